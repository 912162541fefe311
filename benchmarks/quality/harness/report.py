"""Tables and a picture of what `benchmarks.quality` measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.model.page import markdown
from benchmarks.quality.harness.scores import summary
from benchmarks.quality.statistics import Interval, paired_bootstrap

EQUAL_BUDGET, EQUAL_BYTES = "equal budget", "equal bytes"
SAME_READS = 0.005  # of dense's: a budget has whole blocks


@dataclass
class Line:
    """A configuration in a cell, over all its sequences in their order."""

    name: str
    budget: str
    settings: dict[str, Any]
    kv_read: float
    kl: list[float] = field(default_factory=list)
    """Nats per token, a mean for each sequence; so are the next two."""
    agreed: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    equal: list[int] = field(default_factory=list)
    """Tokens of each greedy continuation before the first that differs."""
    of: int = 0
    """Tokens of a greedy continuation, the longest that was measured."""
    tokens: int = 0

    @property
    def mean_kl(self) -> Interval:
        return paired_bootstrap(self.kl, [0.0] * len(self.kl), seed=0)

    @property
    def agreement(self) -> Interval:
        return paired_bootstrap(self.agreed, [0.0] * len(self.agreed), seed=0)

    def kl_against(self, other: Line) -> Interval:
        return paired_bootstrap(self.kl, other.kl, seed=0)

    def perplexity_against(self, dense: Line) -> Interval:
        """The perplexity's change as a share of dense's."""
        found = paired_bootstrap(self.nll, dense.nll, seed=0)
        return Interval(*(math.expm1(value) for value in found))


def cells_of(records: Sequence[dict]) -> dict[tuple[str, str], list[Line]]:
    """The lines of each cell, by (setup as JSON, cell), in the records' order."""
    found: dict[tuple[str, str], dict[tuple[str, str, str], Line]] = {}
    rows = [r for r in records if r.get("measure") in ("forced", "greedy")]
    for record in sorted(rows, key=lambda r: r["first"]):
        setup = json.dumps(record["setup"], sort_keys=True)
        cell = found.setdefault((setup, record["cell"]), {})
        of = {k: record[k] for k in ("name", "budget", "settings", "kv_read")}
        key = record["name"], record["budget"], json.dumps(record["settings"])
        line = cell.setdefault(key, Line(**of))
        if record["measure"] == "greedy":
            if record["of"] > line.of:
                line.of, line.equal = record["of"], []
            line.equal += record["equal"] if record["of"] == line.of else []
            continue
        steps = record["tokens"]
        line.tokens += steps * len(record["kl"])
        line.kl += [kl / steps for kl in record["kl"]]
        line.agreed += [agreed / steps for agreed in record["agreed"]]
        line.nll += [nll / steps for nll in record["nll"]]
    return {cell: [*lines.values()] for cell, lines in found.items()}


def cell_table(lines: Sequence[Line], against: str | None = None) -> str:
    """Every configuration of a cell: what it reads, and how it differs from dense.

    Args:
        lines: The cell's.
        against: A name, if the cell has it: one more column has the KL less that
            configuration's, sequence by sequence, at the same budget or else at the
            same bytes.
    """
    if against not in {line.name for line in lines}:
        against = None
    dense = next(line for line in lines if line.name == "dense")
    head = ["", "budget", "tokens", "KV read", "KL, nats", "agreement", "perplexity"]
    free = any(line.equal for line in lines)
    rows = []
    for line in lines:
        if not line.kl:
            continue
        row = [
            line.name,
            shown_budget(line.budget),
            str(line.settings.get("token_budget", "")),
            f"{line.kv_read:.1%}",
            _shown(line.mean_kl, "{:.4f}"),
            _shown(line.agreement, "{:.1%}"),
            _shown(line.perplexity_against(dense), "{:+.2%}"),
        ]
        if against:
            other = _counterpart(line, lines, against)
            shown = "" if other is None else _shown(line.kl_against(other), "{:+.4f}")
            row.append(shown)
        rows.append(row + [f"{median(line.equal):g}" if line.equal else ""] * free)
    head += [f"KL less that of {against}"] * bool(against)
    return markdown(head + ["same greedy tokens"] * free, rows)


def _counterpart(line: Line, lines: Sequence[Line], name: str) -> Line | None:
    """The configuration of this name with a line's budget, or else with its reads."""
    if line.name in (name, "dense"):
        return None
    theirs = [other for other in lines if other.name == name and other.kl]
    same = [other for other in theirs if other.budget == line.budget]
    same += [o for o in theirs if abs(o.kv_read - line.kv_read) < SAME_READS]
    return same[0] if same else None


def overview(cells: dict[str, list[Line]], budget: str) -> str:
    """Mean KL of each configuration in each cell, at equal budget or equal bytes.

    Args:
        cells: Lines by the cell's name.
        budget: `EQUAL_BUDGET` or `EQUAL_BYTES`. The configuration that the bytes are
            those of has its budget in both.
    """
    names = dict.fromkeys(
        line.name for lines in cells.values() for line in lines if line.kl
    )
    rows = []
    for name in names:
        row = [name]
        for lines in cells.values():
            mine = [line for line in lines if line.name == name and line.kl]
            same = [line for line in mine if line.budget.startswith(budget)]
            if budget == EQUAL_BYTES and not same:
                # Equal to its own budget, so measured once.
                same = [line for line in mine if _reads_like(line, lines)]
            row.append(f"{same[0].mean_kl.estimate:.4f}" if same else "")
        if any(row[1:]):
            rows.append(row)
    titles = []
    for cell in cells:
        context, share, _ = cell.split(":")
        titles.append(f"{int(context) // 1024}K, {float(share):.0%}")
    return markdown(["", *titles], rows)


def _reads_like(line: Line, lines: Sequence[Line]) -> bool:
    """Whether a line at its budget reads what the others read at equal bytes."""
    others = [o.kv_read for o in lines if o.budget.startswith(EQUAL_BYTES)]
    return any(abs(line.kv_read - read) < SAME_READS for read in others)


def answers_table(records: Sequence[dict]) -> str:
    """What each configuration answered of the suites, and what dense did."""
    rows = [
        [
            f"{row['length']}, {row['share']:.0%}",
            row["name"],
            shown_budget(row["budget"]),
            f"{row['kv_read']:.1%}",
            f"{row['score']:.3f}",
            _shown(row["difference"], "{:+.3f}"),
        ]
        for row in summary(records)
    ]
    head = ("length, share", "", "budget", "KV read", "score", "less dense's")
    return markdown(head, rows) if rows else ""


def report(records: Sequence[dict], against: str | None = None) -> str:
    """All cells, and the answers, as Markdown; `against` as of `cell_table`.

    Raises:
        ValueError: No cell has a configuration of that name.
    """
    names = {line.name for lines in cells_of(records).values() for line in lines}
    if against is not None and against not in names:
        allowed = ", ".join(sorted(names - {"dense"})) or "measured"
        raise ValueError(f"--against {against}: must be among {allowed}")
    parts = [
        f"{cell}, {setup}, {max(line.tokens for line in lines)} forced tokens\n\n"
        f"{cell_table(lines, against)}\n"
        for (setup, cell), lines in cells_of(records).items()
    ]
    answers = answers_table(records)
    return "\n".join([*parts, *([f"Answers\n\n{answers}\n"] if answers else [])])


def draw(lines: Sequence[Line], path: Path) -> None:
    """KL against the KV bytes read, a line for each configuration of several budgets.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(line.name for line in lines if line.name != "dense"):
        mine = [line for line in lines if line.name == name and line.kl]
        mine.sort(key=lambda line: line.kv_read)
        points = [(line.kv_read, *line.mean_kl) for line in mine]
        reads, means, lows, highs = zip(*points, strict=True)
        below = [m - low for m, low in zip(means, lows, strict=True)]
        above = [high - m for m, high in zip(means, highs, strict=True)]
        axes.errorbar(reads, means, (below, above), fmt="o-", ms=4, label=name)
    axes.set_yscale("log")
    axes.set(xlabel="KV bytes read per step, share of dense", ylabel="KL, nats")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def shown_budget(budget: str) -> str:
    return budget.removeprefix("equal ").replace("budget", "share of the context")


def _shown(interval: Interval, form: str) -> str:
    mean, low, high = (form.format(value) for value in interval)
    return f"{mean} ({low} to {high})"
