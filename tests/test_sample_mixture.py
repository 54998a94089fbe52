"""sample_mixture.py: Eq. 1 and Eq. 2 against exact arithmetic, the sampler's promises, and the program."""

import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from decimal import Decimal, localcontext
from functools import partial
from itertools import permutations

import numpy as np
import pytest

import sample_mixture
from data import build_bins, load_tokenizer
from sample_mixture import MixtureSampler, discrepancy_factor, keyed_permutation, smooth_update

# ------------ Eq. 1 and Eq. 2 -----------------------------------------------------------------------------------------


def exact_eq2(factor, student_ppl, teacher_ppl, alpha) -> list[Decimal]:
    """Eq. 2 as printed, to 60 digits: Decimal's exponents hold exp(1e6), so nothing needs to be subtracted."""
    with localcontext() as context:
        context.prec = 60
        psi = [Decimal(f) * (Decimal(s) / Decimal(t)).exp() for f, s, t in zip(factor, student_ppl, teacher_ppl)]
        return [Decimal(alpha) * p / sum(psi) + (1 - Decimal(alpha)) / len(psi) for p in psi]


def assert_close(got, exact, student_ppl, teacher_ppl):
    """Within 1e-12 at ratios up to 100, within 1e-9 beyond."""
    largest_ratio = max(s / t for s, t in zip(student_ppl, teacher_ppl))
    tolerance = Decimal("1e-12") if largest_ratio <= 100 else Decimal("1e-9")
    assert got.dtype == np.float64 and got.shape == (len(exact),)
    assert max(abs(Decimal(g) - e) for g, e in zip(got.tolist(), exact)) < tolerance


RNG = np.random.default_rng(0)
PERPLEXITIES = {  # student, teacher
    "ordinary": ([12.5, 8.25, 3.75], [7.5, 6.5, 3.5]),
    "one domain": ([5.0], [4.0]),
    "student ahead": ([2.0, 3.0], [4.0, 9.0]),
    "ten domains": (np.exp(RNG.uniform(0, 4, 10)).tolist(), np.exp(RNG.uniform(0, 3, 10)).tolist()),
    "near-ties at 100": ([99.9, 329.7, 310.1], [1.0, 3.3, 3.1010001]),
    "ratios 1e-6 and 1e6": ([1.0, 1e6], [1e6, 1.0]),
    "near-ties at 1e6": ([1e6, 1e6 - 0.001, 1e6 + 0.25], [1.0, 1.0, 1.0]),
    "uneven quotients at 1e6": ([1.7e6, 2.3e6, 3.1e6, 1.1e6], [1.7, 2.3000001, 3.1000002, 1.1000003]),
}


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("student, teacher", PERPLEXITIES.values(), ids=PERPLEXITIES)
def test_eq1_and_eq2_are_those_of_exact_arithmetic_and_stay_within_their_bounds(student, teacher, alpha):
    N = len(student)
    assert_close(discrepancy_factor(student, teacher), exact_eq2([1] * N, student, teacher, 1), student, teacher)
    factors = [[1 / N] * N, list(range(1, N + 1)), discrepancy_factor(student, teacher), [1e-300] * N]
    if N > 1:  # a factor of 0, that of the largest ratio too
        factors += [[0.0] + [1.0] * (N - 1), [1.0] * (N - 1) + [0.0]]
    for factor in factors:
        r = smooth_update(factor, student, teacher, alpha)
        assert_close(r, exact_eq2(factor, student, teacher, alpha), student, teacher)
        assert r.min() >= (1 - alpha) / N - 1e-15 and r.max() <= alpha + (1 - alpha) / N + 1e-15
        assert abs(r.sum() - 1) < 1e-12


@pytest.mark.parametrize("student, teacher", [
    ([], []), ([2], [2, 2]), ([[2, 2]], [[2, 2]]), ([math.nan, 2], [2, 2]), ([2, 2], [math.inf, 2]),
    ([0.99, 2], [2, 2]), ([2, 2], [2, None])])
def test_bad_perplexities_are_refused(student, teacher):
    with pytest.raises(ValueError, match="student_ppl|teacher_ppl"):
        discrepancy_factor(student, teacher)
    with pytest.raises(ValueError, match="student_ppl|teacher_ppl"):
        smooth_update([0.5] * len(student), student, teacher)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("factor", [[0.5], [0.5, 0.25, 0.25], [-0.5, 1.5], [0, 0], [math.nan, 1], [math.inf, 1]])
def test_a_bad_factor_or_alpha_is_refused(factor, alpha):
    with pytest.raises(ValueError, match="factor"):
        smooth_update(factor, [2, 2], [2, 2])
    with pytest.raises(ValueError, match="alpha"):
        smooth_update([0.5, 0.5], [2, 2], [2, 2], alpha)


# ------------ The keyed permutation -----------------------------------------------------------------------------------


def permutation(n: int, key: int) -> list[int]:
    return keyed_permutation(np.arange(n), np.array(n), np.array(key)).tolist()


def test_the_permutation_is_a_bijection():
    for n in [*range(1, 40), 63, 64, 65, 99, 100, 101, 4097]:
        for key in (0, 1, 2**64 - 1):
            assert sorted(permutation(n, key)) == list(range(n)), (n, key)


def assert_even(counts: np.ndarray, freedom: int):
    """Chi-square of `counts` against even ones, 5 standard deviations wide: the keys are fixed, so never by chance."""
    expected = counts.mean()
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 4, 9, 30])
def test_every_element_comes_to_every_place_and_every_order_equally_often(n):
    keys = np.arange(300 * n, dtype=np.uint64)
    counts = np.empty((n, n))
    for place in range(n):
        elements = keyed_permutation(np.full(len(keys), place), np.full(len(keys), n), keys)
        counts[place] = np.bincount(elements.astype(np.int64), minlength=n)
    assert_even(counts, (n - 1) ** 2)
    if n in (3, 4):
        orders = Counter(tuple(permutation(n, key)) for key in range(60 * math.factorial(n)))
        assert_even(np.array([orders[order] for order in permutations(range(n))]), math.factorial(n) - 1)


# ------------ The sampler ---------------------------------------------------------------------------------------------

WINDOWS = {"code": 31, "prose": 16, "one": 1, "math": 101}


def draw(sampler: MixtureSampler, batches: int) -> np.ndarray:
    """(batches, 2, B): domain ids and window ids."""
    return np.array([sampler.next_batch() for _ in range(batches)])


def walks(sampler: MixtureSampler, batches: int) -> dict[str, list[int]]:
    """The windows of each domain in the order drawn."""
    domain_ids, window_ids = np.concatenate(draw(sampler, batches), axis=1)
    return {name: window_ids[domain_ids == domain].tolist() for domain, name in enumerate(sampler.names)}


def test_a_batch_is_two_int64_arrays_and_each_epoch_of_a_domain_another_permutation():
    for ids in MixtureSampler(WINDOWS, 24, seed=0).next_batch():
        assert ids.shape == (24,) and ids.dtype == np.int64
    sampler = MixtureSampler(WINDOWS, 24, seed=0)
    sampler.probs = np.ones(4)
    for name, walk in walks(sampler, 60).items():
        n = WINDOWS[name]
        epochs = [walk[i:i + n] for i in range(0, len(walk), n)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        if n > 1:
            assert len(set(map(tuple, epochs[:-1]))) == len(epochs) - 1
        assert sampler.epochs[sampler.names.index(name)] == len(walk) / n


def test_seeds_and_domains_of_one_size_are_in_different_orders():
    a, b = (walks(MixtureSampler({"x": 100, "y": 100}, 20, seed), 10) for seed in (0, 1))
    assert a["x"] != b["x"] and a["x"] != a["y"]
    places = [draw(MixtureSampler({"x": 100, "y": 100}, 20, seed), 10)[:, 0].tolist() for seed in (0, 1)]
    assert places[0] != places[1]


def test_counts_are_the_batch_times_probs_to_within_one():
    rng = np.random.default_rng(0)
    mixtures = [[0.1] * 10] * 5
    mixtures += [[1 / 3] * 3, [1 / 49] * 49, [0, 0.3, 0, 0.7, 0], [1, 0, 0], [0, 0, 1], [1e-9, 1, 1e-9]]
    mixtures += [rng.dirichlet(np.full(n, 0.4)) * (rng.random(n) < 0.7) for n in rng.integers(2, 12, 60)]
    for mixture in filter(np.any, mixtures):
        batch_size = int(rng.choice([1, 7, 64, 250]))
        sampler = MixtureSampler({f"d{i}": 50 for i in range(len(mixture))}, batch_size, seed=0)
        sampler.probs = mixture
        for domain_ids, _ in (sampler.next_batch() for _ in range(8)):
            counts = np.bincount(domain_ids, minlength=len(mixture))
            assert counts.sum() == batch_size
            assert (np.abs(counts - batch_size * sampler.probs) < 1 - 1e-9).all()  # whole quotas are met exactly
            assert not counts[sampler.probs == 0].any()


def test_in_the_long_run_every_place_of_a_batch_follows_probs():
    sampler = MixtureSampler(WINDOWS, 8, seed=0)
    sampler.probs = [0.62, 0.3, 0.05, 0.03]
    domain_ids = draw(sampler, 1000)[:, 0]
    for domain, prob in enumerate(sampler.probs):
        assert abs((domain_ids == domain).mean() - prob) < 0.003
        assert np.abs((domain_ids == domain).mean(axis=0) - prob).max() < 0.06


def test_a_domain_is_walked_in_one_order_whatever_the_probs_the_batch_and_the_other_domains():
    natural, skewed, single = (MixtureSampler(WINDOWS, batch_size, seed=3) for batch_size in (64, 12, 1))
    skewed.probs = {"code": 0.1, "prose": 0.6, "one": 0.1, "math": 0.2}
    single.probs = np.ones(4)
    a, b, c = walks(natural, 12), walks(skewed, 40), walks(single, 300)  # of one window a batch: the walk itself
    for name in WINDOWS:
        d = walks(MixtureSampler({name: WINDOWS[name]}, 8, seed=3), 40)
        n = min(len(walk[name]) for walk in (a, b, c, d))
        assert n > 3 and a[name][:n] == b[name][:n] == c[name][:n] == d[name][:n]


def test_probs_start_at_the_natural_proportions_and_new_ones_count_from_the_very_next_batch():
    assert MixtureSampler({"x": 30, "y": 10}, 8, 0).probs.tolist() == [0.75, 0.25]
    sampler = MixtureSampler({"x": 50, "y": 50, "z": 50}, 8, seed=0)
    draw(sampler, 3)
    sampler.probs = {"z": 0.25, "x": 0, "y": 0.75}  # by name, in any order, and weights need not sum to 1
    assert np.bincount(sampler.next_batch()[0], minlength=3).tolist() == [0, 6, 2]
    sampler.probs = np.array([4, 0, 4])
    assert np.bincount(sampler.next_batch()[0], minlength=3).tolist() == [4, 0, 4]


def test_resumed_equals_straight():
    rng = np.random.default_rng(0)
    for _ in range(20):  # mixtures whose sums round this way and that
        sampler, resumed = MixtureSampler(WINDOWS, 24, seed=5), MixtureSampler(WINDOWS, 24, seed=5)
        sampler.probs = rng.dirichlet(np.ones(4))
        draw(sampler, 7)
        state = json.loads(json.dumps(sampler.state_dict()))
        straight = draw(sampler, 10)
        for _ in range(2):  # what was saved has not moved meanwhile
            resumed.load_state_dict(state)
            np.testing.assert_array_equal(draw(resumed, 10), straight)
            assert resumed.state_dict() == sampler.state_dict()


def test_a_billion_windows_take_no_memory_and_a_small_state():
    tracemalloc.start()
    sampler = MixtureSampler({"x": 10**9, "y": 10**9 + 7}, 64, seed=0)
    domain_ids, window_ids = np.concatenate(draw(sampler, 20), axis=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert len(set(zip(domain_ids, window_ids))) == 64 * 20 and window_ids.max() > 9e8
    assert len(json.dumps(sampler.state_dict())) < 300


@pytest.mark.parametrize("n_windows, batch_size", [({}, 4), ({"x": 0}, 4), ({"x": 5, "y": -1}, 4), ({"x": 5}, 0)])
def test_bad_sizes_are_refused(n_windows, batch_size):
    with pytest.raises(ValueError, match="n_windows|batch_size"):
        MixtureSampler(n_windows, batch_size, seed=0)


@pytest.mark.parametrize("probs", [[1], [[1, 1]], [-1, 2], [0, 0], [math.inf, 1], {"x": 1, "z": 1}])
def test_bad_probs_are_refused_and_change_nothing(probs):
    sampler = MixtureSampler({"x": 5, "y": 15}, 4, seed=0)
    with pytest.raises(ValueError, match="probs"):
        sampler.probs = probs
    with pytest.raises(ValueError, match="read-only"):
        sampler.probs[0] = 1
    assert sampler.probs.tolist() == [0.25, 0.75]


# ------------ The program ---------------------------------------------------------------------------------------------


@pytest.fixture
def program(run_main):
    """Runs the program with arguments: (exit status, stdout, stderr)."""
    return partial(run_main, sample_mixture)


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    """Bins of two domains of unlike letters, y three times as long."""
    folder = tmp_path_factory.mktemp("bins") / "bins"
    texts = [("x", f"{i} X " * 20) for i in range(40)] + [("y", f"{i} y " * 40) for i in range(60)]
    build_bins(folder, load_tokenizer("bytes"), texts, val_fraction=0.1)
    return folder


def three(student_ppl, teacher_ppl, prefix="", names="abc", **more) -> dict:
    return {name: {f"{prefix}student_ppl": student, f"{prefix}teacher_ppl": teacher,
                   f"{prefix}ratio": student / teacher if teacher else None,
                   **{key: value[i] for key, value in more.items()}}
            for i, (name, student, teacher) in enumerate(zip(names, student_ppl, teacher_ppl))}


two = partial(three, names="xy", tokens=[0, 0], epochs=[0.0, 0.0])
# A worked example: ratios 2 and 1 give r_0 = 1/(1 + e^∓1), and then 1.5 and 1, with ψ/Σψ = 1/(1 + e^∓1.5) and α = 0.5:
R_1 = [0.6587872380968218, 0.3412127619031782]
LINES = [
    {"kind": "run", "step": 0, "config": {"method": "ddk", "seed": 0, "alpha": 0.5, "max_steps": 30}, "rule": "ddk",
     "natural": {"x": 0.25, "y": 0.75}},
    {"kind": "mixture", "step": 0, "t": 0, "r": {"x": 0.25, "y": 0.75}, "domains": two([8, 4], [4, 4])},
    {"kind": "train", "step": 1, "loss": 2.0},
    {"kind": "mixture", "step": 20, "t": 1, "r": dict(zip("xy", R_1)), "domains": two([6, 4], [4, 4])},
    {"kind": "end", "step": 30, "domains": two([5, 4], [4, 4])},
]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def metrics(tmp_path):
    """A run's metrics.jsonl with a torn last line."""
    path = tmp_path / "metrics.jsonl"
    write_lines(path, LINES)
    path.write_text(path.read_text() + '{"kind": "mixture", "st')
    return path


def shares(stdout: str) -> dict[int, list[float]]:
    """step → r, from what --metrics prints."""
    rows = [line.split() for line in stdout.splitlines()]
    return {int(row[0]): list(map(float, row[1:])) for row in rows if row and row[0].isdigit()}


def test_the_program_shows_the_mixture_and_a_window_of_each_domain(program, bins):
    status, stdout, _ = program(f"--data_dir={bins}", "--block_size=16", "--batch_size=8", "--steps=50")
    assert status == 0
    table, *shown = stdout.split("\n--- ")
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.startswith(("x ", "y "))}
    n_windows = {name: int(row[0].replace(",", "")) for name, row in rows.items()}
    tokens = {name: int(row[3].replace(",", "")) for name, row in rows.items()}
    assert set(rows) == {"x", "y"} and sum(tokens.values()) == 50 * 8 * 16
    for name, (_, wanted, drawn, _, epochs) in rows.items():
        share = n_windows[name] / sum(n_windows.values())
        assert abs(float(wanted.rstrip("%")) / 100 - share) < 1e-4  # the natural proportions
        assert abs(float(drawn.rstrip("%")) / 100 - tokens[name] / sum(tokens.values())) < 1e-4
        assert abs(tokens[name] / (50 * 8 * 16) - share) < 0.01
        assert abs(float(epochs) - tokens[name] / 16 / n_windows[name]) < 1e-3
    assert [text[0] for text in shown] == ["x", "y"]
    assert "X" in shown[0] and "y" not in shown[0] and "y" in shown[1] and "X" not in shown[1]


@pytest.mark.parametrize("arguments, expected", [
    ([], {0: [0.25, 0.75], 20: [0.6588, 0.3412]}),
    (["--alpha=0"], {0: [0.25, 0.75], 20: [0.5, 0.5]}),
    (["--alpha=1"], {0: [0.25, 0.75], 20: [0.8176, 0.1824]}),
    (["--rule=ddk_no_fs"], {0: [0.25, 0.75], 20: [0.6225, 0.3775]}),
    (["--rule=natural"], {0: [0.25, 0.75], 20: [0.25, 0.75]}),
    (["--rule=equal"], {0: [0.5, 0.5], 20: [0.5, 0.5]}),
])
def test_the_program_replays_r_by_the_runs_own_rule_or_another(program, metrics, arguments, expected):
    status, stdout, _ = program(f"--metrics={metrics}", *arguments)
    assert status == 0 and shares(stdout) == expected
    difference = float(stdout.rpartition("difference")[2].split()[-1])
    assert (difference <= 1e-12) == (arguments == [])


def test_a_run_without_a_teacher_replays_by_its_rule_and_by_none_that_requires_one(program, metrics):
    write_lines(metrics, [{**LINES[0], "rule": "natural"}, {**LINES[1], "domains": two([8, 4], [None, None])}])
    assert shares(program(f"--metrics={metrics}")[1]) == {0: [0.25, 0.75]}
    status, _, stderr = program(f"--metrics={metrics}", "--rule=ddk")
    assert status == 2 and "--metrics=" in stderr and "teacher" in stderr


def test_the_program_draws_by_the_last_r_replayed_and_from_the_runs_domains_alone(program, metrics, bins):
    _, stdout, _ = program(f"--metrics={metrics}", f"--data_dir={bins}", "--block_size=16")
    assert "65.88%" in stdout and "34.12%" in stdout
    write_lines(metrics, [{**LINES[0], "natural": {"y": 1.0}}, LINES[1]])
    status, stdout, _ = program(f"--metrics={metrics}", f"--data_dir={bins}", "--block_size=16")
    assert status == 0 and "--- y" in stdout and "--- x" not in stdout
    metrics.write_text(metrics.read_text().replace('"y"', '"other"'))
    status, _, stderr = program(f"--metrics={metrics}", f"--data_dir={bins}", "--block_size=16")
    assert status == 2 and f"--data_dir={bins} has no other" in stderr


# What runs gave in three domains: unlike numbers, so that none passes for another. The teacher's are 2, 4 and 8 on the
# validation windows, and 3, 5 and 10 on the test windows.
VAL_TEACHER = [2.0, 4.0, 8.0]
TEST_TEACHER = [3.0, 5.0, 10.0]
BEFORE = [12.0, 14.0, 17.0]
MIDDLE = [7.0, 9.0, 11.0]
R = [[0.5, 0.3, 0.2], [0.15, 0.6, 0.25]]  # after the first and the second evaluation
CONTENT = {"data_dir": "d" * 64, "teacher": "t" * 64, "student": "5" * 64}
CONFIG = {"method": "ddk", "seed": 0, "alpha": 0.5, "gamma": 0.2, "teacher": "models/big", "student": "models/small",
          "data_dir": "data/abc", "out_dir": "out", "domains": "", "block_size": 16, "val_samples": 8,
          "test_samples": 6, "max_steps": 3000, "save_every": 0}


@pytest.fixture
def make_run(tmp_path):
    """Writes the metrics.jsonl of a run: `test` is its last perplexities on the test windows, `end` those on the
    validation windows, None where there are none. Returns its path."""
    def make(name, test=(6.0, 15.0, 40.0), end=(5.0, 8.0, 10.0), before=BEFORE, content=CONTENT, older=False,
             names="abc", **keys):
        config = {**CONFIG, "out_dir": name, **keys}
        start = {"kind": "run", "step": 0, "config": config, "rule": "ddk", "natural": dict(zip(names, R[0]))}
        if not older:
            start.update(content=content, may_change=["data_dir", "out_dir", "save_every", "student", "teacher"])
        lines = [start]
        for t, ppl in enumerate([before, MIDDLE]):
            tokens = [100 * t, 200 * t, 300 * t]
            lines.append({"kind": "mixture", "step": 80 * t, "t": t, "r": dict(zip(names, R[t])),
                          "domains": three(ppl, VAL_TEACHER, names=names, tokens=tokens)})
        if end:
            last = three(end, VAL_TEACHER, names=names, tokens=[150, 350, 500])
            if test:
                for domain, tested in zip(last.values(), three(test, TEST_TEACHER, "test_").values()):
                    domain.update(tested)
            lines.append({"kind": "end", "step": config["max_steps"], "domains": last})
        path = tmp_path / name / "metrics.jsonl"
        path.parent.mkdir()
        write_lines(path, lines)
        return path
    return make


def cells(stdout: str, label: str) -> str:
    """The cells of the row that starts with `label`, one blank between them."""
    row, = [line for line in stdout.splitlines() if line.startswith(f"{label}  ")]
    return " ".join(row[len(label):].split())


def test_a_row_for_each_run_has_what_differs_and_the_last_numbers_of_the_test_windows(program, make_run):
    paths = [make_run("one", save_every=5), make_run("two", (9.0, 5.5, 11.0), gamma=0.0, method="kd", max_steps=2000)]
    status, stdout, _ = program("--metrics", *paths)
    assert status == 0 and "on the test windows" in stdout
    header = next(line.split() for line in stdout.splitlines() if "worst ratio" in line)
    assert header[:5] == ["method", "gamma", "max_steps", "seed", "step"] and header[5:8] == ["a", "b", "c"]
    assert cells(stdout, "one") == "ddk 0.2 3000 0 3000 6.00 (2.00) 15.00 (3.00) 40.00 (4.00) 4.000 3.000"
    assert cells(stdout, "two") == "kd 0.0 2000 0 2000 9.00 (3.00) 5.50 (1.10) 11.00 (1.10) 3.000 1.733"
    assert cells(stdout, "teacher") == "3.00 5.00 10.00"
    assert "mean of" not in stdout

    # A single run in the same form; without test windows it says validation
    alone = program("--metrics", make_run("alone", test=None, test_samples=0))[1]
    assert cells(alone, "alone") == "ddk 0 3000 5.00 (2.50) 8.00 (2.00) 10.00 (1.25) 2.500 1.917"
    assert "on the validation windows" in alone and cells(alone, "teacher") == "2.00 4.00 8.00"


def test_an_unfinished_run_and_one_without_test_windows_are_marked_and_in_no_mean(program, make_run):
    paths = [make_run("one"), make_run("two", (9.0, 5.5, 11.0), seed=1), make_run("short", end=None, seed=2),
             make_run("untested", test=None, seed=3, test_samples=0)]
    _, stdout, _ = program("--metrics", *paths)
    assert cells(stdout, "short").endswith("7.00 (3.50) 9.00 (2.25) 11.00 (1.38) 3.500 2.375 unfinished at step 80 of "
                                           "3,000 on validation windows")
    assert cells(stdout, "untested").endswith("2.500 1.917 on validation windows")
    assert cells(stdout, "one …: mean of 2 seeds") == "3.500 ± 0.500 2.367 ± 0.633"
    assert "mean of" not in program("--metrics", paths[0], paths[2])[1]
    assert "validation windows" not in program("--metrics", *paths[:2])[1]


def test_runs_that_differ_in_the_seed_or_also_in_its_base_are_averaged_and_others_not(program, make_run):
    tests = [(6.0, 15.0, 40.0), (9.0, 5.5, 11.0), (12.0, 6.0, 10.0)]  # worst 4, 3, 4; mean 3, 26/15, 31/15
    bases = [{**CONTENT, "student": digit * 64} for digit in "123"]
    own = [make_run(f"own-{i}", test, seed=i, content=base) for i, (test, base) in enumerate(zip(tests, bases))]
    other = [make_run(f"other-{i}", test, seed=i, content=base, alpha=0.0)
             for i, (test, base) in enumerate(zip(tests[:2], bases))]
    _, stdout, _ = program("--metrics", *own, *other)
    assert cells(stdout, "own-0 …: mean of 3 seeds") == "3.667 ± 0.333 2.267 ± 0.379"
    assert cells(stdout, "other-0 …: mean of 2 seeds") == "3.500 ± 0.500 2.367 ± 0.633"

    # Bases that do not go with the seed are compared; a seed that was run twice is no second seed
    crossed = make_run("crossed", seed=1, content=bases[0])
    _, stdout, _ = program("--metrics", *own[:2], crossed)
    assert "student" in stdout and "1" * 16 in stdout and "own-0 …: mean of 2 seeds" in stdout
    assert cells(stdout, "own-0 …: mean of 2 seeds").startswith("4.000 ± 0.000")  # with crossed, not own-1
    assert "mean of" not in program("--metrics", own[0], make_run("again", content=bases[0]))[1]


@pytest.mark.parametrize("keys, named", [
    ({"content": {**CONTENT, "teacher": "9" * 64}}, "teacher"), ({"names": "abd"}, "domains"),
    ({"content": {**CONTENT, "data_dir": "9" * 64}}, "data_dir"), ({"block_size": 32}, "block_size"),
    ({"val_samples": 9}, "val_samples"), ({"test_samples": 5}, "test_samples")])
def test_runs_of_other_bins_another_teacher_or_other_windows_are_refused_by_name(program, make_run, keys, named):
    paths = [make_run("one"), make_run("stranger", **keys), make_run("two", alpha=0.1)]
    status, stdout, stderr = program("--metrics", *paths)
    assert status == 2 and stdout == ""
    told, = [line for line in stderr.splitlines() if "stranger" in line and "its" in line]
    assert f"{paths[1]}: its {named}" in told and str(paths[0]) in told and str(paths[2]) not in stderr
    if named in ("teacher", "data_dir"):
        assert f"9999999999999999 ({CONFIG[named]})" in told and f"({CONFIG[named]})" in told.partition("that of")[2]
    assert program("--metrics", paths[0], paths[2])[0] == 0

    # Where the first run is the odd one out, it alone is named
    stderr = program("--metrics", paths[1], paths[0], paths[2])[2]
    assert [line for line in stderr.splitlines() if "its" in line] == [told]


def test_an_older_run_is_known_by_its_config_json_or_refused(program, make_run):
    paths = [make_run("one"), make_run("older", older=True, alpha=0.1)]
    status, stdout, stderr = program("--metrics", *paths)
    assert status == 2 and stdout == "" and f"{paths[1]}: neither it nor a config.json" in stderr
    saved = paths[1].with_name("config.json")
    saved.write_text(json.dumps({"config": CONFIG, "content": CONTENT}))
    _, stdout, _ = program("--metrics", *paths)
    assert cells(stdout, "older").startswith("ddk 0.1 0 3000 6.00") and "out_dir" not in stdout
    saved.write_text(json.dumps({"config": CONFIG, "content": {**CONTENT, "teacher": "9" * 64}}))
    assert program("--metrics", *paths)[0] == 2
    assert program("--metrics", paths[1])[0] == 0  # a single one is compared with none

    # Among older ones the keys that name folders are not compared
    paths[0] = make_run("old", older=True)
    shutil.copy(saved, paths[0].parent)
    assert "out_dir" not in program("--metrics", *paths)[1]


@pytest.fixture
def figure(program, tmp_path, monkeypatch):
    """Runs the program with --plot: the panels of the figure, by their titles."""
    matplotlib_figure = pytest.importorskip("matplotlib.figure")

    def plot(*arguments) -> dict:
        drawn = []
        monkeypatch.setattr(matplotlib_figure.Figure, "savefig", lambda self, path, dpi: drawn.append(self))
        status, _, stderr = program("--metrics", *arguments, f"--plot={tmp_path / 'figure.png'}")
        assert status == 0, stderr
        for panel in drawn[0].axes:
            assert panel.get_xlabel() and panel.get_ylabel() and panel.get_legend()
        return {panel.get_title(): panel for panel in drawn[0].axes}
    return plot


def bars_of(panel) -> dict[str, tuple[list[float], list[float]]]:
    """Label → the heights of its bars, and the lengths of their error bars on each side."""
    bars = {}
    for bar in panel.containers:
        if bar.get_label() and hasattr(bar, "patches"):
            segments = bar.errorbar.lines[2][0].get_segments()
            errors = [(segment[1][1] - segment[0][1]) / 2 for segment in segments]
            bars[bar.get_label()] = ([patch.get_height() for patch in bar], errors)
    return bars


def curves_of(panel) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines}


def test_bars_are_the_numbers_of_the_table_with_error_bars_over_seeds_and_the_student_bases(figure, make_run):
    paths = [make_run("one"), make_run("two", (9.0, 5.5, 11.0), seed=1), make_run("kd", (4.0, 7.0, 13.0), method="kd"),
             make_run("short", end=None, before=[20.0, 30.0, 40.0], seed=2)]
    panel = figure(*paths)["last evaluation"]
    assert panel.get_ylabel() == "perplexity, test windows"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["a", "b", "c"]
    mean = "one …: mean of 2 seeds"
    short = "short unfinished at step 80 of 3,000 on validation windows"
    bars = bars_of(panel)
    bases = [f"student base of {name}, validation windows" for name in ("one", "short")]
    assert list(bars) == [*bases, mean, "kd", short, "teacher"]
    assert bars[mean] == (pytest.approx([7.5, 10.25, 25.5]), pytest.approx([1.5, 4.75, 14.5]))
    assert bars["kd"] == ([4.0, 7.0, 13.0], [0, 0, 0])
    assert bars[short][0] == MIDDLE and bars["teacher"][0] == TEST_TEACHER
    assert bars[bases[0]][0] == BEFORE and bars[bases[1]][0] == [20.0, 30.0, 40.0]

    # Without test windows they are of the validation windows
    alone = bars_of(figure(make_run("alone", test=None, test_samples=0))["last evaluation"])
    assert alone["alone"][0] == [5.0, 8.0, 10.0] and alone["teacher"][0] == VAL_TEACHER


def test_each_run_has_its_ratios_and_its_r_over_tokens_from_the_evaluation_on_that_it_follows(figure, make_run):
    panels = figure(make_run("one"), make_run("two", end=(3.0, 6.0, 20.0), alpha=0.1))
    assert list(panels) == ["last evaluation", "one", "r of one", "two", "r of two"]
    last = {"one": (5.0, 8.0, 10.0), "two": (3.0, 6.0, 20.0)}
    for run, end in last.items():
        ratios = [np.divide(ppl, VAL_TEACHER).tolist() for ppl in (BEFORE, MIDDLE, end)]
        r = panels[f"r of {run}"]
        for i, name in enumerate("abc"):
            assert curves_of(panels[run])[name] == ([0, 600, 1000], [ratio[i] for ratio in ratios])
            assert curves_of(r)[name] == ([0, 600], [shares[i] for shares in R])
        assert {line.get_drawstyle() for line in r.lines} == {"steps-post"}


def test_a_replay_says_its_alpha_and_stands_beside_the_runs_own_r(figure, make_run):
    panels = figure(make_run("one"), "--alpha=0")
    assert list(panels) == ["last evaluation", "one", "r of one", "r replayed with α = 0.0, rule ddk"]
    for i, name in enumerate("abc"):
        assert curves_of(panels["r of one"])[name][1] == [shares[i] for shares in R]
        assert curves_of(panels["r replayed with α = 0.0, rule ddk"])[name] == ([0, 600], [R[0][i], 1 / 3])


def test_the_largest_difference_of_a_replay_is_over_all_evaluations_and_domains(program, make_run):
    path = make_run("one")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["r"] = dict(zip("abc", [0.1, 0.65, 0.25]))  # 0.4 less, 0.35 and 0.05 more than the natural mixture
    write_lines(path, lines)
    assert "the run's own r: 4.0e-01" in program("--metrics", path, "--rule=natural")[1]


def test_a_figure_that_cannot_be_written_is_named(program, metrics, tmp_path):
    pytest.importorskip("matplotlib")
    assert program(f"--metrics={metrics}", f"--plot={tmp_path / 'fig.png'}")[0] == 0
    assert (tmp_path / "fig.png").read_bytes().startswith(b"\x89PNG")
    for name in ("no_such_folder/fig.png", "fig.nonsense"):
        status, _, stderr = program(f"--metrics={metrics}", f"--plot={tmp_path / name}")
        assert status == 2 and f"--plot={tmp_path / name}" in stderr


@pytest.mark.parametrize("arguments, named", [
    ([], "--data_dir or --metrics"),
    (["--metrics=x", "--alpha=nan"], "--alpha=nan"),
    (["--data_dir=x", "--alpha=0.5"], "name one --metrics"),
    (["--metrics", "x", "y", "--alpha=0.5"], "name one --metrics"),
    (["--metrics=x", "--alph=1"], "--alph=1"),
    (["--data_dir=x", "--steps=0"], "--steps=0"),
    (["--data_dir=x", "--plot=x.png"], "--plot=x.png"),
    (["--data_dir=nowhere"], "--data_dir=nowhere"),
])
def test_a_bad_argument_is_named(program, arguments, named):
    status, stdout, stderr = program(*arguments)
    assert status == 2 and stdout == "" and named in stderr


def test_the_rule_of_a_fork_is_named(program, metrics):
    write_lines(metrics, [{**LINES[0], "rule": "average"}, *LINES[1:]])
    status, _, stderr = program(f"--metrics={metrics}")
    assert status == 2 and "its rule average is a fork's" in stderr
    assert program(f"--metrics={metrics}", "--rule=ddk")[0] == 0


LINES_OF_NO_RUN = {
    "none": [],
    "no mixture": LINES[:1],
    "no run": LINES[1:],
    "no object": [[1]],
    "no r": [LINES[0], {**LINES[1], "r": {}}],
    "no perplexity": [LINES[0], {**LINES[1], "domains": two([0.5, 4], [4, 4])}],
}


@pytest.mark.parametrize("lines", LINES_OF_NO_RUN.values(), ids=LINES_OF_NO_RUN)
def test_metrics_that_no_run_writes_are_refused(program, metrics, lines):
    write_lines(metrics, lines)
    status, _, stderr = program(f"--metrics={metrics}")
    assert status == 2 and str(metrics) in stderr


def test_without_torch_it_runs_and_an_error_is_one_message_without_a_traceback():
    code = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = ['', '--metrics=nowhere']; "
            f"runpy.run_path({sample_mixture.__file__!r}, run_name='__main__')")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         cwd=sample_mixture.__file__.rpartition("/")[0])
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: nowhere") and len(run.stderr.splitlines()) == 1
