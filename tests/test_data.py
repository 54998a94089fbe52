"""data.py: the program, published folders, tokenizers, files to documents, the split, bins and windows."""

import dataclasses
import errno
import gzip
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import drop, edit, put
from safetensors import SafetensorError

import data
import sample_mixture
from data import (SPLITS, TokenBins, UserError, build_bins, damaged_files, expand_sources, import_optional,
                  load_tokenizer, model_tokenizer, published, quickstart_documents, read_documents, read_meta,
                  run_program, save_tokenizer, saved_tokenizer, settings_digest, user_errors, verify, write_meta)

ARTICLES = [f"Article {i}: " + f"{i * i} words é <|endoftext|> " * (i % 23) for i in range(400)]
FRACTION = 0.2

BUGS = (NameError, UnboundLocalError, AttributeError, AssertionError, NotImplementedError)


def refused(call, *arguments, **keys) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keys)
    return str(caught.value)


def stream(domains: dict[str, list[str]]):
    for name, texts in domains.items():
        for text in texts:
            yield name, text


def build(folder: Path, domains: dict[str, list[str]] | list[str], tokenizer=None, **keys) -> dict:
    """Build bins of lists of texts; a single list is the domain `code`."""
    if isinstance(domains, list):
        domains = {"code": domains}
    keys.setdefault("val_fraction", FRACTION)
    return build_bins(folder, tokenizer or load_tokenizer("bytes"), stream(domains), **keys)


def split_by_hand(text: str, fraction: float) -> str:
    """Return the split by the formula, written a second time."""
    u = int(sha256(text.encode()).hexdigest()[:16], 16) / 2**64
    return "test" if u < fraction else "val" if fraction <= u < 2 * fraction else "train"


def texts_of(split: str, start: str = ""):
    """Return an endless stream of texts of one split."""
    return (text for text in (f"{start}{i}" for i in itertools.count()) if split_by_hand(text, FRACTION) == split)


def three(start: str = "") -> list[str]:
    """Return a text for each split."""
    return [next(texts_of(split, start)) for split in SPLITS]


def read_bin(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), "<u2")


def bin_texts(folder: Path, split: str, name: str = "code") -> list[str]:
    """Return the documents of a bin of bytes."""
    tokens = read_bin(folder / f"{name}.{split}.bin")
    *documents, rest = bytes(np.minimum(tokens, 255).astype(np.uint8)).split(b"\xff")  # not a byte of UTF-8
    assert rest == b""
    return [document.decode() for document in documents]


def all_texts(folder: Path, name: str = "code") -> list[str]:
    return [text for split in SPLITS for text in bin_texts(folder, split, name)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return bins of ARTICLES in two domains. Tests only read them."""
    folder = tmp_path_factory.mktemp("made") / "bins"
    build(folder, {"code": ARTICLES, "prose": ARTICLES[::-1]})
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """Return a copy of these bins that a test may change."""
    return shutil.copytree(made, tmp_path / "bins")


# ----------------------------------------------- The program ----------------------------------------------------------

@pytest.fixture
def program(run_main):
    """Run data.py with arguments. Return (exit status, stdout, stderr)."""
    return partial(run_main, data)


RECORDS = "".join(json.dumps({"text": text, "body": text.upper()}) + "\n" for text in ("one é", "two\nlines\0"))
TEXTS_OF_SPLITS = [text for i in range(4) for text in three(f"{i} ")]  # four for each split


def write_files(folder: Path) -> list[str]:
    folder.mkdir()
    for i, text in enumerate(TEXTS_OF_SPLITS):
        (folder / f"{i:02}.txt").write_text(text)
    return TEXTS_OF_SPLITS


def test_the_program_writes_bins_and_prints_what_it_skipped(program, tmp_path):
    texts = write_files(tmp_path / "files")
    for name, raw in {"x.txt": b"bad \xff", "y.txt": b" ", "z.txt": b"\0"}.items():
        (tmp_path / "files" / name).write_bytes(raw)
    records = [{"body": text} for text in texts]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, {"no": 1}, {"no": 2}]))
    bins = tmp_path / "bins"
    status, stdout, stderr = program(f"mine={tmp_path}/files/*.txt", f"--out_dir={bins}", "--text_key=other",
                                     "--text_key=body", "--val_fraction", FRACTION, f"records={tmp_path}/r.jsonl")
    assert (status, stderr) == (0, "")
    meta = json.loads((bins / "meta.json").read_text())
    assert list(meta["domains"]) == ["mine", "records"] and meta["tokenizer"]["name"] == "bytes"
    assert (meta["made_by"]["text_key"], meta["made_by"]["val_fraction"]) == ("body", FRACTION)  # the last value wins
    for name in meta["domains"]:
        assert sorted(all_texts(bins, name)) == sorted(texts)
    notes = [line for line in stdout.splitlines() if line.startswith("note: skipped ")]
    assert notes == ["note: skipped 2 text files that are not UTF-8 or hold a NUL",
                     "note: skipped 1 empty documents of mine",
                     "note: skipped 2 records without text under the key body"]
    assert "each document ends with <|endoftext|>, id 256\n" in stdout
    assert "note: mine: only 4 validation documents (" in stdout  # thin validation


@pytest.mark.parametrize("arguments, named", [
    ([], ["--out_dir", "NAME=GLOB"]),
    *[([f"--out_dir=x", "a=a.txt", f"--val_fraction={wrong}"], [f"--val_fraction={wrong}", "below 0.5"])
      for wrong in ("0.5", "0.0", "nan", "-1.0")],
    (["--out_dir=x", "a=a.txt", "--tok=bytes"], ["--tok=bytes"]),
    (["--out_dir=x", "a=a.txt", "--tokenizer=no_such"], ["--tokenizer=no_such", "bytes"]),
    (["--out_dir=x", "a=a.txt", "a=nothing/*.txt"], ["a=nothing/*.txt", "no file matches"]),
    (["--out_dir=x", "a=a.txt", "--tokenizer=old"], ["old/tokenizer.json", "AutoTokenizer"]),
    (["--out_dir=x", "a=a.txt", "--eot=</s>"], ["--eot=</s>", "<|endoftext|>"]),
    (["--out_dir=x", "a.txt", "--domain_key=k"], ["no domain has documents in all splits"]),
    (["--out_dir=x", "word"], ["word", "NAME=GLOB"]),
    (["--out_dir=a.txt/bins", "a=a.txt"], ["a.txt/bins", "cannot be written"]),
    (["--out_dir=bins", "a=a.txt"], ["bins", "exists already"]),
    (["--out_dir=empty", "a=a.txt"], ["empty", "exists already"]),
    (["--out_dir=link", "a=a.txt"], ["link", "exists already"]),
    (["--verify=no_such_folder"], ["no_such_folder", "has no meta.json"])])
def test_a_bad_argument_is_one_message_with_the_fix_and_status_2(
        program, copied, monkeypatch, arguments, named):
    monkeypatch.chdir(copied.parent)
    Path("a.txt").write_text("some text")
    for folder in ("old", "empty"):
        Path(folder).mkdir()
    Path("link").symlink_to("nowhere")
    status, _, stderr = program(*arguments)
    [message] = [line for line in stderr.splitlines() if "error: " in line]
    assert status == 2 and stderr.rstrip().endswith(message)
    assert all(word in message for word in named), message
    assert sorted(os.listdir()) == ["a.txt", "bins", "empty", "link", "old"] and damaged_files(copied) == []


@pytest.mark.parametrize("error, rank, status, message", [
    (UserError("--a: wrong\n--b: wrong too"), "0", 2, "error: --a: wrong\nerror: --b: wrong too\n"),
    (UserError("--a: wrong"), "3", 2, "rank 3: error: --a: wrong\n"),
    (OSError(28, "No space left on device", "x"), "0", 2, "error: [Errno 28] No space left on device: 'x'\n"),
    (KeyboardInterrupt(), "0", 130, ""), (SystemExit(138), "0", 138, ""), (SystemExit(), "0", 0, ""),
    (ZeroDivisionError(), "0", 1, "Traceback")], ids=repr)
def test_a_program_ends_with_a_status_and_a_message_without_a_traceback(
        capsys, monkeypatch, error, rank, status, message):
    """Under torchrun rank 0 exits at once, and the other ranks wait so that it prints first."""
    def main():
        raise error
    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    printed = capsys.readouterr().err
    assert stop.value.code == status and (printed == message or printed.startswith(message) and status == 1)
    assert bool(waited) == (rank == "3")


def test_a_file_that_requires_a_package_is_an_error_with_the_package(tmp_path, monkeypatch):
    for name in ("a.txt.zst", "a.parquet"):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        (tmp_path / name).write_bytes(b"x")
        message = refused(documents, tmp_path / name)
        assert name in message and "pip install pyarrow" in message


def test_an_unforeseen_error_becomes_one_message_with_its_source_and_the_fix():
    def read(error):
        with user_errors("file.x", "copy it again"):
            raise error
    assert refused(read, KeyError("size")) == "file.x: KeyError: 'size'; copy it again"
    assert refused(read, UserError("as it is")) == "as it is"
    panic = type("PanicException", (BaseException,), {})  # as libraries in Rust raise it
    assert refused(read, panic("stack size")) == "file.x: PanicException: stack size; copy it again"
    for passed_on in (KeyboardInterrupt, *BUGS):
        with pytest.raises(passed_on):
            read(passed_on())
    assert "pip install no_such_package" in refused(import_optional, "no_such_package.part", "--plot")


@pytest.mark.parametrize("program, key", [(data, "verify"), (sample_mixture, "data_dir")], ids=["data", "mixture"])
def test_python_x_dev_shows_the_traceback_behind_a_message(copied, program, key):
    (copied / "meta.json").write_text("{")
    command = [program.__file__, f"--{key}={copied}"]
    plain, dev = (subprocess.run([sys.executable, *options, *command], capture_output=True, text=True)
                  for options in ([], ["-X", "dev"]))
    assert plain.returncode == dev.returncode == 2 and plain.stderr.count("\n") == 1
    assert dev.stderr.endswith(plain.stderr) and "The above exception was the direct cause" in dev.stderr
    assert re.search(r"(?m)^json\.\w+\.JSONDecodeError: ", dev.stderr) and 'data.py", line' in dev.stderr


# ----------------------------------------------- Published folders ----------------------------------------------------

def test_a_published_folder_is_complete_or_not_there_and_sha256sum_checks_it(tmp_path):
    with published(tmp_path / "sub" / "a") as folder:
        (folder / "x").write_bytes(b"1")
        (folder / "y").write_bytes(b"2")
        assert folder.parent == tmp_path / "sub" and not (tmp_path / "sub" / "a").exists()
    made = tmp_path / "sub" / "a"
    assert sorted(os.listdir(made)) == ["SHA256SUMS", "x", "y"] and os.listdir(made.parent) == ["a"]
    assert made.stat().st_mode == made.parent.stat().st_mode
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=made).returncode == 0
    assert damaged_files(made) == []
    (made / "x").unlink()
    (made / "y").write_bytes(b"3")
    assert damaged_files(made) == ["x", "y"]
    for broken in (b"\xff", b""):
        (made / "SHA256SUMS").write_bytes(broken)
        assert damaged_files(made) == ["SHA256SUMS"]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt, SystemExit, *BUGS])
def test_an_error_while_a_folder_is_written_leaves_nothing(tmp_path, error):
    with pytest.raises(error), published(tmp_path / "a") as folder:
        (folder / "x").write_bytes(b"1")
        raise error
    assert os.listdir(tmp_path) == []


def test_the_first_of_two_that_publish_a_folder_wins_and_nothing_existing_is_touched(tmp_path):
    lost = "a: cannot be written: .*not empty.*; another process was faster$"
    with pytest.raises(UserError, match=lost), published(tmp_path / "a"):
        with published(tmp_path / "a") as first:
            (first / "x").write_text("first")
    assert (tmp_path / "a" / "x").read_text() == "first" and os.listdir(tmp_path) == ["a"]
    with pytest.raises(UserError, match="exists already"), published(tmp_path / "a"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("library", ["Python", "torch.save", "I/O error: {words} (os error {number})",
                                     'IoError(Os {{ code: {number}, message: "{words}" }})'])  # of safetensors
def test_an_error_of_the_disk_is_one_message_and_only_a_full_disk_asks_for_space(tmp_path, number, library):
    words = os.strerror(number)
    with pytest.raises(UserError) as caught, published(tmp_path / "a"):
        if "{number}" in library:
            raise SafetensorError("Error while serializing: " + library.format(words=words, number=number))
        try:
            raise OSError(number, words)
        finally:
            if library == "torch.save":
                raise RuntimeError("unexpected pos 768 vs 662")
    is_full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "free some space, and start the same command" if is_full else "use another folder"
    assert str(caught.value) == f"{tmp_path}/a: cannot be written: [Errno {number}] {words}; {fix}"
    assert os.listdir(tmp_path) == []


def test_a_bug_in_a_reader_keeps_its_traceback(program, tmp_path, monkeypatch):
    write_files(tmp_path / "files")
    monkeypatch.setattr(data, "read_text", lambda file: file.read_all())
    status, _, stderr = program(f"x={tmp_path / 'files'}", f"--out_dir={tmp_path / 'bins'}")
    assert status == 1 and "Traceback" in stderr and os.listdir(tmp_path) == ["files"]
    assert stderr.endswith("\nAttributeError: '_io.BufferedReader' object has no attribute 'read_all'\n")


def test_everything_is_on_the_disk_before_a_folder_has_its_name(tmp_path, monkeypatch):
    safe = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: safe.add(os.fstat(descriptor).st_ino))
    rename = os.rename

    def checked(source, target):
        assert {path.stat().st_ino for path in (source, *source.iterdir())} <= safe
        rename(source, target)
    monkeypatch.setattr(os, "rename", checked)
    build(tmp_path / "bins", ARTICLES)
    assert len(os.listdir(tmp_path / "bins")) == 5 and tmp_path.stat().st_ino in safe


# ----------------------------------------------- Tokenizers -----------------------------------------------------------

TEXTS = ["", "plain", " spaces\t\r\n\n", "naïve Ω 漢字 👩‍🔬 e\u0301\u200b", "\0\x7f\x1b", "x" * 1000, "<|endoftext|>",
         "a<|endoftext|><|im_end|><s></s>b", "".join(map(chr, range(1, 3000)))]


def test_the_bytes_tokenizer_gives_the_bytes_of_any_text():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.eot_token) == (257, 256, "<|endoftext|>")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == list(text.encode()) and tokenizer.decode(ids.tolist()) == text


def small_encoding(name: str, pattern: str = ".", ranks=bytes(range(256)), eot: int = 259) -> tiktoken.Encoding:
    """Return an encoding of the bytes, with its end of text 3 ids later."""
    return tiktoken.Encoding(name, pat_str=pattern, special_tokens={"<|endoftext|>": eot},
                             mergeable_ranks={bytes([byte]): rank for rank, byte in enumerate(ranks)})


@pytest.mark.parametrize("change", [dict(pattern=r"\w+|\W+"), dict(ranks=bytes(range(255, -1, -1))), dict(eot=260)])
def test_a_tiktoken_encoding_that_has_changed_is_rejected(tmp_path, monkeypatch, change):
    monkeypatch.setattr("tiktoken.get_encoding", small_encoding)
    meta = build(tmp_path / "bins", three(), load_tokenizer("gpt2"))
    monkeypatch.setattr("tiktoken.get_encoding", partial(small_encoding, **change))
    assert "its tokenizer gpt2 encodes in another way" in refused(saved_tokenizer, tmp_path, meta["tokenizer"])


def test_a_tiktoken_encoding_is_known_by_its_name_and_may_have_gaps_between_its_ids(tmp_path, monkeypatch):
    for name in ("bytes", "gpt2"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tiktoken.get_encoding", small_encoding)
    assert load_tokenizer("bytes").vocab_size == 257
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.decode([97, 257, 98, 259])) == (260, "ab<|endoftext|>")
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: 1 / 0)  # it cannot be downloaded
    assert "TIKTOKEN_CACHE_DIR" in refused(load_tokenizer, "gpt2")


def test_a_long_run_of_blanks_is_cut_before_tiktoken_fails_at_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", partial(small_encoding, pattern=r"\s+(?!\S)|\s+|\S+"))
    tokenizer = load_tokenizer("gpt2")
    text = "first" + " " * (4 * 10**6) + "last"
    with pytest.raises(ValueError, match="backtracking"):
        tokenizer.encode_batch([text])
    (tmp_path / "a.txt").write_text(text)
    texts, _ = documents(tmp_path / "a.txt")  # without the parts that are blank
    assert [len(ids) for ids in tokenizer.encode_batch(texts)] == [10**6, 9]


@pytest.fixture(scope="module")
def bpe_settings() -> dict:
    """Return a tiny byte-level BPE's tokenizer.json. It adds <s> at the start, as LLaMA's does, cuts texts and pads."""
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


def test_a_huggingface_tokenizer_encodes_all_of_a_text_and_nothing_else(tmp_path, bpe_settings):
    tokenizer = load_tokenizer(save_bpe(tmp_path / "mine", bpe_settings))
    assert (tokenizer.name, tokenizer.eot_id, tokenizer.vocab_size) == ("mine", 1, len(bpe_settings["model"]["vocab"]))
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert not np.isin(ids, [0, 1]).any()  # neither <s> in front nor <|im_end|> where the text spells it
        assert tokenizer.decode(ids.tolist()) == text
    assert len(tokenizer.encode_batch(["the cat"])[0]) < 7  # merges are applied
    assert tokenizer.decode([0, tokenizer.eot_id]) == "<s><|im_end|>"  # which shows where a document ends


@pytest.mark.parametrize("eos, eot, ends", [
    ("<|im_end|>", "", 1), ({"content": "<s>"}, "", 0), ("<|im_end|>", "<s>", 0), ("</s>", "", None), (None, "", None),
    (5, "", None)])
def test_the_end_of_text_is_eos_token_of_the_config_or_eot(tmp_path, bpe_settings, eos, eot, ends):
    folder = save_bpe(tmp_path, bpe_settings, eos)
    for source in (folder, folder / "tokenizer.json"):
        if ends is None:
            message = refused(load_tokenizer, source, eot)
            assert f"--eot={eos or ''}: " in message and "tokenizer_config.json should" in message
        else:
            assert load_tokenizer(source, eot).eot_id == ends


def test_a_tokenizer_config_that_is_a_list_is_an_error(tmp_path, bpe_settings):
    folder = save_bpe(tmp_path, bpe_settings)
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer.json: TypeError: " in refused(load_tokenizer, folder)


def words(tokenizers):
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "[UNK]": 1, "The": 2, "cat": 3}, "[UNK]"))
    level.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return level


@pytest.mark.parametrize("text, change", [("The dog", "'dog' comes back as '[UNK]'"),
                                          ("The cat\n", r"'\n' comes back as ''")])
def test_one_note_shows_what_the_tokenizer_changes_in_the_first_documents(tmp_path, capsys, text, change):
    made = words(pytest.importorskip("tokenizers"))
    tokenizer = load_tokenizer(save_bpe(tmp_path / "tokenizer", json.loads(made.to_str()), eos="</s>"))
    pairs = [("x", "cat"), ("y", text), ("y", text), *[("x", f"unknown {i}") for i in range(50)]]
    build_bins(tmp_path / "bins", tokenizer, pairs, val_fraction=FRACTION, required=["x"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: the tokenizer")]
    assert notes == [f"note: the tokenizer changes text: {change}"]


def not_special(tokenizers):
    level = words(tokenizers)
    level.model = tokenizers.models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3}, "[UNK]")
    level.add_tokens(["</s>"])
    return level


def test_a_document_that_holds_the_end_of_text_is_skipped_and_counted(tmp_path, capsys):
    made = not_special(pytest.importorskip("tokenizers"))
    tokenizer = load_tokenizer(save_bpe(tmp_path / "tokenizer", json.loads(made.to_str()), eos="</s>"))
    build(tmp_path / "bins", [*three("one "), "three </s> three"], tokenizer)
    assert "note: skipped 1 documents that hold </s>, the end of text\n" in capsys.readouterr().out
    n_ends = sum((read_bin(path) == tokenizer.eot_id).sum() for path in (tmp_path / "bins").glob("*.bin"))
    domain = read_meta(tmp_path / "bins")["domains"]["code"]
    assert n_ends == sum(domain[split]["documents"] for split in SPLITS) == 3


def test_the_vocabulary_counts_added_tokens_up_to_the_largest_id(tmp_path, bpe_settings):
    import tokenizers
    added = {**bpe_settings["added_tokens"][0], "id": 300, "content": "<new>"}
    settings = {**bpe_settings, "added_tokens": [*bpe_settings["added_tokens"], added]}
    largest = max(tokenizers.Tokenizer.from_str(json.dumps(settings)).get_vocab().values())
    assert load_tokenizer(save_bpe(tmp_path, settings)).vocab_size == largest + 1 > len(settings["model"]["vocab"])


def test_differently_serialized_files_of_a_tokenizer_have_the_same_fingerprint(tmp_path, bpe_settings):
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


def lower(settings: dict):
    settings["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [
    lower, lambda settings: settings["model"]["merges"].reverse(),
    lambda settings: settings["model"]["vocab"].update({"!": 3, '"': 2}),
    lambda settings: settings["added_tokens"].append({**settings["added_tokens"][0], "id": 280, "content": "<new>"}),
    lambda settings: settings["pre_tokenizer"].update(add_prefix_space=True)])
def test_a_change_of_the_encoding_changes_the_fingerprint(tmp_path, bpe_settings, change):
    ours = load_tokenizer(save_bpe(tmp_path, bpe_settings)).fingerprint
    assert load_tokenizer(tmp_path, eot_token="<s>").fingerprint == ours
    edit("tokenizer.json", change)(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint != ours


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
    # Documents end with the bins' end of text, and begin with the model's own bos token, or with the end of text.
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


def test_a_student_folder_always_has_one_tokenizer_class_and_the_end_of_text(tmp_path, bpe_settings):
    source = save_bpe(tmp_path / "source", bpe_settings)
    edit("tokenizer_config.json", tokenizer_class="LlamaTokenizer", eos_token={"content": "<s>"}, padding_side="left",
         auto_map={"AutoTokenizer": [None, "x.Y"]})(source)
    build(tmp_path / "bins", ARTICLES, load_tokenizer(source, "<|im_end|>"))
    put("config.json", b"{}")(tmp_path)
    save_tokenizer(tmp_path, TokenBins(tmp_path / "bins", 8))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"]}
    assert model_tokenizer(tmp_path).eot_token == "<|im_end|>" and model_tokenizer(tmp_path, "<s>").eot_id == 0


def test_nanogpts_bins_open_once_they_are_described(tmp_path, made):
    entries = {"dtype": "uint16"}
    for split in ("train", "val"):
        path = Path(shutil.copyfile(made / f"code.{split}.bin", tmp_path / f"{split}.bin"))
        entries[split] = {"file": path.name, "tokens": path.stat().st_size // 2}
    write_meta(tmp_path, load_tokenizer("bytes"), {"web": entries})
    theirs = TokenBins(tmp_path, 16)
    ours = TokenBins(made, 16, ["code"])
    assert theirs.n_windows == {"web": ours.n_windows["code"]}
    assert (theirs.eval_windows("web", "val", 3) == ours.eval_windows("code", "val", 3)).all()
    assert "--test_samples=1: domain web" in refused(theirs.eval_windows, "web", "test", 1)
    assert theirs.content() != ours.content()
    verify(tmp_path)


# ----------------------------------------------- Files to documents ---------------------------------------------------

def documents(*paths: Path, text_key: str = "text") -> tuple[list[str], Counter]:
    skipped = Counter()
    return [text for _, text in read_documents({"a": paths}, text_key, "", skipped)], skipped


def compressed(name: str, raw: bytes) -> bytes:
    """Return `raw` as in a file called `name`: in two frames, as parallel compressors and `cat` make them."""
    parts = (raw[:20], raw[20:])
    if name.endswith(".gz"):
        return b"".join(map(gzip.compress, parts))
    if name.endswith(".zst"):
        pytest.importorskip("pyarrow")  # which reads it
        return b"".join(map(pytest.importorskip("zstandard").compress, parts))
    return raw


MARK = b"\xef\xbb\xbf"  # of byte order: no part of the text


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonlines", "a.NDJSON", "a.jsonl.zst", "a.json", "c4.00000.json.gz"])
def test_each_json_record_of_a_line_is_a_document(tmp_path, name, mark):
    (tmp_path / name).write_bytes(compressed(name, mark + RECORDS.encode()))
    assert documents(tmp_path / name) == (["one é", "two\nlines\0"], Counter())
    assert documents(tmp_path / name, text_key="body")[0] == ["ONE É", "TWO\nLINES\0"]


def test_each_row_of_parquet_is_a_document_and_an_empty_shard_is_no_error(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, empty = tmp_path / "a.parquet", tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"text": ["one é", None, "two"], "body": [b"a", b"b", b"c"]}), path)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), empty)
    assert documents(path, empty) == (["one é", "two"], {"records without text under the key text": 1})
    for key in ("absent", "body"):  # bytes are no text
        assert documents(path, text_key=key) == ([], {f"records without text under the key {key}": 3})


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("name, text", [
    ("a.py", "naïve\r\n漢字"), ("a.txt.gz", "naïve\n漢字, and more"), ("a.md", '{\n  "text": "x"\n}\n'), ("none", "x")])
def test_any_other_file_is_one_unchanged_document(tmp_path, name, text, mark):
    (tmp_path / name).write_bytes(compressed(name, mark + text.encode()))
    assert documents(tmp_path / name) == ([text], Counter())


def test_a_text_of_more_than_a_million_characters_is_cut_at_the_ends_of_lines_in_a_record_too(tmp_path):
    lines = [f"{i} ".ljust(1000, ".") + "\n" for i in range(2500)]
    text = "".join(lines)
    (tmp_path / "a.txt").write_text(text)
    texts, _ = documents(tmp_path / "a.txt")
    assert "".join(texts) == text and len(texts) == 3 and all(piece.endswith("\n") for piece in texts)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert documents(tmp_path / "a.jsonl")[0] == texts
    (tmp_path / "b.txt").write_text("é" * 2_000_001)  # without lines
    assert list(map(len, documents(tmp_path / "b.txt")[0])) == [10**6, 10**6, 1]


@pytest.mark.parametrize("name, raw, reason", [
    ("a.txt", b"bad \xff byte", "not UTF-8"), ("a.txt", "text".encode("utf-16"), "not UTF-8"),
    ("a.txt", b" \n\t", "empty"), ("a.txt.gz", gzip.compress(b""), "empty"),
    ("a.png", b"\x89PNG\0\0\xff", "NUL"), ("a.txt", b"a" * 70_000 + b"\0", "NUL"),
    ("a.jsonl", b'{"text": ""}\n', "empty"), ("a.jsonl", b'{"other": "x"}\n', "key text"),
    ("a.jsonl", b'{"text": 3}\n', "key text")])
def test_a_file_or_record_without_text_is_skipped_and_counted(tmp_path, name, raw, reason):
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "fine").write_text("fine")
    got, skipped = documents(tmp_path / name, tmp_path / "fine")
    assert got == ["fine"] and list(skipped.values()) == [1] and reason in next(iter(skipped))


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "half \\ud800"}\n')
    assert documents(tmp_path / "a.jsonl") == (["half \ud800"], Counter())
    build(tmp_path / "bins", [*three(), "half \ud800"])
    assert sorted(all_texts(tmp_path / "bins")) == sorted([*three(), "half ?"])
    assert "half ?" in bin_texts(tmp_path / "bins", split_by_hand("half ?", FRACTION))


@pytest.mark.parametrize("name, raw, named", [
    ("a.jsonl", b'\n[{"text": "x"}]\n{"text": "y"}\n', "line 2: not a JSON record"),
    ("a.json", b'[{"text": "x"},\n{"text": "y"}]', "jq -c '.[]' FILE"),
    ("a.json", b'{\n "text": "x"\n}', "line 1: "),
    ("a.jsonl", b'\xff\n{"text": "y"}\n', "line 1: "),
    ("a.jsonl", '{"text": "x"}\n{"text": "y"}'.encode("utf-16"), "line 1: "),
    ("a.jsonl.gz", b"no gzip", "BadGzipFile"), ("a.jsonl.zst", b"no zstd", "OSError"),
    ("a.parquet", b"no parquet", "ArrowInvalid")])
def test_a_damaged_file_ends_the_build_with_its_name(tmp_path, name, raw, named):
    if name.endswith((".zst", ".parquet")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(raw)
    message = refused(documents, tmp_path / name)
    assert message.startswith(f"{tmp_path}/{name}: ") and named in message


def test_a_column_that_arrow_cannot_read_ends_the_build_with_the_file(tmp_path, monkeypatch):
    """Its error is a NotImplementedError, which otherwise means a bug."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")

    def iter_batches(*_, **__):
        raise pyarrow.ArrowNotImplementedError("Nested data conversions")
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", iter_batches)
    message = refused(documents, tmp_path / "a.parquet")
    assert message.startswith(f"{tmp_path}/a.parquet: ") and "Nested data conversions" in message


def test_later_broken_records_are_skipped_and_the_first_is_shown(tmp_path, capsys):
    broken = [b'{"text": ', b'["text"]', b'{"text": "bad \xff"}', b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
              b'{"text": ' + b"[" * 100_000]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([RECORDS.encode(), *broken, RECORDS.encode(), *broken]))
    texts, skipped = documents(tmp_path / "a.jsonl")
    assert len(texts) == 4 and skipped == {"broken records": 10}
    [note] = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: {tmp_path}/a.jsonl, line 4: ")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_compressed_file_that_is_cut_off_ends_the_build(tmp_path, name):
    text = "".join(f"{i * i}\n" for i in range(50_000))  # more than one block
    (tmp_path / name).write_bytes(compressed(name, text.encode())[:-1000])
    assert name in refused(documents, tmp_path / name)
    (tmp_path / name).write_bytes(compressed(name, text.encode()))
    assert documents(tmp_path / name)[0] == [text]


def found_by(words: list[str]) -> dict[str, list[str]]:
    found = expand_sources(words, False)
    return {name: [os.path.relpath(path) for path in paths] for name, paths in found.items()}


def test_sources_are_files_folders_and_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "sub/deep/c.txt", "sub/d.md", ".hidden/e.txt", "sub/.f"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    words = ["file=a.txt", "C++=.", "glob=*.txt", "deep=**/*.txt", "two=*.txt", "two=s*", "two=./*.txt"]
    assert found_by(words) == {
        "file": ["a.txt"], "C++": ["a.txt", "b.txt", "sub/d.md", "sub/deep/c.txt"], "glob": ["a.txt", "b.txt"],
        "deep": ["a.txt", "b.txt", "sub/deep/c.txt"], "two": ["a.txt", "b.txt", "sub/d.md", "sub/deep/c.txt"]}


def test_a_path_that_exists_is_no_pattern_and_each_file_is_read_once_without_following_links_to_folders(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("hub/blobs", "hub/snapshots", "[1]", "1", "elsewhere", "loop", "~"):
        Path(folder).mkdir(parents=True)
    for name in ("hub/blobs/9f86", "part[1].jsonl", "part1.jsonl", "[1]/a.txt", "1/b.txt", "elsewhere/x.txt",
                 "loop/d.jsonl", "~/home.txt"):
        Path(name).write_text(RECORDS)
    Path("hub/snapshots/train.jsonl").symlink_to("../blobs/9f86")
    for link, target in (("a", "."), ("b", "."), ("more", "../elsewhere"), ("gone.txt", "nothing")):
        Path("loop", link).symlink_to(target)
    os.mkfifo("loop/pipe.txt")
    monkeypatch.setenv("HOME", str(tmp_path / "~"))
    assert found_by(["hub=hub", "name=part[1].jsonl", "folder=[1]", "loop=loop", "home=~/*.txt"]) == {
        "hub": ["hub/snapshots/train.jsonl"], "name": ["part[1].jsonl"], "folder": ["[1]/a.txt"],
        "loop": ["loop/d.jsonl"], "home": ["~/home.txt"]}
    for word in ("x=loop/gone.txt", "x=loop/pipe.txt"):
        assert "no file matches" in refused(expand_sources, [word], False)


@pytest.mark.parametrize("name", ["a.csv", "a.TSV.gz"])
def test_tables_are_an_error_before_the_build(tmp_path, name):
    (tmp_path / name).write_bytes(b"a,b")
    assert f"{name}: write its rows to .jsonl or .parquet" in refused(expand_sources, [f"mine={tmp_path}"], False)


def test_the_documents_of_all_domains_are_one_stream_and_a_name_without_any_is_an_error(program, tmp_path):
    (tmp_path / "a.jsonl").write_text(RECORDS)
    (tmp_path / "b.txt").write_text(" ")
    one, empty = [tmp_path / "a.jsonl"], [tmp_path / "b.txt"]
    assert list(read_documents({"x": one, "y": empty + one}, "text", "", Counter())) == [
        ("x", "one é"), ("x", "two\nlines\0"), ("y", "one é"), ("y", "two\nlines\0")]
    write_files(tmp_path / "files")
    status, _, err = program(f"x={tmp_path}/files", f"y={tmp_path}/b.txt", f"--out_dir={tmp_path}/bins",
                             f"--val_fraction={FRACTION}")
    assert status == 2 and "y: its documents at --val_fraction=0.2 are 0 train, 0 val, 0 test; " in err


# ----------------------------------------------- Labeled records ------------------------------------------------------

def labeled(text: str, label) -> dict:
    return {"text": text, "meta": {"set": label}}


LABELED = [labeled(text, label) for text in TEXTS_OF_SPLITS for label in ("RedPajamaC4", "Pile/CC (x)")]


def write_records(path: Path, records: list) -> Path:
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes(compressed(path.name, "".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet"])
def test_each_record_can_have_its_own_domain_next_to_named_sources(program, tmp_path, name):
    records = [*LABELED, {"text": "no label"}, labeled("a", None), labeled("b", "—"), {"meta": {"set": "RedPajamaC4"}}]
    if name == "a.jsonl":  # a column of Parquet has one type
        records += [labeled("c", ["a"]), labeled("d", {"b": 1})]
    write_records(tmp_path / name, records)
    write_files(tmp_path / "math")
    status, stdout, stderr = program(f"{tmp_path}/a.*", f"math-2={tmp_path}/math", f"--out_dir={tmp_path}/bins",
                                     "--domain_key=meta.set", f"--val_fraction={FRACTION}")
    assert (status, stderr) == (0, "")
    assert list(read_meta(tmp_path / "bins")["domains"]) == ["math-2", "RedPajamaC4", "Pile_CC_x"]
    for domain in ("RedPajamaC4", "Pile_CC_x"):
        assert sorted(all_texts(tmp_path / "bins", domain)) == sorted(TEXTS_OF_SPLITS)
    n_unlabeled = 5 if name == "a.jsonl" else 3
    assert f"note: skipped {n_unlabeled} records without a label under the key meta.set\n" in stdout
    assert "note: skipped 1 records without text under the key text\n" in stdout


@pytest.mark.parametrize("labels, domains, merged", [
    (["C", "C++", "C#"], ["C", "C++", "C#"], []), ([0, "a_ (b)", "中文"], ["0", "a_b", "中文"], []),
    (["a b", "a_b", "a/b"], ["a_b"], ["'a_b' is another label of the domain a_b", "'a/b' is another label"]),
    (["x" * 400, "y-z", "__y"], ["x" * 100, "y-z", "y"], []), (["語" * 120, "1", True], ["語" * 66, "1", "True"], [])])
def test_a_labels_domain_is_its_letters_digits_plus_hash_and_minus(tmp_path, capsys, labels, domains, merged):
    records = [labeled(text, label) for text in TEXTS_OF_SPLITS for label in labels]
    path = write_records(tmp_path / "a.jsonl", records)
    pairs = list(read_documents({"": [path]}, "text", "meta.set", Counter()))
    assert list(dict.fromkeys(name for name, _ in pairs)) == domains and len(pairs) == len(records)
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == len(merged) and all(part in note for part, note in zip(merged, notes))
    build_bins(tmp_path / "bins", load_tokenizer("bytes"), pairs, val_fraction=FRACTION)
    assert list(TokenBins(tmp_path / "bins", 2).names) == domains


# ----------------------------------------------- The split ------------------------------------------------------------

def test_the_split_is_the_contracts_formula_of_the_document_only(tmp_path):
    """It depends on no other document, no domain and no order. Copies are in one split."""
    pairs = list(stream({"code": ARTICLES, "prose": ARTICLES[::2] * 2}))
    for i, fraction in enumerate((0.05, 0.2, 0.49)):
        shuffled = random.Random(i).sample(pairs, len(pairs))
        build_bins(tmp_path / str(i), load_tokenizer("bytes"), shuffled, val_fraction=fraction)
        for name in ("code", "prose"):
            for split in SPLITS:
                expected = [text for domain, text in shuffled
                            if domain == name and split_by_hand(text, fraction) == split]
                assert bin_texts(tmp_path / str(i), split, name) == expected


def test_two_halves_of_a_corpus_built_separately_and_joined_are_the_whole(tmp_path):
    build(tmp_path / "whole", ARTICLES)
    build(tmp_path / "a", ARTICLES[:150])
    build(tmp_path / "b", ARTICLES[150:])
    (tmp_path / "joined").mkdir()
    entry = {"dtype": "uint16"}
    for split in SPLITS:
        name = f"code.{split}.bin"
        joined = (tmp_path / "a" / name).read_bytes() + (tmp_path / "b" / name).read_bytes()
        (tmp_path / "joined" / name).write_bytes(joined)
        entry[split] = {"file": name, "tokens": len(joined) // 2}
    write_meta(tmp_path / "joined", load_tokenizer("bytes"), {"code": entry})
    assert TokenBins(tmp_path / "joined", 8).content() == TokenBins(tmp_path / "whole", 8).content()


@pytest.mark.parametrize("texts, counts, fix", [
    (three()[:2], "1 train, 1 val, 0 test", "three documents at least"),
    ([three()[0]] * 5, "5 train, 0 val, 0 test", "try --val_fraction=0.3"),
    ([three()[0]] * 50, "50 train, 0 val, 0 test", "try --val_fraction=0.1")])
def test_a_domain_without_a_document_in_a_split_is_an_error_or_without_bins(tmp_path, capsys, texts, counts, fix):
    message = refused(build, tmp_path / "bins", {"fine": ARTICLES, "code": texts})
    assert message.startswith(f"code: its documents at --val_fraction={FRACTION} are {counts}; ") and fix in message
    assert os.listdir(tmp_path) == []
    # A domain from a label gets a note instead, unless it is the only one.
    meta = build(tmp_path / "bins", {"fine": ARTICLES, "code": texts}, required=["fine"])
    assert list(meta["domains"]) == ["fine"] and f"note: {message}; no bins\n" in capsys.readouterr().out
    assert not list((tmp_path / "bins").glob("code.*")) and damaged_files(tmp_path / "bins") == []
    assert "no domain has documents in all splits" in refused(build, tmp_path / "x", {"code": texts}, required=[])


def test_the_memory_of_a_build_does_not_grow_with_its_input(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_BYTES", 1 << 20)

    def peak(megabytes: int) -> int:
        texts = ((f"d{i % 2}", f"document {i} ".ljust(2000, "é")) for i in range(megabytes * 260))
        tracemalloc.start()
        build_bins(tmp_path / str(megabytes), load_tokenizer("bytes"), texts)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result
    small, large = peak(3), peak(20)
    assert large < 1.2 * small and large < 20e6


# ----------------------------------------------- Bins -----------------------------------------------------------------

@pytest.mark.parametrize("vocab_size, dtype, width", [(257, "uint16", 2), (65536, "uint16", 2), (65537, "uint32", 4),
                                                      (151_936, "uint32", 4)])
def test_ids_are_little_endian_uint16_if_they_fit(tmp_path, vocab_size, dtype, width):
    ids = [1, 256, vocab_size - 1]
    tokenizer = dataclasses.replace(load_tokenizer("bytes"), vocab_size=vocab_size, eot_id=2, encode_batch=lambda
                                    texts: [np.array(ids, np.uint32)] * len(texts))
    meta = build(tmp_path / "bins", three(), tokenizer)
    assert meta["domains"]["code"]["dtype"] == dtype
    expected = b"".join(i.to_bytes(width, "little") for i in (*ids, 2))
    for split in SPLITS:
        assert (tmp_path / "bins" / f"code.{split}.bin").read_bytes() == expected
    assert TokenBins(tmp_path / "bins", 3).train_windows(np.array([0]), np.array([0])).tolist() == [[*ids, 2]]


def test_meta_json_describes_the_bins(tmp_path):
    texts = {"code": ARTICLES, "prose": ARTICLES[:50]}
    folder = tmp_path / "bins"
    meta = build(folder, texts, made_by={"key": 1})
    assert json.loads((folder / "meta.json").read_text()) == meta == read_meta(folder)
    assert (meta["format_version"], meta["made_by"]) == (3, {"key": 1})
    assert meta["tokenizer"] == {"name": "bytes", "vocab_size": 257, "eot": 256, "eot_token": "<|endoftext|>",
                                 "fingerprint": load_tokenizer("bytes").fingerprint, "files": []}
    assert list(meta["domains"]) == ["code", "prose"]
    for name, domain in meta["domains"].items():
        assert domain["dtype"] == "uint16"
        for split in SPLITS:
            path = folder / f"{name}.{split}.bin"
            kept = bin_texts(folder, split, name)
            assert domain[split] == {"file": path.name, "tokens": path.stat().st_size // 2, "documents": len(kept),
                                     "bytes": sum(len(text.encode()) for text in kept)}
        assert sum(domain[split]["documents"] for split in SPLITS) == len(texts[name])


def test_the_tokenizers_files_are_copied_next_to_the_bins_and_verified(tmp_path, bpe_settings):
    source = save_bpe(tmp_path / "tokenizer", bpe_settings)
    meta = build(tmp_path / "bins", ARTICLES, load_tokenizer(source))
    assert sorted(meta["tokenizer"]["files"]) == ["tokenizer.json", "tokenizer_config.json"]
    for name in meta["tokenizer"]["files"]:
        assert (tmp_path / "bins" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = saved_tokenizer(tmp_path / "bins", meta["tokenizer"])
    window = TokenBins(tmp_path / "bins", 8).eval_windows("code", "val", 1)[0]
    assert tokenizer.decode(window.tolist()).startswith("Article")
    verify(tmp_path / "bins")
    edit("tokenizer.json", lower)(tmp_path / "bins")
    assert "missing or changed: tokenizer.json;" in refused(verify, tmp_path / "bins")
    data.write_sums(tmp_path / "bins")
    assert "its tokenizer tokenizer encodes in another way" in refused(verify, tmp_path / "bins")


STOPPED_BUILD = """
import os, signal, sys
import data, test_data

def documents():
    for i, document in enumerate(test_data.stream(test_data.LONG)):
        if i == 45:
            os.kill(os.getpid(), int(sys.argv[2]))
        yield document

data.BATCH_BYTES = 1 << 20
sys.argv[3:] and signal.signal(signal.SIGTERM, signal.default_int_handler)
data.run_program(lambda: data.build_bins(sys.argv[1], data.load_tokenizer("bytes"), documents(), val_fraction=0.2))
"""
# Five megabytes: much is written while later documents are still to come.
LONG = {name: [f"{name} {i} ".ljust(100, ".") * 1000 for i in range(25)] for name in ("code", "prose")}


@pytest.mark.parametrize("number, status, left", [(signal.SIGKILL, -signal.SIGKILL, 1), (signal.SIGINT, 130, 0),
                                                  (signal.SIGTERM, 130, 0)])
def test_a_stopped_build_leaves_no_folder_but_after_kill_9_and_starts_again(tmp_path, number, status, left):
    folders = [Path(data.__file__).parent, Path(__file__).parent]
    handled = ["handled"] if number == signal.SIGTERM else []  # as data.py does when it is the program
    run = subprocess.run([sys.executable, "-c", STOPPED_BUILD, tmp_path / "bins", str(int(number)), *handled],
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))})
    assert run.returncode == status
    unfinished = os.listdir(tmp_path)
    assert len(unfinished) == left and all(name.endswith(".tmp") for name in unfinished)
    build(tmp_path / "bins", LONG)
    build(tmp_path / "straight", LONG)
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "bins" / path.name).read_bytes(), path.name


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    """A limit on the size of files simulates it, for bins and for the files after them."""
    resource = pytest.importorskip("resource")
    write_records(tmp_path / "a.jsonl", [{"text": text} for text in ARTICLES])
    command = [sys.executable, data.__file__, f"x={tmp_path}/a.jsonl", f"--out_dir={tmp_path}/bins",
               f"--val_fraction={FRACTION}"]
    for limit in (200, 30_000):
        run = subprocess.run(command, capture_output=True, text=True,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert run.returncode == 2 and run.stderr.count("\n") == 1
        assert re.search(r"/bins: cannot be written: \[Errno 27\] File too large.*; free some space", run.stderr)
        assert os.listdir(tmp_path) == ["a.jsonl"]


# ----------------------------------------------- Windows --------------------------------------------------------------

def test_a_bin_of_n_tokens_has_n_less_1_over_b_windows(tmp_path):
    # The only train text of domain d7 has 7 tokens with its end of text.
    domains = {}
    for n in range(4, 12):
        train = next(text for text in texts_of("train", "x" * (n - 5)) if len(text) == n - 1)
        domains[f"d{n}"] = [train, *three()[1:]]
    meta = build(tmp_path / "bins", domains)
    for n in range(4, 12):
        assert meta["domains"][f"d{n}"]["train"]["tokens"] == n
        tokens = read_bin(tmp_path / "bins" / f"d{n}.train.bin")
        for size in range(1, n):
            bins = TokenBins(tmp_path / "bins", size, [f"d{n}"])
            assert bins.n_windows == {f"d{n}": (n - 1) // size}
            for i in range((n - 1) // size):
                windows = bins.train_windows(np.array([0]), np.array([i]))
                assert windows.dtype == np.int64
                assert windows.tolist() == [tokens[i * size:i * size + size + 1].tolist()]
        assert f"--block_size={n}: domain d{n}" in refused(TokenBins, tmp_path / "bins", n, [f"d{n}"])


def test_train_windows_come_in_the_order_asked(made):
    bins = TokenBins(made, 16)
    domain_ids, window_ids = np.array([1, 0, 1, 0, 0]), np.array([500, 3, 0, 700, 3])
    windows = pickle.loads(pickle.dumps(bins)).train_windows(domain_ids, window_ids)  # ranks get pickled copies
    for row, domain_id, i in zip(windows, domain_ids, window_ids, strict=True):
        tokens = read_bin(made / f"{bins.names[domain_id]}.train.bin")
        assert row.tolist() == tokens[i * 16:i * 16 + 17].tolist()


@pytest.mark.parametrize("split", ["val", "test"])
def test_validation_and_test_windows_are_evenly_spaced_each_over_its_own_bin(made, split):
    bins, tokens = TokenBins(made, 16), read_bin(made / f"code.{split}.bin")
    W = (len(tokens) - 1) // 16
    assert W > 20
    every = np.array([tokens[i * 16:i * 16 + 17] for i in range(W)])
    for n in (1, 2, 7, W):
        np.testing.assert_array_equal(bins.eval_windows("code", split, n), every[[(i * W) // n for i in range(n)]])
    message = refused(bins.eval_windows, "code", split, W + 1)
    assert f"--{split}_samples={W + 1}: domain code of {made} has {W} {split} windows of 16 tokens" in message


def test_domains_are_selected_by_name(made):
    bins = TokenBins(made, 16, ["prose"])
    assert bins.names == list(bins.domains) == list(bins.n_windows) == ["prose"]
    windows = bins.train_windows(np.array([0]), np.array([9]))
    assert windows.tolist() == [read_bin(made / "prose.train.bin")[144:161].tolist()]
    assert "--domains: --data_dir=" in refused(TokenBins, made, 16, ["prose", "cats"])


def test_bins_far_larger_than_memory_are_mapped_and_no_mapping_stays(tmp_path):
    """The bins have nanoGPT's names and a minimal meta.json. They are sparse files, which take no space on the disk."""
    domain = {"dtype": "uint16"}
    for split in ("train", "val"):
        domain[split] = {"file": f"{split}.bin", "tokens": 2**35}
        (tmp_path / f"{split}.bin").touch()
        os.truncate(tmp_path / f"{split}.bin", 2**36)
    tokenizer = {"name": "bytes", "vocab_size": 257, "eot": 256, "eot_token": "<|endoftext|>", "fingerprint": "f"}
    meta = {"format_version": 3, "tokenizer": {**tokenizer, "files": []}, "domains": {"web": domain}}
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


def test_the_content_depends_on_the_tokens_in_use_and_not_on_the_folder(made, copied, tmp_path):
    build(tmp_path / "other", {"code": ARTICLES, "prose": ARTICLES[1:]}, made_by={"other": 1})
    same, other = (TokenBins(folder, 16).content() for folder in (copied, tmp_path / "other"))
    assert TokenBins(made, 16).content() == same != other
    same, other = (TokenBins(folder, 16, ["code"]).content() for folder in (copied, tmp_path / "other"))
    assert same == other
    (copied / "SHA256SUMS").unlink()
    assert "SHA256SUMS: FileNotFoundError" in refused(TokenBins(copied, 16).content)


def test_an_id_beyond_the_vocabulary_is_an_error(copied):
    tokens = read_bin(copied / "code.val.bin").copy()
    tokens[16] = 257  # the target of the first window's last token
    (copied / "code.val.bin").write_bytes(tokens.tobytes())
    message = refused(TokenBins(copied, 16).eval_windows, "code", "val", 1)
    assert "code.val.bin: holds the id 257, but the tokenizer has 257 ids" in message


in_meta = partial(edit, "meta.json")
BAD_FOLDERS = {
    "no meta": (drop("meta.json"), "--data_dir="),
    "meta not JSON": (put("meta.json", b"{"), "meta.json: "),
    "no tokenizer": (in_meta(lambda meta: meta.__delitem__("tokenizer")), "KeyError: 'tokenizer'"),
    "a list": (put("meta.json", b"[3]"), "meta.json: TypeError: "),
    "a list of domains": (in_meta(lambda meta: meta.update(domains=["code"])), "meta.json: TypeError: "),
    "version 2": (in_meta(lambda meta: meta.update(format_version=2)), "delete the whole folder and make"),
    "truncated": (lambda folder: os.truncate(folder / "code.train.bin", 100), "code.train.bin does not have the size"),
    "missing bin": (drop("code.test.bin"), "code.test.bin"),
    "missing tokenizer": (in_meta(lambda meta: meta["tokenizer"].update(files=["tokenizer.json"])),
                          "bins/tokenizer.json'; copy the folder again"),
}


@pytest.mark.parametrize("spoil, named", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_bins_folder_is_an_error(copied, spoil, named):
    spoil(copied)
    assert named in refused(TokenBins, copied, 16)


def test_verify_lists_what_changed(program, copied):
    assert program(f"--verify={copied}")[0] == 0
    tokens = read_bin(copied / "code.val.bin").copy()
    tokens[7] ^= 1
    (copied / "code.val.bin").write_bytes(tokens.tobytes())
    in_meta(made_by="me")(copied)
    status, _, stderr = program(f"--verify={copied}")
    assert status == 2 and "missing or changed: code.val.bin, meta.json;" in stderr


def test_the_quickstart_has_four_domains_of_about_the_size_asked_without_license_headers():
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
