"""The model: transformers' logits in both directions, strict folders, generation, and the program."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModelForCausalLM, GPT2Config, GPTBigCodeConfig, LlamaConfig, MistralConfig,
                          Qwen2Config, Qwen3Config, Starcoder2Config)

import model as model_program
from data import load_tokenizer, save_tokenizer
from model import GPT, GPTConfig, resolve_device

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

LLAMA = dict(vocab_size=67, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=64, rms_norm_eps=1e-2)
GPT2 = dict(vocab_size=67, n_embd=48, n_layer=3, n_head=4, n_positions=64, layer_norm_epsilon=1e-2)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)  # with rope_theta 100: wavelengths of 6 to 291 tokens
STARCODER2 = {**{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}, "norm_epsilon": 1e-2,
              "num_key_value_heads": 2}
MODELS = {  # name → configuration of a tiny transformers model
    "llama": LlamaConfig(**LLAMA),
    "llama grouped-query": LlamaConfig(**LLAMA, num_key_value_heads=2),
    "llama multi-query": LlamaConfig(**LLAMA, num_key_value_heads=1),
    "llama tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama attention bias": LlamaConfig(**LLAMA, attention_bias=True),
    "llama mlp bias": LlamaConfig(**LLAMA, mlp_bias=True),
    "llama wide heads": LlamaConfig(**LLAMA, head_dim=20, num_key_value_heads=2),
    "llama rope_theta": LlamaConfig(**LLAMA, rope_theta=500000.0),
    "llama-3 rope": LlamaConfig(**LLAMA, rope_parameters=dict(LLAMA3_ROPE, rope_theta=100.0)),
    "llama gelu": LlamaConfig(**LLAMA, hidden_act="gelu_pytorch_tanh"),
    "mistral": MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=None),
    "mistral window": MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=24),
    "qwen2": Qwen2Config(**LLAMA, num_key_value_heads=2),
    "qwen2 tied": Qwen2Config(**LLAMA, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2 window": Qwen2Config(**LLAMA, num_key_value_heads=2, use_sliding_window=True, sliding_window=24,
                                max_window_layers=1),
    "qwen2 window above": Qwen2Config(**LLAMA, num_key_value_heads=2, use_sliding_window=True, sliding_window=24,
                                      max_window_layers=3),
    "qwen2 window off": Qwen2Config(**LLAMA, num_key_value_heads=2, sliding_window=24, max_window_layers=1),
    "qwen3": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=20),
    "qwen3 bias": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=12, attention_bias=True),
    "qwen3 window": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=12, use_sliding_window=True,
                                sliding_window=24, max_window_layers=2),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, n_inner=100, tie_word_embeddings=False, activation_function="gelu"),
    "gpt2 odd heads": GPT2Config(**{**GPT2, "n_embd": 36}, activation_function="relu"),
    "gpt_bigcode": GPTBigCodeConfig(**GPT2),
    "gpt_bigcode untied": GPTBigCodeConfig(**GPT2, n_inner=100, tie_word_embeddings=False, activation_function="gelu"),
    "gpt_bigcode multi-head": GPTBigCodeConfig(**GPT2, multi_query=False, tie_word_embeddings=False),
    "gpt_bigcode multi-head tied": GPTBigCodeConfig(**GPT2, multi_query=False),
    "gpt_bigcode one head": GPTBigCodeConfig(**{**GPT2, "n_head": 1}, multi_query=False),
    "starcoder2": Starcoder2Config(**STARCODER2),
    "starcoder2 window": Starcoder2Config(**STARCODER2, sliding_window=24, rope_theta=999999.4420358813),
    "starcoder2 no bias": Starcoder2Config(**STARCODER2, use_bias=False, sliding_window=24, tie_word_embeddings=False),
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_bigcode", "starcoder2")
SLIDING = ("mistral window", "qwen2 window", "qwen3 window", "starcoder2 window")


def tokens(vocab_size: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed: int = 0):
    """`module` with every weight far from its initial value: norms not 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = (1 + 0.5 * noise if norm else 0.25 * noise).to(parameter.dtype)
    return module.eval()


def transformers_model(config):
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def tiny(vocab_size: int = 30, **changes) -> GPT:
    values = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32)
    if changes.get("model_type") in ("gpt2", "gpt_bigcode", "starcoder2"):
        values |= dict(attention_bias=True, mlp_bias=True, hidden_act="gelu", num_key_value_heads=4)
    values |= dict(attention_bias=True) if changes.get("model_type") == "qwen2" else {}
    return randomised(GPT(GPTConfig(**{**values, **changes})))


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs):
    idx = tokens(ours.config.vocab_size, 2, min(ours.config.context, 48))
    expected = theirs(idx).logits
    torch.testing.assert_close(ours(idx), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def edit_config(folder: Path, remove=(), **changes):
    path = folder / CONFIG
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps({**settings, **changes}))


def settings_of(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def assert_same_weights(ours: GPT, expected: GPT):
    state, wanted = ours.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    for name in wanted:
        assert state[name].dtype == wanted[name].dtype and state[name].equal(wanted[name]), name


def edit_tensors(folder: Path, edit):
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


# ----------------------------------------------- Parity with transformers ------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers_both_ways(name, tmp_path):
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert_same_logits(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    assert type(back) is type(theirs)
    assert_same_logits(ours, back)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_has_transformers_tensor_names(name, tmp_path):
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    GPT.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    shapes, expected = ({key: tensor.shape for key, tensor in load_file(tmp_path / side / WEIGHTS).items()}
                        for side in ("ours", "theirs"))
    assert shapes == expected
    assert ("lm_head.weight" in shapes) != theirs.config.tie_word_embeddings


@pytest.mark.parametrize("written", [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},  # transformers 5
    {"rope_theta": 500000.0, "rope_scaling": None},  # transformers 4
    {"rope_theta": 500000},
], ids=["in rope_parameters", "rope_theta", "whole number"])
def test_rope_theta_is_read_wherever_a_transformers_version_writes_it(written, tmp_path):
    theirs = transformers_model(MODELS["llama rope_theta"])
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, remove=("rope_parameters", "rope_theta", "rope_scaling"), **written)
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("rope", [dict(LLAMA3_ROPE, rope_theta=100.0), dict(LLAMA3_ROPE), {}, None])
def test_rope_scaling_counts_before_rope_parameters_as_in_transformers(rope, tmp_path):
    """transformers leaves the latter in a config.json; the former is what is added by hand to stretch the context."""
    transformers_model(MODELS["llama rope_theta"]).save_pretrained(tmp_path)
    edit_config(tmp_path, rope_scaling=rope)
    assert_same_logits(GPT.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_rope_theta_and_dtype_are_written_for_both_transformers_versions(tmp_path):
    tiny(rope_theta=500000.0).to(torch.bfloat16).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 500000.0
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"


SIZES = dict(vocab_size=67, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)
GPT2_SIZES = dict(vocab_size=67, n_embd=64, n_layer=3, n_head=4)
DEFAULTS = {  # family → the keys that a config.json needs, those that it may leave out
    "llama": (SIZES, ["num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"]),
    "mistral": (SIZES, ["head_dim", "sliding_window"]),
    "qwen2": (SIZES, ["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"]),
    "qwen3": (SIZES, ["head_dim", "attention_bias", "sliding_window", "use_sliding_window", "max_window_layers"]),
    "gpt2": (GPT2_SIZES, ["n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"]),
    "gpt_bigcode": (GPT2_SIZES, ["n_inner", "multi_query", "scale_attn_weights", "add_cross_attention"]),
    "starcoder2": (SIZES, ["sliding_window", "use_bias"]),
}
NORM_EPS = {"starcoder2": "norm_epsilon", "gpt2": "layer_norm_epsilon", "gpt_bigcode": "layer_norm_epsilon"}
LEFT_OUT = [(family, key) for family, (sizes, keys) in DEFAULTS.items()
            for key in [*keys, "tie_word_embeddings", "hidden_act" if sizes is SIZES else "activation_function",
                        "max_position_embeddings" if sizes is SIZES else "n_positions",
                        NORM_EPS.get(family, "rms_norm_eps"), *(["rope_parameters"] if sizes is SIZES else [])]]


def assert_same_settings(ours: GPTConfig, theirs):
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                 "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rms_norm_eps == getattr(theirs, NORM_EPS.get(ours.model_type, "rms_norm_eps"))
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.num_key_value_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.hidden_act == (getattr(theirs, "hidden_act", None) or theirs.activation_function)
    assert ours.intermediate_size == (getattr(theirs, "intermediate_size", None) or theirs.n_inner or 4 * theirs.n_embd)
    if ours.model_type in ("llama", "qwen3"):
        assert ours.attention_bias == theirs.attention_bias
    if not ours.family.learned_positions:
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family, key", LEFT_OUT)
def test_a_key_that_is_left_out_has_transformers_default(family, key, tmp_path):
    AutoConfig.for_model(family, **DEFAULTS[family][0]).save_pretrained(tmp_path)
    edit_config(tmp_path, remove=(key,))
    assert_same_settings(model_program.read_config(tmp_path), AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_alone_make_transformers_default_network(family, tmp_path):
    settings = {"model_type": family, **DEFAULTS[family][0]}
    theirs = transformers_model(AutoConfig.for_model(**settings))
    theirs.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


OF_4 = dict(hidden_size=48, intermediate_size=80, num_attention_heads=4, num_hidden_layers=3, num_key_value_heads=2,
            vocab_size=67, initializer_range=0.02, use_cache=True, bos_token_id=1, eos_token_id=2)
GPT2_OF_4 = dict(n_embd=48, n_head=4, n_layer=3, n_positions=64, vocab_size=67, initializer_range=0.02,
                 layer_norm_epsilon=1e-2, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, bos_token_id=1,
                 eos_token_id=2, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
                 summary_type="cls_index", summary_use_proj=True)
HUB = {  # a model of the hub → its config.json's keys, as transformers 4 wrote them
    "gpt2": dict(GPT2_OF_4, model_type="gpt2", activation_function="gelu_new", n_ctx=64,
                 task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
    "starcoder": dict(GPT2_OF_4, model_type="gpt_bigcode", activation_function="gelu", attention_softmax_in_fp32=True,
                      inference_runner=0, max_batch_size=None, max_sequence_length=None, multi_query=True, n_inner=192,
                      pad_key_length=True, pre_allocate_kv_cache=False, scale_attention_softmax_in_fp32=True,
                      scale_attn_weights=True, torch_dtype="float32", transformers_version="4.28.1", use_cache=True,
                      validate_runner_input=True),
    "Qwen1.5": dict(OF_4, model_type="qwen2", attention_dropout=0.0, hidden_act="silu", max_position_embeddings=32768,
                    max_window_layers=1, rms_norm_eps=1e-2, rope_theta=1000000.0, sliding_window=16,
                    tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.37.0",
                    use_sliding_window=False),
    "Qwen2 window": dict(OF_4, model_type="qwen2", hidden_act="silu", max_position_embeddings=64, max_window_layers=2,
                         rms_norm_eps=1e-2, rope_theta=1000000.0, sliding_window=16, torch_dtype="bfloat16",
                         use_sliding_window=True),
    "Qwen2 window above": dict(OF_4, model_type="qwen2", hidden_act="silu", max_position_embeddings=64,
                               max_window_layers=3, rms_norm_eps=1e-2, rope_theta=1000000.0, sliding_window=16,
                               torch_dtype="bfloat16", use_sliding_window=True),
    "Qwen3": dict(OF_4, model_type="qwen3", attention_bias=False, attention_dropout=0.0, head_dim=20,
                  hidden_act="silu", max_position_embeddings=64, max_window_layers=28, rms_norm_eps=1e-2,
                  rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
                  torch_dtype="bfloat16", use_sliding_window=False),
    "starcoder2": dict(OF_4, model_type="starcoder2", attention_dropout=0.1, embedding_dropout=0.1, mlp_type="default",
                       hidden_act="gelu_pytorch_tanh", max_position_embeddings=64, norm_epsilon=1e-2,
                       norm_type="layer_norm", residual_dropout=0.1, rope_theta=999999.4420358813, sliding_window=16,
                       torch_dtype="bfloat16", transformers_version="4.37.0.dev0", use_bias=True),
    "Llama-2": dict(OF_4, model_type="llama", hidden_act="silu", max_position_embeddings=64, pretraining_tp=1,
                    rms_norm_eps=1e-2, rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16",
                    transformers_version="4.31.0.dev0"),
    "Llama-3.1": dict(OF_4, model_type="llama", attention_bias=False, attention_dropout=0.0, hidden_act="silu",
                      max_position_embeddings=64, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-2,
                      rope_scaling=LLAMA3_ROPE, rope_theta=100.0, tie_word_embeddings=False, torch_dtype="bfloat16"),
    "Mistral-v0.1": dict(OF_4, model_type="mistral", hidden_act="silu", max_position_embeddings=64, rms_norm_eps=1e-2,
                         rope_theta=10000.0, sliding_window=16, tie_word_embeddings=False, torch_dtype="bfloat16"),
    "Mistral-v0.2": dict(OF_4, model_type="mistral", hidden_act="silu", max_position_embeddings=64, rms_norm_eps=1e-2,
                         rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_transformers_4_makes_the_same_network(name, tmp_path):
    written = {**HUB[name], "architectures": ["any"]}
    theirs = transformers_model(AutoConfig.for_model(**written)).float()
    theirs.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(written))
    ours = GPT.from_pretrained(tmp_path)
    windowed = name in ("Qwen2 window", "starcoder2", "Mistral-v0.1")
    assert ours.config.context == (16 if windowed else written.get("max_position_embeddings", 64))
    assert_same_logits(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    assert {**written, **settings_of(tmp_path / "ours")}.keys() == settings_of(tmp_path / "ours").keys()


# ----------------------------------------------- Sizes from scratch ------------------------------------------------


@pytest.mark.parametrize("width", [32, 48, 64, 96, 98, 100, 120, 128, 192, 200, 256, 384, 576, 1000])
def test_scratch_has_even_heads_and_opens_in_transformers(width, tmp_path):
    config = GPTConfig.scratch(1, width, 31, 16)
    assert config.hidden_size == width and config.num_hidden_layers == 1 and config.vocab_size == 31
    assert config.head_dim % 2 == 0 and config.num_attention_heads * config.head_dim == width
    if width <= 200:
        ours = GPT(config).eval()
        ours.save_pretrained(tmp_path)
        assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_width_that_no_even_head_divides_is_refused():
    with pytest.raises(ValueError, match="33"):
        GPTConfig.scratch(1, 33, 31, 16)


@pytest.mark.parametrize("block_size", [16, 5000])
def test_scratch_holds_a_whole_block(block_size):
    assert GPTConfig.scratch(2, 64, 31, block_size).max_position_embeddings >= block_size


def test_new_weights_follow_the_seed():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(GPT(GPTConfig.scratch(2, 32, 31, 16)).state_dict())
    first, again, other = weights
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["embed_tokens.weight"].equal(other["embed_tokens.weight"])


# ----------------------------------------------- forward -----------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_loss_fn_gets_the_hidden_states_and_the_head_that_make_the_logits(tied):
    gpt, idx = tiny(tie_word_embeddings=tied), tokens(30, 2, 7)
    hidden, head = gpt(idx, loss_fn=lambda hidden, head: (hidden, head))
    assert hidden.shape == (2, 7, 32) and head.shape == (30, 32)
    torch.testing.assert_close(hidden @ head.T, gpt(idx))
    assert gpt(idx, loss_fn=lambda hidden, head: "its result") == "its result"


def test_a_later_token_changes_no_earlier_logits():
    gpt, idx = tiny(), tokens(30, 2, 12)
    before, changed = gpt(idx), idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 30
    after = gpt(changed)
    assert after[:, :7].equal(before[:, :7])
    assert ((after - before)[:, 7:].abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("name", SLIDING)
def test_the_sliding_window_is_the_context_and_more_is_refused(name):
    gpt = GPT(GPTConfig.from_dict(MODELS[name].to_dict()))
    assert gpt.config.context == 24 and gpt.config.max_position_embeddings == 64
    assert gpt(tokens(67, 1, 24)).shape == (1, 24, 67)
    with pytest.raises(ValueError, match="25 tokens.*24"):
        gpt(tokens(67, 1, 25))


@pytest.mark.parametrize("name", ["qwen2 window above", "qwen2 window off", "mistral", "starcoder2", "llama"])
def test_without_a_window_the_context_is_the_positions(name):
    assert GPTConfig.from_dict(MODELS[name].to_dict()).context == 64


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_more_tokens_than_learned_positions_are_refused(family):
    gpt = GPT(GPTConfig.from_dict(MODELS[family].to_dict()))
    assert gpt(tokens(67, 1, 64)).shape == (1, 64, 67)
    with pytest.raises(ValueError, match="65 tokens.*64"):
        gpt(tokens(67, 1, 65))


@pytest.mark.parametrize("layer_types, max_window_layers, context", [
    (["full_attention"] * 3, 1, 64), (["full_attention", "sliding_attention", "full_attention"], 3, 24)])
def test_layer_types_say_which_layers_slide_whatever_max_window_layers_is(layer_types, max_window_layers, context,
                                                                          tmp_path):
    theirs = transformers_model(Qwen2Config(**LLAMA, num_key_value_heads=2, use_sliding_window=True, sliding_window=24,
                                            max_window_layers=max_window_layers, layer_types=layer_types))
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.context == context
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("name", ["mistral window", "starcoder2 window"])
def test_qwens_keys_do_not_end_the_window_of_mistral_and_starcoder2(name):
    settings = MODELS[name].to_dict()
    for change in ({"use_sliding_window": False}, {"max_window_layers": 28}, {"layer_types": ["full_attention"] * 3}):
        assert GPTConfig.from_dict({**settings, **change}).context == settings["sliding_window"] == 24


def test_heads_of_keys_and_their_width_follow_from_the_rest():
    config = GPTConfig(vocab_size=7, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=3)
    assert (config.num_key_value_heads, config.head_dim) == (3, 16)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-3 rope", "qwen2", "mistral", "starcoder2"])
def test_rotary_positions_go_on_beyond_the_configured_ones(name, tmp_path):
    theirs, idx = transformers_model(MODELS[name]), tokens(67, 1, 90)
    theirs.save_pretrained(tmp_path)
    expected = theirs(idx).logits
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(idx), expected, rtol=0,
                               atol=1e-5 * expected.abs().max().item())


# ----------------------------------------------- Folders -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_is_equal_to_the_bit(tied, dtype, tmp_path):
    gpt = tiny(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, rope_theta=500000.0).to(dtype)
    gpt.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == gpt.config
    assert_same_weights(loaded, gpt)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_keeps_the_dtype_of_its_file(family, dtype, tmp_path):
    gpt = tiny(model_type=family).to(dtype)
    gpt.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    assert_same_weights(GPT.from_pretrained(tmp_path), gpt)


@pytest.mark.parametrize("first, second, dtype", [(torch.bfloat16, torch.float32, torch.float32),
                                                  (torch.float32, torch.bfloat16, torch.float32),
                                                  (torch.float16, torch.bfloat16, torch.float32)], ids=str)
def test_a_file_of_mixed_dtypes_makes_a_model_of_one_that_holds_both(first, second, dtype, tmp_path):
    gpt = tiny()
    gpt.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda state: state.update(
        {key: tensor.to(first if "norm" in key else second) for key, tensor in state.items()}))
    loaded = GPT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.norm.weight.equal(gpt.norm.weight.to(first).to(dtype))
    assert loaded.head_weight.equal(gpt.head_weight.to(second).to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_as_bfloat16_leaves_the_model_as_it_is(family, tmp_path):
    gpt = tiny(model_type=family)
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    gpt.save_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in gpt.state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.equal(before[name]), name
    settings, rounded = settings_of(tmp_path), gpt.bfloat16()
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"
    assert_same_weights(GPT.from_pretrained(tmp_path), rounded)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert_same_logits(rounded.float(), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def without(prefix: str):
    def edit(state):
        for key in [key for key in state if key.startswith(prefix)]:
            state[key.removeprefix(prefix)] = state.pop(key)
    return edit


def with_buffers(tensor, *keys):
    return lambda state: state.update({key: tensor.clone() for key in keys})


CAUSAL = torch.ones(1, 1, 64, 64).tril()
STORED_OTHERWISE = {  # how → (model, edit of its tensors)
    "gpt2 as on the hub": ("gpt2", without("transformer.")),
    "gpt2 untied without a prefix": ("gpt2 untied", without("transformer.")),
    "gpt_bigcode without a prefix": ("gpt_bigcode", without("transformer.")),
    "llama without a prefix": ("llama", without("model.")),
    "gpt2 with buffers": ("gpt2", with_buffers(CAUSAL, *(f"transformer.h.{i}.attn.bias" for i in range(3)))),
    "gpt2 with masked buffers": ("gpt2", with_buffers(torch.tensor(-1e4), "transformer.h.1.attn.masked_bias")),
    "gpt2 as on the hub with buffers": ("gpt2", lambda state: (
        without("transformer.")(state), with_buffers(CAUSAL, "h.0.attn.bias")(state))),
    "gpt_bigcode with buffers": ("gpt_bigcode", with_buffers(CAUSAL.bool(), "transformer.h.0.attn.bias")),
    "llama with buffers": ("llama", with_buffers(torch.ones(6), *(
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)))),
}


@pytest.mark.parametrize("how", STORED_OTHERWISE)
def test_older_files_are_read(how, tmp_path):
    name, edit = STORED_OTHERWISE[how]
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, edit)
    ours = GPT.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize("name", ["llama", "llama-3 rope", "mistral window", "qwen2", "qwen2 window", "qwen3",
                                  "gpt2 untied", "gpt_bigcode untied", "gpt_bigcode multi-head", "starcoder2 window"])
def test_what_config_json_says_besides_is_kept_and_a_second_save_changes_nothing(name, tmp_path):
    transformers_model(MODELS[name]).save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", bos_token_id=7, eos_token_id=[1, 2], attention_dropout=0.5, ours={"a": [1, None]},
                n_inner=MODELS[name].to_dict().get("n_inner") or 192)
    before, folders = settings_of(tmp_path / "theirs"), [tmp_path / "theirs", tmp_path / "ours", tmp_path / "again"]
    for source, target in zip(folders, folders[1:]):
        GPT.from_pretrained(source).save_pretrained(target)
    saved = settings_of(tmp_path / "ours")
    assert {key: saved.get(key) for key in before} == before
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert GPT.from_pretrained(tmp_path / "ours").config == GPT.from_pretrained(tmp_path / "theirs").config


def test_dtype_converts_what_the_file_holds(tmp_path):
    theirs = transformers_model(MODELS["llama"])
    for parameter in theirs.parameters():
        parameter.data = parameter.data.bfloat16().float()
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda state: state.update({key: tensor.bfloat16() for key, tensor in state.items()}))
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    converted = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    assert_same_logits(converted, theirs)


def test_a_tied_head_that_is_also_in_the_file_is_taken_once(tmp_path):
    gpt = tiny(tie_word_embeddings=True)
    gpt.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.head_weight is loaded.embed_tokens.weight
    assert loaded.head_weight.equal(gpt.head_weight)


def test_loading_and_saving_leave_the_global_random_state(tmp_path):
    before = torch.get_rng_state()
    tiny().save_pretrained(tmp_path)
    torch.set_rng_state(before)
    GPT.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert torch.get_rng_state().equal(before)


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    tiny().save_pretrained(tmp_path)
    gpt, path = GPT.from_pretrained(tmp_path), tmp_path / WEIGHTS
    before = gpt.embed_tokens.weight.clone()
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert gpt.embed_tokens.weight.equal(before)


def test_a_pickle_is_never_opened(tmp_path):
    class Canary:
        def __reduce__(self):
            return open, (str(tmp_path / "unpickled"), "w")

    tiny().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(ValueError, match=WEIGHTS):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "unpickled").exists()


def spoil_tensor(key: str, edit):
    """Damage: a tensor of the file replaced by edit(tensor); dropped if that is None."""
    def change(state):
        tensor = edit(state.pop(key))
        if tensor is not None:
            state[key] = tensor.contiguous()
    return lambda folder: edit_tensors(folder, change)


def one_value(value: float):
    def edit(tensor):
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor
    return edit


def spoil_bytes(name: str, edit):
    """Damage: a file's bytes replaced by edit(bytes)."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def spoil_config(remove=(), **changes):
    return lambda folder: edit_config(folder, remove, **changes)


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
DAMAGE = {  # what is wrong → (how it comes about, what the message names)
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS]),
    "no config": (lambda folder: (folder / CONFIG).unlink(), [CONFIG]),
    "missing tensor": (spoil_tensor(Q, lambda tensor: None), [WEIGHTS, "missing", Q]),
    "missing head": (spoil_tensor("lm_head.weight", lambda tensor: None), [WEIGHTS, "missing", "lm_head.weight"]),
    "unexpected tensor": (lambda folder: edit_tensors(folder, lambda state: state.update(spare=torch.ones(2))),
                          [WEIGHTS, "unexpected", "spare"]),
    "unexpected layer": (spoil_config(num_hidden_layers=1), [WEIGHTS, "unexpected", Q]),
    "too few rows": (spoil_tensor(Q, lambda tensor: tensor[:-1]), [WEIGHTS, Q, "31, 32", "32, 32"]),
    "flat": (spoil_tensor(Q, lambda tensor: tensor.flatten()), [WEIGHTS, Q]),
    "would broadcast": (spoil_tensor(NORM, lambda tensor: tensor[:1]), [WEIGHTS, NORM]),
    "another vocabulary": (spoil_config(vocab_size=29), [WEIGHTS, "model.embed_tokens.weight", "30", "29"]),
    "nan": (spoil_tensor(Q, one_value(float("nan"))), [WEIGHTS, Q]),
    "infinity": (spoil_tensor(NORM, one_value(float("inf"))), [WEIGHTS, NORM]),
    "minus infinity": (spoil_tensor(NORM, one_value(float("-inf"))), [WEIGHTS, NORM]),
    "a tied head that differs": (spoil_config(tie_word_embeddings=True), [WEIGHTS, "lm_head.weight"]),
    "cut weights": (spoil_bytes(WEIGHTS, lambda content: content[:-100]), [WEIGHTS]),
    "cut header": (spoil_bytes(WEIGHTS, lambda content: content[:50]), [WEIGHTS]),
    "empty weights": (spoil_bytes(WEIGHTS, lambda content: b""), [WEIGHTS]),
    "weights of another format": (spoil_bytes(WEIGHTS, lambda content: b"version https://git-lfs" * 9), [WEIGHTS]),
    "cut config": (spoil_bytes(CONFIG, lambda content: content[:40]), [CONFIG]),
    "empty config": (spoil_bytes(CONFIG, lambda content: b""), [CONFIG]),
    "a config that is no text": (spoil_bytes(CONFIG, lambda content: b"\xff\xfe\x00"), [CONFIG]),
    "a config that is a list": (spoil_bytes(CONFIG, lambda content: b"[]"), [CONFIG]),
    "no model_type": (spoil_config(["model_type"]), [CONFIG, "model_type"]),
    "unknown model_type": (spoil_config(model_type="mamba"), [CONFIG, "mamba"]),
    "unknown activation": (spoil_config(hidden_act="relu2"), [CONFIG, "relu2"]),
    "unknown rope_parameters": (spoil_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
                                [CONFIG, "yarn"]),
    "rope_scaling without a value": (spoil_config(["rope_parameters"],
                                                  rope_scaling={"rope_type": "llama3", "factor": 8.0}),
                                     [CONFIG, "low_freq_factor"]),
    "unknown rope_scaling": (spoil_config(["rope_parameters"], rope_scaling={"rope_type": "yarn", "factor": 8.0}),
                             [CONFIG, "yarn"]),
    "unknown rope_scaling of old": (spoil_config(["rope_parameters"], rope_scaling={"type": "linear", "factor": 2}),
                                    [CONFIG, "linear"]),
    "unknown rope_scaling beside none": (spoil_config(rope_parameters=None, rope_scaling={"rope_type": "dynamic",
                                                                                        "factor": 8.0}),
                                         [CONFIG, "dynamic"]),
    "unknown rope_scaling beside the default's rope_parameters": (
        spoil_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                     rope_scaling={"rope_type": "yarn", "factor": 8.0}), [CONFIG, "yarn"]),
    "a negative size": (spoil_config(intermediate_size=-1), [CONFIG, "intermediate_size=-1"]),
    "eight-bit weights": (spoil_tensor(Q, lambda tensor: tensor.to(torch.int8)), [WEIGHTS, Q, "holds"]),
    "eight-bit floats": (spoil_tensor(Q, lambda tensor: tensor.to(torch.float8_e4m3fn)), [WEIGHTS, Q, "holds"]),
    "a layer of integers": (spoil_tensor(NORM, lambda tensor: tensor.long()), [WEIGHTS, NORM, "holds"]),
    "quantised": (spoil_config(quantization_config={"quant_method": "gptq"}), [CONFIG, "quantization_config", "gptq"]),
    "half of each head turned": (spoil_config(partial_rotary_factor=0.5), [CONFIG, "partial_rotary_factor", "0.5"]),
    "half of each head turned, in rope_parameters": (
        spoil_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        [CONFIG, "partial_rotary_factor", "0.5"]),
    "odd heads": (spoil_config(head_dim=9), [CONFIG, "head_dim", "9"]),
    "heads in no groups": (spoil_config(num_key_value_heads=3), [CONFIG, "num_key_value_heads 3"]),
    "no groups at all": (spoil_config(num_key_value_heads=0), [CONFIG]),
    **{f"no {key}": (spoil_config([key]), [CONFIG, key])
       for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_folder_that_is_not_right_is_refused_by_name(what, tmp_path):
    damage, named = DAMAGE[what]
    tiny().save_pretrained(tmp_path)
    GPT.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(tmp_path)
    assert all(text in str(caught.value) for text in [str(tmp_path), *named]), str(caught.value)


@pytest.fixture(scope="module")
def family_folders(tmp_path_factory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        tiny(model_type=family).save_pretrained(folder)
    return folders


PROJECTION = {"gpt2": "transformer.h.1.attn.c_attn.weight", "gpt_bigcode": "transformer.h.1.mlp.c_fc.bias",
              "starcoder2": "model.layers.1.mlp.c_proj.bias", "qwen3": "model.layers.1.self_attn.k_norm.weight",
              "qwen2": "model.layers.1.self_attn.v_proj.bias"}
WRONG = {  # what is wrong with a tensor → (how it comes about, what the message says)
    "missing": (lambda key: spoil_tensor(key, lambda tensor: None), "missing ['KEY'], unexpected []"),
    "unexpected": (lambda key: spoil_tensor("lm_head.weight", lambda tensor: None),
                   "missing ['lm_head.weight'], unexpected []"),
    "one more": (lambda key: lambda folder: edit_tensors(folder, with_buffers(torch.ones(2), key + "s")),
                 "missing [], unexpected ['KEYs']"),
    "mis-shaped": (lambda key: spoil_tensor(key, lambda tensor: tensor[:-1]), "KEY is "),
    "not finite": (lambda key: spoil_tensor(key, one_value(float("nan"))), "KEY holds values that are not finite"),
    "whole numbers": (lambda key: spoil_tensor(key, lambda tensor: tensor.to(torch.int8)), "KEY holds "),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_tensors_are_all_there_and_right(family, what, family_folders, tmp_path):
    key = PROJECTION.get(family, Q)
    spoil, message = WRONG[what]
    shutil.copytree(family_folders[family], tmp_path / "model")
    spoil(key)(tmp_path / "model")
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value) and WEIGHTS in str(caught.value)
    assert message.replace("KEY", key) in str(caught.value), str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
@pytest.mark.parametrize("key, value", [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
                                        ("add_cross_attention", True), ("activation_function", "quick_gelu")])
def test_a_setting_that_makes_it_another_network_is_refused(key, value, family, family_folders, tmp_path):
    shutil.copytree(family_folders[family], tmp_path / "model")
    edit_config(tmp_path / "model", **{key: value})
    with pytest.raises(ValueError, match=f"{'hidden_act' if 'act' in key[:3] else key} {value!r}".replace("'", ".")):
        GPT.from_pretrained(tmp_path / "model")


OF_OTHERS = {  # family → settings that other families have, which transformers does not read for it
    "llama": dict(sliding_window=8, use_sliding_window=True),
    "mistral": dict(attention_bias=True, mlp_bias=True),
    "qwen2": dict(attention_bias=False, mlp_bias=True),
    "qwen3": dict(mlp_bias=True),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), dict(attention_bias=False, mlp_bias=False, head_dim=16, rope_theta=5.0,
                                                  sliding_window=8, use_sliding_window=True)),
    "starcoder2": dict(attention_bias=False, mlp_bias=False, rms_norm_eps=0.5),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_setting_that_only_other_families_have_changes_nothing(family, family_folders, tmp_path):
    shutil.copytree(family_folders[family], tmp_path / "model")
    before = GPT.from_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", **OF_OTHERS[family])
    after = GPT.from_pretrained(tmp_path / "model")
    assert after.config == before.config
    assert_same_weights(after, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_setting_of_null_is_as_if_it_were_left_out(family, family_folders, tmp_path):
    shutil.copytree(family_folders[family], tmp_path / "model")
    config = GPT.from_pretrained(tmp_path / "model").config
    edit_config(tmp_path / "model", quantization_config=None, rope_scaling=None, rope_parameters=None,
                partial_rotary_factor=None, sliding_window=None, layer_types=None)
    model = GPT.from_pretrained(tmp_path / "model")
    assert model.config == config
    model.save_pretrained(tmp_path / "saved")
    assert GPT.from_pretrained(tmp_path / "saved").config == config


# ----------------------------------------------- Shards ------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama tied", "qwen3", "gpt2", "gpt_bigcode multi-head", "starcoder2"])
def test_transformers_shards_are_read_as_the_whole(name, tmp_path):
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    sharded = GPT.from_pretrained(tmp_path / "shards")
    assert_same_weights(sharded, GPT.from_pretrained(tmp_path / "whole"))
    assert_same_logits(sharded, theirs)


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def write_index(folder: Path, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def split(folder: Path):
    """A saved model's weights in two shards with an index."""
    state = load_file(folder / WEIGHTS)
    weight_map = {key: FIRST if i < 5 else SECOND for i, key in enumerate(sorted(state))}
    for shard in (FIRST, SECOND):
        save_file({key: state[key] for key in state if weight_map[key] == shard}, folder / shard)
    (folder / WEIGHTS).unlink()
    write_index(folder, weight_map)


def renamed(change):
    """Damage: the index's second shard is named change(folder), and lies there."""
    def damage(folder):
        target = Path(folder, change(folder))
        target.parent.mkdir(exist_ok=True)
        (folder / SECOND).rename(target)
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        write_index(folder, {key: change(folder) if shard == SECOND else shard for key, shard in weight_map.items()})
    return damage


def in_both_shards(edit):
    """Damage: a tensor of the second shard is in the first too, as edit(tensor)."""
    def damage(folder):
        state = load_file(folder / FIRST)
        save_file({**state, NORM: edit(load_file(folder / SECOND)[NORM])}, folder / FIRST)
    return damage


SHARDS = {  # what is wrong with the shards → (how it comes about, what the message names)
    "a shard missing": (lambda folder: (folder / SECOND).unlink(), [SECOND, INDEX]),
    "no index": (lambda folder: (folder / INDEX).unlink(), [WEIGHTS, "index"]),
    "above the folder": (renamed(lambda folder: "../above.safetensors"), ["../above.safetensors", INDEX]),
    "below the folder": (renamed(lambda folder: "sub/below.safetensors"), ["sub/below.safetensors", INDEX]),
    "by an absolute path": (renamed(lambda folder: str(folder.parent / "away" / SECOND)), ["away", INDEX]),
    "a folder": (lambda folder: write_index(folder, {NORM: ".."}), ["..", INDEX]),
    "itself": (lambda folder: write_index(folder, {NORM: ""}), [INDEX]),
    "no shards": (lambda folder: write_index(folder, {}), ["missing", "norm.weight"]),
    "a list": (lambda folder: write_index(folder, [FIRST, SECOND]), [INDEX]),
    "numbers": (lambda folder: write_index(folder, {NORM: 1}), [INDEX]),
    "lists": (lambda folder: write_index(folder, {NORM: [FIRST]}), [INDEX]),
    "nothing": (lambda folder: write_index(folder, None), [INDEX]),
    "no weight_map": (spoil_bytes(INDEX, lambda content: b"{}"), [INDEX, "weight_map"]),
    "an index that is a list": (spoil_bytes(INDEX, lambda content: b"[]"), [INDEX]),
    "an index that is null": (spoil_bytes(INDEX, lambda content: b"null"), [INDEX]),
    "a cut index": (spoil_bytes(INDEX, lambda content: content[:-9]), [INDEX]),
    "an index that is no text": (spoil_bytes(INDEX, lambda content: b"\xff\xfe\x00"), [INDEX]),
    "an empty index": (spoil_bytes(INDEX, lambda content: b""), [INDEX]),
    "a shard not named": (lambda folder: write_index(folder, {NORM: SECOND}), ["missing", SECOND]),
    "a cut shard": (spoil_bytes(SECOND, lambda content: content[:-100]), [SECOND]),
    "a tensor that differs": (in_both_shards(lambda tensor: tensor + 1), [FIRST, SECOND, NORM]),
    "a tensor of two shapes": (in_both_shards(lambda tensor: tensor[:-1]), [FIRST, SECOND, NORM]),
    "a tensor that is not finite": (lambda folder: save_file(
        {key: one_value(float("nan"))(tensor) if key == NORM else tensor
         for key, tensor in load_file(folder / SECOND).items()}, folder / SECOND), [SECOND, NORM]),
}


@pytest.mark.parametrize("what", SHARDS)
def test_shards_that_are_not_right_are_refused_by_name(what, tmp_path):
    damage, named = SHARDS[what]
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    split(folder)
    GPT.from_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(folder)
    assert all(text in str(caught.value) for text in [str(tmp_path), *named]), str(caught.value)


def test_a_tensor_that_is_the_same_in_two_shards_is_taken(tmp_path):
    gpt = tiny()
    gpt.save_pretrained(tmp_path)
    split(tmp_path)
    in_both_shards(torch.clone)(tmp_path)
    assert_same_weights(GPT.from_pretrained(tmp_path), gpt)


# ----------------------------------------------- Some of the layers ------------------------------------------------


@pytest.mark.parametrize("layers", range(1, 10))
def test_layers_are_kept_evenly_spaced_the_first_and_the_last_among_them(layers, tmp_path):
    gpt = tiny(num_hidden_layers=9)
    for i, layer in enumerate(gpt.layers):
        layer.input_layernorm.weight.data.fill_(i)
    gpt.save_pretrained(tmp_path)
    pruned = GPT.from_pretrained(tmp_path, layers=layers)
    kept = [int(layer.input_layernorm.weight[0]) for layer in pruned.layers]
    steps = [after - before for before, after in zip(kept, kept[1:])]
    assert len(kept) == layers == pruned.config.num_hidden_layers and kept[0] == 0
    if layers > 1:
        assert kept[-1] == 8 and 1 <= max(steps) <= min(steps) + 1
    gpt.layers = torch.nn.ModuleList(gpt.layers[i] for i in kept)
    assert_same_weights(pruned, gpt)


def test_all_layers_are_the_whole_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    whole = GPT.from_pretrained(tmp_path)
    assert_same_weights(GPT.from_pretrained(tmp_path, layers=2), whole)
    assert GPT.from_pretrained(tmp_path, layers=2).config == whole.config


@pytest.mark.parametrize("layers", [-1, 0, 3])
def test_a_number_of_layers_that_it_does_not_have_is_refused(layers, tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"layers.{layers}.*2 layers"):
        GPT.from_pretrained(tmp_path, layers=layers)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen2 window", "gpt_bigcode multi-head",
                                  "starcoder2 window"])
def test_some_of_the_layers_open_in_transformers(name, layers, tmp_path):
    transformers_model(MODELS[name]).save_pretrained(tmp_path / "theirs")
    assert ("layer_types" in settings_of(tmp_path / "theirs")) == ("qwen" in name)
    pruned = GPT.from_pretrained(tmp_path / "theirs", layers=layers)
    pruned.save_pretrained(tmp_path / "ours")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and back.config.num_hidden_layers == layers
    assert_same_logits(pruned, back)
    assert_same_weights(GPT.from_pretrained(tmp_path / "ours"), pruned)


@pytest.mark.parametrize("what", ["missing", "one more", "mis-shaped", "whole numbers"])
def test_a_layer_that_is_not_kept_is_checked_too(what, tmp_path):
    tiny(num_hidden_layers=3).save_pretrained(tmp_path)
    assert len(GPT.from_pretrained(tmp_path, layers=2).layers) == 2
    WRONG[what][0](Q)(tmp_path)
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(tmp_path, layers=2)
    assert WRONG[what][1].replace("KEY", Q) in str(caught.value)


# ----------------------------------------------- Memory ------------------------------------------------------------

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
@pytest.mark.parametrize("dtype, layers", [(torch.float32, 6), (torch.bfloat16, 16)], ids=str)
def test_loading_takes_hardly_more_memory_than_the_model(dtype, layers, tmp_path):
    tiny().save_pretrained(tmp_path / "small")
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=24576, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers,
                            num_attention_heads=8, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True))
    gpt = gpt.to(dtype).to_empty(device="cpu")
    for parameter in gpt.parameters():
        parameter.data.fill_(1)
    assert 1.8e8 < sum(p.numel() * p.element_size() for p in gpt.parameters()) < 2.2e8
    gpt.save_pretrained(tmp_path / "large")
    result = subprocess.run([sys.executable, "-c", LOADS, tmp_path / "small", tmp_path / "large"], capture_output=True,
                            text=True, cwd=Path(model_program.__file__).parent)
    (tmp_path / "large" / WEIGHTS).unlink()
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < 1.35


# ----------------------------------------------- Generation --------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_takes_the_likeliest_token_each_time():
    gpt, prompt = tiny(), tokens(30, 3, 4)
    idx = prompt
    for _ in range(9):
        idx = torch.cat((idx, gpt(idx)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert gpt.generate(prompt, 9, temperature=0).equal(idx)
    assert gpt.generate(prompt, 9, top_k=1, generator=seeded(0)).equal(idx)


def test_draws_follow_the_softmax_at_the_temperature():
    gpt, prompt = tiny(), tokens(30, 1, 4).expand(20000, -1)
    drawn = gpt.generate(prompt, 1, temperature=1.5, generator=seeded(0))[:, -1]
    share = drawn.bincount(minlength=30) / len(drawn)
    expected = (gpt(prompt[:1])[0, -1] / 1.5).softmax(dim=-1)
    assert (share - expected).abs().max() < 5 * 0.5 / len(drawn) ** 0.5


def test_top_k_draws_from_the_k_likeliest():
    gpt, prompt = tiny(), tokens(30, 1, 4).expand(500, -1)
    drawn = gpt.generate(prompt, 1, temperature=5.0, top_k=3, generator=seeded(0))[:, -1]
    assert set(drawn.tolist()) == set(gpt(prompt[:1])[0, -1].topk(3).indices.tolist())


@pytest.mark.parametrize("how", [dict(temperature=0), dict(), dict(top_k=4), dict(top_k=1000)], ids=str)
def test_padded_ids_are_never_drawn(how):
    gpt, prompt = tiny(vocab_size=40), tokens(30, 4, 4)
    gpt.lm_head.weight.data[30:] *= 1000
    drawn = gpt.generate(prompt, 12, generator=seeded(0), vocab_size=30, **how)[:, 4:]
    assert drawn.max() < 30
    assert gpt.generate(prompt, 12, generator=seeded(0))[:, 4:].max() >= 30  # as they would have been


def test_a_generator_decides_the_draws_and_the_global_one_is_not_touched():
    gpt, prompt, before = tiny(), tokens(30, 2, 4), torch.get_rng_state()
    first, again, other = (gpt.generate(prompt, 20, generator=seeded(seed)) for seed in (5, 5, 6))
    assert first.equal(again) and not first.equal(other)
    assert torch.get_rng_state().equal(before)


def test_generation_ends_once_every_row_has_drawn_eot():
    gpt, prompt = tiny(vocab_size=6), tokens(6, 2, 4)
    whole = gpt.generate(prompt, 20, temperature=3.0, generator=seeded(0))
    assert whole.shape == (2, 24)
    for eot in range(6):
        first = [(row == eot).nonzero()[0].item() if eot in row else 19 for row in whole[:, 4:]]
        ended = gpt.generate(prompt, 20, temperature=3.0, generator=seeded(0), eot=eot)
        assert ended.equal(whole[:, :4 + max(first) + 1])


@pytest.mark.parametrize("changes", [dict(max_position_embeddings=8),
                                     dict(max_position_embeddings=8, model_type="gpt2"),
                                     dict(sliding_window=8, model_type="mistral")], ids=str)
def test_a_context_longer_than_the_positions_is_cropped_from_the_left(changes):
    gpt, prompt = tiny(**changes), tokens(30, 2, 13)
    idx = prompt
    for _ in range(3):
        idx = torch.cat((idx, gpt(idx[:, -8:])[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert gpt.generate(prompt, 3, temperature=0).equal(idx)


# ----------------------------------------------- The program -------------------------------------------------------


def save_bytes_tokenizer(folder: Path):
    tokenizer = load_tokenizer("bytes")
    entry = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "eot", "eot_token", "fingerprint")}
    save_tokenizer(folder, SimpleNamespace(tokenizer={**entry, "files": []}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model of the bytes tokenizer, with two padded rows."""
    folder, gpt = tmp_path_factory.mktemp("model"), tiny(vocab_size=259)
    gpt.lm_head.weight.data[257:] *= 1000
    gpt.save_pretrained(folder)
    save_bytes_tokenizer(folder)
    return folder


def test_the_program_continues_a_prompt_and_a_seed_decides_how(folder, tmp_path, run_main):
    arguments = [f"--model={folder}", "--prompt=Grüße <|endoftext|>", "--max_new_tokens=30", "--temperature=1.5"]
    program = Path(model_program.__file__).resolve()
    result = subprocess.run([sys.executable, program, *arguments, "--seed=3"], cwd=tmp_path, capture_output=True,
                            env={**os.environ, "PYTHONUTF8": "1"})
    assert result.returncode == 0, result.stderr
    output = result.stdout.decode()
    assert output.startswith("Grüße <|endoftext|>") and len(output) > 25
    assert run_main(model_program, *arguments, "--seed=3") == (0, output, "")
    assert run_main(model_program, *arguments, "--seed=4")[1] != output


def test_the_program_takes_a_tokenizer_where_the_folder_has_none(tmp_path, run_main):
    tiny(vocab_size=257).save_pretrained(tmp_path)
    arguments = [f"--model={tmp_path}", "--prompt=abc", "--max_new_tokens=5"]
    status, _, message = run_main(model_program, *arguments)
    assert status == 2 and "--tokenizer" in message and str(tmp_path) in message
    status, output, _ = run_main(model_program, *arguments, "--tokenizer=bytes")
    assert status == 0 and output.startswith("abc")


@pytest.mark.parametrize("arguments, named", [
    ([], ["--model", "--prompt"]),
    (["--promt=a"], ["--promt=a", "--prompt"]),
    (["--model=FOLDER", "--prompt="], ["--prompt"]),
    (["--model=FOLDER/nowhere", "--prompt=a"], ["--model=FOLDER/nowhere"]),
    (["--model=FOLDER", "--prompt=a", "--max_new_tokens=0", "--top_k=0", "--temperature=-1"],
     ["--max_new_tokens=0", "--top_k=0", "--temperature=-1"]),
    (["--model=FOLDER", "--prompt=a", "--temperature=nan"], ["--temperature=nan"]),
    (["--model=FOLDER", "--prompt=a", "--max_new_tokens=many"], ["--max_new_tokens=many"]),
    (["--model=FOLDER", "--prompt=a", "--device=abacus"], ["--device=abacus"]),
    (["--model=FOLDER", "--prompt=a", "--device=cpu:1"], ["--device=cpu:1", "cpu:0"]),
    (["--model=FOLDER", "--prompt=a", "--tokenizer=bytes", "--eot=none such"], ["--eot=none such"]),
    (["--model=FOLDER", "--prompt=a", "--eot=none such"], ["--eot=none such"]),
    (["--model=FOLDER", "--prompt=a", "--tokenizer=none such"], ["--tokenizer=none such"]),
    (["--model=BROKEN", "--prompt=a"], [CONFIG]),
    (["--model=SMALL", "--prompt=z", "--tokenizer=bytes"], ["30", "257"]),  # rows and ids
])
def test_the_programs_errors_are_a_message_and_status_2(arguments, named, folder, tmp_path, run_main):
    tiny().save_pretrained(tmp_path / "small")
    tiny().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / CONFIG).write_text("{")
    save_bytes_tokenizer(tmp_path / "broken")
    for name, path in (("FOLDER", folder), ("BROKEN", tmp_path / "broken"), ("SMALL", tmp_path / "small")):
        arguments, named = ([text.replace(name, str(path)) for text in texts] for texts in (arguments, named))
    status, _, message = run_main(model_program, *arguments)
    assert status == 2 and all(text in message for text in named), message


def test_kept_layers_reach_the_loss_behind_hidden_and_head():
    model, idx = GPT(GPTConfig.scratch(3, 32, 50, 16)), torch.arange(8)[None]
    hidden, head, first, last = model(idx, loss_fn=lambda *given: given, keep=(0, 2))
    assert head is model.head_weight and first.shape == last.shape == (1, 8, 32) and not first.equal(last)
    torch.testing.assert_close(model.norm(last), hidden)
    assert model(idx, loss_fn=lambda *given: len(given)) == 2


def test_a_gpu_that_torch_cannot_use_is_not_taken(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.mps.device_count", lambda: 0)
    assert resolve_device("auto").type == "cpu"
