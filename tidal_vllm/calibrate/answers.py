"""Dense answers, and how often settings agree with them; each is saved as it comes."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from tidal_vllm.calibrate.candidates import Candidate
from tidal_vllm.calibrate.engine import CalibrationEngine, complete_settings
from tidal_vllm.calibrate.evidence import evidence_needed
from tidal_vllm.calibrate.result import Job, Measured, NotCalibrated, roles_of
from tidal_vllm.calibrate.state import State
from tidal_vllm.config import TidalConfig

# A setting that loses a little less than is allowed takes ever more tokens to tell. At
# most this many times the tokens are asked for that a setting without a loss takes.
MOST_EVIDENCE = 4


class Answers:
    """The model's answers to the prompts of a job and to others like them.

    Args:
        start_engine: Called once, as soon as something has to be asked.

    Attributes:
        layers: Indices of the layers that take part, ascending; known once the job's
            prompts were recorded.
        tokens: The tokens of each dense answer, by the prompt's number.
    """

    def __init__(
        self, job: Job, state: State, start_engine: Callable[[], CalibrationEngine]
    ) -> None:
        self.job, self.state = job, state
        self._start, self._engine = start_engine, None
        self._prompts = list(job.prompts)
        self.layers: tuple[int, ...] = ()
        self.tokens: list[list[int]] = []
        self._right: list[bool] = []
        self._logprobs: list[list[float]] = []

    @property
    def engine(self) -> CalibrationEngine:
        if self._engine is None:
            self._engine = self._start()
        return self._engine

    def settings(self, config: TidalConfig, candidate: Candidate) -> dict[str, Any]:
        """`additional_config["tidal"]` for a config with a candidate's layers."""
        return complete_settings(config, *roles_of(self.layers, candidate))

    def record(
        self, settings: list[dict[str, Any]]
    ) -> tuple[Measured, list[dict[str, np.ndarray]]]:
        """Answer the job's prompts densely, and record every decode step.

        Args:
            settings: Keywords of `TidalConfig` to record for, the main setting first.

        Returns:
            How dense attention did, and per prompt with a decode step what
            `recorder.merge_ranks` returns.

        Raises:
            NotCalibrated: Nothing was decoded, or there is nothing to choose from.
        """
        job, state, records = self.job, self.state, []
        if any(state.reply(f"dense {i}") is None for i in range(len(job.prompts))):
            _ = self.engine  # started here, so that the bar counts prompts only
        bar = _progress(len(job.prompts), "Recording dense attention")
        for i, prompt in enumerate(job.prompts):
            key = f"dense {i}"
            if state.reply(key) is None:
                reply, recorded = self.engine.record(
                    prompt.token_ids, self._wanted(i), settings, state.folder
                )
                if recorded is not None:
                    state.save_recorded(i, recorded)
                saved = dataclasses.asdict(reply) | {"layers": self.engine.layers}
                state.save_replies({key: saved})
            self.layers = tuple(state.reply(key)["layers"])
            self._keep(i)
            if len(self.tokens[i]) > 1:
                records.append(state.recorded(i))
            bar.update()
        bar.close()
        if not records:
            raise NotCalibrated(
                "the model ended every answer with its first token: nothing was "
                "decoded; give other --prompts"
            )
        if len(self.layers) < 2:
            raise NotCalibrated(
                f"only layers {list(self.layers)} attend to the whole sequence: none "
                "could use another's selection"
            )
        everything = range(len(job.prompts))
        answers = [(i, [True] * (len(self.tokens[i]) - 1), 0.0) for i in everything]
        return self._sum(answers), records

    def measure(
        self, title: str, settings: Sequence[dict], count: int | None = None
    ) -> list[Measured]:
        """Run prompts under each of the settings, a batch of prompts at a time.

        Args:
            title: What the progress bar says.
            settings: As `self.settings` makes them.
            count: Number of prompts, the first ones; None: those recorded.

        Returns:
            Per setting, how it did.
        """
        everything = range(len(self.job.prompts) if count is None else count)
        decoded = [i for i in everything if len(self.tokens[i]) > 1]
        names = [json.dumps(setting, sort_keys=True) for setting in settings]
        with _progress(len(decoded) * len(settings), title) as bar:
            asked = [i for i in decoded if any(self._untried(i, n) for n in names)]
            bar.update((len(decoded) - len(asked)) * len(settings))
            for batch in self._batches(asked):
                for name, setting in zip(names, settings, strict=True):
                    self._try([i for i in batch if self._untried(i, name)], setting)
                    bar.update(len(batch))
        return [self._sum([self._tried(i, name) for i in everything]) for name in names]

    def _untried(self, i: int, name: str) -> bool:
        return self.state.reply(_trial(i, name)) is None

    def _batches(self, numbers: Sequence[int]) -> list[list[int]]:
        """Prompts that the engine takes at once, by their numbers."""
        if not numbers:
            return []
        lengths = [len(self._prompts[i].token_ids) + self._wanted(i) for i in numbers]
        batches = self.engine.batches(lengths)
        return [[numbers[k] for k in batch] for batch in batches]

    def _try(self, numbers: Sequence[int], setting: dict[str, Any]) -> None:
        """Decode the dense answers to a batch of prompts under a setting."""
        if not numbers:
            return
        prompts = [self._prompts[i].token_ids for i in numbers]
        tokens = [self.tokens[i] for i in numbers]
        name = json.dumps(setting, sort_keys=True)
        replies = self.engine.trials(prompts, tokens, setting)
        self.state.save_replies(
            {
                _trial(i, name): dataclasses.asdict(reply)
                for i, reply in zip(numbers, replies, strict=True)
            }
        )

    def _tried(self, i: int, name: str) -> tuple[int, list[bool], float]:
        """A prompt's number, which steps agreed, and the log probability lost."""
        if len(self.tokens[i]) <= 1:
            return i, [], 0.0
        saved = self.state.reply(_trial(i, name))
        drop = sum(self._logprobs[i][1:]) - sum(saved["logprobs"][1:])
        return i, saved["agreed"][1:], drop

    def confirm(self, setting: dict[str, Any]) -> Measured:
        """Measure a setting over ever more prompts, until it is sure to hold.

        Ends too where the setting loses too much, where `MOST_EVIDENCE` is reached,
        and where the job has no further prompts.
        """
        job, title = self.job, "Confirming with more prompts"
        limit = MOST_EVIDENCE * evidence_needed(0, job.max_loss)
        (found,) = self.measure(title, [setting])
        while missing := found.missing(job.max_loss):
            too_many = found.steps >= limit or not found.promises(job.max_loss)
            if job.further is None or too_many:
                break
            more = math.ceil(missing / found.steps * found.prompts)
            self._ask_further(found.prompts + more)
            count = min(found.prompts + more, len(self.tokens))
            if count == found.prompts:  # there are no others
                break
            (found,) = self.measure(title, [setting], count)
        return found

    def _ask_further(self, count: int) -> None:
        """Answer further prompts densely until `count` prompts are answered."""
        first = len(self.tokens)
        for i in range(first, count):
            if (prompt := self.job.further(i)) is None:
                break
            self._prompts.append(prompt)
        numbers = range(first, len(self._prompts))
        unknown = [i for i in numbers if self.state.reply(f"dense {i}") is None]
        with _progress(len(numbers), "Answering more prompts densely") as bar:
            bar.update(len(numbers) - len(unknown))
            for batch in self._batches(unknown):
                prompts = [self._prompts[i].token_ids for i in batch]
                replies = self.engine.answers(prompts, list(map(self._wanted, batch)))
                saved = zip(batch, map(dataclasses.asdict, replies), strict=True)
                self.state.save_replies({f"dense {i}": reply for i, reply in saved})
                bar.update(len(batch))
        for i in numbers:
            self._keep(i)

    def _wanted(self, i: int) -> int:
        return len(self._prompts[i].answer_ids or ()) or self.job.decode_tokens

    def _keep(self, i: int) -> None:
        saved = self.state.reply(f"dense {i}")
        self.tokens.append(saved["token_ids"])
        self._logprobs.append(saved["logprobs"])
        prompt = self._prompts[i]
        self._right.append(prompt.is_right(saved["token_ids"], self.job.decode))

    def _sum(self, answers: list[tuple[int, list[bool], float]]) -> Measured:
        steps = sum(len(agreed) for _, agreed, _ in answers)
        return Measured(
            prompts=len(answers),
            steps=steps,
            agreed=sum(sum(agreed) for _, agreed, _ in answers),
            judged=sum(self._prompts[i].judged for i, _, _ in answers),
            right=sum(self._right[i] and all(agreed) for i, agreed, _ in answers),
            dense_right=sum(self._right[i] for i, _, _ in answers),
            lost_logprob=sum(drop for _, _, drop in answers) / max(steps, 1),
        )


def _trial(i: int, name: str) -> str:
    """The key of a prompt's trial under a setting."""
    return f"trial {i} {name}"


def _progress(count: int, title: str) -> tqdm:
    """A bar with the time left."""
    bar = "{desc:<40.40} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} "
    bar += "[{elapsed}, {remaining} left]"
    return tqdm(
        total=count, desc=title, bar_format=bar, file=sys.stderr, dynamic_ncols=True
    )
