"""The tables and figures of the README and of assets/RESULTS.md, from the results files beside it.

    python tests/report_arms.py        makes them anew; a test fails where they do not follow from the files

A results file, SETTING.json, is what `compare_arms.py --setting=SETTING` kept of its runs: arm → seed → what it gave. A
table stands between <!-- NAME --> and <!-- end -->.

Two arms are compared by the differences at the seeds that both have: what the arms share drops out. A p-value is by
Student's t of the differences, or, for the replicates, by the exact sign-flip test. Holm's correction over all rows of
a table in one setting's column decides at 5 %: the smallest of n p-values has to be at most .05 / n, the next at most
.05 / (n − 1), and so on until one is not.
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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import import_optional, run_program

MEASURES = {"worst_ratio": "worst ratio", "mean_ratio": "mean ratio", "size_ratio": "mean ratio by size",
            "ratio_range": "largest − smallest ratio", "python_ratio": "Python's ratio",
            "steps_below_2": "steps until the worst validation ratio is below 2",
            "ratio_change": "change of the ratios", "r_change": "change of r",
            "late_ratio_change": "change of the ratios, later", "late_r_change": "change of r, later"}
BOTH = ("worst_ratio", "mean_ratio")
ALL = (*BOTH, "size_ratio")
CHANGES = ("r_change", "late_r_change", "ratio_change", "late_ratio_change")
MIN_SEEDS = 3  # of a setting, or of a pair, that is compared
ARMS = ["ddk", "kd_fixed", "ddk_no_fs", "ddk_es", "alpha=0.0", "gamma=0.0", "cpt_doremi", "kd", "ted", "minillm", "cpt"]
GAMMAS = [f"gamma={value}" for value in (0.0, 0.1, 0.3, 0.5)]
TEMPERATURES = [f"temperature={value}" for value in (0.1, 0.2, 0.5, 2.0)]
INTERVALS = [f"interval={value}" for value in (5, 15, 20)]
ALPHAS = [f"alpha={value}" for value in (0.25, 0.75, 1.0)]
ABLATED = (*GAMMAS, *TEMPERATURES, *INTERVALS, *ALPHAS)  # the quickstart's


@dataclass
class Pair:
    """Two arms that are compared: first − second, by some measures."""
    first: str
    second: str
    text: str
    where: str = ""  # what the paper has on it, or what it isolates
    measures: tuple = BOTH
    below: str = "lower"  # the word for a difference below 0 that is decided
    above: str = "higher"


def claim(first: str, second: str, text: str, where: str, measures: tuple = BOTH) -> Pair:
    """What the paper claims: `first` is the lower one."""
    return Pair(first, second, text, where, measures, "holds", "reversed")


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
    *[Pair("kd", arm, f"KD similar to {other}", "§4.2", BOTH, "reversed: lower", "reversed: higher") for other, arm in
      (("TED", "ted"), ("MiniLLM", "minillm"))],
    *[claim("ddk", name, f"γ = 0.2 better than {name.removeprefix('gamma=')}", "Table 3") for name in GAMMAS],
    *[claim("ddk", name, f"K = 10 better than {name.removeprefix('interval=')}", "Table 6") for name in INTERVALS],
]
COMPARISONS = [
    Pair("ddk", "alpha=0.0", "DDK − (α = 0)", "equal sampling after the same first interval"),
    Pair("alpha=0.0", "ddk_es", "(α = 0) − equal sampling", "the first interval alone"),
    *[Pair("ddk", arm, f"DDK − {other}", "", ("size_ratio",)) for other, arm in
      (("CPT", "cpt"), ("KD", "kd"), ("equal sampling", "ddk_es"))],
    Pair("ddk", "kd", "DDK − KD", "one reading of §1: “gap across domains … reduced”", ("ratio_range",)),
    Pair("ddk_es", "kd", "equal sampling − KD"),
    *[Pair("ddk", name, "") for name in (*ALPHAS, *TEMPERATURES)],  # in tables of their own
]
# The comparisons of the replicates of November 2026 and their number, both written before the first of them was run
N_REPLICATES = 24
REPLICATED = [
    Pair("ddk", "kd_fixed", "DDK − KD in DDK's mean mixture, held fixed", "which has no natural first interval", ALL),
    Pair("ddk", "cpt", "DDK − CPT", "Tables 1, 2: lower", ALL),
    Pair("ddk", "kd", "DDK − KD", "Tables 1, 2: lower", ALL),
    Pair("ddk", "minillm", "DDK − MiniLLM", "Tables 1, 2: lower", ALL),
    Pair("ddk", "ddk_es", "DDK − equal sampling", "Table 5: lower", ALL),
    Pair("ddk", "alpha=0.0", "DDK − (α = 0)", "equal sampling after the same first interval", ALL),
    Pair("ddk", "ddk_no_fs", "DDK − DDK without FS", "Table 5: lower", ALL),
    Pair("ddk", "gamma=0.0", "DDK − (γ = 0)", "§4.2: the divergence is pivotal", ALL),
    Pair("gamma=0.0", "cpt", "(γ = 0) − CPT", "the mixture without the divergence", ALL),
    Pair("kd_fixed", "kd", "KD in the fixed mixture − KD", "the mixture alone", ALL),
    Pair("kd_fixed", "ddk_es", "KD in the fixed mixture − equal sampling", "", ALL),
    Pair("kd", "cpt", "KD − CPT", "Tables 1, 2: lower", ALL),
    Pair("ddk", "ddk_no_fs", "DDK − DDK without FS", "§3.3, Fig. 3: lower", CHANGES),
    *[Pair("ddk", arm, f"DDK − {other}", "what DDK costs Python", ("python_ratio",)) for other, arm in
      (("KD", "kd"), ("KD in the fixed mixture", "kd_fixed"), ("equal sampling", "ddk_es"))],
]
# Registered on 2026-12-01, before the first of these runs, which nobody looks at before the last one has run:
# - N_REPLICATES replicates, each with its own order of the text, bins, windows, teacher and student base;
# - the methods ddk ddk_no_fs ddk_es alpha=0.0 gamma=0.0 kd minillm cpt kd_fixed kd_first;
# - the primary comparison, the first of REGISTERED on the worst test ratio;
# - the test: the exact sign-flip test, two-sided, with Holm's correction at 5 % over all rows and measures of
#   REGISTERED;
# - the basis of every share of a gain: DDK's gain over CPT;
# - the measure of speed, SPEED: the first evaluation at which the worst validation ratio is below 2; one interval after
#   the end if it never is;
# - the time course: the difference at each evaluation, on validation windows, with 95 % intervals and without tests.
SPEED = "steps_below_2"
REGISTERED = [
    Pair("ddk", "kd_first", "DDK − KD in DDK's mean r after a natural first interval", "what r's motion does",
         (*ALL, SPEED)),
    Pair("ddk", "kd_fixed", "DDK − KD in DDK's mean mixture", "which has no natural first interval", (*ALL, SPEED)),
    Pair("ddk", "cpt", "DDK − CPT", "Tables 1, 2: lower", ALL),
    Pair("ddk", "kd", "DDK − KD", "Tables 1, 2: lower", (*ALL, SPEED)),
    Pair("ddk", "minillm", "DDK − MiniLLM", "Tables 1, 2: lower", ALL),
    Pair("ddk", "ddk_es", "DDK − equal sampling", "Table 5: lower", (*ALL, SPEED)),
    Pair("ddk", "alpha=0.0", "DDK − (α = 0)", "equal sampling after the same first interval", ALL),
    Pair("ddk", "ddk_no_fs", "DDK − DDK without FS", "Table 5: lower", (*ALL, SPEED)),
    Pair("ddk", "gamma=0.0", "DDK − (γ = 0)", "§4.2: the divergence is pivotal", ALL),
    Pair("gamma=0.0", "cpt", "(γ = 0) − CPT", "the mixture without the divergence", ALL),
    Pair("kd_fixed", "kd", "KD in DDK's mean mixture − KD", "the mixture only", ALL),
    Pair("kd_first", "kd_fixed", "with − without the natural first interval", "both in DDK's mean r", ALL),
    Pair("kd", "cpt", "KD − CPT", "Tables 1, 2: lower", ALL),
    Pair("ddk", "ddk_no_fs", "DDK − DDK without FS", "§3.3, Fig. 3: lower", CHANGES),
    *[Pair("ddk", arm, f"DDK − {other}", "what DDK costs Python", ("python_ratio",)) for other, arm in
      (("KD", "kd"), ("KD in DDK's mean r after a natural first interval", "kd_first"),
       ("equal sampling", "ddk_es"))],
]


# ------------ Statistics ----------------------------------------------------------------------------------------------


def measured(one: dict, measure: str) -> float:
    """A number of a run. `size_ratio` is the mean ratio, each domain weighted by its train tokens; `ratio_range` the
    largest ratio at the end minus the smallest; `ratio_change` and `r_change` the mean, over domains, of the absolute
    difference from one evaluation to the next, after the first interval, in which r does not draw yet; and `late_…`
    after the first two in which it draws."""
    domains = one["end"].values()
    ratios = [domain["test_ratio"] for domain in domains]
    if measure == "size_ratio":
        sizes = [domain["tokens"] / domain["epochs"] for domain in domains]
        return sum(size * ratio for size, ratio in zip(sizes, ratios)) / sum(sizes)
    if measure == "ratio_range":
        return max(ratios) - min(ratios)
    if measure == SPEED:
        worst = [max(of_evaluation) for of_evaluation in zip(*one["ratio"].values())]
        reached = [step for step, ratio in zip(one["steps"], worst) if ratio < 2]
        return reached[0] if reached else 2 * one["steps"][-1] - one["steps"][-2]
    if measure == "python_ratio":
        return one["end"]["python"]["test_ratio"]
    if measure in CHANGES:
        first = 3 if measure.startswith("late_") else 1
        changes = []
        for history in one["ratio" if "ratio" in measure else "r"].values():
            changes.append(statistics.mean(abs(after - before)
                                           for before, after in zip(history[first:], history[first + 1:])))
        return statistics.mean(changes)
    return one[measure]


def drawn_share(end: dict, name: str) -> float:
    """A domain's share of the tokens that a run drew, from what it was at its end."""
    return end[name]["tokens"] / sum(domain["tokens"] for domain in end.values())


def values(results: dict, arm: str, measure: str) -> list[float]:
    return [measured(one, measure) for one in results[arm].values()]


def common_seeds(results: dict, first: str, second: str) -> list[str]:
    return sorted(results.get(first, {}).keys() & results.get(second, {}).keys(), key=int)


def paired(results: dict, first: str, second: str, measure: str) -> list[float]:
    """first − second at each seed that both have."""
    return [measured(results[first][seed], measure) - measured(results[second][seed], measure)
            for seed in common_seeds(results, first, second)]


def mean_and_error(numbers: list[float]) -> tuple[float, float]:
    """Mean and standard error; of one number the error is not known."""
    if len(numbers) < 2:
        return statistics.mean(numbers), math.nan
    return statistics.mean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))


def student_p(t: float, degrees: int) -> float:
    """Two-sided p-value of Student's t; its distribution function for whole degrees of freedom is a sum."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    total = 0.0
    term = math.cos(angle) if odd else 1.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return 1 - inside


def p_value(differences: list[float]) -> float:
    """Two-sided, by Student's t, of a mean of 0."""
    mean, error = mean_and_error(differences)
    if error == 0:
        return 0.0 if mean else 1.0
    return student_p(mean / error, len(differences) - 1)


def interval(numbers: list[float]) -> tuple[float, float]:
    """The mean's 95 % interval by Student's t, whose quantile is found by bisection."""
    mean, error = mean_and_error(numbers)
    low, high = 0.0, 1000.0
    for _ in range(60):
        t = (low + high) / 2
        if student_p(t, len(numbers) - 1) > 0.05:
            low = t
        else:
            high = t
    return mean - t * error, mean + t * error


def sign_flip_p(differences: list[float]) -> float:
    """Two-sided, exact: the share of all choices of signs that make the sum of the differences as far from 0 as it is.
    The 2^n sums are those of the first half of the differences and of the second, each with each."""
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
    """The keys whose null hypotheses are rejected at 5 % over all of them."""
    rejected = set()
    for place, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > 0.05 / (len(p_values) - place):
            break
        rejected.add(key)
    return rejected


# ------------ Tables --------------------------------------------------------------------------------------------------


def format_mean(numbers: list[float], sign: str = "", digits: int = 3) -> str:
    mean, error = mean_and_error(numbers)
    text = f"{mean:{sign}.{digits}f}"
    if not math.isnan(error):
        text += f" ± {error:.{digits}f}"
    return text


def rows_of(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def decided(results: dict, pairs: list[Pair], test=p_value) -> dict:
    """(first, second, measure) → differences, and whether Holm's correction of the p-values of `test` rejects that they
    are 0; of the pairs that have MIN_SEEDS or more in common."""
    differences = {}
    for pair in pairs:
        for measure in pair.measures:
            numbers = paired(results, pair.first, pair.second, measure)
            if len(numbers) >= MIN_SEEDS:
                differences[pair.first, pair.second, measure] = numbers
    rejected = holm({key: test(numbers) for key, numbers in differences.items()})
    return {key: (numbers, key in rejected) for key, numbers in differences.items()}


def verdict(pair: Pair, numbers: list[float], is_decided: bool) -> str:
    if not is_decided:
        return "not decided"
    return f"**{pair.below if statistics.mean(numbers) < 0 else pair.above}**"


def pair_name(pair: Pair) -> str:
    return f"{pair.text} ({pair.where})" if pair.where else pair.text


def pairs_table(settings: dict, pairs: list[Pair]) -> str:
    """A row for each pair, a column for each setting: the difference by each measure, and its verdict. Differences
    without a text take part in the correction, but stand in tables of their own."""
    tests = {name: decided(results, pairs) for name, results in settings.items()}
    rows = []
    for pair in pairs:
        cells = []
        for setting in settings:
            parts = []
            for measure in pair.measures:
                if (pair.first, pair.second, measure) in tests[setting]:
                    numbers, is_decided = tests[setting][pair.first, pair.second, measure]
                    parts.append(f"{format_mean(numbers, '+')} {verdict(pair, numbers, is_decided)}")
            cells.append("; ".join(parts))
        if pair.text and any(cells):
            rows.append([pair_name(pair), "; ".join(MEASURES[measure] for measure in pair.measures), *cells])
    return rows_of(["", "", *settings], rows)


def bold_if_decided(cell: str, tests: dict, arm: str, measure: str) -> str:
    """`cell` in bold if `tests`, of `decided`, rejects that `arm` equals DDK by `measure`."""
    _, is_decided = tests.get(("ddk", arm, measure), (None, False))
    return f"**{cell}**" if is_decided else cell


def ratios_row(label: str, ratios: list[list[float]]) -> list[str]:
    """A row of arms_table, from the ratio of each domain in each run."""
    worst = [max(of_run) for of_run in ratios]
    mean = [statistics.mean(of_run) for of_run in ratios]
    per_domain = [f"{statistics.mean(of_domain):.2f}" for of_domain in zip(*ratios)]
    return [label, str(len(ratios)), format_mean(worst), format_mean(mean), *per_domain]


def base_row(runs: dict, arm: str) -> list[str]:
    """The row of the student bases, from the runs of an arm: on the test windows if they were measured there, otherwise
    on the validation windows, from before the arm's run to its end."""
    every = list(runs.values())
    if "base_ratio" in every[0]:
        return ratios_row("student base", [list(one["base_ratio"].values()) for one in every])
    before = [[history[0] for history in one["ratio"].values()] for one in every]
    after = [[domain["ratio"] for domain in one["end"].values()] for one in every]
    label = f"student base → `{arm}`, validation windows"
    first = ratios_row(label, before)
    last = ratios_row(label, after)
    return [*first[:2], *[f"{one} → {other}" for one, other in zip(first[2:], last[2:])]]


def arm_row(results: dict, arm: str) -> list[str]:
    """The row of an arm, at the end of its runs, on the test windows."""
    last = [[domain["test_ratio"] for domain in one["end"].values()] for one in results[arm].values()]
    return ratios_row(f"`{arm}`", last)


def arms_table(settings: dict, arms=ARMS) -> str:
    """Of each setting, which all have the same domains, a row for the student bases, and one for each arm that has run:
    worst and mean ratio, and the ratio of each domain, on the test windows."""
    rows = []
    for name, results in settings.items():
        present = [arm for arm in arms if arm in results]
        some = [base_row(results[present[0]], present[0])]
        some += [arm_row(results, arm) for arm in present]
        for row in some:
            label = f"{name}: {row[0]}" if len(settings) > 1 else row[0]
            rows.append([label, *row[1:]])
        domains = list(next(iter(results[present[0]].values()))["end"])
    return rows_of(["", "seeds", *[MEASURES[measure] for measure in BOTH], *domains], rows)


# ------------ The replicates' tables ----------------------------------------------------------------------------------

def format_interval(numbers: list[float], digits: int = 3) -> str:
    low, high = interval(numbers)
    return f"{statistics.mean(numbers):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def format_p(p: float) -> str:
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"


def replicates_table(results: dict) -> str:
    """The README's: a row for four arms, their ratios, and how far DDK's are below or above them, with 95 % intervals."""
    header = [""]
    for measure in ALL:
        header += [MEASURES[measure], "DDK − it"]
    rows = []
    for arm in ("ddk", "kd_fixed", "ddk_es", "kd"):
        row = [f"`{arm}`"]
        for measure in ALL:
            row.append(f"{statistics.mean(values(results, arm, measure)):.3f}")
            row.append("" if arm == "ddk" else format_interval(paired(results, "ddk", arm, measure)))
        rows.append(row)
    return rows_of(header, rows)


def difference_cell(pair: Pair, test: tuple, digits: int = 3) -> str:
    """Difference, interval, p-value and verdict, from an entry of `decided`."""
    numbers, is_decided = test
    return f"{format_interval(numbers, digits)}, {format_p(sign_flip_p(numbers))}, {verdict(pair, numbers, is_decided)}"


def replicated_table(tests: dict) -> str:
    """The replicates' pairs by each ratio, from `decided`."""
    measures = (*ALL, "python_ratio")
    rows = []
    for pair in REPLICATED:
        if pair.measures == ALL:
            keys = [(pair.first, pair.second, measure) for measure in measures]
            rows.append([pair_name(pair), *[difference_cell(pair, tests[key]) if key in tests else "" for key in keys]])
    return rows_of(["", *[MEASURES[measure] for measure in measures]], rows)


def changes_table(results: dict, tests: dict) -> str:
    """How much r and the ratios change with smoothing and without it."""
    pair = next(pair for pair in REPLICATED if pair.measures == CHANGES)
    rows = []
    for measure in CHANGES:
        levels = [f"{statistics.mean(values(results, arm, measure)):.4f}" for arm in (pair.first, pair.second)]
        rows.append([MEASURES[measure], *levels, difference_cell(pair, tests[pair.first, pair.second, measure], 4)])
    return rows_of([pair_name(pair), f"`{pair.first}`", f"`{pair.second}`", "difference"], rows)


def share_of_gain(results: dict, arm: str, measure: str) -> tuple[float, list[float]]:
    """The share that `arm` has of DDK's gain over CPT: of the means, and the jackknife's value of each replicate, whose
    mean and spread give the share's interval."""
    seeds = common_seeds(results, "ddk", arm)

    def share(left_out):
        gains = []
        for name in (arm, "ddk"):
            gains.append(sum(measured(results["cpt"][seed], measure) - measured(results[name][seed], measure)
                             for seed in seeds if seed != left_out))
        return gains[0] / gains[1]

    n = len(seeds)
    whole = share(None)
    return whole, [n * whole - (n - 1) * share(seed) for seed in seeds]


def replicates_arms_table(results: dict) -> str:
    """A row for each arm that has run: its ratios, by domain too, and its share of DDK's gain over CPT; and what DDK
    draws."""
    domains = list(results["ddk"]["0"]["end"])
    rows = [[*base_row(results["ddk"], "ddk"), "", ""]]
    for arm in [arm for arm in ARMS if arm in results]:
        row = arm_row(results, arm)
        for measure in BOTH:
            cell = ""
            if arm not in ("ddk", "cpt"):  # which have all of it, and none
                whole, of_replicates = share_of_gain(results, arm, measure)
                low, high = interval(of_replicates)
                cell = f"{whole:.1%} [{low:.1%}, {high:.1%}]"
            row.append(cell)
        rows.append(row)
    shares = [statistics.mean(drawn_share(one["end"], name) for one in results["ddk"].values()) for name in domains]
    rows.append(["drawn by `ddk`", "", "", "", *[f"{share:.1%}" for share in shares], "", ""])
    measures = [MEASURES[measure] for measure in BOTH]
    header = ["", "seeds", *measures, *domains, *[f"share of DDK's gain over CPT, {measure}" for measure in measures]]
    return rows_of(header, rows)


# ------------ The other settings' tables ------------------------------------------------------------------------------

def alphas_table(results: dict) -> str:
    """A row for each value of α that has run, and its differences from DDK's runs of the same seeds: in bold where they
    are decided among the comparisons."""
    tests = decided(results, COMPARISONS)
    rows = []
    for arm in sorted(arm for arm in results if arm.startswith("alpha=")):
        row = [f"`{arm}`", str(len(results[arm]))]
        for measure in BOTH:
            difference = format_mean(paired(results, arm, "ddk", measure), "+")
            row.append(format_mean(values(results, arm, measure)))
            row.append(bold_if_decided(difference, tests, arm, measure))
        rows.append(row)
    return rows_of(["", "seeds", "worst ratio", "− `ddk`", "mean ratio", "− `ddk`"], rows)


def temperatures_table(results: dict) -> str:
    """The ratios at each T, without a factor T² on the divergence (DDK) and with it (t2), and how far they are apart.
    Without it, in bold where the difference from DDK, which has T = 1, is decided among the comparisons."""
    tests = decided(results, COMPARISONS)
    rows = []
    for text, label in (("without T²", ""), ("with T²", "t2_")):
        arms = [label + name for name in TEMPERATURES]
        arms.insert(3, "ddk")  # T = 1, between 0.5 and 2
        if not all(arm in results for arm in arms):
            continue
        for measure in BOTH:
            row = [f"{MEASURES[measure]}, {text}"]
            for arm in arms:
                row.append(bold_if_decided(format_mean(values(results, arm, measure)), tests, arm, measure))
            means = [statistics.mean(values(results, arm, measure)) for arm in arms]
            row.append(f"{max(means) / min(means) - 1:.1%}")
            rows.append(row)
    return rows_of(["", "T = 0.1", "0.2", "0.5", "1", "2", "best to worst"], rows)


def sizes_table(settings: dict) -> str:
    """What a run of each setting sees, domain by domain: DDK's seed 0."""
    rows = []
    for name, results in settings.items():
        one = results["ddk"]["0"]
        keys = one["experiment"]["keys"]
        domains = list(one["end"])
        natural = " : ".join(f"{100 * one['r'][domain][0]:.1f}" for domain in domains)
        passes = " : ".join(f"{one['end'][domain]['epochs']:.2f}" for domain in domains)
        n_trained = keys["max_steps"] * keys["batch_size"]
        n_evaluated = len(one["steps"]) * len(domains) * keys["val_samples"]
        rows.append([name, natural, passes, f"{n_trained:,}", f"{n_evaluated:,}"])
    return rows_of(["", "natural proportions, %", "passes over each domain by `ddk`", "windows trained on",
                    "windows evaluated for r"], rows)


def with_seeds(settings: dict) -> dict:
    """The settings in which DDK has run with MIN_SEEDS or more."""
    return {name: results for name, results in settings.items() if len(results["ddk"]) >= MIN_SEEDS}


def make_tables(settings: dict, replicates: dict) -> dict[str, str]:
    """name → table, from what the runs of each setting gave, and the replicates', once all have run."""
    compared = with_seeds(settings)
    quickstart = settings["quickstart"]
    tables = {"sizes": sizes_table(settings), "settings": arms_table(settings),
              "claims": pairs_table(compared, CLAIMS), "comparisons": pairs_table(compared, COMPARISONS),
              "alphas": alphas_table(quickstart), "temperatures": temperatures_table(quickstart)}
    if len(replicates.get("kd_fixed", {})) == N_REPLICATES:
        tables["replicates"] = replicates_table(replicates)
        tests = decided(replicates, REPLICATED, sign_flip_p)
        tables["replicated"] = replicated_table(tests)
        tables["replicated_changes"] = changes_table(replicates, tests)
        tables["replicates_arms"] = replicates_arms_table(replicates)
    return tables


def with_tables(page: str, tables: dict[str, str]) -> str:
    """`page` with each table between its marks replaced."""
    def replaced(match):
        name = match[1]
        return f"<!-- {name} -->\n{tables[name]}\n<!-- end -->"
    return re.sub(r"<!-- (?!end)(\w+) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)


def results_of(page: str) -> str:
    """The part of the README that is on results; of a page that is on nothing else, the whole page."""
    _, heading, rest = page.partition("\n## Results\n")
    return rest.partition("\n## ")[0] if heading else page


def numbers_without_source(page: str, tables: dict[str, str]) -> list[str]:
    """The decimal numbers in the text of a page that no table has; settings, such as T = 0.5, are no results."""
    text = re.sub(r"<!-- (?!end)(\w+) -->\n.*?<!-- end -->|```.*?```|`[^`]*`", "", page, flags=re.DOTALL)
    text = re.sub(r"(α|γ|T|η|torch|Python) ?(=|∈|of)? ?(\{[^}]*\}|\d*\.?\d+)", "", text)
    known = set(re.findall(r"\d*\.\d+", "".join(tables.values())))
    return [number for number in re.findall(r"\d*\.\d+", text) if number not in known]


# ------------ Figures -------------------------------------------------------------------------------------------------

# One colour and marker for each arm, from dark to light so that they differ in grey too; one line style a domain
ARM_STYLES = {"student base": ("#8c8c8c", "s"), "cpt": ("#e6ab02", "v"), "kd": ("#d95f02", "^"),
              "kd_fixed": ("#f781bf", "P"), "ddk_es": ("#1b9e77", "D"), "alpha=0.0": ("#66c2a5", "X"),
              "gamma=0.0": ("#a6761d", "<"), "ddk_no_fs": ("#80b1d3", "h"), "ddk": ("#08306b", "o"),
              "teacher": ("#000000", "*")}
LINE_STYLES = ("-", "--", "-.", ":")


def mean_curves(runs: dict, key: str) -> dict[str, list[float]]:
    """Domain → the mean over seeds of r or of the ratio, at each evaluation."""
    every = [one[key] for one in runs.values()]
    return {name: [statistics.mean(numbers) for numbers in zip(*[one[name] for one in every])] for name in every[0]}


def setting_figure(results: dict, path: Path):
    """The paper's Fig. 1 and Fig. 3, and r, of one setting, on validation windows: means over seeds."""
    matplotlib_figure = import_optional("matplotlib.figure", "figures")
    Line2D = import_optional("matplotlib.lines", "figures").Line2D
    figure = matplotlib_figure.Figure(figsize=(13, 4.3), layout="constrained")
    fig_1, fig_3, shares = figure.subplots(1, 3)

    # Fig. 1: the perplexity of each domain, of the base, of each arm at its end, and of the teacher; a point is a mean
    # over seeds, its bar the lowest to the highest seed
    ddk = results["ddk"].values()
    domains = list(results["ddk"]["0"]["end"])
    points = {"student base": [[one["ratio"][name][0] * one["end"][name]["teacher_ppl"] for one in ddk]
                               for name in domains]}
    for arm in ("cpt", "kd", "kd_fixed", "ddk_es", "ddk"):
        if arm in results:
            points[arm] = [[one["end"][name]["student_ppl"] for one in results[arm].values()] for name in domains]
    points["teacher"] = [[one["end"][name]["teacher_ppl"] for one in ddk] for name in domains]
    for place, (arm, of_domains) in enumerate(points.items()):
        colour, marker = ARM_STYLES[arm]
        for i, numbers in enumerate(of_domains):
            mean = statistics.mean(numbers)
            fig_1.errorbar(i + (place - (len(points) - 1) / 2) * 0.11, mean, color=colour, marker=marker,
                           yerr=[[mean - min(numbers)], [max(numbers) - mean]], label=arm if i == 0 else None)
    fig_1.set(xticks=range(len(domains)), xticklabels=domains, yscale="log", ylabel="perplexity (log scale)",
              title="At the end (Fig. 1)")

    # Fig. 3: the ratio over the steps, DDK's and that of the arm without smoothing, or of KD; and DDK's r
    steps = results["ddk"]["0"]["steps"]
    other = "ddk_no_fs" if "ddk_no_fs" in results else "kd"
    for arm in (other, "ddk"):
        for ratios, style in zip(mean_curves(results[arm], "ratio").values(), LINE_STYLES):
            fig_3.plot(steps, ratios, style, color=ARM_STYLES[arm][0])
    fig_3.set(title=f"Ratio: ddk dark, {other} light (Fig. 3)", xlabel="step", yscale="log",
              ylabel="student's / teacher's perplexity (log scale)")
    for r, style in zip(mean_curves(results["ddk"], "r").values(), LINE_STYLES):
        shares.plot(steps, r, style, color=ARM_STYLES["ddk"][0], drawstyle="steps-post")
    shares.set(title="r under ddk", xlabel="step", ylabel="share of the next interval's windows", ylim=(0, None))

    # Arms and domains in one legend below the panels
    lines = [Line2D([], [], color="#000000", linestyle=style, label=name) for name, style in zip(domains, LINE_STYLES)]
    handles, _ = fig_1.get_legend_handles_labels()
    if other not in points:
        lines.insert(0, Line2D([], [], color=ARM_STYLES[other][0], label=other))
    figure.legend(handles=[*handles, *lines], loc="outside lower center", ncols=len(handles) + len(lines),
                  fontsize="small")
    for ax in (fig_1, fig_3):
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    for ax in (fig_1, fig_3, shares):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def read_results(path: Path) -> dict:
    """Arm → seed → what it gave; empty if nothing has run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_settings() -> dict:
    """SETTING → its results, in the order of the page."""
    names = ("quickstart", "real")
    settings = {name: read_results(ROOT / "assets" / f"{name}.json") for name in names}
    return {name: results for name, results in settings.items() if results}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    settings = read_settings()
    replicates = read_results(ROOT / "assets" / "replicates.json")
    tables = make_tables(settings, replicates)
    for page in (ROOT / "README.md", ROOT / "assets" / "RESULTS.md"):
        text = with_tables(page.read_text(encoding="utf-8"), tables)
        page.write_text(text, encoding="utf-8")
        for number in numbers_without_source(results_of(text), tables):
            print(f"{page}: {number} is in no table")
    for name, results in settings.items():
        setting_figure(results, ROOT / "assets" / f"{name}.png")
    if "replicates" in tables:
        setting_figure(replicates, ROOT / "assets" / "replicates.png")


if __name__ == "__main__":
    run_program(main)
