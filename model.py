"""One decoder-only transformer, for the teacher and the student.

The network comes first: configuration, families, rotary positions, attention, MLP, block, GPT. It is llama's; a row of
FAMILIES says how another model type differs from it. Model folders follow, in Hugging Face's format: transformers
opens a saved model with the same logits, and vice versa. The program at the end generates text:

    python model.py --model=out/quickstart-ddk-0/step_00000300 --prompt='def main('

Shapes: B sequences, T tokens, d hidden_size, H query heads, G key-value heads, hd head_dim, V vocab_size.
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data import (MODEL_FILES, UserError, load_tokenizer, model_folder, model_tokenizer, run_program, user_errors,
                  write_json)


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of the network, named as in a llama's config.json."""
    vocab_size: int  # rows of the embedding; may be more than the tokenizer has ids
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6  # of LayerNorm too
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # llama-3's four numbers, by the keys of LLAMA3_ROPE
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None  # number of tokens that a layer attends to; None: all
    model_type: str = "llama"
    source: dict = field(default_factory=dict, compare=False, repr=False)  # the config.json that this was read from

    def __post_init__(self):
        # Two sizes follow from others. The class is frozen, hence object.__setattr__.
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def family(self) -> "Family":
        return FAMILIES[self.model_type]

    @property
    def context(self) -> int:
        """Tokens that can be read at once. A sliding window limits them too, since no layer here masks older tokens."""
        return min(self.max_position_embeddings, self.sliding_window or math.inf)

    @classmethod
    def scratch(cls, layers: int, width: int, vocab_size: int, block_size: int) -> "GPTConfig":
        """Return the config of a llama with a tied head, for `--student=scratch:LxD`; D has to be even."""
        # Each head is about width / 16 wide, from 32 to 128. Then fewer, wider heads until their width is even
        head_dim = min(max(width // 16, 32), 128)
        heads = max(width // head_dim, 1)
        while heads > 1 and width % (2 * heads) != 0:
            heads -= 1
        return cls(vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                   intermediate_size=32 * math.ceil(8 * width / 3 / 32),  # llama's 8/3, up to a multiple of 32
                   max_position_embeddings=max(block_size, 2048), rms_norm_eps=1e-5, tie_word_embeddings=True)


@dataclass(frozen=True)
class Family:
    """How a model type differs from llama, in the network and in its folder."""
    architecture: str  # its class in transformers
    # The network
    layer_norm: bool = False  # LayerNorm with bias instead of RMSNorm
    gated_mlp: bool = True  # SwiGLU; False: two matrices
    learned_positions: bool = False  # an embedding instead of rotary positions
    fused_qkv: bool = False  # one matrix for queries, keys and values
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, before rotary
    output_bias: bool = True  # attention_bias applies to o_proj too
    # Its folder
    layout: str = "llama"  # row of CONFIG_KEYS and WEIGHT_NAMES
    transposed: bool = False  # the layers' matrices are stored as (in, out)
    optional_window: bool = False  # config.json's sliding_window counts only with use_sliding_window
    fixed: dict = field(default_factory=dict)  # fields of GPTConfig that the family fixes, whatever config.json has
    defaults: dict = field(default_factory=dict)  # fields of GPTConfig if config.json lacks the key


GPT2_FIXED = dict(attention_bias=True, mlp_bias=True, num_key_value_heads=None, head_dim=None, rope_theta=10000.0,
                  rope_scaling=None, sliding_window=None)
GPT2_DEFAULTS = dict(max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
                     hidden_act="gelu_pytorch_tanh")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", fixed=dict(sliding_window=None)),
    "mistral": Family("MistralForCausalLM", fixed=dict(attention_bias=False, mlp_bias=False),
                      defaults=dict(max_position_embeddings=131072, sliding_window=4096)),
    "qwen2": Family("Qwen2ForCausalLM", output_bias=False, optional_window=True,
                    fixed=dict(attention_bias=True, mlp_bias=False),
                    defaults=dict(max_position_embeddings=32768, sliding_window=4096)),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, optional_window=True, fixed=dict(mlp_bias=False),
                    defaults=dict(max_position_embeddings=32768, sliding_window=4096, head_dim=128)),
    "gpt2": Family("GPT2LMHeadModel", layer_norm=True, gated_mlp=False, learned_positions=True, fused_qkv=True,
                   layout="gpt2", transposed=True, fixed=GPT2_FIXED,
                   defaults=dict(GPT2_DEFAULTS, hidden_act="gelu_new")),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", layer_norm=True, gated_mlp=False, learned_positions=True,
                          fused_qkv=True, layout="gpt2", fixed=dict(GPT2_FIXED, num_key_value_heads=1),
                          defaults=GPT2_DEFAULTS),
    "starcoder2": Family("Starcoder2ForCausalLM", layer_norm=True, gated_mlp=False, layout="starcoder2",
                         defaults=dict(GPT2_DEFAULTS, max_position_embeddings=4096, attention_bias=True,
                                       mlp_bias=True)),
}
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rotary_tables(config, positions):
    """Return cos and sin of position × frequency for positions (T,) or (B, T): (1, T, hd) or (B, 1, T, hd) in float32,
    as in RoFormer, in llama's layout of two halves."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    frequency = config.rope_theta ** -exponent
    if config.rope_scaling is not None:
        # Llama-3's longer context: low frequencies are divided by `factor`, high ones kept, with a ramp in between
        rope = config.rope_scaling
        low = rope["low_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
        kept = ((turns - low) / (rope["high_freq_factor"] - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / rope["factor"])
    half = positions[..., None, :, None] * frequency  # the angles of half the dimensions: llama uses each one twice
    angle = torch.cat((half, half), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate each pair (x[i], x[i + hd/2]) of x (B, H, T, hd) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def make_norm(config):
    norm = nn.LayerNorm if config.family.layer_norm else nn.RMSNorm
    return norm(config.hidden_size, eps=config.rms_norm_eps)


class Attention(nn.Module):
    """Self-attention in which H query heads share G key-value heads; causal unless a mask is given."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        family = config.family
        d = config.hidden_size
        H = config.num_attention_heads
        G = config.num_key_value_heads
        hd = config.head_dim
        bias = config.attention_bias
        self.head_dim = hd
        self.widths = (H * hd, G * hd, G * hd)
        # A Python bool: in a compiled block a comparison of sizes may become a symbol
        self.grouped = G < H

        self.qkv_proj = nn.Linear(d, sum(self.widths), bias=bias) if family.fused_qkv else None
        if not family.fused_qkv:
            self.q_proj = nn.Linear(d, H * hd, bias=bias)
            self.k_proj = nn.Linear(d, G * hd, bias=bias)
            self.v_proj = nn.Linear(d, G * hd, bias=bias)
        self.o_proj = nn.Linear(H * hd, d, bias=bias and family.output_bias)
        self.q_norm = nn.RMSNorm(hd, eps=config.rms_norm_eps) if family.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(hd, eps=config.rms_norm_eps) if family.qk_norm else nn.Identity()

    def forward(self, x, rotary, mask=None):
        # Queries (B, T, H · hd), keys and values (B, T, G · hd)
        if self.qkv_proj is not None:
            q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        else:
            q = self.q_proj(x)
            k = self.k_proj(x)
            v = self.v_proj(x)

        # Each head on its own: (B, H or G, T, hd)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        # Rotary positions, unless learned ones were added to the embedding
        if rotary is not None:
            cos, sin = rotary
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)

        # Attend to the tokens so far, or to the tokens that the mask allows, and put the heads side by side again
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU, or two matrices with an activation in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d = config.hidden_size
        width = config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(d, width, bias=config.mlp_bias) if config.family.gated_mlp else None
        self.up_proj = nn.Linear(d, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, d, bias=config.mlp_bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class GPT(nn.Module):
    """The whole model. With `tie_word_embeddings` it has no lm_head: the embedding's matrix is the head too.

    `extra` is empty. A fork puts modules there that are trained with a student but are not part of its model."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        d = config.hidden_size
        learned = config.family.learned_positions
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, d) if learned else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(d, config.vocab_size, bias=False)
        self.extra = nn.ModuleDict()

        # GPT-2's initial weights: a standard deviation of 0.02, less for what is added to the residual stream
        residual_std = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, d): lm_head's, or the tied embedding's."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, idx: Tensor, loss_fn: Callable | None = None):
        """Return logits (B, T, V) of ids (B, T); with `loss_fn`, loss_fn(hidden (B, T, d), head_weight (V, d)).

        `hidden` is after the final norm. A loss that multiplies with the head itself never has to hold all logits, and
        FSDP gathers the head for it. UserError on more tokens than learned positions or the sliding window hold."""
        config = self.config
        T = idx.shape[1]
        bounded = config.family.learned_positions or config.sliding_window is not None  # rotary positions go on
        if bounded and T > config.context:
            raise UserError(f"{T} tokens, but this {config.model_type} reads at most {config.context}")

        # Positions and mask: a fork that keeps the documents of a window apart makes its own here
        positions = torch.arange(T, device=idx.device)
        mask = None

        # Tokens, with learned positions added, or with rotary tables
        x = self.embed_tokens(idx)
        rotary = None
        if config.family.learned_positions:
            x = x + self.embed_positions(positions)
        else:
            rotary = rotary_tables(config, positions)

        for layer in self.layers:
            x = layer(x, rotary, mask)
        x = self.norm(x)

        # Logits, or what the loss makes of hidden states and head
        if loss_fn is not None:
            return loss_fn(x, self.head_weight)
        return F.linear(x, self.head_weight)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, *, temperature: float = 1.0, vocab_size: int | None = None,
                 eot: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Continue ids (B, T) by up to `max_new_tokens`, or until every row has drawn `eot`. Return (B, T + n).

        A row goes on after its `eot` until all have ended. `temperature` 0 takes the most likely id. Ids from
        `vocab_size` on, the head's padding rows, are never drawn. `generator` is None for torch's global one."""
        prompt_length = idx.shape[1]
        for _ in range(max_new_tokens):
            # Logits of the next token, (B, V), from as many tokens as the context holds
            window = idx[:, -self.config.context:]
            logits = self(window, loss_fn=lambda hidden, head: hidden[:, -1] @ head[:vocab_size].T).float()

            # Draw one token for each row
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)
            else:
                probs = F.softmax(logits / temperature, dim=-1)
                new = torch.multinomial(probs, num_samples=1, generator=generator)
            idx = torch.cat((idx, new), dim=1)

            # Stop once every row has ended
            if eot is not None and (idx[:, prompt_length:] == eot).any(dim=1).all():
                break
        return idx

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None,
                        config: GPTConfig | None = None) -> "GPT":
        """Read a Hugging Face folder on the CPU, weights as `dtype` (None: the file's). `config` replaces config.json.

        UserError if a file is missing, or if a tensor is missing, unexpected, of another shape, not finite, or differs
        from the tensor that it is tied to. Nothing is unpickled or made up, and no second copy is in memory."""
        folder = Path(folder)
        if config is None:
            config = read_config(folder)
        with user_errors(folder, "expected a complete model that fits its config.json"):
            with torch.device("meta"):  # without memory: each parameter is replaced by a tensor of the file
                model = cls(config)
            model.load_state_dict(read_weights(folder, model, dtype), strict=True, assign=True)
            # If the file has several dtypes, all weights get one that holds them all.
            return model.to(reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()}))

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None):
        """Write `config.json` and `model.safetensors` as transformers does for this family, in the weights' dtype.

        `state`: whole tensors under the names of `state_dict()`, if the model has only shards. `extra` is left out."""
        if state is None:
            state = self.state_dict()
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_config(Path(folder), self.config, state["embed_tokens.weight"].dtype)
        write_weights(Path(folder), self.config, state)


# ------------ Folders: config.json ------------------------------------------------------------------------------------

# Fields of GPTConfig → keys of config.json, if they differ
CONFIG_KEYS = {
    "llama": {},
    "starcoder2": {"rms_norm_eps": "norm_epsilon", "attention_bias": "use_bias", "mlp_bias": "use_bias"},
    "gpt2": {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
             "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
             "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function"},
}
# Keys that would make it another network, and their supported values. None: the key may be absent
SUPPORTED = {"model_type": FAMILIES, "rope_type": ("default", "llama3"), "hidden_act": (None, *ACTIVATIONS),
             "activation_function": (None, *ACTIVATIONS), "scale_attn_weights": (None, True),
             "scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False),
             "multi_query": (None, True), "partial_rotary_factor": (None, 1.0), "quantization_config": (None,)}


def read_config(folder: Path) -> GPTConfig:
    """Return the GPTConfig of a model folder. UserError with the file and what is wrong in it."""
    path = folder / "config.json"
    if (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: the folder of a run; use one of the step_ folders in it")
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a whole model in Hugging Face's format, no adapter, or "
                        "OWNER/MODEL, a name on the Hub")
    with user_errors(path, "the config.json of a supported model is expected"):
        return config_from_file(path)


def config_from_file(path):
    """Return the GPTConfig of a config.json. UserError if it describes a network that GPT cannot be."""
    settings = dict(**json.loads(path.read_text(encoding="utf-8")))  # TypeError unless it is a dict

    # Rope: transformers 5 has rope_theta in rope_parameters, 4 at top level. Both prefer rope_scaling.
    rope = dict(**settings.get("rope_scaling") or settings.get("rope_parameters") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    given = {**settings, **rope, "rope_type": rope_type, "rope_scaling": None}
    if rope_type == "llama3":
        given["rope_scaling"] = {key: rope[key] for key in LLAMA3_ROPE}

    # Reject what this network cannot do.
    for key, supported in SUPPORTED.items():
        value = given.get(key)
        if value not in supported:
            raise UserError(f"{path}: {key} {value!r} is not supported; expected {' or '.join(map(str, supported))}")
    family = FAMILIES[given["model_type"]]
    if family.optional_window and not given.get("use_sliding_window", False):
        given["sliding_window"] = None

    # Fields: what the family fixes, or the value of the key, or the family's default, or GPTConfig's own
    values = {"source": settings}
    for entry in fields(GPTConfig):
        key = CONFIG_KEYS[family.layout].get(entry.name, entry.name)
        value = given.get(key, family.defaults.get(entry.name))
        if value is not None:
            values[entry.name] = value
    values.update(family.fixed)
    if family.learned_positions:
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
    return GPTConfig(**values)


def write_config(folder, config, dtype):
    """Write a config.json for transformers 4 and 5. Keys without a field of ours stay as they were read."""
    family = config.family
    keys = CONFIG_KEYS[family.layout]
    settings = dict(config.source)
    for entry in fields(config):
        if entry.name != "source" and entry.name not in family.fixed:
            settings[keys.get(entry.name, entry.name)] = getattr(config, entry.name)

    # transformers 5 reads rope_theta from rope_parameters, and 4 from top level
    if not family.learned_positions:
        rope = {"rope_type": "default"}
        if config.rope_scaling is not None:
            rope = {"rope_type": "llama3", **config.rope_scaling}
            settings["rope_scaling"] = rope
        settings["rope_parameters"] = {**rope, "rope_theta": config.rope_theta}

    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["torch_dtype"] = settings["dtype"]  # transformers 4
    settings["architectures"] = [family.architecture]
    write_json(folder / "config.json", settings)


# ------------ Folders: weights ----------------------------------------------------------------------------------------

# Parts of our parameters' names → parts of the file's, if they differ
LLAMA_NAMES = {"embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm"}
WEIGHT_NAMES = {
    "llama": LLAMA_NAMES,
    "starcoder2": {**LLAMA_NAMES, "up_proj": "c_fc", "down_proj": "c_proj"},
    "gpt2": {
        "embed_tokens": "transformer.wte", "embed_positions": "transformer.wpe", "norm": "transformer.ln_f",
        "layers": "transformer.h", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "self_attn": "attn", "qkv_proj": "c_attn", "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj",
    },
}
# Constants that older versions of transformers saved with the weights
BUFFERS = r"\battn\.(masked_)?bias$|rotary_emb\.inv_freq$"


def stored_name(name, config):
    """Return the file's name of our parameter `name`, such as layers.3.mlp.up_proj.weight."""
    names = WEIGHT_NAMES[config.family.layout]
    return ".".join(names.get(part, part) for part in name.split("."))


def maybe_transpose(name, tensor, config):
    """Return our parameter `name` from the file's tensor, or vice versa: GPT-2 stores matrices as (in, out)."""
    if config.family.transposed and name.startswith("layers.") and tensor.dim() == 2:
        return tensor.T
    return tensor


def write_weights(folder, config, state):
    tensors = {}
    for name, tensor in state.items():
        if not name.startswith("extra."):
            tensors[stored_name(name, config)] = maybe_transpose(name, tensor.cpu(), config).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read


def read_weights(folder, model, dtype):
    """Return a state_dict for `model` from the folder's files. ValueError on what from_pretrained rejects."""
    config = model.config
    names = {stored_name(name, config): name for name in model.state_dict()}  # the file's → ours
    prefix = stored_name("embed_tokens.weight", config).split(".")[0] + "."
    state = {}
    for key, tensor in stored_tensors(folder):
        if key not in names and prefix + key in names:  # the gpt2 of the Hub was saved without "transformer."
            key = prefix + key
        if not tensor.is_floating_point() or tensor.itemsize == 1:  # integers and float8
            raise ValueError(f"{key} is {tensor.dtype}; quantized weights are not supported")
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{key} has values that are not finite")
        name = names.get(key, key)
        if name in state:
            raise ValueError(f"{key} comes twice")
        tensor = maybe_transpose(name, tensor, config)
        # A copy: the file's memory is not aligned as torch's is, and the order of sums depends on that
        state[name] = tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)

        # A tied head that is in the file too must equal the embedding.
        if config.tie_word_embeddings and {"lm_head.weight", "embed_tokens.weight"} <= state.keys():
            if not state.pop("lm_head.weight").equal(state["embed_tokens.weight"]):
                raise ValueError("lm_head differs from the embedding: set tie_word_embeddings to false")
    return state


def weight_files(folder: Path) -> list[Path]:
    """Return model.safetensors, or else its shards model-*.safetensors. UserError if there are none."""
    paths = [folder / "model.safetensors"]
    if not paths[0].is_file():
        paths = sorted(folder.glob("model-*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: has no model.safetensors and no model-*.safetensors. Pickles (.bin) are never "
                        "opened: transformers' save_pretrained converts them")
    return paths


def stored_tensors(folder):
    """Yield (name, tensor) of a model folder, without the constants in BUFFERS; of each file the largest first."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if not re.search(BUFFERS, key)]
            # The largest first, while there is room: a tensor is in memory twice while it is copied
            keys.sort(key=lambda key: math.prod(file.get_slice(key).get_shape()), reverse=True)
        for key in keys:
            # Opened for each tensor: the pages that were read through an open file stay in memory
            with safe_open(path, framework="pt") as file:
                yield key, file.get_tensor(key)


# ------------ The program ---------------------------------------------------------------------------------------------

def resolve_device(name: str) -> torch.device:
    """Return the device; `auto` is an accelerator (cuda, mps) or else cpu. UserError if it is not on this machine."""
    available = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        numbered = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
        available = [accelerator.type, *numbered, "cpu"]
    if name not in ("auto", *available):
        raise UserError(f"--device={name}: not on this machine; must be auto or one of {' '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def main():
    parser = argparse.ArgumentParser(description="Generate text with the model of a folder.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="model folder, or the model's name on the Hugging Face Hub")
    add("--prompt", required=True, help="text to continue; empty: the start of a document")
    add("--tokenizer", help="bytes, a tiktoken encoding, a tokenizer.json or a name on the Hub, if not in the folder")
    add("--eot", default="", help="token that ends a text, if not the tokenizer's own")
    add("--max_new_tokens", type=int, default=200, help="most tokens to generate (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: the most likely token (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default: %(default)s)")
    args = parser.parse_args()

    # All that can be checked before the weights are read
    for key, minimum in {"max_new_tokens": 1, "temperature": 0, "seed": 0}.items():
        value = getattr(args, key)
        if not minimum <= value < math.inf:
            parser.error(f"--{key}={value}: must be a finite number, at least {minimum}")
    folder = model_folder(args.model, "--model", MODEL_FILES)
    device = resolve_device(args.device)
    rows = read_config(folder).vocab_size
    tokenizer = load_tokenizer(args.tokenizer, args.eot) if args.tokenizer else model_tokenizer(folder, args.eot)
    if tokenizer is None:
        raise UserError(f"--tokenizer: {folder} has no tokenizer files; choose its tokenizer")
    if tokenizer.vocab_size > rows:
        raise UserError(f"--tokenizer: {tokenizer.name} has {tokenizer.vocab_size} ids, but the model only {rows}")

    # Continue the prompt
    model = GPT.from_pretrained(folder).to(device)
    ids = tokenizer.encode_batch([args.prompt])[0].tolist() or [tokenizer.eot_id]  # which precedes a document
    idx = model.generate(torch.tensor([ids], device=device), args.max_new_tokens, temperature=args.temperature,
                         vocab_size=tokenizer.vocab_size, eot=tokenizer.eot_id,
                         generator=torch.Generator(device).manual_seed(args.seed))
    print(tokenizer.decode(idx[0].tolist()))


if __name__ == "__main__":
    run_program(main)
