"""Answers to questions of known answer, under every configuration and densely."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import records
from benchmarks.quality.harness.configurations import Configuration
from benchmarks.quality.harness.engine import DENSE, Engine, engine_of
from benchmarks.quality.harness.questions import Questions
from benchmarks.quality.harness.scores import ANSWERS, DENSE_NAME

Job = tuple[Questions, Configuration]
Key = tuple[str, int, str, str]


class Answers:
    """The measurement of some suites, resumed from what a file holds.

    Args:
        out: JSON Lines; a record for each suite, length and configuration.
        setup: What has to be equal for two records to be of one measurement.
        share: The budget's share of the length, for the records.
        start: Starts an engine with the settings given.
    """

    def __init__(
        self,
        out: Path,
        setup: dict[str, Any],
        share: float,
        start: Callable[[dict[str, Any]], Engine],
    ) -> None:
        self.out, self.setup, self.share, self.start = out, setup, share, start
        self.done: set[Key] = {
            _key(record["cell"], record["tasks"], record["name"], record["settings"])
            for record in records.read(out)
            if record.get("measure") == ANSWERS and record["setup"] == setup
        }

    def run(self, work: Sequence[tuple[Questions, list[Configuration]]]) -> None:
        """Ask whatever was not asked yet, densely first.

        Methods that keep something of every key need an engine of their own; all
        others share one.
        """
        engines: dict[str, list[Job]] = defaultdict(list)
        for questions, configurations in work:
            for made in [Configuration(DENSE_NAME, DENSE), *configurations]:
                if self._key(questions, made) not in self.done:
                    engines[engine_of(made.settings)].append((questions, made))
        # Started sparsely, and dense comes first: the prefix cache then never hands out
        # what sparse layers wrote.
        for _, jobs in sorted(engines.items()):
            self._one_engine(jobs[-1][1].settings, jobs)

    def _one_engine(self, settings: dict[str, Any], jobs: Sequence[Job]) -> None:
        engine = self.start(settings)
        try:
            bar = tqdm(jobs, desc="Asking", file=sys.stderr, dynamic_ncols=True)
            for questions, made in bar:
                bar.set_postfix_str(f"{questions.suite} {made.name}")
                self._ask(engine, questions, made)
        finally:
            engine.close()

    def _ask(self, engine: Engine, questions: Questions, made: Configuration) -> None:
        engine.configure(made.settings)
        begun = time.monotonic()
        scores = questions.scores(
            lambda prompts, limits: engine.answer(prompts, limits, stop=True)
        )
        record = {
            "benchmark": "quality",
            "measure": ANSWERS,
            "setup": self.setup,
            "cell": self._cell(questions),
            "suite": questions.suite,
            "length": questions.length,
            "share": self.share,
            "name": made.name,
            "budget": made.budget,
            "settings": made.settings,
            "kv_read": engine.kv_read(made.settings, questions.length),
            "tasks": questions.tasks,
            "scores": [round(score, 5) for score in scores],
            "seconds": round(time.monotonic() - begun, 2),
        }
        records.append(self.out, record)
        self.done.add(self._key(questions, made))

    def _cell(self, questions: Questions) -> str:
        return f"{questions.suite}:{questions.length}:{self.share:g}"

    def _key(self, questions: Questions, made: Configuration) -> Key:
        cell = self._cell(questions)
        return _key(cell, questions.tasks, made.name, made.settings)


def _key(cell: str, tasks: int, name: str, settings: dict[str, Any]) -> Key:
    return cell, tasks, name, json.dumps(settings, sort_keys=True)
