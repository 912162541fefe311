"""Engines of this process: started once, kept, reached into and reconfigured."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, envs

from tidal_vllm.engine.attention import TidalImpl
from tidal_vllm.engine.metrics import COUNTING_WORKER
from tidal_vllm.engine.reconfigure import reconfigure

MiB = 1 << 20
# Engines for the model of `tests/support/drifting.py`, whose context is shorter.
SMALL_ENGINE = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 32 * MiB,
}

_broken: set[LLM] = set()


class Engines:
    """Engines of this process, started once per model and arguments, then kept.

    They live side by side: each has its model, KV cache, scheduler and builders, and
    they share only vLLM's process groups of one rank.
    """

    def __init__(self) -> None:
        self._running: dict[str, LLM] = {}

    def __call__(
        self,
        model: Path,
        tidal: dict | None = None,
        layout: str | None = None,
        **kwargs: Any,
    ) -> LLM:
        """An engine with an empty prefix cache.

        Args:
            tidal: Our settings; None leaves the backend unselected: dense attention.
            layout: The KV cache layout; by default the backend's choice.
            kwargs: More arguments of `LLM`.
        """
        kwargs = engine_kwargs(tidal, **kwargs)
        key = json.dumps([str(model), layout, kwargs], sort_keys=True)
        if self._running.get(key) in {None, *_broken}:
            self._running[key] = _start(model, layout, kwargs)
        llm = self._running[key]
        assert not scheduler(llm).requests, "a request never ended"
        assert llm.reset_prefix_cache(), "blocks are in use: a request never ended"
        return llm

    def shutdown(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # vLLM collects twice per engine; in this big process each takes a second.
            patch.setattr(gc, "collect", lambda *_: 0)
            for llm in self._running.values():
                core(llm).shutdown()
        self._running.clear()


def engine_kwargs(tidal: dict | None = None, **kwargs: Any) -> dict[str, Any]:
    """Arguments of `LLM`: a small KV cache, few sequences, TIDAL if configured."""
    defaults: dict[str, Any] = {
        "block_size": 16,
        "max_num_seqs": 4,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 64 * MiB,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if tidal is not None:
        defaults["attention_backend"] = "TIDAL"
        defaults["additional_config"] = {"tidal": tidal}
        defaults["worker_extension_cls"] = COUNTING_WORKER
    return defaults | kwargs


def _start(model: Path, layout: str | None, kwargs: dict[str, Any]) -> LLM:
    # NOTE: the first engine makes vLLM read its environment once and for all.
    envs.disable_envs_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
        if layout is not None:
            patch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
        return LLM(str(model), **kwargs)


@contextmanager
def unbroken(llm: LLM) -> Iterator[None]:
    """Steps of the engine; one that raises leaves it broken, and the next try fails.

    An engine that is asked again after such a step would hang.
    """
    assert llm not in _broken, "an earlier test broke this engine"
    _broken.add(llm)
    yield
    _broken.remove(llm)


def core(llm: LLM) -> Any:
    """The engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


def scheduler(llm: LLM) -> Any:
    """The scheduler of an in-process engine."""
    return core(llm).scheduler


def runner(llm: LLM) -> Any:
    """The model runner of an in-process engine with one worker."""
    return core(llm).model_executor.driver_worker.worker.model_runner


def impls(llm: LLM) -> list[TidalImpl]:
    """The attention of each layer that TIDAL runs."""
    layers = runner(llm).compilation_config.static_forward_context.values()
    found = [getattr(layer, "impl", None) for layer in layers]
    return [impl for impl in found if isinstance(impl, TidalImpl)]


def builders(llm: LLM) -> list[Any]:
    """The metadata builders of all KV cache groups."""
    return [
        builder
        for groups in runner(llm).attn_groups
        for group in groups
        for builder in group.metadata_builders
    ]


@contextmanager
def reconfigured(llm: LLM, **tidal: Any) -> Iterator[LLM]:
    """The engine under other settings, and then again under its own.

    Prompts stay in the prefix cache, for their KV is dense under all settings.
    """
    undo = reconfigure(runner(llm), tidal)
    try:
        yield llm
    finally:
        undo()
