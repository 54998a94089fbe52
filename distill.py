"""DDK: distil a large language model (the teacher) into a small one (the student), domain by domain.

    python distill.py                                        the quickstart: text, teacher, student, DDK, a table
    python distill.py --method=kd                            another arm on the same bins and models
    torchrun --nproc_per_node=8 distill.py --preset=paper --teacher=DIR --student=DIR --data_dir=DIR

The method is Alg. 1 of arXiv 2407.16154. Every K steps (`interval`) the student's perplexity is measured in each
domain and divided by the teacher's. Domains in which the student is further behind get more of the next K steps' data.
The loss of each step is cross-entropy plus γ times the KL divergence from the teacher's predictions (Eq. 3).

The first part of this file is the paper: configuration, arms, Eq. 3, perplexities, one training step, Alg. 1. What it
calls and does not define stands in the second part, below the double line: what surrounds a run.
"""

import argparse
import difflib
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

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

from data import (LOCK, MODEL_FILES, TOKENIZER_FILES, TOKENIZER_META, TokenBins, UserError, build_bins, digest,
                  file_sha256, fsync, import_optional, is_tiktoken, load_tokenizer, locked, model_folder,
                  model_tokenizer, quickstart_documents, run_program, save_tokenizer, user_errors, write_text)
from model import GPT, GPTConfig, read_config, resolve_device, weight_files
from sample_mixture import RULES, MixtureSampler, checked_weights, read_metrics

# ------------ Configuration -------------------------------------------------------------------------------------------

# Sets of defaults. Config's own are the paper's values, so the presets of the paper's pairs only name the models. Where
# the paper gives none the choice is ours: how a step's tokens are cut into windows, weight decay, clipping, the betas.
PRESETS = {
    "quickstart": dict(interval=10, val_samples=64, test_samples=64, block_size=256, batch_size=8, max_steps=300,
                       lr=1e-3, min_lr=1e-4, warmup_steps=20, save_every=100),
    "paper": {},
    "qwen1.5-14b-1.8b": dict(teacher="Qwen/Qwen1.5-14B", student="Qwen/Qwen1.5-1.8B"),
    "qwen1.5-14b-4b": dict(teacher="Qwen/Qwen1.5-14B", student="Qwen/Qwen1.5-4B"),
    "qwen1.5-7b-1.8b": dict(teacher="Qwen/Qwen1.5-7B", student="Qwen/Qwen1.5-1.8B"),
    "llama2-13b-tinyllama-1.1b": dict(teacher="meta-llama/Llama-2-13b-hf",
                                      student="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
    "starcoder-15.5b-3b": dict(teacher="bigcode/starcoder", student="bigcode/starcoderbase-3b"),
}


@dataclass(frozen=True)
class Arm:
    """A method that the paper compares. The defaults are DDK's, so a row of ARMS says what differs."""
    help: str
    rule: str = "ddk"  # the mixture rule, a key of sample_mixture.RULES
    divergence: str | None = "forward"  # `direction` of Eq. 3; None: cross-entropy alone

    @property
    def trains_with_teacher(self) -> bool:
        return self.divergence is not None


ARMS = {
    "ddk": Arm("r by Eq. 2 after every K steps"),
    "ddk_no_fs": Arm("without factor smoothing: r by Eq. 1 after every K steps", rule="ddk_no_fs"),
    "ddk_es": Arm("equal sampling: all domains alike", rule="equal"),
    "kd": Arm("knowledge distillation in the natural mixture", rule="natural"),
    "minillm": Arm("KD with teacher-forced reverse KL", rule="natural", divergence="reverse"),
    "cpt": Arm("continued pre-training: the student alone", rule="natural", divergence=None),
}


def key(default, help: str, minimum: float = -math.inf, maximum: float = math.inf, choices=None, may_change=False):
    """A field of Config: a key of the command line, with its bounds or the words that it takes."""
    if isinstance(default, bool):
        choices = ("true", "false")
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "may_change": may_change}
    return field(default=default, metadata=metadata)


def free_key(default, help: str, **limits):
    """A key that may change when a run is resumed. Of teacher, student and data_dir the content is compared instead."""
    return key(default, help, may_change=True, **limits)


@dataclass
class Config:
    """The keys of `python distill.py`. Where the paper gives a value, it is the default."""
    # What a run is made of
    preset: str = free_key("", "set of defaults (default: quickstart; required if teacher or student names a "
                               "model)",
                           choices=PRESETS)
    teacher: str = free_key("", "folder of the teacher in Hugging Face's format, or its name on the Hub: OWNER/MODEL")
    student: str = free_key("", "the student's folder or name; or scratch:LxD, L new layers, D wide; or layers:N, N "
                                "evenly spaced layers of the teacher")
    data_dir: str = free_key("", "folder of the bins, made by data.py (default: data/PRESET)")
    out_dir: str = free_key("", "folder of the run (default: out/PRESET-METHOD-SEED; name one where another "
                                "key differs)")
    domains: str = key("", "name,name,… of the bins' domains (default: all)")

    # The method
    method: str = key("ddk", "; ".join(f"{name}: {arm.help}" for name, arm in ARMS.items()), choices=ARMS)
    gamma: float = key(0.2, "γ, weight of the divergence from the teacher", minimum=0)
    temperature: float = key(1.0, "T, divides the logits of both models in the divergence", minimum=1e-3)
    alpha: float = key(0.5, "α, how much of r follows the discrepancies; the rest is uniform", minimum=0, maximum=1)
    interval: int = key(1000, "K, steps between two updates of r", minimum=1)
    val_samples: int = key(500, "validation windows per domain, by which r is updated", minimum=1)
    test_samples: int = key(0, "test windows per domain, of other text, never used for r; 0: none", minimum=0)
    mixture: str = key("", "name=weight,… in place of the natural proportions")
    stop_ratio: float = key(0.0, "end when the largest perplexity ratio is at or below this; 0: never", minimum=0)

    # Optimization
    block_size: int = key(2048, "tokens per window", minimum=1)
    batch_size: int = key(256, "windows per step, over all ranks and micro-batches", minimum=1)
    max_steps: int = key(30_000, "training steps; 0 only evaluates", minimum=0)
    lr: float = key(3e-5, "learning rate after warm-up", minimum=0)
    min_lr: float = key(3e-6, "learning rate at the last step", minimum=0)
    warmup_steps: int = key(1000, "steps of linear warm-up", minimum=0)
    weight_decay: float = key(0.1, "weight decay, on matrices only", minimum=0)
    grad_clip: float = key(1.0, "maximum gradient norm; 0: no clipping", minimum=0)
    seed: int = key(0, "order of the data, and initial weights of a scratch student", minimum=0, maximum=2**63 - 1)

    # How it is computed
    micro_batch_size: int = free_key(0, "windows per forward pass; 0: all of a rank's windows", minimum=0)
    dtype: str = key("auto", "dtype of the matrix products; auto: bfloat16 on cuda, else float32",
                     choices=("auto", "float32", "bfloat16"))
    compile: str = free_key("auto", "torch.compile of the models' blocks; auto: on cuda. The loss is compiled wherever "
                                    "that pays", choices=("auto", "true", "false"))
    device: str = free_key("auto", "auto: cuda, then mps, then cpu")
    parallel: str = free_key("auto", "under torchrun; auto: fsdp (FSDP2) on GPUs, ddp on CPUs",
                             choices=("auto", "none", "ddp", "fsdp"))
    shard_teacher: bool = free_key(True, "with fsdp, shard the teacher too; false: whole on every device")
    checkpoint_activations: bool = free_key(False, "recompute activations in the backward pass, to save memory")
    timeout: float = free_key(30, "minutes that a rank waits for the others", minimum=0.1)

    # What is kept and shown
    save_every: int = free_key(1000, "steps between two checkpoints; 0: the last step only", minimum=0)
    keep: int = free_key(2, "newest checkpoints to keep; 0: all", minimum=0)
    resume: str = free_key("auto", "auto: continue the run in out_dir, if there is one; never: move it aside and "
                                   "start again", choices=("auto", "never"))
    log_every: int = free_key(10, "steps between two lines of progress", minimum=1)
    wandb: bool = free_key(False, "log to Weights & Biases too")
    dry_run: bool = free_key(False, "check everything, print what the run would take, and stop")
    pretrain_steps: int = free_key(1200, "quickstart: steps of its teacher; the student base gets a quarter", minimum=4)


# ------------ Eq. 3 ---------------------------------------------------------------------------------------------------

def dense_distillation_loss(student_logits, teacher_logits, targets, *, gamma=0.2, temperature: float = 1.0,
                            direction: str = "forward", vocab_size: int | None = None, num_tokens=None,
                            token_weights=None):
    """Eq. 3: CE(student, next token) + γ · KL(softmax(z_T/T) ‖ softmax(z_S/T)), mean per token → (loss, ce, kl).

    student_logits (…, V_S); teacher_logits (…, V_T), or None, then kl is 0; targets (…), already shifted, −100 is
    ignored. CE is over all V_S rows, which keeps padded ids unlikely. KL is over the first `vocab_size` ids (default:
    the smaller number of rows), the others left out of both softmaxes; there is no T² factor. direction "forward" puts
    the teacher first, "reverse" the student, as in MiniLLM. (The paper prints the student first, and means the teacher:
    see the README's details.) gamma: a number, or one per token (…). The sums, weighted by `token_weights` (…) if
    given, are divided by `num_tokens` (default: the number of targets that count). ce and kl are detached; kl is
    without γ. Given a teacher, raises ValueError on another direction, or if vocab_size exceeds a head's rows."""
    counted = targets != -100
    weights = counted if token_weights is None else counted * token_weights
    if num_tokens is None:
        num_tokens = counted.sum().clamp(min=1)

    # Cross-entropy. The target's log-probability is found by comparing ids, since torch.compile fuses that with the
    # softmax, but not a gather. An ignored target equals no id, so its loss is 0.
    z_S = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    log_s = F.log_softmax(z_S, dim=-1)
    ids = torch.arange(z_S.shape[-1], device=targets.device)
    ce_per_token = -torch.where(ids == targets.unsqueeze(-1), log_s, 0).sum(dim=-1)
    ce = (weights * ce_per_token).sum() / num_tokens
    if teacher_logits is None:
        return ce, ce.detach(), torch.zeros_like(ce)

    # The divergence between p (teacher) and q (student), over the tokenizer's ids. Rows that only one head has are cut
    # off. Those that both have beyond the ids are masked, which torch.compile fuses with the softmax, unlike a slice.
    z_T = teacher_logits.detach().to(z_S.dtype)
    rows = min(z_S.shape[-1], z_T.shape[-1])
    if vocab_size is None:
        vocab_size = rows
    if vocab_size > rows:
        raise ValueError(f"vocab_size {vocab_size} is more than the {rows} rows of a head")

    def log_probabilities(logits):
        logits = logits[..., :rows]
        if temperature != 1:  # a division by 1 is not free: torch.compile makes more passes over quotients
            logits = logits / temperature
        if vocab_size < rows:
            logits = torch.where(ids[:rows] < vocab_size, logits, -1e30)
        return F.log_softmax(logits, dim=-1)

    log_p = log_probabilities(z_T)
    if temperature == 1 and vocab_size == z_S.shape[-1]:
        log_q = log_s  # the same softmax: not computed twice
    else:
        log_q = log_probabilities(z_S)
    if direction == "forward":
        kl_per_token = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    elif direction == "reverse":
        kl_per_token = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    else:
        raise ValueError(f"direction {direction!r} must be forward or reverse")
    kl_per_token = weights * kl_per_token
    kl = kl_per_token.sum() / num_tokens

    loss = ce + (gamma * kl_per_token).sum() / num_tokens
    return loss, ce.detach(), kl.detach()


# ------------ One process among several -------------------------------------------------------------------------------

def rank_slice(config: Config) -> slice:
    """This rank's windows of the batch, which all ranks draw alike."""
    share = config.batch_size // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def over_ranks(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The ranks' `values` summed, or reduced by `op`, on every rank."""
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values, op)
    return values


# ------------ ℓ_S and ℓ_T, and what is measured per domain ------------------------------------------------------------

@torch.no_grad()
def perplexities(model: GPT, windows: dict[str, torch.Tensor], vocab_size: int, micro_batch_size: int,
                 precision=nullcontext()) -> dict[str, float]:
    """The paper's ℓ, name → exp of the mean next-token cross-entropy over a domain's windows (n, block_size + 1).

    Over the tokenizer's ids alone (`vocab_size`), for teacher and student alike, with `micro_batch_size` windows per
    forward pass. All ranks call it and get the same result. Draws no random number. Raises UserError if a loss is not
    finite."""
    ppl = {}
    for name, domain_windows in windows.items():
        ce_sum = torch.zeros((), dtype=torch.float64)
        for inputs, targets in evaluation_batches(domain_windows, micro_batch_size, model.head_weight.device):

            def cross_entropy_sum(hidden, head):
                # Divided by 1: the sum, not the mean
                _, ce, _ = distillation_loss(hidden, head[:vocab_size], None, None, targets, num_tokens=1)
                return ce

            with precision:
                ce = model(inputs, loss_fn=cross_entropy_sum)
            ce_sum += ce.cpu().double()

        # Sums over counts, so that it does not matter how the windows were split
        mean_ce = over_ranks(ce_sum).item() / domain_windows[:, 1:].numel()
        if not math.isfinite(mean_ce):
            raise UserError(f"domain {name}: the loss of a model is {mean_ce}: damaged weights, or --dtype too coarse")
        ppl[name] = math.exp(min(mean_ce, 700.0))  # exp overflows from 710 on
    return ppl


def measured_domains(student_ppl: dict, teacher_ppl: dict, sampler: MixtureSampler, block_size: int) -> dict[str, dict]:
    """The numbers of each domain after an evaluation, which are logged, plotted, and shown in the table at the end.

    Another number that follows from these arguments is one more line here."""
    domains = {}
    for i, name in enumerate(sampler.names):
        domains[name] = {
            **with_ratio(student_ppl[name], teacher_ppl[name]),
            "tokens": int(sampler.drawn[i]) * block_size,
            "epochs": float(sampler.epochs[i]),
        }
    return domains


def with_ratio(student_ppl: float, teacher_ppl: float | None, prefix: str = "") -> dict[str, float | None]:
    """The perplexities of a domain, and ℓ_S / ℓ_T, which is None where there is no teacher."""
    ratio = None
    if teacher_ppl is not None:
        ratio = student_ppl / teacher_ppl
    return {f"{prefix}student_ppl": student_ppl, f"{prefix}teacher_ppl": teacher_ppl, f"{prefix}ratio": ratio}


# ------------ State, learning rate, optimizer -------------------------------------------------------------------------

@dataclass
class TrainState:
    """Everything that a run continues from, besides tensors: weights and optimizers. Saved as JSON."""
    step: int = 0  # finished updates
    finished: bool = False
    teacher_ppl: dict | None = None  # ℓ_T: name → perplexity, measured once; None for each where there is no teacher
    test_teacher_ppl: dict | None = None  # the same on the test windows
    rule_state: dict | None = None  # of the mixture rule, such as r_t
    sampler: dict | None = None  # MixtureSampler.state_dict()
    domains: dict | None = None  # measured_domains of the last evaluation


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of the update that follows `step` finished ones: linear warm-up to lr, then cosine decay, which
    reaches min_lr at the last update."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    decay_steps = config.max_steps - 1 - config.warmup_steps
    if decay_steps <= 0:
        return config.min_lr
    progress = (step - config.warmup_steps) / decay_steps
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model: GPT, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW, with weight decay on matrices only. A list, so that other parameters may get another optimizer; each step
    sets the learning rate of every group."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    betas = [0.9, 0.95]  # no tuple: it would come back from a checkpoint as a list
    groups = [
        {"params": matrices, "betas": betas, "weight_decay": config.weight_decay},
        {"params": vectors, "betas": betas, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=config.lr, fused=True)]


# ------------ One training step ---------------------------------------------------------------------------------------

def training_step(step: int, student: nn.Module, teacher: GPT | None, optimizers: list[torch.optim.Optimizer],
                  windows: torch.Tensor, *, vocab_size: int, config: Config) -> dict[str, float]:
    """One update of the student by Eq. 3 → loss, ce, kl, lr and grad_norm, the same on all ranks.

    student: in its DistributedDataParallel wrapper if it has one. windows: this rank's, (n, block_size + 1) int64.
    Raises UserError, on all ranks and before the update, if the loss or the gradient is not finite."""
    arm = ARMS[config.method]

    # Forward and backward passes, one micro-batch at a time
    totals = torch.zeros(3, device=windows.device)  # loss, ce and kl of this rank
    teacher_hidden = None
    teacher_head = None
    for start in range(0, len(windows), config.micro_batch_size):
        rows = slice(start, start + config.micro_batch_size)
        inputs = windows[rows, :-1]
        targets = windows[rows, 1:]

        # The teacher's hidden states; logits are made inside the loss.
        if arm.divergence is not None:
            with torch.no_grad(), autocast(config):
                teacher_hidden, teacher_head = teacher(inputs, loss_fn=lambda hidden, head: (hidden, head))

        # Eq. 3, as a share of the whole batch: the losses of all micro-batches and ranks are sums over their tokens,
        # divided by the tokens of the batch. So they, and their gradients, add up to Eq. 3's mean.
        def loss_fn(hidden, head):
            return distillation_loss(
                hidden, head, teacher_hidden, teacher_head, targets, gamma=config.gamma,
                temperature=config.temperature, direction=arm.divergence, vocab_size=vocab_size,
                num_tokens=config.batch_size * config.block_size)

        if config.parallel == "ddp":  # which reduces gradients over ranks in the last pass only; FSDP does in each
            student.require_backward_grad_sync = rows.stop >= len(windows)
        with autocast(config):
            loss, ce, kl = student(inputs, loss_fn=loss_fn)
        # Gradients of the ranks have to be added up, but DDP and FSDP average them.
        (loss * world_size()).backward()
        totals += torch.stack((loss, ce, kl)).detach()
    if hasattr(teacher, "reset_iter_state"):
        teacher.reset_iter_state()  # FSDP2 keeps a record of each forward pass that no backward pass follows

    # Clip the gradient, and stop where training has gone wrong: all ranks, or none, since they know the same numbers.
    grad_norm = clip_gradient(student, config)
    loss, ce, kl = over_ranks(totals).tolist()
    if not math.isfinite(loss + grad_norm):
        raise UserError(f"step {step}: loss {loss}, gradient norm {grad_norm}. The update was not made, and nothing is "
                        f"saved. Lower --lr={config.lr}, with --resume=never, or check the data: python data.py "
                        f"--verify={config.data_dir}")

    # One step of each optimizer, with this step's learning rate
    lr = learning_rate(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": loss, "ce": ce, "kl": kl, "lr": lr, "grad_norm": grad_norm}


# ------------ Alg. 1 --------------------------------------------------------------------------------------------------

def train(config: Config) -> Path:
    """Alg. 1, or the arm that `method` names. Returns the folder of the last checkpoint.

    At iteration s of the loop, s updates are done. It evaluates if s is a multiple of K or the last step, and in the
    former case updates r; saves if due; and makes one update unless s is the last: there is one iteration more than
    updates."""
    config = resolve_auto(config)  # of one that is resolved, it changes nothing
    arm = ARMS[config.method]

    with RunFolder(Path(config.out_dir)) as run:
        # Rank 0 checks everything that is cheap, and shares what it found. Then it finds the checkpoint to continue
        # from: `resumed` is its folder, or None.
        bins, model_configs = on_rank_0(preflight, config)
        state, resumed = on_rank_0(run.open, config, bins)
        if state.finished:
            print(f"{config.out_dir}: this run is finished (step {state.step})")
            return resumed

        # The data: fixed windows for validation and test, and the sampler of training windows
        val_windows = fixed_windows(bins, bins.val_windows, config.val_samples)
        test_windows = fixed_windows(bins, bins.test_windows, config.test_samples)
        sampler = MixtureSampler(bins.n_windows, config.batch_size, config.seed)
        if config.mixture:
            sampler.probs = parse_mixture(config.mixture)
        natural = sampler.probs  # the proportions of the data as it is, or --mixture's in their place

        # The teacher (None if there is none) and the student, on this rank's device, whole or sharded
        models = load_models(config, model_configs, resumed)
        teacher = models.get("teacher")
        student = models["student"]
        optimizers = make_optimizers(student, config)

        # measure(model, windows) is ℓ, name → perplexity, in the same way for both models.
        measure = functools.partial(perplexities, vocab_size=bins.vocab_size, micro_batch_size=config.micro_batch_size,
                                    precision=autocast(config))

        # Continue from the checkpoint, or start: ℓ_T is measured once in a run.
        if resumed is not None:
            load_checkpoint(resumed, state, sampler, student, optimizers)
        else:
            state.teacher_ppl = dict.fromkeys(bins.names)
            state.test_teacher_ppl = dict.fromkeys(bins.names)
            if teacher is not None:
                state.teacher_ppl = measure(teacher, val_windows)
                state.test_teacher_ppl = measure(teacher, test_windows)
            run.log("run", 0, config=asdict(config), command=sys.argv, rule=arm.rule,
                    natural=dict(zip(bins.names, natural.tolist())), versions=environment(),
                    parameters=count_parameters(models))
        if not arm.trains_with_teacher:  # it has been measured, and its memory is free for training
            teacher = None
            models.pop("teacher", None)

        # DDP wraps the student for the forward passes of training only; FSDP has sharded it in place.
        wrapped_student = student
        if config.parallel == "ddp":
            wrapped_student = DistributedDataParallel(student, gradient_as_bucket_view=True)

        # The loop. From here on a signal waits for the end of a step or an evaluation.
        run.catch_signals()
        first_step = state.step
        step_times = deque(maxlen=50)  # of the latest steps, in seconds
        while True:
            # Every K steps: measure ℓ_S, update r, log. At the end: measure. A resumed run did so before it was saved.
            t, steps_since_update = divmod(state.step, config.interval)
            last = state.step >= config.max_steps
            just_resumed = resumed is not None and state.step == first_step
            if (steps_since_update == 0 or last) and not just_resumed:
                student_ppl = measure(student, val_windows)
                state.domains = measured_domains(student_ppl, state.teacher_ppl, sampler, config.block_size)
                if steps_since_update == 0:
                    r, state.rule_state = RULES[arm.rule](state.rule_state, list(student_ppl.values()),
                                                          list(state.teacher_ppl.values()), natural, config.alpha)
                    sampler.probs = r
                    # What the next K steps draw by: for ddk at t = 0 the natural proportions, not the r_0 of its state.
                    run.log("mixture", state.step, t=t, r=dict(zip(bins.names, r.tolist())), domains=state.domains)
                if state.step == 0:
                    print_first_table(state.domains, bins, config)
                if worst_ratio(state.domains) <= config.stop_ratio:  # §3.4's threshold; no ratio is below 0
                    last = True

            # After the last step: measure on the test windows too, which r never follows.
            if last:
                for name, test_ppl in measure(student, test_windows).items():
                    tested = with_ratio(test_ppl, state.test_teacher_ppl[name], prefix="test_")
                    state.domains[name].update(tested)
                run.log("end", state.step, domains=state.domains)

            # Save: every save_every steps, at the end, and when a signal asks for it.
            signal_number = run.signal_on_any_rank()
            save_due = config.save_every > 0 and state.step > 0 and state.step % config.save_every == 0
            if (last or save_due or signal_number) and not just_resumed:
                state.finished = last
                state.sampler = sampler.state_dict()
                save_checkpoint(run.folder_of(state.step), state, student, optimizers, bins, config.keep)
            if signal_number:
                stop_by_signal(signal_number, run.folder_of(state.step))
            if last:
                return run.folder_of(state.step)

            # Draw the next batch by r. Each rank reads its share of the windows.
            started = time.perf_counter()
            domain_ids, window_ids = sampler.next_batch()
            mine = rank_slice(config)
            windows = torch.from_numpy(bins.train_windows(domain_ids[mine], window_ids[mine])).to(config.device)

            # One update of the student
            step_log = training_step(state.step, wrapped_student, teacher, optimizers, windows,
                                     vocab_size=bins.vocab_size, config=config)
            state.step += 1

            # Log
            step_times.append(time.perf_counter() - started)
            step_log |= speed(step_times, state.step, config)
            run.log("train", state.step, **step_log)
            print_progress(state.step, step_log, config)


# ======================================================================================================================
# What surrounds a run: Eq. 3 chunk by chunk, processes, devices, the run's folder, checkpoints, checks, report,
# quickstart, command line
# ======================================================================================================================


# ------------ Eq. 3 without the logits of all tokens ------------------------------------------------------------------

def distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, *,
                      chunk_size: int | None = None, **equation):
    """Eq. 3 from hidden states (…, d) and heads (V, d), without ever holding (tokens, V) logits → (loss, ce, kl).

    Logits are made for `chunk_size` tokens at a time, and `dense_distillation_loss` is differentiated on each chunk, so
    that the forward pass makes the gradients too. The other keywords are those of `dense_distillation_loss`; a tensor
    among them that is not a single number has a value per token, and goes with the targets. loss.backward() gives the
    gradients of student_hidden and student_head, once. teacher_hidden and teacher_head may both be None. The default
    chunk has 2²⁸ logits on CUDA; elsewhere 2²⁶, and at most 512 tokens."""
    # What may change between steps is a tensor: torch.compile would recompile for each new value of a Python number. A
    # new coefficient that does is one more name here.
    hidden = student_hidden.flatten(0, -2)
    if equation.get("num_tokens") is None:
        equation["num_tokens"] = (targets != -100).sum().clamp(min=1)
    for name in ("gamma", "num_tokens"):
        if name in equation and not torch.is_tensor(equation[name]):
            loss_dtype = torch.promote_types(hidden.dtype, torch.float32)
            equation[name] = hidden.new_full((), equation[name], dtype=loss_dtype)

    # Whatever has a row or a value for each token
    assert student_hidden.shape[:-1] == targets.shape, (student_hidden.shape, targets.shape)
    per_token = {"targets": targets.flatten()}
    if teacher_hidden is not None:
        per_token["teacher_hidden"] = teacher_hidden.flatten(0, -2)
    for name, value in list(equation.items()):
        if torch.is_tensor(value) and value.dim() > 0:
            per_token[name] = equation.pop(name).expand_as(targets).flatten()

    # Chunks of one shape, for the same reason: a power of two, and the last one is filled up with ignored targets.
    if chunk_size is None:
        chunk_size = default_chunk_size(len(student_head), hidden.is_cuda)
    chunk_size = max(1, min(chunk_size, len(hidden)))
    n_missing = -len(hidden) % chunk_size
    hidden = add_rows(hidden, n_missing)
    for name, value in per_token.items():
        per_token[name] = add_rows(value, n_missing, fill=-100 if name == "targets" else 0)

    if not torch.is_grad_enabled():  # which an autograd.Function cannot see
        hidden = hidden.detach()
        student_head = student_head.detach()
    return ChunkedLoss.apply(hidden, student_head, teacher_head, per_token, chunk_size, equation)


def default_chunk_size(rows: int, on_cuda: bool) -> int:
    """Tokens per chunk for a head of `rows` rows: a power of two, within the limits that distillation_loss names."""
    most = 2**28 // rows if on_cuda else min(512, 2**26 // rows)
    return 2 ** int(math.log2(max(1, most)))


def add_rows(tensor: torch.Tensor, n: int, fill: int = 0) -> torch.Tensor:
    """`tensor` with n rows more at its end, which hold `fill`."""
    if n == 0:
        return tensor
    return torch.cat((tensor, tensor.new_full((n, *tensor.shape[1:]), fill)))


class ChunkedLoss(torch.autograd.Function):
    """The chunks of distillation_loss. The forward pass makes the gradients as well, while the logits are there."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_head, per_token, chunk_size, equation):
        # The gradient of the head is a sum over chunks: at least float32, whatever the head is.
        wants_gradient = any(ctx.needs_input_grad)
        if wants_gradient:
            grad_hidden = torch.zeros_like(hidden)
            grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))

        # The dtype of the products, cast once and not for each chunk
        teacher_hidden = per_token.pop("teacher_hidden", None)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden = hidden.to(dtype)
            head = head.to(dtype)
            if teacher_hidden is not None:
                teacher_hidden = teacher_hidden.to(dtype)
                teacher_head = teacher_head.to(dtype)

        # One buffer of logits for all chunks
        student_logits = aligned_empty(hidden, chunk_size, len(head))
        teacher_logits = None
        if teacher_hidden is not None:
            teacher_logits = aligned_empty(teacher_hidden, chunk_size, len(teacher_head))

        # Compiling takes seconds: too long where there is little to compute.
        eq3 = eq3_of_chunk
        if hidden.is_cuda or len(hidden) * len(head) > 2**24:
            eq3 = compile_eq3()
        totals = hidden.new_zeros(3, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            torch.mm(hidden[chunk], head.T, out=student_logits)
            if teacher_hidden is not None:
                torch.mm(teacher_hidden[chunk], teacher_head.T, out=teacher_logits)
            values = {name: value[chunk] for name, value in per_token.items()}
            totals = totals + eq3(student_logits, teacher_logits, values, equation, wants_gradient)
            if wants_gradient:
                grad_logits = student_logits  # eq3 has written it over them
                grad_hidden[chunk] = grad_logits @ head
                add_product(grad_head, grad_logits.T, hidden[chunk])

        if wants_gradient:
            ctx.save_for_backward(grad_hidden, grad_head)
        loss, ce, kl = (total.clone() for total in totals)  # FSDP2 warns of outputs that are views
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_ce, grad_kl):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None, None


def aligned_empty(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) with room for a multiple of 64 columns, which the matrix products of GPUs require to be fast.

    The columns behind are 0: bfloat16 products on CPUs with AMX read them, and what happens to stand there may be NaN,
    which times 0 is NaN."""
    padded = like.new_empty(rows, math.ceil(columns / 64) * 64)
    padded[:, columns:] = 0
    return padded[:, :columns]


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor):
    """total += a @ b. Of a float32 total and bfloat16 factors CUDA adds the product up in float32; other devices, and
    torch before 2.13, round it to bfloat16 first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and torch.__version__ >= (2, 13):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def eq3_of_chunk(student_logits, teacher_logits, per_token: dict, equation: dict, wants_gradient: bool):
    """Eq. 3 of one chunk → (3,): loss, ce, kl. The gradient with respect to student_logits is written over them."""
    def loss_and_parts(logits):
        loss, ce, kl = dense_distillation_loss(logits, teacher_logits, **per_token, **equation)
        return loss, torch.stack((loss, ce, kl))

    if wants_gradient:
        gradient, parts = torch.func.grad(loss_and_parts, has_aux=True)(student_logits)
        student_logits.copy_(gradient)
    else:
        _, parts = loss_and_parts(student_logits)
    return parts


RECOMPILE_LIMIT = 64  # variants of one piece of code in one process; torch's own 8 are few, and more run uncompiled


@functools.cache
def compile_eq3():
    """eq3_of_chunk, compiled, so that its passes over the logits are fused. If torch.compile fails here, it warns once
    and runs uncompiled, which is slower and holds a dozen copies of the chunk's logits."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    compiled = torch.compile(eq3_of_chunk, dynamic=False)
    works = True

    def eq3(*args):
        nonlocal works
        if works:
            try:
                return compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                works = False
                warnings.warn(f"torch.compile does not work here; the loss is slower without: {str(error)[:300]}")
        return eq3_of_chunk(*args)

    return eq3


# ------------ Many processes ------------------------------------------------------------------------------------------

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def planned_world_size(config: Config) -> int:
    """Processes of this run, also before they meet; of a dry run those that it plans for, by WORLD_SIZE."""
    if not dist.is_initialized() and ("RANK" in os.environ or config.dry_run):
        return int(os.environ.get("WORLD_SIZE", 1))
    return world_size()


def on_rank_0(function: Callable, *args, share: bool = True):
    """What `function(*args)` returns on rank 0, on every rank; without `share`, None on the others.

    A UserError or OSError is raised on every rank."""
    result = None
    error = None
    if rank() == 0:
        try:
            result = function(*args)
        except (UserError, OSError) as exception:
            error = exception
    if dist.is_initialized():
        shared = [result if share else None, error]
        dist.broadcast_object_list(shared)
        error = shared[1]
        if rank() != 0:
            result = shared[0]
    if error is not None:
        raise error
    return result


@contextmanager
def process_group(config: Config):
    """torch.distributed, if torchrun started this process, for as long as the context lasts. Rank 0 alone prints."""
    if "RANK" not in os.environ:
        yield
        return
    # Each process takes the GPU of its number.
    backend = "gloo"
    device_id = None
    if resolve_device(config.device).type == "cuda":
        backend = "nccl"
        device_id = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device_id)
    dist.init_process_group(backend, timeout=timedelta(minutes=config.timeout), device_id=device_id)
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if rank() == 0 else nowhere):
        try:
            yield
            dist.barrier()
        except RuntimeError as error:
            # A process that ends makes the collectives of the others fail.
            if not re.search("gloo|NCCL|Connection (closed|reset|refused)", str(error)):
                raise
            reason = " ".join(str(error).split())[:600]  # NCCL's own cause is on its second line
            raise UserError(f"another process is gone, or silent for {config.timeout} minutes ({reason}); the same "
                            "command continues from the last checkpoint") from None


def evaluation_batches(windows: torch.Tensor, micro_batch_size: int, device) -> Iterator[tuple]:
    """This rank's share of `windows` (n, block_size + 1) as (inputs, targets), micro_batch_size at a time.

    Filled up with ignored targets: FSDP requires equally many passes on all ranks, and torch.compile one shape."""
    per_rank = min(micro_batch_size, math.ceil(len(windows) / world_size()))
    for batch in windows.split(per_rank * world_size()):
        my_windows = batch[rank()::world_size()]
        n_missing = per_rank - len(my_windows)
        inputs = add_rows(my_windows[:, :-1], n_missing)
        targets = add_rows(my_windows[:, 1:], n_missing, fill=-100)
        yield inputs.to(device), targets.to(device)


# ------------ Models on devices ---------------------------------------------------------------------------------------

def resolve_auto(config: Config) -> Config:
    """`config` with what this machine and these processes make of each `auto`, and of micro_batch_size=0."""
    device = resolve_device(config.device)
    on_cuda = device.type == "cuda"
    parallel = "none"
    if dist.is_initialized():
        device = device.type  # without a number: each process has taken its own
        parallel = "fsdp" if on_cuda else "ddp"
    choices = {
        "dtype": "bfloat16" if on_cuda else "float32",
        "compile": "true" if on_cuda else "false",
        "parallel": parallel,
    }
    values = {name: choice for name, choice in choices.items() if getattr(config, name) == "auto"}
    micro_batch_size = config.micro_batch_size or config.batch_size // planned_world_size(config)
    return replace(config, device=str(device), micro_batch_size=micro_batch_size, **values)


def autocast(config: Config):
    """The dtype of the matrix products. Under FSDP its own policy casts."""
    device_type = torch.device(config.device).type
    enabled = config.dtype == "bfloat16" and config.parallel != "fsdp"
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)


def models_of(config: Config) -> dict[str, str]:
    """The models of a run: role, which is also their key, → what the key names. Preflight, hashes and loading walk it.

    The student is trained, in float32. Any other is a frozen teacher, in the dtype of the products."""
    sources = {"teacher": config.teacher, "student": config.student}
    return {role: source for role, source in sources.items() if source}


def load_models(config: Config, model_configs: dict[str, GPTConfig], resumed: Path | None) -> dict[str, GPT]:
    """The models that the run still needs, role → model, on every rank; the student from `resumed` if it continues."""
    models = {}
    for role, source in models_of(config).items():
        dtype = getattr(torch, config.dtype)
        if role == "student":
            dtype = torch.float32
            source = str(resumed or source)
        elif resumed is not None and not ARMS[config.method].trains_with_teacher:
            continue  # it has been measured

        # Rank 0 reads the model. Other ranks get one on the meta device, for `spread` to fill.
        print(f"reading the {role}: {source}", flush=True)
        model = on_rank_0(read_model, role, source, config, model_configs[role], dtype, share=False)
        if model is None:
            with torch.device("meta"):
                model = GPT(model_configs[role]).to(dtype)
        model.requires_grad_(role == "student")
        models[role] = model

    if config.compile == "true":
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # the blocks of all models are one piece of code
        torch._dynamo.config.optimize_ddp = False  # which would cut blocks at DDP's buckets
    for role, model in models.items():
        spread(model, config, shard=config.parallel == "fsdp" and (role == "student" or config.shard_teacher))
    return models


def read_model(role: str, source: str, config: Config, model_config: GPTConfig, dtype: torch.dtype) -> GPT:
    """The model that `source` names: a folder, scratch:LxD, or layers:N of the teacher."""
    kind, _, size = source.partition(":")
    if kind == "scratch":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return GPT(model_config)
    if kind == "layers":
        model = GPT.from_pretrained(model_folder(config.teacher, "--teacher", MODEL_FILES))
        model.keep_layers(int(size))
        return model.to(dtype)
    return GPT.from_pretrained(model_folder(source, f"--{role}", MODEL_FILES), dtype)


def spread(model: GPT, config: Config, shard: bool):
    """Put the model that rank 0 read on every rank's device: whole, or sharded over all ranks.

    FSDP2 gathers one block at a time, in the dtype of the products, and reduces gradients in float32. Without
    `cast_forward_inputs` the rotary tables stay float32."""
    # Each block by itself and in place, so that the names of the weights stay as they are
    for layer in model.layers:
        if config.checkpoint_activations:
            layer.forward = recomputed(layer.forward)
        if config.compile == "true":
            layer.compile(dynamic=False)
    if not dist.is_initialized():
        model.to(config.device)
        return

    # Whole on every device: each tensor from rank 0
    if not shard:
        if rank() == 0:
            model.to(config.device)
        else:
            model.to_empty(device=config.device)
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
        return

    # Shard what has no memory yet, so that no rank ever holds more than its share
    whole_state = model.state_dict() if rank() == 0 else {}
    model.to("meta")
    mesh = init_device_mesh(torch.device(config.device).type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    # Rank 0 hands the weights out
    model.to_empty(device=config.device)
    set_model_state_dict(model, whole_state, options=whole_tensors())


def recomputed(forward: Callable) -> Callable:
    """`forward`, whose activations are computed again in the backward pass. torch.compile skips a partial."""
    def checkpointed(*inputs):
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpointed


def clip_gradient(student: nn.Module, config: Config) -> float:
    """Scale the gradient down to a norm of grad_clip, if it is larger. Returns its norm before, over all shards."""
    max_norm = config.grad_clip if config.grad_clip > 0 else math.inf
    grad_norm = nn.utils.clip_grad_norm_(student.parameters(), max_norm)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    return grad_norm.item()


def whole_tensors(cpu_offload: bool = False) -> StateDictOptions:
    """A checkpoint holds whole tensors, which rank 0 reads and writes: any number of ranks can continue from it."""
    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload, broadcast_from_rank0=dist.is_initialized())


# ------------ The run's folder ----------------------------------------------------------------------------------------

class RunFolder(ExitStack):
    """A run's out_dir: its lock, config.json, metrics.jsonl, checkpoints, and the signals that ask for one.

    Every rank has one, but only rank 0 reads and writes. Leaving its context closes what it has opened."""

    def __init__(self, out_dir: Path):
        super().__init__()
        self.out_dir = out_dir
        self.metrics = None
        self.wandb = None
        self.received_signal = 0

    def open(self, config: Config, bins: TokenBins) -> tuple[TrainState, Path | None]:
        """Lock the folder, and find the checkpoint to continue from → the training state, its folder (None: start)."""
        record = {"config": asdict(config), "content": experiment_content(config, bins)}

        # Take the folder for this process alone, if it is a run's.
        files = set()
        if self.out_dir.exists():
            files = set(os.listdir(self.out_dir)) - {LOCK}
        if files and "metrics.jsonl" not in files:
            raise UserError(f"--out_dir={self.out_dir}: has files, and is not the folder of a run; name another one")
        if config.resume == "never" and files:
            with locked(self.out_dir):
                os.replace(self.out_dir, free_name(self.out_dir))
        self.enter_context(locked(self.out_dir))

        # Refuse to continue another experiment.
        metrics_path = self.out_dir / "metrics.jsonl"
        metrics_path.touch()
        if metrics_path.stat().st_size > 0 or list_checkpoints(self.out_dir):
            check_same_experiment(self.out_dir, record)

        # Continue from the newest whole checkpoint, and drop what was logged after it.
        resumed = newest_checkpoint(self.out_dir)
        state = TrainState()
        last_step = -1
        if resumed is not None:
            state = read_state(resumed)
            last_step = state.step
            if not state.finished:
                print(f"{self.out_dir}: continuing from {resumed.name}")
        kept = [line for line in read_metrics(metrics_path) if line["step"] <= last_step]
        write_text(metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
        if not state.finished:
            write_text(self.out_dir / "config.json", json.dumps(record, indent=1))
            self.metrics = self.enter_context(open(metrics_path, "a", encoding="utf-8"))
            if config.wandb:
                self.open_wandb(config)
        return state, resumed

    def open_wandb(self, config: Config):
        """Log to Weights & Biases. A resumed run, on another machine too, continues its curves, by the id in a file."""
        id_path = self.out_dir / "wandb_id"
        if not id_path.exists():
            write_text(id_path, uuid.uuid4().hex)
        with user_errors("--wandb", "run wandb login, or set WANDB_MODE=offline"):
            self.wandb = import_optional("wandb", "--wandb").init(
                project="ddk", name=config.out_dir, id=id_path.read_text(), resume="allow", dir=config.out_dir,
                config=asdict(config))
        self.callback(self.wandb.finish)

    def log(self, kind: str, step: int, **values):
        """Append a line to metrics.jsonl, and log it to Weights & Biases if that is asked for."""
        if self.metrics is not None:
            print(json.dumps({"kind": kind, "step": step, **values}), file=self.metrics, flush=True)
        if self.wandb is not None and kind != "run":
            self.wandb.log({kind: values}, step=step)

    def catch_signals(self):
        """From here on SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C wait for the loop to save. A second Ctrl-C exits at once."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                handler_before = signal.signal(number, self.receive_signal)
                self.callback(signal.signal, number, handler_before)

    def receive_signal(self, number, frame):
        if number == signal.SIGINT and self.received_signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.received_signal = number

    def signal_on_any_rank(self) -> int:
        """The number of a signal that any rank has received, on every rank; 0 if none."""
        return int(over_ranks(torch.tensor(self.received_signal), dist.ReduceOp.MAX))

    def folder_of(self, step: int) -> Path:
        return self.out_dir / f"step_{step:08d}"


def free_name(path: Path) -> Path:
    """`path`, or with .1, .2, … appended: the first that does not exist."""
    n = 0
    free = path
    while free.exists():
        n += 1
        free = path.with_name(f"{path.name}.{n}")
    return free


def experiment_content(config: Config, bins: TokenBins) -> dict[str, str]:
    """What identifies the bins and models of an experiment, wherever they lie: key → hash of the content."""
    content = {"data_dir": bins.content(), "teacher": ""}  # "": a run without a teacher
    for role, source in models_of(config).items():
        content[role] = source
        if not is_made(source):
            print(f"hashing the {role}: {source}", flush=True)
            folder = model_folder(source, f"--{role}", MODEL_FILES)
            files = [folder / "config.json", *weight_files(folder)]
            content[role] = digest([(path.name, file_sha256(path)) for path in files])
    return content


def check_same_experiment(out_dir: Path, record: dict):
    """Raises UserError if `out_dir` holds a run of another experiment than `record`, naming each key that differs.

    A key that is newer than that run had its default then, and a content that it did not record is not compared."""
    path = out_dir / "config.json"
    with user_errors(path, "not as a run writes it; name another --out_dir"):
        saved = json.loads(path.read_text(encoding="utf-8"))
        before = {**asdict(Config()), **saved["config"]}
        content_before = {**record["content"], **saved["content"]}
    problems = []
    for entry in fields(Config):
        name = entry.name
        other_value = before[name] != record["config"][name] and not entry.metadata["may_change"]
        other_content = content_before.get(name) != record["content"].get(name)
        if other_value or other_content:
            what = "content" if other_content else "value"
            problems.append(f"--{name}={record['config'][name]}: another {what} than the run in {out_dir} has with "
                            f"{name}={before[name]}")
    if problems:
        problems.append(f"--out_dir={out_dir}: keep the values of its run, name another folder, or move the run aside "
                        "with --resume=never. To train a finished student longer, name its folder as --student")
        raise UserError("\n".join(problems))


def environment() -> dict:
    """Versions that a result may depend on, and the git revision of this file if it has one."""
    status, revision = subprocess.getstatusoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
            "git": revision if status == 0 else None}


def count_parameters(models: dict[str, GPT]) -> dict[str, int]:
    return {role: sum(p.numel() for p in model.parameters()) for role, model in models.items()}


def stop_by_signal(number: int, folder: Path):
    """End the program after a save that a signal asked for."""
    print(f"{folder.parent}: stopped by {signal.Signals(number).name}, saved as {folder.name}; "
          "the same command continues from there")
    sys.exit(128 + number)


# ------------ Checkpoints ---------------------------------------------------------------------------------------------
# step_00000400/ is a model's folder in Hugging Face's format with the tokenizer, optimizer.pt, train_state.json, and
# manifest.json, which holds the sha256 of all others. It is written under another name, synced to disk, and renamed: it
# is whole, or not there.


def save_checkpoint(folder: Path, state: TrainState, student: GPT, optimizers: list, bins: TokenBins, keep: int):
    """Write the checkpoint of this step, then delete all but the newest `keep`. All ranks call it, rank 0 writes, and
    none leaves before it is whole."""
    # Gather whole tensors. An optimizer that has made no update yet has no state, and would make one up if asked.
    options = whole_tensors(cpu_offload=True)
    weights = get_model_state_dict(student, options=options)
    optimizer_state = None
    if state.step > 0:
        optimizer_state = get_optimizer_state_dict(student, optimizers, options=options)
    on_rank_0(write_checkpoint, folder, state, student, weights, optimizer_state, bins, keep)


def write_checkpoint(folder: Path, state: TrainState, student: GPT, weights: dict, optimizer_state, bins: TokenBins,
                     keep: int):
    # Write all files under another name, and to the disk itself.
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        student.save_pretrained(temporary, weights)
        save_tokenizer(temporary, bins)
        torch.save(optimizer_state, temporary / "optimizer.pt")
        write_text(temporary / "train_state.json", json.dumps(asdict(state), indent=1))
        manifest = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
        # The log too: a checkpoint is to have all lines before it.
        for path in (*temporary.iterdir(), temporary, folder.parent / "metrics.jsonl"):
            fsync(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # how each library says that the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder}: cannot be saved ({error}); make room, and the same command continues from the "
                        "checkpoint before it") from None

    # Now it is whole, and old ones may go.
    os.replace(temporary, folder)
    fsync(folder.parent)
    if keep > 0:
        for old in list_checkpoints(folder.parent)[:-keep]:
            shutil.rmtree(old)


def list_checkpoints(out_dir: Path) -> list[Path]:
    """Checkpoint folders, the newest last."""
    return sorted(out_dir.glob("step_" + 8 * "[0-9]"))


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The newest whole checkpoint. Damaged ones are named and renamed corrupt_step_…."""
    # What a run that was killed in a save has left
    for unfinished in out_dir.glob("step_*.tmp"):
        shutil.rmtree(unfinished)
    for folder in reversed(list_checkpoints(out_dir)):
        wrong = damaged_files(folder)
        if not wrong:
            return folder
        aside = free_name(folder.with_name(f"corrupt_{folder.name}"))
        os.replace(folder, aside)
        print(f"WARNING: {folder}: {', '.join(wrong)} missing or changed; renamed {aside.name}; the checkpoint before "
              "it is used, if there is one")
    return None


def damaged_files(folder: Path) -> list[str]:
    """The files of a checkpoint that are missing, or not as its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return [name for name, sha256 in manifest.items()
                if not (folder / name).is_file() or file_sha256(folder / name) != sha256]
    except (OSError, ValueError, AttributeError):
        return ["manifest.json"]


NOT_AS_SAVED = "not as a run saves it; delete this step's folder, and the checkpoint before it is used"


def read_state(folder: Path) -> TrainState:
    """The training state of a checkpoint."""
    path = folder / "train_state.json"
    with user_errors(path, NOT_AS_SAVED):
        return TrainState(**json.loads(path.read_text(encoding="utf-8")))


def load_checkpoint(folder: Path, state: TrainState, sampler: MixtureSampler, student: GPT, optimizers: list):
    """Restore the sampler and the optimizers. Rank 0 reads; only tensors are unpickled."""
    with user_errors(folder / "train_state.json", NOT_AS_SAVED):
        sampler.load_state_dict(state.sampler)
    optimizer_state = on_rank_0(read_optimizer_state, folder, share=False)
    if state.step > 0:
        set_optimizer_state_dict(student, optimizers, optimizer_state or {}, options=whole_tensors())


def read_optimizer_state(folder: Path) -> dict:
    with user_errors(folder / "optimizer.pt", NOT_AS_SAVED):
        return torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)


# ------------ Checks before anything slow -----------------------------------------------------------------------------

# What is checked of a model before its weights are downloaded
DESCRIBING_FILES = ("config.json", TOKENIZER_META, *TOKENIZER_FILES)


def preflight(config: Config) -> tuple[TokenBins, dict[str, GPTConfig]]:
    """The bins and the models' configurations, checked before a weight is read. UserError with all problems."""
    bins = open_bins(config)
    problems = []

    # The bins against the keys
    attempt(problems, fixed_windows, bins, bins.val_windows, config.val_samples)
    attempt(problems, fixed_windows, bins, bins.test_windows, config.test_samples)
    mixture = parse_mixture(config.mixture)
    if mixture and set(mixture) != set(bins.names):
        problems.append(f"--mixture={config.mixture}: the domains of {config.data_dir} are {' '.join(bins.names)}")

    # The models against the bins
    model_configs = {}
    for role, source in models_of(config).items():
        model_config = attempt(problems, checked_model_config, role, source, bins, model_configs.get("teacher"))
        if model_config is not None:
            model_configs[role] = model_config
    if config.dry_run:
        print_cost(config, bins, model_configs)
    if problems:
        raise UserError("\n".join(problems))
    return bins, model_configs


def attempt(problems: list[str], function: Callable, *args):
    """What `function(*args)` returns. If it raises UserError, None, and the message is added to `problems`."""
    try:
        return function(*args)
    except UserError as error:
        problems.append(str(error))
        return None


def open_bins(config: Config) -> TokenBins:
    return TokenBins(config.data_dir, config.block_size, config.domains.split(",") if config.domains else None)


def fixed_windows(bins: TokenBins, read: Callable, count: int) -> dict[str, torch.Tensor]:
    """What `read`, bins.val_windows or bins.test_windows, gives for each domain; {} if count is 0."""
    if count == 0:
        return {}
    return {name: torch.from_numpy(read(name, count)) for name in bins.names}


def parse_mixture(text: str) -> dict[str, float]:
    """`name=weight,…` as a dict; {} if empty. Raises UserError."""
    if not text:
        return {}
    try:
        pairs = [part.split("=") for part in text.strip().split(",")]
        weights = {name: float(weight) for name, weight in pairs}
        checked_weights("weights", list(weights.values()), len(pairs))
    except ValueError:
        raise UserError(f"--mixture={text}: write name=weight,… with weights ≥ 0, not all 0") from None
    return weights


def is_made(source: str) -> bool:
    """Whether a student is made anew, or of the teacher's layers: not a folder, and no name on the Hub.

    Another kind of student is added here, and in `contradictions`, `checked_model_config` and `read_model`."""
    return source.partition(":")[0] in ("scratch", "layers")


def checked_model_config(role: str, source: str, bins: TokenBins, teacher: GPTConfig | None) -> GPTConfig:
    """The GPTConfig of the model that `source` names. UserError unless it can read the bins' windows, and has the
    tokenizer of the bins."""
    # A student that is made: for the bins, or of the teacher, which is checked itself
    kind, _, size = source.partition(":")
    if kind == "scratch":
        layers, width = size.split("x")
        return GPTConfig.scratch(int(layers), int(width), bins.vocab_size, bins.block_size)
    if kind == "layers":
        if teacher is None or int(size) > teacher.num_hidden_layers:
            raise UserError(f"--student={source}: the teacher cannot be read, or has fewer layers")
        return replace(teacher, num_hidden_layers=int(size))

    # A folder, or a name on the Hub
    folder = model_folder(source, f"--{role}", DESCRIBING_FILES)
    ours = bins.tokenizer
    try:
        model_config = read_config(folder)
        theirs = model_tokenizer(folder, ours["eot_token"])
    except UserError as error:
        raise UserError(f"--{role}={source}: {error}") from None
    fix = f"make the bins again with data.py --tokenizer={source}"
    if model_config.vocab_size < bins.vocab_size:
        raise UserError(f"--{role}={source}: has {model_config.vocab_size} ids, but the tokenizer of the bins has "
                        f"{bins.vocab_size}; {fix}")
    if model_config.context < bins.block_size:
        raise UserError(f"--block_size={bins.block_size}: the {role} {source} reads at most {model_config.context} "
                        "tokens")
    if theirs is None or is_tiktoken(theirs.name, theirs.files) != is_tiktoken(ours["name"], ours["files"]):
        print(f"WARNING: --{role}={source} has no tokenizer that can be compared with the bins', {ours['name']}; it is "
              "taken, since it has enough ids")
    elif theirs.fingerprint != ours["fingerprint"]:
        name = Path(source).name  # of a folder of the Hub's cache it would be a hash
        raise UserError(f"--{role}={source}: its tokenizer {name} ({theirs.vocab_size} ids) is not that of the bins, "
                        f"{ours['name']} ({ours['vocab_size']} ids); {fix}")
    return model_config


def contradictions(config: Config) -> list[str]:
    """What is wrong with a configuration that can be told without opening a file."""
    arm = ARMS[config.method]
    makes_models = config.preset == "quickstart"
    launched = "RANK" in os.environ
    world = planned_world_size(config)
    per_pass = max(1, config.micro_batch_size)
    too_few_gpus = (launched and config.device in ("auto", "cuda") and torch.cuda.is_available()
                    and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count())

    checks = [  # (whether it is wrong, the message)
        (not config.preset, f"--preset: name one, since it sets what a step is: {describe_presets()}"),
        (is_made(config.student) and not re.fullmatch(r"scratch:[1-9]\d*x(?!0)\d*[02468]|layers:[1-9]\d*",
                                                      config.student),
         f"--student={config.student}: write scratch:LxD with D even, as in scratch:4x128, or layers:N"),
        (is_made(config.teacher), f"--teacher={config.teacher}: name the folder of a trained model"),
        (not config.student and not makes_models, "--student: name its folder, scratch:LxD or layers:N"),
        (arm.trains_with_teacher and not config.teacher and not makes_models,
         f"--teacher: --method={config.method} requires one; name its folder"),
        (config.mixture and arm.rule == "equal",
         f"--mixture={config.mixture}: --method={config.method} draws all domains alike"),
        (0 < config.max_steps <= config.warmup_steps,
         f"--warmup_steps={config.warmup_steps}: the whole run would be warm-up, since --max_steps={config.max_steps}; "
         "a tenth of the steps is common"),
        (config.batch_size % (per_pass * world) != 0,
         f"--batch_size={config.batch_size}: must be a multiple of micro_batch_size={per_pass} × {world} processes"),
        (config.parallel == "none" and world > 1,
         f"--parallel=none: there are {world} processes; take ddp or fsdp"),
        (config.parallel in ("ddp", "fsdp") and not launched and not config.dry_run,
         f"--parallel={config.parallel}: start with torchrun --nproc_per_node=N distill.py"),
        (too_few_gpus, f"--device={config.device}: more processes than GPUs here; start fewer, or --device=cpu"),
    ]
    problems = [message for is_wrong, message in checks if is_wrong]
    attempt(problems, parse_mixture, config.mixture)
    attempt(problems, resolve_device, config.device)
    if config.wandb:
        attempt(problems, import_optional, "wandb", "--wandb")
    return problems


def describe_presets() -> str:
    """What a step of the presets is, for the message that asks for one."""
    described = []
    for name in ("quickstart", "paper"):
        preset = Config(**PRESETS[name])
        described.append(f"{name} ({preset.batch_size} windows × {preset.block_size} tokens a step, "
                         f"{preset.max_steps:,} steps, lr {preset.lr:g})")
    return " or ".join(described)


# ------------ What a run takes ----------------------------------------------------------------------------------------

def step_flops(parameters: dict[str, int], config: Config) -> float:
    """Floating-point operations of a training step, about: 6 a weight and token for the student, 2 for a teacher."""
    flops_per_token = 6 * parameters["student"]
    if ARMS[config.method].trains_with_teacher:
        flops_per_token += 2 * sum(n for role, n in parameters.items() if role != "student")
    return flops_per_token * config.batch_size * config.block_size


def model_bytes(role: str, n_parameters: int, config: Config, world: int) -> dict[str, float]:
    """What a model holds on each of `world` devices between passes, name → bytes: weights in the dtype of the products,
    but the student's in float32 with gradients and AdamW's two moments."""
    widths = {"weights": 2 if config.dtype == "bfloat16" else 4}
    if role == "student":
        widths = {"weights": 4, "gradients": 4, "optimizer": 8}
    is_sharded = config.parallel != "ddp" and (role == "student" or config.shard_teacher)
    shards = world if is_sharded else 1
    return {part: width * n_parameters / shards for part, width in widths.items()}


def print_cost(config: Config, bins: TokenBins, model_configs: dict[str, GPTConfig]):
    """Print what a run would take, from sizes alone, on as many devices as torchrun, or WORLD_SIZE, says."""
    # Bytes per device
    world = planned_world_size(config)
    with torch.device("meta"):
        parameters = count_parameters({role: GPT(model_config) for role, model_config in model_configs.items()})
    for role, n in parameters.items():
        parts = model_bytes(role, n, config, world)
        described = ", ".join(f"{part} {n_bytes / 2**30:.2f} GiB" for part, n_bytes in parts.items())
        print(f"{role}: {n:,} parameters; on each of {world} devices {described}")
    print("on top come gathered weights, the loss's chunk of logits, and activations, which grow with micro_batch_size")

    # A step
    if "student" in parameters:
        print(f"a step: {config.batch_size * config.block_size:,} tokens, {step_flops(parameters, config):.2e} FLOPs; "
              f"{config.max_steps:,} steps")

    # Epochs of each domain, if it were drawn in natural proportions, and if all were drawn alike
    drawn = config.max_steps * config.batch_size
    natural_epochs = drawn / sum(bins.n_windows.values())
    for name, n in bins.n_windows.items():
        print(f"{name}: {n * config.block_size:,} tokens; {natural_epochs:.2f} epochs in natural proportions, "
              f"{drawn / len(bins.names) / n:.2f} if all domains are drawn alike")


def speed(step_times: deque, step: int, config: Config) -> dict[str, float]:
    """Tokens so far, tokens per second of the last step, and seconds that the rest will take at the latest pace, all
    without evaluations and saves."""
    tokens_per_step = config.batch_size * config.block_size
    time_per_step = sum(step_times) / len(step_times)
    return {"tokens": step * tokens_per_step, "tokens_per_s": tokens_per_step / step_times[-1],
            "eta_s": time_per_step * (config.max_steps - step)}


def print_progress(step: int, step_log: dict, config: Config):
    """Print a line after the first step and the last, and every log_every; on GPUs with the peak of memory."""
    if step not in (1, config.max_steps) and step % config.log_every != 0:
        return
    text = (f"step {step}/{config.max_steps}  loss {step_log['loss']:.3f}  ce {step_log['ce']:.3f}  "
            f"kl {step_log['kl']:.3f}  lr {step_log['lr']:.1e}  {step_log['tokens_per_s']:,.0f} tokens/s")
    if config.device.startswith("cuda"):
        text += f"  {torch.cuda.max_memory_allocated(config.device) / 2**30:.1f} GiB"
    print(f"{text}  ETA {timedelta(seconds=int(step_log['eta_s']))}", flush=True)


# ------------ Report --------------------------------------------------------------------------------------------------

def worst_ratio(domains: dict[str, dict]) -> float:
    """The largest ratio of the domains; infinite where there is no teacher."""
    ratios = [domain["ratio"] for domain in domains.values()]
    return math.inf if None in ratios else max(ratios)


def print_teacher_warnings(domains: dict[str, dict], vocab_size: int):
    """Warn, from the first evaluation, about a teacher that has little to teach."""
    for name, domain in domains.items():
        if domain["teacher_ppl"] is None:
            continue
        if domain["teacher_ppl"] > vocab_size / 2:
            print(f"WARNING: THE TEACHER IS NEAR UNIFORM IN {name} ({domain['teacher_ppl']:.0f}): HARDLY TRAINED, "
                  "LOADED WRONG, OR THE BINS ARE OF ANOTHER TOKENIZER")
        elif domain["ratio"] < 1:
            print(f"WARNING: THE TEACHER IS BEHIND ITS STUDENT IN {name} FROM THE START, BY A FACTOR OF "
                  f"{1 / domain['ratio']:.2f}")


def report(config: Config, folder: Path):
    """Print what a run did in each domain, from its first evaluation to its last, and what to try next."""
    state = read_state(folder)
    metrics = read_metrics(folder.parent / "metrics.jsonl")
    first = next((line["domains"] for line in metrics if line["kind"] == "mixture"), state.domains)
    print_teacher_warnings(first, open_bins(config).vocab_size)
    print(f"{config.method}, seed {config.seed}, step {state.step}: first → last evaluation\n")
    print_table(first, state.domains)
    if config.teacher:
        print(f"worst ratio: {worst_ratio(first):.2f} → {worst_ratio(state.domains):.2f}")
    if config.test_samples > 0:
        print("\nOn the test windows, which r never followed:\n")
        print_table(state.domains, state.domains, tested=True)
    print(f"The student is in {folder}. Text by it:  python model.py --model={folder} --prompt='def main('")


def print_first_table(domains: dict[str, dict], bins: TokenBins, config: Config):
    """Print the first evaluation, with the number of documents that each domain's validation windows are of, and
    warnings."""
    documents = {name: bins.eval_documents(name, "val", config.val_samples) for name in domains}
    with_documents = {name: {**domain, "documents": documents[name]} for name, domain in domains.items()}
    print_table(with_documents, with_documents)
    print_teacher_warnings(domains, bins.vocab_size)
    for name, n in documents.items():
        if n < 20:
            print(f"WARNING: the validation windows of {name} are of {n} documents only, and r follows what these are "
                  "like; give the domain more text, or documents that are shorter")


def print_table(first_domains: dict[str, dict], domains: dict[str, dict], tested: bool = False):
    """One row per domain, one column per number of measured_domains, as first → last where it has changed; with
    `tested`, those on the test windows instead."""
    first_row = next(iter(domains.values()))
    columns = [column for column in first_row if column.startswith("test_") == tested]
    print(f"{'':14}" + "".join(f"{column:>20}" for column in columns))
    for name, domain in domains.items():
        row = f"{name:14}"
        for column in columns:
            cell = format_number(domain[column])
            first = format_number(first_domains[name][column])
            if first != cell:
                cell = f"{first} → {cell}"
            row += f"{cell:>20}"
        print(row, flush=True)


def format_number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


# ------------ Quickstart ----------------------------------------------------------------------------------------------

# Unequal domains, as in a real corpus: most of the text is Python.
QUICKSTART_BYTES = {"python": 7_000_000, "cpp": 800_000, "math": 800_000, "prose": 600_000}


def quickstart_models(pretrain_steps: int) -> dict[str, dict]:
    """The keys of the two runs that make the quickstart's models.

    The teacher learns all domains alike, the student base hardly any C++: small models are strong in some domains and
    weak in others."""
    teacher = dict(student="scratch:4x128", max_steps=pretrain_steps, lr=3e-3, min_lr=3e-4,
                   mixture="python=1,cpp=1,math=1,prose=1")
    student = dict(student="scratch:2x96", max_steps=pretrain_steps // 4, lr=2e-3, min_lr=2e-4,
                   mixture="python=.50,cpp=.01,math=.25,prose=.24")
    for keys in (teacher, student):
        keys["warmup_steps"] = min(50, keys["max_steps"] // 10)
    return {"teacher": teacher, "student": student}


def pretraining(keys: dict, **given) -> Config:
    """The Config of a run of `train` that makes a model: without a teacher, evaluated at the start and the end."""
    defaults = dict(preset="quickstart", method="cpt", interval=10**9, test_samples=0, dtype="float32", keep=1,
                    log_every=50)
    return resolve_config({**defaults, **keys, **given})


def quickstart(config: Config) -> Config:
    """Make what the quickstart lacks, in `data_dir`: bins, teacher, student base, from which every arm and seed starts.
    Returns `config` with its models."""
    # The bins, and the models that were made before
    on_rank_0(make_quickstart_bins, config)
    runs = {}  # role → Config of the run that makes the model
    for role, keys in quickstart_models(config.pretrain_steps).items():
        if getattr(config, role):
            continue
        run = pretraining(keys, data_dir=config.data_dir, out_dir=f"{config.data_dir}/{role}", resume=config.resume,
                          device=config.device, compile=config.compile, timeout=config.timeout)
        folder = on_rank_0(finished_run, Path(run.out_dir))
        if folder is None:
            runs[role] = run
        else:
            print(f"The {role} was made before, with the --pretrain_steps of that time: {folder}")
            config = replace(config, **{role: str(folder)})

    # All checks, before minutes of training
    on_rank_0(check_quickstart, config, runs)
    if config.dry_run:
        return config

    for role, run in runs.items():
        print(f"\nThe {role}: {run.student}, {run.max_steps} steps, kept in {run.out_dir}", flush=True)
        config = replace(config, **{role: str(train(run))})
    print(f"\nWith --preset=quickstart these can be named:  --teacher={config.teacher}  --student={config.student}\n",
          flush=True)
    return config


def check_quickstart(config: Config, runs: dict[str, Config]):
    """Raises UserError if the main run, or one of `runs`, which make its models, would fail."""
    problems = []
    for role, run in runs.items():
        domains = open_bins(run).names
        if set(domains) != set(QUICKSTART_BYTES):
            raise UserError(f"--data_dir={config.data_dir}: has the domains {' '.join(domains)}, and the quickstart "
                            "makes models for its own text only; name a --teacher and a --student, or a --preset")
        problems += [f"to make the {role}: {problem}" for problem in contradictions(run)]
    if problems:
        raise UserError("\n".join(problems))
    preflight(replace(config, **{role: run.student for role, run in runs.items()}))


def finished_run(out_dir: Path) -> Path | None:
    """The last checkpoint of a run, if it is finished and whole. Takes no lock: many runs may start from it at once."""
    checkpoints = list_checkpoints(out_dir)
    if checkpoints and not damaged_files(checkpoints[-1]) and read_state(checkpoints[-1]).finished:
        return checkpoints[-1]
    return None


def make_quickstart_bins(config: Config):
    data_dir = Path(config.data_dir)
    if not (data_dir / "meta.json").is_file():
        print(f"Collecting text into {data_dir} …", flush=True)
        build_bins(data_dir, load_tokenizer("bytes"), quickstart_documents(QUICKSTART_BYTES), val_fraction=0.1)


# ------------ Command line --------------------------------------------------------------------------------------------

def parse_config(argv: list[str] | None = None) -> Config:
    """The Config of a command line. Of a key given twice the last counts. Raises UserError with everything that is
    wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, entry in Config.__dataclass_fields__.items():
        # A boolean key alone means true. Values are converted below, so that all problems are reported together.
        alone = "true" if entry.type is bool else None
        metavar = "|".join(entry.metadata["choices"] or ["VALUE"])
        parser.add_argument(f"--{name}", nargs="?", const=alone, default=argparse.SUPPRESS, metavar=metavar,
                            help=help_of(name))
    texts, unknown = parser.parse_known_args(argv)

    # Convert the values, and look for words that are no keys.
    problems = []
    given = {}
    for name, text in vars(texts).items():
        value = attempt(problems, convert, name, text)
        if value is not None:
            given[name] = value
    for word in unknown:
        name = word.lstrip("-").partition("=")[0]
        similar = difflib.get_close_matches(name, Config.__dataclass_fields__, n=1)
        advice = f"did you mean --{similar[0]}?" if similar else "write --key=value; --help lists the keys"
        problems.append(f"{word}: unknown key; {advice}")

    # Then what contradicts what
    config = resolve_config(given)
    problems += contradictions(config)
    if problems:
        raise UserError("\n".join(problems))
    return config


def help_of(name: str) -> str:
    """The meaning of a key, with its default and, where it differs, the quickstart's."""
    entry = Config.__dataclass_fields__[name]
    text = entry.metadata["help"]
    if entry.default != "":
        text += f" (default: {entry.default}"
        if name in PRESETS["quickstart"]:
            text += f"; quickstart: {PRESETS['quickstart'][name]}"
        text += ")"
    return text


def convert(name: str, text: str | None):
    """The value of a key from its text (None: it was given without). Raises UserError."""
    entry = Config.__dataclass_fields__[name]
    choices = entry.metadata["choices"]
    if text is None:
        raise UserError(f"--{name}: has no value; write --{name}=VALUE, or leave it out")
    if entry.type is bool:
        text = text.lower()
    if choices and text not in choices:
        raise UserError(f"--{name}={text}: must be one of {' '.join(choices)}")
    if entry.type is bool:
        return text == "true"
    if entry.type is str:
        return text
    minimum = entry.metadata["minimum"]
    maximum = entry.metadata["maximum"]
    kind = "a whole number" if entry.type is int else "a number"
    try:
        value = entry.type(text)
        if not minimum <= value <= maximum or not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise UserError(f"--{name}={text}: must be {kind} from {minimum} to {maximum}") from None
    return value


def resolve_config(given: dict) -> Config:
    """A whole Config from the keys given: below them the preset's values, then what follows from others."""
    preset = given.get("preset", "")
    if not preset:
        student = given.get("student", "")
        names_a_model = given.get("teacher") or (student and not is_made(student))
        if not names_a_model:
            preset = "quickstart"
    config = Config(**{**PRESETS.get(preset, {}), **given, "preset": preset})
    if not config.data_dir and preset:
        config = replace(config, data_dir=f"data/{preset}")
    if not config.out_dir:
        config = replace(config, out_dir=f"out/{preset}-{config.method}-{config.seed}")
    return config


def main():
    config = parse_config()
    with process_group(config):
        config = resolve_auto(config)
        for name, value in asdict(config).items():
            print(f"{name} = {value}")
        print(flush=True)
        if config.preset == "quickstart":
            config = quickstart(config)
        if config.dry_run:
            if config.preset != "quickstart":
                on_rank_0(preflight, config)
            return
        folder = train(config)
        on_rank_0(report, config, folder)


if __name__ == "__main__":
    run_program(main)
