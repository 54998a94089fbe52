"""DDK: distil a large language model (the teacher) into a small student, domain by domain.

    python distill.py                                        the quickstart: text, teacher, student, DDK, a table
    python distill.py --method=kd                            another method on the same bins and models
    torchrun --nproc_per_node=8 distill.py --preset=paper --teacher=DIR --student=DIR --data_dir=DIR

The method is Alg. 1 of arXiv 2407.16154. Every K steps (`interval`) the student's perplexity is measured in each
domain and divided by the teacher's. Domains in which the student is further behind get more of the next K steps' data.
The loss of each step is cross-entropy plus γ times the KL divergence from the teacher's predictions (Eq. 3).

The first part of this file is the paper: configuration, methods, Eq. 3, perplexities, one training step, Alg. 1. The
second part, below the double line, has the functions that the first part calls: processes, checkpoints, checks, prints.
"""

import argparse
import fcntl
import functools
import gc
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from data import (MODEL_FILES, SUMS, TOKENIZER_FILES, TOKENIZER_META, TokenBins, UserError, build_quickstart_bins,
                  damaged_files, digest, fsync, import_optional, model_folder, model_tokenizer, print_table, published,
                  run_program, save_tokenizer, user_errors, write_json)
from model import GPT, GPTConfig, read_config, resolve_device, weight_files
from sample_mixture import RULES, MixtureSampler, experiment_values, parse_mixture, read_metrics

# ------------ Configuration -------------------------------------------------------------------------------------------

# A preset replaces some of Config's defaults, which are the paper's. Each of the paper's pairs has one: its models, and
# how many windows per forward pass fit 8 GPUs of 80 GB. Ours are batch_size, weight decay, clipping and the betas.
PRESETS = {
    "quickstart": dict(interval=10, val_samples=64, test_samples=64, block_size=256, batch_size=8, max_steps=300,
                       lr=1e-3, min_lr=1e-4, warmup_steps=20, save_every=100),
    "paper": {},
    "qwen1.5-14b-1.8b": dict(teacher="Qwen/Qwen1.5-14B", student="Qwen/Qwen1.5-1.8B", micro_batch_size=8),
    "qwen1.5-14b-4b": dict(teacher="Qwen/Qwen1.5-14B", student="Qwen/Qwen1.5-4B", micro_batch_size=4),
    "qwen1.5-7b-1.8b": dict(teacher="Qwen/Qwen1.5-7B", student="Qwen/Qwen1.5-1.8B", micro_batch_size=8),
    "llama2-13b-tinyllama-1.1b": dict(teacher="meta-llama/Llama-2-13b-hf", micro_batch_size=8,
                                      student="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
    "starcoder-15.5b-3b": dict(teacher="bigcode/starcoder", student="bigcode/starcoderbase-3b", micro_batch_size=8),
}


@dataclass(frozen=True)
class Method:
    """A method that the paper compares. The defaults are DDK's; a row of METHODS has the differences."""
    help: str
    rule: str = "ddk"  # the mixture rule, a key of sample_mixture.RULES
    divergence: str | None = "forward"  # `direction` of Eq. 3; None: cross-entropy only

    @property
    def trains_with_teacher(self) -> bool:
        return self.divergence is not None


METHODS = {
    "ddk": Method("r by Eq. 2 after every K steps"),
    "ddk_no_fs": Method("without factor smoothing: r by Eq. 1 after every K steps", rule="ddk_no_fs"),
    "ddk_es": Method("equal sampling: all domains alike", rule="equal"),
    "kd": Method("knowledge distillation in the natural mixture", rule="natural"),
    "minillm": Method("KD with teacher-forced reverse KL", rule="natural", divergence="reverse"),
    "cpt": Method("continued pre-training: the student alone", rule="natural", divergence=None),
}


@dataclass
class Config:
    """The keys of the command line. The comment behind a key is its --help. Defaults are the paper's, if given."""
    # Models, data and folders
    preset: Literal[("", *PRESETS)] = ""  # set of defaults; quickstart, unless you give a model folder or Hub name
    teacher: str = ""  # folder of the teacher in Hugging Face's format, or its name on the Hub: OWNER/MODEL
    student: str = ""  # the same; or scratch:LxD, a new model of L layers, D wide
    data_dir: str = ""  # folder of the bins, made by data.py; left out: data/PRESET
    out_dir: str = ""  # folder of the run; left out: out/PRESET-METHOD-SEED, so set it if another key differs
    domains: str = ""  # name,name,… of the bins' domains; left out: all

    # The method
    method: Literal[tuple(METHODS)] = "ddk"  # see above
    gamma: float = 0.2  # γ, weight of the divergence from the teacher
    temperature: float = 1.0  # T, divides the logits of both models in the divergence
    alpha: float = 0.5  # α, the share of r that follows the discrepancies; 1 − α is uniform
    interval: int = 1000  # K, steps between two updates of r
    val_samples: int = 500  # validation windows per domain, by which r is updated
    test_samples: int = 0  # test windows per domain, of other text, never used for r; 0: none
    mixture: str = ""  # name=weight,… in place of the natural proportions
    stop_ratio: float = 0.0  # end when the largest perplexity ratio is at or below this; 0: never

    # Optimization
    block_size: int = 2048  # tokens per window
    batch_size: int = 256  # windows per step, over all ranks and micro-batches
    max_steps: int = 30_000  # training steps; 0: evaluate the student, save it, and end
    lr: float = 3e-5  # learning rate after warm-up
    min_lr: float = 3e-6  # learning rate at the last step
    warmup_steps: int = 1000  # steps of linear warm-up
    weight_decay: float = 0.1  # weight decay, on matrices only
    grad_clip: float = 1.0  # maximum gradient norm; 0: no clipping
    seed: int = 0  # order of the data, and initial weights of a scratch student

    # How it is computed
    micro_batch_size: int = 0  # windows per forward pass, fewer in the last one; 0: all of a rank's windows
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on cuda, else float32
    compile: Literal["auto", "true", "false"] = "auto"  # the blocks; auto: on cuda. A large loss is always compiled
    device: str = "auto"  # cuda, mps or cpu; auto: the first one available
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"  # under torchrun; auto: fsdp (FSDP2) on GPUs, ddp on CPUs
    shard_teacher: bool = True  # with fsdp, shard the teacher too; false: whole on every device
    checkpoint_activations: bool = False  # recompute activations in the backward pass, to save memory
    timeout: float = 30  # minutes that a rank waits for the others

    # Checkpoints and logs
    save_every: int = 1000  # steps between two checkpoints; 0: the last step only
    keep: int = 2  # newest checkpoints to keep; 0: all
    log_every: int = 10  # steps between two lines of progress
    wandb: bool = False  # log to Weights & Biases too
    dry_run: bool = False  # check everything, print what the run would take, and stop
    pretrain_steps: int = 1200  # quickstart: steps of its teacher; the student base gets a quarter


# Ranges of numeric keys. The others must be at least 0.
BOUNDS = {"alpha": (0, 1), "lr": (0, 1), "temperature": (1e-3, 1e15), "interval": (1, 1e15), "val_samples": (1, 1e15),
          "block_size": (1, 1e15), "batch_size": (1, 1e15), "timeout": (0.1, 1e6), "log_every": (1, 1e15),
          "pretrain_steps": (4, 1e15)}
# The keys that may change when a run is resumed. For teacher, student and data_dir, the content counts.
MAY_CHANGE = {"preset", "teacher", "student", "data_dir", "out_dir", "micro_batch_size", "compile", "device",
              "parallel", "shard_teacher", "checkpoint_activations", "timeout", "save_every", "keep", "log_every",
              "wandb", "dry_run", "pretrain_steps"}


# ------------ Eq. 3 ---------------------------------------------------------------------------------------------------

def dense_distillation_loss(student_logits, teacher_logits, targets, *, gamma=0.2, temperature: float = 1.0,
                            direction: str = "forward", vocab_size: int | None = None, num_tokens=None,
                            token_weights=None):
    """Eq. 3: CE(student, next token) + γ · KL(softmax(z_T/T) ‖ softmax(z_S/T)), mean per token → (loss, ce, kl).

    student_logits (…, V_S); teacher_logits (…, V_T), or None, then kl is 0; targets (…), already shifted, −100 is
    ignored. CE is over all V_S rows: that keeps padded ids unlikely. KL is over the first `vocab_size` ids (default:
    the smaller number of rows): both softmaxes leave out the other ids. There is no T² factor. direction "forward" puts
    the teacher first, "reverse" the student, as in MiniLLM. (The paper prints the student first, and means the teacher:
    see the README's details.) gamma: a number, or one per token (…).

    loss: CE + γ · KL summed over tokens, weighted by `token_weights` (…) if given, and divided by `num_tokens`
    (default: the number of targets that count). ce and kl: one value per token, (…), detached, without weights and γ, 0
    for ignored targets. ValueError, given a teacher, on another direction, or if vocab_size exceeds a head's rows."""
    counted = targets != -100
    weights = counted if token_weights is None else counted * token_weights
    if num_tokens is None:
        num_tokens = counted.sum().clamp(min=1)

    # Cross-entropy by comparing ids: torch.compile does not fuse a gather. An ignored target is no id, and adds 0.
    z_S = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    log_s = F.log_softmax(z_S, dim=-1)
    ids = torch.arange(z_S.shape[-1], device=targets.device)
    ce = -torch.where(ids == targets.unsqueeze(-1), log_s, 0).sum(dim=-1)
    ce_loss = (weights * ce).sum() / num_tokens
    if teacher_logits is None:
        return ce_loss, ce.detach(), torch.zeros_like(ce)

    # The divergence between p (teacher) and q (student), over the tokenizer's ids. Rows that only the larger head has
    # are sliced off. Padding rows of both are masked: torch.compile fuses that with the softmax, but not a slice.
    z_T = teacher_logits.detach().to(z_S.dtype)
    shared_rows = min(z_S.shape[-1], z_T.shape[-1])
    if vocab_size is None:
        vocab_size = shared_rows
    if vocab_size > shared_rows:
        raise ValueError(f"vocab_size {vocab_size} is more than the {shared_rows} rows of a head")

    def log_probabilities(logits):
        logits = logits[..., :shared_rows]
        if temperature != 1:  # at T = 1 torch.compile makes fewer passes over the logits without a division
            logits = logits / temperature
        if vocab_size < shared_rows:
            logits = torch.where(ids[:shared_rows] < vocab_size, logits, -1e30)  # -inf would make NaN in the KL
        return F.log_softmax(logits, dim=-1)

    log_p = log_probabilities(z_T)
    if temperature == 1 and vocab_size == z_S.shape[-1]:
        log_q = log_s  # the same softmax: not computed twice
    else:
        log_q = log_probabilities(z_S)
    if direction == "forward":
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    elif direction == "reverse":
        kl = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    else:
        raise ValueError(f"unknown direction {direction!r}")
    kl = torch.where(counted, kl, 0)

    loss = ce_loss + (gamma * (weights * kl)).sum() / num_tokens
    return loss, ce.detach(), kl.detach()


# ------------ ℓ_S and ℓ_T, and what is measured per domain ------------------------------------------------------------

@torch.no_grad()
def perplexities(model: GPT | None, windows: dict[str, torch.Tensor], *, vocab_size: int,
                 config: Config) -> dict[str, float | None]:
    """Return the paper's ℓ: name → exp of the mean next-token cross-entropy over windows (n, block_size + 1).

    It is over the tokenizer's ids only (`vocab_size`), for teacher and student. All ranks call it and get the same
    result. Without a model each is None. Draws no random number. UserError if a loss is not finite."""
    if model is None:
        return dict.fromkeys(windows)
    ppl = {}
    for name, domain_windows in windows.items():
        ce_sum = torch.zeros((), dtype=torch.float64)
        for inputs, targets in evaluation_batches(domain_windows, config.micro_batch_size, model.head_weight.device):
            def cross_entropy(hidden, head):
                return distillation_loss(hidden, head[:vocab_size], None, None, targets)

            with autocast(config):
                _, ce, _ = model(inputs, loss_fn=cross_entropy)
            ce_sum += ce.cpu().double().sum()

        # Sums over counts, so that it does not matter how the windows were split
        mean_ce = all_reduce(ce_sum).item() / domain_windows[:, 1:].numel()
        if not math.isfinite(mean_ce):
            raise UserError(f"domain {name}: the loss of a model is {mean_ce}: damaged weights, or --dtype too coarse")
        ppl[name] = math.exp(min(mean_ce, 700.0))  # exp overflows from 710 on
    return ppl


def measured_domains(student_ppl: dict, teacher_ppl: dict, sampler: MixtureSampler, block_size: int) -> dict:
    """Return name → numbers of each domain after an evaluation. Another number for the log is one more line here."""
    domains = {}
    for i, name in enumerate(sampler.names):
        domains[name] = {
            **ppl_and_ratio(student_ppl[name], teacher_ppl[name]),
            "tokens": int(sampler.drawn[i]) * block_size,
            "epochs": float(sampler.epochs[i]),
        }
    return domains


def ppl_and_ratio(student_ppl: float, teacher_ppl: float | None, prefix: str = "") -> dict:
    """Return the perplexities of a domain and ℓ_S / ℓ_T. Without a teacher it and teacher_ppl are None."""
    ratio = None if teacher_ppl is None else student_ppl / teacher_ppl
    return {f"{prefix}student_ppl": student_ppl, f"{prefix}teacher_ppl": teacher_ppl, f"{prefix}ratio": ratio}


# ------------ State, data, learning rate, optimizer -------------------------------------------------------------------

@dataclass
class TrainState:
    """Everything that a run continues from, besides tensors: weights and optimizers. Saved as JSON."""
    step: int = 0  # finished updates
    finished: bool = False
    teacher_ppl: dict | None = None  # ℓ_T: name → perplexity, measured once; None for each without a teacher
    test_teacher_ppl: dict | None = None  # the same on the test windows
    rule_state: dict | None = None  # of the mixture rule, such as r_t
    sampler: dict | None = None  # MixtureSampler.state_dict()
    domains: dict | None = None  # measured_domains of the last evaluation
    log_lines: int = 0  # of metrics.jsonl: a resumed run drops the lines after them


def make_sampler(config: Config, bins: TokenBins) -> MixtureSampler:
    """Return the sampler of training windows, in the natural proportions of the data, or --mixture's if it is set."""
    sampler = MixtureSampler(bins.n_windows, config.batch_size, config.seed)
    if config.mixture:
        sampler.probs = parse_mixture(config.mixture)
    return sampler


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of update `step`, from 0: linear warm-up to lr, then cosine to min_lr at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    decay_steps = config.max_steps - 1 - config.warmup_steps
    if decay_steps <= 0:
        return config.min_lr
    progress = (step - config.warmup_steps) / decay_steps
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model: GPT, config: Config) -> list:
    """Return AdamW, with weight decay on matrices only: a list, so that a fork may add another optimizer."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    betas = [0.9, 0.95]  # a checkpoint gives a tuple back as a list, so that a resumed run's file would differ
    groups = [{"params": matrices, "weight_decay": config.weight_decay, "betas": betas},
              {"params": vectors, "weight_decay": 0.0, "betas": betas}]
    return [torch.optim.AdamW(groups, lr=config.lr, fused=True)]


# ------------ One training step ---------------------------------------------------------------------------------------

def training_step(step: int, student: nn.Module, teacher: GPT | None, optimizers: list[torch.optim.Optimizer],
                  windows: torch.Tensor, *, vocab_size: int, config: Config) -> dict[str, float]:
    """Make one update of the student by Eq. 3. Return loss, ce, kl, lr and grad_norm, the same on all ranks.

    student: in its DistributedDataParallel wrapper if it has one. windows: this rank's, (n, block_size + 1) int64.
    UserError, on all ranks and before the update, if the loss or the gradient is not finite."""
    method = METHODS[config.method]
    num_tokens = config.batch_size * config.block_size

    # Forward and backward passes, one micro-batch at a time
    sums = {}  # name → this rank's share of a number that is logged
    teacher_hidden = teacher_head = None
    for start in range(0, len(windows), config.micro_batch_size):
        rows = slice(start, start + config.micro_batch_size)
        inputs = windows[rows, :-1]
        targets = windows[rows, 1:]

        # The teacher's hidden states; the loss makes the logits. FSDP2 keeps the root, and so the head, gathered.
        if method.divergence is not None:
            with torch.no_grad(), autocast(config):
                teacher_hidden, teacher_head = teacher(inputs, loss_fn=lambda hidden, head: (hidden, head))

        # Eq. 3, as a share of the whole batch: the losses of all micro-batches and ranks are sums over their tokens,
        # divided by the tokens of the batch. So they, and their gradients, add up to Eq. 3's mean.
        equation = dict(gamma=config.gamma, temperature=config.temperature, direction=method.divergence,
                        vocab_size=vocab_size, num_tokens=num_tokens)
        terms = {}  # name → value, detached, of a term besides Eq. 3, for the log

        def loss_fn(hidden, head):
            loss, ce, kl = distillation_loss(hidden, head, teacher_hidden, teacher_head, targets, **equation)
            # A term besides Eq. 3 is added to the loss here: its sum over the tokens, divided by num_tokens.
            return loss, ce, kl

        if config.parallel == "ddp":  # DDP reduces gradients over ranks in the last pass only; FSDP2 does in each
            student.require_backward_grad_sync = rows.stop >= len(windows)
        with autocast(config):
            loss, ce, kl = student(inputs, loss_fn=loss_fn)
        # Gradients of the ranks have to be added up, but DDP and FSDP average them.
        (loss * world_size()).backward()
        logged = {"loss": loss.detach(), "ce": ce.sum() / num_tokens, "kl": kl.sum() / num_tokens, **terms}
        for name, value in logged.items():
            sums[name] = sums.get(name, 0) + value
    if isinstance(teacher, FSDPModule):
        teacher.reset_iter_state()  # its list of forward passes grows, since no backward pass clears it

    # Clip the gradient, and stop where training has gone wrong: all ranks, or none, since they know the same numbers.
    grad_norm = nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()  # over all shards
    totals = all_reduce(torch.stack(list(sums.values()))).tolist()
    step_log = dict(zip(sums, totals))
    step_log["lr"] = learning_rate(step, config)
    step_log["grad_norm"] = grad_norm.item()
    if not math.isfinite(step_log["loss"] + step_log["grad_norm"]):
        raise UserError(f"step {step}: loss {step_log['loss']}, gradient norm {step_log['grad_norm']}. The update was "
                        f"not made, and nothing is saved. Lower --lr={config.lr}, with another --out_dir, or check the "
                        f"data: python data.py --verify={config.data_dir}")

    # One step of each optimizer, with this step's learning rate
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = step_log["lr"]
        optimizer.step()
        optimizer.zero_grad()
    return step_log


# ------------ Alg. 1 --------------------------------------------------------------------------------------------------

def train(config: Config) -> Path:
    """Train by Alg. 1, or by another `method`. Return the folder of the last checkpoint.

    The loop runs max_steps + 1 times, so that the student is evaluated before the first update and after the last one.
    Each time it evaluates and updates r, if due; saves, if due; and makes one update, unless it was the last."""
    check_config(config)  # the quickstart and tests call train directly
    config = resolve_auto(config)
    method = METHODS[config.method]

    with RunFolder(Path(config.out_dir)) as run:
        # Rank 0 checks everything that is cheap, and shares what it found.
        bins, model_configs = on_rank_0(preflight, config)
        record = on_rank_0(experiment_record, config, bins)
        on_rank_0(run.lock)
        on_rank_0(check_same_experiment, run.out_dir, record)

        # The checkpoint to continue from: `resumed` is its folder, or None. Whatever was logged after it is dropped.
        resumed = on_rank_0(newest_checkpoint, run.out_dir)
        state = TrainState() if resumed is None else on_rank_0(read_state, resumed)
        on_rank_0(run.cut_log, state.log_lines)
        if state.finished:
            print(f"{config.out_dir}: this run is finished (step {state.step})")
            return resumed
        if resumed is not None:
            print(f"{config.out_dir}: continuing from {resumed.name}")
        if config.wandb:
            on_rank_0(run.start_wandb, config)

        # The data: fixed windows for validation and test, and the sampler of training windows
        val_windows = fixed_windows(bins, "val", config.val_samples)
        test_windows = fixed_windows(bins, "test", config.test_samples)
        sampler = make_sampler(config, bins)
        natural = sampler.probs  # or --mixture's weights

        # The teacher (None if there is none) and the student, on this rank's device, whole or sharded
        models = load_models(config, model_configs, resumed)
        teacher = models.get("teacher")
        student = models["student"]
        optimizers = make_optimizers(student, config)

        # Continue from the checkpoint, or start. ℓ_T is measured once in a run. measure(model, windows) is ℓ.
        measure = functools.partial(perplexities, vocab_size=bins.vocab_size, config=config)
        if resumed is not None:
            load_checkpoint(resumed, state, sampler, student, optimizers)
        else:
            state.teacher_ppl = measure(teacher, val_windows)
            state.test_teacher_ppl = measure(teacher, test_windows)
            run.log("run", 0, **record, rule=method.rule, natural=dict(zip(bins.names, natural.tolist())),
                    parameters=count_parameters(models))
        if not method.trains_with_teacher:  # it has been measured
            teacher = None
            models.clear()
        gc.collect()  # frees the teacher's memory: a compiled or sharded model is in reference cycles

        # DDP wraps the student for the forward passes of training only; FSDP has sharded it in place.
        wrapped_student = student
        if config.parallel == "ddp":
            wrapped_student = DistributedDataParallel(student, gradient_as_bucket_view=True)

        # The loop. From here on a signal only sets a flag, for the step "Save".
        run.catch_signals()
        gc.freeze()  # so that the collector does not pause steps to look at what stays until the end
        run.callback(gc.unfreeze)
        first_step = state.step
        step_times = []  # in seconds
        while True:
            # Every K steps: measure ℓ_S, update r, log. At the end: measure. A run that is resumed here has done so.
            t, steps_since_update = divmod(state.step, config.interval)
            last = state.step >= config.max_steps
            just_resumed = resumed is not None and state.step == first_step
            if (steps_since_update == 0 or last) and not just_resumed:
                student_ppl = measure(student, val_windows)
                state.domains = measured_domains(student_ppl, state.teacher_ppl, sampler, config.block_size)
                if steps_since_update == 0:
                    r, state.rule_state = RULES[method.rule](state.rule_state, list(student_ppl.values()),
                                                             list(state.teacher_ppl.values()), natural, config.alpha)
                    sampler.probs = r
                    # r of the next K steps: for ddk at t = 0 the natural proportions, not the r_0 of its state.
                    run.log("mixture", state.step, t=t, r=dict(zip(bins.names, r.tolist())), domains=state.domains)
                print_evaluation(state, sampler, bins.vocab_size)
                if worst_ratio(state.domains) <= config.stop_ratio:  # §3.4's threshold; 0, the default: never reached
                    print(f"--stop_ratio={config.stop_ratio}: the run ends here")
                    last = True

            # After the last step: measure on the test windows too. They never influence r.
            if last:
                for name, test_ppl in measure(student, test_windows).items():
                    tested = ppl_and_ratio(test_ppl, state.test_teacher_ppl[name], prefix="test_")
                    state.domains[name].update(tested)
                run.log("end", state.step, domains=state.domains)

            # Save: every save_every steps, at the end, and when a signal that any rank has received asks for it.
            folder = run.out_dir / f"step_{state.step:08d}"
            signal_number = int(all_reduce(torch.tensor(run.received_signal), dist.ReduceOp.MAX))
            save_due = config.save_every > 0 and state.step > 0 and state.step % config.save_every == 0
            if (last or save_due or signal_number) and not just_resumed:
                state.finished = last
                state.sampler = sampler.state_dict()
                state.log_lines = run.log_lines
                save_checkpoint(folder, state, student, optimizers, bins, config.keep)
            if signal_number:
                print(f"{config.out_dir}: stopped by {signal.Signals(signal_number).name}, saved as {folder.name}; "
                      "the same command continues from there")
                sys.exit(128 + signal_number)
            if last:
                return folder

            # Draw the next batch by r. All ranks draw the same, and know the ids of the whole batch; each reads its
            # share of the windows. A rule that moves at every step sets sampler.probs here, which is saved and resumed.
            started = time.perf_counter()
            domain_ids, window_ids = sampler.next_batch()
            mine = rank_slice(config)
            windows = torch.from_numpy(bins.train_windows(domain_ids[mine], window_ids[mine])).to(config.device)

            # One update of the student
            step_log = training_step(state.step, wrapped_student, teacher, optimizers, windows,
                                     vocab_size=bins.vocab_size, config=config)
            state.step += 1

            step_times.append(time.perf_counter() - started)
            log_step(run, state.step, step_log, step_times, config)


# ======================================================================================================================
# Processes, models, folders, checks and prints
# ======================================================================================================================

# ------------ Eq. 3 without the logits of all tokens ------------------------------------------------------------------

def distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, *,
                      chunk_size: int | None = None, **equation):
    """Return (loss, ce, kl) of Eq. 3 from hidden states (…, d) and heads (V, d), without (tokens, V) logits in memory.

    The logits of `chunk_size` tokens are made at a time, and `dense_distillation_loss` is differentiated on each chunk,
    so the forward pass makes the gradients too. loss.backward() gives the gradients of student_hidden and student_head,
    once. `equation` is the keywords of dense_distillation_loss. A tensor among them is a single number, or has a value
    (…) or a row (…, n) per target; (…) may be broadcast. teacher_hidden and teacher_head may both be None. The default
    chunk has at most 2²⁸ logits on CUDA, and elsewhere 2²⁶ and 512 tokens."""
    assert student_hidden.shape[:-1] == targets.shape, (student_hidden.shape, targets.shape)
    hidden = student_hidden.flatten(0, -2)
    if equation.get("num_tokens") is None:
        equation["num_tokens"] = (targets != -100).sum().clamp(min=1)

    # Sort the keywords. A number that changes during training becomes a tensor, since torch.compile compiles again for
    # each new Python number: a fork adds its own to this tuple. A tensor with a value or a row per target is cut into
    # chunks with the tokens. Everything else is a constant.
    per_token = {"targets": targets.flatten()}
    for name, value in list(equation.items()):
        if name in ("gamma", "num_tokens") and not torch.is_tensor(value):
            equation[name] = hidden.new_full((), value, dtype=torch.promote_types(hidden.dtype, torch.float32))
        elif torch.is_tensor(value) and value.dim() > 0:
            rows = equation.pop(name).expand(targets.shape + value.shape[targets.dim():])
            per_token[name] = rows.flatten(0, targets.dim() - 1)
    if teacher_hidden is not None:
        per_token["teacher_hidden"] = teacher_hidden.expand(*targets.shape, -1).flatten(0, -2)

    # All chunks have one shape, so that torch.compile compiles once: ignored targets fill up the last chunk.
    n_tokens = len(hidden)
    if chunk_size is None:
        chunk_size = default_chunk_size(len(student_head), hidden.is_cuda)
    chunk_size = max(1, min(chunk_size, n_tokens))
    n_missing = -n_tokens % chunk_size
    hidden = add_rows(hidden, n_missing)
    for name, value in per_token.items():
        per_token[name] = add_rows(value, n_missing, fill=-100 if name == "targets" else 0)

    # Cast the operands of the products once, not in each chunk. The gradients are those of the uncast tensors.
    operands = [hidden.detach(), student_head.detach(), per_token.pop("teacher_hidden", None), teacher_head]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        operands = [None if tensor is None else tensor.to(dtype) for tensor in operands]

    # torch.no_grad cannot be seen inside an autograd.Function.
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or student_head.requires_grad)
    loss, ce, kl = ChunkedLoss.apply(hidden, student_head, operands, per_token, chunk_size, equation, wants_gradient)
    return loss, ce[:n_tokens].view_as(targets), kl[:n_tokens].view_as(targets)


def default_chunk_size(rows: int, on_cuda: bool) -> int:
    """Return the tokens per chunk for a head of `rows` rows: a power of two within distillation_loss's limits."""
    most = 2**28 // rows if on_cuda else min(512, 2**26 // rows)
    return 2 ** int(math.log2(max(1, most)))


def add_rows(tensor: torch.Tensor, n: int, fill: int = 0) -> torch.Tensor:
    """Return `tensor` with n more rows of `fill` at its end."""
    if n == 0:
        return tensor
    return torch.cat((tensor, tensor.new_full((n, *tensor.shape[1:]), fill)))


class ChunkedLoss(torch.autograd.Function):
    """The chunks of distillation_loss. The forward pass makes the gradients as well, while it has the logits."""

    @staticmethod
    def forward(ctx, hidden, head, operands, per_token, chunk_size, equation, wants_gradient):
        # The gradient of the head is a sum over chunks, in float32 at least. Autograd casts it to the head's dtype once
        # per micro-batch, and FSDP reduces it over ranks in float32.
        if wants_gradient:
            grad_hidden = torch.zeros_like(hidden)
            grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))
        ce = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        kl = torch.empty_like(ce)
        loss = ce.new_zeros(())

        # One buffer of logits for all chunks
        hidden, head, teacher_hidden, teacher_head = operands
        student_logits = aligned_empty(hidden, chunk_size, len(head))
        teacher_logits = None
        if teacher_hidden is not None:
            teacher_logits = aligned_empty(teacher_hidden, chunk_size, len(teacher_head))

        # Compiling takes seconds: too long if there is little to compute.
        eq3 = eq3_of_chunk
        if hidden.is_cuda or len(hidden) * len(head) > 2**24:
            eq3 = compile_eq3()
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            torch.mm(hidden[chunk], head.T, out=student_logits)
            if teacher_hidden is not None:
                torch.mm(teacher_hidden[chunk], teacher_head.T, out=teacher_logits)
            values = {name: value[chunk] for name, value in per_token.items()}
            chunk_loss, ce[chunk], kl[chunk] = eq3(student_logits, teacher_logits, values, equation, wants_gradient)
            loss = loss + chunk_loss
            if wants_gradient:
                grad_logits = student_logits  # eq3 has overwritten the logits with their gradient
                grad_hidden[chunk] = grad_logits @ head
                add_product(grad_head, grad_logits.T, hidden[chunk])

        if wants_gradient:
            ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_ce, grad_kl):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None, None, None


def aligned_empty(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return uninitialized memory (rows, columns), padded to a multiple of 64 columns: matrix products on GPUs
    are faster so. The padding is 0: bfloat16 products on CPUs with AMX read it, and NaN · 0 would be NaN."""
    padded = like.new_empty(rows, math.ceil(columns / 64) * 64)
    padded[:, columns:] = 0
    return padded[:, :columns]


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor):
    """Compute total += a @ b: on CUDA without rounding a bfloat16 product before it is added to a float32 total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def eq3_of_chunk(student_logits, teacher_logits, per_token: dict, equation: dict, wants_gradient: bool):
    """Return loss, ce and kl of one chunk by Eq. 3. The gradient of the student's logits overwrites them."""
    def loss_and_parts(logits):
        loss, ce, kl = dense_distillation_loss(logits, teacher_logits, **per_token, **equation)
        return loss, (loss, ce, kl)

    if wants_gradient:
        gradient, parts = torch.func.grad(loss_and_parts, has_aux=True)(student_logits)
        student_logits.copy_(gradient)
    else:
        _, parts = loss_and_parts(student_logits)
    return parts


@functools.cache
def compile_eq3():
    """Return eq3_of_chunk, compiled, so that its passes over the logits are fused."""
    torch._dynamo.config.recompile_limit = 64  # past torch's own 8 variants it would run uncompiled, and only warn
    return torch.compile(eq3_of_chunk, dynamic=False)


# ------------ Many processes ------------------------------------------------------------------------------------------

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice(config: Config) -> slice:
    """Return this rank's windows of the batch, of which all ranks draw the same ids."""
    share = config.batch_size // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def all_reduce(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Return the ranks' `values` summed, or reduced by `op`, on every rank."""
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values, op)
    return values


def on_rank_0(function: Callable, *args, share: bool = True):
    """Call `function(*args)` on rank 0 only, and return its result on every rank; without `share`, only on rank 0.
    All ranks raise its UserError or OSError. Any other error is a bug: rank 0 prints its traceback, and all exit."""
    if not dist.is_initialized():
        return function(*args)
    result = error = None
    if rank() == 0:
        try:
            result = function(*args)
        except (UserError, OSError) as exception:
            error = exception
        except Exception as exception:
            traceback.print_exception(exception)  # at once: torchrun ends this rank when another has ended
            error = SystemExit(1)
    shared = [result if share else None, error]
    dist.broadcast_object_list(shared)
    if rank() != 0:
        result, error = shared
    if error is not None:
        raise error
    return result


@contextmanager
def process_group(config: Config):
    """Connect the processes if torchrun has started them, while the context lasts. Only rank 0 prints."""
    if "RANK" not in os.environ:
        yield
        return
    backend = "gloo"
    device_id = None
    if resolve_device(config.device).type == "cuda":
        backend = "nccl"
        device_id = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device_id)
    with user_errors("the processes cannot meet", "start them with torchrun --nproc_per_node=N, or unset RANK"):
        dist.init_process_group(backend, timeout=timedelta(minutes=config.timeout), device_id=device_id)
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if rank() == 0 else nowhere):
        try:
            yield
            dist.barrier()
        except RuntimeError as error:
            # When a process ends, the collectives of the other processes fail.
            if not re.search("gloo|NCCL|Connection (closed|reset|refused)", str(error)):
                raise
            reason = " ".join(str(error).split())[:600]  # NCCL's own cause is on its second line
            raise UserError(f"another process is gone, or silent for {config.timeout} minutes ({reason}); the same "
                            "command continues from the last checkpoint") from error


def evaluation_batches(windows: torch.Tensor, micro_batch_size: int, device) -> Iterator:
    """Yield this rank's share of `windows` (n, block_size + 1) as (inputs, targets), micro_batch_size at a time.
    Ignored targets fill up the last batch: FSDP requires equally many passes on all ranks, torch.compile one shape."""
    per_rank = min(micro_batch_size, math.ceil(len(windows) / world_size()))
    for batch in windows.split(per_rank * world_size()):
        my_windows = batch[rank()::world_size()]
        n_missing = per_rank - len(my_windows)
        inputs = add_rows(my_windows[:, :-1], n_missing)
        targets = add_rows(my_windows[:, 1:], n_missing, fill=-100)
        yield inputs.to(device), targets.to(device)


# ------------ Models on devices ---------------------------------------------------------------------------------------

def resolve_auto(config: Config) -> Config:
    """Return `config` with this machine's choices in place of `auto` and micro_batch_size=0."""
    device = resolve_device(config.device)
    on_cuda = device.type == "cuda"
    parallel = "none"
    if dist.is_initialized():
        device = device.type  # without a number: each process has taken its own
        parallel = "fsdp" if on_cuda else "ddp"
    choices = dict(dtype="float32", compile="false", parallel=parallel)
    if on_cuda:
        choices.update(dtype="bfloat16", compile="true")
    values = {name: choice for name, choice in choices.items() if getattr(config, name) == "auto"}
    micro_batch_size = config.micro_batch_size or config.batch_size // world_size()
    return replace(config, device=str(device), micro_batch_size=micro_batch_size, **values)


def autocast(config: Config):
    """Return the context that casts matrix products to `dtype`. Under FSDP its own policy casts."""
    enabled = config.dtype == "bfloat16" and config.parallel != "fsdp"
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=enabled)


def models_of(config: Config) -> dict:
    """Return role (and key) → folder, Hub name or scratch:LxD. The student is trained, in float32. Any other role, such
    as a fork's second teacher, is frozen, in the dtype of the products."""
    sources = dict(teacher=config.teacher, student=config.student)
    return {role: source for role, source in sources.items() if source}


def load_models(config: Config, model_configs: dict, resumed: Path | None) -> dict:
    """Return role → model of what the run still needs, on this rank's device; the student from `resumed` if given."""
    if config.compile == "true":
        torch._dynamo.config.recompile_limit = 64  # variants of Block.forward: past torch's own 8 it runs uncompiled
        torch._dynamo.config.optimize_ddp = False  # True would cut blocks at DDP's buckets
    models = {}
    for role, source in models_of(config).items():
        dtype = getattr(torch, config.dtype)
        if role == "student":
            dtype = torch.float32
            source = str(resumed or source)
        elif resumed is not None and not METHODS[config.method].trains_with_teacher:
            continue  # it has been measured

        # Rank 0 reads the whole model. The other ranks make it on the meta device, without memory.
        print(f"reading the {role}: {source}", flush=True)
        model = on_rank_0(read_model, role, source, config, model_configs[role], dtype, share=False)
        if model is None:
            with torch.device("meta"):
                model = GPT(model_configs[role]).to(dtype)
        model.requires_grad_(role == "student")

        # If role is "student", a fork adds the modules that it trains with the student here, on every rank:
        # model.extra["name"] = … They are saved next to the model. FSDP does not initialize non-persistent buffers.
        if model.extra and resumed is not None:
            on_rank_0(read_saved, resumed / "extra.safetensors",
                      lambda path: model.extra.load_state_dict(load_file(path)), share=False)

        # Before the next model is read, so that rank 0 never has two in its memory
        prepare_layers(model, config)
        if dist.is_initialized():
            hand_out(model, config, shard=config.parallel == "fsdp" and (role == "student" or config.shard_teacher))
        else:
            model.to(config.device)
        models[role] = model
    return models


def read_model(role: str, source: str, config: Config, model_config: GPTConfig, dtype: torch.dtype) -> GPT:
    """Return the model of a folder or a name on the Hub, or a new model of scratch:LxD, on the CPU."""
    if is_scratch(source):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return GPT(model_config)
    return GPT.from_pretrained(model_folder(source, f"--{role}", MODEL_FILES), dtype, model_config)


def prepare_layers(model: GPT, config: Config):
    """Compile the blocks, and recompute their activations, if asked for: in place, so that weights keep their names."""
    for layer in model.layers:
        if config.checkpoint_activations:
            layer.forward = recomputed(layer.forward)
        if config.compile == "true":
            layer.compile(dynamic=False)


def recomputed(forward: Callable) -> Callable:
    """Return `forward`, recomputed in the backward pass: a closure, as torch.compile cannot trace functools.partial."""
    def checkpointed(*inputs):
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpointed


def hand_out(model: GPT, config: Config, shard: bool):
    """Put the model that rank 0 has read on the devices of all ranks: whole, or sharded by FSDP2.

    FSDP2 gathers one block at a time, in the dtype of the products, and reduces gradients in float32. The root stays
    gathered after a forward pass, so the loss may still use the teacher's head."""
    # Move the model to the meta device, so that no rank holds more than its share. Rank 0 keeps the weights aside.
    whole_state = model.state_dict() if rank() == 0 else {}
    model.to("meta")
    if shard:
        # from_group keeps the timeout of the processes' own group; init_device_mesh would make a new group.
        mesh = DeviceMesh.from_group(dist.group.WORLD, torch.device(config.device).type)
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)  # the rotary tables stay float32
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        model.to_empty(device=config.device)
    else:
        # One parameter tells torch the device. It assigns the others, which are still on meta, without a copy.
        model.norm.to_empty(device=config.device)

    set_model_state_dict(model, whole_state, options=full_state_dict_options())


def full_state_dict_options(cpu_offload: bool = False) -> StateDictOptions:
    """Return the options for whole tensors, read and written by rank 0, so that any number of ranks can continue."""
    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload, broadcast_from_rank0=dist.is_initialized())


# ------------ The run's folder ----------------------------------------------------------------------------------------

class RunFolder(ExitStack):
    """A run's out_dir with metrics.jsonl (log, record and lock), and the signals that ask for a checkpoint. Each rank
    has an instance, but only rank 0 reads and writes. It is an ExitStack: however a run ends, everything is closed."""

    def __init__(self, out_dir: Path):
        super().__init__()
        self.out_dir = out_dir
        self.metrics = None  # open on rank 0
        self.log_lines = 0  # of metrics.jsonl
        self.wandb = None
        self.received_signal = 0

    def lock(self):
        """Keep other processes out of the folder. UserError if one uses it, or if it is not a run's folder."""
        path = self.out_dir / "metrics.jsonl"
        if not path.exists() and list(self.out_dir.glob("*")):
            raise UserError(f"--out_dir={self.out_dir}: has files, and is not the folder of a run; use another folder")
        with user_errors(f"--out_dir={self.out_dir}", "use another folder"):
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.metrics = self.enter_context(open(path, "ab+"))  # network file systems lock what is open for writing
        try:
            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.out_dir}: another process is using it; wait, or use another folder") from error

    def cut_log(self, n_lines: int):
        """Drop the lines after the checkpoint's `n_lines`. UserError if the log has fewer."""
        self.metrics.seek(0)
        for _ in range(n_lines):
            if not self.metrics.readline().endswith(b"\n"):
                raise UserError(f"{self.metrics.name}: has fewer than the {n_lines} lines before the checkpoint; copy "
                                "it again, or delete the folder")
        self.metrics.truncate()
        self.log_lines = n_lines

    def log(self, kind: str, step: int, **values):
        """Append a line to metrics.jsonl. `step` counts finished updates. By `kind` the line also has:

        run      config, content and may_change (see `experiment_record`), rule, natural, versions, parameters
        mixture  t, r (name → probability in the next K steps), and domains: name → student_ppl, teacher_ppl, ratio,
                 tokens and epochs drawn so far
        train    loss, ce and kl (nats per token, loss = ce + γ · kl), lr, grad_norm (before clipping), tokens so far,
                 tokens_per_s and eta_s (without evaluations and saves)
        end      domains after the last step, with test_student_ppl, test_teacher_ppl and test_ratio"""
        if self.metrics is not None:
            self.metrics.write(json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n")
            self.metrics.flush()
            self.log_lines += 1
        if self.wandb is not None and kind != "run":
            self.wandb.log({"step": step, kind: values})

    def start_wandb(self, config: Config):
        """Log to Weights & Biases too. A resumed run continues its curves by the id in a file. The step is a value that
        is logged, since wandb's own step cannot go back to a checkpoint's."""
        id_path = self.out_dir / "wandb_id"
        if not id_path.exists():
            id_path.write_text(os.urandom(16).hex())
        with user_errors("--wandb", "run wandb login, or set WANDB_MODE=offline"):
            self.wandb = import_optional("wandb", "--wandb").init(
                project="ddk", name=config.out_dir, id=id_path.read_text(), resume="allow", dir=config.out_dir,
                config=asdict(config))
            self.wandb.define_metric("step")
            self.wandb.define_metric("*", step_metric="step")
        self.callback(self.wandb.finish)

    def catch_signals(self):
        """From here on SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C wait for the loop to save. A second Ctrl-C exits at once."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                previous = signal.signal(number, self.receive_signal)
                self.callback(signal.signal, number, previous)

    def receive_signal(self, number, frame):
        if number == signal.SIGINT and self.received_signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.received_signal = number


def experiment_record(config: Config, bins: TokenBins) -> dict:
    """Return what the run line says of the experiment. `content` identifies bins and models, wherever they are: a model
    folder by its SHA256SUMS, or else by config.json and the names and sizes of its weights."""
    content = {"data_dir": bins.content(), "teacher": ""}  # "": a run without a teacher
    for role, source in models_of(config).items():
        folder = Path(source)
        content[role] = source  # scratch:LxD, or a name on the Hub
        if folder.is_dir():
            sizes = {path.name: path.stat().st_size for path in weight_files(folder)}
            content[role] = digest((folder / "config.json").read_text(encoding="utf-8"), sizes)
        if (folder / SUMS).is_file():
            content[role] = digest((folder / SUMS).read_text(encoding="utf-8"))
    describe = f"git -C '{Path(__file__).parent}' describe --always --abbrev=40 --exclude='*' --dirty"
    status, revision = subprocess.getstatusoutput(describe)  # with -dirty if files have changed
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                "git": revision if status == 0 else None}
    return {"config": asdict(config), "content": content, "may_change": sorted(MAY_CHANGE), "versions": versions}


def check_same_experiment(out_dir: Path, record: dict):
    """Raise UserError if the run in `out_dir` has another record, with each key that differs."""
    path = out_dir / "metrics.jsonl"
    lines = read_metrics(path)
    if not lines:
        return
    with user_errors(path, "no run writes this; use another --out_dir"):
        saved = {**asdict(Config()), **lines[0]["config"]}  # keys that were added since then have their defaults
        saved_values = experiment_values({**lines[0], "config": saved})
    values = experiment_values(record)
    changed = [key for key in values if values[key] != saved_values.get(key, values[key])]
    if changed:
        problems = [f"--{key}={record['config'][key]}: the run in {out_dir} was started with --{key}={saved[key]}"
                    for key in changed]  # the same value twice if a folder's content has changed
        raise UserError("\n".join(problems) + f"\n--out_dir={out_dir}: keep the keys of its run, use another folder, "
                        "or delete this one. To train a finished student further, use its folder as --student")


def count_parameters(models: dict) -> dict:
    return {role: sum(p.numel() for p in model.parameters()) for role, model in models.items()}


# ------------ Checkpoints ---------------------------------------------------------------------------------------------
# step_00000400/ is a published folder (see data.py): a model folder in Hugging Face's format with the tokenizer, and
# optimizer.pt, train_state.json, and extra.safetensors if student.extra has modules.

def save_checkpoint(folder: Path, state: TrainState, student: GPT, optimizers: list, bins: TokenBins, keep: int):
    """Write this step's checkpoint on rank 0, then delete all but the newest `keep`. All ranks call it, and wait."""
    # Gather whole tensors. Before the first update torch would initialize the optimizers' state to return it.
    options = full_state_dict_options(cpu_offload=True)
    weights = get_model_state_dict(student, options=options)
    optimizer_state = None
    if state.step > 0:
        optimizer_state = get_optimizer_state_dict(student, optimizers, options=options)
    on_rank_0(write_checkpoint, folder, state, student, weights, optimizer_state, bins, keep)


def write_checkpoint(folder, state, student, weights, optimizer_state, bins, keep):
    with published(folder) as temporary:
        student.save_pretrained(temporary, weights)
        extra = {name.removeprefix("extra."): weights[name] for name in weights if name.startswith("extra.")}
        if extra:
            save_file(extra, temporary / "extra.safetensors")
        save_tokenizer(temporary, bins)
        with open(temporary / "optimizer.pt", "wb") as file:  # given a path, torch.save hides the error of a full disk
            torch.save(optimizer_state, file)
        write_json(temporary / "train_state.json", asdict(state))
        fsync(folder.with_name("metrics.jsonl"))  # all lines before a checkpoint are on the disk
    if keep > 0:
        for old in list_checkpoints(folder.parent)[:-keep]:
            shutil.rmtree(old.rename(f"{old}.old.tmp"))  # renamed, so that half of it is no checkpoint


def list_checkpoints(out_dir: Path) -> list[Path]:
    """Return the checkpoint folders, the newest last."""
    return sorted(out_dir.glob("step_" + 8 * "[0-9]"))


def newest_checkpoint(out_dir: Path) -> Path | None:
    """Return the newest intact checkpoint. Report damaged ones and rename them corrupt_step_…"""
    for unfinished in out_dir.glob("step_*.tmp"):  # kill -9 left it
        shutil.rmtree(unfinished)
    for folder in reversed(list_checkpoints(out_dir)):
        damaged = damaged_files(folder)
        if not damaged:
            return folder
        aside = folder.rename(out_dir / f"corrupt_{folder.name}.{os.urandom(2).hex()}")
        print(f"WARNING: {folder}: {', '.join(damaged)} missing or changed; renamed {aside.name}")
    if list(out_dir.glob("corrupt_step_*")):
        print(f"{out_dir}: no intact checkpoint is left: starting again from step 0")
    return None


def read_saved(path: Path, read: Callable):
    """Return what `read(path)` gives of a file in a checkpoint."""
    with user_errors(path, "no run saves this; delete this step's folder, and the run uses the previous one"):
        return read(path)


def read_state(folder: Path) -> TrainState:
    return read_saved(folder / "train_state.json", lambda path: TrainState(**json.loads(path.read_text("utf-8"))))


def load_checkpoint(folder: Path, state: TrainState, sampler: MixtureSampler, student: GPT, optimizers: list):
    """Restore the sampler and the optimizers. Rank 0 reads; only tensors are unpickled."""
    read_saved(folder / "train_state.json", lambda path: sampler.load_state_dict(state.sampler))  # for its message
    optimizer_state = on_rank_0(read_saved, folder / "optimizer.pt", lambda path: torch.load(path, weights_only=True),
                                share=False)
    if state.step > 0:
        set_optimizer_state_dict(student, optimizers, optimizer_state or {}, options=full_state_dict_options())


# ------------ Checks before anything slow -----------------------------------------------------------------------------

def preflight(config: Config) -> tuple[TokenBins, dict]:
    """Return the bins, and role → GPTConfig of the models, checked before a weight is read. Raise UserError."""
    bins = TokenBins(config.data_dir, config.block_size, config.domains.split(",") if config.domains else None)
    fixed_windows(bins, "val", config.val_samples)
    fixed_windows(bins, "test", config.test_samples)
    with user_errors(f"--mixture={config.mixture}", f"give each domain of {config.data_dir} a weight"):
        make_sampler(config, bins)

    model_configs = {role: checked_model_config(role, source, bins) for role, source in models_of(config).items()}
    if config.dry_run:
        print_cost(config, model_configs)
    return bins, model_configs


def fixed_windows(bins: TokenBins, split: str, count: int) -> dict:
    """Return name → windows of a split, val or test, (count, block_size + 1) int64; {} if count is 0."""
    return {name: torch.from_numpy(bins.eval_windows(name, split, count)) for name in bins.names if count > 0}


def is_scratch(source: str) -> bool:
    """Return whether a student is a new model: see `config_errors`, `checked_model_config` and `read_model`."""
    return source.startswith("scratch:")


def checked_model_config(role: str, source: str, bins: TokenBins) -> GPTConfig:
    """Return the GPTConfig of a model. UserError if it cannot read the bins' windows or has another tokenizer."""
    if is_scratch(source):
        layers, width = source.removeprefix("scratch:").split("x")
        return GPTConfig.scratch(int(layers), int(width), bins.vocab_size, bins.block_size)

    # From the Hub, download these files only, and check them before the weights.
    folder = model_folder(source, f"--{role}", ("config.json", TOKENIZER_META, *TOKENIZER_FILES))
    ours = bins.tokenizer
    try:
        model_config = read_config(folder)
        theirs = model_tokenizer(folder, ours["eot_token"])
    except UserError as error:
        raise UserError(f"--{role}={source}: {error}") from error
    fix = f"make the bins again with data.py --tokenizer={source}"
    if model_config.vocab_size < bins.vocab_size:
        raise UserError(f"--{role}={source}: has {model_config.vocab_size} ids, but the tokenizer of the bins has "
                        f"{bins.vocab_size}; {fix}")
    if model_config.context < bins.block_size:
        raise UserError(f"--block_size={bins.block_size}: the {role} {source} reads at most {model_config.context} "
                        "tokens")
    if theirs is None or ("tiktoken" in theirs.fingerprint) != ("tiktoken" in ours["fingerprint"]):
        print(f"WARNING: --{role}={source} has no tokenizer that can be compared with the bins', {ours['name']}; the "
              "run uses it, since it has enough ids")
    elif theirs.fingerprint != ours["fingerprint"]:
        raise UserError(f"--{role}={source}: its tokenizer {Path(source).name} ({theirs.vocab_size} ids) is not that "
                        f"of the bins, {ours['name']} ({bins.vocab_size} ids); {fix}")
    return model_config


def config_errors(config: Config) -> list[str]:
    """Return what is wrong with a configuration, as far as no file has to be opened. May raise UserError itself."""
    parse_mixture(config.mixture)
    if config.wandb:
        import_optional("wandb", "--wandb")
    method = METHODS[config.method]
    makes_models = config.preset == "quickstart"
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else world_size()
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
    errors = []
    for name, value in asdict(config).items():
        low, high = BOUNDS.get(name, (0, 1e15))
        if type(value) in (int, float) and not low <= value <= high:  # NaN is in no range
            errors.append(f"--{name}={value}: must be a number from {low:g} to {high:g}")
    checks = [  # (whether it is wrong, the message)
        (not config.preset, "--preset: choose one, since it sets what a step is; paper has the paper's values"),
        (is_scratch(config.student) and not re.fullmatch(r"scratch:[1-9]\d*x(?!0)\d*[02468]", config.student),
         f"--student={config.student}: write scratch:LxD with D even, such as scratch:4x128"),
        (is_scratch(config.teacher), f"--teacher={config.teacher}: use the folder of a trained model"),
        (not makes_models and not config.student, "--student: use a model folder or scratch:LxD"),
        (not makes_models and method.trains_with_teacher and not config.teacher,
         f"--teacher: --method={config.method} requires a model folder"),
        (config.batch_size % world != 0,
         f"--batch_size={config.batch_size}: must be a multiple of {world}, the number of processes"),
        (config.parallel == "none" and world > 1, f"--parallel=none: there are {world} processes; use ddp or fsdp"),
        (config.parallel in ("ddp", "fsdp") and "RANK" not in os.environ and not dist.is_initialized(),
         f"--parallel={config.parallel}: start the processes with torchrun --nproc_per_node=N"),
        (on_cuda and processes_here > torch.cuda.device_count(),
         f"--device={config.device}: more processes than GPUs here; start fewer, or --device=cpu"),
    ]
    return errors + [message for is_wrong, message in checks if is_wrong]


def check_config(config: Config):
    """Raise UserError with all config_errors, a line for each."""
    if errors := config_errors(config):
        raise UserError("\n".join(errors))


# ------------ What a run prints ---------------------------------------------------------------------------------------

def print_cost(config: Config, model_configs: dict):
    """Print what a run would take: weights, and of the student also gradients and AdamW's two moments, in float32."""
    with torch.device("meta"):
        parameters = count_parameters({role: GPT(model_config) for role, model_config in model_configs.items()})
    for role, n in parameters.items():
        n_bytes = 16 if role == "student" else getattr(torch, config.dtype).itemsize
        print(f"{role}: {n:,} parameters, {n * n_bytes / 2**30:.2f} GiB for one copy")
    print(f"{config.max_steps:,} steps: {config.max_steps * config.batch_size * config.block_size:,} tokens")


def log_step(run: RunFolder, step: int, step_log: dict, step_times: list[float], config: Config):
    """Log a step, its speed and the time to the end, without evaluations and saves. Print it if due: see log_every."""
    tokens = config.batch_size * config.block_size
    tokens_per_s = tokens / step_times[-1]
    eta_s = np.mean(step_times[-50:]) * (config.max_steps - step)
    run.log("train", step, **step_log, tokens=step * tokens, tokens_per_s=tokens_per_s, eta_s=eta_s)
    if step not in (1, config.max_steps) and step % config.log_every != 0:
        return
    text = "  ".join(f"{name} {value:.4g}" for name, value in step_log.items())
    if config.device.startswith("cuda"):
        text += f"  {torch.cuda.max_memory_allocated(config.device) / 2**30:.1f} GiB"
    eta = timedelta(seconds=int(eta_s))
    print(f"step {step}/{config.max_steps}  {text}  {tokens_per_s:,.0f} tokens/s  ETA {eta}", flush=True)


def worst_ratio(domains: dict) -> float:
    """Return the largest perplexity ratio of the domains; infinite without a teacher."""
    ratios = [domain["ratio"] for domain in domains.values()]
    return math.inf if None in ratios else max(ratios)


def print_evaluation(state: TrainState, sampler: MixtureSampler, vocab_size: int):
    """Print a line after an evaluation: the worst ratio, its domain, and r, the sampling weights of the next steps.
    Before training, print a table of the domains, and warn of a teacher that has little to teach."""
    r = dict(zip(sampler.names, sampler.probs))
    has_teacher = worst_ratio(state.domains) < math.inf
    if state.step == 0:
        print_domains(state.domains, r, state.domains)
    for name, domain in state.domains.items():
        if state.step == 0 and has_teacher and domain["teacher_ppl"] > vocab_size / 2:
            print(f"WARNING: THE TEACHER IS NEAR UNIFORM IN {name}: UNTRAINED, LOADED WRONG, OR OF ANOTHER TOKENIZER")
        elif state.step == 0 and has_teacher and domain["ratio"] < 1:
            print(f"WARNING: THE TEACHER IS BEHIND ITS STUDENT IN {name} FROM THE START: RATIO {domain['ratio']:.2f}")
    text = f"evaluated at step {state.step}: "
    if has_teacher:
        ratio, name = max((domain["ratio"], name) for name, domain in state.domains.items())
        text += f"worst ratio {ratio:.3f} ({name}), "
    print(text + "r = " + "  ".join(f"{name} {weight:.3f}" for name, weight in r.items()), flush=True)


def report(config: Config, folder: Path):
    """Print what a run did in each domain, with the ratios of its first evaluation."""
    state = read_state(folder)
    lines = read_metrics(folder.with_name("metrics.jsonl"))
    first = next(line["domains"] for line in lines if line["kind"] == "mixture")
    print(f"\n{config.method}, seed {config.seed}, step {state.step}. The test windows never influence r.\n")
    print_domains(state.domains, state.sampler["probs"], first)
    if config.teacher:
        print(f"worst ratio: {worst_ratio(first):.2f} → {worst_ratio(state.domains):.2f}")
    print(f"The student is in {folder}. Text by it:  python model.py --model={folder} --prompt='def main('")


def print_domains(domains: dict, r: dict, first: dict):
    """Print a row per domain and a column per number, the ratio also as it was in `first`."""
    rows = []
    for name, domain in domains.items():
        cells = {"r": f"{r[name]:.2f}"}
        for column, value in domain.items():
            cells[column] = f"{value:,}" if isinstance(value, int) else f"{math.nan if value is None else value:.2f}"
        if domain["ratio"] != first[name]["ratio"]:
            cells["ratio"] = f"{first[name]['ratio']:.2f} → {cells['ratio']}"
        rows.append([name, *cells.values()])
    print_table([["", *cells], *rows])


# ------------ Quickstart ----------------------------------------------------------------------------------------------

def quickstart_models(pretrain_steps: int) -> dict:
    """Return the keys of the runs that train the quickstart's two models, role → keys. The teacher learns all domains
    equally, the student base hardly any C++: small models are strong in some domains and weak in others."""
    shared = dict(preset="quickstart", method="cpt", test_samples=0, dtype="float32", keep=1, log_every=50,
                  interval=10**9)  # evaluated at the start and the end only
    return {"teacher": dict(shared, student="scratch:4x128", max_steps=pretrain_steps, lr=3e-3, min_lr=3e-4,
                            warmup_steps=pretrain_steps // 24, mixture="python=1,cpp=1,math=1,prose=1"),
            "student": dict(shared, student="scratch:2x96", max_steps=pretrain_steps // 4, lr=2e-3, min_lr=2e-4,
                            warmup_steps=pretrain_steps // 40, mixture="python=.50,cpp=.01,math=.25,prose=.24")}


def quickstart(config: Config) -> Config:
    """Return `config` with the models of the quickstart. Make them and the bins if `data_dir` lacks them."""
    on_rank_0(build_quickstart_bins, Path(config.data_dir))
    models = quickstart_models(config.pretrain_steps)

    # Check the main run before minutes of training. Models that are not trained yet are checked as scratch:LxD.
    recipes = {role: getattr(config, role) or keys["student"] for role, keys in models.items()}
    on_rank_0(preflight, replace(config, **recipes))
    for role, keys in models.items():
        if getattr(config, role) or config.dry_run:
            continue
        shared = {key: getattr(config, key) for key in ("data_dir", "device", "compile", "timeout")}
        pretrain_config = resolve_config({**keys, **shared, "out_dir": f"{config.data_dir}/{role}"})
        folder = on_rank_0(finished_run, Path(pretrain_config.out_dir))
        if folder is not None:
            print(f"The {role} was made before; delete {pretrain_config.out_dir} to train it again: {folder}")
        else:
            print(f"\nTraining the {role} as the student of a run without a teacher: {keys['student']}", flush=True)
            folder = train(pretrain_config)
        config = replace(config, **{role: str(folder)})
    return config


def finished_run(out_dir: Path) -> Path | None:
    """Return the last checkpoint of a run if it is finished and intact. No lock: many runs may use it at once."""
    for folder in list_checkpoints(out_dir):
        if not damaged_files(folder) and read_state(folder).finished:
            return folder
    return None


# ------------ Command line --------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse with UserErrors: rank 0 prints only the sentence, without the usage."""
    def error(self, message: str):
        raise UserError(f"{message}; write --key=value, --help lists the keys")


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() == "true"


def parse_config(argv: list[str] | None = None) -> Config:
    """Return the Config of a command line. The last value of a repeated key wins. Raise UserError on a mistake."""
    # A key for each field of Config. Its help is the comment on the same line: a second line would not be seen.
    methods = "\n".join(f"    {name:10} {method.help}" for name, method in METHODS.items())
    parser = Parser(description=f"{__doc__}\nThe methods:\n\n{methods}", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for entry in fields(Config):
        kind = {"type": entry.type}
        if get_args(entry.type):
            kind = {"choices": get_args(entry.type)}  # the words of a Literal
        elif entry.type is bool:
            kind = {"type": true_or_false, "nargs": "?", "const": True}  # the key without a value is true
        text = helps.get(entry.name, "")
        if entry.name in PRESETS["quickstart"]:
            text += f" (default: {entry.default}; quickstart: {PRESETS['quickstart'][entry.name]})"
        elif entry.default != "":
            text += f" (default: {entry.default})"
        parser.add_argument(f"--{entry.name}", help=text, **kind)

    config = resolve_config(vars(parser.parse_args(argv)))
    check_config(config)
    return config


def resolve_config(given: dict) -> Config:
    """Return a whole Config: the keys given, then the preset's values, then what follows from other keys."""
    preset = given.get("preset", "")
    if not preset and all(map(is_scratch, models_of(Config(**given)).values())):
        preset = "quickstart"  # without a model folder or a name on the Hub: all() of nothing is True
    config = Config(**{**PRESETS.get(preset, {}), **given, "preset": preset})
    config.data_dir = config.data_dir or f"data/{preset}"
    config.out_dir = config.out_dir or f"out/{preset}-{config.method}-{config.seed}"
    return config


def main():
    config = parse_config()
    with process_group(config):
        config = resolve_auto(config)
        for name, value in asdict(config).items():
            if value != getattr(Config, name):  # its default
                print(f"{name} = {value}")
        print(f"The other keys have their defaults; all are in {config.out_dir}/metrics.jsonl.\n", flush=True)
        if config.preset == "quickstart":
            config = quickstart(config)
        elif config.dry_run:
            on_rank_0(preflight, config)
        if config.dry_run:
            return
        folder = train(config)
        on_rank_0(report, config, folder)


if __name__ == "__main__":
    run_program(main)
