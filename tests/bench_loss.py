"""Eq. 3 from hidden states to gradients, beside the matrix products that it cannot avoid; in time and in memory.

    python tests/bench_loss.py [--device=cuda --dtype=bfloat16]      about ten minutes on two cores

The floor is four products: the logits of student and teacher, and the gradients of hidden states and head, written
into memory that is there already. Every implementation runs in a fresh process of its own, where it takes turns with
the floor, so that what else the machine does slows both; one run of each goes before to warm up. A ratio is the median
of the pairs', with the least and the most. On a machine that is not quiet, `--threads=1` tells more: one thread, and
its CPU time.

- dense: the logits of all tokens, `dense_distillation_loss`, and autograd.
- fused: `distillation_loss`. fused, eager: the same where torch.compile does not work.
- liger: LigerFusedLinearJSDLoss of liger-kernel, if it is installed, compiled, its beta = 0: forward KL.

The processes keep the memory that they free, as CUDA's allocator does: where glibc gives large blocks back to the
kernel at once, and a hypervisor to its host, the faults of fetching them again can take longer than the passes over the
logits, whichever the implementation.

Memory is the peak above inputs and gradients. The errors are those of the loss, and of the gradients relative to their
largest entry, against the dense equation in float32, computed last in the same process.
"""

import ctypes
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

import distill
from data import UserError, option, parse_config, run_program


KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc's; no others read them


@dataclass
class Config:
    """Keys of `python tests/bench_loss.py`."""
    sizes: str = option("2048x49152x256x576,1024x151936x512x1024",
                        "tokens x vocabulary x student's x teacher's width,…")
    run: str = option("dense,fused,fused eager,liger", "implementations")
    repeats: int = option(7, "timed pairs of floor and implementation", least=1)
    chunk_size: int = option(0, "tokens a chunk, for all; 0: each one's default, but 256 for liger", least=0)
    threads: int = option(0, "CPU threads; 0: torch's default; 1: timed in CPU time", least=0)
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("float32", "float32 or bfloat16")
    alone: str = option("", "internal: one implementation, in this process")


def implementation(config: Config):
    """loss of (hidden, head, teacher_hidden, teacher_head, targets), at γ = 0.2."""
    chunk_size = config.chunk_size or None
    if config.alone == "dense":
        return lambda h, w, h_T, w_T, targets: distill.dense_distillation_loss(
            F.linear(h, w), F.linear(h_T, w_T), targets)[0]
    if config.alone == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        return LigerFusedLinearJSDLoss(1.0, 0.2, beta=0.0, chunk_size=chunk_size or 256)
    if config.alone == "fused eager":
        distill.compiled_eq3_rows = lambda: distill.eq3_rows
    return lambda *inputs: distill.distillation_loss(*inputs, chunk_size=chunk_size)[0]


class PeakMemory:
    """MiB by which memory rises above what is held when this is made; on a CPU, as Linux counts a process's pages."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what is freed, but kept, would hide a rise
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        self.held = torch.cuda.memory_allocated() / 2**20 if self.cuda else self.read("VmRSS")

    def read(self, key: str) -> float:
        if sys.platform != "linux":
            return float("nan")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10

    def rise(self) -> float:
        return (torch.cuda.max_memory_allocated() / 2**20 if self.cuda else self.read("VmHWM")) - self.held


def measure(config: Config):
    """One implementation at one size, in this process; prints one JSON object."""
    tokens, rows, width_S, width_T = map(int, config.sizes.split("x"))
    options = dict(device=config.device, dtype=getattr(torch, config.dtype))
    clock = time.process_time if config.threads == 1 and config.device == "cpu" else time.perf_counter
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(tokens, width_S, **options), torch.randn(tokens, width_T, **options)
    head, teacher_head = (torch.randn(rows, width, **options).mul_(2 / width**0.5) for width in (width_S, width_T))
    targets = torch.randint(rows, (tokens,), device=config.device)
    inputs = hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, targets
    loss_fn = implementation(config)

    def gradients(loss_fn, inputs):
        loss = loss_fn(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, inputs[:2])

    def seconds(function) -> float:
        if config.device == "cuda":
            torch.cuda.synchronize()
        started = clock()
        function()
        if config.device == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    first = seconds(lambda: gradients(loss_fn, inputs))  # compiles
    memory = PeakMemory(config.device)
    results = gradients(loss_fn, inputs)
    peak = memory.rise() - sum(result.nbytes for result in results) / 2**20

    logits, teacher_logits, of_hidden, of_head = (
        torch.zeros(*size, **options) for size in ((tokens, rows), (tokens, rows), (tokens, width_S), (rows, width_S)))

    @torch.no_grad()
    def floor():
        torch.mm(hidden, head.T, out=logits)
        torch.mm(teacher_hidden, teacher_head.T, out=teacher_logits)
        torch.mm(logits, head, out=of_hidden)
        torch.mm(logits.T, hidden, out=of_head)

    floor()
    times = [(seconds(floor), seconds(lambda: gradients(loss_fn, inputs))) for _ in range(config.repeats)]
    del logits, teacher_logits, of_hidden, of_head
    exact = gradients(lambda h, w, h_T, w_T, y: distill.dense_distillation_loss(h @ w.T, h_T @ w_T.T, y)[0],
                      [*(x.detach().float().requires_grad_() for x in inputs[:2]), *(x.float() for x in inputs[2:4]),
                       targets])
    errors = [((got.float() - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in zip(results, exact)]
    print(json.dumps({"times": times, "first": first, "peak": peak, "errors": errors}))


def alone(config: Config, name: str, size: str) -> dict:
    keys = asdict(replace(config, alone=name, sizes=size))
    process = subprocess.run([sys.executable, __file__, *(f"--{key}={value}" for key, value in keys.items())],
                             env={**os.environ, **KEEP_MEMORY}, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise UserError(f"{name} ended with status {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def main():
    config = parse_config(Config)
    if config.alone:
        return measure(config)
    machine = torch.cuda.get_device_name() if config.device == "cuda" else (
        f"{os.cpu_count()} cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})")
    timed = f"{config.threads or torch.get_num_threads()} threads"
    if config.threads == 1 and config.device == "cpu":
        timed = "CPU time of 1 thread"
    print(f"{machine}, {timed}, {config.dtype}, torch {torch.__version__}, {date.today()}, {config.repeats} pairs; "
          f"load at the start {os.getloadavg()[0]:.1f}\n", flush=True)
    print("| tokens × vocabulary, widths | | s | × floor | least … most | peak, MiB | error of loss, gradients | "
          "first, s |\n|---|---|---|---|---|---|---|---|")
    for size in config.sizes.split(","):
        tokens, rows, width_S, width_T = size.split("x")
        label = f"{tokens} × {int(rows):,}, {width_S}/{width_T}"
        for name in config.run.split(","):
            if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
                print(f"| {label} | liger | not installed | | | | | |")
                continue
            result = alone(config, name, size)
            floors, ours = zip(*result["times"])
            ratios = [b / a for a, b in result["times"]]
            print(f"| {label} | floor | {statistics.median(floors):.3f} | 1 | | | | |\n"
                  f"| | {name} | {statistics.median(ours):.3f} | **{statistics.median(ratios):.2f}** | "
                  f"{min(ratios):.2f} … {max(ratios):.2f} | {result['peak']:,.0f} | {result['errors'][0]:.0e}, "
                  f"{max(result['errors'][1:]):.0e} | {result['first']:.1f} |", flush=True)


if __name__ == "__main__":
    run_program(main)
