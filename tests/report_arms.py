"""The tables and the figure of the README and of assets/RESULTS.md, from the results files in assets.

    python tests/report_arms.py        makes them anew; a test fails if they do not follow from the files

SETTING.json there is a copy of compare_arms.py's out/compare-SETTING/results.json. On a page, a table goes between
<!-- NAME --> and <!-- end -->.

Two arms are compared by their differences at the seeds that both have: what the arms share drops out. A p-value is by
Student's t of the differences, or, for the replicates, by the exact sign-flip test. Holm's correction over all tests of
a family decides at 5 %: the smallest of n p-values has to be at most .05 / n, the next at most .05 / (n − 1), and so on
until one is not.
"""

import argparse
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import import_optional, run_program

MEASURES = {"worst_ratio": "worst ratio", "mean_ratio": "mean ratio", "size_ratio": "mean ratio by size",
            "python_ratio": "Python's ratio", "speed": "steps until the worst validation ratio is below 2",
            "ratio_change": "change of the ratios", "r_change": "change of r",
            "late_ratio_change": "change of the ratios, later", "late_r_change": "change of r, later"}
BOTH = ("worst_ratio", "mean_ratio")
ALL = (*BOTH, "size_ratio")
CHANGES = ("r_change", "late_r_change", "ratio_change", "late_ratio_change")
DIGITS = {**dict.fromkeys(MEASURES, 3), **dict.fromkeys(CHANGES, 4), "speed": 1}
MIN_SEEDS = 3  # of a pair that is compared
ARMS = ["ddk", "kd_first", "kd_fixed", "ddk_no_fs", "ddk_es", "alpha=0.0", "gamma=0.0", "cpt_doremi", "kd", "ted",
        "minillm", "cpt"]
GAMMAS = [f"gamma={value}" for value in (0.0, 0.1, 0.3, 0.5)]
TEMPERATURES = [f"temperature={value}" for value in (0.1, 0.2, 0.5, 2.0)]
INTERVALS = [f"interval={value}" for value in (5, 15, 20)]
ALPHAS = [f"alpha={value}" for value in (0.0, 0.25, 0.75, 1.0)]
SWEPT = (*GAMMAS, *TEMPERATURES, *INTERVALS, *ALPHAS)


@dataclass
class Pair:
    """Two arms that are compared: first − second, by some measures."""
    first: str
    second: str
    text: str = ""  # without it, the measures stand in the row of another pair of these arms
    where: str = ""  # what the paper has on it, or what it isolates
    measures: tuple = BOTH
    below: str = "lower"  # the word for a difference below 0 that is decided
    above: str = "higher"


def claim(first: str, second: str, text: str, where: str, measures: tuple = BOTH) -> Pair:
    """Return what the paper claims: `first` is lower."""
    return Pair(first, second, text, where, measures, "holds", "reversed")


# The comparisons of `quickstart` and `real`
CLAIMS = [
    *[claim("ddk", arm, f"DDK better than {other}", "Tables 1, 2") for other, arm in
      (("CPT", "cpt"), ("CPT&DoReMi", "cpt_doremi"), ("KD", "kd"), ("TED", "ted"), ("MiniLLM", "minillm"))],
    claim("ddk", "ddk_no_fs", "DDK better than DDK without FS", "Table 5"),
    claim("ddk", "ddk_es", "DDK better than equal sampling", "Table 5"),
    claim("ddk_no_fs", "ddk_es", "DDK without FS better than equal sampling", "Table 5"),
    claim("ddk", "ddk_no_fs", "ratios move more smoothly with FS", "Fig. 3", ("ratio_change",)),
    claim("kd", "cpt", "KD better than CPT", "Tables 1, 2"),
    claim("cpt_doremi", "cpt", "CPT&DoReMi better than CPT", "Tables 1, 2"),
    claim("kd", "cpt_doremi", "KD better than CPT&DoReMi", "Tables 1, 2"),
    *[Pair("kd", arm, f"KD similar to {other}", "§4.2") for other, arm in (("TED", "ted"), ("MiniLLM", "minillm"))],
    *[claim("ddk", name, f"γ = 0.2 better than {name.removeprefix('gamma=')}", "Table 3") for name in GAMMAS],
    *[claim("ddk", name, f"K = 10 better than {name.removeprefix('interval=')}", "Table 6") for name in INTERVALS],
]
# Registered on 2026-12-01 (commit f026abb), before the first of these runs:
# - N_REPLICATES replicates, each with its own order of the text, bins, windows, teacher and student base;
# - the methods ddk ddk_no_fs ddk_es alpha=0.0 gamma=0.0 kd minillm cpt kd_fixed kd_first;
# - the primary comparison: the first pair, on the worst test ratio;
# - the test: the exact sign-flip test, two-sided, with Holm's correction at 5 % over all pairs and measures;
# - the basis of every share of a gain: DDK's gain over CPT;
# - the measure of speed: the first evaluation at which the worst validation ratio is below 2; one interval after the
#   end if it never is;
# - the time course: the difference at each evaluation, on validation windows, with 95 % intervals and without tests.
N_REPLICATES = 24
SPEEDS = (*ALL, "speed")
REGISTERED = [
    Pair("ddk", "kd_first", "DDK − KD in DDK's mean r after a natural first interval", "what r's motion does", SPEEDS),
    Pair("ddk", "kd_fixed", "DDK − KD in DDK's mean mixture", "which has no natural first interval", SPEEDS),
    Pair("ddk", "cpt", "DDK − CPT", "Tables 1, 2: lower", ALL),
    Pair("ddk", "kd", "DDK − KD", "Tables 1, 2: lower", SPEEDS),
    Pair("ddk", "minillm", "DDK − MiniLLM", "Tables 1, 2: lower", ALL),
    Pair("ddk", "ddk_es", "DDK − equal sampling", "Table 5: lower", SPEEDS),
    Pair("ddk", "alpha=0.0", "DDK − (α = 0)", "equal sampling after the same first interval", ALL),
    Pair("ddk", "ddk_no_fs", "DDK − DDK without FS", "Table 5: lower", SPEEDS),
    Pair("ddk", "gamma=0.0", "DDK − (γ = 0)", "§4.2: the divergence is pivotal", ALL),
    Pair("gamma=0.0", "cpt", "(γ = 0) − CPT", "the mixture without the divergence", ALL),
    Pair("kd_fixed", "kd", "KD in DDK's mean mixture − KD", "the mixture only", ALL),
    Pair("kd_first", "kd_fixed", "with − without the natural first interval", "both in DDK's mean r", ALL),
    Pair("kd", "cpt", "KD − CPT", "Tables 1, 2: lower", ALL),
    Pair("ddk", "ddk_no_fs", "DDK − DDK without FS", "§3.3, Fig. 3: lower", CHANGES),
    *[Pair("ddk", arm, measures=("python_ratio",)) for arm in ("kd", "kd_first", "ddk_es")],  # what DDK costs Python
]
# Registered on 2026-12-02, before the runs above were complete, as secondary: the replicates of seeds 0 to 7, with 1,200
# steps and interval=40, which is the same fraction of a run. DDK − kd_first, kd_fixed and ddk_es at the end, on the
# worst, the mean and the size-weighted test ratio, with 95 % intervals and without tests.

# ------------ Statistics ----------------------------------------------------------------------------------------------


def over_time(one: dict, function) -> list[float]:
    """Return max or mean, over domains, of a run's validation ratios at each evaluation."""
    return [function(ratios) for ratios in zip(*one["ratio"].values())]


def measured(one: dict, measure: str) -> float:
    """Return a number of a run. `size_ratio` is the mean ratio, each domain weighted by its train tokens. `speed` is
    the first evaluation at which the worst validation ratio is below 2, or one interval after the end. `ratio_change`
    and `r_change` are the mean absolute difference from one evaluation to the next, over domains, after the first
    interval, in which r does not draw yet; `late_…` after the first two in which it draws."""
    domains = one["end"].values()
    if measure == "size_ratio":
        sizes = [domain["tokens"] / domain["epochs"] for domain in domains]
        return sum(size * domain["test_ratio"] for size, domain in zip(sizes, domains)) / sum(sizes)
    if measure == "speed":
        reached = [step for step, ratio in zip(one["steps"], over_time(one, max)) if ratio < 2]
        return reached[0] if reached else 2 * one["steps"][-1] - one["steps"][-2]
    if measure == "python_ratio":
        return one["end"]["python"]["test_ratio"]
    if measure in CHANGES:
        first = 3 if measure.startswith("late_") else 1
        changes = []
        for history in one["ratio" if "ratio" in measure else "r"].values():
            changes.append(np.abs(np.diff(history[first:])).mean())
        return statistics.mean(changes)
    return one[measure]


def drawn_share(end: dict, name: str) -> float:
    """Return a domain's share of the tokens that a run drew, from its last measurement."""
    return end[name]["tokens"] / sum(domain["tokens"] for domain in end.values())


def values(runs: dict, arm: str, measure: str) -> list[float]:
    return [measured(one, measure) for one in runs[arm].values()]


def common_seeds(runs: dict, first: str, second: str) -> list[str]:
    return sorted(runs.get(first, {}).keys() & runs.get(second, {}).keys(), key=int)


def paired(runs: dict, first: str, second: str, measure: str) -> list[float]:
    """Return first − second at each seed that both have."""
    return [measured(runs[first][seed], measure) - measured(runs[second][seed], measure)
            for seed in common_seeds(runs, first, second)]


def mean_and_error(numbers: list[float]) -> tuple[float, float]:
    """Return mean and standard error. The error of a single number is NaN."""
    if len(numbers) < 2:
        return statistics.mean(numbers), math.nan
    return statistics.mean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))


def t_p(differences: list[float]) -> float:
    """Return the two-sided p-value, by Student's t, of a mean of 0."""
    mean, error = mean_and_error(differences)
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * scipy.stats.t.sf(abs(mean / error), len(differences) - 1)


def interval(numbers: list[float]) -> tuple[float, float]:
    """Return the mean's 95 % interval by Student's t."""
    mean, error = mean_and_error(numbers)
    half = scipy.stats.t.ppf(0.975, len(numbers) - 1) * error
    return mean - half, mean + half


def sign_flip_p(differences: list[float]) -> float:
    """Return the exact two-sided p-value: the share of all 2^n choices of signs for which the sum of the differences is
    at least as far from 0. Each such sum is a sum over the first half of the differences plus one over the second."""
    half = len(differences) // 2
    sums = []
    for part in (differences[:half], differences[half:]):
        of_part = np.zeros(1)
        for difference in part:
            of_part = np.concatenate([of_part - difference, of_part + difference])
        sums.append(np.sort(of_part))
    first, second = sums
    limit = abs(math.fsum(differences)) * (1 - 1e-9)  # sums that are equal but for rounding count
    below = np.searchsorted(second, -limit - first, side="right").sum()
    above = (len(second) - np.searchsorted(second, limit - first, side="left")).sum()
    return min(1.0, float(below + above) / 2 ** len(differences))


def holm(p_values: dict) -> set:
    """Return the keys whose null hypotheses are rejected at 5 % over all of them."""
    rejected = set()
    for place, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > 0.05 / (len(p_values) - place):
            break
        rejected.add(key)
    return rejected


def decided(runs: dict, family: list[Pair], test=t_p) -> dict:
    """Return (first, second, measure) → differences, p-value, and whether Holm's correction over the family rejects
    that they are 0; of the pairs that have MIN_SEEDS or more in common."""
    differences = {}
    for pair in family:
        for measure in pair.measures:
            numbers = paired(runs, pair.first, pair.second, measure)
            if len(numbers) >= MIN_SEEDS:
                differences[pair.first, pair.second, measure] = numbers
    p_values = {key: test(numbers) for key, numbers in differences.items()}
    rejected = holm(p_values)
    return {key: (numbers, p_values[key], key in rejected) for key, numbers in differences.items()}


def share_of_gain(runs: dict, arm: str, measure: str) -> tuple[float, list[float]]:
    """Return the share that `arm` has of DDK's gain over CPT: that of the means, and the jackknife's value of each
    replicate, for the share's interval."""
    seeds = common_seeds(runs, "ddk", arm)

    def share(left_out):
        gains = []
        for name in (arm, "ddk"):
            gains.append(sum(measured(runs["cpt"][seed], measure) - measured(runs[name][seed], measure)
                             for seed in seeds if seed != left_out))
        return gains[0] / gains[1]

    n = len(seeds)
    whole = share(None)
    return whole, [n * whole - (n - 1) * share(seed) for seed in seeds]


# ------------ Tables --------------------------------------------------------------------------------------------------


def format_mean(numbers: list[float], sign: str = "", digits: int = 3) -> str:
    mean, error = mean_and_error(numbers)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def format_interval(numbers: list[float], digits: int = 3) -> str:
    low, high = interval(numbers)
    return f"{statistics.mean(numbers):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def rows_of(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(pair: Pair, numbers: list[float], is_decided: bool) -> str:
    if not is_decided:
        return "not decided"
    return f"**{pair.below if statistics.mean(numbers) < 0 else pair.above}**"


def difference_cell(pair: Pair, test: tuple, digits: int = 3) -> str:
    """Return difference, interval, p-value and verdict, from an entry of `decided`."""
    numbers, p, is_decided = test
    p_text = "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"
    return f"{format_interval(numbers, digits)}, {p_text}, {verdict(pair, numbers, is_decided)}"


def claims_table(settings: dict) -> str:
    """Return a row for each claim, and for each setting its difference and verdict by each measure."""
    tests = {name: decided(runs, CLAIMS) for name, runs in settings.items()}
    rows = []
    for pair in CLAIMS:
        cells = []
        for setting in settings:
            parts = []
            for measure in pair.measures:
                if (pair.first, pair.second, measure) in tests[setting]:
                    numbers, _, is_decided = tests[setting][pair.first, pair.second, measure]
                    parts.append(f"{format_mean(numbers, '+', DIGITS[measure])} {verdict(pair, numbers, is_decided)}")
            cells.append("; ".join(parts))
        if any(cells):
            rows.append([f"{pair.text} ({pair.where})", "; ".join(MEASURES[measure] for measure in pair.measures),
                         *cells])
    return rows_of(["", "", *settings], rows)


def arms_table(settings: dict, arms=ARMS, shares: bool = False) -> str:
    """Return a row for the student bases and each arm that has run, on the test windows: the worst and the mean ratio,
    and the ratio of each domain; with `shares` the share of DDK's gain over CPT."""
    rows = []
    for setting, runs in settings.items():
        ratios = {}  # arm → seeds × domains
        for arm in [arm for arm in arms if arm in runs]:
            every = list(runs[arm].values())
            if not ratios and "base_ratio" in every[0]:
                ratios["student base"] = [list(one["base_ratio"].values()) for one in every]
            ratios[arm] = [[domain["test_ratio"] for domain in one["end"].values()] for one in every]
        for arm, of_runs in ratios.items():
            label = arm if arm == "student base" else f"`{arm}`"
            worst = [max(of_run) for of_run in of_runs]
            mean = [statistics.mean(of_run) for of_run in of_runs]
            row = [f"{setting}: {label}" if len(settings) > 1 else label, str(len(of_runs)), format_mean(worst),
                   format_mean(mean), *[f"{ratio:.2f}" for ratio in np.mean(of_runs, axis=0)]]
            for measure in BOTH if shares else ():
                cell = ""
                if arm not in ("student base", "ddk", "cpt"):
                    whole, of_replicates = share_of_gain(runs, arm, measure)
                    low, high = interval(of_replicates)
                    cell = f"{whole:.1%} [{low:.1%}, {high:.1%}]"
                row.append(cell)
            rows.append(row)
    header = ["", "seeds", *[MEASURES[measure] for measure in BOTH], *every[0]["end"]]
    if shares:
        header += [f"share of DDK's gain over CPT, {MEASURES[measure]}" for measure in BOTH]
    return rows_of(header, rows)


def replicates_table(runs: dict) -> str:
    """Return the README's table: four arms, their ratios, and how far DDK's are below or above, with 95 % intervals."""
    rows = []
    for arm in ("ddk", "kd_first", "ddk_es", "kd"):
        row = [f"`{arm}`"]
        for measure in ALL:
            row.append(f"{statistics.mean(values(runs, arm, measure)):.3f}")
            row.append("" if arm == "ddk" else format_interval(paired(runs, "ddk", arm, measure)))
        rows.append(row)
    return rows_of(["", *[word for measure in ALL for word in (MEASURES[measure], "DDK − it")]], rows)


def family_table(family: list[Pair], tests: dict) -> str:
    """Return a row for each pair and a column for each measure: difference, interval, p-value and verdict. CHANGES have
    no columns of their own: each cell of their row says which it is."""
    columns = [measure for measure in (*SPEEDS, "python_ratio") if any(measure in key for key in tests)]
    rows = []
    for pair in [pair for pair in family if pair.text]:
        row = [f"{pair.text} ({pair.where})" if pair.where else pair.text]
        for measure in columns if pair.measures != CHANGES else CHANGES:
            label = "" if measure in columns else f"{MEASURES[measure]}: "
            test = tests.get((pair.first, pair.second, measure))
            row.append(label + difference_cell(pair, test, DIGITS[measure]) if test else "")
        rows.append(row + [""] * (len(columns) + 1 - len(row)))
    return rows_of(["", *[MEASURES[measure] for measure in columns]], rows)


def course_table(runs: dict, longer: dict, shown=(20, 50, 100, 200, 300)) -> str:
    """Return the time course: DDK − another arm on validation windows, with 95 % intervals, at the `shown` steps. The
    last row is of the longer runs, at their end on test windows."""
    others = [arm for arm in ("kd_first", "kd_fixed", "ddk_es") if arm in runs]
    steps = runs["ddk"]["0"]["steps"]
    rows = []
    for step in shown:
        t = steps.index(step)
        row = [str(step)]
        for arm in others:
            for function in (max, statistics.mean):
                differences = [over_time(runs["ddk"][seed], function)[t] - over_time(runs[arm][seed], function)[t]
                               for seed in common_seeds(runs, "ddk", arm)]
                row.append(format_interval(differences))
        rows.append(row)
    at_end = [format_interval(paired(longer, "ddk", arm, measure)) for arm in others for measure in BOTH]
    rows.append([f"1,200 (test, {len(longer['ddk'])} replicates)", *at_end])
    return rows_of(["step", *[f"DDK − `{arm}`, {word}" for arm in others for word in ("worst", "mean")]], rows)


def make_tables(settings: dict, replicates: dict, longer: dict) -> dict[str, str]:
    """Return name → table."""
    swept = [*ALPHAS, *TEMPERATURES, *[f"t2_{name}" for name in TEMPERATURES]]
    arms = [arm for arm in ARMS if "=" not in arm] + swept
    assert all(len(replicates[arm]) == N_REPLICATES for pair in REGISTERED for arm in (pair.first, pair.second))
    return {"settings": arms_table(settings, arms), "claims": claims_table(settings),
            "replicates": replicates_table(replicates),
            "family": family_table(REGISTERED, decided(replicates, REGISTERED, sign_flip_p)),
            "course": course_table(replicates, longer),
            "replicates_arms": arms_table({"replicates": replicates}, shares=True)}


# ------------ Pages and figures ---------------------------------------------------------------------------------------


def with_tables(page: str, tables: dict[str, str]) -> str:
    """Return `page` with each table between its marks replaced."""
    def replaced(match):
        name = match[1]
        return f"<!-- {name} -->\n{tables[name]}\n<!-- end -->"
    return re.sub(r"<!-- (?!end)(\w+) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)


# Each arm has a color and a marker, each domain a line style; the grays differ too.
STYLES = {"ddk": ("#08306b", "o"), "kd_first": ("#a6408f", "X"), "kd_fixed": ("#009e73", "P"),
          "ddk_es": ("#56b4e9", "D"), "kd": ("#e69f00", "^"), "cpt": ("#c0c0c0", "v")}


def draw(runs: dict, path: Path):
    """Draw the worst ratio of each arm over the steps (the paper's Fig. 3) and DDK's r, on validation windows: means
    over seeds."""
    figure = import_optional("matplotlib.figure", "figures").Figure(figsize=(11, 4), layout="constrained")
    ratios, weights = figure.subplots(1, 2)
    steps = runs["ddk"]["0"]["steps"]
    for arm in [arm for arm in STYLES if arm in runs]:
        color, marker = STYLES[arm]
        worst = [over_time(one, max) for one in runs[arm].values()]
        ratios.plot(steps, np.mean(worst, axis=0), color=color, marker=marker, markevery=0.1, label=arm)
    ratios.set(xlabel="step", yscale="log", ylabel="worst perplexity ratio (log scale)")
    for name, line in zip(runs["ddk"]["0"]["r"], ("-", "--", "-.", ":")):
        r = np.mean([one["r"][name] for one in runs["ddk"].values()], axis=0)
        weights.plot(steps, r, line, color=STYLES["ddk"][0], drawstyle="steps-post", label=name)
    weights.set(xlabel="step", ylabel="r under ddk, for the next K steps", ylim=(0, None))
    for ax in (ratios, weights):
        ax.legend(fontsize="small")
        ax.grid(alpha=0.3)
    ratios.yaxis.set_major_formatter("{x:g}")
    ratios.yaxis.set_minor_formatter("{x:g}")
    figure.savefig(path, dpi=110)


def runs_of(results: dict) -> dict:
    """Return arm → seed → numbers of a results file."""
    return {arm: kept["runs"] for arm, kept in results.items()}


def read_runs(name: str) -> dict:
    return runs_of(json.loads((ROOT / "assets" / f"{name}.json").read_text(encoding="utf-8")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    settings = {name: read_runs(name) for name in ("quickstart", "real")}
    replicates = read_runs("replicates")
    tables = make_tables(settings, replicates, read_runs("longer"))
    for page in (ROOT / "README.md", ROOT / "assets" / "RESULTS.md"):
        page.write_text(with_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    draw(replicates, ROOT / "assets" / "replicates.png")


if __name__ == "__main__":
    run_program(main)
