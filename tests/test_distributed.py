"""Many processes and faults: the same run whatever the layout, resumed under another, and nothing lost.

Most processes here are forks of a server that has imported torch once (multiprocessing's forkserver), given the
environment that torchrun would give them: a run takes half a second. The launcher itself is tested further down. What
happens to a run, and what is seen of it from inside, goes through the table of arms: see Watch.
"""

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
from conftest import read_lines
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import data
import distill
from data import TokenBins, UserError, run_program
from distill import list_checkpoints, resolve_config, train
from model import GPT, GPTConfig
from sample_mixture import MixtureSampler

ROOT = Path(__file__).parent.parent
NAMES = ["letters", "digits", "signs"]
TIMEOUT = 300  # seconds after which something hangs

# 12 windows divide by 1, 2 and 3 processes. 7 validation windows by neither: two processes with micro-batches of 3 take
# 6 and 1, three with 2 the same, so that one process and then two have none of the last.
GIVEN = dict(preset="paper", student="scratch:2x32", block_size=16, batch_size=12, val_samples=7, test_samples=5,
             interval=5, max_steps=20, lr=3e-3, min_lr=3e-4, warmup_steps=2, save_every=10, keep=0, device="cpu",
             timeout=10)
SHORT = dict(interval=4, max_steps=8, save_every=2, batch_size=4, val_samples=2)


@pytest.fixture(scope="module")
def given(data_dir, teacher):
    return {**GIVEN, "data_dir": str(data_dir), "teacher": str(teacher)}


def words(keys: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


# ----------------------------------------------- What a process does -----------------------------------------------


class Watch:
    """What is seen of a run from inside, and what happens to it.

    It stands in each row of ARMS as `weigh_windows`, which a step calls with its models and windows. `event` is
    {what, at: the number of the update, rank: on which (default: on all), …}."""

    def __init__(self, event: dict, rank: int, folder: Path):
        self.event = event
        self.rank = rank
        self.folder = folder
        self.windows = []  # of each step
        self.passes = []  # of the teacher, that FSDP2 keeps a record of before each step
        self.models = {}
        self.rotary = set()  # dtypes that a block gets

    def install(self):
        for name, arm in distill.ARMS.items():
            distill.ARMS[name] = replace(arm, weigh_windows=partial(self.in_each_step, arm.weigh_windows))

    def in_each_step(self, original, state, student, teacher, windows, domain_ids, sampler, config):
        if not self.models:
            self.look_at("student", student)
            if teacher is not None:
                self.look_at("teacher", teacher)
            student.layers[0].register_forward_pre_hook(self.look_at_rotary)
        self.windows.append(windows.tolist())
        if isinstance(teacher, FSDPModule):
            context = teacher._get_fsdp_state()._comm_ctx
            self.passes.append(len(getattr(context, "post_forward_order", [])))  # made in the first pass
        if config.compile == "true":
            self.count_graphs()
        if original is None:
            weights = torch.ones(config.batch_size)
        else:
            weights, state = original(state, student, teacher, windows, domain_ids, sampler, config)
        if sampler.step == self.event.get("at") and self.event.get("rank", self.rank) == self.rank:
            weights = self.happen(student, weights, config)
        return weights, state

    def count_graphs(self):
        """What Dynamo has traced before this step since the first one. A limit on recompilations that is hit fails."""
        torch._dynamo.config.fail_on_recompile_limit_hit = True
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
            "minutes": sorted({group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60
                               for group in groups}),
            "block by block": all(isinstance(module, FSDPModule) for module in modules),
            "dtype": str(parameters[0].dtype),
            "elements": sum(p.numel() for p in parameters),
            "here": sum(p.numel() for p in local),
        }

    def look_at_rotary(self, layer, inputs):
        _, *rotary = inputs
        if isinstance(rotary[0], tuple):
            rotary = rotary[0]
        self.rotary |= {str(table.dtype) for table in rotary}

    def happen(self, student: GPT, weights: torch.Tensor, config) -> torch.Tensor:
        what = self.event["what"]
        if what == "signal":
            for _ in range(self.event.get("times", 1)):
                os.kill(os.getpid(), self.event["signal"])
        elif what == "killed in an evaluation":
            student.layers[-1].register_forward_hook(self.kill_in_an_evaluation)
        elif what == "killed in a save":
            kill_before_operation(self.event["operation"], config.out_dir)
        elif what == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.event["room"], self.event["room"]))
        elif what == "pause":
            self.pause()
        elif what == "slow save":
            distill.fsync = lambda path: time.sleep(5)  # of eight files and their folder
            if "signal" in self.event:
                os.kill(os.getpid(), self.event["signal"])
            else:
                self.pause()
        elif what == "not finite":
            weights = weights * math.nan
        return weights

    def kill_in_an_evaluation(self, layer, inputs, output):
        if not torch.is_grad_enabled():
            kill_this_process()

    def pause(self):
        """Until any signal comes: SIGUSR2 for nothing else."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        signal.set_wakeup_fd(writer.fileno())
        data.write_text(self.folder / f"paused.{self.rank}", str(os.getpid()))
        reader.recv(1)


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_operation(number: int, out_dir: str):
    """From here on count what Python does to files in `out_dir`, and die before the operation of that number."""
    operations = itertools.count()

    def audit(name, arguments):
        if name in ("open", "os.mkdir", "os.rename", "shutil.rmtree"):
            counts = str(arguments[0]).startswith(out_dir)
        else:
            counts = name in ("os.remove", "os.rmdir")  # relative to a folder that rmtree has opened
        if counts and next(operations) == number:
            kill_this_process()

    sys.addaudithook(audit)


def start_process(folder: Path, rank: int, world: int, port: int):
    """Make this fork what torchrun makes of a process, and send what it prints to `folder`."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, and a shell's background SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number in (("stdout", 1), ("stderr", 2)):
        getattr(sys, name).flush()
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if world:
        of_a_node = 2 if world == 4 else world  # four are two nodes of two
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % of_a_node), "WORLD_SIZE": str(world),
                       "LOCAL_WORLD_SIZE": str(of_a_node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def do_jobs(folder: Path, rank: int, world: int, port: int, jobs: list[dict]):
    """Runs of distill.train, one after the other in one process group. What came of each is written to a file."""
    start_process(folder, rank, world, port)
    with distill.process_group(resolve_config(jobs[0]["keys"])):
        for job in jobs:
            watch = Watch(job["event"], rank, folder)
            with patch.dict(distill.ARMS):
                watch.install()
                try:
                    outcome = train(resolve_config(job["keys"])).name
                except UserError as error:
                    outcome = str(error)
                except SystemExit as stop:
                    outcome = stop.code
            result = {"outcome": outcome, "windows": watch.windows, "models": watch.models,
                      "rotary": sorted(watch.rotary), "passes": watch.passes}
            (folder / f"{job['name']}.{rank}.json").write_text(json.dumps(result))


def do_main(folder: Path, rank: int, world: int, port: int, keys: dict, event: dict):
    """`python distill.py` with these keys."""
    start_process(folder, rank, world, port)
    Watch(event, rank, folder).install()
    sys.argv = ["distill.py", *words(keys)]
    run_program(distill.main)


def do_torchrun(folder: Path, rank: int, world: int, port: int, options: list[str]):
    """The launcher itself, in a fork that has imported it. The two workers that it starts are programs of their own."""
    os.setsid()
    start_process(folder, rank, world, port)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    from torch.distributed.run import main as torchrun
    torchrun(["--nproc_per_node=2", *options])


# ----------------------------------------------- Starting them -----------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Where processes come from: forks of a server that has imported this file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the latter takes a while, and is imported late
    with patch.dict(os.environ, PYTHONPATH=f"{ROOT / 'tests'}:{ROOT}", OMP_NUM_THREADS="1"):
        context.Process(target=int).start()  # starts the server too
    return context


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


def paused(folder: Path, world: int) -> list[int]:
    """The ids of the processes, once all of them pause."""
    paths = [folder / f"paused.{rank}" for rank in range(max(1, world))]
    deadline = time.monotonic() + TIMEOUT
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"no {paths}"
        time.sleep(0.02)
    return [int(path.read_text()) for path in paths]


def launch(processes, folder: Path, keys: dict, event: dict | None = None, world: int = 0) -> tuple[list, str, str]:
    """distill.py to its end: exit statuses, rank 0's stdout, all stderr."""
    statuses = wait(begin(processes, folder, do_main, keys, event or {}, world=world))
    errors = [(folder / f"stderr.{rank}").read_text() for rank in range(max(1, world))]
    return statuses, (folder / "stdout.0").read_text(), "".join(errors)


# ----------------------------------------------- Layouts -----------------------------------------------------------

BF16 = dict(dtype="bfloat16", student="untied")
ALONE = {"one": {}, "one, untied": dict(student="untied"), "one, bfloat16": BF16, "one, ted": dict(method="ted"),
         "one, doremi": dict(method="doremi_proxy"), "one, cpt": dict(method="cpt")}
MICRO_3 = dict(checkpoint_activations=True, micro_batch_size=3)
LAYOUTS = {  # name: (processes, keys, the run of one process that it equals)
    "ddp2": (2, dict(parallel="ddp"), "one"),
    "ddp2, untied, recomputed": (2, dict(parallel="ddp", student="untied", **MICRO_3), "one, untied"),
    "ddp2, ted": (2, dict(parallel="ddp", method="ted", micro_batch_size=3), "one, ted"),
    "ddp2, doremi": (2, dict(parallel="ddp", method="doremi_proxy", micro_batch_size=3), "one, doremi"),
    "ddp2, bfloat16": (2, dict(parallel="ddp", **BF16), "one, bfloat16"),
    "fsdp2": (2, dict(parallel="fsdp"), "one"),
    "fsdp2, recomputed": (2, dict(parallel="fsdp", **MICRO_3), "one"),
    "fsdp2, untied, whole teacher": (2, dict(parallel="fsdp", student="untied", shard_teacher=False), "one, untied"),
    "fsdp2, doremi": (2, dict(parallel="fsdp", method="doremi_proxy"), "one, doremi"),
    "fsdp2, cpt": (2, dict(parallel="fsdp", method="cpt"), "one, cpt"),
    "fsdp2, bfloat16": (2, dict(parallel="fsdp", **BF16), "one, bfloat16"),
    "ddp2, teacher in one pass": (2, dict(parallel="ddp", micro_batch_size=1, teacher_micro_batch_size=3), "one"),
    "auto3": (3, dict(), "one"),
    "fsdp3": (3, dict(parallel="fsdp", micro_batch_size=2), "one"),
    "hsdp4": (4, dict(parallel="hsdp", micro_batch_size=1, teacher_micro_batch_size=3), "one"),
}
STOPS = {  # name: (the event, the run's outcome, its last step): between two evaluations, just before one, at the end
    "at 7": (dict(what="signal", at=7, rank=1, signal=signal.SIGUSR1), 128 + signal.SIGUSR1, 7),
    "at 10": (dict(what="signal", at=10, rank=0, signal=signal.SIGTERM), 128 + signal.SIGTERM, 10),
    "at 20": (dict(what="signal", at=20, rank=1, signal=signal.SIGTERM), "step_00000020", 20),
}
STOPPED = [("ddp2", "at 7"), ("ddp2, ted", "at 7"), ("ddp2, doremi", "at 10"), ("fsdp2", "at 7"), ("fsdp2", "at 10"),
           ("fsdp2", "at 20"), ("fsdp2, cpt", "at 7")]
# processes, parallel, stopped at
CHAIN = [(2, "fsdp", 6), (4, "hsdp", 8), (3, "fsdp", 10), (2, "ddp", 14), (0, "auto", None)]


@pytest.fixture(scope="module")
def runs(processes, given, teacher, tmp_path_factory):
    """All runs that this file compares: name → (out_dir, what each rank saw)."""
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
    groups = {0: [], 2: [], 3: [], 4: [], "not finite": []}
    for name, keys in ALONE.items():
        groups[0].append(job(name, keys))
    for name, (world, keys, _) in LAYOUTS.items():
        groups[world].append(job(name, keys))
    for layout, stop in STOPPED:
        keys = LAYOUTS[layout][1]
        out_dir = f"{layout} stopped {stop}"
        groups[2].append(job(out_dir, keys, STOPS[stop][0]))
        groups[2].append(job(f"{layout} resumed {stop}", keys, out_dir=out_dir))
    for parallel in ("ddp", "fsdp"):
        event = dict(what="not finite", at=3, rank=1)
        groups["not finite"].append(job(f"{parallel} not finite", dict(parallel=parallel), event))

    made = {}

    def finish(printed: Path, world: int, jobs: list[dict], running: list):
        statuses = wait(running)
        errors = [path.read_text() for path in printed.glob("stderr.*")]
        assert statuses == [0] * max(1, world) and not any(errors), "".join(errors)
        for job in jobs:
            ranks = [json.loads((printed / f"{job['name']}.{rank}.json").read_text()) for rank in range(max(1, world))]
            made[job["name"]] = Path(job["keys"]["out_dir"]), ranks

    started = []
    for name, jobs in groups.items():
        printed = folder / f"group {name}"
        world = 2 if name == "not finite" else name
        started.append((printed, world, jobs, begin(processes, printed, do_jobs, jobs, world=world)))
    for group in started:
        finish(*group)

    # A run that goes from layout to layout
    for number, (world, parallel, stop) in enumerate(CHAIN):
        event = dict(what="signal", at=stop, rank=0, signal=signal.SIGTERM)
        jobs = [job(f"chain {number}", dict(parallel=parallel), event, out_dir="chain")]
        printed = folder / f"chain {number} printed"
        finish(printed, world, jobs, begin(processes, printed, do_jobs, jobs, world=world))
    return made


def whole_windows(ranks: list[dict]) -> list:
    """The batches of which each rank saw its share."""
    return [sum(shares, []) for shares in zip(*(rank["windows"] for rank in ranks), strict=True)]


def assert_close(out_dir: Path, other: Path, within: float = 1e-5):
    """Losses, gradient norms, perplexities and r of two runs."""
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


def test_the_first_perplexities_are_the_same_whatever_the_layout(runs):
    for name, (_, _, reference) in LAYOUTS.items():
        if "bfloat16" in name:
            continue
        first = read_lines(runs[name][0], "mixture")[0]["domains"]
        alone = read_lines(runs[reference][0], "mixture")[0]["domains"]
        for domain in NAMES:
            assert first[domain] == pytest.approx(alone[domain], rel=5e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fsdp_shards_all_parameters_and_ddp_none(runs, name):
    world, keys, reference = LAYOUTS[name]
    whole = runs[reference][1][0]["models"]
    for rank in runs[name][1]:
        roles = {"student", "teacher"}
        if keys.get("method") == "cpt":
            roles = {"student"}  # training does without the teacher, which has been measured
        assert rank["models"].keys() == roles
        for role in roles:
            seen = rank["models"][role]
            sharded = keys.get("parallel") in ("fsdp", "hsdp")
            shards = sharded and (role == "student" or keys.get("shard_teacher", True))
            shares = 2 if keys.get("parallel") == "hsdp" else world  # of a node, or of all
            assert seen["block by block"] == shards and seen["elements"] == whole[role]["elements"]
            # The odd row out of 257, and norms of 32 over 3 ranks, make shares uneven.
            assert seen["here"] == pytest.approx(seen["elements"] / (shares if shards else 1), rel=0.05)
            assert seen["minutes"] == ([GIVEN["timeout"]] if shards else [])
            rounded = role == "teacher" and "bfloat16" in name
            assert seen["dtype"] == ("torch.bfloat16" if rounded else "torch.float32")


@pytest.mark.parametrize("name", ["fsdp2", "fsdp3", "hsdp4"])
def test_what_fsdp_keeps_of_the_teachers_passes_does_not_grow(runs, name):
    for rank in runs[name][1]:
        assert len(rank["passes"]) == 20 and rank["passes"][1:] == [0] * 19  # before the first: its evaluation


def test_rotary_tables_stay_float32_under_fsdp_in_bfloat16(runs):
    out_dir, ranks = runs["fsdp2, bfloat16"]
    assert [rank["rotary"] for rank in ranks] == [["torch.float32"]] * 2
    losses = [line["loss"] for line in read_lines(out_dir, "train")]
    alone = [line["loss"] for line in read_lines(runs["one, untied"][0], "train")]
    assert losses != alone and losses == pytest.approx(alone, rel=0.02)  # it was bfloat16, and close to float32


# ----------------------------------------------- Resuming ----------------------------------------------------------


def assert_same_to_the_bit(out_dir: Path, other: Path, but: tuple = ()):
    """Metrics (times aside), and all files of the last checkpoint `but` these."""
    assert read_lines(out_dir)[1:] == read_lines(other)[1:]  # all but the configuration's out_dir
    folder = list_checkpoints(out_dir)[-1]
    other_folder = list_checkpoints(other)[-1]
    assert folder.name == other_folder.name
    assert {path.name for path in folder.iterdir()} == {path.name for path in other_folder.iterdir()}
    for path in folder.iterdir():
        assert path.name in but or path.read_bytes() == (other_folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("layout, stop", STOPPED)
def test_stopped_and_resumed_under_one_layout_equals_straight_to_the_bit(runs, layout, stop):
    straight_dir, straight = runs[layout]
    out_dir, stopped = runs[f"{layout} stopped {stop}"]
    _, resumed = runs[f"{layout} resumed {stop}"]
    _, outcome, last_step = STOPS[stop]
    assert [rank["outcome"] for rank in stopped] == [outcome] * 2  # one got the signal, both stop
    assert len(stopped[0]["windows"]) == last_step
    assert [rank["outcome"] for rank in resumed] == ["step_00000020"] * 2
    assert whole_windows(stopped) + whole_windows(resumed) == whole_windows(straight)
    # A pickle of equal content may refer to equal strings otherwise, and TED's filters keep theirs.
    but = ("optimizer.pt", "manifest.json") if "ted" in layout else ()
    assert_same_to_the_bit(out_dir, straight_dir, but)


def test_a_run_goes_on_under_any_other_layout(runs):
    """Two processes of fsdp, four of hsdp, three of fsdp, two of ddp, one."""
    windows = []
    for number, (_, _, stop) in enumerate(CHAIN):
        out_dir, ranks = runs[f"chain {number}"]
        assert {rank["outcome"] for rank in ranks} == {128 + signal.SIGTERM if stop else "step_00000020"}
        windows += whole_windows(ranks)
    alone, (one,) = runs["one"]
    assert windows == one["windows"]
    assert_close(out_dir, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(runs, parallel):
    out_dir, (one, two) = runs[f"{parallel} not finite"]
    assert re.match(r"step 2: loss nan, .*\. The update was not made, and nothing is saved", one["outcome"])
    assert two["outcome"] == 2
    assert list_checkpoints(out_dir) == []
    assert [line["step"] for line in read_lines(out_dir, "train")] == [1, 2]


# ----------------------------------------------- Faults of one process ---------------------------------------------


@pytest.fixture(scope="module")
def straight(processes, given, tmp_path_factory) -> Path:
    """A short run to which nothing happened."""
    out_dir = tmp_path_factory.mktemp("straight") / "run"
    assert launch(processes, out_dir.parent / "printed", {**given, **SHORT, "out_dir": out_dir})[0] == [0]
    return out_dir


@pytest.fixture
def start(processes, given, tmp_path):
    """Runs distill.py on tmp_path/run: launch's result."""
    def start(event: dict | None = None, world: int = 0, **keys):
        keys = {**given, **SHORT, "out_dir": tmp_path / "run", **keys}
        return launch(processes, tmp_path / "printed", keys, event, world)
    return start


def whole_checkpoints(out_dir: Path) -> list[int]:
    return [int(folder.name[-8:]) for folder in list_checkpoints(out_dir) if not distill.damaged_files(folder)]


def last_step(out_dir: Path) -> int:
    """Finished updates by the metrics, of which a killed run may have torn the last line."""
    path = out_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    whole_lines = path.read_text().rpartition("\n")[0].splitlines()
    return max((json.loads(line)["step"] for line in whole_lines), default=0)


def assert_nothing_is_lost(out_dir: Path):
    """Of a run that was killed: every step before the last was saved if it was due."""
    assert max(whole_checkpoints(out_dir), default=0) >= (last_step(out_dir) - 1) // 2 * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, *(
    pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT))],
    ids=lambda number: number.name)
def test_a_signal_saves_and_ends_with_128_and_its_number(start, straight, tmp_path, number):
    statuses, out, err = start(dict(what="signal", at=3, signal=number))
    assert (statuses, err) == ([128 + number], "")
    assert f"stopped by {number.name}, saved as step_00000003" in out
    assert whole_checkpoints(tmp_path / "run") == [2, 3]
    assert start()[0] == [0]
    assert_same_to_the_bit(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_second_ctrl_c_exits_at_once(start, tmp_path):
    statuses, out, err = start(dict(what="signal", at=3, signal=signal.SIGINT, times=2))
    assert (statuses, err) == ([130], "") and "saved as" not in out
    assert whole_checkpoints(tmp_path / "run") == [2] and last_step(tmp_path / "run") == 2


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_operation_of_a_save_a_run_keeps_the_checkpoint_before(start, straight, tmp_path, stride):
    """Each start is killed before a later operation on the files of its first checkpoint, until one gets through."""
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
    assert_same_to_the_bit(run, straight)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("seed, kills", [(0, 6), *(
    pytest.param(seed, 20, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_at_random_moments_a_run_loses_nothing(processes, given, straight, tmp_path, seed, kills):
    rng = random.Random(seed)
    run = tmp_path / "run"
    keys = {**given, **SHORT, "out_dir": run}
    started = time.monotonic()
    assert launch(processes, tmp_path, {**keys, "out_dir": tmp_path / "timed"})[0] == [0]
    duration = time.monotonic() - started
    for _ in range(kills):
        (process,) = begin(processes, tmp_path, do_main, keys, {})
        time.sleep(rng.uniform(0.1, 0.9) * duration)
        process.kill()
        wait([process])
        assert (tmp_path / "stderr.0").read_text() == ""
        assert_nothing_is_lost(run)
        if whole_checkpoints(run)[-1:] == [8]:  # done: again from the start
            shutil.rmtree(run)
    statuses, out, _ = launch(processes, tmp_path, keys)
    assert statuses == [0] and "corrupt" not in out
    assert_same_to_the_bit(run, straight)


@pytest.mark.slow
@pytest.mark.parametrize("room", [30_000, 200_000], ids=["for no weights", "for no optimizer"])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(start, straight, tmp_path, room):
    folder = tmp_path / "run" / "step_00000004"
    statuses, _, err = start(dict(what="full disk", at=4, room=room))
    assert statuses == [2]
    assert re.fullmatch(rf"error: {folder}: cannot be saved \(.+\); make room, and the same command .*\n", err)
    assert whole_checkpoints(tmp_path / "run") == [2] and not list((tmp_path / "run").glob("*.tmp"))
    statuses, out, _ = start()
    assert statuses == [0] and "continuing from step_00000002" in out
    assert_same_to_the_bit(tmp_path / "run", straight)


@pytest.mark.parametrize("world", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_second_run_on_the_same_folder_is_refused_and_the_first_unharmed(
        processes, given, straight, tmp_path, world):
    run = tmp_path / "run"
    keys = {**given, **SHORT, "out_dir": run}
    first = begin(processes, tmp_path / "first", do_main, keys, dict(what="pause", at=3), world=world)
    pids = paused(tmp_path / "first", world)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for second in ({}, {"resume": "never"}, {"resume": "never", "lr": 1e-3}):
        statuses, _, err = launch(processes, tmp_path / "second", {**keys, **second})
        assert statuses == [2]
        assert err.startswith(f"error: {run}: another run is using it; ") and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    assert wait(first) == [0] * max(1, world)
    assert_close(run, straight)
    assert list_checkpoints(run)[-1].name == "step_00000008" and not (tmp_path / "run.1").exists()


# ----------------------------------------------- Faults of one among several ---------------------------------------

GONE = (r"error: another process is gone, or silent for .* minutes \(.*\); the same command continues from the last "
        "checkpoint")


@pytest.mark.parametrize("parallel, event, done", [
    ("ddp", dict(what="signal", at=5, rank=0, signal=signal.SIGKILL), [2, 4]),
    ("fsdp", dict(what="killed in an evaluation", at=3, rank=1), [2]),
], ids=str)
def test_a_rank_that_is_killed_ends_the_others_without_a_false_save(start, tmp_path, parallel, event, done):
    """Without torchrun, which would help."""
    killed = event["rank"]
    other = 1 - killed
    statuses, _, err = start(event, world=2, parallel=parallel)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[other] in (2, -signal.SIGABRT)  # gloo's threads sometimes abort a process that ends
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert re.match(GONE if other == 0 else f"rank 1: {GONE}", line) and "Traceback" not in err
    assert whole_checkpoints(tmp_path / "run") == done and not list((tmp_path / "run").glob("*.tmp"))
    statuses, out, _ = start(world=2, parallel=parallel)
    assert statuses == [0, 0] and f"continuing from step_{done[-1]:08d}" in out


def test_an_id_that_only_rank_1_reads_ends_the_job_and_names_the_bin(start, given, tmp_path):
    bins = shutil.copytree(given["data_dir"], tmp_path / "bins")
    sampler = MixtureSampler(TokenBins(bins, 16).n_windows, SHORT["batch_size"], 0)
    for _ in range(3):
        domain_ids, window_ids = sampler.next_batch()
    path = bins / f"{NAMES[domain_ids[-1]]}.train.bin"
    with open(path, "r+b") as file:
        file.seek(2 * (16 * int(window_ids[-1]) + 5))  # within this window alone
        file.write((999).to_bytes(2, "little"))
    statuses, _, err = start(world=2, data_dir=bins)
    assert all(status in (2, -signal.SIGABRT) for status in statuses) and "Traceback" not in err
    lines = sorted(line for line in err.splitlines() if "error: " in line)
    assert len(lines) == 2 and re.match(GONE, lines[0])
    assert lines[1].startswith(f"rank 1: error: {path}: holds the id 999, but the tokenizer has 257 ids")
    assert last_step(tmp_path / "run") == 2 and whole_checkpoints(tmp_path / "run") == [2]


def test_a_rank_that_hangs_ends_the_job_within_the_timeout(processes, given, tmp_path):
    keys = {**given, **SHORT, "out_dir": tmp_path / "run", "timeout": 0.1}
    waits, hangs = begin(processes, tmp_path, do_main, keys, dict(what="pause", at=5, rank=1), world=2)
    assert wait([waits])[0] in (2, -signal.SIGABRT)
    hangs.kill()
    assert re.match(GONE, (tmp_path / "stderr.0").read_text())
    assert whole_checkpoints(tmp_path / "run") == [2, 4]


def test_doremis_proxy_in_two_processes_writes_the_mixture_of_one(start, tmp_path):
    shares = []
    for world in (0, 2):
        folder = tmp_path / f"of {world}"
        statuses, out, err = start(world=world, method="doremi_proxy", out_dir=folder)
        assert statuses == [0] * max(1, world) and err == ""
        mixture = (folder / "mixture.txt").read_text().strip()
        assert out.count(f"DoReMi's mixture, for --mixture: {mixture} ") == 1
        shares.append(distill.parse_mixture(mixture))
    assert list(shares[0]) == NAMES and sum(shares[0].values()) == pytest.approx(1)
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world, parallel", [(0, "none"), (2, "ddp"), (2, "fsdp"), (4, "hsdp")])
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_blocks_are_the_same_training_without_a_break_or_a_recompilation(
        start, teacher, tmp_path, world, parallel, recomputed):
    """With a teacher of another family, whose head_dim and number of key-value heads are others than the student's."""
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        GPT(GPTConfig(257, 64, 96, 3, 4, num_key_value_heads=2, head_dim=16, model_type="qwen3")).save_pretrained(other)
    keys = dict(teacher=str(other), micro_batch_size=1, teacher_micro_batch_size=1)
    assert start(out_dir=tmp_path / "plain", **keys)[0] == [0]
    statuses, _, _ = start(world=world, parallel=parallel, compile="true", checkpoint_activations=recomputed, **keys)
    assert statuses == [0] * max(1, world)
    assert_close(tmp_path / "run", tmp_path / "plain")
    for rank in range(max(1, world)):
        counts = [json.loads(line) for line in (tmp_path / "printed" / f"graphs.{rank}").read_text().splitlines()]
        assert counts[0][0] == 0 < counts[1][0] and counts[1:] == [counts[1]] * (len(counts) - 1), counts
        assert counts[-1][1] == 0  # breaks


# ----------------------------------------------- torchrun ----------------------------------------------------------


@pytest.fixture
def torchrun(processes, given, tmp_path):
    """Starts a job of two processes, each of which is this file as a program: the launcher's process."""
    def torchrun(event: dict, *options: str, **keys):
        keys = {**given, **SHORT, "out_dir": str(tmp_path / "run"), **keys}
        program = [__file__, str(tmp_path), json.dumps(event), json.dumps(keys)]
        (launcher,) = begin(processes, tmp_path, do_torchrun, ["--standalone", *options, *program])
        return launcher
    return torchrun


def errors_of(folder: Path) -> list[str]:
    """The error lines of our own among all that torchrun and its workers print."""
    return re.findall(r"(?m)^(?:rank \d+: )?error: .*", (folder / "stderr.0").read_text())


def assert_gone(pids: list[int]):
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("number", [signal.SIGTERM, *(
    pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGINT))], ids=lambda n: n.name)
def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(torchrun, start, tmp_path, number):
    """SIGTERM to torchrun alone, the others to its process group: a scheduler's SIGUSR1, a terminal's Ctrl-C."""
    launcher = torchrun(dict(what="pause", at=5), "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", parallel="ddp")
    pids = paused(tmp_path, 2)
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
    assert_same_to_the_bit(tmp_path / "run", tmp_path / "never stopped")


@pytest.mark.slow
def test_two_torchruns_are_two_nodes_for_hsdp(processes, given, straight, tmp_path):
    keys = {**given, **SHORT, "out_dir": tmp_path / "run", "parallel": "hsdp"}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launchers = []
    for node in range(2):
        options = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command = [*options, str(ROOT / "distill.py"), *words(keys)]
        launchers += begin(processes, tmp_path / f"node {node}", do_torchrun, command)
    assert wait(launchers) == [0, 0]
    assert_close(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["workers", "launcher"])
def test_a_save_of_40_seconds_is_whole_before_any_process_leaves(torchrun, tmp_path, whom):
    event = dict(what="slow save", at=5)
    if whom == "workers":
        event["signal"] = signal.SIGTERM
    launcher = torchrun(event, "--shutdown-timeout=120", parallel="ddp", save_every=0)
    if whom == "launcher":
        paused(tmp_path, 2)
        os.kill(launcher.pid, signal.SIGTERM)
    assert wait([launcher]) != [0] and errors_of(tmp_path) == []
    assert "stopped by SIGTERM, saved as step_00000005" in (tmp_path / "stdout.0").read_text()
    assert whole_checkpoints(tmp_path / "run") == [5]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_of_torchrun_without_a_false_save(torchrun, tmp_path):
    launcher = torchrun(dict(what="pause", at=5), parallel="fsdp")
    pids = paused(tmp_path, 2)
    os.kill(pids[1], signal.SIGKILL)
    assert wait([launcher]) != [0]
    assert_gone(pids)
    (error,) = errors_of(tmp_path)
    assert re.match(GONE, error)
    assert whole_checkpoints(tmp_path / "run") == [2, 4] and not list((tmp_path / "run").glob("*.tmp"))


def test_a_mistake_is_told_once_by_rank_0_under_torchrun(processes, given, tmp_path):
    keys = {**given, "out_dir": tmp_path / "run", "val_samples": 10**6}
    launcher = begin(processes, tmp_path, do_torchrun, ["--standalone", str(ROOT / "distill.py"), *words(keys)])
    assert wait(launcher) == [1]
    assert [error.partition(" domain")[0] for error in errors_of(tmp_path)] == ["error: --val_samples=1000000:"]
    assert 'distill.py", line' not in (tmp_path / "stderr.0").read_text()  # a traceback of ours
    assert (tmp_path / "stdout.0").read_text().count("val_samples = 1000000") == 1  # the configuration is printed once
    assert not (tmp_path / "run").exists()


# ----------------------------------------------- Configuration -----------------------------------------------------


@pytest.mark.parametrize("environment, arguments, message", [
    (dict(RANK="0", WORLD_SIZE="3"), ["--batch_size=8"],
     "error: --batch_size=8: must be a multiple of micro_batch_size=1 × 3 processes"),
    (dict(RANK="0", WORLD_SIZE="2"), ["--batch_size=12", "--micro_batch_size=4"],
     "error: --batch_size=12: must be a multiple of micro_batch_size=4 × 2 processes"),
    (dict(RANK="1", WORLD_SIZE="2"), ["--parallel=none"],  # after a second, in which torchrun ends it
     "rank 1: error: --parallel=none: there are 2 processes; take ddp or fsdp"),
    (dict(RANK="0", WORLD_SIZE="2"), ["--parallel=fsdp", "--method=ted"],
     "error: --method=ted: not with fsdp; take --parallel=ddp"),
    ({}, ["--parallel=fsdp"], "error: --parallel=fsdp: start with torchrun --nproc_per_node=N distill.py"),
    (dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"), ["--parallel=hsdp"],
     "error: --parallel=hsdp: there is one node; take fsdp (for --dry_run set LOCAL_WORLD_SIZE to the GPUs of a node)"),
    (dict(RANK="0", WORLD_SIZE="24"), ["--teacher_micro_batch_size=1"],
     "error: --batch_size=12: must be a multiple of micro_batch_size=1 × 24 processes"),
    (dict(RANK="0", WORLD_SIZE="2"), ["--micro_batch_size=2", "--teacher_micro_batch_size=3"],
     "error: --teacher_micro_batch_size=3: must be a multiple of micro_batch_size=2, and divide the 6 windows of a "
     "process"),
    ({}, ["--micro_batch_size=2", "--teacher_micro_batch_size=8"],
     "error: --teacher_micro_batch_size=8: must be a multiple of micro_batch_size=2, and divide the 12 windows of a "
     "process"),
    ({}, ["--method=ted", "--micro_batch_size=2", "--teacher_micro_batch_size=4"],
     "error: --teacher_micro_batch_size=4: --method=ted compares layers of one micro-batch; leave it out"),
    (dict(WORLD_SIZE="2"), ["--parallel=ddp"],
     "error: --parallel=ddp: start with torchrun --nproc_per_node=N distill.py"),
], ids=str)
def test_what_contradicts_the_processes_is_refused(
        run_main, given, tmp_path, monkeypatch, environment, arguments, message):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    result = run_main(distill, *words({**given, "out_dir": tmp_path / "run"}), *arguments)
    assert result == (2, "", f"{message}\n")
    assert not (tmp_path / "run").exists()


def edit_json(path: Path, change):
    """`change` what is in a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("arguments, sharded", [
    ([], {"teacher", "student"}), (["--shard_teacher=false"], {"student"}), (["--parallel=ddp"], set()),
    (["--parallel=hsdp"], {"teacher", "student"})], ids=str)
def test_a_dry_run_tells_the_memory_of_each_of_many_devices(
        run_main, given, teacher, tmp_path, monkeypatch, arguments, sharded):
    """Of Qwen1.5-14B's sizes, and of four of its layers, on 16 devices: computed here by hand."""
    V, d, ff = 152_064, 5120, 13_696
    big = shutil.copytree(teacher, tmp_path / "big")
    sizes = dict(model_type="qwen2", vocab_size=V, hidden_size=d, num_hidden_layers=40, intermediate_size=ff,
                 head_dim=128, num_attention_heads=40, num_key_value_heads=40, tie_word_embeddings=False)
    edit_json(big / "config.json", lambda config: config.update(sizes))
    layer = 4 * d * d + 3 * d * ff + 3 * d + 2 * d  # q, k, v, o; MLP; biases; norms
    outside = 2 * V * d + d
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    devices = 8 if arguments == ["--parallel=hsdp"] else 16
    keys = {**given, "teacher": big, "student": "layers:4", "batch_size": 32, "dtype": "bfloat16"}
    status, out, err = run_main(distill, *words(keys), "--dry_run", *arguments)
    assert (status, err) == (0, "")
    widths = {"teacher": {"weights": 2}, "student": {"weights": 4, "gradients": 4, "optimizer": 8}}
    for role, layers in (("teacher", 40), ("student", 4)):
        n = layers * layer + outside
        (line,) = [line for line in out.splitlines() if line.startswith(f"{role}: ")]
        assert f" {n:,} parameters" in line and "on each of 16 devices" in line
        shown = {}
        for part, size, unit in re.findall(r"(\w+) ([\d.,]+) (MiB|GiB)", line):
            shown[part] = float(size.replace(",", "")) * (2**20 if unit == "MiB" else 2**30)
        share = n / devices if role in sharded else n
        assert shown == pytest.approx({part: w * share for part, w in widths[role].items()}, rel=0.05)


if __name__ == "__main__":  # what torchrun starts: FOLDER EVENT KEYS
    _, folder, event, keys = sys.argv
    torch.set_num_threads(1)
    Watch(json.loads(event), int(os.environ["RANK"]), Path(folder)).install()
    sys.argv = ["distill.py", *words(json.loads(keys))]
    run_program(distill.main)
