"""What a calibration works on, and what it finds out. Neither torch nor vLLM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from tidal_vllm.calibrate import choice
from tidal_vllm.calibrate.choice import Choice, Point
from tidal_vllm.calibrate.prompts import Prompt
from tidal_vllm.config import TidalConfig


class NotCalibrated(Exception):
    """Nothing measured holds what was asked for; says what came nearest."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a calibration works on, checked.

    Attributes:
        prompts: Recorded while dense attention answers them.
        further: Makes another prompt like those, by number; None: there are no others.
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
    further: Callable[[int], Prompt] | None
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
    """How decoding went under one setting, over the prompts it was tried on.

    Attributes:
        prompts: How many.
        steps: Decode steps, all prompts together; first tokens do not count, they
            come from the prefill, which is dense.
        agreed: Those whose likeliest token is that of dense attention.
        judged: Prompts with a known answer.
        right: Those answered; by sparse attention only where dense attention does.
        dense_right: Those that dense attention answers.
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
        return self.agreed / self.steps

    @property
    def accuracy(self) -> float | None:
        return self.right / self.judged if self.judged else None

    @property
    def sure_agreement(self) -> float:
        """Lower end of its 95 % interval."""
        return choice.wilson_lower(self.agreed, self.steps)

    def promises(self, max_loss: float) -> bool:
        """Whether it was as good as dense attention, within a loss."""
        slack = max_loss + 1e-9
        lost = (self.dense_right - self.right) / self.judged if self.judged else 0.0
        return 1 - self.agreement <= slack and lost <= slack

    def missing(self, max_loss: float) -> int:
        """Tokens that have yet to agree before it is sure to stay within a loss."""
        needed = choice.evidence_needed(self.steps - self.agreed, max_loss)
        return max(needed - self.steps, 0)

    def holds(self, max_loss: float) -> bool:
        """Whether it is sure to be as good as dense attention, within a loss."""
        return self.promises(max_loss) and not self.missing(max_loss)


@dataclasses.dataclass(frozen=True)
class Tried:
    """A choice of layers and how it did when it was run, within the loss allowed."""

    choice: Choice
    measured: Measured
    holds: bool
    promises: bool


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
        return roles_of(self.layers, of)


def roles_of(layers: Sequence[int], of: Choice) -> tuple[list[int], list[int]]:
    """Positions of a choice as layers of the model: DENSE, SELECT."""
    dense, select = (
        [layers[position] for position in positions]
        for positions in (of.dense, of.select)
    )
    return dense, select


def more_evidence(missing: int, steps: int, job: Job) -> str:
    """How a user's own prompts, which gave `steps`, can give so many more tokens."""
    if not steps:
        return "Give answers of two tokens or more: the prefill computes the first"
    prompts = math.ceil(missing / steps * len(job.prompts))
    cure = f"Give about {prompts} more prompts like these in --prompts"
    if free := sum(prompt.answer_ids is None for prompt in job.prompts):
        longer = job.decode_tokens + math.ceil(missing / free)
        cure += f", or --decode-tokens {longer}"
    return f"{cure}; or allow a larger --max-loss"
