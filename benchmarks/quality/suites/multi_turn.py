"""Facts that a conversation holds, asked for later, turn by turn.

Source: none that is published; a needle test of a chat as a server sees it. The user
tells facts at random places of a conversation about other things, then asks for
several of them, one a turn. Each answer is the model's own and stays in the context of
the next question, so that decoding reads keys and values that decoding wrote. The
metric is the share of questions that are answered right in their own turn.
"""

from __future__ import annotations

import random

from benchmarks.quality.suites import prose
from benchmarks.quality.suites.task import (
    TURN_END,
    Draft,
    Message,
    assistant,
    user,
)


def draft(
    rng: random.Random,
    size: int,
    *,
    facts: int = 8,
    questions: int = 4,
    sentences: int = 4,
) -> Draft:
    """A conversation of `facts` turns with a fact and others without.

    Args:
        size: Turns without a fact, besides two.
        questions: Different facts that are asked for, in random order.
        sentences: Length of each answer about something else.

    Raises:
        ValueError: More questions than facts, or none.
    """
    if not 1 <= questions <= facts:
        raise ValueError(f"questions={questions} must be 1 to facts={facts}")
    names = [word.capitalize() for word in prose.made_up_words(rng, facts)]
    codes = prose.numbers(rng, facts, 6)
    turns = [*range(facts), *[None] * (2 + size)]
    rng.shuffle(turns)
    messages: list[Message] = []
    for fact in turns:
        if fact is not None:
            told = f"Please remember: the locker of {names[fact]} has the code "
            messages += [user(f"{told}{codes[fact]}."), assistant("I will.")]
        else:
            noun = rng.choice(prose.NOUNS)
            messages += [
                user(f"What do you think about the {noun}?"),
                assistant(prose.paragraph(rng, sentences, noun)),
            ]
    first, *later = [
        f"Which code has the locker of {name}? Answer with the code alone."
        for name in names[:questions]
    ]
    wanted = tuple(codes[:questions])
    return Draft((*messages, user(first)), TURN_END.join(wanted), wanted, tuple(later))
