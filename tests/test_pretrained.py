"""End to end: text and a tokenizer.json, a teacher and a student as transformers saves them, to an exported student."""

import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_lines
from safetensors import safe_open
from safetensors.torch import load_file

import distill
from data import TOKENIZER_FILES, TokenBins, bytes_settings, load_tokenizer
from distill import distillation_loss, resolve_config, train
from model import GPT, GPTConfig
from sample_mixture import MixtureSampler

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
IDS, STUDENT_ROWS, TEACHER_ROWS = 146, 152, 160  # as Qwen1.5's 151,646, 151,936 and 152,064
EOT = 144
WORDS = {"code": "def return while print self for in range list dict", "prose": "the cat sat on a mat and ate fish",
         "sums": "one two three four plus minus times equals"}
COUNTS = {"code": 40, "prose": 25, "sums": 16}


def program(name: str, *arguments) -> str:
    """Run one of the four files as a user would; what it printed."""
    done = subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    rng = random.Random(0)
    return {name: [" ".join(rng.choices(WORDS[name].split(), k=60)) + f"\n{name}" for _ in range(count)]
            for name, count in COUNTS.items()}


@pytest.fixture(scope="module")
def settings(texts) -> dict:
    """A tokenizer.json: a byte-level BPE with two special tokens behind its vocabulary, as Qwen's."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    sample = [text for domain in texts.values() for text in domain]
    bpe.train_from_iterator(sample + ["".join(map(chr, range(97, 123))) * 3 + " ".join(map(str, range(100, 200)))],
                            tokenizers.trainers.BpeTrainer(vocab_size=EOT, show_progress=False))
    bpe.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    assert bpe.get_vocab_size() == IDS and bpe.token_to_id("<|endoftext|>") == EOT
    return json.loads(bpe.to_str())


def save_tokenizer_files(folder: Path, settings: dict, **how):
    (folder / "tokenizer.json").write_text(json.dumps(settings, **how), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}, **how))


def save_model(folder: Path, family: str, seed: int, **sizes) -> Path:
    """A random model of `family` as transformers saves it, in shards; biases and norms are not 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


LLAMA_LIKE = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=64)
GPT_LIKE = dict(n_embd=32, n_head=4, n_positions=64)
SIZES = {"qwen2": (dict(LLAMA_LIKE, num_hidden_layers=3), dict(LLAMA_LIKE, hidden_size=16, num_hidden_layers=2)),
         "gpt2": (dict(GPT_LIKE, n_layer=3), dict(GPT_LIKE, n_layer=2)),
         "gpt_bigcode": (dict(GPT_LIKE, n_layer=2), dict(GPT_LIKE, n_layer=2, multi_query=False))}


@pytest.fixture(scope="module")
def models(tmp_path_factory, settings):
    """A function that makes the folders of a teacher and a student of a family, once for each kind."""
    made = {}

    def make(family: str = "qwen2", tied: bool = False) -> tuple[Path, Path]:
        if (family, tied) not in made:
            root, (teacher, student) = tmp_path_factory.mktemp(family), SIZES[family]
            made[family, tied] = folders = (
                save_model(root / "teacher", family, 1, vocab_size=TEACHER_ROWS, tie_word_embeddings=tied, **teacher),
                save_model(root / "student", family, 2, vocab_size=STUDENT_ROWS, tie_word_embeddings=not tied,
                           **student))
            save_tokenizer_files(folders[0], settings, indent=1, ensure_ascii=False)
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in settings["model"]["merges"]]
            vocab = dict(reversed(settings["model"]["vocab"].items()))
            otherwise = {**settings["model"], "merges": merges, "vocab": vocab}
            save_tokenizer_files(folders[1], {**settings, "model": otherwise}, indent=2)
            assert (folders[0] / "tokenizer.json").read_bytes() != (folders[1] / "tokenizer.json").read_bytes()
        return made[family, tied]
    return make


@pytest.fixture(scope="module")
def bins(tmp_path_factory, texts, models) -> Path:
    """Made by the program, of a .jsonl.gz, a .parquet and a .jsonl, with the teacher's tokenizer."""
    raw = tmp_path_factory.mktemp("raw")
    with gzip.open(raw / "code.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts["code"])
    pq.write_table(pa.table({"text": texts["prose"]}), raw / "prose.parquet")
    (raw / "sums.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts["sums"]))
    folder = raw / "bins"
    program("data.py", f"--out_dir={folder}", f"--tokenizer={models()[0]}", "--val_fraction=0.2",
            *(f"{name}={raw}/{name}.*" for name in texts))
    return folder


def arguments(bins: Path, teacher: Path | str, student: Path | str, **given) -> dict:
    return {**dict(data_dir=str(bins), teacher=str(teacher), student=str(student), block_size=24, batch_size=8,
                   val_samples=4, interval=2, max_steps=4, lr=3e-3, min_lr=3e-4, warmup_steps=1, save_every=2, keep=0,
                   device="cpu"), **given}


@pytest.fixture(scope="module")
def run(bins, models, tmp_path_factory) -> Path:
    """A run's folder: four steps of DDK by the program."""
    out_dir = tmp_path_factory.mktemp("run") / "ddk"
    program("distill.py", *(f"--{key}={value}" for key, value in arguments(bins, *models(), out_dir=out_dir).items()))
    return out_dir


def open_in_transformers(folder: Path):
    """The model, of whose tensors none is missing, unexpected or reshaped."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def some_ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(IDS, (rows, 20), generator=torch.Generator().manual_seed(0))


def assert_same_logits(folder: Path):
    with torch.no_grad():
        ours = GPT.from_pretrained(folder, torch.float32)(some_ids())
        theirs = open_in_transformers(folder).float()(some_ids()).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def val_windows(bins: Path, name: str, block_size: int = 24, count: int = 4) -> torch.Tensor:
    ids = np.fromfile(bins / f"{name}.val.bin", dtype="<u2").astype(np.int64)
    return torch.from_numpy(np.stack([ids[i * block_size:(i + 1) * block_size + 1] for i in range(count)]))


# ----------------------------------------------- From text to an exported student ------------------------------------


def test_the_bins_hold_the_texts_of_every_format(bins, texts, settings):
    bpe = tokenizers.Tokenizer.from_str(json.dumps(settings))
    for name, domain in texts.items():
        documents = []
        for side in ("train", "val"):
            ids = np.fromfile(bins / f"{name}.{side}.bin", dtype="<u2")
            assert ids.max() == ids[-1] == EOT
            documents += [bpe.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == EOT))]
        assert sorted(filter(None, documents)) == sorted(domain)


def test_the_student_opens_in_transformers_with_our_logits(run):
    assert_same_logits(run / "step_00000004")
    assert open_in_transformers(run / "step_00000004").get_input_embeddings().num_embeddings == STUDENT_ROWS


def test_the_students_tokenizer_is_the_teachers_to_the_byte(run, bins, models, settings, texts):
    folder, (teacher, _) = run / "step_00000004", models()
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (folder / name).read_bytes() == (bins / name).read_bytes() == (teacher / name).read_bytes()
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    bpe = tokenizers.Tokenizer.from_str(json.dumps(settings))
    for text in (domain[0] for domain in texts.values()):
        assert opened(text)["input_ids"] == bpe.encode(text).ids
    assert opened.eos_token_id == EOT
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == EOT
    assert open_in_transformers(folder).generation_config.eos_token_id == EOT


def test_perplexities_are_transformers_over_the_tokenizers_ids(run, bins, models):
    first, last = (read_lines(run, "mixture")[i]["domains"] for i in (0, -1))
    for folder, measured, key in ((models()[0], first, "teacher_ppl"), (models()[1], first, "student_ppl"),
                                  (models()[0], last, "teacher_ppl"), (run / "step_00000004", last, "student_ppl")):
        model = open_in_transformers(folder)
        for name in WORDS:
            windows = val_windows(bins, name)
            with torch.no_grad():
                logits = model(windows).logits[:, :-1, :IDS].double()
            wanted = math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())
            assert measured[name][key] == pytest.approx(wanted, rel=1e-4), (key, name)
            whole = F.cross_entropy(model(windows).logits[:, :-1].double().flatten(0, 1), windows[:, 1:].flatten())
            assert abs(math.exp(whole.item()) / wanted - 1) > 1e-3  # the padded rows would have told


def test_the_first_steps_loss_is_transformers_too(run, bins, models):
    """CE over the student's 152 rows, the divergence over the tokenizer's 146 ids."""
    held = TokenBins(bins, 24)
    batch = torch.from_numpy(held.train_windows(*MixtureSampler(held.n_windows, 8, 0).next_batch()))
    with torch.no_grad():
        teacher, student = (open_in_transformers(folder)(batch[:, :-1]).logits.double() for folder in models())
    ce = F.cross_entropy(student.flatten(0, 1), batch[:, 1:].flatten()).item()
    p, q = (logits[..., :IDS].log_softmax(dim=-1) for logits in (teacher, student))
    kl = (p.exp() * (p - q)).sum(dim=-1).mean().item()
    step = read_lines(run, "train")[0]
    assert [step["ce"], step["kl"], step["loss"]] == pytest.approx([ce, kl, ce + 0.2 * kl], rel=1e-4)


def test_the_parameters_logged_are_transformers(run, models):
    counted = [open_in_transformers(folder).num_parameters() for folder in models()]
    assert list(read_lines(run, "run")[0]["parameters"].values()) == counted


def assert_as_the_fp32_run(run: Path, other: Path):
    for kind in ("train", "mixture", "end"):
        for ours, theirs in zip(read_lines(run, kind), read_lines(other, kind), strict=True):
            for key in {"step", "loss", "kl", "grad_norm", "r"} & set(ours):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (kind, key)


def test_a_bf16_export_rounds_the_file_and_not_the_training(run, bins, models, tmp_path):
    config = resolve_config(**arguments(bins, *models(), export_dtype="bf16", out_dir=str(tmp_path / "straight")))
    folder = train(config)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}
    written = json.loads((folder / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert_same_logits(folder)
    exact = load_file(run / "step_00000004" / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor.float(), exact[name], rtol=2**-8, atol=1e-5)
    assert_as_the_fp32_run(run, tmp_path / "straight")

    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "step_00000004")  # as if it had been stopped after the step 2 was saved
    resumed = train(resolve_config(**arguments(bins, *models(), export_dtype="bf16",
                                               out_dir=str(tmp_path / "resumed"))))
    assert read_lines(tmp_path / "resumed") == read_lines(tmp_path / "straight")
    for name in ("model.safetensors", "config.json", "optimizer.pt"):
        assert (resumed / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_student_of_the_teachers_layers_starts_as_they_are_and_resumes_as_it_is(bins, models, tmp_path, tied):
    teacher, _ = models("qwen2", tied)
    folder = train(resolve_config(**arguments(bins, teacher, "layers:2", max_steps=0, out_dir=str(tmp_path / "start"))))
    whole, kept = open_in_transformers(teacher).state_dict(), open_in_transformers(folder).state_dict()
    for name, tensor in kept.items():
        assert tensor.equal(whole[name.replace("layers.1.", "layers.2.")]), name  # the first and the last of three
    assert {name.split(".")[2] for name in kept if ".layers." in name} == {"0", "1"}
    folder = train(resolve_config(**arguments(bins, teacher, "layers:2", out_dir=str(tmp_path / "run"))))
    assert_same_logits(folder)
    losses = [line["loss"] for line in read_lines(tmp_path / "run", "train")]
    assert len(losses) == 4 and losses[-1] < losses[0]

    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "step_00000004")
    resumed = train(resolve_config(**arguments(bins, teacher, "layers:2", out_dir=str(tmp_path / "resumed"))))
    assert read_lines(tmp_path / "resumed") == read_lines(tmp_path / "run")
    assert (resumed / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_other_families_are_distilled_and_exported(bins, models, tmp_path, family):
    folder = train(resolve_config(**arguments(bins, *models(family), max_steps=2, out_dir=str(tmp_path / "run"))))
    assert_same_logits(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    assert not open_in_transformers(folder).get_output_embeddings().weight.equal(
        open_in_transformers(models(family)[1]).get_output_embeddings().weight)
    assert all(line["kl"] > 0 for line in read_lines(tmp_path / "run", "train"))


# ----------------------------------------------- Bytes ----------------------------------------------------------------


def test_a_bytes_student_opens_in_transformers_and_its_ids_are_the_bytes(teacher):
    opened = transformers.AutoTokenizer.from_pretrained(teacher)
    for text in ("def f(x):\n\treturn x  # é ∀ 🙂\r\n", " two  spaces ", "".join(map(chr, range(1, 0x250)))):
        assert opened(text)["input_ids"] == list(text.encode())
        assert opened.decode(list(text.encode())) == text
    assert opened.eos_token_id == 256 and opened.convert_ids_to_tokens(256) == "<|endoftext|>"
    assert json.loads((teacher / "generation_config.json").read_text())["eos_token_id"] == 256
    assert_same_logits(teacher)


def test_a_bytes_student_has_the_fingerprint_of_bytes_in_either_form(teacher):
    opened, named = load_tokenizer(teacher), load_tokenizer("bytes")
    assert (opened.fingerprint, opened.vocab_size, opened.eot, opened.eot_token) == (
        named.fingerprint, named.vocab_size, named.eot, named.eot_token)
    assert json.loads((teacher / "tokenizer.json").read_text()) == bytes_settings()
    text = "<|endoftext|> in a text is text\0\x7f\u0100"
    assert opened.encode_batch([text])[0].tolist() == named.encode_batch([text])[0].tolist() == list(text.encode())


# ----------------------------------------------- Padded vocabularies --------------------------------------------------


@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_padded_row_of_the_students_head_gets_the_gradient_of_ce_alone(chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(rows, 6, dtype=torch.float64, generator=generator) for rows in (10, 16, 10, 20))
    targets = torch.randint(13, (10,), generator=generator)

    def head_gradient(gamma, teacher_head):
        leaf = head.clone().requires_grad_()
        distillation_loss(hidden, leaf, teacher_hidden, teacher_head, targets, gamma=gamma, vocab_size=13,
                          chunk_size=chunk_size)[0].backward()
        return leaf.grad

    alone, both = head_gradient(0.0, teacher_head), head_gradient(0.5, teacher_head)
    torch.testing.assert_close(both[13:], alone[13:], rtol=1e-12, atol=0)
    assert (both[:13] - alone[:13]).abs().min() > 1e-6
    teacher_head[13:] *= 1000
    assert head_gradient(0.5, teacher_head).equal(both)


def test_the_teachers_padded_rows_change_nothing_in_a_run(bins, models, tmp_path):
    (teacher, student), lines = models(), []
    for role, scale in (("as it is", 1), ("huge", 1e4)):
        model = GPT.from_pretrained(teacher)
        model.head_weight.data[IDS:] *= scale
        model.requires_grad_(False).save_pretrained(tmp_path / role)
        train(resolve_config(**arguments(bins, tmp_path / role, student, out_dir=str(tmp_path / "run" / role))))
        lines.append(read_lines(tmp_path / "run" / role)[1:])
    assert lines[0] == lines[1]


def test_continuations_never_show_a_padded_id(bins, models, tmp_path, monkeypatch, capsys):
    model, drawn, original = GPT.from_pretrained(models()[0]), [], GPT.generate
    model.head_weight.data[IDS:] *= 1000
    model.requires_grad_(False).save_pretrained(tmp_path)
    distill.save_tokenizer(tmp_path, TokenBins(bins, 24))
    monkeypatch.setattr(GPT, "generate", lambda self, idx, *rest, **how: drawn.append(
        original(self, idx, *rest, **how)) or drawn[-1])
    distill.show_continuations(resolve_config(**arguments(bins, tmp_path, tmp_path)), tmp_path)
    assert drawn[0].shape == (3, 24 + 1 + 96) and drawn[0].max() < IDS
    printed = capsys.readouterr().out
    assert all(f"  {name}: " in printed for name in WORDS)


def test_a_scratch_student_has_as_many_rows_as_the_tokenizer_has_ids(bins, models, tmp_path):
    folder = train(resolve_config(**arguments(bins, models()[0], "scratch:1x32", max_steps=1,
                                              out_dir=str(tmp_path / "run"))))
    assert GPT.from_pretrained(folder).config == GPTConfig.scratch(1, 32, IDS, 24)
