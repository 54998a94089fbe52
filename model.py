"""One decoder-only transformer for teacher and student.

Reads bottom-up: configuration → rotary → attention → MLP → block → GPT. A row of FAMILIES says what makes gpt2, llama,
mistral, qwen2, qwen3, gpt_bigcode or starcoder2 of it. A model's folder is Hugging Face's (`config.json` and
`model.safetensors`): what is trained here opens in transformers with the same logits, and the other way round.

    python model.py --model=out/quickstart-ddk-0/step_00000400 --prompt='def main('
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from data import UserError, blame, load_tokenizer, model_tokenizer, option, parse_config, run_program, write_text


@dataclass(frozen=True)
class Family:
    """How a model type differs from llama: switches of the network, and names in config.json and in the weights."""
    architecture: str
    layer_norm: bool = False  # LayerNorm with bias, in place of RMSNorm
    gated_mlp: bool = True  # SwiGLU; False: two matrices
    learned_positions: bool = False  # an embedding, in place of rotary
    qk_norm: bool = False  # RMSNorm of each head's q and k, before rotary
    output_bias: bool = True  # attention_bias is on o_proj too
    transposed: bool = False  # the blocks' matrices are stored (in, out): GPT-2's Conv1D
    multi_query: bool = False  # as its key says; if not, c_attn holds q, k and v of one head after the other
    all_slide: bool = False  # each layer looks back on sliding_window tokens; False: those that Qwen's keys name
    prefix: str = "model."
    names: dict[str, str] = field(default_factory=dict)  # part of our parameters' names → as stored
    keys: dict[str, str] = field(default_factory=dict)  # GPTConfig's field → key of config.json; "": no key says it
    defaults: dict = field(default_factory=dict)  # … where the key is left out


LEARNED = dict(layer_norm=True, gated_mlp=False, learned_positions=True, prefix="transformer.", names={
    "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "input_layernorm": "ln_1", "self_attn": "attn",
    "q_proj": "c_attn", "k_proj": "c_attn", "v_proj": "c_attn", "o_proj": "c_proj",
    "post_attention_layernorm": "ln_2", "up_proj": "c_fc", "down_proj": "c_proj", "norm": "ln_f"}, keys={
    "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon", "num_key_value_heads": "", "head_dim": "", "rope_theta": "",
    "rope_scaling": "", "sliding_window": "", "attention_bias": "", "mlp_bias": ""})
GPT2_DEFAULTS = dict(max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=True,
                     mlp_bias=True, hidden_act="gelu_pytorch_tanh")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", keys={"sliding_window": ""}),
    "mistral": Family("MistralForCausalLM", all_slide=True, keys={"attention_bias": "", "mlp_bias": ""},
                      defaults=dict(max_position_embeddings=131072, sliding_window=4096)),
    "qwen2": Family("Qwen2ForCausalLM", output_bias=False, keys={"attention_bias": "", "mlp_bias": ""},
                    defaults=dict(max_position_embeddings=32768, attention_bias=True)),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, keys={"mlp_bias": ""},
                    defaults=dict(max_position_embeddings=32768, head_dim=128)),
    "gpt2": Family("GPT2LMHeadModel", transposed=True, defaults={**GPT2_DEFAULTS, "hidden_act": "gelu_new"}, **LEARNED),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", multi_query=True, defaults=GPT2_DEFAULTS, **LEARNED),
    "starcoder2": Family("Starcoder2ForCausalLM", layer_norm=True, gated_mlp=False, all_slide=True,
                         names={"up_proj": "c_fc", "down_proj": "c_proj"},
                         keys={"rms_norm_eps": "norm_epsilon", "attention_bias": "use_bias", "mlp_bias": "use_bias"},
                         defaults={**GPT2_DEFAULTS, "max_position_embeddings": 4096}),
}
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu,
               **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), partial(F.gelu, approximate="tanh"))}
# Keys of config.json that would make it another network, with the one value that is known
ONLY = {"quantization_config": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "partial_rotary_factor": 1.0}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches, under the names that llama has for them in a Hugging Face config.json."""
    vocab_size: int  # rows of the embedding, which may be more than the tokenizer has ids
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6  # LayerNorm's too
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None  # tokens that a layer looks back on
    rope_scaling: dict | None = None  # llama-3's, see rotary_tables
    model_type: str = "llama"
    source: dict = field(default_factory=dict, compare=False, repr=False)  # the config.json that this was read from

    def __post_init__(self):
        for name, value in (("num_key_value_heads", self.num_attention_heads),
                            ("head_dim", self.hidden_size // max(1, self.num_attention_heads))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # as in __init__, since the fields are frozen
        if min(self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers, self.head_dim,
               self.num_attention_heads, self.num_key_value_heads, self.max_position_embeddings) < 1:
            raise UserError(f"a size is below 1: {self}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                            f"{self.num_key_value_heads}")
        if self.head_dim % 2 and not self.family.learned_positions:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def context(self) -> int:
        """Tokens that can be read at once: the window counts too, since no layer here masks what lies before it."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def scratch(cls, layers: int, width: int, vocab_size: int, block_size: int) -> "GPTConfig":
        """A llama-style model, head tied, for `--student=scratch:LxD`: heads of an even width, about 32 to 128."""
        most = max(1, width // max(32, min(128, width // 16)))
        heads = max((n for n in range(1, most + 1) if width % (2 * n) == 0), default=0)
        if not heads:
            raise UserError(f"--student=scratch:{layers}x{width}: an even width is needed")
        return cls(vocab_size=vocab_size, hidden_size=width, intermediate_size=-(-8 * width // 3 // 32) * 32,
                   num_hidden_layers=layers, num_attention_heads=heads, rms_norm_eps=1e-5,
                   max_position_embeddings=max(block_size, 2048), tie_word_embeddings=True)

    @classmethod
    def from_dict(cls, settings: dict) -> "GPTConfig":
        """From the contents of a config.json. UserError on what would make it a network that this GPT is not."""
        if (model_type := settings.get("model_type")) not in FAMILIES:
            raise UserError(f"model_type {model_type!r} is not known; {' '.join(FAMILIES)} are")
        family = FAMILIES[model_type]
        # transformers 5 writes rope_theta inside rope_parameters, 4 beside rope_scaling, and both heed the latter first
        rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
        given = {**settings, **{key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        values = {name: value for name in cls.__dataclass_fields__
                  if (value := given.get(family.keys.get(name, name), family.defaults.get(name))) is not None}
        act = values.get("hidden_act", "silu")
        for key, value, known in (("rope type", rope_type, ("default", "llama3")), ("hidden_act", act, ACTIVATIONS),
                                  *((key, given.get(key, only), (only, None)) for key, only in ONLY.items())):
            if value not in known:
                raise UserError(f"{key} {value!r} is not known; {' '.join(map(str, known))} is")
        if family.learned_positions:
            values.setdefault("intermediate_size", 4 * int(values["hidden_size"]))
        if family.multi_query and given.get("multi_query", True):
            values["num_key_value_heads"] = 1
        slides = given.get("use_sliding_window") and given.get("max_window_layers", 28) < values["num_hidden_layers"]
        layer_types = given.get("layer_types") or ["sliding_attention"] * bool(slides)
        if not family.all_slide and "sliding_attention" not in layer_types:
            values["sliding_window"] = None
        return cls(**{**values, "source": settings,
                      **{key: int(values[key]) for key in ("vocab_size", "hidden_size", "intermediate_size",
                                                           "num_hidden_layers", "num_attention_heads")},
                      "rope_scaling": {key: rope[key] for key in LLAMA3_ROPE} if rope_type == "llama3" else None})

    def to_dict(self) -> dict:
        """The contents of a config.json that transformers 4 and 5 read alike, of the family that was read."""
        ours = {self.family.keys.get(key, key): value for key, value in asdict(self).items() if key != "source"}
        kept = {key: value for key, value in self.source.items()
                if key != "layer_types" or value and len(value) == self.num_hidden_layers}
        if not self.family.learned_positions:
            scaling = {"rope_type": "llama3", **self.rope_scaling} if self.rope_scaling else None
            ours |= {"rope_scaling": scaling,
                     "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta}}
        if self.family.multi_query:
            ours["multi_query"] = self.num_key_value_heads == 1
        ours.pop("", None)
        return {**kept, **ours, "architectures": [self.family.architecture]}


# ------------ The network ---------------------------------------------------------------------------------------------
# B sequences, T tokens, d hidden_size, H query heads, G key-value heads, hd head_dim, V vocab_size


def rotary_tables(config: GPTConfig, T: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position × frequency, (T, hd) fp32: RoFormer, in llama's half-split layout.

    llama-3's scaling leaves wavelengths up to context/high_freq_factor as they are, stretches those from
    context/low_freq_factor on by `factor`, and goes from one to the other between."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    if config.rope_scaling:
        factor, low, high, context = map(config.rope_scaling.get, LLAMA3_ROPE)
        kept = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = (torch.arange(T, device=device)[:, None] * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + hd/2]) of (B, H, T, hd) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def make_norm(config: GPTConfig) -> nn.Module:
    return (nn.LayerNorm if config.family.layer_norm else nn.RMSNorm)(config.hidden_size, eps=config.rms_norm_eps)


class Attention(nn.Module):
    """Causal self-attention in which H query heads share G key-value heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, hd, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = hd
        self.q_proj = nn.Linear(d, config.num_attention_heads * hd, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * hd, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * hd, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, d, bias=bias and config.family.output_bias)
        norm = partial(nn.RMSNorm, hd, eps=config.rms_norm_eps) if config.family.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or G, T, hd)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU, or two matrices with an activation between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(d, width, bias=bias) if config.family.gated_mlp else None
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """The model. Its head is the embedding's own matrix where `tie_word_embeddings`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, d = config, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        learned = config.family.learned_positions
        self.embed_positions = nn.Embedding(config.max_position_embeddings, d) if learned else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(d, config.vocab_size, bias=False)
        # GPT-2's initial weights: normal(0, 0.02), and less by √(2L) for what writes to the residual stream
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.layers)) if writes else 0.02)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, d)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, idx: torch.Tensor, loss_fn=None, keep: Sequence[int] = ()):
        """Token ids (B, T) int64 → logits (B, T, V); with `loss_fn`, loss_fn(hidden (B, T, d), head_weight (V, d)),
        which gets what the layers in `keep` give (B, T, d), too, behind these two.

        Hidden is after the final norm. So a loss that does its own product with the head need never hold all logits,
        and a wrapper (FSDP) can gather the head for it. UserError on more tokens than positions are learned or the
        sliding window holds."""
        config, T = self.config, idx.shape[1]
        if T > config.context and (config.sliding_window or config.family.learned_positions):
            raise UserError(f"{T} tokens, but this {config.model_type} reads at most {config.context}")
        rotary = None if config.family.learned_positions else rotary_tables(config, T, idx.device)
        x = self.embed_tokens(idx)
        if rotary is None:
            x = x + self.embed_positions.weight[:T]
        kept = []
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary)
            kept += [x] * (i in keep)
        x = self.norm(x)
        return F.linear(x, self.head_weight) if loss_fn is None else loss_fn(x, self.head_weight, *kept)

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
                 vocab_size: int | None = None, eot: int | None = None,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """Continue (B, T) ids by up to `max_new_tokens` drawn ones, or until every row has drawn `eot`: (B, T + n).

        `temperature` 0 takes the likeliest; ids from `vocab_size` on (padding rows of the head) are never drawn; the
        random numbers are `generator`'s, or torch's global ones."""
        ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            window = idx[:, -self.config.context:]
            last_logits = self(window, loss_fn=lambda hidden, head: hidden[:, -1] @ head[:vocab_size].T).float()
            if top_k is not None:
                kept = last_logits.topk(min(top_k, last_logits.shape[-1])).values
                last_logits[last_logits < kept[:, -1:]] = -math.inf
            if temperature == 0:
                new = last_logits.argmax(dim=-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(last_logits / temperature, dim=-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            ended |= new[:, 0] == (-1 if eot is None else eot)
            if ended.all():
                break
        return idx

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None, state: dict | None = None):
        """Write `config.json` and `model.safetensors` as transformers would for this family; `dtype` None: as held.

        `state`: the whole tensors of a model that itself holds only shards."""
        folder, own = Path(folder), self.state_dict() if state is None else state
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: pack(key, [own[name].to("cpu", dtype) for name in names], self.config).contiguous()
                 for key, names in checkpoint_tensors(self).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        dtype = str(dtype or self.embed_tokens.weight.dtype).removeprefix("torch.")
        settings = {**self.config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
        write_text(folder / "config.json", json.dumps(settings, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, layers: int | None = None) -> "GPT":
        """Read a Hugging Face folder, on the CPU, tensor by tensor, as `dtype` (None: the file's).

        `layers`: keep so many only, evenly spaced, the first and the last among them. A missing file, or a missing,
        unexpected, mis-shaped, non-finite or contradictory tensor is a UserError that names it. Nothing is unpickled
        or filled in."""
        config, held = read_config(Path(folder)), stored_tensors(Path(folder))
        with torch.device("meta"):  # no memory, no initialisation: every tensor comes from the file
            model = cls(config)
        own = model.state_dict()
        wanted = checkpoint_tensors(model)
        if not any(key.startswith(config.family.prefix) for key in held):  # the hub's gpt2 was saved without it
            wanted = {key.removeprefix(config.family.prefix): names for key, names in wanted.items()}
        head, embedding = "lm_head.weight", next(iter(wanted))
        if config.tie_word_embeddings and {head, embedding} <= held.keys():
            if not read_tensor(held[head], head).equal(read_tensor(held[embedding], embedding)):
                raise UserError(f"{held[head]}: {head} differs from {embedding}, though config.json ties them; set "
                                "tie_word_embeddings to false there")
            del held[head]
        if held.keys() != wanted.keys():
            files = " ".join(path.name for path in weight_files(Path(folder)))
            raise UserError(f"{folder}: {files}: missing {sorted(wanted.keys() - held)}, unexpected "
                            f"{sorted(held.keys() - wanted)}; not the weights of this config.json")
        L = config.num_hidden_layers
        if not 1 <= (layers := L if layers is None else layers) <= L:
            raise UserError(f"layers:{layers}: {folder} has {L} layers")
        kept, state = {round(i * (L - 1) / max(1, layers - 1)) for i in range(layers)}, {}
        for key, names in wanted.items():
            tensor, parts, where = read_tensor(held[key], key), [own[name] for name in names], f"{held[key]}: {key}"
            if tensor.shape != (expected := pack(key, parts, config).shape):
                raise UserError(f"{where} is {list(tensor.shape)}, but config.json makes it {list(expected)}")
            if tensor.dtype not in DTYPES:
                raise UserError(f"{where} holds {tensor.dtype}; quantised weights are not read")
            if not all(piece.isfinite().all() for piece in tensor.flatten().split(2**20)):  # without a second copy
                raise UserError(f"{where} holds values that are not finite; copy it again")
            for name, part in zip(names, unpack(key, tensor, [len(part) for part in parts], config)):
                if not name.startswith("layers.") or int(name.split(".")[1]) in kept:
                    # A copy: what safetensors maps from the file is aligned as the file is, and sums by alignment.
                    state[name] = torch.empty(part.shape, dtype=dtype or part.dtype).copy_(part)
        model.load_state_dict(state, assign=True, strict=False)
        model.layers = nn.ModuleList(model.layers[i] for i in sorted(kept))
        model.config = replace(config, num_hidden_layers=layers)
        assert not any(parameter.is_meta for parameter in model.parameters())
        return model.to(reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()}))


# ------------ Folders -------------------------------------------------------------------------------------------------

BUFFERS = r"\battn\.(masked_)?bias$|rotary_emb\.inv_freq$"  # constants that older versions of transformers saved
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def checkpoint_tensors(model: GPT) -> dict[str, list[str]]:
    """Each tensor of the model's checkpoint → our parameters in it: one, or q, k and v where the family fuses them."""
    family, tensors = model.config.family, {}
    for name in model.state_dict():
        if not name.startswith("filters."):  # of --method=ted, which needs them while it trains only
            key = ".".join(family.names.get(part, part) for part in name.split("."))
            tensors.setdefault(key if name.startswith("lm_head.") else family.prefix + key, []).append(name)
    return tensors


def pack(key: str, parts: list[torch.Tensor], config: GPTConfig) -> torch.Tensor:
    """The checkpoint's tensor `key` from our parameters in it."""
    whole = parts[0]
    if len(parts) > 1:
        whole = torch.cat(parts)
        if config.family.multi_query and len(parts[0]) == len(parts[1]):
            whole = whole.unflatten(0, (3, config.num_attention_heads, -1)).transpose(0, 1).flatten(0, 2)
    return whole.T if config.family.transposed and whole.dim() == 2 and ".h." in f".{key}" else whole


def unpack(key: str, whole: torch.Tensor, rows: list[int], config: GPTConfig) -> list[torch.Tensor]:
    """Our parameters, of `rows` each, in the checkpoint's tensor `key`: pack's inverse."""
    whole = whole.T if config.family.transposed and whole.dim() == 2 and ".h." in f".{key}" else whole
    if len(rows) > 1 and config.family.multi_query and rows[0] == rows[1]:
        whole = whole.unflatten(0, (config.num_attention_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return list(whole.split(rows))


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names. UserError if one is missing or outside the folder."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.is_file() and not files[0].is_file():
        with blame(index, "no index of shards; copy it again"):
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if path.parent != folder or not path.is_file():
            raise UserError(f"{path}: not a file in the model's folder; model.safetensors is needed, or the shards that"
                            f" {index.name} names: convert other formats with transformers' save_pretrained")
    return files


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor of a model's folder. Buffers that hold no weights are left out."""
    held = {}
    for path in weight_files(folder):
        with blame(path, "not a whole safetensors file; copy it again"), safe_open(path, framework="pt") as file:
            for key in (key for key in file.keys() if not re.search(BUFFERS, key)):
                if key in held and not read_tensor(held[key], key).equal(file.get_tensor(key)):
                    raise UserError(f"{path}: {key} is not as in {held[key]}; copy both again")
                held[key] = path
    return held


def read_tensor(path: Path, key: str) -> torch.Tensor:
    # Opened anew each time: what a mapping has touched is this process's memory until it is closed.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a model's folder. UserError names what is wrong there."""
    path = folder / "config.json"
    if (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: a run's folder; name one of the step_ folders in it")
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; a model's folder in Hugging Face's format is needed")
    with blame(path, "not the config.json of a model that is known"):
        return GPTConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))


def resolve_device(name: str) -> torch.device:
    """auto: cuda, then mps, then cpu. UserError if this machine lacks it."""
    cuda = torch.cuda.is_available()  # a driver too old for this torch still counts its devices
    counts = {"cuda": torch.cuda.device_count() if cuda else 0, "mps": torch.mps.device_count(), "cpu": 1}
    names = [kind for kind in counts if counts[kind]]
    names += [f"{kind}:{i}" for kind in names for i in range(counts[kind])]
    if name not in ("auto", *names):
        raise UserError(f"--device={name}: not on this machine, which has {' '.join(names)}")
    return torch.device(names[0] if name == "auto" else name)


@dataclass
class GenerateConfig:
    """Keys of `python model.py`."""
    model: str = option("", "the model's folder")
    prompt: str = option("", "the text to continue")
    tokenizer: str = option("", "bytes, a tiktoken encoding or a tokenizer.json, if not in the model's folder")
    eot: str = option("", "the token that ends a text; empty: the tokenizer's own")
    max_new_tokens: int = option(200, "tokens to add at most", least=1)
    temperature: float = option(0.8, "0 takes the likeliest token each time", least=0)
    top_k: int | None = option(None, "draw from the k likeliest only", least=1)
    seed: int = option(0, "selects what is drawn", least=0)
    device: str = option("auto", "auto: cuda, then mps, then cpu")

    def problems(self) -> list[str]:
        return ([f"--model={self.model}: name a model's folder"] * (not self.model or not Path(self.model).is_dir())
                + ["--prompt: give the text to continue"] * (not self.prompt))


def main():
    config = parse_config(GenerateConfig)
    folder = Path(config.model)
    tokenizer = (load_tokenizer(config.tokenizer, config.eot) if config.tokenizer
                 else model_tokenizer(folder, config.eot))
    if tokenizer is None:
        raise UserError(f"--tokenizer: {folder} has no tokenizer files; name its tokenizer")
    device, rows = resolve_device(config.device), read_config(folder).vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(f"--tokenizer: {tokenizer.name} has {tokenizer.vocab_size} ids, but the model {rows}")
    model = GPT.from_pretrained(folder).to(device)
    ids = tokenizer.encode_batch([config.prompt])[0].tolist()
    generator = torch.Generator(device).manual_seed(config.seed)
    idx = model.generate(torch.tensor([ids], device=device), config.max_new_tokens, generator=generator,
                         temperature=config.temperature, top_k=config.top_k, eot=tokenizer.eot,
                         vocab_size=tokenizer.vocab_size)
    print(tokenizer.decode(idx[0].tolist()))


if __name__ == "__main__":
    run_program(main)
