"""The worked forks: each diff of tests/forks is applied to a copy of the four files, and the copy keeps its promises.

This process imports the copies next to the project's own files."""

import functools
import importlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, assert_same_run, read_lines, words
from safetensors.torch import load_file
from test_distill import B, T, exact_softmax, first_batch, new_student, read_state

import distill
from data import TokenBins
from model import GPT
from sample_mixture import MixtureSampler

ROOT = Path(__file__).parent.parent


def patched(name: str, folder: Path) -> Path:
    """Copy the four files to `folder`, apply a diff, and return the folder."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    # Inside a repository git would look for the files at its root, and silently leave the copies as they are.
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", ROOT / "tests" / "forks" / f"{name}.diff"]
    result = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Return a function that gives the folder of a fork, made once."""
    return functools.cache(lambda name: patched(name, tmp_path_factory.mktemp(name)))


def imported(folder: Path) -> SimpleNamespace:
    """Import and return a fork's modules, and restore the project's own in sys.modules."""
    names = [path.stem for path in folder.glob("*.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="session")
def ted(forked):
    return imported(forked("ted")).distill


@pytest.fixture(scope="session")
def doremi(forked):
    return imported(forked("doremi")).distill


@pytest.fixture(scope="session")
def keys(tiny) -> dict:
    """Return the keys of a tiny run, in which TED's first stage has one step."""
    return {**tiny, "max_steps": 10}


@pytest.fixture
def trained(keys, tmp_path):
    """Return a function that makes a tiny run of a fork, by default in tmp_path/run: its last checkpoint."""
    def train(fork, **given) -> Path:
        config = fork.resolve_config({**keys, "out_dir": str(tmp_path / "run"), **given})
        folder = fork.train(config)
        fork.report(config, folder)
        return folder
    return train


def run_in_two_processes(folder: Path, keys: dict):
    """Run a fork's distill.py under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "distill.py"]
    result = subprocess.run(command + words(keys), cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr


def resumed(folder: Path, trained, fork, **given) -> Path:
    """Copy a finished run without its last checkpoint, `folder`, and continue it from the previous checkpoint."""
    out_dir = folder.parent.with_name("resumed")
    shutil.copytree(folder.parent, out_dir)
    shutil.rmtree(out_dir / folder.name)
    trained(fork, **given, out_dir=str(out_dir))
    return out_dir


def test_any_two_forks_can_be_combined(tmp_path):
    """Apply each pair in both orders. The index lines of the diffs let git merge three ways."""
    def git(*arguments) -> str:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    git("init")
    git("add", ".")
    git("commit", "--message=the four files")
    for pair in itertools.permutations(sorted((ROOT / "tests" / "forks").glob("*.diff")), 2):
        for diff in pair:
            git("apply", "--3way", diff)
        changed = git("diff", "HEAD")
        for diff in pair:
            added = [line for line in diff.read_text().splitlines() if re.match(r"\+[^+]", line)]
            assert added and all(line in changed for line in added), pair
        git("reset", "--hard")


# ------------ A mixture rule, a loss, a family of models --------------------------------------------------------------

def test_a_new_mixture_rule_is_drawn_by_replayed_and_resumed_to_the_bit(forked, trained, run_main, tmp_path):
    fork = imported(forked("average"))
    folder = trained(fork.distill, method="ddk_average", alpha=1.0)
    average = None
    for line in read_lines(tmp_path / "run", "mixture"):
        ratios = [domain["ratio"] for domain in line["domains"].values()]
        if average is not None:
            average = [0.5 * new + 0.5 * old for new, old in zip(ratios, average)]
            exact = torch.softmax(torch.tensor(average, dtype=torch.float64), dim=0).tolist()
            assert list(line["r"].values()) == pytest.approx(exact, rel=1e-9)
        else:
            average = ratios
    _, replayed, _ = run_main(fork.sample_mixture, f"--metrics={tmp_path / 'run' / 'metrics.jsonl'}")
    assert float(re.search(r"largest difference from the run's own r: (\S+)", replayed)[1]) < 1e-12
    assert_same_run(resumed(folder, trained, fork.distill, method="ddk_average", alpha=1.0), folder.parent)


def test_a_new_loss_is_what_a_run_minimizes(forked, trained):
    fork = imported(forked("jensen_shannon")).distill
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    teacher, teacher_head, targets = torch.randn(9, 5), torch.randn(11, 5), torch.randint(11, (9,))
    equation = dict(gamma=0.3, direction="jensen_shannon")
    chunked = fork.distillation_loss(hidden, head, teacher, teacher_head, targets, chunk_size=4, **equation)
    dense = fork.dense_distillation_loss(hidden @ head.T, teacher @ teacher_head.T, targets, **equation)
    torch.testing.assert_close(chunked, dense)  # ce and kl of each token too
    for one, other in zip(*(torch.autograd.grad(losses[0], (hidden, head)) for losses in (chunked, dense))):
        torch.testing.assert_close(one, other)
    p, q = torch.softmax(teacher @ teacher_head.T, -1), torch.softmax(hidden @ head.T, -1)
    m = (p + q) / 2
    divergence = (p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2
    torch.testing.assert_close(dense[2].mean(), divergence.detach())

    folder = trained(fork, method="js", gamma=0.3)
    for line in read_lines(folder.parent, "train"):
        assert line["loss"] == pytest.approx(line["ce"] + 0.3 * line["kl"], rel=1e-5) and 0 < line["kl"] < 0.7


def test_the_divergence_can_have_the_factor_t_squared(forked):
    fork = imported(forked("t_squared")).distill
    torch.manual_seed(0)
    inputs = [torch.randn(9, 8), torch.randn(11, 8), torch.randn(9, 5), torch.randn(11, 5), torch.randint(11, (9,))]
    loss, ce, kl = fork.distillation_loss(*inputs, gamma=0.3, temperature=0.5, chunk_size=4)
    torch.testing.assert_close(loss, (ce + 0.3 * 0.5**2 * kl).mean())


def test_a_new_model_family_has_the_logits_of_transformers(forked, tmp_path):
    from transformers import ArceeConfig, ArceeForCausalLM
    torch.manual_seed(0)
    model = ArceeForCausalLM(ArceeConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path / "theirs")
    ours = imported(forked("arcee")).model.GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    idx = torch.arange(24).view(2, 12)
    with torch.no_grad():
        wanted = model(idx).logits
        torch.testing.assert_close(ours(idx), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ArceeForCausalLM.from_pretrained(tmp_path / "ours")(idx).logits, wanted)


# ------------ TED -----------------------------------------------------------------------------------------------------

def layer_outputs(model: GPT, inputs: torch.Tensor) -> list[torch.Tensor]:
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output.detach()))
    model(inputs)
    return outputs


def filters_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "extra.safetensors")


def test_ted_with_no_weight_on_its_distance_is_kd(ted, trained, monkeypatch, tmp_path):
    """Its first stage changes no model."""
    monkeypatch.setattr(ted, "DISTANCE_WEIGHT", 0.0)
    folder = trained(ted, method="ted")
    plain = trained(distill, method="kd", out_dir=str(tmp_path / "kd"))
    for one, other in zip(*(read_lines(run.parent, "train") for run in (folder, plain)), strict=True):
        for name in ("loss", "ce", "kl", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-6)
    weights, plain_weights = (load_file(run / "model.safetensors") for run in (folder, plain))
    torch.testing.assert_close(weights, plain_weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layers, pairs", [(1, [(0, 1)]), (3, [(1, 0), (2, 1)])])
def test_teds_loss_adds_the_distance_of_evenly_spaced_layers(ted, trained, data_dir, teacher, monkeypatch, layers,
                                                             pairs):
    """Check the first step: the filters are still the identity, cut to (64, 32) for the student."""
    monkeypatch.setattr(ted, "DISTANCE_WEIGHT", 0.5)
    folder = trained(ted, method="ted", student=f"scratch:{layers}x32", max_steps=1, micro_batch_size=2)
    _, windows = first_batch(data_dir)
    outputs_S = layer_outputs(new_student(layers), windows[:, :-1])
    outputs_T = layer_outputs(GPT.from_pretrained(teacher), windows[:, :-1])
    distances = []
    for i, j in pairs:
        difference = F.pad(outputs_S[i], (0, 32)) - outputs_T[j]
        distances.append((difference.square().sum(dim=-1) / outputs_T[j].square().sum(dim=-1)).mean())
    (line,) = read_lines(folder.parent, "train")
    distance = torch.stack(distances).mean().item()
    assert distance > 0.1
    assert line["distance"] == pytest.approx(0.5 * distance, rel=1e-4)  # each entry of `terms` is logged
    assert line["loss"] == pytest.approx(line["ce"] + 0.2 * line["kl"] + 0.5 * distance, rel=1e-4)


def test_teds_first_stage_teaches_the_filters_to_predict(ted, trained, data_dir, teacher, monkeypatch):
    """The loss of each filtered layer, read by the teacher's norm and head, falls."""
    monkeypatch.setattr(ted, "STAGE_1", 30)  # of one step
    folder = trained(ted, method="ted", max_steps=1, lr=1e-2, warmup_steps=10**6)
    _, windows = first_batch(data_dir)
    model_T = GPT.from_pretrained(teacher)
    for role, model in (("student", new_student()), ("teacher", model_T)):
        weight = filters_of(folder)[f"{role}.0.weight"]
        output = layer_outputs(model, windows[:, :-1])[-1]
        losses = []
        for matrix in (torch.eye(*weight.shape), weight):
            logits = (model_T.norm(output @ matrix.T) @ model_T.head_weight.T).detach()
            losses.append(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
        assert losses[1] < 0.9 * losses[0], role


def test_teds_filters_are_clipped_with_the_student(ted, trained, monkeypatch):
    monkeypatch.setattr(ted, "DISTANCE_WEIGHT", 10.0)
    folder = trained(ted, method="ted", max_steps=1, grad_clip=0.05)
    norms = {True: [], False: []}
    for name, moments in torch.load(folder / "optimizer.pt", weights_only=True)["state"].items():
        gradient = moments["exp_avg"] / 0.1  # AdamW's 1 − β₁
        norms[name.startswith("extra.")].append(gradient.norm().item())
    both = [math.hypot(*norms[of_filters]) for of_filters in (True, False)]
    assert min(both) > 0.001 and math.hypot(*both) == pytest.approx(0.05, rel=1e-5)


def test_ted_trains_and_saves_its_filters_apart_from_the_model_and_resumes_to_the_bit(ted, trained):
    folder = trained(ted, method="ted", keep=0)
    before, after = filters_of(folder.with_name("step_00000004")), filters_of(folder)
    assert sorted(after) == ["student.0.weight", "teacher.0.weight"]
    assert not before["student.0.weight"].equal(after["student.0.weight"])
    assert before["teacher.0.weight"].equal(after["teacher.0.weight"])

    # Its models open without the fork.
    assert not any(name.startswith("extra") for name in load_file(folder / "model.safetensors"))
    GPT.from_pretrained(folder)
    assert_same_run(resumed(folder, trained, ted, method="ted"), folder.parent)


def test_ted_in_two_processes_is_the_same_training(ted, forked, trained, keys, tmp_path):
    folder = trained(ted, method="ted")
    run_in_two_processes(forked("ted"), {**keys, "method": "ted", "parallel": "ddp", "out_dir": tmp_path / "two"})
    for one, two in zip(*(read_lines(tmp_path / name, "train") for name in ("run", "two")), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    torch.testing.assert_close(filters_of(tmp_path / "two" / folder.name), filters_of(folder), rtol=1e-4, atol=1e-5)


# ------------ DoReMi --------------------------------------------------------------------------------------------------

def exact_doremi(alpha: list[float], excess: list[float]) -> list[float]:
    return [0.999 * float(share) + 0.001 / len(alpha) for share in exact_softmax(alpha, excess)]


def test_doremis_update_raises_the_domain_that_lags_and_keeps_a_minimum(doremi):
    weights = doremi.doremi_update([0.2, 0.3, 0.5], [1.0, 0.0, 2.0])
    assert weights.tolist() == pytest.approx(exact_doremi([0.2, 0.3, 0.5], [1.0, 0.0, 2.0]), rel=1e-12)
    weights = [1 / 3, 1 / 3, 1 / 3]
    for _ in range(2000):
        weights = doremi.doremi_update(weights, [0.0, 0.0, 5.0])
    assert weights.tolist() == pytest.approx([0.001 / 3, 0.001 / 3, 1 - 0.002 / 3], rel=0.01)
    assert doremi.doremi_update([0.5, 0.5], [0.0, 1e4]).tolist() == pytest.approx([0.0005, 0.9995])


def test_a_doremi_proxy_weighs_the_loss_by_its_excess(doremi, trained, data_dir, teacher):
    """Check the first step. The mixture has no signs, so their excess stays 0."""
    folder = trained(doremi, method="doremi_proxy", mixture="letters=3,digits=1,signs=0", max_steps=1,
                     micro_batch_size=4)
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
    (line,) = read_lines(folder.parent, "train")
    assert line["loss"] == pytest.approx(((weights * proxy).sum() / (weights.sum() * T)).item(), rel=1e-5)


def test_a_domain_that_is_not_drawn_keeps_its_excess(doremi, keys, data_dir, teacher):
    ids, windows = first_batch(data_dir, {"letters": 1, "digits": 1, "signs": 0})
    before = {"alpha": [0.2, 0.3, 0.5], "excess": [9.0, 9.0, 1.5], "total": [0.0] * 3}
    sampler = MixtureSampler(TokenBins(data_dir, T).n_windows, B, seed=0)
    config = doremi.resolve_auto(doremi.resolve_config({**keys, "method": "doremi_proxy"}))
    _, state = doremi.window_weights(before, new_student(), GPT.from_pretrained(teacher), windows, ids, sampler, config)
    assert state["excess"][2] == 1.5 and 9.0 not in state["excess"]
    assert state["alpha"] == pytest.approx(exact_doremi(before["alpha"], state["excess"]), rel=1e-9)


def test_cpt_and_doremi_is_three_commands_and_the_proxy_resumes_to_the_bit(doremi, trained, run_main, keys, tmp_path):
    """Run a reference, a proxy, and the student in the proxy's mixture. Only the proxy needs the fork."""
    def command(module, **given):
        status, _, err = run_main(module, *words({**keys, **given}))
        assert (status, err) == (0, "")

    command(distill, method="cpt", out_dir=tmp_path / "cpt")
    proxy_keys = dict(method="doremi_proxy", teacher=str(tmp_path / "cpt" / "step_00000010"), save_every=1, keep=0)
    command(doremi, out_dir=tmp_path / "proxy", **proxy_keys)
    mixture = (tmp_path / "proxy" / "mixture.txt").read_text()
    command(distill, method="cpt", mixture=mixture, out_dir=tmp_path / "student")

    # α of every step is DoReMi's Alg. 1, from the excess losses that the proxy had.
    alpha = [1 / 3] * 3
    total = [0] * 3
    for step in range(1, 11):
        state = read_state(tmp_path / "proxy" / f"step_{step:08d}")["weights_state"]
        alpha = exact_doremi(alpha, state["excess"])
        total = [a + b for a, b in zip(alpha, total)]
        assert state["alpha"] == pytest.approx(alpha, rel=1e-9) and state["total"] == pytest.approx(total, rel=1e-9)
    assert alpha != pytest.approx([1 / 3] * 3, abs=1e-3)

    # The mixture is the mean of α over the steps, and the student draws by it.
    for line in read_lines(tmp_path / "student", "mixture"):
        assert line["r"] == pytest.approx({name: share / 10 for name, share in zip(NAMES, total)}, rel=1e-9)
    again = resumed(tmp_path / "proxy" / "step_00000010", trained, doremi, **proxy_keys)
    assert_same_run(again, tmp_path / "proxy")
    assert (again / "mixture.txt").read_text() == mixture


def test_doremis_proxy_in_two_processes_finds_the_mixture_of_one(doremi, forked, trained, keys, tmp_path):
    trained(doremi, method="doremi_proxy")
    given = {**keys, "method": "doremi_proxy", "parallel": "fsdp", "out_dir": tmp_path / "two"}
    run_in_two_processes(forked("doremi"), given)
    one, two = (distill.parse_mixture((tmp_path / name / "mixture.txt").read_text()) for name in ("run", "two"))
    assert two == pytest.approx(one, rel=1e-5)
