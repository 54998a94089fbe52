"""Text to token bins, one set per domain, and bins to windows.

    python data.py --out_dir=data/mine --tokenizer=bytes 'code=src/**/*.py' books=books/ web=web.jsonl.gz
    python data.py --out_dir=data/pile --tokenizer=DIR --domain_key=meta.pile_set_name 'pile/*.jsonl.zst' code=src/
    python data.py --verify=data/mine

A bins folder holds NAME.train.bin, NAME.val.bin and NAME.test.bin for each domain. A bin is a row of token ids without
a header, little-endian, uint16 if every id fits and uint32 otherwise. Each document ends with the end-of-text id.
meta.json describes the bins and the tokenizer, and SHA256SUMS has the checksums of all files.

A document is a text file, or a record of .jsonl, .ndjson, .json or .parquet, cut at ends of lines if it has more than a
million characters. Its sha256 decides its split. Memory stays below 1.2 GiB, plus the largest text, record or page.
"""

import argparse
import ast
import errno
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import pydoc_data.topics
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
from safetensors import SafetensorError


# ------------ Helpers of all four programs ----------------------------------------------------------------------------

class UserError(ValueError):
    """A mistake that the user can fix. A program prints its message without a traceback and exits with status 2."""


@contextmanager
def user_errors(source: str | Path, fix: str):
    """Turn what bad input raises into a UserError with `source`, the exception's own words and the `fix`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except (NameError, AttributeError, AssertionError, NotImplementedError):
        raise  # a bug: whoever has just changed the code needs its traceback
    except BaseException as error:  # a panic in a Rust library is not an Exception
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: {type(error).__name__}: {reason}; {fix}") from error


def run_program(main: Callable):
    """Run `main` as a program and exit with its status. A UserError or OSError becomes a message and status 2; only
    `python -X dev` prints its traceback too. Under torchrun only rank 0 prints an error that all ranks raise."""
    rank = os.environ.get("RANK")
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code or 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except (UserError, OSError) as error:
        status = 2
        prefix = "error"
        if rank not in (None, "0"):
            time.sleep(3)  # meanwhile torchrun ends this process, since rank 0 has failed
            prefix = f"rank {rank}: error"
        if sys.flags.dev_mode:
            traceback.print_exc()
        for line in str(error).splitlines():
            print(f"{prefix}: {line}", file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()

    # Under torchrun Python's own clean-up can wait for lost processes (NCCL) or abort (gloo's threads).
    if rank is not None:
        print(end="", flush=True)
        os._exit(status)
    sys.exit(status)


def import_optional(module: str, needed_for: str):
    """Import a module that only some uses need. UserError says which package to install."""
    with user_errors(needed_for, f"pip install {module.partition('.')[0]}"):
        return importlib.import_module(module)


def model_folder(source: str | Path, option: str, files: Iterable[str]) -> Path:
    """Return the folder `source`. If it looks like OWNER/MODEL and neither it nor OWNER exists, download `files`
    (patterns) of that model from the Hugging Face Hub. UserError names the key `option`."""
    path = Path(source)
    if path.exists() or path.parent.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        return path
    problem = f"{option}={source}: no such folder, and not found on the Hugging Face Hub"
    huggingface_hub = import_optional("huggingface_hub", problem)
    with user_errors(problem, f"with a network:  hf download {source} --local-dir models/{path.name}"):
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(files)))


def digest(*parts) -> str:
    """Return the sha256 of `parts`, written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path):
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def print_table(rows: list[list[str]]):
    """Print rows of a label and cells, each column as wide as its widest cell."""
    label_width, *widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    for label, *cells in rows:
        print(f"{label:{label_width}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)), flush=True)


# ------------ Published folders ---------------------------------------------------------------------------------------

SUMS = "SHA256SUMS"


@contextmanager
def published(folder: Path):
    """Write a folder under a temporary name and rename it at the end: it is there as a whole, or not at all.

    Yields the temporary folder, and adds SHA256SUMS unless write_meta has done so. An error or Ctrl-C removes it; only
    kill -9 leaves it. UserError if `folder` exists, or if the disk fails."""
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; use another folder, or delete it as a whole")
    temporary = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if not (temporary / SUMS).exists():
            write_sums(temporary)
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        os.rename(temporary, folder)
        fsync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = disk_error(error)
        if problem is None:
            raise
        fix = "another process was faster" if os.path.lexists(folder) else "use another folder"
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "free some space, and start the same command"
        raise UserError(f"{folder}: cannot be written: {problem}; {fix}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def disk_error(error: Exception) -> OSError | None:
    """Return the OSError behind an exception, or None: torch.save hides it, and safetensors prints only its number."""
    number = re.search(r"(?:os error|Os { code:) (\d+)", str(error))  # safetensors 0.6, and before it
    if isinstance(error, SafetensorError) and number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    cause = error.__context__ if type(error) is RuntimeError else error
    return cause if isinstance(cause, OSError) else None


def write_sums(folder: Path):
    """Write SHA256SUMS of all other files of a folder, in the format of `sha256sum`."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def damaged_files(folder: Path) -> list[str]:
    """Return the files of a published folder that are missing or have changed."""
    expected = {SUMS: ""}  # itself, unless it can be read
    with suppress(OSError, ValueError):
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)} or expected
    return [name for name in expected if not (folder / name).is_file() or sha256_of(folder / name) != expected[name]]


# ------------ Windows and bins ----------------------------------------------------------------------------------------

FORMAT_VERSION = 3
SPLITS = ("train", "val", "test")


def read_meta(data_dir: str | Path) -> dict:
    """Return meta.json of a bins folder, checked against the sizes of the bins. UserError if they differ."""
    path = Path(data_dir, "meta.json")
    if not path.is_file():
        raise UserError(f"--data_dir={data_dir}: has no meta.json; make bins with data.py --out_dir={data_dir}")
    with user_errors(path, "copy the folder again, or delete the whole folder and make the bins again"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {meta['format_version']}, but this program reads {FORMAT_VERSION}")
        for domain in dict(**meta["domains"]).values():  # TypeError unless it is a dict
            for entry in (domain[split] for split in SPLITS if split in domain):  # nanoGPT's bins have no test split
                if path.with_name(entry["file"]).stat().st_size != entry["tokens"] * np.dtype(domain["dtype"]).itemsize:
                    raise ValueError(f"{entry['file']} does not have the size of {entry['tokens']:,} tokens")
        for name in meta["tokenizer"]["files"]:
            path.with_name(name).stat()  # FileNotFoundError if the copy is incomplete
    return meta


class TokenBins:
    """The bins of a folder, cut into windows of block_size + 1 tokens: the inputs, and the targets one token later.

    A bin of n tokens has (n − 1) // B windows, with B = block_size. Window i is the tokens i·B … i·B + B inclusive.
    `names` selects domains (default: all). UserError if a domain is missing or has no train window."""

    def __init__(self, data_dir: str | Path, block_size: int, names: list[str] | None = None):
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
                raise UserError(f"--domains: --data_dir={self.dir} has no {name}; it has {' '.join(meta['domains'])}")
            self.domains[name] = meta["domains"][name]
            self.n_windows[name] = self.count_windows(name, "train")
            if self.n_windows[name] == 0:
                raise UserError(f"--block_size={block_size}: domain {name} of {self.dir} has no train text that long")

    def count_windows(self, name: str, split: str) -> int:
        """Return how many windows a split of a domain has; 0 if it has no such split."""
        if split not in self.domains[name]:
            return 0
        return (self.domains[name][split]["tokens"] - 1) // self.block_size

    def _windows(self, name: str, split: str, window_ids: np.ndarray) -> np.ndarray:
        """Return windows of one bin, (len(window_ids), block_size + 1) int64. UserError if an id has no token."""
        # Mapped anew for each batch, as in nanoGPT: pages that were read before do not count as memory in use.
        path = self.dir / self.domains[name][split]["file"]
        tokens = np.memmap(path, dtype=np.dtype(self.domains[name]["dtype"]).newbyteorder("<"), mode="r")
        positions = window_ids[:, None] * self.block_size + np.arange(self.block_size + 1)
        windows = tokens[positions].astype(np.int64)
        largest = windows.max(initial=0)
        if largest >= self.vocab_size:
            raise UserError(f"{path}: holds the id {largest}, but the tokenizer has {self.vocab_size} ids; build again")
        return windows

    def train_windows(self, domain_ids: np.ndarray, window_ids: np.ndarray) -> np.ndarray:
        """Return the windows that MixtureSampler.next_batch chose, in its order: (B, block_size + 1) int64."""
        windows = np.empty((len(domain_ids), self.block_size + 1), dtype=np.int64)
        for domain_id in np.unique(domain_ids):
            rows = domain_ids == domain_id
            windows[rows] = self._windows(self.names[domain_id], "train", window_ids[rows])
        return windows

    def eval_windows(self, name: str, split: str, n: int) -> np.ndarray:
        """Return `n` evenly spaced windows of a "val" or "test" bin, (n, block_size + 1). UserError if it has fewer."""
        available = self.count_windows(name, split)
        if n > available:
            raise UserError(f"--{split}_samples={n}: domain {name} of {self.dir} has {available} {split} windows of "
                            f"{self.block_size} tokens; lower it or --block_size, or make bins with more text")
        return self._windows(name, split, np.arange(n) * available // n)

    def content(self) -> str:
        """Return a digest of the bins' lines in SHA256SUMS and of the tokenizer's fingerprint."""
        files = [entry[split]["file"] for entry in self.domains.values() for split in SPLITS if split in entry]
        with user_errors(self.dir / SUMS, "copy the folder again"):
            by_file = {line.split("  ", 1)[1]: line for line in (self.dir / SUMS).read_text("utf-8").splitlines()}
            return digest([by_file[file] for file in files], self.tokenizer["fingerprint"])


def verify(data_dir: str | Path):
    """Check all checksums of a bins folder, and load its tokenizer. UserError lists what changed."""
    meta = read_meta(data_dir)
    damaged = damaged_files(Path(data_dir))
    if damaged:
        raise UserError(f"{data_dir}: missing or changed: {', '.join(damaged)}; copy the folder or make the bins again")
    saved_tokenizer(Path(data_dir), meta["tokenizer"])
    print(f"{data_dir}: all files are as they were written")


# ------------ Tokenizers ----------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_META = "tokenizer_meta.json"  # in a model folder: the tokenizer's entry of meta.json
# The files of a tokenizer. data.py copies them to the bins, and a run copies them from there to the student.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
# Files to download for a model on the Hub
MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", TOKENIZER_META, *TOKENIZER_FILES)


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. It adds no special tokens, and treats special tokens inside text as plain text."""
    name: str
    vocab_size: int  # largest id + 1, added tokens included
    eot_id: int  # ends each document
    eot_token: str
    fingerprint: str  # of everything that decides the encoding; begins with "tiktoken:" for a named encoding
    encode_batch: Callable[[list[str]], list[np.ndarray]]
    decode: Callable[[list[int]], str]
    files: tuple[Path, ...] = ()  # empty: it is loaded by its name


def load_tokenizer(source: str | Path, eot_token: str = "") -> Tokenizer:
    """Load "bytes", a tiktoken encoding, a tokenizer.json or the folder that has one, or a model's tokenizer from the
    Hugging Face Hub. Each document ends with `eot_token`; the default is its eos_token, or <|endoftext|>."""
    names = ["bytes", *tiktoken.list_encoding_names()]
    if source in names:  # even if a folder has the same name
        return _tiktoken_tokenizer(source, eot_token)
    path = model_folder(source, "--tokenizer", TOKENIZER_FILES)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.name != "tokenizer.json":
        raise UserError(f"--tokenizer={source}: use a folder with a tokenizer.json, OWNER/MODEL, or {' '.join(names)}")
    name = path.resolve().parent.name if Path(source).exists() else str(source)  # the folder's, or the Hub's
    return _huggingface_tokenizer(path, eot_token, name)


def _tiktoken_tokenizer(name: str, eot_token: str) -> Tokenizer:
    if name == "bytes":
        encoding = tiktoken.Encoding("bytes", pat_str="(?s).", special_tokens={END_OF_TEXT: 256},
                                     mergeable_ranks={bytes([byte]): byte for byte in range(256)})
        fingerprint = settings_digest(bytes_settings())
    else:
        with user_errors(f"--tokenizer={name}", "set TIKTOKEN_CACHE_DIR to a folder that has it, or download it"):
            encoding = tiktoken.get_encoding(name)
        ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
        fingerprint = "tiktoken:" + digest(ranks, encoding._pat_str, encoding._special_tokens)
    special = encoding._special_tokens
    eot_token = eot_token or END_OF_TEXT
    if eot_token not in special:
        raise UserError(f"--eot={eot_token}: not a special token of {name}, which has {' '.join(special)}")
    known = {*encoding._mergeable_ranks.values(), *special.values()}  # some encodings have gaps between their ids

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        if name == "bytes":
            return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(partial(encoding.encode_to_numpy, disallowed_special=()), texts))

    return Tokenizer(name=name, vocab_size=encoding.max_token_value + 1, eot_id=special[eot_token],
                     eot_token=eot_token, fingerprint=fingerprint, encode_batch=encode_batch,
                     decode=lambda ids: encoding.decode([i for i in ids if i in known]))


def _huggingface_tokenizer(path: Path, eot_token: str, name: str) -> Tokenizer:
    tokenizers = import_optional("tokenizers", f"--tokenizer={path}")
    with user_errors(f"--tokenizer={path}", "save it again with transformers' AutoTokenizer"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        config = path.with_name("tokenizer_config.json")
        if config.is_file() and not eot_token:
            eos = dict(**json.loads(config.read_text(encoding="utf-8"))).get("eos_token")
            eot_token = eos["content"] if isinstance(eos, dict) else eos

    # Encode special tokens inside text as text, and neither cut nor pad a text.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab = tokenizer.get_vocab()
    if eot_token not in vocab:
        raise UserError(f"--eot={eot_token or ''}: not a token of {path.parent}, whose tokenizer_config.json should "
                        "have an eos_token; choose the token that ends a document with --eot=TOKEN")

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        with user_errors(f"--tokenizer={path}", "it cannot encode all texts; use another tokenizer"):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    files = [path.with_name(name) for name in TOKENIZER_FILES if path.with_name(name).is_file()]
    return Tokenizer(name=name, vocab_size=max(vocab.values()) + 1, eot_id=vocab[eot_token], eot_token=eot_token,
                     fingerprint=settings_digest(json.loads(tokenizer.to_str())), encode_batch=encode_batch,
                     decode=partial(tokenizer.decode, skip_special_tokens=False), files=tuple(files))


def settings_digest(settings: dict) -> str:
    """Return the identity of what decides the encoding in a tokenizer.json, however the file is serialized."""
    model = dict(settings["model"])
    merges = model.pop("merges", None) or []
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    # No text is searched for special tokens, so how they would match does not matter.
    unused = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{**token, **unused} if token["special"] else token for token in settings["added_tokens"]]
    return digest(model, pairs, added, settings["normalizer"], settings["pre_tokenizer"])


def bytes_settings() -> dict:
    """Return the tokenizer `bytes` as a tokenizer.json: GPT-2's alphabet, in which each byte is a character."""
    # A byte that is not printable is written as a character from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    vocab = dict(zip(map(chr, [*printable, *range(256, 256 + len(others))]), [*printable, *others]))
    # All fields that the library itself writes, so that settings_digest gives the same for its files
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end_of_text = {"id": 256, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
                   "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocab, "merges": []}
    return {"version": "1.0", "added_tokens": [end_of_text], "normalizer": None, "pre_tokenizer": byte_level,
            "decoder": byte_level, "model": model}


def saved_tokenizer(folder: Path, entry: dict, eot_token: str = "") -> Tokenizer:
    """Load the tokenizer of an entry of meta.json, from `folder` or by its name. UserError if it has changed."""
    tokenizer = load_tokenizer(folder if entry["files"] else entry["name"], eot_token or entry["eot_token"])
    if tokenizer.fingerprint != entry["fingerprint"]:
        raise UserError(f"{folder}: its tokenizer {entry['name']} encodes in another way than before; copy it again")
    return tokenizer


def save_tokenizer(folder: Path, bins: TokenBins):
    """Write the bins' tokenizer to a model folder, so that the four programs and transformers encode as the bins do."""
    entry = bins.tokenizer
    for name in entry["files"]:
        shutil.copyfile(bins.dir / name, folder / name)
    if entry["name"] == "bytes" and not entry["files"]:
        write_json(folder / "tokenizer.json", bytes_settings())
    write_json(folder / TOKENIZER_META, entry)

    # In transformers 5 only PreTrainedTokenizerFast encodes by tokenizer.json. `auto_map` would run code of the folder.
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer_config.json"
        config = {"bos_token": entry["eot_token"], "clean_up_tokenization_spaces": False}
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        config.update(eos_token=entry["eot_token"], tokenizer_class="PreTrainedTokenizerFast")
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])  # the class would add token types
        config.pop("auto_map", None)
        write_json(path, config)

    # Text ends with the bins' end of text, and begins with the model's own token if it has one.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bos = config.get("bos_token_id")
    ids = {"bos_token_id": entry["eot"] if bos is None else bos, "eos_token_id": entry["eot"],
           "pad_token_id": entry["eot"]}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", {**config, **ids})


def model_tokenizer(folder: Path, eot_token: str = "") -> Tokenizer | None:
    """Load the tokenizer of a model folder; None if it has none. `eot_token` as in load_tokenizer."""
    path = folder / TOKENIZER_META
    if path.is_file():  # a run wrote the folder
        with user_errors(path, "copy it again from the folder that a run wrote"):
            return saved_tokenizer(folder, json.loads(path.read_text(encoding="utf-8")), eot_token)
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder, eot_token)
    return None


# ------------ Files to documents --------------------------------------------------------------------------------------

PIECE = 1_000_000  # characters of a document at most: a longer text is cut
RECORDS = (".json", ".jsonl", ".jsonlines", ".ndjson", ".parquet")  # suffixes of files of records


def expand_sources(sources: list[str], labeled: bool) -> dict[str, list[Path]]:
    """Return the files of NAME=GLOB words, domain → sorted paths. If `labeled`, a plain GLOB is allowed too; its files
    are under the name "". UserError if a word matches no file, or a .csv or .tsv."""
    domains = defaultdict(dict)  # name → real path → path
    for word in sources:
        named = None if labeled and os.path.exists(word) else re.fullmatch(r"([\w+#][\w+#-]*)=(.*)", word)
        if not named and not labeled:
            raise UserError(f"{word!r}: write NAME=GLOB, with letters, digits, _ + # - in NAME, or use --domain_key")
        name, pattern = named.groups() if named else ("", word)
        paths = find_files(os.path.expanduser(pattern))
        if not paths:
            raise UserError(f"{word}: no file matches {pattern!r}; use a file, a folder or a glob")
        # A file with several names counts once, under the last. In the Hub's cache that is snapshots/…, with a suffix.
        for path in sorted(paths):
            if suffix_of(path) in (".csv", ".tsv"):
                raise UserError(f"{path}: write its rows to .jsonl or .parquet, or leave it out")
            domains[name][path.resolve()] = path
    return {name: sorted(paths.values()) for name, paths in domains.items()}


def find_files(pattern: str) -> list[Path]:
    """Return the files of a path or a glob; of a folder all files below it that are not hidden or behind a link."""
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
        for folder, subfolders, names in os.walk(path):  # of a file it yields nothing
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            files += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return [Path(file) for file in files if os.path.isfile(file)]


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, without a .gz or .zst at the end."""
    if path.suffix.lower() in (".gz", ".zst"):
        path = path.with_suffix("")
    return path.suffix.lower()


def read_documents(files: dict[str, list[Path]], text_key: str, domain_key: str,
                   skipped: Counter) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) of all documents. Under the name "" each record has its domain at `domain_key`. `skipped`
    counts the skipped documents by reason. UserError if a file is damaged."""
    labels = {}  # label of a record → domain
    for name, paths in files.items():
        for path in paths:
            for record in read_file(path, text_key, domain_key, skipped):
                text = value_at(record, text_key)
                domain = name or domain_of(value_at(record, domain_key), labels)
                if not isinstance(text, str):
                    skipped[f"records without text under the key {text_key}"] += 1
                elif not domain:
                    skipped[f"records without a label under the key {domain_key}"] += 1
                else:
                    for piece in pieces(text):
                        if piece.strip():
                            yield domain, piece
                        else:
                            skipped[f"empty documents of {domain}"] += 1


def domain_of(label, labels: dict) -> str:
    """Return the domain of a record's label, "" if it has none. `labels` maps the labels so far to their domains."""
    if not isinstance(label, (str, int)):
        return ""
    label = str(label)
    if label not in labels:
        domain = re.sub(r"(?:[^\w+#-]|_)+", "_", label).strip("_")[:100]
        domain = domain.encode()[:200].decode(errors="ignore").strip("_")  # a file name has 255 bytes at most
        if domain and domain in labels.values():
            print(f"note: {label!r} is another label of the domain {domain}")
        labels[label] = domain
    return labels[label]


def pieces(text: str) -> Iterator[str]:
    """Cut a text into documents of at most PIECE characters, at ends of lines if it has some."""
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]  # the rest; an empty text is one piece


def read_file(path: Path, text_key: str, domain_key: str, skipped: Counter) -> Iterator[dict]:
    """Yield the records of a file; a text file is one, with its text under `text_key`. UserError names the file."""
    with user_errors(path, "copy the file again, or leave it out"):
        if suffix_of(path) == ".parquet":
            parquet = import_optional("pyarrow.parquet", str(path))
            file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            # Few rows at once, since they may be long. Columns that the file lacks are left out.
            try:
                for rows in file.iter_batches(columns=[text_key, domain_key], batch_size=4):
                    yield from rows.to_pylist()
            except NotImplementedError as error:  # of Arrow, about the file: no bug
                raise ValueError(error) from error
            return
        with open_file(path) as file:
            if suffix_of(path) in RECORDS:
                yield from json_records(file, path, skipped)
                return
            text = read_text(file)
            if text is None:
                skipped["text files that are not UTF-8 or hold a NUL"] += 1
            else:
                yield {text_key: text}


def open_file(path: Path) -> BufferedReader:
    """Open a file that may be compressed, to read bytes."""
    if path.suffix.lower() == ".gz":
        return BufferedReader(gzip.open(path))
    if path.suffix.lower() == ".zst":  # the package zstandard would read a truncated file without an error
        return BufferedReader(import_optional("pyarrow", str(path)).input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def read_text(file: BufferedReader) -> str | None:
    """Return the text of a file without a byte order mark, line ends as they are; None if it is binary."""
    if b"\0" not in file.peek():  # so that a large binary file is not read as a whole
        with suppress(UnicodeDecodeError):
            text = file.read().decode("utf-8-sig")
            if "\0" not in text:
                return text
    return None


def json_records(lines: Iterable[bytes], path: Path, skipped: Counter) -> Iterator[dict]:
    """Yield the records of lines of JSON. Skip broken lines, but raise ValueError if the first is no record."""
    n_records = 0
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON record")
        except (ValueError, RecursionError) as error:
            if n_records == 0:
                raise ValueError(f"line {number}: {error}; jq -c '.[]' FILE writes an array as records") from error
            if not skipped["broken records"]:
                print(f"note: {path}, line {number}: {error}; broken records are skipped", flush=True)
            skipped["broken records"] += 1
        else:
            n_records += 1
            yield record


def value_at(record: dict, key: str):
    """Return what a record has under a key: a name, or a path of names such as meta.source; None if nothing."""
    if key in record:
        return record[key]
    for name in key.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


# ------------ The build: one pass over a stream of documents ----------------------------------------------------------

BATCH_BYTES = 8 << 20  # of text that is encoded at once: work for many cores, and about 100 bytes of memory per id


def split_of(document: bytes, fraction: float) -> str:
    """Return "test", "val" or "train": the split of a document (UTF-8) depends on its sha256 only."""
    u = int.from_bytes(hashlib.sha256(document).digest()[:8], "big") / 2**64  # uniform in [0, 1)
    if u < fraction:
        return "test"
    if u < 2 * fraction:
        return "val"
    return "train"


def batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, bytes]]]:
    """Cut a stream of (domain, text) into lists of (domain, text in UTF-8) of about BATCH_BYTES."""
    batch = []
    size = 0
    for name, text in documents:
        document = text.encode(errors="replace")  # a lone surrogate becomes "?"
        batch.append((name, document))
        size += len(document) + 300  # plus Python's overhead per document, roughly
        if size >= BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def build_bins(out_dir: str | Path, tokenizer: Tokenizer, documents: Iterable[tuple[str, str]], *,
               val_fraction: float = 0.05, required: Iterable[str] | None = None, made_by: dict | None = None) -> dict:
    """Write the bins of a stream of (domain, text) in one pass, as a published folder, and return its meta.json.

    The split of a document depends only on its text (see split_of) and on val_fraction, the expected share of
    validation, and again of test. So no state is kept, copies of a document are in one split, and parts of a corpus
    that are built on several machines agree. Their bins can be joined with `cat`, and write_meta makes meta.json.

    UserError if one of the `required` domains (default: all) lacks a document in one of the splits. Any other such
    domain gets a note and no bins. `made_by` goes into meta.json."""
    if not 0 < val_fraction < 0.5:
        raise UserError(f"--val_fraction={val_fraction}: must lie above 0 and below 0.5")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    end = np.array([tokenizer.eot_id], dtype=dtype)
    domains = {name: new_domain(name, dtype) for name in required or ()}  # name → entry of meta.json
    n_bytes = 0
    n_with_end = 0
    with published(Path(out_dir)) as folder:
        for batch in batches(documents):
            # Encode documents of all domains at once.
            texts = [document.decode() for _, document in batch]
            ids_of_texts = tokenizer.encode_batch(texts)
            if n_bytes == 0:
                note_change(texts[:20], ids_of_texts[:20], tokenizer)

            # Assign each document to its bin. No document may hold the end of text.
            some_with_end = tokenizer.eot_id in np.concatenate(ids_of_texts)
            parts = defaultdict(list)  # bin → arrays of ids
            for (name, document), ids in zip(batch, ids_of_texts, strict=True):
                n_bytes += len(document)
                if some_with_end and tokenizer.eot_id in ids:
                    n_with_end += 1
                    continue
                domain = domains.setdefault(name, new_domain(name, dtype))
                entry = domain[split_of(document, val_fraction)]
                entry["tokens"] += len(ids) + 1
                entry["documents"] += 1
                entry["bytes"] += len(document)
                parts[entry["file"]] += [ids, end]

            # Append to the bins. None stays open, since domains may be many.
            for file, arrays in parts.items():
                with open(folder / file, "ab") as stream:
                    stream.write(np.concatenate(arrays, dtype=np.dtype(dtype).newbyteorder("<"), casting="same_kind"))
            print(f"{n_bytes / 1e6:,.1f} MB of text", flush=True)
        if n_with_end:
            print(f"note: skipped {n_with_end:,} documents that hold {tokenizer.eot_token}, the end of text")

        # A domain needs a document in each split.
        for name in list(domains):
            problem = split_problem(name, domains[name], val_fraction)
            if problem and (required is None or name in required):
                raise UserError(problem)
            if problem:
                print(f"note: {problem}; no bins")
                for split in SPLITS:
                    (folder / domains[name][split]["file"]).unlink(missing_ok=True)
                del domains[name]
        if not domains:
            raise UserError(f"--out_dir={out_dir}: no domain has documents in all splits; see the notes")
        return write_meta(folder, tokenizer, domains, made_by)


def new_domain(name: str, dtype: str) -> dict:
    """Return the entry of meta.json of a domain without documents."""
    bins = {split: {"file": f"{name}.{split}.bin", "tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
    return {"dtype": dtype, **bins}


def note_change(texts: list[str], ids_of_texts: list[np.ndarray], tokenizer: Tokenizer):
    """Print a note if the tokenizer does not give back one of the texts as it was."""
    for text, ids in zip(texts, ids_of_texts):
        decoded = tokenizer.decode(ids.tolist())
        if decoded != text:
            start = len(os.path.commonprefix([text, decoded]))
            print(f"note: the tokenizer changes text: {text[start:start + 40]!r} comes back as "
                  f"{decoded[start:start + 40]!r}")
            return


def split_problem(name: str, domain: dict, val_fraction: float) -> str:
    """Return the message for a domain without a document in one of its splits, "" if it has them all."""
    documents = {split: domain[split]["documents"] for split in SPLITS}
    if all(documents.values()):
        return ""
    n = sum(documents.values())
    fix = "a domain needs three documents at least"
    if n >= 3:
        fix = f"give it more documents that differ, or try --val_fraction={min(0.3, 5 / n):.2g}"
    counts = ", ".join(f"{count} {split}" for split, count in documents.items())
    return f"{name}: its documents at --val_fraction={val_fraction} are {counts}; {fix}"


def write_meta(folder: str | Path, tokenizer: Tokenizer, domains: dict[str, dict], made_by: dict | None = None) -> dict:
    """Copy the tokenizer's files to a folder of bins, write meta.json and SHA256SUMS there, and return meta.json.

    `domains`: name → {"dtype": "uint16" or "uint32", "train": bin, "val": bin, "test": bin}, each bin {"file",
    "tokens"}. nanoGPT's train.bin and val.bin make such a domain, without "test"."""
    folder = Path(folder)
    entry = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot_id,
             "eot_token": tokenizer.eot_token, "fingerprint": tokenizer.fingerprint,
             "files": [path.name for path in tokenizer.files]}
    meta = {"format_version": FORMAT_VERSION, "tokenizer": entry, "domains": domains, "made_by": made_by}
    for path in tokenizer.files:
        with suppress(shutil.SameFileError):
            shutil.copyfile(path, folder / path.name)
    write_json(folder / "meta.json", meta)
    write_sums(folder)
    return meta


# ------------ The quickstart's text -----------------------------------------------------------------------------------

def without_license(text: str) -> str:
    """Return source code without the comments at its start, if they are about its license."""
    head = re.match(r"(\s*(#[^\n]*\n|//[^\n]*\n|/\*.*?\*/))+", text, re.DOTALL)
    if head and re.search("copyright|licen[cs]e", head[0], re.IGNORECASE):
        return text[head.end():]
    return text


def docstrings(text: str) -> Iterator[str]:
    """Yield the docstrings of Python source, each as a document."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


# The text of each domain: files below the folder of a module that comes with Python or the requirements.
# `exclude` is a regular expression of paths. `extract` makes documents of a file, and only those up to `longest`
# characters are used, so that the windows of validation are of many texts. math is sympy's formulas and examples.
QUICKSTART = {
    "python": {"module": "argparse", "suffix": ".py", "longest": 20_000,
               "extract": lambda text: text.split("\n\n\n"),
               "exclude": r"(^|/)(site-packages|tests?|idlelib|encodings|pydoc_data)/"},
    "cpp": {"module": "torch", "suffix": ".h", "extract": lambda text: [text], "longest": 6_000,
            "exclude": r"^(?!include/)|ATen/(ops|[^/]*$)|google/|sleef"},
    "math": {"module": "sympy", "suffix": ".py", "extract": docstrings, "longest": 4_000,
             "exclude": r"tests/|parsing/"},
    "prose": {"module": "numpy", "suffix": ".py", "extract": docstrings, "longest": 3_000,
              "exclude": r"tests/|_pyinstaller/"},
}
# Unequal domains, as in a real corpus: most of the text is Python.
QUICKSTART_BYTES = {"python": 7_000_000, "cpp": 800_000, "math": 800_000, "prose": 600_000}


def quickstart_files(name: str) -> Iterator[list[str]]:
    """Yield the documents of each file of a domain."""
    if name == "prose":
        for topic in pydoc_data.topics.topics.values():
            yield topic.split("\n\n\n")
    source = QUICKSTART[name]
    folder = Path(importlib.util.find_spec(source["module"]).origin).parent
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*" + source["suffix"])]
    # In the order of the hashes of their names, so that the first few megabytes are a sample of all files
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest()):
        if not re.search(source["exclude"], path):
            text = (folder / path).read_bytes().decode("utf-8-sig", errors="replace")
            yield source["extract"](without_license(text))


def quickstart_documents(n_bytes: dict[str, int], files_of: Callable = quickstart_files) -> Iterator[tuple[str, str]]:
    """Yield the quickstart's text as (domain, text), about `n_bytes` of each domain."""
    for name, limit in n_bytes.items():
        total = 0
        for text in chain.from_iterable(files_of(name)):
            if total >= limit:
                break
            # Tables of characters or of constants are mostly digits and signs.
            letters = sum(map(str.isalpha, text))
            if 200 < len(text) <= QUICKSTART[name]["longest"] and letters > 0.4 * len(text):
                total += len(text.encode())
                yield name, text


def build_quickstart_bins(folder: Path):
    """Build the quickstart's bins, unless the folder has bins."""
    if not (folder / "meta.json").is_file():
        print(f"Collecting text into {folder} …", flush=True)
        build_bins(folder, load_tokenizer("bytes"), quickstart_documents(QUICKSTART_BYTES), val_fraction=0.1)


# ------------ The program ---------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="*", metavar="NAME=GLOB", help="a domain and its files; --domain_key makes NAME= optional")
    add("--out_dir", default="", type=os.path.expanduser, help="folder to make; it must not exist")
    add("--tokenizer", default="bytes", type=os.path.expanduser, help="bytes, a tiktoken encoding, a folder or file "
        "with a tokenizer.json, or a model's name on the Hugging Face Hub (default: %(default)s)")
    add("--eot", default="", help="token that ends a document (default: the tokenizer's eos_token)")
    add("--text_key", default="text", help="key of a record's text (default: %(default)s)")
    add("--domain_key", default="", help="key of a record's domain, such as meta.source (default: none)")
    add("--val_fraction", type=float, default=0.05, help="share of documents in val, as in test (default: %(default)s)")
    add("--verify", default="", type=os.path.expanduser, metavar="DIR", help="only check the files of this folder")
    args = parser.parse_intermixed_args()
    if bool(args.verify) == bool(args.sources) or args.sources and not args.out_dir:
        parser.error("requires --out_dir=DIR and NAME=GLOB for each domain, or only --verify=DIR")
    if args.verify:
        verify(args.verify)
        return

    # Find all files and the tokenizer before reading the first document.
    files = expand_sources(args.sources, bool(args.domain_key))
    tokenizer = load_tokenizer(args.tokenizer, args.eot)
    print(f"each document ends with {tokenizer.eot_token}, id {tokenizer.eot_id}", flush=True)

    # Build the bins. Print what was skipped even after an error: it may be the reason.
    skipped = Counter()  # reason → number
    documents = read_documents(files, args.text_key, args.domain_key, skipped)
    try:
        meta = build_bins(args.out_dir, tokenizer, documents, required=[name for name in files if name],
                          val_fraction=args.val_fraction, made_by=vars(args))
    finally:
        for reason, count in skipped.items():
            print(f"note: skipped {count:,} {reason}")

    # Show the bins, and which of them are thin.
    rows = [["domain", *[f"{split} {unit}" for split in SPLITS for unit in ("documents", "tokens")]]]
    for name, domain in meta["domains"].items():
        rows.append([name, *[f"{domain[split][unit]:,}" for split in SPLITS for unit in ("documents", "tokens")]])
        val = domain["val"]
        if val["documents"] < 20 or val["tokens"] < 20_000:
            print(f"note: {name}: only {val['documents']} validation documents ({val['tokens']:,} tokens) decide r")
    print_table(rows)
    print(f"wrote {args.out_dir}")


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C, so that a build removes its folder
    run_program(main)
