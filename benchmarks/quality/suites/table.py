"""The table of suites, and `make`, which makes a task of one of them."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.suites import (
    countdown,
    graphwalks,
    json_kv,
    mrcr,
    multi_turn,
    needles,
    path_traversal,
    tracking,
    words,
)
from benchmarks.quality.suites.filling import largest
from benchmarks.quality.suites.metrics import METRICS
from benchmarks.quality.suites.task import (
    TURN_END,
    CountTokens,
    Draft,
    Suite,
    Task,
    flatten,
    random_of,
    whole_conversation,
)

_RULER = "RULER, arXiv 2404.06654"
_LONGPROC = "LongProc, arXiv 2501.05414"


def _needles(asks: str, **settings: Any) -> Suite:
    return Suite(needles.draft, asks, _RULER, "strings_found", settings)


SUITES = {
    "niah_single_1": _needles("one number in noise", haystack="noise"),
    "niah_single_2": _needles("one number in prose", haystack="essay"),
    "niah_single_3": _needles("one UUID in prose", haystack="essay", values="uuids"),
    "niah_multikey_1": _needles(
        "one number of four keys in prose", haystack="essay", num_keys=4
    ),
    "niah_multikey_2": _needles("one number among needles", haystack="needles"),
    "niah_multikey_3": _needles(
        "one UUID of a UUID among needles",
        haystack="needles",
        keys="uuids",
        values="uuids",
    ),
    "niah_multivalue": _needles(
        "the four numbers of one key in prose", haystack="essay", num_values=4
    ),
    "niah_multiquery": _needles(
        "the numbers of four keys in prose",
        haystack="essay",
        num_keys=4,
        num_queries=4,
    ),
    "variable_tracking": Suite(
        tracking.draft,
        "the variables of one of two chains of copies",
        _RULER,
        "strings_found",
        {"chains": 2, "hops": 4},
        talk=16,
    ),
    "common_words": Suite(
        words.common,
        "the ten words that stand most often in a list",
        _RULER,
        "strings_found",
        {"num_common": 10, "common_count": 30, "other_count": 3},
    ),
    "frequent_words": Suite(
        words.frequent,
        "the three most frequent words of a zeta distribution",
        _RULER,
        "strings_found",
        {"alpha": 2.0},
    ),
    "graphwalks_bfs": Suite(
        graphwalks.frontier,
        "the nodes at distance 3 from a node",
        "GraphWalks, OpenAI 2025",
        "set_f1",
        {"depth": 3, "degree": 2},
        talk=512,
    ),
    "graphwalks_parents": Suite(
        graphwalks.parents,
        "the nodes with an edge to a node",
        "GraphWalks, OpenAI 2025",
        "set_f1",
        {"degree": 2},
        talk=512,
    ),
    "mrcr": Suite(
        mrcr.draft,
        "its i-th answer to one of four equal requests",
        "MRCR, arXiv 2409.12640 and OpenAI 2025",
        "prefixed_ratio",
        {"needles": 4, "sentences": 4},
    ),
    "countdown": Suite(
        countdown.draft,
        "a search for equations, line by line",
        _LONGPROC,
        "leading_lines",
        {"min_lines": 24, "max_lines": 48},
    ),
    "path_traversal": Suite(
        path_traversal.draft,
        "a route of 16 steps, line by line",
        _LONGPROC,
        "leading_lines",
        {"hops": 16},
    ),
    "json_kv": Suite(
        json_kv.draft,
        "the value of one key of a JSON object",
        "HELMET, arXiv 2410.02694",
        "substring_exact_match",
    ),
    "multi_turn": Suite(
        multi_turn.draft,
        "four of eight facts told in a conversation, one a turn",
        "this project",
        "each_turn",
        {"facts": 8, "questions": 4, "sentences": 4},
    ),
}
"""By name; the eight `niah_*` have the names and settings of RULER's tasks."""


def make(
    suite: str, length: int, seed: int, count_tokens: CountTokens, **settings: Any
) -> Task:
    """A task whose prompt fits into a length and fills it.

    Equal arguments give equal tasks, in any process and on any machine, for one minor
    release of Python: its `random` may draw differently in another.

    Args:
        suite: A name of `SUITES`.
        length: Tokens of the prompt, and with follow-ups of the whole conversation.
            The chat template's own come on top.
        count_tokens: Of a text; by any tokenizer. It is called a few times on texts
            of about `length` tokens.
        settings: In place of the suite's own; the recipe's docstring says which.

    Raises:
        ValueError: Unknown suite or setting, or a length that is too short.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} must be one of {', '.join(SUITES)}")
    recipe = SUITES[suite]
    known = recipe.draft.__kwdefaults__ or {}
    unknown = settings.keys() - known.keys() - recipe.settings.keys()
    if unknown:
        allowed = ", ".join(sorted({*known, *recipe.settings})) or "none"
        raise ValueError(
            f"suite {suite!r} has no setting {min(unknown)!r}; its settings: {allowed}"
        )
    settings = {**recipe.settings, **settings}
    drafts: dict[int, Draft] = {}

    def count(size: int) -> int:
        drafts[size] = recipe.draft(random_of(suite, seed), size, **settings)
        return count_tokens(flatten(whole_conversation(drafts[size])))

    size = largest(count, length)
    if size is None:
        raise ValueError(
            f"length={length} is too short for suite {suite!r}: with seed {seed} its "
            f"smallest prompt has {count(0)} tokens"
        )
    draft = drafts[size]
    turns = draft.answer.split(TURN_END) if draft.follow_ups else [draft.answer]
    return Task(
        suite=suite,
        name=f"{suite}-{length}-{seed}",
        seed=seed,
        messages=draft.messages,
        answer=draft.answer,
        references=draft.references,
        metric=recipe.metric,
        max_new_tokens=max(map(count_tokens, turns)) + recipe.talk,
        follow_ups=draft.follow_ups,
    )


def score(task: Task, output: str) -> float:
    """How right an output is, 0 to 1, by the task's metric; 1 for `task.answer`."""
    return METRICS[task.metric](output, task.references)
