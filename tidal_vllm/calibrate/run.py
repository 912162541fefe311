"""Collect, choose, confirm, draw the curve: what `tidal-vllm calibrate` does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tidal_vllm.calibrate import baselines, choice
from tidal_vllm.calibrate.answers import Answers
from tidal_vllm.calibrate.choice import Choice
from tidal_vllm.calibrate.engine import CalibrationEngine, complete_settings
from tidal_vllm.calibrate.grid import recorder_settings, same_but_budget, settings_grid
from tidal_vllm.calibrate.result import (
    CurvePoint,
    Job,
    Measured,
    NotCalibrated,
    Result,
    Tried,
    more_evidence,
    roles_of,
)
from tidal_vllm.calibrate.state import State
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.pollution import MIN_REMAINING
from tidal_vllm.plan.roles import Role
from tidal_vllm.plan.steps import kv_read_share

LOSS_QUANTILE, MASS_QUANTILE = 0.95, 0.05  # over decode steps: the worse end
INTERVALS = (4, 8, 16, 32)
EXHAUSTIVE_LIMIT = 20_000  # choices; more are not tried one by one for the report


def calibrate(
    job: Job, state: State, start_engine: Callable[[], CalibrationEngine]
) -> Result:
    """Run the whole calibration, or what an earlier run left of it.

    Args:
        start_engine: Called once, as soon as something has to be asked.

    Raises:
        NotCalibrated: No choice of layers, or no setting, holds what was asked for.
    """
    return _Calibration(job, state, start_engine).run()


class _Calibration:
    def __init__(self, job, state, start_engine) -> None:
        self.job, self.answers = job, Answers(job, state, start_engine)
        longest = max(len(prompt.token_ids) for prompt in job.prompts)
        self.grid = settings_grid(job.config, longest, job.kv_block_size)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.answers.layers

    def run(self) -> Result:
        job = self.job
        settings = [recorder_settings(config) for config in self.grid]
        dense, records = self.answers.record(settings)
        loss = choice.over_steps([r["avoidable"] for r in records], LOSS_QUANTILE)
        worst = [r["worst"][:, 0] for r in records]
        captured = choice.over_steps(worst, MASS_QUANTILE)
        overlap = np.concatenate([r["overlap"] for r in records]).mean(0)
        first = min(job.first_select, len(loss) - 1)
        wanted = choice.candidates(loss, captured, job.max_select, first)
        tried, chosen, runner_up = self._confirm(wanted)
        curve = self._curve(chosen, records)
        best = self._recommend(curve, chosen)
        curve = [best if p.config == best.config else p for p in curve]
        intervals, interval = self._intervals(chosen, best)
        counts = range(first + 1, min(first + job.max_select, len(loss)) + 1)
        losses = [record["avoidable"] for record in records]
        return Result(
            layers=self.layers,
            dense=dense,
            loss=loss,
            captured=captured,
            overlap=overlap,
            predicted=[choice.best_choices(loss, n, first)[0] for n in counts],
            tried=tried,
            chosen=chosen,
            runner_up=runner_up,
            stability=choice.stability(losses, LOSS_QUANTILE, chosen.choice, first),
            curve=curve,
            best=best,
            intervals=intervals,
            interval=interval,
            others=_other_rules(loss, overlap, chosen.choice, first),
        )

    def _settings(self, config: TidalConfig, of: Choice) -> dict[str, Any]:
        return complete_settings(config, *roles_of(self.layers, of))

    def _confirm(self, wanted: list[Choice]) -> tuple[list[Tried], Tried, Tried | None]:
        """Run choices, fewest full layers first, until one is sure to hold."""
        tried: list[Tried] = []
        for num_full, group in itertools.groupby(wanted, key=lambda c: c.num_full):
            same = list(group)
            settings = [self._settings(self.job.config, option) for option in same]
            title = f"Trying {len(same)} choices of {num_full} full layers"
            found = self.answers.measure(title, settings)
            of_size = [self._tried(*one) for one in zip(same, found, strict=True)]
            for i in sorted(range(len(same)), key=lambda i: _rank(of_size[i])):
                if of_size[i].promises:
                    measured = self.answers.confirm(settings[i])
                    of_size[i] = self._tried(same[i], measured)
                if of_size[i].holds:
                    break
            tried += of_size
            if any(one.holds for one in of_size):
                break
        ranked = sorted(tried, key=_rank)
        if not ranked[0].holds:
            raise NotCalibrated(self._why_not(ranked[0]))
        return tried, ranked[0], ranked[1] if len(ranked) > 1 else None

    def _tried(self, of: Choice, measured: Measured) -> Tried:
        loss = self.job.max_loss
        return Tried(of, measured, measured.holds(loss), measured.promises(loss))

    def _why_not(self, nearest: Tried) -> str:
        measured, loss = nearest.measured, self.job.max_loss
        select = [self.layers[position] for position in nearest.choice.select]
        agrees = f"agrees with dense attention in {measured.agreed} of {measured.steps}"
        if not nearest.promises:
            return (
                f"no choice of up to {self.job.max_select} SELECT layers stays within "
                f"a loss of {loss:g}; the nearest, {select}, {agrees} tokens "
                f"({measured.agreement:.1%}). Raise --budget, --max-select-layers or "
                "--max-loss"
            )
        missing = measured.missing(loss)
        cure = "Raise --budget or --max-loss"
        if self.job.further is None:
            cure = more_evidence(missing, measured.steps, self.job)
        return (
            f"too few tokens to tell. The best choice, SELECT layers {select}, "
            f"{agrees} tokens: at least {measured.sure_agreement:.1%} with 95% "
            f"confidence, and a loss of {loss:g} asks for {1 - loss:.1%}. {missing} "
            f"more tokens have to agree. {cure}"
        )

    def _curve(self, chosen: Tried, records: list[dict]) -> list[CurvePoint]:
        settings = [self._settings(config, chosen.choice) for config in self.grid]
        results = self.answers.measure("Drawing the curve", settings)
        given = _given_by(chosen.choice, len(self.layers))
        points = []
        for s, (config, measured) in enumerate(zip(self.grid, results, strict=True)):
            mean = [[r["mean"][:, s, i, j].mean() for i, j in given] for r in records]
            worst = [r["worst"][:, s] for r in records]
            low = choice.over_steps(worst, MASS_QUANTILE)
            points.append(
                CurvePoint(
                    config=config,
                    measured=measured,
                    read_share=self._read_share(config, settings[s]),
                    captured=float(np.mean(mean)) if given else 1.0,
                    captured_worst=min((float(low[i, j]) for i, j in given), default=1),
                )
            )
        return points

    def _read_share(self, config: TidalConfig, settings: dict) -> float:
        """KV bytes of a decode step as a share of dense, at the mean prompt length."""
        plan = plan_layers(
            TidalConfig(**settings), self.job.num_layers, None, self.layers
        )
        share = kv_read_share(plan, config, self.job.mean_len)
        if config.scope != "query_head":
            return share
        # The heads of a group may choose different tokens: at most all of them.
        full = 1 - plan.count(Role.SPARSE) / plan.num_full_layers
        return min(1.0, full + (share - full) * self.job.group_size)

    def _recommend(self, curve: list[CurvePoint], chosen: Tried) -> CurvePoint:
        """The preferred setting of those that are sure to hold, as confirmed.

        The main setting is one: the chosen layers were confirmed with it.
        """
        left, target = list(curve), self.job.target_agreement
        while best := self._preferred(left):
            setting = self._settings(best.config, chosen.choice)
            measured = self.answers.confirm(setting)
            reached = target is None or measured.agreement >= target
            if reached and measured.holds(self.job.max_loss):
                return dataclasses.replace(best, measured=measured)
            left.remove(best)
        nearest = max(curve, key=lambda p: p.measured.agreement)
        raise NotCalibrated(
            f"no setting reaches --target-agreement {target:g}; the nearest, "
            f"{recorder_settings(nearest.config)}, has "
            f"{nearest.measured.agreement:.4f}. Lower the target or raise --budget"
        )

    def _preferred(self, points: list[CurvePoint]) -> CurvePoint | None:
        """The knee of the budgets, or the cheapest that reaches the target."""
        target, main = self.job.target_agreement, self.job.config
        if target is None:
            budgets = [p for p in points if same_but_budget(p.config, main)]
            return budgets[choice.knee([p.point for p in budgets], self.job.max_loss)]
        reached = [p for p in points if p.measured.agreement >= target]
        return min(
            reached,
            key=lambda p: (
                p.read_share,
                not same_but_budget(p.config, main),
                -p.measured.agreement,
            ),
            default=None,
        )

    def _intervals(
        self, chosen: Tried, best: CurvePoint
    ) -> tuple[list[tuple[int, Measured]], int | None]:
        """Correction intervals that the answers are long enough for."""
        longest = max(len(tokens) for tokens in self.answers.tokens) - 1 - MIN_REMAINING
        fitting = [n for n in INTERVALS if n < longest and self.job.correctable]
        if not fitting or best.measured.agreed == best.measured.steps:
            return [], None
        settings = [
            self._settings(
                dataclasses.replace(best.config, correction_interval=n), chosen.choice
            )
            for n in (None, *fitting)
        ]
        off, *found = self.answers.measure("Trying corrections", settings)
        intervals = list(zip(fitting, found, strict=True))
        gains = off.agreement + self.job.max_loss
        good = [n for n, measured in intervals if measured.agreement > gains]
        return intervals, max(good, default=None)


def _rank(tried: Tried) -> tuple:
    """Best first: what holds, what may, then by cost, by what it did and promised."""
    cost = tried.choice.num_full if tried.promises else math.inf
    likely = (not tried.holds, not tried.promises, cost)
    return *likely, -tried.measured.agreement, tried.choice.score


def _given_by(of: Choice, num_layers: int) -> list[tuple[int, int]]:
    """Per SPARSE layer, the layer whose selection it is given, and itself."""
    ends = [*of.select[1:], num_layers]
    return [
        (start, layer)
        for start, end in zip(of.select, ends, strict=True)
        for layer in range(start + 1, end)
    ]


def _other_rules(
    loss: np.ndarray, overlap: np.ndarray, chosen: Choice, first: int
) -> dict[str, Choice]:
    """What other rules choose at the same cost, assessed by our loss."""
    count = chosen.num_full - first
    choices = {
        "evenly spaced": baselines.evenly_spaced(len(loss), count, first),
        "adjacent change (DELTA-style)": baselines.adjacent_change(
            overlap, count, first
        ),
    }
    if math.comb(len(loss), count) <= EXHAUSTIVE_LIMIT:
        rule = baselines.mean_overlap(overlap, count, first)
        choices["mean overlap (TidalDecode)"] = rule
        best = choice.exhaustive_choice(loss, chosen.num_full, first)
        choices["exhaustive search"] = best.select
    return {name: choice.assess(loss, select) for name, select in choices.items()}
