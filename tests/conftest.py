"""A tiny corpus and tiny models, made once for all tests."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import TokenBins, build_bins, load_tokenizer, run_program, save_tokenizer
from distill import list_checkpoints
from model import GPT, GPTConfig

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the programs that tests start

WORDS = {"letters": "abcdefgh ", "digits": "0123456789+-=", "signs": "(){}[]<>;,. \n"}
DOCUMENTS = {"letters": 60, "digits": 30, "signs": 15}  # natural proportions of about 4 : 2 : 1
NAMES = list(DOCUMENTS)


def documents(name: str, count: int):
    rng = random.Random(name)
    return ["".join(rng.choices(WORDS[name], k=rng.randint(250, 350))) for _ in range(count)]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Return bins of three domains of unequal size, with the bytes tokenizer."""
    folder = tmp_path_factory.mktemp("bins") / "tiny"
    stream = ((name, text) for name, count in DOCUMENTS.items() for text in documents(name, count))
    build_bins(folder, load_tokenizer("bytes"), stream, val_fraction=0.2)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, data_dir) -> Path:
    """Return a model folder with weights far from their initial values."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = GPT(GPTConfig.scratch(2, 64, 257, 64))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder, TokenBins(data_dir, 16))
    return folder


@pytest.fixture(scope="session")
def tiny(data_dir, teacher) -> dict:
    """Return the keys of a tiny run."""
    return dict(preset="paper", data_dir=str(data_dir), teacher=str(teacher), student="scratch:1x32", block_size=16,
                batch_size=8, val_samples=5, test_samples=0, interval=2, max_steps=8, lr=3e-3, min_lr=3e-4,
                warmup_steps=2, save_every=4, device="cpu")


def words(keys: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


def read_lines(out_dir: Path, kind: str | None = None) -> list[dict]:
    """Return a run's lines of metrics.jsonl, of one kind if given, without times."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_s", "eta_s")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines
            if kind in (None, line["kind"])]


def assert_same_run(out_dir: Path, other: Path):
    """Compare the metrics, except for the configuration, and the files of the last checkpoint, to the bit."""
    assert read_lines(out_dir)[1:] == read_lines(other)[1:]
    folder, other_folder = (list_checkpoints(run)[-1] for run in (out_dir, other))
    assert folder.name == other_folder.name
    assert {path.name for path in folder.iterdir()} == {path.name for path in other_folder.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (other_folder / path.name).read_bytes(), path.name


def open_in_transformers(folder: Path):
    """Open a folder in transformers. Fails if a tensor is missing, unexpected or reshaped."""
    from transformers import AutoModelForCausalLM
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Changes of a folder


def nothing(folder: Path):
    pass


def copy_of(folder: Path, to: Path, change=nothing) -> Path:
    shutil.copytree(folder, to)
    change(to)
    return to


def put(name: str, raw: bytes):
    return lambda folder: (folder / name).write_bytes(raw)


def drop(name: str):
    return lambda folder: (folder / name).unlink()


def edit(name: str, change=lambda content: None, **values):
    """Change a JSON file: what `change` returns, if anything, replaces its content; then `values` are set."""
    def apply(folder: Path):
        content = json.loads((folder / name).read_text())
        replaced = change(content)
        if replaced is not None:
            content = replaced
        if values:
            content.update(values)
        (folder / name).write_text(json.dumps(content))
    return apply


def change_tensors(change, file: str = "model.safetensors"):
    """Change a model's tensors by a function of their dict."""
    def apply(folder: Path):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return apply


class Hostile:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled").resolve(),)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run a module's `main` as a program, in this process. Return (exit status, stdout, stderr)."""
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        monkeypatch.setattr(os, "_exit", sys.exit)  # which ends a program where the test says that torchrun started it
        status = 0
        try:
            run_program(module.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run
