"""How fast data.py makes bins, beside the tokenizer's own batch encoding of the same text; and in how much memory.

    python tests/bench_data.py [--mb=200]     a trained BPE of 16k ids, and bytes: about 10 minutes on two cores
    python tests/bench_data.py --memory       1 GiB of text with the bytes tokenizer: the peak memory of data.py

Text is Python's standard library, repeated with other names, as jsonl. data.py is timed as a whole process: start-up,
two passes over the file, and bins synced to disk. The reference's time is that of its encoding calls alone, on texts
that lie in memory. Each run is a fresh process; one of each kind goes before to warm up; then they alternate. That the
bins hold exactly the reference's ids is checked in the same run.
"""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from data import load_tokenizer, option, parse_config, run_program

REPEATS, MB = 3, 10**6
DATA_PY = Path(__file__).parents[1] / "data.py"


@dataclass
class Config:
    """Keys of `python tests/bench_data.py`."""
    mb: int = option(200, "megabytes of text", least=1)
    memory: bool = option(False, "measure the peak memory on 1 GiB of text instead")


def write_text(path: Path, n_bytes: int):
    """About `n_bytes` of documents, all different, one a line."""
    root, written = Path(sysconfig.get_path("stdlib")), 0
    sources = [source for source in sorted(root.rglob("*.py")) if "site-packages" not in source.parts]
    with open(path, "w", encoding="utf-8") as file:
        for repeat in range(10**6):
            for source in sources:
                text = source.read_text(encoding="utf-8", errors="ignore").replace("self", f"own{repeat}")
                text = f"# {source.relative_to(root)}, {repeat}\n{text}"
                file.write(json.dumps({"text": text}) + "\n")
                if (written := written + len(text.encode())) >= n_bytes:
                    return


def texts_of(path: Path, n_bytes: int = 2**62) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        texts = []
        for line in lines:
            texts.append(json.loads(line)["text"])
            if (n_bytes := n_bytes - len(texts[-1])) < 0:
                break
    return texts


def train_bpe(text: Path, folder: Path):
    """A byte-level BPE of 16k ids, as GPT-2's and Qwen's are, from the first 10 MB."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts_of(text, 10 * MB), trainers.BpeTrainer(
        vocab_size=16384, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def encode_reference(text: Path, tokenizer: Path, out: Path):
    """Encode in batches of 4 MB, print the MB/s of that, and keep ids, lengths and hashes of the documents."""
    if tokenizer == Path("bytes"):
        encode_batch = load_tokenizer("bytes").decode.__self__.encode_ordinary_batch  # tiktoken's Encoding
    else:
        from tokenizers import Tokenizer
        bpe = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        bpe.encode_special_tokens = True

        def encode_batch(batch):
            return bpe.encode_batch_fast(batch, add_special_tokens=False)
    texts, batches, size = texts_of(text), [[]], 0
    for document in texts:
        batches[-1].append(document)
        if (size := size + len(document)) > 4 * MB:
            batches.append([])
            size = 0
    seconds, ids = 0.0, []
    for batch in batches:
        started = time.perf_counter()
        encoded = encode_batch(batch)
        seconds += time.perf_counter() - started
        ids += [np.array(getattr(one, "ids", one), dtype=np.uint16) for one in encoded]
    np.savez(out, ids=np.concatenate(ids), lengths=[len(one) for one in ids],
             hashes=[sha256(document.encode()).hexdigest() for document in texts])
    print(sum(len(document.encode()) for document in texts) / MB / seconds)


def fresh(*command: str | Path) -> tuple[str, float, float]:
    """Run in a process of its own: (what it printed last, seconds, peak memory in MiB).

    A child's peak begins with its parent's memory, so this program keeps small: it never holds the text or the ids."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{printed}")
    lines = printed.splitlines()
    return lines[-1] if lines else "", time.perf_counter() - started, usage.ru_maxrss / 2**10


def check_ids(bins: Path, reference: Path):
    """Exit unless the bins hold the reference's ids, split by hash; prints the number of tokens."""
    meta, held = json.loads((bins / "meta.json").read_text()), np.load(reference)
    domain, hashes, ends = meta["domains"]["text"], held["hashes"], np.cumsum(held["lengths"])
    documents = [np.append(held_ids, meta["tokenizer"]["eot"]) for held_ids in np.split(held["ids"], ends[:-1])]
    validation = np.argsort(hashes)[:domain["val"]["documents"]]
    train = np.setdiff1d(np.arange(len(hashes)), validation)
    for entry, wanted in ((domain["train"][0], train), (domain["val"], validation)):
        got = np.fromfile(bins / entry["file"], dtype=np.dtype(domain["dtype"]).newbyteorder("<"))
        if not np.array_equal(got, np.concatenate([documents[i] for i in wanted])):
            raise SystemExit(f"{entry['file']}: not the ids of the tokenizer's own batch encoding")
    print(f"{len(held['ids']) + len(documents):,}")


def bench(scratch: Path, text: Path, tokenizer: str, name: str):
    """Print the rows of one tokenizer."""
    ours, theirs, peaks = [], [], []
    for repeat in range(1 + REPEATS):
        bins = scratch / f"{name}.{repeat}"
        _, seconds, peak = fresh(DATA_PY, f"--out_dir={bins}", f"--tokenizer={tokenizer}", f"text={text}")
        printed, _, _ = fresh(__file__, "reference", text, tokenizer, scratch / f"{name}.npz")
        if repeat:  # the first is the warm-up
            domain = json.loads((bins / "meta.json").read_text())["domains"]["text"]
            ours.append((domain["train"][0]["bytes"] + domain["val"]["bytes"]) / MB / seconds)
            theirs.append(float(printed))
            peaks.append(peak)
        else:
            tokens, _, _ = fresh(__file__, "check", bins, scratch / f"{name}.npz")
        for file in bins.iterdir():
            file.unlink()
    ratios = [a / b for a, b in zip(ours, theirs)]
    for label, values, form in (("data.py, MB/s", ours, ".1f"), ("batch encoding, MB/s", theirs, ".1f"),
                                ("ratio", ratios, ".2f"), ("data.py's peak, MiB", peaks, ",.0f")):
        print(f"{name:8}{label:24}{statistics.median(values):10{form}}   {min(values):{form}} … {max(values):{form}}")
    print(f"{name:8}{'ids':24}{tokens:>10}   equal to the tokenizer's own", flush=True)


def main():
    parts = {"train": train_bpe, "reference": encode_reference, "check": check_ids}
    if len(sys.argv) > 1 and sys.argv[1] in parts:  # a process that this program started
        return parts[sys.argv[1]](*map(Path, sys.argv[2:]))
    config = parse_config(Config)
    with tempfile.TemporaryDirectory() as scratch:
        scratch, text = Path(scratch), Path(scratch) / "text.jsonl"
        write_text(text, 2**30 if config.memory else config.mb * MB)
        if config.memory:
            _, seconds, peak = fresh(DATA_PY, f"--out_dir={scratch / 'bins'}", "--tokenizer=bytes", f"text={text}")
            print(f"1 GiB of text, bytes: {seconds:.0f} s; peak memory {peak:,.0f} MiB, "
                  f"{'under' if peak < 1024 else 'NOT UNDER'} 1 GiB")
            sys.exit(peak >= 1024)
        fresh(__file__, "train", text, scratch / "bpe")
        print(f"{os.cpu_count()} cores, {config.mb} MB, median of {REPEATS} and their spread\n")
        bench(scratch, text, str(scratch / "bpe"), "bpe 16k")
        bench(scratch, text, "bytes", "bytes")


if __name__ == "__main__":
    run_program(main)
