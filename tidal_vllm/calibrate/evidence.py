"""How many tokens have to agree with dense attention before a share is certain."""

from __future__ import annotations

import bisect


def evidence_needed(disagreed: int, max_loss: float) -> int:
    """Least number of tokens whose lower end stays within a loss.

    Args:
        disagreed: How many of these tokens disagree.
        max_loss: Largest share that may disagree. Above 0, for no number of tokens
            proves that none does.
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
