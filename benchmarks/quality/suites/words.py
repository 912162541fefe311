"""RULER's aggregation: the most common words of a list, the most frequent of a text.

Source: arXiv 2404.06654 (RULER), common and frequent words extraction.

* Common words: a numbered list in which ten words stand 30 times each and all others 3
  times; the ten are asked for.
* Frequent words: made-up words by a zeta distribution: of N words, the one of rank k
  stands floor(N * k**-alpha / zeta(alpha)) times. Rank 1 is the noise `...`; asked for
  are ranks 2 to 4.

Unlike in RULER, words of the list are made up, too, and there is no worked example in
front; the prompts are in our own words.
"""

from __future__ import annotations

import random

from benchmarks.quality.suites import prose
from benchmarks.quality.suites.task import Draft, user

DOTS = "..."
ASKED = 3  # frequent words


def common(
    rng: random.Random,
    size: int,
    *,
    num_common: int = 10,
    common_count: int = 30,
    other_count: int = 3,
) -> Draft:
    """A numbered list in random order.

    Args:
        size: Words that stand `other_count` times.

    Raises:
        ValueError: The common words are not the more frequent ones.
    """
    if not common_count > other_count >= 1:
        raise ValueError(
            f"common_count={common_count} must be above other_count={other_count}, "
            "which must be 1 or more"
        )
    words = prose.made_up_words(rng, num_common + size)
    wanted, others = words[:num_common], words[num_common:]
    listed = wanted * common_count + others * other_count
    rng.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    prompt = (
        f"Below is a numbered list of words. Some of them stand in it more often than "
        f"the others.\n\n{numbered}\n\n"
        f"Which {num_common} words are the most common ones in the list above? Answer "
        "with the words alone."
    )
    return Draft((user(prompt),), ", ".join(wanted), tuple(wanted))


def frequent(rng: random.Random, size: int, *, alpha: float = 2.0) -> Draft:
    """A text of words by their zeta distribution, in random order.

    Args:
        size: N, besides the 100 that the smallest text has.

    Raises:
        ValueError: Ranks 4 and 5 are equally frequent: alpha is too far from 2, or not
            above 1.
    """
    if alpha <= 1:
        raise ValueError(f"alpha={alpha} must be above 1")
    scale = (100 + size) / zeta(alpha)
    counts: list[int] = []
    while not counts or counts[-1]:
        counts.append(int(scale * (len(counts) + 1) ** -alpha))
    counts.pop()
    if len(counts) <= ASKED or counts[ASKED] == (counts + [0])[ASKED + 1]:
        raise ValueError(f"alpha={alpha}: ranks 4 and 5 are equally frequent")
    words = [DOTS, *prose.made_up_words(rng, len(counts) - 1)]
    text = [
        word for word, count in zip(words, counts, strict=True) for _ in range(count)
    ]
    rng.shuffle(text)
    wanted = words[1 : 1 + ASKED]
    prompt = (
        f"The text below is in code. Count how often each word stands in it; {DOTS} is "
        f"no word.\n\n{' '.join(text)}\n\n"
        f"Which {ASKED} words are the most frequent ones in the text above? Answer "
        "with the words alone."
    )
    return Draft((user(prompt),), ", ".join(wanted), tuple(wanted))


def zeta(alpha: float) -> float:
    """Riemann's zeta function for alpha > 1, by its first terms and Euler-Maclaurin."""
    n = 32
    head = sum(k**-alpha for k in range(1, n))
    return (
        head
        + n ** (1 - alpha) / (alpha - 1)
        + n**-alpha / 2
        + alpha * (n ** (-alpha - 1)) / 12
    )
