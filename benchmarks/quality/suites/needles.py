"""RULER's needles in a haystack: one or several keys, values and questions.

Source: "RULER: What's the Real Context Size of Your Long-Context Language Models?",
arXiv 2404.06654; the settings of the eight `niah_*` suites are those of its tasks.

A needle is a sentence that gives a key a value. Needles are put between the sentences
of a haystack, each place as likely as any other, and the model is asked for the values
of some keys. The haystack is one of

* `noise`: the same few sentences, over and over;
* `essay`: prose. RULER takes essays by Paul Graham; here code makes it up, or the
  caller gives a text, which is repeated from its start as often as needed;
* `needles`: other needles, of other keys.

Unlike in RULER, places are drawn from all gaps between sentences, not from 40 depths;
keys are adjectives and nouns from short lists; the prompt is in our own words.
"""

from __future__ import annotations

import random
from itertools import islice

from benchmarks.quality.suites import prose
from benchmarks.quality.suites.task import Draft, user

HAYSTACKS = ("noise", "essay", "needles")
_MAKERS = {
    "words": prose.word_keys,
    "numbers": lambda rng, count: prose.numbers(rng, count, 7),
    "uuids": prose.uuids,
}
KEYS, VALUES = ("words", "numbers", "uuids"), ("numbers", "uuids")


def draft(
    rng: random.Random,
    size: int,
    *,
    haystack: str,
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
    text: str | None = None,
) -> Draft:
    """A haystack with `num_keys * num_values` needles.

    Args:
        size: Sentences of the haystack, besides as many as there are needles.
        num_values: Values of each key.
        num_queries: Keys that are asked for.
        text: The haystack, in place of the made-up essay.

    Raises:
        ValueError: A setting that is not one of those above, or text for a haystack
            that has no place for it.
    """
    for name, value, allowed in (
        ("haystack", haystack, HAYSTACKS),
        ("keys", keys, KEYS),
        ("values", values, VALUES),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    if text is not None and haystack != "essay":
        raise ValueError(f"text is for haystack='essay', not for {haystack!r}")
    if not 1 <= num_queries <= num_keys:
        raise ValueError(f"num_queries={num_queries} must be 1 to num_keys={num_keys}")
    num_needles = num_keys * num_values
    num_hay = size + num_needles
    others = num_hay if haystack == "needles" else 0
    all_keys = _MAKERS[keys](rng, num_keys + others)
    all_values = _MAKERS[values](rng, num_needles + others)
    own = [key for key in all_keys[:num_keys] for _ in range(num_values)]
    sentences = [
        f"One of the special magic {values} for {key} is: {value}."
        for key, value in zip(own + all_keys[num_keys:], all_values, strict=True)
    ]
    needles, hay = sentences[:num_needles], sentences[num_needles:]
    if haystack == "noise":
        hay = [prose.NOISE] * num_hay
    elif text is not None:
        hay = list(islice(prose.sentences_of(text), num_hay))
    elif haystack == "essay":
        hay = [prose.sentence(rng) for _ in range(num_hay)]
    lines = scatter(rng, needles, hay)
    wanted, names = all_values[: num_queries * num_values], all_keys[:num_queries]
    listed = names[0]
    if len(names) > 1:
        listed = f"{', '.join(names[:-1])}, and {names[-1]}"
    prompt = (
        f"Special magic {values} are hidden in the text below. Remember them: a "
        f"question about them follows the text.\n\n"
        f"{(' ' if haystack == 'essay' else chr(10)).join(lines)}\n\n"
        f"Which special magic {values} for {listed} does the text above name? "
        f"Answer with {'them' if len(wanted) > 1 else 'it'} alone."
    )
    return Draft((user(prompt),), ", ".join(wanted), tuple(wanted))


def scatter(
    rng: random.Random, items: list[str], hay: list[str], *, in_order: bool = False
) -> list[str]:
    """Items in gaps of a haystack, each set of gaps as likely as any other.

    Args:
        in_order: Keep the order of the items; otherwise every order is as likely.
    """
    gaps = sorted(rng.sample(range(len(hay) + 1), len(items)))
    items = items if in_order else rng.sample(items, len(items))
    lines = list(hay)
    for gap, item in reversed(list(zip(gaps, items, strict=True))):
        lines.insert(gap, item)
    return lines
