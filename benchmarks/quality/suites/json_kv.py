"""HELMET's recall from JSON: the value of one key among many.

Source: "HELMET: How to Evaluate Long-Context Language Models Effectively and
Thoroughly", arXiv 2410.02694, task JSON KV, which follows "Lost in the Middle: How
Language Models Use Long Contexts", arXiv 2307.03172. Keys and values are random UUIDs;
the key that is asked for stands at any place with the same probability. The metric is
substring exact match. Unlike in HELMET, the prompt has no worked examples and is in
our own words.
"""

from __future__ import annotations

import json
import random

from benchmarks.quality.suites import prose
from benchmarks.quality.suites.task import Draft, user


def draft(rng: random.Random, size: int) -> Draft:
    """An object of `size + 2` pairs, one a line."""
    keys = prose.uuids(rng, size + 2)
    values = prose.uuids(rng, size + 2)
    asked = rng.randrange(size + 2)
    pairs = json.dumps(dict(zip(keys, values, strict=True)), indent=0)
    prompt = (
        f"Below is a JSON object.\n\n{pairs}\n\n"
        f'Which value does the key "{keys[asked]}" have in the object above? Answer '
        "with the value alone."
    )
    return Draft((user(prompt),), values[asked], (values[asked],))
