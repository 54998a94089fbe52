"""sample_mixture.py: Eq. 1 and Eq. 2 against exact arithmetic, the sampler's promises, and the program."""

import json
import math
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
    """Return Eq. 2 as printed, to 60 digits. Decimal's exponents hold exp(1e6), so nothing needs to be subtracted."""
    with localcontext() as context:
        context.prec = 60
        psi = [Decimal(f) * (Decimal(s) / Decimal(t)).exp() for f, s, t in zip(factor, student_ppl, teacher_ppl)]
        return [Decimal(alpha) * p / sum(psi) + (1 - Decimal(alpha)) / len(psi) for p in psi]


def assert_close(got, exact, student_ppl, teacher_ppl):
    """Compare within 1e-12 at ratios up to 100, and within 1e-9 beyond."""
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
def test_eq1_and_eq2_agree_with_exact_arithmetic_and_stay_within_their_bounds(student, teacher, alpha):
    N = len(student)
    assert_close(discrepancy_factor(student, teacher), exact_eq2([1] * N, student, teacher, 1), student, teacher)
    factors = [[1 / N] * N, list(range(1, N + 1)), discrepancy_factor(student, teacher), [1e-300] * N]
    if N > 1:  # a factor of 0, also for the largest ratio
        factors += [[0.0] + [1.0] * (N - 1), [1.0] * (N - 1) + [0.0]]
    for factor in factors:
        r = smooth_update(factor, student, teacher, alpha)
        assert_close(r, exact_eq2(factor, student, teacher, alpha), student, teacher)
        assert r.min() >= (1 - alpha) / N - 1e-15 and r.max() <= alpha + (1 - alpha) / N + 1e-15
        assert abs(r.sum() - 1) < 1e-12


@pytest.mark.parametrize("student, teacher", [
    ([], []), ([2], [2, 2]), ([[2, 2]], [[2, 2]]), ([math.nan, 2], [2, 2]), ([2, 2], [math.inf, 2]),
    ([0.99, 2], [2, 2]), ([2, 2], [2, None])])
def test_bad_perplexities_are_rejected(student, teacher):
    with pytest.raises(ValueError, match="student_ppl|teacher_ppl"):
        discrepancy_factor(student, teacher)
    with pytest.raises(ValueError, match="student_ppl|teacher_ppl"):
        smooth_update([0.5] * len(student), student, teacher)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("factor", [[0.5], [0.5, 0.25, 0.25], [-0.5, 1.5], [0, 0], [math.nan, 1], [math.inf, 1]])
def test_a_bad_factor_or_alpha_is_rejected(factor, alpha):
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
    """Compare `counts` with even counts by chi-square, within 5 standard deviations. The keys are fixed."""
    expected = counts.mean()
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 4, 9, 30])
def test_every_place_of_an_element_and_every_order_is_equally_frequent(n):
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
    """Return domain ids and window ids, (batches, 2, B)."""
    return np.array([sampler.next_batch() for _ in range(batches)])


def walks(sampler: MixtureSampler, batches: int) -> dict[str, list[int]]:
    """Return the windows of each domain in the order drawn."""
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


def test_the_order_of_a_domain_does_not_depend_on_probs_batch_size_or_other_domains():
    natural, skewed, single = (MixtureSampler(WINDOWS, batch_size, seed=3) for batch_size in (64, 12, 1))
    skewed.probs = {"code": 0.1, "prose": 0.6, "one": 0.1, "math": 0.2}
    single.probs = np.ones(4)
    a, b, c = walks(natural, 12), walks(skewed, 40), walks(single, 300)  # of one window a batch: the walk itself
    for name in WINDOWS:
        d = walks(MixtureSampler({name: WINDOWS[name]}, 8, seed=3), 40)
        n = min(len(walk[name]) for walk in (a, b, c, d))
        assert n > 3 and a[name][:n] == b[name][:n] == c[name][:n] == d[name][:n]


def test_probs_start_at_the_natural_proportions_and_new_probs_apply_to_the_next_batch():
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
def test_bad_sizes_are_rejected(n_windows, batch_size):
    with pytest.raises(ValueError, match="n_windows|batch_size"):
        MixtureSampler(n_windows, batch_size, seed=0)


@pytest.mark.parametrize("probs", [[1], [[1, 1]], [-1, 2], [0, 0], [math.inf, 1], {"x": 1, "z": 1}])
def test_bad_probs_are_rejected_and_change_nothing(probs):
    sampler = MixtureSampler({"x": 5, "y": 15}, 4, seed=0)
    with pytest.raises(ValueError, match="probs"):
        sampler.probs = probs
    with pytest.raises(ValueError, match="read-only"):
        sampler.probs[0] = 1
    assert sampler.probs.tolist() == [0.25, 0.75]


# ------------ The program ---------------------------------------------------------------------------------------------


@pytest.fixture
def program(run_main):
    """Run the program with arguments. Return (exit status, stdout, stderr)."""
    return partial(run_main, sample_mixture)


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    """Return bins of two domains of different letters; y is three times as long."""
    folder = tmp_path_factory.mktemp("bins") / "bins"
    texts = [("x", f"{i} X " * 20) for i in range(40)] + [("y", f"{i} y " * 40) for i in range(60)]
    build_bins(folder, load_tokenizer("bytes"), texts, val_fraction=0.1)
    return folder


# A run in two domains. Its ratios 2 and 1, then 1.5 and 1, are a worked example: r_0 is 1/(1 + e^∓1), ψ/Σψ is then
# 1/(1 + e^∓1.5), and α is 0.5. The numbers differ, so that none passes for another.
VAL_TEACHER = (4.0, 2.0)
TEST_TEACHER = (3.0, 5.0)
EVALUATIONS = [(8.0, 2.0), (6.0, 2.0)]
END = (5.0, 3.0)
R = [[0.25, 0.75], [0.6587872380968218, 0.3412127619031782]]
TESTS = [(6.0, 15.0), (12.0, 5.5), (3.0, 25.0)]  # of three seeds: worst ratios 3, 4 and 5, mean ratios 2.5, 2.55 and 3
CONTENT = {"data_dir": "d" * 64, "teacher": "t" * 64, "student": "5" * 64}
CONFIG = {"method": "ddk", "seed": 0, "alpha": 0.5, "teacher": "models/big", "out_dir": "out", "domains": "",
          "block_size": 16, "val_samples": 8, "test_samples": 6, "max_steps": 30}


def domains(names, student_ppl, teacher_ppl, tokens, prefix="") -> dict:
    numbers = {}
    for name, student, teacher, n in zip(names, student_ppl, teacher_ppl, tokens):
        numbers[name] = {f"{prefix}student_ppl": student, f"{prefix}teacher_ppl": teacher,
                         f"{prefix}ratio": student / teacher if teacher else None, "tokens": n}
    return numbers


@pytest.fixture
def make_run(tmp_path):
    """Write the metrics.jsonl of a run with a torn last line, and return its path. `test` is its last perplexities on
    the test windows."""
    def make(name="run", test=TESTS[0], finished=True, names="xy", r=R, rule="ddk", teacher_ppl=VAL_TEACHER,
             content=CONTENT, **keys):
        config = {**CONFIG, "out_dir": name, **keys}
        lines = [{"kind": "run", "step": 0, "config": config, "content": content, "may_change": ["out_dir", "teacher"],
                  "rule": rule, "natural": dict(zip(names, R[0]))}]
        for t, student_ppl in enumerate(EVALUATIONS):
            lines.append({"kind": "mixture", "step": 20 * t, "t": t, "r": dict(zip(names, r[t])),
                          "domains": domains(names, student_ppl, teacher_ppl, [100 * t, 200 * t])})
            lines.append({"kind": "train", "step": 20 * t + 1, "loss": 2.0})
        if finished:
            last = domains(names, END, teacher_ppl, [150, 350])
            if config["test_samples"]:
                for name, numbers in domains(names, test, TEST_TEACHER, [150, 350], "test_").items():
                    last[name].update(numbers)
            lines.append({"kind": "end", "step": config["max_steps"], "domains": last})
        path = tmp_path / config["out_dir"] / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "mixture", "st')
        return path
    return make


def shares(stdout: str) -> dict[int, list[float]]:
    """Return step → r from the output of --metrics."""
    rows = [line.split() for line in stdout.splitlines()]
    return {int(row[0]): list(map(float, row[1:])) for row in rows if row and row[0].isdigit()}


def cells(stdout: str, label: str) -> str:
    """Return the cells of the row that starts with `label`, with one blank between them."""
    row, = [line for line in stdout.splitlines() if line.startswith(f"{label}  ")]
    return " ".join(row[len(label):].split())


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


def test_the_program_draws_by_the_last_replayed_r_and_only_from_the_runs_domains(program, make_run, bins):
    arguments = [f"--data_dir={bins}", "--block_size=16"]
    _, stdout, _ = program(f"--metrics={make_run()}", *arguments)
    assert "65.88%" in stdout and "34.12%" in stdout
    status, stdout, _ = program(f"--metrics={make_run('only-y', names='y')}", *arguments)
    assert status == 0 and "--- y" in stdout and "--- x" not in stdout
    status, _, stderr = program(f"--metrics={make_run('only-z', names='z')}", *arguments)
    assert status == 2 and f"--data_dir={bins} has no z" in stderr


# ------------ The program: r replayed ---------------------------------------------------------------------------------


NO_TEACHER = {"rule": "natural", "teacher_ppl": (None, None), "test_samples": 0, "r": [R[0], R[0]]}


@pytest.mark.parametrize("run, arguments, expected", [
    ({}, [], {0: [0.25, 0.75], 20: [0.6588, 0.3412]}),
    ({}, ["--alpha=0"], {0: [0.25, 0.75], 20: [0.5, 0.5]}),
    ({}, ["--alpha=1"], {0: [0.25, 0.75], 20: [0.8176, 0.1824]}),
    ({}, ["--rule=ddk_no_fs"], {0: [0.25, 0.75], 20: [0.6225, 0.3775]}),
    ({}, ["--rule=natural"], {0: [0.25, 0.75], 20: [0.25, 0.75]}),
    ({}, ["--rule=equal"], {0: [0.5, 0.5], 20: [0.5, 0.5]}),
    (NO_TEACHER, [], {0: [0.25, 0.75], 20: [0.25, 0.75]}),
])
def test_the_program_replays_r_by_the_runs_own_rule_or_another(program, make_run, run, arguments, expected):
    status, stdout, _ = program(f"--metrics={make_run(**run)}", *arguments)
    assert status == 0 and shares(stdout) == expected
    difference = float(stdout.rpartition("difference")[2].split()[-1])
    assert (difference <= 1e-12) == (arguments == [])


def test_the_largest_difference_of_a_replay_is_over_all_evaluations_and_domains(program, make_run):
    path = make_run(r=[[0.3, 0.35], [0.25, 0.75]])  # 0.05 more and 0.4 less than the natural mixture
    assert "the run's own r: 4.0e-01" in program(f"--metrics={path}", "--rule=natural")[1]


@pytest.mark.parametrize("run, arguments, named", [
    ({"rule": "average"}, [], "average"), ({}, ["--alpha=1.5"], "alpha 1.5"), ({}, ["--alpha=nan"], "alpha nan"),
    ({"rule": "natural", "teacher_ppl": (None, None)}, ["--rule=ddk"], "teacher")])
def test_a_rule_of_a_fork_a_bad_alpha_and_a_missing_teacher_are_errors(program, make_run, run, arguments, named):
    path = make_run(**run)
    status, _, stderr = program(f"--metrics={path}", *arguments)
    assert status == 2 and f"--metrics={path}" in stderr and named in stderr and len(stderr.splitlines()) == 1


def test_a_bug_in_a_rule_that_is_replayed_keeps_its_traceback(program, make_run, monkeypatch):
    monkeypatch.setitem(sample_mixture.RULES, "ddk", lambda *_: nothing_at_all)
    status, _, stderr = program(f"--metrics={make_run()}")
    assert status == 1 and "Traceback" in stderr
    assert stderr.endswith("\nNameError: name 'nothing_at_all' is not defined\n")


# ------------ The program: runs next to each other --------------------------------------------------------------------


def test_a_row_for_each_run_has_its_last_perplexities_and_ratios_on_the_test_windows(program, make_run):
    paths = [make_run("one"), make_run("two", TESTS[1], method="kd", seed=3, max_steps=20)]
    status, stdout, _ = program("--metrics", *paths)
    assert status == 0 and "on the test windows" in stdout and "seeds" not in stdout
    header = next(line for line in stdout.splitlines() if "worst ratio" in line)
    assert header.split() == ["method", "seed", "step", "x", "y", "worst", "ratio", "mean", "ratio"]
    assert cells(stdout, "one") == "ddk 0 30 6.00 (2.00) 15.00 (3.00) 3.000 2.500"
    assert cells(stdout, "two") == "kd 3 20 12.00 (4.00) 5.50 (1.10) 4.000 2.550"
    assert cells(stdout, "teacher") == "3.00 5.00"

    # Without test windows
    stdout = program("--metrics", make_run("alone", test_samples=0))[1]
    assert "on the validation windows" in stdout and cells(stdout, "teacher") == "4.00 2.00"
    assert cells(stdout, "alone") == "ddk 0 30 5.00 (1.25) 3.00 (1.50) 1.500 1.375"


def test_unfinished_runs_and_runs_on_other_windows_are_marked_and_enter_no_mean(program, make_run):
    short = make_run("short", finished=False, seed=2)
    untested = [make_run(f"untested-{seed}", seed=seed, test_samples=0) for seed in (3, 4)]
    finished = [make_run(f"finished-{seed}", seed=seed) for seed in (0, 1)]
    stdout = program("--metrics", short, *untested, *finished)[1]
    assert "on the test windows" in stdout and cells(stdout, "teacher") == "3.00 5.00"
    row = cells(stdout, "short")
    assert row.startswith("ddk 2 20 6.00 (1.50) 2.00 (1.00) 1.500 1.250 unfinished") and "validation windows" in row
    assert cells(stdout, "untested-3") == "ddk 3 30 5.00 (1.25) 3.00 (1.50) 1.500 1.375 on validation windows"
    assert stdout.count("unfinished") == 1 and stdout.count("validation windows") == 3
    assert "finished-0 …: 2 seeds" in stdout and stdout.count("seeds") == 1

    # An unfinished run has no test windows yet
    stdout = program("--metrics", short, *untested)[1]
    assert "on the validation windows" in stdout and "untested-3 …: 2 seeds" in stdout
    short = make_run("short-untested", finished=False, test_samples=0)
    assert "seeds" not in program("--metrics", short, untested[0])[1]


def test_runs_that_differ_only_in_the_seed_and_in_keys_that_may_change_are_averaged(program, make_run):
    runs = [make_run(f"run-{seed}", TESTS[seed], seed=seed, teacher=f"moved/{seed}") for seed in range(3)]
    other = [make_run(f"other-{seed}", TESTS[seed], seed=seed, alpha=0.0) for seed in range(2)]
    stranger = make_run("stranger", seed=8, content={**CONTENT, "student": "6" * 64})
    stdout = program("--metrics", *runs, *other, stranger)[1]
    assert cells(stdout, "run-0 …: 3 seeds").endswith("4.000 ± 0.577 2.683 ± 0.159")
    assert cells(stdout, "other-0 …: 2 seeds").endswith("3.500 ± 0.500 2.525 ± 0.025")
    assert stdout.count("seeds") == 2

    # A seed that was run twice counts once, by its last run
    again = make_run("again", TESTS[2])
    assert cells(program("--metrics", *runs[:2], again)[1], "again …: 2 seeds").endswith("4.500 ± 0.500 2.775 ± 0.225")


@pytest.mark.parametrize("keys, named, expected", [
    ({"content": {**CONTENT, "data_dir": "9" * 64}}, "data_dir", ["d" * 64, "9" * 64]),
    ({"content": {**CONTENT, "teacher": "9" * 64}}, "teacher", ["t" * 64, "9" * 64]),
    ({"names": "xz"}, "domains", ["x,y", "x,z"]), ({"block_size": 32}, "block_size", ["16", "32"]),
    ({"val_samples": 9}, "val_samples", ["8", "9"]), ({"test_samples": 5}, "test_samples", ["6", "5"])])
def test_runs_on_other_bins_or_windows_or_of_another_teacher_are_rejected(program, make_run, keys, named, expected):
    paths = [make_run("untested", test_samples=0), make_run("one", alpha=0.1), make_run("stranger", **keys)]
    status, stdout, stderr = program("--metrics", *paths)
    assert status == 2 and stdout == "" and str(paths[2]) in stderr
    told = stderr.replace(str(paths[0].parent.parent), "")
    assert named in told and all(value in told for value in expected)
    assert program("--metrics", *paths[:2])[0] == 0


# ------------ The program: the figure ---------------------------------------------------------------------------------


@pytest.fixture
def figure(program, tmp_path, monkeypatch):
    """Run the program with --plot. Return the panels of the figure."""
    matplotlib_figure = pytest.importorskip("matplotlib.figure")

    def plot(*arguments) -> list:
        drawn = []
        monkeypatch.setattr(matplotlib_figure.Figure, "savefig", lambda self, path, dpi: drawn.append(self))
        status, _, stderr = program("--metrics", *arguments, f"--plot={tmp_path / 'figure.png'}")
        assert status == 0, stderr
        assert all(panel.get_ylabel() and panel.get_legend() for panel in drawn[0].axes)
        return drawn[0].axes
    return plot


def curves_of(panel) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines}


def test_bars_are_the_student_base_the_mean_of_each_group_and_the_teacher(figure, make_run):
    panel = figure(make_run("short", finished=False), make_run("one"), make_run("two", TESTS[1], seed=1),
                   make_run("kd", TESTS[2], method="kd"))[0]
    assert panel.get_title() == "last evaluation" and panel.get_ylabel() == "perplexity, test windows"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["x", "y"]
    bars = [(bar.get_label().split()[0], [patch.get_height() for patch in bar]) for bar in panel.containers]
    assert bars == [("student", [8.0, 2.0]), ("one", [9.0, 10.25]), ("kd", [3.0, 25.0]), ("teacher", [3.0, 5.0])]


def test_each_run_has_its_ratios_over_tokens_and_its_r_over_evaluations(figure, make_run):
    r = [[0.5, 0.5], [0.1, 0.9]]
    panels = figure(make_run("a/run"), make_run("b/run", r=r, alpha=0.1))  # of one name, but two runs
    ratios = [panel for panel in panels if panel.get_xlabel() == "tokens"]
    assert [panel.get_title() for panel in ratios] == ["run", "run"]
    for panel in ratios:
        assert curves_of(panel) == {"x": ([0, 300, 500], [2.0, 1.5, 1.25]), "y": ([0, 300, 500], [1.0, 1.0, 1.5])}
    steps = [panel for panel in panels if panel.get_xlabel() == "evaluation"]
    assert [panel.get_title() for panel in steps] == ["r of run", "r of run"]
    for panel, (first, second) in zip(steps, (R, r)):
        assert curves_of(panel) == {"x": ([0, 1], [first[0], second[0]]), "y": ([0, 1], [first[1], second[1]])}
        assert {line.get_drawstyle() for line in panel.lines} == {"steps-post"}


def test_a_replay_is_plotted_with_its_alpha_after_the_runs_own_r(figure, make_run):
    *_, own, replayed = figure(make_run(), "--alpha=0")
    assert own.get_title() == "r of run" and "replayed with α = 0.0" in replayed.get_title()
    assert curves_of(own)["x"] == ([0, 1], [R[0][0], R[1][0]])
    assert curves_of(replayed) == {"x": ([0, 1], [0.25, 0.5]), "y": ([0, 1], [0.75, 0.5])}


@pytest.mark.filterwarnings("error::UserWarning")  # of matplotlib
def test_a_figure_is_written_without_a_warning_or_rejected_with_its_file(program, make_run, tmp_path):
    pytest.importorskip("matplotlib")
    metrics = make_run()
    assert program(f"--metrics={metrics}", f"--plot={tmp_path / 'fig.png'}")[0] == 0
    assert (tmp_path / "fig.png").read_bytes().startswith(b"\x89PNG")
    for name in ("no_such_folder/fig.png", "fig.nonsense"):
        status, _, stderr = program(f"--metrics={metrics}", f"--plot={tmp_path / name}")
        assert status == 2 and f"--plot={tmp_path / name}" in stderr


# ------------ The program: mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, named", [
    ([], "--data_dir or --metrics"),
    (["--data_dir=x", "--alpha=0"], "exactly one file in --metrics"),
    (["--metrics", "x", "y", "--rule=ddk"], "exactly one file in --metrics"),
    (["--metrics=x", "--alph=1"], "--alph=1"),
    (["--data_dir=x", "--steps=0"], "--steps=0"),
    (["--data_dir=x", "--plot=x.png"], "--plot"),
    (["--data_dir=nowhere"], "--data_dir=nowhere"),
])
def test_a_bad_argument_is_one_message_with_its_name(program, arguments, named):
    status, stdout, stderr = program(*arguments)
    assert status == 2 and stdout == "" and named in stderr.rpartition("error: ")[2]


@pytest.mark.parametrize("lines", [[], ["run"], ["mixture"], ["run", "{", "mixture"], ["[1]"]], ids=str)
def test_metrics_that_no_run_writes_are_rejected(program, make_run, lines):
    path = make_run()
    run, mixture, *_ = path.read_text().splitlines()
    path.write_text("".join({"run": run, "mixture": mixture}.get(line, line) + "\n" for line in lines))
    status, _, stderr = program(f"--metrics={path}")
    assert status == 2 and str(path) in stderr


def test_without_torch_it_runs_and_an_error_is_one_message_without_a_traceback():
    code = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = ['', '--metrics=nowhere']; "
            f"runpy.run_path({sample_mixture.__file__!r}, run_name='__main__')")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         cwd=sample_mixture.__file__.rpartition("/")[0])
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: nowhere") and len(run.stderr.splitlines()) == 1
