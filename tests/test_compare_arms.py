"""The comparison of arms: its statistics and tables, and a whole comparison in miniature."""

import functools
import itertools
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import compare_arms
import pytest
import report_arms
import torch
from compare_arms import (ALL_ARMS, SETTINGS, chosen_arms, experiment_keys, fixed_mixture, other_runs,
                          register_kd_first, shuffled_files)
from conftest import read_lines
from report_arms import (CHANGES, CLAIMS, REGISTERED, arms_table, claims_table, course_table, decided, draw,
                         holm, interval, make_tables, mean_and_error, measured, paired, runs_of, share_of_gain,
                         sign_flip_p, t_p, with_tables)
from test_forks import patched

import distill
from data import UserError, quickstart_documents
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent


def made_up(**arms) -> dict:
    """Return results in which a run's worst and mean ratio are one value, and its ratios fall by a tenth of it."""
    results = {}
    for arm, values in arms.items():
        results[arm] = {}
        for seed, value in enumerate(values):
            domain = {"test_ratio": value, "ratio": value, "student_ppl": 2 * value, "teacher_ppl": 2.0, "tokens": 8,
                      "epochs": 0.5}
            end = {"code": domain, "prose": domain}
            results[arm][str(seed)] = {
                "worst_ratio": value, "mean_ratio": value, "end": end, "steps": [0, 5, 10, 15],
                "ratio": {"code": [5.0, 1.2 * value, 1.1 * value, value], "prose": [3.0, value, value, value]},
                "r": {"code": [0.5, 0.6, 0.6, 0.6], "prose": [0.5, 0.4, 0.4, 0.4]}}
    return results


def test_the_measures_of_a_run():
    # The mean by size weighs domains by their train tokens.
    one = made_up(ddk=[1.0])["ddk"]["0"]
    one["end"] = {"code": {"test_ratio": 2.0, "tokens": 60, "epochs": 2.0},
                  "prose": {"test_ratio": 4.0, "tokens": 40, "epochs": 4.0}}
    assert measured(one, "size_ratio") == 2.5

    # Speed is the first evaluation with a worst ratio below 2, or an interval after the end.
    assert one["ratio"] == {"code": [5.0, 1.2, 1.1, 1.0], "prose": [3.0, 1.0, 1.0, 1.0]}  # at 0, 5, 10, 15
    assert measured(one, "speed") == 5
    one["ratio"]["prose"] = [3.0, 2.0, 1.9, 1.0]
    assert measured(one, "speed") == 10
    one["ratio"]["prose"] = [3.0] * 4
    assert measured(one, "speed") == 20

    # Changes are counted from the first r that draws, or from the third.
    one["ratio"] = {"code": [9.0, 5.0, 4.0, 2.0, 1.0]}
    one["r"] = {"code": [0.1, 0.5, 0.4, 0.2, 0.1]}
    changes = [measured(one, measure) for measure in CHANGES]
    assert changes == pytest.approx([0.4 / 3, 0.1, 4 / 3, 1.0])


def test_seeds_are_paired():
    results = made_up(ddk=[1.0, 2.0, 3.0], kd=[1.5, 2.5])
    assert paired(results, "ddk", "kd", "worst_ratio") == [-0.5, -0.5]
    assert paired(results, "ddk", "ted", "worst_ratio") == []
    changes = paired(results, "ddk", "kd", "ratio_change")  # .1 of the value twice in code, 0 in prose
    assert changes == pytest.approx([-0.05 * 0.5, -0.05 * 0.5])


def test_intervals_and_p_values_are_students():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3 and error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert math.isnan(mean_and_error([1.0])[1])
    numbers = [math.cos(2 * math.pi * k / 5) + 5 for k in range(5)]  # whose mean is 5
    low, high = interval(numbers)
    assert (high + low) / 2 == pytest.approx(5)
    assert (high - low) / 2 == pytest.approx(2.7764 * mean_and_error(numbers)[1], 1e-4)  # of 4 degrees of freedom
    for shift in (low, high):
        assert t_p([number - shift for number in numbers]) == pytest.approx(0.05)


def test_the_sign_flip_test_counts_all_choices_of_signs():
    generator = random.Random(0)
    for n in (1, 2, 5, 8):
        for shift in (0.0, 0.5, 2.0):
            differences = [generator.gauss(shift, 1) for _ in range(n)]
            sums = [sum(sign * one for sign, one in zip(signs, differences))
                    for signs in itertools.product((-1, 1), repeat=n)]
            extreme = sum(abs(total) >= abs(sum(differences)) - 1e-9 for total in sums)
            assert sign_flip_p(differences) == extreme / 2 ** n
    assert sign_flip_p([1.0] * 24) == 2 / 2 ** 24 and sign_flip_p([0.0] * 3) == 1


def test_holms_correction_stops_at_the_first_that_is_not_rejected():
    assert holm({"a": 0.012, "b": 0.04, "c": 0.02, "d": 0.3}) == {"a"}  # .05/4, then .02 > .05/3
    assert holm({"a": 0.012, "b": 0.024, "c": 0.016, "d": 0.3}) == {"a", "b", "c"}
    assert holm({}) == set()


@pytest.mark.parametrize("kd, cell", [([1.5, 2.501, 3.499], "-0.500 ± 0.001 **holds**"),
                                      ([0.5, 1.501, 2.499], "+0.500 ± 0.001 **reversed**"),
                                      ([1.1, 2.3, 3.2], "-0.200 ± 0.058 not decided")])
def test_a_claim_is_decided_by_holms_correction_of_students_t(kd, cell):
    results = made_up(ddk=[1.0, 2.0, 3.0], kd=kd)
    two_seeds = made_up(ddk=[1.0, 2.0], kd=[2.0, 3.0])  # which have no cell
    table = claims_table({"one": results, "two": two_seeds})
    both = "worst ratio; mean ratio"
    assert table.splitlines()[2:] == [f"| DDK better than KD (Tables 1, 2) | {both} | {cell}; {cell} |  |"]


def test_more_claims_make_each_harder_to_decide():
    one = made_up(ddk=[1.0, 2.0, 3.0], kd=[1.2, 2.26, 3.26])
    key = ("ddk", "kd", "worst_ratio")
    assert 0.05 / 10 < t_p(paired(one, *key)) < 0.05 / 2
    assert decided(one, CLAIMS)[key][2]
    more = one | made_up(cpt=[1.0, 2.0, 3.5], minillm=[1.0, 2.0, 3.5], ted=[1.0, 2.0, 3.5], ddk_es=[1.0, 2.0, 3.5])
    assert not decided(more, CLAIMS)[key][2]


def test_the_table_has_a_row_for_each_arm_that_ran_and_for_the_student_base():
    lines = arms_table({"one": made_up(ddk=[1.0, 2.0], kd=[2.0, 4.0], cpt=[3.0])}).splitlines()
    assert lines[0].endswith("| code | prose |")
    assert lines[2:] == ["| `ddk` | 2 | 1.500 ± 0.500 | 1.500 ± 0.500 | 1.50 | 1.50 |",
                         "| `kd` | 2 | 3.000 ± 1.000 | 3.000 ± 1.000 | 3.00 | 3.00 |",
                         "| `cpt` | 1 | 3.000 | 3.000 | 3.00 | 3.00 |"]
    with_base = made_up(kd=[2.0])
    with_base["kd"]["0"]["base_ratio"] = {"code": 4.5, "prose": 2.5}
    lines = arms_table({"one": made_up(ddk=[1.0]), "two": with_base}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| one: `ddk`", "| two: student base", "| two: `kd`"]
    assert lines[3] == "| two: student base | 1 | 4.500 | 3.500 | 4.50 | 2.50 |"


def test_the_time_course_is_of_differences_at_the_same_seed():
    runs = made_up(ddk=[1.0, 2.0], ddk_es=[2.0, 2.6])
    runs["ddk_es"] = dict(reversed(runs["ddk_es"].items()))
    lines = course_table(runs, made_up(ddk=[1.0] * 8, ddk_es=[1.5] * 8), shown=[10]).splitlines()
    assert lines[0] == "| step | DDK − `ddk_es`, worst | DDK − `ddk_es`, mean |" and len(lines) == 4
    assert lines[2].startswith("| 10 | -0.880 [-3.675, +1.915] |")  # 1.1 · (1 − 2) and 1.1 · (2 − 2.6); t = 12.706
    assert lines[3] == "| 1,200 (test, 8 replicates) | -0.500 [-0.500, -0.500] | -0.500 [-0.500, -0.500] |"


def test_a_page_gets_its_tables():
    page = with_tables("Before\n<!-- one -->\n| 9.99 |\n<!-- end -->\nafter\n", {"one": "| 1.25 ± 0.01 |"})
    assert page == "Before\n<!-- one -->\n| 1.25 ± 0.01 |\n<!-- end -->\nafter\n"


def test_a_figure_is_drawn(tmp_path):
    results = made_up(ddk=[1.0, 2.0], kd=[2.0, 3.0])
    draw(results, tmp_path / "setting.png")
    assert (tmp_path / "setting.png").stat().st_size > 5000


def test_a_replicate_draws_its_own_files_of_the_quickstarts_text():
    texts = [list(quickstart_documents({"cpp": 30_000}))]
    for seed in (0, 0, 1):
        texts.append(list(quickstart_documents({"cpp": 30_000}, functools.partial(shuffled_files, seed=seed))))
    assert texts[1] == texts[2]
    for first, second in ((0, 1), (0, 3), (1, 3)):
        assert len(set(texts[first]) & set(texts[second])) < len(texts[first]) / 2


def test_the_controls_draw_ddks_mean_mixture_at_all_other_seeds(monkeypatch):
    runs = {}
    for seed, (code, prose) in enumerate([(90, 10), (20, 80), (120, 80)]):
        share = code / (code + prose)
        runs[str(seed)] = {"end": {"code": {"tokens": code}, "prose": {"tokens": prose}},
                           "r": {"code": [0.5, share, share, 0.9], "prose": [0.5, 1 - share, 1 - share, 0.1]}}
    results = {"ddk": {"experiment": {"lr": 1}, "runs": runs}}
    assert fixed_mixture(other_runs(results, {"lr": 1}, 0, 3)) == "code=0.40000,prose=0.60000"
    assert fixed_mixture(other_runs(results, {"lr": 1}, 2, 2)) == "code=0.55000,prose=0.45000"  # all others
    for experiment, n_seeds in (({"lr": 1}, 4), ({"lr": 2}, 3)):
        with pytest.raises(UserError, match="let ddk run first"):
            other_runs(results, experiment, 0, n_seeds)

    # kd_first draws naturally in the first interval, and the r after the last step has drawn nothing.
    monkeypatch.setattr(distill, "METHODS", dict(distill.METHODS))
    monkeypatch.setattr(compare_arms, "RULES", {})
    register_kd_first(other_runs(results, {"lr": 1}, 0, 3))
    rule = compare_arms.RULES[distill.METHODS["kd_first"].rule]
    natural, state = rule(None, [2.0, 3.0], [1.0, 1.0], [0.7, 0.3], 0.5)
    later, _ = rule(state, [9.0, 1.0], [1.0, 1.0], natural, 0.5)
    assert natural == [0.7, 0.3] and later.tolist() == pytest.approx([0.4, 0.6])


def test_the_share_of_a_gain_is_of_means():
    results = made_up(ddk=[1.0, 1.0], cpt=[2.0, 3.0], ddk_es=[1.5, 1.2])
    whole, of_replicates = share_of_gain(results, "ddk_es", "worst_ratio")
    assert whole == pytest.approx((0.5 + 1.8) / 3)
    assert of_replicates == pytest.approx([2 * whole - 1.8 / 2, 2 * whole - 0.5])  # without the first, the second


def test_the_replicates_tables_have_every_registered_comparison_with_sign_flip_tests(monkeypatch):
    monkeypatch.setattr(report_arms, "sign_flip_p", lambda differences: 0.5)
    arms = {pair.first for pair in REGISTERED} | {pair.second for pair in REGISTERED}
    replicates = made_up(**{arm: [1.0 + place + seed % 3 / 10 for seed in range(24)]
                            for place, arm in enumerate(sorted(arms))})
    for runs in replicates.values():
        for one in runs.values():
            one["steps"] = [0, 20, 50, 100, 200, 300]
            one["end"] = {"python": one["end"]["code"], "prose": one["end"]["prose"]}
            for key in ("r", "ratio"):
                one[key] = {"python": [*one[key]["code"], 1.0, 1.0], "prose": [*one[key]["prose"], 1.0, 1.0]}
    settings = {"quickstart": made_up(ddk=[1.0, 2.0, 3.0])}
    tables = make_tables(settings, replicates, replicates)
    assert len(tables["replicates"].splitlines()) == 6 and len(tables["course"].splitlines()) == 8
    assert len(tables["replicates_arms"].splitlines()) == 2 + len(arms)
    assert len(tables["family"].splitlines()) == 2 + sum(pair.text != "" for pair in REGISTERED)
    n_tests = sum(len(pair.measures) for pair in REGISTERED)
    assert tables["family"].count("p = 0.5000, not decided") == n_tests


def test_all_arms_that_are_compared_can_be_run():
    assert chosen_arms("kd,gamma=0.5,kd") == ["kd", "gamma=0.5"]
    arms = ALL_ARMS.keys() | {"ted", "cpt_doremi"}
    for pair in CLAIMS + REGISTERED:
        assert {pair.first, pair.second} <= arms


@pytest.mark.parametrize("name", ["quickstart", "replicates"])
def test_the_results_files_have_the_settings_and_keys_of_this_code(name):
    setting = SETTINGS[name]
    for arm, kept in json.loads((ROOT / "assets" / f"{name}.json").read_text(encoding="utf-8")).items():
        keys = ALL_ARMS.get(arm.removeprefix("t2_"), {})
        experiment = kept["experiment"]
        assert experiment["keys"] == experiment_keys({**setting.keys, **keys}), arm
        assert experiment["setting"]["n_bytes"] == setting.n_bytes and experiment["steps"] == 0
        for model in ("teacher", "student"):
            assert experiment["setting"][model].items() <= getattr(setting, model).items()


@pytest.mark.parametrize("arm, fork", [("ted", "ted"), ("cpt_doremi", "doremi")])
def test_an_arm_that_needs_a_fork_is_an_error_with_the_commands_that_make_it(monkeypatch, arm, fork):
    monkeypatch.delitem(compare_arms.ALL_ARMS, arm, raising=False)
    with pytest.raises(UserError, match=f"git apply --directory={fork} tests/forks/{fork}.diff, then --code={fork}$"):
        chosen_arms(f"kd,{arm}")


@pytest.fixture
def compare(tmp_path):
    """Run compare_arms.py in miniature. Return what it prints, or its errors if `status` is not 0."""
    keys = ("max_steps=2,interval=1,val_samples=2,test_samples=2,batch_size=4,block_size=32,warmup_steps=1,"
            f"data_dir={tmp_path / 'bins'}")
    command = [sys.executable, ROOT / "tests" / "compare_arms.py", "--steps=2", f"--out_dir={tmp_path / 'out'}",
               f"--keys={keys}"]

    def compare(*words, status=0):
        result = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == status, result.stderr
        return result.stderr if status else result.stdout
    return compare


def read_runs(folder: Path) -> dict:
    return runs_of(json.loads((folder / "out" / "results.json").read_text()))


@pytest.mark.slow
def test_a_comparison_continues_where_it_stopped_and_its_runs_replay(compare, tmp_path):
    assert "2/2  kd, seed 0" in compare("--arms=ddk,kd", "--seeds=1")
    (tmp_path / "fork").mkdir()
    fork = patched("doremi", tmp_path / "fork")
    assert "1/1  cpt_doremi, seed 0" in compare(f"--code={fork}", "--arms=ddk,kd,cpt_doremi", "--seeds=1")
    printed = compare("--arms=ddk,kd", "--seeds=2")
    assert "2/2  kd, seed 1" in printed and "seed 0" not in printed and "Collecting" not in printed
    results = read_runs(tmp_path)
    assert {arm: list(runs) for arm, runs in results.items()} == {"ddk": ["0", "1"], "kd": ["0", "1"],
                                                                  "cpt_doremi": ["0"]}
    first = [results["ddk"][seed]["base_ratio"] for seed in ("0", "1")]
    assert first[0] != first[1] and results["kd"]["0"]["base_ratio"] == first[0]  # a base for each seed
    assert "holds runs of ddk with other keys" in compare("--arms=ddk", "--keys=lr=0.1", status=2)
    assert "| `ddk` | 2 |" in printed and "| `kd` | 2 |" in printed
    assert "1/1  again_kd, seed 0" in compare("--arms=kd", "--seeds=1", "--label=again_")
    again = read_runs(tmp_path)
    assert again["again_kd"]["0"]["end"] == again["kd"]["0"]["end"]

    # CPT&DoReMi draws in the proxy's mixture
    mixture = (tmp_path / "out" / "doremi_proxy-0" / "mixture.txt").read_text().strip()
    config = read_lines(tmp_path / "out" / "cpt_doremi-0", "run")[0]["config"]
    assert config["method"] == "cpt" and config["mixture"] == mixture

    metrics = tmp_path / "out" / "ddk-1" / "metrics.jsonl"
    replay = subprocess.run([sys.executable, ROOT / "sample_mixture.py", f"--metrics={metrics}"], capture_output=True,
                            text=True)
    assert float(replay.stdout.split("largest difference from the run's own r: ")[1].split()[0]) < 1e-12


@pytest.mark.slow
def test_each_replicate_has_its_own_text_and_teacher_and_the_fixed_mixture_is_that_of_the_others(compare, tmp_path):
    words = ("--setting=replicates", "--seeds=2")
    assert "let ddk run first" in compare(*words, "--arms=kd_fixed", status=2)
    compare(*words, "--first=1", "--arms=ddk")
    printed = compare(*words, "--arms=ddk,kd")
    assert "3/3  kd, seed 1" in printed and "ddk, seed 1" not in printed
    compare(*words, "--arms=kd_fixed,kd_first")
    results = read_runs(tmp_path)
    for key in ("same", "base_ratio"):
        first, second = [results["ddk"][seed][key] for seed in ("0", "1")]
        assert first == results["kd"]["0"][key]
        assert all(first[name] != second[name] for name in first if name != "test_samples")
    config = read_lines(tmp_path / "out" / "kd_fixed-0", "run")[0]["config"]
    assert config["mixture"] == fixed_mixture([results["ddk"]["1"]])
    other = {name: shares[1] for name, shares in results["ddk"]["1"]["r"].items()}
    drawn = [{name: shares[t] for name, shares in results["kd_first"]["0"]["r"].items()} for t in (0, 1)]
    assert drawn[0] == {name: shares[0] for name, shares in results["ddk"]["0"]["r"].items()}
    assert drawn[1] == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
def test_the_teacher_can_be_a_pretrained_model(compare, tmp_path, teacher):
    folder = tmp_path / "teacher"
    torch.manual_seed(0)
    GPT(GPTConfig.scratch(12, 64, 257, 64)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer_meta.json"):
        shutil.copy(teacher / name, folder)
    compare("--setting=real", f"--teacher={folder}", "--seeds=2", "--arms=ddk,kd")
    results = read_runs(tmp_path)
    first = [results[arm][seed]["base_ratio"] for arm in ("ddk", "kd") for seed in ("0", "1")]
    assert first[:2] == first[2:]  # a base for each seed
    config = read_lines(tmp_path / "out" / "base-0", "run")[0]["config"]
    assert config["method"] == "kd" and config["student"].endswith("ten-layers")
    assert len(GPT.from_pretrained(tmp_path / "out" / "base-0" / "step_00000002").layers) == 10


@pytest.mark.parametrize("argument, named", [("--setting=real", "--teacher=: use the folder of a model"),
                                             ("--teacher=.", "only with --setting=real"),
                                             ("--arms=best", "best is none of ddk"),
                                             ("--keys=lr=x", "argument --lr: invalid float value: 'x'"),
                                             ("--keys=alpha=2", "--alpha=2.0: must be a number from 0 to 1"),
                                             ("--keys=seed=1", "seed is no key of distill.py, or differs from")])
def test_a_mistake_is_one_message_before_anything_runs(run_main, argument, named):
    status, _, err = run_main(compare_arms, argument)
    assert status == 2 and named in err and err.startswith("error: ")
