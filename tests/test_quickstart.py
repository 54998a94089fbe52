"""The quickstart in miniature, as a newcomer runs it, and every command of the README as written there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import read_lines

ROOT = Path(__file__).parent.parent
SMALL = ["--pretrain_steps=2", "--max_steps=4", "--interval=2", "--val_samples=2", "--batch_size=8"]


def run(folder: Path, *command: str) -> str:
    """What a command prints; fails with it if the command does."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a clone holds, in which the quickstart has run once."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "printed.txt").write_text(run(folder, sys.executable, "distill.py", *SMALL))
    return folder


def test_the_quickstart_makes_bins_teacher_base_and_student(checkout):
    printed = (checkout / "printed.txt").read_text()
    meta = json.loads((checkout / "data" / "quickstart" / "meta.json").read_text())
    sizes = [sum(entry["tokens"] for entry in domain["train"]) for domain in meta["domains"].values()]
    assert len(sizes) >= 4 and max(sizes) > 2 * min(sizes)
    out_dir = checkout / "out" / "quickstart-ddk-0"
    for folder in (checkout / "data/quickstart/teacher/step_00000002",
                   checkout / "data/quickstart/student/step_00000001", out_dir / "step_00000004"):
        assert (folder / "model.safetensors").is_file(), folder
    assert [line["t"] for line in read_lines(out_dir, "mixture")] == [0, 1, 2]
    for wanted in ("ETA", "worst ratio", "goes on from", "--method=kd", "out/quickstart-ddk-0/step_00000004"):
        assert wanted in printed
    for name in meta["domains"]:
        assert len(re.findall(rf"(?m)^ *{name}\b", printed)) >= 2  # in the table, and a continuation


def test_another_arm_uses_the_same_bins_and_models(checkout):
    made = {path: path.stat().st_mtime_ns for path in (checkout / "data").rglob("*.safetensors")}
    printed = run(checkout, sys.executable, "distill.py", *SMALL, "--method=kd", "--seed=1")
    assert made == {path: path.stat().st_mtime_ns for path in (checkout / "data").rglob("*.safetensors")}
    assert "Collecting" not in printed and (checkout / "out" / "quickstart-kd-1" / "step_00000004").is_dir()
    runs = [read_lines(checkout / "out" / run, "mixture")[0] for run in ("quickstart-ddk-0", "quickstart-kd-1")]
    assert runs[0]["domains"] == runs[1]["domains"]  # both start from the same student and teacher


def test_the_commands_of_the_readme_work_as_written(checkout):
    """In their order, made small by keys that come last; pip and pytest are left to whoever runs this test."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = [command for block in blocks for line in block.splitlines() for command in line.split(" && ")]
    assert any(command == "python distill.py" for command in commands)
    assert "pip install -r requirements-dev.txt" in commands and "pytest" in commands
    teacher = checkout / "data/quickstart/teacher/step_00000002"
    for name in ("teacher", "student"):
        shutil.copytree(teacher, checkout / "path" / "to" / name)
    newest = checkout / "out" / "quickstart-ddk-0"
    shutil.copytree(newest / "step_00000004", newest / "step_00000400")
    for command in commands:
        words = shlex.split(command)
        if words[0] in ("pip", "pytest"):
            continue
        assert words[0] == "python", command
        made = [word for word in words if word.startswith("--student=scratch:")]
        extra = {"distill.py": SMALL + ["--block_size=64"] * any("data/mine" in word for word in words)
                 + ["--student=scratch:2x64"] * len(made),
                 "model.py": ["--max_new_tokens=3"], "sample_mixture.py": [], "data.py": []}[words[1]]
        if words == ["python", "distill.py"]:
            continue  # the fixture ran it
        run(checkout, sys.executable, *words[1:], *extra)
    assert (checkout / "mixture.png").is_file()
