"""The settings tried with the chosen layers, and which of them is recommended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tidal_vllm.calibrate.answers import Answers
from tidal_vllm.calibrate.candidates import MASS_QUANTILE, Candidate, over_steps
from tidal_vllm.calibrate.grid import recorder_settings, same_but_budget
from tidal_vllm.calibrate.result import CurvePoint, Job, Measured, NotCalibrated
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.pollution import MIN_REMAINING
from tidal_vllm.plan.roles import Role
from tidal_vllm.plan.rule import may_differ_in_group
from tidal_vllm.plan.steps import kv_read_share

INTERVALS = (4, 8, 16, 32)  # decode steps between corrections


def draw(
    job: Job,
    answers: Answers,
    candidate: Candidate,
    grid: Sequence[TidalConfig],
    records: Sequence[dict[str, np.ndarray]],
) -> list[CurvePoint]:
    """Decode under each setting with the candidate's layers.

    Args:
        grid: The settings, those that were recorded for, in the same order.
        records: Per prompt, what `recorder.merge_ranks` returns.
    """
    settings = [answers.settings(config, candidate) for config in grid]
    results = answers.measure("Drawing the curve", settings)
    given = candidate.given(len(answers.layers))
    points = []
    for s, (config, measured) in enumerate(zip(grid, results, strict=True)):
        plan_config = TidalConfig(**settings[s])
        mean = [[r["mean"][:, s, i, j].mean() for i, j in given] for r in records]
        low = over_steps([r["worst"][:, s] for r in records], MASS_QUANTILE)
        points.append(
            CurvePoint(
                config=config,
                measured=measured,
                read_share=_read_share(job, answers.layers, plan_config),
                captured=float(np.mean(mean)) if given else 1.0,
                captured_worst=min((float(low[i, j]) for i, j in given), default=1.0),
            )
        )
    return points


def recommend(
    job: Job, curve: Sequence[CurvePoint], confirm: Callable[[TidalConfig], Measured]
) -> CurvePoint:
    """The preferred setting of those that are sure to hold, as confirmed.

    Args:
        confirm: Measures a setting over as many prompts as that takes. Without a
            target, the main setting has to hold.

    Raises:
        NotCalibrated: No setting reaches the target and is sure to hold.
    """
    left, dropped = list(curve), []
    while preferred := _preferred(job, left):
        confirmed = dataclasses.replace(preferred, measured=confirm(preferred.config))
        if _reaches(job, confirmed) and confirmed.measured.holds(job.max_loss):
            return confirmed
        left.remove(preferred)
        dropped.append(confirmed)
    raise NotCalibrated(_explain(job, [*left, *dropped]))


def knee(points: Sequence[CurvePoint], max_loss: float) -> CurvePoint:
    """The point where more bytes stop paying.

    Among the points whose agreement is within ``max_loss`` of the best one's, that
    farthest above the line from the cheapest to the dearest of all points in the plane
    of read share and captured mass, each scaled to 0..1.
    """
    best = max(point.measured.agreement for point in points)
    good = [p for p in points if p.measured.agreement >= best - max_loss]
    reads = [point.read_share for point in points]
    masses = [point.captured for point in points]
    read_range = max(reads) - min(reads) or 1.0
    mass_range = max(masses) - min(masses)
    if mass_range < max_loss:  # flat: nothing is gained by reading more
        return min(good, key=lambda p: p.read_share)
    return max(
        good,
        key=lambda p: (
            (p.captured - min(masses)) / mass_range
            - (p.read_share - min(reads)) / read_range,
            -p.read_share,
        ),
    )


def correction_intervals(
    job: Job, answers: Answers, candidate: Candidate, best: CurvePoint
) -> tuple[list[tuple[int, Measured]], int | None]:
    """Try the correction intervals that the answers are long enough for.

    Returns:
        The intervals (decode steps) and how each did; the longest that gains more than
        the loss allowed, or None.
    """
    longest = max(len(tokens) for tokens in answers.tokens) - 1 - MIN_REMAINING
    fitting = [n for n in INTERVALS if n < longest and job.correctable]
    if not fitting or best.measured.agreed == best.measured.steps:
        return [], None
    settings = [
        answers.settings(
            dataclasses.replace(best.config, correction_interval=n), candidate
        )
        for n in (None, *fitting)
    ]
    off, *found = answers.measure("Trying corrections", settings)
    intervals = list(zip(fitting, found, strict=True))
    wanted = off.agreement + job.max_loss
    good = [n for n, measured in intervals if measured.agreement > wanted]
    return intervals, max(good, default=None)


def _read_share(job: Job, layers: tuple[int, ...], config: TidalConfig) -> float:
    """KV bytes of a decode step as a share of dense, at the mean prompt length.

    Args:
        config: Complete, its layers included.
    """
    plan = plan_layers(config, job.num_layers, None, layers)
    share = kv_read_share(plan, config, job.mean_len)
    if not may_differ_in_group(config.scope):
        return share
    # The heads of a group may choose different tokens: at most all of them.
    full = 1 - plan.count(Role.SPARSE) / plan.num_full_layers
    return min(1.0, full + (share - full) * job.group_size)


def _reaches(job: Job, point: CurvePoint) -> bool:
    target = job.target_agreement
    return target is None or point.measured.agreement >= target


def _preferred(job: Job, points: Sequence[CurvePoint]) -> CurvePoint | None:
    """The knee of the budgets, or the cheapest that reaches the target."""
    if job.target_agreement is None:
        budgets = [p for p in points if same_but_budget(p.config, job.config)]
        return knee(budgets, job.max_loss)
    return min(
        (point for point in points if _reaches(job, point)),
        key=lambda p: (
            p.read_share,
            not same_but_budget(p.config, job.config),
            -p.measured.agreement,
        ),
        default=None,
    )


def _explain(job: Job, points: Sequence[CurvePoint]) -> str:
    """Say which setting comes nearest to the target, and what would help.

    Args:
        points: Settings, each as it was last measured.
    """
    nearest = max(points, key=lambda p: p.measured.agreement)
    measured, target = nearest.measured, job.target_agreement
    did = f"agrees in {measured.agreed} of {measured.steps} tokens"
    if not _reaches(job, nearest):
        return (
            f"no setting reaches --target-agreement {target:g}; the nearest, "
            f"{recorder_settings(nearest.config)}, {did} ({measured.agreement:.4%}). "
            "Lower the target or raise --budget"
        )
    return (
        f"no setting that reaches --target-agreement {target:g} is sure to stay within "
        f"--max-loss {job.max_loss:g}; the nearest, "
        f"{recorder_settings(nearest.config)}, {did}: at least "
        f"{measured.sure_agreement:.1%} with 95% confidence. Raise --budget or "
        "--max-loss"
    )
