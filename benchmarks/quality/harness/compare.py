"""A part of the engine that forces tokens and compares what it would have said.

One pass keeps the log probabilities of every step, those of dense attention; later
passes over the same tokens are compared with them, step by step, where the logits lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

FORCED = "quality_forced"


@dataclass
class Pass:
    """One pass of `num_sequences` sequences over `num_tokens` forced tokens each.

    Attributes:
        reference: fp32 `[num_sequences, num_tokens, vocab_size]`, log probabilities of
            the pass that is compared with; None while a pass makes it.
        kept: What this pass said, in the form of `reference`; None in a pass that is
            compared.
        kl: fp32 `[num_sequences, num_tokens]`, nats: sum over the vocabulary of
            p * (log p - log q), p the reference.
        agreed: bool, whether both have the same likeliest token.
        nll: fp32, nats: minus log q of the forced token.
    """

    num_sequences: int
    num_tokens: int
    reference: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    kl: torch.Tensor = field(init=False)
    agreed: torch.Tensor = field(init=False)
    nll: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = self.num_sequences, self.num_tokens
        # NaN stays where a step was never seen.
        self.kl, self.agreed, self.nll = (torch.full(shape, math.nan) for _ in range(3))

    def see(
        self, sequences: list[int], steps: list[int], tokens: list[int], logits
    ) -> None:
        """Take in one step of some sequences: fp32 logits `[rows, vocab_size]`."""
        device = logits.device
        if self.kl.device != device:
            for name in ("kl", "agreed", "nll"):
                setattr(self, name, getattr(self, name).to(device))
        where = (
            torch.tensor(sequences, device=device),
            torch.tensor(steps, device=device),
        )
        forced = torch.tensor(tokens, device=device)[:, None]
        said = logits.float().log_softmax(-1)
        self.nll[where] = -said.gather(1, forced)[:, 0]
        if self.reference is None:
            if self.kept is None:
                shape = self.num_sequences, self.num_tokens, logits.shape[1]
                self.kept = torch.empty(shape, device=device)
            self.kept[where] = said
            self.kl[where], self.agreed[where] = 0.0, 1.0
            return
        wanted = self.reference[sequences, steps].to(device)
        self.kl[where] = divergence(wanted, said)
        same = wanted.argmax(-1) == said.argmax(-1)
        self.agreed[where] = same.float()


def divergence(wanted: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """KL(wanted || said) of log probabilities `[..., vocab_size]`, in nats."""
    terms = wanted.exp() * (wanted - said)
    return terms.masked_fill_(wanted == -math.inf, 0.0).sum(-1)


class Comparing(LogitsProcessor):
    """Forces the tokens of requests, and shows `Comparing.current` every step.

    A request names itself and its tokens by `extra_args={FORCED: [number, token_ids]}`,
    number its place in the pass. Other requests are left alone.
    """

    current: ClassVar[Pass | None] = None

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool
    ) -> None:
        self._forced: dict[int, tuple[int, list[int], list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Whatever it is, this benchmark has written it."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._forced, batch_update, _forced)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._forced:
            return logits
        rows = list(self._forced)
        numbers = [number for number, _, _ in self._forced.values()]
        # A chunk of a correction samples too, and vLLM drops it: the last one to
        # write a step is the one that counts.
        steps = [len(emitted) for _, _, emitted in self._forced.values()]
        tokens = [tokens[len(emitted)] for _, tokens, emitted in self._forced.values()]
        at = torch.tensor(rows, device=logits.device)
        if self.current is not None:
            self.current.see(numbers, steps, tokens, logits[at])
        logits[at] = -math.inf
        logits[at, torch.tensor(tokens, device=logits.device)] = 0.0
        return logits


def _forced(
    params: SamplingParams, prompt: list[int] | None, output_token_ids: list[int]
) -> tuple[int, list[int], list[int]] | None:
    """What `Comparing` keeps of a request: its number, tokens, and those emitted."""
    found = (params.extra_args or {}).get(FORCED)
    return None if found is None else (found[0], found[1], output_token_ids)
