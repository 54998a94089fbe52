"""The data mixture of DDK: how much of each domain the student sees next, and which windows those are.

`discrepancy_factor` is Eq. 1 and `smooth_update` is Eq. 2. RULES is the table of mixture rules: what each arm draws by.
`MixtureSampler` draws the batches. Nothing here depends on torch, on models or on ranks. As a program, this file shows
how batches are drawn from bins, replays r from the perplexities of a run, and compares runs, in a table and a figure:

    python sample_mixture.py --data_dir=data/quickstart
    python sample_mixture.py --metrics=out/quickstart-ddk-0/metrics.jsonl --alpha=0.8 --plot=mixture.png
    python sample_mixture.py --metrics out/quickstart-*/metrics.jsonl --plot=runs.png
"""

import argparse
import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np

from data import TokenBins, UserError, import_optional, print_table, run_program, saved_tokenizer, user_errors

# ------------ Eq. 1 and Eq. 2 -----------------------------------------------------------------------------------------

def discrepancy_factor(student_ppl, teacher_ppl) -> np.ndarray:
    """Eq. 1, the domain discrepancy factor: r[i] = softmax_i(ℓ_S[i] / ℓ_T[i]).

    Takes N perplexities of the student and N of the teacher, one per domain. Returns (N,) float64, which sums to 1.
    Raises ValueError if the lists are empty or differ in length, or if a perplexity is not finite or is below 1."""
    return softmax(perplexity_ratios(student_ppl, teacher_ppl))


def smooth_update(factor, student_ppl, teacher_ppl, alpha: float = 0.5) -> np.ndarray:
    """Eq. 2, factor smooth updating: ψ[i] = r_t[i] · exp(ℓ_S[i] / ℓ_T[i]), r_{t+1}[i] = α · ψ[i]/Σψ + (1 − α)/N.

    `factor` is r_t: N weights, not necessarily normalized. The perplexities are as in `discrepancy_factor`. Returns
    (N,) float64. Raises ValueError also if alpha is outside [0, 1], or if the factor has another length, is all zero,
    or has an entry that is negative or not finite."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} must lie in [0, 1]")
    ratios = perplexity_ratios(student_ppl, teacher_ppl)
    N = len(ratios)
    factor = checked_weights("factor", factor, N)

    # In log space, since exp of a ratio overflows. A domain whose factor is 0 stays at ψ = 0: log 0 = −inf.
    with np.errstate(divide="ignore"):
        log_psi = np.log(factor) + ratios
    return alpha * softmax(log_psi) + (1 - alpha) / N


def perplexity_ratios(student_ppl, teacher_ppl) -> np.ndarray:
    """ℓ_S / ℓ_T per domain, (N,) float64. Raises ValueError unless both are N finite perplexities of at least 1."""
    student_ppl = np.asarray(student_ppl, dtype=np.float64)
    teacher_ppl = np.asarray(teacher_ppl, dtype=np.float64)
    if student_ppl.ndim != 1 or student_ppl.size == 0 or student_ppl.shape != teacher_ppl.shape:
        raise ValueError(f"student_ppl {student_ppl.shape} and teacher_ppl {teacher_ppl.shape}: "
                         "expected one perplexity per domain in each")
    for name, ppl in (("student_ppl", student_ppl), ("teacher_ppl", teacher_ppl)):
        if not (np.isfinite(ppl) & (ppl >= 1)).all():
            raise ValueError(f"{name} {ppl.tolist()} must be finite and at least 1: perplexities, not losses")
    return student_ppl / teacher_ppl


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(z) / Σ exp(z), with the maximum subtracted first so that nothing overflows."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def checked_weights(name: str, weights, N: int) -> np.ndarray:
    """`weights` as (N,) float64. Raises ValueError unless they are N finite numbers ≥ 0, not all of them 0."""
    weights = np.array(weights, dtype=np.float64)
    if weights.shape != (N,) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"{name} {weights.tolist()} must be {N} finite weights ≥ 0, not all 0")
    return weights


def parse_mixture(text: str) -> dict[str, float]:
    """`name=weight,…` as a dict; {} if empty. Raises UserError."""
    if not text:
        return {}
    try:
        pairs = [part.split("=") for part in text.strip().split(",")]
        weights = {name: float(weight) for name, weight in pairs}
        checked_weights("weights", list(weights.values()), len(pairs))
    except ValueError:
        raise UserError(f"--mixture={text}: write name=weight,… with weights ≥ 0, not all 0") from None
    return weights


# ------------ The table of mixture rules ------------------------------------------------------------------------------
# A rule is called after each evaluation: at t = 0, before training, and after every K steps. It gets its own state
# (None at t = 0), the perplexities just measured (those of the teacher are None if the run has no teacher), the natural
# proportions (or --mixture's in their place) and α. Lists are in the order of the domains. It returns r, which the next
# K steps draw by, and its new state: a dict of lists and numbers, empty if there is nothing to remember, saved in every
# checkpoint. The loop and `--metrics` both call it through RULES: a new rule is one function and one line of the table.
# Write a rule's own coefficients into it as constants: another argument would change every rule and both calls.
# Between evaluations, the loop of distill.py may also set `sampler.probs` at every step.


def natural_rule(state, student_ppl, teacher_ppl, natural, alpha):
    """The natural proportions throughout: KD, CPT and the other baselines."""
    return natural, {}


def equal_rule(state, student_ppl, teacher_ppl, natural, alpha):
    """All domains alike from the first step: DDK (ES)."""
    return np.full(len(natural), 1 / len(natural)), {}


def ddk_rule(state, student_ppl, teacher_ppl, natural, alpha):
    """Alg. 1: r_0 by Eq. 1, r_{t+1} by Eq. 2. The first K steps draw from the data as it is, not by r_0."""
    if state is None:
        factor = discrepancy_factor(student_ppl, teacher_ppl)
        return natural, {"factor": factor.tolist()}
    r = smooth_update(state["factor"], student_ppl, teacher_ppl, alpha)
    return r, {"factor": r.tolist()}


def ddk_no_fs_rule(state, student_ppl, teacher_ppl, natural, alpha):
    """DDK without factor smoothing: Eq. 1 after every K steps."""
    if state is None:
        return natural, {}
    return discrepancy_factor(student_ppl, teacher_ppl), {}


RULES = {
    "natural": natural_rule,
    "equal": equal_rule,
    "ddk": ddk_rule,
    "ddk_no_fs": ddk_no_fs_rule,
}

# ------------ Drawing batches -----------------------------------------------------------------------------------------

# A tag for each purpose. It is part of what is hashed, so that no two purposes share random numbers.
WALK = 1  # the order of a domain's windows in an epoch
START = 2  # the random start of a batch's systematic sampling
PLACES = 3  # the places of the domains in a batch


class MixtureSampler:
    """Draws the global batch of each step: how many windows of each domain, by `probs`, and which ones.

    n_windows: train windows of each domain, at least 1. batch_size: windows per step, over all ranks. The sampler knows
    neither ranks nor micro-batches nor evaluation, so none of them can change the order of the data. Raises ValueError
    if a size is below 1."""

    def __init__(self, n_windows: dict[str, int], batch_size: int, seed: int):
        if not n_windows or min(n_windows.values()) < 1 or batch_size < 1:
            raise ValueError(f"n_windows {n_windows} and batch_size {batch_size} must be positive, and not empty")
        self.names = list(n_windows)
        self.n_windows = np.array(list(n_windows.values()), dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.step = 0  # batches drawn so far
        self.drawn = np.zeros(len(self.names), dtype=np.int64)  # windows drawn so far, per domain
        self.probs = self.n_windows  # the natural proportions

        # A number for each domain, made from its name: the order of its windows does not depend on the other domains.
        digests = [hashlib.sha256(name.encode()).digest() for name in self.names]
        self.domain_keys = np.array([int.from_bytes(digest[:8], "little") for digest in digests], dtype=np.uint64)

    @property
    def probs(self) -> np.ndarray:
        """Probability of each domain, (N,) float64, read-only. Set it as a whole: N weights, or name → weight."""
        probs = self._weights / self._weights.sum()
        probs.setflags(write=False)
        return probs

    @probs.setter
    def probs(self, weights: dict[str, float] | np.ndarray):
        if isinstance(weights, dict):
            unknown = weights.keys() - set(self.names)
            missing = set(self.names) - weights.keys()
            if unknown or missing:
                raise ValueError(f"probs have unknown domains {sorted(unknown)}, and lack {sorted(missing)}")
            weights = [weights[name] for name in self.names]
        self._weights = checked_weights("probs", weights, len(self.names))

    @property
    def epochs(self) -> np.ndarray:
        """Passes over each domain so far, (N,) float64."""
        return self.drawn / self.n_windows

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (domain_ids, window_ids) of the next step, both (B,) int64."""
        B = self.batch_size

        # Systematic sampling: B evenly spaced points with one random start, over the domains laid end to end. Every
        # domain gets B · probs windows to within one at every step, not only on average.
        top_bits = int(random_hash(self.seed, START, self.step)[0]) >> 32
        start = top_bits / 2**32  # in [0, 1), exact
        edges = np.append(0, np.cumsum(self.probs))
        edges /= edges[-1]  # the last edge is exactly 1, and so is the one before if the last probability is 0
        points_below = np.ceil(B * edges - start)  # how many of the points lie below each edge
        counts = np.diff(points_below).astype(np.int64)

        # Shuffle the places of the batch among the domains.
        key = random_hash(self.seed, PLACES, self.step)
        places = keyed_permutation(np.arange(B), B, key).astype(np.int64)
        domain_ids = np.repeat(np.arange(len(counts)), counts)[places]

        # Within a domain, the windows come in the order of its walk.
        positions = np.empty(B, dtype=np.int64)
        for i in np.flatnonzero(counts):
            positions[domain_ids == i] = self.drawn[i] + np.arange(counts[i])

        self.drawn += counts
        self.step += 1
        return domain_ids, self.windows(domain_ids, positions)

    def windows(self, domain_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The windows at `positions` (0 first) of the domains' endless walks, (B,) int64. A walk visits every window of
        its domain once per epoch, in a new order for each epoch."""
        n = self.n_windows[domain_ids]
        epoch = positions // n
        keys = random_hash(self.seed, WALK, self.domain_keys[domain_ids], epoch)
        return keyed_permutation(positions % n, n, keys).astype(np.int64)

    def state_dict(self) -> dict:
        """What the next batches depend on besides the constructor's arguments, JSON-able; `probs` as they were set."""
        return {"step": self.step, "probs": dict(zip(self.names, self._weights.tolist())),
                "drawn": dict(zip(self.names, self.drawn.tolist()))}

    def load_state_dict(self, state: dict):
        """Continue from `state`. Raises ValueError if it is of other domains."""
        self.probs = state["probs"]
        self.step = state["step"]
        self.drawn = np.array([state["drawn"][name] for name in self.names], dtype=np.int64)


def random_hash(*words) -> np.ndarray:
    """Pseudo-random uint64s that depend on all `words`: integers, or arrays that broadcast; (1,) for integers alone."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        if isinstance(word, int):
            word %= 2**64
        word = np.asarray(word, dtype=np.uint64)
        # A round of splitmix64, a bijection in which every input bit affects every output bit
        state = (state ^ word) + 0x9E3779B97F4A7C15
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB
        state = state ^ (state >> 31)
    return state


def keyed_permutation(index: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The element at `index` of the pseudo-random permutation of 0 … n−1 that `key` selects. Returns uint64.

    The arguments are arrays of integers that broadcast. Nothing is stored, so a domain of 1e9 windows costs no more
    than one of ten. A Feistel network permutes the cells of a grid of at least n cells: each round shifts one
    coordinate by a hash of the other. That can be undone, so the whole is a bijection."""
    index, n, key = [array.astype(np.uint64) for array in np.broadcast_arrays(index, n, key)]

    # The grid: about √n rows, and as many columns as it takes to hold n cells
    rows = np.ceil(np.sqrt(n)).astype(np.uint64)
    columns = (n + rows - 1) // rows

    # Permute its cells. The number of turns is even, so that left and right end up where they began.
    left = index // columns
    right = index % columns
    for turn in range(8):
        shifted = (left + random_hash(key, turn, right) % rows) % rows
        left, right = right, shifted
        rows, columns = columns, rows
    permuted = left * columns + right

    # A cell outside 0 … n−1 is permuted again. That is rare: fewer than 1/√n of the cells lie outside.
    outside = permuted >= n
    if outside.any():
        permuted[outside] = keyed_permutation(permuted[outside], n[outside], key[outside])
    return permuted


# ------------ The program: compare, replay, plot, draw ----------------------------------------------------------------

def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl, without a torn last line that a killed run left. UserError if the file
    cannot be read, or if a complete line is not JSON."""
    with user_errors(path, "use the metrics.jsonl of a run's out_dir"):
        text = Path(path).read_text(encoding="utf-8")
        complete_lines = text[:text.rfind("\n") + 1].splitlines()
        return [json.loads(line) for line in complete_lines]


def experiment_values(record: dict) -> dict:
    """Return what makes an experiment, from a run line: keys that may not change on resume, and content."""
    values = {key: value for key, value in record["config"].items() if key not in record["may_change"]}
    return {**values, **record["content"]}


def differing_keys(record: dict, other: dict) -> list[str]:
    """Return the keys in which two run lines are of different experiments. `other` may lack contents added later."""
    values = experiment_values(record)
    others = experiment_values(other)
    return [key for key in values if values[key] != others.get(key, values[key])]


def replay(mixture_lines: list[dict], rule: str, natural: dict[str, float], alpha: float) -> list[dict[str, float]]:
    """Return r after each evaluation, name → probability, by a rule of RULES and the perplexities of mixture lines."""
    natural_probs = np.array(list(natural.values()))
    state = None
    replayed = []
    for line in mixture_lines:
        student_ppl = [line["domains"][name]["student_ppl"] for name in natural]
        teacher_ppl = [line["domains"][name]["teacher_ppl"] for name in natural]
        r, state = RULES[rule](state, student_ppl, teacher_ppl, natural_probs, alpha)
        replayed.append(dict(zip(natural, r.tolist())))
    return replayed


# Runs can be compared if they agree in these: their bins, teacher and windows.
COMPARED = ("data_dir", "teacher", "domains", "block_size", "val_samples", "test_samples")


class Run:
    """A run, from its metrics.jsonl. UserError if it has not been evaluated yet."""

    def __init__(self, path: str):
        self.path = path
        self.name = Path(path).absolute().parent.name
        with user_errors(f"--metrics={path}", "use the metrics.jsonl of a run that has been evaluated"):
            lines = read_metrics(path)
            self.start = next(line for line in lines if line["kind"] == "run")
            self.mixture_lines = [line for line in lines if line["kind"] == "mixture"]
            self.evaluations = [line for line in lines if line["kind"] in ("mixture", "end")]
            self.last = self.evaluations[-1]
            self.domains = list(self.last["domains"])
            self.config = {**self.start["config"], **self.start["content"], "domains": ",".join(self.domains)}
        self.is_finished = self.last["kind"] == "end"
        self.prefix = "test_" if self.config["test_samples"] > 0 and self.is_finished else ""

    def numbers(self, key: str) -> np.ndarray:
        """Return the last student_ppl, teacher_ppl or ratio of each domain, (N,): on the test windows if there are."""
        return column(self.last, self.prefix + key)


def column(line: dict, key: str) -> np.ndarray:
    """Return one number of each domain at an evaluation, (N,) float64; NaN for None."""
    return np.array([domain[key] for domain in line["domains"].values()], dtype=np.float64)


def check_comparable(runs: list[Run]):
    """Raise UserError if two runs are of different bins, teachers or windows."""
    for run, other in combinations(runs, 2):
        for key in COMPARED:
            values = (run.config[key], other.config[key])
            if values[0] != values[1] and not (key == "test_samples" and 0 in values):
                raise UserError(f"--metrics: {run.path} has {key} {values[0]}, but {other.path} has {values[1]}; compare "
                                "runs that agree in it")


def show_metrics(args: argparse.Namespace) -> dict[str, float] | None:
    """Print the last perplexities and ratios of runs and their means over seeds, and plot them. Replay r of a single
    run, and return the last."""
    runs = [Run(path) for path in args.metrics]
    check_comparable(runs)

    # The table is on the test windows if a run was measured there. Group the runs that differ only in the seed, without
    # unfinished runs and runs on other windows.
    measured = max(runs, key=lambda run: run.prefix)
    groups = {}  # experiment without the seed → seed → run: the last one of each seed
    for run in runs:
        if run.is_finished and run.prefix == measured.prefix:
            experiment = json.dumps({**experiment_values(run.start), "seed": None}, sort_keys=True)
            groups.setdefault(experiment, {})[run.config["seed"]] = run
    groups = [list(by_seed.values()) for by_seed in groups.values()]

    windows = "test windows" if measured.prefix else "validation windows"
    print(f"perplexity (ratio to the teacher's) on the {windows}:\n")
    print_runs(runs, measured)
    print_means(groups)
    r_curves = {f"r of {run.name}": [line["r"] for line in run.mixture_lines] for run in runs}
    last_r = None
    if len(runs) == 1:
        title, replayed = show_replay(runs[0], args.rule, args.alpha)
        r_curves[title] = replayed
        last_r = replayed[-1]
    if args.plot:
        plot(args.plot, windows, runs, groups, r_curves)
    return last_r


def print_runs(runs: list[Run], measured: Run):
    """Print a row for each run, with a mark if it is unfinished or on other windows than `measured`."""
    rows = [["", "method", "seed", "step", *measured.domains, "worst ratio", "mean ratio", ""]]
    for run in runs:
        ratios = run.numbers("ratio")
        row = [run.name, run.config["method"], str(run.config["seed"]), str(run.last["step"])]
        for ppl, ratio in zip(run.numbers("student_ppl"), ratios):
            row.append(f"{ppl:.2f} ({ratio:.2f})")
        mark = "" if run.is_finished else f"unfinished at step {run.last['step']:,} of {run.config['max_steps']:,}"
        if run.prefix != measured.prefix:
            mark += " on validation windows"
        rows.append([*row, f"{ratios.max():.3f}", f"{ratios.mean():.3f}", mark])
    teacher = [f"{ppl:.2f}" for ppl in measured.numbers("teacher_ppl")]
    rows.append(["teacher", "", "", "", *teacher, "", "", ""])
    print_table(rows)


def print_means(groups: list[list[Run]]):
    """Print the worst and the mean ratio of each group of several runs, mean ± standard error over seeds."""
    rows = [["mean ± standard error", "worst ratio", "mean ratio"]]
    for group in groups:
        n = len(group)
        row = [f"{group[0].name} …: {n} seeds"]
        for summary in (np.max, np.mean):
            values = [summary(run.numbers("ratio")) for run in group]
            row.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=n > 1) / np.sqrt(n):.3f}")
        if n > 1:
            rows.append(row)
    if len(rows) > 1:
        print()
        print_table(rows)


def show_replay(run: Run, rule: str | None, alpha: float | None) -> tuple[str, list[dict[str, float]]]:
    """Print r as a rule and α (default: the run's) make it from the logged perplexities. Return a title and r."""
    with user_errors(f"--metrics={run.path}", "use the metrics.jsonl of a run with a teacher"):
        rule = rule or run.start["rule"]
        if rule not in RULES:
            raise ValueError(f"its rule {rule} is a fork's; replay it there, or choose one with --rule")
        if alpha is None:
            alpha = run.config["alpha"]
        replayed = replay(run.mixture_lines, rule, run.start["natural"], alpha)
    largest = 0.0
    rows = [["step", *replayed[0]]]
    for line, r in zip(run.mixture_lines, replayed):
        rows.append([str(line["step"]), *[f"{share:.4f}" for share in r.values()]])
        for name in r:
            largest = max(largest, abs(line["r"][name] - r[name]))
    title = f"r replayed with α = {alpha}, rule {rule}"
    print(f"\n{title}:")
    print_table(rows)
    print(f"largest difference from the run's own r: {largest:.1e}\n")
    return title, replayed


def plot(path: str, windows: str, runs: list[Run], groups: list[list[Run]], r_curves: dict[str, list[dict]]):
    """Draw the paper's Fig. 1 and Fig. 3, and each r of `r_curves`, title → r after each evaluation."""
    matplotlib_figure = import_optional("matplotlib.figure", f"--plot={path}")
    n_panels = 1 + len(runs) + len(r_curves)
    figure = matplotlib_figure.Figure(figsize=(10, 4 * n_panels), layout="constrained")
    panels = figure.subplots(n_panels)

    # Fig. 1: the perplexity of each domain, mean over seeds
    bars = {"student base": column(runs[0].evaluations[0], "student_ppl")}
    for group in groups:
        bars[group[0].name] = np.mean([run.numbers("student_ppl") for run in group], axis=0)
    bars["teacher"] = runs[0].numbers("teacher_ppl")
    left = np.arange(len(runs[0].domains))
    for i, (label, heights) in enumerate(bars.items()):
        panels[0].bar(left + i / (len(bars) + 1), heights, 1 / (len(bars) + 1), align="edge", label=label)
    panels[0].set(title="last evaluation", ylabel=f"perplexity, {windows}")
    panels[0].set_xticks(left + 0.4, runs[0].domains)

    # Fig. 3: the ratio of each domain over tokens; and r, which holds until the next evaluation
    for run, panel in zip(runs, panels[1:]):
        tokens = [column(line, "tokens").sum() for line in run.evaluations]
        panel.plot(tokens, [column(line, "ratio") for line in run.evaluations], label=run.domains)
        panel.set(title=run.name, xlabel="tokens", ylabel="ratio, validation windows")
    for (title, r), panel in zip(r_curves.items(), panels[1 + len(runs):]):
        panel.step(range(len(r)), [list(shares.values()) for shares in r], where="post", label=list(r[0]))
        panel.set(title=title, xlabel="evaluation", ylabel="r")
    for panel in panels:
        panel.legend(fontsize="small", ncols=2)
    with user_errors(f"--plot={path}", "use a .png in a folder that exists"):
        figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def show_draws(args: argparse.Namespace, r: dict[str, float] | None):
    """Print what `--steps` batches draw from each domain, and the domain's next window as text."""
    bins = TokenBins(args.data_dir, args.block_size, list(r or []))
    sampler = MixtureSampler(bins.n_windows, args.batch_size, args.seed)
    if r:
        sampler.probs = r
    for _ in range(args.steps):
        sampler.next_batch()

    print(f"{args.steps} steps of {args.batch_size} windows of {args.block_size} tokens:\n")
    rows = [["domain", "windows", "wanted", "drawn", "tokens", "epochs"]]
    drawn = sampler.drawn / sampler.drawn.sum()
    tokens = sampler.drawn * args.block_size
    for name, *values in zip(bins.names, sampler.n_windows, sampler.probs, drawn, tokens, sampler.epochs):
        rows.append([name, *map(format, values, (",", ".2%", ".2%", ",", ".3f"))])
    print_table(rows)

    # The next window of each domain
    tokenizer = saved_tokenizer(bins.dir, bins.tokenizer)
    domain_ids = np.arange(len(bins.names))
    window_ids = sampler.windows(domain_ids, sampler.drawn)
    for name, window_id, ids in zip(bins.names, window_ids, bins.train_windows(domain_ids, window_ids)):
        print(f"\n--- {name}, window {window_id}\n{tokenizer.decode(ids.tolist())}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", default="", help="bins to draw from, by the last r of --metrics or in natural proportions")
    add("--metrics", nargs="+", default=[], help="metrics.jsonl of one run, to replay its r, or of several, to compare")
    add("--rule", choices=list(RULES), help="replay by this rule (default: the run's)")
    add("--alpha", type=float, help="replay with this α, from 0 to 1 (default: the run's)")
    add("--plot", default="", help="plot what --metrics shows to this .png")
    add("--block_size", type=int, default=256, help="tokens per window (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="windows per step (default: %(default)s)")
    add("--steps", type=int, default=100, help="steps to draw (default: %(default)s)")
    add("--seed", type=int, default=0, help="order of the data (default: %(default)s)")
    args = parser.parse_args()
    if not args.data_dir and not args.metrics:
        parser.error("use --data_dir or --metrics")
    if min(args.block_size, args.batch_size, args.steps) < 1:
        parser.error(f"--block_size={args.block_size} --batch_size={args.batch_size} --steps={args.steps}: 1 or more")
    if len(args.metrics) != 1 and (args.rule or args.alpha is not None or args.plot and not args.metrics):
        parser.error("--rule and --alpha require one --metrics, and --plot one or more")

    r = show_metrics(args) if args.metrics else None
    if args.data_dir:
        show_draws(args, r)


if __name__ == "__main__":
    run_program(main)
