"""Text to per-domain token bins, and bins to windows.

    python data.py --out_dir=data/mine --tokenizer=bytes 'code=src/**/*.py' books=books/ web=web.jsonl.gz
    python data.py --verify=data/mine

A bins folder holds for each domain `NAME.train.bin` (or NAME.train.000.bin, …) and `NAME.val.bin`: headerless
little-endian ids, uint16 where every id fits, else uint32, each document ended by the end-of-text id. `meta.json` says
which tokenizer made them, and the size and sha256 of each. What the four programs share stands here too.
"""

import argparse
import ast
import difflib
import functools
import glob
import gzip
import hashlib
import heapq
import importlib.util
import itertools
import json
import math
import os
import pydoc_data.topics
import re
import shutil
import sys
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import tiktoken


# ------------ What the four programs share ----------------------------------------------------------------------------

class UserError(ValueError):
    """Something the user can mend: programs print its message without a traceback and exit with status 2."""


@contextmanager
def blame(source: str | Path, mend: str):
    """Whatever fails within becomes a UserError that names `source`, why it failed, and how to `mend` it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
    except Exception as error:  # each format's library has its own kinds
        raise UserError(f"{source}: {type(error).__name__}: {error}; {mend}") from None


def attempt(problems: list[str], make: Callable, *arguments):
    """What `make(*arguments)` returns. If it fails, None, and `problems` gets its UserError: to tell all at once."""
    try:
        return make(*arguments)
    except UserError as error:
        problems.append(str(error))


def digest(*parts) -> str:
    """sha256 of JSON-able `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def import_optional(module: str, wanted_by: str):
    """A package that only some formats need. UserError says how to get it."""
    with blame(wanted_by, f"pip install {module.partition('.')[0]}"):
        return importlib.import_module(module)


def fsync(path: Path):
    """Make a file's content, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path: Path, text: str):
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)


def file_sha256(path: Path) -> str | None:
    """None if there is no such file."""
    if not path.is_file():
        return None
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


# ------------ The command line ----------------------------------------------------------------------------------------

def option(default, help: str, least: float = -math.inf, most: float = math.inf):
    """A dataclass field that is a command-line key; a number must be finite and from `least` to `most`."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


def convert(text: str | None, kind):
    """`text` as a `kind`: str, int, float, bool, a Literal, or one of them | None. ValueError says what it must be."""
    if text is None:
        raise ValueError("needs a value")
    if kind is bool:
        return convert(text.lower(), typing.Literal["true", "false"]) == "true"
    allowed = typing.get_args(kind)
    if type(None) in allowed:
        return None if text.lower() == "none" else convert(text, allowed[0])
    if allowed and text not in allowed:
        raise ValueError(f"must be one of {' '.join(word or repr(word) for word in allowed)}")
    try:
        return text if allowed else kind(text)
    except ValueError:
        raise ValueError("must be a whole number" if kind is int else "must be a number") from None


def parse_config(cls, argv: list[str] | None = None, make: Callable | None = None):
    """A `cls` from --key=value arguments, of which the last wins, and from words for its field `sources` if it has one.

    `make(**given)` builds it (default: cls); its `problems()`, if any, lists what contradicts what. UserError lists
    everything that is wrong at once."""
    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds, given, problems = typing.get_type_hints(cls), {}, []
    options, bare = [entry for entry in fields(cls) if entry.metadata], (make or cls)()
    for entry in options:
        default, alone = repr(entry.default), repr(getattr(bare, entry.name))
        default += f"; with no arguments {alone}" * (alone != default)
        kind = kinds[entry.name]
        words = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ["VALUE"]
        parser.add_argument(f"--{entry.name}", nargs="?", const="true" if kind is bool else None,
                            default=argparse.SUPPRESS, metavar="|".join(filter(None, words)),
                            help=f"{entry.metadata['help']} (default: {default})".replace("%", "%%"))
    if "sources" in kinds:
        parser.add_argument("sources", nargs="*", metavar="NAME=GLOB")
    known, unknown = parser.parse_known_intermixed_args(argv)
    for key, text in vars(known).items():
        try:
            given[key] = text if key == "sources" else convert(text, kinds[key])
        except ValueError as error:
            problems.append(f"--{key}{'' if text is None else '='}{text or ''}: {error}")
    for word in unknown:
        near = difflib.get_close_matches(word.lstrip("-").partition("=")[0], [entry.name for entry in options], n=1)
        problems.append(f"{word}: {'unknown' if word.startswith('-') else 'not a'} key; " + (
            f"did you mean --{near[0]}=…?" if near else "write --key=value; --help lists the keys"))
    config = (make or cls)(**given)
    for entry in options:
        value, least, most = getattr(config, entry.name), entry.metadata["least"], entry.metadata["most"]
        if isinstance(value, int | float) and not (least <= value <= most and math.isfinite(value)):
            problems.append(f"--{entry.name}={value}: must be " + (
                f"from {least} to {most}" if most < math.inf else f"a finite number, {least} or more"))
    problems += config.problems() if hasattr(config, "problems") else []
    if problems:
        if os.environ.get("RANK", "0") != "0":  # rank 0 mostly says the same, and torchrun then ends this process
            time.sleep(1)
        raise UserError("\n".join(problems))
    return config


def print_config(config):
    print("\n".join(f"{entry.name} = {getattr(config, entry.name)}" for entry in fields(config)), flush=True)


def run_program(main: Callable):
    """Run `main` as a program: a UserError is one message and status 2, Ctrl-C status 130; neither a traceback."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as head, has had enough
        os._exit(128 + 13)  # as SIGPIPE ends a program: a run cut short is no success
    except (UserError, OSError) as error:
        prefix = f"rank {os.environ['RANK']}: error" if os.environ.get("RANK", "0") != "0" else "error"
        print("\n".join(f"{prefix}: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ------------ Tokenizers ----------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_META = "tokenizer_meta.json"  # the entry `tokenizer` of meta.json, in a model's folder
# What a folder may hold of a tokenizer; copied along, so that a student's folder has the tokenizer of its bins.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. No special token is added or recognised: what looks like one inside text is text."""
    name: str
    vocab_size: int  # largest id + 1, added tokens included
    eot: int  # ends each document
    eot_token: str
    fingerprint: str  # over all that decides the encoding: equal for equal tokenizers, however serialised
    encode_batch: Callable[[list[str]], list[np.ndarray]]
    decode: Callable[[list[int]], str]
    files: tuple[Path, ...] = ()


def bytes_settings() -> dict:
    """The bytes tokenizer as a tokenizer.json: GPT-2's alphabet of printable characters for bytes, and no merges."""
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    unused = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    return {
        "version": "1.0", "normalizer": None, "pre_tokenizer": level, "decoder": level,
        "added_tokens": [{"id": 256, "content": END_OF_TEXT, "special": True, **flags}],
        "model": {"type": "BPE", **unused, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {chr(byte if byte in printable else next(others)): byte for byte in range(256)},
                  "merges": []}}


def settings_digest(settings: dict) -> str:
    """Of all in a tokenizer.json that decides the encoding, however it was serialised."""
    model = {**settings["model"]}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.pop("merges", None) or []]
    return digest(model, merges, settings["added_tokens"], settings["normalizer"], settings["pre_tokenizer"])


def load_tokenizer(source: str | Path, eot: str = "") -> Tokenizer:
    """The tokenizer called `source`: "bytes", a tiktoken encoding, or a tokenizer.json or the folder that holds one.

    `eot` is the token that ends a document, if not the tokenizer's own (`eos_token` in tokenizer_config.json).
    UserError if there is no such tokenizer or token, or it would have to be downloaded and cannot."""
    path, names = Path(source), tiktoken.list_encoding_names()
    if source not in ("bytes", *names) and (path.is_dir() or path.name == "tokenizer.json"):
        return _huggingface_tokenizer(path / "tokenizer.json" if path.is_dir() else path, eot)
    if source == "bytes":  # no merges: a piece is as many tokens as bytes, and short pieces are quick to search
        encoding = tiktoken.Encoding("bytes", pat_str=r"(?s).{1,64}", special_tokens={END_OF_TEXT: 256},
                                     mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    elif source in names:
        with blame(f"--tokenizer={source}", "tiktoken downloads it; set TIKTOKEN_CACHE_DIR to a folder that has it"):
            encoding = tiktoken.get_encoding(source)
    else:
        raise UserError(f"--tokenizer={source}: neither bytes, nor a folder or file with a tokenizer.json, nor one of "
                        f"tiktoken's {' '.join(names)}")
    special, eot = encoding._special_tokens, eot or END_OF_TEXT
    if eot not in special:
        raise UserError(f"--eot={eot}: not a special token of {source}, which has {' '.join(special)}")
    ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    fingerprint = settings_digest(bytes_settings()) if source == "bytes" else digest(ranks, encoding._pat_str, special)
    encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())
    known = {*encoding._mergeable_ranks.values(), *special.values()}  # cl100k_base leaves ids out
    pool = ThreadPoolExecutor(os.cpu_count())  # tiktoken lets go of Python's lock while it encodes
    return Tokenizer(name=str(source), vocab_size=encoding.max_token_value + 1, eot=special[eot], eot_token=eot,
                     fingerprint=fingerprint, decode=lambda ids: encoding.decode([i for i in ids if i in known]),
                     encode_batch=lambda texts: list(pool.map(encode, texts)))


def _huggingface_tokenizer(path: Path, eot: str) -> Tokenizer:
    tokenizers, config = import_optional("tokenizers", f"--tokenizer={path}"), path.with_name("tokenizer_config.json")
    with blame(f"--tokenizer={path}", "transformers' save_pretrained writes it and tokenizer_config.json"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
        eot = eot or (eos["content"] if isinstance(eos, dict) else eos) or ""
    tokenizer.encode_special_tokens = True  # … as plain text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.token_to_id(eot) is None:
        raise UserError(f"--eot={eot}: no token of {path.parent} that could end a text; data.py and model.py take "
                        "another as --eot=TOKEN")
    return Tokenizer(
        name=path.parent.name, vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eot=tokenizer.token_to_id(eot), eot_token=eot,
        fingerprint=settings_digest(json.loads(tokenizer.to_str())),
        encode_batch=lambda texts: [np.array(encoding.ids, dtype=np.uint32) for encoding in
                                    tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        files=tuple(path.with_name(name) for name in TOKENIZER_FILES if path.with_name(name).is_file()))


def saved_tokenizer(folder: Path, entry: dict) -> Tokenizer:
    """The tokenizer of an entry of meta.json: from its files in `folder` if it has any, else by its name. UserError if
    it is another one now."""
    tokenizer = load_tokenizer(folder if entry["files"] else entry["name"], entry["eot_token"])
    if tokenizer.fingerprint != entry["fingerprint"]:
        mend = "copy it again" if entry["files"] else "install the version that was used then, or make it anew"
        raise UserError(f"{folder}: the tokenizer {entry['name']} is not the one that it was made with; {mend}")
    return tokenizer


def save_tokenizer(folder: Path, bins: "TokenBins"):
    """Put the bins' tokenizer into a model's folder: its files byte for byte, which one it is, and how a text ends."""
    entry = bins.tokenizer
    for name in entry["files"]:
        shutil.copyfile(bins.dir / name, folder / name)
    if entry["name"] == "bytes" and not entry["files"]:  # so that transformers' AutoTokenizer opens the folder too
        write_text(folder / "tokenizer.json", json.dumps(bytes_settings()))
        write_text(folder / "tokenizer_config.json", json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": entry["eot_token"],
            "clean_up_tokenization_spaces": False}))
    ends = dict.fromkeys(("eos_token_id", "pad_token_id"), entry["eot"])
    write_text(folder / "generation_config.json", json.dumps(ends))
    write_text(folder / TOKENIZER_META, json.dumps(entry, indent=1))


def model_tokenizer(folder: Path, eot: str = "") -> Tokenizer | None:
    """The tokenizer of a model's folder; None if there is none. `eot` as in load_tokenizer."""
    if (path := folder / TOKENIZER_META).is_file():
        with blame(path, "copy it again from where a run wrote it"):
            entry = json.loads(path.read_text(encoding="utf-8"))
            return saved_tokenizer(folder, {**entry, "eot_token": eot or entry["eot_token"]})
    return load_tokenizer(folder, eot) if (folder / "tokenizer.json").is_file() else None


# ------------ Documents -----------------------------------------------------------------------------------------------

PIECE = 8_000_000  # characters of a text file that become one document, about


def expand_sources(sources: list[str]) -> dict[str, list[Path]]:
    """NAME=GLOB words → domain → files, sorted; a folder stands for all below it but what a dot hides."""
    domains, problems = {}, []
    for word in sources:
        name, _, pattern = word.partition("=")
        pattern = os.path.join(glob.escape(pattern), "**") if os.path.isdir(pattern) else pattern
        files = {Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)}
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or not pattern:
            problems.append(f"{word}: write NAME=GLOB, with letters, digits, - and _ in NAME")
        elif not files:
            problems.append(f"{word}: no file matches {pattern}")
        domains[name] = sorted(files.union(domains.get(name, [])))
    if problems:
        raise UserError("\n".join(problems))
    return domains


def read_documents(paths: Iterable[Path], text_key: str, left_out: Counter) -> Iterator[str]:
    """The documents of `paths` in order: lines of JSON in .jsonl and .json(l).gz|zst, rows of .parquet, else the whole
    file (in pieces of 8 million characters, so that memory does not grow with it).

    `left_out` counts, by reason, what is not a document or had to be mended. UserError on a line that is not JSON."""
    for text in (text for path in paths for text in _read_file(path, text_key, left_out)):
        if not isinstance(text, str):
            left_out[f"records without a text under the key {text_key}"] += 1
        elif not text.strip():
            left_out["empty documents"] += 1
        else:
            try:
                text.encode()
            except UnicodeEncodeError:  # a byte that files are opened to escape, or half a pair from a JSON string
                left_out["texts with bytes that are not UTF-8, each replaced by U+FFFD"] += 1
                text = re.sub("[\ud800-\udfff]", "\ufffd", text)
            yield text


def _read_file(path: Path, text_key: str, left_out: Counter) -> Iterator[str | None]:
    """Texts as they stand; None for a record without one."""
    how = dict(mode="rt", encoding="utf-8", errors="surrogateescape", newline="\n")
    with blame(path, "copy it again"):
        if path.suffix == ".parquet":
            parquet = import_optional("pyarrow.parquet", str(path)).ParquetFile(path)
            if text_key not in parquet.schema_arrow.names:
                raise UserError(f"{path}: no column {text_key}; --text_key={'|'.join(parquet.schema_arrow.names)}")
            for rows in parquet.iter_batches(columns=[text_key], batch_size=1024):
                yield from rows.column(0).to_pylist()
        elif re.search(r"\.jsonl$|\.jsonl?\.(gz|zst)$", path.name):
            opener = {".jsonl": open, ".gz": gzip.open}.get(path.suffix) or import_optional("zstandard", str(path)).open
            with opener(path, **how) as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        with blame(f"{path}, line {number}", "it must be one JSON record"):
                            record = json.loads(line)
                        yield record.get(text_key) if isinstance(record, dict) else None
        else:
            with open(path, **how) as file:
                pieces = iter(lambda: file.read(PIECE) + file.readline(PIECE), "")  # up to a line's end
                first = next(pieces, "")
                if "\0" in first[:65536]:
                    left_out["binary files"] += 1
                    return
                yield first
                for piece in pieces:
                    left_out[f"more documents than files, since texts are cut at {PIECE:,} characters"] += 1
                    yield piece


# ------------ The split, and bins -------------------------------------------------------------------------------------

FORMAT_VERSION = 1


class Document(typing.NamedTuple):
    key: int  # of its content: equal for equal texts
    start: int  # bytes of the domain before it
    size: int  # bytes
    text: str


def content_hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest()[:16], "big")


def hashed(texts: Iterable[str], doing: str, n_bytes: int = 0) -> Iterator[Document]:
    """The documents of a domain. Prints every five seconds how far it is; with an ETA if their `n_bytes` are known."""
    position, started, said = 0, time.monotonic(), time.monotonic()
    for text in texts:
        raw = text.encode()
        yield Document(content_hash(raw), position, len(raw), text)
        position += len(raw)
        if time.monotonic() - said > 5:
            said = time.monotonic()
            speed = position / (said - started)
            left = f" of {n_bytes / 1e6:,.0f} MB, ETA {(n_bytes - position) / speed:,.0f} s" if n_bytes else " MB"
            print(f"{doing}: {position / 1e6:,.0f}{left}, {speed / 1e6:.1f} MB/s", flush=True)


def validation_split(texts: Iterable[str], val_fraction: float, val_bytes: int,
                     name: str = "") -> tuple[list[Document], int, str]:
    """Validation is the documents with the smallest hashes: up to `val_fraction` of all bytes and `val_bytes`.

    Returns (them in the order of hashes, bytes of all documents, identity of all in their order). Equal documents fall
    on one side, and there is one at least on each (UserError if there are not two). Memory grows with `val_bytes`."""
    heap, kept, total, smallest, largest, content = [], 0, 0, math.inf, -1, hashlib.sha256()
    for document in hashed(texts, f"{name}, choosing validation"):
        content.update(document.key.to_bytes(16, "big"))
        total, kept = total + document.size, kept + document.size
        smallest, largest = min(smallest, document.key), max(largest, document.key)
        heapq.heappush(heap, (-document.key, document))  # the largest hash comes first
        # What is left is more than validation may be. The smallest hash is validation anyway, with all its copies.
        while kept - heap[0][1].size > val_bytes and heap[0][1].key > smallest:
            kept -= heapq.heappop(heap)[1].size
    if smallest >= largest:
        raise UserError(f"domain {name}: at least two distinct documents are needed, for training and validation")
    candidates = sorted(document for _, document in heap)
    sizes = itertools.accumulate(document.size for document in candidates)
    used = dict(zip((document.key for document in candidates), sizes))  # bytes up to a hash, with all its copies
    budget = min(val_fraction * total, val_bytes)
    threshold = max([smallest, *(key for key in used if used[key] <= budget and key < largest)])
    return [document for document in candidates if document.key <= threshold], total, content.hexdigest()


def _write_bin(path: Path, dtype: str, documents: Iterable[Document], tokenizer: Tokenizer) -> dict:
    """Write one bin under a temporary name, make it durable, name it; returns its entry of meta.json."""
    temporary, sha256 = path.with_name(path.name + ".tmp"), hashlib.sha256()
    counts = Counter(tokens=0, documents=0, bytes=0)
    with open(temporary, "wb") as file:
        # About a megabyte at a time keeps all cores busy, and is too little to matter for memory.
        for _, batch in itertools.groupby(documents, lambda document: document.start >> 20):
            batch = list(batch)
            for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch])):
                raw = np.append(ids, tokenizer.eot).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
                file.write(raw)
                sha256.update(raw)
                counts.update(tokens=len(ids) + 1, documents=1, bytes=document.size)
    fsync(temporary)
    os.replace(temporary, path)
    return {"file": path.name, **counts, "sha256": sha256.hexdigest()}


def check_free(out_dir: Path, tokenizer: Tokenizer | None):
    """UserError if bins cannot be made in `out_dir`, since there are some, or the tokenizer itself."""
    if out_dir.is_file():
        raise UserError(f"--out_dir={out_dir}: is a file; name a folder")
    inside = tokenizer and any(path.parent.resolve() == out_dir.resolve() for path in tokenizer.files)
    if inside or (out_dir / "meta.json").exists():
        raise UserError(f"--out_dir={out_dir}: holds bins or the tokenizer already; name another folder")


def build_bins(out_dir: str | Path, tokenizer: Tokenizer, domains: dict[str, Callable[[], Iterable[str]]], *,
               val_fraction: float = 0.05, val_bytes: int = 32_000_000, shards: int = 1,
               made_by: dict | None = None) -> dict:
    """Write the bins of `domains` and, last, meta.json to `out_dir`; returns the latter.

    `domains` maps a name to a function that starts its documents anew: read once for the split, once to encode. Killed
    and started again on the same documents, it keeps the bins that were finished. Shard k holds the documents that
    start in the k-th part of a domain's bytes, so that shards are finished one by one. `made_by`, a configuration, is
    kept in meta.json."""
    out_dir = Path(out_dir)
    check_free(out_dir, tokenizer)
    out_dir.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    entry = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "eot", "eot_token", "fingerprint")}
    meta = {"format_version": FORMAT_VERSION, "tokenizer": {**entry, "files": [path.name for path in tokenizer.files]},
            "domains": {}, "made_by": made_by}
    partial = out_dir / "partial.json"  # plan of a domain → its finished bins
    plans = json.loads(partial.read_text(encoding="utf-8")) if partial.is_file() else {}
    for name, start in domains.items():
        validation, n_bytes, content = validation_split(start(), val_fraction, val_bytes, name)
        threshold = validation[-1].key
        finished = plans.setdefault(digest(name, entry, threshold, content, shards), {})

        def write(file: str, documents: Iterable[Document]) -> dict:
            # A finished bin is made anew if another build wrote over it.
            if file not in finished or file_sha256(out_dir / file) != finished[file]["sha256"]:
                finished[file] = _write_bin(out_dir / file, dtype, documents, tokenizer)
                write_text(partial, json.dumps(plans))
            return finished[file]

        files = [f"{name}.train.{k:03d}.bin" for k in range(shards)] if shards > 1 else [f"{name}.train.bin"]
        train = (document for document in hashed(start(), name, n_bytes) if document.key > threshold)
        written = {k: write(files[k], documents) for k, documents in itertools.groupby(
            train, lambda document: min(shards - 1, document.start * shards // n_bytes))}
        meta["domains"][name] = {
            "dtype": dtype, "train": [written.get(k) or write(file, []) for k, file in enumerate(files)],
            "val": write(f"{name}.val.bin", hashed((document.text for document in validation), name))}
    for path in tokenizer.files:
        shutil.copyfile(path, out_dir / path.name)
    write_text(out_dir / "meta.json", json.dumps(meta, indent=1))
    partial.unlink()
    return meta


# ------------ Windows -------------------------------------------------------------------------------------------------

def read_meta(data_dir: Path, key: str = "--data_dir") -> dict:
    """meta.json of a bins folder, checked against the files beside it. `key`: what a UserError calls the folder by."""
    path = data_dir / "meta.json"
    if not path.is_file():
        raise UserError(f"{key}={data_dir}: no meta.json there; make bins with data.py --out_dir={data_dir}")
    with blame(path, "copy the folder again, or delete meta.json and make the bins anew"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {meta['format_version']}, but {FORMAT_VERSION} is known")
        if not {"name", "eot_token", "fingerprint"} <= set(meta["tokenizer"]) or meta["tokenizer"]["vocab_size"] < 1:
            raise ValueError("entries of the tokenizer are missing")
        if not meta["domains"] or {domain["dtype"] for domain in meta["domains"].values()} - {"uint16", "uint32"}:
            raise ValueError("no domains, or a dtype other than uint16 and uint32")
        sizes = dict.fromkeys(meta["tokenizer"]["files"])
        for domain in meta["domains"].values():
            for entry in [*domain["train"], domain["val"]]:
                sizes[entry["file"]], _ = entry["tokens"] * np.dtype(domain["dtype"]).itemsize, entry["sha256"]
        for name, size in sizes.items():
            file = data_dir / name
            if file.parent != data_dir or not file.is_file() or size not in (None, file.stat().st_size):
                raise ValueError(f"{file} is not in the folder, or not of {size} bytes")
    return meta


class TokenBins:
    """The bins of a folder, cut into windows of block_size + 1 tokens: inputs, and targets one further on.

    Of n tokens, window i is tokens i·B … i·B + B inclusive: there are (n − 1)//B, and none crosses a shard. `names`:
    only these domains, which a UserError says to be from `key`. UserError if the folder is not whole, or a domain is
    missing or has no train window."""

    def __init__(self, data_dir: str | Path, block_size: int, names: list[str] | None = None, key: str = "--domains"):
        self.dir, self.block_size = Path(data_dir), block_size
        meta = read_meta(self.dir)
        if names and (unknown := [name for name in names if name not in meta["domains"]]):
            raise UserError(f"{key}: {self.dir} has no {' '.join(unknown)}; it has {' '.join(meta['domains'])}")
        self.tokenizer, self.names = meta["tokenizer"], names or list(meta["domains"])
        self.domains = {name: meta["domains"][name] for name in self.names}
        self.vocab_size = self.tokenizer["vocab_size"]
        # The first window of each shard, and behind them the number of all
        self._starts = {name: np.cumsum([0, *map(self._count, self.domains[name]["train"])]) for name in self.names}
        self.n_windows = {name: int(starts[-1]) for name, starts in self._starts.items()}
        if empty := [name for name, n in self.n_windows.items() if not n]:
            raise UserError(f"--block_size={block_size}: no train text that long in {' '.join(empty)} of {self.dir}")

    def _count(self, entry: dict) -> int:
        return max(entry["tokens"] - 1, 0) // self.block_size

    def _window(self, name: str, entry: dict, i: int) -> np.ndarray:
        """Window i of one bin of a domain, (block_size + 1,) int64."""
        path, dtype = self.dir / entry["file"], np.dtype(self.domains[name]["dtype"]).newbyteorder("<")
        # Read, not mapped: the pages that a mapping has touched are this process's memory until it is closed.
        window = np.fromfile(path, dtype, self.block_size + 1, offset=int(i) * self.block_size * dtype.itemsize)
        if window.max() >= self.vocab_size:
            raise UserError(f"{path}: holds the id {window.max()}; the tokenizer has {self.vocab_size} ids; see "
                            f"data.py --verify={self.dir}, or make the bins anew")
        return window.astype(np.int64)

    def train_windows(self, domain_ids: np.ndarray, window_ids: np.ndarray) -> np.ndarray:
        """The windows that MixtureSampler.next_batch names, in its order: (B, block_size + 1) int64."""
        windows = []
        for name, i in zip((self.names[domain] for domain in domain_ids), window_ids):
            shard = np.searchsorted(self._starts[name], i, side="right") - 1
            windows.append(self._window(name, self.domains[name]["train"][shard], i - self._starts[name][shard]))
        return np.stack(windows)

    def val_windows(self, name: str, count: int) -> np.ndarray:
        """Windows 0 … count−1 of a domain's validation, (count, block_size + 1) int64. UserError if there are fewer."""
        entry = self.domains[name]["val"]
        if self._count(entry) < count:
            raise UserError(f"--val_samples={count}: domain {name} of {self.dir} has {self._count(entry)} validation "
                            f"windows of {self.block_size} tokens; ask for no more, or raise --val_fraction in data.py")
        return np.stack([self._window(name, entry, i) for i in range(count)])

    def content(self) -> str:
        """Identity of the tokens, wherever they lie: over each bin's sha256 and the tokenizer."""
        return digest(self.domains, self.tokenizer["fingerprint"])


def verify(data_dir: Path):
    """Re-hash every bin of a folder. UserError lists those that changed since, and says so of the tokenizer's files."""
    changed, problems, meta = [], [], read_meta(data_dir, "--verify")
    for domain in meta["domains"].values():
        for entry in [*domain["train"], domain["val"]]:
            if file_sha256(data_dir / entry["file"]) != entry["sha256"]:
                changed.append(entry["file"])
            print(f"{entry['file']:32} {'CHANGED' if entry['file'] in changed else 'ok'}")
    if changed:
        problems.append(f"{data_dir}: {', '.join(changed)} not as in meta.json; copy again, or make the bins anew")
    if meta["tokenizer"]["files"]:
        attempt(problems, saved_tokenizer, data_dir, meta["tokenizer"])
    if problems:
        raise UserError("\n".join(problems))


# ------------ The quickstart's text -----------------------------------------------------------------------------------

def quickstart_domains(n_bytes: dict[str, int]) -> dict[str, Callable[[], Iterable[str]]]:
    """Four domains of text that come with Python, torch and what torch needs, each of about `n_bytes` at most."""
    def without_licence(text: str) -> str:
        head = re.match(r"(\s*(#[^\n]*\n|//[^\n]*\n|/\*.*?\*/))+", text, re.DOTALL)
        return text[head.end():] if head and re.search("copyright|licen[cs]e", head[0], re.I) else text

    def docstrings(text: str) -> str:
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, documented))
        return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))

    sources = {  # package, or a module of the library; suffix, paths left out, what is taken of a file
        "python": ("argparse", ".py", r"(^|/)(site-packages|tests?|idlelib|encodings|pydoc_data)/", without_licence),
        "cpp": ("torch", ".h", r"^(?!include/)|ATen/(ops|[^/]*$)|google/|sleef", without_licence),
        "math": ("sympy", ".py", r"tests/|parsing/", docstrings),  # formulas and worked examples
        "prose": ("numpy", ".py", r"tests/|_pyinstaller/", docstrings),
    }

    def documents(name: str) -> Iterator[str]:
        package, suffix, left_out, take = sources[name]
        folder = Path(importlib.util.find_spec(package).origin).parent
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob(f"*{suffix}")}
        # By the hash of their names, so that the first few megabytes are a sample of all
        chosen = [paths[path] for path in sorted(paths, key=lambda path: content_hash(path.encode()))
                  if not re.search(left_out, path)]
        first, left = pydoc_data.topics.topics.values() if name == "prose" else (), n_bytes[name]
        for text in itertools.chain(first, map(take, read_documents(chosen, "text", Counter()))):
            if left <= 0:
                return
            # Tables, of characters or of constants, are mostly digits and signs.
            if len(text) > 200 and sum(map(str.isalpha, text)) > 0.4 * len(text):
                left -= len(text.encode())
                yield text

    return {name: functools.partial(documents, name) for name in n_bytes}


# ------------ The program ---------------------------------------------------------------------------------------------

@dataclass
class DataConfig:
    """Keys of `python data.py`. Words without a dash are its sources."""
    out_dir: str = option("", "folder to write the bins to")
    tokenizer: str = option("bytes", "bytes, a tiktoken encoding, or a folder or file with a tokenizer.json")
    eot: str = option("", "the token that ends a document; empty: the tokenizer's own")
    text_key: str = option("text", "where the text is in a record of .jsonl and .parquet")
    val_fraction: float = option(0.05, "share of a domain's bytes for validation, at most", least=0, most=0.9)
    val_bytes: int = option(32_000_000, "validation bytes a domain, at most", least=1)
    shards: int = option(1, "train bins a domain", least=1, most=1000)
    verify: str = option("", "only re-hash the bins of this folder")
    sources: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        needed = {"--out_dir: name the folder to write to": self.out_dir,
                  "no sources: write NAME=GLOB for each domain": self.sources}
        return [problem for problem, value in needed.items() if not value and not self.verify]


def main():
    config = parse_config(DataConfig)
    if config.verify:
        return verify(Path(config.verify))
    left_out = {}

    def documents(name: str, files: list[Path]) -> Iterator[str]:
        left_out[name] = Counter()  # anew each time: files are read twice, but counted once
        return read_documents(files, config.text_key, left_out[name])

    problems, out_dir = [], Path(config.out_dir)
    sources = attempt(problems, expand_sources, config.sources)
    tokenizer = attempt(problems, load_tokenizer, config.tokenizer, config.eot)
    attempt(problems, check_free, out_dir, tokenizer)
    if problems:
        raise UserError("\n".join(problems))
    print_config(config)
    domains = {name: functools.partial(documents, name, files) for name, files in sources.items()}
    try:
        meta = build_bins(out_dir, tokenizer, domains, shards=config.shards, val_fraction=config.val_fraction,
                          val_bytes=config.val_bytes, made_by=asdict(config))
    finally:  # a domain may have too few documents for the same reasons
        for reason, count in sum(left_out.values(), Counter()).items():
            print(f"note: {count} {reason}")
    print(f"{'domain':16}{'documents':>12}{'MB':>10}{'train tokens':>16}{'validation':>14}")
    for name, domain in meta["domains"].items():
        entries, val_tokens = [*domain["train"], domain["val"]], domain["val"]["tokens"]
        n, size, tokens = (sum(entry[key] for entry in entries) for key in ("documents", "bytes", "tokens"))
        print(f"{name:16}{n:12,}{size / 1e6:10.1f}{tokens - val_tokens:16,}{val_tokens:14,}")
    print(f"wrote {config.out_dir}")


if __name__ == "__main__":
    run_program(main)
