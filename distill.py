"""DDK: distil a large language model (the teacher) into a small one (the student), domain by domain.

    python distill.py                                        the quickstart: text, teacher, student, DDK, a table
    python distill.py --method=kd                            another arm on the same bins and models
    python distill.py --teacher=DIR --student=DIR --data_dir=DIR    your own

The method is Alg. 1 of arXiv 2407.16154. Every K steps (`interval`) the student's perplexity is measured in each
domain and set against the teacher's; the domains where it is furthest behind get more of the next K steps' data. The
loss of each step is cross-entropy plus γ times the divergence from the teacher's predictions (Eq. 3).

A run's `out_dir` holds `config.json`, `metrics.jsonl` (one JSON object a line) and `step_00000400/` folders, which
open in transformers as they are. The same command again resumes from the newest whole one.
"""

import fcntl
import functools
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from data import (TokenBins, Tokenizer, UserError, attempt, blame, build_bins, digest, file_sha256, fsync,
                  import_optional, load_tokenizer, model_tokenizer, option, parse_config, print_config,
                  quickstart_domains, read_meta, run_program, save_tokenizer, saved_tokenizer, write_text)
from model import GPT, GPTConfig, read_config, resolve_device, weight_files
from sample_mixture import METHODS, MixtureSampler, doremi_update, interval_probs, next_factor, read_metrics

# ------------ Configuration -------------------------------------------------------------------------------------------

# Config's own defaults are the paper's: K, validation windows, learning rates, warm-up, steps, a batch of 500k tokens.
# It does not say block_size, weight_decay, grad_clip and AdamW's betas: those are ours, and so are the folders' names.
PAPER_DOMAINS = ("common_crawl,c4,stack,wikipedia,books,arxiv,stackexchange,chinese_books,chinese_common_crawl,"
                 "openwebmath")
PRESETS = {
    "qwen1.5-14b-1.8b": dict(teacher="models/Qwen1.5-14B", student="models/Qwen1.5-1.8B", domains=PAPER_DOMAINS),
    "qwen1.5-14b-4b": dict(teacher="models/Qwen1.5-14B", student="models/Qwen1.5-4B", domains=PAPER_DOMAINS),
    "qwen1.5-7b-1.8b": dict(teacher="models/Qwen1.5-7B", student="models/Qwen1.5-1.8B", domains=PAPER_DOMAINS),
    "llama2-13b-tinyllama-1.1b": dict(teacher="models/Llama-2-13b-hf", student="models/TinyLlama-1.1B",
                                      domains=PAPER_DOMAINS),
    "starcoder-15.5b-3b": dict(teacher="models/starcoder", student="models/starcoderbase-3b",
                               domains="python,java,typescript,c_sharp"),
    # A few minutes on two cores, the teacher's training included.
    "quickstart": dict(interval=25, val_samples=64, block_size=256, batch_size=16, max_steps=400, lr=1e-3, min_lr=1e-4,
                       warmup_steps=20, save_every=100),
}


@dataclass
class Config:
    """Keys of `python distill.py`. Where the paper gives a value, that is the default."""
    preset: Literal[("", "custom", *PRESETS)] = option(
        "", "a set of defaults; quickstart when neither teacher nor student is given, else custom")
    out_dir: str = option("", "the run's folder; out/PRESET-METHOD-SEED if empty")
    data_dir: str = option("", "the bins' folder, made by data.py; data/PRESET if empty")
    teacher: str = option("", "folder of the teacher, in Hugging Face's format")
    student: str = option("", "folder of the student; scratch:LxD for L new layers, D wide; layers:N of the teacher's")
    domains: str = option("", "name,name,… of the bins' domains; all if empty")
    method: Literal[METHODS] = option(
        "ddk", "ddk; ddk_no_fs: without factor smoothing (Eq. 1 every time); ddk_es: equal sampling. In the natural "
               "mixture: kd; minillm: teacher-forced reverse KL; ted: layers are compared too; cpt: no teacher in the "
               "loss. cpt_doremi: cpt by the mean of the weights that a doremi_proxy, made first, goes through")
    gamma: float = option(0.2, "γ, weight of the divergence from the teacher", least=0)
    temperature: float = option(1.0, "T, divides both models' logits in the divergence", least=1e-3)
    alpha: float = option(0.5, "α, how much of r follows the discrepancies; the rest is uniform", least=0, most=1)
    interval: int = option(1000, "K, steps between two updates of r", least=1)
    val_samples: int = option(500, "validation windows a domain", least=1)
    stop_ratio: float = option(0.0, "end once no domain's perplexity ratio is above this; 0: never", least=0)
    mixture: str = option("", "base proportions instead of the natural ones: name=weight,… or a .json of them")
    filter_steps: int = option(0, "ted: steps that train the layers' filters first; 0: a tenth of max_steps", least=0)
    filter_weight: float = option(0.1, "ted: weight of the distance between filtered layers", least=0)
    block_size: int = option(2048, "tokens a window", least=1)
    batch_size: int = option(256, "windows a step, over all ranks and micro-batches", least=1)
    micro_batch_size: int = option(0, "windows a forward pass; 0: a rank's whole share", least=0)
    max_steps: int = option(30_000, "updates; 0 only evaluates", least=0)
    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: for the hidden matrices, AdamW for the rest")
    lr: float = option(3e-5, "learning rate after warm-up", least=0)
    min_lr: float = option(3e-6, "learning rate at the last step", least=0)
    warmup_steps: int = option(1000, "steps from 0 to lr", least=0)
    weight_decay: float = option(0.1, "on matrices only", least=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping", least=0)
    seed: int = option(0, "order of the data, and initial weights from scratch", least=0)
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of the products; auto: bfloat16 on cuda")
    compile: Literal["auto", "true", "false"] = option("auto", "torch.compile; auto: on cuda")
    device: str = option("auto", "auto: cuda, then mps, then cpu")
    parallel: Literal["auto", "none", "ddp", "fsdp"] = option(
        "auto", "under torchrun; auto: fsdp (FSDP2) on GPUs, ddp on CPUs and with muon")
    shard_teacher: bool = option(True, "with fsdp, the teacher is sharded too; false: whole on every device")
    checkpoint_activations: bool = option(False, "recompute a block's activations in its backward pass: less memory")
    timeout: float = option(30, "minutes after which a rank that hears nothing from the others gives up", least=0.1)
    save_every: int = option(1000, "steps between two checkpoints; 0: the last step only", least=0)
    export_dtype: Literal["fp32", "bf16"] = option("fp32", "of the weights in a checkpoint's model.safetensors")
    keep: int = option(2, "newest checkpoints to keep; 0: all", least=0)
    resume: Literal["auto", "never"] = option("auto", "never: set the run in out_dir aside and start anew")
    tensorboard: bool = option(False, "write the metrics for TensorBoard too, into out_dir")
    wandb: bool = option(False, "send the metrics to Weights & Biases too")
    log_every: int = option(10, "steps between two lines of progress", least=1)
    dry_run: bool = option(False, "only check, and print what the run would take; no weights are read")
    pretrain_steps: int = option(600, "quickstart: steps of its teacher; its student base trains half as many", least=1)

    def problems(self) -> list[str]:
        makes_models, made = self.preset == "quickstart", self.student.partition(":")[0] in ("scratch", "layers")
        domains, launched = self.domains.split(","), "RANK" in os.environ
        world = int(os.environ.get("WORLD_SIZE", 1)) if launched or self.dry_run else 1
        problems = [message for wrong, message in (
            *((folder and not os.path.isdir(folder), f"--{key}={folder}: no such folder")
              for key, folder in (("teacher", self.teacher), ("student", "" if made else self.student))),
            (made and not re.fullmatch(r"scratch:[1-9]\d*x(?!0)\d*[02468]|layers:[1-9]\d*", self.student),
             f"--student={self.student}: write scratch:LxD with D even, as in scratch:4x128, or layers:N"),
            (self.student.startswith("layers:") and not self.teacher and not makes_models,
             f"--student={self.student}: layers of which --teacher? Name its folder"),
            (not self.student and not makes_models, "--student: name its folder, scratch:LxD or layers:N"),
            (not makes_models and not os.path.isdir(self.data_dir),
             f"--data_dir={self.data_dir}: no such folder; make bins there with data.py"),
            (self.method not in ("cpt", "cpt_doremi") and not self.teacher and not makes_models,
             f"--teacher: method={self.method} needs one; name its folder (only cpt and cpt_doremi go without)"),
            (self.stop_ratio and not self.teacher and not makes_models,
             f"--stop_ratio={self.stop_ratio}: a ratio needs a teacher; name its folder with --teacher"),
            (self.min_lr > self.lr, f"--min_lr={self.min_lr}: must not be above lr={self.lr}"),
            (self.parallel == "none" and world > 1, f"--parallel=none: there are {world} processes; take ddp or fsdp"),
            (self.parallel in ("ddp", "fsdp") and not (launched or self.dry_run),
             f"--parallel={self.parallel}: start with torchrun --nproc_per_node=N distill.py"),
            (launched and ":" in self.device, f"--device={self.device}: each process takes its own; leave the number"),
            (launched and self.device in ("auto", "cuda") and torch.cuda.is_available()
             and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count(),
             f"--device={self.device}: fewer GPUs than processes here; start fewer, or take --device=cpu"),
            (self.parallel == "fsdp" and self.optimizer == "muon", "--optimizer=muon: not with fsdp; take ddp"),
            (self.parallel == "fsdp" and self.method == "ted", "--method=ted: not with fsdp; take ddp"),
            (self.method == "cpt_doremi" and self.student.startswith("layers:"),
             f"--student={self.student}: cpt_doremi starts three runs from it; name the folder of such a model"),
            (self.mixture and self.method == "cpt_doremi", f"--mixture={self.mixture}: cpt_doremi finds its own"),
            (os.path.isfile(self.out_dir), f"--out_dir={self.out_dir}: is a file; name a folder"),
            (self.resume == "never" and any(Path(name or ".").resolve().is_relative_to(Path(self.out_dir).resolve())
                                            for name in (self.teacher, self.student, self.data_dir)),
             f"--out_dir={self.out_dir}: holds the data, the teacher or the student; name another folder"),
            (len(set(domains)) < len(domains), f"--domains={self.domains}: name each once"),
            (self.mixture and self.method == "ddk_es", f"--mixture={self.mixture}: ddk_es draws all domains alike"),
            (makes_models and not (self.teacher and self.student) and PRESETS["quickstart"]["batch_size"] % world,
             f"--nproc_per_node={world}: the quickstart trains its models on {PRESETS['quickstart']['batch_size']} "
             "windows a step, which must be a multiple of the processes"),
            (self.batch_size % (max(1, self.micro_batch_size) * world),
             f"--batch_size={self.batch_size}: must be a multiple of micro_batch_size={self.micro_batch_size or 1}"
             + f" × {world} processes" * (world > 1)),
        ) if wrong]
        attempt(problems, parse_mixture, self.mixture)
        attempt(problems, resolve_device, self.device)
        for name in ("tensorboard", "wandb"):
            if getattr(self, name):
                attempt(problems, import_optional, name, f"--{name}")
        return problems


def resolve_config(**given) -> Config:
    """A whole Config from the keys given: the preset's values below them, then what is derived from others."""
    chosen = given.get("preset") or ("custom" if given.get("teacher") or given.get("student") else "quickstart")
    config = Config(**{**PRESETS.get(chosen, {}), **given, "preset": chosen})
    return replace(config, data_dir=config.data_dir or f"data/{chosen}",
                   out_dir=config.out_dir or f"out/{chosen}-{config.method}-{config.seed}")


def mixture_text(given: str) -> str:
    """`name=weight,…`, also from a .json file of them."""
    if not given.endswith(".json"):
        return given
    return ",".join(f"{name}={weight}" for name, weight in json.loads(Path(given).read_text("utf-8")).items())


def parse_mixture(text: str) -> dict[str, float]:
    """`name=weight,…`, or what a .json file of that holds, as a dict; {} if empty."""
    try:
        parts = [part.split("=") for part in mixture_text(text).split(",") if text]
        weights = {name: float(weight) for name, weight in parts}
        if not all(0 <= weight < math.inf for weight in weights.values()) or text and not any(weights.values()):
            raise ValueError
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"--mixture={text}: write name=weight,… with weights ≥ 0, not all 0, or name a .json file that "
                        "holds such an object") from None
    return weights


# ------------ Eq. 3 ---------------------------------------------------------------------------------------------------

def dense_distillation_loss(student_logits, teacher_logits, targets, *, gamma: float = 0.2, temperature: float = 1.0,
                            direction: str = "forward", vocab_size: int | None = None, num_tokens=None):
    """Eq. 3: CE(student, next token) + γ · KL(softmax(z_T/T) ‖ softmax(z_S/T)), mean per token → (loss, ce, kl).

    student_logits (…, V_S), teacher_logits (…, V_T) or None (kl is 0), targets (…) already shifted, −100 ignored.
    The divergence is over the first `vocab_size` ids (default: the fewer rows), both logits cut before the softmax; CE
    is over all the student's rows, which keeps padded ids unlikely. No T² factor. `direction` forward puts the teacher
    first, as Eq. 3 does; reverse the student, as MiniLLM does. Sums are divided by `num_tokens` (default: the targets
    that count). ce and kl are detached. ValueError on another direction, or a vocab_size beyond a head's rows."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction {direction!r} must be forward or reverse")
    counted = targets != -100
    num_tokens = counted.sum().clamp(min=1) if num_tokens is None else num_tokens
    student_logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    ce = F.cross_entropy(student_logits.flatten(0, -2), targets.flatten(), reduction="sum") / num_tokens
    if teacher_logits is None:
        return ce, ce.detach(), torch.zeros_like(ce)
    rows = min(student_logits.shape[-1], teacher_logits.shape[-1])
    if (vocab_size := vocab_size or rows) > rows:
        raise ValueError(f"vocab_size {vocab_size} is more than the {rows} rows of a head")
    log_q = F.log_softmax(student_logits[..., :vocab_size] / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.detach()[..., :vocab_size].to(student_logits.dtype) / temperature, dim=-1)
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).where(counted, 0).sum() / num_tokens
    return ce + gamma * kl, ce.detach(), kl.detach()


def exponentials(z, T: float = 1.0):
    """z (n, V) → (z − max z)/T as z, its exp and the sum of that: softmax is exp / sum, log softmax z − log sum."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z - z.amax(dim=-1, keepdim=True)
    z = z if T == 1 else z * (1 / T)
    e = z.exp()
    return z, e, e.sum(dim=-1, keepdim=True)


def eq3_rows(z_S, z_T, targets, counted, gamma, T, direction, vocab_size, wants_gradient):
    """Sums of CE and KL over n tokens, from logits (n, V_S) and (n, V_T) or None. The gradient takes the place of z_S.

    With s = softmax(z_S) over all rows, p = softmax(z_T/T) and q = softmax(z_S/T) over vocab_size ids:
        ∂CE/∂z_S = s − onehot(target)
        forward:  KL = Σ p (log p − log q)    ∂KL/∂z_S = (q − p) / T
        reverse:  KL = Σ q (log q − log p)    ∂KL/∂z_S = q ⊙ (log q − log p − KL) / T
    targets and counted are (n, 1); counted is a token's weight, mostly 1, or 0 where the target is ignored."""
    z, e, total = exponentials(z_S)
    # Not from z: a gather from what is made here would keep torch.compile from fusing the passes.
    z_target = z_S.gather(-1, targets).to(z.dtype) - z_S.amax(dim=-1, keepdim=True)
    ce, kl = total.log() - z_target, torch.zeros_like(total)
    if z_T is not None:
        q_is_s = T == 1 and vocab_size == z_S.shape[-1]
        z_q, e_q, total_q = (z, e, total) if q_is_s else exponentials(z_S[:, :vocab_size], T)
        z_p, e_p, total_p = exponentials(z_T[:, :vocab_size], T)
        gap, offset = z_q - z_p, (total_p / total_q).log()  # log q − log p is gap + offset
        if direction == "forward":
            kl = -(e_p * gap).sum(dim=-1, keepdim=True) / total_p - offset
        else:
            kl = (e_q * gap).sum(dim=-1, keepdim=True) / total_q + offset
    if wants_gradient:
        # As a comparison in the same pass, and in float32, since in bfloat16 0.999 − 1 would be 0.
        onehot = torch.arange(z_S.shape[-1], device=z_S.device) == targets
        gradient = e * (counted / total) - counted * onehot
        if z_T is not None:
            weight = counted * gamma / T
            of_kl = e_q * (weight / total_q)
            of_kl = of_kl - e_p * (weight / total_p) if direction == "forward" else of_kl * (gap + (offset - kl))
            gradient = gradient + F.pad(of_kl, (0, z_S.shape[-1] - vocab_size))
        z_S.copy_(gradient)
    return torch.stack(((counted * ce).sum(), (counted * kl).sum()))


@functools.cache
def compiled_eq3_rows():
    """eq3_rows with its passes over the logits fused; as it stands, said once, where torch.compile does not work."""
    choices = [torch.compile(eq3_rows), eq3_rows]

    def rows(*args):
        try:
            return choices[0](*args)
        except Exception as error:
            if len(choices) == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(f"torch.compile does not work here; the loss is slower without: {str(error)[:300]}")
            del choices[0]
            return rows(*args)
    return rows


class FusedEq3(torch.autograd.Function):
    """Eq. 3 whose forward pass makes the gradients too, chunk by chunk, while the logits are there."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, weights, num_tokens, chunk_size, *settings):
        # The head's gradient, a sum over chunks, is at least float32 whatever the head is.
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        of_head = head.new_zeros(head.shape, dtype=torch.promote_types(
            head.dtype, torch.float32)) if ctx.needs_input_grad[1] else None
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, head, teacher_hidden, teacher_head = (
                x if x is None else x.to(dtype) for x in (hidden, head, teacher_hidden, teacher_head))
        counted = (targets != -100).to(torch.promote_types(hidden.dtype, torch.float32)) * weights
        targets, losses = targets.clamp(min=0), counted.new_zeros(2)
        # Compiling takes seconds, too long for little. A CPU takes as many rows at a time as its cache holds.
        eq3 = compiled_eq3_rows() if hidden.is_cuda or len(targets) * len(head) > 2**24 else eq3_rows
        n_rows = chunk_size if hidden.is_cuda else torch.get_num_threads() * max(1, 2**20 // len(head))
        logits_S, logits_T = (x if x is None else x.new_empty(chunk_size, len(x)) for x in (head, teacher_head))
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            z_S = torch.mm(hidden[chunk], head.T, out=logits_S[:len(targets[chunk])])
            z_T = None if teacher_head is None else torch.mm(
                teacher_hidden[chunk], teacher_head.T, out=logits_T[:len(z_S)])
            for rows in (slice(first, first + n_rows) for first in range(0, len(z_S), n_rows)):
                losses += eq3(z_S[rows], None if z_T is None else z_T[rows], targets[chunk][rows],
                              counted[chunk][rows], *settings, any(ctx.needs_input_grad))
            if of_hidden is not None:  # from here on z_S is ∂loss/∂z_S
                of_hidden[chunk] = z_S @ head
            if of_head is not None and of_head.dtype == z_S.dtype:
                of_head.addmm_(z_S.T, hidden[chunk])
            elif of_head is not None:
                of_head += z_S.T @ hidden[chunk]
        ctx.save_for_backward(of_hidden, of_head)
        ctx.num_tokens, (ce, kl) = num_tokens, losses / num_tokens
        ctx.mark_non_differentiable(ce, kl)
        return ce + settings[0] * kl, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss, *_):
        return *(x if x is None else x.mul_(of_loss / ctx.num_tokens) for x in ctx.saved_tensors), *[None] * 10


def distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, *, gamma: float = 0.2,
                      temperature: float = 1.0, direction: str = "forward", vocab_size: int | None = None,
                      num_tokens=None, chunk_size: int | None = None, token_weights=None):
    """Eq. 3 from hidden states (…, d) and heads (V, d), never holding the logits of all tokens or making them twice.

    The rest is dense_distillation_loss's. Logits are made for `chunk_size` tokens at a time; by default for as many
    as give 2²⁸ of them on CUDA, elsewhere for 512, or fewer where the head is large. Gradients reach student_hidden
    and student_head, once. `token_weights`, as many as targets, multiply each token's terms; give `num_tokens` with
    them."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction {direction!r} must be forward or reverse")
    rows = min(len(head) for head in (student_head, teacher_head) if head is not None)
    if (vocab_size := vocab_size or rows) > rows:
        raise ValueError(f"vocab_size {vocab_size} is more than the {rows} rows of a head")
    if not torch.is_grad_enabled():  # what the Function cannot see
        student_hidden, student_head = student_hidden.detach(), student_head.detach()
    hidden, targets = student_hidden.flatten(0, -2), targets.reshape(-1, 1)
    token_weights = 1 if token_weights is None else token_weights.reshape(-1, 1)
    teacher_hidden = None if teacher_hidden is None else teacher_hidden.flatten(0, -2)
    num_tokens = (targets != -100).sum().clamp(min=1) if num_tokens is None else num_tokens
    most = 2**28 // len(student_head) if hidden.is_cuda else min(512, 52 * 10**6 // len(student_head))
    chunk_size = max(1, min(chunk_size or most, len(targets)))
    return FusedEq3.apply(hidden, student_head, teacher_hidden, teacher_head, targets, token_weights, num_tokens,
                          chunk_size, gamma, temperature, direction, vocab_size)


# ------------ The optimizers ------------------------------------------------------------------------------------------

def learning_rate(step: int, config: Config) -> float:
    """Of the update after `step` finished ones: linear up to lr in warmup_steps, then cosine to min_lr at the last."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    last = config.max_steps - 1
    progress = (step - config.warmup_steps) / (last - config.warmup_steps) if last > config.warmup_steps else 1.0
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW with decay on matrices only; with optimizer=muon, the blocks' matrices go to Muon instead."""
    hidden = [p for p in model.layers.parameters() if p.dim() == 2] if config.optimizer == "muon" else []
    others = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in hidden)]
    adamw = torch.optim.AdamW([{"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
                               {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}],
                              lr=config.lr, betas=(0.9, 0.95), fused=True)
    # match_rms_adamw scales Muon's steps to AdamW's usual size, so that one learning rate serves both.
    muon = dict(lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, torch.optim.Muon(hidden, **muon)] if hidden else [adamw]


# ------------ Many processes ------------------------------------------------------------------------------------------

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def over_ranks(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The ranks' `values` summed, or as `op` says, on every rank."""
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values, op)
    return values


def on_rank_0(make: Callable):
    """What `make()` returns on rank 0, on every rank. A UserError or OSError there ends all, and rank 0 tells it."""
    result = [None]
    if rank() == 0:
        try:
            result = [make()]
        except BrokenPipeError:  # for run_program
            raise
        except (UserError, OSError) as error:
            result = [UserError(str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        refuse(str(result[0]))
    return result[0]


def refuse(message: str):
    """End all ranks, which know the same; rank 0 tells it."""
    if rank():
        time.sleep(3)  # torchrun ends all as soon as one ends: not before rank 0 has spoken
        sys.exit(2)
    raise UserError(message)


@contextmanager
def process_group(config: Config):
    """torch.distributed while the context lasts, if torchrun started this process. Rank 0 alone prints."""
    if "RANK" not in os.environ:
        yield
        return
    cuda, status = resolve_device(config.device).type == "cuda", 0
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=config.timeout))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank() else nullcontext():
            yield
            dist.barrier()
    except SystemExit as stop:
        status = stop.code
    except RuntimeError as error:
        if not re.search("gloo|nccl|connection|timed out", str(error), re.IGNORECASE):
            raise
        raise UserError(f"another process is gone, or silent for {config.timeout} minutes "
                        f"({str(error).splitlines()[0]}); the same command goes on from the last checkpoint") from None
    if not cuda:  # gloo's threads sometimes abort a process that ends as usual
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()
    sys.exit(status)


def load_model(source: str, config: Config, sizes: GPTConfig, dtype: torch.dtype) -> GPT:
    """The model that `source` names, a folder, scratch:LxD or layers:N: whole on rank 0, on the others its sizes."""
    kind, _, size = source.partition(":")
    with torch.device("meta"):
        model = GPT(sizes).to(dtype)

    def load():
        nonlocal model
        if kind == "scratch":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = GPT(sizes)
        elif kind == "layers":
            model = GPT.from_pretrained(config.teacher, dtype, layers=int(size))
        else:
            model = GPT.from_pretrained(source, dtype)

    on_rank_0(load)
    return model


def recomputed(forward: Callable) -> Callable:
    # A function, since torch.compile would leave a functools.partial as it is.
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def can_shard(config: Config) -> bool:
    """Whether the student's tensors are spread over the GPUs, where `parallel` leaves it open."""
    return config.optimizer == "adamw" and config.method != "ted"


def resolve_auto(config: Config) -> Config:
    """`config` with what this machine and these processes make of each `auto`, and of a mixture's file."""
    device = resolve_device(config.device)
    on_cuda = device.type == "cuda"
    choices = {"device": str(device), "dtype": "bfloat16" if on_cuda else "float32",
               "compile": "true" if on_cuda else "false",
               "parallel": "none" if not dist.is_initialized() else "fsdp" if on_cuda and can_shard(config) else "ddp"}
    return replace(config, mixture=mixture_text(config.mixture),
                   **{key: choice for key, choice in choices.items() if getattr(config, key) == "auto"})


def spread(model: GPT, config: Config, device: torch.device, shard: bool):
    """Put load_model's result on every rank's `device`: whole, or a share of each tensor.

    FSDP2 gathers a block, or what lies outside the blocks, while it computes, as the dtype of the products; gradients
    are reduced in float32. Without `cast_forward_inputs` the rotary tables stay float32."""
    for layer in model.layers:
        if config.checkpoint_activations:
            layer.forward = recomputed(layer.forward)
        if config.compile == "true":
            layer.compile()  # in place: names, saving and loading stay as they are
    if not dist.is_initialized():
        model.to(device)
        return
    whole = model.state_dict() if rank() == 0 else {}
    model.to("meta")
    if shard:
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for part in [*model.layers, model]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    set_model_state_dict(model, whole, options=whole_tensors())


def whole_tensors(cpu_offload: bool = False) -> StateDictOptions:
    """A checkpoint holds whole tensors, which rank 0 reads and writes: any number of ranks can go on from it."""
    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload, broadcast_from_rank0=dist.is_initialized())


# ------------ Evaluation: ℓ_S and ℓ_T ---------------------------------------------------------------------------------

def validation_windows(bins: TokenBins, count: int) -> dict[str, torch.Tensor]:
    """The first `count` of each domain's validation, (count, block_size + 1) int64. UserError if there are fewer."""
    return {name: torch.from_numpy(bins.val_windows(name, count)) for name in bins.names}


@torch.no_grad()
def perplexities(model: GPT, windows: dict[str, torch.Tensor], vocab_size: int, batch: int, autocast=nullcontext(),
                 stopped: Callable[[], int] = lambda: 0) -> dict[str, float]:
    """exp of the mean next-token cross-entropy over each domain's windows (n, block_size + 1): the paper's ℓ.

    Over the tokenizer's ids alone (`vocab_size`), for teacher and student alike, `batch` windows a rank at a time.
    Draws no random number. {} as soon as `stopped()`, asked after each batch, is not 0."""
    device, ppl = model.head_weight.device, {}
    for name, domain in windows.items():
        total = torch.zeros((), dtype=torch.float64)
        for rows in domain.split(batch * world_size()):
            mine = rows[rank()::world_size()]
            # FSDP needs equally many forward passes on all ranks: one without windows makes one that counts nothing.
            idx = (mine if len(mine) else rows[:1])[:, :-1].to(device)
            targets = (mine[:, 1:] if len(mine) else torch.full_like(rows[:1, 1:], -100)).to(device)
            with autocast:
                _, ce, _ = model(idx, loss_fn=lambda hidden, head: distillation_loss(
                    hidden, head[:vocab_size], None, None, targets, num_tokens=1))
            total += ce.cpu().double()
            if stopped():
                return {}
        mean = over_ranks(total).item() / domain[:, 1:].numel()
        if not math.isfinite(mean):
            refuse(f"domain {name}: a model's loss is {mean}; its weights are damaged, or dtype is too coarse")
        ppl[name] = math.exp(min(mean, 700.0))
    return ppl


def teacher_perplexities(identity: str, cache: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """ℓ_T, measured once: kept in `cache` under `identity`, which stands for teacher, bins, windows and precision."""
    def read() -> dict:
        try:
            return {**json.loads(cache.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError):
            return {}

    ppl = on_rank_0(lambda: read().get(identity))
    if not ppl and (ppl := measure()) and rank() == 0:
        try:
            write_text(cache, json.dumps({**read(), identity: ppl}, indent=1))
        except OSError as error:
            print(f"note: {cache} cannot be written ({error.strerror}); the teacher will be measured again next time")
    return ppl


# ------------ Checkpoints ---------------------------------------------------------------------------------------------

@dataclass
class TrainState:
    """All that a run goes on from, besides weights and optimizers. JSON-able."""
    step: int = 0  # finished updates
    evaluated: int = -1  # the step at which the student was last measured
    factor: list[float] | None = None  # r_t
    sampler: dict | None = None  # MixtureSampler.state_dict()
    first_domains: dict | None = None  # what was measured at t = 0, as in the mixture line
    domains: dict | None = None  # … and last
    doremi: dict | None = None  # of a proxy: α "weights", λ "excess", and the "total" of α over the steps


def save_checkpoint(folder: Path, model: GPT, optimizers: list[torch.optim.Optimizer], state: TrainState,
                    bins: TokenBins, export_dtype: str):
    """Write a model's folder with optimizer.pt, train_state.json and manifest.json under a temporary name, sync all of
    it to disk, then rename: it is whole or not there. An `export_dtype` that rounds the weights, or filters that are
    not exported, leave the exact ones in optimizer.pt. All ranks call it, rank 0 writes."""
    whole = whole_tensors(cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    # Asked before the first update, an optimizer makes up a state in which it has made one.
    moments = get_optimizer_state_dict(model, optimizers, options=whole) if state.step else None
    if rank():
        return
    temporary = folder.with_name(folder.name + ".tmp")  # not there: newest_checkpoint cleared what a killed run left
    try:
        model.save_pretrained(temporary, {"fp32": torch.float32, "bf16": torch.bfloat16}[export_dtype], weights)
        exact = export_dtype != "fp32" or hasattr(model, "filters")
        torch.save({"optimizer": moments, "weights": weights if exact else None}, temporary / "optimizer.pt")
        save_tokenizer(temporary, bins)
        write_text(temporary / "train_state.json", json.dumps(asdict(state), indent=1))
        manifest = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library's way to say that the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder}: cannot be saved ({error}); make room, and the same command goes on from the "
                        "checkpoint before it") from None
    old = folder.with_name(folder.name + ".old")
    if folder.exists():  # saved when a signal cut this step's evaluation short
        os.replace(folder, old)
    os.replace(temporary, folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(out_dir: Path) -> list[Path]:
    """Checkpoint folders, the newest last."""
    return sorted(path for path in out_dir.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name) and path.is_dir())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files against its manifest; None if nothing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        wrong = [name for name, sha256 in manifest.items()
                 if not sha256 or (folder / name).parent != folder or file_sha256(folder / name) != sha256]
        wrong += sorted({"config.json", "model.safetensors", "optimizer.pt", "train_state.json"} - set(manifest))
    except (OSError, ValueError, AttributeError, TypeError):
        wrong = ["manifest.json"]
    return f"{', '.join(wrong)} missing or changed" if wrong else None


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and set aside as corrupt_step_…."""
    for old in out_dir.glob("step_*.old"):
        if not old.with_suffix("").exists():  # killed between save_checkpoint's two renames
            os.replace(old, old.with_suffix(""))
    for left in [*out_dir.glob("step_*.tmp"), *out_dir.glob("step_*.old")]:
        shutil.rmtree(left)
    for folder in reversed(checkpoints(out_dir)):
        if not (wrong := damage(folder)):
            return folder
        aside = free_name(folder.with_name(f"corrupt_{folder.name}"))
        os.replace(folder, aside)
        print(f"WARNING: {folder}: {wrong}; set aside as {aside.name}; the one before it, if any, is used")
    return None


AS_SAVED = "not as a run saves it; delete this step's folder, and the one before it is used"


def read_state(folder: Path) -> TrainState:
    """The training state of a checkpoint. UserError if it is not of this folder's step."""
    path = folder / "train_state.json"
    with blame(path, AS_SAVED):
        state = TrainState(**json.loads(path.read_text(encoding="utf-8")))
        if f"step_{state.step:08d}" != folder.name:
            raise ValueError(f"step {state.step}")
        return state


def read_optimizer(folder: Path, model: GPT) -> dict:
    """A checkpoint's optimizer.pt, of which tensors alone are unpickled. UserError if it is not of this model."""
    path = folder / "optimizer.pt"
    with blame(path, AS_SAVED):
        try:
            saved = torch.load(path, weights_only=True)
        except pickle.UnpicklingError:  # its message advises to unpickle everything
            raise ValueError("holds more than tensors") from None
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if saved["optimizer"] and set(saved["optimizer"]["state"]) != trained:
            raise ValueError("moments of other parameters")
        return saved


# ------------ Starting, resuming, and what is written -----------------------------------------------------------------

# Keys that do not change the experiment; folders are compared by content
FREE_KEYS = {"preset", "out_dir", "data_dir", "teacher", "student", "micro_batch_size", "compile", "device", "parallel",
             "save_every", "keep", "resume", "log_every", "pretrain_steps", "export_dtype", "dry_run", "shard_teacher",
             "checkpoint_activations", "timeout", "tensorboard", "wandb"}
CE_ONLY = ("cpt", "cpt_doremi", "doremi_proxy")  # methods whose loss has no divergence


@contextmanager
def locked(folder: Path):
    """Hold a folder, made if missing, for this process alone. UserError if another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is at work there; wait for it, or name another folder") from None
        yield
    finally:
        os.close(descriptor)


def free_name(path: Path) -> Path:
    """`path`, or with .1, .2, … behind it if that exists."""
    names = (path.with_name(f"{path.name}.{n}" if n else path.name) for n in itertools.count())
    return next(name for name in names if not name.exists())


def model_content(folder: str) -> str:
    """Identity of a model, whatever its folder is called: from its config.json and weights."""
    files = [Path(folder) / "config.json", *weight_files(Path(folder))]
    return digest(*((path.name, file_sha256(path)) for path in files))


def check_same_experiment(out_dir: Path, record: dict):
    """UserError if `out_dir` holds a run of another configuration or content than `record`, naming what differs."""
    path = out_dir / "config.json"
    with blame(path, "not as a run writes it; name another --out_dir"):
        before = json.loads(path.read_text(encoding="utf-8"))
        config, content = {**asdict(Config()), **before["config"]}, {**before["content"]}  # keys may be new since then
    changed = [f"--{key}={value}: the run in {out_dir} has {key}={config.get(key)}"
               for key, value in record["config"].items() if key not in FREE_KEYS and value != config.get(key)]
    changed += [f"--{key}={record['config'][key]}: another content than the run in {out_dir} has with "
                f"{key}={config.get(key)}" for key, value in record["content"].items() if value != content.get(key)]
    if changed:
        raise UserError("\n".join([*changed, f"--out_dir={out_dir}: keep its run's values, name another folder, or set "
                                             "the run aside with --resume=never"]))


def rewind_metrics(path: Path, state: TrainState):
    """Drop what a run wrote after the checkpoint that it now goes on from."""
    with blame(path, "delete the line that no run wrote"):
        kept = [line for line in read_metrics(path)
                if line["step"] <= (state.evaluated if line["kind"] == "mixture" else state.step)
                and line["kind"] != "end"]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def environment() -> dict:
    """Versions that a result may depend on, and the git revision of this file if it has one."""
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else None
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__, "git": git or None}


def first_difference(ours: Tokenizer, theirs: Tokenizer, bins: TokenBins) -> str | None:
    """Where two tokenizers of unequal fingerprints part, for the message that says so.

    tiktoken's settings cannot be set against those of a tokenizer.json. So of such two, None: they are taken for one
    if they agree on all ids, and encode alike all ids' text in a row, and each domain's first window."""
    for i in range(max(ours.vocab_size, theirs.vocab_size)):
        texts = [tokenizer.decode([i]) if i < tokenizer.vocab_size else None for tokenizer in (ours, theirs)]
        if texts[0] != texts[1]:
            return f"id {i} is {texts[0]!r} in the bins, {texts[1]!r} there"
    if bool(ours.files) == bool(theirs.files) or "bytes" in (ours.name, theirs.name):
        return "the ids are alike, but merges, added tokens, normaliser or pre-tokenizer are not"
    for ids in (np.arange(ours.vocab_size), *bins.train_windows(np.arange(N := len(bins.names)), np.zeros(N, int))):
        text = ours.decode(ids.tolist())
        encoded = [tokenizer.encode_batch([text])[0].tolist() for tokenizer in (ours, theirs)]
        if encoded[0] != encoded[1]:
            return f"the ids are alike, but {text[-40:]!r} and what is before it are encoded in two ways"
    return None


def model_problems(role: str, folder: str, model: GPTConfig, bins: TokenBins) -> Iterator[str]:
    """Why a model cannot read the bins' windows, or has another tokenizer in its `folder` than they."""
    if model.vocab_size < bins.vocab_size:
        yield (f"--{role}={folder}: has {model.vocab_size} ids, but the bins' tokenizer has {bins.vocab_size}; make "
               "the bins anew with this model's tokenizer")
    if model.context < bins.block_size:
        yield f"--block_size={bins.block_size}: the {role} in {folder} reads at most {model.context} tokens"
    if not os.path.isdir(folder):  # made from scratch or of the teacher's layers
        return
    anew = f"Make the bins anew with data.py --tokenizer={folder}"
    try:
        tokenizer = model_tokenizer(Path(folder), bins.tokenizer["eot_token"])
    except UserError as error:
        lacks_eot = "--eot=" in str(error)
        yield f"--{role}={folder}: {error}" + f". So its tokenizer is not that of the bins. {anew}" * lacks_eot
        return
    if tokenizer is None:
        print(f"WARNING: --{role}={folder} has no tokenizer files; its vocabulary covers the bins' ids, so it is taken")
    elif tokenizer.fingerprint != bins.tokenizer["fingerprint"]:
        if difference := first_difference(saved_tokenizer(bins.dir, bins.tokenizer), tokenizer, bins):
            yield (f"--{role}={folder}: its tokenizer ({tokenizer.name}, {tokenizer.vocab_size} ids) is not the bins' "
                   f"({bins.tokenizer['name']}, {bins.vocab_size} ids): {difference}. {anew}")
        else:
            print(f"note: --{role}={folder}: its tokenizer {tokenizer.name} is taken for the bins' "
                  f"{bins.tokenizer['name']}: they agree on all ids, and on how text is encoded as far as was tried")


def model_config(source: str, bins: TokenBins, teacher: GPTConfig | None) -> GPTConfig:
    """Sizes of the model that `teacher` or `student` names: a folder, scratch:LxD or layers:N of the teacher's."""
    kind, _, size = source.partition(":")
    if kind == "scratch":
        return GPTConfig.scratch(*map(int, size.split("x")), bins.vocab_size, bins.block_size)
    if kind == "layers":
        if teacher is None:
            raise UserError(f"--student={source}: the teacher cannot be read")
        if int(size) > teacher.num_hidden_layers:
            raise UserError(f"--student={source}: the teacher has {teacher.num_hidden_layers} layers")
        return replace(teacher, num_hidden_layers=int(size))
    return read_config(Path(source))


def open_bins(config: Config) -> TokenBins:
    return TokenBins(config.data_dir, config.block_size, [name for name in config.domains.split(",") if name])


def preflight(config: Config) -> tuple[TokenBins, dict[str, GPTConfig]]:
    """The bins and the models' sizes, checked before a weight is read. UserError lists all that does not fit.

    With dry_run, what the run would take is printed, whatever else does not fit."""
    models, problems = {}, []
    if (bins := attempt(problems, open_bins, config)) is None:
        for folder in filter(os.path.isdir, (config.teacher, config.student)):
            attempt(problems, read_config, Path(folder))
        raise UserError("\n".join(problems))
    if (mixture := parse_mixture(config.mixture)) and set(mixture) != set(bins.names):
        problems.append(f"--mixture={config.mixture}: the domains of {config.data_dir} are {' '.join(bins.names)}")
    attempt(problems, validation_windows, bins, config.val_samples)
    for role, source in (("teacher", config.teacher), ("student", config.student)):
        if source and (model := attempt(problems, model_config, source, bins, models.get("teacher"))):
            models[role] = model
            attempt(problems, problems.extend, model_problems(role, source, model, bins))
    if config.dry_run:
        print_cost(config, bins, models)
    if problems:
        raise UserError("\n".join(problems))
    return bins, models


def forward_flops(model: GPT, block_size: int) -> int:
    """Floating-point operations of a forward pass, a token."""
    config = model.config
    weights = sum(p.numel() for p in model.layers.parameters()) + config.vocab_size * config.hidden_size
    # Two products over the causal half of T × T scores in each layer, besides those with the weights
    return 2 * weights + 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * block_size


def print_cost(config: Config, bins: TokenBins, models: dict[str, GPTConfig]):
    """Print what a run would take, estimated from sizes alone, on as many devices as torchrun, or WORLD_SIZE, says."""
    width, world = 2 if config.dtype == "bfloat16" else 4, int(os.environ.get("WORLD_SIZE", 1))
    sharded = {"student": world > 1 and config.parallel != "ddp" and can_shard(config)}
    sharded["teacher"] = sharded["student"] and config.shard_teacher
    flops, memory = {"teacher": 0}, {}  # of a forward pass, a token; bytes
    for role, model in models.items():
        with torch.device("meta"):
            gpt = GPT(model)
        total, block = (sum(p.numel() for p in part.parameters()) for part in (gpt, gpt.layers[0]))
        L, d, share = model.num_hidden_layers, model.hidden_size, world if sharded[role] else 1
        flops[role] = forward_flops(gpt, config.block_size)
        memory[role] = total * (width if role == "teacher" else 4) / share
        if sharded[role]:  # what lies outside the blocks, and the block at work and the next one
            memory["gathered"] = memory.get("gathered", 0) + width * (total - (L - 2) * block)
        print(f"{role}: {model.model_type}, {L} layers × {d}, {total / 1e6:,.1f} M parameters, of whose "
              f"{model.vocab_size:,} rows the divergence is over the tokenizer's {bins.vocab_size:,}")
    if "student" in models:  # the last of the loop, whose sizes therefore stand
        # More whole copies of the student: what autocast makes of its weights, and DDP's buckets of gradients
        copies = 0 if sharded["student"] else (2 * (width == 2) + 4 * (world > 1)) * total
        kept = 16 * d + width * (4 * model.num_attention_heads * model.head_dim + 2 * d + 4 * model.intermediate_size)
        layers = 1 + L * width * d / kept if config.checkpoint_activations else L  # kept whole, in effect
        passed = (config.micro_batch_size or config.batch_size // world) * config.block_size
        memory |= {"gradients": 4 * total / share, "AdamW": 8 * total / share, "activations": kept * layers * passed,
                   "copies": copies, "loss": 8 * model.vocab_size * d}  # the head's gradient, summed and handed on
        drawn, evaluations = config.max_steps * config.batch_size, -(-config.max_steps // config.interval) + 1
        tokens, measured = drawn * config.block_size, len(bins.names) * config.val_samples * config.block_size
        passes = 4 if config.checkpoint_activations else 3
        training = tokens * (passes * flops["student"] + flops["teacher"] * (config.method not in CE_ONLY))
        evaluation = measured * (evaluations * flops["student"] + flops["teacher"])
        hours = (training + evaluation) / (0.4 * 312e12 * 3600)
        print(f"memory: {', '.join(f'{part} {size / 2**30:.1f}' for part, size in memory.items())}, in all "
              f"{sum(memory.values()) / 2**30:.1f} GiB on each of {world} devices\n"
              f"tokens: {tokens:,} in {config.max_steps:,} steps; {measured:,} at each of {evaluations} evaluations\n"
              f"FLOPs: {training:.2e} to train, {evaluation:.2e} to evaluate: {hours:,.1f} hours of an A100 at 40 % of "
              f"its bfloat16 peak, {hours / world:,.1f} of {world}"
              + ", besides the filters' first steps" * (config.method == "ted")
              + ", besides the runs of DoReMi's reference and proxy" * (config.method == "cpt_doremi"))
        for name, n in bins.n_windows.items():
            print(f"{name}: {n * config.block_size:,} tokens; {drawn / sum(bins.n_windows.values()):.2f} epochs in "
                  f"natural proportions, {drawn / len(bins.names) / n:.2f} if all domains are drawn alike")


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense, bfloat16


def utilisation(device: torch.device, flops_per_s: float) -> str:
    """Memory of this process, and the share of the GPUs' peak that is used where it is known, for a progress line."""
    if device.type != "cuda":
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"  {kib / (2**20 if sys.platform == 'linux' else 2**30):.1f} GiB"
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name(device)), None)
    used = f"  MFU {flops_per_s / (peak * world_size()):.0%}" if peak else ""
    return f"{used}  {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"


def open_sinks(config: Config, step: int, stack: ExitStack) -> Iterator[Callable[[dict], None]]:
    """Functions that also get each line of metrics.jsonl, as --tensorboard and --wandb ask for."""
    if config.tensorboard:
        writer = import_optional("torch.utils.tensorboard", "--tensorboard").SummaryWriter(
            config.out_dir, purge_step=step + 1)
        stack.callback(writer.close)
        yield lambda line: [writer.add_scalar(key, value, line["step"]) for key, value in scalars(line).items()]
    if config.wandb:
        run = import_optional("wandb", "--wandb").init(
            project="ddk", name=config.out_dir, config=asdict(config), resume="allow",
            id=digest(os.uname().nodename, os.path.abspath(config.out_dir))[:16])
        stack.callback(run.finish)
        yield lambda line: run.log(scalars(line), step=line["step"])


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, as kind/key, or domain/key where there is one for each domain."""
    numbers = {f"{line['kind']}/{key}": value for key, value in line.items() if key != "step"}
    numbers |= {f"{name}/r": share for name, share in line.get("r", {}).items()}
    numbers |= {f"{name}/{key}": value for name, domain in line.get("domains", {}).items()
                for key, value in domain.items()}
    return {key: value for key, value in numbers.items() if isinstance(value, int | float)}


def stop_requests(stack: ExitStack) -> Callable[[], int]:
    """A function: the number of a signal that this process got until `stack` closes, else 0.

    A second Ctrl-C exits at once. The end of torchrun, which dies of a SIGUSR1 and leaves its processes behind, counts
    as SIGTERM."""
    received, launcher = [], os.getppid()

    def receive(number, frame):
        if number == signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    def request() -> int:
        orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher
        return max(received, default=signal.SIGTERM if orphan else 0)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            stack.callback(signal.signal, number, signal.signal(number, receive))
    return request


# ------------ Baselines that need more than a switch: TED and DoReMi --------------------------------------------------

def layer_pairs(student: GPT, teacher: GPT, most: int = 4) -> tuple[list[int], list[int]]:
    """Evenly spaced layers of both, the last of each among them, which TED compares."""
    depths = len(student.layers), len(teacher.layers)
    pairs = min(most, *depths)
    return tuple([round((i + 1) * depth / pairs) - 1 for i in range(pairs)] for depth in depths)


def add_filters(student: GPT, teacher: GPT, pairs: tuple[list[int], list[int]]):
    """Give the student TED's linear filters, one for each compared layer of both models, to the teacher's width. They
    start as the identity, cut or filled with zeros. A checkpoint holds them, an exported model does not."""
    student.filters = nn.ModuleDict({role: nn.ModuleList(
        nn.Linear(model.config.hidden_size, teacher.config.hidden_size, bias=False, device=student.head_weight.device)
        for _ in keep) for role, model, keep in zip(("student", "teacher"), (student, teacher), pairs)})
    student.filters["teacher"].requires_grad_(False)
    for weight in student.filters.parameters():
        nn.init.eye_(weight)


def train_filters(student: GPT, teacher: GPT, pairs, micro_batches: Iterator[list[torch.Tensor]], config: Config,
                  autocast, stopped: Callable[[], int]):
    """TED's first stage: each filter of the two frozen models alone, to predict the next token from its layer.

    In this small form the teacher's final norm and head, also frozen, read the filtered layers of both, where TED
    trains a head for each. `micro_batches` gives a rank's windows of each step, in pieces. Exits if `stopped()`."""
    filters = [*student.filters["student"], *student.filters["teacher"]]
    steps = min(config.max_steps, config.filter_steps or config.max_steps // 10)
    print(f"TED's filters: {steps} steps, of which nothing is kept if they are stopped", flush=True)
    student.filters["teacher"].requires_grad_(True)
    optimizer = torch.optim.AdamW(student.filters.parameters(), lr=config.lr, weight_decay=0.0)
    for _ in range(steps):
        for rows in next(micro_batches):
            with torch.no_grad(), autocast:
                layers = [layer for model, keep in zip((student, teacher), pairs)
                          for layer in model(rows[:, :-1], loss_fn=lambda hidden, head, *kept: kept, keep=keep)]
            with autocast:
                loss = sum(distillation_loss(teacher.norm(to_teacher(layer)), teacher.head_weight, None, None,
                                             rows[:, 1:], num_tokens=config.batch_size * config.block_size)[0]
                           for to_teacher, layer in zip(filters, layers))
            loss.backward()
        for weight in student.filters.parameters():
            weight.grad = over_ranks(weight.grad)
        optimizer.step()
        optimizer.zero_grad()
        if number := stopped():
            sys.exit(128 + number)
    student.filters["teacher"].requires_grad_(False)


def filter_distance(filters: nn.ModuleDict, layers_S, layers_T) -> torch.Tensor:
    """TED's second stage: squared distance of the filtered layers (…, d) as a share of the teacher's square, so that no
    model's scale matters; the mean over layers, the sum over tokens."""
    filtered_S, filtered_T = ([to_teacher(layer).float() for to_teacher, layer in zip(filters[role], layers)]
                              for role, layers in (("student", layers_S), ("teacher", layers_T)))
    return sum(((ours - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1)).sum()
               for ours, wanted in zip(filtered_S, filtered_T)) / len(layers_S)


@torch.no_grad()
def doremi_step(before: dict | None, proxy: GPT, reference: GPT, micro_batches, domain_ids, N: int, autocast):
    """DoReMi's α_t as "weights" and what it follows from, before the proxy's update by the windows in `micro_batches`.

    λ, "excess", is the proxy's loss above the reference's, cut at 0 for each token: the mean over the tokens of each
    domain that all ranks drew. A domain that was not drawn keeps its λ. "total" is the sum of α_1 … α_t."""
    before = before or {"weights": [1 / N] * N, "excess": [0.0] * N, "total": [0.0] * N}
    sums = torch.zeros(2, N, device=micro_batches[0].device)
    for rows, ids in zip(micro_batches, torch.from_numpy(domain_ids).to(sums.device).split(len(micro_batches[0]))):
        def token_losses(hidden, head):  # a window at a time, so that logits of one alone are held
            return torch.stack([F.cross_entropy(F.linear(h, head).float(), targets, reduction="none")
                                for h, targets in zip(hidden, rows[:, 1:])])
        with autocast:
            of_proxy, of_reference = (model(rows[:, :-1], loss_fn=token_losses) for model in (proxy, reference))
        excess = (of_proxy - of_reference).clamp(min=0).sum(dim=1)
        sums.index_add_(1, ids, torch.stack((excess, torch.full_like(excess, rows[:, 1:].shape[1]))))
    total, tokens = over_ranks(sums).cpu().double().numpy()
    excess = np.where(tokens > 0, total / np.maximum(tokens, 1), before["excess"])
    weights = doremi_update(before["weights"], excess)
    return {"weights": weights.tolist(), "excess": excess.tolist(), "total": (weights + before["total"]).tolist()}


def doremi(config: Config) -> Config:
    """`config`; if its method is cpt_doremi, with the mixture that DoReMi finds, by two runs beside the main one.

    The reference is the student trained as it is, in the natural mixture. The proxy is the student again, trained with
    the loss weighted by α; the mixture is α's mean over its steps. A run that is finished is not made again."""
    if config.method != "cpt_doremi" or not config.max_steps:
        return config
    on_rank_0(lambda: preflight(config))  # before two runs
    beside = str(Path(config.out_dir))
    reference = replace(config, method="cpt", teacher="", stop_ratio=0.0, out_dir=f"{beside}-reference")
    print(f"\nDoReMi's reference, kept in {reference.out_dir}", flush=True)
    proxy = replace(reference, method="doremi_proxy", teacher=str(train(reference)), out_dir=f"{beside}-proxy")
    print(f"\nDoReMi's proxy, kept in {proxy.out_dir}", flush=True)
    folder = train(proxy)
    mixture = on_rank_0(lambda: doremi_mixture(read_state(folder)))
    print(f"\nDoReMi's mixture: {mixture}", flush=True)
    return replace(config, mixture=mixture)


def doremi_mixture(state: TrainState) -> str:
    """The mean of α over a proxy's steps, as name=weight,…"""
    total = np.array(state.doremi["total"])
    return ",".join(f"{name}={share!r}" for name, share in zip(state.domains, (total / total.sum()).tolist()))


# ------------ Alg. 1 --------------------------------------------------------------------------------------------------

def is_last(config: Config, state: TrainState) -> bool:
    """Whether no update follows: the steps are done, or stop_ratio is reached."""
    reached = config.stop_ratio and state.evaluated == state.step and max(
        domain["ratio"] for domain in state.domains.values()) <= config.stop_ratio
    return bool(reached or state.step >= config.max_steps)


def start_run(config: Config, stack: ExitStack):
    """Check all that is cheap, lock the run's folder until `stack` closes, and find the checkpoint to go on from.

    In this order: nothing there → start; another experiment → refuse; finished → say so; else the newest whole
    checkpoint, or the start if there is none. → bins, models' sizes, their content, state, checkpoint, whether done"""
    out_dir = Path(config.out_dir)
    metrics = out_dir / "metrics.jsonl"
    bins, models = preflight(config)
    content = {"data_dir": bins.content(), **{
        role: model_content(source) if os.path.isdir(source) else source
        for role, source in (("teacher", config.teacher), ("student", config.student))}}
    record = {"config": asdict(config), "content": content}
    if config.resume == "never" and out_dir.exists():
        with locked(out_dir):
            os.replace(out_dir, free_name(out_dir))
    if checkpoints(out_dir) or metrics.is_file() and metrics.stat().st_size:
        check_same_experiment(out_dir, record)
    stack.enter_context(locked(out_dir))
    metrics.touch()
    write_text(out_dir / "config.json", json.dumps(record, indent=1))
    resumed = newest_checkpoint(out_dir)
    state = read_state(resumed) if resumed else TrainState()
    if (finished := bool(resumed) and is_last(config, state) and any(
            line["kind"] == "end" for line in read_metrics(metrics))):
        print(f"{out_dir}: this run is finished (step {state.step})")
    else:
        rewind_metrics(metrics, state if resumed else TrainState(step=-1))
    return bins, models, content, state, resumed, finished


def train(config: Config) -> Path:
    """Run Alg. 1, or the arm that `method` names, to its end; returns the last checkpoint's folder.

    Iteration s finds s finished updates. It evaluates and updates r if s is a multiple of K or the last, saves if due,
    and makes one update unless it is the last: there is one iteration more than updates."""
    config = resolve_auto(config)
    out_dir, device, parallel = Path(config.out_dir), torch.device(config.device), config.parallel
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16" and parallel != "fsdp")

    with ExitStack() as stack:
        bins, models, content, state, resumed, finished = on_rank_0(lambda: start_run(config, stack))
        if finished:
            return resumed
        names, windows = bins.names, validation_windows(bins, config.val_samples)
        teacher, teacher_ppl = None, dict.fromkeys(names)
        if config.teacher:
            teacher = load_model(config.teacher, config, models["teacher"], getattr(torch, config.dtype))
            spread(teacher.requires_grad_(False), config, device, parallel == "fsdp" and config.shard_teacher)
        student = load_model(str(resumed or config.student), config, models["student"], torch.float32)
        keep_S, keep_T = layers = layer_pairs(student, teacher) if config.method == "ted" else ((), ())
        if config.method == "ted":
            add_filters(student, teacher, layers)
        saved = read_optimizer(resumed, student) if resumed and rank() == 0 else {}
        if saved.get("weights"):
            student.load_state_dict(saved["weights"])
        spread(student, config, device, parallel == "fsdp")
        optimizers = make_optimizers(student, config)
        if state.step:
            set_optimizer_state_dict(student, optimizers, saved.get("optimizer", {}), options=whole_tensors())
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                # Loading makes lists of tuples such as betas; a resumed run's checkpoints are to be equal to the bit.
                group.update({k: tuple(v) for k, v in group.items() if isinstance(v, list) and k != "params"})
        sampler = MixtureSampler(bins.n_windows, config.batch_size, config.seed)
        sampler.probs = parse_mixture(config.mixture) or sampler.probs
        base_probs = sampler.probs
        if resumed:
            print(f"{out_dir}: going on from {resumed.name}")
            with blame(resumed / "train_state.json", AS_SAVED):
                sampler.load_state_dict(state.sampler)
        share = config.batch_size // world_size()
        mine = slice(rank() * share, (rank() + 1) * share)
        micro_batch_size = config.micro_batch_size or share
        tokens_per_step = config.batch_size * config.block_size
        teaches = config.method not in CE_ONLY
        flops = 3 * forward_flops(student, config.block_size) + (
            forward_flops(teacher, config.block_size) if teaches else 0)

        def draw() -> tuple[dict, np.ndarray, torch.Tensor]:
            """The sampler's state, then from the next global batch: each window's domain, and this rank's windows."""
            before = sampler.state_dict()
            domain_ids, window_ids = sampler.next_batch()
            windows = torch.from_numpy(bins.train_windows(domain_ids[mine], window_ids[mine]))
            return before, domain_ids, windows.pin_memory() if device.type == "cuda" else windows

        def measure(model: GPT) -> dict[str, float]:
            return perplexities(model, windows, bins.vocab_size, micro_batch_size, autocast, stopped)

        metrics_path = out_dir / "metrics.jsonl" if rank() == 0 else os.devnull
        metrics = stack.enter_context(open(metrics_path, "a", encoding="utf-8"))
        sinks = list(open_sinks(config, state.step, stack)) if rank() == 0 else []

        def log(kind: str, **values):
            line = {"kind": kind, "step": state.step, **values}
            print(json.dumps(line), file=metrics, flush=True)
            for sink in sinks:
                sink(line)

        received = stop_requests(stack)

        def stopped() -> int:
            """The number of a signal that any rank received, on every rank."""
            return int(over_ranks(torch.tensor(received()), dist.ReduceOp.MAX))

        identity = digest(content["teacher"], content["data_dir"], config.block_size, config.val_samples, config.dtype)
        if teacher is not None:
            teacher_ppl = teacher_perplexities(identity, bins.dir / "teacher_ppl.json", lambda: measure(teacher))
            if number := stopped():
                sys.exit(128 + number)  # nothing is done yet that could be saved
        if config.method == "ted" and not resumed:
            start = sampler.state_dict()  # the run itself begins with the same batches
            train_filters(student, teacher, layers, (draw()[2].to(device).split(micro_batch_size)
                                                     for _ in itertools.count()), config, autocast, stopped)
            sampler.load_state_dict(start)
        trained = DistributedDataParallel(student) if parallel == "ddp" else student
        if not resumed:
            log("run", config=asdict(config), versions=environment(), base=dict(zip(names, base_probs.tolist())),
                parameters={role: sum(p.numel() for name, p in model.named_parameters() if "filters." not in name)
                            for role, model in (("teacher", teacher), ("student", student)) if model is not None})
        started, first_step, ahead, asked = time.perf_counter(), state.step, None, True
        saved_at = (state.step, state.evaluated) if resumed else None  # the newest checkpoint
        while True:
            # Evaluate, update r, log. `evaluated` keeps a resumed run from doing it twice.
            t, since_update = divmod(state.step, config.interval)
            evaluate = state.evaluated != state.step and (since_update == 0 or is_last(config, state))
            if evaluate and (student_ppl := measure(student)):
                if since_update == 0 and teacher is not None:
                    state.factor = next_factor(config.method, state.factor, list(student_ppl.values()),
                                               [teacher_ppl[name] for name in names], config.alpha).tolist()
                state.domains = {name: {
                    "student_ppl": student_ppl[name], "teacher_ppl": teacher_ppl[name],
                    "ratio": teacher_ppl[name] and student_ppl[name] / teacher_ppl[name],
                    "factor": state.factor and state.factor[i],
                    "tokens": int(sampler.drawn[i]) * config.block_size, "epochs": float(sampler.epochs[i])}
                    for i, name in enumerate(names)}
                state.evaluated = state.step
                if since_update == 0:
                    sampler.probs = interval_probs(config.method, t, state.factor, base_probs)
                    state.first_domains = state.first_domains or state.domains
                    log("mixture", t=t, r=dict(zip(names, sampler.probs.tolist())), domains=state.domains)
                    if t == 0 and teacher is not None:
                        print("\n".join([*teacher_warnings(state.domains, bins.vocab_size), *(
                            f"{name}: teacher's perplexity {domain['teacher_ppl']:.2f}, student's "
                            f"{domain['student_ppl']:.2f}" for name, domain in state.domains.items())]), flush=True)
            number = stopped() if evaluate or asked else 0  # of a signal; it may have cut the evaluation short
            last = is_last(config, state) and not number

            # Save
            folder = out_dir / f"step_{state.step:08d}"
            due = state.step and config.save_every and state.step % config.save_every == 0
            if (last or due or number) and saved_at != (state.step, state.evaluated):
                state.sampler = ahead[0] if ahead else sampler.state_dict()
                save_checkpoint(folder, student, optimizers, state, bins, config.export_dtype)
                saved_at = state.step, state.evaluated
                for old in checkpoints(out_dir)[:-config.keep] if config.keep and rank() == 0 else []:
                    shutil.rmtree(old)
            if last:
                log("end", domains=state.domains)
                return folder
            if number:
                print(f"{out_dir}: stopped by {signal.Signals(number).name}, saved as {folder.name}; "
                      "the same command goes on from there")
                sys.exit(128 + number)

            # One update
            lr = learning_rate(state.step, config)
            step_started = time.perf_counter()
            _, domain_ids, batch = ahead or draw()
            waited = time.perf_counter() - step_started
            micro_batches = batch.to(device, non_blocking=True).split(micro_batch_size)
            window_weights = torch.ones(config.batch_size)
            if config.method == "doremi_proxy":
                state.doremi = doremi_step(state.doremi, student, teacher, micro_batches, domain_ids[mine],
                                           len(names), autocast)
                shares = zip(state.doremi["weights"], sampler.probs)
                window_weights = torch.tensor([alpha / p if p else 0.0 for alpha, p in shares])[domain_ids]
            num_tokens = window_weights.sum().item() * config.block_size
            weights = window_weights[mine, None].to(device, non_blocking=True).split(micro_batch_size)
            sums = torch.zeros(4, device=device)  # loss, ce, kl, and whether a signal came
            for i, (rows, row_weights) in enumerate(zip(micro_batches, weights)):
                idx, targets = rows[:, :-1], rows[:, 1:]
                if parallel == "ddp":  # FSDP reduces each micro-batch's, so as to hold shares of gradients only
                    trained.require_backward_grad_sync = i + 1 == len(micro_batches)
                with autocast:
                    with torch.no_grad():
                        teacher_hidden, teacher_head, *layers_T = teacher(
                            idx, loss_fn=lambda *given: given, keep=keep_T) if teaches else (None, None)

                    def loss_fn(hidden, head, *layers_S):
                        loss, ce, kl = distillation_loss(
                            hidden, head, teacher_hidden, teacher_head, targets, gamma=config.gamma,
                            temperature=config.temperature, vocab_size=bins.vocab_size, num_tokens=num_tokens,
                            token_weights=row_weights.expand_as(targets),
                            direction="reverse" if config.method == "minillm" else "forward")
                        if config.method == "ted":
                            distance = filter_distance(student.filters, layers_S, layers_T)
                            loss = loss + config.filter_weight * distance / num_tokens
                        return loss, ce, kl

                    losses = trained(idx, loss_fn=loss_fn, keep=keep_S)
                (losses[0] * world_size()).backward()  # DDP and FSDP average over ranks; Eq. 3's mean is over tokens
                sums[:3] += torch.stack(losses).detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip or math.inf)
            # The next batch is read while a GPU still computes; not across an update of r, which it has to follow.
            ahead = draw() if (state.step + 1) % config.interval and state.step + 1 < config.max_steps else None
            sums[3] = received()
            loss, ce, kl, asked = over_ranks(sums).tolist()
            grad_norm = (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()
            if not math.isfinite(loss + grad_norm):
                drawn = ", ".join(names[i] for i in np.unique(domain_ids))
                refuse(f"step {state.step}: loss {loss}, gradient norm {grad_norm} on windows of {drawn}. The update "
                       f"was not made, nor a checkpoint. Lower --lr={config.lr}, with --resume=never, or check "
                       f"the data: python data.py --verify={config.data_dir}")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()

            state.step += 1
            now = time.perf_counter()
            eta = (now - started) / (state.step - first_step) * (config.max_steps - state.step)
            step_s = now - step_started
            tokens_per_s = tokens_per_step / step_s
            log("train", loss=loss, ce=ce, kl=kl, lr=lr, grad_norm=grad_norm, tokens=state.step * tokens_per_step,
                tokens_per_s=tokens_per_s, eta_s=eta)
            if state.step % config.log_every == 0 or state.step == config.max_steps:
                print(f"step {state.step}/{config.max_steps}  loss {loss:.3f}  ce {ce:.3f}  kl {kl:.3f}  lr {lr:.1e}  "
                      f"{tokens_per_s:,.0f} tokens/s{utilisation(device, flops * tokens_per_s)}  data "
                      f"{waited / step_s:.1%}  ETA {int(eta) // 60}:{int(eta) % 60:02d}", flush=True)


# ------------ What a run says at its end ------------------------------------------------------------------------------

def teacher_warnings(domains: dict[str, dict], vocab_size: int) -> Iterator[str]:
    """What the first evaluation says against a teacher."""
    for name, domain in domains.items():
        if domain["teacher_ppl"] > vocab_size / 2:
            yield (f"WARNING: THE TEACHER IS NEAR UNIFORM IN {name} ({domain['teacher_ppl']:.0f}): HARDLY TRAINED, "
                   "MADE OR LOADED WRONG, OR THE BINS ARE OF ANOTHER TOKENIZER")
        elif domain["ratio"] < 1:
            yield f"WARNING: THE TEACHER IS BEHIND ITS STUDENT IN {name} FROM THE START, BY {1 / domain['ratio']:.2f}"


def report(config: Config, folder: Path):
    """Print what a run did in each domain, from its first evaluation to its last, and what to try next."""
    state = read_state(folder)
    domains, first = state.domains, state.first_domains
    drawn = sum(domain["tokens"] for domain in domains.values()) or 1
    print("\n".join(teacher_warnings(first, open_bins(config).vocab_size) if config.teacher else []))
    print(f"{config.method}, seed {config.seed}, step {state.step}: perplexity by domain\n")
    print(f"{'':14}{'teacher':>9}{'student':>19}{'student/teacher':>22}{'drawn':>9}{'epochs':>9}")
    for name, domain in domains.items():
        before = first[name]
        student_ppl = f"{before['student_ppl']:.2f} → {domain['student_ppl']:.2f}"
        teacher_ppl = f"{domain['teacher_ppl']:.2f}" if config.teacher else "–"
        ratio = f"{before['ratio']:.2f} → {domain['ratio']:.2f}" if config.teacher else "–"
        print(f"{name:14}{teacher_ppl:>9}{student_ppl:>19}{ratio:>22}"
              f"{domain['tokens'] / drawn:9.1%}{domain['epochs']:9.2f}")
    if config.teacher:
        worst = [max(domain["ratio"] for domain in measured.values()) for measured in (first, domains)]
        print(f"{'worst ratio':14}{f'{worst[0]:.2f} → {worst[1]:.2f}':>50}")
    if state.doremi:
        print(f"DoReMi's mixture, for --mixture: {doremi_mixture(state)}")
    if config.preset == "quickstart":
        show_continuations(config, folder)
        other = "ddk" if config.method == "kd" else "kd"
        print(f"\nAnother arm on the same models:  the same command with --method={other} (and another --out_dir, if "
              f"you named one)\nTo hear more of this student:  python model.py --model={folder} --prompt='def main('")
    print(f"The student lies in {folder}")


def show_continuations(config: Config, folder: Path):
    """Print what the student makes of the start of each domain's first validation document."""
    bins, tokenizer = open_bins(config), model_tokenizer(folder)
    student = GPT.from_pretrained(folder, torch.float32)
    prompts = torch.cat(list(validation_windows(bins, 1).values()))[:, :64]
    idx = student.generate(prompts, 96, temperature=0.7, vocab_size=bins.vocab_size,
                           generator=torch.Generator().manual_seed(config.seed))
    print("\nThe student goes on from 64 tokens of each domain's validation text (after the |):\n")
    for name, prompt, row in zip(bins.names, prompts.tolist(), idx.tolist()):
        print(f"  {name}: {tokenizer.decode(prompt)[-40:]!r} | {tokenizer.decode(row[len(prompt):])!r}")


# ------------ Quickstart ----------------------------------------------------------------------------------------------

QUICKSTART_MODELS = {"teacher": "scratch:4x128", "student": "scratch:2x96"}
QUICKSTART_MIXTURES = {"teacher": "python=1,cpp=1,math=1,prose=1",
                       "student": "python=.495,cpp=.495,math=.005,prose=.005"}
PRETRAINING = dict(preset="custom", method="cpt", optimizer="muon", interval=10**9, lr=1e-2, min_lr=1e-3, keep=1)
# As unequal as the domains of a real corpus: the natural mixture is nine tenths code.
QUICKSTART_BYTES = {"python": 7_000_000, "cpp": 5_000_000, "math": 800_000, "prose": 600_000}


def quickstart(config: Config) -> Config:
    """Make what the quickstart lacks, in `data_dir`: bins, a teacher, a student base. Returns `config` with its models.

    `train` trains both with no teacher: the teacher on all domains alike, the base mostly on code, since small models
    are strong in some domains and weak in others. Every arm and seed then starts from the same two."""
    data_dir = Path(config.data_dir)

    def make_bins():
        if (data_dir / "meta.json").is_file():
            names, own_models = read_meta(data_dir)["domains"].keys(), config.teacher and config.student
            if names != QUICKSTART_BYTES.keys() and not own_models:
                raise UserError(f"--data_dir={data_dir}: holds {' '.join(names)}, not the quickstart's text; name "
                                "--teacher and --student, or another folder")
        else:
            with locked(data_dir):
                print(f"Collecting text into {data_dir} …", flush=True)
                build_bins(data_dir, load_tokenizer("bytes"), quickstart_domains(QUICKSTART_BYTES), val_fraction=0.1)

    on_rank_0(make_bins)
    sizes = {role: getattr(config, role) or size for role, size in QUICKSTART_MODELS.items()}
    if config.dry_run:
        return replace(config, **sizes)
    on_rank_0(lambda: preflight(replace(config, **sizes)))  # before minutes of training
    for role, steps in (("teacher", config.pretrain_steps), ("student", (config.pretrain_steps + 1) // 2)):
        if not getattr(config, role):
            base = resolve_config(**{**PRESETS["quickstart"], **PRETRAINING, "student": sizes[role], "max_steps": steps,
                                     "mixture": QUICKSTART_MIXTURES[role], "log_every": 50, "dtype": "float32",
                                     "device": config.device, "compile": config.compile, "timeout": config.timeout,
                                     "data_dir": str(data_dir), "out_dir": str(data_dir / role)})
            if problems := base.problems():
                refuse("\n".join(problems))
            print(f"\nThe {role}: {sizes[role]}, {steps} steps, kept in {base.out_dir}", flush=True)
            try:
                config = replace(config, **{role: str(train(base))})
            except UserError as error:
                raise UserError(f"{error}\n--data_dir={data_dir}: that was about the quickstart's {role}; keep the "
                                f"--pretrain_steps that it was made with, or delete {base.out_dir}") from None
    return config


def main():
    config = parse_config(Config, make=resolve_config)
    with process_group(config):
        config = resolve_auto(config)
        print_config(config)
        if config.preset == "quickstart":
            config = quickstart(config)
        if config.dry_run:
            return on_rank_0(lambda: preflight(config))
        folder = train(doremi(config))
        on_rank_0(lambda: report(config, folder))


if __name__ == "__main__":
    run_program(main)
