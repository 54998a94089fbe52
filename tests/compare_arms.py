"""The paper's comparison at a small scale: every arm and ablation over several seeds.

    python tests/compare_arms.py --seeds=5 --arms=ddk,ddk_es,kd,cpt       the quickstart's setting
    python tests/compare_arms.py --setting=real --teacher=DIR --seeds=4 --arms=ddk,ddk_es,kd     a pretrained teacher
    python tests/compare_arms.py --setting=replicates --seeds=24 --arms=ddk,kd   each seed has its own text and teacher
    python tests/compare_arms.py --setting=replicates --seeds=24 --arms=kd_fixed,kd_first   after these: DDK's mean r
    python tests/compare_arms.py --code=ted --arms=ted     a fork's arm beside those that have run; ted/ has its files
    python tests/compare_arms.py --code=t2 --label=t2_ --arms=temperature=2.0     kept as t2_temperature=2.0

The teacher is made once, or given. A seed makes its own student base, by another initialization and another order of
its data, and orders the data of the runs that start from it: the spread over seeds is that of all but the teacher and
the text. In `replicates` a seed also draws the files of its own text, and so has its own bins, windows and teacher.

Runs are distill.py's own (`train`), one after the other, in `out_dir`; the same command again continues where it was
stopped, and two commands with other --first may run side by side. What each run gave is kept in `results`;
report_arms.py makes tables and figures of such files. Perplexities and ratios at the end are of the test windows, which
never update r.
"""

import argparse
import fcntl
import functools
import json
import os
import platform
import random
import shutil
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

# The four files are imported from --code, so it has to be known before the other arguments are read.
CODE_PARSER = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
CODE_PARSER.add_argument("--code", default=str(Path(__file__).parents[1]),
                         help="folder of a fork's four files, whose arms are run (default: the project's own)")
CODE = CODE_PARSER.parse_known_args()[0].code
sys.path.insert(0, CODE)

import numpy as np
import torch

import distill
from data import (QUICKSTART_BYTES, TOKENIZER_FILES, TokenBins, UserError, build_bins, file_hashes, load_tokenizer,
                  quickstart_documents, quickstart_files, run_program)
from model import GPT
from report_arms import ABLATED, arms_table, drawn_share, read_results
from sample_mixture import RULES, read_metrics, replay

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
FORKS = {"ted": "ted", "cpt_doremi": "doremi"}  # arms that are forks → the diff in tests/forks
OWN_ARMS = ARMS.keys() - FORKS.keys()  # which the project's own code has
for method in distill.ARMS:  # and what a fork has besides; doremi_proxy is a stage of cpt_doremi
    if method not in (*ARMS, "doremi_proxy"):
        ARMS[method] = {"method": method}
OWN_KEYS = ("method", "seed", "teacher", "student", "out_dir")  # of distill.py, which each run has its own of


def own_keys(text: str, given: dict) -> dict:
    """key=value,… of distill.py's keys, each of its type, checked beside those that are `given`. Raises UserError."""
    texts = {}
    for pair in text.split(",") if text else []:
        name, _, value = pair.partition("=")
        if name not in distill.Config.__dataclass_fields__ or name in OWN_KEYS:
            raise UserError(f"--keys={text}: {name} is no key of distill.py, or each run's own")
        texts[name] = value
    config = distill.parse_config([f"--{name}={value}" for name, value in {**given, **texts}.items()])
    return {name: getattr(config, name) for name in texts}


ABLATIONS = {name: own_keys(name, {}) for name in (*ABLATED, "alpha=0.0")}  # name → the key that differs from DDK's
# KD in DDK's mean mixture over the other seeds: of its whole run; or of the steps after the first interval, which draws
# in natural proportions, as DDK's does
CONTROLS = {"kd_fixed": {"method": "kd"}, "kd_first": {"method": "kd_first"}}
ALL_ARMS = ARMS | ABLATIONS | CONTROLS


@dataclass
class Setting:
    """Data, models and steps that all arms share. teacher, student: keys of the runs that train them."""
    n_bytes: dict
    teacher: dict | None  # None: --teacher names a folder, whose tokenizer the bins have
    student: dict
    keys: dict = field(default_factory=dict)
    own_text: bool = False  # whether each seed draws its own text, and trains its own teacher


QUICKSTART = distill.quickstart_models(distill.Config().pretrain_steps)
WINDOW_RULE = "evenly spaced over the bin of the split"  # runs on windows that another rule chose are not compared
SETTINGS = {
    "quickstart": Setting(QUICKSTART_BYTES, QUICKSTART["teacher"], QUICKSTART["student"],
                          keys={"test_samples": 128}),  # of 165 that every domain has, on Python 3.11
    # The quickstart's, of about four fifths of the Python files and as much of the other domains. test_samples of 0
    # stands for as many as all domains have.
    "replicates": Setting({**QUICKSTART_BYTES, "python": 5_600_000}, QUICKSTART["teacher"], QUICKSTART["student"],
                          keys={"test_samples": 0}, own_text=True),
    # Ten of the teacher's layers, which have to learn to work together first: by KD, on little but source code
    "real": Setting(
        n_bytes={"python": 5_000_000, "cpp": 2_000_000, "math": 1_000_000, "prose": 600_000}, teacher=None,
        student={"method": "kd", "max_steps": 160, "warmup_steps": 16, "lr": 1e-3,
                 "min_lr": 1e-4, "mixture": "python=.45,cpp=.45,math=.05,prose=.05"},
        keys={"max_steps": 100, "warmup_steps": 10, "interval": 20, "val_samples": 24, "test_samples": 24,
              "batch_size": 4, "dtype": "bfloat16", "save_every": 50}),
}

# ----------------------------------------------- Runs ---------------------------------------------------------------


def make_bins(setting: Setting, data_dir: Path, teacher: str, seed: int):
    """Bins of the setting's text, or of a seed's, and the tokenizer, unless they are there."""
    if (data_dir / "meta.json").is_file():
        return
    print(f"Collecting text into {data_dir} …", flush=True)
    documents = quickstart_documents(setting.n_bytes)
    if setting.own_text:
        documents = quickstart_documents(setting.n_bytes, functools.partial(shuffled_files, seed=seed))
    build_bins(data_dir, load_tokenizer(teacher or "bytes"), documents, val_fraction=0.1)


def shuffled_files(name: str, seed: int) -> list[list[str]]:
    """The quickstart's files of a domain, in a random order."""
    files = list(quickstart_files(name))
    random.Random(f"{seed} {name}").shuffle(files)
    return files


def most_test_windows(data_dir: str, block_size: int) -> int:
    """How many test windows every domain of these bins has."""
    bins = TokenBins(data_dir, block_size)
    return min(bins.count_windows(name, "test") for name in bins.names)


def ten_layers(teacher: str, folder: Path) -> str:
    """The folder of a model of ten evenly spaced layers of the teacher, which is made once."""
    if not (folder / "model.safetensors").is_file():
        model = GPT.from_pretrained(teacher)
        n = len(model.layers)
        model.layers = torch.nn.ModuleList(model.layers[round(i * (n - 1) / 9)] for i in range(10))
        model.config = replace(model.config, num_hidden_layers=10)
        model.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if Path(teacher, name).is_file():
                shutil.copy(Path(teacher, name), folder)
    return str(folder)


def run(config: distill.Config) -> Path:
    """`train`, and what the arm does at its end; what it prints goes to `out_dir`.log."""
    Path(config.out_dir).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{config.out_dir}.log", "a", encoding="utf-8") as log, redirect_stdout(log):
        folder = distill.train(config)
        distill.report(config, folder)
    return folder


def other_runs(runs: dict, seed: int, n_seeds: int) -> list[dict]:
    """DDK's runs at all of `n_seeds` but `seed`. UserError if one of them has not run."""
    others = [runs[str(other)] for other in range(n_seeds) if other != seed and str(other) in runs]
    if len(others) < max(n_seeds - 1, 1):
        raise UserError(f"--arms={','.join(CONTROLS)}: need ddk at all other seeds; let ddk run first")
    return others


def fixed_mixture(others: list[dict]) -> str:
    """The shares of train tokens that runs drew, their mean."""
    shares = {}
    for name in others[0]["end"]:
        shares[name] = statistics.mean(drawn_share(one["end"], name) for one in others)
    return ",".join(f"{name}={share:.5f}" for name, share in shares.items())


def register_kd_first(others: list[dict]):
    """Make kd_first a method of this process: natural proportions in the first interval, then the mean of the r that
    the others' later intervals drew by. The r after the last step draws nothing."""
    mean_r = []
    for name in others[0]["r"]:
        mean_r.append(statistics.mean(share for one in others for share in one["r"][name][1:-1]))
    fixed = np.array(mean_r) / sum(mean_r)

    def kd_first_rule(state, student_ppl, teacher_ppl, natural, alpha):
        return (natural if state is None else fixed), {}

    RULES["kd_first"] = kd_first_rule
    distill.ARMS["kd_first"] = distill.Arm("KD in DDK's mean r after a natural first interval", rule="kd_first")


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
    config = asdict(distill.resolve_config({**common, "preset": "quickstart", **ALL_ARMS[name]}))
    keys = {name: value for name, value in config.items() if name not in (*OWN_KEYS, *distill.MAY_CHANGE)}
    return {"setting": asdict(setting), "steps": steps, "keys": keys}


def end_of(metrics: list[dict]) -> dict:
    """What a finished run measured at its end, by domain."""
    return next(line for line in metrics if line["kind"] == "end")["domains"]


def summary(out_dir: Path, base_dir: Path) -> dict:
    """What a finished run gave, from its metrics.jsonl, whose perplexities have to replay its r; `base_ratio` is of its
    student base, on the test windows."""
    metrics = read_metrics(out_dir / "metrics.jsonl")
    run_line = next(line for line in metrics if line["kind"] == "run")
    end = end_of(metrics)
    base = end_of(read_metrics(base_dir / "metrics.jsonl"))
    mixtures = [line for line in metrics if line["kind"] == "mixture"]
    replayed = replay(mixtures, run_line["rule"], run_line["natural"], run_line["config"]["alpha"])
    for line, r in zip(mixtures, replayed, strict=True):
        assert all(abs(line["r"][name] - r[name]) < 1e-9 for name in r), f"{out_dir}: r does not follow at {line}"
    ratios = [domain["test_ratio"] for domain in end.values()]
    first_ratios = [domain["ratio"] for domain in mixtures[0]["domains"].values()]
    return {
        "versions": run_line["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "mean_ratio": statistics.mean(ratios),
        "worst_ratio": max(ratios),
        "first_worst_ratio": max(first_ratios),
        "base_ratio": {name: base[name]["test_student_ppl"] / end[name]["test_teacher_ppl"] for name in end},
        "end": end,
        "steps": [line["step"] for line in mixtures],
        "r": {name: [round(line["r"][name], 5) for line in mixtures] for name in end},
        "ratio": {name: [round(line["domains"][name]["ratio"], 5) for line in mixtures] for name in end},
    }


# ----------------------------------------------- The program --------------------------------------------------------


def keep(path: Path, name: str, seed: int, gave: dict) -> dict:
    """Add a run to the results, to which another command may add at the same time, and return them all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read_results(path)
        results.setdefault(name, {})[str(seed)] = gave
        path.with_suffix(".tmp").write_text(json.dumps(results), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
    return results


def can_run(name: str) -> bool:
    """Whether the code has the method of an arm."""
    method = "doremi_proxy" if name == "cpt_doremi" else ALL_ARMS[name].get("method", "ddk")
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
        elif name not in (*groups["all"], *CONTROLS):
            problems.append(f"--arms={text}: {name} is none of {' '.join((*groups['all'], *CONTROLS))}")
    if problems:
        raise UserError("\n".join(problems))
    return list(dict.fromkeys(names))


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, parents=[CODE_PARSER],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="quickstart", help="data, models and steps")
    parser.add_argument("--teacher", default="", help="folder of a pretrained teacher, for --setting=real")
    parser.add_argument("--seeds", type=int, default=5, help="student bases, and orders of the data")
    parser.add_argument("--first", type=int, default=0, help="the first of these seeds to run")
    parser.add_argument("--arms", default="all", help="name,… of arms and ablations, or arms, ablations or all")
    parser.add_argument("--out_dir", default="", help="folder of the runs (default: out/compare-SETTING)")
    parser.add_argument("--results", default="", help="what the runs gave, a .json (default: OUT_DIR/results.json)")
    parser.add_argument("--label", default="", help="prefix of the names by which the runs are kept")
    parser.add_argument("--keys", default="", help="other values of distill.py's keys for all runs: key=value,…")
    parser.add_argument("--steps", type=int, default=0, help="steps of teacher and student base, to try it out")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    arms = chosen_arms(args.arms)
    common = {"data_dir": f"data/{args.setting}", **setting.keys, **own_keys(args.keys, setting.keys)}
    out_dir = Path(args.out_dir or f"out/compare-{args.setting}")
    teacher_dir = out_dir / "teacher"
    if (setting.teacher is None) != os.path.isdir(args.teacher):
        raise UserError(f"--teacher={args.teacher}: name the folder of a model, for --setting=real alone")

    # What has run already, and of the same experiment
    path = Path(args.results or out_dir / "results.json")
    results = read_results(path)
    for name in arms:
        wanted = experiment(setting, common, name, args.steps)
        if any(one["experiment"] != wanted for one in results.get(args.label + name, {}).values()):
            raise UserError(f"--results={path}: holds runs of {args.label}{name} with other keys, steps or setting; "
                            "name another --results and --out_dir")
    todo = [(seed, name) for seed in range(args.first, args.seeds) for name in arms
            if str(seed) not in results.get(args.label + name, {})]
    is_fork = Path(CODE).resolve() != Path(__file__).resolve().parents[1]
    for seed, name in todo:
        if name in CONTROLS and "ddk" not in arms:
            other_runs(results.get("ddk", {}), seed, args.seeds)
        if is_fork and not args.label and (name in OWN_ARMS or name in ABLATIONS):
            raise UserError(f"--code={CODE}: {name} would be kept as a run of the project's own code; give a --label")

    def pretrained(keys: dict, seed: int, folder: Path) -> Path:
        config = distill.resolve_config({**QUICKSTART["student"], **keys, "seed": seed, "out_dir": str(folder)})
        if args.steps:
            config.max_steps = args.steps
            config.warmup_steps = 0
        return run(config)

    count = 0
    for seed in dict.fromkeys(seed for seed, _ in todo):
        # Bins and teacher: one of each, or the seed's own
        keys = dict(common)
        teacher_seed = 0
        if setting.own_text:
            keys["data_dir"] = f"{common['data_dir']}-{seed}"
            teacher_dir = out_dir / f"teacher-{seed}"
            teacher_seed = seed
        make_bins(setting, Path(keys["data_dir"]), args.teacher, seed)
        if keys["test_samples"] == 0:
            block_size = distill.resolve_config({**keys, "preset": "quickstart"}).block_size
            keys["test_samples"] = most_test_windows(keys["data_dir"], block_size)
        windows = {"rule": WINDOW_RULE, "bins": TokenBins(keys["data_dir"], 1).content()}
        teacher = args.teacher
        if not teacher:
            teacher = pretrained({**keys, "test_samples": 0, **setting.teacher}, teacher_seed, teacher_dir)
        teacher_sha256 = file_hashes([Path(teacher, "model.safetensors")])["model.safetensors"]
        for runs in results.values():
            for other, one in runs.items():
                same = one.get("windows") == windows and one["teacher_sha256"] == teacher_sha256
                if not same and (not setting.own_text or other == str(seed)):
                    raise UserError(f"--results={path}: holds runs on other bins than {keys['data_dir']}, on windows "
                                    f"that were chosen by another rule, or of another teacher than {teacher}; name "
                                    "another --results and --out_dir")

        # The seed's student base, and the run of each arm from it
        base_keys = {**keys, **setting.student}
        if setting.teacher is None:
            base_keys.update(teacher=str(teacher), student=ten_layers(args.teacher, out_dir / "ten-layers"))
        base = pretrained(base_keys, seed, out_dir / f"base-{seed}")
        for name in [name for other, name in todo if other == seed]:
            count += 1
            arm_keys = dict(ALL_ARMS[name])
            if name in CONTROLS:
                others = other_runs(results.get("ddk", {}), seed, args.seeds)
                if name == "kd_fixed":
                    arm_keys["mixture"] = fixed_mixture(others)
                else:
                    register_kd_first(others)
            run_dir = out_dir / f"{args.label}{name}-{seed}"
            run_arm(name, {**keys, "preset": "quickstart", "teacher": str(teacher), "student": str(base), "seed": seed,
                           "keep": 1, "out_dir": str(run_dir), **arm_keys})
            gave = {"experiment": experiment(setting, common, name, args.steps), "windows": windows,
                    "teacher_sha256": teacher_sha256, "test_samples": keys["test_samples"],
                    **summary(run_dir, base.parent)}
            results = keep(path, args.label + name, seed, gave)
            print(f"{count}/{len(todo)}  {args.label}{name}, seed {seed}: worst ratio {gave['worst_ratio']:.3f}, mean "
                  f"{gave['mean_ratio']:.3f}", flush=True)
    print(arms_table({args.setting: results}, results))


if __name__ == "__main__":
    run_program(main)
