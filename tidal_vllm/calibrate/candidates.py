"""Candidates for the SELECT layers, from what was recorded: dynamic programming.

All layers here are *positions* in the list of layers that take part, ascending; in a
model whose layers all have full attention they are its layer indices. Imports neither
torch nor vLLM.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

# A further full layer has to save at least this share of one layer's attention.
LAYER_COST = 0.01
LOSS_QUANTILE, MASS_QUANTILE = 0.95, 0.05  # over decode steps: the worse end


@dataclasses.dataclass(frozen=True, order=True)
class Candidate:
    """SELECT layers and what they are expected to cost; ordered, best first.

    Attributes:
        score: ``loss + LAYER_COST * num_full``; smaller is better.
        loss: Attention mass lost, summed over the SPARSE layers; each loses 0 to 1.
        num_full: Layers that read the whole KV cache: DENSE and SELECT ones.
        select: Positions, ascending. All before the first are DENSE.
    """

    score: float
    loss: float
    num_full: int
    select: tuple[int, ...]

    @property
    def dense(self) -> tuple[int, ...]:
        """Positions of the DENSE layers."""
        return tuple(range(self.select[0]))

    def given(self, num_layers: int) -> list[tuple[int, int]]:
        """Per SPARSE layer, the position of the layer that selects for it, and its own.

        Args:
            num_layers: Layers that take part.
        """
        ends = [*self.select[1:], num_layers]
        return [
            (start, layer)
            for start, end in zip(self.select, ends, strict=True)
            for layer in range(start + 1, end)
        ]


def assess(loss: np.ndarray, select: Sequence[int]) -> Candidate:
    """Score given SELECT layers by the definition that the search optimises.

    Args:
        loss: [num_layers, num_layers]; ``loss[i, j]`` is what layer j > i loses when
            it attends to what layer i selected.
        select: Positions, ascending, at least one.
    """
    ends = [*select[1:], len(loss)]
    lost = sum(
        float(loss[start, start + 1 : end].sum())
        for start, end in zip(select, ends, strict=True)
    )
    full = select[0] + len(select)
    return Candidate(lost + LAYER_COST * full, lost, full, tuple(select))


def best_candidates(
    loss: np.ndarray, num_full: int, first_select: int, keep: int = 1
) -> list[Candidate]:
    """The best candidates with exactly ``num_full`` full layers, best first.

    Dynamic programming over the SELECT layers, from the last one backwards. A later
    first SELECT layer costs as much as one more SELECT layer.

    Args:
        loss: As in ``assess``.
        num_full: DENSE and SELECT layers, more than ``first_select``.
        first_select: No layer before this position may select: they stay DENSE.
        keep: How many candidates are wanted; fewer come back where there are fewer.

    Returns:
        Distinct candidates; of equal losses the one with the smaller positions first.
    """
    num_layers = len(loss)
    # lost[i][e]: what layers i + 1 .. e - 1 lose under the selection of layer i.
    lost = np.zeros((num_layers, num_layers + 1))
    for i in range(num_layers):
        lost[i, i + 2 :] = np.cumsum(loss[i, i + 1 :])
    # tails[i]: best (loss, path) of layers i .. end, layer i selecting.
    tails = {
        i: [(float(lost[i, num_layers]), (i,))] for i in range(first_select, num_layers)
    }
    ranked = []
    for count in range(1, num_full - first_select + 1):
        ranked += tails.get(num_full - count, ())
        longer = {}
        for i in range(first_select, num_layers):
            found = [
                (float(lost[i, after]) + rest, (i, *path))
                for after in range(i + 1, num_layers)
                for rest, path in tails.get(after, ())
            ]
            if found:
                longer[i] = sorted(found)[:keep]
        tails = longer
    return [assess(loss, path) for _, path in sorted(ranked)[:keep]]


def exhaustive_candidate(
    loss: np.ndarray, num_full: int, first_select: int
) -> Candidate:
    """The best candidate, found by trying every one."""
    tried = []
    for first in range(first_select, min(num_full, len(loss))):
        rest = itertools.combinations(range(first + 1, len(loss)), num_full - first - 1)
        tried += [assess(loss, (first, *others)) for others in rest]
    return min(tried, key=lambda one: (one.loss, one.select))


def worth_running(
    loss: np.ndarray, captured: np.ndarray, max_select: int, first_select: int
) -> list[Candidate]:
    """Few candidates for each number of full layers.

    The two best by avoidable loss; the best by its squares, which hold one layer that
    loses much worse than many that lose little; and the best by all the mass that is
    not captured, which also counts what no selection of this size could have held.

    Args:
        loss: Avoidable loss, as in ``assess``.
        captured: Attention mass captured, 0 to 1, of the same shape.
        max_select: Most SELECT layers.
        first_select: As in ``best_candidates``.

    Returns:
        Distinct candidates, assessed by ``loss``; fewest full layers first, then best.
    """
    found: dict[tuple[int, ...], Candidate] = {}
    for extra in range(1, min(max_select, len(loss) - first_select) + 1):
        num_full = first_select + extra
        for candidate in best_candidates(loss, num_full, first_select, keep=2):
            found[candidate.select] = candidate
        for measure in (loss**2, 1.0 - captured):
            (other,) = best_candidates(measure, num_full, first_select)
            found.setdefault(other.select, assess(loss, other.select))
    return sorted(found.values(), key=lambda c: (c.num_full, c.score))


def stability(
    losses: Sequence[np.ndarray],
    quantile: float,
    candidate: Candidate,
    first_select: int,
    resamples: int = 100,
    seed: int = 0,
) -> float:
    """How often a candidate comes out again from other prompts of the same kind.

    Bootstrap: prompts are drawn with replacement, and the best candidate with as many
    full layers is found from their steps.

    Args:
        losses: Per prompt [num_steps, num_layers, num_layers].
        quantile: Over the steps, as the loss matrix was made.
        candidate: What came out of all prompts.
        first_select: As in ``best_candidates``.

    Returns:
        Share of the resamples, 0 to 1, that give the same SELECT layers.
    """
    rng = np.random.default_rng(seed)
    same = 0
    for _ in range(resamples):
        drawn = rng.integers(len(losses), size=len(losses))
        matrix = over_steps([losses[i] for i in drawn], quantile)
        (best,) = best_candidates(matrix, candidate.num_full, first_select)
        same += best.select == candidate.select
    return same / resamples


def over_steps(per_prompt: Sequence[np.ndarray], quantile: float) -> np.ndarray:
    """[num_layers, num_layers]: a quantile over all decode steps of all prompts.

    Not interpolated: the value of a step that happened, towards the worse end.

    Args:
        per_prompt: Each [num_steps, num_layers, num_layers].
        quantile: Above 0.5 for losses, below for masses.
    """
    steps = np.concatenate(per_prompt)
    method = "higher" if quantile > 0.5 else "lower"
    return np.quantile(steps, quantile, axis=0, method=method)
