"""The paper's comparison at a small scale: every method and ablation over several seeds.

    python tests/compare_arms.py --seeds=5 --arms=ddk,ddk_es,kd,cpt       the quickstart's setting
    python tests/compare_arms.py --setting=real --teacher=DIR --seeds=4 --arms=ddk,ddk_es,kd     a pretrained teacher
    python tests/compare_arms.py --setting=replicates --seeds=24 --arms=ddk,kd   each seed has its own text and teacher
    python tests/compare_arms.py --setting=replicates --seeds=24 --arms=kd_fixed,kd_first   need ddk at all other seeds
    python tests/compare_arms.py --code=ted --arms=ted     a fork's method; the folder ted has the fork's files
    python tests/compare_arms.py --code=t2 --label=t2_ --arms=temperature=2.0     kept as t2_temperature=2.0

An arm is a method, an ablation (key=value) or a control. All arms share one teacher. Each seed makes its own student
base and its own order of the data. In `replicates` it also draws its own text, and so has its own bins, windows and
teacher.

Runs are distill.py's own (`train`), one after the other, in `out_dir`. The same command continues where it was stopped,
and two `replicates` commands for disjoint seeds may run at the same time. results.json there has the numbers of
each run, for report_arms.py. Ratios at the end are measured on test windows. These never update r.
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

# The four files are imported from --code, so this argument is read first.
CODE_PARSER = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
CODE_PARSER.add_argument("--code", default=str(Path(__file__).parents[1]),
                         help="folder of a fork's four files (default: the project's own)")
CODE = CODE_PARSER.parse_known_args()[0].code
sys.path.insert(0, CODE)

import numpy as np
import torch

import distill
from data import (QUICKSTART_BYTES, TOKENIZER_FILES, TokenBins, UserError, build_bins, load_tokenizer,
                  quickstart_documents, quickstart_files, run_program, sha256_of)
from model import GPT
from report_arms import SWEPT, arms_table, drawn_share, runs_of
from sample_mixture import RULES, read_metrics, replay

OWN_KEYS = ("method", "seed", "teacher", "student", "out_dir")  # differ from run to run


def extra_keys(text: str, given: dict) -> dict:
    """Return key=value,… of distill.py's keys, with their types, checked together with the `given` keys."""
    pairs = dict(pair.partition("=")[::2] for pair in text.split(",") if pair)
    for name in pairs:
        if name not in distill.Config.__dataclass_fields__ or name in OWN_KEYS:
            raise UserError(f"--keys={text}: {name} is no key of distill.py, or differs from run to run")
    config = distill.parse_config([f"--{name}={value}" for name, value in {**given, **pairs}.items()])
    return {name: getattr(config, name) for name in pairs}


def experiment_keys(given: dict) -> dict:
    """Return the keys of distill.py that all runs of an arm share, with their values: the given and the quickstart's."""
    config = asdict(distill.resolve_config({"preset": "quickstart", **given}))
    return {key: value for key, value in config.items() if key not in (*OWN_KEYS, *distill.MAY_CHANGE)}


# arm → the keys that differ from DDK's. DDK has the paper's values but for the quickstart's K.
METHOD_ARMS = {name: {"method": name} for name in distill.METHODS if name != "doremi_proxy"}
ABLATIONS = {name: extra_keys(name, {}) for name in SWEPT}
# KD by DDK's runs at the other seeds: kd_fixed in the mean mixture of whole runs; kd_first in natural proportions for
# the first interval, as DDK, then in the mean r of the later intervals
CONTROLS = {"kd_fixed": {"method": "kd"}, "kd_first": {"method": "kd_first"}}
# arms that need a fork → the diff in tests/forks. CPT&DoReMi draws by the mixture of the fork's proxy, see run_arm.
FORKS = {"ted": "ted", "cpt_doremi": "doremi"}
ALL_ARMS = METHOD_ARMS | ABLATIONS | CONTROLS
if "doremi_proxy" in distill.METHODS:
    ALL_ARMS["cpt_doremi"] = {"method": "cpt"}


@dataclass
class Setting:
    """Data, models and steps that all arms share. teacher, student: keys of the runs that train them."""
    n_bytes: dict
    teacher: dict | None  # None: --teacher is a model folder, and the bins have its tokenizer
    student: dict
    keys: dict = field(default_factory=dict)
    own_text: bool = False  # whether each seed draws its own text, and trains its own teacher


QUICKSTART = distill.quickstart_models(distill.Config().pretrain_steps)
SETTINGS = {
    "quickstart": Setting(QUICKSTART_BYTES, QUICKSTART["teacher"], QUICKSTART["student"],
                          keys={"test_samples": 128}),  # of 165 that every domain has, on Python 3.11
    # About four fifths of the Python files, and as much of the other domains as the quickstart has. With test_samples=0
    # a run takes as many windows as every domain has.
    "replicates": Setting({**QUICKSTART_BYTES, "python": 5_600_000}, QUICKSTART["teacher"], QUICKSTART["student"],
                          keys={"test_samples": 0}, own_text=True),
    # The student is ten of the teacher's layers. They first learn to work together, by KD on little but source code.
    "real": Setting(
        n_bytes={"python": 5_000_000, "cpp": 2_000_000, "math": 1_000_000, "prose": 600_000}, teacher=None,
        student={"method": "kd", "max_steps": 160, "warmup_steps": 16, "lr": 1e-3,
                 "min_lr": 1e-4, "mixture": "python=.45,cpp=.45,math=.05,prose=.05"},
        keys={"max_steps": 100, "warmup_steps": 10, "interval": 20, "val_samples": 24, "test_samples": 24,
              "batch_size": 4, "dtype": "bfloat16", "save_every": 50}),
}

# ------------ Data and models -----------------------------------------------------------------------------------------


def make_bins(setting: Setting, data_dir: Path, teacher: str, seed: int):
    """Make the setting's bins, or a seed's, unless they exist."""
    if (data_dir / "meta.json").is_file():
        return
    print(f"Collecting text into {data_dir} …", flush=True)
    files = functools.partial(shuffled_files, seed=seed) if setting.own_text else quickstart_files
    build_bins(data_dir, load_tokenizer(teacher or "bytes"), quickstart_documents(setting.n_bytes, files),
               val_fraction=0.1)


def shuffled_files(name: str, seed: int) -> list[list[str]]:
    """Return the quickstart's files of a domain, in a random order."""
    files = list(quickstart_files(name))
    random.Random(f"{seed} {name}").shuffle(files)
    return files


def ten_layers(teacher: str, folder: Path) -> str:
    """Make a model of ten evenly spaced layers of the teacher, unless it exists. Return its folder."""
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


# ------------ Runs ----------------------------------------------------------------------------------------------------


def run(keys: dict) -> Path:
    """Train, and print the final table into `out_dir`.log. Return the folder of the last checkpoint."""
    config = distill.resolve_config(keys)
    Path(config.out_dir).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{config.out_dir}.log", "a", encoding="utf-8") as log, redirect_stdout(log):
        folder = distill.train(config)
        distill.report(config, folder)
    return folder


def other_runs(results: dict, experiment: dict, seed: int, n_seeds: int) -> list[dict]:
    """Return DDK's runs of an experiment at all other seeds. UserError if fewer than n_seeds − 1 of them have run."""
    ddk = results.get("ddk", {})
    others = []
    if ddk.get("experiment") == experiment:
        others = [numbers for other, numbers in ddk["runs"].items() if other != str(seed)]
    if len(others) < max(n_seeds - 1, 1):
        raise UserError(f"--arms={','.join(CONTROLS)}: need ddk at all other seeds; let ddk run first")
    return others


def fixed_mixture(others: list[dict]) -> str:
    """Return the mean shares of train tokens that runs drew."""
    shares = {}
    for name in others[0]["end"]:
        shares[name] = statistics.mean(drawn_share(one["end"], name) for one in others)
    return ",".join(f"{name}={share:.5f}" for name, share in shares.items())


def register_kd_first(others: list[dict]):
    """Make kd_first a method of this process: natural proportions in the first interval, then the others' mean r of
    the later intervals. The r after the last step draws nothing."""
    mean_r = []
    for name in others[0]["r"]:
        mean_r.append(statistics.mean(share for one in others for share in one["r"][name][1:-1]))
    fixed = np.array(mean_r) / sum(mean_r)

    def kd_first_rule(state, student_ppl, teacher_ppl, natural, alpha):
        return (natural if state is None else fixed), {}

    RULES["kd_first"] = kd_first_rule
    distill.METHODS["kd_first"] = distill.Method("KD in DDK's mean r after a natural first interval", rule="kd_first")


def run_arm(name: str, keys: dict, others: list[dict]):
    """Run one arm at one seed. `others` are DDK's runs at the other seeds, by which the controls draw."""
    keys = {**keys, **ALL_ARMS[name]}
    if name == "kd_fixed":
        keys["mixture"] = fixed_mixture(others)
    elif name == "kd_first":
        register_kd_first(others)
    elif name == "cpt_doremi":  # three runs: the cpt arm as the reference, the proxy, and CPT in its mixture
        out_dir = Path(keys["out_dir"])
        seed = keys["seed"]
        reference = run({**keys, "out_dir": str(out_dir.with_name(f"cpt-{seed}"))})
        proxy_dir = out_dir.with_name(f"doremi_proxy-{seed}")
        run({**keys, "method": "doremi_proxy", "teacher": str(reference), "out_dir": str(proxy_dir)})
        keys["mixture"] = (proxy_dir / "mixture.txt").read_text(encoding="utf-8").strip()
    run(keys)


def end_of(metrics: list[dict]) -> dict:
    """Return what a finished run measured at its end, by domain."""
    return next(line for line in metrics if line["kind"] == "end")["domains"]


def summary(out_dir: Path, base_dir: Path) -> dict:
    """Return the numbers of a finished run. `base_ratio` is its student base's, on the test windows."""
    metrics = read_metrics(out_dir / "metrics.jsonl")
    run_line = next(line for line in metrics if line["kind"] == "run")
    end = end_of(metrics)
    base = end_of(read_metrics(base_dir / "metrics.jsonl"))
    mixtures = [line for line in metrics if line["kind"] == "mixture"]
    replayed = replay(mixtures, run_line["rule"], run_line["natural"], run_line["config"]["alpha"])
    for line, r in zip(mixtures, replayed, strict=True):
        assert all(abs(line["r"][name] - r[name]) < 1e-9 for name in r), f"{out_dir}: r does not follow at {line}"
    ratios = [domain["test_ratio"] for domain in end.values()]
    return {
        "versions": run_line["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "mean_ratio": statistics.mean(ratios),
        "worst_ratio": max(ratios),
        "base_ratio": {name: base[name]["test_student_ppl"] / end[name]["test_teacher_ppl"] for name in end},
        "end": end,
        "steps": [line["step"] for line in mixtures],
        "r": {name: [round(line["r"][name], 5) for line in mixtures] for name in end},
        "ratio": {name: [round(line["domains"][name]["ratio"], 5) for line in mixtures] for name in end},
    }


# ------------ The program ---------------------------------------------------------------------------------------------


def read_kept(path: Path) -> dict:
    """Return a results file: arm → {"experiment": …, "runs": seed → numbers}; empty if there is none."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any("runs" not in kept for kept in results.values()):
        raise UserError(f"{path}: has an older format; continue with the code that wrote it, or use another --out_dir")
    return results


def keep(path: Path, name: str, experiment: dict, seed: int, numbers: dict) -> dict:
    """Add a run to the results, to which another command may add at the same time. Return them all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read_kept(path)
        results.setdefault(name, {"experiment": experiment, "runs": {}})["runs"][str(seed)] = numbers
        path.with_suffix(".tmp").write_text(json.dumps(results), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
    return results


def chosen_arms(text: str) -> list[str]:
    """Return the arms of name,… UserError if the code does not have one."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name in FORKS and name not in ALL_ARMS:
            fork = FORKS[name]
            raise UserError(f"--arms={text}: {name} is a fork, and not in {CODE}; mkdir {fork} && cp *.py {fork} && "
                            f"git apply --directory={fork} tests/forks/{fork}.diff, then --code={fork}")
        if name not in ALL_ARMS:
            raise UserError(f"--arms={text}: {name} is none of {' '.join(ALL_ARMS)}")
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, parents=[CODE_PARSER],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="quickstart", help="data, models and steps")
    parser.add_argument("--teacher", default="", help="folder of a pretrained teacher, only for --setting=real")
    parser.add_argument("--seeds", type=int, default=5, help="run the seeds FIRST to SEEDS - 1")
    parser.add_argument("--first", type=int, default=0, help="the first seed to run")
    parser.add_argument("--arms", default="ddk,ddk_no_fs,ddk_es,kd,minillm,cpt", help="name,… of arms")
    parser.add_argument("--out_dir", default="", help="folder of the runs (default: out/compare-SETTING)")
    parser.add_argument("--label", default="", help="prefix of the names under which the runs are kept")
    parser.add_argument("--keys", default="", help="other values of distill.py's keys for all arms: key=value,…")
    parser.add_argument("--steps", type=int, default=0, help="steps of teacher and student base, to try it out")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    arms = chosen_arms(args.arms)
    common = {"data_dir": f"data/{args.setting}", **setting.keys, **extra_keys(args.keys, setting.keys)}
    out_dir = Path(args.out_dir or f"out/compare-{args.setting}")
    if (setting.teacher is None) != os.path.isdir(args.teacher):
        raise UserError(f"--teacher={args.teacher}: use the folder of a model, and only with --setting=real")

    # The runs that are missing. Those in the results have to be of the same experiment.
    path = out_dir / "results.json"
    results = read_kept(path)
    experiments = {}
    for name in arms:
        keys = experiment_keys({**common, **ALL_ARMS[name]})
        experiments[name] = {"setting": asdict(setting), "steps": args.steps, "keys": keys}
        if results.get(args.label + name, {}).get("experiment", experiments[name]) != experiments[name]:
            raise UserError(f"{path}: holds runs of {args.label}{name} with other keys, steps or setting; use another "
                            "--out_dir")
    todo = [(seed, name) for seed in range(args.first, args.seeds) for name in arms
            if str(seed) not in results.get(args.label + name, {"runs": {}})["runs"]]
    for seed, name in todo:
        if name in CONTROLS:
            other_runs(results, experiments[name], seed, args.seeds)

    def pretrain(keys: dict, seed: int, folder: Path) -> Path:
        keys = {**QUICKSTART["student"], **keys, "seed": seed, "out_dir": str(folder)}
        if args.steps:
            keys.update(max_steps=args.steps, warmup_steps=0)
        return run(keys)

    count = 0
    for seed in dict.fromkeys(seed for seed, _ in todo):
        # Bins and teacher: one of each, or the seed's own
        keys = dict(common)
        teacher_dir = out_dir / "teacher"
        teacher_seed = 0
        if setting.own_text:
            keys["data_dir"] = f"{common['data_dir']}-{seed}"
            teacher_dir = out_dir / f"teacher-{seed}"
            teacher_seed = seed
        make_bins(setting, Path(keys["data_dir"]), args.teacher, seed)
        if keys["test_samples"] == 0:
            bins = TokenBins(keys["data_dir"], distill.resolve_config({**keys, "preset": "quickstart"}).block_size)
            keys["test_samples"] = min(bins.count_windows(name, "test") for name in bins.names)
        teacher = args.teacher or pretrain({**keys, **setting.teacher}, teacher_seed, teacher_dir)
        same = {"bins": TokenBins(keys["data_dir"], 1).content(), "test_samples": keys["test_samples"],
                "teacher": sha256_of(Path(teacher, "model.safetensors"))}
        for arm in results.values():
            for other, numbers in arm["runs"].items():
                if numbers["same"] != same and (not setting.own_text or other == str(seed)):
                    raise UserError(f"{path}: holds runs on other bins than {keys['data_dir']}, other test windows, or "
                                    f"of another teacher than {teacher}; use another --out_dir")

        # The seed's student base, and the run of each arm from it
        base_keys = {**keys, **setting.student, "test_samples": keys["test_samples"]}  # a base is measured there, too
        if setting.teacher is None:
            base_keys.update(teacher=str(teacher), student=ten_layers(args.teacher, out_dir / "ten-layers"))
        base = pretrain(base_keys, seed, out_dir / f"base-{seed}")
        for name in [name for other, name in todo if other == seed]:
            count += 1
            kept_as = args.label + name
            run_dir = out_dir / f"{kept_as}-{seed}"
            others = other_runs(results, experiments[name], seed, args.seeds) if name in CONTROLS else []
            run_arm(name, {**keys, "preset": "quickstart", "teacher": str(teacher), "student": str(base), "seed": seed,
                           "keep": 1, "out_dir": str(run_dir)}, others)
            numbers = {"same": same, "others": len(others), **summary(run_dir, base.parent)}
            results = keep(path, kept_as, experiments[name], seed, numbers)
            print(f"{count}/{len(todo)}  {kept_as}, seed {seed}", flush=True)
    print(arms_table({args.setting: runs_of(results)}, results))


if __name__ == "__main__":
    run_program(main)
