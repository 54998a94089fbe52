"""The model: transformers' logits both ways, strict folders, generation, and the program."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Hostile, change_tensors, copy_of, drop, edit, open_in_transformers, put
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModelForCausalLM, GPT2Config, GPTBigCodeConfig, LlamaConfig, MistralConfig,
                          Qwen2Config, Qwen3Config, Starcoder2Config)

import model as model_program
from data import UserError
from model import GPT, GPTConfig, rotary_tables

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_bigcode", "starcoder2")

# Tiny models of transformers. An epsilon of 1e-2 and a rope_theta of 100 make a mistake in either visible.
LLAMA = dict(vocab_size=67, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=64, rms_norm_eps=1e-2)
GROUPED = dict(LLAMA, num_key_value_heads=2)
GPT2 = dict(vocab_size=67, n_embd=48, n_layer=3, n_head=4, n_positions=64, layer_norm_epsilon=1e-2)
STARCODER2 = dict(GROUPED, norm_epsilon=1e-2)
QWEN_WINDOW = dict(use_sliding_window=True, sliding_window=24)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)  # with rope_theta 100: wavelengths of 6 to 291 tokens
MODELS = {
    "llama": LlamaConfig(**LLAMA),
    "llama multi-query": LlamaConfig(**LLAMA, num_key_value_heads=1),
    "llama tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama attention bias": LlamaConfig(**LLAMA, attention_bias=True),
    "llama mlp bias": LlamaConfig(**LLAMA, mlp_bias=True),
    "llama rope_theta": LlamaConfig(**GROUPED, head_dim=20, rope_theta=500000.0),
    "llama-3 rope": LlamaConfig(**LLAMA, rope_parameters=dict(LLAMA3_ROPE, rope_theta=100.0)),
    "llama gelu": LlamaConfig(**LLAMA, hidden_act="gelu_pytorch_tanh"),
    "mistral": MistralConfig(**GROUPED, sliding_window=24),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2 tied": Qwen2Config(**LLAMA, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2 window": Qwen2Config(**GROUPED, **QWEN_WINDOW, max_window_layers=1),
    "qwen2 window off": Qwen2Config(**GROUPED, sliding_window=24, max_window_layers=1),
    "qwen2 one layer slides": Qwen2Config(**GROUPED, **QWEN_WINDOW, layer_types=[
        "full_attention", "sliding_attention", "full_attention"]),
    "qwen3": Qwen3Config(**GROUPED, head_dim=20),
    "qwen3 bias": Qwen3Config(**GROUPED, head_dim=12, attention_bias=True, **QWEN_WINDOW, max_window_layers=2),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, n_inner=100, tie_word_embeddings=False, activation_function="gelu"),
    "gpt2 odd heads": GPT2Config(**{**GPT2, "n_embd": 36}, activation_function="relu"),
    "gpt_bigcode": GPTBigCodeConfig(**GPT2),
    "gpt_bigcode untied": GPTBigCodeConfig(**GPT2, n_inner=100, tie_word_embeddings=False, activation_function="gelu"),
    "starcoder2": Starcoder2Config(**STARCODER2),
    "starcoder2 no bias": Starcoder2Config(**STARCODER2, use_bias=False, sliding_window=24, tie_word_embeddings=False),
}
SLIDING = ("mistral", "qwen2 window", "qwen2 one layer slides", "qwen3 bias", "starcoder2 no bias")


def tokens(vocab_size: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=seeded(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module):
    """Move every weight of `module` far from its initial value: norms are not 1, biases not 0."""
    generator = seeded(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 1 + 0.5 * noise if is_norm else 0.25 * noise
    return module.eval()


def transformers_model(config):
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def tiny(model_type: str = "llama", **changes) -> GPT:
    values = dict(vocab_size=30, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=8, max_position_embeddings=32, model_type=model_type)
    if model_type == "qwen2":
        values.update(attention_bias=True)
    if model_type in ("gpt2", "gpt_bigcode", "starcoder2"):
        values.update(attention_bias=True, mlp_bias=True, hidden_act="gelu")
    if model_type in ("gpt2", "gpt_bigcode"):
        values.update(num_key_value_heads=4 if model_type == "gpt2" else 1)
    return randomised(GPT(GPTConfig(**{**values, **changes})))


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs, length: int = 0):
    """Compare logits to 1e-5 of the largest, on as many tokens as both models read, or `length`."""
    idx = tokens(ours.config.vocab_size, 2, length or min(ours.config.context, 48))
    expected = theirs(idx).logits
    torch.testing.assert_close(ours(idx), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def assert_same_weights(ours: GPT, expected: GPT):
    state, wanted = ours.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    for name in wanted:
        assert state[name].dtype == wanted[name].dtype and state[name].equal(wanted[name]), name


def settings_of(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def assert_opens_in_transformers(ours: GPT, folder: Path):
    ours.save_pretrained(folder)
    back = open_in_transformers(folder)
    assert_same_logits(ours, back)
    return back


# ------------ Parity with transformers --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tensor_names_are_those_of_transformers_both_ways(name, tmp_path):
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert ours.config.context == (24 if name in SLIDING else 64)
    assert_same_logits(ours, theirs)
    if name in ("llama-3 rope", "qwen2", "starcoder2"):  # rotary positions go on beyond the configured ones
        assert_same_logits(ours, theirs, length=90)

    assert type(assert_opens_in_transformers(ours, tmp_path / "ours")) is type(theirs)
    saved, expected = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert {key: tensor.shape for key, tensor in saved.items()} == {
        key: tensor.shape for key, tensor in expected.items()}
    assert ("lm_head.weight" in saved) != theirs.config.tie_word_embeddings


ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")
NULLS = dict.fromkeys(("rope_scaling", "partial_rotary_factor"))
EDITED = {  # what is edited in a config.json → (model, keys that are removed, keys that are set)
    "rope_theta, as of transformers 4": ("llama", ROPE_KEYS, dict(rope_theta=500000, rope_scaling=None)),
    # A key that users add by hand to a file of transformers 5 to stretch the context
    "rope_scaling before rope_parameters": ("llama rope_theta", (), dict(rope_scaling=dict(LLAMA3_ROPE,
                                                                                           rope_theta=100.0))),
    "rope_scaling without rope_theta": ("llama rope_theta", (), dict(rope_scaling=LLAMA3_ROPE)),
    **{f"nulls in {family}": (family, (), NULLS) for family in FAMILIES},
    "layer_types is null": ("qwen2 window", (), dict(layer_types=None)),
    # Keys that only other families have
    "a window of llama": ("llama", (), dict(QWEN_WINDOW, max_window_layers=0)),
    "biases of mistral": ("mistral", (), dict(attention_bias=True, mlp_bias=True)),
    "biases of qwen2": ("qwen2", (), dict(attention_bias=False, mlp_bias=True)),
    "mlp_bias of qwen3": ("qwen3", (), dict(mlp_bias=True)),
    "biases and epsilon of starcoder2": ("starcoder2", (), dict(attention_bias=False, mlp_bias=False,
                                                               rms_norm_eps=0.5)),
    **{f"llama's keys in {family}": (family, (), dict(
        QWEN_WINDOW, attention_bias=False, mlp_bias=False, rms_norm_eps=0.5, rope_theta=5.0, rope_scaling=LLAMA3_ROPE))
       for family in ("gpt2", "gpt_bigcode")},
    "Qwen's keys in mistral": ("mistral", (), dict(use_sliding_window=False, max_window_layers=28)),
}


@pytest.mark.parametrize("what", EDITED)
def test_a_config_json_gives_the_same_network_as_in_transformers(what, tmp_path):
    name, removed, changes = EDITED[what]
    transformers_model(MODELS[name]).save_pretrained(tmp_path)
    edit(CONFIG, without_keys(*removed), **changes)(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.context == (24 if name in SLIDING else 64)
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"))
    assert_opens_in_transformers(ours, tmp_path / "saved")
    assert GPT.from_pretrained(tmp_path / "saved").config == ours.config


SIZES = dict(vocab_size=67, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)
GPT2_SIZES = dict(vocab_size=67, n_embd=64, n_layer=3, n_head=4)


@pytest.mark.parametrize("window", [{}, dict(use_sliding_window=True, max_window_layers=1)], ids=["", "window"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_but_the_sizes_has_transformers_default(family, window, tmp_path):
    sizes = GPT2_SIZES if family in ("gpt2", "gpt_bigcode") else SIZES
    theirs = transformers_model(AutoConfig.for_model(family, **sizes, **window))
    theirs.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": family, **sizes, **window}))
    ours = GPT.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs)

    # What 48 tokens do not show
    wanted = AutoConfig.from_pretrained(tmp_path)
    longest = wanted.max_position_embeddings
    assert ours.config.context == min(longest, getattr(wanted, "sliding_window", None) or longest)
    assert ours.config.tie_word_embeddings == wanted.tie_word_embeddings
    epsilon = model_program.CONFIG_KEYS[ours.config.family.layout].get("rms_norm_eps", "rms_norm_eps")
    assert ours.config.rms_norm_eps == getattr(wanted, epsilon)


V4 = dict(GROUPED, hidden_act="silu", initializer_range=0.02, use_cache=True, bos_token_id=1, eos_token_id=2,
          torch_dtype="bfloat16")
GPT2_V4 = dict(GPT2, initializer_range=0.02, attn_pdrop=0.1, bos_token_id=1, eos_token_id=2, summary_activation=None)
HUB = {  # a model of the hub → its config.json as transformers 4 wrote it, with small sizes
    "starcoder": dict(GPT2_V4, model_type="gpt_bigcode", activation_function="gelu", attention_softmax_in_fp32=True,
                      multi_query=True, n_inner=192, scale_attn_weights=True, torch_dtype="float32"),
    "Qwen1.5": dict(V4, model_type="qwen2", max_window_layers=1, rope_theta=1000000.0, sliding_window=16,
                    tie_word_embeddings=True, use_sliding_window=False),
    "Qwen3": dict(V4, model_type="qwen3", attention_bias=False, head_dim=20, max_window_layers=28, rope_scaling=None,
                  rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False),
    "starcoder2": dict(V4, model_type="starcoder2", mlp_type="default", hidden_act="gelu_pytorch_tanh",
                       norm_epsilon=1e-2, norm_type="layer_norm", rope_theta=999999.4420358813, sliding_window=16,
                       use_bias=True),
    "Llama-3.1": dict(V4, model_type="llama", attention_bias=False, mlp_bias=False, pretraining_tp=1,
                      rope_scaling=LLAMA3_ROPE, rope_theta=100.0, tie_word_embeddings=False),
    "Mistral-v0.1": dict(V4, model_type="mistral", rope_theta=10000.0, sliding_window=16, tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_transformers_4_makes_the_same_network_and_keeps_its_keys(name, tmp_path):
    theirs = transformers_model(AutoConfig.for_model(**HUB[name])).float()
    theirs.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(HUB[name]))
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.context == (16 if name in ("starcoder2", "Mistral-v0.1") else 64)
    assert_same_logits(ours, theirs)
    assert_opens_in_transformers(ours, tmp_path / "ours")
    assert HUB[name].keys() <= settings_of(tmp_path / "ours").keys()


# ------------ Sizes from scratch --------------------------------------------------------------------------------------

@pytest.mark.parametrize("width", [32, 48, 98, 120, 192, 576, 1000])
def test_scratch_has_even_heads_and_opens_in_transformers(width, tmp_path):
    config = GPTConfig.scratch(1, width, 31, 5000)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.context) == (width, 1, 31, 5000)
    assert config.head_dim % 2 == 0 and config.num_attention_heads * config.head_dim == width
    assert config.intermediate_size % 32 == 0 and 0 <= config.intermediate_size - 8 * width / 3 < 32
    if width <= 128:
        assert_opens_in_transformers(GPT(config).eval(), tmp_path)


def test_new_weights_are_gpt2s():
    state = GPT(GPTConfig.scratch(8, 256, 500, 16)).state_dict()
    for name, tensor in state.items():
        if "norm" in name:
            assert tensor.eq(1).all()
        else:
            expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert tensor.std().item() == pytest.approx(expected, rel=0.05), name


# ------------ forward -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_loss_fn_gets_the_hidden_states_and_the_head_that_make_the_logits(tied):
    gpt, idx = tiny(tie_word_embeddings=tied), tokens(30, 2, 7)
    hidden, head = gpt(idx, loss_fn=lambda hidden, head: (hidden, head))
    assert hidden.shape == (2, 7, 32) and head.shape == (30, 32)
    assert head is gpt.head_weight and (head is gpt.embed_tokens.weight) == tied
    torch.testing.assert_close(hidden @ head.T, gpt(idx))


@pytest.mark.parametrize("family, changes", [("mistral", dict(sliding_window=8)), ("gpt2", {}), ("gpt_bigcode", {})])
def test_more_tokens_than_the_window_or_the_learned_positions_are_rejected(family, changes):
    gpt = tiny(family, **changes)
    context = changes.get("sliding_window", 32)
    assert gpt.config.context == context and gpt(tokens(30, 1, context)).shape == (1, context, 30)
    with pytest.raises(ValueError, match=f"{context + 1} tokens.*{context}"):
        gpt(tokens(30, 1, context + 1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fork_masks_the_documents_of_a_window_with_positions_and_a_mask(family):
    """Two documents in one window give the logits that they give in separate windows."""
    gpt, idx = tiny(family), tokens(30, 2, 12)
    separate = torch.cat((gpt(idx[:, :7]), gpt(idx[:, 7:])), dim=1)
    document = torch.tensor([0] * 7 + [1] * 5)
    mask = (document[:, None] == document) & torch.ones(12, 12).bool().tril()
    positions = torch.cat((torch.arange(7), torch.arange(5)))
    for positions in (positions, positions.expand(2, -1)):  # the same for all sequences, or one row each
        x, rotary = gpt.embed_tokens(idx), None
        if family == "gpt2":
            x = x + gpt.embed_positions(positions)
        else:
            rotary = rotary_tables(gpt.config, positions)
        for layer in gpt.layers:
            x = layer(x, rotary, mask)
        torch.testing.assert_close(gpt.norm(x) @ gpt.head_weight.T, separate)


@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
def test_compiled_blocks_have_no_break_if_dynamo_makes_head_dim_symbolic():
    """Dynamo does so under FSDP2 if teacher and student differ in head_dim."""
    for head_dim in (8, 16):
        gpt, idx = tiny(num_hidden_layers=1, head_dim=head_dim), tokens(30, 2, 7)
        expected = gpt(idx)
        gpt.layers[0].compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(gpt(idx), expected)


# ------------ Folders -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_equal_to_the_bit_in_the_dtype_of_the_file(family, tied, dtype, tmp_path):
    gpt = tiny(family, tie_word_embeddings=tied).to(dtype)
    gpt.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == gpt.config
    assert_same_weights(loaded, gpt)
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in loaded.parameters())
    assert (loaded.head_weight is loaded.embed_tokens.weight) == tied


def test_rope_theta_and_dtype_are_written_for_both_transformers_versions(tmp_path):
    tiny(rope_theta=500000.0).to(torch.bfloat16).save_pretrained(tmp_path)
    settings = settings_of(tmp_path)
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 500000.0
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_model_has_the_dtype_that_holds_all_tensors_of_the_file_unless_another_is_requested(wanted, tmp_path):
    gpt = tiny("gpt2").bfloat16()
    gpt.norm.half()
    gpt.save_pretrained(tmp_path)
    assert_same_weights(GPT.from_pretrained(tmp_path, wanted), gpt.to(wanted or torch.float32))


def without(prefix: str):
    def edit(state):
        for key in [key for key in state if key.startswith(prefix)]:
            state[key.removeprefix(prefix)] = state.pop(key)
    return edit


def with_buffers(tensor, *keys):
    return lambda state: state.update({key: tensor.clone() for key in keys})


def as_on_the_hub(state):
    without("transformer.")(state)
    with_buffers(CAUSAL, "h.0.attn.bias", "h.1.attn.bias")(state)


CAUSAL = torch.ones(1, 1, 64, 64).tril()
STORED_OTHERWISE = {  # how → (model, edit of its tensors)
    "gpt2 as on the hub": ("gpt2", as_on_the_hub),
    "gpt2 untied without a prefix": ("gpt2 untied", without("transformer.")),
    "gpt2 with masked buffers": ("gpt2", with_buffers(torch.tensor(-1e4), "transformer.h.1.attn.masked_bias")),
    "llama with buffers": ("llama", with_buffers(torch.ones(6), "model.layers.1.self_attn.rotary_emb.inv_freq")),
    "a tied head that is also in the file": ("llama tied", lambda state: state.update(
        {"lm_head.weight": state["model.embed_tokens.weight"].clone()})),
}


@pytest.mark.parametrize("how", STORED_OTHERWISE)
def test_files_of_other_versions_are_read(how, tmp_path):
    name, change = STORED_OTHERWISE[how]
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path)
    change_tensors(change)(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs)
    assert_opens_in_transformers(ours, tmp_path / "ours")


@pytest.mark.parametrize("name", ["llama-3 rope", "mistral", "qwen2 window", "qwen3", "gpt2 untied",
                                  "gpt_bigcode untied", "starcoder2"])
def test_other_keys_of_config_json_are_kept_and_a_second_save_changes_nothing(name, tmp_path):
    transformers_model(MODELS[name]).save_pretrained(tmp_path / "theirs")
    edit(CONFIG, bos_token_id=7, eos_token_id=[1, 2], attention_dropout=0.5, ours={"a": [1, None]},
         n_inner=MODELS[name].to_dict().get("n_inner") or 192)(tmp_path / "theirs")
    before = settings_of(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    saved = settings_of(tmp_path / "ours")
    assert {key: saved.get(key) for key in before} == before
    assert saved.keys() - before.keys() <= {"rope_theta", "rope_scaling", "head_dim", "sliding_window",
                                              "torch_dtype"}

    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    again.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [CONFIG, WEIGHTS]
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    tiny().save_pretrained(tmp_path)
    gpt, path = GPT.from_pretrained(tmp_path), tmp_path / WEIGHTS
    before = gpt.embed_tokens.weight.clone()
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert gpt.embed_tokens.weight.equal(before)


def test_modules_in_extra_are_trained_and_not_saved_with_the_model(tmp_path):
    gpt = tiny()
    assert not any(name.startswith("extra") for name in gpt.state_dict())
    gpt.save_pretrained(tmp_path / "before")
    gpt.extra["filter"] = torch.nn.Linear(32, 64)
    assert "extra.filter.weight" in dict(gpt.named_parameters())
    for state in (None, gpt.state_dict()):
        gpt.save_pretrained(tmp_path / "after", state)
        for file in (CONFIG, WEIGHTS):
            assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    message = refusal(tmp_path)
    assert WEIGHTS in message and "Pickles (.bin) are never opened" in message
    assert not (tmp_path / "unpickled").exists()


# ------------ Strictness ----------------------------------------------------------------------------------------------

def spoil_tensor(key: str, edit):
    """Return a damage: edit(tensor) replaces a tensor, or drops it if that is None."""
    def change(state):
        tensor = edit(state.pop(key))
        if tensor is not None:
            state[key] = tensor.contiguous()
    return change_tensors(change)


def one_value(value: float):
    def edit(tensor):
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor
    return edit


def spoil_bytes(name: str, edit):
    """Return a damage: edit(bytes) replaces the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def without_keys(*removed: str):
    return lambda settings: {key: value for key, value in settings.items() if key not in removed}


def spoil_rope(key: str, **rope):
    return edit(CONFIG, without_keys("rope_parameters"), **{key: {"rope_theta": 1e4, **rope}})


def in_shards(*parts: slice):
    """Return a damage: shards of these parts of the sorted tensors replace the whole file."""
    def damage(folder):
        tensors = sorted(load_file(folder / WEIGHTS).items())
        (folder / WEIGHTS).unlink()
        for i, part in enumerate(parts):
            save_file(dict(tensors[part]), folder / f"model-{i}.safetensors")
    return damage


def refusal(folder: Path, dtype: torch.dtype | None = None) -> str:
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(folder, dtype)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value)


Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
DAMAGE = {  # what is wrong → (how it comes about, what the message names)
    "no weights": (drop(WEIGHTS), [WEIGHTS]),
    "no config": (lambda folder: (folder / CONFIG).rename(folder / "adapter_config.json"), [CONFIG, "adapter"]),
    "the folder of a run": (put("metrics.jsonl", b""), ["step_"]),
    "unexpected layer": (edit(CONFIG, num_hidden_layers=1), ["Unexpected key(s)", "model.layers.1."]),
    "would broadcast": (spoil_tensor(NORM, lambda tensor: tensor[:1]), ["size mismatch for norm.weight"]),
    "another vocabulary": (edit(CONFIG, vocab_size=29), ["size mismatch for embed_tokens.weight", "[30,", "[29,"]),
    "minus infinity": (spoil_tensor(NORM, one_value(float("-inf"))), [NORM, "not finite"]),
    "a tied head that differs": (edit(CONFIG, tie_word_embeddings=True), ["lm_head", "tie_word_embeddings"]),
    "cut weights": (spoil_bytes(WEIGHTS, lambda content: content[:-100]), ["SafetensorError"]),
    "a shard missing": (in_shards(slice(5)), ["Missing key(s)", "layers.0.self_attn.q_proj.weight"]),
    "a tensor in two shards": (in_shards(slice(6), slice(5, None)), ["model.layers.0.mlp.up_proj.weight"]),
    "cut config": (spoil_bytes(CONFIG, lambda content: content[:40]), [CONFIG]),
    "a config that is a list": (put(CONFIG, b"[]"), [CONFIG]),
    "rope_parameters that are a list": (edit(CONFIG, rope_parameters=[1e4]), [CONFIG, "TypeError"]),
    "unknown model_type": (edit(CONFIG, model_type="mamba"), [CONFIG, "mamba"]),
    "unknown activation": (edit(CONFIG, hidden_act="relu2"), [CONFIG, "relu2"]),
    "llama3 without a value": (spoil_rope("rope_scaling", rope_type="llama3", factor=8.0), ["low_freq_factor"]),
    "unknown rope_parameters": (spoil_rope("rope_parameters", rope_type="yarn", factor=2.0), [CONFIG, "yarn"]),
    "unknown rope_scaling of old": (spoil_rope("rope_scaling", type="linear", factor=2.0), [CONFIG, "linear"]),
    "unknown rope_scaling beside rope_parameters": (
        edit(CONFIG, rope_scaling={"rope_type": "yarn", "factor": 8.0}), [CONFIG, "yarn"]),
    "half of each head turned, in rope_parameters": (spoil_rope("rope_parameters", partial_rotary_factor=0.5),
                                                     [CONFIG, "partial_rotary_factor", "0.5"]),
    "quantised": (edit(CONFIG, quantization_config={"quant_method": "gptq"}), [CONFIG, "quantization_config", "gptq"]),
    # Sizes that the weights do not have, or no network
    "a size that is a text": (edit(CONFIG, intermediate_size="many"), ["TypeError"]),
    "no layers": (edit(CONFIG, num_hidden_layers=0), ["ZeroDivisionError"]),
    "no heads": (edit(CONFIG, without_keys("head_dim"), num_attention_heads=0), [CONFIG]),
    "heads in no groups": (edit(CONFIG, num_key_value_heads=3), ["size mismatch for layers.0.self_attn.k_proj.weight"]),
    "no hidden_size": (edit(CONFIG, without_keys("hidden_size")), [CONFIG, "hidden_size"]),
}


@pytest.fixture(scope="module")
def family_folders(tmp_path_factory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        tiny(family).save_pretrained(folder)
    return folders


NAMES = {  # family → a tensor's name in its file, and ours
    "llama": (Q, "layers.1.self_attn.q_proj.weight"),
    "mistral": (Q, "layers.1.self_attn.q_proj.weight"),
    "qwen2": ("model.layers.1.self_attn.v_proj.bias", "layers.1.self_attn.v_proj.bias"),
    "qwen3": ("model.layers.1.self_attn.k_norm.weight", "layers.1.self_attn.k_norm.weight"),
    "gpt2": ("transformer.h.1.attn.c_attn.weight", "layers.1.self_attn.qkv_proj.weight"),
    "gpt_bigcode": ("transformer.h.1.attn.c_attn.bias", "layers.1.self_attn.qkv_proj.bias"),
    "starcoder2": ("model.layers.1.mlp.c_proj.bias", "layers.1.mlp.down_proj.bias"),
}
WRONG = {  # what is wrong with a tensor → (how it comes about, what the message says)
    "missing": (lambda key: spoil_tensor(key, lambda tensor: None), 'Missing key(s) in state_dict: "OURS"'),
    "head missing": (lambda key: spoil_tensor("lm_head.weight", lambda tensor: None),
                     'Missing key(s) in state_dict: "lm_head.weight"'),
    "unexpected": (lambda key: change_tensors(with_buffers(torch.ones(2), key + "s")),
                   'Unexpected key(s) in state_dict: "KEYs"'),
    "mis-shaped": (lambda key: spoil_tensor(key, lambda tensor: tensor[:-1]), "size mismatch for OURS"),
    "not finite": (lambda key: spoil_tensor(key, one_value(float("nan"))), "KEY has values that are not finite"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_wrong_tensors_are_rejected_in_each_family(family, what, family_folders, tmp_path):
    spoil, expected = WRONG[what]
    key, ours = NAMES[family]
    message = refusal(copy_of(family_folders[family], tmp_path / "model", spoil(key)))
    assert expected.replace("KEY", key).replace("OURS", ours) in message, message


@pytest.mark.parametrize("stored, wanted", [
    (torch.int8, None),
    (torch.int8, torch.float32),
    (torch.float8_e4m3fn, None),
    (torch.float8_e4m3fn, torch.float32),
], ids=str)
def test_quantized_weights_are_rejected_for_any_dtype(stored, wanted, family_folders, tmp_path):
    refusal(copy_of(family_folders["llama"], tmp_path / "model", spoil_tensor(Q, lambda tensor: tensor.to(stored))),
            wanted)


@pytest.mark.parametrize("damage, named", DAMAGE.values(), ids=DAMAGE)
def test_a_wrong_folder_is_rejected_with_its_name(damage, named, family_folders, tmp_path):
    message = refusal(copy_of(family_folders["llama"], tmp_path / "model", damage))
    assert all(text in message for text in named), message


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
@pytest.mark.parametrize("key, value", [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
                                        ("add_cross_attention", True), ("activation_function", "quick_gelu"),
                                        ("multi_query", False)])
def test_a_setting_of_an_unsupported_network_is_rejected(key, value, family, family_folders, tmp_path):
    folder = copy_of(family_folders[family], tmp_path / "model", edit(CONFIG, **{key: value}))
    assert f"{key} {value!r}" in refusal(folder)


# ------------ Shards --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama tied", "qwen3", "gpt2"])
def test_shards_that_transformers_wrote_are_read_like_one_file(name, tmp_path):
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    drop("model.safetensors.index.json")(tmp_path / "shards")
    assert_same_weights(GPT.from_pretrained(tmp_path / "shards"), GPT.from_pretrained(tmp_path / "whole"))


def test_shards_next_to_a_whole_file_are_not_read(tmp_path):
    tiny().save_pretrained(tmp_path)
    put("model-00001-of-00002.safetensors", b"")(tmp_path)
    assert_same_weights(GPT.from_pretrained(tmp_path), tiny())


# ------------ Memory --------------------------------------------------------------------------------------------------

LOADS = """
import re, sys, torch
from pathlib import Path
from model import GPT
read = lambda key: 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
GPT.from_pretrained(sys.argv[1])
before = read("VmRSS")
model = GPT.from_pretrained(sys.argv[2])
print((read("VmHWM") - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says the most that a process has held")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loading_takes_hardly_more_memory_than_the_model_even_if_a_tied_head_is_stored(family, tmp_path):
    tiny().save_pretrained(tmp_path / "small")
    gpt = tiny(family, vocab_size=8192, hidden_size=1024, intermediate_size=1024, num_hidden_layers=8, head_dim=256)
    gpt.lm_head.weight.data = gpt.embed_tokens.weight.data.clone()
    gpt.bfloat16().save_pretrained(tmp_path / "large")  # 120 MB
    edit(CONFIG, tie_word_embeddings=True)(tmp_path / "large")
    result = subprocess.run([sys.executable, "-c", LOADS, tmp_path / "small", tmp_path / "large"], capture_output=True,
                            text=True, cwd=Path(model_program.__file__).parent)
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < 1.05


# ------------ Generation ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family, changes", [("llama", {}), ("gpt2", dict(max_position_embeddings=8)),
                                             ("mistral", dict(sliding_window=8))])
def test_greedy_generation_uses_the_most_likely_token_and_the_last_tokens_that_fit_the_context(family, changes):
    gpt, prompt = tiny(family, **changes), tokens(30, 3, 13)
    idx = prompt
    for _ in range(5):
        logits = gpt(idx[:, -gpt.config.context:])[:, -1]
        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    assert gpt.generate(prompt, 5, temperature=0).equal(idx)


def test_draws_follow_the_softmax_at_the_temperature():
    gpt, prompt = tiny(), tokens(30, 1, 4).expand(20000, -1)
    drawn = gpt.generate(prompt, 1, temperature=1.5, generator=seeded(0))[:, -1]
    share = drawn.bincount(minlength=30) / len(drawn)
    expected = (gpt(prompt[:1])[0, -1] / 1.5).softmax(dim=-1)
    assert (share - expected).abs().max() < 5 * 0.5 / len(drawn) ** 0.5


@pytest.mark.parametrize("how", [dict(temperature=0), dict()], ids=str)
def test_padded_ids_are_never_drawn(how):
    gpt, prompt = tiny(vocab_size=40), tokens(30, 4, 4)
    gpt.lm_head.weight.data[30:] *= 1000
    assert gpt.generate(prompt, 12, generator=seeded(0), vocab_size=30, **how)[:, 4:].max() < 30
    assert gpt.generate(prompt, 12, generator=seeded(0), **how)[:, 4:].max() >= 30  # as they would have been


def test_generation_ends_once_every_row_has_drawn_eot():
    gpt, prompt = tiny(vocab_size=6), tokens(6, 2, 4)
    whole = gpt.generate(prompt, 20, temperature=3.0, generator=seeded(0))
    assert whole.shape == (2, 24)
    for eot in range(6):
        first = [(row == eot).nonzero()[0].item() if eot in row else 19 for row in whole[:, 4:]]
        ended = gpt.generate(prompt, 20, temperature=3.0, generator=seeded(0), eot=eot)
        assert ended.equal(whole[:, :4 + max(first) + 1])


# ------------ The program ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a model folder for the 257 ids of the bytes tokenizer, with two rows of padding."""
    folder, gpt = tmp_path_factory.mktemp("model"), tiny(vocab_size=259)
    gpt.lm_head.weight.data[257:] *= 1000
    gpt.save_pretrained(folder)
    return folder


def test_the_program_continues_a_prompt_and_a_seed_decides_how(folder, run_main):
    arguments = [f"--model={folder}", "--tokenizer=bytes", "--prompt=Grüße <|endoftext|>", "--max_new_tokens", "30",
                 "--temperature=0", "--temperature=1.5"]
    status, output, err = run_main(model_program, *arguments, "--seed=3")
    assert (status, err) == (0, "") and output.startswith("Grüße <|endoftext|>") and len(output) > 25
    assert run_main(model_program, *arguments, "--seed=3") == (0, output, "")
    assert run_main(model_program, *arguments, "--seed=4")[1] != output
    assert run_main(model_program, *arguments, "--prompt=")[1].startswith("<|endoftext|>")  # a new document


def test_help_lists_every_key_with_its_default(run_main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    status, output, _ = run_main(model_program, "--help")
    assert status == 0
    for key, default in {"model": "", "prompt": "", "tokenizer": "", "eot": "", "max_new_tokens": 200,
                         "temperature": 0.8, "seed": 0, "device": "auto"}.items():
        assert f"--{key}" in output and f"default: {default}" in output


@pytest.mark.parametrize("arguments, named", [
    ([], ["--model"]),
    (["--model=FOLDER", "--prompt=a", "--temp=1"], ["--temp=1"]),
    (["--model=FOLDER/nowhere", "--prompt=a"], ["FOLDER/nowhere: no config.json"]),
    (["--model=FOLDER", "--prompt=a", "--max_new_tokens=0"], ["--max_new_tokens=0", "1"]),
    (["--model=FOLDER", "--prompt=a", "--seed=-1"], ["--seed=-1", "0"]),
    (["--model=FOLDER", "--prompt=a", "--temperature=nan"], ["--temperature=nan"]),
    (["--model=FOLDER", "--prompt=a", "--device=abacus"], ["--device=abacus", "cpu"]),
    (["--model=FOLDER", "--prompt=a", "--tokenizer=bytes", "--eot=none such"], ["--eot=none such"]),
    (["--model=FOLDER", "--prompt=a", "--tokenizer=none such"], ["--tokenizer=none such"]),
    (["--model=FOLDER", "--prompt=a"], ["--tokenizer", "FOLDER"]),  # it has none
    (["--model=SMALL", "--prompt=z", "--tokenizer=bytes"], ["30", "257"]),  # rows and ids
])
def test_the_programs_errors_are_a_message_and_status_2(arguments, named, folder, tmp_path, run_main):
    tiny().save_pretrained(tmp_path / "small")
    for name, path in (("FOLDER", folder), ("SMALL", tmp_path / "small")):
        arguments = [text.replace(name, str(path)) for text in arguments]
        named = [text.replace(name, str(path)) for text in named]
    status, output, message = run_main(model_program, *arguments)
    assert status == 2 and output == ""
    assert all(text in message for text in named), message
