"""Many processes and faults: the same run whatever the layout, resumed under another, and nothing lost.

Most processes here are forks of a server that has imported torch once (multiprocessing's forkserver), with the
environment that torchrun would give them: a run takes half a second. The launcher itself is tested further down. Tests
watch a run, and make faults happen, in its training steps: see Watch.
"""

import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import NAMES, assert_same_run, read_lines, words
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import data
import distill
import model as model_program
from data import TokenBins, UserError, run_program
from distill import list_checkpoints, resolve_config, train
from model import GPT, GPTConfig
from sample_mixture import MixtureSampler, read_metrics

ROOT = Path(__file__).parent.parent
TIMEOUT = 300  # seconds after which something hangs

# 1, 2 and 3 processes divide 12 windows, but not 7 validation windows. Two processes with micro-batches of 3 take 6 and
# then 1, and so do three with micro-batches of 2: at the end one process, or two, have no window.
GIVEN = dict(student="scratch:2x32", batch_size=12, val_samples=7, test_samples=5, interval=5, max_steps=20,
             save_every=10, keep=0, timeout=10)
SHORT = dict(interval=4, max_steps=8, save_every=2, batch_size=4, val_samples=2)


@pytest.fixture(scope="module")
def given(tiny):
    return {**tiny, **GIVEN}


# ----------------------------------------------- What a process does -----------------------------------------------


class Watch:
    """Watches a run from inside and causes faults: its `training_step` replaces distill's.

    `event` is {what, at: the number of the update that it comes before, rank: on which (default: on all), …}."""

    def __init__(self, event: dict, rank: int, folder: Path):
        self.original = distill.training_step
        self.event = event
        self.rank = rank
        self.folder = folder
        self.windows = []  # of each step
        self.passes = []  # of the teacher, that FSDP2 keeps a record of before each step
        self.models = {}
        self.rotary = set()  # dtypes that a block gets

    def training_step(self, step, student, teacher, optimizers, windows, *args, config, **kwargs):
        model = getattr(student, "module", student)  # without DDP's wrapper
        if not self.models:
            self.look_at("student", model)
            if teacher is not None:
                self.look_at("teacher", teacher)
            model.layers[0].register_forward_pre_hook(self.look_at_rotary)
        self.windows.append(windows.tolist())
        if isinstance(teacher, FSDPModule):
            context = teacher._get_fsdp_state()._comm_ctx
            self.passes.append(len(getattr(context, "post_forward_order", [])))  # made in the first pass
        if config.compile == "true":
            self.count_graphs()
        if step + 1 == self.event.get("at") and self.event.get("rank", self.rank) == self.rank:
            self.happen(model, config)
        return self.original(step, student, teacher, optimizers, windows, *args, config=config, **kwargs)

    def count_graphs(self):
        """Write how many graphs Dynamo has traced since the first step, and its breaks."""
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # so that too many recompilations are an error
        counters = torch._dynamo.utils.counters
        if len(self.windows) == 1:
            self.graphs_before = counters["stats"]["unique_graphs"]
        counts = [counters["stats"]["unique_graphs"] - self.graphs_before, sum(counters["graph_break"].values())]
        with open(self.folder / f"graphs.{self.rank}", "a") as file:
            print(json.dumps(counts), file=file)

    def look_at(self, role: str, model: GPT):
        modules = [*model.layers, model]
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation some are whole
        parameters = list(model.parameters())
        local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        groups = [group for p in parameters if isinstance(p, DTensor) for group in p.device_mesh.get_all_groups()]
        self.models[role] = {
            "minutes": sorted({group._get_backend(local[0].device).options._timeout.total_seconds() / 60
                               for group in groups}),
            "block by block": all(isinstance(module, FSDPModule) for module in modules),
            "dtypes": sorted({gathered_and_reduced(module) for module in modules if isinstance(module, FSDPModule)}),
            "dtype": str(parameters[0].dtype),
            "elements": sum(p.numel() for p in parameters),
            "here": sum(p.numel() for p in local),
        }

    def look_at_rotary(self, layer, inputs):
        _, rotary, _ = inputs
        self.rotary |= {str(table.dtype) for table in rotary}

    def happen(self, student: GPT, config):
        what = self.event["what"]
        if what == "signal":
            signal.raise_signal(self.event["signal"])
        elif what == "killed in an evaluation":
            student.layers[-1].register_forward_hook(self.kill_in_an_evaluation)
        elif what == "killed in a save":
            kill_before_operation(self.event["operation"], config.out_dir)
        elif what == "full disk":
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.event["room"], most))
        elif what == "not finite":
            distill.distillation_loss = partial(not_finite, distill.distillation_loss)
        elif what == "bug in a save":
            model_program.write_weights = lambda *_: torch.ones(2, 3) @ torch.ones(2, 3)
        elif what == "pause":
            self.pause()
        elif what == "slow save":
            data.fsync = lambda path: time.sleep(4)  # of eight files, their folder and the run's
            if "signal" in self.event:
                signal.raise_signal(self.event["signal"])
            else:
                self.pause()

    def kill_in_an_evaluation(self, layer, inputs, output):
        if not torch.is_grad_enabled():
            signal.raise_signal(signal.SIGKILL)

    def pause(self):
        """Wait for any signal; SIGUSR2 has no other effect."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        signal.set_wakeup_fd(writer.fileno())
        path = self.folder / f"paused.{self.rank}"
        temporary = self.folder / f"pid.{self.rank}"
        temporary.write_text(str(os.getpid()))
        temporary.rename(path)
        reader.recv(1)


def gathered_and_reduced(module: FSDPModule) -> str:
    """Return the dtypes in which FSDP2 gathers weights and reduces gradients, and whether it casts inputs."""
    policy = module._get_fsdp_state()._mp_policy
    return f"{policy.param_dtype} {policy.reduce_dtype} {policy.cast_forward_inputs}"


def not_finite(original, *arguments, **keywords):
    """Return a loss of NaN with a finite gradient: other ranks notice it only by the sum over ranks."""
    loss, ce, kl = original(*arguments, **keywords)
    return loss + math.nan, ce, kl


def kill_before_operation(number: int, out_dir: str):
    """Count what Python does to files in `out_dir` from now on, and die before the operation of that number."""
    operations = itertools.count()

    def audit(name, arguments):
        if name in ("open", "os.mkdir", "os.rename", "shutil.rmtree"):
            counts = str(arguments[0]).startswith(out_dir)
        else:
            counts = name in ("os.remove", "os.rmdir")  # relative to a folder that rmtree has opened
        if counts and next(operations) == number:
            signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(audit)


def start_process(folder: Path, rank: int, world: int, port: int):
    """Set up this fork as torchrun sets up a process, and send its output to `folder`."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, and a shell's background SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number in (("stdout", 1), ("stderr", 2)):
        getattr(sys, name).flush()
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if world:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def do_jobs(folder: Path, rank: int, world: int, port: int, jobs: list[dict]):
    """Run distill.train for each job in one process group, and write each outcome to a file."""
    start_process(folder, rank, world, port)
    run_program(partial(run_jobs, folder, rank, jobs))


def run_jobs(folder: Path, rank: int, jobs: list[dict]):
    with distill.process_group(resolve_config(jobs[0]["keys"])):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for job in jobs:
            watch = Watch(job["event"], rank, folder)
            loss = distill.distillation_loss
            with patch.multiple(distill, training_step=watch.training_step, distillation_loss=loss):
                try:
                    outcome = train(resolve_config(job["keys"])).name
                except UserError as error:
                    outcome = str(error)
                except SystemExit as stop:
                    outcome = stop.code
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            result = {"outcome": outcome, "windows": watch.windows, "models": watch.models,
                      "rotary": sorted(watch.rotary), "passes": watch.passes,
                      "left": sorted(os.listdir(job["keys"]["out_dir"]))}
            (folder / f"{job['name']}.{rank}.json").write_text(json.dumps(result))


def do_main(folder: Path, rank: int, world: int, port: int, keys: dict, event: dict):
    """Run `python distill.py` with these keys."""
    start_process(folder, rank, world, port)
    main_with_event(folder, rank, keys, event)


def main_with_event(folder: Path, rank: int, keys: dict, event: dict):
    distill.training_step = Watch(event, rank, folder).training_step
    sys.argv = ["distill.py", *words(keys)]
    run_program(distill.main)


def do_fork(folder: Path, rank: int, world: int, port: int, keys: dict, event: dict):
    """Run the distill.py of a fork that trains an extra module with the student."""
    places = {  # function → the line before which the fork adds its own
        "load_models": ("        if model.extra and resumed is not None:\n", """\
        if role == "student":
            torch.manual_seed(rank())  # another module on each rank: rank 0's has to be taken
            model.extra["filter"] = nn.Linear(32, 32)
"""),
        "training_step": ("            return loss, ce, kl\n", """\
            error = getattr(student, "module", student).extra["filter"](hidden) - hidden
            term = error.square().sum() / num_tokens
            terms["filter"] = term.detach()
            loss = loss + term
""")}
    for name, (line, added) in places.items():
        source = inspect.getsource(getattr(distill, name))
        assert source.count(line) == 1, line
        exec(source.replace(line, added + line), vars(distill))
    do_main(folder, rank, world, port, keys, event)


def do_torchrun(folder: Path, rank: int, world: int, port: int, options: list[str]):
    """Run the launcher itself, in a fork that has imported it. The two workers that it starts are new programs."""
    os.setsid()
    start_process(folder, rank, world, port)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    from torch.distributed.run import main as torchrun
    torchrun(["--nproc_per_node=2", *options])


# ----------------------------------------------- Starting them -----------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Return the context that starts processes, as forks of a server that has imported this file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the latter takes a while, and is imported late
    with patch.dict(os.environ, PYTHONPATH=f"{ROOT / 'tests'}:{ROOT}", OMP_NUM_THREADS="1"):
        context.Process(target=int).start()  # starts the server too
    yield context
    for process in multiprocessing.active_children():  # which hang
        process.kill()


def begin(processes, folder: Path, target, *arguments, world: int = 0) -> list:
    """Start `world` processes as torchrun would, or one without it if 0."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    running = []
    for rank in range(max(1, world)):
        process = processes.Process(target=target, args=(folder, rank, world, port, *arguments), daemon=True)
        process.start()
        running.append(process)
    return running


def wait(running: list) -> list[int]:
    """Return the exit statuses; −n if signal n ended the process. Fails if they hang."""
    deadline = time.monotonic() + TIMEOUT
    for process in running:
        process.join(max(0, deadline - time.monotonic()))
    assert not any(process.is_alive() for process in running), "processes hang"
    return [process.exitcode for process in running]


def paused(folder: Path) -> list[int]:
    """Return the ids of two processes once both pause."""
    paths = [folder / f"paused.{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + TIMEOUT
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"no {paths}"
        time.sleep(0.02)
    return [int(path.read_text()) for path in paths]


# ----------------------------------------------- Layouts -----------------------------------------------------------

BF16 = dict(dtype="bfloat16", student="untied")
ALONE = {"one": {}, "one, untied": dict(student="untied"), "one, bfloat16": BF16, "one, cpt": dict(method="cpt")}
MICRO_3 = dict(checkpoint_activations=True, micro_batch_size=3)
LAYOUTS = {  # name: (processes, keys, the run of one process that it equals)
    "ddp2": (2, dict(parallel="ddp"), "one"),
    "ddp2, untied, recomputed": (2, dict(parallel="ddp", student="untied", **MICRO_3), "one, untied"),
    "ddp2, bfloat16": (2, dict(parallel="ddp", **BF16), "one, bfloat16"),
    "fsdp2": (2, dict(parallel="fsdp"), "one"),
    "fsdp2, recomputed": (2, dict(parallel="fsdp", **MICRO_3), "one"),
    "fsdp2, untied, whole teacher": (2, dict(parallel="fsdp", student="untied", shard_teacher=False), "one, untied"),
    "fsdp2, cpt": (2, dict(parallel="fsdp", method="cpt"), "one, cpt"),
    "fsdp2, bfloat16": (2, dict(parallel="fsdp", **BF16), "one, bfloat16"),
    "auto3": (3, dict(), "one"),
    "fsdp3": (3, dict(parallel="fsdp", micro_batch_size=2), "one"),
}
FULL = r".*/step_00000020: cannot be written: \[Errno 27\] File too large; free some space, and start the same command"
STOPS = {  # name: (the event, the outcome as a pattern, the step to go on from): an evaluation is at 10
    "at 7": (dict(what="signal", at=7, rank=1, signal=signal.SIGUSR1), str(128 + signal.SIGUSR1), 7),
    "at 10": (dict(what="signal", at=10, rank=0, signal=signal.SIGTERM), str(128 + signal.SIGTERM), 10),
    "at the end": (dict(what="signal", at=20, rank=1, signal=signal.SIGTERM), str(128 + signal.SIGTERM), 20),
    "no room for weights": (dict(what="full disk", at=13, rank=0, room=30_000), FULL, 10),
    "no room for an optimizer": (dict(what="full disk", at=13, rank=0, room=200_000), FULL, 10),
}
STOPPED = [("ddp2", "at 7"), ("fsdp2", "at 7"), ("fsdp2", "at 10"), ("fsdp2", "at the end"), ("fsdp2, cpt", "at 7"),
           ("ddp2", "no room for weights"), ("fsdp2", "no room for an optimizer")]
CHAIN = [(2, "fsdp", 6), (3, "fsdp", 10), (2, "ddp", 14), (0, "auto", None)]  # processes, parallel, stopped at


@pytest.fixture(scope="module")
def runs(processes, given, teacher, tmp_path_factory):
    """Make all runs that this file compares. Return name → (out_dir, what each rank saw)."""
    folder = tmp_path_factory.mktemp("layouts")
    untied = folder / "untied"
    shutil.copytree(teacher, untied)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        GPT(replace(GPTConfig.scratch(2, 32, 257, 64), tie_word_embeddings=False)).save_pretrained(untied)

    def job(name: str, keys: dict, event: dict | None = None, out_dir: str = "") -> dict:
        keys = {**given, **keys, "out_dir": str(folder / (out_dir or name))}
        if keys["student"] == "untied":
            keys["student"] = str(untied)
        return {"name": name, "keys": keys, "event": event or {}}

    # Each list is run by a group of processes of its own.
    groups = [(0, [job(name, keys) for name, keys in ALONE.items()])]
    for world in (2, 3):
        groups.append((world, [job(name, keys) for name, (n, keys, _) in LAYOUTS.items() if n == world]))
    stopped = []
    for layout, stop in STOPPED:
        keys = LAYOUTS[layout][1]
        out_dir = f"{layout} stopped {stop}"
        stopped.append(job(out_dir, keys, STOPS[stop][0]))
        stopped.append(job(f"{layout} resumed {stop}", keys, out_dir=out_dir))
    for parallel in ("ddp", "fsdp"):
        event = dict(what="not finite", at=3, rank=1)
        stopped.append(job(f"{parallel} not finite", dict(parallel=parallel), event))
    groups.append((2, stopped))

    made = {}

    def begin_group(name: str, world: int, jobs: list[dict]) -> tuple:
        printed = folder / f"{name} printed"
        return printed, world, jobs, begin(processes, printed, do_jobs, jobs, world=world)

    def finish(printed: Path, world: int, jobs: list[dict], running: list):
        statuses = wait(running)
        errors = [path.read_text() for path in printed.glob("stderr.*")]
        assert statuses == [0] * max(1, world) and not any(errors), "".join(errors)
        for job in jobs:
            ranks = [json.loads((printed / f"{job['name']}.{rank}.json").read_text()) for rank in range(max(1, world))]
            made[job["name"]] = Path(job["keys"]["out_dir"]), ranks

    started = [begin_group(f"group {number}", *group) for number, group in enumerate(groups)]

    # A run that goes from layout to layout
    for number, (world, parallel, stop) in enumerate(CHAIN):
        name = f"chain {number}"
        event = dict(what="signal", at=stop, rank=0, signal=signal.SIGTERM)
        finish(*begin_group(name, world, [job(name, dict(parallel=parallel), event, out_dir="chain")]))
    for group in started:
        finish(*group)
    return made


def whole_windows(ranks: list[dict]) -> list:
    """Return the batches of a run, from each rank's share."""
    return [sum(shares, []) for shares in zip(*(rank["windows"] for rank in ranks), strict=True)]


def assert_close(out_dir: Path, other: Path, within: float = 1e-5):
    """Compare losses, gradient norms, perplexities and r of two runs."""
    lines = read_lines(out_dir)[1:]
    others = read_lines(other)[1:]
    for a, b in zip(lines, others, strict=True):
        for key in ("kind", "step", "tokens", "t"):
            assert a.get(key) == b.get(key)
        for key in a.keys() & {"loss", "ce", "kl", "grad_norm", "lr"}:
            assert b[key] == pytest.approx(a[key], rel=within, abs=within)
        assert a.get("r", {}) == pytest.approx(b.get("r", {}), abs=within)
        for name in a.get("domains", {}):
            assert a["domains"][name] == pytest.approx(b["domains"][name], rel=within)


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_is_the_same_training(runs, name):
    world, _, reference = LAYOUTS[name]
    out_dir, ranks = runs[name]
    alone, (one,) = runs[reference]
    assert [rank["outcome"] for rank in ranks] == [one["outcome"]] * world == ["step_00000020"] * world
    assert whole_windows(ranks) == one["windows"] and len(one["windows"]) == 20
    assert all(len(rank["windows"][0]) == 12 // world for rank in ranks)
    assert len(read_lines(out_dir, "train")) == 20
    assert_close(out_dir, alone, 5e-3 if "bfloat16" in name else 1e-5)
    if "bfloat16" not in name:  # before the first step
        first, expected = (read_lines(run, "mixture")[0]["domains"] for run in (out_dir, alone))
        assert all(first[domain] == pytest.approx(expected[domain], rel=5e-6) for domain in NAMES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fsdp_shards_all_parameters_in_the_right_dtypes_and_ddp_none(runs, name):
    world, keys, reference = LAYOUTS[name]
    whole = runs[reference][1][0]["models"]
    for rank in runs[name][1]:
        roles = {"student", "teacher"}
        if keys.get("method") == "cpt":
            roles = {"student"}  # training does not need the teacher: it has been measured
        assert rank["models"].keys() == roles
        for role in roles:
            seen = rank["models"][role]
            shards = keys.get("parallel") == "fsdp" and (role == "student" or keys.get("shard_teacher", True))
            assert seen["block by block"] == shards and seen["elements"] == whole[role]["elements"]
            # The odd row out of 257, and norms of 32 over 3 ranks, make shares uneven.
            assert seen["here"] == pytest.approx(seen["elements"] / (world if shards else 1), rel=0.05)
            assert seen["minutes"] == ([GIVEN["timeout"]] if shards else [])
            products = "torch.bfloat16" if "bfloat16" in name else "torch.float32"
            assert seen["dtypes"] == ([f"{products} torch.float32 False"] if shards else [])
            rounded = role == "teacher" and "bfloat16" in name
            assert seen["dtype"] == ("torch.bfloat16" if rounded else "torch.float32")
        if "teacher" in roles and keys.get("parallel") == "fsdp" and keys.get("shard_teacher", True):
            # What FSDP2 keeps of the teacher's passes does not grow; before the first step: its evaluation
            assert len(rank["passes"]) == 20 and rank["passes"][1:] == [0] * 19


@pytest.mark.parametrize("name", ["one, bfloat16", "fsdp2, bfloat16"])
def test_bfloat16_changes_both_models_and_rotary_tables_stay_float32(runs, name):
    out_dir, ranks = runs[name]
    assert all(rank["rotary"] == ["torch.float32"] for rank in ranks)
    rounded, plain = (read_lines(run) for run in (out_dir, runs["one, untied"][0]))
    for domain, other in zip(rounded[1]["domains"].values(), plain[1]["domains"].values(), strict=True):
        assert all(domain[key] != other[key] for key in ("student_ppl", "teacher_ppl"))
    assert rounded[2]["ce"] != plain[2]["ce"]
    losses, others = ([line["loss"] for line in lines if line["kind"] == "train"] for lines in (rounded, plain))
    assert losses == pytest.approx(others, rel=0.02)


# ----------------------------------------------- Resuming ----------------------------------------------------------


@pytest.mark.parametrize("layout, stop", STOPPED)
def test_stopped_or_on_a_full_disk_and_resumed_under_one_layout_equals_straight_to_the_bit(runs, layout, stop):
    straight_dir, straight = runs[layout]
    out_dir, stopped = runs[f"{layout} stopped {stop}"]
    _, resumed = runs[f"{layout} resumed {stop}"]
    _, outcome, saved = STOPS[stop]
    assert all(re.fullmatch(outcome, str(rank["outcome"])) for rank in stopped)  # it came to one, both stop
    assert [rank["outcome"] for rank in resumed] == ["step_00000020"] * 2
    assert whole_windows(stopped)[:saved] + whole_windows(resumed) == whole_windows(straight)
    assert_same_run(out_dir, straight_dir)
    if "no room" in stop:  # on rank 0, the rank that writes: all stop with its message
        for rank in stopped:
            assert rank["outcome"].startswith(f"{out_dir / 'step_00000020'}: cannot be written: ")
            assert rank["left"] == ["metrics.jsonl", "step_00000010"]


def test_a_run_continues_under_any_other_layout(runs):
    """It continues under fsdp in 2 and 3 processes, ddp in 2, and in one process."""
    windows = []
    for number, (_, _, stop) in enumerate(CHAIN):
        out_dir, ranks = runs[f"chain {number}"]
        assert {rank["outcome"] for rank in ranks} == {128 + signal.SIGTERM if stop else "step_00000020"}
        windows += whole_windows(ranks)
    alone, (one,) = runs["one"]
    assert windows == one["windows"]
    assert_close(out_dir, alone)


def test_an_extra_module_is_saved_next_to_the_model_and_restored_in_another_layout(
        processes, given, tmp_path):
    def start(name: str, world: int, event: dict, **keys) -> list[int]:
        keys = {**given, **SHORT, "out_dir": tmp_path / name, **keys}
        return wait(begin(processes, tmp_path, do_fork, keys, event, world=world))

    stop = dict(what="signal", at=5, signal=signal.SIGTERM)
    assert start("straight", 0, {}) == [0]
    assert start("moved", 2, stop, parallel="fsdp") == [128 + signal.SIGTERM] * 2
    assert start("moved", 2, stop | {"at": 7}, parallel="ddp") == [128 + signal.SIGTERM] * 2
    assert start("moved", 2, {}, parallel="fsdp") == [0, 0]
    assert_close(tmp_path / "moved", tmp_path / "straight")
    terms = [[line["filter"] for line in read_lines(tmp_path / name, "train")] for name in ("moved", "straight")]
    assert terms[0] == pytest.approx(terms[1], rel=1e-5) and terms[0][-1] < terms[0][0]

    folder = tmp_path / "moved" / "step_00000008"
    filters = [load_file(path / "extra.safetensors") for path in
               (folder, tmp_path / "straight" / folder.name, folder.with_name("step_00000002"))]
    assert filters[0].keys() == {"filter.weight", "filter.bias"}
    for name, weight in filters[0].items():
        torch.testing.assert_close(weight, filters[1][name], rtol=0, atol=1e-5)
        assert (weight - filters[2][name]).abs().max() > 1e-4
    assert not any("filter" in name for name in load_file(folder / "model.safetensors"))
    GPT.from_pretrained(folder)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(runs, parallel):
    out_dir, (one, two) = runs[f"{parallel} not finite"]
    assert re.match(r"step 2: loss nan, gradient norm [\d.]+\. The update was not made, and nothing is saved",
                    one["outcome"])
    assert two["outcome"] == one["outcome"]
    assert list_checkpoints(out_dir) == []
    assert [line["step"] for line in read_lines(out_dir, "train")] == [1, 2]


# ----------------------------------------------- Faults of one process ---------------------------------------------


@pytest.fixture(scope="module")
def straight(processes, given, tmp_path_factory) -> Path:
    """Return the folder of a short, undisturbed run."""
    folder = tmp_path_factory.mktemp("straight")
    keys = {**given, **SHORT, "out_dir": folder / "run"}
    assert wait(begin(processes, folder, do_main, keys, {})) == [0]
    return folder / "run"


@pytest.fixture
def begin_run(processes, given, tmp_path):
    """Return a function that starts distill.py on tmp_path/run, and returns its processes."""
    def begin_run(event: dict | None = None, world: int = 0, **keys) -> list:
        keys = {**given, **SHORT, "out_dir": tmp_path / "run", **keys}
        return begin(processes, tmp_path, do_main, keys, event or {}, world=world)
    return begin_run


@pytest.fixture
def start(begin_run, tmp_path):
    """Return a function that runs distill.py to its end: (exit statuses, rank 0's stdout, all stderr)."""
    def start(event: dict | None = None, world: int = 0, **keys) -> tuple[list, str, str]:
        statuses = wait(begin_run(event, world, **keys))
        errors = [(tmp_path / f"stderr.{rank}").read_text() for rank in range(max(1, world))]
        return statuses, (tmp_path / "stdout.0").read_text(), "".join(errors)
    return start


def whole_checkpoints(out_dir: Path) -> list[int]:
    return [int(folder.name[-8:]) for folder in list_checkpoints(out_dir) if not distill.damaged_files(folder)]


def last_step(out_dir: Path) -> int:
    """Return the number of finished updates in the metrics."""
    path = out_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return max((line["step"] for line in lines), default=0)


def assert_nothing_is_lost(out_dir: Path):
    """Check that a killed run has saved every step that was due before its last one."""
    assert max(whole_checkpoints(out_dir), default=0) >= (last_step(out_dir) - 1) // 2 * 2


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_before_any_operation_of_a_save_keeps_the_previous_checkpoint(start, straight, tmp_path, stride):
    """Each start is killed before a later operation on its first checkpoint's files, until a start succeeds."""
    run = tmp_path / "run"
    for operation in itertools.count(step=stride):
        saved = max(whole_checkpoints(run), default=0)
        event = dict(what="killed in a save", at=saved + 1, operation=operation)
        statuses, out, err = start(event, keep=1)
        if statuses == [0]:
            break
        assert (statuses, err) == ([-signal.SIGKILL], "") and "corrupt" not in out
        assert_nothing_is_lost(run)
    assert operation > 30
    assert_same_run(run, straight)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("seed, kills", [(0, 6), *(
    pytest.param(seed, 20, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_a_run_killed_at_random_moments_loses_nothing(begin_run, start, straight, tmp_path, seed, kills):
    rng = random.Random(seed)
    run = tmp_path / "run"
    started = time.monotonic()
    assert start(out_dir=tmp_path / "timed")[0] == [0]
    duration = time.monotonic() - started
    for _ in range(kills):
        (process,) = begin_run()
        time.sleep(rng.uniform(0.1, 0.9) * duration)
        process.kill()
        wait([process])
        assert (tmp_path / "stderr.0").read_text() == ""
        assert_nothing_is_lost(run)
        if whole_checkpoints(run)[-1:] == [8]:  # done: again from the start
            shutil.rmtree(run)
    statuses, out, _ = start()
    assert statuses == [0] and "corrupt" not in out
    assert_same_run(run, straight)


# ----------------------------------------------- Faults of one among several ---------------------------------------

GONE = (r"error: another process is gone, or silent for .* minutes \(.*\); the same command continues from the last "
        "checkpoint")


@pytest.mark.parametrize("parallel, event, done", [
    ("ddp", dict(what="signal", at=5, rank=0, signal=signal.SIGKILL), [2, 4]),
    ("fsdp", dict(what="killed in an evaluation", at=3, rank=1), [2]),
], ids=str)
def test_a_rank_that_is_killed_ends_the_others_without_a_false_save(start, tmp_path, parallel, event, done):
    """This runs without torchrun, which would end the other rank."""
    killed = event["rank"]
    other = 1 - killed
    statuses, _, err = start(event, world=2, parallel=parallel)
    assert statuses[killed] == -signal.SIGKILL and statuses[other] == 2
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert re.match(GONE if other == 0 else f"rank 1: {GONE}", line) and "Traceback" not in err
    assert whole_checkpoints(tmp_path / "run") == done and not list((tmp_path / "run").glob("*.tmp"))
    statuses, out, _ = start(world=2, parallel=parallel)
    assert statuses == [0, 0] and f"continuing from step_{done[-1]:08d}" in out


def test_a_bad_id_that_only_rank_1_reads_ends_the_job_with_the_name_of_the_bin(start, given, tmp_path):
    bins = shutil.copytree(given["data_dir"], tmp_path / "bins")
    sampler = MixtureSampler(TokenBins(bins, 16).n_windows, SHORT["batch_size"], 0)
    for _ in range(3):
        domain_ids, window_ids = sampler.next_batch()
    path = bins / f"{NAMES[domain_ids[-1]]}.train.bin"
    with open(path, "r+b") as file:
        file.seek(2 * (16 * int(window_ids[-1]) + 5))  # only in this window
        file.write((999).to_bytes(2, "little"))
    statuses, _, err = start(world=2, data_dir=bins)
    assert statuses == [2, 2] and "Traceback" not in err
    lines = sorted(line for line in err.splitlines() if "error: " in line)
    assert len(lines) == 2 and re.match(GONE, lines[0])
    assert lines[1].startswith(f"rank 1: error: {path}: holds the id 999, but the tokenizer has 257 ids")
    assert last_step(tmp_path / "run") == 2 and whole_checkpoints(tmp_path / "run") == [2]


def test_a_bug_only_on_rank_0_ends_all_ranks_with_its_traceback_once(start):
    statuses, _, err = start(dict(what="bug in a save", at=1), world=2)
    assert statuses == [1, 1] and err.count("Traceback") == 1
    assert err.endswith("\nRuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)\n")  # not of rank 1


def test_a_rank_that_hangs_ends_the_job_within_the_timeout(begin_run, tmp_path):
    waits, _ = begin_run(dict(what="pause", at=5, rank=1), world=2, timeout=0.1)
    assert wait([waits]) == [2]
    assert re.match(GONE, (tmp_path / "stderr.0").read_text())
    assert whole_checkpoints(tmp_path / "run") == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("world, parallel", [(0, "none"), (2, "ddp"), (2, "fsdp")])
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_blocks_are_the_same_training_without_a_break_or_a_recompilation(
        start, teacher, tmp_path, world, parallel, recomputed):
    """The teacher has another family, head_dim and number of key-value heads than the student."""
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        GPT(GPTConfig(257, 64, 96, 3, 4, num_key_value_heads=2, head_dim=16, model_type="qwen3")).save_pretrained(other)
    keys = dict(teacher=str(other), micro_batch_size=1)
    assert start(out_dir=tmp_path / "plain", **keys)[0] == [0]
    statuses, _, _ = start(world=world, parallel=parallel, compile="true", checkpoint_activations=recomputed, **keys)
    assert statuses == [0] * max(1, world)
    assert_close(tmp_path / "run", tmp_path / "plain")
    for rank in range(max(1, world)):
        counts = [json.loads(line) for line in (tmp_path / f"graphs.{rank}").read_text().splitlines()]
        assert counts[0][0] == 0 < counts[1][0] and counts[1:] == [counts[1]] * (len(counts) - 1), counts
        assert counts[-1][1] == 0  # breaks


# ----------------------------------------------- torchrun ----------------------------------------------------------


@pytest.fixture
def torchrun(processes, given, tmp_path):
    """Return a function that starts torchrun with this file as the program of two workers: the launcher's process."""
    def torchrun(event: dict, *options: str, **keys):
        keys = {**given, **SHORT, "out_dir": str(tmp_path / "run"), **keys}
        program = [__file__, str(tmp_path), json.dumps(event), json.dumps(keys)]
        (launcher,) = begin(processes, tmp_path, do_torchrun, ["--standalone", *options, *program])
        return launcher
    return torchrun


def errors_of(folder: Path) -> list[str]:
    """Return the project's own error lines in the output of torchrun and its workers."""
    return re.findall(r"(?m)^(?:rank \d+: )?error: .*", (folder / "stderr.0").read_text())


def assert_gone(pids: list[int]):
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("number", [signal.SIGTERM, *(
    pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGINT))], ids=lambda n: n.name)
def test_a_signal_to_torchrun_saves_and_the_same_command_continues(torchrun, start, tmp_path, number):
    """SIGTERM goes to torchrun only; a scheduler's SIGUSR1 and a terminal's Ctrl-C go to its process group."""
    launcher = torchrun(dict(what="pause", at=5), "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", parallel="ddp")
    pids = paused(tmp_path)
    if number == signal.SIGTERM:
        os.kill(launcher.pid, number)
    else:
        os.killpg(launcher.pid, number)
    assert wait([launcher]) != [0] and errors_of(tmp_path) == []
    assert_gone(pids)
    assert f"stopped by {number.name}, saved as step_00000005" in (tmp_path / "stdout.0").read_text()
    assert whole_checkpoints(tmp_path / "run") == [2, 4, 5] and last_step(tmp_path / "run") == 5
    for out_dir in ("run", "never stopped"):
        assert start(world=2, parallel="ddp", out_dir=tmp_path / out_dir)[0] == [0, 0]
    assert_same_run(tmp_path / "run", tmp_path / "never stopped")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["workers", "launcher"])
def test_a_save_of_40_seconds_is_whole_before_any_process_leaves(torchrun, tmp_path, whom):
    event = dict(what="slow save", at=5)
    if whom == "workers":
        event["signal"] = signal.SIGTERM
    launcher = torchrun(event, "--shutdown-timeout=120", parallel="ddp", save_every=0)
    if whom == "launcher":
        paused(tmp_path)
        os.kill(launcher.pid, signal.SIGTERM)
    assert wait([launcher]) != [0] and errors_of(tmp_path) == []
    assert "stopped by SIGTERM, saved as step_00000005" in (tmp_path / "stdout.0").read_text()
    assert whole_checkpoints(tmp_path / "run") == [5]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_of_torchrun_without_a_false_save(torchrun, tmp_path):
    launcher = torchrun(dict(what="pause", at=5), parallel="fsdp")
    pids = paused(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    assert wait([launcher]) != [0]
    assert_gone(pids)
    (error,) = errors_of(tmp_path)
    assert re.match(GONE, error)
    assert whole_checkpoints(tmp_path / "run") == [2, 4] and not list((tmp_path / "run").glob("*.tmp"))


def test_a_mistake_is_printed_once_by_rank_0_under_torchrun(processes, given, tmp_path):
    keys = {**given, "out_dir": tmp_path / "run", "val_samples": 10**6}
    launcher = begin(processes, tmp_path, do_torchrun, ["--standalone", str(ROOT / "distill.py"), *words(keys)])
    assert wait(launcher) == [1]
    assert [error.partition(" domain")[0] for error in errors_of(tmp_path)] == ["error: --val_samples=1000000:"]
    assert 'distill.py", line' not in (tmp_path / "stderr.0").read_text()  # a traceback of ours
    assert (tmp_path / "stdout.0").read_text().count("val_samples = 1000000") == 1  # the configuration is printed once
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":  # what torchrun starts: FOLDER EVENT KEYS
    _, folder, event, keys = sys.argv
    main_with_event(Path(folder), int(os.environ["RANK"]), json.loads(keys), json.loads(event))
