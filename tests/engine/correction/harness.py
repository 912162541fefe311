"""Driving an in-process engine step by step, and looking at its KV cache."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tidal_vllm.engine.metrics import CorrectionCounters

MiB = 1 << 20


def engine_kwargs(tidal: dict | None = None, **kwargs: Any) -> dict[str, Any]:
    """Arguments of `LLM`: a small KV cache, few sequences, TIDAL if configured."""
    defaults: dict[str, Any] = {
        "block_size": 16,
        "max_num_seqs": 4,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 32 * MiB,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if tidal is not None:
        defaults["attention_backend"] = "TIDAL"
        defaults["additional_config"] = {"tidal": tidal}
    return defaults | kwargs


def core(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


def scheduler(llm: LLM) -> Any:
    return core(llm).scheduler


def runner(llm: LLM) -> Any:
    return core(llm).model_executor.driver_worker.worker.model_runner


def params(max_tokens: int, **more: Any) -> SamplingParams:
    more = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | more
    return SamplingParams(max_tokens=max_tokens, **more)


def generate(llm: LLM, prompts, max_tokens=16, **more: Any) -> list[list[int]]:
    """Tokens of greedy answers, all prompts in one go."""
    return [list(o.outputs[0].token_ids) for o in ask(llm, prompts, max_tokens, **more)]


def ask(llm: LLM, prompts, max_tokens=16, **more: Any) -> list[Any]:
    """Outputs of all prompts in one go; `max_tokens` may be one for each."""
    counts = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, [params(n, **more) for n in counts], use_tqdm=False)


def kv_of(llm: LLM, request_id: str, first: int, end: int) -> torch.Tensor:
    """KV that the engine holds of a request: [layers, end - first, heads, 2 * size]."""
    (block_ids,) = scheduler(llm).kv_cache_manager.get_block_ids(request_id)
    return kv_in(llm, block_ids, first, end)


def kv_in(llm: LLM, block_ids: list[int], first: int, end: int) -> torch.Tensor:
    caches = runner(llm).kv_caches
    size = caches[0].shape[2]
    positions = torch.arange(first, end)
    blocks = torch.tensor(block_ids)[positions // size]
    return torch.stack([cache[blocks, :, positions % size].clone() for cache in caches])


def relative_errors(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Per layer: norm of the difference over the norm of what is wanted."""
    wanted = wanted.double()
    error = (found.double() - wanted).flatten(1).norm(dim=1)
    return error / wanted.flatten(1).norm(dim=1)


@contextmanager
def watched(llm: LLM) -> Iterator[list[dict[str, tuple[int, int]]]]:
    """Per step: each scheduled request's first position and number of tokens."""
    steps: list[dict[str, tuple[int, int]]] = []
    schedule = scheduler(llm).schedule

    def spied(*args, **kwargs):
        output = schedule(*args, **kwargs)
        requests = scheduler(llm).requests
        if output.num_scheduled_tokens:
            steps.append(
                {
                    req_id: (requests[req_id].num_computed_tokens - count, count)
                    for req_id, count in output.num_scheduled_tokens.items()
                }
            )
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler(llm), "schedule", spied)
        yield steps


@contextmanager
def correcting(
    llm: LLM, interval: int | None, exact_up_to: int | None = None
) -> Iterator[CorrectionCounters]:
    """The engine under another interval; gives the counters of this time.

    Args:
        exact_up_to: Longest sequence whose decoded tokens count as clean. Below what
            the attention keeps, the engine is exact but corrects all the same.
    """
    found = scheduler(llm)
    rule = found.selection_rule
    if exact_up_to is not None:
        fields = {"token_budget": exact_up_to, "sparse_threshold": exact_up_to}
        rule = dataclasses.replace(rule, **fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found, "correction_interval", interval)
        patch.setattr(found, "selection_rule", rule)
        patch.setattr(found, "correction_counters", CorrectionCounters())
        yield found.correction_counters
        assert not found._clean_positions
        assert not found._to_announce
