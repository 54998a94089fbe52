"""Compare Eq. 3, from hidden states to gradients, with the matrix products that it cannot avoid: time and memory.

    python tests/bench_loss.py                                   about ten minutes on two cores
    python tests/bench_loss.py --device=cuda                     bfloat16, several chunks; 80 GB for the dense equation

The floor is four products, written into allocated memory: the logits of student and teacher, and the gradients of
hidden states and head. Every implementation runs in a fresh process and takes turns with the floor, so that other work
on the machine slows both. A ratio is the median over the pairs, with the minimum and the maximum. On a busy machine use
`--threads=1`: one thread, and its CPU time.

- dense: the logits of all tokens, `dense_distillation_loss`, and autograd.
- ours: `distillation_loss`. ours eager: the same where torch.compile does not work.
- liger: LigerFusedLinearJSDLoss of liger-kernel, if it is installed, compiled; beta = 0 is forward KL, 1 reverse. It
  knows no padded rows.

The processes keep the memory that they free, as CUDA's allocator does. Otherwise glibc gives large blocks back to the
kernel, and the page faults of fetching them again can take longer than the passes over the logits.

Memory is the peak above inputs and gradients. Errors are relative to the dense equation in float32, computed last in
the same process: the loss's, and the gradients' in terms of their largest entry.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from data import UserError, run_program
from distill import dense_distillation_loss, distillation_loss

NAMES = ["dense", "ours", "ours eager", "liger"]
SIZES = {"cpu": "2048x49152x256x576,1024x151936x512x1024", "cuda": "16384x49152x576x2048,4096x151936x2048x5120"}
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc's; no others read them


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="tokens x rows of the heads x student's x teacher's width,… (default: "
                        f"{SIZES['cpu']}; on cuda {SIZES['cuda']})")
    parser.add_argument("--run", default=",".join(NAMES), help="implementations (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7,
                        help="pairs of floor and implementation (default: %(default)s)")
    parser.add_argument("--chunk_size", type=int, default=0,
                        help="tokens per chunk; 0: each one's default, but 256 for liger (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="T of Eq. 3 (default: %(default)s)")
    parser.add_argument("--direction", default="forward", choices=["forward", "reverse"],
                        help="of the divergence (default: %(default)s)")
    parser.add_argument("--padded_rows", type=int, default=0,
                        help="rows of the heads beyond the tokenizer's ids (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="of the products, by autocast of float32 inputs (default: float32; on cuda bfloat16)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0,
                        help="CPU threads; 0: torch's default; 1: timed in CPU time (default: %(default)s)")
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)  # one implementation, in this process
    args = parser.parse_args()
    args.sizes = args.sizes or SIZES[args.device]
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    for name in args.run.split(","):
        if name not in NAMES:
            parser.error(f"--run={args.run}: {name!r} must be one of {', '.join(NAMES)}")
    return args


def uses_cpu_time(args: argparse.Namespace) -> bool:
    return args.threads == 1 and args.device == "cpu"


def loss_functions(args: argparse.Namespace) -> dict:
    """name → loss of (hidden, head, teacher_hidden, teacher_head, targets)."""
    equation = {"temperature": args.temperature, "direction": args.direction}
    if args.padded_rows:
        equation["vocab_size"] = int(args.sizes.split("x")[1]) - args.padded_rows

    def dense(hidden, head, teacher_hidden, teacher_head, targets):
        teacher_logits = F.linear(teacher_hidden, teacher_head)
        return dense_distillation_loss(F.linear(hidden, head), teacher_logits, targets, **equation)[0]

    def ours(*inputs):
        return distillation_loss(*inputs, chunk_size=args.chunk_size or None, **equation)[0]

    functions = {"dense": dense, "ours": ours, "ours eager": ours}
    if args.alone == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        beta = 0.0 if args.direction == "forward" else 1.0
        functions["liger"] = LigerFusedLinearJSDLoss(1.0, 0.2, beta=beta, temperature=args.temperature,
                                                     chunk_size=args.chunk_size or 256)
    return functions


class PeakMemory:
    """Measures by how many MiB memory rises from now on. On a CPU, Linux counts the pages of the process."""

    def __init__(self, device: str):
        self.on_cuda = device == "cuda"
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what is freed, but kept, would hide a rise
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the resident memory
            self.held = self.read_mib("VmRSS")

    def read_mib(self, key: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 2**10
        raise UserError(f"/proc/self/status: has no {key}; memory on a CPU is measured on Linux only")

    def rise(self) -> float:
        if self.on_cuda:
            return torch.cuda.max_memory_allocated() / 2**20 - self.held
        return self.read_mib("VmHWM") - self.held


@torch.no_grad()
def four_products(hidden, head, teacher_hidden, teacher_head, logits, teacher_logits, grad_hidden, grad_head):
    """The floor: what no implementation can do without, written into the last four."""
    torch.mm(hidden, head.T, out=logits)
    torch.mm(teacher_hidden, teacher_head.T, out=teacher_logits)
    torch.mm(logits, head, out=grad_hidden)
    torch.mm(logits.T, hidden, out=grad_head)


def measure(args: argparse.Namespace):
    """One implementation at one size, in this process. Prints one JSON object."""
    tokens, rows, width_S, width_T = map(int, args.sizes.split("x"))
    clock = time.process_time if uses_cpu_time(args) else time.perf_counter
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.alone == "ours eager":
        torch.compiler.set_stance("force_eager")

    # Random inputs, with logits of the size that a model's have
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width_S, device=args.device).requires_grad_()
    head = (torch.randn(rows, width_S, device=args.device) * 2 / width_S**0.5).requires_grad_()
    teacher_hidden = torch.randn(tokens, width_T, device=args.device)
    teacher_head = torch.randn(rows, width_T, device=args.device) * 2 / width_T**0.5
    targets = torch.randint(rows - args.padded_rows, (tokens,), device=args.device)
    inputs = [hidden, head, teacher_hidden, teacher_head, targets]
    functions = loss_functions(args)
    loss_fn = functions[args.alone]

    def gradients(loss_fn, autocast: bool) -> list[torch.Tensor]:
        with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
            loss = loss_fn(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, head])]

    def seconds(function, *arguments) -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        started = clock()
        function(*arguments)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    # The first run compiles; the second is that whose memory counts.
    autocast = args.dtype == "bfloat16"
    first = seconds(gradients, loss_fn, autocast)
    memory = PeakMemory(args.device)
    results = gradients(loss_fn, autocast)
    peak = memory.rise() - sum(result.nbytes for result in results) / 2**20

    # The floor in the dtype of the products, and the implementation, in turns
    dtype = getattr(torch, args.dtype)
    operands = [tensor.detach().to(dtype) for tensor in inputs[:4]]
    logits = torch.zeros(2, tokens, rows, dtype=dtype, device=args.device)
    grad_hidden = torch.zeros_like(operands[0])
    grad_head = torch.zeros_like(operands[1])
    products = [*operands, *logits, grad_hidden, grad_head]
    four_products(*products)
    times = []
    for _ in range(args.repeats):
        floor = seconds(four_products, *products)
        times.append((floor, seconds(gradients, loss_fn, autocast)))
    del logits, products

    exact = gradients(functions["dense"], autocast=False)
    errors = [((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in zip(results, exact)]
    print(json.dumps({"times": times, "first": first, "peak": peak, "errors": errors}))


def run_alone(args: argparse.Namespace, name: str, size: str) -> dict:
    """What `measure` finds in a process of its own."""
    words = [f"--{key}={value}" for key, value in {**vars(args), "alone": name, "sizes": size}.items()]
    process = subprocess.run([sys.executable, __file__, *words], env={**os.environ, **KEEP_MEMORY},
                             stdout=subprocess.PIPE, text=True)
    if process.returncode != 0:
        raise UserError(f"{name} ended with status {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def print_heading(args: argparse.Namespace):
    machine = f"{os.cpu_count()} cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    timed = f"{args.threads or torch.get_num_threads()} threads"
    if uses_cpu_time(args):
        timed = "CPU time of 1 thread"
    print(f"{machine}, {timed}, {args.dtype}, torch {torch.__version__}, {date.today()}, {args.repeats} pairs; "
          f"{args.direction}, T = {args.temperature}, {args.padded_rows} padded rows; "
          f"load at the start {os.getloadavg()[0]:.1f}\n")
    print("| tokens × rows, widths | | s | × floor | least … most | peak, MiB | error of loss, gradients | first, s |\n"
          "|---|---|---|---|---|---|---|---|", flush=True)


def main():
    args = parse_arguments()
    if args.alone:
        measure(args)
        return
    print_heading(args)
    for size in args.sizes.split(","):
        tokens, rows, width_S, width_T = size.split("x")
        label = f"{tokens} × {int(rows):,}, {width_S}/{width_T}"
        for name in args.run.split(","):
            if name == "liger" and (importlib.util.find_spec("liger_kernel") is None or args.padded_rows):
                reason = "has no padded rows" if args.padded_rows else "not installed"
                print(f"| {label} | liger | {reason} | | | | | |")
                continue
            result = run_alone(args, name, size)
            floor_seconds, seconds = zip(*result["times"])
            ratios = [mine / floor for floor, mine in result["times"]]
            error_of_loss, *errors_of_gradients = result["errors"]
            print(f"| {label} | floor | {statistics.median(floor_seconds):.4g} | 1 | | | | |\n"
                  f"| | {name} | {statistics.median(seconds):.4g} | **{statistics.median(ratios):.2f}** | "
                  f"{min(ratios):.2f} … {max(ratios):.2f} | {result['peak']:,.0f} | {error_of_loss:.0e}, "
                  f"{max(errors_of_gradients):.0e} | {result['first']:.1f} |", flush=True)


if __name__ == "__main__":
    run_program(main)
