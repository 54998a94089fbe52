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


R_0 = [0.7310585786300049, 0.2689414213699951]  # of ratios 2 and 1: e²/(e² + e)
R_1 = [0.6587872380968218, 0.3412127619031782]  # then of 1.5 and 1: ψ/Σψ = 1/(1 + e^∓1.5), α = 0.5


def test_a_worked_example():
    np.testing.assert_allclose(discrepancy_factor([8, 4], [4, 4]), R_0, rtol=0, atol=1e-15)
    np.testing.assert_allclose(smooth_update(R_0, [6, 4], [4, 4]), R_1, rtol=0, atol=1e-15)


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
    folder = tmp_path_factory.mktemp("bins")
    texts = [("x", f"{i} X " * 20) for i in range(40)] + [("y", f"{i} y " * 40) for i in range(60)]
    build_bins(folder, load_tokenizer("bytes"), texts)
    return folder


def domains(student_ppl: list[float], teacher_ppl: float | None = 4) -> dict:
    ratios = [ppl / teacher_ppl if teacher_ppl else None for ppl in student_ppl]
    return {name: {"student_ppl": ppl, "teacher_ppl": teacher_ppl, "ratio": ratio, "tokens": 0, "epochs": 0.0}
            for name, ppl, ratio in zip("xy", student_ppl, ratios)}


LINES = [
    {"kind": "run", "step": 0, "config": {"alpha": 0.5}, "rule": "ddk", "natural": {"x": 0.25, "y": 0.75}},
    {"kind": "mixture", "step": 0, "t": 0, "r": {"x": 0.25, "y": 0.75}, "domains": domains([8, 4])},
    {"kind": "train", "step": 1, "loss": 2.0},
    {"kind": "mixture", "step": 20, "t": 1, "r": dict(zip("xy", R_1)), "domains": domains([6, 4])},
    {"kind": "end", "step": 30, "domains": domains([5, 4])},
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
    write_lines(metrics, [{**LINES[0], "rule": "natural"}, {**LINES[1], "domains": domains([8, 4], None)}])
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
    assert status == 2 and f"--metrics={metrics}: {bins} has no other" in stderr


def test_the_plot_of_one_run_has_fig_1_fig_3_and_r_or_is_refused(program, metrics, tmp_path):
    pytest.importorskip("matplotlib")
    assert program(f"--metrics={metrics}", f"--plot={tmp_path / 'fig.png'}")[0] == 0
    assert (tmp_path / "fig.png").read_bytes().startswith(b"\x89PNG")
    assert program(f"--metrics={metrics}", f"--plot={tmp_path / 'fig.svg'}")[0] == 0
    svg = (tmp_path / "fig.svg").read_text()
    for text in ("r", f"{tmp_path.name}: perplexity, student / teacher", "perplexity, last evaluation", "tokens"):
        assert f"<!-- {text} -->" in svg
    for name in ("no_such_folder/fig.png", "fig.nonsense"):
        status, _, stderr = program(f"--metrics={metrics}", f"--plot={tmp_path / name}")
        assert status == 2 and f"--plot={tmp_path / name}" in stderr


def test_a_plot_goes_to_the_last_evaluation_which_may_be_no_multiple_of_k(program, metrics, two_runs, monkeypatch):
    plotted = []
    monkeypatch.setattr(sample_mixture, "plot", lambda runs, path, r=None: plotted.extend(runs))
    for paths in ([metrics], two_runs):
        assert program("--metrics", *paths, "--plot=fig.png")[0] == 0
    assert [[line["step"] for line in lines] for _, lines in plotted] == 3 * [[0, 20, 30]]


@pytest.fixture
def two_runs(tmp_path):
    """The metrics of two finished runs, in folders of their own."""
    paths = []
    for name, end in (("one", [5.0, 4.0]), ("other", [6.0, 3.0])):
        path = tmp_path / name / "metrics.jsonl"
        path.parent.mkdir()
        write_lines(path, [*LINES[:-1], {"kind": "end", "step": 30, "domains": domains(end)}])
        paths.append(path)
    return paths


def test_runs_side_by_side_have_a_row_each_of_what_was_measured_last(program, two_runs):
    status, stdout, _ = program("--metrics", *two_runs)
    rows = {line.split()[0]: line.split()[1:] for line in stdout.splitlines() if line}
    assert status == 0 and "on the validation windows" in stdout
    assert " ".join(rows["one"]) == "5.00 (1.25) 4.00 (1.00) 1.250 1.125"
    assert " ".join(rows["other"]) == "6.00 (1.50) 3.00 (0.75) 1.500 1.125"
    assert rows["teacher"] == ["4.00", "4.00"]
    assert program("--metrics", *two_runs, two_runs[0])[1].count("\none ") == 2  # a row each, whatever their names

    # On the test windows where all runs have some
    for path in two_runs:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for name, domain in lines[-1]["domains"].items():
            domain.update(test_student_ppl=8.0, test_teacher_ppl=2.0, test_ratio=4.0)
        write_lines(path, lines)
    assert "on the test windows" in program("--metrics", *two_runs)[1]


def test_runs_side_by_side_are_plotted_as_fig_1_and_fig_3(program, two_runs, tmp_path):
    pytest.importorskip("matplotlib")
    assert program("--metrics", *two_runs, f"--plot={tmp_path / 'fig.svg'}")[0] == 0
    svg = (tmp_path / "fig.svg").read_text()
    for text in ("student before", "one", "other", "teacher", "one: perplexity, student / teacher", "tokens"):
        assert f"<!-- {text} -->" in svg


def test_runs_that_cannot_stand_side_by_side_are_one_message(program, two_runs):
    status, _, stderr = program("--metrics", *two_runs, "--alpha=0.5")
    assert status == 2 and "--alpha" in stderr
    write_lines(two_runs[1], [*LINES[:-1], {"kind": "end", "step": 30, "domains": domains([5.0], None)}])
    status, _, stderr = program("--metrics", *two_runs)
    assert status == 2 and str(two_runs[1]) in stderr and "other domains" in stderr

    write_lines(two_runs[1], LINES[:1])
    status, _, stderr = program("--metrics", *two_runs)
    assert status == 2 and str(two_runs[1]) in stderr and "no evaluation in it yet" in stderr

    # Columns are those of the first run.
    reversed_domains = dict(reversed(domains([6.0, 3.0]).items()))
    write_lines(two_runs[1], [*LINES[:-1], {"kind": "end", "step": 30, "domains": reversed_domains}])
    status, _, stderr = program("--metrics", *two_runs)
    assert status == 2 and "in another order" in stderr


@pytest.mark.parametrize("arguments, named", [
    ([], "--data_dir or --metrics"),
    (["--metrics=x", "--alpha=nan"], "--alpha=nan"),
    (["--data_dir=x", "--alpha=0.5"], "name one --metrics"),
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
    "unknown rule": [{**LINES[0], "rule": "other"}, *LINES[1:]],
    "no r": [LINES[0], {**LINES[1], "r": {}}],
    "no perplexity": [LINES[0], {**LINES[1], "domains": domains([0.5, 4])}],
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
