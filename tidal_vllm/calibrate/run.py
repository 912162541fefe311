"""Collect, choose, confirm, draw the curve: what `tidal-vllm calibrate` does."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from tidal_vllm.calibrate import baselines, choice
from tidal_vllm.calibrate.choice import Choice, Point
from tidal_vllm.calibrate.engine import CalibrationEngine, complete_settings
from tidal_vllm.calibrate.prompts import Prompt
from tidal_vllm.calibrate.state import State
from tidal_vllm.config import TidalConfig, TidalConfigError
from tidal_vllm.correction import MIN_REMAINING
from tidal_vllm.policy import (
    Role,
    kv_read_share,
    plan_layers,
)

LOSS_QUANTILE, MASS_QUANTILE = 0.95, 0.05  # over decode steps: the worse end
BUDGETS = (0.25, 0.5, 1, 2)  # times the budget asked for
BLOCK_SIZES = (4, 16)
SCOPES = ("sequence", "kv_head", "query_head")
INTERVALS = (4, 8, 16, 32)
EXHAUSTIVE_LIMIT = 20_000  # choices; more are not tried one by one for the report


class NotCalibrated(Exception):
    """Nothing measured holds what was asked for; says what came nearest."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a calibration works on, checked.

    Attributes:
        config: The main setting: budget, block size, scope and what is forced.
        first_select: Layers before this position stay DENSE.
        max_select: Most SELECT layers.
        max_loss: Largest drop of accuracy and of agreement that counts as none.
        target_agreement: Wanted of the recommended setting; None: the knee.
        decode_tokens: Of each answer that is not known beforehand.
        num_layers: Of the model, those that do not take part included.
        full_layers: Indices of those that take part, ascending: with full attention.
        correctable: Whether the model's tokens can be computed again.
        group_size: Query heads per KV head.
        kv_block_size: Of vLLM's cache, tokens.
    """

    model: str
    prompts: tuple[Prompt, ...]
    decode: Callable[[Sequence[int]], str] | None
    config: TidalConfig
    first_select: int
    max_select: int
    max_loss: float
    target_agreement: float | None
    decode_tokens: int
    num_layers: int
    full_layers: tuple[int, ...]
    correctable: bool
    group_size: int
    kv_block_size: int

    @property
    def mean_len(self) -> int:
        return sum(len(p.token_ids) for p in self.prompts) // len(self.prompts)


@dataclasses.dataclass(frozen=True)
class Measured:
    """How decoding went under one setting, over all prompts.

    Attributes:
        steps: Decode steps, all prompts together; first tokens do not count, they
            come from the prefill, which is dense.
        agreed: Those whose likeliest token is that of dense attention.
        judged: Prompts with a known answer.
        right: Those answered; by sparse attention only where dense attention does.
        lost_logprob: Mean drop of the log probability of the dense token, nats.
    """

    steps: int
    agreed: int
    judged: int
    right: int
    lost_logprob: float

    @property
    def agreement(self) -> float:
        return self.agreed / self.steps

    @property
    def accuracy(self) -> float | None:
        return self.right / self.judged if self.judged else None

    @property
    def sure_agreement(self) -> float:
        return choice.wilson_lower(self.agreed, self.steps)

    def holds(self, dense: Measured, max_loss: float) -> bool:
        """Whether it is as good as dense attention, within a loss."""
        slack = max_loss + 1e-9
        lost = (dense.right - self.right) / self.judged if self.judged else 0.0
        return 1 - self.agreement <= slack and lost <= slack


@dataclasses.dataclass(frozen=True)
class Tried:
    """A choice of layers and how it did when it was run."""

    choice: Choice
    measured: Measured
    holds: bool


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One setting, with the chosen layers."""

    config: TidalConfig
    measured: Measured
    read_share: float
    captured: float
    captured_worst: float

    @property
    def point(self) -> Point:
        return Point(self.read_share, self.measured.agreement, self.captured)


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything found out.

    Attributes:
        layers: Indices of the layers that take part; matrices and choices count
            positions in it.
        loss, captured, overlap: [num_layers, num_layers], see `recorder`: avoidable
            loss (high quantile over steps), mass of the worst head (low quantile) and
            mean overlap.
        predicted: The best choice by prediction for 1, 2, ... SELECT layers.
        tried: Choices that were run, in order.
        chosen, runner_up: Of those; the runner-up may not hold.
        stability: Share of resamples of the prompts that give the same layers.
        curve: The settings tried with the chosen layers, and `best`, the one to take.
        intervals: Correction intervals tried with it, and the best; None: off.
        others: What other rules choose, by name, with as many SELECT layers.
    """

    layers: tuple[int, ...]
    dense: Measured
    loss: np.ndarray
    captured: np.ndarray
    overlap: np.ndarray
    predicted: list[Choice]
    tried: list[Tried]
    chosen: Tried
    runner_up: Tried | None
    stability: float
    curve: list[CurvePoint]
    best: CurvePoint
    intervals: list[tuple[int, Measured]]
    interval: int | None
    others: dict[str, Choice]

    def roles(self, of: Choice) -> tuple[list[int], list[int]]:
        """DENSE and SELECT layers of a choice, as indices of the model's layers."""
        return _roles(self.layers, of)


def _roles(layers: Sequence[int], of: Choice) -> tuple[list[int], list[int]]:
    """Positions of a choice as layers of the model: DENSE, SELECT."""
    dense, select = (
        [layers[position] for position in positions]
        for positions in (of.dense, of.select)
    )
    return dense, select


def settings_grid(config: TidalConfig, longest: int, kv_block_size: int):
    """The settings to measure, the main one first; one thing changes at a time.

    Args:
        longest: Tokens of the longest prompt; a budget must be smaller.
    """
    size = config.select_block_size
    changes: list[dict[str, Any]] = [
        {"token_budget": round(config.token_budget * times / size) * size}
        for times in BUDGETS
    ]
    changes += [{"select_block_size": s} for s in BLOCK_SIZES if kv_block_size % s == 0]
    changes += [{"scope": scope} for scope in SCOPES]
    grid = [config]
    for change in changes:
        try:
            other = dataclasses.replace(config, **change)
        except TidalConfigError:
            continue  # a budget too small for what is forced, or not of whole blocks
        if other not in grid and other.token_budget < longest:
            grid.append(other)
    return grid


def recorder_settings(config: TidalConfig) -> dict[str, Any]:
    """The keywords of `TidalConfig` that decide what a set keeps."""
    keys = ("token_budget", "select_block_size", "scope", "sink_tokens")
    return {key: getattr(config, key) for key in (*keys, "recent_fraction")}


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
        self.job, self.state = job, state
        self._start, self._engine = start_engine, None
        longest = max(len(prompt.token_ids) for prompt in job.prompts)
        self.grid = settings_grid(job.config, longest, job.kv_block_size)

    @property
    def engine(self) -> CalibrationEngine:
        if self._engine is None:
            self._engine = self._start()
        return self._engine

    def run(self) -> Result:
        job = self.job
        dense, records = self._collect()
        loss = choice.over_steps([r["avoidable"] for r in records], LOSS_QUANTILE)
        worst = [r["worst"][:, 0] for r in records]
        captured = choice.over_steps(worst, MASS_QUANTILE)
        overlap = np.concatenate([r["overlap"] for r in records]).mean(0)
        first = min(job.first_select, len(loss) - 1)
        wanted = choice.candidates(loss, captured, job.max_select, first)
        tried, chosen, runner_up = self._confirm(wanted, dense)
        curve = self._curve(chosen, records)
        best = self._recommend(curve)
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

    def _collect(self) -> tuple[Measured, list[dict[str, np.ndarray]]]:
        """Dense answers, and what was recorded of those with a decode step."""
        job, state = self.job, self.state
        settings = [recorder_settings(config) for config in self.grid]
        self.tokens: list[list[int]] = []
        self.right: list[bool] = []
        self.logprobs: list[list[float]] = []
        records = []
        if any(state.reply(f"dense {i}") is None for i in range(len(job.prompts))):
            _ = self.engine  # started here, so that the bar counts prompts only
        for i, prompt in enumerate(_progress(job.prompts, "Recording dense attention")):
            key = f"dense {i}"
            if state.reply(key) is None:
                wanted = len(prompt.answer_ids or ()) or job.decode_tokens
                reply, recorded = self.engine.record(
                    prompt.token_ids, wanted, settings, state.folder
                )
                if recorded is not None:
                    state.save_recorded(i, recorded)
                state.save_reply(
                    key, dataclasses.asdict(reply) | {"layers": self.engine.layers}
                )
            saved = state.reply(key)
            self.layers = tuple(saved["layers"])
            self.tokens.append(saved["token_ids"])
            self.logprobs.append(saved["logprobs"])
            self.right.append(prompt.is_right(saved["token_ids"], job.decode))
            if len(saved["token_ids"]) > 1:
                records.append(state.recorded(i))
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
        judged = sum(prompt.judged for prompt in job.prompts)
        steps = sum(len(tokens) - 1 for tokens in self.tokens)
        return Measured(steps, steps, judged, sum(self.right), 0.0), records

    def _measure(self, title: str, settings: Sequence[dict]) -> list[Measured]:
        """Run all prompts under each of the settings, prompt by prompt."""
        asked = list(itertools.product(range(len(self.job.prompts)), settings))
        found: dict[str, list[tuple[int, list[bool], float]]] = {}
        for i, setting in _progress(asked, title):
            name = json.dumps(setting, sort_keys=True)
            tokens = self.tokens[i]
            if len(tokens) < 2:
                continue
            key = f"trial {i} {name}"
            if self.state.reply(key) is None:
                prompt = self.job.prompts[i].token_ids
                reply = self.engine.trial(prompt, tokens, setting)
                self.state.save_reply(key, dataclasses.asdict(reply))
            saved = self.state.reply(key)
            drop = sum(self.logprobs[i][1:]) - sum(saved["logprobs"][1:])
            found.setdefault(name, []).append((i, saved["agreed"][1:], drop))
        return [self._sum(found[json.dumps(s, sort_keys=True)]) for s in settings]

    def _sum(self, answers: list[tuple[int, list[bool], float]]) -> Measured:
        steps = sum(len(agreed) for _, agreed, _ in answers)
        return Measured(
            steps=steps,
            agreed=sum(sum(agreed) for _, agreed, _ in answers),
            judged=sum(prompt.judged for prompt in self.job.prompts),
            right=sum(self.right[i] and all(agreed) for i, agreed, _ in answers)
            + sum(
                right
                for right, tokens in zip(self.right, self.tokens, strict=True)
                if len(tokens) < 2
            ),
            lost_logprob=sum(drop for _, _, drop in answers) / steps,
        )

    def _settings(self, config: TidalConfig, of: Choice) -> dict[str, Any]:
        return complete_settings(config, *_roles(self.layers, of))

    def _confirm(
        self, wanted: list[Choice], dense: Measured
    ) -> tuple[list[Tried], Tried, Tried | None]:
        """Run choices, fewest full layers first, until one of a size holds."""
        tried: list[Tried] = []
        for num_full, group in itertools.groupby(wanted, key=lambda c: c.num_full):
            same = list(group)
            settings = [self._settings(self.job.config, option) for option in same]
            title = f"Confirming {len(same)} choices of {num_full} full layers"
            for option, measured in zip(
                same, self._measure(title, settings), strict=True
            ):
                holds = measured.holds(dense, self.job.max_loss)
                tried.append(Tried(option, measured, holds))
            if any(one.holds for one in tried):
                break
        ranked = sorted(tried, key=_rank)
        if not ranked[0].holds:
            nearest = ranked[0]
            select = [self.layers[position] for position in nearest.choice.select]
            raise NotCalibrated(
                f"no choice of up to {self.job.max_select} SELECT layers stays within "
                f"a loss of {self.job.max_loss:g}; the nearest, {select}, agrees with "
                f"dense attention in {nearest.measured.agreement:.1%} of "
                f"{nearest.measured.steps} tokens. Raise --budget, --max-select-layers "
                "or --max-loss"
            )
        return tried, ranked[0], ranked[1] if len(ranked) > 1 else None

    def _curve(self, chosen: Tried, records: list[dict]) -> list[CurvePoint]:
        settings = [self._settings(config, chosen.choice) for config in self.grid]
        results = self._measure("Drawing the curve", settings)
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

    def _recommend(self, curve: list[CurvePoint]) -> CurvePoint:
        target, main = self.job.target_agreement, self.job.config
        if target is None:
            budgets = [p for p in curve if _same_but_budget(p.config, main)]
            return budgets[choice.knee([p.point for p in budgets], self.job.max_loss)]
        reached = [p for p in curve if p.measured.agreement >= target]
        if not reached:
            nearest = max(curve, key=lambda p: p.measured.agreement)
            raise NotCalibrated(
                f"no setting reaches --target-agreement {target:g}; the nearest, "
                f"{recorder_settings(nearest.config)}, has "
                f"{nearest.measured.agreement:.4f}. Lower the target or raise --budget"
            )
        return min(
            reached,
            key=lambda p: (
                p.read_share,
                not _same_but_budget(p.config, main),
                -p.measured.agreement,
            ),
        )

    def _intervals(
        self, chosen: Tried, best: CurvePoint
    ) -> tuple[list[tuple[int, Measured]], int | None]:
        """Correction intervals that the answers are long enough for."""
        longest = max(len(tokens) for tokens in self.tokens) - 1 - MIN_REMAINING
        fitting = [n for n in INTERVALS if n < longest and self.job.correctable]
        if not fitting or best.measured.agreed == best.measured.steps:
            return [], None
        settings = [
            self._settings(
                dataclasses.replace(best.config, correction_interval=n), chosen.choice
            )
            for n in fitting
        ]
        found = list(
            zip(fitting, self._measure("Trying corrections", settings), strict=True)
        )
        gains = best.measured.agreement + self.job.max_loss
        good = [n for n, measured in found if measured.agreement > gains]
        return found, max(good, default=None)


def _same_but_budget(config: TidalConfig, main: TidalConfig) -> bool:
    return dataclasses.replace(main, token_budget=config.token_budget) == config


def _rank(tried: Tried) -> tuple:
    """Best first: what holds, then by cost, then by what it did and promised."""
    cost = tried.choice.num_full if tried.holds else math.inf
    return not tried.holds, cost, -tried.measured.agreement, tried.choice.score


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


def _progress(items: Sequence, title: str):
    """The items behind a bar with the time left."""
    bar = "{desc:<40.40} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} "
    bar += "[{elapsed}, {remaining} left]"
    return tqdm(items, desc=title, bar_format=bar, file=sys.stderr, dynamic_ncols=True)
