"""The loop: Alg. 1 and its arms, what a run writes, how it is stopped and resumed, and what is refused.

Runs are watched through Weights & Biases: what stands for it here gets each line of metrics.jsonl as soon as it is
logged, and can have something happen at any of them.
"""

import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import asdict, fields
from decimal import Decimal, getcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import read_lines
from safetensors.torch import load_file, save_file

import data
import distill
import model as model_program
import sample_mixture
from data import TokenBins, UserError, build_bins, bytes_settings, file_sha256, load_tokenizer
from distill import (ARMS, NOT_REPEATED, OTHER_NAMES, PRESETS, TED, Arm, Config, contradictions,
                     dense_distillation_loss, line_is_due, parse_config, resolve_auto, resolve_config, train)
from model import GPT, GPTConfig
from sample_mixture import RULES, MixtureSampler, discrepancy_factor

NAMES = ["letters", "digits", "signs"]
T, B = 16, 8  # tokens of a window, windows of a step
KEYS = {entry.name: entry for entry in fields(Config)}


class Sink:
    """Stands for TensorBoard's writer and for a run of Weights & Biases: keeps what it gets. `at[kind, step]` is called
    once, when that line comes."""

    def __init__(self, at: dict, *_, **keywords):
        self.at = at
        self.keywords = keywords
        self.numbers = []  # (step, name, value)
        self.closed = 0

    def add_scalar(self, name, value, step):
        self.numbers.append((step, name, value))

    def log(self, values, step):
        self.numbers += [(step, name, value) for name, value in values.items()]
        kind = "mixture" if "mixture/t" in values else "end"
        if "train/loss" in values:
            kind = "train"
        self.at.pop((kind, step), lambda: None)()

    def close(self):
        self.closed += 1

    finish = close


@pytest.fixture
def sinks(monkeypatch):
    """The sinks that runs open, `tensorboard` and `wandb`; `at`: (kind, step) → what is to happen at that line."""
    opened = types.SimpleNamespace(at={}, tensorboard=[], wandb=[])

    def open_sink(sinks: list, *arguments, **keywords):
        sinks.append(Sink(opened.at, *arguments, **keywords))
        return sinks[-1]

    modules = {"tensorboard": types.ModuleType("tensorboard"),
               "torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=partial(open_sink, opened.tensorboard)),
               "wandb": types.SimpleNamespace(init=partial(open_sink, opened.wandb))}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return opened


@pytest.fixture
def at(sinks) -> dict:
    return sinks.at


class Killed(Exception):
    """Stands for the end of a process that nothing in it can catch."""


def kill():
    raise Killed


def send(number: signal.Signals):
    os.kill(os.getpid(), number)


TERM = partial(send, signal.SIGTERM)


@contextmanager
def handled(number: signal.Signals, handler):
    """The handler of a signal outside a run, whatever it is where the tests are started."""
    before = signal.signal(number, handler)
    yield
    signal.signal(number, before)


@pytest.fixture(scope="module")
def tiny(data_dir, teacher) -> dict:
    """The keys of a tiny run."""
    return dict(preset="paper", data_dir=str(data_dir), teacher=str(teacher), student="scratch:1x32", block_size=T,
                batch_size=B, val_samples=5, test_samples=0, interval=2, max_steps=8, lr=3e-3, min_lr=3e-4,
                warmup_steps=2, save_every=4, device="cpu")


@pytest.fixture
def config(tiny, tmp_path, sinks):
    """A function that makes a tiny run's configuration, in tmp_path/run unless named."""
    def make(**given):
        config = resolve_config({**tiny, "out_dir": str(tmp_path / "run"), "wandb": True, **given})
        problems = contradictions(config)
        assert all(problem.startswith("--warmup_steps") for problem in problems)  # of a few steps all may be warm-up
        return config
    return make


def words(given: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in given.items()]


@pytest.fixture
def program(run_main, tiny, tmp_path, sinks):
    """Runs distill.py with a tiny run's keys and more arguments: (exit status, stdout, stderr)."""
    return partial(run_main, distill, *words({**tiny, "out_dir": tmp_path / "run", "wandb": True}))


@pytest.fixture(autouse=True, scope="module")
def ted_has_a_first_stage():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TED, "STAGE_1", 0.5)  # of 8 steps
        yield


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """A function: the folder of an arm's tiny run to which nothing happened; ddk's and ted's save each step."""
    made = {}

    def run(method: str = "ddk") -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("straight") / method
            save_every = 1 if method in ("ddk", "ted") else 8
            train(resolve_config({**tiny, "method": method, "out_dir": str(made[method]), "keep": 0,
                                  "save_every": save_every}))
        return made[method]
    return run


def checkpoints(out_dir: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(path.name[5:]) for path in out_dir.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def read_state(folder: Path) -> dict:
    return json.loads((folder / "train_state.json").read_text())


def alike(one, other) -> bool:
    """Whether what two .pt files hold is equal to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one.equal(other) if isinstance(one, torch.Tensor) else one == other


def assert_same_run(out_dir: Path, other: Path):
    """All lines of metrics (the configuration aside) and all that the last checkpoint holds are equal to the bit."""
    assert read_lines(out_dir)[1:] == read_lines(other)[1:]
    folder, other_folder = (run / f"step_{checkpoints(run)[-1]:08d}" for run in (out_dir, other))
    names = {path.name for path in folder.iterdir()}
    assert folder.name == other_folder.name and names == {path.name for path in other_folder.iterdir()}
    for name in names - {"optimizer.pt", "manifest.json"}:
        assert (folder / name).read_bytes() == (other_folder / name).read_bytes(), name
    assert alike(*(torch.load(path / "optimizer.pt", weights_only=True) for path in (folder, other_folder)))


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def natural(data_dir) -> list[float]:
    windows = TokenBins(data_dir, T).n_windows
    return [windows[name] / sum(windows.values()) for name in NAMES]


def exact_softmax(weights: list, exponents: list) -> list[Decimal]:
    """weight · exp(exponent), normalized, in 50 digits."""
    getcontext().prec = 50
    raised = [Decimal(weight) * Decimal(exponent).exp() for weight, exponent in zip(weights, exponents)]
    return [value / sum(raised) for value in raised]


def exact_factors(lines: list[dict], alpha: str) -> list[list[float]]:
    """r_0 by Eq. 1 and then r_t by Eq. 2, from the perplexities of mixture lines alone."""
    factors = []
    for line in lines:
        ratios = [Decimal(d["student_ppl"]) / Decimal(d["teacher_ppl"]) for d in line["domains"].values()]
        if factors:
            psi = exact_softmax(factors[-1], ratios)
            factors.append([Decimal(alpha) * share + (1 - Decimal(alpha)) / len(ratios) for share in psi])
        else:
            factors.append(exact_softmax([1] * len(ratios), ratios))
    return [[float(value) for value in factor] for factor in factors]


def first_batch(data_dir, probs=None) -> tuple[np.ndarray, torch.Tensor]:
    """Domain ids and windows of a run's first step."""
    bins = TokenBins(data_dir, T)
    sampler = MixtureSampler(bins.n_windows, B, seed=0)
    if probs:
        sampler.probs = probs
    ids, window_ids = sampler.next_batch()
    return ids, torch.from_numpy(bins.train_windows(ids, window_ids))


def new_student(layers: int = 1, seed: int = 0, rows: int = 257) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig.scratch(layers, 32, rows, T))


# Changes of a folder


def copy_of(folder: Path, to: Path, change=lambda folder: None) -> Path:
    shutil.copytree(folder, to)
    change(to)
    return to


def put(name: str, raw: bytes):
    return lambda folder: (folder / name).write_bytes(raw)


def drop(name: str):
    return lambda folder: (folder / name).unlink()


def edit(name: str, change=lambda content: None, **values):
    """Change a JSON file; what `change` returns, if anything, replaces its content."""
    def apply(folder: Path):
        content = json.loads((folder / name).read_text())
        replaced = change(content)
        if replaced is None:
            content.update(values)
        (folder / name).write_text(json.dumps(content if replaced is None else replaced))
    return apply


def sign(folder: Path):
    """Make the manifest of a changed checkpoint fit."""
    hashes = {path.name: file_sha256(path) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(hashes))


def change_tensors(change):
    """`change` a model's tensors: a function of their dict."""
    def apply(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


# ------------ Alg. 1 --------------------------------------------------------------------------------------------------


def test_a_whole_run_follows_alg_1(config, data_dir, tmp_path):
    folder = train(config(alpha=0.7, gamma=0.3))
    lines = read_lines(tmp_path / "run", "mixture")
    assert [(line["t"], line["step"]) for line in lines] == [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]
    factors = exact_factors(lines, "0.7")
    for line, factor in zip(lines, factors):
        assert list(line["domains"]) == list(line["r"]) == NAMES
        r = factor if line["t"] > 0 else natural(data_dir)  # the first interval draws from the data as it is
        assert list(line["r"].values()) == pytest.approx(r, abs=1e-12)
    assert read_state(folder)["rule_state"]["factor"] == pytest.approx(factors[-1], abs=1e-12)

    # What was drawn in an interval follows the r that stood at its start, to within one window a step.
    for before, after in zip(lines, lines[1:]):
        for name in NAMES:
            drawn = (after["domains"][name]["tokens"] - before["domains"][name]["tokens"]) / T
            assert abs(drawn - 2 * B * before["r"][name]) < 2
    assert all(sum(d["tokens"] for d in line["domains"].values()) == line["step"] * B * T for line in lines)

    # The student is trained, by Eq. 3, and measured anew; the teacher stays as it is.
    for name in NAMES:
        domains = [line["domains"][name] for line in lines]
        assert all(domain["ratio"] == domain["student_ppl"] / domain["teacher_ppl"] for domain in domains)
        assert len({domain["student_ppl"] for domain in domains}) == 5
        assert len({domain["teacher_ppl"] for domain in domains}) == 1
        assert domains[-1]["student_ppl"] < domains[0]["student_ppl"]
    for line in read_lines(tmp_path / "run", "train"):
        assert line["kl"] > 0 and line["loss"] == pytest.approx(line["ce"] + 0.3 * line["kl"], rel=1e-5)

    # What is counted
    windows = TokenBins(data_dir, T).n_windows
    for line in lines:
        for name, domain in line["domains"].items():
            assert domain["epochs"] == domain["tokens"] / T / windows[name]
    assert [line["tokens"] for line in read_lines(tmp_path / "run", "train")] == [n * B * T for n in range(1, 9)]


def test_the_time_that_is_left_is_told_from_the_steps_of_this_process(config, at, tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)

    def perf_counter():
        clock.now += 1
        return clock.now

    monkeypatch.setattr(distill, "time", types.SimpleNamespace(perf_counter=perf_counter))
    at["mixture", 0] = lambda: setattr(clock, "now", 1000.0)  # a slow first evaluation
    at["train", 4] = TERM
    with pytest.raises(SystemExit):
        train(config())
    train(config())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["kind"] == "train"):
        done = line["step"]
        if line["step"] > 4:
            done -= 4
        assert line["tokens_per_s"] == B * T  # a step takes a second of this clock, and one passes between two
        assert line["eta_s"] == pytest.approx((2 * done - 1) / done * (8 - line["step"]))


@pytest.mark.parametrize("method", ARMS)
def test_each_arm_draws_by_its_rule(straight, data_dir, method):
    lines = read_lines(straight(method), "mixture")
    for line, factor in zip(lines, exact_factors(lines, "0.5"), strict=True):
        r = natural(data_dir)
        if method == "ddk_es":
            r = [1 / 3] * 3
        elif method == "ddk_no_fs" and line["t"] > 0:
            (r,) = exact_factors([line], "0.5")
        elif method == "ddk" and line["t"] > 0:
            r = factor
        assert list(line["r"].values()) == pytest.approx(r, abs=1e-12)
    alone = method in ("cpt", "doremi_proxy")
    assert all((line["kl"] == 0) == alone for line in read_lines(straight(method), "train"))


def test_what_is_drawn_depends_on_r_and_the_seed_alone(config, data_dir, tmp_path, monkeypatch):
    """Not on the arm, the evaluations or micro-batches; and a run does not touch the random numbers of others."""
    drawn = []
    original = TokenBins.train_windows

    def train_windows(bins, domain_ids, window_ids):
        drawn.append((domain_ids.tolist(), window_ids.tolist()))
        return original(bins, domain_ids, window_ids)

    monkeypatch.setattr(TokenBins, "train_windows", train_windows)
    random_state = torch.get_rng_state()
    sampler = MixtureSampler(TokenBins(data_dir, T).n_windows, B, seed=3)
    expected = [tuple(ids.tolist() for ids in sampler.next_batch()) for _ in range(8)]
    losses = {}
    for name, variant in {"often": dict(interval=1), "never": dict(interval=100, val_samples=3),
                          "cpt": dict(method="cpt"), "micro": dict(micro_batch_size=2)}.items():
        drawn.clear()
        train(config(**{"method": "kd", "seed": 3, "out_dir": str(tmp_path / name), **variant}))
        assert drawn == expected
        losses[name] = [line["loss"] for line in read_lines(tmp_path / name, "train")]
    assert losses["often"] == losses["never"] == pytest.approx(losses["micro"], rel=1e-5)
    assert torch.get_rng_state().equal(random_state)


@pytest.mark.parametrize("method, direction, rows", [("ddk", "forward", 264), ("minillm", "reverse", 257)])
def test_three_updates_equal_three_written_out(config, data_dir, teacher, tmp_path, method, direction, rows):
    """The divergence's direction, γ, T, clipping, learning rates, initial weights and padded heads take part."""
    big = GPT(GPTConfig.scratch(2, 64, 300, 64)).requires_grad_(False)
    for mine, theirs in zip(big.parameters(), GPT.from_pretrained(teacher).parameters()):
        mine.data[:len(theirs)] = theirs.data
    big.save_pretrained(tmp_path / "big")
    student = new_student(seed=1, rows=rows)
    student.save_pretrained(tmp_path / "padded")
    folder = train(config(method=method, teacher=str(tmp_path / "big"), gamma=0.3, temperature=2.0, grad_clip=0.05,
                          student="scratch:1x32" if rows == 257 else str(tmp_path / "padded"), weight_decay=0.5, seed=1,
                          max_steps=3, interval=100))

    # Perplexities are over the tokenizer's ids alone, for both models.
    bins = TokenBins(data_dir, T)
    (line,) = read_lines(tmp_path / "run", "mixture")
    for name in NAMES:
        windows = torch.from_numpy(bins.val_windows(name, 5))
        for role, model in (("student", student), ("teacher", big)):
            logits = model(windows[:, :-1]).detach()[..., :257]
            ppl = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()
            assert line["domains"][name][f"{role}_ppl"] == pytest.approx(ppl, rel=1e-5)

    sampler = MixtureSampler(bins.n_windows, B, seed=1)
    matrices = [p for p in student.parameters() if p.dim() == 2]
    vectors = [p for p in student.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0}],
                                  betas=(0.9, 0.95))
    for line, lr in zip(read_lines(tmp_path / "run", "train"), (1.5e-3, 3e-3, 3e-4), strict=True):
        batch = torch.from_numpy(bins.train_windows(*sampler.next_batch()))
        loss, ce, kl = dense_distillation_loss(student(batch[:, :-1]), big(batch[:, :-1]), batch[:, 1:], gamma=0.3,
                                               temperature=2.0, vocab_size=257, direction=direction)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.05)
        assert norm > 0.05
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        optimizer.step()
        logged = [line[key] for key in ("loss", "ce", "kl", "grad_norm", "lr")]
        assert logged == pytest.approx([loss.item(), ce.item(), kl.item(), norm.item(), lr], rel=1e-4)
    trained = GPT.from_pretrained(folder).state_dict()
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def cosine(n: int) -> list[float]:
    """From 1e-2 to 1e-3 in n steps."""
    return [1e-3 + 9e-3 * (1 + math.cos(math.pi * i / (n - 1))) / 2 for i in range(n)]


@pytest.mark.parametrize("warmup_steps, lrs", [
    (0, cosine(6)), (2, [5e-3, 1e-2, *cosine(4)]), (5, [2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1e-3]),
    (20, [5e-4, 1e-3, 1.5e-3, 2e-3, 2.5e-3, 3e-3])])
def test_the_learning_rate_warms_up_and_then_falls_as_a_cosine_to_the_last_step(config, tmp_path, warmup_steps, lrs):
    train(config(method="cpt", lr=1e-2, min_lr=1e-3, max_steps=6, warmup_steps=warmup_steps, interval=10))
    assert [line["lr"] for line in read_lines(tmp_path / "run", "train")] == pytest.approx(lrs)


def test_a_grad_clip_of_0_does_not_clip(config, tmp_path):
    for name, grad_clip in (("none", 0.0), ("high", 1e9)):
        train(config(method="cpt", grad_clip=grad_clip, max_steps=2, interval=10, save_every=0,
                     out_dir=str(tmp_path / name)))
    assert read_lines(tmp_path / "none")[1:] == read_lines(tmp_path / "high")[1:]


def test_one_pass_of_the_teacher_may_serve_several_of_the_student(config, straight, tmp_path, monkeypatch):
    sizes = []
    forward = GPT.forward

    def counted(self, idx, loss_fn=None):
        if torch.is_grad_enabled() or loss_fn is distill.hidden_and_head:
            sizes.append((self.config.num_hidden_layers, len(idx)))
        return forward(self, idx, loss_fn)

    monkeypatch.setattr(GPT, "forward", counted)
    train(config(micro_batch_size=2, teacher_micro_batch_size=4, max_steps=8))
    assert sizes[:6] == [(2, 4), (1, 2), (1, 2)] * 2  # the teacher has two layers
    for line, other in zip(read_lines(tmp_path / "run", "train"), read_lines(straight(), "train"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_a_fixed_mixture_takes_the_place_of_the_natural_one(config, tmp_path):
    train(config(method="kd", mixture="digits=1,letters=0,signs=3", max_steps=4))
    lines = read_lines(tmp_path / "run", "mixture")
    assert all(line["r"] == {"letters": 0, "digits": 0.25, "signs": 0.75} for line in lines)
    tokens = {name: domain["tokens"] for name, domain in lines[-1]["domains"].items()}
    assert tokens == {"letters": 0, "digits": 4 * 2 * T, "signs": 4 * 6 * T}


def test_domains_train_and_evaluate_on_these_only(config, straight, data_dir, tmp_path):
    train(config(domains="signs,letters", max_steps=2))
    lines = read_lines(tmp_path / "run", "mixture")
    assert all(list(line["domains"]) == list(line["r"]) == ["signs", "letters"] for line in lines)
    windows = TokenBins(data_dir, T).n_windows
    assert lines[0]["r"]["signs"] == windows["signs"] / (windows["signs"] + windows["letters"])
    all_domains = read_lines(straight(), "mixture")[0]["domains"]
    for name, domain in lines[0]["domains"].items():  # each with its own perplexities, whatever the order
        assert domain == all_domains[name]
    assert sum(domain["tokens"] for domain in lines[-1]["domains"].values()) == 2 * B * T


def test_the_teacher_is_measured_once_in_a_run_and_kept_in_its_state(config, at, tmp_path):
    at["train", 4] = TERM
    with pytest.raises(SystemExit):
        train(config())
    folder = tmp_path / "run" / "step_00000004"
    first = read_lines(tmp_path / "run", "mixture")[0]["domains"]
    kept = read_state(folder)["teacher_ppl"]
    assert kept == {name: domain["teacher_ppl"] for name, domain in first.items()}
    changed = {name: 2 * ppl for name, ppl in kept.items()}
    edit("train_state.json", teacher_ppl=changed)(folder)
    sign(folder)
    train(config())
    for line in read_lines(tmp_path / "run", "mixture")[-2:]:
        assert {name: domain["teacher_ppl"] for name, domain in line["domains"].items()} == changed


def test_stop_ratio_ends_a_run_early(config, straight, tmp_path):
    worst = [max(d["ratio"] for d in line["domains"].values()) for line in read_lines(straight(), "mixture")]
    assert worst == sorted(worst, reverse=True)
    folder = train(config(stop_ratio=worst[2]))
    assert folder.name == "step_00000004" and read_state(folder)["finished"]
    assert [line["step"] for line in read_lines(tmp_path / "run", "end")] == [4]


def test_the_last_step_is_evaluated_and_saved_whatever_k(config, tmp_path):
    folder = train(config(max_steps=3, save_every=0))
    assert folder == tmp_path / "run" / "step_00000003" and checkpoints(tmp_path / "run") == [3]
    mixture = read_lines(tmp_path / "run", "mixture")
    assert [line["step"] for line in mixture] == [0, 2]
    (end,) = read_lines(tmp_path / "run", "end")
    assert end["step"] == 3 and list(end["domains"]) == NAMES
    assert end["domains"]["digits"]["student_ppl"] != mixture[1]["domains"]["digits"]["student_ppl"]


@pytest.mark.parametrize("method", ARMS)
def test_max_steps_0_only_evaluates_by_any_method(program, tmp_path, method):
    status, out, err = program("--max_steps=0", f"--method={method}")
    assert (status, err) == (0, "") and f"The student is in {tmp_path / 'run' / 'step_00000000'}" in out
    assert [line["kind"] for line in read_lines(tmp_path / "run")] == ["run", "mixture", "end"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not (tmp_path / "run" / "mixture.txt").exists()


def test_cpt_goes_without_a_teacher(program, tmp_path):
    status, out, err = program("--method=cpt", "--teacher=", "--max_steps=2", "--warmup_steps=0")
    assert (status, err) == (0, "") and "worst ratio" not in out and "WARNING" not in out
    for line in read_lines(tmp_path / "run", "mixture"):
        assert all(domain["teacher_ppl"] is domain["ratio"] is None for domain in line["domains"].values())


def test_bfloat16_computes_otherwise_than_float32(config, straight, tmp_path):
    train(config(dtype="bfloat16"))
    one, two = ([line["loss"] for line in read_lines(run, "train")] for run in (tmp_path / "run", straight()))
    assert one != two and one == pytest.approx(two, rel=0.02)

    # The student's numbers too, not only the teacher's
    runs = (tmp_path / "run", straight())
    one, two = (read_lines(run, "mixture")[0]["domains"] for run in runs)
    assert all(one[name]["student_ppl"] != two[name]["student_ppl"] for name in NAMES)
    assert len({read_lines(run, "train")[0]["ce"] for run in runs}) == 2


def test_fsdp_gathers_in_the_dtype_of_the_products_and_reduces_in_float32(monkeypatch):
    wrapped = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distill, "init_device_mesh", lambda *_, **__: None)
    monkeypatch.setattr(distill, "set_model_state_dict", lambda *_, **__: None)
    monkeypatch.setattr(distill, "fully_shard", lambda module, mesh, mp_policy: wrapped.append((module, mp_policy)))
    student = new_student(layers=2)
    distill.spread(student, Config(parallel="fsdp", dtype="bfloat16", device="cpu"), shard=True)
    assert [module for module, _ in wrapped] == [*student.layers, student]
    for _, policy in wrapped:
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert not policy.cast_forward_inputs


@pytest.mark.parametrize("again", [False, True])
def test_with_checkpoint_activations_each_block_is_computed_a_second_time(config, again):
    student = new_student(layers=2)
    passes = []
    for layer in student.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    distill.spread(student, resolve_auto(config(checkpoint_activations=again)), shard=False)
    student(torch.arange(8)[None]).sum().backward()
    assert len(passes) == (4 if again else 2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_blocks_are_traced_in_the_first_step_alone(config, straight, at, tmp_path, monkeypatch, recomputed,
                                                            backend):
    """Traced as ever, but run as Python where `backend` is eager: what recompiles does not depend on it."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kw: compile_module(module, backend=backend, **kw))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    traced = []
    for step in range(1, 9):
        at["train", step] = lambda: traced.append(graphs["unique_graphs"] - before)
    folder = train(config(compile="true", micro_batch_size=2, checkpoint_activations=recomputed))
    assert traced[0] > 0 and len(set(traced)) == 1, traced
    for line, plain in zip(read_lines(tmp_path / "run", "train"), read_lines(straight(), "train"), strict=True):
        assert line["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    names, plain = (load_file(run / folder.name / "model.safetensors").keys() for run in (folder.parent, straight()))
    assert names == plain


# ------------ TED -----------------------------------------------------------------------------------------------------


def layer_outputs(model: GPT, inputs: torch.Tensor) -> list[torch.Tensor]:
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output.detach()))
    model(inputs)
    return outputs


def optimizer_of(folder: Path) -> dict:
    return torch.load(folder / "optimizer.pt", weights_only=True)


def test_ted_with_no_weight_on_its_distance_is_kd(config, straight, tmp_path, monkeypatch):
    """Its first stage changes no model, and its filters are in no model that it saves."""
    monkeypatch.setattr(TED, "WEIGHT", 0.0)
    folder = train(config(method="ted"))
    assert read_lines(tmp_path / "run")[1:] == read_lines(straight("kd"))[1:]
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (straight("kd") / folder.name / name).read_bytes()
    assert optimizer_of(straight("kd") / folder.name)["added_loss"] is None


@pytest.mark.parametrize("layers, most, pairs", [(1, 4, [(0, 1)]), (3, 4, [(1, 0), (2, 1)]), (3, 1, [(2, 1)])])
def test_teds_loss_adds_the_distance_of_evenly_spaced_layers(config, data_dir, teacher, tmp_path, monkeypatch, layers,
                                                             most, pairs):
    """At the first step, with filters as they begin: the identity, cut to (64, 32) for the student."""
    monkeypatch.setattr(TED, "MAX_PAIRS", most)
    monkeypatch.setattr(TED, "WEIGHT", 0.5)
    train(config(method="ted", student=f"scratch:{layers}x32", max_steps=1, micro_batch_size=2, lr=0, min_lr=0))
    _, windows = first_batch(data_dir)
    outputs_S = layer_outputs(new_student(layers), windows[:, :-1])
    outputs_T = layer_outputs(GPT.from_pretrained(teacher), windows[:, :-1])
    distances = []
    for i, j in pairs:
        difference = F.pad(outputs_S[i], (0, 32)) - outputs_T[j]
        distances.append((difference.square().sum(dim=-1) / outputs_T[j].square().sum(dim=-1)).mean())
    (line,) = read_lines(tmp_path / "run", "train")
    distance = torch.stack(distances).mean().item()
    assert distance > 0.1
    assert line["loss"] == pytest.approx(line["ce"] + 0.2 * line["kl"] + 0.5 * distance, rel=1e-4)


def test_teds_first_stage_teaches_the_filters_to_predict(config, data_dir, teacher, monkeypatch):
    """The loss of each filtered layer, read by the teacher's norm and head, falls."""
    monkeypatch.setattr(TED, "STAGE_1", 30)  # of one step
    folder = train(config(method="ted", max_steps=1, lr=1e-2, warmup_steps=10**6))
    _, windows = first_batch(data_dir)
    model_T = GPT.from_pretrained(teacher)
    for role, model in (("student", new_student()), ("teacher", model_T)):
        weight = optimizer_of(folder)["added_loss"]["filters"][f"{role}.0.weight"]
        output = layer_outputs(model, windows[:, :-1])[-1]
        losses = []
        for matrix in (torch.eye(*weight.shape), weight):
            logits = (model_T.norm(output @ matrix.T) @ model_T.head_weight.T).detach()
            losses.append(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
        assert losses[1] < 0.9 * losses[0], role


def test_teds_filters_are_clipped_with_the_student_and_go_on_being_trained(config, straight, monkeypatch):
    monkeypatch.setattr(TED, "WEIGHT", 10.0)
    saved = optimizer_of(train(config(method="ted", max_steps=1, grad_clip=0.05)))
    norms = []
    for states in (saved["optimizer"]["state"], saved["added_loss"]["optimizer"]["state"]):
        gradient = torch.cat([moments["exp_avg"].flatten() for moments in states.values()]) / 0.1  # AdamW's 1 − β₁
        norms.append(gradient.norm().item())
    assert min(norms) > 0.001 and math.hypot(*norms) == pytest.approx(0.05, rel=1e-5)
    before, after = (optimizer_of(straight("ted") / f"step_0000000{step}")["added_loss"]["filters"] for step in (4, 8))
    assert not before["student.0.weight"].equal(after["student.0.weight"])
    assert before["teacher.0.weight"].equal(after["teacher.0.weight"])


def test_teds_filters_follow_the_learning_rate(straight):
    for line in read_lines(straight("ted"), "train"):
        saved = optimizer_of(straight("ted") / f"step_{line['step']:08d}")["added_loss"]["optimizer"]
        assert [group["lr"] for group in saved["param_groups"]] == [line["lr"]]


# ------------ DoReMi --------------------------------------------------------------------------------------------------


def exact_doremi(alpha: list[float], excess: list[float]) -> list[float]:
    return [float(Decimal("0.999") * share + Decimal("0.001") / len(alpha)) for share in exact_softmax(alpha, excess)]


def test_a_doremi_proxy_weighs_the_loss_by_its_excess(config, data_dir, teacher, tmp_path):
    """The first step, written out; signs is left out of the data, so that its λ stays 0."""
    folder = train(config(method="doremi_proxy", mixture="letters=3,digits=1,signs=0", max_steps=1, micro_batch_size=4))
    ids, windows = first_batch(data_dir, {"letters": 3, "digits": 1, "signs": 0})
    proxy, reference = (
        F.cross_entropy(model(windows[:, :-1]).detach().transpose(1, 2), windows[:, 1:], reduction="none")
        for model in (new_student(), GPT.from_pretrained(teacher)))
    over = (proxy - reference).clamp(min=0)
    excess = [over[torch.from_numpy(ids == i)].mean().item() for i in range(2)] + [0.0]
    assert min(excess[:2]) > 0
    alpha = exact_doremi([1 / 3] * 3, excess)
    state = read_state(folder)["weights_state"]
    assert state["excess"] == pytest.approx(excess, rel=1e-5)
    assert state["alpha"] == state["total"] == pytest.approx(alpha, rel=1e-5)
    weights = torch.tensor([alpha[i] / (0.75, 0.25)[i] for i in ids])[:, None]
    (line,) = read_lines(tmp_path / "run", "train")
    assert line["loss"] == pytest.approx(((weights * proxy).sum() / (weights.sum() * T)).item(), rel=1e-5)


def test_a_domain_that_is_not_drawn_keeps_its_excess(config, data_dir, teacher):
    ids, windows = first_batch(data_dir, {"letters": 1, "digits": 1, "signs": 0})
    before = {"alpha": [0.2, 0.3, 0.5], "excess": [9.0, 9.0, 1.5], "total": [0.0] * 3}
    sampler = MixtureSampler(TokenBins(data_dir, T).n_windows, B, seed=0)
    _, state = distill.doremi_window_weights(before, new_student(), GPT.from_pretrained(teacher), windows, ids, sampler,
                                             resolve_auto(config(method="doremi_proxy")))
    assert state["excess"][2] == 1.5 and 9.0 not in state["excess"]
    assert state["alpha"] == pytest.approx(exact_doremi(before["alpha"], state["excess"]), rel=1e-9)


DOREMI = """
distill.py {keys} --method=cpt --out_dir=out/cpt
distill.py {keys} --method=doremi_proxy --teacher=out/cpt/step_00000008 --out_dir=out/proxy --save_every=1 --keep=0
distill.py {keys} --method=cpt --mixture="$(cat out/proxy/mixture.txt)" --out_dir=out/doremi
"""


def test_cpt_and_doremi_is_three_commands(run_main, tiny, tmp_path, monkeypatch):
    """A reference, a proxy, and the student in the mixture that the proxy found; as a shell makes words of them."""
    monkeypatch.chdir(tmp_path)
    for command in DOREMI.format(keys=" ".join(words(tiny))).strip().splitlines():
        shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
        status, _, err = run_main(distill, *shell.stdout.splitlines()[1:])
        assert (status, err) == (0, "")

    # α of every step is DoReMi's Alg. 1, from the excess losses that the proxy had.
    alpha = [1 / 3] * 3
    total = [0] * 3
    for step in range(1, 9):
        state = read_state(tmp_path / "out" / "proxy" / f"step_{step:08d}")["weights_state"]
        alpha = exact_doremi(alpha, state["excess"])
        total = [a + b for a, b in zip(alpha, total)]
        assert state["alpha"] == pytest.approx(alpha, rel=1e-9) and state["total"] == pytest.approx(total, rel=1e-9)
    assert alpha != pytest.approx([1 / 3] * 3, abs=1e-3)

    # The mixture is the mean of α over the steps, and the student draws by it.
    for line in read_lines(tmp_path / "out" / "doremi", "mixture"):
        assert line["r"] == pytest.approx({name: share / 8 for name, share in zip(NAMES, total)}, rel=1e-9)


# ------------ Forks are made in one place -----------------------------------------------------------------------------


def average_rule(state, student_ppl, teacher_ppl, base, alpha):
    """r by Eq. 1 from a moving average of the ratios."""
    ratios = np.array(student_ppl) / np.array(teacher_ppl)
    if state is not None:
        ratios = alpha * ratios + (1 - alpha) * np.array(state["ratios"])
    return discrepancy_factor(ratios + 1, np.ones(len(ratios))), {"ratios": ratios.tolist()}


def test_a_rule_with_a_state_is_a_function_and_a_row(program, config, at, run_main, tmp_path, monkeypatch):
    """It runs, logs, replays, and resumes to the bit."""
    monkeypatch.setitem(RULES, "average", average_rule)
    monkeypatch.setitem(ARMS, "average", Arm("r by a moving average of the ratios", rule="average"))
    whole = tmp_path / "straight"
    assert program("--method=average", "--alpha=0.3", f"--out_dir={whole}")[0] == 0
    average = None
    for line in read_lines(whole, "mixture"):
        ratios = [domain["ratio"] for domain in line["domains"].values()]
        average = [0.3 * new + 0.7 * old for new, old in zip(ratios, average or ratios)]
        exponentials = [math.exp(ratio) for ratio in average]
        assert list(line["r"].values()) == pytest.approx([e / sum(exponentials) for e in exponentials])

    status, out, err = run_main(sample_mixture, f"--metrics={whole / 'metrics.jsonl'}")
    assert (status, err) == (0, "") and "by the rule average" in out
    assert float(re.search(r"largest difference from the run's own r: (\S+)", out)[1]) <= 1e-12

    at["train", 5] = TERM
    with pytest.raises(SystemExit):
        train(config(method="average", alpha=0.3))
    train(config(method="average", alpha=0.3))
    assert_same_run(tmp_path / "run", whole)


def test_a_number_added_in_measured_domains_is_logged_shown_and_plotted(program, sinks, run_main, tmp_path,
                                                                        monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    original = distill.measured_domains

    def measured_domains(*args):
        domains = original(*args)
        for domain in domains.values():
            domain["gap"] = domain["student_ppl"] - domain["teacher_ppl"]
        return domains

    monkeypatch.setattr(distill, "measured_domains", measured_domains)
    _, out, _ = program()
    first, *_, last = [line["domains"] for line in read_lines(tmp_path / "run", "mixture")]
    assert all(d["gap"] == d["student_ppl"] - d["teacher_ppl"] for d in last.values())
    assert (8, "digits/gap", last["digits"]["gap"]) in sinks.wandb[0].numbers

    # The table shows each number from the first evaluation to the last.
    table = out.partition("first → last evaluation")[2]
    assert table.split()[:len(last["digits"])] == list(last["digits"])
    for name in NAMES:
        (row,) = [line for line in table.splitlines() if line.startswith(name)]
        for key in ("student_ppl", "gap"):
            assert f"{first[name][key]:.2f} → {last[name][key]:.2f}" in row
        assert f"0 → {last[name]['tokens']:,}" in row
    worst = [max(domain["ratio"] for domain in domains.values()) for domains in (first, last)]
    assert f"worst ratio: {worst[0]:.2f} → {worst[1]:.2f}" in table

    titles = []

    def savefig(figure, *_, **__):
        titles.extend(ax.get_title() for ax in figure.axes)

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    assert run_main(sample_mixture, f"--metrics={tmp_path / 'run' / 'metrics.jsonl'}", "--plot=fig.png")[0] == 0
    assert {"r", "ratio", "gap"} <= set(titles)


# ------------ What is written -----------------------------------------------------------------------------------------


def test_metrics_have_the_promised_keys(straight):
    lines = [json.loads(line) for line in (straight() / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "mixture"] + ["train", "train", "mixture"] * 4 + ["end"]
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 8]
    run, mixture, step, end = lines[0], lines[1], lines[2], lines[-1]
    assert {"config", "rule", "base", "versions", "parameters"} <= set(run) and "git" in run["versions"]
    assert run["config"]["seed"] == 0 and run["rule"] == "ddk" and list(run["base"]) == NAMES
    assert run["parameters"]["student"] == sum(p.numel() for p in new_student().parameters())
    assert set(mixture) == {"kind", "step", "t", "r", "domains"}
    assert set(mixture["domains"]["signs"]) == {"student_ppl", "teacher_ppl", "ratio", "tokens", "epochs"}
    assert set(step) == {"kind", "step", "loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "eta_s"}
    assert step["tokens"] == B * T and end["domains"] == lines[-2]["domains"]


def test_the_next_windows_are_measured_at_the_end_and_steer_nothing(program, straight, data_dir, teacher, tmp_path):
    status, out, err = program("--test_samples=3", "--val_samples=5")
    assert (status, err) == (0, "")
    end, = read_lines(tmp_path / "run", "end")
    without, = read_lines(straight(), "end")
    bins = TokenBins(data_dir, T)
    models = {"student": GPT.from_pretrained(tmp_path / "run" / "step_00000008"),
              "teacher": GPT.from_pretrained(teacher)}
    for name in NAMES:
        tested = {key: value for key, value in end["domains"][name].items() if key.startswith("test_")}
        untested = end["domains"][name].keys() - tested
        assert without["domains"][name] == {key: end["domains"][name][key] for key in untested}
        windows = torch.from_numpy(bins.val_windows(name, 8)[5:])
        for role, model in models.items():
            with torch.no_grad():
                logits = model(windows[:, :-1])[..., :257]
            ce = F.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten()).item()
            assert tested[f"test_{role}_ppl"] == pytest.approx(math.exp(ce), rel=1e-5)
        assert tested["test_ratio"] == tested["test_student_ppl"] / tested["test_teacher_ppl"]
        assert f"{tested['test_ratio']:.2f}" in out.partition("first → last evaluation")[2]
    assert read_lines(tmp_path / "run", "train") == read_lines(straight(), "train")
    assert read_lines(tmp_path / "run", "mixture") == read_lines(straight(), "mixture")


def test_the_configuration_is_printed_and_saved_as_it_is_resolved(program, tmp_path):
    _, out, _ = program("--device=auto", "--max_steps=0", "--mixture=letters=3,digits=2,signs=1")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert saved.keys() == KEYS.keys() and saved["mixture"] == "letters=3,digits=2,signs=1"
    for key, value in saved.items():
        assert f"\n{key} = {value}\n" in f"\n{out}" and (value != "auto" or key == "resume")


def test_a_checkpoint_opens_in_transformers_with_equal_logits(straight):
    transformers = pytest.importorskip("transformers")
    folder = straight() / "step_00000008"
    other, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert transformers.AutoTokenizer.from_pretrained(folder)("abc").input_ids == [97, 98, 99]
    idx = torch.arange(48).view(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(folder)(idx), other(idx).logits, rtol=1e-5, atol=1e-5)


def test_ends_of_text_agree_in_all_files_of_a_checkpoint(config, straight, teacher, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = straight() / "step_00000008"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for settings in (transformers.AutoConfig.from_pretrained(folder),
                     transformers.GenerationConfig.from_pretrained(folder)):
        assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == (256, 256, 256)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 256

    # With a tokenizer of the user's, whose beginning and padding are tokens of their own, and a model that says else
    def give_own_tokenizer(folder: Path):
        settings = bytes_settings()
        end = settings["added_tokens"][0]
        settings["added_tokens"] += [{**end, "id": 257, "content": "<s>"}, {**end, "id": 258, "content": "<pad>"}]
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>",
                 "pad_token": {"content": "<pad>"}}
        for name in ("tokenizer_meta.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        put("tokenizer.json", json.dumps(settings).encode())(folder)
        put("tokenizer_config.json", json.dumps(names).encode())(folder)

    source = tmp_path / "source"
    new_student(rows=259).save_pretrained(source)
    edit("config.json", eos_token_id=7, bos_token_id=8)(source)
    for name in ("tokenizer_meta.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher / name, source)
    give_own_tokenizer(source)
    documents = [("x", f"text {i} " * 99) for i in range(9)]
    build_bins(tmp_path / "bins", load_tokenizer(source), documents, val_fraction=0.3)
    folder = train(config(data_dir=str(tmp_path / "bins"), teacher="", method="cpt", student=str(source), max_steps=0))
    for settings in (transformers.AutoConfig.from_pretrained(folder),
                     transformers.GenerationConfig.from_pretrained(folder)):
        assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == (256, 258, 257)


def test_the_files_of_a_checkpoint_may_be_read_by_whom_the_umask_lets(config, tmp_path):
    before = os.umask(0o027)
    folder = train(config(max_steps=0))
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_leaves_before_a_checkpoint_is_whole(tmp_path, monkeypatch, rank):
    done = []
    monkeypatch.setattr(distill, "save_checkpoint", lambda *_: done.append("saved"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "barrier", lambda: done.append("barrier"))
    distill.RunFolder(tmp_path).save(distill.TrainState(step=3), None, None, None, None, keep=2)
    assert done == ["saved", "barrier"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(config, monkeypatch):
    done = []
    sync = distill.fsync
    rename = os.replace

    def fsync(path):
        done.append(Path(path))
        sync(path)

    def replace(*paths):
        done.append(paths)
        rename(*paths)

    monkeypatch.setattr(distill, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    folder = train(config(max_steps=0))
    temporary = folder.with_name(folder.name + ".tmp")
    moment = done.index((temporary, folder))
    assert {temporary, *(temporary / path.name for path in folder.iterdir())} <= set(done[:moment])
    assert folder.parent in done[moment + 1:]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_of_other_files_is_refused_and_left_alone(config, tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"^--out_dir={tmp_path / 'run'}: has files, and is not the folder of a run"):
        train(config(resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_folder_with_no_more_than_a_lock_is_free_and_a_finished_run_keeps_its_configuration(config, tmp_path):
    with distill.locked(tmp_path / "run"):
        pass
    train(config(max_steps=0))
    record = (tmp_path / "run" / "config.json").read_bytes()
    train(config(max_steps=0, timeout=77))
    assert (tmp_path / "run" / "config.json").read_bytes() == record


class Exited(BaseException):
    """Stands for os._exit."""


def leave(status: int):
    raise Exited(status)


@pytest.mark.parametrize("error, status, message", [
    (SystemExit(138), 138, ""), (SystemExit(), 0, ""), (KeyboardInterrupt(), 130, ""), (BrokenPipeError(), 141, ""),
    (UserError("--a: wrong"), 2, "error: --a: wrong\n"),
    (RuntimeError("a mistake of ours"), 1, "Traceback .*RuntimeError: a mistake of ours\n"),
    (RuntimeError("[x/gloo/pair.cc:5] Connection closed by peer"), 2, "error: another process is gone, .*\n"),
    (dist.DistBackendError("NCCL error in: x.cpp\nLast error:\nno room in /dev/shm"), 2,
     "error: another process is gone, .*no room in /dev/shm.*\n")], ids=repr)
def test_what_ends_a_process_of_a_group_is_its_status_and_message(monkeypatch, capsys, error, status, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Exited) as ended, distill.process_group(Config(device="cpu")):
        raise error
    assert ended.value.args == (status,)
    assert re.fullmatch(message, capsys.readouterr().err, re.DOTALL)


def test_a_closed_output_ends_a_program_at_once_and_quietly(monkeypatch, capsys):
    def main():
        raise BrokenPipeError

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Exited) as ended:
        data.run_program(main)
    assert ended.value.args == (141,) and capsys.readouterr().err == ""


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    train(config(save_every=1, keep=3))
    assert checkpoints(tmp_path / "run") == [6, 7, 8] and not list((tmp_path / "run").glob("*.tmp"))


def test_tensorboard_and_wandb_get_the_numbers_of_every_line_once(config, sinks, tmp_path):
    sinks.at["train", 5] = TERM
    with pytest.raises(SystemExit):
        train(config(tensorboard=True))
    train(config(tensorboard=True))
    expected = []
    for line in read_lines(tmp_path / "run"):
        values = {f"{line['kind']}/{key}": value for key, value in line.items() if isinstance(value, int | float)}
        values |= {f"{name}/r": share for name, share in line.get("r", {}).items()}
        for name, domain in line.get("domains", {}).items():
            values |= {f"{name}/{key}": value for key, value in domain.items()}
        expected += [(line["step"], name, value) for name, value in values.items() if not name.endswith("/step")]
    for opened in (sinks.tensorboard, sinks.wandb):
        assert [sink.closed for sink in opened] == [1, 1]
        numbers = opened[0].numbers + opened[1].numbers
        clock = ("train/tokens_per_s", "train/eta_s")
        assert sorted(number for number in numbers if number[1] not in clock) == sorted(expected)
    assert [sink.keywords["purge_step"] for sink in sinks.tensorboard] == [1, 6]  # what a resumed run does anew
    first, second = (sink.keywords for sink in sinks.wandb)
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"]["seed"] == 0


def test_after_resume_never_wandb_gets_a_run_of_its_own(config, sinks):
    for _ in range(2):
        train(config(resume="never", max_steps=0))
    first, second = (sink.keywords["id"] for sink in sinks.wandb)
    assert first != second


# ------------ Stopped and resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, events", [
    *((method, [("train", 5, TERM)]) for method in ARMS),
    ("ddk", [("mixture", 0, TERM), ("train", 1, TERM), ("train", 3, TERM), ("mixture", 4, TERM), ("train", 7, TERM)]),
    ("ddk", [("train", 4, TERM)]), ("ddk", [("mixture", 2, TERM), ("train", 3, kill), ("train", 6, TERM)]),
    ("ddk", [("train", 1, kill)]), ("ddk", [("train", 4, kill)]), ("ted", [("train", 7, kill)]),
    ("ddk", [("end", 8, kill)])],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{line} {step}" for line, step, _ in value))
def test_stopped_or_killed_anywhere_and_resumed_equals_straight_to_the_bit(config, at, straight, tmp_path, method,
                                                                           events):
    for kind, step, event in events:
        at[kind, step] = event
        with pytest.raises((SystemExit, Killed)):
            train(config(method=method))
        if event is TERM:
            assert checkpoints(tmp_path / "run")[-1] == step
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write('{"kind": "train", "step"')  # a torn line
    train(config(method=method))
    assert_same_run(tmp_path / "run", straight(method))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_after_the_step_and_ends_with_128_and_its_number(program, at, tmp_path, number):
    at["train", 3] = partial(send, number)
    with handled(number, print):
        status, out, err = program()
        assert signal.getsignal(number) is print
    assert (status, err) == (128 + number, "")
    assert f"stopped by {number.name}, saved as step_00000003" in out and checkpoints(tmp_path / "run") == [3]


def test_a_signal_in_the_last_step_or_one_that_is_ignored_lets_the_run_finish(config, at, straight, tmp_path):
    at["train", 3] = partial(send, signal.SIGHUP)
    at["train", 8] = TERM
    with handled(signal.SIGHUP, signal.SIG_IGN):  # as nohup leaves it
        train(config())
    assert_same_run(tmp_path / "run", straight())


def test_a_second_ctrl_c_exits_at_once(program, at, tmp_path):
    at["train", 3] = lambda: (send(signal.SIGINT), send(signal.SIGINT))
    with handled(signal.SIGINT, signal.default_int_handler):
        status, out, err = program("--save_every=2")
    assert (status, err) == (130, "") and "saved as" not in out
    assert checkpoints(tmp_path / "run") == [2] and read_lines(tmp_path / "run")[-1]["step"] == 3


def test_a_signal_straight_after_a_resume_writes_no_checkpoint_again(config, at, straight, tmp_path, monkeypatch):
    at["train", 4] = TERM
    with pytest.raises(SystemExit):
        train(config())
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "step_00000004").iterdir()}
    catch = signal.signal
    waiting = [signal.SIGTERM]

    def catch_one_that_comes_at_once(number, handler):
        old = catch(number, handler)
        if number in waiting:
            send(waiting.pop())
        return old

    monkeypatch.setattr(signal, "signal", catch_one_that_comes_at_once)
    with pytest.raises(SystemExit) as stopped:
        train(config())
    assert stopped.value.code == 128 + signal.SIGTERM and not waiting
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "step_00000004").iterdir()}
    train(config())
    assert_same_run(tmp_path / "run", straight())


def test_a_finished_run_says_so_and_does_nothing(program, straight, monkeypatch):
    before = files_of(straight())
    monkeypatch.setattr(GPT, "from_pretrained", None)  # nothing is loaded
    status, out, err = program(f"--out_dir={straight()}")
    assert (status, err) == (0, "") and f"{straight()}: this run is finished (step 8)" in out
    assert f"The student is in {straight() / 'step_00000008'}" in out
    after = files_of(straight())
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"config.json"} and after.keys() == before.keys()


def test_resume_never_starts_anew_and_loses_nothing(config, straight, tmp_path):
    copy_of(straight(), tmp_path / "run")
    train(config(resume="never", lr=1e-3, max_steps=0))
    assert_same_run(tmp_path / "run.1", straight())
    assert read_lines(tmp_path / "run", "run")[0]["config"]["lr"] == 1e-3


def test_two_runs_do_not_share_a_folder(config, at, straight, tmp_path):
    def start_others():
        for given in ({}, {"resume": "never"}, {"resume": "never", "lr": 1e-3}):
            with pytest.raises(UserError, match=f"^{tmp_path / 'run'}: another run is using it"):
                train(config(**given))
    at["train", 3] = start_others
    train(config())
    assert at == {} and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_same_run(tmp_path / "run", straight())


@pytest.mark.parametrize("room", [30_000, 120_000], ids=["for no weights", "for no optimizer"])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(program, config, at, straight, tmp_path, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at["train", 7] = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status, _, err = program()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = tmp_path / "run" / "step_00000008"
    assert status == 2
    assert re.fullmatch(rf"error: {folder}: cannot be saved \(.+\); make room, and the same command .*\n", err)
    assert checkpoints(tmp_path / "run") == [4] and not list((tmp_path / "run").glob("*.tmp"))
    train(config())
    assert_same_run(tmp_path / "run", straight())


def test_a_loss_that_is_not_finite_stops_before_the_update_and_saves_nothing(program, tmp_path):
    """The first update makes the weights so large that the second loss is no number."""
    status, _, err = program("--lr=1e38", "--interval=10", "--save_every=2")
    assert status == 2 and re.match(r"error: step 1: loss (nan|inf), gradient norm .*Lower --lr=1e\+38", err)
    assert checkpoints(tmp_path / "run") == [] and len(read_lines(tmp_path / "run", "train")) == 1


def test_weights_that_give_no_finite_loss_are_refused(config, teacher, tmp_path):
    def damage(tensors: dict):
        for name in tensors:
            if "q_proj" in name or "k_proj" in name:
                tensors[name] *= 1e20
    with pytest.raises(UserError, match="domain letters: the loss of a model is nan"):
        train(config(teacher=str(copy_of(teacher, tmp_path / "other", change_tensors(damage)))))


def test_a_reader_of_the_output_that_has_had_enough_is_no_mistake(config, straight, tmp_path, monkeypatch):
    copy_of(straight(), tmp_path / "run", lambda folder: shutil.rmtree(folder / "step_00000008"))

    def closed(text):
        raise BrokenPipeError
    monkeypatch.setattr(sys.stdout, "write", closed)
    with pytest.raises(BrokenPipeError):
        train(config())


# ------------ Another experiment in the same folder -------------------------------------------------------------------

OTHER_VALUES = dict(
    domains="signs,digits,letters", method="kd", gamma=0.5, temperature=2.0, alpha=0.9, interval=4, val_samples=4,
    mixture="letters=1,digits=1,signs=1", stop_ratio=0.01, test_samples=3, block_size=8, batch_size=4, max_steps=10,
    lr=1e-3, min_lr=1e-4, warmup_steps=3, weight_decay=0.2, grad_clip=0.5, seed=1, dtype="bfloat16", student="scratch:1x64")


@pytest.mark.parametrize("keys", [*([key] for key in OTHER_VALUES), list(OTHER_VALUES)], ids="+".join)
def test_another_experiment_in_the_same_folder_is_refused_by_key_and_nothing_is_touched(config, straight, keys):
    before = files_of(straight())
    with pytest.raises(UserError) as refused:
        train(config(out_dir=str(straight()), **{key: OTHER_VALUES[key] for key in keys}))
    *problems, advice = str(refused.value).splitlines()
    named = [problem.partition("=")[0][2:] for problem in problems]
    assert sorted(named) == sorted(keys)
    for key, problem in zip(named, problems):
        assert problem.startswith(f"--{key}={OTHER_VALUES[key]}: ") and str(straight()) in problem
    assert advice.startswith(f"--out_dir={straight()}: ") and "--resume=never" in advice
    assert files_of(straight()) == before
    assert OTHER_VALUES.keys() - {"student"} == {key for key in KEYS if not KEYS[key].metadata["may_change"]}


def test_keys_that_change_no_experiment_may_change(config, at, tmp_path):
    at["train", 5] = TERM
    with pytest.raises(SystemExit):
        train(config())
    train(config(micro_batch_size=4, shard_teacher=False, checkpoint_activations=True, timeout=5, save_every=3, keep=0,
                 log_every=1, tensorboard=True, wandb=False, pretrain_steps=7, preset="quickstart"))
    assert checkpoints(tmp_path / "run") == [4, 5, 6, 8]
    train(config(compile="true", device="auto"))  # finished


def test_models_and_data_are_compared_by_content_not_by_path(config, straight, data_dir, teacher, tmp_path):
    bins = copy_of(data_dir, tmp_path / "moved_bins")
    moved = copy_of(teacher, tmp_path / "moved_teacher")
    settings = config(data_dir=str(bins), teacher=str(moved), out_dir=str(copy_of(straight(), tmp_path / "run")))
    assert train(settings).name == "step_00000008"
    change_tensors(lambda tensors: tensors["model.norm.weight"].add_(1))(moved)
    edit("meta.json", lambda meta: meta["domains"]["digits"]["val"].update(sha256="0" * 64))(bins)
    with pytest.raises(UserError) as refused:
        train(settings)
    for key, folder in (("teacher", moved), ("data_dir", bins)):
        assert f"--{key}={folder}: another content than the run in {tmp_path / 'run'}" in str(refused.value)


def test_a_run_without_a_checkpoint_yet_is_not_given_to_another_experiment(config, at, tmp_path):
    at["train", 1] = kill
    with pytest.raises(Killed):
        train(config())
    before = files_of(tmp_path / "run")
    with pytest.raises(UserError, match="--lr=0.5"):
        train(config(lr=0.5))
    assert files_of(tmp_path / "run") == before


def test_a_start_that_failed_does_not_claim_the_folder(config, teacher, tmp_path):
    broken = copy_of(teacher, tmp_path / "broken", drop("model.safetensors"))
    with pytest.raises(UserError, match="model.safetensors"):
        train(config(teacher=str(broken)))
    assert train(config(lr=1e-3, max_steps=0)).name == "step_00000000"


# ------------ Damaged folders -----------------------------------------------------------------------------------------


def flip_a_bit(folder: Path):
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


DAMAGES = {
    "a bit of the weights": (flip_a_bit, "model.safetensors"),
    "the end of the weights": (lambda folder: os.truncate(folder / "model.safetensors", 9000), "model.safetensors"),
    "no weights": (drop("model.safetensors"), "model.safetensors"),
    "no manifest": (drop("manifest.json"), "manifest.json"),
    "an empty manifest": (put("manifest.json", b"{}"), "optimizer.pt"),
    "a manifest that is a list": (edit("manifest.json", list), "manifest.json"),
    "a manifest of a file elsewhere": (edit("manifest.json", **{"../config.json": "0"}), "../config.json"),
    "a manifest of no file": (edit("manifest.json", **{"more.pt": None}), "more.pt"),
    "a manifest without the optimizer": (edit("manifest.json", lambda files: {"config.json": "0"}), "optimizer.pt"),
    "a manifest of other types": (edit("manifest.json", **{"optimizer.pt": {}}), "optimizer.pt"),
}


@pytest.mark.parametrize("damage, named", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(config, straight, tmp_path, capsys, damage, named):
    copy_of(straight(), tmp_path / "run")
    damage(tmp_path / "run" / "step_00000008")
    (tmp_path / "run" / "corrupt_step_00000008").mkdir()  # of an earlier time
    train(config(keep=0))
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "step_00000008: " in line]
    assert named in warning and "renamed corrupt_step_00000008.1" in warning
    assert (tmp_path / "run" / "corrupt_step_00000008.1" / "optimizer.pt").is_file()
    assert_same_run(tmp_path / "run", straight())


class Hostile:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled").resolve(),)


def insert_line(line: bytes):
    """Put a line into the middle of metrics.jsonl."""
    def insert(folder: Path):
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(True)
        (folder / "metrics.jsonl").write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    return insert


FOREIGN_RUNS = {
    "config not JSON": (put("config.json", b"{"), "config.json"),
    "config missing": (drop("config.json"), "config.json"),
    "config a list": (put("config.json", b"[]"), "config.json"),
    "config without content": (edit("config.json", lambda content: {"config": content["config"]}), "config.json"),
    "a line not JSON": (insert_line(b"step 3"), "metrics.jsonl"),
    "a line not text": (insert_line(b"\xff\xfe"), "metrics.jsonl"),
    "a line whose step is text": (insert_line(b'{"kind": "train", "step": "one"}'), "metrics.jsonl"),
}
FOREIGN_CHECKPOINTS = {  # with a manifest that fits: not damaged, but not as a run writes it
    "state not JSON": (put("train_state.json", b"{"), "train_state.json"),
    "state of unknown keys": (edit("train_state.json", colour=3), "train_state.json"),
    "state without sampler": (edit("train_state.json", sampler=None), "train_state.json"),
    "sampler of other domains": (edit("train_state.json", lambda state: state["sampler"]["probs"].clear()),
                                 "train_state.json"),
    "step of another folder": (edit("train_state.json", step=3), "train_state.json"),
    "optimizer hostile": (lambda folder: torch.save({"optimizer": Hostile()}, folder / "optimizer.pt"), "optimizer.pt"),
    "optimizer a bare pickle": (lambda folder: put("optimizer.pt", pickle.dumps(Hostile(), 2))(folder), "optimizer.pt"),
    "optimizer empty": (put("optimizer.pt", b""), "optimizer.pt"),
    "weights not safetensors": (put("model.safetensors", b"weights"), "model.safetensors"),
    "config of no model": (put("config.json", b"[]"), "config.json"),
}


@pytest.mark.parametrize("spoil, named, part", [
    *(pytest.param(*row, "", id=f"run: {name}") for name, row in FOREIGN_RUNS.items()),
    *(pytest.param(*row, "step_00000007", id=name) for name, row in FOREIGN_CHECKPOINTS.items())])
def test_what_no_run_wrote_is_one_message_runs_no_code_and_loses_nothing(program, straight, tmp_path, monkeypatch,
                                                                         spoil, named, part):
    monkeypatch.chdir(tmp_path)
    run = copy_of(straight(), tmp_path / "run", lambda folder: shutil.rmtree(folder / "step_00000008"))
    spoil(run / part)
    sign(run / "step_00000007")
    status, _, err = program()
    assert not (tmp_path / "unpickled").exists()
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and str(run / part / named) in err
    assert checkpoints(run) == list(range(1, 8))


# ------------ Command line and presets --------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, messages", [
    (["--learning_rate=1", "--lr=fast", "--gamma=-1", "--max_step=3", "--interval=1.5", "--wandb=maybe", "--alpha"],
     ["--learning_rate=1: unknown key; ", "--lr=fast: must be a number", "--gamma=-1: must be 0.* or more, and finite",
      "--max_step=3: unknown key; did you mean --max_steps", "--interval=1.5: must be a whole number",
      "--wandb=maybe: must be true or false", "--alpha: requires a value"]),
    (["--alpha=2", "--temperature=0", "--interval=0", "--min_lr=1", "--lr=nan", "--gamma=inf"],
     ["--alpha=2: must be from 0 to 1", "--temperature=0: ", "--interval=0: ", "--lr=nan: ", "--gamma=inf: ",
      "--min_lr=1.0: must not be above --lr=0.001"]),
    (["--method=dkd", "--preset=small", "--dtype=float16", "lr=3", "-v"],
     ["--method=dkd: must be one of ddk ", "--preset=small: must be one of quickstart paper ",
      "--dtype=float16: requires loss scaling, .* bfloat16 or float32", "lr=3: unknown key; ",
      "-v: unknown key; write --key=value"]),
    (["--num_epochs=3", "--gradient_accumulation_steps=4", "--bf16", "--model=gpt2", "--dtype=half",
      "--warmup_steps=300"],
     ["--num_epochs=3: unknown key; here it is --max_steps", "--gradient_accumulation_steps=4: .* --micro_batch_size",
      "--bf16: unknown key; here it is --dtype=bfloat16", "--model=gpt2: unknown key; here it is --student",
      "--dtype=half: must be one of auto ", "--warmup_steps=300: .*--max_steps=300"])])
def test_mistakes_on_the_command_line_are_named_all_at_once(run_main, arguments, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_main(distill, *arguments)
    assert (status, out, err.count("\n")) == (2, "", len(messages))
    for message in messages:
        assert re.search(f"(?m)^error: {message}", err), message
    assert not list(tmp_path.iterdir())


def test_of_a_key_given_twice_the_last_counts_and_a_space_does_for_the_equals_sign():
    config = parse_config(["--seed=1", "--seed", "2", "--wandb", "--wandb=false", "--shard_teacher", "false"])
    assert (config.seed, config.wandb, config.shard_teacher) == (2, False, False)
    assert config.out_dir == "out/quickstart-ddk-2" and config.data_dir == "data/quickstart"
    assert [parse_config([f"--dtype={word}"]).dtype for word in ("bf16", "fp32")] == ["bfloat16", "float32"]


def test_other_programs_words_lead_to_keys_that_exist():
    for advice in OTHER_NAMES.values():
        assert re.split("[=:]", advice)[0] in KEYS
    assert not OTHER_NAMES.keys() & KEYS.keys()


def test_a_run_is_repeated_by_its_config_json(run_main, tiny, straight, sinks, teacher, tmp_path):
    again = tmp_path / "again"
    status, _, err = run_main(distill, f"--config={straight()}/config.json", f"--out_dir={again}", "--device=cpu")
    assert (status, err) == (0, "")
    assert read_lines(again)[1:] == read_lines(straight())[1:]
    # Keys of the command line win, and what belongs to a place is not repeated.
    config = parse_config([f"--config={straight()}/config.json", "--seed=3"])
    saved = json.loads((straight() / "config.json").read_text())["config"]
    left = (*NOT_REPEATED, "seed")
    for name, entry in KEYS.items():
        assert name in left or getattr(config, name) == saved[name]
    assert (config.seed, config.out_dir, config.device) == (3, "out/paper-ddk-3", "auto")
    # Values that are the class's defaults, but not the preset's, are repeated too.
    odd = {**tiny, "preset": "quickstart", "interval": 1000, "out_dir": tmp_path / "odd"}
    assert run_main(distill, *words(odd))[0] == 0
    repeated = parse_config([f"--config={tmp_path / 'odd'}/config.json"])
    assert (repeated.preset, repeated.interval, repeated.test_samples) == ("quickstart", 1000, 0)
    # A model's config.json is another thing.
    status, _, err = run_main(distill, f"--config={teacher}/config.json")
    assert status == 2 and f"--config={teacher}/config.json: " in err and "a model's" in err


def test_progress_is_shown_after_the_first_step_and_the_last_every_log_every_and_within_30_seconds():
    config = resolve_config({"log_every": 10, "max_steps": 95})
    slow = dict(since_line=21.0, step_time=10.0)
    fast = dict(since_line=21.0, step_time=8.0)
    assert [step for step in range(1, 96) if line_is_due(step, 0, **fast, config=config)] == [1, *range(10, 91, 10), 95]
    assert [step for step in range(43, 50) if line_is_due(step, 42, **fast, config=config)] == [43]
    assert all(line_is_due(step, 0, **slow, config=config) for step in range(1, 96))


def test_the_first_step_says_how_long_the_run_will_take(program):
    _, out, _ = program("--log_every=100")
    shown = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["1/8", "8/8"]
    assert all(re.search(r"[\d,]+ tokens/s  [\d.]+ [MG]iB  ETA \d+:\d\d$", line) for line in shown)


def test_help_lists_every_key_with_its_default(run_main):
    status, out, err = run_main(distill, "--help")
    assert (status, err) == (0, "")
    helps = dict(re.findall(r"--(\w+) \[\S+\] (.*?)(?= --\w+ \[|$)", " ".join(out.split())))
    assert helps.keys() == KEYS.keys()
    for name, entry in KEYS.items():
        quickstart = f"; quickstart: {PRESETS['quickstart'][name]}" if name in PRESETS["quickstart"] else ""
        default = f" (default: {entry.default}{quickstart})" if entry.default != "" else ""
        assert helps[name].startswith(entry.metadata["help"]) and helps[name].endswith(default)
    assert all(f"{method}: {arm.help}" in helps["method"] for method, arm in ARMS.items())


PAPER = dict(method="ddk", gamma=0.2, temperature=1.0, alpha=0.5, interval=1000, val_samples=500, max_steps=30_000,
             lr=3e-5, min_lr=3e-6, warmup_steps=1000, test_samples=0, mixture="", stop_ratio=0.0, domains="")  # its set-up


@pytest.mark.parametrize("preset, teacher, student", [
    ("paper", "", ""),
    ("qwen1.5-14b-1.8b", "Qwen/Qwen1.5-14B", "Qwen/Qwen1.5-1.8B"),
    ("qwen1.5-14b-4b", "Qwen/Qwen1.5-14B", "Qwen/Qwen1.5-4B"),
    ("qwen1.5-7b-1.8b", "Qwen/Qwen1.5-7B", "Qwen/Qwen1.5-1.8B"),
    ("llama2-13b-tinyllama-1.1b", "meta-llama/Llama-2-13b-hf", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
    ("starcoder-15.5b-3b", "bigcode/starcoder", "bigcode/starcoderbase-3b")])
def test_the_papers_presets_have_its_values_and_its_pairs(preset, teacher, student):
    config = resolve_config({"preset": preset})
    folders = dict(teacher=teacher, student=student, data_dir=f"data/{preset}", out_dir=f"out/{preset}-ddk-0")
    assert asdict(config) == asdict(config) | PAPER | folders
    assert config.batch_size * config.block_size == pytest.approx(15e9 / 30_000, rel=0.05)  # 15 B tokens in all
    assert resolve_config({"preset": preset, "lr": 1.0, "teacher": "x"}).lr == 1.0  # what is given counts


@pytest.mark.parametrize("given", [{}, {"student": "scratch:1x32"}, {"student": "layers:2"}, {"lr": 1.0}], ids=str)
def test_the_quickstart_is_the_default_where_no_folder_is_named(given):
    config = resolve_config(given)
    assert config.preset == "quickstart" and contradictions(config) == []
    assert config.interval == 25 and config.warmup_steps < config.max_steps
    assert config.batch_size % 8 == 0  # torchrun --nproc_per_node=8 works as it is


def test_the_quickstart_checks_its_main_run_before_it_trains_a_model(run_main, tmp_path, monkeypatch):
    texts = ((name, f"{name} {i} " * 99) for name in distill.QUICKSTART_BYTES for i in range(20))
    build_bins(tmp_path / "bins", load_tokenizer("bytes"), texts, val_fraction=0.3)
    monkeypatch.setattr(distill, "train", None)
    command = [f"--data_dir={tmp_path / 'bins'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"]
    status, _, err = run_main(distill, *command)
    assert status == 2 and "--val_samples=64: domain python" in err
    status, _, err = run_main(distill, *command, "--block_size=4096")
    assert (status, err) == (2, "error: --block_size=4096: the quickstart's models read at most 2048 tokens\n")


def test_a_size_without_scratch_is_one_message(run_main):
    status, _, err = run_main(distill, "--student=2x64")
    assert (status, err) == (2, "error: --student=2x64: no such folder; a new student is --student=scratch:2x64\n")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_who_names_a_folder_names_a_preset_and_is_told_what_a_step_of_each_is(run_main, tiny, teacher, role):
    others = {key: value for key, value in tiny.items() if key not in ("preset", "teacher", "student")}
    status, _, err = run_main(distill, *words({**others, role: teacher}))
    assert status == 2 and "error: --preset: name one, since it sets what a step is: " in err
    for preset in ("quickstart", "paper"):
        config = resolve_config({"preset": preset})
        assert (f"{preset} ({config.batch_size} windows × {config.block_size} tokens a step, {config.max_steps:,} "
                f"steps, lr {config.lr:g})") in err


def test_the_quickstart_refuses_other_bins_than_its_own(run_main, data_dir, tmp_path):
    before = files_of(data_dir)
    status, _, err = run_main(distill, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}")
    assert status == 2 and f"--data_dir={data_dir}: " in err and "--teacher and --student" in err
    assert files_of(data_dir) == before


# ------------ Contradictions ------------------------------------------------------------------------------------------

TWO = dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
STUDENTS = ["layers:x", "layers:0", "layers:", "layers", "layers:1.5", "layers:2x32", "scratch:0x32", "scratch:2x33",
            "scratch:4by4"]
MIXTURES = ["a", "letters=x", "letters=-1", "letters=0", "letters=inf", "letters=1,digits", "letters=1,,digits=1"]


@pytest.mark.parametrize("arguments, environment, messages", [
    *(([f"--student={word}"], {}, [f"--student={word}: write scratch:LxD with D even"]) for word in STUDENTS),
    (["--teacher=nowhere", "--student=nowhere"], {},
     ["--teacher=nowhere: no such folder", "--student=nowhere: no such folder"]),
    (["--student=2x64"], {}, ["--student=2x64: no such folder; a new student is --student=scratch:2x64"]),
    *(([f"--max_steps={n}", "--warmup_steps=8", *dry], {}, [f"--warmup_steps=8: .* --max_steps={n}"])
      for n in (1, 8) for dry in ([], ["--dry_run"])),
    (["--teacher=scratch"], {},
     ["--teacher=scratch: name a trained model; for a folder of that name write ./scratch"]),
    (["--student="], {}, ["--student: name its folder, scratch:LxD or layers:N"]),
    (["--student=layers:2", "--teacher=", "--method=cpt"], {}, ["--student=layers:2: layers of which --teacher?"]),
    *((["--teacher=", f"--method={method}"], {}, [f"--teacher: --method={method} requires one"])
      for method in ARMS if method != "cpt"),
    (["--teacher=", "--method=cpt", "--stop_ratio=2"], {}, ["--stop_ratio=2.0: a ratio requires a teacher"]),
    (["--data_dir=nowhere"], {}, ["--data_dir=nowhere: no such folder; make bins there with data.py"]),
    ([f"--out_dir={__file__}"], {}, [f"--out_dir={__file__}: is a file"]),
    (["--domains=letters,letters"], {}, ["--domains=letters,letters: name each once"]),
    *(([f"--mixture={text}"], {}, [f"--mixture={text}: write name=weight"]) for text in MIXTURES),
    (["--mixture=letters=1", "--method=ddk_es"], {}, ["--mixture=letters=1: --method=ddk_es draws all domains alike"]),
    (["--min_lr=1"], {}, ["--min_lr=1.0: must not be above --lr=0.003"]),
    (["--batch_size=10", "--micro_batch_size=4"], {}, ["--batch_size=10: must be a multiple of micro_batch_size=4 × "]),
    (["--batch_size=12", "--micro_batch_size=4"], TWO, ["--batch_size=12: must be a multiple of micro_batch_size=4 ×"]),
    (["--batch_size=9", "--dry_run"], dict(WORLD_SIZE="2"), ["--batch_size=9: must be a multiple of .* × 2 processes"]),
    (["--device=abacus"], {}, ["--device=abacus"]),
    (["--parallel=none"], TWO, ["--parallel=none: there are 2 processes; take ddp or fsdp"]),
    (["--parallel=ddp"], {}, ["--parallel=ddp: start with torchrun"]),
    (["--parallel=fsdp"], dict(WORLD_SIZE="2"), ["--parallel=fsdp: start with torchrun"]),
    (["--parallel=fsdp", "--method=ted"], TWO, ["--method=ted: not with fsdp; take --parallel=ddp"]),
    (["--device=cuda:0"], dict(**TWO, GPUS="2"), ["--device=cuda:0: each process takes its own"]),
    (["--device=auto"], dict(**TWO, GPUS="1"), ["--device=auto: more processes than GPUs here"]),
    (["--tensorboard", "--wandb"], dict(NO_PACKAGES="1"),
     ["--tensorboard: .*pip install tensorboard", "--wandb: .*pip install wandb"]),
], ids=str)
def test_what_contradicts_itself_is_refused_without_opening_a_file(program, monkeypatch, tmp_path, arguments,
                                                                   environment, messages):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if "GPUS" in environment:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(environment["GPUS"]))
    if "NO_PACKAGES" in environment:
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(distill, "TokenBins", None)
    status, out, err = program(*arguments)
    assert (status, out) == (2, "") and not (tmp_path / "run").exists()
    for line, message in zip(err.splitlines(), messages, strict=True):
        assert line.startswith(f"error: {message}") or re.match(f"error: {message}", line)


@pytest.mark.parametrize("given, cuda, world, resolved", [
    ({}, False, 1, dict(device="cpu", dtype="float32", compile="false", parallel="none", micro_batch_size=8)),
    ({}, True, 1, dict(device="cuda", dtype="bfloat16", compile="true", parallel="none", micro_batch_size=8)),
    ({}, False, 4, dict(device="cpu", dtype="float32", compile="false", parallel="ddp", micro_batch_size=2)),
    ({}, True, 4, dict(device="cuda", dtype="bfloat16", compile="true", parallel="fsdp", micro_batch_size=2)),
    (dict(method="ted"), True, 4, dict(parallel="ddp")),
    (dict(device="cpu"), True, 1, dict(device="cpu", dtype="float32", compile="false"))], ids=str)
def test_what_auto_means_on_a_machine(given, cuda, world, resolved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    monkeypatch.setattr(dist, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    config = resolve_config({"batch_size": 8, **given})
    assert asdict(resolve_auto(config)) == asdict(resolve_auto(config)) | resolved
    fixed = resolve_config({"dtype": "float32", "compile": "false", "parallel": "ddp", "micro_batch_size": 1,
                            "teacher_micro_batch_size": 2, **given})
    assert asdict(resolve_auto(fixed)) == asdict(fixed) | {"device": asdict(resolve_auto(config))["device"]}


# ------------ Bins, models and tokenizers that do not fit -------------------------------------------------------------


def own_tokenizer(change):
    """Give a folder the bytes tokenizer's tokenizer.json after `change`, as transformers would write it."""
    def give(folder: Path):
        settings = bytes_settings()
        change(settings)
        (folder / "tokenizer_meta.json").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(settings))
    return give


def nothing(folder: Path):
    pass


SAME = own_tokenizer(lambda settings: None)
SWAPPED = own_tokenizer(lambda settings: settings["model"]["vocab"].update(a=98, b=97))
SPLIT = own_tokenizer(lambda settings: settings["pre_tokenizer"].update(use_regex=True))
OTHER_END = own_tokenizer(lambda settings: settings["added_tokens"][0].update(content="</s>"))
BERT = edit("config.json", model_type="bert")
SHORT = edit("config.json", max_position_embeddings=8)
SLIDING = edit("config.json", model_type="mistral", sliding_window=8)
SMALL_AND_SHORT = edit("config.json", vocab_size=200, max_position_embeddings=8)
TOO_SHORT = "--block_size=16: the {} {{other}} reads at most 8 tokens"
MAKE_ANEW = "make the bins again with data.py --tokenizer={other}"


@pytest.mark.parametrize("change, arguments, messages", [
    (SWAPPED, ["--teacher={other}"], ["--teacher={other}: its tokenizer", MAKE_ANEW]),
    (SWAPPED, ["--student={other}"], ["--student={other}: its tokenizer", MAKE_ANEW]),
    (SPLIT, ["--teacher={other}"], ["--teacher={other}: its tokenizer other (257 ids) is not that of the bins, bytes"]),
    (OTHER_END, ["--teacher={other}"], ["--teacher={other}: ", "<|endoftext|>"]),
    (edit("tokenizer_meta.json", fingerprint="0"), ["--teacher={other}"], ["{other}: the tokenizer bytes is not"]),
    (put("tokenizer_meta.json", b"{}"), ["--student={other}"], ["{other}/tokenizer_meta.json: "]),
    (SHORT, ["--teacher={other}", "--student=layers:1"], [TOO_SHORT.format("teacher")]),
    (SLIDING, ["--teacher={other}"], [TOO_SHORT.format("teacher")]),
    (SMALL_AND_SHORT, ["--teacher={other}", "--student={other}"],
     ["--teacher={other}: has 200 ids, but the tokenizer of the bins has 257; " + MAKE_ANEW,
      "--student={other}: has 200 ids"]),
    (SHORT, ["--teacher={other}", "--student={other}"], [TOO_SHORT.format("teacher"), TOO_SHORT.format("student")]),
    (BERT, ["--teacher={other}", "--val_samples=1000", "--mixture=letters=1,cats=1"],
     ["{other}/config.json: model_type 'bert' is not ", "--val_samples=1000: domain letters",
      "--mixture=letters=1,cats=1: the domains of", "letters digits signs"]),
    (drop("config.json"), ["--student={other}"], ["{other}: no config.json"]),
    (nothing, ["--student=layers:9", "--domains=letters", "--mixture=letters=1,signs=1"],
     ["--student=layers:9: the teacher has 2 layers", "--mixture=letters=1,signs=1: the domains of"]),
    (nothing, ["--domains=letters,cats"], ["--domains: ", "has no cats", "letters digits signs"]),
    (nothing, ["--test_samples=1000"], ["--val_samples=5 and --test_samples=1000: domain letters"]),
    (nothing, ["--block_size=4096"], ["--block_size=4096: no train text that long"])])
def test_what_does_not_fit_is_refused_with_the_fix_before_a_weight_is_read(program, teacher, tmp_path, monkeypatch,
                                                                           change, arguments, messages):
    other = copy_of(teacher, tmp_path / "other", change)
    monkeypatch.setattr(GPT, "from_pretrained", None)
    status, _, err = program(*(word.format(other=other) for word in arguments))
    assert status == 2 and not (tmp_path / "run").exists()
    for message in messages:
        assert message.format(other=other) in err
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_a_folder_without_tokenizer_files_is_taken_with_a_warning(program, teacher, tmp_path):
    other = copy_of(teacher, tmp_path / "other", lambda folder: [path.unlink() for path in folder.glob("tokenizer*")])
    status, out, err = program(f"--teacher={other}", "--max_steps=0")
    assert (status, err) == (0, "") and f"WARNING: --teacher={other} has no tokenizer.json" in out


def hub_cache(folder: Path, cache: Path, name: str):
    """Put a model's folder into a cache of huggingface_hub."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")


@pytest.fixture
def hub(monkeypatch, tmp_path, teacher):
    """huggingface_hub without a network, its cache with the model you/teacher."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub_cache(teacher, tmp_path / "hub", "you/teacher")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    download = partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_models_may_be_named_as_on_the_hub(program, hub, straight, tmp_path):
    status, _, err = program("--teacher=you/teacher", "--keep=0", "--save_every=1")
    assert (status, err) == (0, "")
    assert_same_run(tmp_path / "run", straight())
    # The content is what counts: the folder itself is the same experiment.
    status, out, err = program("--keep=0", "--save_every=1")
    assert (status, err) == (0, "") and "this run is finished" in out


def test_the_bins_may_have_the_tokenizer_of_a_model_on_the_hub(run_main, hub, tmp_path):
    text = ["one", "two"]
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(text[i])
    status, _, err = run_main(data, f"--out_dir={tmp_path / 'bins'}", "--tokenizer=you/teacher", f"x={tmp_path}/*.txt")
    assert (status, err) == (0, "")
    assert (tmp_path / "bins" / "tokenizer.json").is_file()


def test_a_model_on_the_hub_writes_text(run_main, hub):
    status, out, err = run_main(model_program, "--model=you/teacher", "--prompt=abc", "--max_new_tokens=3",
                                "--device=cpu")
    assert (status, err) == (0, "") and out.startswith("abc")


@pytest.mark.parametrize("installed", [True, False])
def test_a_name_that_the_hub_does_not_give_is_one_message_with_the_command(program, hub, tmp_path, monkeypatch,
                                                                           installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    status, _, err = program("--teacher=mine/other")
    assert status == 2 and "huggingface" not in err.lower() and "mine/other: no config.json" in err  # a folder of mine
    status, _, err = program("--teacher=you/other")
    assert status == 2 and err.startswith("error: --teacher=you/other: no such folder") and err.count("error: ") == 1
    assert "hf download you/other --local-dir models/other" in err and not (tmp_path / "run").exists()


def test_a_name_on_the_hub_counts_as_a_folder_does_for_presets(run_main, tiny):
    others = {key: value for key, value in tiny.items() if key not in ("preset", "teacher", "student")}
    status, _, err = run_main(distill, *words({**others, "teacher": "you/teacher"}))
    assert status == 2 and "error: --preset: name one" in err


def test_a_tokenizer_whose_package_is_missing_is_not_called_another_one(program, teacher, tmp_path, monkeypatch):
    other = copy_of(teacher, tmp_path / "other", SAME)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, _, err = program(f"--teacher={other}", "--student=layers:9")
    assert status == 2 and "pip install tokenizers" in err and "make the bins again" not in err
    assert "--student=layers:9: the teacher has" in err


@pytest.mark.parametrize("change, same", [(SAME, True), (SPLIT, True), (SWAPPED, False)])
def test_a_tokenizer_json_is_taken_for_the_tiktoken_encoding_that_it_equals(program, teacher, tmp_path, monkeypatch,
                                                                            change, same):
    """Here both are of single bytes, so that it does not matter how text is split."""
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W+", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    build_bins(tmp_path / "bins", load_tokenizer("gpt2"), [("letters", "ab" * 99), ("letters", "ba" * 99)])
    folder = copy_of(teacher, tmp_path / "theirs", change)
    status, _, err = program(f"--data_dir={tmp_path / 'bins'}", f"--teacher={folder}", "--dry_run")
    assert (status, err == "") == ((0, True) if same else (2, False))
    assert same or f"--teacher={folder}: its tokenizer theirs" in err and "of the bins, gpt2" in err


# ------------ Dry run and report --------------------------------------------------------------------------------------


def test_a_dry_run_with_problems_prints_all_the_same_and_ends_with_2(program):
    status, out, err = program("--dry_run", "--val_samples=1000", "--mixture=cats=1")
    assert status == 2 and "--val_samples=1000" in err and "--mixture=cats=1" in err
    assert all(f"\n{word}: " in out for word in ("teacher", "student", "a step", *NAMES))


@pytest.mark.parametrize("arguments, world, width, sharded, trains", [
    (["--dtype=bfloat16"], 1, 2, "", True), (["--dtype=float32"], 1, 4, "", True),
    (["--dtype=bfloat16", "--method=cpt", "--preset=quickstart"], 1, 2, "", False),
    (["--dtype=bfloat16"], 8, 2, "teacher student", True),
    (["--dtype=bfloat16", "--shard_teacher=false"], 8, 2, "student", True),
    (["--dtype=bfloat16", "--method=ted"], 8, 2, "", True)], ids=str)
def test_a_dry_run_tells_what_a_run_takes_reads_no_weights_and_writes_nothing(
        program, data_dir, teacher, tmp_path, monkeypatch, arguments, world, width, sharded, trains):
    """Of a teacher of 32 layers, 4096 wide, and 4 of its layers: computed here by hand."""
    V, d, L, ff, kv, steps = 152_064, 4096, 32, 11_008, 8 * 128, 600
    sizes = dict(model_type="qwen2", vocab_size=V, hidden_size=d, num_hidden_layers=L, intermediate_size=ff,
                 head_dim=128, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
    other = copy_of(teacher, tmp_path / "other", edit("config.json", **sizes))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    status, out, err = program(f"--teacher={other}", "--student=layers:4", f"--max_steps={steps}", "--dry_run",
                               *arguments)
    assert (status, err) == (0, "") and [path.name for path in tmp_path.iterdir()] == ["other"]
    shown = {line.partition(": ")[0]: line for line in out.splitlines() if ": " in line}

    def number(key: str, pattern: str) -> float:
        return float(re.search(pattern.replace("N", r"([\d.,]+(?:e[+-]\d+)?)"), shown[key])[1].replace(",", ""))

    matrices = 2 * d * d + 2 * d * kv + 3 * d * ff  # q and o, k and v, the MLP's three
    layer = matrices + (d + 2 * kv) + 2 * d  # biases of q, k and v; two norms
    flops = 0
    for role, layers, passes in (("teacher", L, int(trains)), ("student", 4, 3)):
        parameters = layers * layer + 2 * V * d + d
        assert number(role, f"{layers} layers × {d}, N parameters") == parameters
        here = parameters / (world if role in sharded else 1)
        parts = {"weights": width} if role == "teacher" else {"weights": 4, "gradients": 4, "optimizer": 8}
        for part, n_bytes in parts.items():
            unit, size = ("GiB", 2**30) if n_bytes * here >= 2**30 else ("MiB", 2**20)
            assert number(role, f"{part} N {unit}") == pytest.approx(n_bytes * here / size, abs=0.06)
        assert f"on each of {world} devices" in shown[role]
        # Two FLOPs a weight of a matrix and token forward (the embedding is a look-up), twice that backward
        flops += passes * 2 * (layers * matrices + V * d)
    assert number("a step", "N tokens, ") == B * T and number("a step", "N steps") == steps
    assert number("a step", "N FLOPs") == pytest.approx(B * T * flops, rel=0.01)
    windows = TokenBins(data_dir, T).n_windows
    for name, n in windows.items():
        assert number(name, "N tokens") == n * T
        assert number(name, "N epochs in natural") == pytest.approx(steps * B / sum(windows.values()), abs=0.006)
        assert number(name, "N if all") == pytest.approx(steps * B / 3 / n, abs=0.006)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """A run that has learned something by its step 8, and more by its step 16."""
    out_dir = tmp_path_factory.mktemp("trained") / "run"
    train(resolve_config({**tiny, "teacher": "", "method": "cpt", "lr": 2e-2, "max_steps": 16, "save_every": 8,
                          "out_dir": str(out_dir)}))
    return out_dir


@pytest.mark.parametrize("teacher_step, student_step, message", [
    (None, 8, "WARNING: THE TEACHER IS NEAR UNIFORM IN {}"),
    (8, 16, "WARNING: THE TEACHER IS BEHIND ITS STUDENT IN {}"), (16, 8, None)], ids=["near uniform", "behind", "good"])
def test_a_teacher_with_little_to_teach_is_warned_of_at_the_top_of_the_report(program, trained, teacher, teacher_step,
                                                                              student_step, message):
    folder = teacher if teacher_step is None else trained / f"step_{teacher_step:08d}"
    status, out, err = program(f"--teacher={folder}", f"--student={trained / f'step_{student_step:08d}'}",
                               "--max_steps=0")
    assert (status, err) == (0, "")
    top = out.partition("first → last evaluation")[0]
    assert out.count("WARNING") == top.count("WARNING") == (3 if message else 0)
    assert message is None or all(message.format(name) in top for name in NAMES)
