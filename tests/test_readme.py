"""What the README says of the code: the lines it points to, and its worked changes, applied and run.

    python tests/test_readme.py      sets the line numbers of its links right
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from compare_arms import ARMS, MEASURES, table, verdicts
from conftest import read_lines

from data import TokenBins, verify

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)")


def definitions(file: str) -> dict[str, int]:
    """The line on which each function, class and constant of a file's top level, or a class's method, is defined."""
    nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    nodes += [method for node in nodes if isinstance(node, ast.ClassDef) for method in node.body]
    lines = {node.name: node.lineno for node in reversed(nodes) if hasattr(node, "name")}
    return lines | {target.id: node.lineno for node in nodes if isinstance(node, ast.Assign)
                    for target in node.targets if isinstance(target, ast.Name)}


def test_each_link_to_a_line_leads_to_what_it_names():
    links = LINK.findall(README)
    assert len(links) > 20
    wrong = [f"{name}: {file}#L{line}, is on {definitions(file).get(name)}" for name, file, line in links
             if definitions(file).get(name) != int(line)]
    assert wrong == [], "python tests/test_readme.py sets them right"


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"@@[A-Z]+@@", README)


def test_the_readmes_tables_are_those_of_the_assets():
    paths = list((ROOT / "assets").glob("*.md"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(lines) > 20 and [line for line in lines if line not in README] == []
    assert all(f"(assets/{path.stem}_{figure}.png)" in README for path in paths for figure in ("arms", "domains"))


def test_the_tables_follow_from_the_results_beside_them():
    for path in (ROOT / "assets").glob("*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        lines = [*table(results, ARMS, MEASURES), *verdicts(results)]
        assert [line for line in lines if line not in path.with_suffix(".md").read_text(encoding="utf-8")] == []


def test_each_link_to_a_file_or_heading_leads_somewhere():
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            assert not path or (ROOT / path).exists(), target
            assert not anchor or re.fullmatch(r"L\d+", anchor) or anchor in headings, target


def test_nanogpts_bins_open_with_the_meta_json_that_is_made_for_them(tmp_path, data_dir):
    for side in ("train", "val"):
        shutil.copyfile(data_dir / f"letters.{side}.bin", tmp_path / f"{side}.bin")
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, namespace := {})
    namespace["make_meta"](tmp_path, "bytes")
    theirs, ours = TokenBins(tmp_path, 16), TokenBins(data_dir, 16, ["letters"])
    assert theirs.n_windows == {"web": ours.n_windows["letters"]}
    assert (theirs.val_windows("web", 5) == ours.val_windows("letters", 5)).all()
    assert theirs.tokenizer["fingerprint"] == ours.tokenizer["fingerprint"]
    verify(tmp_path)


def test_every_test_that_the_readme_names_is_there():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+?)(?:_…)?`", README):
        assert f"def {name}" in tests or (ROOT / "tests" / f"{name}.py").exists(), name


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
            old, new = ("".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in kinds)
                        for kinds in (" -", " +"))
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, *words) -> str:
    result = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr
    return result.stdout


def test_there_are_three_changes_each_under_20_lines():
    assert len(CHANGES) == 3 and all(len(change.splitlines()) < 20 for change in CHANGES)


@pytest.fixture
def small(data_dir, teacher):
    return [f"--data_dir={data_dir}", f"--teacher={teacher}", "--student=scratch:1x32", "--block_size=16",
            "--batch_size=8", "--val_samples=5", "--interval=2", "--max_steps=4", "--lr=3e-3", "--out_dir=run"]


def test_a_new_mixture_rule(tmp_path, small):
    run(patched(CHANGES[0], tmp_path), "distill.py", *small, "--method=shearing", "--alpha=1")
    factor = [1 / 3] * 3
    for line in read_lines(tmp_path / "run", "mixture"):
        psi = [f * domain["ratio"] for f, domain in zip(factor, line["domains"].values())]
        factor = [value / sum(psi) for value in psi]
        assert [domain["factor"] for domain in line["domains"].values()] == pytest.approx(factor, rel=1e-9)
        assert line["t"] == 0 or list(line["r"].values()) == pytest.approx(factor, rel=1e-9)
    replayed = run(tmp_path, "sample_mixture.py", "--metrics=run/metrics.jsonl")
    assert re.search(r"difference to the r of the run: (0.0e\+00|.*e-1\d)$", replayed, re.MULTILINE)


def test_a_new_loss(tmp_path, small):
    """Its two forms agree, in loss and gradients; and it is what a run minimises."""
    patched(CHANGES[1], tmp_path)
    run(tmp_path, "-c", """
import torch
from distill import dense_distillation_loss, distillation_loss
torch.manual_seed(0)
hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
teacher, teacher_head, targets = torch.randn(9, 5), torch.randn(11, 5), torch.randint(11, (9,))
fused = distillation_loss(hidden, head, teacher, teacher_head, targets, gamma=0.3, chunk_size=4)
dense = dense_distillation_loss(hidden @ head.T, teacher @ teacher_head.T, targets, gamma=0.3)
torch.testing.assert_close(fused, dense)
for one, other in zip(*(torch.autograd.grad(losses[0], (hidden, head)) for losses in (fused, dense))):
    torch.testing.assert_close(one, other)
""")
    run(tmp_path, "distill.py", *small, "--gamma=0.3")
    for line in read_lines(tmp_path / "run", "train"):
        assert line["loss"] == pytest.approx(0.7 * line["ce"] + 0.3 * line["kl"], rel=1e-5)
    run(tmp_path, "distill.py", *small, "--method=cpt", "--out_dir=cpt")
    assert all(line["loss"] == line["ce"] for line in read_lines(tmp_path / "cpt", "train"))


def test_a_new_model_family(tmp_path):
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


if __name__ == "__main__":
    (ROOT / "README.md").write_text(LINK.sub(
        lambda link: f"[`{link[1]}`]({link[2]}#L{definitions(link[2])[link[1]]})", README), encoding="utf-8")
