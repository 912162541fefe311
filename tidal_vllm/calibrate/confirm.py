"""Candidates are run, fewest full layers first, until one is sure to hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from tidal_vllm.calibrate.answers import Answers
from tidal_vllm.calibrate.candidates import Candidate
from tidal_vllm.calibrate.result import (
    Job,
    Measured,
    NotCalibrated,
    Tried,
    more_evidence,
)


def confirm(job: Job, answers: Answers, candidates: Iterable[Candidate]) -> list[Tried]:
    """Decode under candidates for the SELECT layers.

    Args:
        candidates: Fewest full layers first.

    Returns:
        Those that were run, in order; the best of them is sure to hold.

    Raises:
        NotCalibrated: None is sure to hold.
    """
    tried: list[Tried] = []
    for num_full, group in itertools.groupby(candidates, key=lambda c: c.num_full):
        same_size = list(group)
        settings = [answers.settings(job.config, one) for one in same_size]
        title = f"Trying choices of {num_full} full layers"
        found = answers.measure(title, settings)
        of_size = [_judge(job, *one) for one in zip(same_size, found, strict=True)]
        for i in sorted(range(len(of_size)), key=lambda i: of_size[i].rank):
            if of_size[i].promises:
                measured = answers.confirm(settings[i])
                of_size[i] = _judge(job, same_size[i], measured)
            if of_size[i].holds:
                break
        tried += of_size
        if any(one.holds for one in of_size):
            return tried
    nearest = min(tried, key=lambda one: one.rank)
    raise NotCalibrated(_explain(job, answers.layers, nearest))


def _judge(job: Job, candidate: Candidate, measured: Measured) -> Tried:
    loss = job.max_loss
    return Tried(candidate, measured, measured.holds(loss), measured.promises(loss))


def _explain(job: Job, layers: tuple[int, ...], nearest: Tried) -> str:
    """Say what came nearest, and what would help."""
    measured, loss = nearest.measured, job.max_loss
    select = [layers[position] for position in nearest.candidate.select]
    agrees = f"agrees with dense attention in {measured.agreed} of {measured.steps}"
    if not nearest.promises:
        return (
            f"no choice of up to {job.max_select} SELECT layers stays within "
            f"a loss of {loss:g}; the nearest, {select}, {agrees} tokens "
            f"({measured.agreement:.1%}). Raise --budget, --max-select-layers or "
            "--max-loss"
        )
    missing = measured.missing(loss)
    cure = "Raise --budget or --max-loss"
    if job.further is None:
        cure = more_evidence(missing, measured.steps, job)
    return (
        f"too few tokens to tell. The best choice, SELECT layers {select}, "
        f"{agrees} tokens: at least {measured.sure_agreement:.1%} with 95% "
        f"confidence, and a loss of {loss:g} asks for {1 - loss:.1%}. {missing} "
        f"more tokens have to agree. {cure}"
    )
