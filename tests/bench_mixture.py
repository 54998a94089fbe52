"""What DDK's own work costs beside a training step: sampling, reading, and the evaluations that r needs.

    python tests/bench_mixture.py      about two minutes on two cores

Sampling and reading are timed at the quickstart's size (4 domains, 16 windows of 256 tokens) beside its step (teacher
4 × 128, student 2 × 96), then with a thousand domains, with 1e9 windows each, and with bins of 4 GB, of which the
resident memory is taken before and after. An evaluation's price is given at the paper's proportions: 10 domains × 500
windows every 1000 steps of 256 windows, beside KD, which needs none.
"""

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
from distill import distillation_loss, make_optimizers, perplexities, resolve_config
from model import GPT, GPTConfig
from sample_mixture import MixtureSampler

B, T, VOCAB = 16, 256, 257


def median_seconds(work, repeats: int) -> float:
    """Of one call, after a third of as many calls to warm up."""
    times = []
    for _ in range(repeats + repeats // 3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[repeats // 3:])


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def big_bins(folder: Path, n_bytes: int) -> TokenBins:
    """Bins whose first domain's train side is a file of `n_bytes`, of holes."""
    build_bins(folder, load_tokenizer("bytes"), {name: lambda name=name: (f"{name} {i} " * 500 for i in range(20))
                                                 for name in ("large", "small")})
    os.truncate(folder / "large.train.bin", n_bytes)
    meta = json.loads((folder / "meta.json").read_text())
    meta["domains"]["large"]["train"][0]["tokens"] = n_bytes // 2
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenBins(folder, T)


def main():
    torch.manual_seed(0)
    teacher, student = (GPT(GPTConfig.scratch(*size, VOCAB, T)) for size in ((4, 128), (2, 96)))
    optimizers = make_optimizers(student, resolve_config())
    windows = torch.randint(0, VOCAB, (B, T + 1))

    def step():
        idx, targets = windows[:, :-1], windows[:, 1:]
        with torch.no_grad():
            given = teacher(idx, loss_fn=lambda hidden, head: (hidden, head))
        loss, _, _ = student(idx, loss_fn=lambda hidden, head: distillation_loss(hidden, head, *given, targets))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step_s = median_seconds(step, 30)
    eval_s = median_seconds(lambda: perplexities(student, {"": windows}, VOCAB, B), 30)
    teacher_s = median_seconds(lambda: perplexities(teacher, {"": windows}, VOCAB, B), 30)
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}\n\n"
          f"A step of {B} × {T} tokens: {1e3 * step_s:.1f} ms\n\n"
          "| drawing and reading a batch | ms | of the step |\n|---|---|---|")

    def row(name: str, seconds: float):
        print(f"| {name} | {1e3 * seconds:.3f} | {seconds / step_s:.2%} |")

    with tempfile.TemporaryDirectory() as folder:
        bins = big_bins(Path(folder), 10**8)
        for n_domains, n_windows in ((4, 10**4), (4, 10**9), (1000, 10**4), (1000, 10**9)):
            sampler = MixtureSampler({f"d{i}": n_windows + i for i in range(n_domains)}, B, seed=0)
            row(f"sampling, {n_domains:,} domains of {n_windows:.0e} windows", median_seconds(sampler.next_batch, 300))
        sampler = MixtureSampler(bins.n_windows, B, seed=0)
        row("sampling and reading, 0.1 GB", median_seconds(lambda: bins.train_windows(*sampler.next_batch()), 300))
    with tempfile.TemporaryDirectory() as folder:
        bins = big_bins(Path(folder), 4 * 10**9)
        sampler, before = MixtureSampler(bins.n_windows, B, seed=0), resident_mib()
        row("sampling and reading, 4 GB", median_seconds(lambda: bins.train_windows(*sampler.next_batch()), 3000))
        print(f"\nResident memory before and after 4,000 batches of 4 GB: {before:.0f} and {resident_mib():.0f} MiB")

    every, once = 10 * 500 * eval_s / (1000 * 256 * step_s), 10 * 500 * teacher_s / (30_000 * 256 * step_s)
    print(f"Evaluating {B} windows: student {1e3 * eval_s:.1f} ms, teacher {1e3 * teacher_s:.1f} ms. At the paper's "
          f"proportions: {every:.2%} of the run for the student, {once:.3%} for the teacher, measured once")


if __name__ == "__main__":
    run_program(main)
