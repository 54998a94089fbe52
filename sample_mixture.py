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
    """The lines of a run's metrics.jsonl, without a torn last line that a killed run left. Raises UserError if the file
    cannot be read, or if a whole line is not JSON."""
    with user_errors(path, "name the metrics.jsonl of a run's out_dir"):
        text = Path(path).read_text(encoding="utf-8")
        whole_lines = text[:text.rfind("\n") + 1].splitlines()
        return [json.loads(line) for line in whole_lines]


def replay(mixture_lines: list[dict], rule: str, natural: dict[str, float], alpha: float) -> list[dict[str, float]]:
    """r after each evaluation, name → probability, by a rule of RULES and the perplexities of the mixture lines."""
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
    """A run, as its metrics.jsonl tells. Raises UserError if there is no evaluation in it yet."""

    def __init__(self, path: str):
        self.path = path
        self.name = Path(path).absolute().parent.name
        with user_errors(f"--metrics={path}", "name the metrics.jsonl of a run that has been evaluated"):
            lines = read_metrics(path)
            self.start = next(line for line in lines if line["kind"] == "run")
            self.mixture_lines = [line for line in lines if line["kind"] == "mixture"]
            self.evaluations = [line for line in lines if line["kind"] in ("mixture", "end")]
            last = self.evaluations[-1]
            self.domains = list(last["domains"])
            self.curves = [(f"r of {self.name}", [line["r"] for line in self.mixture_lines])]
            # What runs are compared by. An older run has the hashes of its bins and models in config.json only.
            config_path = Path(path).with_name("config.json")
            if "content" not in self.start and config_path.is_file():
                self.start["content"] = json.loads(config_path.read_text(encoding="utf-8"))["content"]
            self.config = self.start["config"]
            self.keys = {**self.config, "domains": ",".join(self.domains), "step": last["step"]}
            self.keys["parameters"] = self.start.get("parameters", {}).get("student")
            self.folders = {}
            for key, sha256 in self.start.get("content", {}).items():
                self.keys[key] = sha256[:16]
                self.folders[key] = f" ({self.config[key]})"
            # The last numbers of each domain, (N,): of the test windows, if there are some
            self.prefix = "test_" if "test_ratio" in last["domains"][self.domains[0]] else ""
            self.student_ppl = column(last, self.prefix + "student_ppl")
            self.teacher_ppl = column(last, self.prefix + "teacher_ppl")
            self.ratios = column(last, self.prefix + "ratio")
            self.results = np.append(self.student_ppl, [self.ratios.max(), self.ratios.mean()])  # what is averaged
            self.note = ""  # why these numbers are in no mean
            if last["kind"] == "mixture":
                self.note = f"unfinished at step {last['step']:,} of {self.config['max_steps']:,}"


def column(line: dict, key: str) -> np.ndarray:
    """One number of each domain at an evaluation, (N,) float64; NaN where it is None."""
    return np.array([domain[key] for domain in line["domains"].values()], dtype=np.float64)


def differing_keys(runs: list[Run]) -> list[str]:
    """What runs differ in besides the method and seed: keys that may not change within a run, and the student, by
    content, unless each seed has its own. Raises UserError if bins, teacher or windows differ, and names the runs."""
    left_out = {"method", "seed", "step"}
    keys = {}
    for run in runs:
        if not run.folders:
            raise UserError(f"{run.path}: neither it nor a config.json beside it says which bins and models it is of")
        left_out.update(run.start.get("may_change", ["data_dir", "teacher", "student", "out_dir"]))
        keys.update(run.keys)
    seeds = [run.keys["seed"] for run in runs]
    students = [run.keys["student"] for run in runs]
    n = len(set(zip(seeds, students)))
    if n > len(set(seeds)) or n > len(set(students)):
        left_out.discard("student")
    differing = []
    problems = []
    for key in keys:
        values = [run.keys.get(key) for run in runs]
        if key in ("domains", "data_dir", "teacher", "block_size", "val_samples", "test_samples"):
            counted = [value for value in values if value != 0]  # a run without test windows goes with any
            expected = max(counted, key=counted.count, default=0)
            other = runs[values.index(expected)]
            for run, value in zip(runs, values):
                if value not in (0, expected):
                    problems.append(f"{run.path}: its {key} is {value}{run.folders.get(key, '')}, that of {other.path} "
                                    f"is {expected}{other.folders.get(key, '')}")
        elif key not in left_out and len(set(values)) > 1:
            differing.append(key)
    if problems:
        raise UserError("\n".join(problems) + "\n--metrics: these cannot be compared; name runs that can")
    return differing


def show_metrics(args: argparse.Namespace) -> dict[str, float] | None:
    """Print the last perplexities and ratios of runs, and plot them. Of a single run replay r, and return the last."""
    runs = [Run(path) for path in args.metrics]
    differing = differing_keys(runs) if len(runs) > 1 else []
    columns = ["method", *differing, "seed", "step"]
    # The table is of the test windows, if a run was measured there
    tested = [run for run in runs if run.prefix]
    measured = tested[0] if tested else runs[0]
    windows = "test windows" if measured.prefix else "validation windows"
    # A row for each run. Runs that differ in the seed alone form a group: of a seed that was run twice the last run.
    rows = [["", *columns, *measured.domains, "worst ratio", "mean ratio", ""]]
    groups = {}  # what is alike → seed → run
    bases = {}  # perplexities before training → label
    for run in runs:
        if run.prefix != measured.prefix:
            run.note += " on validation windows"
        values = [str(run.keys.get(key)) for key in columns]
        cells = [f"{ppl:.2f} ({ratio:.2f})" for ppl, ratio in zip(run.student_ppl, run.ratios)]
        cells += [f"{value:.3f}" for value in run.results[-2:]]  # the worst and the mean ratio
        rows.append([run.name, *values, *cells, run.note])
        alike = run.path if run.note else tuple(values[:-2])
        groups.setdefault(alike, {})[run.keys["seed"]] = run
        before = tuple(column(run.evaluations[0], "student_ppl"))
        bases.setdefault(before, f"student base of {run.name}, validation windows")
    rows.append(["teacher", *[""] * len(columns), *[f"{ppl:.2f}" for ppl in measured.teacher_ppl], "", "", ""])
    print(f"perplexity (ratio to the teacher's) on the {windows}:\n")
    print_table(rows)
    # The means over seeds. In Fig. 1 each student base that differs is a bar, each group, and the teacher.
    bars = [(label, before, 0) for before, label in bases.items()]
    rows = [["mean ± standard error", "worst ratio", "mean ratio"]]
    for by_seed in groups.values():
        group = list(by_seed.values())
        n = len(group)
        results = np.array([run.results for run in group])
        mean = results.mean(axis=0)
        error = results.std(axis=0, ddof=min(1, n - 1)) / np.sqrt(n)  # the standard error; 0 for one run
        label = f"{group[0].name} {group[0].note}".strip()
        if n > 1:
            label = f"{group[0].name} …: mean of {n} seeds"
            rows.append([label, *[f"{value:.3f} ± {more:.3f}" for value, more in zip(mean[-2:], error[-2:])]])
        bars.append((label, mean[:-2], error[:-2]))
    bars.append(("teacher", measured.teacher_ppl, 0))
    if len(rows) > 1:
        print()
        print_table(rows)
    r = show_replay(runs[0], args) if len(runs) == 1 else None
    if args.plot:
        plot(args.plot, windows, bars, runs)
    return r


def show_replay(run: Run, args: argparse.Namespace) -> dict[str, float]:
    """Print r as the rule and α, by default the run's, make it from the logged perplexities. Returns the last r."""
    largest = 0.0
    with user_errors(f"--metrics={run.path}", "name the metrics.jsonl of a run with a teacher"):
        rule = args.rule or run.start["rule"]
        if rule not in RULES:
            raise ValueError(f"its rule {rule} is a fork's; replay it there, or name one with --rule")
        alpha = run.config["alpha"] if args.alpha is None else args.alpha
        replayed = replay(run.mixture_lines, rule, run.start["natural"], alpha)
        rows = [["step", *replayed[0]]]
        for line, r in zip(run.mixture_lines, replayed):
            rows.append([str(line["step"]), *[f"{share:.4f}" for share in r.values()]])
            for name in r:
                largest = max(largest, abs(line["r"][name] - r[name]))
    title = f"r replayed with α = {alpha}, rule {rule}"
    run.curves.append((title, replayed))
    print(f"\n{title}:")
    print_table(rows)
    print(f"largest difference from the run's own r: {largest:.1e}\n")
    return replayed[-1]


def plot(path: str, windows: str, bars: list[tuple], runs: list[Run]):
    """The paper's Fig. 1, of bars (label, heights, errors); of each run Fig. 3, its r, and the one replayed."""
    matplotlib_figure = import_optional("matplotlib.figure", f"--plot={path}")
    figure = matplotlib_figure.Figure(figsize=(16, 4 + 4 * len(runs)), layout="constrained")
    subfigures = figure.subfigures(1 + len(runs))
    panel = subfigures[0].subplots()
    panel.set(title="last evaluation", xlabel="domain", ylabel=f"perplexity, {windows}")
    panel.margins(y=0.3)  # room for the legend
    left = np.arange(len(runs[0].domains))
    width = 0.8 / len(bars)
    for i, (label, heights, errors) in enumerate(bars):
        panel.bar(left + i * width, heights, width, yerr=errors, align="edge", label=label)
    panel.set_xticks(left + 0.4, runs[0].domains)
    # The ratio of each domain over tokens, and r, which holds until the next evaluation
    for run, subfigure in zip(runs, subfigures[1:]):
        panels = subfigure.subplots(1, 1 + len(run.curves))
        tokens = [column(line, "tokens").sum() for line in run.evaluations]
        panels[0].plot(tokens, [column(line, "ratio") for line in run.evaluations], label=run.domains)
        panels[0].set(title=run.name, xlabel="tokens", ylabel="ratio, validation")
        for panel, (title, r) in zip(panels[1:], run.curves):
            panel.step(tokens[:len(r)], [list(shares.values()) for shares in r], where="post", label=run.domains)
            panel.set(title=title, xlabel="tokens", ylabel="r")
    for panel in figure.axes:
        panel.legend(fontsize="small", ncols=2)
    with user_errors(f"--plot={path}", "name a .png in a folder that exists"):
        figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def show_draws(args: argparse.Namespace, r: dict[str, float] | None):
    """Print what `--steps` batches draw from each domain, and the domain's next window as text."""
    names = list(r) if r else None
    bins = TokenBins(args.data_dir, args.block_size, names)
    sampler = MixtureSampler(bins.n_windows, args.batch_size, args.seed)
    if r:
        sampler.probs = r
    for _ in range(args.steps):
        sampler.next_batch()

    print(f"{args.steps} steps of {args.batch_size} windows of {args.block_size} tokens:\n")
    rows = [["domain", "windows", "wanted", "drawn", "tokens", "epochs"]]
    shares = sampler.drawn / sampler.drawn.sum()
    tokens = sampler.drawn * args.block_size
    for i, name in enumerate(bins.names):
        rows.append([name, f"{sampler.n_windows[i]:,}", f"{sampler.probs[i]:.2%}", f"{shares[i]:.2%}", f"{tokens[i]:,}",
                     f"{sampler.epochs[i]:.3f}"])
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
    add("--data_dir", default="", help="bins: show what --steps batches draw from them, by the last r of one --metrics "
        "or else in natural proportions, and a window of each domain as text")
    add("--metrics", nargs="+", default=[], help="metrics.jsonl of a run: replay r from the perplexities in it; of "
        "several runs: put them side by side")
    add("--rule", choices=list(RULES), help="replay by this rule (default: the run's)")
    add("--alpha", type=float, help="replay with this α, from 0 to 1 (default: the run's)")
    add("--plot", default="", help="plot what --metrics shows to this .png")
    add("--block_size", type=int, default=256, help="tokens per window (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="windows per step (default: %(default)s)")
    add("--steps", type=int, default=100, help="steps to draw (default: %(default)s)")
    add("--seed", type=int, default=0, help="order of the data (default: %(default)s)")
    args = parser.parse_args()
    if not args.data_dir and not args.metrics:
        parser.error("name --data_dir or --metrics")
    if args.plot and not args.metrics:
        parser.error(f"--plot={args.plot} requires --metrics")
    if args.alpha is not None and not 0 <= args.alpha <= 1:
        parser.error(f"--alpha={args.alpha} must be from 0 to 1")
    if min(args.block_size, args.batch_size, args.steps) < 1:
        parser.error(f"--block_size={args.block_size} --batch_size={args.batch_size} --steps={args.steps}: 1 or more")
    if len(args.metrics) != 1 and (args.rule or args.alpha is not None):
        parser.error("--rule and --alpha replay one run: name one --metrics")

    r = show_metrics(args) if args.metrics else None
    if args.data_dir:
        show_draws(args, r)


if __name__ == "__main__":
    run_program(main)
