"""The pictures in a report, drawn by matplotlib where it is installed."""

from __future__ import annotations

import base64
import importlib.util
import io
from typing import TYPE_CHECKING

import numpy as np

from tidal_vllm.calibrate.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL = 0.24  # inches of a heat map's cell
_GREEN, _BLUE = "#0a6b2d", "#2166ac"


def how_to_get() -> str:
    """What to install for pictures; empty where they can be drawn."""
    if importlib.util.find_spec("matplotlib"):
        return ""
    return "pictures need matplotlib: pip install 'tidal_vllm[calibrate]'"


def heat_maps(result: Result) -> str:
    """Avoidable loss and captured mass: row i selects, column j is given that.

    Returns:
        A data URL.
    """
    from matplotlib.figure import Figure

    side = _CELL * len(result.layers) + 1.2
    figure = Figure(figsize=(2 * side, side), layout="constrained")
    left, right = figure.subplots(1, 2)
    _heat_map(left, result, result.loss, "avoidable loss", "Reds")
    _heat_map(right, result, result.captured, "captured mass", "Blues")
    return _data_url(figure)


def curve(result: Result) -> str:
    """Agreement and captured mass against the KV bytes read, by budget.

    Returns:
        A data URL.
    """
    from matplotlib.figure import Figure

    best = result.best.config
    points = [
        p
        for p in result.curve
        if (p.config.scope, p.config.select_block_size)
        == (best.scope, best.select_block_size)
    ]
    points.sort(key=lambda p: p.read_share)
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    reads = [p.read_share for p in points]
    agreement = [p.measured.agreement for p in points]
    captured = [p.captured for p in points]
    axes.plot(reads, agreement, "o-", color=_GREEN, mfc="none", ms=9)
    axes.plot(reads, captured, "o-", color=_BLUE, ms=5)
    axes.axvline(result.best.read_share, color="#8795a8", linestyle=":")
    axes.legend(["agreement with dense", "captured mass, mean", "recommended"])
    axes.set(xlim=(0, 1), xlabel="KV bytes read per step, as a share of dense")
    return _data_url(figure)


def _heat_map(
    axes: Axes, result: Result, values: np.ndarray, title: str, colours: str
) -> None:
    """[i, j] for j > i as cells, from white (0) to the colour (1)."""
    from matplotlib.patches import Rectangle

    count = len(result.layers)
    above = np.ma.masked_where(np.tril(np.ones((count, count), bool)), values)
    cells = axes.pcolormesh(above, cmap=colours, vmin=0, vmax=1, edgecolors="#d8dee6")
    for i, j in result.given:
        axes.add_patch(Rectangle((j, i), 1, 1, fill=False, linewidth=1.5))
    axes.set(aspect="equal", title=title)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    centres = np.arange(count) + 0.5
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(centres, [str(layer) for layer in result.layers], fontsize=7)
        for position in result.chosen.candidate.select:
            axis.get_ticklabels()[position].set(color=_GREEN, fontweight="bold")
    axes.figure.colorbar(cells, ax=axes, shrink=0.6)


def _data_url(figure: Figure) -> str:
    """The figure as an SVG image in a URL, so that the page needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
