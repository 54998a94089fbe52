"""Simulate a training step at full size: memory, traffic and FLOPs of one of many GPUs, without a GPU.

    python tests/bench_scale.py                                     the paper's pairs on 8 GPUs, ten minutes
    python tests/bench_scale.py --preset=qwen1.5-14b-1.8b --world=16 --micro_batch_size=4 --checkpoint_activations

Rank 0 runs `load_models` and `training_step` of distill.py on fake tensors: they have shapes but no memory. A fake
process group answers each collective at once. Differences from a run:

- Blocks run uncompiled, and as on a CPU, where RMSNorm keeps float32 copies of its input. Compiled blocks keep about a
  third less for the backward pass.
- The compiled Eq. 3 is replaced by its allocations: a float32 for each of a chunk's logits.
- Fragmentation, and the buffers of CUDA, cuBLAS and NCCL, are missing: leave several GiB free.
- Seconds are FLOPs and bytes over the rates below, as if nothing ever waited.
- Nothing is loaded, evaluated or saved.

The same run checks that the bytes of weights, gradients and optimizer which `--dry_run` prints are right to 2 %.
"""

import argparse
import inspect
import os
import sys
import weakref
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import distill
from distill import PRESETS, Config, count_parameters, default_chunk_size, load_models, make_optimizers, training_step
from model import GPT, GPTConfig

DISTILLATION_LOSS = distill.distillation_loss
BACKWARD = torch.Tensor.backward
RESIZE = torch.UntypedStorage.resize_
GIB = 2**30
GB = 1e9
FLOPS_PER_S = 450e12  # of bfloat16 products on one H100, as good training loops reach
BYTES_PER_S = 400e9  # of one GPU's NVLink, as NCCL reaches

# The sizes in each model's config.json
QWEN = dict(model_type="qwen2", attention_bias=True, max_position_embeddings=32768)
LLAMA = dict(max_position_embeddings=4096)
STARCODER = dict(model_type="gpt_bigcode", attention_bias=True, mlp_bias=True, num_key_value_heads=1,
                 max_position_embeddings=8192, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh")
MODELS = {
    "Qwen/Qwen1.5-14B": GPTConfig(152064, 5120, 13696, 40, 40, **QWEN),
    "Qwen/Qwen1.5-7B": GPTConfig(151936, 4096, 11008, 32, 32, **QWEN),
    "Qwen/Qwen1.5-4B": GPTConfig(151936, 2560, 6912, 40, 20, **QWEN),
    "Qwen/Qwen1.5-1.8B": GPTConfig(151936, 2048, 5504, 24, 16, **QWEN),
    "meta-llama/Llama-2-13b-hf": GPTConfig(32000, 5120, 13824, 40, 40, **LLAMA),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": GPTConfig(32000, 2048, 5632, 22, 32, 4, **LLAMA),
    "bigcode/starcoder": GPTConfig(49152, 6144, 24576, 40, 48, **STARCODER),
    "bigcode/starcoderbase-3b": GPTConfig(49152, 2816, 11264, 36, 22, **STARCODER),
}
TOKENIZER_IDS = {"Qwen": 151646, "meta-llama": 32000, "bigcode": 49152}


def parse_arguments() -> argparse.Namespace:
    pairs = [preset for preset, values in PRESETS.items() if values.get("teacher") in MODELS]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="", choices=pairs, help="one of the paper's pairs (default: all)")
    parser.add_argument("--world", type=int, default=8, help="GPUs (default: %(default)s)")
    parser.add_argument("--micro_batch_size", default="2,4,8", help="windows per forward pass,… (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="windows per step (default: %(default)s)")
    parser.add_argument("--block_size", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--shard_teacher", default="true", choices=("true", "false"), help="(default: %(default)s)")
    parser.add_argument("--checkpoint_activations", action="store_true", help="recompute them in the backward pass")
    args = parser.parse_args()
    args.presets = [args.preset] if args.preset else pairs
    args.micro_batch_sizes = [int(size) for size in args.micro_batch_size.split(",")]
    return args


# ------------ What is alive, and what goes over the wires -------------------------------------------------------------


class Tracker(TorchDispatchMode):
    """Counts the bytes of all live tensors, by the activity in which each was made, and their peak; and the bytes of
    collectives."""

    def __init__(self):
        super().__init__()
        self.doing = "activations"
        self.live = {}  # storage → its bytes, and the activity in which it was made
        self.total = 0
        self.start_step()

        # FSDP2 frees and allocates gathered weights by resizing their storage. No operator shows that.
        def resize_(storage, size):
            RESIZE(storage, size)
            if storage._cdata in self.live:
                self.set_bytes(storage._cdata, size, "gathered weights")

        torch.UntypedStorage.resize_ = resize_

    def start_step(self):
        self.peak = 0
        self.peak_by_kind = {}
        self.collectives = Counter()  # collective → how often
        self.moved = Counter()  # collective → bytes that a GPU sends, and as many that it receives

    def wrap(self, function, doing: str):
        """`function`, during which the program does `doing`."""
        def wrapped(*args, **kwargs):
            before = self.doing
            self.doing = doing
            outputs = function(*args, **kwargs)
            self.doing = before
            return outputs
        return wrapped

    def set_bytes(self, key: int, n_bytes: int, kind: str):
        if key in self.live:
            self.total -= self.live[key][0]
        self.live[key] = (n_bytes, kind)
        self.total += n_bytes
        if self.total > self.peak:
            self.peak = self.total
            self.peak_by_kind = self.by_kind()

    def by_kind(self) -> Counter:
        kinds = Counter()
        for n_bytes, kind in self.live.values():
            kinds[kind] += n_bytes
        return kinds

    def forget(self, key: int):
        n_bytes, _ = self.live.pop(key)
        self.total -= n_bytes

    def watch(self, tensor, kind: str):
        """Start to count the storage of `tensor`, unless it has been counted before."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.set_bytes(storage._cdata, storage.nbytes(), kind)
            weakref.finalize(storage, self.forget, storage._cdata)

    def relabel(self, tensor, kind: str):
        """Count a storage as another kind from now on."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        key = tensor.untyped_storage()._cdata
        self.set_bytes(key, self.live[key][0], kind)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        library, name, *_ = str(function).split(".")
        if "c10d" in library:
            self.count_collective(name.strip("_"), tree_leaves((args, kwargs)))
        outputs = function(*args, **kwargs)
        kind = "gathered weights" if library == "fsdp" else self.doing
        for output in tree_leaves(outputs):
            self.watch(output, kind)
        return outputs

    def count_collective(self, name: str, inputs: list):
        # The larger side is the whole tensor: what an all-gather makes, what a reduce-scatter takes.
        whole = max((value.nbytes for value in inputs if isinstance(value, torch.Tensor)), default=0)
        world = dist.get_world_size()
        passes = 2 if name in ("allreduce", "all_reduce") else 1
        self.collectives[name] += 1
        self.moved[name] += passes * whole * (world - 1) / world


# ------------ The step ------------------------------------------------------------------------------------------------


def replace_what_needs_values(tracker: Tracker, mesh):
    """Replace what reads files or values, neither of which exist here, and tell the tracker what the program does."""
    def read_model(role, source, config, model_config, dtype):
        torch.set_default_dtype(dtype)
        model = GPT(model_config)
        torch.set_default_dtype(torch.float32)
        return model

    def eq3(student_logits, *args, **kwargs):
        torch.empty_like(student_logits, dtype=torch.float32)
        ce, kl = student_logits.new_zeros(2, len(student_logits), dtype=torch.float32)
        return ce.sum(), ce, kl

    def loss_in_cudas_chunks(hidden, head, *args, **equation):
        chunk_size = default_chunk_size(len(head), on_cuda=True)
        return DISTILLATION_LOSS(hidden, head, *args, chunk_size=chunk_size, **equation)

    distill.distillation_loss = tracker.wrap(loss_in_cudas_chunks, "Eq. 3")
    distill.compile_eq3 = lambda: eq3
    distill.read_model = read_model
    distill.on_rank_0 = lambda function, *args, share=True: function(*args)
    distill.DeviceMesh.from_group = lambda *args, **kwargs: mesh
    distill.set_model_state_dict = lambda *args, **options: None
    GPT.to = GPT.to_empty = lambda model, *args, **options: model  # fake tensors are on their device from the start
    torch.Tensor.backward = tracker.wrap(BACKWARD, "backward pass")
    FakeTensor.item = lambda tensor: 1.0
    FakeTensor.tolist = lambda tensor: [1.0] * tensor.numel()


def attention_flops(query, key, value, *args, out_shape=None, **options) -> int:
    """Two products of (tokens × width) and (width × tokens) for each head, of which the causal half counts."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * tokens * width


def attention_backward_flops(grad, query, *args, out_shape=None, **options) -> int:
    """Five products instead of two: one of them is computed again."""
    return attention_flops(query, None, None) * 5 // 2


ATTENTION = {  # which torch's counter does not know on CPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def simulate(preset: str, micro_batch_size: int, args: argparse.Namespace, mesh) -> tuple[float, float, float]:
    """A whole step of a pair. Prints what it takes → bytes at the peak, bytes moved, FLOPs."""
    names = PRESETS[preset]
    model_configs = {role: MODELS[names[role]] for role in ("teacher", "student")}
    config = Config(preset=preset, teacher=names["teacher"], student=names["student"], device="cpu", dtype="bfloat16",
                    compile="false", parallel="fsdp", batch_size=args.batch_size, block_size=args.block_size,
                    micro_batch_size=micro_batch_size, shard_teacher=args.shard_teacher == "true",
                    checkpoint_activations=args.checkpoint_activations)
    vocab_size = TOKENIZER_IDS[names["teacher"].split("/")[0]]

    tracker = Tracker()
    replace_what_needs_values(tracker, mesh)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        models = load_models(config, model_configs, None)
        for role, model in models.items():
            for parameter in model.parameters():
                tracker.relabel(parameter, f"{role}'s weights")
        optimizer, = make_optimizers(models["student"], config)
        held = {}  # after the last backward pass: kind → bytes
        optimizer.register_step_pre_hook(lambda *_: held.update(tracker.by_kind()))
        optimizer.step = tracker.wrap(optimizer.step, "optimizer")

        # A fork's step may have more arguments: a value for each window of the batch
        known = {"step", "student", "teacher", "optimizers", "windows", "vocab_size", "config"}
        names_of_added = inspect.signature(training_step).parameters.keys() - known
        added = {name: torch.zeros(config.batch_size, dtype=torch.long) for name in names_of_added}

        # One micro-batch, after which AdamW has its moments, and then a whole step
        windows = torch.zeros(config.batch_size // args.world, config.block_size + 1, dtype=torch.long)
        for windows_of_step in (windows[:config.micro_batch_size], windows):
            tracker.start_step()
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                training_step(0, models["student"], models["teacher"], [optimizer], windows_of_step,
                              vocab_size=vocab_size, config=config, **added)
            n_flops = counter.get_total_flops()

    # Each GPU holds its share of the bytes per parameter that the dry run counts.
    kinds = {"teacher's weights": ("teacher", 2), "student's weights": ("student", 4), "backward pass": ("student", 4),
             "optimizer": ("student", 8)}
    n_parameters = count_parameters(models)
    for kind, (role, width) in kinds.items():
        world = args.world if role == "student" or config.shard_teacher else 1
        n_bytes = width * n_parameters[role] / world
        assert abs(n_bytes / held[kind] - 1) < 0.02, f"{preset}: {kind} hold {held[kind]:,} bytes, not {n_bytes:,.0f}"

    moved = sum(tracker.moved.values())
    described = [f"{kind} {n / GIB:.2f}" for kind, n in tracker.peak_by_kind.most_common() if n / GIB >= 0.005]
    print(f"\n{preset}: {len(windows)} windows of {config.block_size} tokens on each of {args.world} GPUs, "
          f"{micro_batch_size} per forward pass\n  peak {tracker.peak / GIB:.1f} GiB: {', '.join(described)}")
    for name, count in tracker.collectives.most_common():
        print(f"  {name}: {count} times, {tracker.moved[name] / GB:,.1f} GB")
    print(f"  {n_flops:.3e} FLOPs", flush=True)
    return tracker.peak, moved, n_flops


def main():
    args = parse_arguments()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(args.world))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.world)
    mesh = init_device_mesh("cpu", (args.world,))
    sizes = args.micro_batch_sizes
    header = [f"{size}: GiB, GB, s" for size in sizes]
    lines = [f"| | compute, s | {' | '.join(header)} |", "|---" * (len(sizes) + 2) + "|"]
    for preset in args.presets:
        steps = [simulate(preset, size, args, mesh) for size in sizes]
        cells = [f"{peak / GIB:.0f}, {moved / GB:,.0f}, {moved / BYTES_PER_S:.1f}" for peak, moved, _ in steps]
        lines.append(f"| `{preset}` | {steps[0][2] / FLOPS_PER_S:.1f} | {' | '.join(cells)} |")
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
