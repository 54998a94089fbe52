"""How fast data.py makes bins, beside the tokenizer's own batch encoding of the same text; and in how much memory.

    python tests/bench_data.py [--mb=200]     a trained BPE of 16k ids, and bytes: about 10 minutes on two cores
    python tests/bench_data.py --memory       1 GiB of text with the bytes tokenizer: the peak memory of data.py

The text is Python's standard library, repeated with other names, as jsonl. data.py is timed as a whole process:
start-up, its pass over the file, and bins synced to disk. The reference's time is that of its encoding calls alone, on
texts in memory. Each run is a fresh process. The first run of each kind is a warm-up; then they alternate. The same
run checks that the bins hold exactly the reference's ids.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tiktoken

from data import run_program

REPEATS = 3
MB = 10**6
DATA_PY = Path(__file__).parents[1] / "data.py"


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


def texts_of(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_bpe(text: Path, folder: Path):
    """A byte-level BPE of 16k ids, as GPT-2's and Qwen's are, from the first 1000 documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=16384, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts_of(text)[:1000], trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def encode_reference(text: Path, tokenizer: Path, out: Path):
    """Encode in batches of 4 MB, print the MB/s of that, and keep the documents' ids, lengths and hashes."""
    if tokenizer == Path("bytes"):
        ranks = {bytes([byte]): byte for byte in range(256)}
        encoding = tiktoken.Encoding("bytes", pat_str=r"(?s).{1,64}", mergeable_ranks=ranks, special_tokens={})
        encode_batch = encoding.encode_ordinary_batch
    else:
        from tokenizers import Tokenizer
        bpe = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        bpe.encode_special_tokens = True

        def encode_batch(batch):
            return bpe.encode_batch_fast(batch, add_special_tokens=False)

    # Cut the texts into batches.
    texts = texts_of(text)
    batches = [[]]
    size = 0
    for document in texts:
        batches[-1].append(document)
        size += len(document)
        if size > 4 * MB:
            batches.append([])
            size = 0

    # Time the encoding alone.
    seconds = 0.0
    ids = []
    for batch in batches:
        started = time.perf_counter()
        encoded = encode_batch(batch)
        seconds += time.perf_counter() - started
        for one in encoded:
            ids.append(np.array(getattr(one, "ids", one), dtype=np.uint16))
    raws = [document.encode() for document in texts]
    np.savez(out, ids=np.concatenate(ids), lengths=[len(one) for one in ids],
             hashes=[sha256(raw).hexdigest() for raw in raws])
    print(sum(map(len, raws)) / MB / seconds)


def fresh(*command: str | Path) -> tuple[str, float, float]:
    """Run in a process of its own: (what it printed, seconds, peak memory in MiB).

    A child's peak begins with its parent's memory, so this program stays small: it never holds the text or the ids."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{printed}")
    return printed.strip(), time.perf_counter() - started, usage.ru_maxrss / 2**10


def check_ids(bins: Path, reference: Path):
    """Exit unless the bins hold the reference's ids, split by hash; prints the number of tokens."""
    meta = json.loads((bins / "meta.json").read_text())
    domain = meta["domains"]["text"]
    held = np.load(reference)
    documents = np.split(held["ids"], np.cumsum(held["lengths"])[:-1])
    order = np.argsort(held["hashes"])
    n_val = domain["val"]["documents"]
    n_tokens = 0
    for side, expected in (("val", order[:n_val]), ("train", order[n_val:])):
        file = domain[side]["file"]
        tokens = np.fromfile(bins / file, dtype=np.dtype(domain["dtype"]).newbyteorder("<"))
        ends = np.flatnonzero(tokens == meta["tokenizer"]["eot"])
        got = [tokens[start:end].tobytes() for start, end in zip([0, *(ends[:-1] + 1)], ends)]
        wanted = [documents[i].tobytes() for i in expected]
        # Validation is in the order of the hashes. Train documents come in any order.
        same = got == wanted if side == "val" else Counter(got) == Counter(wanted)
        if not same or ends[-1] + 1 != len(tokens):
            raise SystemExit(f"{file}: not the ids of the tokenizer's own batch encoding")
        n_tokens += len(tokens)
    print(f"{n_tokens:,}")


def bench(scratch: Path, text: Path, tokenizer: str, name: str):
    """Print the rows of one tokenizer."""
    ours = []
    theirs = []
    peaks = []
    for repeat in range(1 + REPEATS):
        bins = scratch / f"{name}.{repeat}"
        _, seconds, peak = fresh(DATA_PY, f"--out_dir={bins}", f"--tokenizer={tokenizer}", f"text={text}")
        printed, _, _ = fresh(__file__, "reference", text, tokenizer, scratch / f"{name}.npz")
        if repeat == 0:  # the warm-up
            tokens, _, _ = fresh(__file__, "check", bins, scratch / f"{name}.npz")
        else:
            domain = json.loads((bins / "meta.json").read_text())["domains"]["text"]
            ours.append((domain["train"]["bytes"] + domain["val"]["bytes"]) / MB / seconds)
            theirs.append(float(printed))
            peaks.append(peak)
        for file in bins.iterdir():
            file.unlink()
    ratios = [a / b for a, b in zip(ours, theirs)]
    for label, values, form in (("data.py, MB/s", ours, ".1f"), ("batch encoding, MB/s", theirs, ".1f"),
                                ("ratio", ratios, ".2f"), ("data.py's peak, MiB", peaks, ",.0f")):
        print(f"{name:8}{label:24}{statistics.median(values):10{form}}   {min(values):{form}} … {max(values):{form}}")
    print(f"{name:8}{'ids':24}{tokens:>10}   equal to the tokenizer's own", flush=True)


def main():
    parser = argparse.ArgumentParser(description="How fast data.py makes bins, and in how much memory.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mb", type=int, default=200, help="megabytes of text")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory on 1 GiB of text instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        text = scratch / "text.jsonl"
        write_text(text, 2**30 if arguments.memory else arguments.mb * MB)
        if arguments.memory:
            _, seconds, peak = fresh(DATA_PY, f"--out_dir={scratch / 'bins'}", "--tokenizer=bytes", f"text={text}")
            print(f"1 GiB of text, bytes: {seconds:.0f} s; peak memory {peak:,.0f} MiB, "
                  f"{'under' if peak < 1024 else 'NOT UNDER'} 1 GiB")
            sys.exit(peak >= 1024)
        fresh(__file__, "train", text, scratch / "bpe")
        print(f"{os.cpu_count()} cores, {arguments.mb} MB, median of {REPEATS} and their spread\n")
        bench(scratch, text, str(scratch / "bpe"), "bpe 16k")
        bench(scratch, text, "bytes", "bytes")


if __name__ == "__main__":
    # The parts run in processes that this program starts.
    PARTS = {"train": train_bpe, "reference": encode_reference, "check": check_ids}
    if len(sys.argv) > 1 and sys.argv[1] in PARTS:
        PARTS[sys.argv[1]](*map(Path, sys.argv[2:]))
    else:
        run_program(main)
