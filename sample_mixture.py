"""The data mixture of DDK: how much of each domain the student sees next, and which windows they are.

`discrepancy_factor` is Eq. 1, `smooth_update` is Eq. 2, RULES has the mixture rules, and `MixtureSampler` draws
batches, without torch, models or ranks. As a program, this file draws from bins, replays r, and compares runs:

    python sample_mixture.py --data_dir=data/quickstart
    python sample_mixture.py --metrics=out/quickstart-ddk-0/metrics.jsonl --alpha=0.8 --plot=mixture.png
    python sample_mixture.py --metrics out/quickstart-*/metrics.jsonl --plot=runs.png
"""

import argparse
import hashlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import TokenBins, UserError, digest, import_optional, print_table, run_program, saved_tokenizer, user_errors

# ------------ Eq. 1 and Eq. 2 -----------------------------------------------------------------------------------------

def discrepancy_factor(student_ppl, teacher_ppl) -> np.ndarray:
    """Return Eq. 1, the domain discrepancy factor: r[i] = softmax_i(ℓ_S[i] / ℓ_T[i]), (N,) float64. ValueError unless
    student and teacher have a perplexity in each of the N domains, finite and at least 1."""
    return softmax(perplexity_ratios(student_ppl, teacher_ppl))


def smooth_update(factor, student_ppl, teacher_ppl, alpha: float = 0.5) -> np.ndarray:
    """Return Eq. 2, factor smooth updating: ψ[i] = r_t[i] · exp(ℓ_S[i] / ℓ_T[i]), r_{t+1}[i] = α · ψ[i]/Σψ + (1 − α)/N.

    `factor` is r_t: N finite weights ≥ 0, not all 0. ValueError if not, if α is outside [0, 1], or as for Eq. 1."""
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
    """Return ℓ_S / ℓ_T per domain, (N,) float64. ValueError unless both are N finite perplexities of at least 1."""
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
    """Return exp(z) / Σ exp(z), with the maximum subtracted first so that nothing overflows."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def checked_weights(name: str, weights, N: int) -> np.ndarray:
    """Return `weights` as (N,) float64. ValueError unless they are N finite numbers ≥ 0, not all 0."""
    weights = np.array(weights, dtype=np.float64)
    if weights.shape != (N,) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"{name} {weights.tolist()} must be {N} finite weights ≥ 0, not all 0")
    return weights


def parse_mixture(text: str) -> dict[str, float]:
    """Return `name=weight,…` as a dict; {} if empty. UserError if it is anything else."""
    if not text:
        return {}
    try:
        pairs = [part.split("=") for part in text.strip().split(",")]
        weights = {name: float(weight) for name, weight in pairs}
        checked_weights("weights", list(weights.values()), len(pairs))
    except ValueError as error:
        raise UserError(f"--mixture={text}: write name=weight,… with weights ≥ 0, not all 0") from error
    return weights


# ------------ The table of mixture rules ------------------------------------------------------------------------------
# A rule is called at t = 0, before training, and after every K steps. It gets its own state (None at t = 0), the
# perplexities just measured (the teacher's are None without a teacher), the natural proportions (or --mixture's) and α.
# It returns r for the next K steps, and its new state for the checkpoint: a dict of lists and numbers. All lists are in
# the order of the domains. The loop and `--metrics` call it through RULES: a new rule is one function and one line of
# the table. Its own coefficients are constants inside it: a new argument would change every rule and both calls. The
# loop of distill.py may also set `sampler.probs` at every step.

def natural_rule(state, student_ppl, teacher_ppl, natural, alpha):
    """The natural proportions throughout: KD, CPT and the other baselines."""
    return natural, {}


def equal_rule(state, student_ppl, teacher_ppl, natural, alpha):
    """Equal shares from the first step: DDK (ES)."""
    return np.full(len(natural), 1 / len(natural)), {}


def ddk_rule(state, student_ppl, teacher_ppl, natural, alpha):
    """Alg. 1: r_0 by Eq. 1, r_{t+1} by Eq. 2. The first K steps draw in natural proportions, not by r_0."""
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
    """Draws the global batch of each step: how many windows of each domain, by `probs`, and which windows.

    n_windows: train windows of each domain. batch_size: windows per step, over all ranks. ValueError if one is below 1.
    The sampler knows neither ranks nor micro-batches nor evaluation, so they cannot change the order of the data."""

    def __init__(self, n_windows: dict[str, int], batch_size: int, seed: int):
        if not n_windows or min(n_windows.values()) < 1 or batch_size < 1:
            raise ValueError(f"n_windows {n_windows} and batch_size {batch_size} must not be empty, nor below 1")
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
        """The probability of each domain, (N,) float64, read-only. Set it as a whole: N weights, or name → weight."""
        probs = self._weights / self._weights.sum()
        probs.setflags(write=False)
        return probs

    @probs.setter
    def probs(self, weights: dict[str, float] | np.ndarray):
        if isinstance(weights, dict):
            if weights.keys() != set(self.names):
                raise ValueError(f"probs are for {' '.join(weights)}, but the domains are {' '.join(self.names)}")
            weights = [weights[name] for name in self.names]
        self._weights = checked_weights("probs", weights, len(self.names))

    @property
    def epochs(self) -> np.ndarray:
        """Passes over each domain so far, (N,) float64."""
        return self.drawn / self.n_windows

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (domain_ids, window_ids) of the next step, both (B,) int64."""
        B = self.batch_size

        # Systematic sampling over the domains laid end to end, with one random start: point i lies at (i + start) / B.
        # Every domain gets B · probs windows to within one at every step, not only on average.
        top_bits = int(random_hash(self.seed, START, self.step)[0]) >> 32
        start = top_bits / 2**32  # in [0, 1), exact
        edges = np.append(0, np.cumsum(self.probs))
        edges /= edges[-1]  # the last edge is exactly 1, and so is the edge before it if the last probability is 0
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
        """Return the windows at `positions` (from 0) of the domains' endless walks, (B,) int64. A walk visits every
        window of its domain once per epoch, in a new order for each epoch."""
        n = self.n_windows[domain_ids]
        epoch = positions // n
        keys = random_hash(self.seed, WALK, self.domain_keys[domain_ids], epoch)
        return keyed_permutation(positions % n, n, keys).astype(np.int64)

    def state_dict(self) -> dict:
        """Return what the next batches depend on besides the constructor's arguments, for JSON; `probs` as set."""
        return {"step": self.step, "probs": dict(zip(self.names, self._weights.tolist())),
                "drawn": dict(zip(self.names, self.drawn.tolist()))}

    def load_state_dict(self, state: dict):
        """Continue from `state`. ValueError if it has other domains."""
        self.probs = state["probs"]
        self.step = state["step"]
        self.drawn = np.array([state["drawn"][name] for name in self.names], dtype=np.int64)


def random_hash(*words) -> np.ndarray:
    """Return pseudo-random uint64s that depend on all `words`: arrays that broadcast, or integers, which give (1,)."""
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
    """Return the element at `index` of the pseudo-random permutation of 0 … n−1 that `key` selects: uint64, broadcast.

    Nothing is stored, so a domain of 1e9 windows costs no more than a domain of ten. A Feistel network permutes a grid
    of at least n cells: each round shifts one coordinate by a hash of the other. That can be undone: a bijection."""
    index, n, key = [array.astype(np.uint64) for array in np.broadcast_arrays(index, n, key)]

    # The grid: about √n rows, and as many columns as it takes to hold n cells
    rows = np.ceil(np.sqrt(n)).astype(np.uint64)
    columns = (n + rows - 1) // rows

    # Permute its cells. The number of rounds is even, so that left and right end up where they began.
    left = index // columns
    right = index % columns
    for round_id in range(8):
        shifted = (left + random_hash(key, round_id, right) % rows) % rows
        left, right = right, shifted
        rows, columns = columns, rows
    permuted = left * columns + right

    # Cycle walking: a cell outside 0 … n−1 is permuted again. That is rare: fewer than 1/√n of the cells lie outside.
    outside = permuted >= n
    if outside.any():
        permuted[outside] = keyed_permutation(permuted[outside], n[outside], key[outside])
    return permuted


# ------------ The program: compare, replay, plot, draw ----------------------------------------------------------------

def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl, without a torn last line. UserError if it cannot be read."""
    with user_errors(path, "use the metrics.jsonl of a run's out_dir"):
        *complete_lines, _ = Path(path).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in complete_lines]


def experiment_values(record: dict) -> dict:
    """Return the values that define a run line's experiment: keys that may not change on resume, and content."""
    values = {key: value for key, value in record["config"].items() if key not in record["may_change"]}
    return {**values, **record["content"]}


def column(line: dict, key: str) -> np.ndarray:
    """Return one number of each domain at an evaluation, (N,) float64; NaN for None."""
    return np.array([domain[key] for domain in line["domains"].values()], dtype=np.float64)


def replay(mixture_lines: list[dict], rule: str, natural: dict, alpha: float) -> list[dict]:
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


class Run:
    """A run, from its metrics.jsonl. UserError if it has not been evaluated yet."""

    def __init__(self, path: str):
        self.path = path
        self.name = Path(path).absolute().parent.name
        with user_errors(f"--metrics={path}", "use the metrics.jsonl of a run that has been evaluated"):
            self.run_line, *lines = read_metrics(path)
            self.mixture_lines = [line for line in lines if line["kind"] == "mixture"]
            self.evaluations = [line for line in lines if "domains" in line]
            self.r_curves = {f"r of {self.name}": [line["r"] for line in self.mixture_lines]}
            last = self.evaluations[-1]
            self.step = last["step"]
            self.is_finished = last["kind"] == "end"
            self.names = list(last["domains"])
            self.config = {**self.run_line["config"], **self.run_line["content"], "domains": ",".join(self.names)}
            self.experiment = digest({**experiment_values(self.run_line), "seed": None})  # the same for every seed

            # The last numbers of each domain, (N,). Only a finished run has been measured on the test windows.
            self.measured_on = "validation windows"
            prefix = ""
            if self.is_finished and self.config["test_samples"] > 0:
                self.measured_on = "test windows"
                prefix = "test_"
            self.student_ppl = column(last, prefix + "student_ppl")
            self.teacher_ppl = column(last, prefix + "teacher_ppl")
            self.ratios = column(last, prefix + "ratio")
            self.worst_and_mean = [self.ratios.max(), self.ratios.mean()]


def show_metrics(args: argparse.Namespace) -> dict:
    """Print a table of runs, and plot them. Replay r of a single run, and return its last r."""
    runs = [Run(path) for path in args.metrics]

    # Runs can be compared if bins, teacher and windows agree. A run may have no test windows.
    for key in ("data_dir", "teacher", "domains", "block_size", "val_samples", "test_samples"):
        paths = {run.config[key]: run.path for run in runs}
        if key == "test_samples":
            paths.pop(0, None)
        if len(paths) > 1:
            raise UserError(f"--metrics: {key} differs: {paths}; compare runs that agree in it")

    # The table is on test windows if a run has them. Runs of a group differ in the seed; its last run counts.
    reference = max(runs, key=lambda run: run.measured_on == "test windows")
    by_seed = defaultdict(dict)  # experiment → seed → run
    for run in runs:
        if run.is_finished and run.measured_on == reference.measured_on:
            by_seed[run.experiment][run.config["seed"]] = run
    groups = [list(group.values()) for group in by_seed.values()]
    print_runs(runs, groups, reference)
    last_r = show_replay(reference, args) if len(runs) == 1 else {}
    if args.plot:
        plot(args.plot, runs, groups, reference)
    return last_r


def print_runs(runs: list[Run], groups: list[list[Run]], reference: Run):
    """Print a row for each run, for the teacher, and for the mean ± standard error of each group."""
    rows = [["", "method", "seed", "step", *reference.names, "worst ratio", "mean ratio", ""]]
    for run in runs:
        row = [run.name, run.config["method"], str(run.config["seed"]), str(run.step)]
        row += map("{:.2f} ({:.2f})".format, run.student_ppl, run.ratios)
        row += map("{:.3f}".format, run.worst_and_mean)
        mark = "" if run.is_finished else "unfinished"
        if run.measured_on != reference.measured_on:
            mark += f" on {run.measured_on}"
        rows.append([*row, mark])
    rows.append(["teacher", "", "", "", *map("{:.2f}".format, reference.teacher_ppl), "", "", ""])
    for group in groups:
        n = len(group)
        if n > 1:
            results = np.array([[*run.student_ppl, *run.worst_and_mean] for run in group])
            errors = results.std(axis=0, ddof=1) / np.sqrt(n)
            cells = map("{:.3f} ± {:.3f}".format, results.mean(axis=0), errors)
            rows.append([f"{group[0].name} …: {n} seeds", "", "", "", *cells, ""])
    print(f"perplexity (ratio to the teacher's) on the {reference.measured_on}:\n")
    print_table(rows)


def show_replay(run: Run, args: argparse.Namespace) -> dict:
    """Print r replayed from the logged perplexities by a rule and α (default: the run's). Return the last r."""
    with user_errors(f"--metrics={run.path}", "use a run with a teacher, another --rule, or an --alpha from 0 to 1"):
        rule = args.rule or run.run_line["rule"]
        alpha = run.config["alpha"] if args.alpha is None else args.alpha
        replayed = replay(run.mixture_lines, rule, run.run_line["natural"], alpha)
    title = f"r replayed with α = {alpha}, rule {rule}"
    run.r_curves[title] = replayed

    rows = [["step", *run.names]]
    differences = []
    for line, r in zip(run.mixture_lines, replayed):
        rows.append([str(line["step"]), *map("{:.4f}".format, r.values())])
        differences += [abs(line["r"][name] - r[name]) for name in r]
    print(f"\n{title}:")
    print_table(rows)
    print(f"largest difference from the run's own r: {max(differences):.1e}\n")
    return replayed[-1]


def plot(path: str, runs: list[Run], groups: list[list[Run]], reference: Run):
    """Draw the paper's Fig. 1, and for each run Fig. 3 and r."""
    matplotlib_figure = import_optional("matplotlib.figure", f"--plot={path}")
    n_panels = 1 + sum(1 + len(run.r_curves) for run in runs)
    figure = matplotlib_figure.Figure(figsize=(10, 4 * n_panels), layout="constrained")
    panels = iter(figure.subplots(n_panels))

    # Fig. 1: the perplexity of each domain, mean over seeds. The student base is measured on validation windows only.
    bars = [("student base, validation windows", column(runs[0].evaluations[0], "student_ppl"))]
    for group in groups:
        bars.append((group[0].name, np.mean([run.student_ppl for run in group], axis=0)))
    bars.append(("teacher", reference.teacher_ppl))
    panel = next(panels)
    width = 0.8 / len(bars)
    left = np.arange(len(reference.names))
    for i, (label, heights) in enumerate(bars):
        panel.bar(left + i * width, heights, width, align="edge", label=label)
    panel.set_xticks(left + 0.4, reference.names)
    panel.set(title="last evaluation", ylabel=f"perplexity, {reference.measured_on}")

    # Fig. 3: the ratio of each domain over tokens. r is a step curve: it holds until the next evaluation
    for run in runs:
        panel = next(panels)
        tokens = [column(line, "tokens").sum() for line in run.evaluations]
        panel.plot(tokens, [column(line, "ratio") for line in run.evaluations], label=run.names)
        panel.set(title=run.name, xlabel="tokens", ylabel="ratio, validation windows")
        for title, r in run.r_curves.items():
            panel = next(panels)
            panel.step(range(len(r)), [list(shares.values()) for shares in r], where="post", label=run.names)
            panel.set(title=title, xlabel="evaluation", ylabel="r")
    for panel in figure.axes:
        panel.legend(fontsize="small", ncols=2)
    with user_errors(f"--plot={path}", "use a .png in a folder that exists"):
        figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def show_draws(args: argparse.Namespace, r: dict):
    """Print what `--steps` batches draw from each domain by r, and the domain's next window as text."""
    bins = TokenBins(args.data_dir, args.block_size, list(r))
    sampler = MixtureSampler(bins.n_windows, args.batch_size, args.seed)
    if r:
        sampler.probs = r
    for _ in range(args.steps):
        sampler.next_batch()

    rows = [["domain", "windows", "wanted", "drawn", "tokens", "epochs"]]
    drawn = sampler.drawn / sampler.drawn.sum()
    tokens = sampler.drawn * args.block_size
    for name, *values in zip(bins.names, sampler.n_windows, sampler.probs, drawn, tokens, sampler.epochs):
        rows.append([name, *map(format, values, (",", ".2%", ".2%", ",", ".3f"))])
    print(f"{args.steps} steps of {args.batch_size} windows of {args.block_size} tokens:\n")
    print_table(rows)
    tokenizer = saved_tokenizer(bins.dir, bins.tokenizer)
    domain_ids = np.arange(len(bins.names))
    window_ids = sampler.windows(domain_ids, sampler.drawn)
    for name, window_id, ids in zip(bins.names, window_ids, bins.train_windows(domain_ids, window_ids)):
        print(f"\n--- {name}, window {window_id}\n{tokenizer.decode(ids.tolist())}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", help="bins to draw from, by the last r of --metrics or in natural proportions")
    add("--metrics", nargs="+", default=[], help="metrics.jsonl of one run, to replay its r, or of several, to compare")
    add("--rule", choices=RULES, help="replay by this rule (default: the run's)")
    add("--alpha", type=float, help="replay with this α, from 0 to 1 (default: the run's)")
    add("--plot", help="plot what --metrics shows to this .png")
    add("--block_size", type=int, default=256, help="tokens per window (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="windows per step (default: %(default)s)")
    add("--steps", type=int, default=100, help="steps to draw (default: %(default)s)")
    add("--seed", type=int, default=0, help="order of the data (default: %(default)s)")
    args = parser.parse_args()
    if not args.data_dir and not args.metrics:
        parser.error("use --data_dir or --metrics")
    for key, value in vars(args).items():
        if key in ("block_size", "batch_size", "steps") and value < 1:
            parser.error(f"--{key}={value}: must be 1 or more")
    if len(args.metrics) != 1 and (args.rule or args.alpha is not None):
        parser.error("--rule and --alpha require exactly one file in --metrics")
    if args.plot and not args.metrics:
        parser.error("--plot requires --metrics")
    r = show_metrics(args) if args.metrics else {}
    if args.data_dir:
        show_draws(args, r)


if __name__ == "__main__":
    run_program(main)
