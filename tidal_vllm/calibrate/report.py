"""The page to look at, and its short form for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tidal_vllm.calibrate.result import CurvePoint, Job, Measured, Result, Tried
from tidal_vllm.plan.roles import format_layers

_CELL = 18  # pixels of a heat map's cell
_PLOT = (520, 260)  # pixels of the curve
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; color: #1c2733; background: #fff; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #d8dee6; text-align: right;
         white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.best td { background: #e3f1e7; font-weight: 600 }
svg { max-width: 100%; height: auto } svg text { font: 10px system-ui, sans-serif }
.note { color: #56657a }
"""


def describe(job: Job, result: Result, seconds: float) -> str:
    """The result in a few lines of at most 88 columns."""
    chosen, best = result.chosen, result.best
    dense, select = result.roles(chosen.choice)
    lines = [
        f"SELECT layers {format_layers(select)}, DENSE {format_layers(dense)} "
        f"of {_all_layers(job)}",
        f"  {_did(chosen.measured)}",
        f"  {_sure(chosen.measured)}",
        f"  {_stable(result)}",
        f"  runner-up: {_runner_up(result)}",
        f"Recommended: {_setting(best)}, {_correction(result.interval)}",
        f"  {_did(best.measured)}",
        f"  {_sure(best.measured)}; --max-loss asks for {1 - job.max_loss:.1%}",
        f"  reads {best.read_share:.0%} of the KV; captures {best.captured:.1%} of the "
        f"attention mass, {best.captured_worst:.1%} in the worst head",
        f"{seconds:.0f} s",
    ]
    if result.dense.judged and 2 * result.dense.right < result.dense.judged:
        lines.insert(
            0,
            f"NOTE: dense attention itself answers {result.dense.right} of "
            f"{result.dense.judged} prompts: trust the agreement, not the accuracy",
        )
    return "\n".join(lines)


def write_report(path: Path, job: Job, result: Result, fields: dict[str, Any]) -> None:
    """Write one HTML file that needs nothing else.

    Args:
        fields: The profile's content.
    """
    path.write_text(_page(job, result, fields), encoding="utf-8")


def _page(job: Job, result: Result, fields: dict[str, Any]) -> str:
    best = result.best
    dense, select = result.roles(result.chosen.choice)
    measured = fields["measured"]
    asked = measured["prompts"]
    kinds = ", ".join(asked["kinds"])
    parts = [
        f"<h1>Calibration of {escape(job.model)}</h1>",
        f"<p>SELECT layers <b>{format_layers(select)}</b>, DENSE "
        f"{format_layers(dense)}, all others of {_all_layers(job)} SPARSE. "
        f"Runner-up: {escape(_runner_up(result))}. {escape(_stable(result))}.</p>",
        f"<p>Recommended: <b>{escape(_setting(best))}</b>, "
        f"{_correction(result.interval)}; reads {best.read_share:.0%} of the KV. "
        f"Decoded so, the model {escape(_did(best.measured))}. That is "
        f"{_sure(best.measured)}, where <code>--max-loss {job.max_loss:g}</code> asks "
        f"for {1 - job.max_loss:.1%}. The selection captures {best.captured:.1%} of "
        "the attention mass on average, "
        f"{best.captured_worst:.1%} in the worst layer and head.</p>",
        f"<p class=note>{asked['count']} prompts ({escape(kinds)}) of "
        f"{asked['mean_tokens']} tokens on average; {measured['seconds']} s; "
        f"{escape(fields['source'])}; "
        + escape(", ".join(f"{k} {v}" for k, v in fields["versions"].items()))
        + ".</p>",
        "<h2>What one layer's selection costs another</h2>",
        "<p class=note>Row: the layer that selects. Column: the layer that attends to "
        "that selection. Left: attention mass that the worst head loses although "
        "another choice of blocks would have held it, in the worst 5% of decode "
        "steps; the choice of layers minimises its sum. Right: mass that the worst "
        "head captures there. Outlined: what the chosen layers give to whom.</p>",
        _heat_map(result, result.loss, "avoidable loss (red: all)", (178, 24, 43)),
        _heat_map(result, result.captured, "captured mass (blue: all)", (33, 102, 172)),
        "<h2>Choices of layers that were run</h2>",
        _tried_table(result),
        "<h2>Budget, block size and scope</h2>",
        "<p class=note>With the chosen layers. Bytes are KV bytes of a decode step, as "
        "a share of dense attention's.</p>",
        _curve(result),
        _curve_table(result),
        _corrections(result),
        "<h2>Other rules</h2>",
        "<p class=note>What they choose on the same recordings at the same cost; "
        "expected loss is the sum over SPARSE layers, by the left map.</p>",
        _rules_table(result),
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>Calibration of {escape(job.model)}</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _setting(point: CurvePoint) -> str:
    config = point.config
    return (
        f"budget {config.token_budget} tokens, block {config.select_block_size}, "
        f"scope {config.scope}"
    )


def _did(measured: Measured) -> str:
    agreed = f"agrees with dense in {measured.agreed} of {measured.steps} tokens"
    if not measured.judged:
        return agreed
    return (
        f"{agreed}, answers {measured.right} of {measured.judged} prompts "
        f"(dense {measured.dense_right})"
    )


def _all_layers(job: Job) -> str:
    full = len(job.full_layers)
    if full == job.num_layers:
        return str(full)
    return f"{full} full-attention layers (the model has {job.num_layers})"


def _correction(interval: int | None) -> str:
    return f"corrected every {interval} steps" if interval else "no correction"


def _sure(measured: Measured) -> str:
    return f"at least {measured.sure_agreement:.1%} with 95% confidence"


def _stable(result: Result) -> str:
    return f"{result.stability:.0%} of resamples of the prompts give the same layers"


def _runner_up(result: Result) -> str:
    other = result.runner_up
    if other is None:
        return "none was run"
    _, select = result.roles(other.choice)
    full, ours = other.choice.num_full, result.chosen.choice.num_full
    size = "as many full layers" if full == ours else f"{full} full layers, not {ours}"
    agreement = f"agreement {other.measured.agreement:.1%}"
    return f"SELECT {format_layers(select)} ({size}), {agreement}, {_verdict(other)}"


def _verdict(tried: Tried) -> str:
    if tried.holds:
        return "holds"
    return "too few tokens to tell" if tried.promises else "does not hold"


def _heat_map(
    result: Result, values: np.ndarray, title: str, colour: tuple[int, int, int]
) -> str:
    """[i, j] as cells: row i, column j, from white (0) to the colour (1)."""
    count, left, top = len(result.layers), 34, 34
    select = result.chosen.choice.select
    ends = [*select[1:], count]
    given = {
        (i, j) for i, end in zip(select, ends, strict=True) for j in range(i + 1, end)
    }
    cells = []
    for i in range(count):
        for j in range(i + 1, count):
            value = float(values[i, j])
            shade = ",".join(str(round(255 + (c - 255) * value)) for c in colour)
            edge = "'#111' stroke-width=2" if (i, j) in given else "'#d8dee6'"
            cells.append(
                f"<rect x={left + j * _CELL} y={top + i * _CELL} width={_CELL - 1} "
                f"height={_CELL - 1} fill='rgb({shade})' stroke={edge}><title>"
                f"{result.layers[i]} for {result.layers[j]}: {value:.3f}"
                "</title></rect>"
            )
    marks = []
    for i, layer in enumerate(result.layers):
        weight = "font-weight=700 fill='#0a6b2d'" if i in select else "fill='#56657a'"
        middle = i * _CELL + _CELL // 2
        marks.append(
            f"<text x={left - 6} y={top + middle + 4} text-anchor=end {weight}>"
            f"{layer}</text><text x={left + middle} y={top - 6} text-anchor=middle "
            f"{weight}>{layer}</text>"
        )
    side = count * _CELL
    return (
        f"<svg width={left + side} height={top + side} role=img "
        f"viewBox='0 0 {left + side} {top + side}'>"
        f"<text x={left} y=12 font-weight=700>{title}</text>"
        + "".join(cells + marks)
        + "</svg> "
    )


def _curve(result: Result) -> str:
    """Agreement and captured mass against the bytes read, both 0 to 1."""
    width, height = _PLOT
    left, bottom = 40, height - 30
    points = [p for p in result.curve if p.config.scope == result.best.config.scope]
    points = [
        p
        for p in points
        if p.config.select_block_size == result.best.config.select_block_size
    ]
    points.sort(key=lambda p: p.read_share)
    lowest = min(min(p.measured.agreement, p.captured) for p in points)
    floor = max(0.0, min(lowest - 0.02, 0.9))

    def at(share: float, value: float) -> tuple[float, float]:
        x = left + share * (width - left - 30)
        return x, bottom - (value - floor) / (1 - floor) * (bottom - 20)

    drawn = [
        f"<line x1={left} y1={bottom} x2={width - 30} y2={bottom} stroke='#8795a8'/>",
        f"<line x1={left} y1=20 x2={left} y2={bottom} stroke='#8795a8'/>",
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, _ = at(share, floor)
        drawn.append(
            f"<text x={x:.1f} y={bottom + 14} text-anchor=middle>{share:.0%}</text>"
        )
    for value in (floor, (1 + floor) / 2, 1):
        _, y = at(0, value)
        drawn.append(
            f"<text x={left - 4} y={y + 3:.1f} text-anchor=end>{value:.2f}</text>"
        )
    drawn.append(
        f"<text x={width - 30} y={bottom + 26} text-anchor=end>KV bytes read per "
        "step, of dense; large circles: recommended</text>"
    )
    series = (
        ("agreement with dense", "#0a6b2d", lambda p: p.measured.agreement),
        ("captured mass, mean", "#2166ac", lambda p: p.captured),
    )
    for number, (name, colour, value) in enumerate(series):
        path = [at(p.read_share, value(p)) for p in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
        drawn.append(f"<polyline points='{line}' fill=none stroke='{colour}'/>")
        for point, (x, y) in zip(points, path, strict=True):
            radius = (7, 3)[number] + 2 * (point is result.best)
            drawn.append(
                f"<circle cx={x:.1f} cy={y:.1f} r={radius} "
                f"fill='{('none', colour)[number]}' stroke='{colour}'><title>"
                f"budget {point.config.token_budget}: {value(point):.4f}"
                "</title></circle>"
            )
        drawn.append(
            f"<text x={width - 170} y={bottom - 30 + 14 * number} "
            f"fill='{colour}'>{name}</text>"
        )
    return (
        f"<svg width={width} height={height} viewBox='0 0 {width} {height}' role=img>"
        + "".join(drawn)
        + "</svg>"
    )


def _tried_table(result: Result) -> str:
    def row(one: Tried) -> tuple[bool, list[str]]:
        _, select = result.roles(one.choice)
        cells = [format_layers(select), str(one.choice.num_full)]
        cells += [f"{one.choice.loss:.3f}", *_measured_cells(one.measured)]
        return one is result.chosen, [*cells, _verdict(one)]

    head = ["SELECT layers", "full layers", "expected loss", *_MEASURED, "holds"]
    return _table(head, map(row, result.tried))


def _curve_table(result: Result) -> str:
    def row(point: CurvePoint) -> tuple[bool, list[str]]:
        config = point.config
        cells = [str(config.token_budget), str(config.select_block_size), config.scope]
        cells += [f"{point.read_share:.1%}", f"{point.captured:.1%}"]
        cells += [f"{point.captured_worst:.1%}", *_measured_cells(point.measured)]
        return point is result.best, cells

    head = ["budget", "block", "scope", "bytes", "captured", "worst", *_MEASURED]
    return _table(head, map(row, result.curve))


def _corrections(result: Result) -> str:
    if not result.intervals:
        return (
            "<p class=note>No correction interval was tried: there was no drift to "
            "correct, or the answers are too short to tell.</p>"
        )
    rows = [
        (n == result.interval, [f"every {n} steps", *_measured_cells(measured)])
        for n, measured in [(None, result.best.measured), *result.intervals]
    ]
    rows[0] = (result.interval is None, ["never", *rows[0][1][1:]])
    return "<h2>Correction</h2>" + _table(["interval", *_MEASURED], rows)


def _rules_table(result: Result) -> str:
    rows = [
        (False, [name, format_layers(result.roles(one)[1]), f"{one.loss:.3f}"])
        for name, one in result.others.items()
    ]
    ours = result.chosen.choice
    select = format_layers(result.roles(ours)[1])
    rows.insert(0, (True, ["this calibration", select, f"{ours.loss:.3f}"]))
    return _table(["rule", "SELECT layers", "expected loss"], rows)


_MEASURED = ("tokens", "agreement", "at least", "right", "lost logprob")


def _measured_cells(measured: Measured) -> list[str]:
    right = f"{measured.right}/{measured.judged}" if measured.judged else "-"
    return [
        str(measured.steps),
        f"{measured.agreement:.2%}",
        f"{measured.sure_agreement:.2%}",
        right,
        f"{measured.lost_logprob:.4f}",
    ]


def _table(head: Sequence[str], rows: Iterable[tuple[bool, list[str]]]) -> str:
    def cells(tag: str, values: Iterable[str]) -> str:
        return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)

    body = "".join(
        f"<tr{' class=best' if best else ''}>{cells('td', values)}</tr>"
        for best, values in rows
    )
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"
