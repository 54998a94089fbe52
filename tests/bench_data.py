"""Compare data.py with two usual ways to make bins: time and memory.

    python tests/bench_data.py [--mb=100] [--tokenizer=TOK …]    a trained BPE of 16k ids and bytes, or each TOK
    python tests/bench_data.py --memory [--tokenizer=TOK]        1 GiB of text: the peak memory of data.py

nanoGPT maps Hugging Face's datasets, and Megatron has a pool of processes that take lines in turn. Both call the
tokenizer for one text at a time, with a process per core. The program skips a way whose packages are not installed. TOK
is bytes, a tiktoken encoding, or a folder with a tokenizer.json and a tokenizer_config.json.

The text is Python's standard library, repeated with other names, as jsonl. The time is that of
the whole program: start-up, its pass over the file, and writing. CPU seconds include all its processes. Each run is a
fresh process. The first run of each way is a warm-up; then they alternate. The same run checks that all ways write the
same documents.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tiktoken

from data import run_program

REPEATS = 3
MB = 10**6
CORES = os.cpu_count()
DATA_PY = Path(__file__).parents[1] / "data.py"
END_OF_TEXT = "<|endoftext|>"


def write_text(path: Path, n_bytes: int):
    """About `n_bytes` of documents, all different, one a line."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = [source for source in sorted(root.rglob("*.py")) if "site-packages" not in source.parts]
    written = 0
    repeat = 0
    with open(path, "w", encoding="utf-8") as file:
        while True:
            for source in sources:
                text = source.read_text(encoding="utf-8", errors="ignore").replace("self", f"own{repeat}")
                text = f"# {source.relative_to(root)}, {repeat}\n{text}"
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= n_bytes:
                    return
            repeat += 1


def train_bpe(text: str, folder: str):
    """A byte-level BPE of 16k ids, as GPT-2's and Qwen's are, from the first 1000 documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=16384, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    with open(text, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(1000))]
    bpe.train_from_iterator(texts, trainer)
    os.mkdir(folder)
    bpe.save(f"{folder}/tokenizer.json")
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))


def load_encode(tokenizer: str):
    """Return a function that encodes a text with the tokenizer's own library, and the id that ends a document."""
    if tokenizer == "bytes":
        return (lambda text: list(text.encode())), 256
    if not os.path.isdir(tokenizer):
        encoding = tiktoken.get_encoding(tokenizer)
        return encoding.encode_ordinary, encoding.eot_token
    from tokenizers import Tokenizer
    loaded = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    loaded.encode_special_tokens = True
    eot = json.loads(Path(tokenizer, "tokenizer_config.json").read_text())["eos_token"]
    return (lambda text: loaded.encode(text, add_special_tokens=False).ids), loaded.token_to_id(eot)


def nanogpt(text: str, tokenizer: str, dtype: str, out: str):
    """As nanoGPT's data/openwebtext/prepare.py."""
    from datasets import disable_progress_bars, load_dataset
    disable_progress_bars()
    encode, eot = load_encode(tokenizer)

    def process(example):
        ids = encode(example["text"])
        ids.append(eot)
        return {"ids": ids, "len": len(ids)}

    texts = load_dataset("json", data_files=text, split="train", cache_dir=f"{out}.cache")
    tokenized = texts.map(process, remove_columns=["text"], num_proc=CORES)
    arr = np.memmap(out, dtype=dtype, mode="w+", shape=(sum(tokenized["len"]),))
    shards = min(1024, len(tokenized))
    start = 0
    for i in range(shards):
        batch = tokenized.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"][:])
        arr[start:start + len(ids)] = ids
        start += len(ids)
    arr.flush()


def start_worker(tokenizer: str):
    global encode, eot
    encode, eot = load_encode(tokenizer)


def encode_line(line: str) -> list[int]:
    return [*encode(json.loads(line)["text"]), eot]


def megatron(text: str, tokenizer: str, dtype: str, out: str):
    """As Megatron-LM's tools/preprocess_data.py."""
    with (open(text, encoding="utf-8") as lines, open(out, "wb") as file,
          multiprocessing.Pool(CORES, initializer=start_worker, initargs=(tokenizer,)) as pool):
        for ids in pool.imap(encode_line, lines, 32):
            file.write(np.array(ids, dtype=dtype).tobytes())


def check(bins: str, *others: str):
    """Exit unless all files hold the documents of the bins, in any order; prints the number of tokens."""
    meta = json.loads(Path(bins, "meta.json").read_text())
    domain = meta["domains"]["text"]
    dtype = np.dtype(domain["dtype"])

    def content(*paths: Path) -> list[bytes]:
        hashes = []
        for path in paths:
            tokens = np.fromfile(path, dtype=dtype)
            ends = np.flatnonzero(tokens == meta["tokenizer"]["eot"]) + 1
            assert ends[-1] == len(tokens), f"{path}: ends in the middle of a document"
            hashes += [sha256(document.tobytes()).digest() for document in np.split(tokens, ends[:-1])]
        return sorted(hashes)

    ours = content(*(Path(bins, domain[side]["file"]) for side in ("train", "val")))
    for other in others:
        assert content(Path(other)) == ours, f"{other}: holds other documents"
    print(f"{domain['train']['tokens'] + domain['val']['tokens']:,}")


def fresh(*command: str | Path) -> tuple[str, float, float, float]:
    """Run in a process of its own: (what it printed, seconds, CPU seconds of it and its children, peak MiB of one).

    A child's peak begins with its parent's memory, so this program stays small: it never holds the text or the ids."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{printed}")
    return printed.strip(), time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**10


def bench(scratch: Path, text: Path, tokenizer: str, name: str):
    """Print the rows of one tokenizer."""
    ways = {"data.py": None, "nanoGPT's way": "nanogpt", "Megatron's way": "megatron"}
    if importlib.util.find_spec("datasets") is None:
        print("nanoGPT's way is left out: pip install datasets")
        del ways["nanoGPT's way"]
    measured = {way: [] for way in ways}
    for repeat in range(1 + REPEATS):
        outputs = []
        for way, part in ways.items():
            outputs.append(scratch / f"{name}.{repeat}.{part}")
            command = [__file__, part, text, tokenizer, outputs[-1]]
            if part is None:
                command = [DATA_PY, f"--out_dir={outputs[0]}", f"--tokenizer={tokenizer}", f"text={text}"]
            else:
                command.insert(4, domain["dtype"])
            _, seconds, cpu_seconds, peak = fresh(*command)
            domain = json.loads((outputs[0] / "meta.json").read_text())["domains"]["text"]
            n_mb = (domain["train"]["bytes"] + domain["val"]["bytes"]) / MB
            if repeat > 0:  # the first is the warm-up
                measured[way].append((cpu_seconds / n_mb, n_mb / seconds, peak))
        if repeat == 0:
            tokens, *_ = fresh(__file__, "check", *outputs)
        subprocess.run(["rm", "-r", *scratch.glob(f"{name}.{repeat}.*")], check=True)
    for way, rows in measured.items():
        line = f"{name:14}{way:16}"
        for values, form in zip(zip(*rows), (".4f", ".1f", ",.0f")):
            line += f"{statistics.median(values):10{form}} ({min(values):{form}} – {max(values):{form}})"
        print(line)
    print(f"{name:14}{tokens} ids, the same documents in all\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description="How fast data.py makes bins, and in how much memory.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mb", type=int, default=100, help="megabytes of text")
    parser.add_argument("--tokenizer", action="append", help="bytes, a tiktoken encoding or a folder; may be repeated")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory on 1 GiB of text instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        text = scratch / "text.jsonl"
        write_text(text, 2**30 if arguments.memory else arguments.mb * MB)
        if arguments.memory:
            for tokenizer in arguments.tokenizer or ["bytes"]:
                _, seconds, _, peak = fresh(DATA_PY, f"--out_dir={scratch}/{Path(tokenizer).name}",
                                            f"--tokenizer={tokenizer}", f"text={text}")
                print(f"1 GiB of text, {Path(tokenizer).name}: {seconds:.0f} s; peak memory {peak:,.0f} MiB")
            return
        print(f"{CORES} cores, {arguments.mb} MB, median of {REPEATS} and their spread\n")
        print(f"{'':30}{'CPU s per MB':>14}{'MB/s':>24}{'peak MiB of a process':>36}")
        if not arguments.tokenizer:
            fresh(__file__, "train_bpe", text, scratch / "bpe-16k")
        for tokenizer in arguments.tokenizer or [str(scratch / "bpe-16k"), "bytes"]:
            bench(scratch, text, tokenizer, Path(tokenizer).name)


if __name__ == "__main__":
    # The parts run in processes that this program starts.
    PARTS = {part.__name__: part for part in (train_bpe, nanogpt, megatron, check)}
    if len(sys.argv) > 1 and sys.argv[1] in PARTS:
        PARTS[sys.argv[1]](*sys.argv[2:])
    else:
        run_program(main)
