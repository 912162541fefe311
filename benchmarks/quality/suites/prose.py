"""Words and sentences made by code: haystacks, keys, names, replies."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Iterator

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
NOISE += "There and back again."
"""The sentences that RULER repeats where a haystack is to be empty of meaning."""

_ADJECTIVES = """
able amber ancient bitter bold brave brief bright brisk broad calm careful cheerful
clever cold common curious damp daring distant dull eager early easy famous fancy
fierce firm fond formal fresh gentle golden grand grave heavy hollow humble
idle jolly keen late lively lonely loud lucky mellow mild modest narrow noble odd
patient plain proud quick quiet rare rough silent
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
_NOUNS = """
anchor apple arrow autumn bakery basket beach bell bench bicycle boat bottle bridge
brush bucket button cabin candle canyon castle cellar chair chapel cherry circus clock
cloud coast corner cottage cradle crystal desert diary drum engine falcon farm feather
ferry field flute forest fountain garden garlic glacier glove guitar hammer harbor
helmet hill island jacket journal kettle kitchen ladder lantern library lighthouse
market meadow mirror mountain museum needle notebook ocean orchard palace paper pebble
pencil piano pillow planet pocket prairie quarry rabbit railway ribbon river saddle
school shadow shelter station summer teapot temple theater ticket tower tunnel valley
village violin wagon window winter workshop
"""
NOUNS = tuple(_NOUNS.split())
_VERBS = ("changes", "explains", "hides", "needs", "shapes", "surprises", "teaches")
_PEOPLE = ("bakers", "children", "editors", "farmers", "painters", "sailors")
_TEMPLATES = (
    "The first thing that {people} notice about a {noun} is how {adj} it looks.",
    "Most {people} will tell you that a {adj} {noun} {verb} the {noun2} beside it.",
    "I used to think that every {noun} was {adj}, and then I saw the {noun2}.",
    "It is hard to say why a {noun} {verb} {people} more than a {noun2} does.",
    "If you want to understand the {noun}, begin with the {adj} {noun2}.",
    "What {people} call a {adj} {noun} is often a {noun2} seen from far away.",
    "Nobody plans a {noun}; it grows out of a {adj} {noun2} over many years.",
    "There is something {adj} about the way in which a {noun} {verb} a {noun2}.",
    "When {people} argue about the {noun}, they mean the {noun2} as a rule.",
    "A {noun} without a {noun2} is {adj} at best, and no one misses it for long.",
    "Perhaps the {adj} {noun} is only a habit that {people} have kept.",
    "The better question is whether the {noun} {verb} the {adj} {noun2} at all.",
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def sentence(rng: random.Random, noun: str | None = None) -> str:
    """A sentence of 12 to 16 words, about a noun if one is given; no digits."""
    words = rng.choice(_TEMPLATES).format(
        people=rng.choice(_PEOPLE),
        adj=rng.choice(ADJECTIVES),
        noun=noun or rng.choice(NOUNS),
        noun2=rng.choice(NOUNS),
        verb=rng.choice(_VERBS),
    )
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", words)


def paragraph(rng: random.Random, sentences: int, noun: str | None = None) -> str:
    return " ".join(sentence(rng, noun) for _ in range(sentences))


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of a text, over and over.

    Raises:
        ValueError: The text holds none.
    """
    found = [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]
    if not found:
        raise ValueError("the haystack's text holds no sentence")
    while True:
        yield from found


def made_up_words(rng: random.Random, count: int, syllables: int = 3) -> list[str]:
    """Distinct words that no language has, of equal length: none contains another.

    Args:
        syllables: Of two letters each; more where the words would run out.
    """
    while 2 * count > (len(_CONSONANTS) * len(_VOWELS)) ** syllables:
        syllables += 1
    words: dict[str, None] = {}
    while len(words) < count:
        pairs = [
            rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables)
        ]
        words["".join(pairs)] = None
    return list(words)


def word_keys(rng: random.Random, count: int) -> list[str]:
    """Distinct keys such as `calm-harbor`; of two adjectives where there are many."""
    a, n = len(ADJECTIVES), len(NOUNS)
    many = count > a * n // 2
    keys = []
    for number in rng.sample(range(a * a * n if many else a * n), count):
        rest, noun = divmod(number, n)
        first, second = divmod(rest, a)
        words = [ADJECTIVES[second], NOUNS[noun]]
        keys.append("-".join([ADJECTIVES[first], *words] if many else words))
    return keys


def numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    """Distinct numbers of so many digits, none with a zero in front."""
    low = 10 ** (digits - 1)
    return [str(n) for n in rng.sample(range(low, 10 * low), count)]


def uuids(rng: random.Random, count: int) -> list[str]:
    """Random UUIDs, version 4; that two are equal will not happen."""
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
