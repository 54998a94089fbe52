"""The model: transformers' logits in both directions, strict folders, generation, and the program."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, GPT2Config, GPTBigCodeConfig, LlamaConfig, MistralConfig, Qwen2Config,
                          Qwen3Config, Starcoder2Config)

import model as model_program
from data import load_tokenizer, save_tokenizer
from model import GPT, GPTConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"

LLAMA = dict(vocab_size=67, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=64, rms_norm_eps=1e-2)
GPT2 = dict(vocab_size=67, n_embd=48, n_layer=3, n_head=4, n_positions=64, layer_norm_epsilon=1e-2)
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
    "llama-3 rope": LlamaConfig(**LLAMA, rope_parameters=dict(
        rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32)),
    "mistral": MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=None),
    "mistral window": MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=24),
    "qwen2": Qwen2Config(**LLAMA, num_key_value_heads=2),
    "qwen2 tied": Qwen2Config(**LLAMA, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=1e6),
    "qwen3": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=20),
    "qwen3 bias": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=12, attention_bias=True),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied": GPT2Config(**GPT2, n_inner=100, tie_word_embeddings=False, activation_function="gelu"),
    "gpt_bigcode": GPTBigCodeConfig(**GPT2),
    "gpt_bigcode multi-head": GPTBigCodeConfig(**GPT2, multi_query=False, tie_word_embeddings=False),
    "starcoder2": Starcoder2Config(**STARCODER2),
    "starcoder2 no bias": Starcoder2Config(**STARCODER2, use_bias=False, sliding_window=24, tie_word_embeddings=False),
}


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
    return randomised(GPT(GPTConfig(**{**values, **changes})))


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs):
    idx = tokens(ours.config.vocab_size, 2, 24)
    expected = theirs(idx).logits
    torch.testing.assert_close(ours(idx), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def edit_config(folder: Path, remove=(), **changes):
    path = folder / CONFIG
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps({**settings, **changes}))


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


def test_rope_theta_and_dtype_are_written_for_both_transformers_versions(tmp_path):
    tiny(rope_theta=500000.0).to(torch.bfloat16).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 500000.0
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
                                 "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"])
def test_a_key_that_is_left_out_has_transformers_default(key, tmp_path):
    transformers_model(LlamaConfig(**{**LLAMA, "rms_norm_eps": 1e-6})).save_pretrained(tmp_path)
    edit_config(tmp_path, remove=(key,))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.rms_norm_eps == theirs.config.rms_norm_eps
    assert ours.config.max_position_embeddings == theirs.config.max_position_embeddings
    assert_same_logits(ours, theirs)


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


# ----------------------------------------------- Folders -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_is_equal_to_the_bit(tied, dtype, tmp_path):
    gpt = tiny(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, rope_theta=500000.0).to(dtype)
    gpt.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == gpt.config
    state, expected = loaded.state_dict(), gpt.state_dict()
    assert list(state) == list(expected)
    for name in expected:
        assert state[name].dtype == dtype and state[name].equal(expected[name]), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())


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


def test_a_context_longer_than_the_positions_is_cropped_from_the_left():
    gpt, prompt = tiny(max_position_embeddings=8), tokens(30, 2, 13)
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
