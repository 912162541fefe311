"""How many items a prompt of a given length takes."""

from __future__ import annotations

from collections.abc import Callable

CLOSE = 0.99  # of the length: near enough to stop
_PROBE = 8  # items of the first look at what an item takes


def largest(count: Callable[[int], int], length: int) -> int | None:
    """A size whose prompt fits, and the next one does not or is 99 % full.

    What an item takes is interpolated between sizes that are known: a prompt of a
    million tokens is counted a few times only.

    Args:
        count: Tokens of the prompt of a size, 0 or more; grows with the size, but for
            small differences. The size that is returned was counted.
        length: Tokens that the prompt may have.

    Returns:
        The size; None where not even size 0 fits.
    """
    low, fits = 0, count(0)
    if fits > length:
        return None
    high: int | None = None
    guess = _PROBE
    for tries in range(64):
        if fits >= CLOSE * length or high == low + 1:
            break
        tokens = count(guess)
        per_item = max((tokens - fits) / (guess - low), 1e-3)
        if tokens <= length:
            low, fits = guess, tokens
        else:
            high = guess
        guess = low + int((length - fits) / per_item)
        if high is None:
            guess = min(max(guess, low + 1), 64 * low + _PROBE)
        elif tries > 8:
            guess = (low + high) // 2
        else:
            guess = min(max(guess, low + 1), high - 1)
    return low
