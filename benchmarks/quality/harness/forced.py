"""Forced decoding of natural text under every configuration, kept as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import records
from benchmarks.quality.harness.cells import Cell
from benchmarks.quality.harness.compare import Pass
from benchmarks.quality.harness.configurations import Configuration
from benchmarks.quality.harness.engine import DENSE, Engine, engine_of
from benchmarks.quality.harness.texts import Cut
from tidal_vllm.demo.engines import equal_tokens

QUARTERS = 4
FORCED, GREEDY = "forced", "greedy"
Key = tuple[str, str, str, str, int, int]
Job = tuple[Cell, list[Configuration], list[Cut], int]


class Forced:
    """The measurement of some cells, resumed from what a file holds.

    Args:
        out: JSON Lines; a record for each cell, configuration and group of sequences.
        setup: What has to be equal for two records to be of one measurement: the
            model, its dtype, the text.
        group: Sequences that decode together.
        start: Starts an engine with the settings given.
        greedy: Tokens of a free continuation, greedily; 0: none.
    """

    def __init__(
        self,
        out: Path,
        setup: dict[str, Any],
        group: int,
        start: Callable[[dict[str, Any]], Engine],
        greedy: int = 0,
    ) -> None:
        self.out, self.setup, self.group, self.start = out, setup, group, start
        self.greedy = greedy
        self.later: set[tuple[str, int]] = set()
        self.references: dict[tuple[str, int], torch.Tensor] = {}
        self.continued: dict[tuple[str, int], list[list[int]]] = {}
        self.done: set[Key] = {
            _key(record)
            for record in records.read(out)
            if record.get("measure") in (FORCED, GREEDY) and record["setup"] == setup
        }

    def run(self, work: Sequence[tuple[Cell, list[Configuration], list[Cut]]]) -> None:
        """Measure whatever is missing.

        Methods that keep something of every key need an engine of their own; all
        others share one.
        """
        engines: dict[str, dict[str, Any]] = {}
        for _, configurations, _ in work:
            for made in configurations:
                engines.setdefault(engine_of(made.settings), made.settings)
        # The shared engine first: it makes the references of all. Started sparsely, so
        # that the prefix cache never hands out what sparse layers wrote.
        jobs: dict[str, list[Job]] = {name: [] for name in sorted({"", *engines})}
        for name, mine in jobs.items():
            for cell, found, texts in work:
                own = [c for c in found if engine_of(c.settings) == name]
                asked = own if name else found
                mine += [(cell, own, texts, i) for i in self._groups(cell, asked)]
        self.later = {
            (cell.name, first)
            for name, mine in jobs.items()
            for cell, _, _, first in mine
            if name
        }
        for name, mine in jobs.items():
            if mine:
                self._one_engine(engines.get(name, DENSE), mine)

    def _one_engine(self, settings: dict[str, Any], jobs: Sequence[Job]) -> None:
        engine = self.start(settings)
        try:
            bar = tqdm(jobs, desc="Forcing", file=sys.stderr, dynamic_ncols=True)
            for cell, configurations, texts, first in bar:
                bar.set_postfix_str(cell.name)
                self._one_group(engine, cell, configurations, texts, first)
        finally:
            engine.close()

    def _groups(self, cell: Cell, asked: list[Configuration]) -> Iterator[int]:
        """Where the groups begin that lack something."""
        for first in range(0, cell.sequences, self.group):
            if any(self._lacks(cell, made, first) for made in asked):
                yield first

    def _lacks(
        self, cell: Cell, made: Configuration, first: int, measure: str | None = None
    ) -> bool:
        measures = [measure] if measure else [FORCED] + [GREEDY] * bool(self.greedy)
        place = {
            "cell": cell.name,
            "name": made.name,
            "settings": made.settings,
            "first": first,
        }
        asked = {FORCED: {}, GREEDY: {"of": self.greedy}}
        return any(
            _key(place | {"measure": measure} | asked[measure]) not in self.done
            for measure in measures
        )

    def _one_group(
        self,
        engine: Engine,
        cell: Cell,
        configurations: list[Configuration],
        texts: list[Cut],
        first: int,
    ) -> None:
        cuts = texts[first : first + self.group]
        prompts = [cut.prompt for cut in cuts]
        tokens = [cut.continuation for cut in cuts]
        engine.warm(prompts)
        reference = self.references.get((cell.name, first))
        if reference is None:
            engine.configure(DENSE)
            dense = engine.force(prompts, tokens, None)
            reference = dense.kept
            assert reference is not None
            if (cell.name, first) in self.later:
                # Not on the device, where those of many groups would not fit.
                self.references[cell.name, first] = reference.cpu()
            if self.greedy:
                answers = engine.answer(prompts, [self.greedy] * len(prompts), False)
                self.continued[cell.name, first] = answers
            configurations = [Configuration("dense", DENSE), *configurations]
        for made in configurations:
            place = {
                "setup": self.setup,
                "cell": cell.name,
                "name": made.name,
                "budget": made.budget,
                "settings": made.settings,
                "kv_read": engine.kv_read(made.settings, cell.middle),
                "first": first,
            }
            if not self._lacks(cell, made, first):
                continue
            engine.configure(made.settings)
            begun = time.monotonic()
            if self._lacks(cell, made, first, FORCED):
                found = compared(engine.force(prompts, tokens, reference))
                self._keep(FORCED, place, found, begun)
            if self.greedy and self._lacks(cell, made, first, GREEDY):
                begun = time.monotonic()
                answers = engine.answer(prompts, [self.greedy] * len(prompts), False)
                dense = self.continued[cell.name, first]
                pairs = zip(answers, dense, strict=True)
                equal = [equal_tokens(*pair) for pair in pairs]
                self._keep(GREEDY, place, {"equal": equal, "of": self.greedy}, begun)

    def _keep(self, measure: str, place: dict, found: dict, begun: float) -> None:
        kind = {"benchmark": "quality", "measure": measure}
        seconds = round(time.monotonic() - begun, 2)
        record = kind | place | found | {"seconds": seconds}
        records.append(self.out, record)
        self.done.add(_key(record))


def compared(found: Pass) -> dict[str, Any]:
    """What is kept of a pass: sums over each sequence, means over each quarter.

    Raises:
        RuntimeError: The engine did not show every step.
    """
    # The first token comes of the prompt, densely.
    seen = found.kl, found.agreed, found.nll
    kl, agreed, nll = (part[:, 1:].cpu() for part in seen)
    if not (kl.isfinite().all() and nll.isfinite().all()):
        raise RuntimeError("some steps of the pass went unseen")
    count = min(QUARTERS, kl.shape[1])
    split = (part.tensor_split(count, dim=1) for part in (kl, agreed))
    return {
        "tokens": kl.shape[1],
        "kl": _rounded(kl.sum(1), 6),
        "agreed": [int(n) for n in agreed.sum(1)],
        "nll": _rounded(nll.sum(1), 5),
        "quarters": [
            {"kl": round(float(k.mean()), 7), "agreed": round(float(a.mean()), 5)}
            for k, a in zip(*split, strict=True)
        ],
        "kl_p99": round(float(kl.flatten().quantile(0.99)), 6),
    }


def _key(record: dict[str, Any]) -> Key:
    """What was measured: settings may stand under names, continuations in lengths."""
    settings = json.dumps(record["settings"], sort_keys=True)
    named = record["measure"], record["cell"], record["name"]
    return *named, settings, record["first"], record.get("of", 0)


def _rounded(values: torch.Tensor, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
