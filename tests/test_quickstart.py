"""The quickstart in miniature, as a newcomer runs it, and every command of the README as written there."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import read_lines

import distill
from distill import RunFolder

ROOT = Path(__file__).parent.parent
SMALL = "--pretrain_steps=4 --max_steps=4 --interval=2 --val_samples=2 --test_samples=2 --batch_size=8 --warmup_steps=1"


def run(folder: Path, command: str) -> str:
    """Return the output of a command in a shell. Fails, with the output, if the command fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "PATH": path})
    assert result.returncode == 0, command + "\n" + result.stdout[-2000:] + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Return a copy of the project in which the quickstart has run once."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "printed.txt").write_text(run(folder, f"python distill.py {SMALL}"))
    return folder


def test_the_quickstart_makes_bins_teacher_base_and_student(checkout):
    printed = (checkout / "printed.txt").read_text()
    meta = json.loads((checkout / "data" / "quickstart" / "meta.json").read_text())
    sizes = [domain["train"]["tokens"] for domain in meta["domains"].values()]
    assert len(sizes) >= 4 and max(sizes) > 2 * min(sizes)
    out_dir = checkout / "out" / "quickstart-ddk-0"
    for folder in (checkout / "data/quickstart/teacher/step_00000004",
                   checkout / "data/quickstart/student/step_00000001", out_dir / "step_00000004"):
        assert (folder / "model.safetensors").is_file(), folder
    assert [line["t"] for line in read_lines(out_dir, "mixture")] == [0, 1, 2]
    for wanted in ("ETA", "worst ratio", "evaluated at step 4: worst ratio", "out/quickstart-ddk-0/step_00000004"):
        assert wanted in printed
    for name in meta["domains"]:
        assert len(re.findall(rf"(?m)^ *{name}\b", printed)) >= 2  # before training, and at the end


def test_another_method_uses_the_same_bins_and_models(checkout):
    made = {path: path.stat().st_mtime_ns for path in (checkout / "data").rglob("*.safetensors")}
    printed = run(checkout, f"python distill.py {SMALL} --method=kd --seed=1")
    assert made == {path: path.stat().st_mtime_ns for path in (checkout / "data").rglob("*.safetensors")}
    assert "Collecting" not in printed and (checkout / "out" / "quickstart-kd-1" / "step_00000004").is_dir()
    runs = [read_lines(checkout / "out" / name, "mixture")[0] for name in ("quickstart-ddk-0", "quickstart-kd-1")]
    assert runs[0]["domains"] == runs[1]["domains"]  # both start from the same student and teacher


def test_finished_models_are_used_for_any_number_of_steps_and_by_many_runs_at_once(
        checkout, monkeypatch, capsys):
    trained = []

    def record(config):
        trained.append(config)
        return Path(config.out_dir, "step_00000008")

    monkeypatch.setattr(distill, "train", record)
    monkeypatch.chdir(checkout)
    config = distill.parse_config([*SMALL.split(), "--pretrain_steps=8"])
    with RunFolder(checkout / "data/quickstart/teacher") as run_folder:  # of another run
        run_folder.lock()
        ready = distill.quickstart(config)
    assert not trained and ready.teacher == "data/quickstart/teacher/step_00000004"
    assert "The teacher was made before" in capsys.readouterr().out

    # A damaged model is trained again
    shutil.copytree(checkout / "data/quickstart", checkout / "data/damaged")
    weights = checkout / "data/damaged/teacher/step_00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ready = distill.quickstart(replace(config, data_dir="data/damaged"))
    assert [(run.out_dir, run.max_steps) for run in trained] == [("data/damaged/teacher", 8)]
    assert ready.teacher == "data/damaged/teacher/step_00000008"
    assert ready.student == "data/damaged/student/step_00000001"


def readme_blocks(kind: str, path: str = "README.md") -> list[list[str]]:
    """Return the commands of each block of a `kind` in a README."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)
    return [[command for line in block.replace("\\\n", " ").splitlines() for command in line.split(" && ")]
            for block in blocks]


def test_the_commands_of_the_readme_work_as_written(checkout):
    """Keys at the end make the runs small. This does not run pip and pytest."""
    blocks = readme_blocks("bash")
    for wanted in ("python distill.py", "pip install -r requirements-dev.txt", "pytest"):
        assert any(wanted in block for block in blocks)
    shutil.copytree(checkout / "data" / "quickstart", checkout / "data" / "try")
    newest = checkout / "out" / "quickstart-ddk-0"
    shutil.copytree(newest / "step_00000004", newest / "step_00000300")

    def run_block(commands: list[str]):
        for command in commands:
            program = command.split()[1] if command.startswith("python ") else None
            if program is None:
                assert command.startswith(("pip ", "pytest")), command
            elif command != "python distill.py":  # which the fixture ran
                keys = {"distill.py": SMALL, "model.py": "--max_new_tokens=3"}.get(program, "")
                run(checkout, f"{command} {keys}")

    with ThreadPoolExecutor(2) as pool:  # no block requires another
        list(pool.map(run_block, blocks))
    assert (checkout / "mixture.png").is_file()


@pytest.mark.slow
def test_the_commands_that_apply_a_fork_work_as_written(checkout):
    blocks = readme_blocks("sh", "tests/forks/README.md")
    assert len(blocks) == 1
    for command in blocks[0]:
        run(checkout, f"{command} {SMALL}" if "distill.py" in command else command)
    assert (checkout / "out/quickstart-ted-0/step_00000004/extra.safetensors").is_file()
    mixture = (checkout / "out/proxy/mixture.txt").read_text().strip()
    assert read_lines(checkout / "out/cpt-doremi", "run")[0]["config"]["mixture"] == mixture
