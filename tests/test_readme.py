"""The README agrees with the code: its tables, its links, its worked forks."""

import re
from pathlib import Path

from report_arms import make_tables, read_runs, with_tables

from distill import METHODS, Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOOKS = [ROOT / "README.md", ROOT / "tests" / "README.md", ROOT / "assets" / "RESULTS.md"]
RESULTS_PAGE = BOOKS[-1].read_text(encoding="utf-8")


def test_the_table_of_methods_agrees_with_the_code():
    """A fork need not add its method to the table."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\w+) \| (.*) \|$", README, re.MULTILINE)
    assert {name for name, *_ in rows} >= {"ddk", "ddk_no_fs", "ddk_es", "kd", "minillm", "cpt"}
    for name, *row in rows:
        assert row == [METHODS[name].rule, METHODS[name].divergence or "none", METHODS[name].help]


def test_each_key_in_the_readme_exists():
    theirs = {"data_dir", "tokenizer", "text_key", "val_fraction", "domain_key", "verify", "metrics",
              "rule", "plot", "model", "prompt", "eot", "alpha", "setting", "seeds", "arms",
              "device"}  # of the other programs
    launchers = {"nproc_per_node", "nodes", "ntasks-per-node", "signal", "signals-to-handle", "nnodes", "rdzv_id",
                 "rdzv_backend", "rdzv_endpoint", "kill-on-bad-exit", "time", "help", "key", "model_args", "tasks",
                 "repo-type", "include", "local-dir", "shutdown-timeout", "directory", "gpus-per-node", "cpus-per-task",
                 "exclusive", "mem", "requeue", "open-mode", "output"}
    named = set(re.findall(r"--([a-z][a-z_-]+)", README.split("## Changing it")[0]))
    assert named - theirs - launchers <= Config.__dataclass_fields__.keys()


def test_each_name_in_the_reading_list_is_in_its_file():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\w+\.py) \|", README, re.MULTILINE)
    assert len(rows) > 8
    for names, file in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(?m)^(def|class) {name}\b|^{name}\b.* = ", source), f"{name} in {file}"


def test_each_link_to_a_file_or_heading_has_a_target():
    for path in BOOKS:
        text = path.read_text(encoding="utf-8")
        headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                    for line in text.splitlines() if line.startswith("#")}
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            if not target.startswith("http"):
                assert not file or (path.parent / file).exists(), f"{path}: {target}"
                assert not anchor or anchor in headings, f"{path}: {target}"


def test_the_readme_lists_all_forks_with_their_sizes():
    forks = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "forks").glob("*.diff")}
    rows = dict(re.findall(r"`(\w+\.diff)` \((\d+)", README))
    assert rows == {name: str(len(re.findall(r"(?m)^\+(?!\+\+)", diff))) for name, diff in forks.items()}


def test_the_tables_follow_from_the_results_and_the_text_from_the_tables():
    settings = {name: read_runs(name) for name in ("quickstart", "real")}
    tables = make_tables(settings, read_runs("replicates"), read_runs("longer"))
    known = set(re.findall(r"\d*\.\d+", "".join(tables.values())))
    _, _, results = README.partition("\n## Results\n")
    for page, text in ((README, results.partition("\n## ")[0]), (RESULTS_PAGE, RESULTS_PAGE)):
        assert with_tables(page, tables) == page
        # Each decimal number of the text is in a table. Code and settings, such as T = 0.5, do not count.
        text = re.sub(r"<!-- (?!end)(\w+) -->\n.*?<!-- end -->|```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        text = re.sub(r"(α|γ|T|torch|Python) ?(=|∈|of)? ?(\{[^}]*\}|\d*\.?\d+)", "", text)
        assert [number for number in re.findall(r"\d*\.\d+", text) if number not in known] == []


def test_every_test_in_the_list_of_promises_exists():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(names) > 10
    for name in names:
        assert f"def {name}(" in tests, name
