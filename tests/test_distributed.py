"""Many processes and faults: the same run whatever the layout, resumed under another, and nothing lost.

Most processes here are forks of a server that has imported torch once (multiprocessing's forkserver), given the
environment that torchrun would give them: a run takes half a second. The launcher itself is tested at the end.
"""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import read_lines
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import data
import distill
import model
from data import TokenBins, UserError, file_sha256, run_program, write_text
from distill import checkpoints, resolve_config, train
from model import GPT, GPTConfig
from sample_mixture import MixtureSampler

ROOT = Path(__file__).parent.parent
NAMES = ["letters", "digits", "signs"]
TIMEOUT = 120  # seconds after which something hangs

# 12 windows divide by 1, 2 and 3 processes. 7 validation windows by neither: two processes with micro-batches of 3 take
# 6 and 1, three with 2 the same, so that one process and then two have none of the last.
GIVEN = dict(student="scratch:2x32", block_size=16, batch_size=12, val_samples=7, interval=5, max_steps=20, lr=3e-3,
             min_lr=3e-4, warmup_steps=2, save_every=10, keep=0, device="cpu", timeout=1)


@pytest.fixture(scope="module")
def given(data_dir, teacher):
    return {**GIVEN, "data_dir": str(data_dir), "teacher": str(teacher)}


# ----------------------------------------------- What a process does -----------------------------------------------


def start_process(folder: Path, rank: int, world: int, port: int, threads: int = 1):
    """Make this fork what torchrun makes of a process, and send what it prints to `folder`."""
    torch.set_num_threads(threads)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(os.open(folder / f"{stream.name.strip('<>')}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if world:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextmanager
def happening(event: dict, rank: int, folder: Path | None = None):
    """What befalls a run, on the rank that `event` names, or all: {what, rank, at, …}."""
    what, mine = event.get("what"), event.get("rank", rank) == rank

    def act():
        if not mine:
            return
        if "raise" in what:
            raise UserError("the disk is gone")
        if what == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (event["room"], event["room"]))
        elif what == "pause":  # until the test says go, or any signal comes
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer)
            write_text(folder / f"paused.{rank}", str(os.getpid()))
            while not (folder / f"go.{rank}").exists() and not select.select([reader], [], [], 0.02)[0]:
                pass
        else:
            for _ in range(event.get("times", 1)):
                os.kill(os.getpid(), event.get("signal", signal.SIGTERM))

    if what in ("signal", "raise", "full disk", "pause"):  # while the update after `at` finished ones is made
        original = distill.learning_rate
        with patch("distill.learning_rate", lambda step, config: (
                act() if step == event["at"] else None, original(step, config))[1]):
            yield
    elif what in ("evaluation", "evaluation raises"):  # after the second batch of evaluation number `at` of a `role`
        original, evaluations = distill.perplexities, iter(range(10**6))

        def perplexities(gpt, *arguments):
            student, batches = next(gpt.parameters()).requires_grad, iter(range(10**6))
            due = student == (event["role"] == "student") and next(evaluations) == event["at"]

            def stopped():
                if due and next(batches) == 1:
                    act()
                return arguments[-1]()
            return original(gpt, *arguments[:-1], stopped)
        with patch("distill.perplexities", perplexities):
            yield
    elif what == "not finite":  # the loss of update `at`
        original, step = distill.distillation_loss, iter(range(10**6))

        def loss(hidden, *arguments, **keywords):
            losses = original(hidden, *arguments, **keywords)
            if torch.is_grad_enabled() and next(step) == event["at"] and mine:
                losses = tuple(part * float("nan") for part in losses)
            return losses
        with patch("distill.distillation_loss", loss):
            yield
    elif what == "kill in a save":  # before call number `at` of those that write a checkpoint
        calls = iter(range(10**6))

        def counted(function):
            def call(*arguments, **keywords):
                saving = "save_checkpoint" in {frame.name for frame in traceback.extract_stack()}
                if saving and next(calls) == event["at"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)
            return call
        with ExitStack() as stack:
            for owner, name in ((shutil, "rmtree"), (GPT, "save_pretrained"), (torch, "save"), (os, "replace"),
                                (os, "fsync"), (distill, "file_sha256")):
                stack.enter_context(patch.object(owner, name, counted(getattr(owner, name))))
            yield
    else:
        yield


def do_job(rank: int, job: dict) -> dict:
    """One run of distill.train; what came of it, and what can only be seen from inside."""
    seen = {"windows": [], "models": {}, "rotary": set()}
    spread, train_windows, rotate = distill.spread, TokenBins.train_windows, model.rotate

    def spread_seen(gpt, config, device, shard):
        spread(gpt, config, device, shard)
        parameters = list(gpt.parameters())
        role = "student" if parameters[0].requires_grad else "teacher"
        seen["models"][role] = {
            "fsdp": all(isinstance(part, FSDPModule) for part in [*gpt.layers, gpt]),
            "sharded": all(isinstance(p, DTensor) for p in parameters), "dtype": str(parameters[0].dtype),
            "elements": sum(p.numel() for p in parameters),
            "here": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)}

    def windows_seen(bins, domain_ids, window_ids):
        seen["windows"].append([domain_ids.tolist(), window_ids.tolist()])
        return train_windows(bins, domain_ids, window_ids)

    def rotate_seen(x, cos, sin):
        seen["rotary"] |= {str(cos.dtype), str(sin.dtype)}
        return rotate(x, cos, sin)

    with (patch("distill.spread", spread_seen), patch.object(TokenBins, "train_windows", windows_seen),
          patch("model.rotate", rotate_seen), happening(job.get("event", {}), rank)):
        try:
            outcome = distill.train(resolve_config(**job["given"])).name
        except UserError as error:
            outcome = str(error)
        except SystemExit as stop:
            outcome = stop.code
    saved = checkpoints(Path(job["given"]["out_dir"]))
    return {**seen, "rotary": sorted(seen["rotary"]), "outcome": outcome,
            "evaluated": distill.read_state(saved[-1]).evaluated if saved else None}


def do_jobs(folder: Path, rank: int, world: int, port: int, jobs: list[dict]):
    """Runs one after the other in one process group."""
    start_process(folder, rank, world, port)
    with distill.process_group(resolve_config(**jobs[0]["given"])):
        for job in jobs:
            result = do_job(rank, job)
            (folder / f"{job['name']}.{rank}.json").write_text(json.dumps(result))


def do_main(folder: Path, rank: int, world: int, port: int, words: list[str], event: dict):
    """`python distill.py` with these arguments."""
    start_process(folder, rank, world, port)
    sys.argv = ["distill.py", *words]
    with happening(event, rank, folder):
        run_program(distill.main)


# ----------------------------------------------- Starting them -----------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Where processes come from: forks of a server that has imported this file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the latter takes a while, and is imported late
    with patch.dict(os.environ, PYTHONPATH=f"{ROOT / 'tests'}:{ROOT}", OMP_NUM_THREADS="1"):
        context.Process(target=int).start()  # starts the server too
    return context


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait(running: list) -> list[int]:
    """Exit statuses; −n if signal n ended the process. Fails if they hang."""
    deadline = time.monotonic() + TIMEOUT
    for process in running:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [process for process in running if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, "processes hang"
    return [process.exitcode for process in running]


def begin(processes, folder: Path, target, *arguments, world: int = 0) -> list:
    """Start `world` processes as torchrun would, or one without it if 0."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running = [processes.Process(target=target, args=(folder, rank, world, port, *arguments), daemon=True)
               for rank in range(max(1, world))]
    for process in running:
        process.start()
    return running


def wait_for(path: Path):
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def words(given: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in given.items()]


def launch(processes, folder: Path, given: dict, event: dict | None = None, world: int = 0) -> tuple[list, str, str]:
    """distill.py to its end: exit statuses, rank 0's stdout, all stderr."""
    statuses = wait(begin(processes, folder, do_main, words(given), event or {}, world=world))
    return statuses, (folder / "stdout.0").read_text(), "".join(
        (folder / f"stderr.{rank}").read_text() for rank in range(max(1, world)))


# ----------------------------------------------- Layouts -----------------------------------------------------------

BF16 = dict(dtype="bfloat16", student="untied")
LAYOUTS = {  # name: (processes, keys, the run of one process that it equals)
    "ddp2": (2, dict(parallel="ddp"), "one"),
    "ddp2, recomputed in micro-batches": (2, dict(parallel="ddp", checkpoint_activations=True, micro_batch_size=3),
                                          "one"),
    "ddp2, untied": (2, dict(parallel="ddp", student="untied", micro_batch_size=2), "one, untied"),
    "ddp2, muon": (2, dict(parallel="ddp", optimizer="muon"), "one, muon"),
    "ddp2, ted": (2, dict(parallel="ddp", method="ted", micro_batch_size=3), "one, ted"),
    "ddp2, doremi": (2, dict(parallel="ddp", method="doremi_proxy", micro_batch_size=3), "one, doremi"),
    "fsdp2, doremi": (2, dict(parallel="fsdp", method="doremi_proxy"), "one, doremi"),
    "ddp2, bfloat16": (2, dict(parallel="ddp", **BF16), "one, bfloat16"),
    "fsdp2": (2, dict(parallel="fsdp"), "one"),
    "fsdp2, recomputed in micro-batches": (2, dict(parallel="fsdp", checkpoint_activations=True, micro_batch_size=3),
                                           "one"),
    "fsdp2, untied, whole teacher": (2, dict(parallel="fsdp", student="untied", shard_teacher=False), "one, untied"),
    "fsdp2, bfloat16": (2, dict(parallel="fsdp", **BF16), "one, bfloat16"),
    "auto3": (3, dict(), "one"),
    "fsdp3": (3, dict(parallel="fsdp", micro_batch_size=2), "one"),
}
ALONE = {"one": {}, "one, untied": dict(student="untied"), "one, muon": dict(optimizer="muon"), "one, bfloat16": BF16,
         "one, ted": dict(method="ted"), "one, doremi": dict(method="doremi_proxy")}
STOPS = {  # between two evaluations, just before one (which is then cut short), in one, in the last
    "at 7": dict(what="signal", at=6, rank=1, signal=signal.SIGUSR1),
    "at 10": dict(what="signal", at=9, rank=0, signal=signal.SIGTERM),
    "in an evaluation": dict(what="evaluation", role="student", at=2, rank=1, signal=signal.SIGTERM),
    "in the last evaluation": dict(what="evaluation", role="student", at=4, rank=0, signal=signal.SIGINT),
}
STOPPED = [(layout, stop) for layout in ("ddp2", "fsdp2") for stop in STOPS]
CHAIN = [(2, "fsdp", 6), (3, "fsdp", 10), (2, "ddp", 14), (0, "auto", None)]  # processes, parallel, stopped at


@pytest.fixture(scope="module")
def runs(processes, given, teacher, tmp_path_factory):
    """All runs that this file compares, made by four groups of processes: name → (out_dir, what each rank saw)."""
    folder = tmp_path_factory.mktemp("layouts")
    untied = folder / "untied"
    shutil.copytree(teacher, untied)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        sizes = distill.replace(GPTConfig.scratch(2, 32, 257, 64), tie_word_embeddings=False)
        GPT(sizes).save_pretrained(untied)

    def own_bins(name: str) -> str:
        """Bins beside which no teacher was measured yet."""
        ignore = shutil.ignore_patterns("teacher_ppl.json")
        return str(shutil.copytree(given["data_dir"], folder / f"bins of {name}", ignore=ignore, dirs_exist_ok=True))

    def job(name: str, event: dict | None = None, out_dir: str = "", bins: str = "", **keys) -> dict:
        keys = {**given, "data_dir": own_bins(bins or name), **keys, "out_dir": str(folder / (out_dir or name))}
        keys["student"] = str(untied) if keys["student"] == "untied" else keys["student"]
        return {"name": name, "given": keys, "event": event or {}}

    def chain(number: int) -> dict:
        _, parallel, stop = CHAIN[number]
        event = dict(what="signal", at=stop and stop - 1, rank=0) if stop else {}
        return job(f"chain {number}", event, "chain", "chain", parallel=parallel)

    groups = [(0, [job(name, **keys) for name, keys in ALONE.items()])]
    for world in (2, 3):
        groups.append((world, [job(name, **keys) for name, (n, keys, _) in LAYOUTS.items() if n == world]))
    for layout, stop in STOPPED:
        keys = LAYOUTS[layout][1]
        out_dir = f"{layout} stopped {stop}"
        groups[1][1].append(job(out_dir, STOPS[stop], out_dir, layout, **keys))
        groups[1][1].append(job(f"{layout} resumed {stop}", {}, out_dir, layout, **keys))
    in_teacher = dict(what="evaluation", role="teacher", at=0, rank=1)
    groups[1][1].append(job("teacher stopped", in_teacher, "teacher", "teacher", parallel="fsdp"))
    groups[1][1].append(job("teacher resumed", {}, "teacher", "teacher", parallel="fsdp"))
    for parallel in ("ddp", "fsdp"):
        event = dict(what="not finite", at=12, rank=1)
        groups[1][1].append(job(f"{parallel} not finite", event, parallel=parallel))
    groups[1][1].append(chain(0))
    groups[2][1].append(chain(1))
    groups += [(2, [chain(2)]), (0, [chain(3)])]

    made = {}
    for number, (world, jobs) in enumerate(groups):
        statuses = wait(begin(processes, folder / f"group {number}", do_jobs, jobs, world=world))
        stderr = "".join(path.read_text() for path in (folder / f"group {number}").glob("stderr.*"))
        assert statuses == [0] * max(1, world), stderr
        assert stderr == ""
        for job in jobs:
            ranks = [json.loads((folder / f"group {number}" / f"{job['name']}.{rank}.json").read_text())
                     for rank in range(max(1, world))]
            made[job["name"]] = Path(job["given"]["out_dir"]), ranks
    return made


def assert_close(out_dir: Path, other: Path, within: float = 1e-5):
    """Losses, gradient norms, perplexities and r of two runs."""
    lines, others = read_lines(out_dir), read_lines(other)
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in others]
    assert sum(line["kind"] == "train" for line in lines) == 20
    for a, b in zip(lines[1:], others[1:]):
        for key in a.keys() & {"loss", "ce", "kl", "grad_norm", "lr"}:
            assert b[key] == pytest.approx(a[key], rel=within, abs=within)
        for key in ("step", "tokens", "t"):
            assert a.get(key) == b.get(key)
        assert a.get("r", {}) == pytest.approx(b.get("r", {}), abs=within)
        for name in a.get("domains", {}):
            assert a["domains"][name] == pytest.approx(b["domains"][name], rel=within)


def joined(ranks: list[dict]) -> list:
    """The batches that the ranks asked for, each put together again."""
    return [[sum((part[i] for part in parts), []) for i in range(2)]
            for parts in zip(*(rank["windows"] for rank in ranks), strict=True)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_is_the_same_training(runs, name):
    world, _, reference = LAYOUTS[name]
    (out_dir, ranks), (alone, (one,)) = runs[name], runs[reference]
    assert {rank["outcome"] for rank in ranks} == {one["outcome"]} == {"step_00000020"} and len(ranks) == world
    assert all(len(rank["windows"][0][0]) == 12 // world for rank in ranks)
    assert joined(ranks) == one["windows"] and len(one["windows"]) == 20 + 2 * (reference == "one, ted")  # its filters
    # Promised within 1e-4. Muon makes its updates orthogonal in bfloat16, which makes more of a difference in rounding.
    assert_close(out_dir, alone, 5e-3 if "bfloat16" in name else 1e-3 if "muon" in name else 1e-5)


def test_the_validation_windows_divide_by_no_number_of_ranks_and_some_ranks_have_none():
    for world, batch in ((2, 6), (2, 3), (2, 2), (3, 4), (3, 2)):
        assert GIVEN["val_samples"] % (world * batch) and GIVEN["val_samples"] % world
    assert GIVEN["val_samples"] % (2 * 3) < 2 and GIVEN["val_samples"] % (3 * 2) < 2  # in the last batch


def test_the_first_perplexities_are_the_same_whatever_the_layout(runs):
    for name, (_, _, reference) in LAYOUTS.items():
        if "bfloat16" not in name:
            first, alone = (read_lines(runs[run][0], "mixture")[0]["domains"] for run in (name, reference))
            for domain in NAMES:
                assert first[domain] == pytest.approx(alone[domain], rel=5e-6)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "auto3"])
def test_fsdp_shards_all_parameters_and_ddp_none(runs, name):
    world, keys, reference = LAYOUTS[name]
    whole = runs[reference][1][0]["models"]
    for rank in runs[name][1]:
        for role in ("student", "teacher"):
            seen, shards = rank["models"][role], keys["parallel"] == "fsdp"
            shards = shards and (role == "student" or keys.get("shard_teacher", True))
            assert (seen["fsdp"], seen["sharded"]) == (shards, shards)
            assert seen["elements"] == whole[role]["elements"]
            # The odd row out of 257, and norms of 32 over 3 ranks, make shares uneven.
            assert seen["here"] == pytest.approx(seen["elements"] / (world if shards else 1), rel=0.05)
            assert seen["dtype"] == ("torch.bfloat16" if role == "teacher" and "bfloat16" in name else "torch.float32")


def test_auto_takes_ddp_on_cpus(runs):
    assert not any(rank["models"]["student"]["sharded"] for rank in runs["auto3"][1])


def test_rotary_tables_stay_float32_under_fsdp_in_bfloat16(runs):
    assert all(rank["rotary"] == ["torch.float32"] for rank in runs["fsdp2, bfloat16"][1])
    fsdp, alone = ([line["loss"] for line in read_lines(runs[name][0], "train")]
                   for name in ("fsdp2, bfloat16", "one, untied"))
    assert fsdp != alone and fsdp == pytest.approx(alone, rel=0.02)  # it was bfloat16, and close to float32


def test_doremis_three_runs_in_two_processes(processes, given, tmp_path):
    keys = {**given, "method": "cpt_doremi", "max_steps": 4, "interval": 2, "out_dir": str(tmp_path / "run")}
    statuses, out, err = launch(processes, tmp_path, keys, world=2)
    assert statuses == [0, 0] and err == "" and "DoReMi's mixture: letters=" in out
    assert [checkpoints(tmp_path / f"run{name}")[-1].name for name in ("", "-reference", "-proxy")] == [
        "step_00000004"] * 3


# ----------------------------------------------- Resuming ----------------------------------------------------------


def assert_same_to_the_bit(out_dir: Path, other: Path):
    """Metrics (times aside), and all files of the last checkpoint."""
    assert read_lines(out_dir)[1:] == read_lines(other)[1:]  # all but the configuration's out_dir
    folder, other_folder = checkpoints(out_dir)[-1], checkpoints(other)[-1]
    assert folder.name == other_folder.name
    assert {path.name for path in folder.iterdir()} == {path.name for path in other_folder.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (other_folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("layout, stop", STOPPED)
def test_stopped_and_resumed_under_one_layout_equals_straight_to_the_bit(runs, layout, stop):
    out_dir, ranks = runs[f"{layout} stopped {stop}"]
    number = STOPS[stop]["signal"]
    assert [rank["outcome"] for rank in ranks] == [128 + number] * 2  # one got the signal, both stop
    steps = {"at 7": 7, "at 10": 10, "in an evaluation": 10, "in the last evaluation": 20}
    assert len(ranks[0]["windows"]) in (steps[stop], steps[stop] + 1)  # one may be read ahead
    assert ranks[0]["evaluated"] == {"in the last evaluation": 15}.get(stop, 5)
    _, resumed = runs[f"{layout} resumed {stop}"]
    assert {rank["outcome"] for rank in resumed} == {"step_00000020"}
    straight = joined(runs[layout][1])
    assert joined(ranks)[:steps[stop]] + joined(resumed) == straight
    assert_same_to_the_bit(out_dir, runs[layout][0])


def test_stopped_while_the_teacher_is_measured(runs):
    out_dir, ranks = runs["teacher stopped"]
    assert [rank["outcome"] for rank in ranks] == [128 + signal.SIGTERM] * 2 and not ranks[0]["windows"]
    assert_same_to_the_bit(out_dir, runs["fsdp2"][0])


def test_a_run_goes_on_under_any_other_layout(runs):
    """Two processes of fsdp, three of fsdp, two of ddp, one."""
    windows = []
    for number, (world, _, stop) in enumerate(CHAIN):
        out_dir, ranks = runs[f"chain {number}"]
        assert {rank["outcome"] for rank in ranks} == {128 + signal.SIGTERM if stop else "step_00000020"}
        drawn = joined(ranks)
        windows += drawn[:stop - CHAIN[number - 1][2] if number else stop] if stop else drawn
    assert windows == runs["one"][1][0]["windows"]
    assert_close(out_dir, runs["one"][0])


# ----------------------------------------------- A loss that is not finite -----------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(runs, parallel):
    out_dir, (one, two) = runs[f"{parallel} not finite"]
    assert re.match(r"step 12: loss nan, gradient norm .*on windows of letters, digits, signs\. The update was not ",
                    one["outcome"])
    assert two["outcome"] == 2
    assert [folder.name for folder in checkpoints(out_dir)] == ["step_00000010"]
    assert [line["step"] for line in read_lines(out_dir, "train")] == list(range(1, 13))


# ----------------------------------------------- Faults of one process ---------------------------------------------

SHORT = dict(interval=4, max_steps=8, save_every=2, batch_size=4, val_samples=2)


@pytest.fixture(scope="module")
def straight(processes, given, tmp_path_factory) -> Path:
    """A short run that nothing befell."""
    out_dir = tmp_path_factory.mktemp("straight") / "run"
    assert launch(processes, out_dir.parent / "printed", {**given, **SHORT, "out_dir": out_dir})[0] == [0]
    return out_dir


@pytest.fixture
def start(processes, given, tmp_path):
    """Runs distill.py on tmp_path/run: launch's result."""
    def start(event: dict | None = None, world: int = 0, **keys):
        return launch(processes, tmp_path / "printed", {**given, **SHORT, "out_dir": tmp_path / "run", **keys}, event,
                      world)
    return start


def whole_checkpoints(out_dir: Path) -> list[int]:
    return [int(folder.name[-8:]) for folder in checkpoints(out_dir) if not distill.damage(folder)]


def last_step(out_dir: Path) -> int:
    """Finished updates by the metrics, of which a killed run may have torn the last line."""
    path = out_dir / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines(True) if line.endswith("\n")] if (
        path.exists()) else []
    return max(steps, default=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_ends_with_128_and_its_number(start, straight, tmp_path, number):
    statuses, out, err = start(dict(what="signal", at=2, rank=0, signal=number))
    assert (statuses, err) == ([128 + number], "")
    assert f"stopped by {number.name}, saved as step_00000003" in out
    assert whole_checkpoints(tmp_path / "run") == [2, 3]
    assert start()[0] == [0]
    assert_same_to_the_bit(tmp_path / "run", straight)


def test_a_second_ctrl_c_exits_at_once(start, tmp_path):
    statuses, out, err = start(dict(what="signal", at=2, rank=0, signal=signal.SIGINT, times=2))
    assert (statuses, err) == ([130], "") and "saved as" not in out
    assert whole_checkpoints(tmp_path / "run") == [2] and last_step(tmp_path / "run") == 2


def test_killed_before_any_call_of_a_save_a_run_keeps_the_checkpoint_before(start, straight, tmp_path):
    """Start number n is killed before the n-th of the calls that write its checkpoints, until one gets through."""
    for at in itertools.count():
        statuses, out, err = start(dict(what="kill in a save", at=at, rank=0))
        if statuses == [0]:
            break
        assert (statuses, err) == ([-signal.SIGKILL], "")
        assert max(whole_checkpoints(tmp_path / "run"), default=0) >= (last_step(tmp_path / "run") - 1) // 2 * 2
    assert at > 20 and "going on from step_0000000" in out and "set aside" not in out
    assert_same_to_the_bit(tmp_path / "run", straight)
    assert not list((tmp_path / "run").glob("*.tmp"))


def kill_at_random(processes, given: dict, straight: Path, folder: Path, kills: int, seed: int):
    rng, keys = random.Random(seed), {**given, **SHORT, "out_dir": folder / "run"}
    started = time.monotonic()
    assert launch(processes, folder / "timed", {**keys, "out_dir": folder / "timed run"})[0] == [0]
    duration = time.monotonic() - started
    for _ in range(kills):
        (process,) = begin(processes, folder / "printed", do_main, words(keys), {})
        time.sleep(rng.uniform(0.1, 0.9) * duration)
        process.kill()
        wait([process])
        assert (folder / "printed" / "stderr.0").read_text() == ""
        assert max(whole_checkpoints(folder / "run"), default=0) >= (last_step(folder / "run") - 1) // 2 * 2
        if whole_checkpoints(folder / "run")[-1:] == [8]:  # done: again from the start
            shutil.rmtree(folder / "run")
    assert launch(processes, folder / "printed", keys)[0] == [0]
    assert "set aside" not in (folder / "printed" / "stdout.0").read_text()
    assert_same_to_the_bit(folder / "run", straight)


def test_killed_at_random_moments_a_run_loses_nothing(processes, given, straight, tmp_path):
    kill_at_random(processes, given, straight, tmp_path, kills=20, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_a_hundred_times_more_a_run_loses_nothing(processes, given, straight, tmp_path, seed):
    kill_at_random(processes, given, straight, tmp_path, kills=20, seed=seed)


@pytest.mark.parametrize("room", [30_000, 200_000], ids=["for no weights", "for no optimizer"])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(start, straight, tmp_path, room):
    folder = tmp_path / "run" / "step_00000004"
    statuses, out, err = start(dict(what="full disk", at=3, rank=0, room=room))
    assert statuses == [2]
    assert re.fullmatch(rf"error: {folder}: cannot be saved \(.+\); make room, and the same command goes on .*\n", err)
    assert whole_checkpoints(tmp_path / "run") == [2] and not list((tmp_path / "run").glob("*.tmp"))
    statuses, out, err = start()
    assert statuses == [0] and "going on from step_00000002" in out
    assert_same_to_the_bit(tmp_path / "run", straight)


@pytest.mark.parametrize("world", [0, 2])
def test_a_second_run_on_the_same_folder_is_refused_and_the_first_unharmed(
        processes, given, straight, tmp_path, world):
    keys = {**given, **SHORT, "out_dir": tmp_path / "run"}
    first = begin(processes, tmp_path / "first", do_main, words(keys), dict(what="pause", at=2), world=world)
    wait_for(tmp_path / "first" / "paused.0")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for second in ({}, {"resume": "never"}, {"resume": "never", "lr": 1e-3}):
        statuses, _, err = launch(processes, tmp_path / "second", {**keys, **second})
        assert statuses == [2]
        assert err.startswith(f"error: {tmp_path / 'run'}: another run is at work there; ") and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for rank in range(max(1, world)):
        (tmp_path / "first" / f"go.{rank}").touch()
    assert wait(first) == [0] * max(1, world)
    if not world:
        assert_same_to_the_bit(tmp_path / "run", straight)
    assert checkpoints(tmp_path / "run")[-1].name == "step_00000008" and not (tmp_path / "run.1").exists()


# ----------------------------------------------- Faults of one among several ---------------------------------------

GONE = r"error: another process is gone, or silent for .* minutes \(.*\); the same command goes on from the last check"


@pytest.mark.parametrize("parallel, event, message", [
    ("fsdp", dict(what="signal", at=4, rank=1, signal=signal.SIGKILL), None),
    ("ddp", dict(what="signal", at=4, rank=0, signal=signal.SIGKILL), None),
    ("fsdp", dict(what="evaluation", role="student", at=1, rank=1, signal=signal.SIGKILL), None),
    ("fsdp", dict(what="raise", at=4, rank=1), "rank 1: error: the disk is gone"),
    ("ddp", dict(what="evaluation raises", role="student", at=1, rank=1), "rank 1: error: the disk is gone"),
], ids=str)
def test_a_rank_that_ends_ends_the_others(start, tmp_path, parallel, event, message):
    """Without torchrun, which would help."""
    other = 1 - event["rank"]
    statuses, _, err = start(event, world=2, parallel=parallel)
    assert statuses[event["rank"]] in ((-signal.SIGKILL,) if message is None else (2, -signal.SIGABRT))
    assert statuses[other] in (2, -signal.SIGABRT)  # gloo's threads sometimes abort a process that ends
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 + (message is not None) and "Traceback" not in err
    assert sum(bool(re.search(("" if other == 0 else f"rank {other}: ") + GONE, line)) for line in lines) == 1
    assert message is None or message in lines
    done = [2] if "evaluation" in event["what"] else [2, 4]
    assert whole_checkpoints(tmp_path / "run") == done and not list((tmp_path / "run").glob("*.tmp"))
    statuses, out, _ = start(world=2, parallel=parallel)
    assert statuses == [0, 0] and f"going on from step_{done[-1]:08d}" in out


def test_a_rank_that_hangs_is_given_up_on(processes, given, tmp_path):
    keys = {**given, **SHORT, "out_dir": tmp_path / "run", "timeout": 0.1}
    waits, hangs = begin(processes, tmp_path, do_main, words(keys), dict(what="pause", at=4, rank=1), world=2)
    assert wait([waits])[0] in (2, -signal.SIGABRT)
    hangs.kill()
    assert re.match(GONE, (tmp_path / "stderr.0").read_text())
    assert whole_checkpoints(tmp_path / "run") == [2, 4]


# ----------------------------------------------- torchrun ----------------------------------------------------------


def do_torchrun(folder: Path, rank: int, world: int, port: int, arguments: list[str]):
    """The launcher itself, in a fork that has imported it; what it starts are programs of their own."""
    os.setsid()
    start_process(folder, rank, 0, 0)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    from torch.distributed.run import main as torchrun
    torchrun(["--standalone", "--nproc_per_node=2", *arguments])


class Torchrun:
    """A job of two processes that torchrun starts: this file as a program, and `event` in it."""

    def __init__(self, processes, folder: Path, given: dict, event: dict, *options: str):
        self.folder, self.event = folder, event
        program = [str(Path(__file__)), str(folder), json.dumps(event), *words(given)]
        (self.process,) = begin(processes, folder, do_torchrun, [*options, *program])

    def pids(self) -> list[int]:
        """Of the workers, once they pause."""
        for rank in range(2):
            wait_for(self.folder / f"paused.{rank}")
        return [int((self.folder / f"paused.{rank}").read_text()) for rank in range(2)]

    def end(self) -> tuple[int, list[str]]:
        """(exit status, lines of our errors) after the job's end, of which nothing may be left."""
        (status,) = wait([self.process])
        assert not self.left()
        return status, re.findall(r"(?m)^(?:rank \d+: )?error: .*", (self.folder / "stderr.0").read_text())

    def left(self) -> list[bytes]:
        """Command lines of this job's processes."""
        commands = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                commands.append((process / "cmdline").read_bytes())
            except OSError:  # ended meanwhile
                pass
        return [command for command in commands if str(self.folder).encode() in command]


@pytest.fixture
def torchrun(processes, given, tmp_path):
    def torchrun(event: dict, *options: str, **keys) -> Torchrun:
        return Torchrun(processes, tmp_path / "printed", {**given, **SHORT, "out_dir": tmp_path / "run", **keys}, event,
                        *options)
    return torchrun


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(torchrun, start, straight, tmp_path):
    job = torchrun(dict(what="pause", at=4), parallel="ddp")
    job.pids()
    os.kill(job.process.pid, signal.SIGTERM)
    status, errors = job.end()
    assert status != 0 and errors == []
    assert "stopped by SIGTERM, saved as step_00000005" in (tmp_path / "printed" / "stdout.0").read_text()
    assert whole_checkpoints(tmp_path / "run") == [2, 4, 5] and last_step(tmp_path / "run") == 5
    start(world=2, parallel="ddp", out_dir=tmp_path / "never stopped")
    assert start(world=2, parallel="ddp")[0] == [0, 0]
    assert_same_to_the_bit(tmp_path / "run", tmp_path / "never stopped")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_other_signals_to_torchrun_save_too(torchrun, tmp_path, number):
    """As a scheduler sends SIGUSR1, and a terminal Ctrl-C: to all of torchrun's process group."""
    job = torchrun(dict(what="pause", at=4), "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
    job.pids()
    os.killpg(job.process.pid, number)
    status, errors = job.end()
    assert status != 0 and errors == []
    assert f"stopped by {number.name}, saved as step_00000005" in (tmp_path / "printed" / "stdout.0").read_text()
    assert whole_checkpoints(tmp_path / "run") == [2, 4, 5]


def test_what_torchrun_leaves_behind_saves_and_ends(torchrun, tmp_path):
    """It is killed, as SIGUSR1 does too if it is not told to handle that."""
    job = torchrun(dict(what="pause", at=4), parallel="fsdp")
    job.pids()
    job.process.kill()
    assert wait([job.process]) == [-signal.SIGKILL] and len(job.left()) == 2
    for rank in range(2):
        (tmp_path / "printed" / f"go.{rank}").touch()
    deadline = time.monotonic() + TIMEOUT
    while job.left():
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    assert "stopped by SIGTERM, saved as step_00000005" in (tmp_path / "printed" / "stdout.0").read_text()
    assert whole_checkpoints(tmp_path / "run") == [2, 4, 5]


def test_a_killed_rank_ends_the_job_without_a_false_save(torchrun, start, tmp_path):
    job = torchrun(dict(what="pause", at=4), parallel="fsdp")
    os.kill(job.pids()[1], signal.SIGKILL)
    status, errors = job.end()
    assert status != 0 and len(errors) == 1 and re.match(GONE, errors[0])
    assert whole_checkpoints(tmp_path / "run") == [2, 4] and not list((tmp_path / "run").glob("*.tmp"))
    statuses, out, _ = start(world=2, parallel="fsdp")
    assert statuses == [0, 0] and "going on from step_00000004" in out


def test_an_id_that_only_rank_1_reads_ends_the_job_and_names_the_bin(torchrun, given, tmp_path):
    bins = shutil.copytree(given["data_dir"], tmp_path / "bins")
    sampler = MixtureSampler(TokenBins(bins, 16).n_windows, SHORT["batch_size"], 0)
    for _ in range(3):
        domain_ids, window_ids = sampler.next_batch()
    name, window = NAMES[domain_ids[-1]], int(window_ids[-1])
    with open(bins / f"{name}.train.bin", "r+b") as file:
        file.seek(2 * (16 * window + 5))  # within this window alone
        file.write((999).to_bytes(2, "little"))
    status, errors = torchrun({}, data_dir=bins).end()
    assert status != 0
    (error,) = [error for error in errors if error.startswith("rank 1: ")]
    assert f"{bins}/{name}.train.bin: holds the id 999; the tokenizer has 257 ids" in error
    assert all(re.match(GONE, other) for other in errors if other != error)
    assert last_step(tmp_path / "run") <= 2 and whole_checkpoints(tmp_path / "run") in ([], [2])


def test_a_mistake_is_told_once_by_the_program_itself_under_torchrun(given, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "distill.py"]
    result = subprocess.run([*command, *words({**given, "out_dir": tmp_path / "run", "val_samples": 10**6})], cwd=ROOT,
                            capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode == 1 and [error.partition(": domain")[0] for error in errors] == [
        "error: --val_samples=1000000"]
    assert result.stdout.count("val_samples = 1000000") == 1  # the configuration is printed once, too
    assert not (tmp_path / "run").exists()


# ----------------------------------------------- Configuration -----------------------------------------------------


@pytest.mark.parametrize("environment, arguments, message", [
    (dict(RANK="0", WORLD_SIZE="3"), ["--batch_size=8"],
     "--batch_size=8: must be a multiple of micro_batch_size=1 × 3 processes"),
    (dict(RANK="0", WORLD_SIZE="2"), ["--batch_size=12", "--micro_batch_size=4"],
     "--batch_size=12: must be a multiple of micro_batch_size=4 × 2 processes"),
    (dict(RANK="0", WORLD_SIZE="2"), ["--parallel=none"], "--parallel=none: there are 2 processes; take ddp or fsdp"),
    (dict(RANK="0", WORLD_SIZE="2"), ["--parallel=fsdp", "--optimizer=muon"],
     "--optimizer=muon: not with fsdp; take ddp"),
    ({}, ["--parallel=fsdp"], "--parallel=fsdp: start with torchrun --nproc_per_node=N distill.py"),
    (dict(WORLD_SIZE="2"), ["--parallel=ddp"], "--parallel=ddp: start with torchrun --nproc_per_node=N distill.py"),
])
def test_what_contradicts_the_processes_is_refused_by_rank_0_first(
        run_main, given, tmp_path, monkeypatch, environment, arguments, message):
    for rank in ("0", "1")[:1 + ("RANK" in environment)]:
        for key, value in {**environment, **({"RANK": rank} if "RANK" in environment else {})}.items():
            monkeypatch.setenv(key, value)
        status, out, err = run_main(distill, *words({**given, "out_dir": tmp_path / "run"}), *arguments)
        # Rank 1 waits a second, in which torchrun ends it, so that a mistake is told once.
        assert (status, out, err) == (2, "", f"{'' if rank == '0' else 'rank 1: '}error: {message}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, sharded", [
    ([], {"teacher", "student"}), (["--shard_teacher=false"], {"student"}), (["--parallel=ddp"], set())], ids=str)
def test_a_dry_run_adds_up_the_memory_of_each_of_many_devices(
        run_main, given, teacher, tmp_path, monkeypatch, arguments, sharded):
    """Of Qwen1.5-14B's sizes, and of four of its layers, on 16 devices: computed here by hand."""
    V, d, ff, GiB = 152_064, 5120, 13_696, 2**30
    big = shutil.copytree(teacher, tmp_path / "big")
    sizes = dict(model_type="qwen2", vocab_size=V, hidden_size=d, num_hidden_layers=40, intermediate_size=ff,
                 head_dim=128, num_attention_heads=40, num_key_value_heads=40, tie_word_embeddings=False)
    (big / "config.json").write_text(json.dumps({**json.loads((big / "config.json").read_text()), **sizes}))
    layer = 4 * d * d + 3 * d * ff + 3 * d + 2 * d  # q, k, v, o; MLP; biases; norms
    outside = 2 * V * d + d
    parameters = {"teacher": 40 * layer + outside, "student": 4 * layer + outside}
    monkeypatch.setenv("WORLD_SIZE", "16")
    status, out, err = run_main(distill, *words({**given, "teacher": big, "student": "layers:4", "batch_size": 32}),
                                "--dtype=bfloat16", "--dry_run", *arguments)
    assert (status, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("memory: ")]
    memory = {part: float(size) for part, size in re.findall(r"(\w+) ([\d.]+)", line.partition(", in all")[0])}
    share = {role: 16 if role in sharded else 1 for role in parameters}
    assert memory["teacher"] == pytest.approx(2 * parameters["teacher"] / share["teacher"] / GiB, abs=0.06)
    for part, width in (("student", 4), ("gradients", 4), ("AdamW", 8)):
        assert memory[part] == pytest.approx(width * parameters["student"] / share["student"] / GiB, abs=0.06)
    # While it computes, a device holds what lies outside the blocks whole, and two blocks
    gathered = sum(2 * (outside + 2 * layer) for _ in sharded) / GiB
    assert memory.pop("gathered", 0) == pytest.approx(gathered, abs=0.06)
    total = float(re.search(r"in all ([\d.]+) GiB on each of 16 devices", line)[1])
    assert total == pytest.approx(sum(memory.values()) + gathered, abs=0.4)
    assert "weights" not in line and "of 16" in out.split("FLOPs: ")[1].splitlines()[0]


# ----------------------------------------------- Bad input ---------------------------------------------------------

# Here: what `python distill.py` says of a bins folder and of a run's folder in which something is wrong. Elsewhere: 14
# bins folders that TokenBins refuses, 12 command lines, 24 models and tokenizers that do not fit (test_data.py,
# test_distill.py), damaged models (test_pretrained.py).


def edit_json(path: Path, change):
    """`change` what is in a file; a value that it returns replaces all of it."""
    content = json.loads(path.read_text())
    replaced = change(content)
    path.write_text(json.dumps(content if replaced is None else replaced))


def meta(change):
    return lambda bins: edit_json(bins / "meta.json", change)


def train_entry(**values):
    return meta(lambda meta: meta["domains"]["digits"]["train"][0].update(values))


def as_dtype(dtype: str, width: int):
    """meta.json calls digits' bins numbers of another type, and their sizes fit."""
    def spoil(bins: Path):
        def change(content: dict):
            domain = content["domains"]["digits"]
            domain["dtype"] = dtype
            for path, entry in ((bins / entry["file"], entry) for entry in (*domain["train"], domain["val"])):
                os.truncate(path, path.stat().st_size // 8 * 8)
                entry["tokens"] = path.stat().st_size // width
        edit_json(bins / "meta.json", change)
    return spoil


def digits(**values):
    return meta(lambda meta: meta["domains"]["digits"].update(values))


def swap(bins: Path):
    for side in ("train", "val"):
        one, two = (bins / f"{name}.{side}.bin" for name in ("letters", "digits"))
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)


BAD_BINS = {
    "truncated": (lambda bins: os.truncate(bins / "digits.train.bin", 1000), "digits.train.bin is not in the"),
    "odd size": (lambda bins: os.truncate(bins / "digits.train.bin", 1001), "digits.train.bin is not in the"),
    "empty": (lambda bins: os.truncate(bins / "signs.val.bin", 0), "signs.val.bin is not in the"),
    "swapped": (swap, ".train.bin is not in the"),
    "half the width": (digits(dtype="uint8"), "a dtype other than uint16 and uint32"),
    "twice the width": (digits(dtype="uint32"), "digits.train.bin is not in the"),
    "read as uint32": (as_dtype("uint32", 4), "digits.val.bin: holds the id "),
    "read as int64": (as_dtype("int64", 8), "a dtype other"),
    "read as float32": (as_dtype("float32", 4), "a dtype other"),
    "read as int16": (as_dtype("int16", 2), "a dtype other"),
    "unknown type": (digits(dtype="float7"), "meta.json: "),
    "other endianness": (lambda bins: [path.write_bytes(np.fromfile(path, "<u2").astype(">u2").tobytes())
                                       for path in bins.glob("*.bin")], ".val.bin: holds the id "),
    "id beyond": (lambda bins: (bins / "letters.val.bin").write_bytes(
        b"\x01\x01" + (bins / "letters.val.bin").read_bytes()[2:]), "letters.val.bin: holds the id 257"),
    "meta not JSON": (lambda bins: (bins / "meta.json").write_text('{"format_version": 1'), "meta.json: "),
    "meta empty": (lambda bins: (bins / "meta.json").write_text(""), "meta.json: "),
    "meta null": (meta(lambda meta: [None]), "meta.json: "),
    "meta missing": (lambda bins: (bins / "meta.json").unlink(), "--data_dir="),
    "meta a folder": (lambda bins: [(bins / "meta.json").unlink(), (bins / "meta.json").mkdir()], "--data_dir="),
    "other version": (meta(lambda meta: meta.update(format_version="1.1")), "format version 1.1, but 1 is known"),
    "no domains": (meta(lambda meta: meta.update(domains={})), "meta.json: "),
    "domains a list": (meta(lambda meta: meta.update(domains=list(meta["domains"]))), "meta.json: "),
    "domain null": (meta(lambda meta: meta["domains"].update(digits=None)), "meta.json: "),
    "no train bins": (digits(train=[]), "no train text that long"),
    "tokens text": (train_entry(tokens="many"), "digits.train.bin is not"),
    "tokens negative": (train_entry(tokens=-2), "digits.train.bin is not"),
    "tokens null": (train_entry(tokens=None), "meta.json: "),
    "file null": (train_entry(file=None), "meta.json: "),
    "file a number": (train_entry(file=3), "meta.json: "),
    "file elsewhere": (train_entry(file="/etc/passwd"), "/etc/passwd is not in the folder"),
    "no hash": (meta(lambda meta: meta["domains"]["digits"]["val"].pop("sha256") and None), "meta.json: "),
    "vocabulary text": (meta(lambda meta: meta["tokenizer"].update(vocab_size="257")), "meta.json: "),
    "vocabulary 0": (meta(lambda meta: meta["tokenizer"].update(vocab_size=0)), "meta.json: "),
    "tokenizer null": (meta(lambda meta: meta.update(tokenizer=None)), "meta.json: "),
}


@pytest.mark.parametrize("spoil, message", BAD_BINS.values(), ids=BAD_BINS)
def test_bad_bins_are_one_message(run_main, given, tmp_path, spoil, message):
    bins = shutil.copytree(given["data_dir"], tmp_path / "bins")
    spoil(bins)
    keys = {**given, **SHORT, "out_dir": tmp_path / "run", "data_dir": bins}
    status, out, err = run_main(distill, *words(keys))
    assert status == 2 and err.startswith("error: ") and message in err and str(bins) in err
    assert err.count("\n") == 1 and len(err) < 600
    assert not (tmp_path / "run").exists() or not checkpoints(tmp_path / "run")


def test_bins_of_one_size_that_are_swapped_are_found_by_verify(run_main, given, tmp_path):
    bins = shutil.copytree(given["data_dir"], tmp_path / "bins")
    sizes = {path.name: path.stat().st_size for path in bins.glob("*.train.bin")}
    for path in bins.glob("*.train.bin"):
        os.truncate(path, min(sizes.values()))
        entry = {"tokens": min(sizes.values()) // 2, "sha256": file_sha256(path)}
        meta(lambda meta: meta["domains"][path.name.split(".")[0]]["train"][0].update(entry))(bins)
    assert run_main(data, f"--verify={bins}")[0] == 0
    (bins / "letters.train.bin").rename(bins / "aside")
    (bins / "digits.train.bin").rename(bins / "letters.train.bin")
    (bins / "aside").rename(bins / "digits.train.bin")
    status, _, err = run_main(data, f"--verify={bins}")
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: {bins}: letters.train.bin, digits.train.bin not as in meta.json; ")


class Hostile:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled").resolve(),)


def resave(name: str, change):
    """Changes the content of a checkpoint's .pt file."""
    def spoil(folder: Path):
        torch.save(change(torch.load(folder / name, weights_only=True)), folder / name)
    return spoil


def state(change):
    return lambda folder: edit_json(folder / "train_state.json", change)


BAD_CHECKPOINTS = {  # with a manifest that fits: not damaged, but made so
    "state not JSON": (lambda folder: (folder / "train_state.json").write_text("{"), "train_state.json"),
    "state a list": (state(lambda state: [1]), "train_state.json"),
    "state of unknown keys": (state(lambda state: state.update(colour=3)), "train_state.json"),
    "state without sampler": (state(lambda state: state.update(sampler=None)), "train_state.json"),
    "sampler of other domains": (state(lambda state: state["sampler"]["probs"].pop("digits") and None),
                                 "train_state.json"),
    "sampler without counts": (state(lambda state: state["sampler"].pop("drawn") and None), "train_state.json"),
    "step text": (state(lambda state: state.update(step="four")), "train_state.json"),
    "step of another folder": (state(lambda state: state.update(step=3)), "train_state.json"),
    "optimizer hostile": (lambda folder: torch.save({"optimizer": Hostile()}, folder / "optimizer.pt"), "optimizer.pt"),
    "optimizer a bare pickle": (lambda folder: (folder / "optimizer.pt").write_bytes(pickle.dumps(Hostile(), 2)),
                                "optimizer.pt"),
    "optimizer not a file of torch's": (lambda folder: (folder / "optimizer.pt").write_bytes(b"moments"),
                                        "optimizer.pt"),
    "optimizer empty": (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "optimizer.pt"),
    "optimizer a list": (resave("optimizer.pt", lambda saved: [1, 2]), "optimizer.pt"),
    "optimizer of nothing": (resave("optimizer.pt", lambda saved: {}), "optimizer.pt"),
    "optimizer of another model": (resave("optimizer.pt", lambda saved: {**saved, "optimizer": {
        **saved["optimizer"], "state": {}}}), "optimizer.pt"),
    "weights of another size": (lambda folder: GPT(GPTConfig.scratch(3, 32, 257, 16)).save_pretrained(folder),
                                "step_00000004"),
    "weights not safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"weights"),
                                "model.safetensors"),
    "config of no model": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
}


@pytest.fixture(scope="module")
def stopped(given, tmp_path_factory) -> Path:
    """The folder of a run that was stopped at step 4."""
    out_dir = tmp_path_factory.mktemp("stopped") / "run"
    with happening(dict(what="signal", at=3), 0), pytest.raises(SystemExit):
        train(resolve_config(**{**given, **SHORT, "out_dir": str(out_dir)}))
    return out_dir


@pytest.fixture
def go_on(run_main, given, stopped, tmp_path, monkeypatch):
    """Runs the same command after `spoil(folder)`: (exit status, stdout, stderr)."""
    def go_on(spoil, folder: str = ""):
        shutil.copytree(stopped, tmp_path / "run")
        spoil(tmp_path / "run" / folder)
        monkeypatch.chdir(tmp_path)
        return run_main(distill, *words({**given, **SHORT, "out_dir": tmp_path / "run"}))
    return go_on


@pytest.mark.parametrize("spoil, named", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_checkpoint_that_no_run_wrote_is_one_message_and_runs_no_code(go_on, tmp_path, monkeypatch, spoil, named):
    def spoil_and_sign(folder):
        spoil(folder)
        files = [path for path in folder.iterdir() if path.name != "manifest.json"]
        (folder / "manifest.json").write_text(json.dumps({path.name: file_sha256(path) for path in files}))
    monkeypatch.chdir(tmp_path)
    status, _, err = go_on(spoil_and_sign, "step_00000004")
    assert not (tmp_path / "unpickled").exists()
    assert status == 2 and err.startswith("error: ") and named in err and "step_00000004" in err
    assert err.count("\n") == 1


BAD_MANIFESTS = {
    "out of its folder": lambda manifest: manifest.update({"../config.json": file_sha256(Path("run/config.json"))}),
    "absolute": lambda manifest: manifest.update({"/etc/passwd": file_sha256(Path("/etc/passwd"))}),
    "its own folder": lambda manifest: manifest.update({"..": None}),
    "a file that is not there": lambda manifest: manifest.update({"more.pt": None}),
    "without the optimizer": lambda manifest: manifest.pop("optimizer.pt") and None,
    "a list": lambda manifest: list(manifest),
    "hashes of hashes": lambda manifest: {name: {"sha256": sha256} for name, sha256 in manifest.items()},
    "another hash": lambda manifest: manifest.update({"optimizer.pt": "0" * 64}),
    "null": lambda manifest: [None],
}


@pytest.mark.parametrize("change", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_manifest_that_does_not_fit_sets_its_checkpoint_aside(go_on, straight, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    status, out, err = go_on(lambda folder: edit_json(folder / "manifest.json", change), "step_00000004")
    assert (status, err) == (0, "")
    assert "step_00000004: " in out and "set aside as corrupt_step_00000004" in out and "from step_00000002" in out
    assert_same_to_the_bit(tmp_path / "run", straight)


def spoil_line(line: str):
    """Puts a line into the middle of metrics.jsonl."""
    def spoil(out_dir: Path):
        lines = (out_dir / "metrics.jsonl").read_bytes().splitlines(True)
        (out_dir / "metrics.jsonl").write_bytes(b"".join([*lines[:2], line.encode("latin-1") + b"\n", *lines[2:]]))
    return spoil


BAD_RUNS = {
    "config not JSON": (lambda run: (run / "config.json").write_text("{"), "config.json: "),
    "config missing": (lambda run: (run / "config.json").unlink(), "config.json: "),
    "config a list": (lambda run: (run / "config.json").write_text("[]"), "config.json: "),
    "config of lists": (lambda run: (run / "config.json").write_text('{"config": [], "content": []}'),
                        "config.json: "),
    "config without content": (lambda run: edit_json(run / "config.json", lambda run: run.pop("content") and None),
                               "config.json: "),
    "config not text": (lambda run: (run / "config.json").write_bytes(b"\xff\xfe"), "config.json: "),
    "a line not JSON": (spoil_line("step 3"), "metrics.jsonl"),
    "a line not text": (spoil_line("\xff\xfe"), "metrics.jsonl"),
    "a line without kind": (spoil_line('{"step": 1}'), "metrics.jsonl"),
    "a line of a list": (spoil_line("[1, 2]"), "metrics.jsonl"),
    "a line whose step is text": (spoil_line('{"kind": "train", "step": "one"}'), "metrics.jsonl"),
    "metrics a folder": (lambda run: [(run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()],
                         "metrics.jsonl"),
}


@pytest.mark.parametrize("spoil, message", BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_runs_folder_that_no_run_wrote_is_one_message(go_on, tmp_path, spoil, message):
    status, _, err = go_on(spoil)
    assert status == 2 and err.startswith("error: ") and message in err and str(tmp_path / "run") in err
    assert err.count("\n") == 1
    assert whole_checkpoints(tmp_path / "run") == [2, 4]  # nothing is lost


@pytest.mark.parametrize("text", ["{", "[1]", "null", "\xff"])
def test_a_spoilt_cache_of_the_teachers_perplexities_is_measured_anew(run_main, given, tmp_path, text):
    bins = shutil.copytree(given["data_dir"], tmp_path / "bins")
    keys = {**given, **SHORT, "data_dir": bins, "max_steps": 0}
    assert run_main(distill, *words({**keys, "out_dir": tmp_path / "one"}))[0] == 0
    cache = bins / "teacher_ppl.json"
    cache.write_bytes(text.encode("latin-1"))
    status, _, err = run_main(distill, *words({**keys, "out_dir": tmp_path / "two"}))
    assert (status, err) == (0, "")
    assert read_lines(tmp_path / "one")[1:] == read_lines(tmp_path / "two")[1:]


# ----------------------------------------------- Metrics for other programs ----------------------------------------


class Sink:
    """Stands for SummaryWriter and for wandb's run: keeps what it is told."""

    def __init__(self, *arguments, **keywords):
        self.made, self.lines, self.closed = (arguments, keywords), [], 0

    def add_scalar(self, key, value, step):
        self.lines.append((step, key, value))

    def log(self, values, step):
        self.lines += [(step, key, value) for key, value in values.items()]

    def close(self):
        self.closed += 1

    finish = close


def test_tensorboard_and_wandb_get_the_numbers_of_every_line_once(given, tmp_path, monkeypatch):
    made = {"tensorboard": [], "wandb": []}

    def maker(name):
        def make(*arguments, **keywords):
            made[name].append(Sink(*arguments, **keywords))
            return made[name][-1]
        return make
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    writer = types.SimpleNamespace(SummaryWriter=maker("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=maker("wandb")))
    config = resolve_config(**{**given, **SHORT, "out_dir": str(tmp_path / "run"), "tensorboard": True, "wandb": True})
    assert config.problems() == []
    with happening(dict(what="signal", at=4), 0), pytest.raises(SystemExit):
        train(config)
    train(config)
    for name, sinks in made.items():
        assert [sink.closed for sink in sinks] == [1, 1], name
        lines = sinks[0].lines + sinks[1].lines
        assert all(isinstance(value, int | float) for _, _, value in lines)
        for key in ("loss", "ce", "kl", "lr", "grad_norm", "tokens"):
            logged = [(step, value) for step, found, value in lines if found == f"train/{key}"]
            assert logged == [(line["step"], line[key]) for line in read_lines(tmp_path / "run", "train")]
        for domain in NAMES:
            expected = [(line["step"], line["r"][domain]) for line in read_lines(tmp_path / "run", "mixture")]
            assert [(step, value) for step, key, value in lines if key == f"{domain}/r"] == expected
            expected = [(line["step"], line["domains"][domain]["student_ppl"]) for line in read_lines(tmp_path / "run")
                        if line["kind"] in ("mixture", "end")]
            assert [(step, value) for step, key, value in lines if key == f"{domain}/student_ppl"] == expected
    assert [sink.made[1]["purge_step"] for sink in made["tensorboard"]] == [1, 6]  # what a resumed run does anew
    first, second = (sink.made[1] for sink in made["wandb"])
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"]["seed"] == 0


def test_a_missing_package_of_a_sink_is_one_message(run_main, given, tmp_path, monkeypatch):
    for name in ("tensorboard", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = run_main(distill, *words({**given, "out_dir": tmp_path / "run"}), "--tensorboard", "--wandb")
    assert (status, out) == (2, "") and not (tmp_path / "run").exists()
    assert re.fullmatch("".join(f"error: --{name}: .*pip install {name}\n" for name in ("tensorboard", "wandb")), err)


if __name__ == "__main__":  # what Torchrun starts: FOLDER EVENT --key=value …
    folder, event = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.argv = ["distill.py", *sys.argv[3:]]
    torch.set_num_threads(1)
    with happening(event, int(os.environ["RANK"]), folder):
        run_program(distill.main)
