"""The pages of docs/ that measurements made: their tables are what was measured."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.engine import lossless_report
from benchmarks.gpu import report
from benchmarks.quality import (
    captured_report,
    choice,
    correction_ablation,
    reselect_ablation,
)
from benchmarks.quality.harness import page as quality_page

ROOT = Path(__file__).parents[2]
# Page, and by the name of its results the module that makes tables of them.
PAGES = {
    "choice": {"choice": choice, "captured": captured_report},
    "correction": {"correction": correction_ablation},
    "reselect": {"reselect": reselect_ablation},
}


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


def records(name: str) -> list[dict]:
    lines = (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_what_was_measured(name):
    marked = r"<!-- table: (\S+) -->\n(.*?)\n<!-- end of table -->"
    shown = dict(re.findall(marked, page(name), re.DOTALL))
    assert shown
    assert shown == {
        module.name_of(record): module.table(record)
        for results, module in PAGES[name].items()
        for record in records(results)
    }


def test_the_gpus_tables_are_what_was_measured():
    marked = r"<!-- table: (\S+) -->\n(.*?)\n<!-- end of table -->"
    shown = dict(re.findall(marked, page("gpu_results"), re.DOTALL))
    found = (ROOT / "benchmarks/results/gpu_h100.jsonl").read_text().splitlines()
    assert shown == report.tables([json.loads(line) for line in found])


def test_qualitys_tables_are_what_was_measured():
    marked = r"<!-- table: (\S+) -->\n(.*?)\n<!-- end of table -->"
    shown = dict(re.findall(marked, page("quality"), re.DOTALL))
    assert shown == quality_page.tables(records("quality"))


def test_losslesss_tables_are_what_was_measured():
    marked = r"<!-- table: (\S+) -->\n(.*?)\n<!-- end of table -->"
    shown = dict(re.findall(marked, page("lossless"), re.DOTALL))
    found = records("lossless")
    assert shown == lossless_report.tables(found)
    assert found
    assert not any(record["different"] for record in found)


def test_corrections_default_rests_on_measurements():
    """All intervals, on two models that drift, and their cost."""
    intervals = {"off", "4", "8", "16", "32", "64", "128"}
    complete = [r for r in records("correction") if intervals <= r["runs"].keys()]
    assert len(complete) == 3
    assert sum("kv_error_by_layer" in r["runs"]["off"] for r in complete) == 2


def test_reselects_defaults_rest_on_measurements():
    """Both settings, on two models that drift."""
    cases = {f"{i} {a}" for i in (1, 2, 4, 8, 16) for a in ("everything", "chosen")}
    found = records("reselect")
    assert all(cases <= record["runs"].keys() for record in found)
    assert len(found) == 2
    for record in found:
        best = min(cases, key=lambda case: record["runs"][case]["kl_mean"])
        assert best == "1 everything"


def test_the_choices_defaults_rest_on_measurements():
    """block_lse stays fp32: sets change. Ranks agree: what is carried captures more."""
    for record in records("choice"):
        found = {(r["choice"], r["by"]): r for r in record["choices"]}
        for two_bytes in ("float16", "bfloat16", "fixed16"):
            assert found["own", two_bytes]["sets_unchanged"] < 1
        mass = [
            found["carried", f"ranks {n}"]["captured_mass"]["mean"] for n in (1, 2, 3)
        ]
        assert mass == sorted(mass, reverse=True)


def test_no_way_to_choose_captures_more_than_the_oracle():
    assert all(record["above_oracle"] == 0 for record in records("captured"))


@pytest.mark.parametrize("name", ["correction", "reselect"])
def test_the_baseline_is_dense(name):
    for record in records(name):
        assert record["runs"]["dense"]["kl_mean"] == 0
        assert record["runs"]["dense"]["agreement"] == 1
