"""Text to per-domain token bins, and bins to windows.

    python data.py --out_dir=data/mine --tokenizer=bytes 'code=src/**/*.py' books=books/ web=web.jsonl.gz
    python data.py --out_dir=data/pile --tokenizer=DIR --domain_key=meta.pile_set_name 'pile/*.jsonl.zst' code=src/
    python data.py --verify=data/mine

A bins folder holds for each domain NAME.train.bin and NAME.val.bin: token ids without a header, little-endian, uint16
where every id fits and uint32 otherwise, each document followed by the end-of-text id. meta.json describes the
tokenizer, and gives the size and sha256 of each bin. Helpers that all four programs share come first.
"""

import argparse
import ast
import fcntl
import fnmatch
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pydoc_data.topics
import re
import shutil
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import tiktoken


# ------------ What the four programs share ----------------------------------------------------------------------------

class UserError(ValueError):
    """Something the user can fix. A program prints its message without a traceback and exits with status 2."""


@contextmanager
def user_errors(source: str | Path, fix: str):
    """Turn any exception into a UserError that names `source` and the `fix`. One that says both passes unchanged."""
    try:
        yield
    except (UserError, PermissionError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # every library raises exceptions of its own, and a panic in Rust is no Exception
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: {type(error).__name__}: {reason}; {fix}") from None


def run_program(main: Callable):
    """Run `main` as a program, and end it in one way.

    A UserError or OSError is one message and status 2, without a traceback. Under torchrun rank 0 alone prints an error
    that all ranks raise: torchrun ends the others."""
    rank = os.environ.get("RANK")
    status = 0
    with suppress(AttributeError):  # an output that the shell closed is None
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    try:
        main()
        print(end="", flush=True)
    except SystemExit as stop:
        status = stop.code or 0
    except KeyboardInterrupt:
        status = 128 + 2  # as SIGINT gives
    except BrokenPipeError:
        status = 128 + 13  # as SIGPIPE gives
    except (UserError, OSError) as error:
        status = 2
        prefix = "error"
        if rank not in (None, "0"):
            time.sleep(3)  # gives torchrun time to end this process, so that the message of rank 0 stands alone
            prefix = f"rank {rank}: error"
        for line in str(error).splitlines():
            print(f"{prefix}: {line}", file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()

    # Leave at once, without Python's own cleaning up. It would write to an output that is closed. Under torchrun it
    # would wait for lost processes (NCCL), and sometimes it aborts (threads of gloo).
    if rank is not None or status == 128 + 13:
        with suppress(BrokenPipeError):
            print(end="", flush=True)
        os._exit(status)
    if status != 0:
        sys.exit(status)


def import_optional(module: str, needed_for: str, or_else: str = ""):
    """Import a module that only some uses require. UserError says how to install its package, or what else to do."""
    package = module.partition(".")[0]
    with user_errors(needed_for, f"pip install {package} {or_else}".strip()):
        return importlib.import_module(module)


def model_folder(source: str | Path, option: str, files: Iterable[str]) -> Path:
    """The folder that `source` names. If it is a name on the Hugging Face Hub, the folder that has `files` (patterns).

    It is a name if it looks like OWNER/MODEL and neither it nor OWNER exists here. `option` gave it, for the message
    if what huggingface_hub's cache lacks cannot be downloaded."""
    path = Path(source)
    if path.exists() or path.parent.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        return path
    where = f"{option}={source}: no such folder, and not to be had from the Hugging Face Hub"
    fix = f"name a folder; where there is a network:  hf download {source} --local-dir models/{path.name}"
    huggingface_hub = import_optional("huggingface_hub", where, f"or {fix}")
    with user_errors(where, fix):
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(files)))


def digest(*parts) -> str:
    """sha256 of `parts`, which can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def fsync(path: Path):
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path: Path, text: str):
    """Write a small file completely or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)


def print_table(rows: list[list[str]]):
    """Print rows of a label and cells, each column as wide as its widest cell."""
    label_width, *widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    for label, *cells in rows:
        print(f"{label:{label_width}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)), flush=True)


LOCK = ".lock"


@contextmanager
def locked(folder: Path):
    """Make the folder if there is none, and keep all other processes out of it for as long as the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:  # network file systems lock files that are open for writing, not folders
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is using it; wait for it, or name another folder") from None
        yield


# ------------ Windows and bins ----------------------------------------------------------------------------------------

FORMAT_VERSION = 2
TOKENIZER_KEYS = {"name": str, "vocab_size": int, "eot": int, "eot_token": str, "fingerprint": str,
                  "files": list}  # of its entry in meta.json


def read_meta(data_dir: str | Path, option: str = "--data_dir") -> dict:
    """meta.json of a bins folder, checked against the files beside it. UserError names the `option` that gave it."""
    path = Path(data_dir, "meta.json")
    if not path.is_file():
        raise UserError(f"{option}={data_dir}: has no meta.json; make bins with data.py --out_dir={data_dir}")
    with user_errors(path, "copy the folder again, or delete meta.json and make the bins again"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {meta['format_version']}, but {FORMAT_VERSION} is known")
        tokenizer = meta["tokenizer"]
        lacking = {key for key, kind in TOKENIZER_KEYS.items() if type(tokenizer.get(key)) is not kind}
        # Every file is in the folder itself, and every bin has the size that its number of tokens gives.
        sizes = dict.fromkeys(tokenizer["files"])  # None: any size
        for name, domain in meta["domains"].items():
            dtype = np.dtype(domain["dtype"])
            if not tokenizer["eot"] < tokenizer["vocab_size"] <= np.iinfo(dtype).max + 1:
                raise ValueError(f"domain {name}: {dtype} cannot hold {tokenizer['vocab_size']} ids, or end of text "
                                 f"{tokenizer['eot']} is not one of them")
            for entry in (domain["train"], domain["val"]):
                lacking |= {"sha256"} - entry.keys()
                if entry["file"] in sizes or entry["tokens"] < 1:
                    raise ValueError(f"domain {name}: {entry['file']} is empty, or named twice")
                sizes[entry["file"]] = entry["tokens"] * dtype.itemsize
        if lacking or not meta["domains"]:
            raise ValueError(f"lacks {' '.join(lacking) or 'domains'}")
        for name, size in sizes.items():
            file = path.parent / name
            if file.parent != path.parent or not file.is_file() or size not in (None, file.stat().st_size):
                raise ValueError(f"{file} is not in the folder, or not of the size that is recorded")
    return meta


class TokenBins:
    """The bins of a folder, cut into windows of block_size + 1 tokens: the inputs, and the targets one token later.

    A bin of n tokens has (n − 1) // B windows, B = block_size, and window i is the tokens i·B … i·B + B inclusive.
    `names`, given by `option`, selects domains (default: all). UserError if one is missing or has no train window. No
    file stays open, so an instance can be pickled."""

    def __init__(self, data_dir: str | Path, block_size: int, names: list[str] | None = None,
                 option: str = "--domains"):
        meta = read_meta(data_dir)
        self.dir = Path(data_dir)
        self.block_size = block_size
        self.names = list(dict.fromkeys(names or meta["domains"]))
        self.tokenizer = meta["tokenizer"]  # its entry of meta.json
        self.vocab_size = self.tokenizer["vocab_size"]
        self.domains = {}  # name → entry of meta.json
        self.n_windows = {}  # name → number of train windows
        for name in self.names:
            if name not in meta["domains"]:
                raise UserError(f"{option}: {self.dir} has no {name}; it has {' '.join(meta['domains'])}")
            self.domains[name] = meta["domains"][name]
            self.n_windows[name] = (self.domains[name]["train"]["tokens"] - 1) // block_size
        empty = " ".join(name for name in self.names if self.n_windows[name] == 0)
        if empty:
            raise UserError(f"--block_size={block_size}: no train text that long in domain {empty} of {self.dir}")

    def _tokens(self, name: str, side: str) -> np.ndarray:
        """A bin, mapped anew for each batch, as in nanoGPT, so that pages read before do not count as memory in use."""
        dtype = np.dtype(self.domains[name]["dtype"]).newbyteorder("<")
        return np.memmap(self.dir / self.domains[name][side]["file"], dtype=dtype, mode="r")

    def _windows(self, name: str, side: str, window_ids: np.ndarray) -> np.ndarray:
        """Windows of one bin, (len(window_ids), block_size + 1) int64. UserError if an id is not in the vocabulary."""
        tokens = self._tokens(name, side)
        positions = window_ids[:, None] * self.block_size + np.arange(self.block_size + 1)
        windows = tokens[positions].astype(np.int64)
        largest = windows.max(initial=0)
        if largest >= self.vocab_size:
            path = self.dir / self.domains[name][side]["file"]
            raise UserError(f"{path}: holds the id {largest}, but the tokenizer has {self.vocab_size} ids; run data.py "
                            f"--verify={self.dir}")
        return windows

    def train_windows(self, domain_ids: np.ndarray, window_ids: np.ndarray) -> np.ndarray:
        """The windows that MixtureSampler.next_batch names, in its order: (B, block_size + 1) int64."""
        windows = np.empty((len(domain_ids), self.block_size + 1), dtype=np.int64)
        for domain_id in np.unique(domain_ids):
            rows = domain_ids == domain_id
            windows[rows] = self._windows(self.names[domain_id], "train", window_ids[rows])
        return windows

    def eval_windows(self, name: str, side: str, n: int) -> np.ndarray:
        """`n` windows of a domain's validation bin, evenly spaced over its first half (`side` is "val") or its second
        ("test"), whose documents are random: (n, block_size + 1) int64. UserError if that half has fewer windows."""
        return self._windows(name, "val", self._eval_ids(name, side, n))

    def eval_half(self, name: str, side: str) -> range:
        """The windows of a domain's validation bin that are for a side, the first half ("val") or the second ("test").
        If the number of windows is odd, the second half is the larger one."""
        n_windows = (self.domains[name]["val"]["tokens"] - 1) // self.block_size
        half = n_windows // 2
        return range(half) if side == "val" else range(half, n_windows)

    def _eval_ids(self, name: str, side: str, n: int) -> np.ndarray:
        half = self.eval_half(name, side)
        if n > len(half):
            raise UserError(f"--{side}_samples={n}: domain {name} of {self.dir} has {len(half)} windows of "
                            f"{self.block_size} tokens in that half of its validation bin; lower --{side}_samples or "
                            "--block_size, or make bins with more text or --val_fraction")
        return half.start + np.arange(n) * len(half) // max(n, 1)

    def eval_documents(self, name: str, side: str, n: int) -> int:
        """How many distinct documents the windows of `eval_windows` touch."""
        # Document i lies between the edges i and i + 1.
        tokens = self._tokens(name, "val")
        ends = np.flatnonzero(tokens == self.tokenizer["eot"])
        edges = np.concatenate([[-1], ends, [len(tokens)]]) + 1
        starts = self._eval_ids(name, side, n) * self.block_size
        firsts = np.searchsorted(ends, starts)
        lasts = np.searchsorted(ends, starts + self.block_size - 1)
        touched = set(chain.from_iterable(map(range, firsts, lasts + 1)))
        return len({tokens[edges[i]:edges[i + 1]].tobytes() for i in touched})

    def content(self) -> str:
        """Identity of the tokens, independent of the folder: over the bins' entries and the tokenizer."""
        return digest(list(self.domains.items()), self.tokenizer["fingerprint"])


def verify(data_dir: str | Path):
    """Hash every bin of a folder again. UserError names what changed: bins, or the tokenizer."""
    meta = read_meta(data_dir, "--verify")
    changed = []
    for domain in meta["domains"].values():
        for entry in (domain["train"], domain["val"]):
            path = Path(data_dir, entry["file"])
            largest = np.memmap(path, domain["dtype"], mode="r").max()
            state = "ok"
            if file_sha256(path) != entry["sha256"] or largest >= meta["tokenizer"]["vocab_size"]:
                state = "CHANGED"
                changed.append(entry["file"])
            print(f"{entry['file']:32} {state}")
    if changed:
        raise UserError(f"{data_dir}: {', '.join(changed)} not as in meta.json; copy again, or make the bins again")
    saved_tokenizer(Path(data_dir), meta["tokenizer"])


# ------------ Tokenizers ----------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
PART = 2 << 20  # characters that a tokenizer.json encodes at once, since its library holds about 100 bytes an id
TOKENIZER_META = "tokenizer_meta.json"  # in a model's folder: the tokenizer's entry of meta.json
# The files of a tokenizer. They are copied to the bins, and from there to the student.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
# What is downloaded of a model on the Hub.
MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", TOKENIZER_META, *TOKENIZER_FILES)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. No special token is added, and text that looks like a special token is plain text."""
    name: str
    vocab_size: int  # largest id + 1, added tokens included
    eot: int  # the id that ends each document
    eot_token: str
    fingerprint: str  # of everything that decides the encoding, however the files are serialised
    encode_batch: Callable[[list[str]], list[np.ndarray]]
    decode: Callable[[list[int]], str]
    files: tuple[Path, ...] = ()  # none: it is loaded by its name


def load_tokenizer(source: str | Path, eot: str = "") -> Tokenizer:
    """The tokenizer `source`: "bytes", a tiktoken encoding, a tokenizer.json or the folder that holds one, or a model's
    name on the Hugging Face Hub. Each document ends with the token `eot`; default: the tokenizer's own eos_token."""
    names = ["bytes", *tiktoken.list_encoding_names()]
    if source in names:  # even if there is a folder of the same name
        return _tiktoken_tokenizer(source, eot)
    path = model_folder(source, "--tokenizer", TOKENIZER_FILES)
    if path.is_dir():
        name = path.name if path == Path(source) else str(source)
        return _huggingface_tokenizer(path / "tokenizer.json", eot, name)
    if path.name == "tokenizer.json":
        return _huggingface_tokenizer(path, eot, path.parent.name)
    raise UserError(f"--tokenizer={source}: expected a folder or file with a tokenizer.json, a name on the Hugging "
                    f"Face Hub such as Qwen/Qwen1.5-14B, or one of {' '.join(names)}")


def _tiktoken_tokenizer(name: str, eot: str) -> Tokenizer:
    if name == "bytes":
        encoding = tiktoken.Encoding("bytes", pat_str="(?s).", special_tokens={END_OF_TEXT: 256},
                                     mergeable_ranks={bytes([byte]): byte for byte in range(256)})
        fingerprint = settings_digest(bytes_settings())
    else:
        with user_errors(f"--tokenizer={name}", "set TIKTOKEN_CACHE_DIR to a folder that has it, or download it"):
            encoding = tiktoken.get_encoding(name)
        ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
        fingerprint = digest(ranks, encoding._pat_str, encoding._special_tokens)

    # The token that ends a document.
    special = encoding._special_tokens
    eot = eot or END_OF_TEXT
    if eot not in special:
        raise UserError(f"--eot={eot}: not a special token of {name}, which has {' '.join(special)}")
    # Some encodings have gaps between their ids, and a model may predict any id.
    known = {*encoding._mergeable_ranks.values(), *special.values()}

    def encode(text: str) -> np.ndarray:
        with user_errors(f"--tokenizer={name}, a text that begins with {text[:40]!r}", "leave it out, or cut it"):
            return encoding.encode_to_numpy(text, disallowed_special=())

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        if name == "bytes":
            return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(encode, texts))

    def decode(ids: list[int]) -> str:
        return encoding.decode([i for i in ids if i in known])

    return Tokenizer(name=name, vocab_size=encoding.max_token_value + 1, eot=special[eot], eot_token=eot,
                     fingerprint=fingerprint, encode_batch=encode_batch, decode=decode)


def _huggingface_tokenizer(path: Path, eot: str, name: str) -> Tokenizer:
    tokenizers = import_optional("tokenizers", f"--tokenizer={path}")
    convert = f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained({str(path.parent)!r})"
    with user_errors(f"--tokenizer={path}", f"transformers' {convert} writes it where there is another kind"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The token that ends a document is `eot`, or the one that the configuration beside it names.
        config = path.with_name("tokenizer_config.json")
        if config.is_file():
            eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token") or ""
            eot = eot or (eos.get("content") if isinstance(eos, dict) else eos)
    # Special tokens inside text are encoded as text, no text is cut off or filled up, and no merge is left to chance.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None

    vocab = tokenizer.get_vocab()
    tokens = {}  # id → token
    for token, i in vocab.items():
        if tokens.setdefault(i, token) != token:
            raise UserError(f"--tokenizer={path}: {tokens[i]!r} and {token!r} have one id, {i}; name another")
    if not isinstance(eot, str) or eot not in vocab:
        raise UserError(f"--eot={eot}: not a token of {path.parent}, whose tokenizer_config.json names the end of text "
                        "as eos_token; name the token that ends a document with --eot=TOKEN")

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        ids = []
        for part in batches(texts, len, PART):
            encodings = tokenizer.encode_batch_fast(part, add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return ids

    files = [path.with_name(name) for name in TOKENIZER_FILES if path.with_name(name).is_file()]
    return Tokenizer(name=name, vocab_size=max(tokens) + 1, eot=vocab[eot], eot_token=eot,
                     fingerprint=settings_digest(json.loads(tokenizer.to_str())), encode_batch=encode_batch,
                     decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False), files=tuple(files))


# The characters that every tokenizer has to keep, and those that have, together with them, all bytes of UTF-8.
PROBE_TEXT = "".join(map(chr, range(33, 127))) + " \t\néßΩЖ漢か한ع≈👩"
PROBE_BYTES = "".join(map(chr, [*range(128, 0x900), *range(0x1400, 0xFC00, 0x1000), *range(2**18, 2**20 + 1, 2**18)]))


def check_characters(tokenizer: Tokenizer):
    """UserError if the tokenizer loses a character between two letters, or a byte of it."""
    characters = list(dict.fromkeys(PROBE_TEXT + PROBE_BYTES))
    texts = ["ab", "abab", *(f"a{character}b" for character in characters)]
    with user_errors(f"--tokenizer={tokenizer.name}", "name another one"):
        ab, abab, *decoded = [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode_batch(texts)]
    # A normalizer may take out some of PROBE_BYTES by design, such as accents, but half a character is a byte lost.
    pairs = zip(characters, decoded, strict=True)
    lost = [repr(c) for c, text in pairs if "\ufffd" in text or text == ab and (c in PROBE_TEXT or c.isalpha())]
    # If the same comes back of any word, it is one unknown word, which loses no character.
    if lost and (ab != abab or not ab):
        raise UserError(f"--tokenizer={tokenizer.name}: loses {' '.join(lost[:20])}; name one that keeps them")


def note_changes(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Pass a stream of (domain, text) on. A note tells once if the tokenizer changes some of a domain's first 20."""
    first = defaultdict(list)  # name → texts
    noted = False
    for name, text in documents:
        if not noted and len(first[name]) < 20:
            first[name].append(text[:1000])
            if len(first[name]) == 20:
                noted = print_changes(name, first[name], tokenizer)
        yield name, text
    for name, texts in first.items():
        if not noted and len(texts) < 20:
            noted = print_changes(name, texts, tokenizer)


def print_changes(name: str, texts: list[str], tokenizer: Tokenizer) -> bool:
    """Print a note if the tokenizer changes some texts of a domain by design. It says what happens."""
    decoded = [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode_batch(texts)]
    changed = [pair for pair in zip(texts, decoded, strict=True) if pair[0] != pair[1]]
    if changed:
        start = len(os.path.commonprefix(changed[0]))
        before, after = [text[start:start + 40] for text in changed[0]]
        print(f"note: the tokenizer changes {len(changed)} of the first {len(texts)} documents of {name}: {before!r} "
              f"comes back as {after!r}")
    return bool(changed)


def settings_digest(settings: dict) -> str:
    """Identity of what decides the encoding in a tokenizer.json, however the file is serialised."""
    model = dict(settings["model"])
    merges = model.pop("merges", None) or []
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    # How a special token is matched in text decides nothing: it is never looked for there.
    unused = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{**token, **unused} if token["special"] else token for token in settings["added_tokens"]]
    return digest(model, pairs, added, settings["normalizer"], settings["pre_tokenizer"])


def bytes_settings() -> dict:
    """The tokenizer `bytes` as a tokenizer.json: GPT-2's alphabet, in which each byte is a character, and no merges."""
    # Bytes that are not printable are the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    vocab = dict(zip(map(chr, [*printable, *range(256, 256 + len(others))]), [*printable, *others]))
    # All fields that the library writes, so that a file that it wrote again has the same fingerprint.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end_of_text = {"id": 256, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
                   "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocab, "merges": []}
    return {"version": "1.0", "added_tokens": [end_of_text], "normalizer": None, "pre_tokenizer": byte_level,
            "decoder": byte_level, "model": model}


def saved_tokenizer(folder: Path, entry: dict, eot: str = "") -> Tokenizer:
    """The tokenizer of an entry of meta.json: from its files in `folder`, or by its name. UserError if it changed.
    `eot` as in load_tokenizer; default: the entry's."""
    source = folder if entry["files"] else entry["name"]
    tokenizer = load_tokenizer(source, eot or entry["eot_token"])
    changed = [key for key in ("fingerprint", "vocab_size", "eot") if getattr(tokenizer, key) != entry[key]]
    if changed and not (eot and changed == ["eot"]):
        raise UserError(f"{folder}: the tokenizer {entry['name']} is not the one that it was made with, by its "
                        f"{' '.join(changed)}; copy its files again, or install the version that was used then")
    return tokenizer


def is_tiktoken(name: str, files: Iterable) -> bool:
    """Whether a tokenizer is one of tiktoken's encodings, whose fingerprint no tokenizer.json has. `bytes` is not."""
    return not files and name != "bytes"


def save_tokenizer(folder: Path, bins: TokenBins):
    """Write the bins' tokenizer to a model's folder: files, and its entry of meta.json."""
    entry = bins.tokenizer
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in entry["files"]:
        shutil.copyfile(bins.dir / name, folder / name)
    # transformers loads a tokenizer from files only, so `bytes` gets one.
    if entry["name"] == "bytes" and not entry["files"]:
        write_text(folder / "tokenizer.json", json.dumps(bytes_settings()))
    if (folder / "tokenizer.json").is_file():
        write_tokenizer_config(folder, config["model_type"], entry["eot_token"])
    write_text(folder / TOKENIZER_META, json.dumps(entry, indent=1))

    # config.json and generation_config.json name the bins' end of text, whatever the model named before.
    bos = config.get("bos_token_id")
    if bos is None:
        bos = entry["eot"]
    ids = {"bos_token_id": bos, "eos_token_id": entry["eot"], "pad_token_id": entry["eot"]}
    write_text(folder / "generation_config.json", json.dumps(ids))
    write_text(folder / "config.json", json.dumps({**config, **ids}, indent=2, sort_keys=True))


def write_tokenizer_config(folder: Path, model_type: str, eot_token: str):
    """Name the end of text in tokenizer_config.json, and the class with which transformers encodes by tokenizer.json.

    Most other classes keep its vocabulary in transformers 5, but split text in their own way. Qwen's class is right for
    Qwen's tokenizer. In a qwen2 model transformers 5 takes it whatever is named, unless `auto_map` names code too. That
    code is not run without trust_remote_code: then the named class counts."""
    path = folder / "tokenizer_config.json"
    config = {"bos_token": eot_token, "clean_up_tokenization_spaces": False}  # the beginning is the end, as GPT-2's
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
    qwens = str(config.get("tokenizer_class")).startswith("Qwen2Tokenizer")
    if qwens and config.get("eos_token") == eot_token:
        return
    config["eos_token"] = eot_token
    if not qwens:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])  # what a model takes
        if model_type == "qwen2":
            config["auto_map"] = {"AutoTokenizer": [None, "tokenizer_as_saved.TokenizerAsSaved"]}
            write_text(folder / "tokenizer_as_saved.py", "from transformers import PreTrainedTokenizerFast\n\n\n"
                       "class TokenizerAsSaved(PreTrainedTokenizerFast):\n    pass\n")
    write_text(path, json.dumps(config, indent=2))


def model_tokenizer(folder: Path, eot: str = "") -> Tokenizer | None:
    """The tokenizer of a model's folder, or None if the folder has none. `eot` as in load_tokenizer."""
    path = folder / TOKENIZER_META
    if path.is_file():  # a run wrote the folder
        with user_errors(path, "copy it again from the folder that a run wrote"):
            return saved_tokenizer(folder, json.loads(path.read_text(encoding="utf-8")), eot)
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder, eot)
    return None


# ------------ Documents -----------------------------------------------------------------------------------------------

PIECE = 8_000_000  # characters, about: a longer text becomes several documents, so that memory stays bounded
RECORDS = (".json", ".jsonl", ".jsonlines", ".ndjson", ".parquet")  # suffixes of files of records
COMPRESSED = (".gz", ".zst")


def expand_sources(sources: list[str], labelled: bool, left_out: dict[str, Counter]) -> dict[str, list[Path]]:
    """NAME=GLOB words to domain → sorted files, each once. If records are `labelled`, a GLOB alone is "" → files.

    UserError if a word matches no file, or one whose suffix says that it is not read. `left_out`: see read_documents.
    """
    domains = defaultdict(list)  # name → paths, and what those lead to that are links
    for word in sources:
        named = re.fullmatch("([A-Za-z0-9][A-Za-z0-9_-]*)=(.*)", word)
        # With labels, a word such as year=2023/*.jsonl may be a glob as it stands.
        if labelled and (not named or find_files(word, Counter())):
            name = ""
            pattern = word
        elif named:
            name, pattern = named.groups()
        else:
            raise UserError(f"{word!r}: write NAME=GLOB, with letters, digits, - and _ in NAME, or name a --domain_key")
        paths = find_files(pattern, left_out[name])
        if not paths:
            fix = " ".join(left_out[name]) or "name a folder or a glob of files that you may read"
            raise UserError(f"{word}: no file matches {pattern!r}; {fix}")
        domains[name] += paths + [path.resolve() for path in paths]

    found = {}
    for name, paths in domains.items():
        # Of the names of a file, one that says that it holds records is used, or else that it is compressed.
        names = {}
        for path in sorted(paths, key=lambda p: (suffix_of(p) not in RECORDS, p.suffix.lower() not in COMPRESSED)):
            status = path.stat()
            names.setdefault((status.st_dev, status.st_ino), path)
        found[name] = sorted(names.values())
        for path in found[name]:
            suffix = suffix_of(path)
            if suffix in (".csv", ".tsv"):
                raise UserError(f"{path}: write its rows to .jsonl or .parquet, or name the other files")
            if suffix == ".parquet" or path.suffix.lower() == ".zst":
                import_optional("pyarrow", str(path))
            if not name and suffix not in RECORDS:
                raise UserError(f"{path}: --domain_key requires records, in .jsonl, .json or .parquet, or NAME=GLOB")
    return found


def find_files(pattern: str, left_out: Counter) -> list[Path]:
    """The files that a name or a glob stands for. If these are folders alone: all files in them that are not hidden."""
    pattern = re.sub(r"(^|/)\*\*/*$", r"\1**/*", os.path.expanduser(pattern))
    paths = list(find_paths(pattern, left_out))
    if not any(map(os.path.isfile, paths)):
        for folder in list(filter(os.path.isdir, paths)):
            paths += find_paths(os.path.join(glob.escape(folder), "**/*"), left_out)
    lost = [path for path in paths if not os.path.isfile(path) and not os.path.isdir(path)]
    left_out.update(["links to nothing, pipes and devices left out"] * len(lost))
    return sorted(map(Path, filter(os.path.isfile, paths)))


def find_paths(pattern: str, left_out: Counter) -> Iterator[str]:
    """What glob.glob finds. Folders that cannot be read are counted, and links in a circle end."""
    if os.path.lexists(pattern):  # a name that exists is no pattern
        yield pattern
        return
    if not glob.has_magic(pattern):
        return
    head, tail = os.path.split(pattern.rstrip("/"))
    entered = set()
    for top in filter(os.path.isdir, find_paths(head or ".", left_out)):
        walk = os.walk(top, followlinks=True, onerror=lambda _: left_out.update(["unreadable folders left out"]))
        for folder, subfolders, files in walk:
            # Any other pattern stands for names in this folder, and for hidden ones only if it begins with a dot.
            if tail != "**":
                for name in fnmatch.filter(subfolders + files, tail):
                    if tail.startswith(".") or not name.startswith("."):
                        yield os.path.join(folder, name)
                break
            # ** stands for all folders below, each of which is entered once.
            real = os.path.realpath(folder)
            subfolders[:] = [name for name in subfolders if real not in entered and not name.startswith(".")]
            if real not in entered:
                entered.add(real)
                yield folder


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without .gz or .zst where another is before it."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()


def read_documents(files: dict[str, list[Path]], text_key: str, domain_key: str,
                   left_out: dict[str, Counter]) -> Iterator[tuple[str, str]]:
    """The documents of the files as a stream of (domain, text). UserError if a name has none, or a file is damaged.

    Under the name "" the domain is what each record says at `domain_key`. `left_out` counts, by name and reason, what
    is no document and what was replaced."""
    labels = {}  # domain → the label that it was made from
    for name, paths in files.items():
        counts = left_out[name]
        found = False
        for path in paths:
            for record in read_file(path, text_key, domain_key, counts):
                text = value_at(record, text_key)
                label = name or value_at(record, domain_key)
                domain = name or re.sub(r"[^A-Za-z0-9]+", "_", str(label)).strip("_")[:100]

                # Leave out what is not a document.
                reason = None
                if not isinstance(text, str):
                    reason = f"records left out, without a text (bytes are none) under the key {text_key}"
                elif type(label) not in (str, int, float) or label != label or not domain:  # NaN is not equal to itself
                    reason = f"records left out, without a letter or digit of ASCII under the key {domain_key}"
                elif not text or text.isspace():
                    reason = "empty documents left out"
                if reason is not None:
                    counts[reason] += 1
                    continue

                # Labels that make the same name are one domain.
                if labels.setdefault(domain, label) != label:
                    counts[f"records in the domain {domain} with another label than {labels[domain]!r}"] += 1
                # Lone surrogates are not valid Unicode. They are from _open_text, or from escapes in JSON.
                try:
                    text.encode()
                except UnicodeEncodeError:
                    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
                    counts["texts with bytes that are not UTF-8, each replaced by U+FFFD"] += 1
                # A long text is several documents.
                found = True
                file = io.StringIO(text)
                while piece := file.read(PIECE) + file.readline(PIECE):
                    yield domain, piece
        if not found:
            raise UserError(f"{name or 'records'}: no document in its {len(paths)} files; notes say what was left out")


def read_file(path: Path, text_key: str, domain_key: str, left_out: Counter) -> Iterator[dict]:
    """The records of a file. A text file is one with its text under `text_key`, or several, cut at ends of lines."""
    suffix = suffix_of(path)
    with user_errors(path, "copy it again, or make a .zst that needs no more memory than --long=27"):
        if suffix == ".parquet":
            file = import_optional("pyarrow.parquet", str(path)).ParquetFile(path, buffer_size=PIECE, pre_buffer=False)
            # Columns that the file lacks are left out. Rows may be long, so few are read at once.
            for rows in file.iter_batches(columns=[text_key, domain_key], batch_size=4):
                yield from rows.to_pylist()
            return
        with _open_text(path) as file:
            if suffix in RECORDS:
                yield from json_records(file, path, left_out)
                return
            taken = ""
            while piece := file.read(PIECE) + file.readline(PIECE):
                # Text has no NUL characters.
                if "\0" in piece:
                    left_out[f"binary files left out{taken}"] += 1
                    return
                taken = f" after the first part, which was taken: {path}"
                yield {text_key: piece}


def json_records(lines: Iterable[str], path: Path, left_out: Counter) -> Iterator[dict]:
    """The records of lines of JSON, without broken ones. UserError if there are more of these than of others."""
    first = ""  # what is wrong with the first broken one of the file
    surplus = 0  # of broken ones
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no record")
        except (ValueError, RecursionError) as error:
            first = first or f"{path}, line {number}: {error}; expected one JSON record per line"
            if left_out["broken records left out"] == 0:
                print(f"note: {first}", flush=True)
            left_out["broken records left out"] += 1
            surplus += 1
        else:
            surplus -= 1
            yield record
    if surplus > 0:
        raise UserError(f"{first}; jq -c '.[]' FILE writes the records of one array so, or name the other files")


def value_at(record: dict, key: str):
    """What a record holds under a key such as meta.source, the name itself or a path of names; None if nothing."""
    if key in record:
        return record[key]
    for name in key.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _open_text(path: Path) -> io.TextIOWrapper:
    """Open a text file, compressed or not, without a byte order mark. Bytes that are not UTF-8 are lone surrogates."""
    compression = path.suffix.lower()
    if compression == ".gz":
        file = gzip.open(path)
    elif compression == ".zst":
        # Not by zstandard, whose reader takes a file that is cut off for a whole one.
        pyarrow = import_optional("pyarrow", str(path))
        file = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    else:
        file = open(path, "rb")
    if compression in COMPRESSED and path.stat().st_size == 0:
        raise ValueError("a compressed file is never empty")
    start = file.peek(4)[:4]
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        encoding = "UTF-32" if b"\0\0" in start else "UTF-16"
        raise UserError(f"{path}: is {encoding}; convert it:  iconv -f {encoding} -t UTF-8 {path} > NEW")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


# ------------ The build: one pass over a stream of documents ----------------------------------------------------------

BATCH_BYTES = 32 << 20  # of text that is encoded at once: enough for many cores
BATCH_DOCUMENTS = 100_000  # at most, however short they are
MAX_DOMAINS = 256  # each keeps up to --val_bytes in memory
MIN_HELD = 8  # documents of a domain, among which validation is chosen however few bytes it may have


class BinWriter:
    """A bin that is being written, under a temporary name until `publish`. No file stays open: domains may be many."""

    def __init__(self, path: Path, dtype: str):
        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self.temporary.write_bytes(b"")
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.sha256 = hashlib.sha256()
        self.tokens = 0
        self.documents = 0
        self.bytes = 0  # of the documents in UTF-8

    def write(self, documents: list[tuple[np.ndarray, int]], eot: int):
        """Add documents, (ids, bytes in UTF-8), each with the end of text."""
        with user_errors(self.path, "make room there, and build again"), open(self.temporary, "ab") as file:
            for ids, n_bytes in documents:
                encoded = np.empty(len(ids) + 1, dtype=self.dtype)
                encoded[:-1] = ids
                encoded[-1] = eot
                file.write(encoded)
                self.sha256.update(encoded)
                self.tokens += len(encoded)
                self.documents += 1
                self.bytes += n_bytes

    def publish(self) -> dict:
        """Give the bin its name. Returns its entry of meta.json."""
        fsync(self.temporary)
        os.replace(self.temporary, self.path)
        return {"file": self.path.name, "tokens": self.tokens, "documents": self.documents, "bytes": self.bytes,
                "sha256": self.sha256.hexdigest()}


class DomainBuild:
    """A domain that is being built: its two bins, and those of its documents that may become validation.

    They are the ones with the smallest content hashes, so the order in which documents come does not matter. The
    methods yield pairs of a bin and a document in UTF-8."""

    def __init__(self, name: str, out_dir: Path, dtype: str):
        self.train = BinWriter(out_dir / f"{name}.train.bin", dtype)
        self.val = BinWriter(out_dir / f"{name}.val.bin", dtype)
        self.held = {}  # hash → document
        self.copies = Counter()  # hash → how often the document came
        self.held_bytes = 0  # of those that fit into validation, each once
        self.total_bytes = 0  # of all documents of the domain, as often as they came
        self.bound = b"\xff" * 33  # every document with a smaller hash is held, if it fits into validation

    def add(self, raw: bytes, limit: int) -> Iterator[tuple[BinWriter, bytes]]:
        """Take the next document and hold about `limit` bytes."""
        key = hashlib.sha256(raw).digest()
        self.total_bytes += len(raw)
        if key >= self.bound:
            yield self.train, raw
            return
        self.copies[key] += 1
        if key not in self.held:
            self.held[key] = raw
            if len(raw) <= limit:
                self.held_bytes += len(raw)
        if self.held_bytes > 1.1 * limit or len(raw) > limit:
            yield from self.shrink(limit)

    def shrink(self, limit: int) -> Iterator[tuple[BinWriter, bytes]]:
        """Hold at most `limit` bytes or MIN_HELD documents. Others are train text: those with smaller hashes fill all
        that validation may have, or they exceed it."""
        for key in sorted(self.held, reverse=True)[:-MIN_HELD]:
            size = len(self.held[key])
            if size <= limit:
                if self.held_bytes <= limit:
                    continue
                self.bound = key
                self.held_bytes -= size
            yield from repeat((self.train, self.held.pop(key)), self.copies.pop(key))

    def split(self, fraction: float, limit: int) -> Iterator[tuple[BinWriter, bytes]]:
        """After the last document: validation has at most `limit` bytes and this fraction, and a document at least."""
        yield from self.shrink(limit)
        limit = min(limit, fraction * self.total_bytes)
        sizes = {key: len(self.held[key]) * self.copies[key] for key in sorted(self.held)}
        # A document that exceeds the limit by itself or by its copies is train text. The others fill the limit.
        small = [key for key in sizes if sizes[key] <= limit]
        totals = np.cumsum([sizes[key] for key in small])
        chosen = dict.fromkeys(small[:np.searchsorted(totals, limit, side="right")])
        # If all exceed it, the first without copies is taken, or else the one with the fewest bytes: of the first that
        # were held from the start, since a copy of another may be train text.
        if not chosen:
            first = list(sizes)[:MIN_HELD]
            chosen = [min(first, key=lambda key: sizes[key] if self.copies[key] > 1 else 0)]
        for key in reversed(sizes):
            if key not in chosen:
                yield from repeat((self.train, self.held[key]), self.copies[key])
        for key in chosen:
            yield from repeat((self.val, self.held[key]), self.copies[key])
        self.held.clear()


def split_documents(documents: Iterable[tuple[str, str]], domains: dict[str, DomainBuild], out_dir: Path, dtype: str,
                    val_fraction: float, val_bytes: int) -> Iterator[tuple[BinWriter, bytes]]:
    """Yield (bin, document in UTF-8) of a stream of (domain, text), as soon as the bin is known. Adds to `domains`."""
    for name, text in documents:
        if name not in domains:
            if len(domains) == MAX_DOMAINS:
                raise UserError(f"domain {name}: at most {MAX_DOMAINS} domains fit into memory; merge some")
            domains[name] = DomainBuild(name, out_dir, dtype)
        yield from domains[name].add(text.encode(), val_bytes)
    for domain in domains.values():
        yield from domain.split(val_fraction, val_bytes)


def batches(items: Iterable, size: Callable, limit: int) -> Iterator[list]:
    """Cut a stream into lists whose items have a `size` of about `limit` together. Short items are not too many."""
    batch = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
            total = 0
    if batch:
        yield batch


def build_bins(out_dir: str | Path, tokenizer: Tokenizer, documents: Iterable[tuple[str, str]], *,
               val_fraction: float = 0.05, val_bytes: int = 32_000_000, made_by: dict | None = None) -> dict:
    """Write the bins of a stream of (domain, text) in one pass, and then meta.json, whose content is returned.

    Of each domain, the documents with the smallest content hashes are validation, in the order of their hashes: at most
    val_fraction (below 1) of the domain's bytes and val_bytes, and at least one distinct document on each side. A
    domain with a single one is left out. Memory is two batches, and a domain's val_bytes with a few hundred bytes for
    each document in them. A build that is killed has to start again. `made_by` is kept in meta.json."""
    out_dir = Path(out_dir)
    if not 0 <= val_fraction < 1 or val_bytes < 0:
        raise UserError(f"--val_fraction={val_fraction} --val_bytes={val_bytes}: at least 0, and the fraction below 1")
    # What a killed build left is written again. It left the lock file too, which also a run's folder has.
    was_killed = (out_dir / LOCK).exists() and not (out_dir / "metrics.jsonl").exists()
    for path in own_files(out_dir, tokenizer):
        if path.is_file() and not was_killed:
            raise UserError(f"--out_dir={out_dir}: holds {path.name}, which no build has left; name another folder")

    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    domains = {}
    n_bytes = 0
    n_with_end = 0
    with locked(out_dir):
        if (out_dir / "meta.json").exists():
            raise UserError(f"--out_dir={out_dir}: holds bins already; name another folder")
        try:
            # Encode a batch over all domains at a time. No document may hold the end of text.
            assigned = split_documents(documents, domains, out_dir, dtype, val_fraction, val_bytes)
            for batch in batches(assigned, lambda pair: len(pair[1]), BATCH_BYTES):
                encoded = tokenizer.encode_batch([raw.decode() for writer, raw in batch])
                some_with_end = tokenizer.eot in np.concatenate(encoded)
                by_writer = defaultdict(list)
                for (writer, raw), ids in zip(batch, encoded, strict=True):
                    n_bytes += len(raw)
                    if some_with_end and tokenizer.eot in ids:
                        n_with_end += 1
                    else:
                        by_writer[writer].append((ids, len(raw)))
                for writer, written in by_writer.items():
                    writer.write(written, tokenizer.eot)
                print(f"{n_bytes / 1e6:,.1f} MB of text", flush=True)
            if n_with_end:
                print(f"note: {n_with_end:,} documents left out, which hold {tokenizer.eot_token}, the end of text")

            # Every bin is complete, and gets its name. meta.json comes last: a folder that has it is complete.
            entries = {}
            for name, domain in domains.items():
                if domain.train.documents and domain.val.documents:
                    entries[name] = {"dtype": dtype, "train": domain.train.publish(), "val": domain.val.publish()}
                else:
                    print(f"note: {name}: left out; a domain requires two distinct documents, to train and to validate")
            if not entries:
                raise UserError(f"--out_dir={out_dir}: no domain has two distinct documents")
            return write_meta(out_dir, tokenizer, entries, made_by)
        finally:
            complete = (out_dir / "meta.json").exists()
            for path in own_files(out_dir, tokenizer):
                if path.suffix == ".tmp" or not complete:
                    path.unlink()


def own_files(folder: Path, tokenizer: Tokenizer) -> list[Path]:
    """What there is in a folder by the names that a build would use; not the tokenizer's files where they lie."""
    patterns = [path.name for path in tokenizer.files if path.parent.resolve() != folder.resolve()]
    patterns += ["*.train.bin", "*.train.bin.tmp", "*.val.bin", "*.val.bin.tmp", "meta.json", "meta.json.tmp"]
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def write_meta(folder: Path, tokenizer: Tokenizer, domains: dict[str, dict], made_by: dict | None = None) -> dict:
    """Copy the tokenizer's files to `folder`, write meta.json there, and return its content.

    `domains`: name → {"dtype": "uint16" or "uint32", "train": side, "val": side}, each side {"file", "tokens",
    "sha256"}. nanoGPT's train.bin and val.bin can be such a domain."""
    entry = {key: getattr(tokenizer, key) for key in TOKENIZER_KEYS}
    entry["files"] = [path.name for path in tokenizer.files]
    meta = {"format_version": FORMAT_VERSION, "tokenizer": entry, "domains": domains, "made_by": made_by}
    with user_errors(folder / "meta.json", "make room there, and build again"):
        for path in tokenizer.files:
            with suppress(shutil.SameFileError):
                shutil.copyfile(path, folder / path.name)
        fsync(folder)
        write_text(folder / "meta.json", json.dumps(meta, indent=1))
    return meta


# ------------ The quickstart's text -----------------------------------------------------------------------------------

def without_licence(text: str) -> str:
    """Source code without the comments at its start, if they are about its licence."""
    head = re.match(r"(\s*(#[^\n]*\n|//[^\n]*\n|/\*.*?\*/))+", text, re.DOTALL)
    if head and re.search("copyright|licen[cs]e", head[0], re.IGNORECASE):
        return text[head.end():]
    return text


def docstrings(text: str) -> Iterator[str]:
    """Python source as a document per docstring."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


# Where a domain's text is: files below the folder of a module that comes with Python, torch, or what torch requires.
# `left_out` is a regular expression of paths, `extract` makes documents of a file's text: of Python source one per
# class or function, about. Validation has few windows: documents up to `longest` characters make them many texts.
# The domain math is sympy's formulas and worked examples, and prose is documentation.
QUICKSTART = {
    "python": {"module": "argparse", "suffix": ".py", "longest": 20_000,
               "extract": lambda text: text.split("\n\n\n"),
               "left_out": r"(^|/)(site-packages|tests?|idlelib|encodings|pydoc_data)/"},
    "cpp": {"module": "torch", "suffix": ".h", "extract": lambda text: [text], "longest": 6_000,
            "left_out": r"^(?!include/)|ATen/(ops|[^/]*$)|google/|sleef"},
    "math": {"module": "sympy", "suffix": ".py", "extract": docstrings, "longest": 4_000,
             "left_out": r"tests/|parsing/"},
    "prose": {"module": "numpy", "suffix": ".py", "extract": docstrings, "longest": 3_000,
              "left_out": r"tests/|_pyinstaller/"},
}
# Unequal domains, as in a real corpus: most of the text is Python.
QUICKSTART_BYTES = {"python": 7_000_000, "cpp": 800_000, "math": 800_000, "prose": 600_000}


def quickstart_files(name: str) -> Iterator[list[str]]:
    """The files of a domain, each as its documents."""
    if name == "prose":
        for topic in pydoc_data.topics.topics.values():
            yield topic.split("\n\n\n")
    source = QUICKSTART[name]
    folder = Path(importlib.util.find_spec(source["module"]).origin).parent
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*" + source["suffix"])]
    # By the hashes of their names, so that the first few megabytes are a sample of all files.
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest()):
        if not re.search(source["left_out"], path):
            text = (folder / path).read_bytes().decode("utf-8-sig", errors="replace")
            yield source["extract"](without_licence(text))


def quickstart_documents(n_bytes: dict[str, int], files_of: Callable = quickstart_files) -> Iterator[tuple[str, str]]:
    """The quickstart's text as a stream of (domain, text), of each domain about as many bytes as `n_bytes` says."""
    for name, limit in n_bytes.items():
        taken = 0
        for text in chain.from_iterable(files_of(name)):
            if taken >= limit:
                break
            # Tables of characters or of constants are mostly digits and signs.
            letters = sum(map(str.isalpha, text))
            if 200 < len(text) <= QUICKSTART[name]["longest"] and letters > 0.4 * len(text):
                taken += len(text.encode())
                yield name, text


def build_quickstart_bins(folder: Path):
    """The quickstart's bins, unless they are there."""
    if not (folder / "meta.json").is_file():
        print(f"Collecting text into {folder} …", flush=True)
        build_bins(folder, load_tokenizer("bytes"), quickstart_documents(QUICKSTART_BYTES), val_fraction=0.1)


# ------------ The program ---------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Text to per-domain token bins.", allow_abbrev=False)
    add = parser.add_argument
    add("sources", nargs="*", metavar="NAME=GLOB", help="a domain and its files, or a folder of them; with "
        "--domain_key also a GLOB alone, of records that say their domain")
    add("--out_dir", default="", type=os.path.expanduser, help="folder to write the bins to")
    add("--tokenizer", default="bytes", type=os.path.expanduser, help="bytes, a tiktoken encoding, a folder or file "
        "with a tokenizer.json, or a model's name on the Hugging Face Hub (default: %(default)s)")
    add("--eot", default="", help="token that ends a document; empty: the tokenizer's own")
    add("--text_key", default="text", help="where the text is in a record (default: %(default)s)")
    add("--domain_key", default="", help="where the domain is in a record, such as meta.source; empty: from NAME=GLOB")
    add("--val_fraction", type=float, default=0.05, help="maximum share of a domain's bytes for validation "
        "(default: %(default)s)")
    add("--val_bytes", type=int, default=32_000_000, help="maximum of them (default: %(default)s)")
    add("--verify", default="", type=os.path.expanduser, metavar="DIR", help="only hash the bins of this folder again")
    arguments = parser.parse_intermixed_args()
    if bool(arguments.verify) == bool(arguments.sources) or arguments.sources and not arguments.out_dir:
        parser.error("requires --out_dir=DIR and NAME=GLOB for each domain, or --verify=DIR alone")
    if arguments.verify:
        verify(arguments.verify)
        return

    # Find all files and the tokenizer before the first document is read.
    left_out = defaultdict(Counter)  # name → reason → number
    files = expand_sources(arguments.sources, bool(arguments.domain_key), left_out)
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eot)
    check_characters(tokenizer)
    for key, value in vars(arguments).items():
        print(f"{key} = {value}")
    print(f"each document ends with {tokenizer.eot_token}, id {tokenizer.eot}", flush=True)

    # Build the bins. After an error too, say what was left out: it may be the reason.
    documents = read_documents(files, arguments.text_key, arguments.domain_key, left_out)
    try:
        meta = build_bins(arguments.out_dir, tokenizer, note_changes(documents, tokenizer), made_by=vars(arguments),
                          val_fraction=arguments.val_fraction, val_bytes=arguments.val_bytes)
    finally:
        for name, reasons in left_out.items():
            for reason, count in reasons.items():
                print(f"note: {name or 'records'}: {count:,} {reason}")

    # Show what was built, and where it is little.
    rows = [["domain", "documents", "MB of text", "train tokens", "val tokens"]]
    for name, domain in meta["domains"].items():
        train = domain["train"]
        val = domain["val"]
        documents = train["documents"] + val["documents"]
        megabytes = (train["bytes"] + val["bytes"]) / 1e6
        rows.append([name, f"{documents:,}", f"{megabytes:,.1f}", f"{train['tokens']:,}", f"{val['tokens']:,}"])
        if val["documents"] < 20 or val["tokens"] < 20_000:
            print(f"WARNING: {name} has only {val['documents']} documents, {val['tokens']:,} tokens, for validation, "
                  "and r follows these; give it more text, or raise --val_fraction")
    print_table(rows)
    print(f"wrote {arguments.out_dir}")


if __name__ == "__main__":
    run_program(main)
