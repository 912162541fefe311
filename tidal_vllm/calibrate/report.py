"""The report of a calibration: one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tidal_vllm.calibrate import pictures, summary
from tidal_vllm.calibrate.result import CurvePoint, Job, Measured, Result, Tried
from tidal_vllm.plan.roles import format_layers

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; color: #1c2733; background: #fff; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #d8dee6; text-align: right;
         white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.best td { background: #e3f1e7; font-weight: 600 }
img { max-width: 100%; height: auto } details div { overflow-x: auto }
.note { color: #56657a }
"""


def write_report(path: Path, job: Job, result: Result, fields: dict[str, Any]) -> None:
    """Write the page.

    Without matplotlib it has no pictures, and says so; see `pictures.how_to_get`.

    Args:
        fields: The profile's content.
    """
    path.write_text(_page(job, result, fields), encoding="utf-8")


def _page(job: Job, result: Result, fields: dict[str, Any]) -> str:
    best = result.best
    dense, select = result.roles(result.chosen.candidate)
    measured = fields["measured"]
    asked = measured["prompts"]
    kinds = ", ".join(asked["kinds"])
    parts = [
        f"<h1>Calibration of {escape(job.model)}</h1>",
        f"<p>SELECT layers <b>{format_layers(select)}</b>, DENSE "
        f"{format_layers(dense)}, all others of {summary.all_layers(job)} SPARSE. "
        f"Runner-up: {escape(summary.runner_up(result))}. "
        f"{escape(summary.stable(result))}.</p>",
        f"<p>Recommended: <b>{escape(summary.setting(best))}</b>, "
        f"{summary.correction(result.interval)}; reads {best.read_share:.0%} of the "
        f"KV. Decoded so, the model {escape(summary.did(best.measured))}. That is "
        f"{summary.sure(best.measured)}, where <code>--max-loss {job.max_loss:g}"
        f"</code> asks for {1 - job.max_loss:.1%}. The selection captures "
        f"{best.captured:.1%} of the attention mass on average, "
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
        _picture(pictures.heat_maps, result, "Two heat maps, layer by layer"),
        "<details><summary>The numbers</summary>",
        "<h3>Avoidable loss</h3>",
        _matrix_table(result, result.loss),
        "<h3>Captured mass</h3>",
        _matrix_table(result, result.captured),
        "</details>",
        "<h2>Choices of layers that were run</h2>",
        _tried_table(result),
        "<h2>Budget, block size and scope</h2>",
        "<p class=note>With the chosen layers. Bytes are KV bytes of a decode step, as "
        "a share of dense attention's.</p>",
        _picture(pictures.curve, result, "Agreement and mass against KV bytes read"),
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


def _picture(draw: Callable[[Result], str], result: Result, text: str) -> str:
    """An image in the page itself, or why there is none."""
    if advice := pictures.how_to_get():
        return f"<p class=note>No picture here: {escape(advice)}.</p>"
    return f"<img alt='{text}' src='{draw(result)}'>"


def _matrix_table(result: Result, values: np.ndarray) -> str:
    """[i, j] for j > i: row i selects for column j; SELECT layers stand out."""
    select = result.chosen.candidate.select
    rows = []
    for i, layer in enumerate(result.layers):
        cells = [f"{value:.3f}" if j > i else "" for j, value in enumerate(values[i])]
        rows.append((i in select, [str(layer), *cells]))
    return f"<div>{_table(['layer', *map(str, result.layers)], rows)}</div>"


def _tried_table(result: Result) -> str:
    def row(one: Tried) -> tuple[bool, list[str]]:
        _, select = result.roles(one.candidate)
        cells = [format_layers(select), str(one.candidate.num_full)]
        cells += [f"{one.candidate.loss:.3f}", *_measured_cells(one.measured)]
        return one is result.chosen, [*cells, summary.verdict(one)]

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
    chosen = result.chosen.candidate
    select = format_layers(result.roles(chosen)[1])
    rows.insert(0, (True, ["this calibration", select, f"{chosen.loss:.3f}"]))
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
