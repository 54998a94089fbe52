"""The paper's comparison at a small scale: every arm and ablation over several seeds, a table, the claims, figures.

    python tests/compare_arms.py --seeds=5                                 the quickstart's setting
    python tests/compare_arms.py --setting=larger --seeds=3 --arms=ddk,kd  a BPE tokenizer, a larger teacher

The teacher is made once. A seed makes its own student base, by other initial weights and another order of its data, and
orders the data of the runs that start from it: so the spread over seeds is that of all but the teacher and the text.
Runs are distill.py's own (`train`), one after the other, in `out_dir`; the same command again goes on where it was
stopped. What each gave is kept in `results`, from which the table and the figures are made, also without the runs. All
arms and ablations over 5 seeds are 115 runs of about a minute each on two cores.

Perplexities are of the validation windows that steer r, as in the paper's Fig. 3: an arm that follows them is judged by
what it follows. A step's time is that of the main loop: evaluation, TED's filters and DoReMi's two runs come on top.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import distill
from data import (UserError, build_bins, convert, import_optional, load_tokenizer, option, parse_config,
                  quickstart_domains, run_program, write_text)
from sample_mixture import read_metrics

# name → what differs from DDK, which the first row is, with the paper's values but for the quickstart's K = 25
ARMS = {
    "ddk": {}, "ddk_no_fs": dict(method="ddk_no_fs"), "ddk_es": dict(method="ddk_es"), "kd": dict(method="kd"),
    "ted": dict(method="ted"), "minillm": dict(method="minillm"), "cpt_doremi": dict(method="cpt_doremi"),
    "cpt": dict(method="cpt"),
}
ABLATIONS = {
    **{f"gamma={value}": dict(gamma=value) for value in (0.0, 0.1, 0.3, 0.5)},
    **{f"temperature={value}": dict(temperature=value) for value in (0.1, 0.2, 0.5, 2.0)},
    **{f"interval={value}": dict(interval=value) for value in (10, 50, 100)},
    **{f"alpha={value}": dict(alpha=value) for value in (0.0, 0.25, 0.75, 1.0)},
}
# The paper's claims that this can tell of: text, the arm that is to be lower, the other
CLAIMS = (
    ("DDK above KD (Table 1)", "ddk", "kd"),
    ("KD above TED (Table 1)", "kd", "ted"),
    ("KD above MiniLLM (Table 1)", "kd", "minillm"),
    ("MiniLLM above CPT&DoReMi (Table 1)", "minillm", "cpt_doremi"),
    ("CPT&DoReMi above CPT (Table 1)", "cpt_doremi", "cpt"),
    ("KD above CPT (Table 1)", "kd", "cpt"),
    ("factor smoothing helps (Table 5)", "ddk", "ddk_no_fs"),
    ("DDK above equal sampling (Table 5)", "ddk", "ddk_es"),
    ("equal sampling above KD (Tables 5 and 1)", "ddk_es", "kd"),
    *((f"γ = 0.2 above {value}", "ddk", f"gamma={value}") for value in (0.0, 0.1, 0.3, 0.5)),
    *((f"T = 1 above {value}", "ddk", f"temperature={value}") for value in (0.1, 0.2, 0.5, 2.0)),
)
MEASURES = {"mean_ppl": "average perplexity", "mean_ratio": "mean ratio", "worst_ratio": "worst ratio",
            "step_s": "a step's time, KD = 1"}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided 95 %, from 1 degree of freedom
OWN_KEYS = ("method", "seed", "teacher", "student", "out_dir")  # of distill.py, which each run has its own of


@dataclass
class Setting:
    """Data, sizes and steps that all arms share."""
    vocab_size: int  # of a BPE trained on the text; 0: bytes
    n_bytes: dict  # of each domain, at most
    teacher: str
    teacher_steps: int
    teacher_mixture: str
    student: str
    student_steps: int
    student_mixture: str
    keys: dict


SIZES, MIXTURES = distill.QUICKSTART_MODELS, distill.QUICKSTART_MIXTURES
SETTINGS = {
    "quickstart": Setting(0, distill.QUICKSTART_BYTES, SIZES["teacher"], 600, MIXTURES["teacher"],
                          SIZES["student"], 300, MIXTURES["student"], {}),
    # The teacher sees the small domains more often than their size, but not so often that it learns them by heart.
    "larger": Setting(4096, {"python": 14_000_000, "cpp": 10_000_000, "math": 1_500_000, "prose": 800_000},
                      "scratch:6x256", 2600, "python=3,cpp=3,math=2,prose=1", "scratch:3x128", 600,
                      MIXTURES["student"], dict(max_steps=600, interval=30, val_samples=48, save_every=200)),
}


@dataclass
class Config:
    """Keys of `python tests/compare_arms.py`."""
    setting: Literal["quickstart", "larger"] = option("quickstart", "data, models and steps")
    seeds: int = option(5, "student bases, and orders of the data", least=1)
    arms: str = option("all", "name,… of arms and ablations, or arms, ablations or all")
    out_dir: str = option("", "the runs' folder; out/compare-SETTING if empty")
    results: str = option("", "what the runs gave, a .json; OUT_DIR/results.json if empty")
    assets: str = option("", "folder of the table and the figures; OUT_DIR if empty")
    keys: str = option("", "other values of distill.py's keys for all runs: key=value,…")
    steps: int = option(0, "steps of teacher and student base instead of the setting's, to try it out", least=0)

    def problems(self) -> list[str]:
        unknown = [name for name in chosen_arms(self.arms) if name not in ARMS | ABLATIONS]
        problems = [f"--arms={self.arms}: {' '.join(unknown)} is none of {' '.join(ARMS | ABLATIONS)}"] * bool(unknown)
        try:
            own_keys(self.keys)
        except UserError as error:
            problems.append(str(error))
        return problems


def chosen_arms(text: str) -> list[str]:
    groups = {"arms": ARMS, "ablations": ABLATIONS, "all": ARMS | ABLATIONS}
    return list(dict.fromkeys(name for word in text.split(",") for name in groups.get(word, [word])))


def own_keys(text: str) -> dict:
    """key=value,… of distill.py's keys, each of its type. UserError names one that is wrong."""
    try:
        pairs = dict(pair.split("=") for pair in text.split(",") if pair)
        if taken := pairs.keys() & set(OWN_KEYS):
            raise ValueError(f"{' '.join(taken)} are each run's own")
        return {key: convert(value, distill.Config.__dataclass_fields__[key].type) for key, value in pairs.items()}
    except (KeyError, ValueError) as error:
        raise UserError(f"--keys={text}: write key=value,… with keys of distill.py ({error})") from None


def experiment(setting: Setting, common: dict, name: str, steps: int) -> dict:
    """All that a run of an arm follows from, but for its seed, to be kept with what it gave."""
    config = distill.asdict(distill.resolve_config(**{**common, "preset": "quickstart", **(ARMS | ABLATIONS)[name]}))
    return {"setting": distill.asdict(setting), "steps": steps,
            "keys": {key: value for key, value in config.items() if key not in distill.FREE_KEYS | {*OWN_KEYS}}}


def make_bins(setting: Setting, data_dir: Path):
    """Bins of the setting's text, and its tokenizer, unless they are there."""
    if (data_dir / "meta.json").is_file():
        return
    print(f"Collecting text into {data_dir} …", flush=True)
    sources, tokenizer = quickstart_domains(setting.n_bytes), "bytes"
    if setting.vocab_size:
        tokenizers = import_optional("tokenizers", "--setting=larger")
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        bpe.train_from_iterator((text for documents in sources.values() for text in documents()),
                                tokenizers.trainers.BpeTrainer(
            vocab_size=setting.vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        tokenizer = str(data_dir.with_name(f"{data_dir.name}-tokenizer"))
        Path(tokenizer).mkdir(parents=True, exist_ok=True)
        bpe.save(f"{tokenizer}/tokenizer.json")
        write_text(Path(tokenizer) / "tokenizer_config.json", json.dumps({"eos_token": "<|endoftext|>"}))
    build_bins(data_dir, load_tokenizer(tokenizer), sources, val_fraction=0.1)


def pretraining(setting: Setting, common: dict, role: str, seed: int, steps: int) -> distill.Config:
    """A model of its own for `role`, trained as the quickstart trains its two."""
    return distill.resolve_config(**{
        **distill.PRESETS["quickstart"], **common, **distill.PRETRAINING, "seed": seed,
        "student": getattr(setting, role), "max_steps": steps or getattr(setting, f"{role}_steps"),
        "mixture": getattr(setting, f"{role}_mixture")})


def run(config: distill.Config) -> Path:
    """`train`, with DoReMi's two runs before it where they are asked for; its output goes to `out_dir`.log."""
    if problems := config.problems():
        raise UserError("\n".join(problems))
    Path(config.out_dir).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{config.out_dir}.log", "a", encoding="utf-8") as log, redirect_stdout(log):
        return distill.train(distill.doremi(config))


def summary(out_dir: Path) -> dict:
    """What a finished run gave, from its metrics.jsonl."""
    metrics = read_metrics(out_dir / "metrics.jsonl")
    end = next(line for line in metrics if line["kind"] == "end")["domains"]
    mixtures = [line for line in metrics if line["kind"] == "mixture"]
    steps = [line["tokens"] / line["step"] / line["tokens_per_s"] for line in metrics if line["kind"] == "train"]
    ratios = [domain["ratio"] for domain in end.values()]

    def over_steps(of: Callable[[dict, str], float]) -> dict[str, list[float]]:
        return {name: [round(of(line, name), 5) for line in mixtures] for name in end}
    return {
        "mean_ppl": statistics.mean(domain["student_ppl"] for domain in end.values()),
        "mean_ratio": statistics.mean(ratios), "worst_ratio": max(ratios), "step_s": statistics.median(steps),
        "first_worst_ratio": max(domain["ratio"] for domain in mixtures[0]["domains"].values()),
        "steps": [line["step"] for line in mixtures],
        "r": over_steps(lambda line, name: line["r"][name]),
        "ratio": over_steps(lambda line, name: line["domains"][name]["ratio"]),
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; of one value the error is not known."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired(results: dict, first: str, second: str, measure: str, relative: bool = False) -> list[float]:
    """first − second, or first / second, at each seed that both have: what seeds share drops out."""
    seeds = results.get(first, {}).keys() & results.get(second, {}).keys()
    pairs = [(results[first][seed][measure], results[second][seed][measure]) for seed in sorted(seeds, key=int)]
    return [a / b if relative else a - b for a, b in pairs]


def table(results: dict, names, measures) -> list[str]:
    lines = ["| | seeds | " + " | ".join(map(MEASURES.get, measures)) + " |", "|---" * (len(measures) + 2) + "|"]
    for name in names:
        if not (runs := results.get(name)):
            continue
        cells = []
        for measure in measures:
            values = (paired(results, name, "kd", measure, relative=True) if measure == "step_s"
                      else [run[measure] for run in runs.values()])
            mean, error = mean_and_error(values) if values else (math.nan, math.nan)
            cells.append(" ± ".join(f"{value:.3f}" for value in (mean, error) if not math.isnan(value)))
        lines.append(f"| `{name}` | {len(runs)} | " + " | ".join(cells) + " |")
    return lines


def verdicts(results: dict) -> list[str]:
    """Each claim that three seeds tell of, with the difference seen; lower is better. Decided where it is further from
    0 than Student's t allows at 95 %: 4.3 standard errors with 3 seeds, 2.8 with 5. Not corrected for their number."""
    measures = ("mean_ratio", "worst_ratio")
    lines = ["| The paper | " + " | ".join(f"{MEASURES[measure]} | seen" for measure in measures) + " |",
             "|---" * 5 + "|"]
    for claim, better, worse in CLAIMS:
        cells = [claim]
        for measure in measures:
            if (n := len(differences := paired(results, better, worse, measure))) < 3:
                break
            mean, error = mean_and_error(differences)
            decided = abs(mean) > error * T95[min(n - 2, len(T95) - 1)]
            cells += [f"{mean:+.4f} ± {error:.4f}",
                      "cannot be told" if not decided else "holds" if mean < 0 else "does not hold at this scale"]
        else:
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def means_over_seeds(runs: dict, key: str) -> dict[str, list[float]]:
    every = [run[key] for run in runs.values()]
    return {name: [statistics.mean(values) for values in zip(*(one[name] for one in every))] for name in every[0]}


def figures(results: dict, folder: Path, setting: str):
    """Ratios and shares by domain over the steps, for DDK and KD; and the arms compared."""
    make = partial(import_optional("matplotlib.figure", "figures").Figure, layout="constrained")
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
    if {"ddk", "kd"} <= results.keys():
        figure = make(figsize=(11, 3.6))
        axes = figure.subplots(1, 3)
        panels = (("ddk", "ratio", "DDK: perplexity, student / teacher"), ("kd", "ratio", "KD: the same"),
                  ("ddk", "r", "DDK: share of the next interval's data"))
        for ax, (arm, key, title) in zip(axes, panels):
            steps = next(iter(results[arm].values()))["steps"]
            for colour, (name, values) in zip(colours, means_over_seeds(results[arm], key).items()):
                for one in results[arm].values():
                    ax.plot(steps, one[key][name], color=colour, alpha=0.25, linewidth=0.8)
                ax.plot(steps, values, color=colour, label=name)
            ax.set(title=title, xlabel="step")
            ax.grid(alpha=0.3)
        axes[1].sharey(axes[0])
        axes[2].set_ylim(0, None)
        axes[0].legend()
        figure.savefig(folder / f"{setting}_domains.png", dpi=110)
    names = [name for name in ARMS if name in results]
    figure = make(figsize=(9, 0.4 * len(names) + 1.2))
    for ax, measure in zip(figure.subplots(1, 2, sharey=True), ("worst_ratio", "mean_ratio")):
        for place, name in enumerate(names):
            values = [run[measure] for run in results[name].values()]
            ax.plot(values, [place] * len(values), "o", color="#999999", markersize=3)
            mean, error = mean_and_error(values)
            ax.errorbar(mean, place, xerr=0 if math.isnan(error) else 2 * error, fmt="|", color=colours[0], capsize=3,
                        markersize=10)
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel=MEASURES[measure])
        ax.grid(axis="x", alpha=0.3)
    ax.invert_yaxis()
    figure.savefig(folder / f"{setting}_arms.png", dpi=110)


def write_report(results: dict, config: Config, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    first = {seed: run["first_worst_ratio"] for runs in results.values() for seed, run in runs.items()}.values()
    lines = [f"Mean ± standard error over seeds; the worst ratio was {statistics.mean(first):.2f} before the runs.", "",
             *table(results, ARMS, MEASURES), ""]
    if results.keys() & ABLATIONS.keys():
        lines += ["DDK with one value changed:", "", *table(results, ["ddk", *ABLATIONS], list(MEASURES)[:-1]), ""]
    lines += ["The paper's claims, by paired differences over seeds, decided at 95 % (Student's t):", ""]
    text = "\n".join([*lines, *verdicts(results)]) + "\n"
    write_text(folder / f"{config.setting}.md", text)
    figures(results, folder, config.setting)
    print(f"\n{text}\nwritten to {folder}")


def main():
    config = parse_config(Config)
    setting, out_dir = SETTINGS[config.setting], Path(config.out_dir or f"out/compare-{config.setting}")
    path = Path(config.results or out_dir / "results.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    import_optional("matplotlib", "figures")  # not after hours
    common = {"data_dir": f"data/{config.setting}", **setting.keys, **own_keys(config.keys)}
    for name in chosen_arms(config.arms):
        wanted = experiment(setting, common, name, config.steps)
        if any(run["experiment"] != wanted for run in results.get(name, {}).values()):
            raise UserError(f"--results={path}: holds runs of {name} with other keys, steps or setting; name another "
                            "--results and --out_dir")
    todo = [(seed, name) for seed in range(config.seeds) for name in chosen_arms(config.arms)
            if str(seed) not in results.get(name, {})]
    if todo:
        make_bins(setting, Path(common["data_dir"]))
        first = pretraining(setting, common, "teacher", 0, config.steps)
        print(f"The teacher: {first.student}, {first.max_steps} steps", flush=True)
        teacher = run(replace(first, out_dir=str(out_dir / "teacher")))
    for count, (seed, name) in enumerate(todo, 1):
        base = pretraining(setting, common, "student", seed, config.steps)
        base = run(replace(base, out_dir=str(out_dir / f"base-{seed}")))
        arm = distill.resolve_config(**{
            **common, "preset": "quickstart", "teacher": str(teacher), "student": str(base), "seed": seed, "keep": 1,
            "out_dir": str(out_dir / f"{name}-{seed}"), **(ARMS | ABLATIONS)[name]})
        run(arm)
        gave = {"experiment": experiment(setting, common, name, config.steps), **summary(Path(arm.out_dir))}
        results.setdefault(name, {})[str(seed)] = gave
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results))
        print(f"{count}/{len(todo)}  {name}, seed {seed}: worst ratio {gave['worst_ratio']:.3f}, mean "
              f"{gave['mean_ratio']:.3f}, {gave['step_s'] * 1000:.0f} ms a step on {torch.get_num_threads()} threads",
              flush=True)
    write_report(results, config, Path(config.assets or out_dir))


if __name__ == "__main__":
    run_program(main)
