"""The metrics: from an output and a task's references to a number in 0..1."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from difflib import SequenceMatcher

from benchmarks.quality.suites.task import TURN_END

OPEN, CLOSE = "<answer>", "</answer>"
"""Around the lines that `leading_lines` compares."""
FINAL = "Final Answer:"
"""In front of the list that `set_f1` compares."""


def strings_found(output: str, references: Sequence[str]) -> float:
    """Share of the references that the output contains, in upper or lower case.

    RULER's match of "all" strings, which it uses for every task that it makes by code;
    its match of "part" belongs to question answering, which needs its data sets. Wrong
    strings cost nothing: it is `max_new_tokens` that keeps a model from listing all.
    """
    low = output.lower()
    return sum(r.lower() in low for r in references) / len(references)


def set_f1(output: str, references: Sequence[str]) -> float:
    """F1 of two sets: the references, and the list in the output's last line.

    The line is `Final Answer: [a, b]`, as in GraphWalks; anything else is no set.
    """
    last = output.rstrip().rpartition("\n")[2]
    match = re.search(rf"{FINAL} ?\[(.*)\]", last)
    if not match:
        return 0.0
    found = {item.strip() for item in match[1].split(",") if item.strip()}
    right = len(found & set(references))
    return 2 * right / (len(found) + len(set(references)))


def prefixed_ratio(output: str, references: Sequence[str]) -> float:
    """difflib's ratio of what follows the prefix; 0 where the prefix is not in front.

    Args:
        references: The prefix, and the text that follows it.
    """
    prefix, wanted = references
    if not output.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, output.removeprefix(prefix), wanted).ratio()


def leading_lines(output: str, references: Sequence[str]) -> float:
    """Share of the lines that are right, up to the first that is not.

    Lines are those between `<answer>` and `</answer>`, or the end of the output where
    the model did not come so far. Empty lines and indentation do not count. Lines
    beyond the right ones do: the score is 1 only for an output that ends in time.
    """
    if OPEN not in output:
        return 0.0
    inner = output.partition(OPEN)[2].partition(CLOSE)[0]
    lines = [line.strip() for line in inner.splitlines() if line.strip()]
    right = 0
    for line, wanted in zip(lines, references, strict=False):
        if line != wanted.strip():
            break
        right += 1
    return right / max(len(lines), len(references))


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and runs of spaces, as in SQuAD."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def substring_exact_match(output: str, references: Sequence[str]) -> float:
    """1 where the output contains a reference, both normalized; 0 otherwise."""
    found = normalized(output)
    return float(any(normalized(r) in found for r in references))


def each_turn(output: str, references: Sequence[str]) -> float:
    """Share of turns whose output contains the reference of this very turn."""
    turns = output.split(TURN_END)
    right = sum(r in turn for turn, r in zip(turns, references, strict=False))
    return right / len(references)


METRICS = {
    metric.__name__: metric
    for metric in (
        strings_found,
        set_f1,
        prefixed_ratio,
        leading_lines,
        substring_exact_match,
        each_turn,
    )
}
