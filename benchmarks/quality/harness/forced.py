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
from benchmarks.quality.harness.engine import DENSE, Engine, keeps_keys
from benchmarks.quality.harness.texts import Cut
from tidal_vllm.plan.steps import kv_read_share

QUARTERS = 4
Key = tuple[str, str, int]


class Forced:
    """The measurement of some cells, resumed from what a file holds.

    Args:
        out: JSON Lines; a record for each cell, configuration and group of sequences.
        setup: What has to be equal for two records to be of one measurement: the
            model, its dtype, the text.
        group: Sequences that decode together.
        start: Starts an engine with the settings given.
    """

    def __init__(
        self,
        out: Path,
        setup: dict[str, Any],
        group: int,
        start: Callable[[dict[str, Any]], Engine],
    ) -> None:
        self.out, self.setup, self.group, self.start = out, setup, group, start
        self.references: dict[tuple[str, int], torch.Tensor] = {}
        self.done: set[Key] = {
            self._key(record["cell"], record["settings"], record["first"])
            for record in records.read(out)
            if record.get("benchmark") == "quality" and record["setup"] == setup
        }

    def run(self, work: Sequence[tuple[Cell, list[Configuration], list[Cut]]]) -> None:
        """Measure whatever is missing.

        Methods that keep something of every key need an engine of their own; all
        others share one.
        """
        engines: dict[str, dict[str, Any]] = {}
        for _, configurations, _ in work:
            for made in configurations:
                engines.setdefault(_engine_of(made.settings), made.settings)
        # The shared engine first: it makes the references.
        for name in sorted(engines):
            mine = [
                (cell, [c for c in found if _engine_of(c.settings) == name], texts)
                for cell, found, texts in work
            ]
            if name and not any(self._missing(*job) for job in mine):
                continue
            self._one_engine(engines[name] if name else DENSE, mine)

    def _one_engine(self, settings: dict[str, Any], work) -> None:
        jobs = [(*job, i) for job in work for i in self._groups(*job)]
        if not jobs:
            return
        engine = self.start(settings)
        try:
            bar = tqdm(jobs, desc="Forcing", file=sys.stderr, dynamic_ncols=True)
            for cell, configurations, texts, first in bar:
                bar.set_postfix_str(cell.name)
                self._one_group(engine, cell, configurations, texts, first)
        finally:
            engine.close()

    def _groups(self, cell, configurations, texts) -> Iterator[int]:
        """Where the groups begin that lack something, or whose reference is needed."""
        for first in range(0, cell.sequences, self.group):
            if any(self._lacks(cell, c, first) for c in configurations):
                yield first

    def _missing(self, cell, configurations, texts) -> bool:
        return any(self._groups(cell, configurations, texts))

    def _lacks(self, cell: Cell, made: Configuration, first: int) -> bool:
        return self._key(cell.name, made.settings, first) not in self.done

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
            again = Configuration("dense", DENSE)
            if self._lacks(cell, again, first):
                found = engine.force(prompts, tokens, reference)
                self._keep(engine, cell, again, first, found, 0.0)
            self.references[cell.name, first] = reference
        for made in configurations:
            if self._lacks(cell, made, first):
                engine.configure(made.settings)
                begun = time.monotonic()
                found = engine.force(prompts, tokens, reference)
                self._keep(engine, cell, made, first, found, time.monotonic() - begun)

    def _keep(
        self,
        engine: Engine,
        cell: Cell,
        made: Configuration,
        first: int,
        found: Pass,
        seconds: float,
    ) -> None:
        startup = engine.startup(made.settings)
        # The first token comes of the prompt, densely.
        kl, agreed, nll = (
            part[:, 1:].cpu() for part in (found.kl, found.agreed, found.nll)
        )
        if not (kl.isfinite().all() and nll.isfinite().all()):
            raise RuntimeError(
                f"{made.name} in cell {cell.name}: not every step was seen"
            )
        quarters = zip(
            *(part.tensor_split(QUARTERS, dim=1) for part in (kl, agreed)), strict=True
        )
        record = {
            "benchmark": "quality",
            "measure": "forced",
            "setup": self.setup,
            "cell": cell.name,
            "name": made.name,
            "budget": made.budget,
            "settings": made.settings,
            "kv_read": round(
                kv_read_share(startup.plan, startup.config, cell.middle), 5
            ),
            "first": first,
            "tokens": kl.shape[1],
            "kl": _rounded(kl.sum(1), 6),
            "agreed": [int(n) for n in agreed.sum(1)],
            "nll": _rounded(nll.sum(1), 5),
            "quarters": [
                {"kl": round(float(k.mean()), 7), "agreed": round(float(a.mean()), 5)}
                for k, a in quarters
            ],
            "kl_p99": round(float(kl.flatten().quantile(0.99)), 6),
            "seconds": round(seconds, 2),
        }
        records.append(self.out, record)
        self.done.add(self._key(cell.name, made.settings, first))

    def _key(self, cell: str, settings: dict[str, Any], first: int) -> Key:
        return cell, json.dumps(settings, sort_keys=True), first


def _engine_of(settings: dict[str, Any]) -> str:
    """Which engine can run the settings: empty for the one that is shared."""
    if not keeps_keys(settings):
        return ""
    kept = {k: v for k, v in settings.items() if k != "token_budget"}
    return json.dumps(kept, sort_keys=True)


def _rounded(values: torch.Tensor, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
