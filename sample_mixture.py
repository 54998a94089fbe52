"""The data mixture of DDK: how much of each domain the student sees next, and which windows those are.

`discrepancy_factor` is Eq. 1, `smooth_update` Eq. 2; `next_factor` and `interval_probs` say which of them an arm draws
by; `MixtureSampler` draws. Nothing here knows of models or ranks. As a program it shows a mixture, replays r from the
perplexities that a run logged, and draws the paper's Fig. 3:

    python sample_mixture.py --data_dir=data/quickstart
    python sample_mixture.py --metrics=out/quickstart-ddk-0/metrics.jsonl --alpha=0.8 --plot=mixture.png
"""

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from data import TokenBins, UserError, blame, import_optional, option, parse_config, run_program, saved_tokenizer


# DDK, without factor smoothing, with equal sampling; the baselines, in the natural mixture or DoReMi's
METHODS = ("ddk", "ddk_no_fs", "ddk_es", "kd", "minillm", "ted", "cpt", "cpt_doremi", "doremi_proxy")


def _weights(name: str, weights, n: int) -> np.ndarray:
    weights = np.array(weights, dtype=np.float64)
    if weights.shape != (n,) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"{name} {weights.tolist()} must be {n} finite weights ≥ 0, not all 0")
    return weights


def _weighted_softmax(weights, student_ppl, teacher_ppl) -> np.ndarray:
    """ψ/Σψ with ψ[i] = weights[i] · exp(ℓ_S[i] / ℓ_T[i]), (N,) float64.

    The largest ratio is subtracted first, in exact arithmetic: a float64 ratio of 1e6 is already off by 1e-10, and the
    exp that follows would pass that on."""
    student, teacher = np.asarray(student_ppl, dtype=np.float64), np.asarray(teacher_ppl, dtype=np.float64)
    if student.ndim != 1 or student.shape != teacher.shape or not student.size:
        raise ValueError(f"student_ppl {student.shape}, teacher_ppl {teacher.shape}: must be one perplexity a domain")
    for name, ppl in (("student_ppl", student), ("teacher_ppl", teacher)):
        if not (np.isfinite(ppl) & (ppl >= 1)).all():
            raise ValueError(f"{name} {ppl.tolist()} must be finite and at least 1: perplexities, not losses")
    weights = _weights("factor", weights, len(student))
    ratios = [Fraction(s) / Fraction(t) for s, t in zip(student.tolist(), teacher.tolist())]
    largest = max(ratio for ratio, weight in zip(ratios, weights) if weight > 0)
    # LLM-Shearing's ψ[i] = r[i] · ℓ_S[i]/ℓ_T[i] has np.log(student / teacher) in the place of the differences.
    with np.errstate(divide="ignore"):  # log 0 = −inf: a domain that α = 1 has driven to 0 stays there, as in Eq. 2
        log_psi = np.log(weights) + [float(ratio - largest) for ratio in ratios]
    psi = np.exp(log_psi - log_psi.max())
    return psi / psi.sum()


def discrepancy_factor(student_ppl, teacher_ppl) -> np.ndarray:
    """Eq. 1: r[i] = softmax_i(ℓ_S[i] / ℓ_T[i]), the domain discrepancy factor.

    Takes two lists of N perplexities and returns (N,) float64 that sums to 1. ValueError on empty or unequal lists and
    on a perplexity that is not finite or below 1."""
    return _weighted_softmax(np.ones(np.size(student_ppl)), student_ppl, teacher_ppl)


def smooth_update(factor, student_ppl, teacher_ppl, alpha: float = 0.5) -> np.ndarray:
    """Eq. 2: ψ[i] = r_t[i] · exp(ℓ_S[i] / ℓ_T[i]), then r_{t+1}[i] = α · ψ[i]/Σψ + (1 − α)/N.

    `factor` is r_t, (N,) weights; the rest as in `discrepancy_factor`. ValueError also on α outside [0, 1] and on a
    factor that is negative, not finite, all zero or of another length."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} must lie in [0, 1]")
    psi = _weighted_softmax(factor, student_ppl, teacher_ppl)
    return alpha * psi + (1 - alpha) / len(psi)


def doremi_update(weights, excess_loss, step_size: float = 1.0, smoothing: float = 1e-3) -> np.ndarray:
    """DoReMi's α_t, (N,), from α_{t−1} and the proxy's losses above the reference's, nats a token (its Alg. 1):
    α′ = α · exp(η λ), then (1 − c) · α′/Σα′ + c/N."""
    log_weights = np.log(np.asarray(weights, dtype=np.float64)) + step_size * np.asarray(excess_loss)
    weights = np.exp(log_weights - log_weights.max())
    return (1 - smoothing) * weights / weights.sum() + smoothing / len(weights)


def next_factor(method: str, factor, student_ppl, teacher_ppl, alpha: float = 0.5) -> np.ndarray:
    """r_t, (N,), from the last one (None at t = 0): Eq. 1, then Eq. 2, but always Eq. 1 without factor smoothing."""
    if factor is None or method == "ddk_no_fs":
        return discrepancy_factor(student_ppl, teacher_ppl)
    return smooth_update(factor, student_ppl, teacher_ppl, alpha)


def interval_probs(method: str, t: int, factor, base_probs: np.ndarray) -> np.ndarray:
    """What `method` draws the K steps after evaluation t by, (N,): r_t, all alike, or `base_probs`.
    Alg. 1 draws the first interval (t = 0) from the data as it is, although r_0 is known by then."""
    if method == "ddk_es":
        return np.full(len(base_probs), 1 / len(base_probs))
    return factor if method in ("ddk", "ddk_no_fs") and t > 0 else base_probs


_WALK, _START, _PLACES = 1, 2, 3  # what a hash is for, so that no two uses share random numbers


def _mix(x: np.ndarray) -> np.ndarray:
    """Bijective 64-bit mixer (the finaliser of splitmix64): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*words) -> np.ndarray:
    """A pseudo-random uint64 for each row of `words` (integers or uint64 arrays that broadcast), at least 1-d."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        word = np.atleast_1d(np.asarray(word % 2**64 if isinstance(word, int) else word, dtype=np.uint64))
        state = _mix((state ^ word) + np.uint64(0x9E3779B97F4A7C15))
    return state


def keyed_permutation(index: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The element at `index` of a pseudo-random permutation of 0 … n−1 that `key` selects. All (B,), uint64.

    Nothing is stored, so a domain of 1e9 windows costs no more than one of ten. A Feistel network permutes an a × b
    grid that just covers n: each round shifts one coordinate by a hash of the other, which shifting back undoes. A
    result past n (fewer than one in √n) is permuted again until it falls inside."""
    index, n, key = (np.array(x, dtype=np.uint64) for x in np.broadcast_arrays(index, n, key))
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    walking = np.arange(index.size)
    while walking.size:
        rows, columns, keys = a[walking], b[walking], key[walking]
        left, right = index[walking] // columns, index[walking] % columns
        for turn in range(8):  # an even number, so that left and right end as they began
            left, right = right, (left + _hash(keys, turn, right) % rows) % rows
            rows, columns = columns, rows
        index[walking] = left * columns + right
        walking = walking[index[walking] >= n[walking]]
    return index


class MixtureSampler:
    """Draws the global batch of each step: which domains, by `probs`, and which of their windows.

    It knows neither ranks nor micro-batches nor evaluation. `n_windows`: train windows of each domain, at least 1."""

    def __init__(self, n_windows: dict[str, int], batch_size: int, seed: int):
        if not n_windows or min(*n_windows.values(), batch_size) < 1:
            raise ValueError(f"n_windows {n_windows} and batch_size {batch_size} must be positive, and not empty")
        self.names, self.n_windows = list(n_windows), np.array(list(n_windows.values()), dtype=np.int64)
        self.batch_size, self.seed = batch_size, seed
        self.step = 0  # batches drawn
        self.drawn = np.zeros(len(self.names), dtype=np.int64)  # windows drawn a domain; epoch = drawn // n_windows
        # By name, so that a domain's order does not depend on which others are there.
        self._domain_keys = np.array([int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
                                      for name in self.names], dtype=np.uint64)
        self.probs = self.n_windows  # the natural proportions

    @property
    def probs(self) -> np.ndarray:
        """Probability of each domain, (N,) float64, read-only. Set it whole, to N weights or name → weight."""
        return self._probs

    @probs.setter
    def probs(self, weights: dict[str, float] | np.ndarray):
        if isinstance(weights, dict):
            if set(weights) != set(self.names):
                raise ValueError(f"probs name {sorted(weights)}, but the domains are {sorted(self.names)}")
            weights = [weights[name] for name in self.names]
        weights = _weights("probs", weights, len(self.names))
        self._probs = weights / weights.sum()
        self._probs.setflags(write=False)

    @property
    def epochs(self) -> np.ndarray:
        """Passes over each domain so far, (N,) float64."""
        return self.drawn / self.n_windows

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """(domain_ids, window_ids), both (B,) int64, of the next step.

        Systematic sampling: B evenly spaced points, with one random start, over the domains laid end to end, so that
        each gets B · probs windows to within one at every step, not just in the long run."""
        start = int(_hash(self.seed, _START, self.step)[0] >> np.uint64(32)) / 2**32  # in [0, 1), exact
        edges = np.append(0, np.cumsum(self.probs))
        edges /= edges[-1]  # ends on 1 exactly, and a last domain of probability 0 stays empty
        counts = np.diff(np.ceil(self.batch_size * edges - start)).astype(np.int64)

        # Shuffle the places among the domains. The k-th place that falls to a domain gets its k-th window from here.
        places = keyed_permutation(np.arange(self.batch_size), self.batch_size, _hash(self.seed, _PLACES, self.step))
        in_order = np.repeat(np.arange(len(counts)), counts)
        domain_ids = in_order[places.astype(np.int64)]
        first_place = np.cumsum(counts) - counts
        position = np.empty(self.batch_size, dtype=np.int64)
        position[np.argsort(domain_ids, kind="stable")] = (
            self.drawn[in_order] + np.arange(self.batch_size) - first_place[in_order])
        self.drawn += counts
        self.step += 1
        return domain_ids, self.windows(domain_ids, position)

    def windows(self, domain_ids: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The windows at a `position`, 0 first, of the domains' endless walks, (B,) int64: a new order every epoch."""
        n = self.n_windows[domain_ids]
        key = _hash(self.seed, _WALK, self._domain_keys[domain_ids], position // n)
        return keyed_permutation(position % n, n, key).astype(np.int64)

    def state_dict(self) -> dict:
        """All that the next batches depend on besides the constructor's arguments: JSON-able, a few numbers."""
        return {"step": self.step, "probs": dict(zip(self.names, self.probs.tolist())),
                "drawn": dict(zip(self.names, self.drawn.tolist()))}

    def load_state_dict(self, state: dict):
        """Go on from `state`. ValueError if it is of other domains."""
        self.probs = state["probs"]  # checks; then the very bits, which a second normalisation could move
        self._probs = np.array([state["probs"][name] for name in self.names])
        self._probs.setflags(write=False)
        self.step = state["step"]
        self.drawn = np.array([state["drawn"][name] for name in self.names], dtype=np.int64)


def read_metrics(path: Path, key: str = "") -> list[dict]:
    """The lines of a run's metrics.jsonl; a torn last line, left by a run that was killed, is not one."""
    with blame(f"{key}{path}", "name the metrics.jsonl in a run's out_dir"), open(path, encoding="utf-8") as lines:
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]
        needed = {"mixture": {"step", "t", "r", "domains"}}
        if not all(line.keys() >= needed.get(line["kind"], {"step"}) for line in metrics):
            raise ValueError("a line without step, or a mixture without t, r or domains")
        return metrics


def plot(lines: list[dict], replayed: list[dict[str, float]], path: str):
    """The paper's Fig. 3: each domain's share of the data, and its perplexity ratio, over the steps."""
    figure = import_optional("matplotlib.figure", f"--plot={path}").Figure(figsize=(10, 4), layout="constrained")
    shares, ratios = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    for name in replayed[0]:
        shares.step(steps, [r[name] for r in replayed], where="post", label=name)
        ratios.plot(steps, [line["domains"][name]["ratio"] for line in lines], label=name)
    shares.set(xlabel="step", ylabel="share of the next interval's data (r)", ylim=(0, None))
    ratios.set(xlabel="step", ylabel="student perplexity / teacher perplexity")
    ratios.legend()
    with blame(f"--plot={path}", "name a .png in a folder that exists"):
        figure.savefig(path, dpi=150)
    print(f"wrote {path}")


@dataclass
class MixtureConfig:
    """Keys of `python sample_mixture.py`."""
    data_dir: str = option("", "bins: show how a run would draw from them, and a window of each domain")
    metrics: str = option("", "a run's metrics.jsonl: replay r from the perplexities in it")
    alpha: float | None = option(None, "replay with this α; none: the run's", least=0, most=1)
    method: Literal[("", *METHODS)] = option("", "replay this arm's rule; empty: the run's")
    plot: str = option("", "draw the shares and the ratios of --metrics to this .png")
    block_size: int = option(256, "tokens a window", least=1)
    batch_size: int = option(64, "windows a step", least=1)
    steps: int = option(100, "steps to draw", least=1)
    seed: int = option(0, "order of the data", least=0)

    def problems(self) -> list[str]:
        return (["--data_dir or --metrics: name at least one"] * (not self.data_dir and not self.metrics)
                + [f"--plot={self.plot}: needs --metrics"] * bool(self.plot and not self.metrics))


def show_replay(config: MixtureConfig) -> dict[str, float]:
    """Print and plot r as `method` and `alpha` make it from the perplexities that a run logged; returns the last."""
    metrics = read_metrics(Path(config.metrics), "--metrics=")
    with blame(f"--metrics={config.metrics}", "name the metrics.jsonl in a run's out_dir"):
        run = {"config": {}, **next((line for line in metrics if line["kind"] == "run"), {})}
        lines = [line for line in metrics if line["kind"] == "mixture"]
        if not lines or any(domain["ratio"] is None for line in lines for domain in line["domains"].values()):
            raise UserError("no perplexities of a student and a teacher in it")
        method = config.method or run["config"].get("method", "ddk")
        alpha = run["config"].get("alpha", 0.5) if config.alpha is None else config.alpha
        names, base, factor, replayed = list(lines[0]["domains"]), run.get("base", lines[0]["r"]), None, []
        for line in lines:
            measured = [[line["domains"][name][key] for name in names] for key in ("student_ppl", "teacher_ppl")]
            factor = next_factor(method, factor, *measured, alpha)
            r = interval_probs(method, line["t"], factor, np.array([base[name] for name in names]))
            replayed.append(dict(zip(names, r.tolist())))
        difference = max(abs(line["r"][name] - r[name]) for line, r in zip(lines, replayed) for name in r)
    print(f"r by {method}, α = {alpha}\n{'step':>8}  " + "".join(f"{name[:12]:>13}" for name in names))
    for line, r in zip(lines, replayed):
        print(f"{line['step']:8}  " + "".join(f"{share:13.4f}" for share in r.values()))
    print(f"largest difference to the r of the run: {difference:.1e}\n")
    if config.plot:
        plot(lines, replayed, config.plot)
    return replayed[-1]


def show_draws(config: MixtureConfig, r: dict[str, float] | None):
    """Print what `config.steps` batches by `r` draw from each domain, and the domain's next window as text."""
    bins = TokenBins(config.data_dir, config.block_size, list(r or []), f"--metrics={config.metrics}")
    tokenizer = saved_tokenizer(bins.dir, bins.tokenizer)
    sampler = MixtureSampler(bins.n_windows, config.batch_size, config.seed)
    sampler.probs = r or sampler.probs
    for _ in range(config.steps):
        sampler.next_batch()
    print(f"{config.steps} steps of {config.batch_size} windows of {config.block_size} tokens:\n\n"
          f"{'domain':16}{'windows':>12}{'wanted':>9}{'drawn':>9}{'tokens':>14}{'epochs':>9}")
    for i, name in enumerate(bins.names):
        print(f"{name:16}{sampler.n_windows[i]:12,}{sampler.probs[i]:9.2%}{sampler.drawn[i] / sampler.drawn.sum():9.2%}"
              f"{sampler.drawn[i] * config.block_size:14,}{sampler.epochs[i]:9.3f}")
    domain_ids = np.arange(len(bins.names))
    window_ids = sampler.windows(domain_ids, sampler.drawn)
    for name, window, ids in zip(bins.names, window_ids, bins.train_windows(domain_ids, window_ids)):
        print(f"\n--- {name}, window {window}\n{tokenizer.decode(ids.tolist())}")


def main():
    config = parse_config(MixtureConfig)
    r = show_replay(config) if config.metrics else None
    if config.data_dir:
        show_draws(config, r)


if __name__ == "__main__":
    run_program(main)
