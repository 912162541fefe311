"""RULER's variable tracking: which variables hold a value, through chains of copies.

Source: arXiv 2404.06654 (RULER), task `vt`: chains of `VAR X1 = 12345`,
`VAR X2 = VAR X1`, ... in a haystack of noise, each chain in its order; the model is
asked for all variables that hold one value.

Unlike in RULER, whose task has one chain, the default is two: with one, each variable
in the text is right. There is no worked example in front; the prompt is in our words.
"""

from __future__ import annotations

import random
import string

from benchmarks.quality.suites import prose
from benchmarks.quality.suites.needles import scatter
from benchmarks.quality.suites.task import Draft, user

_LETTERS = 5


def draft(rng: random.Random, size: int, *, chains: int = 2, hops: int = 4) -> Draft:
    """Chains of `hops + 1` variables each, of which one is asked for.

    Args:
        size: Times that the noise is repeated, besides once for each assignment.
    """
    names: dict[str, None] = {}
    while len(names) < chains * (hops + 1):
        names["".join(rng.choices(string.ascii_uppercase, k=_LETTERS))] = None
    variables, values = list(names), prose.numbers(rng, chains, 5)
    waiting = []
    for chain, value in enumerate(values):
        own = variables[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        lines = [f"VAR {own[0]} = {value}"]
        lines += [f"VAR {b} = VAR {a}" for a, b in zip(own, own[1:], strict=False)]
        waiting.append(lines)
    # A random order of all assignments in which each chain keeps its own.
    turns = [chain for chain in range(chains) for _ in range(hops + 1)]
    rng.shuffle(turns)
    assignments = [waiting[chain].pop(0) for chain in turns]
    lines = scatter(
        rng, assignments, [prose.NOISE] * (size + len(turns)), in_order=True
    )
    wanted = variables[: hops + 1]
    newline = "\n"
    prompt = (
        f"Variables are assigned in the text below, some of them from others. Keep "
        f"track of what each holds.\n\n{newline.join(lines)}\n\n"
        f"Which {hops + 1} variables hold the value {values[0]}? Answer with their "
        f"names alone."
    )
    return Draft((user(prompt),), " ".join(wanted), tuple(wanted))
