"""A tiny corpus and tiny models, made once for all tests."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch

from data import TokenBins, build_bins, load_tokenizer, run_program, save_tokenizer
from model import GPT, GPTConfig

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the programs that tests start

WORDS = {"letters": "abcdefgh ", "digits": "0123456789+-=", "signs": "(){}[]<>;,. \n"}
DOCUMENTS = {"letters": 60, "digits": 30, "signs": 15}  # natural proportions of about 4 : 2 : 1


def documents(name: str, count: int):
    rng = random.Random(name)
    return ["".join(rng.choices(WORDS[name], k=rng.randint(250, 350))) for _ in range(count)]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Bins of three domains of unequal size, of the bytes tokenizer."""
    folder = tmp_path_factory.mktemp("bins") / "tiny"
    stream = ((name, text) for name, count in DOCUMENTS.items() for text in documents(name, count))
    build_bins(folder, load_tokenizer("bytes"), stream, val_fraction=0.2)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, data_dir) -> Path:
    """A model's folder whose weights are far from their initial values."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = GPT(GPTConfig.scratch(2, 64, 257, 64))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder, TokenBins(data_dir, 16))
    return folder


def read_lines(out_dir: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl, of one kind, without what a clock put there."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_s", "eta_s")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines
            if kind in (None, line["kind"])]


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a module's `main` as a program with arguments, in this process: (exit status, stdout, stderr)."""
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
