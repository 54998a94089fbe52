"""What the README says of the code: its tables, its links, and its worked changes, applied and run."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from compare_arms import ABLATIONS
from compare_arms import ARMS as COMPARED
from compare_arms import (MEASURES, SETTINGS, ablations_table, domains_table, format_mean, gains_table, table,
                          verdicts)
from conftest import read_lines

from distill import ARMS, Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOOKS = [ROOT / "README.md", ROOT / "tests" / "README.md", ROOT / "assets" / "RESULTS.md"]
RESULTS_PAGE = BOOKS[-1].read_text(encoding="utf-8")
RESULTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "assets").glob("*.json")}


def test_nothing_is_left_to_be_filled_in():
    for path in BOOKS:
        assert not re.search(r"@@[A-Z_]+@@", path.read_text(encoding="utf-8")), path


def test_the_table_of_arms_is_the_codes():
    for name, arm in ARMS.items():
        assert f"| `{name}` | `{arm.rule}` | {arm.divergence or 'none'} | {arm.help} |" in README


def test_each_key_that_the_readme_names_is_there():
    theirs = {"data_dir", "tokenizer", "text_key", "val_fraction", "val_bytes", "domain_key", "verify", "metrics",
              "rule", "plot", "model", "prompt", "alpha", "setting", "seeds", "arms", "device"}  # of the other programs
    launchers = {"nproc_per_node", "nodes", "ntasks-per-node", "signal", "signals-to-handle", "nnodes", "rdzv_id",
                 "rdzv_backend", "rdzv_endpoint", "kill-on-bad-exit", "time", "help", "key", "model_args", "tasks",
                 "repo-type", "include", "local-dir", "shutdown-timeout"}
    named = set(re.findall(r"--([a-z][a-z_-]+)", README.split("## Changing it")[0]))
    assert named - theirs - launchers <= Config.__dataclass_fields__.keys()


def test_each_name_in_the_reading_list_is_in_its_file():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\w+\.py) \|", README, re.MULTILINE)
    assert len(rows) > 8
    for names, file in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(?m)^(def|class) {name}\b|^{name}\b.* = ", source), f"{name} in {file}"


def test_each_link_to_a_file_or_heading_leads_somewhere():
    for path in BOOKS:
        text = path.read_text(encoding="utf-8")
        headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                    for line in text.splitlines() if line.startswith("#")}
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            if not target.startswith("http"):
                assert not file or (path.parent / file).exists(), f"{path}: {target}"
                assert not anchor or anchor in headings, f"{path}: {target}"


def test_the_tables_follow_from_the_results_beside_them():
    for results in RESULTS.values():
        lines = [*table(results, COMPARED, MEASURES), *domains_table(results, COMPARED), *verdicts(results)]
        if results.keys() & ABLATIONS.keys():
            lines += ablations_table(results)
        for line in lines:
            assert line in RESULTS_PAGE
    for name in COMPARED:
        runs = RESULTS["quickstart"][name].values()
        worst = format_mean([one["worst_ratio"] for one in runs])
        mean = format_mean([one["mean_ratio"] for one in runs])
        assert f"| `{name}` | {worst} | {mean} |" in README


def test_the_results_are_of_the_settings_that_their_commands_have():
    for name, results in RESULTS.items():
        for runs in results.values():
            for one in runs.values():
                assert one["experiment"]["setting"] == asdict(SETTINGS[name])
    assert all(line in RESULTS_PAGE for line in gains_table(RESULTS))


def test_every_test_that_is_named_as_proof_is_there():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(names) > 10
    for name in names:
        assert f"def {name}(" in tests, name


# ----------------------------------------------- Worked changes ----------------------------------------------------

CHANGES = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


def patched(change: str, folder: Path) -> Path:
    """A copy of the four files with a change made: each hunk's old lines are there once, and become its new ones."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for part in re.split(r"(?m)^--- ", change)[1:]:
        file, _, hunks = part.partition("\n")
        text = (folder / file).read_text(encoding="utf-8")
        for hunk in hunks.split("@@\n")[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, *words) -> str:
    result = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr
    return result.stdout


def test_there_are_three_changes_each_under_25_lines():
    assert len(CHANGES) == 3 and all(len(change.splitlines()) < 25 for change in CHANGES)


@pytest.fixture
def small(data_dir, teacher):
    return ["--preset=paper", f"--data_dir={data_dir}", f"--teacher={teacher}", "--student=scratch:1x32",
            "--block_size=16", "--batch_size=8", "--val_samples=5", "--interval=2", "--max_steps=6", "--lr=3e-3",
            "--warmup_steps=1", "--out_dir=run"]


def test_a_new_mixture_rule_is_drawn_by_and_replayed(tmp_path, small):
    run(patched(CHANGES[0], tmp_path), "distill.py", *small, "--method=ddk_average", "--alpha=1")
    average = None
    for line in read_lines(tmp_path / "run", "mixture"):
        ratios = [domain["ratio"] for domain in line["domains"].values()]
        if average is not None:
            average = [0.5 * new + 0.5 * old for new, old in zip(ratios, average)]
            exact = torch.softmax(torch.tensor(average, dtype=torch.float64), dim=0).tolist()
            assert list(line["r"].values()) == pytest.approx(exact, rel=1e-9)
        else:
            average = ratios
    replayed = run(tmp_path, "sample_mixture.py", "--metrics=run/metrics.jsonl")
    difference = float(re.search(r"largest difference from the run's own r: (\S+)", replayed)[1])
    assert difference < 1e-12


def test_a_new_loss_is_what_a_run_minimizes(tmp_path, small):
    patched(CHANGES[1], tmp_path)
    run(tmp_path, "-c", """
import torch
from distill import dense_distillation_loss, distillation_loss
torch.manual_seed(0)
hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
teacher, teacher_head, targets = torch.randn(9, 5), torch.randn(11, 5), torch.randint(11, (9,))
equation = dict(gamma=0.3, direction="jensen_shannon")
chunked = distillation_loss(hidden, head, teacher, teacher_head, targets, chunk_size=4, **equation)
dense = dense_distillation_loss(hidden @ head.T, teacher @ teacher_head.T, targets, **equation)
torch.testing.assert_close(chunked, dense)
for one, other in zip(*(torch.autograd.grad(losses[0], (hidden, head)) for losses in (chunked, dense))):
    torch.testing.assert_close(one, other)
p, q = torch.softmax(teacher @ teacher_head.T, -1), torch.softmax(hidden @ head.T, -1)
m = (p + q) / 2
divergence = (p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2
torch.testing.assert_close(dense[2], divergence.detach())
""")
    run(tmp_path, "distill.py", *small, "--method=js", "--gamma=0.3")
    for line in read_lines(tmp_path / "run", "train"):
        assert line["loss"] == pytest.approx(line["ce"] + 0.3 * line["kl"], rel=1e-5) and 0 < line["kl"] < 0.7


def test_a_new_model_family_has_the_logits_of_transformers(tmp_path):
    from transformers import ArceeConfig, ArceeForCausalLM
    torch.manual_seed(0)
    model = ArceeForCausalLM(ArceeConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path / "theirs")
    idx = torch.arange(24).view(2, 12)
    run(patched(CHANGES[2], tmp_path), "-c", """
import json, torch
from model import GPT
model = GPT.from_pretrained("theirs")
model.save_pretrained("ours")
with torch.no_grad():
    json.dump(model(torch.arange(24).view(2, 12)).tolist(), open("logits.json", "w"))
""")
    with torch.no_grad():
        wanted = model(idx).logits
        torch.testing.assert_close(torch.tensor(json.loads((tmp_path / "logits.json").read_text())), wanted,
                                   rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ArceeForCausalLM.from_pretrained(tmp_path / "ours")(idx).logits, wanted)
