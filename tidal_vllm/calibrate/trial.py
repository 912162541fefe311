"""Two parts of the engine for trial runs: forced tokens, settings per request.

A trial decodes the tokens that dense attention chose, whatever it would choose itself,
and reports what that would have been. Both parts read `SamplingParams.extra_args`.
"""

from __future__ import annotations

import copy
import math

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from tidal_vllm.engine.scheduler import TidalScheduler
from tidal_vllm.plan.resolve import resolve

FORCED, SETTINGS = "tidal_forced_tokens", "tidal_settings"


class ForcedTokens(LogitsProcessor):
    """Makes a request emit given tokens; its raw log probabilities do not change."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool
    ) -> None:
        self._forced: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._forced, batch_update, _forced_tokens)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (tokens, emitted) in self._forced.items():
            logits[row] = -math.inf
            logits[row, tokens[len(emitted)]] = 0.0
        return logits


def _forced_tokens(
    params: SamplingParams, prompt: list[int] | None, output_token_ids: list[int]
) -> tuple[list[int], list[int]] | None:
    """What `ForcedTokens` keeps of a request: its tokens, and those emitted so far."""
    tokens = (params.extra_args or {}).get(FORCED)
    return None if tokens is None else (tokens, output_token_ids)


class TrialScheduler(TidalScheduler):
    """The scheduler that corrects, under the settings of the request that comes next.

    NOTE: the workers have to be told the same (`calibration_configure`).
    """

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        settings = (params and params.extra_args or {}).get(SETTINGS)
        if settings is not None:
            config = copy.copy(self.vllm_config)
            config.additional_config = {"tidal": settings}
            startup = resolve(config)
            self.layer_plan, self.selection_rule = startup.plan, startup.rule
            self.correction_interval = (
                startup.config.correction_interval if startup.plan.sparse else None
            )
        super().add_request(request)
