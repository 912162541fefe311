"""The tables of docs/quality.md, from what was measured on SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.harness.report import (
    EQUAL_BUDGET,
    EQUAL_BYTES,
    Line,
    cell_table,
    cells_of,
    overview,
)

PAGE = Path(__file__).parents[3] / "docs/quality.md"
MAIN, ABLATION = "4096:0.1:32x256", "4096:0.1:32x128"


def tables(records: Sequence[dict]) -> dict[str, str]:
    """Every table of the page by its marker."""
    by_dtype: dict[str, dict[str, list[Line]]] = {"float16": {}, "float32": {}}
    for (setup, cell), lines in cells_of(records).items():
        by_dtype[json.loads(setup)["dtype"]][cell] = lines
    gpu, cpu = by_dtype.values()
    many = {cell: gpu[cell] for cell in sorted(gpu, key=_order) if "8x128" in cell}
    return {
        "main": cell_table(gpu[MAIN]),
        "ablation": cell_table(gpu[ABLATION]),
        "budgets": overview(many, EQUAL_BUDGET),
        "bytes": overview(many, EQUAL_BYTES),
    } | {f"cpu_{cell}": cell_table(lines, "default") for cell, lines in cpu.items()}


def _order(cell: str) -> tuple[int, float]:
    context, share, _ = cell.split(":")
    return int(context), float(share)
