"""Tests that need a GPU: `pytest -m cuda`. Skipped without one."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import read_lines, words
from torch._inductor.codecache import PyCodeCache
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill import (add_product, default_chunk_size, dense_distillation_loss, distillation_loss, resolve_config,
                     train)
from model import GPT, GPTConfig

DEVICE = "cuda"
ROOT = Path(__file__).parent.parent
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms require, from the first on
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def config(tiny, tmp_path):
    """Return a function that makes a tiny run's configuration."""
    def make(name: str, **given):
        keys = dict(student="scratch:2x64", interval=5, max_steps=20, save_every=10, device=DEVICE)
        return resolve_config({**tiny, **keys, "out_dir": str(tmp_path / name), **given})
    return make


def losses(out_dir: Path) -> list[float]:
    return [line["loss"] for line in read_lines(out_dir, "train")]


# ----------------------------------------------- The loss ----------------------------------------------------------


def loss_inputs(tokens: int, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, tokens, 128, generator=generator)
    head, teacher_head = torch.randn(2, rows, 128, generator=generator) * 0.2
    targets = torch.randint(rows, (tokens,), generator=generator)
    inputs = [tensor.to(DEVICE, dtype) for tensor in (hidden, head, teacher_hidden, teacher_head)]
    return [*inputs, targets.to(DEVICE)]


@pytest.mark.parametrize("rows", [151_936, 151_646])  # the latter is no multiple of 64
@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_eq3_of_a_large_vocabulary_is_that_of_float64(rows, dtype, within):
    hidden, head, teacher_hidden, teacher_head, targets = loss_inputs(700, rows, dtype)
    results = []
    for cast in (lambda tensor: tensor, torch.Tensor.double):
        student = cast(hidden).detach().requires_grad_()
        weight = cast(head).detach().requires_grad_()
        if cast is torch.Tensor.double:
            teacher_logits = teacher_hidden.double() @ teacher_head.double().T
            loss, ce, kl = dense_distillation_loss(student @ weight.T, teacher_logits, targets)
        else:
            loss, ce, kl = distillation_loss(student, weight, teacher_hidden, teacher_head, targets)
        assert ce.shape == kl.shape == targets.shape
        loss.backward()
        results.append([loss.detach(), ce, kl, student.grad, weight.grad])
    for ours, exact in zip(*results):
        assert (ours.double() - exact).abs().max() <= within * exact.abs().max()


def test_the_loss_holds_little_more_than_its_chunk():
    """4,096 tokens × 151,936 ids: the logits of one model are 2.3 GiB in float32."""
    if DEVICE != "cuda":
        pytest.skip("counts CUDA memory")
    hidden, head, teacher_hidden, teacher_head, targets = loss_inputs(4096, 151_936, torch.bfloat16)
    hidden.requires_grad_()
    head.requires_grad_()
    peaks = []
    for _ in range(2):  # the first compiles
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        distillation_loss(hidden, head, teacher_hidden, teacher_head, targets)[0].backward()
        peaks.append(torch.cuda.max_memory_allocated() - held)
        hidden.grad = head.grad = None
    chunk = default_chunk_size(151_936, True) * 151_936 * 2  # bytes of one model's logits
    gradient = head.numel() * (4 + 2)  # float32, and its copy in bfloat16
    assert peaks[1] < 4.5 * chunk + gradient, peaks  # of each model once, and what is compiled holds them in float32


@pytest.fixture
def nan_in_new_memory(monkeypatch):
    """Fill torch's new memory with NaN, in Inductor's code too. Return the shapes that Inductor made."""
    name = f"_empty_strided_{DEVICE}"
    allocate = getattr(torch._C._dynamo.guards, name)
    made = []

    def allocate_nan(shape, stride, dtype):
        made.append(shape)
        tensor = allocate(shape, stride, dtype)
        return tensor.fill_(math.nan) if dtype.is_floating_point else tensor

    def forget_compiled():  # generated code takes the allocator when it is loaded
        torch._dynamo.reset()
        PyCodeCache.cache_clear()

    monkeypatch.setattr(torch._C._dynamo.guards, name, allocate_nan)
    forget_compiled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield made
    torch.use_deterministic_algorithms(False)
    forget_compiled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_was_not_written_is_not_read(nan_in_new_memory, dtype):
    """40,001 rows are padded to a multiple of 64, and ignored targets fill up the second chunk."""
    inputs = loss_inputs(700, 40_001, dtype)
    student = [tensor.requires_grad_() for tensor in inputs[:2]]
    loss, ce, kl = distillation_loss(*inputs, vocab_size=39_990, chunk_size=512)
    loss.backward()
    assert nan_in_new_memory
    for result in (loss, ce, kl, student[0].grad, student[1].grad):
        assert result.isfinite().all()


def test_the_gradient_of_the_head_is_added_up_in_float32():
    """0.25 is added 4,096 times to 256, each of which bfloat16 would lose; and a product is not rounded to it."""
    total = torch.full((8, 16), 256.0, device=DEVICE)
    ones = torch.ones(1, 8, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(4096):
        add_product(total, ones.T, 0.25 * torch.ones(1, 16, dtype=torch.bfloat16, device=DEVICE))
    assert (total == 256 + 1024).all()

    torch.manual_seed(0)
    a, b = torch.randn(2, 256, 256, device=DEVICE).bfloat16()
    total = torch.zeros(256, 256, device=DEVICE)
    add_product(total, a.T, b)
    exact = a.T.double() @ b.double()
    rounded = 2**-8 if DEVICE == "cpu" else 2**-16  # bfloat16's step is 2⁻⁸
    assert (total.double() - exact).abs().max() <= rounded * exact.abs().max()


# ----------------------------------------------- Runs --------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_in_bfloat16_holds_no_square_of_scores(head_dim):
    """The context raises if neither kernel works. Without it the math kernel would hold the scores."""
    sizes = GPTConfig(257, 8 * head_dim, 512, 1, 8, num_key_value_heads=2, head_dim=head_dim)
    model = GPT(sizes).to(DEVICE)
    ids = torch.zeros(2, 1024, dtype=torch.int64, device=DEVICE)
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(kernels), torch.autocast(DEVICE, torch.bfloat16):
        model(ids).float().mean().backward()


@pytest.mark.parametrize("given, expected, within", [
    (dict(dtype="float32", compile="false"), dict(device="cpu"), 1e-3),
    (dict(dtype="bfloat16", compile="false"), dict(device="cpu"), 2e-2),
    (dict(compile="true", micro_batch_size=2), dict(compile="true", micro_batch_size=8), 5e-3)], ids=str)
def test_twenty_steps_equal_the_cpus_and_micro_batches_of_2_equal_those_of_8(config, given, expected, within):
    runs = [config("given", **given), config("expected", **expected)]
    for run in runs:
        train(run)
    assert losses(Path(runs[0].out_dir)) == pytest.approx(losses(Path(runs[1].out_dir)), rel=within)


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_blocks_have_no_break_and_no_recompilation_after_the_first_step(config, recomputed):
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train(config("short", compile="true", max_steps=6, warmup_steps=1, micro_batch_size=4,
                     checkpoint_activations=recomputed))
        graphs = counters["stats"]["unique_graphs"]
        train(config("long", compile="true", micro_batch_size=4, checkpoint_activations=recomputed))
    assert not counters["graph_break"]
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs


def test_a_resumed_run_continues_as_if_it_had_not_stopped(config, tmp_path):
    """Use windows of several attention tiles. With `warn_only` their backward pass would not be deterministic."""
    keys = dict(compile="false", block_size=256, val_samples=1)
    torch.use_deterministic_algorithms(True)
    try:
        train(config("straight", **keys))
        train(config("stopped", **keys))
        stopped = tmp_path / "stopped"
        (stopped / "step_00000020").rename(tmp_path / "away")
        train(config("stopped", **keys))
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(stopped) == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)


# ----------------------------------------------- torchrun ----------------------------------------------------------


def torchrun(processes: int, config, event: dict | None = None) -> subprocess.CompletedProcess:
    """Run distill.py under torchrun, on NCCL; with an event, through test_distributed.py."""
    program = [ROOT / "distill.py", *words(asdict(config))]
    if event is not None:
        folder = Path(config.out_dir).parent
        program = [ROOT / "tests" / "test_distributed.py", folder, json.dumps(event), json.dumps(asdict(config))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *program]
    return subprocess.run(command, capture_output=True, text=True, timeout=400,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_one_process_under_torchrun_is_the_same_training(config, tmp_path, parallel):
    train(config("alone", dtype="float32", compile="false"))
    result = torchrun(1, config("torchrun", dtype="float32", compile="true", parallel=parallel))
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert losses(tmp_path / "torchrun") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    run, = read_lines(tmp_path / "torchrun", "run")
    assert run["config"]["parallel"] == parallel
    assert json.loads((tmp_path / "torchrun" / "step_00000020" / "train_state.json").read_text())["finished"]


def test_all_gpus_save_after_a_signal_and_half_of_them_continue(config, tmp_path):
    """FSDP2 with compiled blocks in bfloat16."""
    world = 2 if DEVICE == "cpu" else torch.cuda.device_count()
    if world < 2:
        pytest.skip("needs several GPUs")
    keys = dict(dtype="bfloat16", compile="true", batch_size=4 * math.lcm(world, world // 2), micro_batch_size=2,
                val_samples=4)
    train(config("alone", **keys))
    run = config("run", parallel="fsdp", **keys)
    stop = dict(what="signal", at=8, rank=world - 1, signal=signal.SIGUSR1)
    for processes, event, status, said in ((world, stop, 1, "stopped by SIGUSR1, saved as step_00000008"),
                                           (world // 2, {}, 0, "continuing from step_00000008")):
        result = torchrun(processes, run, event)
        assert result.returncode == status and said in result.stdout, result.stdout[-1000:] + result.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=2e-2)
    breaks = [json.loads(line)[1] for line in (tmp_path / "graphs.0").read_text().splitlines()]
    assert breaks == [0] * 20
