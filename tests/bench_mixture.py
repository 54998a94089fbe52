"""Measure the cost of DDK's own work: sampling, reading, and the evaluations that r requires.

    python tests/bench_mixture.py      about two minutes on two cores

It compares sampling and reading with a training step of the quickstart: with four domains and a thousand, with 1e9
windows each, and from bins of 4 GB, whose resident memory it prints. It prices evaluations at the paper's proportions:
10 domains × 500 windows every 1000 steps of 256 windows. KD requires none.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from data import TokenBins, build_bins, load_tokenizer, run_program
from distill import distillation_loss, make_optimizers, perplexities, resolve_auto, resolve_config
from model import GPT, GPTConfig
from sample_mixture import MixtureSampler

VOCAB = 257


def median_seconds(work, repeats: int) -> float:
    """Of one call, after a third of as many calls to warm up."""
    times = []
    for _ in range(repeats + repeats // 3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[repeats // 3:])


def resident_mib() -> float:
    """Memory of this process in MiB, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def big_bins(folder: Path, n_bytes: int, block_size: int) -> TokenBins:
    """Bins of two domains, one of which has a train bin of `n_bytes`, of holes."""
    texts = [(name, f"{name} {i} " * 500) for name in ("large", "small") for i in range(20)]
    build_bins(folder, load_tokenizer("bytes"), texts, val_fraction=0.2)
    os.truncate(folder / "large.train.bin", n_bytes)
    meta = json.loads((folder / "meta.json").read_text())
    meta["domains"]["large"]["train"]["tokens"] = n_bytes // 2
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenBins(folder, block_size)


def print_row(name: str, seconds: float, step_s: float):
    print(f"| {name} | {1e3 * seconds:.3f} | {seconds / step_s:.2%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="timed steps and evaluations; of batches ten and a "
                                                                "hundred times as many (default: %(default)s)")
    parser.add_argument("--gb", type=float, default=4, help="size of the large bins (default: %(default)s)")
    args = parser.parse_args()

    # The quickstart's step: the teacher's forward pass, Eq. 3, the student's forward and backward pass, AdamW
    torch.manual_seed(0)
    config = resolve_auto(resolve_config({"device": "cpu"}))
    B = config.batch_size
    teacher = GPT(GPTConfig.scratch(4, 128, VOCAB, config.block_size))
    student = GPT(GPTConfig.scratch(2, 96, VOCAB, config.block_size))
    optimizer, = make_optimizers(student, config)
    windows = torch.randint(0, VOCAB, (B, config.block_size + 1))

    def step():
        inputs = windows[:, :-1]
        targets = windows[:, 1:]
        with torch.no_grad():
            teacher_hidden, teacher_head = teacher(inputs, loss_fn=lambda *hidden_and_head: hidden_and_head)
        loss, _, _ = student(inputs, loss_fn=lambda hidden, head: distillation_loss(
            hidden, head, teacher_hidden, teacher_head, targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step_s = median_seconds(step, args.repeats)
    measure = functools.partial(perplexities, windows={"": windows}, vocab_size=VOCAB, config=config)
    student_s = median_seconds(lambda: measure(student), args.repeats)
    teacher_s = median_seconds(lambda: measure(teacher), args.repeats)
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}\n\n"
          f"A step of {B} × {config.block_size} tokens: {1e3 * step_s:.1f} ms\n\n"
          "| drawing and reading a batch | ms | of the step |\n|---|---|---|")

    # Sampling, with few and many domains, of few and many windows
    for n_domains, n_windows in ((4, 10**4), (4, 10**9), (1000, 10**4), (1000, 10**9)):
        sampler = MixtureSampler({f"d{i}": n_windows + i for i in range(n_domains)}, B, seed=0)
        seconds = median_seconds(sampler.next_batch, 10 * args.repeats)
        print_row(f"sampling, {n_domains:,} domains of {n_windows:.0e} windows", seconds, step_s)

    # Sampling and reading, from small and large bins
    memory = []
    for gb in (0.1, args.gb):
        with tempfile.TemporaryDirectory() as folder:
            bins = big_bins(Path(folder), int(gb * 10**9), config.block_size)
            sampler = MixtureSampler(bins.n_windows, B, seed=0)
            before = resident_mib()
            seconds = median_seconds(lambda: bins.train_windows(*sampler.next_batch()), 100 * args.repeats)
            memory.append(f"{before:.0f} and {resident_mib():.0f} MiB after {sampler.step:,} batches of {gb} GB")
        print_row(f"sampling and reading, {gb} GB", seconds, step_s)
    print(f"\nResident memory before and after: {'; '.join(memory)}")

    # Evaluations, at the paper's proportions, as a share of a run
    run_s = 30_000 * 256 / B * step_s
    evaluated = 10 * 500 / B
    print(f"Evaluating {B} windows: student {1e3 * student_s:.1f} ms, teacher {1e3 * teacher_s:.1f} ms. At the paper's "
          f"proportions: {30 * evaluated * student_s / run_s:.2%} of the run for the student, "
          f"{evaluated * teacher_s / run_s:.3%} for the teacher, measured once")


if __name__ == "__main__":
    run_program(main)
