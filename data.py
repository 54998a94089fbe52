"""Text to per-domain token bins, and bins to windows.

    python data.py --out_dir=data/mine --tokenizer=bytes code='src/**/*.py' books=books/ web=web.jsonl.gz
    python data.py --verify=data/mine

A bins folder holds, for each domain, `NAME.train.bin` (or several `NAME.train.000.bin`) and `NAME.val.bin`: headerless
little-endian token ids, uint16 where every id fits, else uint32. Each document ends with the end-of-text id.
`meta.json` beside them says with which tokenizer they were made, and the size and sha256 of each.

    load_tokenizer      "bytes", a tiktoken name, or a tokenizer.json  →  Tokenizer
    read_documents      files  →  documents
    build_bins          documents  →  bins and meta.json
    TokenBins           bins  →  windows of block_size + 1 tokens
    quickstart_domains  text that is on every machine that can run this

This is also the bottom of the four files' imports, so the command-line handling that they share is here.
"""

import argparse
import ast
import difflib
import glob
import gzip
import hashlib
import heapq
import importlib.util
import io
import json
import os
import pydoc_data.topics
import re
import shutil
import sys
import sysconfig
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Command lines: one dataclass a program
# ---------------------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can mend. Programs print its message without a traceback and exit with status 2."""


def option(default, help: str):
    """A dataclass field that is also a command-line key."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def convert(text: str, kind):
    """The value that `text` stands for as a `kind`: str, int, float, bool, a Literal or one of these | None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if text.lower() == "none" else convert(text, typing.get_args(kind)[0])
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise ValueError(f"must be one of {' '.join(typing.get_args(kind))}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError({int: "must be a whole number", float: "must be a number"}[kind]) from None


def parse_config(cls, argv: list[str] | None = None, make: Callable | None = None):
    """A `cls` from --key=value arguments; words without a dash go to its `sources`, if it has them.

    Of a key given twice the last wins. `make(**given)` builds the object (default: cls) and its `problems()`, if any,
    lists what contradicts what. UserError lists everything wrong at once.
    """
    kinds = {key: kind for key, kind in typing.get_type_hints(cls).items() if key != "sources"}
    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for entry in fields(cls):
        if entry.name in kinds:
            default = entry.default_factory() if entry.default is MISSING else entry.default
            text = f"{entry.metadata['help']} (default: {default!r})".replace("%", "%%")
            kind = kinds[entry.name]
            name = "|".join(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else None
            parser.add_argument(f"--{entry.name}", nargs="?", const=None, default=argparse.SUPPRESS, help=text,
                                metavar=name or getattr(kind, "__name__", str(kind)).upper())
    known, rest = parser.parse_known_args(argv)

    problems, given = [], {}
    for key, text in vars(known).items():
        if text is None:
            problems.append(f"--{key}: no value; write --{key}=VALUE")
            continue
        try:
            given[key] = convert(text, kinds[key])
        except ValueError as error:
            problems.append(f"--{key}={text}: {error}")
    words = [word for word in rest if not word.startswith("-")]
    for word in rest:
        if word.startswith("-"):
            near = difflib.get_close_matches(word.lstrip("-").partition("=")[0], kinds, n=1)
            problems.append(f"{word}: unknown key; " + (f"did you mean --{near[0]}?" if near else "--help lists them"))
    if "sources" in typing.get_type_hints(cls):
        given["sources"] = words
    else:
        problems += [f"{word}: not a key; arguments are written --key=value" for word in words]
    if not problems:
        config = (make or cls)(**given)
        problems = config.problems() if hasattr(config, "problems") else []
    if problems:
        raise UserError("\n".join(problems))
    return config


def run_program(main: Callable):
    """Run `main` as a program: a UserError is one message and status 2, Ctrl-C is status 130; neither a traceback."""
    try:
        main()
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
# What a model's folder may hold besides tokenizer.json; copied along, so that a student's folder has its tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. No special token is added or recognised: what looks like one inside text is text."""

    name: str
    vocab_size: int  # largest id + 1, added tokens included
    eot: int  # the id that ends each document
    eot_token: str
    fingerprint: str  # sha256 over all that decides the encoding; equal for equal tokenizers, however serialised
    encode_batch: Callable[[list[str]], list[np.ndarray]]  # on all cores, where the library does that
    decode: Callable[[list[int]], str]
    files: tuple[Path, ...] = ()


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_tokenizer(source: str | Path, eot: str = "") -> Tokenizer:
    """The tokenizer called `source`: "bytes", a tiktoken encoding, or a tokenizer.json or the folder that holds one.

    `eot` names the token that ends a document where the tokenizer's own (`eos_token` of tokenizer_config.json) is
    absent or not meant. UserError if there is no such tokenizer or token, or it would have to be downloaded.
    """
    path = Path(source)
    if path.is_dir() or path.suffix == ".json":
        return _huggingface_tokenizer(path if path.is_file() else path / "tokenizer.json", eot)
    import tiktoken

    if source == "bytes":
        # No merges: a piece is as many tokens as it has bytes. Short pieces only spare tiktoken a quadratic search.
        encoding = tiktoken.Encoding("bytes", pat_str=r"(?s).{1,64}", special_tokens={END_OF_TEXT: 256},
                                     mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    elif source in tiktoken.list_encoding_names():
        try:
            encoding = tiktoken.get_encoding(source)
        except OSError as error:
            raise UserError(f"tokenizer={source}: tiktoken downloads this encoding at first use, and could not "
                            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it, or take "
                            "bytes or a tokenizer.json") from None
    else:
        raise UserError(f"tokenizer={source}: neither bytes, nor a folder or file with a tokenizer.json, nor one of "
                        f"tiktoken's {' '.join(tiktoken.list_encoding_names())}")
    special, eot = encoding._special_tokens, eot or END_OF_TEXT
    if eot not in special:
        raise UserError(f"eot={eot}: {source} has no such token; its special tokens are {' '.join(special)}")
    ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    return Tokenizer(
        name=str(source), vocab_size=encoding.max_token_value + 1, eot=special[eot], eot_token=eot,
        fingerprint=digest(ranks, encoding._pat_str, special),
        encode_batch=lambda texts: [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts],
        decode=encoding.decode)


def _huggingface_tokenizer(path: Path, eot: str) -> Tokenizer:
    """A tokenizer.json, read by `tokenizers` alone."""
    if not path.is_file():
        raise UserError(f"tokenizer={path}: no such file; a tokenizer.json is needed (transformers writes one with "
                        "AutoTokenizer.from_pretrained(…).save_pretrained(…))")
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"tokenizer={path}: reading it needs the package tokenizers: pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer={path}: not a readable tokenizer.json: {error}") from None
    tokenizer.encode_special_tokens = True  # as plain text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = json.loads(tokenizer.to_str())
    config_path = path.with_name("tokenizer_config.json")
    if not eot and config_path.is_file():
        eos = json.loads(config_path.read_text(encoding="utf-8")).get("eos_token") or ""
        eot = eos if isinstance(eos, str) else eos["content"]
    if not eot or tokenizer.token_to_id(eot) is None:
        raise UserError(f"eot={eot!r}: {path.parent} names no such end-of-text token; give it as --eot=TOKEN")
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    model = settings["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.pop("merges", None) or []]
    added = sorted((token["id"], token["content"], token["special"], token["lstrip"], token["rstrip"],
                    token["single_word"], token["normalized"]) for token in settings["added_tokens"])
    return Tokenizer(
        name=path.parent.name, vocab_size=max(vocab.values()) + 1, eot=tokenizer.token_to_id(eot), eot_token=eot,
        fingerprint=digest(model, merges, added, settings["normalizer"], settings["pre_tokenizer"]),
        encode_batch=lambda texts: [np.array(encoding.ids, dtype=np.uint32) for encoding in
                                    tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        files=tuple(path.with_name(name) for name in TOKENIZER_FILES if path.with_name(name).is_file()))


TOKENIZER_META = "tokenizer_meta.json"  # meta.json's "tokenizer", in a model's folder


def saved_tokenizer(folder: Path, entry: dict) -> Tokenizer:
    """The tokenizer of meta.json's `entry`, from the files in `folder` if it has any, else by name."""
    return load_tokenizer(folder if entry["files"] else entry["name"], entry["eot_token"])


def save_tokenizer(folder: Path, bins: "TokenBins"):
    """Put the bins' tokenizer into a model's folder: its files, byte for byte, and which one it is."""
    for name in bins.meta["tokenizer"]["files"]:
        shutil.copyfile(bins.dir / name, folder / name)
    write_text(folder / TOKENIZER_META, json.dumps(bins.meta["tokenizer"], indent=1))


def model_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model's folder; None if there is none."""
    if (folder / TOKENIZER_META).is_file():
        return saved_tokenizer(folder, json.loads((folder / TOKENIZER_META).read_text(encoding="utf-8")))
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


# ---------------------------------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------------------------------


def expand_sources(sources: list[str]) -> dict[str, list[Path]]:
    """`name=GLOB` words to domain → files, sorted by path. A folder stands for all files below it.

    UserError lists every word that is not of that form and every pattern that matches nothing.
    """
    domains, problems = {}, []
    for word in sources:
        name, equals, pattern = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            problems.append(f"{word}: write NAME=GLOB, with letters, digits, - and _ in NAME")
            continue
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "**")
        files = [Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
        if not files:
            problems.append(f"{word}: no file matches {pattern}")
        domains[name] = sorted(set(domains.get(name, []) + files))
    if problems:
        raise UserError("\n".join(problems))
    return domains


def read_documents(paths: Iterable[Path], text_key: str = "text", skipped: Counter | None = None) -> Iterator[str]:
    """The documents of `paths` in order: a line of .jsonl(.gz|.zst), a row of .parquet, else a whole file.

    `skipped` counts what is left out (empty documents, records without `text_key`, binary files) and what is mended
    (bytes that are not UTF-8 become U+FFFD), by reason. UserError on a line that is not JSON.
    """
    skipped = Counter() if skipped is None else skipped
    for path in paths:
        for text in _read_file(path, text_key, skipped):
            if text is None:
                skipped[f"records without the key {text_key}"] += 1
            elif not text.strip():
                skipped["empty documents"] += 1
            else:
                yield text


def _decode(raw: bytes, skipped: Counter) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        skipped["texts with bytes that are not UTF-8, replaced"] += 1
        return raw.decode("utf-8", "replace")


def _read_file(path: Path, text_key: str, skipped: Counter) -> Iterator[str | None]:
    stem, compression = (path.stem, path.suffix) if path.suffix in (".gz", ".zst") else (path.name, "")
    if stem.endswith(".parquet"):
        for record in _import("pyarrow.parquet", path).ParquetFile(path).iter_batches(columns=[text_key]):
            yield from record.column(0).to_pylist()
    elif stem.endswith(".jsonl"):
        with (gzip.open(path) if compression == ".gz" else
              io.BufferedReader(_import("zstandard", path).open(path)) if compression == ".zst" else
              open(path, "rb")) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(_decode(line, skipped))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error}") from None
                text = record.get(text_key) if isinstance(record, dict) else None
                # A JSON string may hold half a surrogate pair, which UTF-8 cannot.
                yield _decode(text.encode("utf-8", "surrogatepass"), skipped) if isinstance(text, str) else None
    else:
        raw = path.read_bytes()
        if b"\0" in raw[:65536]:
            skipped["binary files"] += 1
        else:
            yield _decode(raw, skipped)


def _import(module: str, path: Path):
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{path}: reading it needs the package {package}: pip install {package}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Documents to bins
# ---------------------------------------------------------------------------------------------------------------------

FORMAT_VERSION = 1


def content_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def validation_split(documents: Iterable[str], val_fraction: float, val_bytes: int) -> bytes:
    """The largest content hash that is validation; a document is validation if its own is no larger.

    Validation is the documents with the smallest hashes, up to `val_fraction` of all bytes and `val_bytes`, and at
    least one on each side. It depends on the set of documents alone, and equal documents fall on one side. Memory
    grows with `val_bytes`, not with the input: of the hashes seen, only the smallest that fill it are kept.
    ValueError with fewer than two distinct documents.
    """
    smallest: dict[bytes, int] = {}  # hash → bytes of all its copies
    heap: list[bytes] = []  # the same hashes, the largest first: each byte inverted
    kept = total = 0
    beyond = False  # whether a distinct document beyond `smallest` was seen
    for text in documents:
        key, size = content_hash(text), len(text.encode())
        total += size
        if key not in smallest:
            heapq.heappush(heap, bytes(255 - byte for byte in key))
        smallest[key] = smallest.get(key, 0) + size
        kept += size
        largest = bytes(255 - byte for byte in heap[0])
        while len(heap) > 1 and kept - smallest[largest] >= val_bytes:
            kept -= smallest.pop(largest)
            heapq.heappop(heap)
            largest, beyond = bytes(255 - byte for byte in heap[0]), True
    in_order = sorted(smallest)
    if len(in_order) + beyond < 2:
        raise ValueError(f"{len(in_order)} distinct documents; one for training and one for validation are needed")
    if not beyond:
        in_order.pop()
    budget = min(val_fraction * total, val_bytes)
    threshold, used = in_order[0], smallest[in_order[0]]
    for key in in_order[1:]:
        used += smallest[key]
        if used > budget:
            break
        threshold = key
    return threshold


class _BinWriter:
    """One bin under a temporary name until `finish`, which makes it durable and names it."""

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype = path, np.dtype(dtype).newbyteorder("<")
        self.file = open(path.with_name(path.name + ".tmp"), "wb")
        self.sha256 = hashlib.sha256()
        self.entry = {"file": path.name, "tokens": 0, "documents": 0, "bytes": 0}

    def append(self, ids: np.ndarray, n_bytes: int):
        raw = ids.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.sha256.update(raw)
        for key, more in (("tokens", len(ids)), ("documents", 1), ("bytes", n_bytes)):
            self.entry[key] += more

    def finish(self) -> dict:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.file.name, self.path)
        return {**self.entry, "sha256": self.sha256.hexdigest()}


def _batches(documents: Iterable[str], n_characters: int = 4_000_000) -> Iterator[list[str]]:
    """Documents in lists large enough to keep all cores busy, small enough not to matter for memory."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= n_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def build_bins(out_dir: str | Path, tokenizer: Tokenizer, domains: dict[str, Callable[[], Iterable[str]]], *,
               val_fraction: float = 0.05, val_bytes: int = 32_000_000, shards: int = 1) -> dict:
    """Write the bins of `domains` and meta.json to `out_dir`; returns the latter.

    `domains` maps each name to a function that starts its documents anew: they are read twice, once to find the
    split and once to encode. Every file is written under a temporary name, and meta.json last.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if (out_dir / "meta.json").exists():
        raise UserError(f"out_dir={out_dir}: holds bins already; name another folder, or delete it first")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta = {"format_version": FORMAT_VERSION,
            "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
                          "eot_token": tokenizer.eot_token, "fingerprint": tokenizer.fingerprint, "files": [path.name for path in tokenizer.files]},
            "domains": {}}
    for name, documents in domains.items():
        try:
            threshold = validation_split(documents(), val_fraction, val_bytes)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"domain {name}: {error}") from None
        suffixes = [f".{shard:03d}" for shard in range(shards)] if shards > 1 else [""]
        train = [_BinWriter(out_dir / f"{name}.train{suffix}.bin", dtype) for suffix in suffixes]
        validation = []  # (hash, ids, bytes): held, at most val_bytes of text, to be written in the hashes' order
        for texts in _batches(documents()):
            for text, ids in zip(texts, tokenizer.encode_batch(texts)):
                key, ids, n_bytes = content_hash(text), np.append(ids, tokenizer.eot), len(text.encode())
                if key <= threshold:
                    validation.append((key, ids, n_bytes))
                else:
                    train[int.from_bytes(key[-8:], "little") % shards].append(ids, n_bytes)
        val = _BinWriter(out_dir / f"{name}.val.bin", dtype)
        for _, ids, n_bytes in sorted(validation, key=lambda document: document[0]):
            val.append(ids, n_bytes)
        meta["domains"][name] = {"dtype": dtype, "train": [writer.finish() for writer in train], "val": val.finish()}
    for path in tokenizer.files:
        shutil.copyfile(path, out_dir / path.name)
    write_text(out_dir / "meta.json", json.dumps(meta, indent=1))
    return meta


def write_text(path: Path, text: str):
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Bins to windows
# ---------------------------------------------------------------------------------------------------------------------


class TokenBins:
    """The bins of a folder, cut into windows of block_size + 1 tokens: inputs, and targets one further on.

    Of n tokens, window i is tokens i·B … i·B + B inclusive, so there are (n − 1)//B, each token is a target once, and
    none crosses a shard. UserError if the folder is not whole or has a domain without one train window.
    """

    def __init__(self, data_dir: str | Path, block_size: int):
        self.dir, self.block_size = Path(data_dir), block_size
        self.meta = read_meta(self.dir)
        self.names = list(self.meta["domains"])
        self.vocab_size = self.meta["tokenizer"]["vocab_size"]
        self.n_windows = {name: int(sum(self._windows(self._train(name)))) for name in self.names}
        for name, n in self.n_windows.items():
            if not n:
                raise UserError(f"block_size={block_size}: domain {name} of {self.dir} has no train window that long")

    def _train(self, name: str) -> list[dict]:
        return self.meta["domains"][name]["train"]

    def _windows(self, entries: list[dict]) -> np.ndarray:
        return np.array([max(entry["tokens"] - 1, 0) // self.block_size for entry in entries])

    def _read(self, name: str, entries: list[dict], window_ids: np.ndarray) -> np.ndarray:
        """Windows of one domain, (n, block_size + 1) int64; numbered through its shards."""
        ends = np.cumsum(self._windows(entries))
        windows = np.empty((len(window_ids), self.block_size + 1), dtype=np.int64)
        shards = np.searchsorted(ends, window_ids, side="right")
        for shard in np.unique(shards):
            entry, rows = entries[shard], np.flatnonzero(shards == shard)
            # Mapped anew at each call: pages that a mapping has touched count as this process's memory until it goes.
            tokens = np.memmap(self.dir / entry["file"], dtype=self._dtype(name), mode="r")
            starts = (window_ids[rows] - (ends[shard] - self._windows([entry])[0])) * self.block_size
            windows[rows] = tokens[starts[:, None] + np.arange(self.block_size + 1)]
        if windows.size and windows.max() >= self.vocab_size:
            raise UserError(f"{self.dir}: domain {name} holds the id {windows.max()}, but the tokenizer of meta.json has "
                            f"{self.vocab_size}; make the bins anew with data.py (python data.py --verify={self.dir} "
                            "tells whether they changed)")
        return windows

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(self.meta["domains"][name]["dtype"]).newbyteorder("<")

    def train_windows(self, domain_ids: np.ndarray, window_ids: np.ndarray) -> np.ndarray:
        """The windows that a MixtureSampler names, in its order: (B, block_size + 1) int64."""
        windows = np.empty((len(domain_ids), self.block_size + 1), dtype=np.int64)
        for domain in np.unique(domain_ids):
            rows = np.flatnonzero(domain_ids == domain)
            name = self.names[domain]
            windows[rows] = self._read(name, self._train(name), window_ids[rows])
        return windows

    def val_windows(self, name: str, count: int) -> np.ndarray:
        """Windows 0 … count−1 of the domain's validation bin, (count, block_size + 1) int64. UserError if fewer."""
        entry = self.meta["domains"][name]["val"]
        available = int(self._windows([entry])[0])
        if available < count:
            raise UserError(f"val_samples={count}: domain {name} of {self.dir} has {available} validation windows of "
                            f"{self.block_size} tokens; take at most that, or a larger val_fraction in data.py")
        return self._read(name, [entry], np.arange(count))

    def content(self) -> str:
        """Identity of the tokens, whatever the folder: from the sha256 of each bin and the tokenizer."""
        return digest(self.meta["domains"], self.meta["tokenizer"]["fingerprint"])


def read_meta(data_dir: Path) -> dict:
    """meta.json of a bins folder, checked against the files there. UserError names what is wrong."""
    path = data_dir / "meta.json"
    if not path.is_file():
        raise UserError(f"data_dir={data_dir}: no meta.json there; make the bins with python data.py "
                        f"--out_dir={data_dir} NAME=GLOB …")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version}, but this program reads {FORMAT_VERSION}; "
                            "make the bins anew with data.py")
        for name, domain in meta["domains"].items():
            for entry in [*domain["train"], domain["val"]]:
                bin_path, expected = data_dir / entry["file"], entry["tokens"] * np.dtype(domain["dtype"]).itemsize
                if Path(entry["file"]).name != entry["file"] or not bin_path.is_file():
                    raise UserError(f"{bin_path}: named in meta.json for domain {name}, but missing; copy it there or "
                                    "make the bins anew with data.py")
                if bin_path.stat().st_size != expected:
                    raise UserError(f"{bin_path}: {bin_path.stat().st_size} bytes, but meta.json says {expected}; "
                                    "copy it again or make the bins anew with data.py")
        meta["tokenizer"]["vocab_size"], meta["tokenizer"]["fingerprint"]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a meta.json of data.py ({type(error).__name__}: {error}); make the bins anew"
                        ) from None
    return meta


def verify(data_dir: Path):
    """Re-hash every bin. UserError lists those that changed since data.py wrote them."""
    changed = []
    for name, domain in read_meta(data_dir)["domains"].items():
        for entry in [*domain["train"], domain["val"]]:
            same = file_sha256(data_dir / entry["file"]) == entry["sha256"]
            print(f"{entry['file']:32} {'ok' if same else 'CHANGED'}")
            changed += [] if same else [entry["file"]]
    if changed:
        raise UserError(f"{data_dir}: {', '.join(changed)} differ from meta.json; copy them again or make them anew")


# ---------------------------------------------------------------------------------------------------------------------
# Text that is on every machine that can run this
# ---------------------------------------------------------------------------------------------------------------------

def quickstart_domains(n_bytes: dict[str, int]) -> dict[str, Callable[[], Iterable[str]]]:
    """Four domains of text that Python, torch and its dependencies bring along, of about `n_bytes` each at most.

    python: the standard library's source; cpp: torch's C++ headers; math: sympy's docstrings, where formulas and
    worked examples are; prose: Python's reference topics and numpy's docstrings.
    """
    def package(name: str) -> Path:
        return Path(importlib.util.find_spec(name).submodule_search_locations[0])

    def files(root: Path, suffix: str, leave_out: str) -> list[Path]:
        found = [path for path in root.rglob(f"*{suffix}") if not re.search(leave_out, path.relative_to(root).as_posix())]
        # In the order of their names' hashes, so that the first few megabytes are a sample of all.
        return sorted(found, key=lambda path: content_hash(path.relative_to(root).as_posix()))

    def sources(paths: list[Path]) -> Iterator[str]:
        for text in read_documents(paths):
            yield without_licence(text)

    def docstrings(paths: list[Path]) -> Iterator[str]:
        for text in read_documents(paths):
            nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
            yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))

    def prose() -> Iterator[str]:
        yield from pydoc_data.topics.topics.values()
        yield from docstrings(files(package("numpy"), ".py", r"tests/|_pyinstaller/"))

    def first(documents: Iterable[str], n_bytes: int) -> Iterator[str]:
        for text in documents:
            # Tables (of characters, of hexadecimal constants) are mostly digits and signs: they teach nothing.
            if len(text) > 200 and sum(map(str.isalpha, text)) > 0.4 * len(text):
                yield text
                n_bytes -= len(text.encode())
                if n_bytes <= 0:
                    return

    everything = {
        "python": lambda: sources(files(Path(sysconfig.get_path("stdlib")), ".py",
                                        r"(^|/)(site-packages|tests?|idlelib|encodings|pydoc_data)/")),
        "cpp": lambda: sources(files(package("torch") / "include", ".h", r"ATen/(ops|[^/]*$)|google/|sleef")),
        "math": lambda: docstrings(files(package("sympy"), ".py", r"tests/|parsing/")),
        "prose": prose,
    }
    return {name: lambda name=name: first(everything[name](), n_bytes[name]) for name in n_bytes}


def without_licence(text: str) -> str:
    """`text` without its leading comments if those speak of copyright."""
    head = re.match(r"(\s*(#[^\n]*\n|//[^\n]*\n|/\*.*?\*/))+", text, re.DOTALL)
    return text[head.end():].lstrip("\n") if head and re.search("copyright|licen[cs]e", head[0], re.I) else text


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    """Keys of `python data.py`; the words without a dash are its sources, NAME=GLOB."""

    out_dir: str = option("", "folder to write the bins to")
    tokenizer: str = option("bytes", "bytes, a tiktoken encoding, or a folder or file with a tokenizer.json")
    eot: str = option("", "the token that ends a document, if not the tokenizer's own")
    text_key: str = option("text", "where the text is in a record of .jsonl and .parquet")
    val_fraction: float = option(0.05, "share of a domain's bytes for validation")
    val_bytes: int = option(32_000_000, "validation bytes a domain at most")
    shards: int = option(1, "train bins a domain")
    verify: str = option("", "re-hash the bins of this folder, and nothing else")
    sources: list = option([], "NAME=GLOB …")

    def problems(self) -> list[str]:
        if self.verify:
            return []
        return [message for wrong, message in (
            (not self.out_dir, "--out_dir: name the folder to write to"),
            (not self.sources, "no sources; write NAME=GLOB for each domain"),
            (not 0 < self.val_fraction < 1, f"--val_fraction={self.val_fraction}: must be above 0 and below 1"),
            (self.val_bytes < 1, f"--val_bytes={self.val_bytes}: must be at least 1"),
            (not 1 <= self.shards <= 1000, f"--shards={self.shards}: must be from 1 to 1000"),
        ) if wrong]


def main():
    config = parse_config(DataConfig)
    if config.verify:
        verify(Path(config.verify))
        return
    domains = expand_sources(config.sources)
    tokenizer = load_tokenizer(config.tokenizer, config.eot)
    skipped = Counter()

    def documents(files: list[Path]) -> Callable[[], Iterable[str]]:
        passes = iter([Counter(), skipped])  # read twice, to be counted once
        return lambda: read_documents(files, config.text_key, next(passes))

    meta = build_bins(config.out_dir, tokenizer, {name: documents(files) for name, files in domains.items()},
                      val_fraction=config.val_fraction, val_bytes=config.val_bytes, shards=config.shards)
    print(f"{'domain':16}{'documents':>12}{'MB':>10}{'train tokens':>16}{'val tokens':>14}")
    for name, domain in meta["domains"].items():
        entries = [*domain["train"], domain["val"]]
        total = {key: sum(entry[key] for entry in entries) for key in ("documents", "bytes", "tokens")}
        print(f"{name:16}{total['documents']:12,}{total['bytes'] / 1e6:10.1f}"
              f"{total['tokens'] - domain['val']['tokens']:16,}{domain['val']['tokens']:14,}")
    for reason, count in skipped.items():
        print(f"note: {count} {reason}", file=sys.stderr)
    print(f"wrote {config.out_dir}")


if __name__ == "__main__":
    run_program(main)
