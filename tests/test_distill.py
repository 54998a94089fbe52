"""The loop: Alg. 1 and its arms, what is written, resuming, and what is refused."""

import json
import os
import re
import shutil
import signal
import sys
import types
from contextlib import nullcontext
from dataclasses import replace
from decimal import Decimal, getcontext
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import read_lines
from safetensors.torch import load_file, save_file

import distill
from data import TokenBins, UserError, build_bins, bytes_settings, load_tokenizer
from distill import (checkpoints, dense_distillation_loss, make_optimizers, read_state, resolve_config, train)
from model import GPT, GPTConfig
from sample_mixture import METHODS, MixtureSampler

NAMES = ["letters", "digits", "signs"]


@pytest.fixture
def config(data_dir, teacher, tmp_path):
    """A function that makes a tiny run's configuration; each of its own out_dir unless named."""
    def make(**given):
        values = dict(data_dir=str(data_dir), teacher=str(teacher), student="scratch:1x32", block_size=16, batch_size=8,
                      val_samples=5, interval=2, max_steps=8, lr=3e-3, min_lr=3e-4, warmup_steps=2, save_every=4,
                      out_dir=str(tmp_path / "run"), device="cpu")
        config = resolve_config(**{**values, **given})
        assert config.problems() == []
        return config
    return make


def natural(data_dir):
    windows = TokenBins(data_dir, 16).n_windows
    return [windows[name] / sum(windows.values()) for name in NAMES]


def exact_update(factor, ratios, alpha):
    """Eq. 1 where factor is None, else Eq. 2, in 50 digits."""
    getcontext().prec = 50
    if factor is None:
        return [r.exp() / sum(r.exp() for r in ratios) for r in ratios]
    weights = [f * r.exp() for f, r in zip(factor, ratios)]
    return [Decimal(alpha) * w / sum(weights) + (1 - Decimal(alpha)) / len(ratios) for w in weights]


# ----------------------------------------------- Alg. 1 ------------------------------------------------------------


def test_a_whole_run_follows_alg_1(config, data_dir, tmp_path):
    train(config(alpha=0.7))
    lines, factor = read_lines(tmp_path / "run", "mixture"), None
    assert [(line["t"], line["step"]) for line in lines] == [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]
    for line in lines:
        domains = line["domains"]
        assert list(domains) == NAMES
        for domain in domains.values():
            assert domain["ratio"] == domain["student_ppl"] / domain["teacher_ppl"]
        ratios = [Decimal(d["student_ppl"]) / Decimal(d["teacher_ppl"]) for d in domains.values()]
        factor = exact_update(factor, ratios, "0.7")
        assert [d["factor"] for d in domains.values()] == pytest.approx([float(f) for f in factor], abs=1e-12)
        expected_r = natural(data_dir) if line["t"] == 0 else [float(f) for f in factor]
        assert list(line["r"].values()) == pytest.approx(expected_r, abs=1e-12)
    # What was drawn in each interval of 2 steps follows the r that stood at its start, to within one window a step.
    for before, after in zip(lines, lines[1:]):
        for name in NAMES:
            drawn = (after["domains"][name]["tokens"] - before["domains"][name]["tokens"]) / 16
            assert abs(drawn - 2 * 8 * before["r"][name]) < 2
    # The student was trained: it is not measured once and copied.
    assert len({line["domains"]["digits"]["student_ppl"] for line in lines}) == 5
    assert len({line["domains"]["digits"]["teacher_ppl"] for line in lines}) == 1


@pytest.mark.parametrize("method", ["ddk_no_fs", "ddk_es", "kd", "minillm", "ted", "cpt"])
def test_each_arm_draws_by_its_own_rule(config, data_dir, tmp_path, method):
    train(config(method=method, max_steps=4))
    factor = None
    for line in read_lines(tmp_path / "run", "mixture"):
        ratios = [Decimal(d["ratio"]) for d in line["domains"].values()]
        factor = exact_update(None if method == "ddk_no_fs" else factor, ratios, "0.5")
        assert [d["factor"] for d in line["domains"].values()] == pytest.approx([float(f) for f in factor], abs=1e-12)
        expected = {"ddk_no_fs": [float(f) for f in factor] if line["t"] else natural(data_dir),
                    "ddk_es": [1 / 3] * 3}.get(method, natural(data_dir))
        assert list(line["r"].values()) == pytest.approx(expected, abs=1e-12)
    kl = [line["kl"] for line in read_lines(tmp_path / "run", "train")]
    assert all(value == 0 for value in kl) if method == "cpt" else all(value > 0 for value in kl)


def test_arms_of_one_mixture_see_the_same_windows(config, tmp_path, monkeypatch):
    drawn = {}
    for method in ("kd", "cpt"):
        batches = drawn[method] = []
        original = TokenBins.train_windows
        monkeypatch.setattr(TokenBins, "train_windows", lambda self, *ids: (
            batches.append([part.tolist() for part in ids]), original(self, *ids))[1])
        train(config(method=method, out_dir=str(tmp_path / method)))
        monkeypatch.undo()
    assert drawn["kd"] == drawn["cpt"] and len(drawn["kd"]) == 8


def test_the_loss_is_ce_plus_gamma_kl(config, tmp_path):
    train(config(gamma=0.3, max_steps=2))
    for line in read_lines(tmp_path / "run", "train"):
        assert line["loss"] == pytest.approx(line["ce"] + 0.3 * line["kl"], rel=1e-5)


def test_minillms_divergence_puts_the_student_first(config, data_dir, teacher, tmp_path):
    train(config(method="minillm", max_steps=1))
    bins = TokenBins(data_dir, 16)
    windows = torch.from_numpy(bins.train_windows(*MixtureSampler(bins.n_windows, 8, 0).next_batch()))
    torch.manual_seed(0)
    models = GPT(GPTConfig.scratch(1, 32, 257, 16)), GPT.from_pretrained(teacher)
    with torch.no_grad():
        logits = [model(windows[:, :-1]) for model in models]
        both = [dense_distillation_loss(*logits, windows[:, 1:], direction=d)[2].item() for d in ("reverse", "forward")]
    (line,) = read_lines(tmp_path / "run", "train")
    assert line["kl"] == pytest.approx(both[0], rel=1e-5) and both[0] != pytest.approx(both[1], rel=1e-3)


# ----------------------------------------------- TED and DoReMi ----------------------------------------------------


def test_ted_with_no_weight_on_its_filters_is_kd(config, tmp_path):
    for method in ("ted", "kd"):
        train(config(method=method, filter_weight=0, filter_steps=3, grad_clip=0, weight_decay=0,
                     out_dir=str(tmp_path / method)))
    ted, kd = (read_lines(tmp_path / method, "train") for method in ("ted", "kd"))
    assert ted == kd and len(kd) == 8


def test_teds_loss_adds_the_distance_of_the_filtered_layers(config, data_dir, teacher, tmp_path, monkeypatch):
    """At the first step, with the filters of stage 1 taken from the run."""
    seen, original = {}, distill.train_filters

    def train_filters(student, *rest):
        seen["before"] = [weight.clone() for weight in student.filters.parameters()]
        original(student, *rest)
        seen["after"] = [weight.clone() for weight in student.filters.parameters()]

    monkeypatch.setattr(distill, "train_filters", train_filters)
    folder = train(config(method="ted", filter_weight=0.5, filter_steps=4, max_steps=1))
    eye = torch.eye(64, 32), torch.eye(64)  # of one layer of the student's and of the teacher's each
    assert all(weight.equal(one) for weight, one in zip(seen["before"], eye, strict=True))
    assert not any(weight.equal(one) for weight, one in zip(seen["after"], eye))
    windows = torch.from_numpy(TokenBins(data_dir, 16).train_windows(
        *MixtureSampler(TokenBins(data_dir, 16).n_windows, 8, 0).next_batch()))
    torch.manual_seed(0)
    models = GPT(GPTConfig.scratch(1, 32, 257, 16)), GPT.from_pretrained(teacher)
    with torch.no_grad():
        layers = [model(windows[:, :-1], loss_fn=lambda hidden, head, layer: layer, keep=[len(model.layers) - 1])
                  for model in models]
        ours, wanted = (layer @ weight.T for layer, weight in zip(layers, seen["after"]))
        distance = (((ours - wanted) ** 2).sum(dim=-1) / (wanted ** 2).sum(dim=-1)).mean()
    (line,) = read_lines(tmp_path / "run", "train")
    assert line["loss"] == pytest.approx(line["ce"] + 0.2 * line["kl"] + 0.5 * distance.item(), rel=1e-4)
    assert not [name for name in load_file(folder / "model.safetensors") if "filter" in name]


def test_teds_first_stage_teaches_the_filters_to_predict(config, data_dir, teacher):
    """The loss of each filtered layer, read by the teacher's norm and head, falls; the models stay as they are."""
    torch.manual_seed(3)
    models = [GPT(GPTConfig.scratch(1, 32, 257, 16)), GPT.from_pretrained(teacher)]
    models[1].requires_grad_(False)
    pairs = distill.layer_pairs(*models)
    distill.add_filters(*models, pairs)
    before = [p.clone() for model in models for name, p in model.named_parameters() if "filters" not in name]
    bins = TokenBins(data_dir, 16)
    rows = torch.from_numpy(bins.train_windows(*MixtureSampler(bins.n_windows, 8, 0).next_batch()))

    def losses():
        with torch.no_grad():
            for role, model in zip(("student", "teacher"), models):
                layer = model(rows[:, :-1], loss_fn=lambda hidden, head, layer: layer, keep=[len(model.layers) - 1])
                logits = models[1].norm(models[0].filters[role][0](layer)) @ models[1].head_weight.T
                yield dense_distillation_loss(logits, None, rows[:, 1:])[0].item()
    first = list(losses())
    distill.train_filters(*models, pairs, iter(lambda: [rows], None),
                          config(filter_steps=30, max_steps=30, lr=1e-2), nullcontext(), lambda: 0)
    assert all(after < 0.9 * loss for after, loss in zip(losses(), first))
    after = [p for model in models for name, p in model.named_parameters() if "filters" not in name]
    assert all(p.equal(q) for p, q in zip(before, after, strict=True))
    assert [p.requires_grad for p in models[0].filters.parameters()] == [True, False]


@pytest.mark.parametrize("depths, pairs", [((2, 4), ([0, 1], [1, 3])), ((1, 2), ([0], [1])), ((24, 40), (
    [5, 11, 17, 23], [9, 19, 29, 39])), ((3, 2), ([1, 2], [0, 1]))])
def test_ted_compares_evenly_spaced_layers_with_the_last_among_them(depths, pairs):
    models = [types.SimpleNamespace(layers=range(depth)) for depth in depths]
    assert distill.layer_pairs(*models) == pairs


def exact_doremi(weights, excess):
    raised = [Decimal(w) * Decimal(x).exp() for w, x in zip(weights, excess)]
    return [float(Decimal("0.999") * w / sum(raised) + Decimal("0.001") / len(raised)) for w in raised]


def test_a_doremi_proxy_weighs_the_loss_by_its_excess(config, data_dir, teacher, tmp_path):
    """The first step, written out; signs is left out of the data, so that its λ stays 0."""
    train(config(method="doremi_proxy", mixture="letters=3,digits=1,signs=0", max_steps=1, val_samples=2))
    bins = TokenBins(data_dir, 16)
    sampler = MixtureSampler(bins.n_windows, 8, 0)
    sampler.probs = {"letters": 3, "digits": 1, "signs": 0}
    ids, windows = sampler.next_batch()
    rows = torch.from_numpy(bins.train_windows(ids, windows))
    torch.manual_seed(0)
    proxy, reference = GPT(GPTConfig.scratch(1, 32, 257, 16)), GPT.from_pretrained(teacher)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none")
                  for model in (proxy, reference)]
    over = (losses[0] - losses[1]).clamp(min=0)
    excess = [over[torch.from_numpy(ids == i)].mean().item() if (ids == i).any() else 0.0 for i in range(3)]
    weights = exact_doremi([1 / 3] * 3, excess)
    assert excess[2] == 0 and min(excess[:2]) > 0
    state = read_state(checkpoints(tmp_path / "run")[-1]).doremi
    assert state["excess"] == pytest.approx(excess, rel=1e-5)
    assert state["weights"] == state["total"] == pytest.approx(weights, rel=1e-5)
    of_windows = torch.tensor([weights[i] / (0.75, 0.25)[i] for i in ids])[:, None]
    (line,) = read_lines(tmp_path / "run", "train")
    assert line["loss"] == pytest.approx(((of_windows * losses[0]).sum() / (of_windows.sum() * 16)).item(), rel=1e-5)


def test_cpt_doremi_makes_a_reference_and_a_proxy_once_and_draws_by_the_mean_of_its_weights(
        run_main, data_dir, teacher, tmp_path):
    arguments = [f"--data_dir={data_dir}", f"--teacher={teacher}", "--student=scratch:1x32", "--block_size=16",
                 "--batch_size=8", "--val_samples=5", "--interval=2", "--max_steps=4", f"--out_dir={tmp_path}/run/",
                 "--method=cpt_doremi"]
    assert run_main(distill, *arguments)[::2] == (0, "")
    runs = {name: tmp_path / f"run{name}" for name in ("", "-reference", "-proxy")}
    (proxy,) = [json.loads((runs["-proxy"] / "config.json").read_text())["config"]]
    assert proxy["teacher"] == str(checkpoints(runs["-reference"])[-1]) and proxy["method"] == "doremi_proxy"
    state = read_state(checkpoints(runs["-proxy"])[-1])
    mean = [total / state.step for total in state.doremi["total"]]
    assert sum(mean) == pytest.approx(1) and mean != pytest.approx(natural(data_dir), abs=0.005)
    for line in read_lines(runs[""], "mixture"):
        assert list(line["r"].values()) == pytest.approx(mean, rel=1e-9)
        assert all(domain["ratio"] > 0 for domain in line["domains"].values())  # to the teacher, though it trains none
    made = {path: path.stat().st_mtime_ns for name in ("-reference", "-proxy") for path in runs[name].rglob("*.pt")}
    status, out, err = run_main(distill, *arguments)
    assert (status, err) == (0, "") and out.count("this run is finished") == 3
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_cpt_doremi_refuses_before_its_two_runs_what_its_third_would(run_main, data_dir, teacher, tmp_path):
    GPT(GPTConfig.scratch(1, 32, 100, 16)).save_pretrained(tmp_path / "small")
    common = [f"--data_dir={data_dir}", "--block_size=16", "--batch_size=8", "--val_samples=5", "--max_steps=2",
              "--method=cpt_doremi", f"--out_dir={tmp_path / 'run'}"]
    for words, message in (([f"--teacher={tmp_path / 'small'}", "--student=scratch:1x32"], "has 100 ids"),
                           ([f"--teacher={teacher}", "--student=layers:1"], "--student=layers:1: cpt_doremi starts")):
        status, out, err = run_main(distill, *common, *words)
        assert status == 2 and message in err and not list(tmp_path.glob("run*"))


def test_a_mixture_from_a_file_is_known_by_its_content(config, data_dir, tmp_path):
    path = tmp_path / "mixture.json"
    path.write_text('{"letters": 1, "digits": 1, "signs": 2}')
    train(config(method="kd", mixture=str(path)))
    assert list(read_lines(tmp_path / "run", "mixture")[0]["r"].values()) == [0.25, 0.25, 0.5]
    train(config(method="kd", mixture="letters=1,digits=1,signs=2"))  # the same: finished
    path.write_text('{"letters": 2, "digits": 1, "signs": 1}')
    with pytest.raises(UserError, match="--mixture=letters=2,digits=1,signs=1"):
        train(config(method="kd", mixture=str(path)))


@pytest.mark.parametrize("text", ["[1, 2]", '{"letters": "x"}', '{"letters": -1}', "{", '{"letters": 0}', "null"])
def test_a_bad_mixture_file_is_one_message(run_main, data_dir, teacher, tmp_path, text):
    (tmp_path / "mixture.json").write_text(text)
    for mixture in (tmp_path / "mixture.json", tmp_path / "none.json"):
        status, out, err = run_main(distill, f"--data_dir={data_dir}", f"--teacher={teacher}", "--student=scratch:1x32",
                                    f"--mixture={mixture}")
        assert status == 2 and err.startswith(f"error: --mixture={mixture}: write") and err.count("\n") == 1


def test_evaluation_changes_nothing_in_training(config, tmp_path):
    random_state, losses, drawn = torch.get_rng_state(), [], []
    for interval in (1, 100):
        folder = train(config(method="kd", interval=interval, out_dir=str(tmp_path / str(interval))))
        losses.append([line["loss"] for line in read_lines(tmp_path / str(interval), "train")])
        drawn.append(read_state(folder).sampler)
    assert losses[0] == losses[1] and drawn[0] == drawn[1]
    assert torch.get_rng_state().equal(random_state)


def test_the_teacher_is_measured_once_for_the_same_windows(config, data_dir, tmp_path, monkeypatch):
    (data_dir / "teacher_ppl.json").unlink(missing_ok=True)
    measured, original = [], distill.perplexities
    monkeypatch.setattr(distill, "perplexities", lambda model, *rest: (
        measured.append(len(model.layers)), original(model, *rest))[1])
    for run, val_samples in (("a", 5), ("b", 5), ("c", 4)):
        train(config(out_dir=str(tmp_path / run), max_steps=2, val_samples=val_samples))
    assert measured.count(2) == 2  # the teacher has two layers: once for 5 windows, once for 4
    assert measured.count(1) == 6  # the student one: before and after, three times


def test_perplexities_kept_from_domains_in_another_order_go_to_their_own_domains(config, data_dir, tmp_path):
    (data_dir / "teacher_ppl.json").unlink(missing_ok=True)
    factors = []
    for run, domains in (("a", "letters,signs"), ("b", "signs,letters")):
        train(config(out_dir=str(tmp_path / run), domains=domains, max_steps=2))
        measured = read_lines(tmp_path / run, "mixture")[0]["domains"]
        factors.append({name: round(domain["factor"], 9) for name, domain in measured.items()})
    assert factors[0] == factors[1] and factors[0]["letters"] != factors[0]["signs"]


def test_stop_ratio_ends_a_run_early(config, tmp_path):
    train(config(out_dir=str(tmp_path / "whole"), max_steps=6))
    worst = [max(d["ratio"] for d in line["domains"].values()) for line in read_lines(tmp_path / "whole", "mixture")]
    assert worst == sorted(worst, reverse=True)
    folder = train(config(stop_ratio=worst[2], max_steps=6))
    assert folder.name == "step_00000004"
    assert read_lines(tmp_path / "run", "end")[0]["step"] == 4


def test_the_last_step_is_evaluated_and_saved_whatever_k(config, tmp_path):
    folder = train(config(max_steps=3, save_every=0))
    assert folder.name == "step_00000003" and checkpoints(tmp_path / "run") == [folder]
    assert [line["step"] for line in read_lines(tmp_path / "run", "mixture")] == [0, 2]
    (end,) = read_lines(tmp_path / "run", "end")
    assert end["step"] == 3 and set(end["domains"]) == set(NAMES)


@pytest.mark.parametrize("method", METHODS)
def test_max_steps_0_makes_no_step_by_any_method(run_main, data_dir, teacher, tmp_path, method):
    status, out, err = run_main(
        distill, f"--data_dir={data_dir}", f"--teacher={teacher}", "--student=scratch:1x32", "--block_size=16",
        "--batch_size=8", "--val_samples=5", "--max_steps=0", f"--method={method}", f"--out_dir={tmp_path / 'run'}")
    assert (status, err) == (0, "") and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not read_lines(tmp_path / "run", "train") and len(read_lines(tmp_path / "run", "mixture")) == 1


def test_a_proxy_that_is_good_enough_from_the_start_ends_as_any_run(run_main, data_dir, teacher, tmp_path):
    status, out, err = run_main(
        distill, f"--data_dir={data_dir}", f"--teacher={teacher}", "--student=scratch:1x32", "--block_size=16",
        "--batch_size=8", "--val_samples=5", "--method=doremi_proxy", "--stop_ratio=1000",
        f"--out_dir={tmp_path / 'run'}")
    assert (status, err) == (0, "") and "step_00000000" in out


def test_max_steps_0_only_evaluates(config, tmp_path):
    folder = train(config(max_steps=0))
    assert [line["kind"] for line in read_lines(tmp_path / "run")] == ["run", "mixture", "end"]
    assert folder.name == "step_00000000"


def test_cpt_goes_without_a_teacher(config, tmp_path):
    train(config(method="cpt", teacher="", max_steps=2))
    for line in read_lines(tmp_path / "run", "mixture"):
        assert all(d["teacher_ppl"] is d["ratio"] is d["factor"] is None for d in line["domains"].values())


def test_a_fixed_mixture_replaces_the_natural_one(config, tmp_path):
    train(config(method="kd", mixture="digits=1,letters=0,signs=3", max_steps=4))
    for line in read_lines(tmp_path / "run", "mixture"):
        assert line["r"] == {"letters": 0, "digits": 0.25, "signs": 0.75}
    tokens = {name: d["tokens"] for name, d in line["domains"].items()}
    assert tokens == {"letters": 0, "digits": 4 * 2 * 16, "signs": 4 * 6 * 16}


def test_micro_batches_change_neither_order_nor_result(config, tmp_path):
    runs = []
    for size in (0, 2, 4):
        train(config(micro_batch_size=size, out_dir=str(tmp_path / str(size))))
        runs.append(read_lines(tmp_path / str(size)))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            if a["kind"] == "train":
                assert [b[key] for key in ("loss", "ce", "kl", "grad_norm")] == pytest.approx(
                    [a[key] for key in ("loss", "ce", "kl", "grad_norm")], rel=1e-4)
            if a["kind"] == "mixture":
                assert list(b["r"].values()) == pytest.approx(list(a["r"].values()), abs=1e-5)


# ----------------------------------------------- What is written ---------------------------------------------------


def test_metrics_have_the_promised_keys(config, tmp_path):
    train(config())
    lines = read_lines(tmp_path / "run")
    assert [line["kind"] for line in lines] == (
        ["run", "mixture"] + ["train", "train", "mixture"] * 4 + ["end"])
    run, mixture, step, end = lines[0], lines[1], lines[2], lines[-1]
    assert {"config", "versions", "parameters"} <= set(run) and "git" in run["versions"]
    assert {"t", "step", "r", "domains"} <= set(mixture)
    assert {"student_ppl", "teacher_ppl", "ratio", "factor", "tokens", "epochs"} == set(mixture["domains"]["signs"])
    raw = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "eta_s"} <= set(raw[2])
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert step["tokens"] == 8 * 16 and end["domains"] == lines[-2]["domains"]
    assert run["parameters"]["student"] == sum(p.numel() for p in GPT.from_pretrained(
        tmp_path / "run" / "step_00000008").parameters())


def test_a_checkpoint_opens_in_transformers_with_equal_logits(config):
    transformers = pytest.importorskip("transformers")
    folder = train(config())
    other, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    idx = torch.arange(48).view(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(folder)(idx), other(idx).logits, rtol=1e-5, atol=1e-5)


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    train(config(save_every=1, keep=3))
    assert [folder.name[-1] for folder in checkpoints(tmp_path / "run")] == ["6", "7", "8"]
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_failed_save_leaves_no_half_checkpoint(config, tmp_path, monkeypatch):
    train(config(max_steps=8, save_every=4, keep=0))
    shutil.rmtree(tmp_path / "run" / "step_00000008")

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="step_00000008: cannot be saved.*No space left"):
        train(config(max_steps=8, save_every=4, keep=0))
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step_00000004"]


# ----------------------------------------------- Resuming ----------------------------------------------------------


def stop_at(monkeypatch, step, action):
    """Do `action` while the update after `step` finished ones is made."""
    original = distill.learning_rate
    monkeypatch.setattr(distill, "learning_rate", lambda s, config: (action() if s == step else None,
                                                                     original(s, config))[1])


def assert_same_run(one, other):
    assert read_lines(one)[1:] == read_lines(other)[1:]  # all but the configuration's out_dir
    last_one, last_other = checkpoints(one)[-1], checkpoints(other)[-1]
    for name in ("model.safetensors", "optimizer.pt", "train_state.json"):
        assert (last_one / name).read_bytes() == (last_other / name).read_bytes(), name


@pytest.mark.parametrize("method", ["ddk", "kd", "ted", "doremi_proxy"])
def test_stopped_by_a_signal_and_resumed_equals_straight_to_the_bit(config, tmp_path, monkeypatch, method):
    train(config(method=method, out_dir=str(tmp_path / "straight")))
    stop_at(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        train(config(method=method))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoints(tmp_path / "run")[-1].name == "step_00000005"
    monkeypatch.undo()
    train(config(method=method))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_an_evaluation_made_after_a_resume_is_logged_once(config, tmp_path, monkeypatch):
    """Stopped in the evaluation of step 2, resumed, killed before the next save, resumed."""
    train(config(out_dir=str(tmp_path / "straight"), save_every=100))
    measured, original = [], distill.perplexities

    def perplexities(model, *rest):
        measured.append(0)
        if len(measured) == 2:  # the teacher's perplexities are cached, so: at step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, *rest)

    monkeypatch.setattr(distill, "perplexities", perplexities)
    with pytest.raises(SystemExit):
        train(config(save_every=100))
    assert checkpoints(tmp_path / "run")[-1].name == "step_00000002"
    monkeypatch.undo()

    def die():
        raise RuntimeError("killed")
    stop_at(monkeypatch, 3, die)
    with pytest.raises(RuntimeError):
        train(config(save_every=100))
    monkeypatch.undo()
    train(config(save_every=100))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("step", [0, 3, 4, 6])
def test_killed_anywhere_and_resumed_equals_straight_to_the_bit(config, tmp_path, monkeypatch, step):
    train(config(out_dir=str(tmp_path / "straight")))

    def die():
        raise RuntimeError("killed")
    stop_at(monkeypatch, step, die)
    with pytest.raises(RuntimeError):
        train(config())
    monkeypatch.undo()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step"')  # a torn line
    train(config())
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_muon_resumes_to_the_bit_too(config, tmp_path, monkeypatch):
    train(config(optimizer="muon", out_dir=str(tmp_path / "straight")))
    stop_at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(config(optimizer="muon"))
    monkeypatch.undo()
    train(config(optimizer="muon"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(config, tmp_path, capsys, damage):
    train(config(out_dir=str(tmp_path / "straight")))
    train(config())
    weights = tmp_path / "run" / "step_00000008" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    if damage == "manifest":
        (weights.parent / "manifest.json").write_text("{}")
    elif damage == "remove":
        weights.unlink()
    else:
        weights.write_bytes(raw if damage == "flip" else raw[:-8])
    train(config())
    printed = capsys.readouterr().out
    assert "step_00000008" in printed and "step_00000004" in printed
    assert (tmp_path / "run" / "corrupt_step_00000008").is_dir()
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_finished_run_says_so_and_does_nothing(config, tmp_path, capsys, monkeypatch):
    folder = train(config())
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(GPT, "from_pretrained", None)  # nothing is loaded
    assert train(config()) == folder
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("key, value", [("lr", 1e-3), ("max_steps", 10), ("gamma", 0.5), ("method", "kd"), ("seed", 1),
                                        ("interval", 4), ("batch_size", 4), ("student", "scratch:1x64"),
                                        ("alpha", 0.9), ("dtype", "bfloat16"),
                                        ("mixture", "letters=1,digits=1,signs=1")])
def test_another_experiment_in_the_same_out_dir_is_refused_by_key(config, key, value):
    train(config())
    with pytest.raises(UserError, match=f"--{key}="):
        train(config(**{key: value}))


@pytest.mark.parametrize("given", [dict(save_every=2), dict(keep=5), dict(micro_batch_size=4), dict(log_every=1)])
def test_keys_that_change_no_experiment_are_accepted(config, tmp_path, monkeypatch, given):
    stop_at(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(config())
    monkeypatch.undo()
    assert train(config(**given)).name == "step_00000008"


def test_a_run_without_a_checkpoint_yet_is_not_given_to_another_experiment(config, tmp_path):
    folder = train(config())
    shutil.rmtree(folder)
    for other in checkpoints(tmp_path / "run"):
        shutil.rmtree(other)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--lr=0.5"):
        train(config(lr=0.5))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert train(config()) == folder


def test_a_finished_run_without_its_metrics_is_ended_again(config, tmp_path):
    folder = train(config())
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert train(config()) == folder
    assert [line["kind"] for line in read_lines(tmp_path / "run")] == ["end"]


def test_a_start_that_failed_does_not_claim_the_folder(config, teacher, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        train(config(teacher=str(broken)))
    assert train(config(lr=1e-3)).name == "step_00000008"


def test_models_and_data_are_compared_by_content_not_by_path(config, data_dir, teacher, tmp_path):
    folder = train(config())
    shutil.copytree(data_dir, tmp_path / "moved_bins")
    shutil.copytree(teacher, tmp_path / "moved_teacher")
    assert train(config(data_dir=str(tmp_path / "moved_bins"), teacher=str(tmp_path / "moved_teacher"))) == folder
    weights = tmp_path / "moved_teacher" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="--teacher="):
        train(config(teacher=str(tmp_path / "moved_teacher")))


def test_resume_never_starts_anew_and_loses_nothing(config, tmp_path):
    train(config())
    train(config(resume="never", lr=1e-3))
    assert read_state(checkpoints(tmp_path / "run.1")[-1]).step == 8
    assert read_lines(tmp_path / "run", "run")[0]["config"]["lr"] == 1e-3


# ----------------------------------------------- The wiring ---------------------------------------------------------


def test_three_updates_equal_three_written_out(config, data_dir, teacher, tmp_path):
    """gamma, temperature, clipping, learning rate, initial weights and the padded teacher all take part."""
    padded = tmp_path / "padded"
    big = GPT(GPTConfig.scratch(2, 64, 300, 64))
    for mine, theirs in zip(big.parameters(), GPT.from_pretrained(teacher).parameters()):
        mine.data[:len(theirs)] = theirs.data
    big.requires_grad_(False).save_pretrained(padded)
    shutil.copy(teacher / "tokenizer_meta.json", padded)
    settings = config(teacher=str(padded), gamma=0.3, temperature=2.0, grad_clip=0.05, seed=1, max_steps=3,
                      interval=100)
    folder = train(settings)

    torch.manual_seed(1)
    student, bins = GPT(GPTConfig.scratch(1, 32, 257, 16)), TokenBins(data_dir, 16)
    sampler = MixtureSampler(bins.n_windows, 8, 1)
    (optimizer,) = make_optimizers(student, settings)
    for step, rate in enumerate((1.5e-3, 3e-3, 3e-4)):
        batch = torch.from_numpy(bins.train_windows(*sampler.next_batch()))
        loss, _, _ = dense_distillation_loss(student(batch[:, :-1]), big(batch[:, :-1]), batch[:, 1:], gamma=0.3,
                                             temperature=2.0, vocab_size=257)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.05)
        assert norm > 0.05
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
    trained = GPT.from_pretrained(folder).state_dict()
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_each_teacher_has_its_own_perplexities(config, teacher, tmp_path):
    train(config(max_steps=0, out_dir=str(tmp_path / "one")))
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    GPT(GPTConfig.scratch(1, 32, 257, 64)).save_pretrained(other)
    train(config(max_steps=0, teacher=str(other), out_dir=str(tmp_path / "two")))
    one, two = (read_lines(tmp_path / run, "end")[0]["domains"]["digits"]["teacher_ppl"] for run in ("one", "two"))
    assert one != two


def test_the_report_warns_of_a_bad_teacher_and_shows_before_and_after(config, teacher, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    GPT(GPTConfig.scratch(1, 32, 400, 64)).save_pretrained(other)  # untrained, and padded
    settings = config(teacher=str(other), lr=1e-2)
    folder = train(settings)
    distill.report(settings, folder)
    printed = capsys.readouterr().out
    assert "WARNING: THE TEACHER IS NEAR UNIFORM IN letters" in printed
    first, last = (read_lines(tmp_path / "run", "mixture")[i]["domains"]["letters"]["student_ppl"] for i in (0, -1))
    assert f"{first:.2f} → {last:.2f}" in printed and last < first
    less_trained = str(folder.with_name("step_00000004"))
    settings = config(student=str(folder), teacher=less_trained, out_dir=str(tmp_path / "behind"), max_steps=0)
    distill.report(settings, train(settings))
    assert "THE TEACHER IS BEHIND ITS STUDENT" in capsys.readouterr().out


def test_bfloat16_computes_otherwise_than_float32(config, tmp_path):
    for dtype in ("float32", "bfloat16"):
        train(config(dtype=dtype, out_dir=str(tmp_path / dtype), max_steps=2))
    one, two = ([line["loss"] for line in read_lines(tmp_path / dtype, "train")] for dtype in ("float32", "bfloat16"))
    assert one != two and one == pytest.approx(two, rel=0.02)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_blocks_are_traced_in_the_first_steps_alone(config, tmp_path, monkeypatch, recomputed, backend):
    """Traced as ever, but run as Python where `backend` is eager: what recompiles does not depend on it."""
    original, traced = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend=backend))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for step in range(8):
        stop_at(monkeypatch, step, lambda: traced.append(graphs["unique_graphs"] - before))
    folder = train(config(compile="true", student="scratch:3x32", micro_batch_size=2,
                          checkpoint_activations=recomputed))
    traced.append(graphs["unique_graphs"] - before)
    assert traced[0] > 0 and len(set(traced[1:])) == 1, traced
    monkeypatch.undo()
    train(config(student="scratch:3x32", micro_batch_size=2, out_dir=str(tmp_path / "plain")))
    for compiled, plain in zip(read_lines(tmp_path / "run")[1:], read_lines(tmp_path / "plain")[1:], strict=True):
        assert compiled.get("loss", 0) == pytest.approx(plain.get("loss", 0), rel=1e-4)
    assert load_file(folder / "model.safetensors").keys() == load_file(
        tmp_path / "plain" / folder.name / "model.safetensors").keys()


def test_damaged_weights_are_no_perplexity(config, teacher, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tensors = load_file(other / "model.safetensors")
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            tensors[name] *= 1e20
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="loss is nan"):
        train(config(teacher=str(other)))


# ----------------------------------------------- What is refused ---------------------------------------------------


@pytest.mark.parametrize("given, message", [
    (dict(val_samples=10**6), "val_samples=1000000: domain letters"),
    (dict(mixture="letters=1,numbers=2"), "--mixture"),
    (dict(block_size=4096, val_samples=1), "block_size=4096: no train text"),
])
def test_what_the_data_rule_out_is_refused_before_any_model_is_loaded(config, monkeypatch, tmp_path, given, message):
    monkeypatch.setattr(GPT, "from_pretrained", None)
    with pytest.raises(UserError, match=message):
        train(config(**given))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rows, positions, message",
                         [(257, 8, "--block_size=16: the teacher"), (200, 64, "has 200 ids")])
def test_a_model_that_cannot_read_the_windows_is_refused(config, teacher, tmp_path, rows, positions, message):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    GPT(replace(GPTConfig.scratch(1, 32, rows, 64), max_position_embeddings=positions)).save_pretrained(other)
    with pytest.raises(UserError, match=message):
        train(config(teacher=str(other)))


def test_bins_of_another_tokenizer_than_the_teachers_are_refused(config, teacher, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    meta = json.loads((other / "tokenizer_meta.json").read_text())
    (other / "tokenizer_meta.json").write_text(json.dumps({**meta, "name": "gpt2", "fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="tokenizer"):
        train(config(teacher=str(other)))


def test_a_folder_without_tokenizer_files_is_taken_with_a_warning(config, teacher, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    for name in ("tokenizer_meta.json", "tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    train(config(teacher=str(other), max_steps=0))
    assert "WARNING: --teacher" in capsys.readouterr().out


def test_ids_beyond_the_vocabulary_are_refused(config, data_dir, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(data_dir, bad)
    raw = bytearray((bad / "digits.train.bin").read_bytes())
    raw[1::2] = b"\x7f" * (len(raw) // 2)
    (bad / "digits.train.bin").write_bytes(raw)
    with pytest.raises(UserError, match="digits.train.bin: holds the id"):
        train(config(data_dir=str(bad)))


def test_a_loss_that_is_not_finite_stops_before_the_update(config, tmp_path, monkeypatch):
    original = distill.distillation_loss

    def broken(hidden, *arguments, **keywords):
        loss, ce, kl = original(hidden, *arguments, **keywords)
        return (loss * float("nan"), ce, kl) if loss.requires_grad else (loss, ce, kl)
    stop_at(monkeypatch, 5, lambda: monkeypatch.setattr(distill, "distillation_loss", broken))
    with pytest.raises(UserError, match="step 5: loss nan.*letters"):
        train(config())
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step_00000004"]
    assert read_lines(tmp_path / "run", "train")[-1]["step"] == 5


@pytest.mark.parametrize("arguments, messages", [
    (["--learning_rate=1"], ["--learning_rate=1: unknown key"]),
    (["--lr=fast", "--gamma=-1", "--max_step=3"], ["--lr=fast: must be a number", "did you mean --max_steps"]),
    (["--alpha=2", "--temperature=0", "--interval=0", "--min_lr=1"],
     ["--alpha=2.0", "--temperature=0.0", "--interval=0", "--min_lr=1.0"]),
    (["--method=dkd"], ["--method=dkd: must be one of ddk"]),
    (["--teacher=nowhere", "--student=scratch:4by4"], ["--teacher=nowhere: no such folder", "--student=scratch:4by4",
                                                     "--data_dir=data/custom: no such folder"]),
    (["--student=scratch:1x32"], ["--teacher: method=ddk needs one"]),
    (["--batch_size=10", "--micro_batch_size=4"], ["--batch_size=10: must be a multiple of micro_batch_size=4"]),
    (["--device=abacus"], ["--device=abacus"]),
    (["--resume=never", "--out_dir=data"], ["--out_dir=data: holds the data"]),
    (["--resume=never", "--out_dir=data/quickstart"], ["--out_dir=data/quickstart: holds the data"]),
    (["--mixture=a"], ["--mixture=a"]),
    (["--lr"], ["--lr: needs a value"]),
    (["lr=3"], ["lr=3: not a key"]),
    (["--lr=nan"], ["--lr=nan"]),
])
def test_mistakes_on_the_command_line_are_named_all_at_once(arguments, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        distill.parse_config(distill.Config, arguments, make=resolve_config)
    for message in messages:
        assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_the_quickstart_refuses_so_many_processes_that_its_own_models_cannot_share_a_step(monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    (problem,) = resolve_config(batch_size=12, device="cpu").problems()
    assert problem.startswith("--nproc_per_node=3: ") and " 16 windows" in problem


def test_the_quickstart_refuses_other_bins_than_its_own(run_main, data_dir, tmp_path):
    before = sorted(data_dir.rglob("*"))
    status, _, err = run_main(distill, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}")
    assert status == 2 and f"--data_dir={data_dir}: " in err and "--teacher and --student" in err
    assert sorted(data_dir.rglob("*")) == before


def test_the_quickstarts_values_can_be_had_with_own_bins_and_models(start):
    status, _, err, _ = start(lambda other: None, "--preset=quickstart", "--dry_run")
    assert (status, err) == (0, "")


def test_a_reader_that_has_had_enough_is_no_mistake():
    def make():
        raise BrokenPipeError
    with pytest.raises(BrokenPipeError):
        distill.on_rank_0(make)


def test_a_failure_of_the_disk_is_told_as_a_mistake_on_any_rank(tmp_path):
    with pytest.raises(UserError, match="no_such"):
        distill.on_rank_0(lambda: open(tmp_path / "no_such"))


# ----------------------------------------------- Pre-flight ---------------------------------------------------------


def change_config(**changes):
    """A function that changes keys of a folder's config.json."""
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


def change_tokenizer(change):
    """A function that gives a folder the bytes tokenizer's tokenizer.json after `change`, as transformers would."""
    def give(folder):
        settings = bytes_settings()
        change(settings)
        (folder / "tokenizer_meta.json").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(settings))
    return give


def swap_two_ids(settings):
    settings["model"]["vocab"].update(a=98, b=97)


def split_words(settings):
    settings["pre_tokenizer"]["use_regex"] = True


@pytest.fixture
def start(run_main, data_dir, teacher, tmp_path, monkeypatch):
    """Runs distill.py as a program with `{teacher}` and `{other}` in arguments filled in, where no weight may be read.

    `other` is the teacher's folder after `change`. Returns (exit status, stdout, stderr) and other's folder."""
    def run(change, *arguments):
        other = tmp_path / "other"
        shutil.copytree(teacher, other)
        change(other)
        monkeypatch.setattr(GPT, "from_pretrained", None)
        monkeypatch.chdir(tmp_path)
        given = [f"--data_dir={data_dir}", f"--teacher={teacher}", "--student=scratch:1x32", "--block_size=16",
                 "--batch_size=8", "--val_samples=5", "--max_steps=2", "--out_dir=run", "--device=cpu"]
        return *run_main(distill, *given, *(word.format(teacher=teacher, other=other) for word in arguments)), other
    return run


SHORT = {"max_position_embeddings": 8}
SLIDING = {"model_type": "mistral", "sliding_window": 8}


@pytest.mark.parametrize("change, arguments, messages", [
    (change_tokenizer(swap_two_ids), ["--teacher={other}"],
     ["--teacher={other}: its tokenizer", "id 97 is 'a' in the bins, 'b' there", "data.py --tokenizer={other}"]),
    (change_tokenizer(swap_two_ids), ["--student={other}"],
     ["--student={other}: its tokenizer", "id 97 is 'a' in the bins, 'b' there"]),
    (change_tokenizer(split_words), ["--teacher={other}"],
     ["--teacher={other}: its tokenizer", "the ids are alike, but", "pre-tokenizer"]),
    (change_config(**SHORT), ["--teacher={other}"], ["--block_size=16: the teacher in {other} reads at most 8 tokens"]),
    (change_config(**SHORT), ["--student={other}"], ["--block_size=16: the student in {other} reads at most 8 tokens"]),
    (change_config(**SLIDING), ["--teacher={other}"], ["--block_size=16: the teacher in {other} reads at most 8"]),
    (change_config(**SLIDING), ["--teacher={other}", "--student=layers:1"], ["--block_size=16: the teacher in"]),
    (change_config(vocab_size=256), ["--student={other}"],
     ["--student={other}: has 256 ids, but the bins' tokenizer has 257", "make the bins anew"]),
    (change_config(model_type="bert"), ["--teacher={other}"], ["{other}/config.json: model_type 'bert' is not known"]),
    (lambda other: (other / "config.json").unlink(), ["--student={other}"], ["{other}: no config.json"]),
    (lambda other: (other / "tokenizer_meta.json").write_text("{}"), ["--student={other}"], ["tokenizer_meta.json"]),
    (lambda other: None, ["--student=layers:9"], ["--student=layers:9: the teacher has 2 layers"]),
    (lambda other: None, ["--student=layers:2", "--teacher=", "--method=cpt"], ["--student=layers:2", "--teacher"]),
    *((lambda other: None, [f"--student={word}"], [f"--student={word}: write scratch:LxD with D even", "layers:N"])
      for word in ("layers:x", "layers:0", "layers:", "layers", "layers:-1", "layers:1.5", "layers:2x32")),
    (lambda other: None, ["--domains=letters,cats"], ["--domains: ", "has no cats", "letters digits signs"]),
    (lambda other: None, ["--domains=letters,letters"], ["--domains=letters,letters: name each once"]),
    (change_config(**SHORT), ["--teacher={other}", "--val_samples=1000", "--mixture=letters=1,cats=1"],
     ["--block_size=16: the teacher in {other}", "--val_samples=1000: domain letters",
      "--mixture=letters=1,cats=1: the domains of", "letters digits signs"]),
    (lambda other: None, ["--domains=letters", "--mixture=letters=1,signs=1", "--val_samples=1000"],
     ["--mixture=letters=1,signs=1", "--val_samples=1000: domain letters"]),
])
def test_what_does_not_fit_is_refused_with_the_fix_before_a_weight_is_read(
        start, tmp_path, change, arguments, messages):
    status, _, err, other = start(change, *arguments)
    assert status == 2
    for message in messages:
        assert message.format(other=other) in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert not (tmp_path / "run").exists()


def test_the_teachers_and_the_students_problems_are_told_together(start):
    status, _, err, other = start(change_config(vocab_size=200, **SHORT), "--teacher={other}", "--student={other}")
    assert status == 2
    for role in ("teacher", "student"):
        assert f"--{role}={other}: has 200 ids" in err and f"--block_size=16: the {role} in {other}" in err


def test_equal_ids_with_other_merges_are_another_tokenizer(config, teacher, tmp_path):
    folders = []
    for merges in ([["a", "b"], ["ab", "c"], ["b", "c"]], [["b", "c"], ["a", "bc"], ["a", "b"]]):
        settings = bytes_settings()
        settings["model"]["vocab"].update(ab=256, bc=257, abc=258)
        settings["model"]["merges"], settings["added_tokens"][0]["id"] = merges, 259
        folders.append(tmp_path / f"tokenizer{len(folders)}")
        shutil.copytree(teacher, folders[-1])
        (folders[-1] / "tokenizer_meta.json").unlink()
        (folders[-1] / "tokenizer.json").write_text(json.dumps(settings))
        change_config(vocab_size=260)(folders[-1])
    texts = ["abc bcb abb " * 20, "cba aba cc a " * 20]
    build_bins(tmp_path / "bins", load_tokenizer(folders[0]), {"letters": lambda: texts}, val_fraction=0.5)
    given = dict(data_dir=str(tmp_path / "bins"), val_samples=2)
    distill.preflight(config(teacher=str(folders[0]), **given))
    with pytest.raises(UserError, match="the ids are alike, but merges"):
        distill.preflight(config(teacher=str(folders[1]), **given))


def load_encoding(pattern: str) -> tiktoken.Encoding:
    ranks = {**{bytes([byte]): byte for byte in range(256)}, b"ab": 256, b"bc": 257}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})


@pytest.fixture
def in_two_forms(teacher, tmp_path, monkeypatch):
    """Bins by a tiktoken encoding called gpt2, and a model's folder with the same as a tokenizer.json."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: load_encoding(pattern))
    settings = bytes_settings()
    settings["model"]["vocab"].update(ab=256, bc=257)
    settings["model"]["merges"], settings["added_tokens"][0]["id"] = [["a", "b"], ["b", "c"]], 258
    settings["pre_tokenizer"] = {**settings["pre_tokenizer"], "use_regex": True}
    folder = tmp_path / "theirs"
    shutil.copytree(teacher, folder)
    (folder / "tokenizer_meta.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    change_config(vocab_size=259)(folder)
    texts = ["abc bcb abb " * 20, "cba abcb\ncc a'll " * 20, "cc " * 999]  # the last is training's
    build_bins(tmp_path / "bins", load_tokenizer("gpt2"), {"letters": lambda: texts}, val_fraction=0.5)
    return dict(data_dir=str(tmp_path / "bins"), val_samples=2), folder, settings


def test_a_tokenizer_json_is_taken_for_tiktokens_encoding_that_it_equals(config, in_two_forms, capsys):
    given, folder, _ = in_two_forms
    distill.preflight(config(teacher=str(folder), **given))
    assert "its tokenizer theirs is taken for the bins' gpt2" in capsys.readouterr().out


def test_bins_with_too_little_validation_for_the_trial_are_told_as_what_was_asked_for(config, in_two_forms):
    given, folder, _ = in_two_forms
    with pytest.raises(UserError) as refused:
        distill.preflight(config(teacher=str(folder), student="layers:9", **{**given, "val_samples": 500,
                                                                             "block_size": 900}))
    assert "--val_samples=500: " in str(refused.value) and "--val_samples=1:" not in str(refused.value)
    assert "--student=layers:9: the teacher" in str(refused.value)


@pytest.mark.parametrize("change, named", [
    (lambda settings: settings["model"].update(merges=[["b", "c"], ["a", "b"]]), "are encoded in two ways"),
    (lambda settings: settings["model"]["vocab"].update(ab=257, bc=256), "id 256 is 'ab' in the bins, 'bc' there")])
def test_a_tokenizer_json_that_differs_from_tiktokens_encoding_is_refused(config, in_two_forms, change, named):
    given, folder, settings = in_two_forms
    change(settings)
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=named):
        distill.preflight(config(teacher=str(folder), **given))


def test_a_tokenizer_without_the_bins_end_of_text_is_told_of_the_model(start):
    def other_end(other: Path):
        settings = json.loads((other / "tokenizer.json").read_text())
        settings["added_tokens"][0]["content"] = "</s>"
        (other / "tokenizer.json").write_text(json.dumps(settings))
        (other / "tokenizer_meta.json").unlink()
    status, _, err, other = start(other_end, "--teacher={other}")
    assert status == 2
    for words in (f"--teacher={other}: --eot=<|endoftext|>", "its tokenizer is not that of the bins",
                  "Make the bins anew"):
        assert words in err


def test_the_configuration_is_printed_as_it_is_resolved(start, tmp_path):
    (tmp_path / "mixture.json").write_text('{"letters": 3, "digits": 2, "signs": 1}')
    _, out, _, _ = start(lambda other: None, "--device=auto", "--mixture=mixture.json", "--dry_run")
    assert "\nmixture = letters=3,digits=2,signs=1\n" in out
    for key in ("device", "dtype", "parallel", "compile"):
        assert f"\n{key} = " in out and f"\n{key} = auto" not in out


def test_a_tokenizer_whose_package_is_missing_is_not_called_another_one(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, _, err, other = start(lambda other: (other / "tokenizer_meta.json").unlink(), "--teacher={other}",
                                  "--student=layers:9")
    assert status == 2 and "pip install tokenizers" in err and "Make the bins anew" not in err
    assert "--student=layers:9: the teacher has" in err


def test_a_bins_tokenizer_that_is_another_one_now_is_told_with_the_rest(config, in_two_forms, monkeypatch):
    given, folder, _ = in_two_forms
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: load_encoding(pattern=r"\s+|\S+"))
    with pytest.raises(UserError, match="(?s)install the version that was used then.*--student=layers:9: the teacher"):
        distill.preflight(config(teacher=str(folder), student="layers:9", **given))


def test_bins_and_models_that_cannot_be_read_are_told_together(start):
    status, _, err, other = start(change_config(model_type="bert"), "--teacher={other}", "--domains=letters,cats")
    assert status == 2 and "has no cats" in err and f"{other}/config.json: model_type 'bert'" in err


def test_a_dry_run_reads_no_weights_and_writes_nothing(start, tmp_path):
    before = sorted(tmp_path.parent.rglob("*"))
    status, out, err, other = start(lambda other: (other / "model.safetensors").unlink(),
                                    "--teacher={other}", "--student=layers:1", "--dry_run")
    assert (status, err) == (0, "")
    for word in ("teacher: ", "student: ", "memory: ", "tokens: ", "FLOPs: ", "letters: ", "digits: ", "signs: "):
        assert f"\n{word}" in out
    assert "WARNING" not in out and "dry_run = True" in out
    assert [path for path in sorted(tmp_path.parent.rglob("*")) if other not in (path, *path.parents)] == before


def test_a_dry_run_with_problems_prints_all_the_same_and_ends_with_2(start):
    status, out, err, _ = start(lambda other: None, "--dry_run", "--val_samples=1000", "--mixture=cats=1")
    assert status == 2
    assert "--val_samples=1000" in err and "--mixture=cats=1" in err
    for word in ("teacher: ", "student: ", "memory: ", "tokens: ", "FLOPs: ", "letters: "):
        assert f"\n{word}" in out


def numbers_after(out, start_of_line):
    """The numbers in the line that starts so."""
    (line,) = [line for line in out.splitlines() if line.startswith(start_of_line)]
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", line)]


@pytest.mark.parametrize("arguments, teacher_bytes, teacher_trains", [
    (["--dtype=bfloat16"], 2, True), (["--dtype=float32"], 4, True),
    (["--dtype=bfloat16", "--method=cpt"], 2, False), (["--dtype=bfloat16", "--micro_batch_size=2"], 2, True)], ids=str)
def test_the_numbers_of_a_dry_run(start, data_dir, arguments, teacher_bytes, teacher_trains):
    """Of a teacher of 32 layers, 4096 wide: computed here by hand."""
    V, d, L, ff, H, G, T, B, steps, K, n_val = 152_064, 4096, 32, 11008, 32, 8, 16, 8, 600, 200, 5
    sizes = dict(model_type="qwen2", vocab_size=V, hidden_size=d, num_hidden_layers=L, intermediate_size=ff,
                 head_dim=128, num_attention_heads=H, num_key_value_heads=G, tie_word_embeddings=False)
    status, out, _, _ = start(change_config(**sizes), "--teacher={other}", "--student=layers:4", f"--max_steps={steps}",
                              f"--interval={K}", "--dry_run", *arguments)
    assert status == 0
    kv = G * 128
    matrices = 2 * d * d + 2 * d * kv + 3 * d * ff  # q and o, k and v, the MLP's three
    layer = matrices + (d + 2 * kv) + 2 * d  # biases of q, k and v; two norms
    parameters = {"teacher": L * layer + 2 * V * d + d, "student": 4 * layer + 2 * V * d + d}
    for role, layers in (("teacher", L), ("student", 4)):
        millions = pytest.approx(parameters[role] / 1e6, abs=0.06)
        assert numbers_after(out, f"{role}: ")[1:] == [layers, d, millions, V, 257]
    parts = ["teacher", "student", "gradients", "AdamW", "activations", "copies", "loss", "in all"]
    (line,), GiB = [line for line in out.splitlines() if line.startswith("memory: ")], 2**30
    memory = {part: float(re.search(rf"{part} ([\d.]+)", line)[1]) for part in parts}
    assert memory["teacher"] == pytest.approx(teacher_bytes * parameters["teacher"] / GiB, abs=0.06)
    assert memory["student"] == memory["gradients"] == pytest.approx(4 * parameters["student"] / GiB, abs=0.06)
    assert memory["AdamW"] == pytest.approx(8 * parameters["student"] / GiB, abs=0.06)
    copied = 2 if teacher_bytes == 2 else 0  # by autocast
    assert memory["copies"] == pytest.approx(copied * parameters["student"] / GiB, abs=0.06)
    assert memory["loss"] == pytest.approx(2 * 4 * V * d / GiB, abs=0.06)
    assert memory.pop("in all") == pytest.approx(sum(memory.values()), abs=0.3)
    measured = 3 * n_val * T
    assert numbers_after(out, "tokens: ") == [steps * B * T, steps, measured, steps // K + 1]
    # Two FLOPs a weight of a matrix and token forward (the embedding is a look-up), twice that backward; attention adds
    # about 2·T·d a layer, next to nothing here.
    forward = {role: 2 * (layers * matrices + V * d) for role, layers in (("teacher", L), ("student", 4))}
    training = steps * B * T * (3 * forward["student"] + forward["teacher"] * teacher_trains)
    evaluation = measured * ((steps // K + 1) * forward["student"] + forward["teacher"])
    flops = numbers_after(out, "FLOPs: ")
    assert flops[:2] == pytest.approx([training, evaluation], rel=0.01)
    assert flops[2] == pytest.approx((training + evaluation) / (0.4 * 312e12) / 3600, abs=0.06)
    windows = TokenBins(data_dir, T).n_windows
    for name, n in windows.items():
        epochs = [steps * B / sum(windows.values()), steps * B / 3 / n]
        assert numbers_after(out, f"{name}: ") == pytest.approx([n * T, *epochs], abs=0.006)


@pytest.mark.parametrize("max_steps, evaluations", [(6, 4), (0, 1), (7, 5)])
def test_a_dry_run_counts_the_evaluations_that_a_run_makes(start, max_steps, evaluations):
    _, out, _, _ = start(lambda other: None, f"--max_steps={max_steps}", "--interval=2", "--dry_run")
    assert f" at each of {evaluations} evaluations\n" in out  # before the first step, after each two, and at the end


def test_activations_grow_with_the_micro_batch_alone(start):
    sizes = change_config(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32,
                          num_key_value_heads=32, head_dim=128)
    given = ["--student={other}", "--teacher=", "--method=cpt", "--batch_size=64", "--dry_run", "--val_samples=1"]
    seen = []
    for size in (0, 16, 64):
        shutil.rmtree("other", ignore_errors=True)
        _, out, _, _ = start(sizes, *given, f"--micro_batch_size={size}")
        seen.append(float(re.search(r"activations ([\d.]+)", out)[1]))
        assert "\nteacher: " not in out
    assert seen[0] == seen[2] == pytest.approx(4 * seen[1], abs=0.3) and seen[1] > 1


# The paper's set-up, as DESIGN.md has it
PAPER = dict(method="ddk", gamma=0.2, temperature=1.0, alpha=0.5, interval=1000, val_samples=500, max_steps=30_000,
             lr=3e-5, min_lr=3e-6, warmup_steps=1000, optimizer="adamw", mixture="", stop_ratio=0.0)
PAPER_TEXT = ["common_crawl", "c4", "stack", "wikipedia", "books", "arxiv", "stackexchange", "chinese_books",
              "chinese_common_crawl", "openwebmath"]


@pytest.mark.parametrize("preset, family, teacher, student, names", [
    ("qwen1.5-14b-1.8b", "qwen2", "Qwen1.5-14B", "Qwen1.5-1.8B", PAPER_TEXT),
    ("qwen1.5-14b-4b", "qwen2", "Qwen1.5-14B", "Qwen1.5-4B", PAPER_TEXT),
    ("qwen1.5-7b-1.8b", "qwen2", "Qwen1.5-7B", "Qwen1.5-1.8B", PAPER_TEXT),
    ("llama2-13b-tinyllama-1.1b", "llama", "Llama-2-13b-hf", "TinyLlama-1.1B", PAPER_TEXT),
    ("starcoder-15.5b-3b", "gpt_bigcode", "starcoder", "starcoderbase-3b",
     ["python", "java", "typescript", "c_sharp"])])
def test_a_preset_of_the_paper_needs_only_its_folders(
        run_main, data_dir, tmp_path, monkeypatch, preset, family, teacher, student, names):
    monkeypatch.chdir(tmp_path)
    for name in (teacher, student):
        (tmp_path / "models" / name).mkdir(parents=True)
        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=300,
                     max_position_embeddings=4096)
        sizes |= dict(n_embd=8, n_layer=1, n_head=2, n_positions=8192) if family == "gpt_bigcode" else {}
        (tmp_path / "models" / name / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    bins = tmp_path / "data" / preset
    bins.mkdir(parents=True)
    meta = json.loads((data_dir / "meta.json").read_text())
    meta["domains"], n_tokens = {}, 500 * 2048 + 1
    for name in [*names, "another"]:
        entries = [{"file": f"{name}.{side}.bin", "tokens": n_tokens, "documents": 1, "bytes": n_tokens, "sha256": ""}
                   for side in ("train", "val")]
        for entry in entries:
            with open(bins / entry["file"], "wb") as file:
                file.truncate(2 * n_tokens)  # takes no room
        meta["domains"][name] = {"dtype": "uint16", "train": entries[:1], "val": entries[1]}
    (bins / "meta.json").write_text(json.dumps(meta))

    status, out, err = run_main(distill, f"--preset={preset}", "--dry_run")
    assert (status, err) == (0, "")
    assert "\ntokens: 15,728,640,000 in 30,000 steps; " in out  # the paper's 15 B
    assert re.search(rf"; {len(names) * 500 * 2048:,} at each of 31 evaluations\n", out)
    assert [name for name in [*names, "another"] if f"\n{name}: {500 * 2048:,} tokens; " in out] == names
    resolved = dict(line.split(" = ", 1) for line in out.splitlines() if " = " in line)
    wanted = dict(PAPER, teacher=f"models/{teacher}", student=f"models/{student}", domains=",".join(names),
                  data_dir=f"data/{preset}", out_dir=f"out/{preset}-ddk-0")
    assert {key: resolved[key] for key in wanted} == {key: str(value) for key, value in wanted.items()}
    assert int(resolved["batch_size"]) * int(resolved["block_size"]) == pytest.approx(500_000, rel=0.05)
    assert not (tmp_path / "out").exists()


def test_domains_train_and_evaluate_on_these_only(config, data_dir, tmp_path, capsys):
    settings = config(domains="signs,letters", method="kd")
    folder = train(settings)
    windows = TokenBins(data_dir, 16).n_windows
    mixtures, (end,) = read_lines(tmp_path / "run", "mixture"), read_lines(tmp_path / "run", "end")
    for line in mixtures:
        assert list(line["domains"]) == list(line["r"]) == ["signs", "letters"]
        assert line["r"]["signs"] == windows["signs"] / (windows["signs"] + windows["letters"])
    assert sum(domain["tokens"] for domain in end["domains"].values()) == 8 * 8 * 16
    assert list(end["domains"]) == ["signs", "letters"]
    distill.report(settings, folder)
    assert "digits" not in capsys.readouterr().out
    signs = {"signs": torch.from_numpy(TokenBins(data_dir, 16).val_windows("signs", 5))}
    alone = train(config(domains="signs", max_steps=0, out_dir=str(tmp_path / "alone")))
    (line,) = read_lines(alone.parent, "mixture")
    measured = distill.perplexities(GPT.from_pretrained(settings.teacher), signs, 257, 8)["signs"]
    assert measured == line["domains"]["signs"]["teacher_ppl"] == mixtures[0]["domains"]["signs"]["teacher_ppl"]


@pytest.mark.parametrize("steps, message", [
    ((0, 8), "WARNING: THE TEACHER IS NEAR UNIFORM IN {}"),
    ((8, 16), "WARNING: THE TEACHER IS BEHIND ITS STUDENT IN {}"), ((16, 8), None)
], ids=["near uniform", "behind", "good"])
def test_a_bad_teacher_is_warned_of_before_the_first_step_and_in_the_report(
        config, run_main, data_dir, tmp_path, steps, message):
    """Teacher and student are one model, trained for so many steps each."""
    run = config(teacher="", method="cpt", lr=2e-2, max_steps=16, save_every=8, keep=0, out_dir=str(tmp_path / "both"))
    train(run)
    train(replace(run, max_steps=0, out_dir=str(tmp_path / "new")))
    teacher, student = (tmp_path / ("both" if step else "new") / f"step_{step:08d}" for step in steps)
    status, out, _ = run_main(
        distill, f"--data_dir={data_dir}", f"--teacher={teacher}", f"--student={student}", "--block_size=16",
        "--batch_size=8", "--val_samples=5", "--max_steps=2", f"--out_dir={tmp_path / 'run'}", "--log_every=1",
        "--device=cpu")
    assert status == 0
    before, after = out.split("step 1/2 ")
    for part in (before, after):
        assert part.count("WARNING") == (3 if message else 0)
        for name in NAMES if message else []:
            assert message.format(name) in part
    for name, domain in read_lines(tmp_path / "run", "mixture")[0]["domains"].items():
        told = f"{name}: teacher's perplexity {domain['teacher_ppl']:.2f}, student's {domain['student_ppl']:.2f}"
        assert told in before


def test_of_a_key_given_twice_the_last_wins():
    config = distill.parse_config(distill.Config, ["--seed=1", "--seed=2"], make=resolve_config)
    assert config.seed == 2 and config.out_dir == "out/quickstart-ddk-2"


def test_help_shows_the_papers_values_and_the_quickstarts(run_main):
    shown = " ".join(run_main(distill, "--help")[1].split())
    for key, paper, quickstart in (("interval", 1000, 25), ("max_steps", 30000, 400), ("val_samples", 500, 64)):
        assert re.search(rf"--{key} \[VALUE\] [^(]*\(default: {paper}; with no arguments {quickstart}\)", shown)
    assert "(default: 0.2)" in shown
