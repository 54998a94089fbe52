"""Compare a training step with the sum of its parts, transformers loops with and without Liger, and TRL's GKDTrainer.

    python tests/bench_step.py                                                    about five minutes on two cores
    python tests/bench_step.py --device=cuda --dtype=bfloat16 --teacher=12x5120 --student=24x2048 --vocab_size=151936 \\
        --block_size=2048 --batch_size=2                         like Qwen1.5 1.8B, with a teacher that fits into 80 GB

All of them train the same student from the same teacher on the same windows. Each runs in a fresh process, in turns,
`--rounds` times over. A step's time is the median after warm-up.

- parts: the unavoidable parts of a step, each measured separately: the teacher's forward pass, the student's forward
  and backward pass, the loss from hidden states to gradients, and the optimizer; compiled if ours is.
- ours: `distill.train`, as a run logs it: reading the data and clipping included.
- fsdp: the same under torchrun, sharded by FSDP2 over all GPUs, or two processes that share the CPU, each with as many
  windows as the others have; tokens/s are of all of them.
- transformers: both models with AutoModelForCausalLM, cross-entropy + 0.2 · KL of whole logits, AdamW.
- liger: the same with LigerFusedLinearJSDLoss on the models' hidden states, in chunks.
- trl: GKDTrainer with lmbda = 0 and beta = 0, so forward KL on the given text; it has no cross-entropy beside it.

The same run checks the first step's loss (not trl's) against the dense equation. It skips packages that are not
installed, and names them. A row says if an implementation runs out of memory, or if another program fails. Each process
draws the models' random weights on its device, so that nothing large is written or read.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import distill
from data import TokenBins, Tokenizer, build_bins
from distill import (count_parameters, dense_distillation_loss, distillation_loss, make_optimizers, prepare_layers,
                     resolve_auto, resolve_config, train)
from model import GPT, GPTConfig, stored_name, write_config
from sample_mixture import MixtureSampler


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps per run, of which a third warm up")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each implementation")
    parser.add_argument("--batch_size", type=int, default=8, help="windows per step")
    parser.add_argument("--block_size", type=int, default=256, help="tokens per window")
    parser.add_argument("--teacher", default="8x512", help="layers x width of the teacher")
    parser.add_argument("--student", default="4x256", help="layers x width of the student")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="ids")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--run", default="", choices=("", *RUNS), help="internal: one implementation, in this process")
    parser.add_argument("--folder", default="", help="internal: where models and bins are")
    return parser.parse_args()


# ------------ What all of them share ----------------------------------------------------------------------------------


def model_config(args: argparse.Namespace, role: str) -> GPTConfig:
    layers, width = getattr(args, role).split("x")
    sizes = GPTConfig.scratch(int(layers), int(width), args.vocab_size, args.block_size)
    return replace(sizes, tie_word_embeddings=False)


def model_dtype(args: argparse.Namespace, role: str) -> torch.dtype:
    return torch.float32 if role == "student" else getattr(torch, args.dtype)


def random_model(args: argparse.Namespace, role: str) -> GPT:
    """The model of a role, with the same random weights in each process: they do not change what a step costs."""
    torch.manual_seed(["teacher", "student"].index(role))
    torch.set_default_dtype(model_dtype(args, role))
    with torch.device(args.device):
        model = GPT(model_config(args, role))
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(role == "student")


def prepare(args: argparse.Namespace):
    """Folders of models without weights, and bins of random ids."""
    folder = Path(args.folder)
    for role in ("teacher", "student"):
        (folder / role).mkdir()
        write_config(folder / role, model_config(args, role), model_dtype(args, role))

    random = np.random.default_rng(0)

    def encode_batch(texts):
        return [random.integers(1, args.vocab_size, len(text)).astype(np.uint32) for text in texts]

    # A fingerprint of tiktoken's kind: a run does not load such a tokenizer.
    tokenizer = Tokenizer("random", args.vocab_size, 0, "<|endoftext|>", "tiktoken:random", encode_batch=encode_batch,
                          decode=str)
    documents = [(name, f"{name} {i} " * 2000) for name in ("one", "two") for i in range(60)]
    build_bins(folder / "bins", tokenizer, documents, val_fraction=0.2)


def run_config(args: argparse.Namespace):
    folder = Path(args.folder)
    return resolve_config(dict(
        preset="paper", method="kd", teacher=str(folder / "teacher"), student=str(folder / "student"),
        data_dir=str(folder / "bins"), out_dir=str(folder / "run"), block_size=args.block_size,
        batch_size=args.batch_size, val_samples=1, interval=10**6, max_steps=args.steps, warmup_steps=1, lr=1e-4,
        min_lr=1e-4, save_every=0, device=args.device, dtype=args.dtype,
        parallel="fsdp" if args.run == "fsdp" else "auto"))


def batches(args: argparse.Namespace):
    """The windows of each step, as `train` draws them: (B, block_size + 1)."""
    bins = TokenBins(Path(args.folder) / "bins", args.block_size)
    sampler = MixtureSampler(bins.n_windows, args.batch_size, seed=0)
    for _ in range(args.steps):
        domain_ids, window_ids = sampler.next_batch()
        yield torch.from_numpy(bins.train_windows(domain_ids, window_ids)).to(args.device)


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


def clock(args: argparse.Namespace) -> float:
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median(times: list[float]) -> float:
    return statistics.median(times[len(times) // 3:])


def hidden_and_head(hidden, head):
    """A loss_fn for GPT that returns its arguments."""
    return hidden, head


# ------------ The implementations -------------------------------------------------------------------------------------


def parts(args: argparse.Namespace) -> dict:
    config = resolve_auto(run_config(args))
    teacher = random_model(args, "teacher")
    student = random_model(args, "student")
    for model in (teacher, student):
        prepare_layers(model, config)  # compiles its blocks, if ours are
    optimizer, = make_optimizers(student, config)
    seconds = {"teacher": [], "student forward": [], "loss": [], "student backward": [], "optimizer": []}
    losses = []
    for windows in batches(args):
        inputs = windows[:, :-1]
        targets = windows[:, 1:]
        marks = [clock(args)]
        with autocast(args), torch.no_grad():
            teacher_hidden, teacher_head = teacher(inputs, loss_fn=hidden_and_head)
        marks.append(clock(args))
        with autocast(args):
            hidden, head = student(inputs, loss_fn=hidden_and_head)
        marks.append(clock(args))
        leaves = [hidden.detach().requires_grad_(), head.detach().requires_grad_()]
        with autocast(args):
            loss, _, _ = distillation_loss(*leaves, teacher_hidden, teacher_head, targets)
        loss.backward()
        marks.append(clock(args))
        torch.autograd.backward([hidden, head], [leaf.grad for leaf in leaves])
        marks.append(clock(args))
        optimizer.step()
        optimizer.zero_grad()
        marks.append(clock(args))
        losses.append(loss.item())
        for part, start, end in zip(seconds, marks, marks[1:]):
            seconds[part].append(end - start)
    medians = {part: median(times) for part, times in seconds.items()}
    return {"seconds": sum(medians.values()), "loss": losses[0], "parts": medians}


def ours(args: argparse.Namespace) -> dict:
    def read_model(role, *_):
        model = random_model(args, role).cpu()
        if args.device == "cuda":  # rank 0 has made the whole of it there
            torch.cuda.reset_peak_memory_stats()
        return model

    distill.read_model = read_model
    distill.weight_files = lambda folder: []  # to be hashed
    distill.save_checkpoint = lambda *_: None
    train(run_config(args))
    lines = [json.loads(line) for line in open(Path(args.folder) / "run" / "metrics.jsonl")]
    steps = [line for line in lines if line["kind"] == "train"]
    tokens = args.batch_size * args.block_size
    return {"seconds": median([tokens / line["tokens_per_s"] for line in steps]), "loss": steps[0]["loss"]}


def fsdp(args: argparse.Namespace) -> dict:
    world = int(os.environ["WORLD_SIZE"])
    args.batch_size *= world
    with distill.process_group(run_config(args)):
        result = ours(args)
    if world > 1:
        result["loss"] = None  # of other windows
    return {**result, "devices": world}


def their_models(args: argparse.Namespace):
    from transformers import AutoConfig, AutoModelForCausalLM
    models = []
    for role in ("teacher", "student"):
        config = AutoConfig.from_pretrained(Path(args.folder) / role)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=model_dtype(args, role))
        weights = random_model(args, role).state_dict()
        model.load_state_dict({stored_name(name, model_config(args, role)): weights[name] for name in weights})
        models.append(model)
        del weights
    if args.device == "cuda":  # the weights were there twice
        torch.cuda.reset_peak_memory_stats()
    return models


def their_loop(args: argparse.Namespace, student, loss_of) -> dict:
    """A plain training loop: loss_of(inputs, targets), the backward pass, clipping and AdamW."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    times = []
    losses = []
    start = clock(args)
    for windows in batches(args):
        with autocast(args):
            loss = loss_of(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(clock(args) - start)
        start = clock(args)
    return {"seconds": median(times), "loss": losses[0]}


def transformers(args: argparse.Namespace) -> dict:
    teacher, student = their_models(args)

    def loss_of(inputs, targets):
        with torch.no_grad():
            teacher_logits = teacher(inputs, use_cache=False).logits
        student_logits = student(inputs, use_cache=False).logits
        loss, _, _ = dense_distillation_loss(student_logits, teacher_logits, targets)
        return loss

    return their_loop(args, student, loss_of)


def liger(args: argparse.Namespace) -> dict:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    teacher, student = their_models(args)
    loss_fn = LigerFusedLinearJSDLoss(1.0, 0.2, beta=0.0, temperature=1.0, chunk_size=1024)  # beta 0: forward KL

    def loss_of(inputs, targets):
        with torch.no_grad():
            teacher_hidden = teacher.model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = student.model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return loss_fn(hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, targets.flatten())

    return their_loop(args, student, loss_of)


def trl(args: argparse.Namespace) -> dict:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    teacher, student = their_models(args)
    windows = torch.cat(list(batches(args)))
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **_):
            self.start = clock(args)

        def on_step_end(self, *arguments, **_):
            times.append(clock(args) - self.start)

    def collate(rows):
        ids = torch.tensor([row["ids"] for row in rows])
        labels = ids.clone()
        labels[:, 0] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": ids[:, :1]}

    words = FastTokenizer(WordLevel({"a": 0}, "a"))
    settings = GKDConfig(
        output_dir=str(Path(args.folder) / "trl"), max_steps=args.steps, lmbda=0.0, beta=0.0, temperature=1.0,
        per_device_train_batch_size=args.batch_size, learning_rate=1e-4, optim="adamw_torch_fused", logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=args.device == "cpu", shuffle_dataset=False,
        bf16=args.dtype == "bfloat16", gradient_checkpointing=False, disable_tqdm=True, lr_scheduler_type="constant")
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=settings, data_collator=collate, callbacks=[Clock()],
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="a"),
        train_dataset=Dataset.from_dict({"ids": windows.tolist()}))
    trainer.train()
    return {"seconds": median(times), "loss": None}


def dense(args: argparse.Namespace) -> dict:
    """Eq. 3 of the first step, from whole logits."""
    windows = next(batches(args))
    with torch.no_grad(), autocast(args):
        logits = [random_model(args, role)(windows[:, :-1]) for role in ("student", "teacher")]
        loss, _, _ = dense_distillation_loss(*logits, windows[:, 1:])
    return {"seconds": math.nan, "loss": loss.item()}


PEERS = {"transformers": "transformers", "liger": "liger_kernel", "trl": "trl"}  # and the packages that they require
RUNS = {"dense": dense, "parts": parts, "ours": ours, "fsdp": fsdp, "transformers": transformers, "liger": liger,
        "trl": trl}


# ------------ The table -----------------------------------------------------------------------------------------------


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**20 if sys.platform == "linux" else 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense, bfloat16


def share_of_peak(args: argparse.Namespace, seconds: float) -> str:
    """MFU of a step: its FLOPs over what the GPU could do in its time; – where that is not known."""
    if args.device != "cuda":
        return "–"
    with torch.device("meta"):
        parameters = count_parameters({role: GPT(model_config(args, role)) for role in ("student", "teacher")})
    for card, peak in PEAK_FLOPS.items():
        if card in torch.cuda.get_device_name():
            flops_per_token = 6 * parameters["student"] + 2 * parameters["teacher"]
            return f"{flops_per_token * args.batch_size * args.block_size / seconds / peak:.0%}"
    return "–"


def run_in_a_process(name: str, args: argparse.Namespace) -> dict:
    """Return the numbers of an implementation, or {"failed": reason}."""
    keys = [f"--{key}={value}" for key, value in vars(args).items() if key != "run"]
    program = [__file__, *keys, f"--run={name}"]
    if name == "fsdp":
        world = torch.cuda.device_count() if args.device == "cuda" else 2
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "--", *program]
    shutil.rmtree(Path(args.folder) / "run", ignore_errors=True)  # of ours, or the round before
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True)
    if done.returncode == 0:
        result = json.loads(done.stdout.splitlines()[-1])
    elif re.search("out of memory|OutOfMemoryError|ALLOC_FAILED", done.stderr):
        result = {"failed": "out of memory"}
    elif name in PEERS:
        result = {"failed": done.stderr.strip().splitlines()[-1]}
    else:
        raise SystemExit(f"{name}:\n{done.stderr[-3000:]}")
    print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def compare(args: argparse.Namespace):
    # Run all that are installed, in turns.
    names = ["parts", "ours", "fsdp"]
    for name, package in PEERS.items():
        if importlib.util.find_spec(package):
            names.append(name)
        else:
            print(f"{package} is not installed: left out")
    results = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        prepare(args)
        for _ in range(args.rounds):
            for name in names:
                results[name].append(run_in_a_process(name, args))
        whole_logits = run_in_a_process("dense", args)

    # A failed run has no numbers.
    expected = whole_logits.get("loss", math.nan)
    ran = {name: runs for name, runs in results.items() if all("seconds" in run for run in runs)}

    # Print the table.
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores"
    print(f"{date.today()}, {machine}, {platform.machine()}, torch {torch.__version__}, {args.dtype}; teacher "
          f"{args.teacher}, student {args.student}, {args.vocab_size:,} ids, {args.batch_size} × {args.block_size} "
          f"tokens; first loss {expected:.4f}\n")
    floor = math.nan
    if "parts" in ran:
        floor = statistics.median(run["seconds"] for run in ran["parts"])
    print("| | step, s (minimum – maximum) | ratio to the parts | tokens/s | MFU | peak GiB |\n"
          "|---|---|---|---|---|---|")
    for name, runs in results.items():
        if name not in ran:
            reasons = {run["failed"] for run in runs if "failed" in run}
            print(f"| {name} | {', '.join(reasons)} | | | | |")
            continue
        seconds = [run["seconds"] for run in runs]
        middle = statistics.median(seconds)
        devices = runs[0].get("devices", 1)
        tokens_per_s = devices * args.batch_size * args.block_size / middle
        peak = statistics.median(run["peak"] for run in runs)
        label = name if devices == 1 else f"{name}, {devices} processes"
        print(f"| {label} | {middle:.3f} ({min(seconds):.3f} – {max(seconds):.3f}) | {middle / floor:.2f} | "
              f"{tokens_per_s:,.0f} | {share_of_peak(args, middle)} | {peak:.2f} |")
    if "parts" in ran:
        described = []
        for part in ran["parts"][0]["parts"]:
            seconds = statistics.median(run["parts"][part] for run in ran["parts"])
            described.append(f"{part} {seconds:.3f} s")
        print("\nParts: " + ", ".join(described))

    # They computed the same loss.
    tolerance = 1e-5 if args.dtype == "float32" else 0.02
    for name, runs in ran.items():
        loss = runs[0]["loss"]
        if loss is not None and not math.isnan(expected):
            assert abs(loss / expected - 1) < tolerance, f"{name}: first loss {loss}, by the dense equation {expected}"


def main():
    args = parse_arguments()
    if args.run:
        result = RUNS[args.run](args)
        result["peak"] = peak_gib(args.device)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
    else:
        compare(args)


if __name__ == "__main__":
    main()
