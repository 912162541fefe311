"""A running engine that changes its settings between two passes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from benchmarks.quality.harness.compare import FORCED, Comparing, Pass
from tidal_vllm.calibrate.engine import engine_kwargs
from tidal_vllm.calibrate.trial import SETTINGS
from tidal_vllm.config import TidalConfig
from tidal_vllm.names import NAME
from tidal_vllm.plan.resolve import Startup, resolve
from tidal_vllm.plan.steps import kv_read_share
from tidal_vllm.registry import METHODS

DENSE: dict[str, Any] = {"dense_layers": [], "select_layers": []}
"""Settings of an engine in which every layer attends to everything."""


def planner(model: str, **more: Any) -> Callable[[dict[str, Any]], Startup]:
    """What settings would make of a model, without an engine.

    Args:
        more: Arguments of `LLM`.
    """
    args = EngineArgs(model=model, attention_backend=NAME, **more)
    config = args.create_engine_config()
    return lambda settings: _startup(config, settings)


def _startup(vllm_config: VllmConfig, settings: dict[str, Any]) -> Startup:
    config = copy.copy(vllm_config)
    config.additional_config = {"tidal": settings}
    return resolve(config)


def engine_of(settings: dict[str, Any]) -> str:
    """Which engine can run the settings: empty for the one that is shared.

    A method that keeps something of every key needs one that was started with it;
    nothing but the budget may differ.
    """
    if not METHODS[TidalConfig(**settings).method].follows_keys:
        return ""
    kept = {k: v for k, v in settings.items() if k != "token_budget"}
    return json.dumps(kept, sort_keys=True)


class Engine:
    """vLLM's engine in this process; the prefix cache keeps prompts between passes.

    Args:
        model: A Hugging Face folder or name.
        settings: `additional_config["tidal"]` of the start.
        more: Arguments of `LLM`.
    """

    def __init__(self, model: str, settings: dict[str, Any], **more: Any) -> None:
        self.settings: dict[str, Any] = settings
        ours = {
            # Answers end at the model's end of text, which its tokenizer knows.
            "skip_tokenizer_init": False,
            "logits_processors": [Comparing],
            "seed": 0,
        }
        self.llm = LLM(**engine_kwargs(model, settings, **ours | more))

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def startup(self, settings: dict[str, Any]) -> Startup:
        """What settings would make of this model."""
        return _startup(self.llm.llm_engine.vllm_config, settings)

    def kv_read(self, settings: dict[str, Any], seq_len: int) -> float:
        """KV bytes that a decode step reads, as a share of dense attention's."""
        startup = self.startup(settings)
        return round(kv_read_share(startup.plan, startup.config, seq_len), 5)

    def configure(self, settings: dict[str, Any]) -> None:
        """Run under other settings from now on."""
        if settings != self.settings:
            self.llm.collective_rpc("calibration_configure", args=(settings,))
            self.settings = settings

    def warm(self, prompts: Sequence[Sequence[int]]) -> None:
        """Let the prefix cache hold the prompts."""
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        params.extra_args = {SETTINGS: self.settings}
        self.llm.generate(_inputs(prompts), params, use_tqdm=False)

    def force(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        reference: torch.Tensor | None,
    ) -> Pass:
        """Decode given tokens, all sequences together, and compare every step.

        Args:
            tokens: Of each prompt, as many for all.
            reference: Of a pass over the same tokens; None to make one.
        """
        found = Pass(len(prompts), len(tokens[0]), reference)
        Comparing.current = found
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=len(forced),
                ignore_eos=True,
                detokenize=False,
                extra_args={FORCED: [i, list(forced)], SETTINGS: self.settings},
            )
            for i, forced in enumerate(tokens)
        ]
        try:
            self.llm.generate(_inputs(prompts), params, use_tqdm=False)
        finally:
            Comparing.current = None
        return found

    def answer(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], stop: bool
    ) -> list[list[int]]:
        """Continue prompts greedily.

        Args:
            stop: Whether the model's end of text ends an answer.
        """
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=limit,
                ignore_eos=not stop,
                extra_args={SETTINGS: self.settings},
            )
            for limit in max_tokens
        ]
        outputs = self.llm.generate(_inputs(prompts), params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _inputs(prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]
