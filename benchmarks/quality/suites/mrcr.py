"""MRCR: the i-th of several answers to one and the same request in a conversation.

Source: "Michelangelo: Long Context Evaluations Beyond Haystacks via Latent Structure
Queries", arXiv 2409.12640, which has multi-round co-reference resolution; and OpenAI's
data set MRCR (2025), whose number of equal requests (2, 4, 8), prefix and metric are
used here.

The user asks for texts of many forms about many subjects. A few requests are equal
word by word; others share the form or the subject with them. In the end the model is
to repeat its i-th answer to the equal requests behind a random prefix, so that saying
something else first shows. The metric is difflib's ratio, 0 without the prefix. Unlike
in the sources, code makes up the texts.
"""

from __future__ import annotations

import random
import string

from benchmarks.quality.suites import prose
from benchmarks.quality.suites.task import Draft, Message, assistant, user

FORMS = (
    *("poem", "short story", "blog post", "letter", "speech", "riddle", "song"),
    *("news article", "diary entry", "fable"),
)
_PREFIX = 10  # characters


def draft(
    rng: random.Random, size: int, *, needles: int = 4, sentences: int = 4
) -> Draft:
    """A conversation of `needles` equal requests among others.

    Args:
        size: Other requests, besides two.
        sentences: Length of each answer.
    """
    form, subject = rng.choice(FORMS), rng.choice(prose.NOUNS)
    requests = [(form, subject)] * needles
    while len(requests) < needles + 2 + size:
        near = rng.randrange(4)
        other = rng.choice(FORMS), rng.choice(prose.NOUNS)
        if near == 0:
            other = form, other[1]
        elif near == 1:
            other = other[0], subject
        if other != (form, subject):
            requests.append(other)
    rng.shuffle(requests)
    messages: list[Message] = []
    answers: dict[str, None] = {}
    for request in requests:
        text = prose.paragraph(rng, sentences, request[1])
        while text in answers:
            text = prose.paragraph(rng, sentences, request[1])
        if request == (form, subject):
            answers[text] = None
        messages += [
            user(f"Write a {request[0]} about the {request[1]}."),
            assistant(text),
        ]
    prefix = "".join(rng.choices(string.ascii_letters + string.digits, k=_PREFIX))
    chosen = rng.randrange(needles)
    wanted = list(answers)[chosen]
    messages.append(
        user(
            f"Write {prefix} and, right behind it, repeat word by word number "
            f"{chosen + 1} of the texts that you wrote as a {form} about the "
            f"{subject}. Write nothing else."
        )
    )
    return Draft(tuple(messages), prefix + wanted, (prefix, wanted))
