"""Tables of what `harness.answers` measured, without an engine."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality.statistics import paired_bootstrap

ANSWERS = "answers"
"""The measure of its records."""
DENSE_NAME = "dense"


def summary(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each configuration answers, over all suites of a length and a share.

    Args:
        found: Records of any measure; those of `ANSWERS` count.

    Returns:
        A row for each setup, length, share, number of tasks and configuration, in the
        order of the records: `setup`, `length`, `share`, `tasks` (of a suite), `name`,
        `budget`, `settings`, `kv_read`, `suites` (mean scores by suite), `score` and
        `dense` (means over all tasks), `difference` (a `statistics.Interval`: score
        minus dense, task by task, at 95 %).
    """
    by_row: dict[str, list[dict[str, Any]]] = defaultdict(list)
    dense: dict[str, list[float]] = {}
    shared = "setup", "length", "share", "tasks"
    for record in found:
        if record.get("measure") != ANSWERS:
            continue
        group = [record[k] for k in shared]
        if record["name"] == DENSE_NAME:
            dense[_text([*group, record["suite"]])] = record["scores"]
        row = [record[k] for k in ("name", "budget", "settings")]
        by_row[_text([*group, *row])].append(record)
    rows = []
    for measured in by_row.values():
        first = measured[0]
        group = [first[k] for k in shared]
        theirs = [x for r in measured for x in dense[_text([*group, r["suite"]])]]
        ours = [score for record in measured for score in record["scores"]]
        kept = *shared, "name", "budget", "settings", "kv_read"
        rows.append(
            {k: first[k] for k in kept}
            | {
                "suites": {r["suite"]: _mean(r["scores"]) for r in measured},
                "score": _mean(ours),
                "dense": _mean(theirs),
                "difference": paired_bootstrap(ours, theirs, seed=0),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
