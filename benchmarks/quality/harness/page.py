"""The tables of docs/quality.md, from what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.model.page import markdown
from benchmarks.quality.harness.report import (
    EQUAL_BUDGET,
    EQUAL_BYTES,
    Line,
    cell_table,
    cells_of,
    overview,
    shown_budget,
)
from benchmarks.quality.harness.scores import summary

PAGE = Path(__file__).parents[3] / "docs/quality.md"
MAIN, ABLATION = "4096:0.1:32x256", "4096:0.1:32x128"
DEFAULT_CELL, DEFAULT = "4096:0.1:8x128", "default"


def tables(records: Sequence[dict]) -> dict[str, str]:
    """Every table of the page by its marker."""
    names = "everything", "gpu", "more", "cpu"
    by_run: dict[str, dict[str, list[Line]]] = {name: {} for name in names}
    for (setup, cell), lines in cells_of(records).items():
        found = by_run[_run(json.loads(setup))]
        if cell in found:
            raise ValueError(
                f"two runs have the cell {cell}, the page one table for it"
            )
        found[cell] = lines
    everything, gpu, more, cpu = by_run.values()
    many = _but(everything, MAIN, ABLATION)
    others, few = _but(gpu, MAIN), _but(cpu, DEFAULT_CELL)
    return {
        "main": cell_table(gpu[MAIN], DEFAULT),
        "gpu_budgets": overview(others, EQUAL_BUDGET),
        "gpu_bytes": overview(others, EQUAL_BYTES),
        "main_everything": cell_table(everything[MAIN]),
        "ablation": cell_table(everything[ABLATION]),
        "budgets": overview(many, EQUAL_BUDGET),
        "bytes": overview(many, EQUAL_BYTES),
        "more_bytes": cell_table(more[DEFAULT_CELL]),
        "default": cell_table(cpu[DEFAULT_CELL], DEFAULT),
        "cpu_budgets": overview(few, EQUAL_BUDGET),
        "cpu_bytes": overview(few, EQUAL_BYTES),
        "planted": answers_by_model(records),
    }


def answers_by_model(records: Sequence[dict]) -> str:
    """The score of each configuration, a column for each model, with what it read."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    models: dict[str, None] = {}
    for row in summary(records):
        model, budget = row["setup"]["model"], shown_budget(row["budget"])
        if row["budget"].startswith(EQUAL_BYTES):  # other ones for each model
            budget = "bytes"
        models[model] = None
        shown = f"{row['score']:.3f} ({row['kv_read']:.0%})"
        rows.setdefault((row["name"], budget), {})[model] = shown
    return markdown(
        ["", "budget", *models],
        [[*key, *(found.get(m, "") for m in models)] for key, found in rows.items()],
    )


def _run(setup: dict) -> str:
    """Which of the runs: on a GPU (fp16) or a CPU, the first one or later ones."""
    later = "group" in setup
    if setup["dtype"] == "float16":
        return "gpu" if later else "everything"
    return "cpu" if later else "more"


def _but(cells: dict[str, list[Line]], *left_out: str) -> dict[str, list[Line]]:
    return {c: cells[c] for c in sorted(cells, key=_order) if c not in left_out}


def _order(cell: str) -> tuple[int, float]:
    context, share, _ = cell.split(":")
    return int(context), float(share)
