"""The comparison of arms: what it computes from runs, and a whole one in miniature."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import compare_arms
import pytest
import torch
from compare_arms import (ABLATIONS, ARMS, CLAIMS, MEASURES, ablations_table, chosen_arms, domains_table, gain,
                          mean_and_error, paired, table, verdicts, write_gains)
from test_forks import patched

import distill
from data import UserError
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent


def made_up(**arms) -> dict:
    """Results in which all measures of a run are one value."""
    return {arm: {str(seed): dict.fromkeys(MEASURES, value) for seed, value in enumerate(values)}
            for arm, values in arms.items()}


def test_mean_and_standard_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3 and error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert math.isnan(mean_and_error([1.0])[1])


def test_seeds_are_paired():
    results = made_up(ddk=[1.0, 2.0, 3.0], kd=[1.5, 2.5])
    assert paired(results, "ddk", "kd", "worst_ratio") == [-0.5, -0.5]
    assert paired(results, "ddk", "ted", "worst_ratio") == []


# Three seeds: 4.3 standard errors
@pytest.mark.parametrize("kd, seen", [([1.5, 2.51, 3.49], "holds"), ([1.1, 2.2, 3.3], "cannot be told"),
                                      ([1.19, 2.2, 3.29], "holds"), ([0.9, 1.91, 2.89], "does not hold at this scale"),
                                      ([1.5, 1.9, 3.1], "cannot be told"), ([1.5, 2.5, 3.5], "holds")])
def test_a_claim_is_decided_by_students_t_of_the_paired_differences(kd, seen):
    (line,) = verdicts(made_up(ddk=[1.0, 2.0, 3.0], kd=kd))[2:]
    assert line.count(f"| {seen} |") == 2  # by worst and by mean ratio


def test_a_claim_on_two_seeds_is_not_told():
    assert len(verdicts(made_up(ddk=[1.0, 2.0], kd=[2.0, 3.0]))) == 2


def test_the_table_has_a_line_for_each_arm_that_ran():
    lines = table(made_up(ddk=[1.0, 2.0], kd=[2.0, 4.0], cpt=[3.0]), ARMS, ["worst_ratio"])
    assert lines[2:] == ["| `ddk` | 2 | 1.500 ± 0.500 |", "| `kd` | 2 | 3.000 ± 1.000 |", "| `cpt` | 1 | 3.000 |"]


def test_an_ablation_is_compared_with_ddk_at_the_seeds_that_both_have():
    results = made_up(**{"ddk": [1.0, 2.0, 9.0], "alpha=1.0": [1.5, 3.5], "interval=5": [2.0]})
    difference = "+1.000 ± 0.500"
    assert ablations_table(results)[2:] == [
        "| `interval=5` | 1 | 2.000 | +1.000 | 2.000 | +1.000 |",
        f"| `alpha=1.0` | 2 | 2.500 ± 1.000 | {difference} | 2.500 ± 1.000 | {difference} |"]


def test_perplexities_stand_beside_the_teachers():
    ends = [{"code": {"test_student_ppl": ppl, "test_teacher_ppl": 2.0, "test_ratio": ppl / 2}} for ppl in (4.0, 5.0)]
    results = {"ddk": {"0": {"end": ends[0]}, "1": {"end": ends[1]}}}
    assert domains_table(results, ARMS)[2:] == ["| teacher | 2.00 |", "| `ddk` | 4.50 (2.25) |"]


def test_gains_are_shares_by_seed_and_a_row_for_each_setting_and_arm(tmp_path, capsys):
    results = made_up(ddk=[1.0, 3.0], kd=[2.0, 4.0], ddk_es=[1.0, 2.0])
    assert gain(results, "kd", "worst_ratio") == [50, 25] and gain(results, "cpt", "mean_ratio") == []
    for one in results["ddk"].values():
        one["ratio"] = {"code": [3.0, 1.0], "prose": [1.5, 1.0]}
    write_gains({"one": results, "two": results}, tmp_path)
    rows = (tmp_path / "gains.md").read_text().splitlines()[2:]
    assert rows[0] == "| one | 2 | 1.50 | `kd` | +37.5 ± 12.5 | +37.5 ± 12.5 |" and len(rows) == 4
    assert (tmp_path / "gains.png").stat().st_size > 500


def test_arms_and_ablations_by_name():
    own = ["ddk", "ddk_no_fs", "ddk_es", "kd", "minillm", "cpt"]
    assert chosen_arms("arms") == own and chosen_arms("all") == [*own, *ABLATIONS]
    assert chosen_arms("kd,gamma=0.5") == ["kd", "gamma=0.5"]
    assert all(name in ARMS | ABLATIONS for _, *names in CLAIMS for name in names)


def test_an_arm_that_is_a_fork_is_asked_for_with_its_diff_and_runs_where_the_code_has_it(monkeypatch):
    with pytest.raises(UserError) as error:
        chosen_arms("kd,ted,cpt_doremi,best")
    lines = str(error.value).splitlines()
    for line, fork in zip(lines[:2], ("ted", "doremi")):
        assert line.endswith(f"git apply --directory={fork} tests/forks/{fork}.diff, then --code={fork}")
    assert len(lines) == 3 and "best is none of ddk" in lines[2]
    for method in ("ted", "doremi_proxy"):
        monkeypatch.setitem(distill.ARMS, method, distill.ARMS["kd"])
    assert chosen_arms("arms") == list(ARMS) and chosen_arms("ted,cpt_doremi") == ["ted", "cpt_doremi"]


@pytest.mark.slow
def test_a_whole_comparison_continues_where_it_was_and_its_runs_replay(tmp_path):
    keys = ("max_steps=2,interval=1,val_samples=2,test_samples=2,batch_size=4,block_size=32,warmup_steps=1,"
            f"data_dir={tmp_path / 'bins'}")
    command = [sys.executable, ROOT / "tests" / "compare_arms.py", "--steps=2", f"--out_dir={tmp_path / 'out'}",
               f"--keys={keys}"]

    def compare(*words):
        result = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "2/2  kd, seed 0" in compare("--arms=ddk,kd", "--seeds=1")
    (tmp_path / "fork").mkdir()
    fork = patched("doremi", tmp_path / "fork")
    assert "1/1  cpt_doremi, seed 0" in compare(f"--code={fork}", "--arms=ddk,kd,cpt_doremi", "--seeds=1")
    printed = compare("--arms=ddk,kd", "--seeds=2")
    assert "2/2  kd, seed 1" in printed and "seed 0" not in printed and "Collecting" not in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {arm: list(runs) for arm, runs in results.items()} == {"ddk": ["0", "1"], "kd": ["0", "1"],
                                                                  "cpt_doremi": ["0"]}
    first = [results["ddk"][seed]["first_worst_ratio"] for seed in ("0", "1")]
    assert first[0] != first[1] and results["kd"]["0"]["first_worst_ratio"] == first[0]  # a base for each seed
    other = subprocess.run([*command, "--arms=ddk", "--keys=lr=0.1"], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 2 and "holds runs of ddk with other keys" in other.stderr
    for name in ("quickstart.md", "quickstart_arms.png", "quickstart_domains.png"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    text = (tmp_path / "out" / "quickstart.md").read_text()
    assert "| `ddk` | 2 |" in text and "| `kd` | 2 |" in text

    # The proxy's mixture is what CPT&DoReMi drew by
    mixture = (tmp_path / "out" / "doremi_proxy-0" / "mixture.txt").read_text().strip()
    config = json.loads((tmp_path / "out" / "cpt_doremi-0" / "config.json").read_text())["config"]
    assert config["method"] == "cpt" and config["mixture"] == mixture

    metrics = tmp_path / "out" / "ddk-1" / "metrics.jsonl"
    replay = subprocess.run([sys.executable, ROOT / "sample_mixture.py", f"--metrics={metrics}"], capture_output=True,
                            text=True)
    assert float(replay.stdout.split("largest difference from the run's own r: ")[1].split()[0]) < 1e-12


@pytest.mark.slow
def test_a_pretrained_teacher_may_be_given(tmp_path, teacher):
    keys = ("max_steps=2,interval=1,val_samples=2,test_samples=2,batch_size=4,block_size=32,warmup_steps=1,"
            f"data_dir={tmp_path / 'bins'}")
    folder = tmp_path / "teacher"
    torch.manual_seed(0)
    GPT(GPTConfig.scratch(12, 64, 257, 64)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer_meta.json"):
        shutil.copy(teacher / name, folder)
    command = [sys.executable, ROOT / "tests" / "compare_arms.py", "--setting=real", f"--teacher={folder}", "--steps=2",
               "--seeds=2", "--arms=ddk,kd", f"--out_dir={tmp_path / 'out'}", f"--keys={keys}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    first = {one["first_worst_ratio"] for runs in results.values() for one in runs.values()}
    assert len(first) == 1 and list(results["kd"]) == ["0", "1"]  # one base
    config = json.loads((tmp_path / "out" / "base-0" / "config.json").read_text())["config"]
    assert config["method"] == "kd" and config["student"] == "layers:10"


@pytest.mark.parametrize("argument, named", [("--setting=real", "--teacher=: name the folder of a model"),
                                             ("--teacher=.", "for --setting=real alone"),
                                             ("--arms=best", "best is none of ddk"),
                                             ("--keys=lr=x", "must be a number"),
                                             ("--keys=seed=1", "seed is no key of distill.py, or each run's own")])
def test_mistakes_are_named_at_once(run_main, argument, named):
    status, _, err = run_main(compare_arms, argument)
    assert status == 2 and named in err and err.startswith("error: ")
