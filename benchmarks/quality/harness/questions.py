"""Questions of known answer: prompts for an engine, and scores of what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.quality.suites import (
    SUITES,
    TURN_END,
    Task,
    flatten,
    make,
    score,
    whole_conversation,
)
from benchmarks.quality.suites.task import Message, assistant, user
from tidal_vllm.planted import PlantedPrompt, load_spec, make_prompt

PLANTED = "planted"
Answer = Callable[[list[list[int]], list[int]], list[list[int]]]
"""Prompts and the most tokens of each answer, to the answers: token ids."""


class Questions(Protocol):
    """Some tasks of one suite at one length.

    Attributes:
        suite: A name of `SUITES`, or `PLANTED`.
        length: Tokens of a prompt, at most.
        tasks: How many.
        room: Tokens of the longest sequence, answers included.
    """

    suite: str
    length: int
    tasks: int
    room: int

    def scores(self, answer: Answer) -> list[float]:
        """Ask all tasks, those of one turn together, and score each, 0 to 1."""


class PlantedQuestions:
    """Needles at depths spread evenly over the prompt; only the exact answer scores."""

    suite = PLANTED

    def __init__(self, prompts: Sequence[PlantedPrompt], length: int) -> None:
        self.prompts, self.length, self.tasks = prompts, length, len(prompts)
        self.room = length + max(len(p.answer_token_ids) for p in prompts)

    def scores(self, answer: Answer) -> list[float]:
        answers = answer(
            [p.prompt_token_ids for p in self.prompts],
            [len(p.answer_token_ids) for p in self.prompts],
        )
        pairs = zip(answers, self.prompts, strict=True)
        return [float(given == p.answer_token_ids) for given, p in pairs]


class SuiteQuestions:
    """Tasks of a suite, asked through the chat template or else as plain text."""

    def __init__(self, tasks: Sequence[Task], length: int, tokenizer: Any) -> None:
        self.of, self.length, self.tasks = tasks, length, len(tasks)
        self.tokenizer = tokenizer
        self.suite = tasks[0].suite
        # A model may say more than the perfect one, which `whole_conversation` quotes.
        self.room = max(
            len(self._encode(whole_conversation(task)))
            + (1 + len(task.follow_ups)) * task.max_new_tokens
            for task in tasks
        )

    def scores(self, answer: Answer) -> list[float]:
        talks: list[list[Message]] = [list(task.messages) for task in self.of]
        said: list[list[str]] = [[] for _ in self.of]
        for turn in range(1 + max(len(task.follow_ups) for task in self.of)):
            asked = [
                i for i, task in enumerate(self.of) if turn <= len(task.follow_ups)
            ]
            answers = answer(
                [self._encode(talks[i]) for i in asked],
                [self.of[i].max_new_tokens for i in asked],
            )
            for i, token_ids in zip(asked, answers, strict=True):
                text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
                said[i].append(text.replace(TURN_END, " "))
                further = self.of[i].follow_ups[turn : turn + 1]
                talks[i] += [assistant(said[i][-1]), *map(user, further)]
        pairs = zip(self.of, said, strict=True)
        return [score(task, TURN_END.join(outputs)) for task, outputs in pairs]

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer(flatten(messages), verbose=False)["input_ids"]
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return _plain(self.tokenizer, text)


def questions(
    model: str, tokenizer: Any, suite: str, length: int, tasks: int, longest: int
) -> Questions:
    """The first so many tasks of a suite: seeds 0, 1, ...

    Args:
        model: A Hugging Face folder or name; planted questions need a planted model's.
        tokenizer: The model's, of transformers.
        longest: Tokens of a sequence that the model reads.

    Raises:
        ValueError: Unknown suite, no task, planted questions for another model, or a
            length that is too short for the suite or too long for the model.
    """
    if suite not in SUITES and suite != PLANTED:
        allowed = ", ".join([PLANTED, *SUITES])
        raise ValueError(f"--suites {suite}: must be among {allowed}")
    if tasks < 1:
        raise ValueError(f"--tasks {tasks}: must be 1 or more")
    # Before prompts are made that nothing reads.
    _check_room(suite, length, length + 1, longest)
    found: Questions
    if suite == PLANTED:
        found = PlantedQuestions(_planted(model, length, tasks), length)
    else:
        try:
            made = [
                make(suite, length, seed, lambda text: len(_plain(tokenizer, text)))
                for seed in range(tasks)
            ]
        except ValueError as error:
            raise ValueError(f"--lengths {length}: {error}") from error
        found = SuiteQuestions(made, length, tokenizer)
    _check_room(suite, length, found.room, longest)
    return found


def _planted(model: str, length: int, tasks: int) -> list[PlantedPrompt]:
    if not Path(model).is_dir():
        raise ValueError(f"--suites {PLANTED}: {model} is no planted model's folder")
    try:
        spec = load_spec(model)
    except ValueError as error:
        raise ValueError(f"--suites {PLANTED}: {error}") from error
    try:
        return [
            make_prompt(spec, length, depth=(seed + 0.5) / tasks, seed=seed)
            for seed in range(tasks)
        ]
    except ValueError as error:
        raise ValueError(f"--lengths {length}: {error}") from error


def _check_room(suite: str, length: int, room: int, longest: int) -> None:
    if room > longest:
        raise ValueError(
            f"--lengths {length}: {suite} needs {room} tokens with its answers, and "
            f"this model reads {longest} at most"
        )


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without what a tokenizer puts around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
