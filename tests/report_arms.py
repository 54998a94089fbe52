"""The tables and figures of the README and of assets/RESULTS.md, from the results files beside it.

    python tests/report_arms.py        makes them anew; a test fails where they do not follow from the files

A results file, SETTING.json, is what `compare_arms.py --setting=SETTING` kept of its runs: arm → seed → what it gave. A
table stands between <!-- NAME --> and <!-- end -->.

Two arms are compared by the differences at the seeds that both have: what the arms share drops out. Student's t of the
differences gives a p-value, and Holm's correction over all rows of a table in one setting's column decides at 5 %: the
smallest of n p-values has to be at most .05 / n, the next at most .05 / (n − 1), and so on until one is not.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import import_optional, run_program, write_text

MEASURES = {"worst_ratio": "worst ratio", "mean_ratio": "mean ratio", "size_ratio": "mean ratio by size",
            "ratio_range": "largest − smallest ratio", "python_ratio": "Python's ratio",
            "ratio_change": "change of the ratios", "r_change": "change of r",
            "late_ratio_change": "change of the ratios, later", "late_r_change": "change of r, later"}
BOTH = ("worst_ratio", "mean_ratio")
ALL = (*BOTH, "size_ratio")
CHANGES = ("r_change", "late_r_change", "ratio_change", "late_ratio_change")
MIN_SEEDS = 3  # of a setting, or of a pair, that is compared
ARMS = ["ddk", "ddk_no_fs", "ddk_es", "alpha=0.0", "cpt_doremi", "kd", "ted", "minillm", "cpt"]
PAIRS = [("ddk", "kd"), ("ddk", "ddk_es"), ("ddk", "alpha=0.0")]  # whose gains are shown over all settings
GAMMAS = [f"gamma={value}" for value in (0.0, 0.1, 0.3, 0.5)]
TEMPERATURES = [f"temperature={value}" for value in (0.1, 0.2, 0.5, 2.0)]
INTERVALS = [f"interval={value}" for value in (5, 15, 20)]
ALPHAS = [f"alpha={value}" for value in (0.25, 0.75, 1.0)]
ABLATED = (*GAMMAS, *TEMPERATURES, *INTERVALS, *ALPHAS)  # whose differences stand in tables of their own
# What the paper claims: text, where, the arm that is to be lower, the other, by which measures
CLAIMS = [
    *[(f"DDK better than {other}", "Tables 1, 2", "ddk", arm, BOTH) for other, arm in
      (("CPT", "cpt"), ("CPT&DoReMi", "cpt_doremi"), ("KD", "kd"), ("TED", "ted"), ("MiniLLM", "minillm"))],
    ("DDK better than DDK without FS", "Table 5", "ddk", "ddk_no_fs", BOTH),
    ("DDK better than equal sampling", "Table 5", "ddk", "ddk_es", BOTH),
    ("ratios move more smoothly with FS", "Fig. 3", "ddk", "ddk_no_fs", ("ratio_change",)),
    *[("", "", "ddk", name, BOTH) for name in (*GAMMAS, *INTERVALS)],  # Tables 3 and 6: in ablations_table
]
# Others: the first arm minus the second
COMPARISONS = [
    ("DDK − (α = 0)", "equal sampling after the same first interval", "ddk", "alpha=0.0", BOTH),
    ("(α = 0) − equal sampling", "the first interval alone", "alpha=0.0", "ddk_es", BOTH),
    *[(f"DDK − {other}", "", "ddk", arm, ("size_ratio",)) for other, arm in
      (("CPT", "cpt"), ("KD", "kd"), ("equal sampling", "ddk_es"))],
    ("DDK − KD", "one reading of §1: “gap across domains … reduced”", "ddk", "kd", ("ratio_range",)),
    ("DDK without FS − equal sampling", "Table 5: lower", "ddk_no_fs", "ddk_es", BOTH),
    ("equal sampling − KD", "", "ddk_es", "kd", BOTH),
    ("KD − CPT", "Tables 1, 2: lower", "kd", "cpt", BOTH),
    ("KD − TED", "§4.2: “similar”", "kd", "ted", BOTH),
    ("KD − MiniLLM", "§4.2: “similar”", "kd", "minillm", BOTH),
    ("CPT&DoReMi − CPT", "Tables 1, 2: lower", "cpt_doremi", "cpt", BOTH),
    ("CPT&DoReMi − KD", "Tables 1, 2: higher", "cpt_doremi", "kd", BOTH),
    *[("", "", "ddk", name, BOTH) for name in (*ALPHAS, *TEMPERATURES)],  # in tables of their own
]
# The replicates' comparisons, the first arm minus the second, and their number, both written before the first of them
# was run. Holm's correction is over all rows.
N_REPLICATES = 24
REPLICATED = [
    ("DDK − KD in DDK's mean mixture, held fixed", "does it matter that r moves?", "ddk", "kd_fixed", ALL),
    ("DDK − CPT", "Tables 1, 2: lower", "ddk", "cpt", ALL),
    ("DDK − KD", "Tables 1, 2: lower", "ddk", "kd", ALL),
    ("DDK − MiniLLM", "Tables 1, 2: lower", "ddk", "minillm", ALL),
    ("DDK − equal sampling", "Table 5: lower", "ddk", "ddk_es", ALL),
    ("DDK − (α = 0)", "equal sampling after the same first interval", "ddk", "alpha=0.0", ALL),
    ("DDK − DDK without FS", "Table 5: lower", "ddk", "ddk_no_fs", ALL),
    ("DDK − (γ = 0)", "§4.2: the divergence is pivotal", "ddk", "gamma=0.0", ALL),
    ("(γ = 0) − CPT", "the mixture without the divergence", "gamma=0.0", "cpt", ALL),
    ("KD in the fixed mixture − KD", "the mixture without its motion", "kd_fixed", "kd", ALL),
    ("KD in the fixed mixture − equal sampling", "", "kd_fixed", "ddk_es", ALL),
    ("KD − CPT", "Tables 1, 2: lower", "kd", "cpt", ALL),
    ("DDK − DDK without FS", "§3.3, Fig. 3: lower", "ddk", "ddk_no_fs", CHANGES),
    *[(f"DDK − {other}", "what DDK costs Python", "ddk", arm, ("python_ratio",)) for other, arm in
      (("KD", "kd"), ("KD in the fixed mixture", "kd_fixed"), ("equal sampling", "ddk_es"))],
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


def p_value(differences: list[float]) -> float:
    """Two-sided, by Student's t, of a mean of 0; its distribution function for whole degrees of freedom is a sum."""
    mean, error = mean_and_error(differences)
    degrees = len(differences) - 1
    if error == 0:
        return 0.0 if mean else 1.0
    angle = math.atan(abs(mean) / error / math.sqrt(degrees))
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


def decided(results: dict, pairs: list) -> dict:
    """(first, second, measure) → differences, and whether Holm's correction rejects that they are 0; of the pairs that
    have MIN_SEEDS or more in common."""
    differences = {}
    for _, _, first, second, measures in pairs:
        for measure in measures:
            numbers = paired(results, first, second, measure)
            if len(numbers) >= MIN_SEEDS:
                differences[first, second, measure] = numbers
    rejected = holm({key: p_value(numbers) for key, numbers in differences.items()})
    return {key: (numbers, key in rejected) for key, numbers in differences.items()}


def bold_if_decided(cell: str, tests: dict, arm: str, measure: str) -> str:
    """`cell` in bold if `tests`, of `decided`, rejects that `arm` equals DDK by `measure`."""
    _, is_decided = tests.get(("ddk", arm, measure), (None, False))
    return f"**{cell}**" if is_decided else cell


def pairs_table(settings: dict, pairs: list, words: tuple[str, str]) -> str:
    """A row for each pair and measure, a column for each setting: the difference, and of those that are decided the
    first word if it is below 0, else the second. Differences from ablations take part in the correction, but have a
    table of their own."""
    tests = {name: decided(results, pairs) for name, results in settings.items()}
    rows = []
    for text, where, first, second, measures in pairs:
        if second in ABLATED:
            continue
        for measure in measures:
            cells = []
            for setting in settings:
                cell = ""
                if (first, second, measure) in tests[setting]:
                    numbers, is_decided = tests[setting][first, second, measure]
                    cell = format_mean(numbers, "+", 4)
                    if is_decided:
                        cell += f", **{words[0] if statistics.mean(numbers) < 0 else words[1]}**"
                cells.append(cell)
            if any(cells):
                rows.append([f"{text} ({where})" if where else text, MEASURES[measure], *cells])
    return rows_of(["", "", *settings], rows)


def ratios_row(label: str, ratios: list[list[float]]) -> list[str]:
    """A row of arms_table, from the ratio of each domain in each run."""
    worst = [max(of_run) for of_run in ratios]
    mean = [statistics.mean(of_run) for of_run in ratios]
    per_domain = [f"{statistics.mean(of_domain):.2f}" for of_domain in zip(*ratios)]
    return [label, str(len(ratios)), format_mean(worst), format_mean(mean), *per_domain]


def arms_table(settings: dict, arms=ARMS) -> str:
    """Of each setting, which all have the same domains, a row for each arm that has run: worst and mean ratio, and the
    ratio of each domain, on the test windows; and one for the student bases, on the validation windows."""
    runs = [one for results in settings.values() for seeds in results.values() for one in seeds.values()]
    domains = list(runs[0]["end"])
    rows = []
    for name, results in settings.items():
        setting = f"{name}: " if len(settings) > 1 else ""
        some_runs = next(iter(results.values())).values()
        first = [[one["ratio"][domain][0] for domain in domains] for one in some_runs]
        rows.append(ratios_row(f"{setting}student base", first))
        for arm in arms:
            if arm in results:
                last = [[one["end"][domain]["test_ratio"] for domain in domains] for one in results[arm].values()]
                rows.append(ratios_row(f"{setting}`{arm}`", last))
    return rows_of(["", "seeds", *[MEASURES[measure] for measure in BOTH], *domains], rows)


def ablations_table(results: dict) -> str:
    """A row for each value of α, γ and K that has run, and its differences from DDK's runs of the same seeds: in bold
    where they are decided, those of γ and K among the claims, those of α among the comparisons."""
    tests = decided(results, CLAIMS) | decided(results, COMPARISONS)
    changed = [arm for arm in results if arm.startswith(("alpha=", "gamma=", "interval="))]

    def name_and_value(arm):
        name, _, value = arm.partition("=")
        return name, float(value)

    rows = []
    for arm in sorted(changed, key=name_and_value):
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


def documents_table(settings: dict) -> str:
    """Documents of the validation and of the test windows, a row for the settings that have the same."""
    names = {}
    for name, results in settings.items():
        documents = results["ddk"]["0"]["documents"]
        text = ", ".join(f"{domain} {val} and {test}" for domain, (val, test) in documents.items())
        names.setdefault(text, []).append(name)
    rows = [[", ".join(alike), text] for text, alike in names.items()]
    return rows_of(["", "documents of the validation and of the test windows"], rows)


def first_difference(results: dict) -> float:
    """The largest minus the smallest ratio before the first step, mean over DDK's runs. Eq. 1 exponentiates ratios, so
    this is how unequal they are."""
    differences = []
    for one in results["ddk"].values():
        first = [ratios[0] for ratios in one["ratio"].values()]
        differences.append(max(first) - min(first))
    return statistics.mean(differences)


def gains(results: dict, other: str, measure: str) -> list[float]:
    """How much lower the measure is under DDK than under the other arm, in percent, at each seed that both have."""
    return [100 * (1 - results["ddk"][seed][measure] / results[other][seed][measure])
            for seed in common_seeds(results, "ddk", other)]


def gains_table(settings: dict) -> str:
    rows = []
    for name, results in settings.items():
        row = [name, f"{first_difference(results):.2f}"]
        for _, other in PAIRS:
            for measure in BOTH:
                numbers = gains(results, other, measure)
                row.append(format_mean(numbers, "+", 1) if numbers else "")
        rows.append(row)
    header = [f"{MEASURES[measure]}, over `{other}`, %" for _, other in PAIRS for measure in BOTH]
    return rows_of(["", "first ratios, largest − smallest", *header], rows)


def with_seeds(settings: dict) -> dict:
    """The settings in which DDK has run with MIN_SEEDS or more."""
    return {name: results for name, results in settings.items() if len(results["ddk"]) >= MIN_SEEDS}


def make_tables(settings: dict) -> dict[str, str]:
    """name → table, from what the runs of each setting gave."""
    compared = with_seeds(settings)
    tables = {"claims": pairs_table(compared, CLAIMS, ("holds", "the reverse")),
              "comparisons": pairs_table(compared, COMPARISONS, ("lower", "higher")),
              "gains": gains_table(compared), "documents": documents_table(settings)}
    others = {name: results for name, results in settings.items() if name != "quickstart"}
    if others:
        tables["other_settings"] = arms_table(others)
    if "quickstart" in settings:
        tables["quickstart"] = arms_table({"quickstart": settings["quickstart"]})
        tables["ablations"] = ablations_table(settings["quickstart"])
        tables["temperatures"] = temperatures_table(settings["quickstart"])
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

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def mean_curves(runs: dict, key: str) -> dict[str, list[float]]:
    """Domain → the mean over seeds of r or of the ratio, at each evaluation."""
    every = [one[key] for one in runs.values()]
    return {name: [statistics.mean(numbers) for numbers in zip(*[one[name] for one in every])] for name in every[0]}


def setting_figure(results: dict, path: Path):
    """The paper's Fig. 1 and Fig. 3, and r, of one setting, on validation windows: means over seeds."""
    figure = import_optional("matplotlib.figure", "figures").Figure(figsize=(13, 3.8), layout="constrained")
    fig_1, fig_3, shares = figure.subplots(1, 3)

    # Fig. 1: the perplexity of each domain, of the base, of each arm at its end, and of the teacher
    ddk = results["ddk"].values()
    domains = list(results["ddk"]["0"]["end"])
    bars = {}
    bars["student base"] = [statistics.mean(one["ratio"][name][0] * one["end"][name]["teacher_ppl"] for one in ddk)
                            for name in domains]
    for arm in ("cpt", "kd", "ddk_es", "ddk"):
        if arm in results:
            bars[arm] = [statistics.mean(one["end"][name]["student_ppl"] for one in results[arm].values())
                         for name in domains]
    bars["teacher"] = [statistics.mean(one["end"][name]["teacher_ppl"] for one in ddk) for name in domains]
    width = 0.8 / len(bars)
    for place, ((label, heights), colour) in enumerate(zip(bars.items(), COLOURS)):
        fig_1.bar([i + (place - len(bars) / 2 + 0.5) * width for i in range(len(domains))], heights, width, label=label,
                  color=colour)
    fig_1.set(xticks=range(len(domains)), xticklabels=domains, yscale="log", title="perplexity at the end (Fig. 1)")

    # Fig. 3: the ratio over the steps, DDK with and without smoothing, where that has run; and DDK's r
    steps = results["ddk"]["0"]["steps"]
    for (name, ratios), colour in zip(mean_curves(results["ddk"], "ratio").items(), COLOURS):
        fig_3.plot(steps, ratios, color=colour, label=name)
    other = "ddk_no_fs" if "ddk_no_fs" in results else "kd"
    for ratios, colour in zip(mean_curves(results[other], "ratio").values(), COLOURS):
        fig_3.plot(steps, ratios, ":", color=colour)
    fig_3.set(title=f"student / teacher: ddk, dotted {other} (Fig. 3)", xlabel="step", yscale="log")
    for (name, r), colour in zip(mean_curves(results["ddk"], "r").items(), COLOURS):
        shares.plot(steps, r, color=colour, label=name)
    shares.set(title="r of the next interval: ddk", xlabel="step", ylim=(0, None))
    for ax in (fig_1, fig_3):
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.legend(fontsize="small")
    for ax in (fig_1, fig_3, shares):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def gains_figure(settings: dict, path: Path):
    """The gain of DDK over other arms against how unequal the ratios were at the start."""
    figure = import_optional("matplotlib.figure", "figures").Figure(figsize=(12, 3.6), layout="constrained")
    for (_, other), ax in zip(PAIRS, figure.subplots(1, len(PAIRS), sharex=True)):
        for (setting, results), colour in zip(settings.items(), COLOURS):
            difference = first_difference(results)
            for measure, marker in zip(BOTH, "os"):
                numbers = gains(results, other, measure)
                if numbers:
                    ax.plot([difference] * len(numbers), numbers, marker, color=colour, alpha=0.3, markersize=3)
                    ax.plot([difference], [statistics.mean(numbers)], marker, color=colour,
                            label=f"{setting}, {MEASURES[measure]}")
        ax.axhline(0, color="#000000", linewidth=0.5)
        ax.set(xlabel="first ratios, largest − smallest", title=f"gain of ddk over {other}, %")
        ax.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right", fontsize="small")
    figure.savefig(path, dpi=110)


def read_settings(folder: Path) -> dict:
    """SETTING → its results, in the order of the page."""
    settings = {}
    for name in ("quickstart", "even", "unequal", "larger", "real"):
        path = folder / f"{name}.json"
        if path.is_file():
            settings[name] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    settings = read_settings(ROOT / "assets")
    tables = make_tables(settings)
    for page in (ROOT / "README.md", ROOT / "assets" / "RESULTS.md"):
        text = with_tables(page.read_text(encoding="utf-8"), tables)
        write_text(page, text)
        for number in numbers_without_source(results_of(text), tables):
            print(f"{page}: {number} is in no table")
    for name, results in settings.items():
        setting_figure(results, ROOT / "assets" / f"{name}.png")
    gains_figure(with_seeds(settings), ROOT / "assets" / "gains.png")


if __name__ == "__main__":
    run_program(main)
