"""How sure a score is: intervals of a mean difference and of a share."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_DRAWS_AT_ONCE = 1 << 20  # indices in memory


class Interval(NamedTuple):
    """An estimate and the ends of its interval, in the unit of what was given."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Percentile bootstrap of the mean of `ours[i] - theirs[i]` over tasks i.

    Of n differences, n are drawn with replacement, `resamples` times; the interval's
    ends are the quantiles (1 - level) / 2 and (1 + level) / 2 of the means. Pairs stay
    together, so that how hard a task is cancels.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Args:
        ours, theirs: Scores of the same tasks in the same order, one or more.

    Raises:
        ValueError: Other lengths, no task, a level outside of 0..1, or no resamples.
    """
    _check_level(level)
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(
            f"{len(ours)} and {len(theirs)} scores: must be as many, one or more"
        )
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be 1 or more")
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    n = len(differences)
    rng = np.random.default_rng(seed)
    rows = max(_DRAWS_AT_ONCE // n, 1)
    means = np.concatenate(
        [
            differences[rng.integers(n, size=(min(rows, resamples - done), n))].mean(1)
            for done in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences.mean()), float(low), float(high))


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share p = successes / trials.

    With z the normal quantile of (1 + level) / 2 and n = trials:

        (p + z^2 / 2n  +-  z * sqrt(p * (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    It stays within 0..1 and has a width at shares of 0 and 1.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical
    Inference", Journal of the American Statistical Association 22 (1927), 209-212.

    Raises:
        ValueError: No trials, successes outside of 0..trials, or a level outside 0..1.
    """
    _check_level(level)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is no share")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, n = successes / trials, trials
    middle = p + z**2 / (2 * n)
    reach = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((middle + sign * reach) / (1 + z**2 / n) for sign in (-1, 1))
    return Interval(p, max(low, 0.0), min(high, 1.0))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1")
