"""The loop: Alg. 1 and its methods, a run's files, stopping and resuming, and mistakes of the user.

The tests watch runs through a fake Weights & Biases. It gets each line of metrics.jsonl as soon as it is logged, and
can make something happen there.
"""

import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import asdict, field, fields, make_dataclass, replace
from decimal import Decimal, getcontext
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (NAMES, Hostile, assert_same_run, change_tensors, copy_of, drop, edit, files_of, nothing, put,
                      read_lines, words)
from safetensors.torch import load_file

import data
import distill
import model as model_program
from data import QUICKSTART_BYTES, TokenBins, UserError, build_bins, bytes_settings, load_tokenizer, write_sums
from distill import (MAY_CHANGE, PRESETS, Config, config_errors, dense_distillation_loss, parse_config, resolve_auto,
                     resolve_config, train)
from model import GPT, GPTConfig
from sample_mixture import MixtureSampler

T, B = 16, 8  # tokens of a window, windows of a step
KEYS = {entry.name: entry for entry in fields(Config)}


class Sink:
    """A fake run of Weights & Biases that keeps what it gets. `at[kind, step]` is called once, at that line."""

    def __init__(self, at: dict, **keywords):
        self.at = at
        self.keywords = keywords
        self.lines = []  # (step, kind, values)
        self.finished = 0
        self.defined = []
        self.define_metric = lambda *args, **keywords: self.defined.append((*args, keywords))

    def log(self, line):
        step, (kind, values) = line["step"], list(line.items())[-1]
        self.lines.append((step, kind, values))
        self.at.pop((kind, step), lambda: None)()

    def finish(self):
        self.finished += 1


@pytest.fixture
def sinks(monkeypatch):
    """Replace wandb. `runs` are the runs that it opened; `at`: (kind, step) → a function to call at that line."""
    opened = types.SimpleNamespace(at={}, runs=[])

    def init(**keywords):
        opened.runs.append(Sink(opened.at, **keywords))
        return opened.runs[-1]

    package = types.ModuleType("wandb")  # with a __spec__: other packages ask whether wandb is installed
    package.__spec__ = ModuleSpec("wandb", None)
    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    return opened


@pytest.fixture
def at(sinks) -> dict:
    return sinks.at


class Killed(Exception):
    """Simulates the end of a process by kill -9."""


def kill():
    raise Killed


def send(number: signal.Signals):
    os.kill(os.getpid(), number)


TERM = partial(send, signal.SIGTERM)


@contextmanager
def handled(number: signal.Signals, handler):
    """Set the handler of a signal while the context lasts, whatever it was when the tests started."""
    before = signal.signal(number, handler)
    yield
    signal.signal(number, before)


@pytest.fixture
def config(tiny, tmp_path, sinks):
    """Return a function that makes a tiny run's configuration, with out_dir=tmp_path/run unless given."""
    def make(**given):
        config = resolve_config({**tiny, "out_dir": str(tmp_path / "run"), "wandb": True, **given})
        assert config_errors(config) == []
        return config
    return make


@pytest.fixture
def program(run_main, tiny, tmp_path, sinks):
    """Run distill.py with a tiny run's keys and more arguments. Return (exit status, stdout, stderr)."""
    return partial(run_main, distill, *words({**tiny, "out_dir": tmp_path / "run", "wandb": True}))


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """Return a function that gives the folder of a method's undisturbed tiny run. The run of ddk saves each step."""
    made = {}

    def run(method: str = "ddk") -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("straight") / method
            save_every = 1 if method == "ddk" else 8
            train(resolve_config({**tiny, "method": method, "out_dir": str(made[method]), "keep": 0,
                                  "save_every": save_every}))
        return made[method]
    return run


def checkpoints(out_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return sorted(int(path.name[5:]) for path in out_dir.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def read_state(folder: Path) -> dict:
    return json.loads((folder / "train_state.json").read_text())


def natural(data_dir) -> list[float]:
    windows = TokenBins(data_dir, T).n_windows
    return [windows[name] / sum(windows.values()) for name in NAMES]


def exact_softmax(weights: list, exponents: list) -> list[Decimal]:
    """Return weight · exp(exponent), normalized, in 50 digits."""
    getcontext().prec = 50
    raised = [Decimal(weight) * Decimal(exponent).exp() for weight, exponent in zip(weights, exponents)]
    return [value / sum(raised) for value in raised]


def exact_factors(lines: list[dict], alpha: str) -> list[list[float]]:
    """Return r_0 by Eq. 1 and then r_t by Eq. 2, only from the perplexities of mixture lines."""
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
    """Return domain ids and windows of a run's first step."""
    bins = TokenBins(data_dir, T)
    sampler = MixtureSampler(bins.n_windows, B, seed=0)
    if probs:
        sampler.probs = probs
    ids, window_ids = sampler.next_batch()
    return ids, torch.from_numpy(bins.train_windows(ids, window_ids))


def new_student(layers: int = 1, seed: int = 0, rows: int = 257) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig.scratch(layers, 32, rows, T))


def sign(folder: Path):
    """Write the checksums of a checkpoint that was changed."""
    write_sums(folder)


# ------------ Alg. 1 --------------------------------------------------------------------------------------------------


def test_a_run_follows_alg_1(config, data_dir, tmp_path):
    folder = train(config(alpha=0.7, gamma=0.3))
    lines = read_lines(tmp_path / "run", "mixture")
    assert [(line["t"], line["step"]) for line in lines] == [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]
    factors = exact_factors(lines, "0.7")
    for line, factor in zip(lines, factors):
        assert list(line["domains"]) == list(line["r"]) == NAMES
        r = factor if line["t"] > 0 else natural(data_dir)  # the first interval draws in natural proportions
        assert list(line["r"].values()) == pytest.approx(r, abs=1e-12)
    assert read_state(folder)["rule_state"]["factor"] == pytest.approx(factors[-1], abs=1e-12)

    # The draws of an interval follow the r at its start, to within one window a step.
    for before, after in zip(lines, lines[1:]):
        for name in NAMES:
            drawn = (after["domains"][name]["tokens"] - before["domains"][name]["tokens"]) / T
            assert abs(drawn - 2 * B * before["r"][name]) < 2
    assert all(sum(d["tokens"] for d in line["domains"].values()) == line["step"] * B * T for line in lines)

    # Eq. 3 trains the student, which is measured again; the teacher does not change.
    for name in NAMES:
        domains = [line["domains"][name] for line in lines]
        assert all(domain["ratio"] == domain["student_ppl"] / domain["teacher_ppl"] for domain in domains)
        assert len({domain["student_ppl"] for domain in domains}) == 5
        assert len({domain["teacher_ppl"] for domain in domains}) == 1
        assert domains[-1]["student_ppl"] < domains[0]["student_ppl"]
    for line in read_lines(tmp_path / "run", "train"):
        assert line["kl"] > 0 and line["loss"] == pytest.approx(line["ce"] + 0.3 * line["kl"], rel=1e-5)

    # Tokens and epochs
    windows = TokenBins(data_dir, T).n_windows
    for line in lines:
        for name, domain in line["domains"].items():
            assert domain["epochs"] == domain["tokens"] / T / windows[name]
    assert [line["tokens"] for line in read_lines(tmp_path / "run", "train")] == [n * B * T for n in range(1, 9)]


@pytest.mark.parametrize("method", ["ddk", "ddk_no_fs", "ddk_es", "kd", "minillm", "cpt"])
def test_each_method_draws_by_its_rule(straight, data_dir, method):
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
    assert all((line["kl"] == 0) == (method == "cpt") for line in read_lines(straight(method), "train"))


def test_the_drawn_windows_depend_only_on_r_and_the_seed(config, data_dir, tmp_path, monkeypatch):
    """They do not depend on method, evaluations or micro-batches. A run does not move torch's random numbers."""
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
                          "cpt": dict(method="cpt"), "micro": dict(micro_batch_size=3)}.items():
        drawn.clear()
        train(config(**{"method": "kd", "seed": 3, "out_dir": str(tmp_path / name), **variant}))
        assert drawn == expected
        losses[name] = [line["loss"] for line in read_lines(tmp_path / name, "train")]
    assert losses["often"] == losses["never"] == pytest.approx(losses["micro"], rel=1e-5)
    assert torch.get_rng_state().equal(random_state)


@pytest.mark.parametrize("method, direction, rows, grad_clip", [("ddk", "forward", 264, 0.05),
                                                                ("minillm", "reverse", 257, 0.0)])
def test_three_updates_equal_three_written_out(config, data_dir, teacher, tmp_path, method, direction, rows, grad_clip):
    """This covers the divergence's direction, γ, T, clipping, learning rates, initial weights and padded heads."""
    big = GPT(GPTConfig.scratch(2, 64, 300, 64)).requires_grad_(False)
    for mine, theirs in zip(big.parameters(), GPT.from_pretrained(teacher).parameters()):
        mine.data[:len(theirs)] = theirs.data
    big.save_pretrained(tmp_path / "big")
    student = new_student(seed=1, rows=rows)
    student.save_pretrained(tmp_path / "padded")
    folder = train(config(method=method, teacher=str(tmp_path / "big"), gamma=0.3, temperature=2.0, grad_clip=grad_clip,
                          student="scratch:1x32" if rows == 257 else str(tmp_path / "padded"), weight_decay=0.5, seed=1,
                          max_steps=3, interval=100))

    # Perplexities are over the tokenizer's ids only, for both models.
    bins = TokenBins(data_dir, T)
    (line,) = read_lines(tmp_path / "run", "mixture")
    for name in NAMES:
        windows = torch.from_numpy(bins.eval_windows(name, "val", 5))
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
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), grad_clip or math.inf)  # 0: no clipping
        assert norm > 0.05
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        optimizer.step()
        logged = [line[key] for key in ("loss", "ce", "kl", "grad_norm", "lr")]
        assert logged == pytest.approx([loss.item(), ce.mean().item(), kl.mean().item(), norm.item(), lr], rel=1e-4)
    trained = GPT.from_pretrained(folder).state_dict()
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_a_fixed_mixture_replaces_the_natural_proportions(config, tmp_path):
    train(config(method="kd", mixture="digits=1,letters=0,signs=3", max_steps=4))
    lines = read_lines(tmp_path / "run", "mixture")
    assert all(line["r"] == {"letters": 0, "digits": 0.25, "signs": 0.75} for line in lines)
    tokens = {name: domain["tokens"] for name, domain in lines[-1]["domains"].items()}
    assert tokens == {"letters": 0, "digits": 4 * 2 * T, "signs": 4 * 6 * T}


def test_the_key_domains_selects_what_is_trained_and_evaluated_on(config, straight, data_dir, tmp_path):
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


def test_stop_ratio_ends_a_run_early_and_prints_it(config, straight, tmp_path, capsys):
    worst = [max(d["ratio"] for d in line["domains"].values()) for line in read_lines(straight(), "mixture")]
    assert worst == sorted(worst, reverse=True)
    folder = train(config(stop_ratio=worst[2]))
    assert folder.name == "step_00000004" and read_state(folder)["finished"]
    assert f"\n--stop_ratio={worst[2]}: the run ends here\n" in capsys.readouterr().out
    assert [line["step"] for line in read_lines(tmp_path / "run", "end")] == [4]


def test_the_last_step_is_evaluated_and_saved_for_any_k(config, tmp_path):
    folder = train(config(max_steps=3, save_every=0))
    assert folder == tmp_path / "run" / "step_00000003" and checkpoints(tmp_path / "run") == [3]
    mixture = read_lines(tmp_path / "run", "mixture")
    assert [line["step"] for line in mixture] == [0, 2]
    (end,) = read_lines(tmp_path / "run", "end")
    assert end["step"] == 3 and list(end["domains"]) == NAMES
    assert end["domains"]["digits"]["student_ppl"] != mixture[1]["domains"]["digits"]["student_ppl"]


def test_max_steps_0_evaluates_and_saves_the_student_without_training(program, tmp_path):
    status, out, err = program("--max_steps=0")
    assert (status, err) == (0, "") and f"The student is in {tmp_path / 'run' / 'step_00000000'}" in out
    assert [line["kind"] for line in read_lines(tmp_path / "run")] == ["run", "mixture", "end"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not (tmp_path / "run" / "mixture.txt").exists()
    status, _, err = program()  # which is another run
    assert status == 2 and f"--max_steps=8: the run in {tmp_path / 'run'} was started with --max_steps=0\n" in err


def test_a_model_is_built_from_the_configuration_that_was_checked(config, teacher, monkeypatch):
    """Other ranks build it from the same object, so a fork that changes it trains one model on all ranks."""
    original = distill.read_config
    monkeypatch.setattr(distill, "read_config", lambda folder: replace(original(folder), rms_norm_eps=0.25))
    folder = train(config(student=str(teacher), max_steps=0))
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 0.25


@pytest.mark.parametrize("again", [False, True])
def test_with_checkpoint_activations_each_block_is_computed_a_second_time(config, again):
    student = new_student(layers=2)
    passes = []
    for layer in student.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    distill.prepare_layers(student, resolve_auto(config(checkpoint_activations=again)))
    student(torch.arange(8)[None]).sum().backward()
    assert len(passes) == (4 if again else 2)


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_blocks_are_traced_only_in_the_first_step(config, straight, at, tmp_path, monkeypatch, recomputed):
    """The eager backend traces as usual, and runs Python. Recompilation does not depend on the backend."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kw: compile_module(module, backend="eager", **kw))
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


# ------------ What is written -----------------------------------------------------------------------------------------


def test_a_number_added_in_measured_domains_is_logged_and_shown(program, sinks, tmp_path, monkeypatch):
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
    logged, = [values["domains"] for step, kind, values in sinks.runs[0].lines if (step, kind) == (8, "mixture")]
    assert logged == last

    # The report's table shows each number, and the ratio from the first evaluation to the last.
    table = out.partition("The test windows never influence r")[2].partition("\n\n")[2]
    assert table.split()[:len(last["digits"]) + 1] == ["r", *last["digits"]]
    for name in NAMES:
        (row,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
        for key in ("student_ppl", "gap"):
            assert f" {last[name][key]:.2f}" in row
        assert f"{first[name]['ratio']:.2f} → {last[name]['ratio']:.2f}" in row and f" {last[name]['tokens']:,} " in row
    worst = [max(domain["ratio"] for domain in domains.values()) for domains in (first, last)]
    assert f"worst ratio: {worst[0]:.2f} → {worst[1]:.2f}" in table


@pytest.mark.parametrize("arguments", [[], ["--method=ddk_no_fs"], ["--method=cpt", "--teacher="]], ids=str)
def test_each_evaluation_prints_the_r_by_which_the_next_steps_draw(program, tmp_path, monkeypatch, arguments):
    drawn_by = []
    next_batch = MixtureSampler.next_batch
    monkeypatch.setattr(MixtureSampler, "next_batch",
                        lambda sampler: drawn_by.append(sampler.probs.tolist()) or next_batch(sampler))
    status, out, err = program("--max_steps=5", *arguments)
    assert (status, err) == (0, "") and "THE TEACHER IS BEHIND" not in out
    lines = [*read_lines(tmp_path / "run", "mixture"), *read_lines(tmp_path / "run", "end")]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]  # the last is no multiple of K: r as it was
    for line, text in zip(lines, re.findall("(?m)^evaluated.*", out), strict=True):
        worst = ""
        if "--teacher=" in arguments:
            assert all(domain["teacher_ppl"] is domain["ratio"] is None for domain in line["domains"].values())
        else:
            ratio, name = max((domain["ratio"], name) for name, domain in line["domains"].items())
            worst = f"worst ratio {ratio:.3f} ({name}), "
        r = "  ".join(f"{name} {share:.3f}" for name, share in zip(NAMES, drawn_by[min(line["step"], 4)]))
        assert text == f"evaluated at step {line['step']}: {worst}r = {r}"

    # The table before training, and the report's
    for table, shares in zip(out.split(" student_ppl")[1:], (drawn_by[0], drawn_by[4]), strict=True):
        for row, share in zip(table.splitlines()[1:], shares):
            assert row.split()[1] == f"{share:.2f}"


def test_metrics_have_the_promised_keys(straight):
    lines = [json.loads(line) for line in (straight() / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "mixture"] + ["train", "train", "mixture"] * 4 + ["end"]
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 8]
    run, mixture, step, end = lines[0], lines[1], lines[2], lines[-1]
    assert {"config", "content", "rule", "natural", "versions", "parameters"} <= set(run) and "git" in run["versions"]
    assert run["config"]["seed"] == 0 and run["rule"] == "ddk" and list(run["natural"]) == NAMES
    assert run["content"].keys() == {"data_dir", "teacher", "student"} and run["content"]["student"] == "scratch:1x32"
    assert run["may_change"] == sorted(MAY_CHANGE)
    assert run["parameters"]["student"] == sum(p.numel() for p in new_student().parameters())
    assert {"kind", "step", "t", "r", "domains"} <= set(mixture)
    assert {"student_ppl", "teacher_ppl", "ratio", "tokens", "epochs"} <= set(mixture["domains"]["signs"]) - {"r"}
    assert "r" not in mixture["domains"]["signs"]  # it is there once
    assert {"kind", "step", "loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "eta_s"} <= set(step)
    assert step["tokens"] == B * T and end["domains"] == lines[-2]["domains"]
    times = []
    for line in (line for line in lines if line["kind"] == "train"):
        times.append(B * T / line["tokens_per_s"])
        assert line["eta_s"] == pytest.approx((8 - line["step"]) * sum(times) / len(times))


def test_test_windows_are_measured_at_the_end_and_steer_nothing(program, straight, data_dir, teacher, tmp_path):
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
        windows = torch.from_numpy(bins.eval_windows(name, "test", 3))
        for role, model in models.items():
            with torch.no_grad():
                logits = model(windows[:, :-1])[..., :257]
            ce = F.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten()).item()
            assert tested[f"test_{role}_ppl"] == pytest.approx(math.exp(ce), rel=1e-5)
        assert tested["test_ratio"] == tested["test_student_ppl"] / tested["test_teacher_ppl"]
        assert f"{tested['test_ratio']:.2f}" in out.partition("The test windows never influence r")[2]
    assert read_lines(tmp_path / "run", "train") == read_lines(straight(), "train")
    assert read_lines(tmp_path / "run", "mixture") == read_lines(straight(), "mixture")


def test_the_resolved_configuration_is_saved_and_what_differs_from_the_defaults_is_printed(program, tmp_path):
    _, out, _ = program("--device=auto", "--max_steps=0", "--mixture=letters=3,digits=2,signs=1")
    saved = read_lines(tmp_path / "run", "run")[0]["config"]
    assert saved.keys() == KEYS.keys() and saved["mixture"] == "letters=3,digits=2,signs=1"
    for key, value in saved.items():
        assert (f"\n{key} = {value}\n" in f"\n{out}") == (value != KEYS[key].default) and value != "auto"
    assert f"all are in {tmp_path / 'run' / 'metrics.jsonl'}" in out


def test_the_files_of_a_checkpoint_have_the_permissions_of_the_umask(config, tmp_path):
    before = os.umask(0o027)
    folder = train(config(max_steps=0))
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_its_log_too(config, monkeypatch):
    done = []
    rename = os.rename
    for module in (data, distill):
        monkeypatch.setattr(module, "fsync", lambda path: done.append(Path(path)))
    monkeypatch.setattr(os, "rename", lambda *paths: (done.append(paths), rename(*paths)))
    folder = train(config(max_steps=0))
    moment, = [i for i, entry in enumerate(done) if isinstance(entry, tuple)]
    temporary, _ = done[moment]
    written = {temporary, *(temporary / path.name for path in folder.iterdir())}
    assert written | {folder.parent / "metrics.jsonl"} <= set(done[:moment])
    assert folder.parent in done[moment + 1:]


def test_the_recorded_revision_shows_whether_files_had_changed(monkeypatch, tmp_path, data_dir):
    def recorded():
        return distill.experiment_record(resolve_config({}), TokenBins(data_dir, T))["versions"]["git"]

    monkeypatch.setattr(distill, "__file__", str(tmp_path / "distill.py"))
    assert recorded() is None
    (tmp_path / "distill.py").write_text("one")
    commit = "git init -q && git add . && git -c user.name=me -c user.email=me@x commit -qm one && git rev-parse HEAD"
    revision = subprocess.run(commit, shell=True, cwd=tmp_path, check=True, capture_output=True, text=True).stdout[:40]
    assert recorded() == revision
    (tmp_path / "notes.txt").write_text("not tracked")
    assert recorded() == revision
    (tmp_path / "distill.py").write_text("two")
    assert recorded() == f"{revision}-dirty"


def test_a_folder_of_other_files_is_rejected_and_not_touched(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"^--out_dir={tmp_path / 'run'}: has files, and is not the folder of a run"):
        train(config())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("error, message", [
    (RuntimeError("a mistake of ours"), None),
    (RuntimeError("[x/gloo/pair.cc:5] Connection closed by peer"), "another process is gone, .*"),
    (dist.DistBackendError("NCCL error in: x.cpp\nLast error:\nno room in /dev/shm"),
     "another process is gone, .*no room in /dev/shm.*")], ids=repr)
def test_a_process_that_is_gone_is_one_message_with_the_fix(monkeypatch, error, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    with pytest.raises((RuntimeError, UserError)) as raised, distill.process_group(Config(device="cpu")):
        raise error
    assert raised.value is error if message is None else re.fullmatch(message, str(raised.value))


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    train(config(save_every=1, keep=3))
    assert checkpoints(tmp_path / "run") == [6, 7, 8] and not list((tmp_path / "run").glob("*.tmp"))


def test_wandb_gets_every_line_with_its_step_and_a_resumed_run_sends_repeated_steps_again(config, sinks, tmp_path):
    sinks.at["train", 5] = kill
    with pytest.raises(Killed):
        train(config())
    train(config())
    expected = [(line.pop("step"), line.pop("kind"), line) for line in read_lines(tmp_path / "run")[1:]]
    for run in sinks.runs:
        for _, _, values in run.lines:
            values.pop("tokens_per_s", None)
            values.pop("eta_s", None)
        assert run.defined == [("step", {}), ("*", {"step_metric": "step"})] and run.finished == 1
    first, second = (run.lines for run in sinks.runs)
    assert first + second[1:] == expected and second[0] == first[-1] and second[0][:2] == (5, "train")
    train(config(out_dir=str(tmp_path / "other"), max_steps=0))
    first, second, other = (run.keywords for run in sinks.runs)
    assert first["id"] == second["id"] != other["id"] and first["resume"] == "allow"
    assert first["dir"] == str(tmp_path / "run") and first["config"]["seed"] == 0


def test_an_error_of_wandb_is_one_message_before_a_model_is_read(program, monkeypatch, tmp_path):
    def init(**_):
        raise RuntimeError("No API key configured")
    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    monkeypatch.setattr(GPT, "from_pretrained", None)
    status, _, err = program()
    assert status == 2 and re.fullmatch("error: --wandb: .*No API key configured; run wandb login, .*\n", err)


# ------------ Stopped and resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, events", [
    ("ddk", [("mixture", 0, TERM), ("train", 1, TERM), ("train", 3, TERM), ("mixture", 4, TERM), ("train", 7, TERM)]),
    ("ddk", [("mixture", 2, TERM), ("train", 3, kill), ("train", 4, kill), ("end", 8, kill)]),
    ("ddk", [("train", 1, kill), ("train", 4, TERM)]),
    ("ddk_no_fs", [("train", 5, TERM)]), ("ddk_es", [("train", 5, TERM)]), ("cpt", [("train", 5, TERM)])],
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


def test_a_run_finishes_after_a_signal_in_the_last_step_or_an_ignored_signal(config, at, straight, tmp_path):
    at["train", 3] = partial(send, signal.SIGHUP)
    at["train", 8] = TERM
    with handled(signal.SIGHUP, signal.SIG_IGN), pytest.raises(SystemExit) as stopped:  # ignored, as nohup leaves it
        train(config())
    assert stopped.value.code == 128 + signal.SIGTERM  # so that the quickstart does not go on to its next model
    assert_same_run(tmp_path / "run", straight())


def test_a_second_ctrl_c_exits_at_once(program, at, tmp_path):
    at["train", 3] = lambda: (send(signal.SIGINT), send(signal.SIGINT))
    with handled(signal.SIGINT, signal.default_int_handler):
        status, out, err = program("--save_every=2")
    assert (status, err) == (130, "") and "saved as" not in out
    assert checkpoints(tmp_path / "run") == [2] and read_lines(tmp_path / "run")[-1]["step"] == 3


def test_a_signal_right_after_a_resume_writes_no_second_checkpoint(config, at, straight, tmp_path, monkeypatch):
    at["train", 4] = TERM
    with pytest.raises(SystemExit):
        train(config())
    written = (tmp_path / "run" / "step_00000004").stat()
    catch_signals = distill.RunFolder.catch_signals

    def catch_one_that_comes_at_once(run):
        catch_signals(run)
        TERM()

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(distill.RunFolder, "catch_signals", catch_one_that_comes_at_once)
        train(config())
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "run" / "step_00000004").stat().st_ino == written.st_ino
    train(config())
    assert_same_run(tmp_path / "run", straight())


def test_a_finished_run_prints_that_it_is_finished_and_does_nothing(program, straight, tmp_path, monkeypatch):
    run = copy_of(straight(), tmp_path / "run")
    before = files_of(run)
    monkeypatch.setattr(GPT, "from_pretrained", None)  # nothing is loaded
    status, out, err = program("--timeout=77")
    assert (status, err) == (0, "") and f"{run}: this run is finished (step 8)" in out
    assert f"The student is in {run / 'step_00000008'}" in out
    assert files_of(run) == before


def test_two_runs_do_not_share_a_folder(config, at, straight, tmp_path):
    def start_others():
        before = files_of(tmp_path)
        for given in ({}, {"lr": 1e-3}):
            with pytest.raises(UserError, match=f"^{tmp_path / 'run'}: another process is using it"):
                train(config(**given))
        assert files_of(tmp_path) == before
    at["train", 3] = start_others
    train(config())
    assert at == {} and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_same_run(tmp_path / "run", straight())


# ------------ Another experiment in the same folder -------------------------------------------------------------------

OTHER_VALUES = dict(
    domains="signs,digits,letters", method="kd", gamma=0.5, temperature=2.0, alpha=0.9, interval=4, val_samples=4,
    mixture="letters=1,digits=1,signs=1", stop_ratio=0.01, test_samples=3, block_size=8, batch_size=4, max_steps=10,
    lr=1e-3, min_lr=1e-4, warmup_steps=3, weight_decay=0.2, grad_clip=0.5, seed=1, dtype="bfloat16",
    student="scratch:1x64")
FREE = {"preset", "teacher", "student", "data_dir", "out_dir", "micro_batch_size", "compile", "device", "parallel",
        "shard_teacher", "checkpoint_activations", "timeout", "save_every", "keep", "log_every", "wandb", "dry_run",
        "pretrain_steps"}


def test_another_experiment_in_the_same_folder_is_rejected_by_key_and_nothing_is_touched(config, straight):
    assert FREE <= MAY_CHANGE and MAY_CHANGE & OTHER_VALUES.keys() == {"student"}  # whose content is compared
    before = files_of(straight())
    with pytest.raises(UserError) as refused:
        train(config(out_dir=str(straight()), **OTHER_VALUES))
    *problems, advice = str(refused.value).splitlines()
    saved = read_lines(straight(), "run")[0]["config"]
    others = {**OTHER_VALUES, "data_dir": saved["data_dir"]}  # other domains are other bins
    expected = [f"--{key}={value}: the run in {straight()} was started with --{key}={saved[key]}"
                for key, value in others.items()]
    assert sorted(problems) == sorted(expected)
    assert advice.startswith(f"--out_dir={straight()}: ")
    assert files_of(straight()) == before


def test_a_key_newer_than_a_run_had_its_default_there_and_may_not_change(config, straight, monkeypatch):
    straight()
    forked = make_dataclass("Forked", [("colour", str, field(default="red"))], bases=(Config,))
    monkeypatch.setattr(distill, "Config", forked)
    assert train(config(out_dir=str(straight()))).name == "step_00000008"
    with pytest.raises(UserError, match=f"^--colour=blue: the run in {straight()} was started with --colour=red\n"):
        train(config(out_dir=str(straight()), colour="blue"))


def test_a_teacher_that_the_run_did_not_have_is_another_experiment(config, teacher):
    train(config(teacher="", method="cpt", max_steps=0))
    with pytest.raises(UserError, match=f"^--teacher={teacher}: the run in .* was started with --teacher=\n"):
        train(config(method="cpt", max_steps=0))


def test_keys_that_change_no_experiment_may_change(config, at, tmp_path):
    at["train", 5] = TERM
    with pytest.raises(SystemExit):
        train(config())
    train(config(micro_batch_size=4, shard_teacher=False, checkpoint_activations=True, timeout=5, save_every=3, keep=0,
                 log_every=1, wandb=False, pretrain_steps=7, preset="quickstart"))
    assert checkpoints(tmp_path / "run") == [4, 5, 6, 8]
    train(config(compile="true", device="auto"))  # finished


def test_models_and_data_are_compared_by_content_not_by_path(config, straight, data_dir, teacher, tmp_path):
    bins = copy_of(data_dir, tmp_path / "moved_bins")
    moved = copy_of(teacher, tmp_path / "moved_teacher")
    settings = config(data_dir=str(bins), teacher=str(moved), out_dir=str(copy_of(straight(), tmp_path / "run")))
    assert train(settings).name == "step_00000008"
    edit("config.json", rms_norm_eps=0.1)(moved)
    sums = (bins / "SHA256SUMS").read_text()
    (bins / "SHA256SUMS").write_text(re.sub(r"(?m)^\w+(  digits.val.bin)$", 64 * "0" + r"\1", sums))
    with pytest.raises(UserError) as refused:
        train(settings)
    for key, folder in (("teacher", moved), ("data_dir", bins)):
        assert f"--{key}={folder}: the run in {tmp_path / 'run'} was started with --{key}=" in str(refused.value)


def test_a_run_without_a_checkpoint_yet_is_not_given_to_another_experiment(config, at, tmp_path):
    at["train", 1] = kill
    with pytest.raises(Killed):
        train(config())
    before = files_of(tmp_path / "run")
    with pytest.raises(UserError, match="--lr=0.5"):
        train(config(lr=0.5))
    assert files_of(tmp_path / "run") == before


def test_a_start_that_failed_does_not_claim_the_folder(config, teacher, tmp_path):
    def damage(tensors: dict):
        for name in tensors:
            if "q_proj" in name or "k_proj" in name:
                tensors[name] *= 1e20

    damaged = copy_of(teacher, tmp_path / "damaged", change_tensors(damage))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()  # as a run leaves it that was killed at once
    with pytest.raises(UserError, match="domain letters: the loss of a model is nan"):
        train(config(teacher=str(damaged)))
    assert train(config(lr=1e-3, max_steps=0)).name == "step_00000000"


# ------------ Damaged folders -----------------------------------------------------------------------------------------


def flip_a_bit(folder: Path):
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


DAMAGES = {
    "a bit of the weights": (flip_a_bit, "model.safetensors"),
    "no weights": (drop("model.safetensors"), "model.safetensors"),
    "no checksums": (drop("SHA256SUMS"), "SHA256SUMS"),
    "checksums that are none": (put("SHA256SUMS", b"{}\n"), "SHA256SUMS"),
}


@pytest.mark.parametrize("damage, named", DAMAGES.values(), ids=DAMAGES)
def test_after_a_damaged_checkpoint_the_previous_one_is_used(config, straight, tmp_path, capsys, damage, named):
    copy_of(straight(), tmp_path / "run")
    damage(tmp_path / "run" / "step_00000008")
    (tmp_path / "run" / "corrupt_step_00000008").mkdir()  # of an earlier time
    train(config(keep=0))
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "step_00000008: " in line]
    aside = tmp_path / "run" / re.search(r"renamed (corrupt_step_00000008\.\w+)$", warning)[1]
    assert named in warning and (aside / "optimizer.pt").is_file()
    assert_same_run(tmp_path / "run", straight())


def test_without_an_intact_checkpoint_a_run_prints_it_and_starts_again(config, straight, tmp_path, capsys):
    copy_of(straight("kd"), tmp_path / "run", lambda run: flip_a_bit(run / "step_00000008"))
    train(config(method="kd"))
    assert f"{tmp_path / 'run'}: no intact checkpoint is left: starting again from step 0\n" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", straight("kd"))


def insert_line(line: bytes):
    """Put a line into the middle of metrics.jsonl."""
    def insert(folder: Path):
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(True)
        (folder / "metrics.jsonl").write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    return insert


FOREIGN_RUNS = {
    "log missing": (put("metrics.jsonl", b""), "metrics.jsonl"),
    "log cut": (lambda folder: os.truncate(folder / "metrics.jsonl", 5000), "metrics.jsonl"),
    "no run line": (put("metrics.jsonl", b'{"kind": "run"}\n'), "metrics.jsonl"),
    "a line not text": (insert_line(b"\xff\xfe"), "metrics.jsonl"),
}
FOREIGN_CHECKPOINTS = {  # with checksums that fit: not damaged, but no run writes this
    "state of unknown keys": (edit("train_state.json", colour=3), "train_state.json"),
    "state without sampler": (edit("train_state.json", sampler=None), "train_state.json"),
    "sampler of other domains": (edit("train_state.json", lambda state: state["sampler"]["probs"].clear()),
                                 "train_state.json"),
    "optimizer hostile": (lambda folder: torch.save({"optimizer": Hostile()}, folder / "optimizer.pt"), "optimizer.pt"),
    "optimizer a bare pickle": (lambda folder: put("optimizer.pt", pickle.dumps(Hostile(), 2))(folder), "optimizer.pt"),
    "weights not safetensors": (put("model.safetensors", b"weights"), ""),
}


@pytest.mark.parametrize("spoil, named, part", [
    *(pytest.param(*row, "", id=f"run: {name}") for name, row in FOREIGN_RUNS.items()),
    *(pytest.param(*row, "step_00000007", id=name) for name, row in FOREIGN_CHECKPOINTS.items())])
def test_a_file_that_no_run_wrote_is_one_message_and_none_of_its_code_runs(program, straight, tmp_path, monkeypatch,
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


def test_the_last_value_of_a_repeated_key_wins_and_a_space_works_like_the_equals_sign():
    config = parse_config(["--seed=1", "--seed", "2", "--wandb", "--wandb=false", "--shard_teacher", "false"])
    assert (config.seed, config.wandb, config.shard_teacher) == (2, False, False)
    assert config.out_dir == "out/quickstart-ddk-2" and config.data_dir == "data/quickstart"


def test_the_first_step_prints_how_long_the_run_will_take(program):
    _, out, _ = program("--log_every=100")
    shown = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["1/8", "8/8"]
    assert all(re.search(r"[\d,]+ tokens/s  ETA \d+:\d\d:\d\d$", line) for line in shown)


def test_help_lists_every_key_with_its_comment_and_its_defaults(run_main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    status, out, err = run_main(distill, "--help")
    assert (status, err) == (0, "")
    helps = dict(re.findall(r"--(\w+) (?:\[\w+\]|\{\S+\}|[A-Z_]+)\s+(.*)", out.partition("options:")[2]))
    comments = dict(re.findall(r"(?m)^    (\w+): .*?  # (.+)$", inspect.getsource(Config)))
    assert helps.keys() == comments.keys() == KEYS.keys()
    for name, entry in KEYS.items():
        quickstart = f"; quickstart: {PRESETS['quickstart'][name]}" if name in PRESETS["quickstart"] else ""
        default = f" (default: {entry.default}{quickstart})" if entry.default != "" else ""
        assert helps[name] == comments[name] + default
    for name, method in distill.METHODS.items():
        assert re.search(rf"(?m)^ +{name} +{re.escape(method.help)}$", out)


PAPER = dict(method="ddk", gamma=0.2, temperature=1.0, alpha=0.5, interval=1000, val_samples=500, max_steps=30_000,
             lr=3e-5, min_lr=3e-6, warmup_steps=1000, test_samples=0, mixture="", stop_ratio=0.0, domains="")


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
    assert resolve_config({"preset": preset, "lr": 1.0, "teacher": "x"}).lr == 1.0  # a given key wins


@pytest.mark.parametrize("given", [{}, {"student": "scratch:1x32"}, {"lr": 1.0}], ids=str)
def test_the_quickstart_is_the_default_without_a_model_folder(given):
    config = resolve_config(given)
    assert config.preset == "quickstart" and config_errors(config) == []
    assert config.interval == 10 and config.warmup_steps < config.max_steps
    assert config.batch_size % 8 == 0  # for torchrun --nproc_per_node=8


@pytest.mark.parametrize("arguments, message", [
    ([], "--val_samples=64: domain python"),
    (["--batch_size=6"], "--batch_size=6: must be a multiple of 4, the number of processes")], ids=str)
def test_the_quickstart_checks_the_main_run_before_it_trains_a_model(
        run_main, tmp_path, monkeypatch, arguments, message):
    bins = tmp_path / "bins"
    texts = ((name, f"{name} {i} " * 99) for name in QUICKSTART_BYTES for i in range(40))
    build_bins(bins, load_tokenizer("bytes"), texts, val_fraction=0.2)
    if "--batch_size=6" in arguments:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(distill, "train", None)
    status, _, err = run_main(distill, f"--data_dir={bins}", f"--out_dir={tmp_path / 'run'}", *arguments)
    assert status == 2 and err.startswith("error: " + message) and err.count("\n") == 1


def test_train_itself_checks_the_configuration(monkeypatch):
    """Otherwise 3 processes would silently train on 6 of 8 windows."""
    monkeypatch.setattr(distill, "world_size", lambda: 3)
    with pytest.raises(UserError, match="--batch_size=8: must be a multiple of 3"):
        train(resolve_config({"student": "scratch:1x32"}))


@pytest.mark.parametrize("role, source, missing", [("teacher", "a/folder/of/mine", "student"),
                                                   ("student", "on-the-hub/student", "teacher")])
def test_a_model_folder_requires_a_preset(run_main, tiny, role, source, missing):
    others = {key: value for key, value in tiny.items() if key not in ("preset", "teacher", "student")}
    status, _, err = run_main(distill, *words({**others, role: source}))
    preset, model = err.splitlines()
    assert status == 2 and preset.startswith("error: --preset: choose one, since it sets what a step is; paper ")
    assert model.startswith(f"error: --{missing}: ")


# ------------ Mistakes ------------------------------------------------------------------------------------------------

ADVICE = "; write --key=value, --help lists the keys"
OUT_OF_RANGE = {"gamma": -1.0, "lr": "nan", "min_lr": "inf", "temperature": 0.0, "interval": 0, "val_samples": 0,
                "block_size": 0, "batch_size": 0, "micro_batch_size": -1, "max_steps": -1, "timeout": 0.0,
                "log_every": 0, "pretrain_steps": 3, "seed": 2**64, "stop_ratio": "nan"}
MISTAKES = [
    *(([word], f"unrecognized arguments: {word}{ADVICE}") for word in ("--nope=3", "--max_step=3", "lr=3", "-v")),
    (["--lr=fast", "--nope=3"], "argument --lr: invalid float value: 'fast'"),  # the first is enough
    (["--interval=1.5"], "argument --interval: invalid int value: '1.5'"),
    (["--wandb=maybe"], "argument --wandb: 'maybe' must be true or false"),
    (["--alpha"], "argument --alpha: expected one argument"),
    (["--data_dir"], "argument --data_dir: expected one argument"),
    *(([f"--{key}={word}"], f"argument --{key}: invalid choice: '{word}' (choose from ")
      for key, word in {"method": "dkd", "dtype": "float16", "preset": "papers", "compile": "yes"}.items()),
    *(([f"--{key}={value}"], f"--{key}={value}: must be a number from ") for key, value in OUT_OF_RANGE.items()),
    (["--alpha=2"], "--alpha=2.0: must be a number from 0 to 1"),
    (["--lr=3e5"], "--lr=300000.0: must be a number from 0 to 1"),
]
TWO = dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
STUDENTS = ["scratch:0x32", "scratch:2x33", "scratch:4by4"]
MIXTURES = ["a", "letters=x", "letters=-1", "letters=0", "letters=1,,digits=1"]


@pytest.mark.parametrize("arguments, environment, message", [
    *((arguments, {}, message) for arguments, message in MISTAKES),
    *(([f"--student={word}"], {}, f"--student={word}: write scratch:LxD with D even") for word in STUDENTS),
    (["--teacher=scratch:2x64"], {}, "--teacher=scratch:2x64: use the folder of a trained model"),
    (["--student="], {}, "--student: use a model folder or scratch:LxD"),
    (["--teacher=", "--method=ddk_es"], {}, "--teacher: --method=ddk_es requires a model folder"),
    *(([f"--mixture={text}"], {}, f"--mixture={text}: write name=weight") for text in MIXTURES),
    (["--batch_size=9"], TWO, "--batch_size=9: must be a multiple of 2, the number of processes"),
    (["--device=abacus"], {}, "--device=abacus"),
    (["--parallel=none"], TWO, "--parallel=none: there are 2 processes; use ddp or fsdp"),
    (["--parallel=fsdp"], {}, "--parallel=fsdp: start the processes with torchrun"),
    (["--device=auto"], dict(**TWO, GPUS="1"), "--device=auto: more processes than GPUs here"),
    ([], dict(RANK="0"), "the processes cannot meet: "),
    (["--wandb"], dict(NO_PACKAGES="1"), "--wandb: "),
], ids=str)
def test_a_mistake_on_the_command_line_is_one_message_before_a_file_is_opened(program, monkeypatch, tmp_path,
                                                                              arguments, environment, message):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if "GPUS" in environment:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(environment["GPUS"]))
    if "NO_PACKAGES" in environment:
        monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(distill, "TokenBins", None)
    status, out, err = program(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and not (tmp_path / "run").exists()
    assert err.startswith(f"error: {message}") and ("pip install wandb" in err) == ("NO_PACKAGES" in environment)


@pytest.mark.parametrize("given, cuda, world, resolved", [
    ({}, False, 1, dict(device="cpu", dtype="float32", compile="false", parallel="none", micro_batch_size=8)),
    ({}, True, 1, dict(device="cuda", dtype="bfloat16", compile="true", parallel="none", micro_batch_size=8)),
    ({}, False, 4, dict(device="cpu", dtype="float32", compile="false", parallel="ddp", micro_batch_size=2)),
    ({}, True, 4, dict(device="cuda", dtype="bfloat16", compile="true", parallel="fsdp", micro_batch_size=2)),
    (dict(device="cuda:1"), True, 4, dict(device="cuda")),
    (dict(device="cpu"), True, 1, dict(device="cpu", dtype="float32", compile="false"))], ids=str)
def test_what_auto_means_on_a_machine(given, cuda, world, resolved, monkeypatch):
    accelerator = torch.device("cuda") if cuda else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(dist, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    config = resolve_config({"batch_size": 8, **given})
    assert asdict(resolve_auto(config)) == asdict(resolve_auto(config)) | resolved
    fixed = resolve_config({"dtype": "float32", "compile": "false", "parallel": "ddp", "micro_batch_size": 1, **given})
    assert asdict(resolve_auto(fixed)) == asdict(fixed) | {"device": asdict(resolve_auto(config))["device"]}


def test_all_contradictions_are_printed_at_once_a_line_each(program):
    status, _, err = program("--alpha=2", "--lr=3e5", "--teacher=")
    assert status == 2 and err.count("\n") == 3
    assert re.findall("(?m)^error: --(\\w+)", err) == ["alpha", "lr", "teacher"]


def product(*_):
    return torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("changed, name, bug, words", [
    (model_program, "Block", lambda config: config.width, "AttributeError: 'GPTConfig' object has no attribute"),
    (model_program, "write_weights", product, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    (distill, "dense_distillation_loss", lambda logits, *_, **__: logits.soft(), "AttributeError: 'Tensor' object has"),
    (distill, "measured_domains", lambda *_: nothing_at_all, "NameError: name 'nothing_at_all' is not defined")],
    ids=["constructor", "save", "loss", "loop"])
def test_a_bug_keeps_its_traceback(program, monkeypatch, changed, name, bug, words):
    monkeypatch.setattr(changed, name, bug)
    status, _, err = program()
    assert status == 1 and err.startswith("Traceback") and err.splitlines()[-1].startswith(words)


# ------------ Bins, models and tokenizers that do not fit -------------------------------------------------------------


def own_tokenizer(change):
    """Return a function that writes the bytes tokenizer's tokenizer.json after `change`, as transformers would."""
    def give(folder: Path):
        settings = bytes_settings()
        change(settings)
        (folder / "tokenizer_meta.json").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(settings))
    return give


SWAPPED = own_tokenizer(lambda settings: settings["model"]["vocab"].update(a=98, b=97))
SPLIT = own_tokenizer(lambda settings: settings["pre_tokenizer"].update(use_regex=True))
OTHER_END = own_tokenizer(lambda settings: settings["added_tokens"][0].update(content="</s>"))
BERT = edit("config.json", model_type="bert")
SLIDING = edit("config.json", model_type="mistral", sliding_window=8)
SMALL_AND_SHORT = edit("config.json", vocab_size=200, max_position_embeddings=8)
MAKE_ANEW = "make the bins again with data.py --tokenizer={other}"


@pytest.mark.parametrize("change, arguments, messages", [
    (SWAPPED, ["--teacher={other}"], ["--teacher={other}: its tokenizer", MAKE_ANEW]),
    (SWAPPED, ["--student={other}"], ["--student={other}: its tokenizer", MAKE_ANEW]),
    (SPLIT, ["--teacher={other}"], ["--teacher={other}: its tokenizer other (257 ids) is not that of the bins, bytes"]),
    (OTHER_END, ["--teacher={other}"], ["<|endoftext|>: not a token of {other}"]),
    (edit("tokenizer_meta.json", fingerprint="0"), ["--teacher={other}"],
     ["{other}: its tokenizer bytes encodes in another way"]),
    (put("tokenizer_meta.json", b"{}"), ["--student={other}"], ["{other}/tokenizer_meta.json: "]),
    (SLIDING, ["--teacher={other}"], ["--block_size=16: the teacher {other} reads at most 8 tokens"]),
    (SLIDING, ["--student={other}"], ["--block_size=16: the student {other} reads at most 8 tokens"]),
    (SMALL_AND_SHORT, ["--teacher={other}"],
     ["--teacher={other}: has 200 ids, but the tokenizer of the bins has 257; " + MAKE_ANEW]),
    (SMALL_AND_SHORT, ["--student={other}"], ["--student={other}: has 200 ids"]),
    (BERT, ["--teacher={other}"], ["--teacher={other}: {other}/config.json: model_type 'bert' is not "]),
    (nothing, ["--mixture=letters=1,cats=1"], ["--mixture=letters=1,cats=1: ValueError: probs are for letters cats, but "
                                               "the domains are letters digits signs; give each domain of "]),
    (nothing, ["--domains=letters", "--mixture=letters=1,signs=1"], ["for letters signs, but the domains are letters;"]),
    (nothing, ["--teacher=nowhere"], ["--teacher=nowhere: nowhere: no config.json"]),
    (nothing, ["--student=2x64"], ["--student=2x64: 2x64: no config.json"]),
    (nothing, ["--data_dir=nowhere"], ["--data_dir=nowhere: has no meta.json; make bins with data.py"]),
    (nothing, ["--domains=letters,cats"], ["--domains: ", "has no cats", "letters digits signs"]),
    (nothing, ["--val_samples=1000"], ["--val_samples=1000: domain letters"]),
    (nothing, ["--test_samples=1000"], ["--test_samples=1000: domain letters"]),
    (nothing, ["--block_size=4096"], ["--block_size=4096: domain", "has no train text that long"])])
@pytest.mark.parametrize("dry", [False, True])
def test_models_and_bins_that_do_not_fit_are_rejected_before_a_weight_is_read(program, teacher, tmp_path, monkeypatch,
                                                                              change, arguments, messages, dry):
    other = copy_of(teacher, tmp_path / "other", change)
    monkeypatch.setattr(GPT, "from_pretrained", None)
    status, _, err = program(*(word.format(other=other) for word in arguments), f"--dry_run={dry}")
    assert status == 2 and not (tmp_path / "run").exists()
    for message in messages:
        assert message.format(other=other) in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_folder_without_tokenizer_files_is_used_with_a_warning(program, teacher, tmp_path):
    other = copy_of(teacher, tmp_path / "other", lambda folder: [path.unlink() for path in folder.glob("tokenizer*")])
    status, out, err = program(f"--teacher={other}", "--max_steps=0")
    assert (status, err) == (0, "") and f"WARNING: --teacher={other} has no tokenizer that can be compared" in out


def hub_cache(folder: Path, cache: Path, name: str):
    """Copy a model folder into a cache of huggingface_hub."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")


@pytest.fixture
def hub(monkeypatch, tmp_path, teacher):
    """Set huggingface_hub offline, with the model you/teacher in its cache."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")  # a submodule that the package does not import
    hub_cache(teacher, tmp_path / "hub", "you/teacher")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download = partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_models_and_tokenizers_can_be_names_on_the_hub(program, run_main, hub, straight, tmp_path):
    expected = straight()
    status, _, err = program("--teacher=you/teacher", "--keep=0", "--save_every=1")
    assert (status, err) == (0, "")
    assert_same_run(tmp_path / "run", expected)
    # A name on the Hub is its own identity, since only config.json is there at the first start.
    assert read_lines(tmp_path / "run", "run")[0]["content"]["teacher"] == "you/teacher"
    status, out, err = run_main(model_program, "--model=you/teacher", "--prompt=abc", "--max_new_tokens=3")
    assert (status, err) == (0, "") and out.startswith("abc")
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i}")
    status, _, err = run_main(data, f"--out_dir={tmp_path / 'bins'}", "--tokenizer=you/teacher",
                              f"x={tmp_path / 'texts'}", "--val_fraction=0.2")
    assert (status, err) == (0, "") and (tmp_path / "bins" / "tokenizer.json").is_file()


@pytest.mark.parametrize("installed", [True, False])
def test_a_name_that_the_hub_lacks_is_one_message_with_the_command(program, hub, tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    status, _, err = program("--teacher=mine/other")
    assert status == 2 and "huggingface" not in err.lower() and "mine/other: no config.json" in err  # a folder of mine
    status, _, err = program("--teacher=you/other")
    assert status == 2 and err.startswith("error: --teacher=you/other: no such folder") and err.count("error: ") == 1
    command = "hf download you/other --local-dir models/other" if installed else "pip install huggingface_hub"
    assert command in err and not (tmp_path / "run").exists()
    assert ("pip install huggingface_hub" in err) == (not installed)


# ------------ Dry run and report --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, width", [(["--dtype=float32"], 4), (["--dtype=bfloat16", "--method=cpt"], 2)])
def test_a_dry_run_prints_sizes_reads_no_weights_and_writes_nothing(
        program, teacher, tmp_path, arguments, width):
    """The sizes of a teacher of 32 layers, 4096 wide, and of a student of 4 layers are computed by hand."""
    V, d, L, ff, kv, steps = 152_064, 4096, 32, 11_008, 8 * 128, 600
    sizes = dict(model_type="qwen2", vocab_size=V, hidden_size=d, intermediate_size=ff, head_dim=128,
                 num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
    folders = {}
    for role, layers in (("teacher", L), ("student", 4)):
        folders[role] = copy_of(teacher, tmp_path / role, edit("config.json", num_hidden_layers=layers, **sizes))
    status, out, err = program(*words(folders), f"--max_steps={steps}", "--dry_run", *arguments)
    assert (status, err) == (0, "") and sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]
    matrices = 2 * d * d + 2 * d * kv + 3 * d * ff  # q and o, k and v, the MLP's three
    layer = matrices + (d + 2 * kv) + 2 * d  # biases of q, k and v; two norms
    for role, layers, n_bytes in (("teacher", L, width), ("student", 4, 16)):
        parameters = layers * layer + 2 * V * d + d
        assert f"{role}: {parameters:,} parameters, {parameters * n_bytes / 2**30:.2f} GiB for one copy\n" in out
    assert f"{steps} steps: {steps * B * T:,} tokens\n" in out


@pytest.mark.slow
def test_a_step_of_the_papers_pair_holds_the_bytes_that_a_dry_run_counts():
    """This runs on fake tensors. bench_scale.py itself compares the bytes."""
    command = [sys.executable, str(Path(__file__).with_name("bench_scale.py")), "--preset=llama2-13b-tinyllama-1.1b",
               "--batch_size=16", "--micro_batch_size=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    row, = re.findall(r"\| `llama2-13b-tinyllama-1.1b` \| [\d.]+ \| (\d+), (\d+), [\d.]+ \|", result.stdout)
    gib, moved_gb = map(int, row)
    assert 5 < gib < 20 and moved_gb > 2 * 13 * 2 * 7 / 8  # at least the teacher's weights, twice


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """Return a run that has learned something by step 8, and more by step 16."""
    out_dir = tmp_path_factory.mktemp("trained") / "run"
    train(resolve_config({**tiny, "teacher": "", "method": "cpt", "lr": 2e-2, "max_steps": 16, "save_every": 8,
                          "out_dir": str(out_dir)}))
    return out_dir


@pytest.mark.parametrize("teacher_step, student_step, message", [
    (None, 8, "WARNING: THE TEACHER IS NEAR UNIFORM IN {}"),
    (8, 16, "WARNING: THE TEACHER IS BEHIND ITS STUDENT IN {}"), (16, 8, None)], ids=["near uniform", "behind", "good"])
def test_a_run_warns_at_once_of_a_teacher_with_little_to_teach(program, trained, teacher, teacher_step, student_step,
                                                               message):
    folder = teacher if teacher_step is None else trained / f"step_{teacher_step:08d}"
    status, out, err = program(f"--teacher={folder}", f"--student={trained / f'step_{student_step:08d}'}",
                               "--max_steps=0")
    assert (status, err) == (0, "")
    # Once for each domain, when it is measured
    top = out.partition("The test windows never influence r")[0]
    assert out.count("THE TEACHER") == (3 if message else 0)
    assert message is None or all(top.count(message.format(name)) == 1 for name in NAMES)
