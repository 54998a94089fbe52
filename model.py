"""One decoder-only transformer for teacher and student.

Reads bottom-up: rotary → attention → MLP → block → GPT. A model's folder is Hugging Face's (`config.json` and
`model.safetensors`): what is trained here opens in transformers with the same logits, and the other way round.

    python model.py --model=out/quickstart-ddk-0/step_00000400 --prompt='def main('
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import UserError, load_tokenizer, model_tokenizer, option, parse_config, run_program, write_text


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches, under the names that they have in a Hugging Face config.json."""
    vocab_size: int  # rows of the embedding, which may be more than the tokenizer has ids
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def scratch(cls, layers: int, width: int, vocab_size: int, block_size: int) -> "GPTConfig":
        """A llama-style model, head tied, for `--student=scratch:LxD`: heads of an even width, about 32 to 128."""
        most = max(1, width // max(32, min(128, width // 16)))
        heads = max((n for n in range(1, most + 1) if width % (2 * n) == 0), default=0)
        if not heads:
            raise UserError(f"--student=scratch:{layers}x{width}: an even width is needed")
        return cls(vocab_size=vocab_size, hidden_size=width, intermediate_size=-(-8 * width // 3 // 32) * 32,
                   num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, rms_norm_eps=1e-5,
                   head_dim=width // heads, max_position_embeddings=max(block_size, 2048), tie_word_embeddings=True)

    @classmethod
    def from_dict(cls, settings: dict) -> "GPTConfig":
        """From the contents of a config.json. ValueError on an architecture that this GPT is not."""
        if settings.get("model_type") != "llama":
            raise UserError(f"model_type {settings.get('model_type')!r} is not known; llama is")
        rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        for key, known, value in (("rope type", "default", rope.get("rope_type", rope.get("type", "default"))),
                                  ("hidden_act", "silu", settings.get("hidden_act", "silu"))):
            if value != known:
                raise UserError(f"{key} {value!r} is not known; {known} is")
        heads = settings["num_attention_heads"]
        return cls(
            *(int(settings[key]) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
            num_attention_heads=heads,
            num_key_value_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
            # transformers 5 writes it inside rope_parameters, 4 beside them
            rope_theta=rope.get("rope_theta") or settings.get("rope_theta") or 10000.0,
            **{key: settings[key] for key in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                                              "attention_bias", "mlp_bias") if key in settings})

    def to_dict(self) -> dict:
        """The contents of a config.json that transformers 4 and 5 read alike."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **asdict(self),
                "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}}


# ------------ The network ---------------------------------------------------------------------------------------------
# B sequences, T tokens, d hidden_size, H query heads, G key-value heads, hd head_dim, V vocab_size


def rotary_tables(config: GPTConfig, T: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position × frequency, (T, hd) fp32: RoFormer, in llama's half-split layout."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    angle = (torch.arange(T, device=device)[:, None] * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + hd/2]) of (B, H, T, hd) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which H query heads share G key-value heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, hd, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = hd
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.q_proj = nn.Linear(d, config.num_attention_heads * hd, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * hd, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * hd, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, d, bias=bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or G, T, hd)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True,
                                           enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, width, bias=bias)
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """The model. Its head is the embedding's own matrix where `tie_word_embeddings`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        untied = not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if untied else None
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    def init_weights(self):
        """GPT-2's: normal(0, 0.02), and less by √(2L) for the matrices that write to the residual stream."""
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

    def forward(self, idx: torch.Tensor, loss_fn=None):
        """Token ids (B, T) int64 → logits (B, T, V); with `loss_fn`, loss_fn(hidden (B, T, d), head_weight (V, d)).

        Hidden is after the final norm. So a loss that does its own product with the head need never hold all logits,
        and a wrapper (FSDP) can gather the head for it."""
        cos, sin = rotary_tables(self.config, idx.shape[1], idx.device)
        x = self.embed_tokens(idx)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return F.linear(x, self.head_weight) if loss_fn is None else loss_fn(x, self.head_weight)

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
                 vocab_size: int | None = None, eot: int | None = None,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """Continue (B, T) ids by up to `max_new_tokens` drawn ones, or until every row has drawn `eot`: (B, T + n).

        `temperature` 0 takes the likeliest; ids from `vocab_size` on (padding rows of the head) are never drawn; the
        random numbers are `generator`'s, or torch's global ones."""
        ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            window = idx[:, -self.config.max_position_embeddings:]
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

    def save_pretrained(self, folder: str | Path):
        """Write `config.json` and `model.safetensors` in Hugging Face's llama format; a tied head is left out."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {checkpoint_name(name): tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        settings = {**self.config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
        write_text(folder / "config.json", json.dumps(settings, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "GPT":
        """Read a Hugging Face folder, on the CPU, as `dtype` (None: the file's).

        A missing file, or a missing, unexpected, mis-shaped or non-finite tensor, is a ValueError that names it.
        Nothing is unpickled or filled in."""
        folder = Path(folder)
        config = read_config(folder)
        with torch.device("meta"):  # no memory, no initialisation: every tensor comes from the file
            model = cls(config)
        shapes = {checkpoint_name(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
        path, state = folder / "model.safetensors", {}
        if not path.is_file():
            raise UserError(f"{folder}: no model.safetensors; convert other formats with transformers' save_pretrained")
        try:
            with safe_open(path, framework="pt") as tensors:
                found = set(tensors.keys())
                if config.tie_word_embeddings and "lm_head.weight" in found:
                    if not tensors.get_tensor("lm_head.weight").equal(tensors.get_tensor("model.embed_tokens.weight")):
                        raise UserError(f"{path}: lm_head.weight differs from model.embed_tokens.weight, though "
                                        "config.json ties them; set tie_word_embeddings to false there")
                    found.remove("lm_head.weight")
                if found != set(shapes):
                    raise UserError(f"{path}: missing {sorted(set(shapes) - found)}, unexpected "
                                    f"{sorted(found - set(shapes))}; not the weights of this config.json")
                for key, (name, shape) in shapes.items():
                    tensor = tensors.get_tensor(key)
                    if tensor.shape != shape:
                        raise UserError(f"{path}: {key} is {tuple(tensor.shape)}, config.json makes it {tuple(shape)}")
                    if not tensor.isfinite().all():
                        raise UserError(f"{path}: {key} holds values that are not finite; the file is damaged")
                    # A copy: what safetensors maps from the file is aligned as the file is, and sums by alignment.
                    state[name] = tensor.to(dtype or tensor.dtype, copy=True)
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
        model.load_state_dict(state, assign=True)
        return model


def checkpoint_name(name: str) -> str:
    """Our parameter's name as it stands in a llama checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a model's folder. ValueError names what is wrong there."""
    path = folder / "config.json"
    if (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: a run's folder; name one of the step_ folders in it")
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; a model's folder in Hugging Face's format is needed")
    try:
        return GPTConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a model's config.json ({type(error).__name__}: {error})") from None


def resolve_device(name: str) -> torch.device:
    """auto: cuda, then mps, then cpu. UserError if this machine lacks it."""
    kinds = [kind for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()),
                                      ("cpu", True)) if there]
    if name != "auto" and not re.fullmatch(rf"({'|'.join(kinds)})(:\d+)?", name):
        raise UserError(f"--device={name}: not on this machine, which has {' '.join(kinds)}")
    return torch.device(kinds[0] if name == "auto" else name)


@dataclass
class GenerateConfig:
    """Keys of `python model.py`."""
    model: str = option("", "the model's folder", required=True)
    prompt: str = option("", "the text to continue", required=True)
    tokenizer: str = option("", "bytes, a tiktoken encoding or a tokenizer.json, if not in the model's folder")
    max_new_tokens: int = option(200, "tokens to add at most", least=1)
    temperature: float = option(0.8, "0 takes the likeliest token each time", least=0)
    top_k: int | None = option(None, "draw from the k likeliest only", least=1)
    seed: int = option(0, "selects what is drawn", least=0)
    device: str = option("auto", "auto: cuda, then mps, then cpu")

    def problems(self) -> list[str]:
        return [] if Path(self.model).is_dir() else [f"--model={self.model}: no such folder"]


def main():
    config = parse_config(GenerateConfig)
    folder = Path(config.model)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else model_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"--tokenizer: {folder} has no tokenizer files; name its tokenizer")
    device, rows = resolve_device(config.device), read_config(folder).vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(f"--tokenizer={config.tokenizer}: {tokenizer.vocab_size} ids, but the model has {rows}")
    model = GPT.from_pretrained(folder).to(device)
    ids = tokenizer.encode_batch([config.prompt])[0].tolist()
    generator = torch.Generator(device).manual_seed(config.seed)
    idx = model.generate(torch.tensor([ids], device=device), config.max_new_tokens, generator=generator,
                         temperature=config.temperature, top_k=config.top_k, eot=tokenizer.eot,
                         vocab_size=tokenizer.vocab_size)
    print(tokenizer.decode(idx[0].tolist()))


if __name__ == "__main__":
    run_program(main)
