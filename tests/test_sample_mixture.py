"""sample_mixture.py: Eq. 1 and Eq. 2 against exact arithmetic, the promises of the sampler, and the program."""

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
from sample_mixture import (MixtureSampler, discrepancy_factor, doremi_update, interval_probs, keyed_permutation,
                            next_factor, smooth_update)

# ----------------------------------------------- Eq. 1 and Eq. 2 ------------------------------------------------------


def exact_eq2(factor, student_ppl, teacher_ppl, alpha) -> list[Decimal]:
    """Eq. 2 as printed, to 60 digits: Decimal's exponents hold exp(1e6), so nothing needs to be subtracted."""
    with localcontext() as context:
        context.prec = 60
        psi = [Decimal(f) * (Decimal(s) / Decimal(t)).exp() for f, s, t in zip(factor, student_ppl, teacher_ppl)]
        return [Decimal(alpha) * p / sum(psi) + (1 - Decimal(alpha)) / len(psi) for p in psi]


def assert_close(got, exact):
    assert got.dtype == np.float64 and got.shape == (len(exact),)
    assert max(abs(Decimal(g) - e) for g, e in zip(got.tolist(), exact)) < Decimal("1e-12")


RNG = np.random.default_rng(0)
PERPLEXITIES = {  # student, teacher
    "ordinary": ([12.5, 8.25, 3.75], [7.5, 6.5, 3.5]),
    "one domain": ([5.0], [4.0]),
    "all alike": ([3.0, 3.0, 3.0], [2.0, 2.0, 2.0]),
    "student ahead": ([2.0, 3.0], [4.0, 9.0]),
    "ratios 1e6 and 1": ([1e6, 1.0], [1.0, 1.0]),
    "ratios 1e-6 and 1e6": ([1.0, 1e6], [1e6, 1.0]),
    "largest first": ([1e6, 10.1, 33.3], [1.0, 3.3, 10.7]),
    "near-ties at 1e6": ([1e6, 1e6 - 0.001, 1e6 + 0.25], [1.0, 1.0, 1.0]),
    "near-ties of uneven quotients": ([1.7e6, 2.3e6, 3.1e6, 1.1e6], [1.7, 2.3000001, 3.1000002, 1.1000003]),
    "ten domains": (np.exp(RNG.uniform(0, 7, 10)).tolist(), np.exp(RNG.uniform(0, 3, 10)).tolist()),
}


@pytest.mark.parametrize("student, teacher", PERPLEXITIES.values(), ids=PERPLEXITIES)
def test_eq1_is_within_1e_12_of_exact_arithmetic(student, teacher):
    assert_close(discrepancy_factor(student, teacher), exact_eq2([1] * len(student), student, teacher, 1))


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("student, teacher", PERPLEXITIES.values(), ids=PERPLEXITIES)
def test_eq2_is_within_1e_12_of_exact_arithmetic(student, teacher, alpha):
    n = len(student)
    uneven = np.arange(1, n + 1) / sum(range(1, n + 1))
    factors = [np.full(n, 1 / n), uneven, discrepancy_factor(student, teacher), [1e-300] * n]
    if n > 1:  # a factor of 0, that of the largest ratio too
        factors += [[0.0] + [1 / (n - 1)] * (n - 1), [1 / (n - 1)] * (n - 1) + [0.0]]
    for factor in factors:
        assert_close(smooth_update(factor, student, teacher, alpha), exact_eq2(factor, student, teacher, alpha))


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_eq2_stays_within_its_bounds(alpha):
    for student, teacher in PERPLEXITIES.values():
        n = len(student)
        r = smooth_update(np.full(n, 1 / n), student, teacher, alpha)
        assert r.min() >= (1 - alpha) / n - 1e-15 and r.max() <= alpha + (1 - alpha) / n + 1e-15
        assert abs(r.sum() - 1) < 1e-12


def test_a_worked_example():
    # Ratios 2 and 1: r_0 = e²/(e² + e). Then ratios 1.5 and 1: ψ = r_0 · (e^1.5, e), so ψ/Σψ = 1/(1 + e^∓1.5).
    r_0 = discrepancy_factor([8, 4], [4, 4])
    np.testing.assert_allclose(r_0, [0.7310585786300049, 0.2689414213699951], rtol=0, atol=1e-15)
    np.testing.assert_allclose(smooth_update(r_0, [6, 4], [4, 4]), [0.6587872380968218, 0.3412127619031782],
                               rtol=0, atol=1e-15)


@pytest.mark.parametrize("student, teacher", [
    ([], []), ([2], [2, 2]), ([[2, 2]], [[2, 2]]), ([math.nan, 2], [2, 2]), ([2, 2], [math.inf, 2]),
    ([0.99, 2], [2, 2]), ([2, 2], [2, 0]), ([2, 2], [2, -3])])
def test_bad_perplexities_are_refused(student, teacher):
    with pytest.raises(ValueError, match="student_ppl|teacher_ppl"):
        discrepancy_factor(student, teacher)
    with pytest.raises(ValueError, match="student_ppl|teacher_ppl"):
        smooth_update([0.5] * len(student), student, teacher)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_0_to_1_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        smooth_update([0.5, 0.5], [2, 2], [2, 2], alpha)


@pytest.mark.parametrize("factor", [[0.5], [0.5, 0.25, 0.25], [-0.5, 1.5], [0, 0], [math.nan, 1], [math.inf, 1]])
def test_bad_factors_are_refused(factor):
    with pytest.raises(ValueError, match="factor"):
        smooth_update(factor, [2, 2], [2, 2])


# ----------------------------------------------- Alg. 1: the rule of each arm --------------------------------------

METHODS = ["ddk", "ddk_no_fs", "ddk_es", "kd", "cpt", "cpt_doremi", "minillm", "ted"]


@pytest.mark.parametrize("method", METHODS)
def test_the_factor_starts_at_eq1_and_goes_on_by_eq2_but_for_no_fs(method):
    perplexities, r_0 = ([6, 4], [4, 4]), discrepancy_factor([8, 4], [4, 4])
    eq1, eq2 = discrepancy_factor(*perplexities), smooth_update(r_0, *perplexities, 0.3)
    np.testing.assert_array_equal(next_factor(method, None, [8, 4], [4, 4], 0.3), r_0)
    expected = eq1 if method == "ddk_no_fs" else eq2
    np.testing.assert_array_equal(next_factor(method, r_0, *perplexities, 0.3), expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_each_arm_draws_by(method):
    factor, natural, uniform = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6]), np.full(3, 1 / 3)
    first, later = {"ddk": (natural, factor), "ddk_no_fs": (natural, factor),
                    "ddk_es": (uniform, uniform)}.get(method, (natural, natural))
    np.testing.assert_array_equal(interval_probs(method, 0, factor, natural), first)
    np.testing.assert_array_equal(interval_probs(method, 1, factor, natural), later)
    np.testing.assert_array_equal(interval_probs(method, 30, factor, natural), later)


# ----------------------------------------------- The keyed permutation ------------------------------------------------


def permutation(n: int, key: int) -> list[int]:
    return keyed_permutation(np.arange(n), np.array(n), np.array(key)).tolist()


def test_the_permutation_is_a_bijection():
    for n in [*range(1, 40), 48, 49, 50, 63, 64, 65, 99, 100, 101, 4095, 4096, 4097, 10007]:
        for key in (0, 1, 2**64 - 1):
            assert sorted(permutation(n, key)) == list(range(n)), (n, key)


def test_the_permutation_depends_on_the_key_alone():
    together = keyed_permutation(np.array([3, 3, 5, 0]), np.array([100, 7, 100, 1]), np.array([1, 2, 1, 9], np.uint64))
    assert together.tolist() == [permutation(100, 1)[3], permutation(7, 2)[3], permutation(100, 1)[5], 0]
    assert len({tuple(permutation(100, key)) for key in range(200)}) == 200


def assert_even(counts: np.ndarray, freedom: int):
    """Chi-square of `counts` against even ones, 5 standard deviations wide: the keys are fixed, so never by chance."""
    expected = counts.mean()
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 9, 10, 16, 30])
def test_every_element_comes_to_every_place_equally_often(n):
    keys, counts = np.arange(300 * n, dtype=np.uint64), np.empty((n, n))
    for place in range(n):
        elements = keyed_permutation(np.full(len(keys), place), np.full(len(keys), n), keys)
        counts[place] = np.bincount(elements.astype(np.int64), minlength=n)
    assert_even(counts, (n - 1) ** 2)


@pytest.mark.parametrize("n", [3, 4])
def test_every_order_comes_equally_often(n):
    orders = Counter(tuple(permutation(n, key)) for key in range(60 * math.factorial(n)))
    assert_even(np.array([orders[order] for order in permutations(range(n))]), math.factorial(n) - 1)


# ----------------------------------------------- The sampler ----------------------------------------------------------

WINDOWS = {"code": 31, "prose": 16, "one": 1, "math": 101}


def draw(sampler: MixtureSampler, batches: int) -> np.ndarray:
    """(batches, 2, B): domain ids and window ids."""
    return np.array([sampler.next_batch() for _ in range(batches)])


def walks(sampler: MixtureSampler, batches: int) -> dict[str, list[int]]:
    """The windows of each domain in the order drawn."""
    domain_ids, window_ids = np.concatenate(draw(sampler, batches), axis=1)
    return {name: window_ids[domain_ids == domain].tolist() for domain, name in enumerate(sampler.names)}


def test_a_batch_is_two_int64_arrays_of_valid_ids():
    sampler = MixtureSampler(WINDOWS, 24, seed=0)
    for domain_ids, window_ids in (sampler.next_batch() for _ in range(30)):
        assert domain_ids.shape == window_ids.shape == (24,) and domain_ids.dtype == window_ids.dtype == np.int64
        assert ((domain_ids >= 0) & (domain_ids < 4)).all()
        assert ((window_ids >= 0) & (window_ids < np.array(list(WINDOWS.values()))[domain_ids])).all()


def test_each_epoch_of_a_domain_is_a_permutation_and_epochs_differ():
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


def test_probs_start_at_the_natural_proportions():
    np.testing.assert_array_equal(MixtureSampler({"x": 30, "y": 10}, 8, 0).probs, [0.75, 0.25])


def test_counts_are_the_batch_times_probs_to_within_one():
    rng = np.random.default_rng(0)
    mixtures = [[0.1] * 10, [1 / 3] * 3, [1 / 49] * 49, [0, 0.3, 0, 0.7, 0], [1, 0, 0], [0, 0, 1], [1e-9, 1, 1e-9]]
    mixtures += [rng.dirichlet(np.full(n, 0.4)) * (rng.random(n) < 0.7) for n in rng.integers(2, 12, 150)]
    for mixture in filter(np.any, mixtures):
        batch_size = int(rng.choice([1, 7, 64, 250]))
        sampler = MixtureSampler({f"d{i}": 50 for i in range(len(mixture))}, batch_size, seed=0)
        sampler.probs = mixture
        for domain_ids, _ in (sampler.next_batch() for _ in range(8)):
            counts = np.bincount(domain_ids, minlength=len(mixture))
            assert counts.sum() == batch_size
            assert (np.abs(counts - batch_size * sampler.probs) < 1).all()
            assert not counts[sampler.probs == 0].any()


def test_whole_quotas_are_met_exactly():
    sampler = MixtureSampler({f"d{i}": 50 for i in range(10)}, 20, seed=0)  # 0.1 + 0.1 + 0.1 is not 0.3
    assert all(np.bincount(sampler.next_batch()[0]).tolist() == [2] * 10 for _ in range(300))


def test_the_share_drawn_in_the_long_run_is_probs():
    sampler = MixtureSampler(WINDOWS, 8, seed=0)
    sampler.probs = [0.62, 0.3, 0.05, 0.03]
    shares = np.bincount(draw(sampler, 1000)[:, 0].ravel()) / 8000
    np.testing.assert_allclose(shares, sampler.probs, atol=0.003)


def test_the_places_of_a_batch_are_shuffled_among_domains():
    domain_ids = draw(MixtureSampler({"x": 50, "y": 50}, 16, seed=0), 400)[:, 0]
    assert np.abs(domain_ids.mean(axis=0) - 0.5).max() < 0.1  # at every place, as often x as y
    assert len(set(map(tuple, domain_ids))) > 390  # and in other places each time


def test_a_domain_is_walked_in_one_order_whatever_the_probs_and_the_batch():
    natural, skewed, single = (MixtureSampler(WINDOWS, batch_size, seed=3) for batch_size in (64, 12, 1))
    skewed.probs = {"code": 0.1, "prose": 0.6, "one": 0.1, "math": 0.2}
    single.probs = np.ones(4)
    a, b, c = walks(natural, 12), walks(skewed, 40), walks(single, 300)  # of one window a batch: the walk itself
    for name in WINDOWS:
        n = min(len(a[name]), len(b[name]), len(c[name]))
        assert n > 3 and a[name][:n] == b[name][:n] == c[name][:n]


def test_a_domains_order_does_not_depend_on_which_others_there_are():
    alone, among = MixtureSampler({"code": 31}, 8, seed=0), MixtureSampler({"a": 7, "code": 31, "z": 50}, 8, seed=0)
    walk = walks(among, 40)["code"]
    assert walk == walks(alone, 40)["code"][:len(walk)]


def test_new_probs_count_from_the_very_next_batch():
    sampler = MixtureSampler({"x": 50, "y": 50, "z": 50}, 8, seed=0)
    draw(sampler, 3)
    sampler.probs = {"z": 0.25, "x": 0, "y": 0.75}  # by name, in any order, and weights need not sum to 1
    assert np.bincount(sampler.next_batch()[0], minlength=3).tolist() == [0, 6, 2]
    sampler.probs = np.array([4, 0, 4])
    assert np.bincount(sampler.next_batch()[0], minlength=3).tolist() == [4, 0, 4]


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 24), (1, 3), (2, 12), (4, 2), (8, 3)])
def test_the_global_batch_is_the_same_for_any_ranks_and_micro_batches(world_size, micro_batch_size):
    expected, share = draw(MixtureSampler(WINDOWS, 24, seed=0), 5), 24 // world_size
    slices = []
    for rank in range(world_size):
        np.random.seed(rank)  # the state that a rank happens to be in
        own = draw(MixtureSampler(WINDOWS, 24, seed=0), 5)[:, :, rank * share:(rank + 1) * share]
        slices += [own[:, :, i:i + micro_batch_size] for i in range(0, share, micro_batch_size)]
    np.testing.assert_array_equal(np.concatenate(slices, axis=2), expected)


def test_resumed_equals_straight():
    rng = np.random.default_rng(0)
    for _ in range(20):  # mixtures whose sums round this way and that
        sampler, resumed = MixtureSampler(WINDOWS, 24, seed=5), MixtureSampler(WINDOWS, 24, seed=5)
        sampler.probs = rng.dirichlet(np.ones(4))
        draw(sampler, 7)
        state = json.loads(json.dumps(sampler.state_dict()))
        straight = draw(sampler, 10)
        resumed.load_state_dict(state)
        np.testing.assert_array_equal(draw(resumed, 10), straight)
        assert resumed.state_dict() == sampler.state_dict()
        resumed.load_state_dict(state)  # what was saved has not moved meanwhile
        np.testing.assert_array_equal(draw(resumed, 10), straight)


def test_the_state_is_small():
    sampler = MixtureSampler({"x": 10**9, "y": 10**9}, 64, seed=0)
    draw(sampler, 20)
    assert len(json.dumps(sampler.state_dict())) < 300


def test_the_state_of_other_domains_is_refused():
    state = MixtureSampler({"x": 5, "y": 5}, 4, seed=0).state_dict()
    for names in ({"x": 5}, {"x": 5, "z": 5}, {"x": 5, "y": 5, "z": 5}):
        with pytest.raises(ValueError, match="domains"):
            MixtureSampler(names, 4, seed=0).load_state_dict(state)


def test_a_billion_windows_take_no_memory():
    tracemalloc.start()
    sampler = MixtureSampler({"x": 10**9, "y": 10**9 + 7}, 64, seed=0)
    domain_ids, window_ids = np.concatenate(draw(sampler, 20), axis=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert len(set(zip(domain_ids, window_ids))) == 64 * 20 and window_ids.max() > 9e8


@pytest.mark.parametrize("n_windows, batch_size", [({}, 4), ({"x": 0}, 4), ({"x": 5, "y": -1}, 4), ({"x": 5}, 0)])
def test_bad_sizes_are_refused(n_windows, batch_size):
    with pytest.raises(ValueError, match="n_windows|batch_size"):
        MixtureSampler(n_windows, batch_size, seed=0)


@pytest.mark.parametrize("probs", [[1], [1, 1, 1], [[1, 1]], [-1, 2], [0, 0], [math.nan, 1], [math.inf, 1], {"x": 1},
                                   {"x": 1, "z": 1}, {"x": 1, "y": 1, "z": 1}, {"x": -1, "y": 2}])
def test_bad_probs_are_refused_and_change_nothing(probs):
    sampler = MixtureSampler({"x": 5, "y": 15}, 4, seed=0)
    with pytest.raises(ValueError, match="probs"):
        sampler.probs = probs
    assert sampler.probs.tolist() == [0.25, 0.75]


def test_probs_can_only_be_set_whole():
    with pytest.raises(ValueError, match="read-only"):
        MixtureSampler({"x": 5, "y": 15}, 4, seed=0).probs[0] = 1


# ----------------------------------------------- The program ----------------------------------------------------------


@pytest.fixture
def program(run_main):
    """Runs the program with arguments: (exit status, stdout, stderr)."""
    return partial(run_main, sample_mixture)


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    """Bins of two domains of unlike letters, y three times as long."""
    texts = {"x": [f"{i} X " * 20 for i in range(40)], "y": [f"{i} y " * 40 for i in range(60)]}
    folder = tmp_path_factory.mktemp("bins")
    build_bins(folder, load_tokenizer("bytes"), {name: lambda name=name: texts[name] for name in texts})
    return folder


def domains(x: tuple[float, float], y: tuple[float, float]) -> dict:
    return {name: {"student_ppl": student, "teacher_ppl": teacher, "ratio": student / teacher, "factor": 0.5,
                   "tokens": 0, "epochs": 0.0} for name, (student, teacher) in {"x": x, "y": y}.items()}


R_1 = {"x": 0.6587872380968218, "y": 0.3412127619031782}  # as in test_a_worked_example
LINES = [
    {"kind": "run", "step": 0, "config": {"method": "ddk", "alpha": 0.5}},
    {"kind": "mixture", "step": 0, "t": 0, "r": {"x": 0.25, "y": 0.75}, "domains": domains((8, 4), (4, 4))},
    {"kind": "train", "step": 1, "loss": 2.0},
    {"kind": "mixture", "step": 20, "t": 1, "r": R_1, "domains": domains((6, 4), (4, 4))},
    {"kind": "end", "step": 30, "domains": domains((5, 4), (4, 4))},
]


@pytest.fixture
def metrics(tmp_path):
    """A run's metrics.jsonl with a torn last line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"kind": "mixture", "st')
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


def test_the_program_replays_r_as_the_run_had_it(program, metrics):
    status, stdout, _ = program(f"--metrics={metrics}")
    assert status == 0
    assert shares(stdout) == {0: [0.25, 0.75], 20: [0.6588, 0.3412]}
    assert float(stdout.rpartition("difference")[2].split()[-1]) < 1e-15


@pytest.mark.parametrize("argument, r_1", [
    ("--alpha=0", [0.5, 0.5]), ("--alpha=1", [0.8176, 0.1824]), ("--method=ddk_no_fs", [0.6225, 0.3775]),
    ("--method=kd", [0.25, 0.75])])
def test_the_program_replays_r_under_another_rule(program, metrics, argument, r_1):
    status, stdout, _ = program(f"--metrics={metrics}", argument)
    assert status == 0 and shares(stdout) == {0: [0.25, 0.75], 20: r_1}


def test_the_program_replays_equal_sampling_from_the_start(program, metrics):
    assert shares(program(f"--metrics={metrics}", "--method=ddk_es")[1]) == {0: [0.5, 0.5], 20: [0.5, 0.5]}


def test_the_program_draws_by_the_last_r_replayed(program, metrics, bins):
    _, stdout, _ = program(f"--metrics={metrics}", f"--data_dir={bins}", "--block_size=16")
    assert "65.88%" in stdout and "34.12%" in stdout


def test_the_program_draws_from_the_domains_of_the_run_alone(program, metrics, bins):
    lines = [json.loads(line) for line in metrics.read_text().splitlines()[:2]]
    del lines[1]["domains"]["y"], lines[1]["r"]["y"]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, stdout, _ = program(f"--metrics={metrics}", f"--data_dir={bins}", "--block_size=16")
    assert status == 0 and "--- x" in stdout and "--- y" not in stdout


def test_the_program_plots(program, metrics, tmp_path):
    pytest.importorskip("matplotlib")
    assert program(f"--metrics={metrics}", f"--plot={tmp_path / 'fig.png'}")[0] == 0
    assert (tmp_path / "fig.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, named", [
    ([], ["--data_dir", "--metrics"]),
    (["--alpha=1.5", "--seed=-1", "--steps=0", "--plot=x.png"], ["--alpha=1.5", "--seed=-1", "--steps=0", "--plot="]),
    (["--alhpa=1", "--batch_size=x", "--method=gd"], ["--alpha", "--batch_size=x", "--method=gd"]),
    (["--data_dir=nowhere"], ["--data_dir=nowhere"]),
    (["--metrics=nowhere.jsonl"], ["--metrics=nowhere.jsonl"]),
])
def test_bad_arguments_are_all_named_at_once(program, arguments, named):
    status, stdout, stderr = program(*arguments)
    assert status == 2 and stdout == "" and all(key in stderr for key in named)


@pytest.mark.parametrize("text", [
    b"", b'{"kind": "run", "config": {}}\n', b'{"kind": "mixture", "st\n{"kind": "end"}\n', b"[1]\n", b"{}\n",
    b"\x89PNG\r\n\x1a\n\xff\xfe\n", json.dumps({**LINES[1], "domains": {
        "x": {"student_ppl": 8, "teacher_ppl": None, "ratio": None}}}).encode() + b"\n",
    *(json.dumps({key: value for key, value in LINES[1].items() if key != left_out}).encode() + b"\n"
      for left_out in ("t", "r", "domains")),
    *(json.dumps({**LINES[1], "domains": {"x": domain, "y": domain}}).encode() + b"\n"
      for domain in ({"student_ppl": 8, "teacher_ppl": 4}, {"student_ppl": .5, "teacher_ppl": 4, "ratio": .125}))],
    ids=["empty", "no mixture line", "torn in the middle", "no objects", "no kind", "binary", "no teacher", "no t",
         "no r", "no domains", "no ratio", "no perplexity"])
def test_metrics_without_perplexities_are_refused(program, tmp_path, text):
    (tmp_path / "metrics.jsonl").write_bytes(text)
    status, _, stderr = program(f"--metrics={tmp_path / 'metrics.jsonl'}")
    assert status == 2 and "--metrics=" in stderr


def test_metrics_of_other_domains_than_the_bins_are_refused(program, metrics, bins):
    metrics.write_text(metrics.read_text().replace('"x"', '"other"'))
    status, _, stderr = program(f"--metrics={metrics}", f"--data_dir={bins}", "--block_size=16")
    assert status == 2 and f"--metrics={metrics}: {bins} has no other" in stderr


@pytest.mark.parametrize("name", ["no_such_folder/fig.png", "fig.nonsense"])
def test_a_plot_that_cannot_be_written_is_refused(program, metrics, tmp_path, name):
    pytest.importorskip("matplotlib")
    status, _, stderr = program(f"--metrics={metrics}", f"--plot={tmp_path / name}")
    assert status == 2 and "--plot=" in stderr


def test_an_error_is_one_message_without_a_traceback():
    run = subprocess.run([sys.executable, sample_mixture.__file__, "--alpha=2", "--metrics=x"], capture_output=True,
                         text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.startswith("error: --alpha=2")
    assert len(run.stderr.splitlines()) == 1


def test_doremis_update_raises_what_lags_and_keeps_a_floor():
    weights = doremi_update([0.2, 0.3, 0.5], [1.0, 0.0, 2.0])
    raised = [0.2 * math.e, 0.3, 0.5 * math.e ** 2]
    assert weights.tolist() == pytest.approx([0.999 * w / sum(raised) + 0.001 / 3 for w in raised], rel=1e-12)
    weights = np.full(3, 1 / 3)
    for _ in range(2000):
        weights = doremi_update(weights, [0.0, 0.0, 5.0])
    assert weights.sum() == pytest.approx(1) and weights[0] == pytest.approx(0.001 / 3, rel=0.01)
    assert np.isfinite(doremi_update([0.5, 0.5], [0.0, 1e4])).all()
