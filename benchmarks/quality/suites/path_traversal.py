"""LongProc's path traversal: a long route, one step a line.

Source: "LongProc: Benchmarking Long-Context Language Models on Long Procedural
Generation", arXiv 2501.05414. Every city has one connection, one-way, to another city;
the prompt lists them in random order, and the model writes the route between two
cities. The metric is the share of lines up to the first wrong one, LongProc's partial
accuracy, where lines beyond the right ones count as wrong. Unlike in LongProc, cities
have made-up names, the prompt has no worked example and is in our own words.
"""

from __future__ import annotations

import random

from benchmarks.quality.suites import prose
from benchmarks.quality.suites.metrics import CLOSE, OPEN
from benchmarks.quality.suites.task import Draft, user

TRANSIT = ("bus", "train", "plane", "ferry")


def draft(rng: random.Random, size: int, *, hops: int = 16) -> Draft:
    """A route of `hops` steps among other connections.

    Args:
        size: Cities that are not on the route.
    """
    cities = [w.capitalize() for w in prose.made_up_words(rng, hops + 1 + size)]
    steps = {a: b for a, b in zip(cities[:hops], cities[1:], strict=False)}
    for at in range(hops, len(cities)):
        other = rng.randrange(len(cities) - 1)
        steps[cities[at]] = cities[other + (other >= at)]
    means = {city: rng.choice(TRANSIT) for city in cities}
    listed = [f"From {a} there is a {means[a]} to {b}." for a, b in steps.items()]
    rng.shuffle(listed)
    route = [f"{a}, {means[a]}, {steps[a]}" for a in cities[:hops]]
    newline = "\n"
    prompt = (
        "Below are the connections between cities. All are one-way, and exactly one "
        f"leaves each city.\n\n{newline.join(listed)}\n\n"
        f"Write the route from {cities[0]} to {cities[hops]} between {OPEN} and "
        f"{CLOSE}, one connection a line, of this form:\nSTART, MEANS, END"
    )
    answer = "\n".join([OPEN, *route, CLOSE])
    return Draft((user(prompt),), answer, tuple(route))
