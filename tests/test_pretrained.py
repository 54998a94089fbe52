"""End to end: text and a tokenizer.json, a teacher and a student as transformers saves them, to an exported student."""

import functools
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import open_in_transformers, read_lines
from safetensors.torch import load_file

from data import TOKENIZER_FILES, TokenBins, build_bins, load_tokenizer, save_tokenizer
from distill import resolve_config, train
from model import GPT
from sample_mixture import MixtureSampler

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

IDS, STUDENT_ROWS, TEACHER_ROWS = 146, 152, 160  # as Qwen1.5's 151,646, 151,936 and 152,064
EOT = 144
WORDS = {"code": "def return while print self for in range list dict", "prose": "the cat sat on a mat and ate fish",
         "sums": "one two three four plus minus times equals"}
COUNTS = {"code": 40, "prose": 25, "sums": 16}


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    rng = random.Random(0)
    made = {}
    for name, count in COUNTS.items():
        words = WORDS[name].split()
        made[name] = [" ".join(rng.choices(words, k=60)) + f"\n{name}" for _ in range(count)]
    return made


@pytest.fixture(scope="module")
def settings(texts) -> dict:
    """Return a tokenizer.json: a byte-level BPE with two special tokens after its vocabulary, like Qwen's."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    sample = [text for domain in texts.values() for text in domain]
    sample.append("".join(map(chr, range(97, 123))) * 3 + " ".join(map(str, range(100, 200))))
    bpe.train_from_iterator(sample, tokenizers.trainers.BpeTrainer(vocab_size=EOT, show_progress=False))
    bpe.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    assert bpe.get_vocab_size() == IDS and bpe.token_to_id("<|endoftext|>") == EOT
    return json.loads(bpe.to_str())


def save_tokenizer_files(folder: Path, settings: dict, **how):
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer.json").write_text(json.dumps(settings, **how), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, **how))


def save_model(folder: Path, family: str, seed: int, **sizes) -> Path:
    """Save a random model of `family` with transformers, in shards; biases and norms are not 0 and 1."""
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
SIZES = {  # of the teacher and of the student
    "qwen2": (dict(LLAMA_LIKE, num_hidden_layers=3), dict(LLAMA_LIKE, hidden_size=16, num_hidden_layers=2)),
    "gpt2": (dict(GPT_LIKE, n_layer=3), dict(GPT_LIKE, n_layer=2)),
    "gpt_bigcode": (dict(GPT_LIKE, n_layer=3), dict(GPT_LIKE, n_layer=2)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, settings):
    """Return a function that makes the folders of a teacher and a student of a family, once."""
    @functools.cache
    def make(family: str = "qwen2") -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(family)
        teacher_sizes, student_sizes = SIZES[family]
        teacher = save_model(root / "teacher", family, 1, vocab_size=TEACHER_ROWS, tie_word_embeddings=False,
                             **teacher_sizes)
        student = save_model(root / "student", family, 2, vocab_size=STUDENT_ROWS, tie_word_embeddings=True,
                             **student_sizes)

        # One tokenizer, in two files that differ
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in settings["model"]["merges"]]
        vocab = dict(reversed(settings["model"]["vocab"].items()))
        otherwise = {**settings, "model": {**settings["model"], "merges": merges, "vocab": vocab}}
        save_tokenizer_files(teacher, settings, indent=1, ensure_ascii=False)
        save_tokenizer_files(student, otherwise, indent=2)
        assert (teacher / "tokenizer.json").read_bytes() != (student / "tokenizer.json").read_bytes()
        return teacher, student
    return make


@pytest.fixture(scope="module")
def bins(tmp_path_factory, texts, models) -> Path:
    """Return bins made with the teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("raw") / "bins"
    teacher, _ = models()
    stream = ((name, text) for name in texts for text in texts[name])
    build_bins(folder, load_tokenizer(str(teacher)), stream, val_fraction=0.2)
    return folder


@pytest.fixture(scope="module")
def keys(bins):
    """Return a function that gives the keys of a short run."""
    def make(teacher: Path, student: Path, out_dir: Path, **given) -> dict:
        return dict(preset="paper", data_dir=str(bins), teacher=str(teacher), student=str(student),
                    out_dir=str(out_dir), block_size=24, batch_size=8, val_samples=3, interval=2, max_steps=4, lr=3e-3,
                    min_lr=3e-4, warmup_steps=1, save_every=2, keep=0, device="cpu") | given
    return make


@pytest.fixture(scope="module")
def run(keys, models, tmp_path_factory) -> Path:
    """Return the folder of a run: four steps of DDK."""
    out_dir = tmp_path_factory.mktemp("run") / "ddk"
    train(resolve_config(keys(*models(), out_dir)))
    return out_dir


def assert_same_logits(folder: Path):
    ids = torch.randint(IDS, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = GPT.from_pretrained(folder, torch.float32)(ids)
        theirs = open_in_transformers(folder).float()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ----------------------------------------------- From text to an exported student ------------------------------------


def test_the_student_opens_in_transformers_with_our_logits(run):
    assert_same_logits(run / "step_00000004")
    assert open_in_transformers(run / "step_00000004").get_input_embeddings().num_embeddings == STUDENT_ROWS


def test_the_students_tokenizer_is_the_teachers_to_the_byte(run, bins, models, settings, texts):
    folder = run / "step_00000004"
    teacher, _ = models()
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (bins / name).read_bytes() == (teacher / name).read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    teachers, students = [json.loads((one / "tokenizer_config.json").read_text()) for one in (teacher, folder)]
    assert students.items() >= teachers.items()
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    bpe = tokenizers.Tokenizer.from_str(json.dumps(settings))
    for domain in texts.values():
        assert opened(domain[0])["input_ids"] == bpe.encode(domain[0]).ids
    assert opened.eos_token_id == EOT
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == EOT
    assert open_in_transformers(folder).generation_config.eos_token_id == EOT


def test_perplexities_are_transformers_over_the_tokenizers_ids(run, bins, models):
    teacher, student = models()
    lines = read_lines(run, "mixture")
    for folder, line, key in ((teacher, lines[0], "teacher_ppl"), (student, lines[0], "student_ppl"),
                              (teacher, lines[-1], "teacher_ppl"), (run / "step_00000004", lines[-1], "student_ppl")):
        model = open_in_transformers(folder)
        for name in WORDS:
            windows = torch.from_numpy(TokenBins(bins, 24).eval_windows(name, "val", 3))
            targets = windows[:, 1:].flatten()
            with torch.no_grad():
                logits = model(windows).logits[:, :-1].double().flatten(0, 1)
            expected = math.exp(F.cross_entropy(logits[:, :IDS], targets))
            assert line["domains"][name][key] == pytest.approx(expected, rel=1e-4), (key, name)
            with_padded_rows = math.exp(F.cross_entropy(logits, targets))
            assert abs(with_padded_rows / expected - 1) > 1e-3  # they would have been noticed


def test_the_first_steps_loss_is_transformers_too(run, bins, models):
    """CE is over the student's 152 rows, the divergence over the tokenizer's 146 ids."""
    token_bins = TokenBins(bins, 24)
    batch = MixtureSampler(token_bins.n_windows, 8, 0).next_batch()
    windows = torch.from_numpy(token_bins.train_windows(*batch))
    with torch.no_grad():
        teacher, student = [open_in_transformers(folder)(windows[:, :-1]).logits.double() for folder in models()]
    ce = F.cross_entropy(student.flatten(0, 1), windows[:, 1:].flatten()).item()
    log_p = teacher[..., :IDS].log_softmax(dim=-1)
    log_q = student[..., :IDS].log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()
    step = read_lines(run, "train")[0]
    assert [step["ce"], step["kl"], step["loss"]] == pytest.approx([ce, kl, ce + 0.2 * kl], rel=1e-4)


def test_a_student_that_is_stored_in_bfloat16_is_trained_and_exported_in_float32(keys, models, tmp_path):
    teacher, whole = models()
    student = shutil.copytree(whole, tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors*"))
    GPT.from_pretrained(whole, torch.bfloat16).save_pretrained(student)
    given = dict(max_steps=1, lr=1e-6, min_lr=0, dtype="bfloat16")
    folder = train(resolve_config(keys(teacher, student, tmp_path / "run", **given)))
    written = json.loads((folder / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "float32"
    before = load_file(student / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.dtype == torch.float32
        changed = (tensor - before[name].float()).abs().max().item()
        assert 0 < changed < 1e-5, name  # an update that bfloat16 would have rounded away
    assert_same_logits(folder)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_other_families_are_distilled_and_exported(keys, models, tmp_path, family):
    teacher, student = models(family)
    folder = train(resolve_config(keys(teacher, student, tmp_path / "run", max_steps=2)))
    assert_same_logits(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    before = open_in_transformers(student).get_output_embeddings().weight
    assert not open_in_transformers(folder).get_output_embeddings().weight.equal(before)
    assert all(line["kl"] > 0 for line in read_lines(tmp_path / "run", "train"))


# ----------------------------------------------- Tokenizers of every model type ---------------------------------------

TEXT = "The year 2023, it's 12345 cafe\u0301 na\u00efve\n\n  x = Y + 10\t DON'T"


@pytest.fixture(scope="module")
def own_bins(tmp_path_factory):
    """Return a function that makes bins with a tokenizer that splits digits and lowers letters. `config` is its
    tokenizer_config.json, without the end of text."""
    @functools.cache
    def make(config: str) -> TokenBins:
        folder = tmp_path_factory.mktemp("own")
        split = tokenizers.pre_tokenizers
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.normalizer = tokenizers.normalizers.Lowercase()
        bpe.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(False)])
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, show_progress=False,
                                                 initial_alphabet=split.ByteLevel.alphabet())
        bpe.train_from_iterator([TEXT] * 20, trainer)
        bpe.add_special_tokens(["<|endoftext|>"])
        bpe.save(str(folder / "tokenizer.json"))
        if config:
            (folder / "tokenizer_config.json").write_text(config)
        build_bins(folder / "bins", load_tokenizer(str(folder), "<|endoftext|>"),
                   [("a", f"{i} {TEXT}") for i in range(30)], val_fraction=0.2)
        return TokenBins(folder / "bins", 8)
    return make


@pytest.mark.parametrize("config", [
    "", '{"model_max_length": 99}', '{"tokenizer_class": "GPT2Tokenizer"}', '{"tokenizer_class": "LlamaTokenizer"}'])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3", "gpt_bigcode", "starcoder2"])
def test_autotokenizer_encodes_as_the_bins_for_a_student_of_any_model_type(own_bins, tmp_path, family, config):
    """This leaves out qwen2: transformers 5 uses Qwen's own class there, whatever the folder declares."""
    bins = own_bins(config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": bins.vocab_size}))
    save_tokenizer(tmp_path, bins)
    expected = tokenizers.Tokenizer.from_file(str(bins.dir / "tokenizer.json")).encode(TEXT).ids
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert opened(TEXT) == {"input_ids": expected, "attention_mask": [1] * len(expected)}
    assert opened.eos_token == "<|endoftext|>" and (opened.model_max_length == 99) == ("99" in config)


# ----------------------------------------------- Bytes ----------------------------------------------------------------


def test_a_bytes_student_opens_in_transformers_and_its_ids_are_the_bytes(teacher):
    opened = transformers.AutoTokenizer.from_pretrained(teacher)
    for text in ("def f(x):\n\treturn x  # é ∀ 🙂\r\n", " two  spaces ", "".join(map(chr, range(1, 0x250)))):
        assert opened(text)["input_ids"] == list(text.encode())
        assert opened.decode(list(text.encode())) == text
    assert opened.eos_token_id == 256 and opened.convert_ids_to_tokens(256) == "<|endoftext|>"
    assert json.loads((teacher / "generation_config.json").read_text())["eos_token_id"] == 256
    assert_same_logits(teacher)
