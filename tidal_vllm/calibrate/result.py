"""What a calibration works on and what it finds. Imports neither torch nor vLLM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tidal_vllm.calibrate.candidates import Candidate
from tidal_vllm.calibrate.evidence import evidence_needed, wilson_lower
from tidal_vllm.calibrate.prompts import Prompt
from tidal_vllm.config import TidalConfig


class NotCalibrated(Exception):
    """Nothing measured holds what was asked for; says what came nearest."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a calibration works on, checked.

    Attributes:
        model: The model's folder, or its name on the hub.
        prompts: What the model is asked while its attention is recorded.
        further: Makes another prompt like those, by number, or None where there are no
            more; None: there are no others.
        decode: Turns tokens into text; None: the model has no tokenizer.
        config: The main setting: budget, block size, scope and what is forced.
        first_select: Layers before this position stay DENSE.
        max_select: Most SELECT layers.
        max_loss: Largest drop of accuracy and of agreement that counts as none.
        target_agreement: Agreement wanted of the recommended setting, 0 to 1; None:
            the knee of the curve is recommended.
        decode_tokens: Length of each answer that is not known beforehand.
        num_layers: Layers of the model, those that do not take part included.
        full_layers: Indices of the layers that take part, ascending: those with full
            attention.
        correctable: Whether the model's tokens can be computed again.
        group_size: Query heads per KV head.
        kv_block_size: Block size of vLLM's KV cache, tokens.
    """

    model: str
    prompts: tuple[Prompt, ...]
    further: Callable[[int], Prompt | None] | None
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
        """Mean length of the recorded prompts, tokens, rounded down."""
        return sum(len(p.token_ids) for p in self.prompts) // len(self.prompts)


@dataclasses.dataclass(frozen=True)
class Measured:
    """How decoding went under one setting, over the prompts it was tried on.

    Attributes:
        prompts: How many prompts.
        steps: Decode steps, all prompts together; first tokens do not count, they
            come from the prefill, which is dense.
        agreed: Steps whose likeliest token is that of dense attention.
        judged: Prompts with a known answer.
        right: Judged prompts that were answered rightly, by dense attention too.
        dense_right: Judged prompts that dense attention answers rightly.
        lost_logprob: Mean drop of the log probability of the dense token, nats.
    """

    prompts: int
    steps: int
    agreed: int
    judged: int
    right: int
    dense_right: int
    lost_logprob: float

    @property
    def agreement(self) -> float:
        """Share of the steps that agree with dense attention, 0 to 1."""
        return self.agreed / self.steps

    @property
    def sure_agreement(self) -> float:
        """Lower end of the agreement's 95 % interval."""
        return wilson_lower(self.agreed, self.steps)

    def promises(self, max_loss: float) -> bool:
        """Whether it was as good as dense attention, within a loss."""
        slack = max_loss + 1e-9
        lost = (self.dense_right - self.right) / self.judged if self.judged else 0.0
        return 1 - self.agreement <= slack and lost <= slack

    def missing(self, max_loss: float) -> int:
        """Tokens that have yet to agree before it is sure to stay within a loss."""
        needed = evidence_needed(self.steps - self.agreed, max_loss)
        return max(needed - self.steps, 0)

    def holds(self, max_loss: float) -> bool:
        """Whether it is sure to be as good as dense attention, within a loss."""
        return self.promises(max_loss) and not self.missing(max_loss)


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate and how it did when it was run.

    Attributes:
        holds: Whether it is sure to stay within the loss allowed.
        promises: Whether it stayed within the loss allowed.
    """

    candidate: Candidate
    measured: Measured
    holds: bool
    promises: bool

    @property
    def rank(self) -> tuple[Any, ...]:
        """Smaller is better: what holds, what promises, fewest full layers, ..."""
        cost = self.candidate.num_full if self.promises else math.inf
        likely = (not self.holds, not self.promises, cost)
        return *likely, -self.measured.agreement, self.candidate.score


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One setting, with the chosen layers.

    Attributes:
        read_share: KV bytes read per decode step, as a share of dense attention's.
        captured: Mean attention mass captured, 0 to 1.
        captured_worst: Attention mass captured in the worst layer and head, 0 to 1.
    """

    config: TidalConfig
    measured: Measured
    read_share: float
    captured: float
    captured_worst: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything found out.

    Attributes:
        layers: Indices of the layers that take part, num_layers of them; matrices and
            candidates count positions in this tuple.
        dense: How dense attention answered the recorded prompts.
        loss, captured, overlap: [num_layers, num_layers], see `recorder`: avoidable
            loss (high quantile over steps), mass of the worst head (low quantile) and
            mean overlap.
        tried: Candidates that were run, in order.
        stability: Share of resamples of the prompts that give the same layers.
        curve: The settings tried with the chosen layers.
        best: The point of `curve` that is recommended.
        intervals: Correction intervals (decode steps) tried with it.
        interval: The best of `intervals`; None: no correction.
        others: What other rules choose, by name, with as many SELECT layers.
    """

    layers: tuple[int, ...]
    dense: Measured
    loss: np.ndarray
    captured: np.ndarray
    overlap: np.ndarray
    tried: list[Tried]
    stability: float
    curve: list[CurvePoint]
    best: CurvePoint
    intervals: list[tuple[int, Measured]]
    interval: int | None
    others: dict[str, Candidate]

    @property
    def chosen(self) -> Tried:
        """The candidate whose layers are taken."""
        return min(self.tried, key=lambda one: one.rank)

    @property
    def runner_up(self) -> Tried | None:
        """The next best candidate; it may not hold."""
        _, *others = sorted(self.tried, key=lambda one: one.rank)
        return others[0] if others else None

    def roles(self, candidate: Candidate) -> tuple[list[int], list[int]]:
        """DENSE and SELECT layers of a candidate, as indices of the model's layers."""
        return roles_of(self.layers, candidate)

    @property
    def given(self) -> list[tuple[int, int]]:
        """Per SPARSE layer, the position of the layer that selects for it, and its own.

        With the chosen layers.
        """
        return self.chosen.candidate.given(len(self.layers))


def roles_of(
    layers: Sequence[int], candidate: Candidate
) -> tuple[list[int], list[int]]:
    """DENSE and SELECT layers of a candidate, as indices of the model's layers.

    Args:
        layers: Indices of the layers that take part, ascending.
    """
    dense = [layers[position] for position in candidate.dense]
    return dense, [layers[position] for position in candidate.select]


def more_evidence(missing: int, steps: int, job: Job) -> str:
    """Say how a user's own prompts can give more tokens.

    Args:
        missing: Further tokens that are needed.
        steps: Tokens that the prompts gave so far, the first of each answer left out.
    """
    if not steps:
        return "Give answers of two tokens or more: the prefill computes the first"
    prompts = math.ceil(missing / steps * len(job.prompts))
    cure = f"Give about {prompts} more prompts like these in --prompts"
    if free := sum(prompt.answer_ids is None for prompt in job.prompts):
        longer = job.decode_tokens + math.ceil(missing / free)
        cure += f", or --decode-tokens {longer}"
    return f"{cure}; or allow a larger --max-loss"
