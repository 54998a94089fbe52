"""A whole training step beside the sum of its parts, a plain transformers loop and TRL's GKDTrainer.

    python tests/bench_step.py [--steps=12] [--device=cuda --dtype=bfloat16]      about five minutes on two cores

All of them train the same student from the same teacher on the same windows. Each runs in a fresh process, in turns,
three times over; a step's time is the median after warm-up.

- parts: what no step can do without, each measured alone: the teacher's forward pass, the student's forward and
  backward pass, the loss from hidden states to gradients, and the optimizer.
- ours: `distill.train`, as a run logs it: reading the data and clipping included.
- transformers: both models with AutoModelForCausalLM, cross-entropy + 0.2 · KL of whole logits, AdamW.
- trl: GKDTrainer with lmbda = 0 and beta = 0, so forward KL on the given text; it has no cross-entropy beside it.

The first step's loss (for trl its KL) is checked against the dense equation in the same run. What is not installed is
left out, and said.
"""

import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from data import TokenBins, Tokenizer, build_bins, option, parse_config, run_program
from distill import dense_distillation_loss, distillation_loss, make_optimizers, resolve_config, train
from model import GPT, GPTConfig
from sample_mixture import MixtureSampler

VOCAB, ROUNDS = 32_000, 3


@dataclass
class Config:
    """Keys of `python tests/bench_step.py`."""
    steps: int = option(12, "steps a run, of which a third warm up", least=3)
    batch_size: int = option(8, "windows a step", least=1)
    block_size: int = option(256, "tokens a window", least=8)
    teacher: str = option("8x512", "layers x width of the teacher")
    student: str = option("4x256", "layers x width of the student")
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("float32", "float32 or bfloat16")
    run: str = option("", "internal: one implementation, in this process")
    folder: str = option("", "internal: where models and bins lie")


def run_config(config: Config):
    folder = Path(config.folder)
    return resolve_config(
        teacher=str(folder / "teacher"), student=str(folder / "student"), data_dir=str(folder / "bins"), method="kd",
        out_dir=str(folder / "run"), resume="never", block_size=config.block_size, batch_size=config.batch_size,
        val_samples=1, interval=10**6, max_steps=config.steps, warmup_steps=1, lr=1e-4, min_lr=1e-4, save_every=0,
        device=config.device, dtype=config.dtype)


def prepare(config: Config):
    """Models with random weights, and bins of random ids: neither changes what a step costs."""
    folder, random = Path(config.folder), np.random.default_rng(0)
    for role in ("teacher", "student"):
        torch.manual_seed(len(role))
        sizes = GPTConfig.scratch(*map(int, getattr(config, role).split("x")), VOCAB, config.block_size)
        GPT(replace(sizes, tie_word_embeddings=False)).save_pretrained(folder / role)
    tokenizer = Tokenizer("random", VOCAB, 0, "<|endoftext|>", "random", decode=str, encode_batch=lambda texts: [
        random.integers(0, VOCAB, len(text)).astype(np.uint32) for text in texts])
    build_bins(folder / "bins", tokenizer, {name: lambda name=name: (f"{name} {i} " * 2000 for i in range(60))
                                            for name in ("one", "two")})


def batches(config: Config):
    """The windows of each step, as `train` draws them: (B, block_size + 1)."""
    bins = TokenBins(Path(config.folder) / "bins", config.block_size)
    sampler = MixtureSampler(bins.n_windows, config.batch_size, seed=0)
    for _ in range(config.steps):
        yield torch.from_numpy(bins.train_windows(*sampler.next_batch())).to(config.device)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median(times: list[float]) -> float:
    return statistics.median(times[len(times) // 3:])


def parts(config: Config) -> dict:
    dtype = getattr(torch, config.dtype)
    autocast = torch.autocast(config.device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    teacher = GPT.from_pretrained(Path(config.folder) / "teacher", dtype).to(config.device).requires_grad_(False)
    student = GPT.from_pretrained(Path(config.folder) / "student").to(config.device)
    optimizers, seconds, first = make_optimizers(student, run_config(config)), {}, None
    keep = lambda hidden, head: (hidden, head)  # noqa: E731
    for windows in batches(config):
        idx, targets, marks = windows[:, :-1], windows[:, 1:], [clock(config.device)]
        with autocast, torch.no_grad():
            given = teacher(idx, loss_fn=keep)
        marks.append(clock(config.device))
        with autocast:
            hidden, head = student(idx, loss_fn=keep)
        marks.append(clock(config.device))
        leaves = [part.detach().requires_grad_() for part in (hidden, head)]
        with autocast:
            loss = distillation_loss(*leaves, *given, targets)[0]
        loss.backward()
        marks.append(clock(config.device))
        torch.autograd.backward([hidden, head], [leaf.grad for leaf in leaves])
        marks.append(clock(config.device))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        marks.append(clock(config.device))
        first = loss.item() if first is None else first
        for part, start, end in zip(("teacher", "student forward", "loss", "student backward", "optimizer"), marks,
                                    marks[1:]):
            seconds.setdefault(part, []).append(end - start)
    medians = {part: median(times) for part, times in seconds.items()}
    return {"seconds": sum(medians.values()), "loss": first, "parts": medians}


def ours(config: Config) -> dict:
    train(run_config(config))
    lines = [json.loads(line) for line in open(Path(config.folder) / "run" / "metrics.jsonl")]
    steps = [line for line in lines if line["kind"] == "train"]
    tokens = config.batch_size * config.block_size
    return {"seconds": median([tokens / line["tokens_per_s"] for line in steps]), "loss": steps[0]["loss"]}


def their_models(config: Config):
    from transformers import AutoModelForCausalLM
    models = (AutoModelForCausalLM.from_pretrained(Path(config.folder) / role, dtype=getattr(torch, dtype))
              for role, dtype in (("teacher", config.dtype), ("student", "float32")))
    return [model.to(config.device) for model in models]


def transformers(config: Config) -> dict:
    teacher, student = their_models(config)
    optimizer, times, first = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True), [], None
    autocast = torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")
    start = clock(config.device)
    for windows in batches(config):
        idx, targets = windows[:, :-1], windows[:, 1:]
        with autocast:
            with torch.no_grad():
                teacher_logits = teacher(idx, use_cache=False).logits
            loss, _, _ = dense_distillation_loss(student(idx, use_cache=False).logits, teacher_logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first = loss.item() if first is None else first
        times.append(clock(config.device) - start)
        start = clock(config.device)
    return {"seconds": median(times), "loss": first}


def trl(config: Config) -> dict:
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    from datasets import Dataset
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    teacher, student = their_models(config)
    windows = torch.cat(list(batches(config)))

    class Clock(TrainerCallback):
        times, losses = [], []

        def on_step_begin(self, *arguments, **_):
            self.start = clock(config.device)

        def on_step_end(self, *arguments, **_):
            self.times.append(clock(config.device) - self.start)

        def on_log(self, arguments, state, control, logs=None, **_):
            self.losses += [logs["loss"]] if "loss" in logs else []

    def collate(rows):
        ids = torch.tensor([row["ids"] for row in rows])
        labels = ids.clone()
        labels[:, 0] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": ids[:, :1]}

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Fast(WordLevel({"a": 0}, "a")), pad_token="a", eos_token="a")
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, processing_class=tokenizer, data_collator=collate, callbacks=[Clock()],
        train_dataset=Dataset.from_dict({"ids": windows.tolist()}), args=GKDConfig(
            output_dir=str(Path(config.folder) / "trl"), max_steps=config.steps, lmbda=0.0, beta=0.0, temperature=1.0,
            per_device_train_batch_size=config.batch_size, learning_rate=1e-4, optim="adamw_torch_fused",
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=config.device == "cpu", shuffle_dataset=False,
            bf16=config.dtype == "bfloat16", gradient_checkpointing=False, disable_tqdm=True,
            lr_scheduler_type="constant"))
    trainer.train()
    return {"seconds": median(Clock.times), "loss": None}


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)


def compare(config: Config):
    names = ["parts", "ours", *(name for name in ("transformers", "trl") if importlib.util.find_spec(name))]
    results = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, folder=folder)
        prepare(config)
        words = [f"--{key}={value}" for key, value in vars(config).items() if key != "run"]
        for _ in range(ROUNDS):
            for name in names:
                command = [sys.executable, __file__, *words, f"--run={name}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{name}:\n{done.stderr[-3000:]}")
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
        windows = next(batches(config)).cpu()
        models = [GPT.from_pretrained(Path(folder) / role) for role in ("student", "teacher")]
        with torch.no_grad():
            dense = dense_distillation_loss(*(model(windows[:, :-1]) for model in models), windows[:, 1:])[0].item()
    within = 1e-5 if config.dtype == "float32" else 0.02
    for name, runs in results.items():
        for loss in (run["loss"] for run in runs if run["loss"] is not None):
            assert abs(loss / dense - 1) < within, f"{name}: the first loss is {loss}, by the dense equation {dense}"
    machine = torch.cuda.get_device_name() if config.device == "cuda" else f"{os.cpu_count()} cores"
    print(f"{date.today()}, {machine}, {platform.machine()}, torch {torch.__version__}, {config.dtype}; teacher "
          f"{config.teacher}, student {config.student}, {VOCAB:,} ids, {config.batch_size} × {config.block_size} "
          f"tokens; first loss {dense:.4f}\n")
    floor = statistics.median(run["seconds"] for run in results["parts"])
    print("| | step, s (least – most of 3) | ratio to the parts | tokens/s | peak GiB |\n|---|---|---|---|---|")
    for name, runs in results.items():
        seconds = sorted(run["seconds"] for run in runs)
        print(f"| {name} | {seconds[1]:.3f} ({seconds[0]:.3f} – {seconds[-1]:.3f}) | {seconds[1] / floor:.2f} | "
              f"{config.batch_size * config.block_size / seconds[1]:,.0f} | "
              f"{statistics.median(run['peak'] for run in runs):.2f} |")
    print("\nParts: " + ", ".join(f"{part} {statistics.median(run['parts'][part] for run in results['parts']):.3f} s"
                                  for part in results["parts"][0]["parts"]))
    for name in ("transformers", "trl"):
        if name not in names:
            print(f"{name} is not installed: left out")


def main():
    config = parse_config(Config)
    if not config.run:
        return compare(config)
    result = globals()[config.run](config)
    print(json.dumps({**result, "peak": peak_gib(config.device)}))


if __name__ == "__main__":
    run_program(main)
