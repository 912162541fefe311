"""Other rules for choosing SELECT layers, to be compared with the calibration's.

Each returns positions, ascending, the first of them ``first_select``, as the published
methods do; see ``candidates`` for what a position is.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from tidal_vllm.calibrate.candidates import Candidate, assess, exhaustive_candidate

EXHAUSTIVE_LIMIT = 20_000  # more candidates are not tried one by one


def other_rules(
    loss: np.ndarray, overlap: np.ndarray, chosen: Candidate, first_select: int
) -> dict[str, Candidate]:
    """What other rules choose at the same cost, by name, assessed by our loss.

    Args:
        loss: [num_layers, num_layers], as in ``candidates.assess``.
        overlap: As in ``mean_overlap``.
        chosen: What the calibration chose.
    """
    count = chosen.num_full - first_select
    found = {
        "evenly spaced": evenly_spaced(len(loss), count, first_select),
        "adjacent change (DELTA-style)": adjacent_change(overlap, count, first_select),
    }
    if math.comb(len(loss), count) <= EXHAUSTIVE_LIMIT:
        found["mean overlap (TidalDecode)"] = mean_overlap(overlap, count, first_select)
        best = exhaustive_candidate(loss, chosen.num_full, first_select)
        found["exhaustive search"] = best.select
    return {name: assess(loss, select) for name, select in found.items()}


def evenly_spaced(
    num_layers: int, num_select: int, first_select: int
) -> tuple[int, ...]:
    """Equal stretches of layers per SELECT layer."""
    step = (num_layers - first_select) / num_select
    return tuple(first_select + int(k * step) for k in range(num_select))


def mean_overlap(
    overlap: np.ndarray, num_select: int, first_select: int
) -> tuple[int, ...]:
    """TidalDecode's rule (arXiv 2410.05076): the highest mean overlap of selections.

    A SPARSE layer's overlap is the share of the blocks that it would itself have
    selected among those that it is given. Its mean over the SPARSE layers is what the
    paper's sensitivity study calls recall.

    Args:
        overlap: [num_layers, num_layers], mean over decode steps.
    """
    num_layers = len(overlap)
    best, found = -1.0, None
    later = range(first_select + 1, num_layers)
    for rest in itertools.combinations(later, num_select - 1):
        select = (first_select, *rest)
        ends = [*rest, num_layers]
        given = np.concatenate(
            [overlap[i, i + 1 : e] for i, e in zip(select, ends, strict=True)]
        )
        mean = float(given.mean()) if given.size else 1.0
        if mean > best:
            best, found = mean, select
    return found


def adjacent_change(
    overlap: np.ndarray, num_select: int, first_select: int
) -> tuple[int, ...]:
    """DELTA-style: select anew where neighbouring layers' selections differ most.

    Args:
        overlap: As in ``mean_overlap``; ``1 - overlap[j - 1, j]`` is the change at j.
    """
    later = range(first_select + 1, len(overlap))
    changes = sorted(later, key=lambda j: (overlap[j - 1, j], j))
    return (first_select, *sorted(changes[: num_select - 1]))
