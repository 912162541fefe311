"""Choosing SELECT layers from what was measured: dynamic programming, no model.

All layers here are *positions* in the list of layers that take part, ascending; in a
plain model they are its layer indices. Knows neither torch nor vLLM.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

# A further full layer has to save at least this share of one layer's attention.
LAYER_COST = 0.01


@dataclasses.dataclass(frozen=True, order=True)
class Choice:
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
        return tuple(range(self.select[0]))


def assess(loss: np.ndarray, select: Sequence[int]) -> Choice:
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
    return Choice(lost + LAYER_COST * full, lost, full, tuple(select))


def best_choices(
    loss: np.ndarray, num_full: int, first_select: int, keep: int = 1
) -> list[Choice]:
    """The best choices with exactly ``num_full`` full layers, best first.

    Dynamic programming over the last SELECT layer chosen, from the end; a later start
    of SELECT layers costs as much as one more of them.

    Args:
        loss: As in ``assess``.
        num_full: DENSE and SELECT layers, more than ``first_select``.
        first_select: No layer before this position may select: they stay DENSE.
        keep: How many choices are wanted; fewer come back where there are fewer.

    Returns:
        Distinct choices; of equal losses the one with the smaller positions first.
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


def exhaustive_choice(loss: np.ndarray, num_full: int, first_select: int) -> Choice:
    """What ``best_choices`` finds, by trying everything."""
    tried = []
    for first in range(first_select, min(num_full, len(loss))):
        rest = itertools.combinations(range(first + 1, len(loss)), num_full - first - 1)
        tried += [assess(loss, (first, *others)) for others in rest]
    return min(tried, key=lambda choice: (choice.loss, choice.select))


def candidates(
    loss: np.ndarray, captured: np.ndarray, max_select: int, first_select: int
) -> list[Choice]:
    """What is worth a real run: few choices for each number of full layers.

    The two best by avoidable loss; the best by its squares, which hold one layer that
    loses much worse than many that lose little; and the best by all the mass that is
    not captured, which also counts what no selection of this size could have held.

    Args:
        loss: Avoidable loss, as in ``assess``.
        captured: Mass captured, same shape; used as ``1 - captured``.
        max_select: Most SELECT layers.
        first_select: As in ``best_choices``.

    Returns:
        Distinct choices, assessed by ``loss``; fewest full layers first, then best.
    """
    found: dict[tuple[int, ...], Choice] = {}
    for extra in range(1, min(max_select, len(loss) - first_select) + 1):
        for choice in best_choices(loss, first_select + extra, first_select, keep=2):
            found[choice.select] = choice
        for measure in (loss**2, 1.0 - captured):
            for other in best_choices(measure, first_select + extra, first_select):
                found.setdefault(other.select, assess(loss, other.select))
    return sorted(found.values(), key=lambda c: (c.num_full, c.score))


def stability(
    losses: Sequence[np.ndarray],
    quantile: float,
    choice: Choice,
    first_select: int,
    resamples: int = 100,
    seed: int = 0,
) -> float:
    """How often the choice comes out again from other prompts of the same kind.

    Bootstrap: prompts are drawn with replacement, the loss matrix and the choice of as
    many full layers is made anew.

    Args:
        losses: Per prompt [num_steps, num_layers, num_layers].
        quantile: Over the steps, as the loss matrix was made.
        choice: What came out of all prompts.

    Returns:
        Share of the resamples, 0 to 1, that give the same SELECT layers.
    """
    rng = np.random.default_rng(seed)
    same = 0
    for _ in range(resamples):
        drawn = rng.integers(len(losses), size=len(losses))
        matrix = over_steps([losses[i] for i in drawn], quantile)
        (best,) = best_choices(matrix, choice.num_full, first_select)
        same += best.select == choice.select
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


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting on the curve.

    Attributes:
        read_share: KV bytes read per decode step, as a share of dense.
        agreement: Next tokens that are those of dense attention, 0 to 1.
        captured: Attention mass captured, 0 to 1.
    """

    read_share: float
    agreement: float
    captured: float


def knee(points: Sequence[Point], max_loss: float) -> int:
    """Where more bytes stop paying: the index of the point to take.

    Among the points whose agreement is within ``max_loss`` of the best one's, that
    farthest above the line from the cheapest to the dearest of all points in the plane
    of read share and captured mass, each scaled to 0..1.
    """
    best = max(point.agreement for point in points)
    good = [i for i, p in enumerate(points) if p.agreement >= best - max_loss]
    reads = [point.read_share for point in points]
    masses = [point.captured for point in points]
    read_range = max(reads) - min(reads) or 1.0
    mass_range = max(masses) - min(masses)
    if mass_range < max_loss:  # flat: nothing is gained by reading more
        return min(good, key=lambda i: reads[i])
    return max(
        good,
        key=lambda i: (
            (masses[i] - min(masses)) / mass_range
            - (reads[i] - min(reads)) / read_range,
            -reads[i],
        ),
    )


def evidence_needed(disagreed: int, max_loss: float) -> int:
    """Least tokens, so many of them lost, whose lower end stays within a loss.

    Args:
        max_loss: Above 0, for no number of tokens proves that none is lost.
    """

    def proves(tokens: int) -> bool:
        return wilson_lower(tokens - disagreed, tokens) >= 1 - max_loss

    enough = max(disagreed, 1)
    while not proves(enough):
        enough *= 2
    return bisect.bisect_left(range(enough), True, lo=max(disagreed, 1), key=proves)


def wilson_lower(successes: int, trials: int, z: float = 1.96) -> float:
    """Lower end of the 95 % interval of a share, by Wilson's score."""
    if trials == 0:
        return 0.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    return max(0.0, (centre - spread) / (1 + z * z / trials))
