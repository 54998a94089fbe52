"""The paper's comparison at a small scale: every arm and ablation over several seeds, tables, claims, figures.

    python tests/compare_arms.py --seeds=5 --arms=ddk,ddk_es,kd,cpt       the quickstart's setting
    python tests/compare_arms.py --setting=larger --seeds=3 --arms=ddk,kd  a BPE tokenizer, a larger teacher
    python tests/compare_arms.py --setting=real --teacher=DIR --seeds=2 --arms=ddk,ddk_es,kd     a pretrained teacher
    python tests/compare_arms.py --code=ted --arms=ted     a fork's arm beside those that have run; ted/ has its files
    python tests/compare_arms.py --gains=assets/quickstart.json,assets/even.json       what DDK gains in which setting

The teacher is made once, or given. A seed makes its own student base, by another initialization and another order of
its data, and orders the data of the runs that start from it: the spread over seeds is that of all but the teacher and
the text. (In the real setting all seeds share one base.) Runs are distill.py's own (`train`), one after the other,
in `out_dir`; the same command again continues where it was stopped. What each run gave is kept in `results`, from which
tables and figures are made, also without the runs.

Perplexities and ratios at the end are of the test windows, which never update r.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# The four files are imported from --code, so it has to be known before the other arguments are read.
CODE_PARSER = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
CODE_PARSER.add_argument("--code", default=str(Path(__file__).parents[1]),
                         help="folder of a fork's four files, whose arms are run (default: the project's own)")
CODE = CODE_PARSER.parse_known_args()[0].code
sys.path.insert(0, CODE)

import torch

import distill
from data import (TokenBins, UserError, build_bins, file_sha256, import_optional, load_tokenizer, quickstart_documents,
                  run_program, write_text)
from sample_mixture import read_metrics, replay

# name → the keys that differ from DDK's, which has the paper's values but for the quickstart's K
ARMS = {
    "ddk": {},
    "ddk_no_fs": {"method": "ddk_no_fs"},
    "ddk_es": {"method": "ddk_es"},
    "kd": {"method": "kd"},
    "ted": {"method": "ted"},
    "minillm": {"method": "minillm"},
    "cpt_doremi": {"method": "cpt"},  # in the mixture of the proxy, see run_arm
    "cpt": {"method": "cpt"},
}
for method in distill.ARMS:  # and what a fork has besides; doremi_proxy is a stage of cpt_doremi
    if method not in (*ARMS, "doremi_proxy"):
        ARMS[method] = {"method": method}
FORKS = {"ted": "ted", "cpt_doremi": "doremi"}  # arms that are forks → the diff in tests/forks
ABLATIONS = {
    **{f"gamma={value}": {"gamma": value} for value in (0.0, 0.1, 0.3, 0.5)},
    **{f"temperature={value}": {"temperature": value} for value in (0.1, 0.2, 0.5, 2.0)},
    **{f"interval={value}": {"interval": value} for value in (5, 15, 20, 50)},
    **{f"alpha={value}": {"alpha": value} for value in (0.0, 0.25, 0.75, 1.0)},
}
# The paper's claims: text, the arm that is to be lower, the other
CLAIMS = [
    ("DDK above KD (Table 1)", "ddk", "kd"),
    ("KD above TED (Table 1)", "kd", "ted"),
    ("KD above MiniLLM (Table 1)", "kd", "minillm"),
    ("MiniLLM above CPT&DoReMi (Table 1)", "minillm", "cpt_doremi"),
    ("CPT&DoReMi above CPT (Table 1)", "cpt_doremi", "cpt"),
    ("KD above CPT (Table 1)", "kd", "cpt"),
    ("factor smoothing helps (Table 5)", "ddk", "ddk_no_fs"),
    ("DDK above equal sampling (Table 5)", "ddk", "ddk_es"),
    ("equal sampling above KD (Tables 5 and 1)", "ddk_es", "kd"),
    *[(f"γ = 0.2 above {value}", "ddk", f"gamma={value}") for value in (0.0, 0.1, 0.3, 0.5)],
    *[(f"T = 1 above {value}", "ddk", f"temperature={value}") for value in (0.1, 0.2, 0.5, 2.0)],
]
# At the end, on the test windows; the last is of the validation windows, which update r
MEASURES = {"mean_ppl": "average perplexity", "mean_ratio": "mean ratio", "worst_ratio": "worst ratio",
            "val_worst_ratio": "worst ratio, validation"}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided 95 %, from 1 degree of freedom
OWN_KEYS = ("method", "seed", "teacher", "student", "out_dir")  # of distill.py, which each run has its own of


@dataclass
class Setting:
    """Data, models and steps that all arms share. teacher, student: keys of the runs that train them."""
    n_bytes: dict
    teacher: dict | None  # None: --teacher names a folder, whose tokenizer the bins have
    student: dict
    vocab_size: int = 0  # of a BPE trained on the text; 0: bytes
    keys: dict = field(default_factory=dict)
    one_base: bool = False  # of seed 0, for all seeds
    origin: str = ""  # the setting whose bins and teacher this one uses; its own if empty


QUICKSTART = distill.quickstart_models(distill.Config().pretrain_steps)
QUICKSTART_KEYS = {"test_samples": 104}  # nearly all that the half for tests holds, so that they are of more documents
WINDOW_RULE = "evenly spaced over each half"  # by which windows are chosen; runs by another are not compared
SETTINGS = {
    "quickstart": Setting(distill.QUICKSTART_BYTES, QUICKSTART["teacher"], QUICKSTART["student"],
                          keys=QUICKSTART_KEYS),
    # The teacher sees the small domains more often than their size, but not so often that it learns them by heart.
    "larger": Setting(
        n_bytes={"python": 14_000_000, "cpp": 10_000_000, "math": 1_500_000, "prose": 800_000},
        teacher={**QUICKSTART["teacher"], "student": "scratch:6x256", "max_steps": 2000, "batch_size": 16,
                 "mixture": "python=3,cpp=3,math=2,prose=1"},
        student={**QUICKSTART["student"], "student": "scratch:3x128", "max_steps": 400, "batch_size": 16,
                 "mixture": "python=.495,cpp=.495,math=.005,prose=.005"},
        vocab_size=4096, keys={"max_steps": 400, "interval": 20, "val_samples": 40, "test_samples": 40,
                               "batch_size": 16, "dtype": "bfloat16", "save_every": 100}),
    # The quickstart's, with bases that are less and more unequal
    "even": Setting(distill.QUICKSTART_BYTES, QUICKSTART["teacher"], keys=QUICKSTART_KEYS, origin="quickstart",
                    student={**QUICKSTART["student"], "mixture": "python=1,cpp=1,math=1,prose=1"}),
    "unequal": Setting(distill.QUICKSTART_BYTES, QUICKSTART["teacher"], keys=QUICKSTART_KEYS, origin="quickstart",
                       student={**QUICKSTART["student"], "mixture": "python=.49,cpp=.01,math=.01,prose=.49"}),
    # Ten of the teacher's layers, which have to learn to work together first: by KD, on little but source code
    "real": Setting(
        n_bytes={"python": 5_000_000, "cpp": 2_000_000, "math": 1_000_000, "prose": 600_000}, teacher=None,
        student={"student": "layers:10", "method": "kd", "max_steps": 160, "warmup_steps": 16, "lr": 1e-3,
                 "min_lr": 1e-4, "mixture": "python=.45,cpp=.45,math=.05,prose=.05"},
        keys={"max_steps": 100, "warmup_steps": 10, "interval": 20, "val_samples": 24, "test_samples": 24,
              "batch_size": 4, "dtype": "bfloat16", "save_every": 50}, one_base=True),
}

# ----------------------------------------------- Runs ---------------------------------------------------------------


def make_bins(setting: Setting, data_dir: Path, teacher: str):
    """Bins of the setting's text, and its tokenizer, unless they are there."""
    if (data_dir / "meta.json").is_file():
        return
    print(f"Collecting text into {data_dir} …", flush=True)
    tokenizer = teacher or "bytes"
    if setting.vocab_size:
        tokenizer = data_dir.with_name(f"{data_dir.name}-tokenizer")
        train_bpe(setting, tokenizer)
    build_bins(data_dir, load_tokenizer(tokenizer), quickstart_documents(setting.n_bytes), val_fraction=0.1)


def train_bpe(setting: Setting, folder: Path):
    tokenizers = import_optional("tokenizers", "--setting=larger")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=setting.vocab_size, special_tokens=["<|endoftext|>"],
                                             show_progress=False, initial_alphabet=byte_level.alphabet())
    bpe.train_from_iterator((text for _, text in quickstart_documents(setting.n_bytes)), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    write_text(folder / "tokenizer_config.json", json.dumps({"eos_token": "<|endoftext|>"}))


def run(config: distill.Config) -> Path:
    """`train`, and what the arm does at its end; what it prints goes to `out_dir`.log."""
    problems = distill.contradictions(config)
    if problems:
        raise UserError("\n".join(problems))
    Path(config.out_dir).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{config.out_dir}.log", "a", encoding="utf-8") as log, redirect_stdout(log):
        folder = distill.train(config)
        distill.report(config, folder)
    return folder


def run_arm(name: str, keys: dict) -> Path:
    """One arm at one seed. CPT&DoReMi is three runs: the reference is the cpt arm, the proxy finds the mixture."""
    out_dir = Path(keys["out_dir"])
    if name == "cpt_doremi":
        seed = keys["seed"]
        base_keys = {**keys, "method": "cpt", "out_dir": str(out_dir.with_name(f"cpt-{seed}"))}
        reference = run(distill.resolve_config(base_keys))
        proxy_dir = out_dir.with_name(f"doremi_proxy-{seed}")
        proxy_keys = {**keys, "method": "doremi_proxy", "teacher": str(reference), "out_dir": str(proxy_dir)}
        run(distill.resolve_config(proxy_keys))
        keys = {**keys, "mixture": (proxy_dir / "mixture.txt").read_text(encoding="utf-8").strip()}
    return run(distill.resolve_config(keys))


def experiment(setting: Setting, common: dict, name: str, steps: int) -> dict:
    """All that a run of an arm follows from, but for its seed, to be kept with what it gave."""
    config = asdict(distill.resolve_config({**common, "preset": "quickstart", **(ARMS | ABLATIONS)[name]}))
    keys = {entry.name: config[entry.name] for entry in fields(distill.Config)
            if not entry.metadata["may_change"] and entry.name not in OWN_KEYS}
    return {"setting": asdict(setting), "steps": steps, "keys": keys}


def documents(config: distill.Config) -> dict[str, list[int]]:
    """Domain → how many documents its validation windows are cut from, and its test windows."""
    bins = distill.open_bins(config)
    counts = {}
    for name in bins.names:
        counts[name] = [bins.eval_documents(name, "val", config.val_samples),
                        bins.eval_documents(name, "test", config.test_samples)]
    return counts


def summary(out_dir: Path) -> dict:
    """What a finished run gave, from its metrics.jsonl, whose perplexities have to replay its r."""
    metrics = read_metrics(out_dir / "metrics.jsonl")
    run_line = next(line for line in metrics if line["kind"] == "run")
    end = next(line for line in metrics if line["kind"] == "end")["domains"]
    mixtures = [line for line in metrics if line["kind"] == "mixture"]
    replayed = replay(mixtures, run_line["rule"], run_line["natural"], run_line["config"]["alpha"])
    for line, r in zip(mixtures, replayed, strict=True):
        assert all(abs(line["r"][name] - r[name]) < 1e-9 for name in r), f"{out_dir}: r does not follow at {line}"
    ratios = [domain["test_ratio"] for domain in end.values()]
    first_ratios = [domain["ratio"] for domain in mixtures[0]["domains"].values()]
    return {
        "versions": run_line["versions"],
        "documents": documents(distill.Config(**run_line["config"])),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "mean_ppl": statistics.mean(domain["test_student_ppl"] for domain in end.values()),
        "mean_ratio": statistics.mean(ratios),
        "worst_ratio": max(ratios),
        "val_worst_ratio": max(domain["ratio"] for domain in end.values()),
        "val_mean_ratio": statistics.mean(domain["ratio"] for domain in end.values()),
        "first_worst_ratio": max(first_ratios),
        "end": end,
        "steps": [line["step"] for line in mixtures],
        "r": {name: [round(line["r"][name], 5) for line in mixtures] for name in end},
        "ratio": {name: [round(line["domains"][name]["ratio"], 5) for line in mixtures] for name in end},
    }


# ----------------------------------------------- Tables -------------------------------------------------------------


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; of one value the error is not known."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def paired(results: dict, first: str, second: str, measure: str) -> list[float]:
    """first − second at each seed that both have: what the arms share drops out."""
    seeds = results.get(first, {}).keys() & results.get(second, {}).keys()
    return [results[first][seed][measure] - results[second][seed][measure] for seed in sorted(seeds, key=int)]


def table(results: dict, names, measures) -> list[str]:
    """A row for each arm that has run: seeds, and mean ± standard error of each measure."""
    lines = ["| | seeds | " + " | ".join(MEASURES[measure] for measure in measures) + " |",
             "|---" * (len(measures) + 2) + "|"]
    for name in names:
        if name not in results:
            continue
        row = f"| `{name}` | {len(results[name])} |"
        for measure in measures:
            row += f" {format_mean([one[measure] for one in results[name].values()])} |"
        lines.append(row)
    return lines


def ablations_table(results: dict) -> list[str]:
    """A row for each ablation that has run, and its differences from DDK, paired by seed: above 0 is worse than DDK."""
    measures = ("worst_ratio", "mean_ratio")
    lines = ["| | seeds | " + " | ".join(f"{MEASURES[measure]} | less `ddk`'s" for measure in measures) + " |",
             "|---" * 6 + "|"]
    for name in ABLATIONS:
        if name not in results:
            continue
        row = f"| `{name}` | {len(results[name])} |"
        for measure in measures:
            differences = paired(results, name, "ddk", measure)
            row += f" {format_mean([one[measure] for one in results[name].values()])} |"
            row += f" {format_mean(differences, '+')} |" if differences else " |"
        lines.append(row)
    return lines


def domains_table(results: dict, names) -> list[str]:
    """Perplexity on the test windows per domain: the teacher's, and each arm's mean over seeds with its mean ratio."""
    ends = {name: [one["end"] for one in results[name].values()] for name in names if name in results}
    domains = next(iter(ends.values()))[0]
    lines = ["| | " + " | ".join(domains) + " |", "|---" * (len(domains) + 1) + "|"]
    row = "| teacher |"
    for numbers in domains.values():
        row += f" {numbers['test_teacher_ppl']:.2f} |"
    lines.append(row)
    for name, runs in ends.items():
        row = f"| `{name}` |"
        for domain in domains:
            ppl = statistics.mean(end[domain]["test_student_ppl"] for end in runs)
            ratio = statistics.mean(end[domain]["test_ratio"] for end in runs)
            row += f" {ppl:.2f} ({ratio:.2f}) |"
        lines.append(row)
    return lines


def format_mean(values: list[float], sign: str = "", digits: int = 3) -> str:
    mean, error = mean_and_error(values)
    text = f"{mean:{sign}.{digits}f}"
    if not math.isnan(error):
        text += f" ± {error:.{digits}f}"
    return text


def verdicts(results: dict) -> list[str]:
    """Each claim on which at least three seeds can say something, with the paired difference; lower is better.

    Decided where the mean is further from 0 than Student's t allows at 95 %: 4.3 standard errors with 3 seeds, 2.8 with
    5. Not corrected for the number of claims."""
    measures = ("mean_ratio", "worst_ratio")
    lines = ["| The paper | " + " | ".join(f"{MEASURES[measure]} | seen" for measure in measures) + " |",
             "|---" * 5 + "|"]
    for claim, better, worse in CLAIMS:
        row = f"| {claim} |"
        n = 0
        for measure in measures:
            differences = paired(results, better, worse, measure)
            n = len(differences)
            if n >= 3:
                row += f" {format_mean(differences, '+', 4)} | {seen(differences)} |"
        if n >= 3:
            lines.append(row)
    return lines


def seen(differences: list[float]) -> str:
    mean, error = mean_and_error(differences)
    degrees = len(differences) - 1
    if abs(mean) <= error * T95[min(degrees, len(T95)) - 1]:
        return "cannot be told"
    return "holds" if mean < 0 else "does not hold at this scale"


# ----------------------------------------------- Figures and report -------------------------------------------------


def mean_curves(runs: dict, key: str) -> dict[str, list[float]]:
    """Domain → the mean over seeds of r or of the ratio, at each evaluation."""
    every = [one[key] for one in runs.values()]
    return {name: [statistics.mean(values) for values in zip(*[one[name] for one in every])] for name in every[0]}


def domains_figure(results: dict, path: Path):
    """Ratios and r per domain over the steps, for DDK and KD: the mean over seeds, and each seed as a thin line."""
    figure = import_optional("matplotlib.figure", "figures").Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = [("ddk", "ratio", "DDK: perplexity, student / teacher"), ("kd", "ratio", "KD: the same"),
              ("ddk", "r", "DDK: r of the next interval")]
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
    for ax, (arm, key, title) in zip(axes, panels):
        steps = next(iter(results[arm].values()))["steps"]
        for colour, (name, values) in zip(colours, mean_curves(results[arm], key).items()):
            for one in results[arm].values():
                ax.plot(steps, one[key][name], color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(steps, values, color=colour, label=name)
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
    axes[1].sharey(axes[0])
    axes[2].set_ylim(0, None)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def arms_figure(results: dict, names: list[str], path: Path):
    """Worst and mean ratio of each arm: a point per seed, and the mean with two standard errors."""
    figure = import_optional("matplotlib.figure", "figures").Figure(figsize=(9, 0.4 * len(names) + 1.2),
                                                                     layout="constrained")
    for ax, measure in zip(figure.subplots(1, 2, sharey=True), ("worst_ratio", "mean_ratio")):
        for place, name in enumerate(names):
            values = [one[measure] for one in results[name].values()]
            mean, error = mean_and_error(values)
            ax.plot(values, [place] * len(values), "o", color="#999999", markersize=3)
            if not math.isnan(error):
                ax.errorbar(mean, place, xerr=2 * error, fmt="|", color="#0072b2", capsize=3, markersize=10)
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel=MEASURES[measure])
        ax.grid(axis="x", alpha=0.3)
    ax.invert_yaxis()
    figure.savefig(path, dpi=110)


def write_report(results: dict, setting: str, folder: Path):
    """Write SETTING.md and the figures, and print the former."""
    folder.mkdir(parents=True, exist_ok=True)
    arms = [name for name in dict.fromkeys([*ARMS, *results]) if name in results and name not in ABLATIONS]
    first = [one["first_worst_ratio"] for runs in results.values() for one in runs.values()]
    apart = [abs(domain["test_ratio"] / domain["ratio"] - 1) for name in arms for one in results[name].values()
             for domain in one["end"].values()]
    some_run = next(iter(next(iter(results.values())).values()))
    counts = [f"{name} {val} and {test}" for name, (val, test) in some_run["documents"].items()]
    lines = ["Mean ± standard error over seeds, on the test windows. Before the runs the worst ratio was",
             f"{statistics.mean(first):.2f} on the validation windows. At the end a domain's ratios on test and",
             f"validation windows are {statistics.mean(apart):.0%} apart on average, {max(apart):.0%} at most.",
             f"Documents in the validation and the test windows: {', '.join(counts)}.", "",
             *table(results, arms, MEASURES), "",
             "Perplexity of each domain's test windows, and its ratio to the teacher's:", "",
             *domains_table(results, arms), ""]
    if results.keys() & ABLATIONS.keys():
        lines += ["DDK with one value changed:", "", *ablations_table(results), ""]
    lines += ["The paper's claims, by paired differences over seeds, decided at 95 % (Student's t):", "",
              *verdicts(results)]
    text = "\n".join(lines) + "\n"
    write_text(folder / f"{setting}.md", text)
    if "ddk" in results and "kd" in results:
        domains_figure(results, folder / f"{setting}_domains.png")
    arms_figure(results, arms, folder / f"{setting}_arms.png")
    print(f"\n{text}\nwritten to {folder}")


def gain(results: dict, other: str, measure: str) -> list[float]:
    """How much lower the measure is under DDK than under the other arm, in percent, at each seed that both have."""
    seeds = results.get("ddk", {}).keys() & results.get(other, {}).keys()
    return [100 * (1 - results["ddk"][seed][measure] / results[other][seed][measure])
            for seed in sorted(seeds, key=int)]


def gains_table(settings: dict[str, dict]) -> list[str]:
    """How much lower DDK's ratios end than KD's and equal sampling's. settings: name → what its runs gave."""
    lines = ["| setting | seeds | first ratios, largest − smallest | over | worst ratio, % | mean ratio, % |",
             "|---" * 6 + "|"]
    for setting, results in settings.items():
        difference = first_difference(results)
        for other in ("kd", "ddk_es"):
            worst = gain(results, other, "worst_ratio")
            if worst:
                mean = gain(results, other, "mean_ratio")
                lines.append(f"| {setting} | {len(worst)} | {difference:.2f} | `{other}` | "
                             f"{format_mean(worst, '+', 1)} | {format_mean(mean, '+', 1)} |")
    return lines


def write_gains(settings: dict[str, dict], folder: Path):
    """gains.md, and gains.png: the gains of DDK against how unequal the ratios were at the start."""
    figure = import_optional("matplotlib.figure", "figures").Figure(figsize=(10, 3.6), layout="constrained")
    axes = dict(zip(("kd", "ddk_es"), figure.subplots(1, 2, sharex=True)))
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
    for (setting, results), colour in zip(settings.items(), itertools.cycle(colours)):
        difference = first_difference(results)
        for other, ax in axes.items():
            for measure, marker in (("worst_ratio", "o"), ("mean_ratio", "s")):
                values = gain(results, other, measure)
                if values:
                    ax.plot([difference] * len(values), values, marker, color=colour, alpha=0.3, markersize=3)
                    ax.plot([difference], [statistics.mean(values)], marker, color=colour,
                            label=f"{setting}, {MEASURES[measure]}")
    for other, ax in axes.items():
        ax.axhline(0, color="#000000", linewidth=0.5)
        ax.set(xlabel="largest − smallest ratio before the runs", title=f"gain of ddk over {other}, %")
        ax.grid(alpha=0.3)
    handles, labels = axes["kd"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right", fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "gains.png", dpi=110)
    text = "\n".join(gains_table(settings)) + "\n"
    write_text(folder / "gains.md", text)
    print(text)


def first_difference(results: dict) -> float:
    """The largest minus the smallest ratio before the first step, mean over DDK's runs. Eq. 1 exponentiates ratios, so
    this is how unequal they are."""
    differences = []
    for one in results["ddk"].values():
        first = [ratios[0] for ratios in one["ratio"].values()]
        differences.append(max(first) - min(first))
    return statistics.mean(differences)


# ----------------------------------------------- The program --------------------------------------------------------


def can_run(name: str) -> bool:
    """Whether the code has the method of an arm."""
    method = "doremi_proxy" if name == "cpt_doremi" else ARMS[name].get("method", "ddk")
    return method in distill.ARMS


def chosen_arms(text: str) -> list[str]:
    """name,… of arms and ablations, where arms, ablations and all stand for what the code can run. Raises UserError."""
    arms = [name for name in ARMS if can_run(name)]
    groups = {"arms": arms, "ablations": list(ABLATIONS), "all": [*arms, *ABLATIONS]}
    names = []
    for word in text.split(","):
        names += groups.get(word, [word])
    problems = []
    for name in dict.fromkeys(names):
        if name in FORKS and name not in arms:
            fork = FORKS[name]
            problems.append(f"--arms={text}: {name} is a fork, and not in {CODE}; mkdir {fork} && cp *.py {fork} && "
                            f"git apply --directory={fork} tests/forks/{fork}.diff, then --code={fork}")
        elif name not in groups["all"]:
            problems.append(f"--arms={text}: {name} is none of {' '.join(groups['all'])}")
    if problems:
        raise UserError("\n".join(problems))
    return list(dict.fromkeys(names))


def own_keys(text: str) -> dict:
    """key=value,… of distill.py's keys, each of its type. Raises UserError."""
    keys = {}
    for pair in text.split(",") if text else []:
        name, _, value = pair.partition("=")
        if name not in distill.Config.__dataclass_fields__ or name in OWN_KEYS:
            raise UserError(f"--keys={text}: {name} is no key of distill.py, or each run's own")
        keys[name] = distill.convert(name, value)
    return keys


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, parents=[CODE_PARSER],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="quickstart", help="data, models and steps")
    parser.add_argument("--teacher", default="", help="folder of a pretrained teacher, for --setting=real")
    parser.add_argument("--seeds", type=int, default=5, help="student bases, and orders of the data")
    parser.add_argument("--arms", default="all", help="name,… of arms and ablations, or arms, ablations or all")
    parser.add_argument("--out_dir", default="", help="folder of the runs (default: out/compare-SETTING)")
    parser.add_argument("--results", default="", help="what the runs gave, a .json (default: OUT_DIR/results.json)")
    parser.add_argument("--assets", default="", help="folder of the tables and figures (default: OUT_DIR)")
    parser.add_argument("--gains", default="", help="only make gains.md and gains.png of these results: FILE,FILE,…")
    parser.add_argument("--keys", default="", help="other values of distill.py's keys for all runs: key=value,…")
    parser.add_argument("--steps", type=int, default=0, help="steps of teacher and student base, to try it out")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    arms = chosen_arms(args.arms)
    origin = setting.origin or args.setting
    common = {"data_dir": f"data/{origin}", **setting.keys, **own_keys(args.keys)}
    out_dir = Path(args.out_dir or f"out/compare-{args.setting}")
    teacher_dir = Path(args.out_dir or f"out/compare-{origin}") / "teacher"
    import_optional("matplotlib", "figures")  # asked for now, and not after hours
    if args.gains:
        settings = {}
        for path in map(Path, args.gains.split(",")):
            if not path.is_file():
                raise UserError(f"--gains={path}: no such file; name results.json files of finished comparisons")
            settings[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        write_gains(settings, Path(args.assets or "out"))
        return
    if (setting.teacher is None) != os.path.isdir(args.teacher):
        raise UserError(f"--teacher={args.teacher}: name the folder of a model, for --setting=real alone")

    # What has run already, and of the same experiment
    path = Path(args.results or out_dir / "results.json")
    results = {}
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
    for name in arms:
        wanted = experiment(setting, common, name, args.steps)
        if any(one["experiment"] != wanted for one in results.get(name, {}).values()):
            raise UserError(f"--results={path}: holds runs of {name} with other keys, steps or setting; name another "
                            "--results and --out_dir")
    todo = [(seed, name) for seed in range(args.seeds) for name in arms if str(seed) not in results.get(name, {})]

    # Bins and the teacher, once
    def pretrained(keys: dict, seed: int, folder: Path) -> Path:
        config = distill.pretraining({**common, "test_samples": 0, **keys}, seed=seed, out_dir=str(folder))
        if args.steps:
            config.max_steps = args.steps
            config.warmup_steps = 0
        return run(config)

    if todo:
        make_bins(setting, Path(common["data_dir"]), args.teacher)
        windows = {"rule": WINDOW_RULE, "bins": TokenBins(common["data_dir"], 1).content()}
        for runs in results.values():
            if any(one.get("windows") != windows for one in runs.values()):
                raise UserError(f"--results={path}: holds runs on other bins than {common['data_dir']}, or on windows that "
                                "were chosen by another rule; name another --results and --out_dir")
        teacher = args.teacher
        if not teacher:
            print(f"The teacher: {setting.teacher['student']}, {args.steps or setting.teacher['max_steps']} steps",
                  flush=True)
            teacher = pretrained(setting.teacher, 0, teacher_dir)
        teacher_sha256 = file_sha256(Path(teacher, "model.safetensors"))
        for runs in results.values():
            if any(one["teacher_sha256"] != teacher_sha256 for one in runs.values()):
                raise UserError(f"--results={path}: holds runs of another teacher than {teacher}; name another "
                                "--results")

    # A student base for each seed, and a run of each arm from it
    for count, (seed, name) in enumerate(todo, 1):
        base_seed = 0 if setting.one_base else seed
        base_keys = {"teacher": str(teacher), **setting.student}
        if setting.teacher is not None:
            base_keys["teacher"] = ""
        base = pretrained(base_keys, base_seed, out_dir / f"base-{base_seed}")
        run_dir = out_dir / f"{name}-{seed}"
        run_arm(name, {**common, "preset": "quickstart", "teacher": str(teacher), "student": str(base), "seed": seed,
                       "keep": 1, "out_dir": str(run_dir), **(ARMS | ABLATIONS)[name]})
        gave = {"experiment": experiment(setting, common, name, args.steps), "windows": windows,
                "teacher_sha256": teacher_sha256, **summary(run_dir)}
        results.setdefault(name, {})[str(seed)] = gave
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results))
        print(f"{count}/{len(todo)}  {name}, seed {seed}: worst ratio {gave['worst_ratio']:.3f}, mean "
              f"{gave['mean_ratio']:.3f}", flush=True)
    write_report(results, args.setting, Path(args.assets or out_dir))


if __name__ == "__main__":
    run_program(main)
