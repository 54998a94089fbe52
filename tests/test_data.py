"""data.py: the program, tokenizers, documents, the build with its validation split, bins and windows."""

import dataclasses
import gzip
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter, defaultdict
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import drop, edit, put

import data
from data import (TokenBins, UserError, build_bins, expand_sources, file_sha256, import_optional, load_tokenizer,
                  model_tokenizer, quickstart_documents, read_documents, read_meta, run_program, save_tokenizer,
                  saved_tokenizer, settings_digest, user_errors, verify, write_meta)

ARTICLES = [f"Article {i}: " + f"{i * i} words é <|endoftext|> " * (i % 23) for i in range(400)]


def refused(call, *arguments, **keys) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keys)
    return str(caught.value)


def stream(domains: dict[str, list[str]]):
    for name, texts in domains.items():
        for text in texts:
            yield name, text


def build(folder: Path, domains: dict[str, list[str]] | list[str], tokenizer=None, **keys) -> dict:
    """The bins of lists of texts; a single list is the domain `code`."""
    if isinstance(domains, list):
        domains = {"code": domains}
    return build_bins(folder, tokenizer or load_tokenizer("bytes"), stream(domains), **keys)


def read_bin(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), "<u2")


def bin_texts(path: Path) -> list[str]:
    """The documents of a bin of bytes."""
    *documents, rest = bytes(np.minimum(read_bin(path), 255).astype(np.uint8)).split(b"\xff")  # not a byte of UTF-8
    assert rest == b""
    return [document.decode() for document in documents]


def sides(folder: Path, texts: list[str], **keys) -> tuple[list[str], list[str]]:
    build(folder, texts, **keys)
    return bin_texts(folder / "code.train.bin"), bin_texts(folder / "code.val.bin")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Bins of ARTICLES in two domains, to be read only."""
    folder = tmp_path_factory.mktemp("made") / "bins"
    build(folder, {"code": ARTICLES, "prose": ARTICLES[::-1]})
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(made, tmp_path / "bins")


def by_hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------- The program ----------------------------------------------------------

@pytest.fixture
def program(run_main):
    """Runs data.py with arguments: (exit status, stdout, stderr)."""
    return partial(run_main, data)


RECORDS = "".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in ("one é", "two\nlines\0"))


def test_the_program_writes_bins_and_says_what_it_left_out(program, tmp_path):
    files = {"a.txt": b"one", "b.txt": b"two", "c.txt": b"bad \xff", "d.txt": b" ", "e.dat": b"\0"}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "r.jsonl").write_text(RECORDS + '{"no": 1}\n{"no": 2}\n')
    bins = tmp_path / "bins"
    status, stdout, stderr = program(f"mine={tmp_path}/*.txt", f"--out_dir={bins}", "--text_key=other",
                                     "--text_key=body", f"mine={tmp_path}/e.dat", "--val_fraction", "0.4",
                                     f"records={tmp_path}/r.jsonl")
    assert (status, stderr) == (0, "")
    meta = json.loads((bins / "meta.json").read_text())
    assert list(meta["domains"]) == ["mine", "records"] and meta["tokenizer"]["name"] == "bytes"
    assert (meta["made_by"]["text_key"], meta["made_by"]["val_fraction"]) == ("body", 0.4)  # the last of a key wins
    assert "\nval_fraction = 0.4\n" in stdout
    assert meta["domains"]["mine"]["train"]["documents"] + meta["domains"]["mine"]["val"]["documents"] == 3
    notes = [line for line in stdout.splitlines() if line.startswith("note: ")]
    for domain, count, reason in (("mine", 1, "not UTF-8"), ("mine", 1, "empty"), ("mine", 1, "binary"),
                                  ("records", 2, "under the key body")):
        assert len([note for note in notes if note.startswith(f"note: {domain}: {count} ") and reason in note]) == 1
    assert len(notes) == 4
    assert "\neach document ends with <|endoftext|>, id 256\n" in stdout


def test_help_lists_every_key_with_its_default_and_meaning(program):
    status, stdout, _ = program("--help")
    shown = " ".join(stdout.split())
    assert status == 0
    for key in ("out_dir", "tokenizer", "eot", "text_key", "val_fraction", "val_bytes", "verify"):
        assert f"--{key} " in shown
    for default in ("bytes", "text", "0.05", "32000000"):
        assert f"(default: {default})" in shown


@pytest.mark.parametrize("arguments, named", [
    ([], ["--out_dir", "NAME=GLOB"]),
    (["--out_dir=x"], ["NAME=GLOB"]),
    (["--out_dir=x", "a=a.txt", "--val_fraction=1"], ["--val_fraction=1.0", "below 1"]),
    (["--out_dir=x", "a=a.txt", "--val_fraction=nan"], ["--val_fraction=nan", "below 1"]),
    (["--out_dir=x", "a=a.txt", "--val_bytes=-1"], ["--val_bytes=-1", "at least 0"]),
    (["--out_dir=x", "a=a.txt", "--val_fraction=some"], ["--val_fraction", "'some'"]),
    (["--out_dir=x", "a=a.txt", "--val_bytes=1.5"], ["--val_bytes", "'1.5'"]),
    (["--out_dir=x", "a=a.txt", "--tok=bytes"], ["--tok=bytes"]),
    (["--out_dir=x", "a=a.txt", "--tokenizer=no_such"], ["--tokenizer=no_such", "bytes"]),
    (["--out_dir=x", "a=a.txt", "a=nothing/*.txt"], ["a=nothing/*.txt", "no file matches"]),
    (["--out_dir=x", "a=a.json", "--domain_key=k"], ["a=a.json", "no file matches"]),
    (["--out_dir=x", "a=a.txt", "--tokenizer=old"], ["old/tokenizer.json", "AutoTokenizer.from_pretrained('old')"]),
    (["--out_dir=x", "a=a.txt", "--eot=</s>"], ["--eot=</s>", "<|endoftext|>"]),
    (["--out_dir=x", "a.txt", "--domain_key=k"], ["a.txt", "--domain_key requires records"]),
    (["--out_dir=x", "word"], ["word", "NAME=GLOB"]),
    (["--out_dir=x", "../a=a.txt"], ["'../a=a.txt'", "letters"]),
    (["--out_dir=a.txt", "a=a.txt"], ["a.txt", "File exists"]),
    (["--out_dir=bins", "a=a.txt"], ["--out_dir=bins", "holds bins"]),
    (["--verify=bins", "a=a.txt"], ["--verify=DIR alone"]),
    (["--verify=no_such_folder"], ["--verify=no_such_folder", "meta.json"])])
def test_a_bad_argument_is_one_message_with_the_fix_and_status_2(
        program, made, copied, monkeypatch, arguments, named):
    monkeypatch.chdir(copied.parent)
    Path("a.txt").write_text("some text")
    Path("old").mkdir()
    Path("old", "tokenizer.model").write_bytes(b"of sentencepiece")
    status, _, stderr = program(*arguments)
    [message] = [line for line in stderr.splitlines() if "error: " in line]
    assert status == 2 and stderr.rstrip().endswith(message)
    assert all(word in message for word in named)
    assert sorted(os.listdir()) == ["a.txt", "bins", "old"] and contents(copied) == contents(made)


@pytest.mark.parametrize("error, rank, status, message", [
    (UserError("--a: wrong\n--b: wrong too"), "0", 2, "error: --a: wrong\nerror: --b: wrong too\n"),
    (UserError("--a: wrong"), "3", 2, "rank 3: error: --a: wrong\n"),
    (OSError(28, "No space left on device", "x"), "0", 2, "error: [Errno 28] No space left on device: 'x'\n"),
    (KeyboardInterrupt(), "0", 130, ""), (BrokenPipeError(), "0", 141, ""), (SystemExit(138), "0", 138, ""),
    (SystemExit(), "0", 0, "")], ids=repr)
def test_what_ends_a_program_is_its_status_and_message_without_a_traceback(
        capsys, monkeypatch, error, rank, status, message):
    """As torchrun starts it: it leaves at once, and ranks other than 0 let that one speak first."""
    def main():
        raise error
    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    assert (stop.value.code, capsys.readouterr().err) == (status, message)
    assert bool(waited) == (rank == "3")


def test_a_mistake_of_ours_has_its_traceback_and_a_program_that_ends_well_returns(capsys):
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: 1 / 0)
    assert stop.value.code == 1 and "ZeroDivisionError" in capsys.readouterr().err
    assert run_program(lambda: None) is None


def test_a_file_that_requires_a_package_names_it(tmp_path, monkeypatch):
    for name, package in (("a.txt.zst", "pyarrow"), ("a.parquet", "pyarrow.parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).write_bytes(b"x")
        message = refused(documents, tmp_path / name)
        assert name in message and "pip install pyarrow" in message
    # Before the sources before it are read
    assert "pip install pyarrow" in refused(expand_sources, [f"a={tmp_path}/*.zst"], False, {"a": Counter()})


def test_an_unforeseen_error_is_told_with_its_source_and_the_fix():
    def read(error):
        with user_errors("file.x", "copy it again"):
            raise error
    assert refused(read, KeyError("size")) == "file.x: KeyError: 'size'; copy it again"
    assert refused(read, UserError("as it is")) == "as it is"
    panic = type("PanicException", (BaseException,), {})  # as libraries in Rust raise it
    assert refused(read, panic("stack size")) == "file.x: PanicException: stack size; copy it again"
    with pytest.raises(KeyboardInterrupt):
        read(KeyboardInterrupt())
    assert "pip install no_such_package" in refused(import_optional, "no_such_package.part", "--plot")


# ----------------------------------------------- Tokenizers -----------------------------------------------------------

TEXTS = ["", "plain", " spaces\t\r\n\n", "naïve Ω 漢字 👩‍🔬 e\u0301\u200b", "\0\x7f\x1b", "x" * 1000, "<|endoftext|>",
         "a<|endoftext|><|im_end|><s></s>b", "".join(map(chr, range(1, 3000)))]


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0].tolist()


def test_the_bytes_tokenizer_gives_the_bytes_of_any_text():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.eot_token) == (257, 256, "<|endoftext|>")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == list(text.encode()) and tokenizer.decode(ids.tolist()) == text


def test_bytes_are_encoded_without_tiktoken_and_a_batch_is_enough_for_many_cores(tmp_path, monkeypatch):
    monkeypatch.delattr(tiktoken.Encoding, "encode_ordinary_batch")
    bytes_ = load_tokenizer("bytes")
    sizes = []
    tokenizer = dataclasses.replace(bytes_, encode_batch=lambda texts: sizes.append(len(texts)) or
                                    bytes_.encode_batch(texts))
    build(tmp_path, [f"{i} ".ljust(100_000, ".") for i in range(100)], tokenizer, val_bytes=1)
    assert sizes[-1] == 100


def small_encoding(name: str, pattern: str = ".", merges: tuple[str, ...] = (), gap: int = 3) -> tiktoken.Encoding:
    """An encoding of the bytes and some merges, and `gap` ids later its end of text."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in merges:
        ranks[token.encode()] = len(ranks)
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks) + gap})


@pytest.mark.parametrize("change", [dict(pattern=r"\w+|\W+"), dict(merges=("ab",)), dict(gap=4)], ids=str)
def test_a_tiktoken_encoding_that_is_another_now_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.setattr("tiktoken.get_encoding", small_encoding)
    meta = build(tmp_path, ["one", "two"], load_tokenizer("gpt2"))
    monkeypatch.setattr("tiktoken.get_encoding", partial(small_encoding, **change))
    assert "the tokenizer gpt2 is not the one" in refused(saved_tokenizer, tmp_path, meta["tokenizer"])


def test_a_tiktoken_encoding_is_known_by_its_name_and_may_have_gaps_between_its_ids(tmp_path, monkeypatch):
    for name in ("bytes", "gpt2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tiktoken.get_encoding", small_encoding)
    assert load_tokenizer("bytes").vocab_size == 257
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.decode([97, 257, 98, 259])) == (260, "ab<|endoftext|>")


def test_what_tiktoken_cannot_encode_or_download_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", partial(small_encoding, pattern=r"\s+(?!\S)|\s+|\S+"))
    message = refused(build, tmp_path, ["first", "second" + " " * 10**6 + "x"], load_tokenizer("gpt2"))
    assert "--tokenizer=gpt2, a text that begins with 'second  " in message and "leave it out" in message
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: 1 / 0)
    assert "TIKTOKEN_CACHE_DIR" in refused(load_tokenizer, "gpt2")


@pytest.fixture(scope="module")
def bpe_settings() -> dict:
    """The tokenizer.json of a tiny byte-level BPE that adds <s> at the start, as LLaMA's does, cuts texts and pads."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["the cat sat on the mat, the rat sat at the cat"] * 5, tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(4)
    bpe.enable_padding(length=50)
    return json.loads(bpe.to_str())


def save_bpe(folder: Path, settings: dict, eos="<|im_end|>", **how) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings, **how), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


def test_a_huggingface_tokenizer_encodes_all_of_a_text_and_nothing_else(tmp_path, bpe_settings, monkeypatch):
    tokenizer = load_tokenizer(save_bpe(tmp_path / "mine", bpe_settings))
    assert (tokenizer.name, tokenizer.eot, tokenizer.vocab_size) == ("mine", 1, len(bpe_settings["model"]["vocab"]))
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert not np.isin(ids, [0, 1]).any()  # neither <s> in front nor <|im_end|> where the text spells it
        assert tokenizer.decode(ids.tolist()) == text
    assert len(encode(tokenizer, "the cat")) < 7  # merges are applied
    assert tokenizer.decode([0, tokenizer.eot]) == "<s><|im_end|>"  # which shows where a document ends
    # Its library holds much for each id, so it gets a part of the texts at a time.
    limits = []
    monkeypatch.setattr(data, "batches", lambda texts, size, limit: limits.append(limit) or [texts])
    assert tokenizer.encode_batch(TEXTS)[1].size and limits == [data.PART]


@pytest.mark.parametrize("eos, eot, ends", [
    ("<|im_end|>", "", 1), ({"content": "<s>"}, "", 0), ("<|im_end|>", "<s>", 0), ("</s>", "", None), (None, "", None),
    (5, "", None)])
def test_the_end_of_text_is_eos_token_of_the_config_or_eot(tmp_path, bpe_settings, eos, eot, ends):
    folder = save_bpe(tmp_path, bpe_settings, eos)
    for source in (folder, folder / "tokenizer.json"):
        if ends is None:
            message = refused(load_tokenizer, source, eot)
            assert f"--eot={eos or ''}: " in message and "tokenizer_config.json names" in message
        else:
            assert load_tokenizer(source, eot).eot == ends


@pytest.mark.parametrize("kind, missing, normalizer, unknown, refusal", [
    ("ByteLevel", "", "Lowercase", None, None), ("ByteLevel", "Ā", "BertNormalizer", None, None),  # which takes it out
    ("Metaspace", "éΩ", "NFC", "<unk>", None), ("Metaspace", "éΩ", "NFC", None, "loses 'é' 'Ω';"),
    ("Metaspace", "\t", "NFC", None, r"loses '\t';"), ("Split", " ", "NFC", None, "loses ' ';"),
    ("ByteLevel", "Ã", "NFC", None, "loses 'é' 'ß' 'À'"),  # of bytes, Ã stands for the first of é,
    ("ByteLevel", "Ċ", "NFC", None, r"loses '\n';"), ("ByteLevel", "ĉ", "BertNormalizer", None, None),  # tabs to blanks
    ("Metaspace", "ж", "NFC", None, "loses 'ж';"), ("ByteLevel", "ô", "NFC", None, "loses '\\U00100000';"),
    ("ByteLevel", "a", "NFC", None, "loses 'a';")])
def test_a_tokenizer_that_loses_characters_is_refused(tmp_path, kind, missing, normalizer, unknown, refusal):
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = kind == "ByteLevel"
    alphabet = {*(tokenizers.pre_tokenizers.ByteLevel.alphabet() if byte_level else data.PROBE_TEXT + data.PROBE_BYTES)}
    vocab = {token: i for i, token in enumerate(["<s>", "<unk>", *sorted({*alphabet, "▁"} - {*missing})])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token=unknown))
    if kind == "Split":
        bpe.decoder = tokenizers.decoders.Fuse()
    else:
        bpe.pre_tokenizer = getattr(tokenizers.pre_tokenizers, kind)()
        bpe.decoder = getattr(tokenizers.decoders, kind)()
    bpe.normalizer = getattr(tokenizers.normalizers, normalizer)()
    tokenizer = load_tokenizer(save_bpe(tmp_path / "bpe", json.loads(bpe.to_str()), eos="<s>"))
    if refusal:
        assert refusal in refused(data.check_characters, tokenizer)
    else:
        data.check_characters(tokenizer)


def word_pieces(tokenizers):
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        {token: i for i, token in enumerate(["</s>", "[UNK]", "the", "cat", "a", "b", "##b"])}, unk_token="[UNK]"))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer()
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.decoder = tokenizers.decoders.WordPiece()
    return pieces


def words(tokenizers):
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "[UNK]": 1, "The": 2, "cat": 3}, "[UNK]"))
    level.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return level


@pytest.mark.parametrize("make, text, change", [
    (word_pieces, "The cat", "'The cat' comes back as 'the cat'"),
    (word_pieces, "the\tcat", r"'\tcat' comes back as ' cat'"),
    (words, "The dog", "'dog' comes back as '[UNK]'"), (words, "The cat\n", r"'\n' comes back as ''")])
def test_what_a_tokenizer_changes_by_design_is_told_once(program, tmp_path, make, text, change):
    made = make(pytest.importorskip("tokenizers"))
    save_bpe(tmp_path / "tokenizer", json.loads(made.to_str()), eos="</s>")
    for name, first in (("w", ["cat", "a"]), ("x", ["cat"] * 8 + [text] * 12 + ["The dog"]), ("y", [text, "cat"])):
        records = "".join(json.dumps({"text": text}) + "\n" for text in first)
        (tmp_path / f"{name}.jsonl").write_text(records)
    status, stdout, _ = program(f"--tokenizer={tmp_path}/tokenizer", f"--out_dir={tmp_path}/bins",
                                *[f"{name}={tmp_path}/{name}.jsonl" for name in "wxy"])
    [note] = [line for line in stdout.splitlines() if "note" in line]
    assert status == 0 and note == f"note: the tokenizer changes 12 of the first 20 documents of x: {change}"


def special_by_its_text(tokenizers):
    """A Unigram that holds </s> as an entry."""
    entries = [(token, -1.0) for token in ["<unk>", "</s>", "▁", *map(chr, range(33, 127))]]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(entries, unk_id=0))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    unigram.decoder = tokenizers.decoders.Metaspace()
    return unigram


def not_special(tokenizers):
    level = words(tokenizers)
    level.model = tokenizers.models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3}, "[UNK]")
    level.add_tokens(["</s>"])
    return level


@pytest.mark.parametrize("make", [special_by_its_text, words, not_special])
def test_a_document_that_holds_the_end_of_text_is_left_out_and_counted(tmp_path, capsys, make):
    made = make(pytest.importorskip("tokenizers"))
    tokenizer = load_tokenizer(save_bpe(tmp_path / "tokenizer", json.loads(made.to_str()), eos="</s>"))
    build(tmp_path / "bins", ["one", "two", "three </s> three", "one two", "two one"], tokenizer, val_fraction=0.4)
    assert "note: 1 documents left out, which hold </s>, the end of text\n" in capsys.readouterr().out
    n_ends = sum((read_bin(path) == tokenizer.eot).sum() for path in (tmp_path / "bins").glob("*.bin"))
    domain = read_meta(tmp_path / "bins")["domains"]["code"]
    assert n_ends == domain["train"]["documents"] + domain["val"]["documents"] == 4


def test_an_id_that_two_tokens_have_is_refused_and_a_file_that_is_broken(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1, "b": 2, "c": 3}, "c"))
    level.add_special_tokens(["</s>"])  # gets the id 3: the vocabulary has 3 tokens
    message = refused(load_tokenizer, save_bpe(tmp_path, json.loads(level.to_str()), eos="</s>"))
    assert "have one id, 3" in message and "'</s>'" in message and "'c'" in message
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert "tokenizer.json" in refused(load_tokenizer, tmp_path, "</s>")


def test_the_vocabulary_counts_added_tokens_up_to_the_largest_id(tmp_path, bpe_settings):
    import tokenizers
    added = {**bpe_settings["added_tokens"][0], "id": 300, "content": "<new>"}
    settings = {**bpe_settings, "added_tokens": [*bpe_settings["added_tokens"], added]}
    largest = max(tokenizers.Tokenizer.from_str(json.dumps(settings)).get_vocab().values())
    assert load_tokenizer(save_bpe(tmp_path, settings)).vocab_size == largest + 1 > len(settings["model"]["vocab"])


def test_differently_serialised_files_of_one_tokenizer_have_one_fingerprint(tmp_path, bpe_settings):
    model = bpe_settings["model"]
    words = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pairs = [word.split(" ") for word in words]
    a = {**bpe_settings, "model": {**model, "merges": pairs}}
    b = {**bpe_settings, "model": {**model, "merges": words, "vocab": dict(reversed(model["vocab"].items()))}}
    assert settings_digest(a) == settings_digest(b)
    save_bpe(tmp_path / "a", a)
    save_bpe(tmp_path / "b", dict(reversed(b.items())), indent=3, ensure_ascii=False)
    ours = load_tokenizer(tmp_path / "a")
    assert ours.fingerprint == load_tokenizer(tmp_path / "b").fingerprint

    # Dropout of merges, which is switched off
    dropping = load_tokenizer(save_bpe(tmp_path / "dropping", {**a, "model": {**a["model"], "dropout": 0.5}}))
    assert ours.fingerprint == dropping.fingerprint
    assert all(encode(ours, "the cat sat") == encode(dropping, "the cat sat") for _ in range(20))

    # How a special token would be matched in text
    special = [{**token, "normalized": True, "lstrip": True} for token in b["added_tokens"] if token["special"]]
    assert special and settings_digest({**b, "added_tokens": special}) == settings_digest(a)


def changed(settings: dict, change: str) -> dict:
    settings = json.loads(json.dumps(settings))
    merges, vocab = settings["model"]["merges"], settings["model"]["vocab"]
    if change == "merges":
        merges[0], merges[1] = merges[1], merges[0]
    elif change == "vocab":
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    elif change == "added_tokens":
        settings["added_tokens"].append({**settings["added_tokens"][0], "id": len(vocab), "content": "<new>"})
    elif change == "normalizer":
        settings["normalizer"] = {"type": "Lowercase"}
    else:
        settings["pre_tokenizer"]["add_prefix_space"] = True
    return settings


@pytest.mark.parametrize("change", ["merges", "vocab", "added_tokens", "normalizer", "pre_tokenizer"])
def test_what_changes_the_encoding_changes_the_fingerprint(tmp_path, bpe_settings, change):
    ours = load_tokenizer(save_bpe(tmp_path / "a", bpe_settings))
    theirs = load_tokenizer(save_bpe(tmp_path / "b", changed(bpe_settings, change)))
    assert ours.fingerprint != theirs.fingerprint
    assert ours.fingerprint == load_tokenizer(tmp_path / "a", eot="<s>").fingerprint


@pytest.mark.parametrize("as_files, bos", [(False, None), (True, 0)])
def test_a_models_folder_keeps_the_tokenizer_of_its_bins(tmp_path, bpe_settings, as_files, bos):
    source = save_bpe(tmp_path / "source", bpe_settings) if as_files else "bytes"
    meta = build(tmp_path / "bins", ARTICLES, load_tokenizer(source))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": bos, "eos_token_id": 7}))
    assert model_tokenizer(model) is None
    save_tokenizer(model, TokenBins(tmp_path / "bins", 8))
    assert model_tokenizer(model).fingerprint == meta["tokenizer"]["fingerprint"]
    # Documents end with the bins' end of text, and begin with what the model had, or with that too.
    eot = meta["tokenizer"]["eot"]
    for name in ("generation_config.json", "config.json"):
        ids = json.loads((model / name).read_text())
        assert ids["bos_token_id"] == (eot if bos is None else bos)
        assert ids["eos_token_id"] == ids["pad_token_id"] == eot
    # Without what only this project writes, the folder still holds the same tokenizer.
    (model / "tokenizer_meta.json").unlink()
    assert model_tokenizer(model).fingerprint == meta["tokenizer"]["fingerprint"]
    if as_files:
        assert (model / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        # The end of text that was named with --eot is the student's, too, and what is broken is refused at once.
        build(tmp_path / "other", ARTICLES, load_tokenizer(source, eot="a"))
        save_tokenizer(model, TokenBins(tmp_path / "other", 8))
        assert json.loads((model / "tokenizer_config.json").read_text())["eos_token"] == "a"
        (tmp_path / "other" / "tokenizer_config.json").write_text("{")
        assert "JSONDecodeError" in refused(verify, tmp_path / "other")


def test_nanogpts_bins_open_once_they_are_described(tmp_path, made):
    entries = {"dtype": "uint16"}
    for side in ("train", "val"):
        path = Path(shutil.copyfile(made / f"code.{side}.bin", tmp_path / f"{side}.bin"))
        entries[side] = {"file": path.name, "tokens": path.stat().st_size // 2, "sha256": file_sha256(path)}
    write_meta(tmp_path, load_tokenizer("bytes"), {"web": entries})
    theirs = TokenBins(tmp_path, 16)
    ours = TokenBins(made, 16, ["code"])
    assert theirs.n_windows == {"web": ours.n_windows["code"]}
    assert (theirs.eval_windows("web", "val", 3) == ours.eval_windows("code", "val", 3)).all()
    assert theirs.tokenizer["fingerprint"] == ours.tokenizer["fingerprint"]
    verify(tmp_path)


# ----------------------------------------------- Documents ------------------------------------------------------------

def documents(*paths: Path, text_key: str = "text") -> tuple[list[str], Counter]:
    left_out = Counter()
    return [text for _, text in read_documents({"a": paths}, text_key, "", {"a": left_out})], left_out


def compressed(name: str, raw: bytes) -> bytes:
    """`raw` as a file called `name` holds it, in two frames, as parallel compressors and `cat` make them."""
    parts = (raw[:20], raw[20:])
    if name.endswith(".gz"):
        return b"".join(map(gzip.compress, parts))
    if name.endswith(".zst"):
        pytest.importorskip("pyarrow")  # which reads it
        return b"".join(map(pytest.importorskip("zstandard").compress, parts))
    return raw


MARK = b"\xef\xbb\xbf"  # of byte order, which is no text


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonlines", "a.ndjson", "a.jsonl.zst", "a.json", "c4.00000.json.gz"])
def test_each_json_record_of_a_line_is_a_document(tmp_path, name, mark):
    (tmp_path / name).write_bytes(compressed(name, mark + RECORDS.encode()))
    assert documents(tmp_path / name) == (["one é", "two\nlines\0"], Counter())
    assert documents(tmp_path / name, text_key="body")[0] == ["ONE É", "TWO\nLINES\0"]


def test_each_row_of_parquet_is_a_document(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one é", None, "two"], "body": ["a", "b", "c"]}), path)
    texts, left_out = documents(path)
    assert texts == ["one é", "two"] and list(left_out.values()) == [1]
    assert documents(path, text_key="body")[0] == ["a", "b", "c"]
    assert "a: no document in its 1 files" in refused(documents, path, text_key="absent")


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("name, text", [
    ("a.py", "naïve\r\n漢字"), ("a.txt.gz", "naïve\n漢字, and more"), ("a.md", '{\n  "text": "x"\n}\n'), ("none", "x")])
def test_any_other_file_is_one_document_as_it_stands(tmp_path, name, text, mark):
    (tmp_path / name).write_bytes(compressed(name, mark + text.encode()))
    assert documents(tmp_path / name) == ([text], Counter())


def test_a_long_text_is_cut_at_the_ends_of_lines_in_a_record_too(tmp_path):
    lines = [f"{i} ".ljust(1000, ".") + "\n" for i in range(17_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    texts, _ = documents(tmp_path / "a.txt")
    assert "".join(texts) == "".join(lines) and len(texts) == 3 and all(text.endswith("\n") for text in texts)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "".join(lines)}))
    assert documents(tmp_path / "a.jsonl")[0] == texts


@pytest.mark.parametrize("name, raw, texts, reason", [
    ("a.txt", b"bad \xff byte", ["bad \ufffd byte"], "UTF-8"),
    ("a.txt", b" \n\t", [], "empty"),
    ("a.png", b"\x89PNG\0\0\xff", [], "binary"), ("a.txt", b"a" * 70_000 + b"\0", [], "binary"),
    ("a.txt", b"a" * 8_000_000 + b"\nb\0", ["a" * 8_000_000 + "\n"], "after the first part, which was taken: /"),
    ("a.jsonl", b'{"text": "bad \xff byte"}\n', ["bad \ufffd byte"], "UTF-8"),
    ("a.jsonl", b'{"text": "half \\ud800"}\n', ["half \ufffd"], "UTF-8"),
    ("a.jsonl", b'{"text": ""}\n', [], "empty"),
    ("a.jsonl", b'{"other": "x"}\n', [], "key text"),
    ("a.jsonl", b'{"text": 3}\n', [], "key text")])
def test_what_is_left_out_or_replaced_is_counted(tmp_path, name, raw, texts, reason):
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "fine").write_text("fine")
    got, left_out = documents(tmp_path / name, tmp_path / "fine")
    assert got == [*texts, "fine"] and len(left_out) == 1
    assert [count for why, count in left_out.items() if reason in why] == [1]


@pytest.mark.parametrize("name, raw, named", [
    ("a.jsonl", b'\n[{"text": "x"}]\n{"text": \n', "a.jsonl, line 2"),
    ("a.jsonl", b'[{"text": "x"},\n{"text": "y"}\n,{"text": "z"}]', "a.jsonl, line 1"),
    ("a.jsonl", b'\n [\n{"text": "x"},\n{"text": "y"}\n]\n', "a.jsonl, line 2"),
    ("a.json", b'{"data": [\n{"text": "x"},\n{"text": "y"}\n]}', "jq -c '.[]'"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n{"text": \n', "a.jsonl, line 2"),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "a.jsonl: is UTF-16"),
    ("a.txt", "text".encode("utf-32"), "iconv -f UTF-32 -t UTF-8"),
    ("a.txt", "\ufefftext".encode("utf-16-be"), "iconv -f UTF-16 -t UTF-8"),
    ("a.txt.gz", b"", "a.txt.gz"), ("a.txt.zst", b"", "a.txt.zst"),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz"), ("a.jsonl.zst", b"no zstd", "a.jsonl.zst"),
    ("a.parquet", b"no parquet", "a.parquet")])
def test_a_damaged_file_is_named(tmp_path, name, raw, named):
    if name.endswith((".zst", ".parquet")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(raw)
    assert named in refused(documents, tmp_path / name)


def test_broken_records_are_left_out_and_the_first_is_told(program, tmp_path):
    broken = ['{"text": ', '["text"]', '{"text": "x", "n": ' + "9" * 5000 + "}", '{"text": ' + "[" * 100_000]
    (tmp_path / "a.jsonl").write_text(RECORDS + "\n" + "\n".join(broken) + "\n" + RECORDS)
    (tmp_path / "b.jsonl").write_text("}\n" + RECORDS)
    status, stdout, stderr = program(f"x={tmp_path}/*.jsonl", f"--out_dir={tmp_path}/bins")
    notes = [line for line in stdout.splitlines() if line.startswith("note: ")]
    assert (status, stderr, len(notes)) == (0, "", 2)
    assert f"{tmp_path}/a.jsonl, line 4: " in notes[0] and notes[1] == "note: x: 5 broken records left out"
    domain = read_meta(tmp_path / "bins")["domains"]["x"]
    assert domain["train"]["documents"] + domain["val"]["documents"] == 6


def test_a_zst_of_a_larger_window_and_parquet_of_bytes_are_told(tmp_path):
    zstandard, parquet = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(writer.compress(b"text" * 1000) + writer.flush())
    message = refused(documents, tmp_path / "a.txt.zst")
    assert "a.txt.zst: " in message and "too much memory" in message and "--long=27" in message
    parquet.write_table(sys.modules["pyarrow"].table({"text": [b"one", b"two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("b")
    assert documents(tmp_path / "a.parquet", tmp_path / "b.txt") == (["b"], {
        "records left out, without a text (bytes are none) under the key text": 2})


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_compressed_file_that_is_cut_off_is_no_whole_one(tmp_path, name):
    text = "".join(f"{i * i}\n" for i in range(100_000))  # more than one block
    (tmp_path / name).write_bytes(compressed(name, text.encode())[:-1000])
    assert name in refused(documents, tmp_path / name)
    (tmp_path / name).write_bytes(compressed(name, text.encode()))
    assert documents(tmp_path / name)[0] == [text]


def names(found: dict[str, list[Path]], folder: Path) -> dict[str, list[str]]:
    return {name: [path.relative_to(folder).as_posix() for path in paths] for name, paths in found.items()}


def test_sources_are_files_folders_and_globs(tmp_path):
    for name in ("b.txt", "a.txt", "sub/deep/c.txt", "sub/d.md", ".hidden/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    found = expand_sources([f"file={tmp_path}/a.txt", f"folder={tmp_path}", f"glob={tmp_path}/*.txt",
                            f"deep={tmp_path}/**/*.txt", f"two={tmp_path}/*.txt", f"two={tmp_path}/sub/*.md",
                            f"two={tmp_path}/./*.txt"], False, defaultdict(Counter))
    assert names(found, tmp_path) == {
        "file": ["a.txt"], "folder": ["a.txt", "b.txt", "sub/d.md", "sub/deep/c.txt"], "glob": ["a.txt", "b.txt"],
        "deep": ["a.txt", "b.txt", "sub/deep/c.txt"], "two": ["a.txt", "b.txt", "sub/d.md"]}


def test_links_lead_to_each_file_once_and_what_cannot_be_read_is_counted(tmp_path, monkeypatch):
    for folder in ("root/a", "root/closed", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text("text")
    for link, target in (("loop", "root"), ("a/loop", "root"), ("a/more", "elsewhere"), ("y.txt", "root/a/x.txt"),
                         ("gone.txt", "nothing"), ("self.txt", "root/self.txt")):
        (tmp_path / "root" / link).symlink_to(tmp_path / target)
    os.mkfifo(tmp_path / "root" / "a" / "pipe.txt")
    scandir = os.scandir

    def guarded(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", guarded)
    left_out = defaultdict(Counter)
    words = ["all=root", "glob=root/**/*.txt", "glob=root/*.txt", "glob=**/a/**/x.txt"]
    monkeypatch.chdir(tmp_path)
    found = expand_sources(words, False, left_out)
    once = ["root/a/more/x.txt", "root/a/x.txt"]
    assert names(found, Path(".")) == {"all": once, "glob": once}
    assert left_out["all"] == {"links to nothing, pipes and devices left out": 3, "unreadable folders left out": 1}
    # It is said where that is why nothing matches.
    for word in ("all=root/closed/**/*.txt", "all=root/closed/*.txt", "all=root/closed"):
        assert "unreadable folders" in refused(expand_sources, [word], False, defaultdict(Counter))


def test_a_file_is_read_by_the_name_that_says_what_it_is_and_a_name_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("hub/blobs", "hub/snapshots", "man/man1", "man/man5", "~", "od[d]", "odd", "zip"):
        Path(folder).mkdir(parents=True)
    for name in ("hub/blobs/9f86", "part[1].jsonl", "part1.jsonl", "man/man5/passwd", "~/home.txt", "d.jsonl",
                 "od[d]/a.txt", "odd/b.txt"):
        Path(name).write_text(RECORDS)
    Path("zip/a").write_bytes(gzip.compress(b"text"))
    Path("zip/B.TXT.GZ").symlink_to("a")
    Path("hub/snapshots/train.jsonl").symlink_to("../blobs/9f86")
    Path("latest").symlink_to("d.jsonl")
    os.link("d.jsonl", "hard.txt")
    monkeypatch.setenv("HOME", str(tmp_path / "~"))
    words = ["hub=hub", "link=latest", "hard=*d*", "name=part[1].jsonl", "man=man/man[15]", "home=~/*.txt",
             "odd=od[d]/*.txt", "zip=zip"]
    found = expand_sources(words, False, defaultdict(Counter))
    found = {name: [Path(os.path.abspath(path)) for path in paths] for name, paths in found.items()}
    assert names(found, tmp_path) == {
        "hub": ["hub/snapshots/train.jsonl"], "link": ["d.jsonl"], "hard": ["d.jsonl"], "name": ["part[1].jsonl"],
        "man": ["man/man5/passwd"], "home": ["~/home.txt"], "odd": ["od[d]/a.txt"], "zip": ["zip/B.TXT.GZ"]}
    assert documents(tmp_path / "zip" / "B.TXT.GZ") == (["text"], Counter())


def test_the_documents_of_all_domains_are_one_stream_and_an_empty_domain_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(RECORDS)
    (tmp_path / "b.txt").write_text(" ")
    one, empty = [tmp_path / "a.jsonl"], [tmp_path / "b.txt"]
    left_out = {"x": Counter(), "y": Counter()}
    assert list(read_documents({"x": one, "y": empty + one}, "text", "", left_out)) == [
        ("x", "one é"), ("x", "two\nlines\0"), ("y", "one é"), ("y", "two\nlines\0")]
    assert "y: no document" in refused(list, read_documents({"x": one, "y": empty}, "text", "", left_out))


@pytest.mark.parametrize("name, raw, fix", [
    ("a.csv", b"a,b", ".jsonl or .parquet"), ("a.TSV.gz", b"", ".jsonl or .parquet"), ("a.png", b"\0", "no document"),
    ("a.json", b'[{"text": "x"}]', "jq -c '.[]'"), ("a.ndjson", b'{\n "text": "x"\n}', "one JSON record per line")])
def test_files_that_hold_no_text_are_one_message_with_the_fix(program, tmp_path, name, raw, fix):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(raw)
    for source in (folder, folder / "*"):
        status, _, stderr = program(f"mine={source}", f"--out_dir={tmp_path}/bins")
        assert status == 2 and stderr.count("\n") == 1 and fix in stderr
        assert name in stderr or name == "a.png"


# ----------------------------------------------- Labelled records -----------------------------------------------------

def labelled(i: int, label) -> dict:
    return {"text": f"text number {i}", "meta": {"set": label}}


LABELLED = [labelled(i, ("RedPajamaC4", "Pile/CC (x)")[i % 2]) for i in range(20)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet"])
def test_the_domain_may_be_what_each_record_says(program, tmp_path, name):
    records = [*LABELLED, {"text": "no label"}, labelled(1, None), labelled(2, "—"), {"meta": {"set": "RedPajamaC4"}}]
    if name.endswith("parquet"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name)
    else:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name).write_bytes(compressed(name, lines.encode()))
    status, stdout, stderr = program(f"{tmp_path}/a.*", "--domain_key=meta.set", f"--out_dir={tmp_path}/bins")
    assert (status, stderr) == (0, "")
    meta = json.loads((tmp_path / "bins" / "meta.json").read_text())
    assert sorted(meta["domains"]) == ["Pile_CC_x", "RedPajamaC4"]
    for domain, parity in (("RedPajamaC4", 0), ("Pile_CC_x", 1)):
        texts = [text for side in ("train", "val") for text in bin_texts(tmp_path / "bins" / f"{domain}.{side}.bin")]
        assert sorted(texts) == sorted(record["text"] for record in LABELLED[parity::2])
    assert "note: records: 3 records left out, without a letter or digit of ASCII under the key meta.set\n" in stdout
    assert "note: records: 1 records left out, without a text (bytes are none) under the key text\n" in stdout


@pytest.mark.parametrize("records, named", [
    ([{"text": "no label"}], "records: no document in its 1 files"),
    ([labelled(1, label) for label in (["a"], {"b": 1}, True, float("nan"))], "records: no document in its 1 files"),
    ([labelled(i, f"d{i % 257}") for i in range(600)], "at most 256"),
])
def test_labels_that_make_no_domains_are_refused(program, tmp_path, records, named):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status, _, stderr = program(f"{tmp_path}/a.jsonl", "--domain_key=meta.set", f"--out_dir={tmp_path}/bins")
    assert status == 2 and stderr.count("\n") == 1 and named in stderr


@pytest.mark.parametrize("labels, domains, merged", [
    ([0, 1.5], ["0", "1_5"], []),
    (["a b", "a-b"], ["a_b"], ["10 records in the domain a_b with another label than 'a b'"]),
    (["x" * 300, "y"], ["x" * 100, "y"], [])])
def test_any_label_makes_a_name_and_those_that_make_the_same_are_merged(program, tmp_path, labels, domains, merged):
    records = [labelled(i, labels[i % 2]) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status, stdout, _ = program(f"{tmp_path}/a.jsonl", "--domain_key=meta.set", f"--out_dir={tmp_path}/bins")
    found = read_meta(tmp_path / "bins")["domains"]
    assert status == 0 and list(found) == domains
    assert sum(entry[side]["documents"] for entry in found.values() for side in ("train", "val")) == 20
    assert [line for line in stdout.splitlines() if "note" in line] == [f"note: records: {note}" for note in merged]


def test_labelled_records_and_named_sources_are_one_build(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("year=2023").mkdir()
    Path("books").mkdir()
    Path("year=2023", "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in LABELLED))
    Path("math.jsonl").write_text(RECORDS)
    for name in ("one", "two"):
        Path("books", name).write_text(name)
    status, _, stderr = program("year=2023/*.jsonl", "math-2=math.jsonl", "records=books", "--domain_key=meta.set",
                                "--out_dir=bins")
    assert (status, stderr) == (0, "")
    assert sorted(read_meta("bins")["domains"]) == ["Pile_CC_x", "RedPajamaC4", "math-2", "records"]


# ----------------------------------------------- The validation split -------------------------------------------------

@pytest.mark.parametrize("val_bytes", [1, 3000, 10**9])
def test_the_split_does_not_depend_on_the_order_of_documents(tmp_path, val_bytes):
    pairs = list(stream({"code": ARTICLES, "prose": ARTICLES[::2] * 2}))
    tokenizer = load_tokenizer("bytes")
    build_bins(tmp_path / "a", tokenizer, pairs, val_bytes=val_bytes, val_fraction=0.3)
    for seed in range(3):
        shuffled = random.Random(seed).sample(pairs, len(pairs))
        build_bins(tmp_path / str(seed), tokenizer, shuffled, val_bytes=val_bytes, val_fraction=0.3)
        for name in ("code", "prose"):
            a, b = (tmp_path / folder / f"{name}.val.bin" for folder in ("a", str(seed)))
            assert a.read_bytes() == b.read_bytes()
            a, b = (tmp_path / folder / f"{name}.train.bin" for folder in ("a", str(seed)))
            assert sorted(bin_texts(a)) == sorted(bin_texts(b))


@pytest.mark.parametrize("val_bytes", [1, 20, 40, 60, 100, 200, 1000])
def test_duplicates_never_straddle_the_split_and_no_copy_is_lost(tmp_path, val_bytes):
    rng = random.Random(val_bytes)
    domains = {}
    for i in range(5):
        kinds = [f"{'text' * 5} {n}" for n in range(rng.choice([2, 3, 8]))]
        domains[f"d{i}"] = rng.choices(kinds, k=20) + ["text 0", "text 1"]
    build(tmp_path, domains, val_bytes=val_bytes, val_fraction=0.9)
    for name, texts in domains.items():
        train, val = (bin_texts(tmp_path / f"{name}.{side}.bin") for side in ("train", "val"))
        assert Counter(train + val) == Counter(texts) and not set(train) & set(val)
        assert sum(map(len, val)) <= val_bytes or len(set(val)) == 1


@pytest.mark.parametrize("limits", [{}, {"val_bytes": 1500}, {"val_fraction": 0.4}])
def test_a_text_whose_copies_exceed_the_limit_is_train_text_and_others_are_validation(tmp_path, limits):
    first, second, *others = sorted(ARTICLES, key=by_hash)
    texts = ARTICLES + [first] * 1000  # more than half of all
    train, val = sides(tmp_path, texts, **limits)
    assert first not in val and val[0] == second and Counter(train + val) == Counter(texts)
    most = limits.get("val_fraction", 0.05) * len("".join(texts).encode())
    assert 0.5 < len("".join(val).encode()) / min(most, limits.get("val_bytes", most)) <= 1
    # Where every text exceeds it, the first without copies is validation, or else the one with the fewest bytes.
    assert sides(tmp_path / "a", [first] * 9 + [second, others[0]], val_fraction=0)[1] == [second]
    assert sides(tmp_path / "b", [first] * 20 + ["x"] * 9 + [second] * 30, val_fraction=0)[1] == ["x"] * 9


def test_texts_that_exceed_the_limit_are_train_text_whatever_their_hashes_and_others_fill_it(tmp_path):
    huge = sorted([f"{i} " + "x" * 5000 for i in range(200)], key=by_hash)
    for few in (huge[:1], huge[:20], huge[50:]):
        train, val = sides(tmp_path / str(len(few)), few + ARTICLES + few, val_bytes=2000, val_fraction=0.4)
        assert 1500 < len("".join(val).encode()) <= 2000 and val == sorted(ARTICLES, key=by_hash)[:len(val)]
        assert Counter(train + val) == Counter(few + ARTICLES + few)


def test_texts_whose_hashes_begin_alike_are_two_documents(tmp_path):
    alike = ["text number 43376", "text number 65761"]
    assert len({by_hash(text)[:8] for text in alike}) == 1
    train, val = sides(tmp_path, [*alike, "other"], val_fraction=0.5)
    assert sorted(train + val) == sorted([*alike, "other"])


BY_HASH = sorted(ARTICLES * 2, key=by_hash)  # copies count as often as they come
BYTES = np.cumsum([len(text.encode()) for text in BY_HASH])  # of the documents up to each


@pytest.mark.parametrize("limits, most", [
    ({}, 0.05 * BYTES[-1]), ({"val_fraction": 0.3}, 0.3 * BYTES[-1]), ({"val_bytes": 2000}, 2000),
    ({"val_bytes": 20_000, "val_fraction": 0.5}, 20_000), ({"val_bytes": int(BYTES[9])}, BYTES[9]),
    ({"val_bytes": int(BYTES[9]) - 1}, BYTES[7])])
def test_validation_takes_as_many_bytes_as_it_may(tmp_path, limits, most):
    train, val = sides(tmp_path, ARTICLES * 2, **limits)
    count = np.searchsorted(BYTES, most, side="right") // 2 * 2  # both copies or none
    assert val == BY_HASH[:count] and sorted(train) == sorted(BY_HASH[count:])


@pytest.mark.parametrize("texts, limits", [
    (ARTICLES, {"val_fraction": 0}), (ARTICLES, {"val_bytes": 1}), (ARTICLES, {"val_fraction": 1 - 1e-9}),
    (["one", "two"], {}), (["one", "two" * 1000, "two" * 1000], {"val_fraction": 0.9}), (["a" * 9999, "b"], {})])
def test_each_side_has_a_document(tmp_path, texts, limits):
    assert all(sides(tmp_path, texts, **limits))


@pytest.mark.parametrize("domains, named", [
    ({"prose": ["alone"] * 5, "code": ["alone"]}, "no domain has two distinct documents"),
    ({f"d{i}": ["one", "two"] for i in range(257)}, "at most 256 domains")])
def test_a_stream_without_a_split_is_refused(tmp_path, domains, named):
    assert named in refused(build, tmp_path, domains)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_domain_with_one_distinct_document_is_left_out_and_told(tmp_path, capsys):
    meta = build(tmp_path, {"alone": ["one"] * 5, "code": ARTICLES}, val_bytes=1)
    assert list(meta["domains"]) == ["code"] and "note: alone: left out; " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "code.train.bin", "code.val.bin", "meta.json"}


@pytest.mark.parametrize("distinct", [10**9, 3])
def test_the_memory_of_a_build_does_not_grow_with_its_input(tmp_path, monkeypatch, distinct):
    monkeypatch.setattr(data, "BATCH_BYTES", 1 << 20)

    def peak(megabytes: int) -> int:
        texts = ((f"d{i % 2}", f"document {i % distinct} ".ljust(2000, "é")) for i in range(megabytes * 260))
        tracemalloc.start()
        build_bins(tmp_path / str(megabytes), load_tokenizer("bytes"), texts, val_bytes=500_000)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result
    small, large = peak(3), peak(30)
    assert large < 1.2 * small and large < 20e6


# ----------------------------------------------- Bins -----------------------------------------------------------------

@pytest.mark.parametrize("vocab_size, dtype, width", [(257, "uint16", 2), (65536, "uint16", 2), (65537, "uint32", 4),
                                                      (151_936, "uint32", 4)])
def test_ids_are_little_endian_uint16_where_they_fit(tmp_path, vocab_size, dtype, width):
    ids = [1, 256, vocab_size - 1]
    tokenizer = dataclasses.replace(load_tokenizer("bytes"), vocab_size=vocab_size, eot=2, encode_batch=lambda
                                    texts: [np.array(ids, np.uint32)] * len(texts))
    meta = build(tmp_path, ["one", "two"], tokenizer)
    assert meta["domains"]["code"]["dtype"] == dtype
    expected = b"".join(i.to_bytes(width, "little") for i in (*ids, 2))
    assert (tmp_path / "code.train.bin").read_bytes() == (tmp_path / "code.val.bin").read_bytes() == expected
    assert TokenBins(tmp_path, 3).train_windows(np.array([0]), np.array([0])).tolist() == [[*ids, 2]]


def test_meta_json_says_what_the_bins_are(tmp_path):
    texts = {"code": ARTICLES, "prose": ARTICLES[:50]}
    meta = build(tmp_path, texts, made_by={"key": 1})
    assert json.loads((tmp_path / "meta.json").read_text()) == meta == read_meta(tmp_path)
    assert (meta["format_version"], meta["made_by"]) == (2, {"key": 1})
    assert meta["tokenizer"] == {"name": "bytes", "vocab_size": 257, "eot": 256, "eot_token": "<|endoftext|>",
                                 "fingerprint": load_tokenizer("bytes").fingerprint, "files": []}
    assert list(meta["domains"]) == ["code", "prose"]
    files = {"meta.json", ".lock"}
    for name, domain in meta["domains"].items():
        assert domain["dtype"] == "uint16"
        for side in ("train", "val"):
            path = tmp_path / f"{name}.{side}.bin"
            kept = bin_texts(path)
            assert domain[side] == {
                "file": path.name, "tokens": path.stat().st_size // 2, "documents": len(kept),
                "bytes": sum(len(text.encode()) for text in kept), "sha256": sha256(path.read_bytes()).hexdigest()}
            files.add(path.name)
        assert domain["train"]["documents"] + domain["val"]["documents"] == len(texts[name])
    assert {path.name for path in tmp_path.iterdir()} == files


def test_the_tokenizers_files_are_copied_beside_the_bins_and_verified(tmp_path, bpe_settings):
    source = save_bpe(tmp_path / "tokenizer", bpe_settings)
    meta = build(tmp_path / "bins", ARTICLES, load_tokenizer(source))
    assert sorted(meta["tokenizer"]["files"]) == ["tokenizer.json", "tokenizer_config.json"]
    for name in meta["tokenizer"]["files"]:
        assert (tmp_path / "bins" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = saved_tokenizer(tmp_path / "bins", meta["tokenizer"])
    window = TokenBins(tmp_path / "bins", 8).eval_windows("code", "val", 1)[0]
    assert tokenizer.decode(window.tolist()).startswith("Article")
    verify(tmp_path / "bins")
    save_bpe(tmp_path / "bins", changed(bpe_settings, "normalizer"))
    assert "the tokenizer tokenizer is not the one" in refused(verify, tmp_path / "bins")


KILLED_BUILD = """
import os, signal, sys
import data, test_data

def documents():
    for i, document in enumerate(test_data.stream(test_data.LONG)):
        if i == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield document
    if sys.argv[2] == "-1":  # when the first bin has its name
        replace = os.replace
        os.replace = lambda *paths: (replace(*paths), os.kill(os.getpid(), signal.SIGKILL))

data.BATCH_BYTES = 1 << 20
data.build_bins(sys.argv[1], data.load_tokenizer("bytes"), documents(), val_bytes=100_000)
"""
# Five megabytes: much is written while later documents are still to come.
LONG = {name: [f"{name} {i} ".ljust(100, ".") * 1000 for i in range(25)] for name in ("code", "prose")}


@pytest.mark.parametrize("moment", [0, 45, -1])
def test_a_killed_build_leaves_no_half_written_bin_and_starts_again(tmp_path, moment):
    build(tmp_path / "straight", LONG, val_bytes=100_000)
    folders = [Path(data.__file__).parent, Path(__file__).parent]
    run = subprocess.run([sys.executable, "-c", KILLED_BUILD, tmp_path / "killed", str(moment)],
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))})
    assert run.returncode == -signal.SIGKILL
    left = contents(tmp_path / "killed")
    del left[".lock"]
    finished = {name for name in left if not name.endswith(".tmp")}
    assert finished == ({"code.train.bin"} if moment == -1 else set()) and (moment == 0 or len(left) == 4)
    for name in finished:
        assert left[name] == (tmp_path / "straight" / name).read_bytes()
    build(tmp_path / "killed", LONG, val_bytes=100_000)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.parametrize("name", ["x.train.bin", "x.val.bin.tmp", "tokenizer.json", "meta.json.tmp", "notes.bin.tmp"])
def test_files_of_the_user_are_not_overwritten_or_removed(tmp_path, bpe_settings, name):
    tokenizer = load_tokenizer(save_bpe(tmp_path / "tokenizer", bpe_settings))
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / name).write_text("mine")
    if name == "notes.bin.tmp":
        build(tmp_path / "bins", ["one", "two"], tokenizer)
        assert (tmp_path / "bins" / name).read_text() == "mine"
    else:
        assert f"holds {name}, which no build" in refused(build, tmp_path / "bins", ["one", "two"], tokenizer)
        assert contents(tmp_path / "bins") == {name: b"mine"}
    # A run's folder has a lock file, too. No lock file is emptied.
    (tmp_path / "bins" / ".lock").touch()
    (tmp_path / "bins" / "metrics.jsonl").touch()
    if name != "notes.bin.tmp":
        assert f"holds {name}, which no build" in refused(build, tmp_path / "bins", ["one", "two"], tokenizer)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").write_text("mine")
    build(tmp_path / "locked", ["one", "two"], tokenizer)
    assert (tmp_path / "locked" / ".lock").read_text() == "mine"
    # The tokenizer's own folder may hold the bins.
    files = contents(tmp_path / "tokenizer")
    assert "no domain" in refused(build, tmp_path / "tokenizer", ["one"], tokenizer)
    assert {**contents(tmp_path / "tokenizer"), ".lock": b""} == {**files, ".lock": b""}
    build(tmp_path / "tokenizer", ["one", "two"], tokenizer)
    verify(tmp_path / "tokenizer")


def test_hundreds_of_domains_need_few_open_files_and_names_that_a_terminal_lacks_are_shown(tmp_path):
    resource = pytest.importorskip("resource")
    records = [labelled(i, f"d{i % 200}") for i in range(400)]
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, 1]))
    command = [sys.executable, data.__file__, str(path), "--domain_key=meta.set", f"--out_dir={tmp_path}/bins"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert (run.returncode, run.stderr) == (0, "") and "\\udcff.jsonl, line 401: no record" in run.stdout
    assert len(read_meta(tmp_path / "bins")["domains"]) == 200 and "WARNING: d7 has only 1 documents" in run.stdout
    # With its output closed
    command = f"{sys.executable} {data.__file__} --verify={tmp_path}/bins >&-"
    run = subprocess.run(command, shell=True, capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")


def test_two_builds_do_not_share_a_folder(tmp_path):
    def documents():
        yield "code", "one"
        message = refused(build, tmp_path, ARTICLES)
        assert message.startswith(f"{tmp_path}: another process is using it; ")
        yield "code", "two"
    build_bins(tmp_path, load_tokenizer("bytes"), documents())
    texts = [bin_texts(tmp_path / f"code.{side}.bin") for side in ("train", "val")]
    assert sorted(texts) == [["one"], ["two"]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="requires /dev/full")
@pytest.mark.parametrize("file", ["code.train.bin", "code.val.bin", "meta.json"])
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_full_disk_is_told_with_the_file_and_what_was_begun_is_removed(tmp_path, file, length):
    (tmp_path / f"{file}.tmp").symlink_to("/dev/full")
    message = refused(build, tmp_path, ["one" * length, "two" * length])
    assert "[Errno 28] No space left on device" in message and str(tmp_path / file) in message
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "meta.json").exists()
    assert not list(tmp_path.glob("*.bin"))


def test_a_disk_that_is_full_when_the_tokenizer_is_copied_keeps_no_bins(tmp_path, bpe_settings, monkeypatch):
    def full(source, target):
        Path(target).touch()
        raise OSError(28, "No space left on device", target)
    tokenizer = load_tokenizer(save_bpe(tmp_path / "tokenizer", bpe_settings))
    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left on device" in refused(build, tmp_path / "bins", ["one", "two"], tokenizer)
    assert os.listdir(tmp_path / "bins") == [".lock"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Bins, and what write_text writes: meta.json, and metrics.jsonl at the start of a run."""
    safe = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: safe.add(os.fstat(descriptor).st_ino))
    replace = os.replace
    named = []

    def checked(source, target):
        assert os.stat(source).st_ino in safe, target
        named.append(Path(target).name)
        replace(source, target)
    monkeypatch.setattr(os, "replace", checked)
    build(tmp_path, ["one", "two"])
    data.write_text(tmp_path / "metrics.jsonl", "{}")
    assert named == ["code.train.bin", "code.val.bin", "meta.json", "metrics.jsonl"]


# ----------------------------------------------- Windows --------------------------------------------------------------

def one(i: int) -> np.ndarray:
    return np.array([i])


def test_a_bin_of_n_tokens_has_n_less_1_over_b_windows(tmp_path):
    # In domain d7, either document has 7 tokens with its end of text.
    meta = build(tmp_path, {f"d{n}": ["a" * (n - 1), "b" * (n - 1)] for n in range(2, 12)})
    for n in range(2, 12):
        assert meta["domains"][f"d{n}"]["train"]["tokens"] == n
        tokens = read_bin(tmp_path / f"d{n}.train.bin")
        for size in range(1, n):
            bins = TokenBins(tmp_path, size, [f"d{n}"])
            assert bins.n_windows == {f"d{n}": (n - 1) // size}
            for i in range((n - 1) // size):
                windows = bins.train_windows(one(0), one(i))
                assert windows.dtype == np.int64
                assert windows.tolist() == [tokens[i * size:i * size + size + 1].tolist()]
        assert f"--block_size={n}" in refused(TokenBins, tmp_path, n, [f"d{n}"])
    assert "in domain d2 d3 d4 of" in refused(TokenBins, tmp_path, 4)  # all at once


def test_train_windows_come_in_the_order_asked(made):
    bins = TokenBins(made, 16)
    domain_ids, window_ids = np.array([1, 0, 1, 0, 0]), np.array([500, 3, 0, 700, 3])
    windows = pickle.loads(pickle.dumps(bins)).train_windows(domain_ids, window_ids)  # ranks get pickled copies
    for row, domain_id, i in zip(windows, domain_ids, window_ids, strict=True):
        tokens = read_bin(made / f"{bins.names[domain_id]}.train.bin")
        assert row.tolist() == tokens[i * 16:i * 16 + 17].tolist()


def test_validation_and_test_windows_are_evenly_spaced_each_over_its_own_half(made):
    bins, tokens = TokenBins(made, 16), read_bin(made / "code.val.bin")
    W = (len(tokens) - 1) // 16
    h = W // 2
    assert W > 20 and W % 2 == 1  # the second half is the larger one
    every = np.array([tokens[i * 16:i * 16 + 17] for i in range(W)])
    for n in (1, 2, 7, h):
        val_ids = [(i * h) // n for i in range(n)]
        test_ids = [h + (i * (W - h)) // n for i in range(n)]
        np.testing.assert_array_equal(bins.eval_windows("code", "val", n), every[val_ids])
        np.testing.assert_array_equal(bins.eval_windows("code", "test", n), every[test_ids])
    np.testing.assert_array_equal(bins.eval_windows("code", "test", W - h), every[h:])
    for side, available in (("val", h), ("test", W - h)):
        message = refused(bins.eval_windows, "code", side, available + 1)
        assert f"--{side}_samples={available + 1}: domain code of {made} has {available} windows of" in message
        assert f"lower --{side}_samples or --block_size" in message and "--val_fraction" in message


def test_the_documents_that_windows_touch_are_counted(made, tmp_path):
    bins, tokens = TokenBins(made, 16), read_bin(made / "code.val.bin")
    W = (len(tokens) - 1) // 16
    document = np.cumsum(tokens == 256) - (tokens == 256)  # of each token, its end included
    for side, first, available in (("val", 0, W // 2), ("test", W // 2, W - W // 2)):
        for n in (1, 3, available):
            ids = [first + (i * available) // n for i in range(n)]
            touched = {d for i in ids for d in document[i * 16:i * 16 + 16].tolist()}
            assert bins.eval_documents("code", side, n) == len(touched)
    assert bins.eval_documents("code", "val", W // 2) > 1
    # Copies of one text count as one.
    build(tmp_path, ["text of 20 letters"] * 600 + ["x" * 20_000, "y" * 20_000], val_fraction=0.3)
    assert set(bin_texts(tmp_path / "code.val.bin")) == {"text of 20 letters"}
    assert TokenBins(tmp_path, 256).eval_documents("code", "val", 7) == 1


def test_domains_are_selected_by_name(made):
    bins = TokenBins(made, 16, ["prose"])
    assert bins.names == list(bins.domains) == list(bins.n_windows) == ["prose"]
    assert bins.train_windows(one(0), one(9)).tolist() == [read_bin(made / "prose.train.bin")[144:161].tolist()]
    message = refused(TokenBins, made, 16, ["prose", "cats"], "--mixture")
    assert "--mixture: " in message and "has no cats; it has code prose" in message


def test_bins_far_larger_than_memory_are_mapped_and_no_mapping_stays(tmp_path):
    """Bins as nanoGPT names them, with the least meta.json that a person would write; they take no room on a disk."""
    domain = {"dtype": "uint16"}
    for side in ("train", "val"):
        domain[side] = {"file": f"{side}.bin", "tokens": 2**35, "sha256": "unknown"}
        (tmp_path / f"{side}.bin").touch()
        os.truncate(tmp_path / f"{side}.bin", 2**36)
    tokenizer = {"name": "bytes", "vocab_size": 257, "eot": 256, "eot_token": "<|endoftext|>", "fingerprint": "f"}
    meta = {"format_version": 2, "tokenizer": {**tokenizer, "files": []}, "domains": {"web": domain}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    bins = TokenBins(tmp_path, 1024)
    last = bins.n_windows["web"] - 1
    tracemalloc.start()
    windows = bins.train_windows(np.zeros(3, int), np.array([0, last // 2, last]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert windows.shape == (3, 1025) and peak < 1e6 and bins.eval_windows("web", "val", 2).shape == (2, 1025)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


def test_the_content_is_that_of_the_tokens_in_whichever_folder(made, copied, tmp_path):
    build(tmp_path / "other", {"code": ARTICLES, "prose": ARTICLES[1:]})
    same, other = (TokenBins(folder, 16).content() for folder in (copied, tmp_path / "other"))
    assert TokenBins(made, 16).content() == same != other


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("i", [0, 16])
def test_an_id_beyond_the_vocabulary_is_refused(copied, side, i):
    path = copied / f"code.{side}.bin"
    tokens = read_bin(path).copy()
    tokens[i] = 257
    path.write_bytes(tokens.tobytes())
    bins = TokenBins(copied, 16)
    arguments = (bins.eval_windows, "code", "val", 1) if side == "val" else (bins.train_windows, one(0), one(0))
    message = refused(*arguments)
    assert path.name in message and "id 257" in message and "257 ids" in message


in_meta = partial(edit, "meta.json")


def train_entry(**values):
    return in_meta(lambda meta: meta["domains"]["code"]["train"].update(values))


BAD_FOLDERS = {
    "no meta": (drop("meta.json"), "--data_dir="),
    "meta not JSON": (put("meta.json", b"{"), "meta.json: "),
    "meta not text": (put("meta.json", b"\xff\xfe"), "meta.json: "),
    "no domains": (in_meta(lambda meta: meta.update(domains={})), "lacks domains"),
    "no sha256": (in_meta(lambda meta: meta["domains"]["code"]["val"].__delitem__("sha256")), "lacks sha256"),
    "a name of another type": (in_meta(lambda meta: meta["tokenizer"].update(name=None)), "lacks name"),
    "half a tokenizer": (in_meta(lambda meta: meta["tokenizer"].__delitem__("name")), "lacks name"),
    "other version": (in_meta(lambda meta: meta.update(format_version=1)), "format version 1, but 2 is known"),
    "no tokenizer": (in_meta(lambda meta: meta.__delitem__("tokenizer")), "meta.json: "),
    "no tokens": (train_entry(tokens=None), "meta.json: "),
    "train as val": (in_meta(lambda meta: meta["domains"]["code"].update(val=meta["domains"]["code"]["train"])),
                     "code.train.bin is empty, or named twice"),
    "ids beyond the dtype": (in_meta(lambda meta: meta["tokenizer"].update(vocab_size=65537)), "cannot hold 65537 ids"),
    "end of text beyond the ids": (in_meta(lambda meta: meta["tokenizer"].update(eot=257)), "end of text 257"),
    "an empty bin": (train_entry(tokens=0), "code.train.bin is empty"),
    "negative tokens": (train_entry(tokens=-2), "code.train.bin"),
    "bin outside": (train_entry(file="../outside.bin"), "outside.bin is not in the folder"),
    "truncated": (lambda folder: os.truncate(folder / "code.train.bin", 100), "code.train.bin"),
    "missing bin": (drop("code.val.bin"), "code.val.bin is not in the folder"),
    "tokenizer file outside": (in_meta(lambda meta: meta["tokenizer"].update(files=["../x.json"])), "x.json is not"),
    "missing tokenizer file": (in_meta(lambda meta: meta["tokenizer"].update(files=["t.json"])), "t.json is not"),
}


@pytest.mark.parametrize("spoil, named", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_bins_folder_is_refused(copied, spoil, named):
    shutil.copy(copied / "code.train.bin", copied.parent / "outside.bin")
    (copied.parent / "x.json").write_text("{}")
    spoil(copied)
    assert named in refused(TokenBins, copied, 16)


# ----------------------------------------------- Verifying, and the quickstart's text ---------------------------------

def test_verify_names_the_bins_that_changed(program, copied):
    status, stdout, _ = program(f"--verify={copied}")
    assert status == 0 and stdout.count(" ok\n") == 4
    tokens = read_bin(copied / "code.val.bin").copy()
    tokens[7] ^= 1
    (copied / "code.val.bin").write_bytes(tokens.tobytes())
    status, stdout, stderr = program(f"--verify={copied}")
    assert status == 2 and stdout.count(" ok\n") == 3
    assert "code.val.bin not as in meta.json" in stderr and "train" not in stderr


@pytest.mark.parametrize("change, named", [
    (dict(eot=10), "not the one that it was made with, by its eot;"), (dict(vocab_size=300), "by its vocab_size"),
    (dict(fingerprint="f"), "its fingerprint"), (dict(name="other"), "--tokenizer=other"),
    (dict(vocab_size=99, eot=9), "code.train")])
def test_verify_names_what_is_not_as_it_was_written(copied, change, named):
    verify(copied)
    in_meta(lambda meta: meta["tokenizer"].update(change))(copied)
    assert named in refused(verify, copied)


def test_the_quickstart_has_four_domains_of_about_the_size_asked_without_licence_headers():
    names = ["python", "cpp", "math", "prose"]
    texts = {name: [] for name in names}
    for name, text in quickstart_documents(dict.fromkeys(names, 20_000)):
        texts[name].append(text)
    assert list(texts) == names
    for name, documents in texts.items():
        assert len(set(documents)) >= 2 and all(documents), name
        assert sum(len(text.encode()) for text in documents[:-1]) < 20_000, name
        for text in documents:
            comments = [line for line in text.splitlines()[:10] if line.lstrip().startswith(("#", "//", "/*", "*"))]
            assert "copyright" not in "\n".join(comments).lower(), text[:200]
