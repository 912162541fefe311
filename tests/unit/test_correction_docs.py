"""docs/correction.md: its tables are what was measured, its pictures exist."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/correction.md").read_text()
RESULTS = ROOT / "benchmarks/results/correction.jsonl"
RECORDS = [json.loads(line) for line in RESULTS.read_text().splitlines()]


@pytest.fixture(scope="module")
def ablation():
    """The script as a module; what it imports from its own folder is not needed."""
    sys.modules.setdefault("machine", type(sys)("machine")).describe_run = None
    teacher = sys.modules.setdefault("teacher", type(sys)("teacher"))
    teacher.Run = teacher.TaughtEngine = None
    path = ROOT / "benchmarks/correction_ablation.py"
    spec = importlib.util.spec_from_file_location("correction_ablation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["machine"], sys.modules["teacher"]


def test_tables_are_what_was_measured(ablation):
    marked = r"<!-- table: (\S+) -->\n(.*?)\n<!-- end of table -->"
    shown = dict(re.findall(marked, PAGE, re.DOTALL))
    assert shown == {ablation.name_of(r): ablation.table(r) for r in RECORDS}


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)(.*?)\)", PAGE))
def test_linked_paths_exist(target):
    assert (ROOT / "docs" / target).resolve().exists()


def test_the_default_rests_on_measurements():
    """All intervals, on two models that drift, and their cost."""
    intervals = {"off", "4", "8", "16", "32", "64", "128"}
    complete = [r for r in RECORDS if intervals <= r["runs"].keys()]
    assert len(complete) == 3
    assert sum("kv_error_by_layer" in r["runs"]["off"] for r in complete) == 2
    for record in RECORDS:
        assert record["runs"]["dense"]["kl_mean"] == 0
        assert record["runs"]["dense"]["agreement"] == 1
