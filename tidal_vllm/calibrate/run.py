"""Collect, choose, confirm, draw the curve: what `tidal-vllm calibrate` does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tidal_vllm.calibrate import baselines, curve
from tidal_vllm.calibrate.answers import Answers
from tidal_vllm.calibrate.candidates import (
    LOSS_QUANTILE,
    MASS_QUANTILE,
    over_steps,
    stability,
    worth_running,
)
from tidal_vllm.calibrate.confirm import confirm
from tidal_vllm.calibrate.engine import CalibrationEngine
from tidal_vllm.calibrate.grid import recorder_settings, settings_grid
from tidal_vllm.calibrate.result import Job, Result
from tidal_vllm.calibrate.state import State


def calibrate(
    job: Job, state: State, start_engine: Callable[[], CalibrationEngine]
) -> Result:
    """Run the whole calibration, or what an earlier run left of it.

    Args:
        start_engine: Called once, as soon as something has to be asked.

    Raises:
        NotCalibrated: No choice of layers, or no setting, holds what was asked for.
    """
    answers = Answers(job, state, start_engine)
    longest = max(len(prompt.token_ids) for prompt in job.prompts)
    grid = settings_grid(job.config, longest, job.kv_block_size)
    dense, records = answers.record([recorder_settings(config) for config in grid])
    losses = [record["avoidable"] for record in records]
    loss = over_steps(losses, LOSS_QUANTILE)
    captured = over_steps([r["worst"][:, 0] for r in records], MASS_QUANTILE)
    overlap = np.concatenate([r["overlap"] for r in records]).mean(0)

    first = min(job.first_select, len(loss) - 1)
    candidates = worth_running(loss, captured, job.max_select, first)
    tried = confirm(job, answers, candidates)
    chosen = min(tried, key=lambda one: one.rank).candidate

    points = curve.draw(job, answers, chosen, grid, records)
    best = curve.recommend(
        job, points, lambda config: answers.confirm(answers.settings(config, chosen))
    )
    intervals, interval = curve.correction_intervals(job, answers, chosen, best)
    return Result(
        layers=answers.layers,
        dense=dense,
        loss=loss,
        captured=captured,
        overlap=overlap,
        tried=tried,
        stability=stability(losses, LOSS_QUANTILE, chosen, first),
        curve=[best if p.config == best.config else p for p in points],
        best=best,
        intervals=intervals,
        interval=interval,
        others=baselines.other_rules(loss, overlap, chosen, first),
    )
