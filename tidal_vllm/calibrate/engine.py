"""vLLM's engine for calibration: one recorded request, or batches under one setting.

Changes vLLM at run time: the environment, while a calibration runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tidal_vllm.config import TidalConfig
from tidal_vllm.names import NAME

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput

# vLLM's own switches, set before it reads them. In this process, so that a worker's
# failure is ours; the V1 runner, for V2 has another interface for forced tokens.
_SWITCHES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
_LOG_LEVEL = "VLLM_LOGGING_LEVEL"
# Requests of a batch. A step of a small batch costs little more than a step of one
# request; from about here on, arithmetic costs more than reading the weights.
MOST_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model said to one prompt.

    Attributes:
        token_ids: The tokens; in a trial those that were forced.
        agreed: Per token, whether it was the model's own first choice.
        logprobs: Per token, its log probability.
    """

    token_ids: tuple[int, ...]
    agreed: tuple[bool, ...]
    logprobs: tuple[float, ...]


def engine_kwargs(model: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Arguments of `LLM` and `EngineArgs` for calibration.

    Args:
        settings: As in `complete_settings`, for the start; they have to be sparse, so
            that polluted KV never reaches the prefix cache.
        more: Arguments of the user's.
    """
    package = "tidal_vllm.calibrate"
    return {
        "model": model,
        "attention_backend": NAME,
        "additional_config": {"tidal": settings},
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "max_num_seqs": MOST_AT_ONCE,
        "async_scheduling": False,
        "scheduler_cls": f"{package}.trial.TrialScheduler",
        "worker_extension_cls": f"{package}.worker.CalibrationWorker",
        "logits_processors": [f"{package}.trial:ForcedTokens"],
    } | more


def complete_settings(
    config: TidalConfig, dense: Sequence[int], select: Sequence[int]
) -> dict[str, Any]:
    """`additional_config["tidal"]` with nothing left to a profile or preset."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del fields["preset"], fields["profile"]
    return fields | {"dense_layers": list(dense), "select_layers": list(select)}


@contextlib.contextmanager
def switches() -> Iterator[None]:
    """vLLM's environment as calibration needs it, and less of its log."""
    kept = {name: os.environ.get(name) for name in (*_SWITCHES, _LOG_LEVEL)}
    os.environ.update(_SWITCHES)
    os.environ.setdefault(_LOG_LEVEL, "ERROR")
    ours = logging.getLogger("vllm.tidal")
    level = ours.level
    ours.setLevel(logging.ERROR)  # a start-up table per trial says nothing
    try:
        yield
    finally:
        ours.setLevel(level)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class CalibrationEngine:
    """A running engine; use it inside `switches()` and close it.

    Attributes:
        layers: Indices of the layers that take part, ascending.
    """

    def __init__(self, kwargs: dict[str, Any]) -> None:
        from vllm import LLM

        print("Starting vLLM ...", file=sys.stderr, flush=True)
        self._llm = LLM(**kwargs)
        self._settings: dict[str, Any] | None = None
        start = kwargs["additional_config"]["tidal"]
        self._dense = start | {"dense_layers": [], "select_layers": []}
        (self.layers,) = {tuple(found) for found in self._ask("calibration_layers")}

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def record(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        settings: Sequence[dict[str, Any]],
        folder: Path,
    ) -> tuple[Reply, dict[str, np.ndarray] | None]:
        """Answer a prompt densely, recording every decode step.

        Args:
            settings: Keywords of `TidalConfig` to record for, the main one first.
            folder: Existing; each rank leaves its file there, which is then removed.

        Returns:
            The answer, and what `recorder.merge_ranks` makes of the files; None where
            the model stopped with its first token, so that nothing was decoded.
        """
        from tidal_vllm.calibrate.recorder import merge_ranks
        from tidal_vllm.calibrate.worker import rank_file

        self._configure(self._dense)
        self._ask("calibration_record", list(settings))
        (reply,) = self._generate([(prompt, self._dense_params(max_tokens))])
        self._ask("calibration_stop")
        wanted = len(reply.token_ids) - 1
        saved = self._ask("calibration_save", str(folder), wanted)
        if set(saved) != {wanted}:
            raise RuntimeError(f"ranks recorded {saved} decode steps, not {wanted}")
        if wanted == 0:
            return reply, None
        files = [rank_file(folder, rank) for rank in range(len(saved))]
        recorded = merge_ranks(files)
        for path in files:
            path.unlink()
        return reply, recorded

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]
    ) -> list[Reply]:
        """Answer prompts densely, all at once.

        Args:
            prompts: At most what `batches` puts together.
            max_tokens: Of each answer.
        """
        self._configure(self._dense)
        params = map(self._dense_params, max_tokens)
        return self._generate(list(zip(prompts, params, strict=True)))

    def trials(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        settings: dict[str, Any],
    ) -> list[Reply]:
        """Decode given tokens under the settings, after all prompts at once.

        Args:
            prompts: At most what `batches` puts together.
            tokens: What is decoded after each.
            settings: As `complete_settings` makes them.
        """
        self._configure(settings)
        params = [_params(len(t), settings, forced=list(t)) for t in tokens]
        return self._generate(list(zip(prompts, params, strict=True)))

    def batches(self, lengths: Sequence[int]) -> list[range]:
        """Split requests into batches whose KV fits the cache at once.

        So no request of a batch is preempted, which would compute its polluted KV anew,
        and a prompt stays in the prefix cache while its batch is tried.

        Args:
            lengths: Tokens of each request, its answer included.

        Returns:
            Consecutive ranges of positions in `lengths`; one request fits at least.
        """
        kv = self._llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        sizes = [group.kv_cache_spec.block_size for group in kv.kv_cache_groups]
        room = kv.num_blocks // len(sizes) * min(sizes)
        padding = 2 * max(sizes)  # a block that is partly used, and one to spare
        found, first, used = [], 0, 0
        for i, length in enumerate(lengths):
            full = used + length + padding > room or i - first == MOST_AT_ONCE
            if full and i > first:
                found.append(range(first, i))
                first, used = i, 0
            used += length + padding
        return [*found, range(first, len(lengths))] if lengths else []

    def _dense_params(self, max_tokens: int) -> SamplingParams:
        return _params(max_tokens, self._dense)

    def _configure(self, settings: dict[str, Any]) -> None:
        if settings != self._settings:
            self._ask("calibration_configure", settings)
            self._settings = settings

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return self._llm.collective_rpc(method, args=args)

    def _generate(
        self, requests: Sequence[tuple[Sequence[int], SamplingParams]]
    ) -> list[Reply]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt, _ in requests]
        params = [one for _, one in requests]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return [_reply(*output.outputs) for output in outputs]


def _params(
    max_tokens: int, settings: dict[str, Any], forced: list[int] | None = None
) -> SamplingParams:
    """Greedy decoding under settings; the forced tokens are emitted whatever comes."""
    from vllm import SamplingParams

    from tidal_vllm.calibrate.trial import FORCED, SETTINGS

    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=forced is not None,
        detokenize=False,
        logprobs=1,
        extra_args={SETTINGS: settings} | ({FORCED: forced} if forced else {}),
    )


def _reply(completion: CompletionOutput) -> Reply:
    token_ids = tuple(completion.token_ids)
    steps = list(zip(token_ids, completion.logprobs, strict=True))
    return Reply(
        token_ids=token_ids,
        agreed=tuple(found[token].rank == 1 for token, found in steps),
        logprobs=tuple(found[token].logprob for token, found in steps),
    )
