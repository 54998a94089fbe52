"""DDK: distil a large language model (the teacher) into a small one (the student), domain by domain.

    python distill.py                                        the quickstart: text, teacher, student, DDK, a table
    python distill.py --method=kd                            another arm on the same bins and models
    torchrun --nproc_per_node=8 distill.py --preset=paper --teacher=DIR --student=DIR --data_dir=DIR

The method is Alg. 1 of arXiv 2407.16154. Every K steps (`interval`) the student's perplexity is measured in each
domain and divided by the teacher's. Domains in which the student is further behind get more of the next K steps' data.
The loss of each step is cross-entropy plus γ times the KL divergence from the teacher's predictions (Eq. 3).

The first part of this file is the paper: configuration, arms, Eq. 3, perplexities, one training step, Alg. 1. The
second part, below the double line, is what surrounds a run.
"""

import argparse
import difflib
import fcntl
import functools
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
import traceback
import uuid
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
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

from data import (HUB_NAME, MODEL_FILES, TOKENIZER_FILES, TOKENIZER_META, TokenBins, UserError, alive, build_bins,
                  digest, file_sha256, fsync, import_optional, load_tokenizer, model_folder, model_tokenizer,
                  quickstart_documents, read_meta, report_error, run_program, same_tokenizer, save_tokenizer,
                  saved_tokenizer, user_errors, write_text)
from model import GPT, GPTConfig, read_config, resolve_device, weight_files
from sample_mixture import RULES, MixtureSampler, read_metrics, softmax

# The first part calls five helpers before a reader meets them. rank_slice: this rank's windows of a batch. over_ranks:
# a sum over all ranks. on_rank_0: call a function on rank 0, and give its result to all. refuse: end all ranks with a
# message. alive: print a line every 30 seconds while a function runs.


# ------------ Configuration -------------------------------------------------------------------------------------------


# Sets of defaults. Config's own are the paper's values, so the presets of the paper's pairs only name the models. Where
# the paper gives no value the choice is ours: how the tokens of a step are cut into windows, weight decay, clipping,
# AdamW's betas.
PRESETS = {
    "quickstart": dict(interval=25, val_samples=64, test_samples=64,
                       block_size=256, batch_size=8, max_steps=300, lr=1e-3, min_lr=1e-4, warmup_steps=20,
                       save_every=100),
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
    divergence: str | None = "forward"  # `direction` of Eq. 3, "forward" or "reverse"; None: cross-entropy alone
    needs_teacher: bool = True  # in training; where one is named it is measured in any case
    # A term besides Eq. 3: a class with TED's methods. __init__ may register hooks on the layers. pretrain runs once,
    # before the first step. sum_over_tokens gives the term of a micro-batch. reduce_gradients (returns a list), update,
    # state_dict and load_state_dict are for parameters of its own.
    added_loss: type | None = None
    # A weight for each window of a batch: a function with the arguments of doremi_window_weights
    weigh_windows: Callable | None = None
    # Called with (config, state) by `report`, each time the command finds the run finished
    at_end: Callable | None = None


ARMS = {
    "ddk": Arm("r by Eq. 2 after every K steps"),
    "ddk_no_fs": Arm("without factor smoothing: r by Eq. 1 after every K steps", rule="ddk_no_fs"),
    "ddk_es": Arm("equal sampling: all domains alike", rule="equal"),
    "kd": Arm("knowledge distillation in the natural mixture", rule="natural"),
    "minillm": Arm("KD with teacher-forced reverse KL", rule="natural", divergence="reverse"),
    "cpt": Arm("continued pre-training: the student alone", rule="natural", divergence=None, needs_teacher=False),
    # ted and doremi_proxy add their rows where their code is, further below
}


def key(default, help: str, minimum: float = -math.inf, maximum: float = math.inf, choices=None, may_change=False):
    """A field of Config: a key of the command line, with its bounds or the words that it takes."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "may_change": may_change}
    return field(default=default, metadata=metadata)


def free_key(default, help: str, **limits):
    """A key that may have another value when the run is resumed. Models and bins are compared by content instead."""
    return key(default, help, may_change=True, **limits)


@dataclass
class Config:
    """The keys of `python distill.py`. Where the paper gives a value, it is the default."""
    # What a run is made of
    config: str = free_key("", "config.json of a run to repeat; keys given besides it win")
    preset: str = free_key("", "set of defaults (default: quickstart, unless teacher or student names a model)",
                           choices=PRESETS)
    teacher: str = free_key("", "folder of the teacher in Hugging Face's format, or its name on the Hub: OWNER/MODEL")
    student: str = free_key("", "the student's folder or name; or scratch:LxD, L new layers, D wide; or layers:N, N "
                                "evenly spaced layers of the teacher")
    data_dir: str = free_key("", "folder of the bins, made by data.py (default: data/PRESET)")
    out_dir: str = free_key("", "folder of the run (default: out/PRESET-METHOD-SEED)")
    domains: str = key("", "name,name,… of the bins' domains (default: all)")

    # The method
    method: str = key("ddk", "the arm", choices=ARMS)
    gamma: float = key(0.2, "γ, weight of the divergence from the teacher", minimum=0)
    temperature: float = key(1.0, "T, divides the logits of both models in the divergence", minimum=1e-3)
    alpha: float = key(0.5, "α, how much of r follows the discrepancies; the rest is uniform", minimum=0, maximum=1)
    interval: int = key(1000, "K, steps between two updates of r", minimum=1)
    val_samples: int = key(500, "validation windows per domain, by which r is updated", minimum=1)
    test_samples: int = key(0, "test windows per domain, behind the validation windows; never used for r; 0: none",
                            minimum=0)
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
    seed: int = key(0, "order of the data, and initial weights of a scratch student", minimum=0)

    # How it is computed
    micro_batch_size: int = free_key(0, "windows per forward pass; 0: all of a rank's windows", minimum=0)
    teacher_micro_batch_size: int = free_key(0, "windows per forward pass of the teacher, a multiple of "
                                                "micro_batch_size; 0: equal to it", minimum=0)
    dtype: str = key("auto", "dtype of the matrix products; auto: bfloat16 on cuda, else float32",
                     choices=("auto", "float32", "bfloat16"))
    compile: str = free_key("auto", "torch.compile of the models' blocks; auto: on cuda. The loss is compiled wherever "
                                    "that pays", choices=("auto", "true", "false"))
    device: str = free_key("auto", "auto: cuda, then mps, then cpu")
    parallel: str = free_key("auto", "under torchrun; auto: fsdp (FSDP2) on GPUs, ddp on CPUs; hsdp: sharded within a "
                                     "node, replicated across nodes", choices=("auto", "none", "ddp", "fsdp", "hsdp"))
    shard_teacher: bool = free_key(True, "with fsdp and hsdp, shard the teacher too; false: whole on every device")
    checkpoint_activations: bool = free_key(False, "recompute activations in the backward pass, to save memory")
    timeout: float = free_key(30, "minutes that a rank waits for the others", minimum=0.1)

    # What is kept and shown
    save_every: int = free_key(1000, "steps between two checkpoints; 0: the last step only", minimum=0)
    keep: int = free_key(2, "newest checkpoints to keep; 0: all", minimum=0)
    resume: str = free_key("auto", "never: move the run in out_dir aside and start again", choices=("auto", "never"))
    log_every: int = free_key(10, "steps between two lines of progress", minimum=1)
    tensorboard: bool = free_key(False, "log to TensorBoard too, in out_dir")
    wandb: bool = free_key(False, "log to Weights & Biases too")
    dry_run: bool = free_key(False, "check everything, print what the run would take, and stop")
    pretrain_steps: int = free_key(1200, "quickstart: steps of its teacher; of its base, a quarter", minimum=4)


# ------------ Eq. 3 ---------------------------------------------------------------------------------------------------


def dense_distillation_loss(student_logits, teacher_logits, targets, *, gamma: float = 0.2, temperature: float = 1.0,
                            direction: str = "forward", vocab_size: int | None = None, num_tokens=None,
                            token_weights=None):
    """Eq. 3: CE(student, next token) + γ · KL(softmax(z_T/T) ‖ softmax(z_S/T)), mean per token → (loss, ce, kl).

    student_logits (…, V_S); teacher_logits (…, V_T), or None, then kl is 0; targets (…), already shifted, −100 is
    ignored. CE is over all V_S rows, which keeps padded ids unlikely. KL is over the first `vocab_size` ids (default:
    the smaller number of rows), both logits cut before the softmax; there is no T² factor. direction "forward" puts the
    teacher first, as in Eq. 3; "reverse" puts the student first, as in MiniLLM. The sums, weighted by `token_weights`
    (…) if given, are divided by `num_tokens` (default: the number of targets that count). ce and kl are detached.
    Given a teacher, raises ValueError on another direction, or if vocab_size exceeds the rows of a head."""
    counted = targets != -100
    weights = counted if token_weights is None else counted * token_weights
    if num_tokens is None:
        num_tokens = counted.sum().clamp(min=1)

    # Cross-entropy. The target's log-probability is found by comparing ids, since torch.compile fuses that with the
    # softmax, but not a gather. An ignored target equals no id, so its loss is 0.
    z_S = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    log_s = F.log_softmax(z_S, dim=-1)
    is_target = torch.arange(z_S.shape[-1], device=targets.device) == targets.unsqueeze(-1)
    ce_per_token = -torch.where(is_target, log_s, 0).sum(dim=-1)
    ce = (weights * ce_per_token).sum() / num_tokens
    if teacher_logits is None:
        return ce, ce.detach(), torch.zeros_like(ce)

    # The divergence between p (teacher) and q (student)
    z_T = teacher_logits.detach().to(z_S.dtype)
    rows = min(z_S.shape[-1], z_T.shape[-1])
    if vocab_size is None:
        vocab_size = rows
    if vocab_size > rows:
        raise ValueError(f"vocab_size {vocab_size} is more than the {rows} rows of a head")
    log_p = F.log_softmax(z_T[..., :vocab_size] / temperature, dim=-1)
    if temperature == 1 and vocab_size == z_S.shape[-1]:
        log_q = log_s  # the same softmax: not computed twice
    else:
        log_q = F.log_softmax(z_S[..., :vocab_size] / temperature, dim=-1)
    if direction == "forward":
        kl_per_token = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    elif direction == "reverse":
        kl_per_token = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    else:
        raise ValueError(f"direction {direction!r} must be forward or reverse")
    kl = (weights * kl_per_token).sum() / num_tokens

    return ce + gamma * kl, ce.detach(), kl.detach()


# ------------ ℓ_S and ℓ_T, and what is measured per domain ------------------------------------------------------------


@alive("measuring perplexities")
@torch.no_grad()
def perplexities(model: GPT, windows: dict[str, torch.Tensor], vocab_size: int, micro_batch_size: int,
                 precision=nullcontext()) -> dict[str, float]:
    """The paper's ℓ, name → exp of the mean next-token cross-entropy over a domain's windows (n, block_size + 1).

    Over the tokenizer's ids alone (`vocab_size`), for teacher and student alike, with `micro_batch_size` windows per
    forward pass. All ranks call it and get the same result. Draws no random number. Raises UserError if a loss is not
    finite."""
    device = model.head_weight.device
    ppl = {}
    for name, domain_windows in windows.items():
        n = len(domain_windows)
        per_rank = min(micro_batch_size, math.ceil(n / world_size()))
        ce_sum = torch.zeros((), dtype=torch.float64)
        for batch in domain_windows.split(per_rank * world_size()):
            # Every rank takes its share, filled up with ignored targets: FSDP requires equally many forward passes on
            # all ranks, and torch.compile one shape.
            my_windows = batch[rank()::world_size()]
            n_missing = per_rank - len(my_windows)
            padding = (0, 0, 0, n_missing)  # no columns, n_missing rows at the end
            inputs = F.pad(my_windows[:, :-1], padding).to(device)
            targets = F.pad(my_windows[:, 1:], padding, value=-100).to(device)

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
            refuse(f"domain {name}: the loss of a model is {mean_ce}; its weights are damaged, or --dtype too coarse")
        ppl[name] = math.exp(min(mean_ce, 700.0))  # exp overflows from 710 on
    return ppl


def measured_domains(student_ppl: dict, teacher_ppl: dict, sampler: MixtureSampler, block_size: int) -> dict[str, dict]:
    """The numbers of each domain after an evaluation, which are logged, plotted, and shown in the table at the end.

    Another number that follows from these arguments is one more line here. One that needs a model is a function such as
    `perplexities`, called beside it in `train`, and an argument of this function."""
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
    """Everything that a run continues from, besides tensors: weights, optimizer, added loss. Saved as JSON."""
    step: int = 0  # finished updates
    finished: bool = False
    teacher_ppl: dict | None = None  # ℓ_T: name → perplexity, measured once; None for each where there is no teacher
    test_teacher_ppl: dict | None = None  # the same on the test windows
    rule_state: dict | None = None  # of the mixture rule, such as r_t
    sampler: dict | None = None  # MixtureSampler.state_dict()
    first_domains: dict | None = None  # measured_domains at t = 0
    domains: dict | None = None  # … and at the last evaluation
    weights_state: dict | None = None  # of the arm's weigh_windows


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of the update that follows `step` finished ones: linear warm-up to lr, then cosine to min_lr, which
    the last update has."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    decay_steps = config.max_steps - 1 - config.warmup_steps
    if decay_steps <= 0:
        return config.min_lr
    progress = (step - config.warmup_steps) / decay_steps
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


# ------------ One training step ---------------------------------------------------------------------------------------


def training_step(step: int, student: nn.Module, teacher: GPT | None, optimizer: torch.optim.Optimizer,
                  windows: torch.Tensor, window_weights: torch.Tensor, *, added_loss, vocab_size: int,
                  config: Config) -> dict[str, float]:
    """One update of the student by Eq. 3 → loss, ce, kl, lr and grad_norm, the same on all ranks.

    student: in its DistributedDataParallel wrapper if it has one. windows: this rank's, (n, block_size + 1) int64.
    window_weights: of the whole batch, (batch_size,); 1 for all but DoReMi's proxy. added_loss: see TED, or None.
    Raises UserError, before the update, if the loss or the gradient is not finite."""
    arm = ARMS[config.method]

    # The tokens of the whole batch, each counted by its weight. The losses of all micro-batches and ranks are sums over
    # their tokens, divided by this number. So they, and their gradients, add up to Eq. 3's mean.
    num_tokens = (window_weights.sum() * config.block_size).to(windows.device)
    my_weights = window_weights[rank_slice(config)].to(windows.device)

    # Forward and backward passes, one micro-batch at a time
    totals = torch.zeros(3, device=windows.device)  # loss, ce and kl of this rank
    teacher_hidden = None
    teacher_head = None
    for start in range(0, len(windows), config.micro_batch_size):
        rows = slice(start, start + config.micro_batch_size)
        inputs = windows[rows, :-1]
        targets = windows[rows, 1:]
        token_weights = my_weights[rows, None].expand_as(targets)

        # The teacher's hidden states; logits are made inside the loss. One forward pass of it serves one or more
        # micro-batches of the student, of which this one begins at row `offset`.
        if arm.divergence is not None:
            offset = start % config.teacher_micro_batch_size
            if offset == 0:
                teacher_inputs = windows[start:start + config.teacher_micro_batch_size, :-1]
                with torch.no_grad(), autocast(config):
                    all_teacher_hidden, teacher_head = teacher(teacher_inputs, loss_fn=hidden_and_head)
            teacher_hidden = all_teacher_hidden[offset:offset + config.micro_batch_size]

        reduce_in_last_pass_only(student, rows.stop >= len(windows), config)

        def loss_fn(hidden, head):
            loss, ce, kl = distillation_loss(
                hidden, head, teacher_hidden, teacher_head, targets, gamma=config.gamma,
                temperature=config.temperature, direction=arm.divergence, vocab_size=vocab_size,
                num_tokens=num_tokens, token_weights=token_weights)
            if added_loss is not None:
                loss = loss + added_loss.sum_over_tokens() / num_tokens
            return loss, ce, kl

        with autocast(config):
            loss, ce, kl = student(inputs, loss_fn=loss_fn)
        # Gradients of the ranks have to be added up, but DDP and FSDP average them.
        (loss * world_size()).backward()
        totals += torch.stack((loss, ce, kl)).detach()
    clear_forward_record(teacher)  # FSDP2 would keep one of each forward pass

    # Clip the gradient; its norm is over all parameters, those of an added loss too.
    parameters = list(student.parameters())
    if added_loss is not None:
        parameters += added_loss.reduce_gradients()
    max_norm = config.grad_clip if config.grad_clip > 0 else math.inf
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()  # of all shards
    grad_norm = grad_norm.item()

    # Stop where training has gone wrong. The sums are over all ranks, so that all of them stop, or none.
    loss, ce, kl = over_ranks(totals).tolist()
    if not math.isfinite(loss + grad_norm):
        refuse(f"step {step}: loss {loss}, gradient norm {grad_norm}. The update was not made, and nothing is saved. "
               f"Lower --lr={config.lr}, with --resume=never, or check the data: python data.py "
               f"--verify={config.data_dir}")

    # One step of AdamW, with this step's learning rate
    lr = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    if added_loss is not None:
        added_loss.update(lr)
    return {"loss": loss, "ce": ce, "kl": kl, "lr": lr, "grad_norm": grad_norm}


def hidden_and_head(hidden, head):
    """A loss_fn for GPT that returns what it is given."""
    return hidden, head


# ------------ Alg. 1 --------------------------------------------------------------------------------------------------


def train(config: Config) -> Path:
    """Alg. 1, or the arm that `method` names. Returns the folder of the last checkpoint.

    Iteration s of the loop finds s finished updates. It evaluates and updates r if s is a multiple of K or the last
    step, saves if due, and makes one update unless s is the last: there is one iteration more than updates."""
    config = resolve_auto(config)
    arm = ARMS[config.method]

    with RunFolder(Path(config.out_dir)) as run:
        # Check everything that is cheap. Then find the checkpoint to continue from: `resumed` is its folder, or None.
        bins, model_configs = on_rank_0(preflight, config)
        state, resumed = on_rank_0(run.open, config, bins)
        if state.finished:
            print(f"{config.out_dir}: this run is finished (step {state.step})")
            return resumed

        # The data: fixed windows for validation and test, and the sampler of training windows
        val_windows = validation_windows(bins, config.val_samples)
        test_windows = validation_windows(bins, config.test_samples, start=config.val_samples)
        sampler = MixtureSampler(bins.n_windows, config.batch_size, config.seed)
        if config.mixture:
            sampler.probs = parse_mixture(config.mixture)
        base = sampler.probs

        # The teacher and the student, on this rank's device, whole or sharded
        teacher, student, added_loss = load_models(config, model_configs, resumed)
        optimizer = make_optimizer(student, config)

        # measure(model, windows) is ℓ, name → perplexity, in the same way for both models.
        measure = functools.partial(perplexities, vocab_size=bins.vocab_size, micro_batch_size=config.micro_batch_size,
                                    precision=autocast(config))

        # Continue from the checkpoint, or start: ℓ_T is measured once in a run, and TED's filters are trained.
        if resumed is not None:
            load_checkpoint(resumed, state, sampler, student, optimizer, added_loss)
        else:
            state.teacher_ppl = dict.fromkeys(bins.names)
            state.test_teacher_ppl = dict.fromkeys(bins.names)
            if teacher is not None:
                state.teacher_ppl = measure(teacher, val_windows)
                state.test_teacher_ppl = measure(teacher, test_windows)
            if added_loss is not None:
                added_loss.pretrain(student, teacher, bins, base, config)
            run.log("run", 0, config=asdict(config), rule=arm.rule, base=dict(zip(bins.names, base.tolist())),
                    versions=environment(), parameters=count_parameters(teacher=teacher, student=student))
        if not arm.needs_teacher:
            teacher = None  # it has been measured, and training does without

        # DDP wraps the student for the forward passes of training only; FSDP has sharded it in place.
        wrapped_student = student
        if config.parallel == "ddp":
            wrapped_student = DistributedDataParallel(student, gradient_as_bucket_view=True)

        # The loop. From here on a signal waits for the end of a step or an evaluation.
        run.catch_signals()
        first_step = state.step
        while True:
            # Every K steps, and at the end: measure ℓ_S, update r, log. A resumed run did so before its checkpoint.
            t, steps_since_update = divmod(state.step, config.interval)
            last = state.step >= config.max_steps
            just_resumed = resumed is not None and state.step == first_step
            if (steps_since_update == 0 or last) and not just_resumed:
                student_ppl = measure(student, val_windows)
                state.domains = measured_domains(student_ppl, state.teacher_ppl, sampler, config.block_size)
                if steps_since_update == 0:
                    r, state.rule_state = RULES[arm.rule](state.rule_state, list(student_ppl.values()),
                                                          list(state.teacher_ppl.values()), base, config.alpha)
                    sampler.probs = r
                    run.log("mixture", state.step, t=t, r=dict(zip(bins.names, r.tolist())), domains=state.domains)
                if state.step == 0:
                    state.first_domains = state.domains
                    print_table(state.domains, state.domains)
                if config.stop_ratio > 0 and worst_ratio(state.domains) <= config.stop_ratio:
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
                run.save(state, student, optimizer, added_loss, bins, config.keep)
            if last:
                return run.folder_of(state.step)
            if signal_number:
                stop_by_signal(signal_number, run.folder_of(state.step))

            # Draw the next batch by r. Each rank reads its share of the windows.
            started = time.perf_counter()
            if state.step == first_step:  # the first evaluation is not part of the time per step
                loop_started = started
                last_line = started
            domain_ids, windows = next_windows(sampler, bins, config)
            window_weights = torch.ones(config.batch_size)
            if arm.weigh_windows is not None:
                window_weights, state.weights_state = arm.weigh_windows(
                    state.weights_state, student, teacher, windows, domain_ids, sampler, config)

            # One update of the student
            step_log = training_step(state.step, wrapped_student, teacher, optimizer, windows, window_weights,
                                     added_loss=added_loss, vocab_size=bins.vocab_size, config=config)
            state.step += 1

            # Log
            now = time.perf_counter()
            tokens_per_step = config.batch_size * config.block_size
            step_log["tokens"] = state.step * tokens_per_step
            step_log["tokens_per_s"] = tokens_per_step / (now - started)
            step_log["eta_s"] = (now - loop_started) / (state.step - first_step) * (config.max_steps - state.step)
            run.log("train", state.step, **step_log)
            if line_is_due(state.step, first_step, now - last_line, now - started, config):
                print_progress(state.step, step_log, student, teacher, config)
                last_line = now


# ======================================================================================================================
# What surrounds a run: Eq. 3 chunk by chunk, processes, devices, the run's folder, checkpoints, checks, baselines,
# report, quickstart, command line
# ======================================================================================================================


# ------------ Eq. 3 without the logits of all tokens ------------------------------------------------------------------


def distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, *,
                      chunk_size: int | None = None, num_tokens=None, token_weights=None, **equation):
    """Eq. 3 from hidden states (…, d) and heads (V, d), without ever holding (tokens, V) logits → (loss, ce, kl).

    Logits are made for `chunk_size` tokens at a time, and `dense_distillation_loss` is differentiated on each chunk, so
    that the forward pass makes the gradients too. The other keywords are those of `dense_distillation_loss`.
    loss.backward() gives the gradients of student_hidden and student_head, once. teacher_hidden and teacher_head may
    both be None. The default chunk has 2²⁸ logits on CUDA; elsewhere 2²⁶, and at most 512 tokens."""
    hidden = student_hidden.flatten(0, -2)
    targets = targets.flatten()
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.flatten(0, -2)
    if token_weights is None:
        token_weights = torch.ones_like(targets)
    token_weights = token_weights.flatten()

    # What may change between steps is a tensor: torch.compile would recompile for each new value of a Python number.
    if num_tokens is None:
        num_tokens = (targets != -100).sum().clamp(min=1)
    equation["num_tokens"] = torch.as_tensor(num_tokens, device=hidden.device)
    if "gamma" in equation:
        loss_dtype = torch.promote_types(hidden.dtype, torch.float32)
        equation["gamma"] = hidden.new_full((), equation["gamma"], dtype=loss_dtype)

    # Chunks of one shape, for the same reason: a power of two, and the last one is filled up with ignored targets.
    if chunk_size is None:
        most = 2**28 // len(student_head) if hidden.is_cuda else min(512, 2**26 // len(student_head))
        chunk_size = 2 ** int(math.log2(max(1, most)))
    chunk_size = max(1, min(chunk_size, len(targets)))
    padding = -len(targets) % chunk_size
    if padding:
        hidden = F.pad(hidden, (0, 0, 0, padding))
        targets = F.pad(targets, (0, padding), value=-100)
        token_weights = F.pad(token_weights, (0, padding))
        if teacher_hidden is not None:
            teacher_hidden = F.pad(teacher_hidden, (0, 0, 0, padding))

    if not torch.is_grad_enabled():  # which an autograd.Function cannot see
        hidden = hidden.detach()
        student_head = student_head.detach()
    return ChunkedLoss.apply(hidden, student_head, teacher_hidden, teacher_head, targets, token_weights, chunk_size,
                             equation)


class ChunkedLoss(torch.autograd.Function):
    """The chunks of distillation_loss. The forward pass makes the gradients as well, while the logits are there."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, token_weights, chunk_size, equation):
        # The gradient of the head is a sum over chunks: at least float32, whatever the head is.
        wants_gradient = any(ctx.needs_input_grad)
        if wants_gradient:
            grad_hidden = torch.zeros_like(hidden)
            grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))

        # The dtype of the products, cast once and not for each chunk
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
            losses = eq3(student_logits, teacher_logits, targets[chunk], token_weights[chunk], equation, wants_gradient)
            totals = totals + losses
            if wants_gradient:
                grad_logits = student_logits  # eq3 has written it over them
                grad_hidden[chunk] = grad_logits @ head
                if grad_head.dtype == grad_logits.dtype:
                    grad_head.addmm_(grad_logits.T, hidden[chunk])
                else:
                    grad_head += grad_logits.T @ hidden[chunk]

        if wants_gradient:
            ctx.save_for_backward(grad_hidden, grad_head)
        loss, ce, kl = (total.clone() for total in totals)  # FSDP2 warns of outputs that are views
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_ce, grad_kl):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None, None, None, None


def aligned_empty(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) with room for a multiple of 64 columns, which the matrix products of GPUs require to be fast.

    The columns behind are 0: bfloat16 products on CPUs with AMX read them, and what happens to stand there may be NaN,
    which times 0 is NaN."""
    padded = like.new_empty(rows, math.ceil(columns / 64) * 64)
    padded[:, columns:] = 0
    return padded[:, :columns]


def eq3_of_chunk(student_logits, teacher_logits, targets, token_weights, equation: dict, wants_gradient: bool):
    """Eq. 3 of one chunk → (3,): loss, ce, kl. The gradient with respect to student_logits is written over them."""
    def loss_and_parts(logits):
        loss, ce, kl = dense_distillation_loss(logits, teacher_logits, targets, token_weights=token_weights, **equation)
        return loss, torch.stack((loss, ce, kl))

    if wants_gradient:
        gradient, parts = torch.func.grad(loss_and_parts, has_aux=True)(student_logits)
        student_logits.copy_(gradient)
    else:
        _, parts = loss_and_parts(student_logits)
    return parts


@functools.cache
def compile_eq3():
    """eq3_of_chunk, compiled, so that its passes over the logits are fused. If torch.compile fails here, it warns once
    and runs uncompiled, in slices."""
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
        return eq3_in_slices(*args)

    return eq3


def eq3_in_slices(student_logits, teacher_logits, targets, token_weights, equation: dict, wants_gradient: bool):
    """eq3_of_chunk on a sixteenth of the tokens at a time, since uncompiled it holds a dozen copies of the logits."""
    totals = 0
    n = math.ceil(len(targets) / 16)
    for start in range(0, len(targets), n):
        rows = slice(start, start + n)
        teacher_rows = None
        if teacher_logits is not None:
            teacher_rows = teacher_logits[rows]
        totals = totals + eq3_of_chunk(student_logits[rows], teacher_rows, targets[rows], token_weights[rows], equation,
                                       wants_gradient)
    return totals


# ------------ Many processes ------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice(config: Config) -> slice:
    """This rank's windows of the global batch."""
    share = config.batch_size // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def next_windows(sampler: MixtureSampler, bins: TokenBins, config: Config) -> tuple[np.ndarray, torch.Tensor]:
    """Draw the next batch → domain_ids of the whole batch (B,), and this rank's windows (n, block_size + 1)."""
    domain_ids, window_ids = sampler.next_batch()
    mine = rank_slice(config)
    windows = torch.from_numpy(bins.train_windows(domain_ids[mine], window_ids[mine]))
    return domain_ids, windows.to(config.device)


def over_ranks(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The ranks' `values` summed, or reduced by `op`, on every rank."""
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values, op)
    return values


def on_rank_0(function: Callable, *args, share: bool = True):
    """What `function(*args)` returns on rank 0, on every rank; without `share`, None on the others.

    A UserError or OSError on rank 0 ends all ranks."""
    result = None
    error = None
    if rank() == 0:
        try:
            result = function(*args)
        except BrokenPipeError:  # run_program ends the program quietly
            raise
        except (UserError, OSError) as exception:
            error = str(exception)
    if dist.is_initialized():
        shared = [(result if share else None, error)]
        dist.broadcast_object_list(shared)
        error = shared[0][1]
        if rank() != 0:
            result = shared[0][0]
    if error is not None:
        refuse(error)
    return result


def refuse(message: str):
    """End all ranks for a reason that all of them know. The error is raised on rank 0, which prints it."""
    if rank() != 0:
        time.sleep(3)  # torchrun ends all ranks as soon as one ends: rank 0 has to print first
        sys.exit(2)
    raise UserError(message)


@contextmanager
def process_group(config: Config):
    """torch.distributed, if torchrun started this process, for as long as the context lasts. Rank 0 alone prints."""
    if "RANK" not in os.environ:
        yield
        return
    # Each process takes the GPU of its number.
    device = resolve_device(config.device)
    backend = "gloo"
    device_id = None
    if device.type == "cuda":
        backend = "nccl"
        device_id = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device_id)
    dist.init_process_group(backend, timeout=timedelta(minutes=config.timeout), device_id=device_id)

    status = 0
    try:
        with open(os.devnull, "w") as nowhere:
            output = nullcontext() if rank() == 0 else redirect_stdout(nowhere)
            with output:
                yield
                dist.barrier()
    except BaseException as error:
        # A process that ends makes the collectives of the others fail.
        if isinstance(error, RuntimeError) and re.search("gloo|NCCL|Connection (closed|reset|refused)", str(error)):
            reason = " ".join(str(error).split())[:600]  # NCCL's own cause is on its second line
            error = UserError(f"another process is gone, or silent for {config.timeout} minutes ({reason}); the same "
                              "command continues from the last checkpoint")
        status = report_error(error)
        if status == 1:
            traceback.print_exc()

    # Out at once: threads of gloo sometimes abort a process that exits as usual, and NCCL waits for lost processes.
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ------------ Models on devices ---------------------------------------------------------------------------------------


def resolve_auto(config: Config) -> Config:
    """`config` with what this machine and these processes make of each `auto`, and of micro_batch_size=0."""
    device = resolve_device(config.device)
    on_cuda = device.type == "cuda"
    parallel = "none"
    if dist.is_initialized():
        parallel = "fsdp" if on_cuda and can_shard(config) else "ddp"
    choices = {
        "device": str(device),
        "dtype": "bfloat16" if on_cuda else "float32",
        "compile": "true" if on_cuda else "false",
        "parallel": parallel,
    }
    config = replace(config, **{name: choice for name, choice in choices.items() if getattr(config, name) == "auto"})
    if config.micro_batch_size == 0:
        config = replace(config, micro_batch_size=config.batch_size // world_size())
    if config.teacher_micro_batch_size == 0:
        config = replace(config, teacher_micro_batch_size=config.micro_batch_size)
    return config


def can_shard(config: Config) -> bool:
    """An added loss reads whole layers, so FSDP is not for it."""
    return ARMS[config.method].added_loss is None


def is_sharded(config: Config) -> bool:
    return config.parallel in ("fsdp", "hsdp")


def autocast(config: Config):
    """The dtype of the matrix products. Under FSDP its own policy casts."""
    device_type = torch.device(config.device).type
    enabled = config.dtype == "bfloat16" and not is_sharded(config)
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)


def load_models(config: Config, model_configs: dict[str, GPTConfig], resumed: Path | None):
    """The teacher (None if none is needed), the student, and the arm's added loss (None for most) on every rank."""
    arm = ARMS[config.method]
    teacher = None
    if config.teacher and (arm.needs_teacher or resumed is None):
        teacher = load_model(config.teacher, config, model_configs["teacher"], getattr(torch, config.dtype))
        teacher.requires_grad_(False)
    student = load_model(str(resumed or config.student), config, model_configs["student"], torch.float32)

    # Before the blocks are compiled: TED's hooks have to be there by then.
    added_loss = None
    if arm.added_loss is not None:
        added_loss = arm.added_loss(student, teacher, config)

    if config.compile == "true":
        torch._dynamo.config.recompile_limit = 64  # the blocks of both models are one piece of code
        torch._dynamo.config.optimize_ddp = False  # which would cut blocks at DDP's buckets
    if teacher is not None:
        spread(teacher, config, shard=is_sharded(config) and config.shard_teacher)
    spread(student, config, shard=is_sharded(config))
    return teacher, student, added_loss


def load_model(source: str, config: Config, model_config: GPTConfig, dtype: torch.dtype) -> GPT:
    """The model that `source` names, read on rank 0. Other ranks get one on the meta device, for `spread` to fill."""
    model = on_rank_0(read_model, source, config, model_config, dtype, share=False)
    if model is None:
        with torch.device("meta"):
            model = GPT(model_config).to(dtype)
    return model


@alive("reading a model")
def read_model(source: str, config: Config, model_config: GPTConfig, dtype: torch.dtype) -> GPT:
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
    return GPT.from_pretrained(model_folder(source, "--model", MODEL_FILES), dtype)


def spread(model: GPT, config: Config, shard: bool):
    """Put the model that rank 0 read on every rank's device: whole, or sharded over all ranks, or those of a node.

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
    device_type = torch.device(config.device).type
    if config.parallel == "hsdp":
        devices = int(os.environ["LOCAL_WORLD_SIZE"])  # of a node
        nodes = world_size() // devices
        mesh = init_device_mesh(device_type, (nodes, devices), mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():  # they would have the backend's own timeout
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=config.timeout), group)
    else:
        mesh = init_device_mesh(device_type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    # Rank 0 hands the weights out
    model.to_empty(device=config.device)
    set_model_state_dict(model, whole_state, options=whole_tensors())


def reduce_in_last_pass_only(student: nn.Module, is_last: bool, config: Config):
    """Called before each micro-batch: DDP reduces the gradients over ranks in the step's last backward pass only.

    FSDP reduces them in each, so that a rank holds no more than its shard; hsdp across nodes in the last only."""
    if config.parallel == "ddp":
        student.require_backward_grad_sync = is_last
    elif config.parallel == "hsdp":
        student.set_requires_all_reduce(is_last)


def clear_forward_record(model: GPT | None):
    """FSDP2 keeps a record of each forward pass until a backward pass, which the teacher never has: drop it."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()


def recomputed(forward: Callable) -> Callable:
    """`forward`, whose activations are computed again in the backward pass. torch.compile skips a partial."""
    def checkpointed(*inputs):
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpointed


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
        self.tensorboard = None
        self.wandb = None
        self.received_signal = 0

    def open(self, config: Config, bins: TokenBins) -> tuple[TrainState, Path | None]:
        """Lock the folder, and find the checkpoint to continue from.

        Returns the training state and the checkpoint's folder (None: start)."""
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
            self.open_logs(config, state.step)
        return state, resumed

    def open_logs(self, config: Config, step: int):
        self.metrics = self.enter_context(open(self.out_dir / "metrics.jsonl", "a", encoding="utf-8"))
        if config.tensorboard:
            tensorboard = import_optional("torch.utils.tensorboard", "--tensorboard")
            self.tensorboard = tensorboard.SummaryWriter(config.out_dir, purge_step=step + 1)
            self.callback(self.tensorboard.close)
        if config.wandb:
            # A resumed run, on another machine too, continues its curves. Delete the file in a copy of the folder.
            id_path = self.out_dir / "wandb_id"
            if not id_path.exists():
                write_text(id_path, uuid.uuid4().hex)
            self.wandb = import_optional("wandb", "--wandb").init(
                project="ddk", name=config.out_dir, id=id_path.read_text(), resume="allow", config=asdict(config))
            self.callback(self.wandb.finish)

    def log(self, kind: str, step: int, **values):
        """Append a line to metrics.jsonl, and to TensorBoard and Weights & Biases if they are asked for."""
        line = {"kind": kind, "step": step, **values}
        if self.metrics is not None:
            print(json.dumps(line), file=self.metrics, flush=True)
        if self.tensorboard is not None:
            for name, value in scalars(line).items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(scalars(line), step=step)

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

    def save(self, state: TrainState, student: GPT, optimizer, added_loss, bins: TokenBins, keep: int):
        """Write the checkpoint of this step, then delete all but the newest `keep`."""
        save_checkpoint(self.folder_of(state.step), state, student, optimizer, added_loss, bins)
        if rank() == 0 and keep > 0:
            for old in list_checkpoints(self.out_dir)[:-keep]:
                shutil.rmtree(old)
        if dist.is_initialized():
            dist.barrier()  # no rank leaves before the checkpoint is whole


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a metrics line: kind/key, or domain/key for those of each domain."""
    numbers = {f"{line['kind']}/{key}": value for key, value in line.items() if key != "step"}
    for name, probability in line.get("r", {}).items():
        numbers[f"{name}/r"] = probability
    for name, domain in line.get("domains", {}).items():
        for key, value in domain.items():
            numbers[f"{name}/{key}"] = value
    return {key: value for key, value in numbers.items() if isinstance(value, int | float)}


LOCK = ".lock"


@contextmanager
def locked(folder: Path):
    """Make the folder if there is none, and keep all other processes out of it for as long as the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:  # network file systems lock files that are open for writing, not folders
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is using it; wait for it to end, or name another folder") from None
        yield


def free_name(path: Path) -> Path:
    """`path`, or with .1, .2, … appended: the first that does not exist."""
    n = 0
    free = path
    while free.exists():
        n += 1
        free = path.with_name(f"{path.name}.{n}")
    return free


@alive("hashing the models")
def experiment_content(config: Config, bins: TokenBins) -> dict[str, str]:
    """What identifies the bins and models of an experiment, wherever they lie: hashes of their content."""
    content = {"data_dir": bins.content()}
    for role in ("teacher", "student"):
        source = getattr(config, role)
        content[role] = source
        if source and not is_made(source):
            folder = model_folder(source, f"--{role}", MODEL_FILES)
            files = [folder / "config.json", *weight_files(folder)]
            content[role] = digest([(path.name, file_sha256(path)) for path in files])
    return content


def check_same_experiment(out_dir: Path, record: dict):
    """Raises UserError if `out_dir` holds a run of another configuration or content than `record`, naming each key."""
    path = out_dir / "config.json"
    with user_errors(path, "not as a run writes it; name another --out_dir"):
        before = json.loads(path.read_text(encoding="utf-8"))
        old_config = asdict(Config()) | before["config"]  # there may be new keys since then
        old_content = dict(before["content"])

    # Keys that define the experiment, then the content of data and models
    problems = []
    for entry in fields(Config):
        value = record["config"][entry.name]
        old_value = old_config[entry.name]
        if value != old_value and not entry.metadata["may_change"]:
            problem = f"--{entry.name}={value}: the run in {out_dir} has {entry.name}={old_value}"
            if entry.name == "max_steps":  # which sets the learning rate of all steps
                problem += "; to train longer, begin a new run with its last checkpoint as --student"
            problems.append(problem)
    for name, content in record["content"].items():
        if content != old_content.get(name):
            problems.append(f"--{name}={record['config'][name]}: another content than the run in {out_dir} has with "
                            f"{name}={old_config[name]}")
    if problems:
        problems.append(f"--out_dir={out_dir}: keep the values of its run, name another folder, or move the run aside "
                        "with --resume=never")
        raise UserError("\n".join(problems))


def environment() -> dict:
    """Versions that a result may depend on, and the git revision of this file if it has one."""
    revision = None
    if shutil.which("git"):
        command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__, "git": revision}


def count_parameters(**models: GPT | None) -> dict[str, int]:
    return {role: sum(p.numel() for p in model.parameters()) for role, model in models.items() if model is not None}


def stop_by_signal(number: int, folder: Path):
    """End the program after a save that a signal asked for."""
    print(f"{folder.parent}: stopped by {signal.Signals(number).name}, saved as {folder.name}; "
          "the same command continues from there")
    sys.exit(128 + number)


# ------------ Checkpoints ---------------------------------------------------------------------------------------------
# step_00000400/ is a model's folder in Hugging Face's format with the tokenizer, optimizer.pt, train_state.json, and
# manifest.json, which holds the sha256 of all others. It is written under another name, synced to disk, and renamed: it
# is whole, or not there.


@alive("saving a checkpoint")
def save_checkpoint(folder: Path, state: TrainState, student: GPT, optimizer, added_loss, bins: TokenBins):
    """Write a checkpoint. All ranks call it; rank 0 writes. Raises UserError if it cannot be written."""
    # Gather whole tensors. An optimizer that has made no update yet has no state, and would make one up if asked.
    options = whole_tensors(cpu_offload=True)
    weights = get_model_state_dict(student, options=options)
    saved = {"optimizer": None, "added_loss": None}
    if state.step > 0:
        saved["optimizer"] = get_optimizer_state_dict(student, optimizer, options=options)
    if added_loss is not None:
        saved["added_loss"] = added_loss.state_dict()
    if rank() != 0:
        return

    # Write all files under another name, and to the disk itself.
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        student.save_pretrained(temporary, weights)
        save_tokenizer(temporary, bins)
        torch.save(saved, temporary / "optimizer.pt")
        write_text(temporary / "train_state.json", json.dumps(asdict(state), indent=1))
        manifest = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
        for path in temporary.iterdir():
            fsync(path)
        fsync(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:  # how each library says that the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder}: cannot be saved ({error}); make room, and the same command continues from the "
                        "checkpoint before it") from None

    # Now it is whole.
    os.replace(temporary, folder)
    fsync(folder.parent)


def list_checkpoints(out_dir: Path) -> list[Path]:
    """Checkpoint folders, the newest last."""
    return sorted(out_dir.glob("step_" + 8 * "[0-9]"))


@alive("checking the checkpoints")
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
        wrong = [name for name in ("config.json", "model.safetensors", "optimizer.pt", "train_state.json")
                 if name not in manifest]
        for name, sha256 in manifest.items():
            path = folder / name
            if path.parent != folder or not path.is_file() or file_sha256(path) != sha256:
                wrong.append(name)
    except (OSError, ValueError, AttributeError, TypeError):
        wrong = ["manifest.json"]
    return wrong


NOT_AS_SAVED = "not as a run saves it; delete this step's folder, and the checkpoint before it is used"


def read_state(folder: Path) -> TrainState:
    """The training state of a checkpoint. Raises UserError if it is not of this folder's step."""
    path = folder / "train_state.json"
    with user_errors(path, NOT_AS_SAVED):
        state = TrainState(**json.loads(path.read_text(encoding="utf-8")))
        if folder.name != f"step_{state.step:08d}":
            raise ValueError(f"it is of step {state.step}")
    return state


def load_checkpoint(folder: Path, state: TrainState, sampler: MixtureSampler, student: GPT, optimizer, added_loss):
    """Restore the sampler, the optimizer, and what an added loss keeps. Rank 0 reads; only tensors are unpickled.
    Raises UserError if the sampler's state is of other domains."""
    with user_errors(folder / "train_state.json", NOT_AS_SAVED):
        sampler.load_state_dict(state.sampler)
    saved = on_rank_0(read_optimizer, folder, share=False)
    if rank() != 0:  # these ranks get their part from rank 0
        saved = {"optimizer": {}, "added_loss": None}
    if added_loss is not None:
        added_loss.load_state_dict(on_rank_0(saved.get, "added_loss"))
    if state.step > 0:
        set_optimizer_state_dict(student, optimizer, saved["optimizer"], options=whole_tensors())
        # Loading makes a list of the tuple, and checkpoints of a resumed run are to be equal to the bit.
        for group in optimizer.param_groups:
            group["betas"] = tuple(group["betas"])


def read_optimizer(folder: Path) -> dict:
    with user_errors(folder / "optimizer.pt", NOT_AS_SAVED):
        try:
            return torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # its own message advises to unpickle everything
            raise ValueError("it holds more than tensors") from None


# ------------ Checks before anything slow -----------------------------------------------------------------------------

# What is checked of a model before its weights are downloaded
DESCRIBING_FILES = ("config.json", TOKENIZER_META, *TOKENIZER_FILES)


def preflight(config: Config) -> tuple[TokenBins, dict[str, GPTConfig]]:
    """The bins and the sizes of the models, checked before a weight is read. Raises UserError with all problems.

    With dry_run, also prints what the run would take."""
    bins = open_bins(config)
    problems = []

    # The bins against the keys
    if attempt(problems, validation_windows, bins, config.val_samples) is not None:
        attempt(problems, validation_windows, bins, config.test_samples, config.val_samples)
    mixture = parse_mixture(config.mixture)
    if mixture and set(mixture) != set(bins.names):
        problems.append(f"--mixture={config.mixture}: the domains of {config.data_dir} are {' '.join(bins.names)}")

    # The models against the bins
    model_configs = {}
    for role in ("teacher", "student"):
        source = getattr(config, role)
        if source:
            model_config = attempt(problems, read_model_config, role, source, bins, model_configs.get("teacher"))
            if model_config is not None:
                model_configs[role] = model_config
                attempt(problems, check_model, role, source, model_config, bins)
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
    names = None
    if config.domains:
        names = config.domains.split(",")
    return TokenBins(config.data_dir, config.block_size, names)


def validation_windows(bins: TokenBins, count: int, start: int = 0) -> dict[str, torch.Tensor]:
    """`count` validation windows of each domain from `start` on, (count, block_size + 1) int64; {} if count is 0.
    UserError if a domain has fewer."""
    if count == 0:
        return {}
    return {name: torch.from_numpy(bins.val_windows(name, count, start)) for name in bins.names}


def parse_mixture(text: str) -> dict[str, float]:
    """`name=weight,…` as a dict; {} if empty. Raises UserError."""
    if not text:
        return {}
    try:
        weights = {}
        for part in text.strip().split(","):
            name, weight = part.split("=")
            weights[name] = float(weight)
            if not 0 <= weights[name] < math.inf:
                raise ValueError
        if sum(weights.values()) == 0:
            raise ValueError
    except ValueError:
        raise UserError(f"--mixture={text}: write name=weight,… with weights ≥ 0, not all 0") from None
    return weights


SIZE_ALONE = r"\d+x\d+"  # LxD without the scratch: before it


def is_made(source: str) -> bool:
    """Whether a student is made anew, or of the teacher's layers: not a folder, and no name on the Hub.

    Another kind of student is added here, and in `contradictions`, `read_model_config` and `read_model`."""
    return source.partition(":")[0] in ("scratch", "layers")


def read_model_config(role: str, source: str, bins: TokenBins, teacher: GPTConfig | None) -> GPTConfig:
    """The GPTConfig of the model that `source` names: a folder, scratch:LxD, or layers:N of the teacher."""
    kind, _, size = source.partition(":")
    if kind == "scratch":
        layers, width = size.split("x")
        return GPTConfig.scratch(int(layers), int(width), bins.vocab_size, bins.block_size)
    if kind == "layers":
        if teacher is None:
            raise UserError(f"--student={source}: the teacher cannot be read")
        if int(size) > teacher.num_hidden_layers:
            raise UserError(f"--student={source}: the teacher has {teacher.num_hidden_layers} layers")
        return replace(teacher, num_hidden_layers=int(size))
    return read_config(model_folder(source, f"--{role}", DESCRIBING_FILES))


def check_model(role: str, source: str, model_config: GPTConfig, bins: TokenBins):
    """Raises UserError unless the model can read the bins' windows, and has the tokenizer of the bins."""
    if is_made(source):  # for the bins, or of the teacher, which is checked itself
        return
    fix = f"make the bins again with data.py --tokenizer={source}"
    if model_config.vocab_size < bins.vocab_size:
        raise UserError(f"--{role}={source}: has {model_config.vocab_size} ids, but the tokenizer of the bins has "
                        f"{bins.vocab_size}; {fix}")
    if model_config.context < bins.block_size:
        raise UserError(f"--block_size={bins.block_size}: the {role} {source} reads at most {model_config.context} "
                        "tokens")
    try:
        folder = model_folder(source, f"--{role}", DESCRIBING_FILES)
        tokenizer = model_tokenizer(folder, bins.tokenizer["eot_token"])
    except UserError as error:
        raise UserError(f"--{role}={source}: {error}") from None
    if tokenizer is None:
        print(f"WARNING: --{role}={source} has no tokenizer.json; it is taken, since it has enough ids for the bins")
    elif tokenizer.fingerprint != bins.tokenizer["fingerprint"]:
        if not same_tokenizer(saved_tokenizer(bins.dir, bins.tokenizer), tokenizer):
            raise UserError(f"--{role}={source}: its tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids) is not "
                            f"that of the bins, {bins.tokenizer['name']} ({bins.vocab_size} ids); {fix}")


def contradictions(config: Config) -> list[str]:
    """What is wrong with a configuration that can be told without opening a file."""
    problems = []
    arm = ARMS[config.method]
    makes_models = config.preset == "quickstart"
    launched = "RANK" in os.environ
    world = 1
    if launched or config.dry_run:
        world = int(os.environ.get("WORLD_SIZE", 1))

    # Models
    for role, source in (("teacher", config.teacher), ("student", config.student)):
        if role == "teacher" and is_made(source):
            problems.append(f"--teacher={source}: name a trained model; for a folder of that name write ./{source}")
        elif role == "student" and is_made(source):
            if not re.fullmatch(r"scratch:[1-9]\d*x(?!0)\d*[02468]|layers:[1-9]\d*", source):
                problems.append(f"--student={source}: write scratch:LxD with D even, as in scratch:4x128, or layers:N")
        elif not source or os.path.isdir(source):
            continue
        elif re.fullmatch(SIZE_ALONE, source):
            problems.append(f"--{role}={source}: no such folder; a new student is --student=scratch:{source}")
        elif not re.fullmatch(HUB_NAME, source):
            problems.append(f"--{role}={source}: no such folder, and no name on the Hugging Face Hub, OWNER/MODEL")
    if not config.preset:
        problems.append(f"--preset: name one, since it sets what a step is: {describe_presets()}")
    if not config.student and not makes_models:
        problems.append("--student: name its folder, scratch:LxD or layers:N")
    if not config.teacher and not makes_models:
        if config.student.partition(":")[0] == "layers":
            problems.append(f"--student={config.student}: layers of which --teacher? Name its folder")
        if arm.needs_teacher:
            problems.append(f"--teacher: --method={config.method} requires one; name its folder")
        if config.stop_ratio > 0:
            problems.append(f"--stop_ratio={config.stop_ratio}: a ratio requires a teacher; name its folder with "
                            "--teacher")

    # Folders
    if config.data_dir and not os.path.isdir(config.data_dir) and not makes_models:
        problems.append(f"--data_dir={config.data_dir}: no such folder; make bins there with data.py")
    if os.path.isfile(config.out_dir):
        problems.append(f"--out_dir={config.out_dir}: is a file; name a folder")

    # Data
    domains = config.domains.split(",")
    if len(set(domains)) < len(domains):
        problems.append(f"--domains={config.domains}: name each once")
    attempt(problems, parse_mixture, config.mixture)
    if config.mixture and arm.rule == "equal":
        problems.append(f"--mixture={config.mixture}: --method={config.method} draws all domains alike")
    if 0 < config.max_steps <= config.warmup_steps:
        problems.append(f"--warmup_steps={config.warmup_steps}: the whole run would be warm-up, since "
                        f"--max_steps={config.max_steps}; a tenth of the steps is common")
    if config.min_lr > config.lr:
        problems.append(f"--min_lr={config.min_lr}: must not be above --lr={config.lr}")

    # Processes and devices
    per_pass = max(1, config.micro_batch_size)
    if config.batch_size % (per_pass * world):
        problems.append(f"--batch_size={config.batch_size}: must be a multiple of micro_batch_size={per_pass} × "
                        f"{world} processes")
    attempt(problems, resolve_device, config.device)
    if config.parallel == "none" and world > 1:
        problems.append(f"--parallel=none: there are {world} processes; take ddp or fsdp")
    share = config.batch_size // world
    student_per_pass = config.micro_batch_size or max(1, share)
    teacher_per_pass = config.teacher_micro_batch_size or student_per_pass
    if config.teacher_micro_batch_size > 0 and (teacher_per_pass % student_per_pass or share % teacher_per_pass):
        problems.append(f"--teacher_micro_batch_size={teacher_per_pass}: must be a multiple of "
                        f"micro_batch_size={student_per_pass}, and divide the {share} windows of a process")
    if config.parallel in ("ddp", "fsdp", "hsdp") and not launched and not config.dry_run:
        problems.append(f"--parallel={config.parallel}: start with torchrun --nproc_per_node=N distill.py")
    elif config.parallel == "hsdp" and world == int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        problems.append("--parallel=hsdp: there is one node; take fsdp (for --dry_run set LOCAL_WORLD_SIZE to the GPUs "
                        "of a node)")
    if is_sharded(config) and not can_shard(config):
        problems.append(f"--method={config.method}: not with {config.parallel}; take --parallel=ddp")
    if arm.added_loss is not None and teacher_per_pass != student_per_pass:
        problems.append(f"--teacher_micro_batch_size={teacher_per_pass}: --method={config.method} compares layers of "
                        "one micro-batch; leave it out")
    if launched and ":" in config.device:
        problems.append(f"--device={config.device}: each process takes its own; leave out the number")
    if launched and config.device in ("auto", "cuda") and torch.cuda.is_available():
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            problems.append(f"--device={config.device}: more processes than GPUs here; start fewer, or --device=cpu")

    # Packages
    for name in ("tensorboard", "wandb"):
        if getattr(config, name):
            attempt(problems, import_optional, name, f"--{name}")
    return problems


def describe_presets() -> str:
    """What a step of the presets is, for the message that asks for one."""
    described = []
    for name in ("quickstart", "paper"):
        values = asdict(Config()) | PRESETS[name]
        described.append(f"{name} ({values['batch_size']} windows × {values['block_size']} tokens a step, "
                         f"{values['max_steps']:,} steps, lr {values['lr']:g})")
    return " or ".join(described)


# ------------ What a run takes ----------------------------------------------------------------------------------------


def forward_flops(model: GPT, block_size: int) -> int:
    """Floating-point operations of a forward pass, per token."""
    config = model.config
    weights = sum(p.numel() for p in model.layers.parameters()) + config.vocab_size * config.hidden_size
    # Besides the products with the weights, two with the causal half of T × T scores in each layer
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * block_size
    return 2 * weights + 2 * attention


def step_flops(student: GPT, teacher: GPT | None, config: Config) -> int:
    """Floating-point operations of a training step: the student's forward and backward pass, the teacher's forward.

    What an arm adds, such as TED's filters and the passes that weigh DoReMi's windows, is not counted."""
    flops = 3 * forward_flops(student, config.block_size)
    if ARMS[config.method].divergence is not None and teacher is not None:
        flops += forward_flops(teacher, config.block_size)
    return flops * config.batch_size * config.block_size


def print_cost(config: Config, bins: TokenBins, model_configs: dict[str, GPTConfig]):
    """Print what a run would take, from sizes alone, on as many devices as torchrun, or WORLD_SIZE, says."""
    # Each model: its size, and its bytes on a device
    world = int(os.environ.get("WORLD_SIZE", 1))
    sharded = world > 1 and config.parallel != "ddp" and can_shard(config)
    shards = world
    if config.parallel == "hsdp":
        shards = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    gpts = {}
    for role, model_config in model_configs.items():
        with torch.device("meta"):
            gpts[role] = GPT(model_config)
        n = count_parameters(model=gpts[role])["model"]

        # Bytes per device: the teacher's weights in the dtype of the products, the student's in float32 with gradients
        # and AdamW's two moments
        per_device = n
        if sharded and (role == "student" or config.shard_teacher):
            per_device = n / shards
        if role == "teacher":
            width = 2 if config.dtype == "bfloat16" else 4
            parts = {"weights": width * per_device}
        else:
            parts = {"weights": 4 * per_device, "gradients": 4 * per_device, "optimizer": 8 * per_device}
        described = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        print(f"{role}: {model_config.model_type}, {model_config.num_hidden_layers} layers × "
              f"{model_config.hidden_size}, {n:,} parameters; on each of {world} devices {described}")

    # A step
    if "student" in gpts:
        print(f"a step: {config.batch_size * config.block_size:,} tokens, "
              f"{step_flops(gpts['student'], gpts.get('teacher'), config):.2e} FLOPs; {config.max_steps:,} steps")

    # Epochs of each domain, if it were drawn in natural proportions, and if all were drawn alike
    drawn = config.max_steps * config.batch_size
    natural_epochs = drawn / sum(bins.n_windows.values())
    for name, n in bins.n_windows.items():
        print(f"{name}: {n * config.block_size:,} tokens; {natural_epochs:.2f} epochs in natural proportions, "
              f"{drawn / len(bins.names) / n:.2f} if all domains are drawn alike")


def format_bytes(n: float) -> str:
    if n < 2**30:
        return f"{n / 2**20:,.1f} MiB"
    return f"{n / 2**30:,.1f} GiB"


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense, bfloat16


def usage(student: GPT, teacher: GPT | None, tokens_per_s: float, config: Config) -> str:
    """Peak memory of this process, and the share of the GPUs' peak FLOPs that is used (MFU) where it is known."""
    if not config.device.startswith("cuda"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform != "darwin":
            peak *= 1024  # Linux counts KiB, macOS bytes
        return format_bytes(peak)
    text = format_bytes(torch.cuda.max_memory_allocated(config.device))
    peak = peak_flops(config)
    if peak is not None:
        flops_per_s = step_flops(student, teacher, config) * tokens_per_s / (config.batch_size * config.block_size)
        text += f"  MFU {flops_per_s / (peak * world_size()):.0%}"
    return text


def peak_flops(config: Config) -> float | None:
    """Floating-point operations per second that a GPU can do in bfloat16; None for another device or dtype."""
    if config.device.startswith("cuda") and config.dtype == "bfloat16":
        for name, flops in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(config.device):
                return flops
    return None


def line_is_due(step: int, first_step: int, since_line: float, step_time: float, config: Config) -> bool:
    """Whether progress is printed after this step: the first one and the last, every log_every, and, where steps are
    slow, before 30 seconds have passed since the line before. Times in seconds."""
    is_end = step in (first_step + 1, config.max_steps)
    return is_end or step % config.log_every == 0 or since_line + step_time > 30


def print_progress(step: int, step_log: dict, student: GPT, teacher: GPT | None, config: Config):
    minutes, seconds = divmod(int(step_log["eta_s"]), 60)
    print(f"step {step}/{config.max_steps}  loss {step_log['loss']:.3f}  ce {step_log['ce']:.3f}  "
          f"kl {step_log['kl']:.3f}  lr {step_log['lr']:.1e}  {step_log['tokens_per_s']:,.0f} tokens/s  "
          f"{usage(student, teacher, step_log['tokens_per_s'], config)}  ETA {minutes}:{seconds:02d}", flush=True)


# ------------ Baseline: TED -------------------------------------------------------------------------------------------


class TED:
    """Task-aware layer-wise distillation (arXiv 2210.01351) in a small form: a row of ARMS with an added loss.

    Linear filters map up to four evenly spaced layers of each model to the teacher's width. They start as the identity,
    cut or filled with zeros. Stage 1 trains the filters of the two frozen models to predict the next token; the
    teacher's frozen final norm and head read them, where TED trains a head for each. Stage 2 adds the distance between
    the filtered layers to Eq. 3 and goes on training the student's filters. Layers' outputs come from forward hooks,
    which have to be there before the first forward pass. Models and filters are whole on every device."""

    MAX_PAIRS = 4
    WEIGHT = 0.1  # of the distance in the loss
    STAGE_1 = 0.1  # its steps, as a share of max_steps

    def __init__(self, student: GPT, teacher: GPT, config: Config):
        width = teacher.config.hidden_size
        self.outputs = {}  # (role, pair) → the layer's output (…, d), of the latest forward pass
        self.filters = nn.ModuleDict()
        pairs = min(self.MAX_PAIRS, len(student.layers), len(teacher.layers))
        for role, model in (("student", student), ("teacher", teacher)):
            self.filters[role] = nn.ModuleList()
            for pair in range(pairs):  # evenly spaced layers, the last among them
                depth = round((pair + 1) * len(model.layers) / pairs)
                layer = model.layers[depth - 1]
                layer.register_forward_hook(functools.partial(self.keep_output, role, pair))
                linear = nn.Linear(model.config.hidden_size, width, bias=False, device=config.device)
                nn.init.eye_(linear.weight)
                self.filters[role].append(linear)
        self.filters["teacher"].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.filters["student"].parameters(), lr=config.lr, betas=(0.9, 0.95),
                                           weight_decay=config.weight_decay)

    def keep_output(self, role: str, pair: int, layer, inputs, output):
        self.outputs[role, pair] = output

    @alive("training TED's filters")
    def pretrain(self, student: GPT, teacher: GPT, bins: TokenBins, base: np.ndarray, config: Config):
        """Stage 1, on batches of the base proportions. The run itself begins with the same batches."""
        sampler = MixtureSampler(bins.n_windows, config.batch_size, config.seed)
        sampler.probs = base
        self.filters.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.filters.parameters(), lr=config.lr, weight_decay=0.0)
        steps = int(self.STAGE_1 * config.max_steps)
        print(f"TED's filters: {steps} steps", flush=True)
        for _ in range(steps):
            # This rank's windows, through both models: the hooks keep the layers' outputs.
            _, windows = next_windows(sampler, bins, config)
            for micro_batch in windows.split(config.micro_batch_size):
                inputs = micro_batch[:, :-1]
                targets = micro_batch[:, 1:]
                with torch.no_grad(), autocast(config):
                    student(inputs, loss_fn=hidden_and_head)
                    teacher(inputs, loss_fn=hidden_and_head)

                # Every filter by itself: the sum of their losses gives each its own gradient.
                with autocast(config):
                    for (role, pair), output in self.outputs.items():
                        hidden = teacher.norm(self.filters[role][pair](output))
                        loss, _, _ = distillation_loss(hidden, teacher.head_weight, None, None, targets,
                                                       num_tokens=config.batch_size * config.block_size)
                        loss.backward()
                self.outputs.clear()

            # One update of all filters
            for weight in self.filters.parameters():
                weight.grad = over_ranks(weight.grad)
            optimizer.step()
            optimizer.zero_grad()
        self.filters["teacher"].requires_grad_(False)

    def sum_over_tokens(self) -> torch.Tensor:
        """The weighted distance: the squared difference as a share of the teacher's square, so that no model's scale
        matters; the mean over pairs, the sum over tokens. The outputs that it used are dropped."""
        distances = []
        for pair, (filter_S, filter_T) in enumerate(zip(self.filters["student"], self.filters["teacher"])):
            filtered_S = filter_S(self.outputs["student", pair]).float()
            filtered_T = filter_T(self.outputs["teacher", pair]).float()
            difference = (filtered_S - filtered_T).square().sum(dim=-1)
            distances.append((difference / filtered_T.square().sum(dim=-1)).sum())
        self.outputs.clear()
        return self.WEIGHT * torch.stack(distances).mean()

    def reduce_gradients(self) -> list[nn.Parameter]:
        """Average the gradients over ranks, as DDP does with the student's. Returns the parameters, to be clipped."""
        for weight in self.filters["student"].parameters():
            weight.grad = over_ranks(weight.grad) / world_size()
        return list(self.filters["student"].parameters())

    def update(self, lr: float):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict:
        return {"filters": self.filters.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict):
        self.filters.load_state_dict(state["filters"])
        self.optimizer.load_state_dict(state["optimizer"])


ARMS["ted"] = Arm("KD, and the distance between filtered layers", rule="natural", added_loss=TED)


# ------------ Baseline: DoReMi's proxy --------------------------------------------------------------------------------
# CPT&DoReMi (arXiv 2305.10429) is three runs: a reference (cpt), a proxy whose loss is weighted by α (doremi_proxy,
# with the reference as its teacher), and cpt again in the mixture that the proxy has found: the mean of its α.


def doremi_update(alpha, excess, step_size: float = 1.0, smoothing: float = 1e-3) -> np.ndarray:
    """DoReMi's Alg. 1: α′ = α · exp(η λ), then (1 − c) · α′/Σα′ + c/N. (N,) float64.

    alpha: the last weights. excess, λ: the proxy's loss above the reference's, nats per token, per domain."""
    log_alpha = np.log(np.asarray(alpha, dtype=np.float64)) + step_size * np.asarray(excess)
    return (1 - smoothing) * softmax(log_alpha) + smoothing / len(log_alpha)


@torch.no_grad()
def doremi_window_weights(state: dict | None, proxy: GPT, reference: GPT, windows: torch.Tensor, domain_ids: np.ndarray,
                          sampler: MixtureSampler, config: Config) -> tuple[torch.Tensor, dict]:
    """A weight for each window of a batch, α of its domain over the probability it was drawn by → ((B,), new state).

    windows: this rank's. domain_ids: of the whole batch. The state holds α, λ ("excess") and the "total" of α over the
    steps. λ is the mean over the domain's tokens on all ranks, cut at 0 for each token; a domain that was not drawn
    keeps its λ."""
    N = len(sampler.names)
    if state is None:
        state = {"alpha": [1 / N] * N, "excess": [0.0] * N, "total": [0.0] * N}

    # Sums over this rank's tokens, then over ranks
    sums = torch.zeros(2, N, device=windows.device)
    my_ids = torch.from_numpy(domain_ids[rank_slice(config)]).to(windows.device)
    for rows, ids in zip(windows.split(config.micro_batch_size), my_ids.split(config.micro_batch_size)):
        targets = rows[:, 1:]

        def token_losses(hidden, head):
            # One window at a time, so that the logits of one alone are held
            losses = []
            for window_hidden, window_targets in zip(hidden, targets):
                logits = F.linear(window_hidden, head).float()
                losses.append(F.cross_entropy(logits, window_targets, reduction="none"))
            return torch.stack(losses)

        with autocast(config):
            proxy_losses = proxy(rows[:, :-1], loss_fn=token_losses)
            reference_losses = reference(rows[:, :-1], loss_fn=token_losses)
        excess = (proxy_losses - reference_losses).clamp(min=0).sum(dim=1)
        tokens = torch.full_like(excess, targets.shape[1])
        sums.index_add_(1, ids, torch.stack((excess, tokens)))
    excess_sum, tokens = over_ranks(sums).cpu().double().numpy()

    # Update α, and weigh each window by it
    excess = np.where(tokens > 0, excess_sum / np.maximum(tokens, 1), state["excess"])
    alpha = doremi_update(state["alpha"], excess)
    total = alpha + state["total"]
    weights = np.divide(alpha, sampler.probs, out=np.zeros(N), where=sampler.probs > 0)
    window_weights = torch.tensor(weights[domain_ids], dtype=torch.float32)
    return window_weights, {"alpha": alpha.tolist(), "excess": excess.tolist(), "total": total.tolist()}


def write_doremi_mixture(config: Config, state: TrainState):
    """Write the mean of α over the proxy's steps to mixture.txt, as --mixture takes it."""
    if state.weights_state is None:
        return
    total = np.array(state.weights_state["total"])
    shares = total / total.sum()
    mixture = ",".join(f"{name}={share!r}" for name, share in zip(state.domains, shares.tolist()))
    path = Path(config.out_dir) / "mixture.txt"
    write_text(path, mixture + "\n")
    print(f"DoReMi's mixture, for --mixture: {mixture} (also in {path})")


ARMS["doremi_proxy"] = Arm("DoReMi's proxy; its teacher is the reference, a finished cpt", rule="natural",
                           divergence=None, weigh_windows=doremi_window_weights, at_end=write_doremi_mixture)


# ------------ Report --------------------------------------------------------------------------------------------------


def worst_ratio(domains: dict[str, dict]) -> float:
    return max(domain["ratio"] for domain in domains.values())


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
    print_teacher_warnings(state.first_domains, open_bins(config).vocab_size)
    print(f"{config.method}, seed {config.seed}, step {state.step}: first → last evaluation\n")
    print_table(state.first_domains, state.domains)
    if config.teacher:
        print(f"worst ratio: {worst_ratio(state.first_domains):.2f} → {worst_ratio(state.domains):.2f}")
    if config.test_samples > 0:
        print("\nOn the test windows, which r never followed:\n")
        print_table(state.domains, state.domains, tested=True)
    arm = ARMS[config.method]
    if arm.at_end is not None:
        arm.at_end(config, state)
    if config.preset == "quickstart":
        other = "kd" if config.method != "kd" else "ddk"
        print(f"\nAnother arm on the same models:  python distill.py --preset=quickstart --data_dir={config.data_dir} "
              f"--teacher={config.teacher} --student={config.student} --method={other}\n"
              f"Text by this student:            python model.py --model={folder} --prompt='def main('")
    print(f"The student is in {folder}")


def print_table(first_domains: dict[str, dict], domains: dict[str, dict], tested: bool = False):
    """One row per domain, one column per number of measured_domains, as first → last where it has changed; with
    `tested`, those on the test windows instead."""
    first_row = next(iter(domains.values()))
    columns = []
    for column in first_row:
        is_test_column = column.startswith("test_")
        if is_test_column == tested:
            columns.append(column)
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
    """Make what the quickstart lacks, in `data_dir`: bins, teacher, student base. Returns `config` with its models.

    Every arm and seed then starts from the same two models."""
    # The runs of the models that the user has not named, checked before anything is made
    runs = {}
    for role, keys in quickstart_models(config.pretrain_steps).items():
        if not getattr(config, role):
            runs[role] = pretraining(keys, data_dir=config.data_dir, out_dir=f"{config.data_dir}/{role}",
                                     device=config.device, compile=config.compile, timeout=config.timeout)
            problems = contradictions(runs[role])
            if problems:
                refuse("\n".join(problems))

    if runs and config.block_size > 2048:
        refuse(f"--block_size={config.block_size}: the quickstart's models read at most 2048 tokens")

    # The bins, and then the main run's own checks, before minutes of training
    on_rank_0(make_quickstart_bins, config)
    whole_config = replace(config, **{role: run.student for role, run in runs.items()})
    if config.dry_run:
        return whole_config
    if runs:
        on_rank_0(preflight, whole_config)

    for role, run in runs.items():
        print(f"\nThe {role}: {run.student}, {run.max_steps} steps, kept in {run.out_dir}", flush=True)
        try:
            folder = train(run)
        except UserError as error:
            raise UserError(f"{error}\nThat was the quickstart's {role}. If another one is there already, keep the "
                            f"--pretrain_steps that it was made with, or delete {run.out_dir}") from None
        config = replace(config, **{role: str(folder)})
    print(f"\nWith --preset=quickstart these can be named:  --teacher={config.teacher}  --student={config.student}\n",
          flush=True)
    return config


def make_quickstart_bins(config: Config):
    data_dir = Path(config.data_dir)
    if not (data_dir / "meta.json").is_file():
        print(f"Collecting text into {data_dir} …", flush=True)
        with locked(data_dir):
            build_bins(data_dir, load_tokenizer("bytes"), quickstart_documents(QUICKSTART_BYTES), val_fraction=0.1)
    names = read_meta(data_dir)["domains"].keys()
    if names != QUICKSTART_BYTES.keys() and not (config.teacher and config.student):
        raise UserError(f"--data_dir={data_dir}: holds {' '.join(names)}, not the quickstart's text; name --teacher "
                        "and --student, or another folder")


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
                            help=help_of(name).replace("%", "%%"))
    texts, unknown = parser.parse_known_args(argv)

    # Convert the values, on top of those of --config, and look for words that are no keys.
    problems = []
    given = {}
    if getattr(texts, "config", None):
        given = attempt(problems, read_run_config, texts.config) or {}
    for name, text in vars(texts).items():
        value = attempt(problems, convert, name, text)
        if value is not None:
            given[name] = value
    for word in unknown:
        name = word.lstrip("-").partition("=")[0]
        similar = difflib.get_close_matches(name, Config.__dataclass_fields__, n=1)
        advice = "write --key=value; --help lists the keys"
        if name in OTHER_NAMES:
            advice = f"here it is --{OTHER_NAMES[name]}"
        elif similar:
            advice = f"did you mean --{similar[0]}?"
        problems.append(f"{word}: unknown key; {advice}")

    # Then what contradicts what
    config = resolve_config(given)
    problems += contradictions(config)
    if problems:
        if os.environ.get("RANK", "0") != "0":  # rank 0 has to print first: torchrun ends all ranks when one ends
            time.sleep(1)
        raise UserError("\n".join(problems))
    return config


# Words of other programs for our keys
OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "max_lr"), "lr"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "epochs", "max_iters", "num_steps"), "max_steps"),
    **dict.fromkeys(("model", "model_name_or_path", "student_model"), "student"),
    **dict.fromkeys(("teacher_model", "teacher_model_name_or_path"), "teacher"),
    **dict.fromkeys(("bf16", "fp16", "precision", "torch_dtype"), "dtype=bfloat16"),
    "gradient_accumulation_steps": "micro_batch_size: windows per forward pass; accumulation follows from it",
    **dict.fromkeys(("per_device_train_batch_size", "device_batch_size"), "micro_batch_size"),
    **dict.fromkeys(("train_batch_size", "total_batch_size", "global_batch_size"), "batch_size"),
    **dict.fromkeys(("max_seq_length", "max_length", "seq_len", "sequence_length", "context_length"), "block_size"),
    **dict.fromkeys(("output_dir", "save_dir"), "out_dir"),
    **dict.fromkeys(("dataset", "data", "data_path", "train_file"), "data_dir"),
    **dict.fromkeys(("warmup_ratio", "warmup_iters", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("eval_interval", "eval_steps", "eval_every"), "interval"),
    **dict.fromkeys(("save_steps", "save_interval"), "save_every"),
    **dict.fromkeys(("logging_steps", "log_interval"), "log_every"),
    **dict.fromkeys(("max_grad_norm", "clip_grad", "gradient_clipping"), "grad_clip"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "checkpoint_activations"),
    **dict.fromkeys(("kl_weight", "kd_weight", "kd_ratio", "lambda"), "gamma"),
    "resume_from_checkpoint": "out_dir: the same command continues the run there",
}


# Keys that --config does not take from a run: they belong to its folder, its machine or its occasion.
NOT_REPEATED = ("config", "out_dir", "resume", "dry_run", "device", "parallel", "compile", "micro_batch_size",
                "teacher_micro_batch_size")


def read_run_config(path: str) -> dict:
    """The keys to repeat a run by, from its config.json: all but NOT_REPEATED."""
    with user_errors(f"--config={path}", "name the config.json in the out_dir of a run"):
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if "config" not in saved:
            raise ValueError("not a run's configuration" + (", but a model's" if "model_type" in saved else ""))
        given = {}
        for name, value in saved["config"].items():
            if name not in NOT_REPEATED:
                given[name] = convert(name, str(value))
    return given


def help_of(name: str) -> str:
    """The meaning of a key, with its default and, where it differs, the quickstart's."""
    entry = Config.__dataclass_fields__[name]
    text = entry.metadata["help"]
    if name == "method":
        text += "; " + "; ".join(f"{method}: {arm.help}" for method, arm in ARMS.items())
    if entry.default != "":
        text += f" (default: {entry.default}"
        if name in PRESETS["quickstart"]:
            text += f"; quickstart: {PRESETS['quickstart'][name]}"
        text += ")"
    return text


def convert(name: str, text: str | None):
    """The value of a key from its text. Raises UserError."""
    entry = Config.__dataclass_fields__[name]
    choices = entry.metadata["choices"]
    if text is None:
        raise UserError(f"--{name}: requires a value")
    if name == "dtype":
        text = {"bf16": "bfloat16", "fp32": "float32"}.get(text, text)
        if text in ("fp16", "float16"):
            raise UserError(f"--dtype={text}: requires loss scaling, which is not done here; take bfloat16 or float32")
    if choices and text not in choices:
        raise UserError(f"--{name}={text}: must be one of {' '.join(choices)}")
    if entry.type is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--{name}={text}: must be true or false")
        return text.lower() == "true"
    if entry.type is str:
        return text
    try:
        value = entry.type(text)
    except ValueError:
        kind = "a whole number" if entry.type is int else "a number"
        raise UserError(f"--{name}={text}: must be {kind}") from None
    minimum = entry.metadata["minimum"]
    maximum = entry.metadata["maximum"]
    if not minimum <= value <= maximum or not math.isfinite(value):
        bounds = f"{minimum} or more" if maximum == math.inf else f"from {minimum} to {maximum}"
        raise UserError(f"--{name}={text}: must be {bounds}, and finite")
    return value


def resolve_config(given: dict) -> Config:
    """A whole Config from the keys given: below them the preset's values, then what follows from others."""
    preset = given.get("preset", "")
    if not preset:
        student = given.get("student", "")
        names_student = student and not is_made(student) and not re.fullmatch(SIZE_ALONE, student)
        if not given.get("teacher") and not names_student:
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
            on_rank_0(preflight, config)
            return
        folder = train(config)
        on_rank_0(report, config, folder)


if __name__ == "__main__":
    run_program(main)
