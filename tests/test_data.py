"""data.py: command lines, tokenizers, documents, the validation split, bins and windows."""

import dataclasses
import gzip
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tiktoken

import data
from data import (TokenBins, UserError, build_bins, expand_sources, load_tokenizer, option, parse_config,
                  quickstart_domains, read_documents, run_program, saved_tokenizer, validation_split, verify)

# ----------------------------------------------- Command lines --------------------------------------------------------


@dataclass
class Example:
    """Keys of no program."""

    name: str = option("x", "what it is called")
    steps: int = option(3, "how many, 100% of them")
    rate: float = option(0.5, "how fast")
    deep: bool = option(False, "how deep")
    arm: Literal["", "ddk", "kd"] = option("", "which arm")
    limit: float | None = option(None, "how far; none: no end")
    sources: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        return [f"--steps={self.steps}: must be positive"] * (self.steps < 0) + ["--rate: too fast"] * (self.rate > 1)


@dataclass
class WithoutWords:
    """Keys of a program that takes no words."""

    name: str = option("x", "what it is called")

    def problems(self) -> list[str]:
        return []


def test_arguments_become_typed_values():
    config = parse_config(Example, ["--name=a=b", "--steps=7", "--rate=1e-3", "--deep=True", "--arm=kd", "--limit=2",
                                    "code=src/*.py", "prose=books"])
    assert config == Example("a=b", 7, 1e-3, True, "kd", 2.0, ["code=src/*.py", "prose=books"])
    assert type(config.limit) is float and type(config.steps) is int
    assert parse_config(Example, ["--limit=none", "--deep=false", "--arm=", "--name="]) == Example(name="")
    assert parse_config(Example, []) == Example()


def test_of_a_key_given_twice_the_last_wins():
    assert parse_config(Example, ["--steps=1", "--rate=1", "--steps=2"]) == Example(steps=2, rate=1)


def refused(call, *arguments, **keys) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keys)
    return str(caught.value)


@pytest.mark.parametrize("argument, named", [
    ("--steps=1.5", ["--steps=1.5", "whole number"]), ("--steps=", ["--steps=", "whole number"]),
    ("--steps", ["--steps", "needs a value"]), ("--rate=fast", ["--rate=fast", "number"]),
    ("--deep=maybe", ["--deep=maybe", "true", "false"]), ("--arm=gd", ["--arm=gd", "ddk", "kd"]),
    ("--limit=far", ["--limit=far", "number"]), ("--stepz=1", ["--stepz", "did you mean --steps"]),
    ("--qqq=1", ["--qqq", "--help"]), ("--source=x", ["--source=x", "--help"]),
    ("-steps=1", ["-steps=1", "--steps"]), ("--ste=1", ["--ste=1"])])
def test_a_bad_argument_is_named_with_the_fix(argument, named):
    message = refused(parse_config, Example, [argument])
    assert len(message.splitlines()) == 1 and all(word in message for word in named)


def test_words_are_refused_where_no_sources_are_taken():
    assert "name=x" in refused(parse_config, WithoutWords, ["name=x"])


def test_all_problems_are_told_at_once():
    message = refused(parse_config, Example, ["--stepz=1", "--arm=gd", "--deep=2", "--limit"])
    assert all(key in message for key in ("--stepz", "--arm=gd", "--deep=2", "--limit"))
    assert len(refused(parse_config, Example, ["--steps=-1", "--rate=2"]).splitlines()) == 2


def test_contradictions_are_told_along_with_bad_values():
    message = refused(parse_config, Example, ["--stepz=1", "--arm=gd", "--rate=2"])
    assert all(key in message for key in ("--stepz", "--arm=gd", "--rate: too fast"))


def test_help_lists_every_key_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Example, ["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key in dataclasses.fields(Example)[:-1]:
        assert f"--{key.name}" in shown and key.metadata["help"] in shown and f"(default: {key.default!r})" in shown
    assert "<class" not in shown


def test_a_user_error_is_a_message_and_status_2(capsys):
    def main():
        raise UserError("--a: wrong\n--b: wrong too")
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: --a: wrong\nerror: --b: wrong too\n"


# ----------------------------------------------- Tokenizers --------------------------------------------------------

TEXTS = ["", "plain", " spaces\t\r\n\n", "naïve Ω 漢字 👩‍🔬 e\u0301\u200b", "\0\x7f\x1b", "x" * 1000, "<|endoftext|>",
         "a<|endoftext|><|im_end|><s></s>b", "".join(map(chr, range(1, 3000)))]


def test_the_bytes_tokenizer_gives_the_bytes_of_any_text():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.eot_token) == (257, 256, "<|endoftext|>")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == list(text.encode()) and tokenizer.decode(ids.tolist()) == text


def test_a_name_is_that_of_the_tokenizer_also_beside_a_folder_called_so(tmp_path, monkeypatch):
    for name in ("bytes", "gpt2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: tiktoken.Encoding(
        name, pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={"<|endoftext|>": 1}))
    assert (load_tokenizer("bytes").vocab_size, load_tokenizer("gpt2").vocab_size) == (257, 2)


@pytest.mark.parametrize("source, eot, named", [
    ("no_such", "", "--tokenizer=no_such"), ("bytes", "</s>", "--eot=</s>")])
def test_an_unknown_tokenizer_or_token_is_refused(source, eot, named):
    assert named in refused(load_tokenizer, source, eot)


def test_ids_that_an_encoding_leaves_out_are_no_text(monkeypatch):
    """cl100k_base has none between its merges and its special tokens, but a model may predict them."""
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: tiktoken.Encoding(
        name, pat_str=".", mergeable_ranks={b"a": 0, b"b": 1}, special_tokens={"<|endoftext|>": 5}))
    tokenizer = load_tokenizer("cl100k_base")
    assert (tokenizer.vocab_size, tokenizer.decode([0, 3, 1, 5])) == (6, "ab<|endoftext|>")


def test_a_tokenizer_that_cannot_be_downloaded_is_refused(monkeypatch):
    def offline(name):
        raise ConnectionError("no network")
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    assert "TIKTOKEN_CACHE_DIR" in refused(load_tokenizer, "gpt2")


@pytest.fixture(scope="module")
def bpe_settings() -> dict:
    """The tokenizer.json of a tiny byte-level BPE that adds <s> at the start, as LLaMA's does."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["the cat sat on the mat, the rat sat at the cat"] * 5, tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return json.loads(bpe.to_str())


def save_bpe(folder: Path, settings: dict, eos="<|im_end|>", **how) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings, **how), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


def test_a_huggingface_tokenizer_adds_no_token_and_takes_special_ones_as_text(tmp_path, bpe_settings):
    tokenizer = load_tokenizer(save_bpe(tmp_path / "mine", bpe_settings))
    assert (tokenizer.name, tokenizer.eot, tokenizer.vocab_size) == ("mine", 1, len(bpe_settings["model"]["vocab"]))
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert not np.isin(ids, [0, 1]).any()  # neither <s> in front nor <|im_end|> where the text spells it
        assert tokenizer.decode(ids.tolist()) == text
    assert len(tokenizer.encode_batch(["the cat"])[0]) < 7  # merges are at work
    assert tokenizer.decode([0, tokenizer.eot]) == "<s><|im_end|>"  # which shows where a document ends


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path, bpe_settings):
    import tokenizers
    bpe = tokenizers.Tokenizer.from_str(json.dumps(bpe_settings))
    bpe.enable_truncation(4)
    bpe.enable_padding(length=50)
    tokenizer = load_tokenizer(save_bpe(tmp_path, json.loads(bpe.to_str())))
    assert [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode_batch(["q" * 20, "z"])] == ["q" * 20, "z"]


def test_the_end_of_text_token_is_the_configs_eos_or_eot(tmp_path, bpe_settings):
    named, as_dict = save_bpe(tmp_path / "a", bpe_settings), save_bpe(tmp_path / "b", bpe_settings, {"content": "<s>"})
    assert (load_tokenizer(named).eot, load_tokenizer(as_dict).eot) == (1, 0)
    assert load_tokenizer(named / "tokenizer.json").eot == 1  # the file stands for its folder
    assert load_tokenizer(named, eot="<s>").eot == 0


def test_a_tokenizer_without_its_end_of_text_token_is_refused(tmp_path, bpe_settings):
    assert "--eot=</s>" in refused(load_tokenizer, save_bpe(tmp_path, bpe_settings, eos="</s>"))
    assert "--eot" in refused(load_tokenizer, save_bpe(tmp_path, bpe_settings, eos=None))
    (tmp_path / "tokenizer_config.json").unlink()
    assert "--eot" in refused(load_tokenizer, tmp_path)


def test_a_folder_without_a_readable_tokenizer_json_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    assert "tokenizer.json" in refused(load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert "tokenizer.json" in refused(load_tokenizer, tmp_path, "<s>")


def test_the_vocabulary_counts_added_tokens_up_to_the_largest_id(tmp_path, bpe_settings):
    added = {**bpe_settings["added_tokens"][0], "id": 300, "content": "<new>"}
    settings = {**bpe_settings, "added_tokens": [*bpe_settings["added_tokens"], added]}
    import tokenizers
    largest = max(tokenizers.Tokenizer.from_str(json.dumps(settings)).get_vocab().values())
    assert load_tokenizer(save_bpe(tmp_path, settings)).vocab_size == largest + 1 > len(settings["model"]["vocab"])


def test_differently_serialised_files_of_one_tokenizer_have_one_fingerprint(tmp_path, bpe_settings):
    model = bpe_settings["model"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    vocab = dict(reversed(model["vocab"].items()))
    as_lists = {**bpe_settings, "model": {**model, "merges": pairs}}
    as_words = {**bpe_settings, "model": {**model, "merges": [" ".join(pair) for pair in pairs], "vocab": vocab}}
    as_words = dict(reversed(as_words.items()))
    tokenizers = [load_tokenizer(save_bpe(tmp_path / "a", as_lists)),
                  load_tokenizer(save_bpe(tmp_path / "b", as_words, indent=3, ensure_ascii=False))]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint
    assert (tmp_path / "a/tokenizer.json").read_bytes() != (tmp_path / "b/tokenizer.json").read_bytes()


@pytest.mark.parametrize("change", ["merges", "vocab", "added_tokens", "normalizer", "pre_tokenizer"])
def test_what_changes_the_encoding_changes_the_fingerprint(tmp_path, bpe_settings, change):
    settings = json.loads(json.dumps(bpe_settings))
    merges, vocab = settings["model"]["merges"], settings["model"]["vocab"]
    if change == "merges":
        merges[0], merges[1] = merges[1], merges[0]
    elif change == "vocab":
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    elif change == "added_tokens":
        settings["added_tokens"].append({**settings["added_tokens"][0], "id": len(vocab), "content": "<new>"})
    else:
        settings[change] = {"type": "Lowercase"} if change == "normalizer" else {
            **settings["pre_tokenizer"], "add_prefix_space": True}
    fingerprints = [load_tokenizer(save_bpe(tmp_path / str(i), s)).fingerprint
                    for i, s in enumerate((bpe_settings, settings))]
    assert fingerprints[0] != fingerprints[1]


# ----------------------------------------------- Documents ---------------------------------------------------------


def documents(path: Path, text_key: str = "text") -> tuple[list[str], Counter]:
    left_out = Counter()
    return list(read_documents([path], text_key, left_out)), left_out


RECORDS = "".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in ("one é", "two\nlines"))


def compressed(name: str, raw: bytes) -> bytes:
    """`raw` as a file called `name` holds it; in two frames, as parallel compressors and `cat` make them."""
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        return zstandard.compress(raw[:20]) + zstandard.compress(raw[20:])
    return gzip.compress(raw[:20]) + gzip.compress(raw[20:]) if name.endswith(".gz") else raw


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "c4-train.00000.json.gz", "a.json.zst"])
def test_each_line_of_jsonl_is_a_document(tmp_path, name):
    (tmp_path / name).write_bytes(compressed(name, RECORDS.encode()))
    assert documents(tmp_path / name) == (["one é", "two\nlines"], Counter())
    assert documents(tmp_path / name, "body")[0] == ["ONE É", "TWO\nLINES"]


def test_each_row_of_parquet_is_a_document(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one é", None, "two"], "body": ["a", "b", "c"]}), path)
    texts, left_out = documents(path)
    assert texts == ["one é", "two"] and list(left_out.values()) == [1]
    assert documents(path, "body")[0] == ["a", "b", "c"]
    assert "--text_key=" in refused(documents, path, "absent")


def test_any_other_file_is_one_document(tmp_path):
    (tmp_path / "a.py").write_bytes("naïve\r\n漢字".encode())
    assert documents(tmp_path / "a.py") == (["naïve\r\n漢字"], Counter())


@pytest.mark.parametrize("name, raw, texts, reason", [
    ("a.txt", b"bad \xff byte", ["bad \ufffd byte"], "UTF-8"),
    ("a.txt", b" \n\t", [], "empty"),
    ("a.png", b"\x89PNG\0\0\xff", [], "binary"),
    ("a.jsonl", b'{"text": "bad \xff byte"}\n', ["bad \ufffd byte"], "UTF-8"),
    ("a.jsonl", b'{"text": "half \\ud800"}\n', ["half \ufffd"], "UTF-8"),
    ("a.jsonl", b'{"text": ""}\n', [], "empty"),
    ("a.jsonl", b'{"other": "x"}\n', [], "key text"),
    ("a.jsonl", b'{"text": 3}\n', [], "key text"),
    ("a.jsonl", b'["x"]\n', [], "key text")])
def test_what_is_left_out_or_mended_is_counted(tmp_path, name, raw, texts, reason):
    (tmp_path / name).write_bytes(raw)
    got, left_out = documents(tmp_path / name)
    assert [re.sub("\ufffd+", "\ufffd", text) for text in got] == texts
    assert [count for why, count in left_out.items() if reason in why] == [1]


def test_a_record_with_a_nul_character_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\0b"}) + "\n")
    assert documents(tmp_path / "a.jsonl") == (["a\0b"], Counter())


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": \n')
    message = refused(documents, tmp_path / "a.jsonl")
    assert "a.jsonl" in message and "line 3" in message


@pytest.mark.parametrize("name, raw", [
    ("a.jsonl.gz", compressed("a.gz", RECORDS.encode())[:-9]), ("a.jsonl.gz", b"no gzip"), ("a.jsonl.zst", b"no zstd"),
    ("a.parquet", b"no parquet")])
def test_a_damaged_file_is_named(tmp_path, name, raw):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(raw)
    assert name in refused(documents, tmp_path / name)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    assert "pip install zstandard" in refused(documents, tmp_path / "a.jsonl.zst")


def test_sources_are_files_folders_and_globs(tmp_path):
    for name in ("b.txt", "a.txt", "sub/deep/c.txt", "sub/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    found = expand_sources([f"file={tmp_path}/a.txt", f"folder={tmp_path}", f"glob={tmp_path}/*.txt",
                            f"deep={tmp_path}/**/*.txt", f"two={tmp_path}/*.txt", f"two={tmp_path}/sub/*.md"])
    assert {name: [path.relative_to(tmp_path).as_posix() for path in paths] for name, paths in found.items()} == {
        "file": ["a.txt"], "folder": ["a.txt", "b.txt", "sub/d.md", "sub/deep/c.txt"], "glob": ["a.txt", "b.txt"],
        "deep": ["a.txt", "b.txt", "sub/deep/c.txt"], "two": ["a.txt", "b.txt", "sub/d.md"]}


def test_all_sources_that_match_nothing_are_told_at_once(tmp_path):
    message = refused(expand_sources, [f"a={tmp_path}/*.txt", f"b={tmp_path}/nowhere", "no_equals", f"../c={tmp_path}"])
    assert all(word in message for word in ("a=", "b=", "no_equals", "../c=")) and len(message.splitlines()) == 4


# ----------------------------------------------- The validation split ----------------------------------------------


def build(folder: Path, domains: dict[str, list[str]] | list[str], tokenizer=None, **keys) -> dict:
    """The bins of lists of texts; a single list is the domain `code`."""
    domains = domains if isinstance(domains, dict) else {"code": domains}
    return build_bins(folder, tokenizer or load_tokenizer("bytes"),
                      {name: lambda texts=texts: iter(texts) for name, texts in domains.items()}, **keys)


def read_bin(folder: Path, file: str, dtype: str = "<u2") -> np.ndarray:
    return np.frombuffer((folder / file).read_bytes(), dtype)


def bin_texts(folder: Path, file: str) -> list[str]:
    """The documents of a bin of bytes."""
    ids = read_bin(folder, file)
    ends = np.flatnonzero(ids == 256)
    assert ends[-1] == len(ids) - 1
    return [bytes(part[part < 256].tolist()).decode() for part in np.split(ids, ends + 1)[:-1]]


def sides(folder: Path, texts: list[str], **keys) -> tuple[list[str], list[str]]:
    build(folder, texts, **keys)
    return bin_texts(folder, "code.train.bin"), bin_texts(folder, "code.val.bin")


ARTICLES = [f"Article {i}: " + f"{i * i} words é " * (i % 23) for i in range(400)]


def by_hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def test_the_split_is_of_whole_documents_by_hash(tmp_path):
    train, val = sides(tmp_path, ARTICLES)
    assert sorted(train + val) == sorted(ARTICLES) and train and val
    assert train == [text for text in ARTICLES if text in set(train)]  # in the order of the input
    assert val == sorted(ARTICLES, key=by_hash)[:len(val)]  # the smallest hashes, in their order


def test_the_split_does_not_depend_on_the_order_of_documents(tmp_path):
    shuffled = random.Random(0).sample(ARTICLES, len(ARTICLES))
    (train, val), (shuffled_train, shuffled_val) = sides(tmp_path / "a", ARTICLES), sides(tmp_path / "b", shuffled)
    assert val == shuffled_val and sorted(train) == sorted(shuffled_train)
    assert [text for text in shuffled if text not in set(val)] == shuffled_train


def test_duplicates_never_straddle_the_split(tmp_path):
    copies = random.Random(0).sample(ARTICLES * 3, 3 * len(ARTICLES))
    train, val = sides(tmp_path, copies, val_fraction=0.3)
    assert not set(train) & set(val) and Counter(train + val) == Counter(copies)


@pytest.mark.parametrize("val_bytes", [1, 20, 40, 60, 100, 200, 1000])
def test_no_copy_is_lost_whatever_the_limit(tmp_path, val_bytes):
    rng = random.Random(val_bytes)
    for i in range(5):
        texts = rng.choices([f"{'text' * 5} {n}" for n in range(rng.choice([2, 3, 8]))], k=20) + ["text 0", "text 1"]
        train, val = sides(tmp_path / str(i), texts, val_bytes=val_bytes, val_fraction=0.9)
        assert Counter(train + val) == Counter(texts) and not set(train) & set(val)
        assert val[0] == min(texts, key=by_hash)
        assert sum(len(text) for text in val) <= val_bytes or len(set(val)) == 1


@pytest.mark.parametrize("limits, most", [
    ({}, 0.05), ({"val_fraction": 0.3}, 0.3), ({"val_bytes": 2000}, 2000),
    ({"val_bytes": 20000, "val_fraction": 0.5}, 20000), ({"val_bytes": 10**9, "val_fraction": 0.5}, 0.5)])
def test_validation_takes_as_many_bytes_as_it_may(tmp_path, limits, most):
    texts = ARTICLES * 2  # copies count as often as they come
    total, largest = sum(len(text.encode()) for text in texts), max(len(text.encode()) for text in texts)
    meta = build(tmp_path, texts, **limits)
    used, most = meta["domains"]["code"]["val"]["bytes"], most if most > 1 else most * total
    assert most - 2 * largest < used <= most


@pytest.mark.parametrize("texts, limits", [
    (ARTICLES, {"val_fraction": 1e-9}), (ARTICLES, {"val_bytes": 1}), (ARTICLES, {"val_fraction": 1 - 1e-9}),
    (["one", "two"], {}), (["one", "two" * 1000, "two" * 1000], {"val_fraction": 0.99}), (["a" * 9999, "b"], {})])
def test_each_side_has_a_document(tmp_path, texts, limits):
    assert all(sides(tmp_path, texts, **limits))


@pytest.mark.parametrize("texts", [[], ["alone"], ["alone"] * 5])
def test_fewer_than_two_distinct_documents_are_refused(tmp_path, texts):
    assert "code" in refused(build, tmp_path, texts)


def test_the_memory_of_the_split_is_bounded_by_val_bytes():
    def peak(n: int) -> int:
        tracemalloc.start()
        validation_split((f"document {i}" for i in range(n)), 0.9, 1000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    assert peak(20000) < 1.5 * peak(1000) < 500_000


# ----------------------------------------------- Bins --------------------------------------------------------------


def test_a_bin_is_its_documents_encoded_each_ended_once(tmp_path):
    texts = [text for text in TEXTS if text.strip()]  # some spell the end-of-text token
    meta = build(tmp_path, texts, val_fraction=0.3)
    for file in ("code.train.bin", "code.val.bin"):
        kept = bin_texts(tmp_path, file)
        expected = [[*text.encode(), 256] for text in kept]
        assert read_bin(tmp_path, file).tolist() == sum(expected, []) and set(kept) <= set(texts)
    assert sum(meta["domains"]["code"][side]["documents"] if side == "val" else
               meta["domains"]["code"][side][0]["documents"] for side in ("train", "val")) == len(texts)


@pytest.mark.parametrize("vocab_size, dtype, width", [(257, "uint16", 2), (65536, "uint16", 2), (65537, "uint32", 4),
                                                      (151_936, "uint32", 4)])
def test_ids_are_little_endian_uint16_where_they_fit(tmp_path, vocab_size, dtype, width):
    largest = vocab_size - 1
    tokenizer = dataclasses.replace(load_tokenizer("bytes"), vocab_size=vocab_size, eot=largest, encode_batch=lambda
                                    texts: [np.array([1, 256 % vocab_size, largest], np.uint32)] * len(texts))
    meta = build(tmp_path, ["one", "two"], tokenizer)
    assert meta["domains"]["code"]["dtype"] == dtype
    expected = b"".join(id.to_bytes(width, "little") for id in (1, 256, largest, largest))
    assert (tmp_path / "code.train.bin").read_bytes() == (tmp_path / "code.val.bin").read_bytes() == expected
    assert TokenBins(tmp_path, 3).train_windows(np.array([0]), np.array([0])).tolist() == [[1, 256, largest, largest]]


def test_meta_json_says_what_the_bins_are(tmp_path):
    texts = {"code": ARTICLES, "prose": ARTICLES[:50]}
    meta = build(tmp_path, texts)
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    tokenizer = load_tokenizer("bytes")
    assert type(meta["format_version"]) is int
    assert meta["tokenizer"] == {"name": "bytes", "vocab_size": 257, "eot": 256, "eot_token": "<|endoftext|>",
                                 "fingerprint": tokenizer.fingerprint, "files": []}
    assert list(meta["domains"]) == ["code", "prose"]
    for name, domain in meta["domains"].items():
        [train], val = domain["train"], domain["val"]
        assert (train["file"], val["file"]) == (f"{name}.train.bin", f"{name}.val.bin")
        for entry in (train, val):
            raw, kept = (tmp_path / entry["file"]).read_bytes(), bin_texts(tmp_path, entry["file"])
            assert entry == {"file": entry["file"], "tokens": len(raw) // 2, "documents": len(kept),
                             "bytes": sum(len(text.encode()) for text in kept), "sha256": sha256(raw).hexdigest()}
        assert train["documents"] + val["documents"] == len(texts[name])
    assert {path.name for path in tmp_path.iterdir()} == {
        "meta.json", "code.train.bin", "code.val.bin", "prose.train.bin", "prose.val.bin"}


def test_the_tokenizers_files_are_copied_beside_the_bins(tmp_path, bpe_settings):
    source, out = save_bpe(tmp_path / "tokenizer", bpe_settings), tmp_path / "bins"
    meta = build(out, ARTICLES, load_tokenizer(source))
    assert sorted(meta["tokenizer"]["files"]) == ["tokenizer.json", "tokenizer_config.json"]
    for name in meta["tokenizer"]["files"]:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    shutil.rmtree(source)
    tokenizer = saved_tokenizer(out, meta["tokenizer"])
    assert tokenizer.fingerprint == meta["tokenizer"]["fingerprint"]
    assert tokenizer.decode(TokenBins(out, 8).val_windows("code", 1)[0].tolist()).startswith("Article")


def test_shards_split_the_train_side_alone(tmp_path):
    whole, parts = build(tmp_path / "a", ARTICLES), build(tmp_path / "b", ARTICLES, shards=3)
    shards = parts["domains"]["code"]["train"]
    assert [shard["file"] for shard in shards] == [f"code.train.00{k}.bin" for k in range(3)]
    assert sum((bin_texts(tmp_path / "b", shard["file"]) for shard in shards), []) == bin_texts(
        tmp_path / "a", "code.train.bin")
    sizes = [shard["bytes"] for shard in shards]
    assert max(sizes) < 1.2 * min(sizes)
    assert whole["domains"]["code"]["val"] == parts["domains"]["code"]["val"]


def test_more_shards_than_documents(tmp_path):
    meta = build(tmp_path, ["one", "two", "three"], shards=10)
    shards = meta["domains"]["code"]["train"]
    assert len(shards) == 10 and sum(shard["documents"] for shard in shards) == 2  # most are empty
    assert TokenBins(tmp_path, 2).n_windows["code"] > 0


def test_documents_that_came_while_the_split_was_made_go_to_the_last_shard(tmp_path):
    calls = itertools.count()
    build_bins(tmp_path, load_tokenizer("bytes"), shards=3,
               domains={"code": lambda: [*ARTICLES, *["late " * 99 + str(i) for i in range(99 * (next(calls) > 0))]]})
    assert len(bin_texts(tmp_path, "code.train.002.bin")) > 90


def test_bins_are_not_overwritten(tmp_path):
    build(tmp_path, ARTICLES[:50])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "--out_dir" in refused(build, tmp_path, ARTICLES[50:])
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


# Five megabytes: bins are written while later documents are still to be encoded.
LONG = [f"document {i} ".ljust(100, ".") * 1000 for i in range(50)]


class Killed(BaseException):
    pass


def fast_tokenizer(encoded: list[str], kill_after: int = 10**9):
    """The bytes tokenizer, noting what it encodes and killed when it has `kill_after` documents behind it."""
    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        if len(encoded) >= kill_after:
            raise Killed
        encoded.extend(texts)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
    return dataclasses.replace(load_tokenizer("bytes"), encode_batch=encode_batch)


def killed_build(folder: Path, texts: list[str], kill_after: int = 25):
    with pytest.raises(Killed):
        build(folder, texts, fast_tokenizer([], kill_after), shards=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_build_goes_on_without_redoing_finished_shards(tmp_path):
    encoded = []
    build(tmp_path / "straight", LONG, fast_tokenizer([]), shards=3)
    killed_build(tmp_path / "killed", LONG)
    finished = {path.name for path in (tmp_path / "killed").glob("*.bin")}
    assert finished == {"code.train.000.bin"} and not (tmp_path / "killed/meta.json").exists()
    build(tmp_path / "killed", LONG, fast_tokenizer(encoded), shards=3)
    assert encoded and not set(encoded) & set(bin_texts(tmp_path / "killed", "code.train.000.bin"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.parametrize("kill_after", [0, 15, 25, 45])
def test_nothing_half_written_is_called_bin(tmp_path, kill_after):
    build(tmp_path / "straight", LONG, fast_tokenizer([]), shards=3)
    killed_build(tmp_path / "killed", LONG, kill_after)
    for path in (tmp_path / "killed").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "straight" / path.name).read_bytes()


@pytest.mark.parametrize("texts", [LONG[::-1], [text.upper() for text in LONG]], ids=["other order", "other documents"])
def test_a_killed_build_of_other_documents_is_not_gone_on_with(tmp_path, texts):
    killed_build(tmp_path / "killed", LONG)
    build(tmp_path / "killed", texts, fast_tokenizer([]), shards=3)
    build(tmp_path / "straight", texts, fast_tokenizer([]), shards=3)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_plan_whose_bins_another_build_replaced_is_not_gone_on_with(tmp_path):
    killed_build(tmp_path, LONG)
    killed_build(tmp_path, [text.upper() for text in LONG])
    build(tmp_path, LONG, fast_tokenizer([]), shards=3)
    verify(tmp_path)


# ----------------------------------------------- Windows -----------------------------------------------------------


def test_a_bin_of_n_tokens_has_n_less_1_over_b_windows(tmp_path):
    for n in range(2, 12):  # tokens of either document, the end included
        meta = build(tmp_path / str(n), ["a" * (n - 1), "b" * (n - 1)])
        assert meta["domains"]["code"]["train"][0]["tokens"] == n
        for block_size in range(1, n):
            bins = TokenBins(tmp_path / str(n), block_size)
            assert bins.n_windows == {"code": (n - 1) // block_size}
            tokens = read_bin(tmp_path / str(n), "code.train.bin")
            for i in range(bins.n_windows["code"]):
                [window] = bins.train_windows(np.array([0]), np.array([i]))
                assert window.dtype == np.int64
                assert window.tolist() == tokens[i * block_size:i * block_size + block_size + 1].tolist()
        assert "--block_size" in refused(TokenBins, tmp_path / str(n), n)


def test_no_window_crosses_a_shard(tmp_path):
    meta, bins = build(tmp_path, ARTICLES, shards=3), TokenBins(tmp_path, 32)
    expected = []
    for shard in meta["domains"]["code"]["train"]:
        tokens = read_bin(tmp_path, shard["file"])
        expected += [tokens[i * 32:i * 32 + 33] for i in range((len(tokens) - 1) // 32)]
    assert bins.n_windows["code"] == len(expected)
    windows = bins.train_windows(np.zeros(len(expected), int), np.arange(len(expected)))
    np.testing.assert_array_equal(windows, expected)


def test_train_windows_come_in_the_order_asked(tmp_path):
    build(tmp_path, {"code": ARTICLES, "prose": ARTICLES[::-1]}, shards=2)
    bins, domain_ids, window_ids = TokenBins(tmp_path, 16), np.array([1, 0, 1, 0, 0]), np.array([500, 3, 0, 700, 3])
    together = bins.train_windows(domain_ids, window_ids)
    for row, domain, window in zip(together, domain_ids, window_ids):
        np.testing.assert_array_equal(row, bins.train_windows(np.array([domain]), np.array([window]))[0])


def test_validation_windows_are_the_first(tmp_path):
    build(tmp_path, ARTICLES)
    bins, tokens = TokenBins(tmp_path, 16), read_bin(tmp_path, "code.val.bin")
    np.testing.assert_array_equal(bins.val_windows("code", 5), [tokens[i * 16:i * 16 + 17] for i in range(5)])
    n = (len(tokens) - 1) // 16
    assert len(bins.val_windows("code", n)) == n
    message = refused(bins.val_windows, "code", n + 1)
    assert "--val_samples" in message and "code" in message and str(n) in message.split() and str(n + 1) in message


def test_the_content_is_that_of_the_tokens_wherever_they_lie(tmp_path):
    build(tmp_path / "a", ARTICLES)
    build(tmp_path / "b", ARTICLES[:-1])
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    a, b, copy = (TokenBins(tmp_path / name, 16).content() for name in ("a", "b", "copy"))
    assert a == copy != b


def set_meta(folder: Path, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def write_outside(folder: Path):
    shutil.copy(folder / "code.train.bin", folder.parent / "outside.bin")
    set_meta(folder, lambda meta: meta["domains"]["code"]["train"][0].update(file="../outside.bin"))


def append(path: Path, raw: bytes):
    path.write_bytes(path.read_bytes() + raw)


BAD_FOLDERS = {
    "no meta": (lambda folder: (folder / "meta.json").unlink(), "meta.json"),
    "meta not JSON": (lambda folder: (folder / "meta.json").write_text("{"), "meta.json"),
    "meta not text": (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe"), "meta.json"),
    "meta of another kind": (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json"),
    "other version": (lambda folder: set_meta(folder, lambda meta: meta.update(format_version=99)), "meta.json"),
    "no tokenizer": (lambda folder: set_meta(folder, lambda meta: meta.pop("tokenizer")), "meta.json"),
    "no dtype": (lambda folder: set_meta(folder, lambda meta: meta["domains"]["code"].pop("dtype")), "meta.json"),
    "truncated": (lambda folder: (folder / "code.train.bin").write_bytes(b"\0" * 100), "code.train.bin"),
    "truncated validation": (lambda folder: (folder / "code.val.bin").write_bytes(b""), "code.val.bin"),
    "odd size": (lambda folder: append(folder / "code.train.bin", b"\0"), "code.train.bin"),
    "missing bin": (lambda folder: (folder / "code.val.bin").unlink(), "code.val.bin"),
    "bin outside": (write_outside, "outside.bin"),
    "tokenizer file outside": (lambda folder: set_meta(folder, lambda meta: meta["tokenizer"].update(
        files=["../secret.json"])), "secret.json"),
    "missing tokenizer file": (lambda folder: set_meta(folder, lambda meta: meta["tokenizer"].update(
        files=["tokenizer.json"])), "tokenizer.json"),
}


@pytest.mark.parametrize("spoil, named", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_bins_folder_is_refused(tmp_path, spoil, named):
    build(tmp_path / "bins", ARTICLES[:50])
    (tmp_path / "secret.json").write_text("{}")
    spoil(tmp_path / "bins")
    assert named in refused(TokenBins, tmp_path / "bins", 16)


@pytest.mark.parametrize("side", ["train", "val"])
def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, side):
    build(tmp_path, ARTICLES)
    path = tmp_path / f"code.{side}.bin"
    path.write_bytes((257).to_bytes(2, "little") + path.read_bytes()[2:])
    bins = TokenBins(tmp_path, 16)
    read = (lambda: bins.val_windows("code", 1)) if side == "val" else (
        lambda: bins.train_windows(np.array([0]), np.array([0])))
    message = refused(read)
    assert path.name in message and "257" in message


# ----------------------------------------------- Text for the quickstart -------------------------------------------


def test_the_quickstart_has_four_domains_without_licence_headers():
    domains = quickstart_domains(dict.fromkeys(("python", "cpp", "math", "prose"), 20_000))
    assert len(domains) >= 4
    for name, start in domains.items():
        texts = list(start())
        assert len(set(texts)) >= 2 and all(texts), name
        assert sum(len(text.encode()) for text in texts[:-1]) < 20_000, name
        for text in texts:
            comments = [line for line in text.splitlines()[:10] if line.lstrip().startswith(("#", "//", "/*", "*"))]
            assert "copyright" not in "\n".join(comments).lower(), text[:200]


# ----------------------------------------------- The program -------------------------------------------------------


@pytest.fixture
def program(run_main):
    """Runs the program with arguments: (exit status, stdout, stderr)."""
    return partial(run_main, data)


def test_the_program_writes_bins_and_tells_what_it_left_out(program, tmp_path):
    for name, raw in {"a.txt": b"one", "b.txt": b"two", "c.txt": b"bad \xff", "d.txt": b"", "e.bin": b"\0"}.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "r.jsonl").write_text(RECORDS + '{"no": 1}\n{"no": 2}\n')
    status, stdout, _ = program(f"--out_dir={tmp_path / 'bins'}", "--text_key=body", "--shards=2", "--val_fraction=0.4",
                                f"mine={tmp_path}/*.txt", f"mine={tmp_path}/e.bin", f"records={tmp_path}/r.jsonl")
    assert status == 0
    meta = json.loads((tmp_path / "bins/meta.json").read_text())
    assert list(meta["domains"]) == ["mine", "records"] and meta["tokenizer"]["name"] == "bytes"
    assert (meta["made_by"]["text_key"], meta["made_by"]["val_fraction"]) == ("body", 0.4)
    assert sum(entry["documents"] for entry in [*meta["domains"]["mine"]["train"], meta["domains"]["mine"]["val"]]) == 3
    notes = [line.split()[1:] for line in stdout.splitlines() if line.startswith("note: ")]
    counts = {reason: int(count) for count, *words in notes for reason in ("UTF-8", "empty", "binary", "body")
              if reason in " ".join(words)}
    assert counts == {"UTF-8": 1, "empty": 1, "binary": 1, "body": 2}  # once, though the files are read twice


def test_what_is_wrong_with_sources_tokenizer_and_folder_is_told_together(program, tmp_path):
    (tmp_path / "meta.json").touch()
    assert "is a file" in program(f"--out_dir={tmp_path / 'meta.json'}", f"a={tmp_path}")[2]
    status, stdout, stderr = program(f"--out_dir={tmp_path}", "--tokenizer=no_such", f"a={tmp_path}/nothing", "b")
    assert (status, stdout) == (2, "")
    assert all(word in stderr for word in ("nothing: no file matches", "b: write NAME=GLOB", "--tokenizer=no_such",
                                           f"--out_dir={tmp_path}: holds bins"))


def test_another_tokenizer_beside_the_bins_is_found(program, tmp_path, bpe_settings):
    build_bins(tmp_path / "bins", load_tokenizer(save_bpe(tmp_path / "tokenizer", bpe_settings)), {
        "code": lambda: iter(["one cat", "two rats"])})
    assert program(f"--verify={tmp_path / 'bins'}")[0] == 0
    save_bpe(tmp_path / "bins", {**bpe_settings, "normalizer": {"type": "Lowercase"}})
    with open(tmp_path / "bins/code.val.bin", "r+b") as file:
        file.write(b"z")
    status, _, stderr = program(f"--verify={tmp_path / 'bins'}")
    assert status == 2 and "the tokenizer tokenizer is not the one" in stderr and "code.val.bin not as in" in stderr


def test_a_folder_to_verify_is_named_by_its_own_key(program, tmp_path):
    status, _, stderr = program(f"--verify={tmp_path}")
    assert status == 2 and f"--verify={tmp_path}" in stderr and "--data_dir" not in stderr


def test_a_json_file_is_one_document_as_it_stands(tmp_path):
    (tmp_path / "a.json").write_text(RECORDS)
    assert documents(tmp_path / "a.json")[0] == [RECORDS]


def test_the_program_verifies(program, tmp_path):
    build(tmp_path, ARTICLES, shards=2)
    assert program(f"--verify={tmp_path}")[0] == 0
    path = tmp_path / "code.train.001.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    status, _, stderr = program(f"--verify={tmp_path}")
    assert status == 2 and path.name in stderr and "code.train.000.bin" not in stderr


@pytest.mark.parametrize("arguments, named", [
    ([], ["--out_dir", "NAME=GLOB"]),
    (["--out_dir=x", "--val_fraction=1", "--val_bytes=0", "--shards=0", "a=b"],
     ["--val_fraction=1.0", "--val_bytes=0", "--shards=0"]),
    (["--out_dir=x", "--tokeniser=bytes", "--shards=x", "a=b"], ["did you mean --tokenizer", "--shards=x"]),
    (["--out_dir=x", "a=no_such_file", "b=neither"], ["a=no_such_file", "b=neither"]),
    (["--verify=no_such_folder"], ["no_such_folder"]),
])
def test_bad_arguments_are_all_named_at_once(program, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = program(*arguments)
    assert status == 2 and stdout == "" and all(word in stderr for word in named)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_message_without_a_traceback(tmp_path):
    (tmp_path / "a.jsonl").write_text("no JSON\n")
    run = subprocess.run([sys.executable, data.__file__, "--out_dir=bins", "a=a.jsonl"], cwd=tmp_path, text=True,
                         capture_output=True)
    assert run.returncode == 2 and "a.jsonl, line 1" in run.stderr and len(run.stderr.splitlines()) == 1
