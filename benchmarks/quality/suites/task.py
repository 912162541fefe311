"""What a suite makes: a task, its conversation, and how it is asked turn by turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""`role` and `content`, as in the chat API of `vllm serve`."""
CountTokens = Callable[[str], int]
TURN_END = "\x1e"
"""Between the outputs of a task with follow-ups: ASCII's record separator, which no
model prints and `converse` removes where one does."""


@dataclass(frozen=True)
class Draft:
    """One prompt of a recipe at one size, not yet known to fit.

    Attributes:
        messages: The conversation up to the first question, from the user last.
        answer: What a perfect model prints; with follow-ups, the answers of all turns
            joined by `TURN_END`.
        references: What the metric compares an output with.
        follow_ups: The user's further questions, each asked after the model's answer
            to the one before.
    """

    messages: tuple[Message, ...]
    answer: str
    references: tuple[str, ...]
    follow_ups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One question of known answer.

    Attributes:
        suite: A name of `SUITES`, or the data set that a file holds.
        name: Unique among the tasks of all suites, lengths and seeds; settings that
            are not the suite's own do not show in it.
        seed: What it was made from; of a task from a file, its line number.
        metric: A name of `METRICS`.
        max_new_tokens: Output tokens per turn: the answer, and some words around it.

    The other attributes are those of `Draft`.
    """

    suite: str
    name: str
    seed: int
    messages: tuple[Message, ...]
    answer: str
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    follow_ups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A recipe in the table of suites.

    Attributes:
        draft: `draft(rng, size, **settings)` gives the prompt with `size` items (of a
            recipe's own kind) more than the smallest one; longer with the size.
        asks: What the model is asked, for the table.
        source: Where the recipe comes from.
        metric: A name of `METRICS`.
        settings: The recipe's keyword arguments and their defaults.
        talk: Output tokens that a task allows besides those of the answer.
    """

    draft: Callable[..., Draft]
    asks: str
    source: str
    metric: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    talk: int = 32


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def flatten(messages: Sequence[Message]) -> str:
    """A conversation as one text: what `length` counts, and what base models read.

    One message is its content; of several, each has its role in front.
    """
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def whole_conversation(draft: Draft | Task) -> list[Message]:
    """All that a perfect model has read when it is asked the last question."""
    messages = list(draft.messages)
    answers = draft.answer.split(TURN_END)
    for answer, question in zip(answers, draft.follow_ups, strict=False):
        messages += [assistant(answer), user(question)]
    return messages


def converse(task: Task, ask: Callable[[list[Message]], str]) -> str:
    """Ask a task, turn by turn, and give the output that `score` takes.

    Args:
        ask: The model: from a conversation to its next message. It is called once,
            and once more for each follow-up, with its own answers in between.
    """
    messages = list(task.messages)
    outputs = [ask(list(messages)).replace(TURN_END, " ")]
    for question in task.follow_ups:
        messages += [assistant(outputs[-1]), user(question)]
        outputs.append(ask(list(messages)).replace(TURN_END, " "))
    return TURN_END.join(outputs)


def random_of(suite: str, seed: int) -> random.Random:
    """The source of everything random in one task."""
    return random.Random(f"{suite}/{seed}")
