"""Speculative decoding on the real engine: arguments FOLDER RESULTS.

In a process of its own: vLLM's sampler of drafts is a Triton kernel, and Triton reads
TRITON_INTERPRET when it is imported. RESULTS is written, as JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE, NUM_LAYERS, MODEL_LEN = 16, 4, 400
BLOCK_BYTES = NUM_LAYERS * 2 * 16 * 2 * 32 * 4  # 16 tokens, 2 KV heads of 32, fp32
SETTINGS = {
    "dense_layers": [0],
    "select_layers": [1],
    "token_budget": 64,
    "select_block_size": 8,
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
# Few words, so that drafts are found, and prompts that repeat themselves; they arrive
# in chunks beside decodes. The first two stay short for a while.
LENGTHS, STEPS, MAX_TOKENS = (40, 20, 333, 150), (0, 0, 2, 6), 24


def arrivals() -> list[tuple[int, list[int], int]]:
    from tests.support.models import random_prompt

    def prompt(seed: int, length: int) -> list[int]:
        words = [token % VOCAB_SIZE for token in random_prompt(30, seed)]
        return (words * 20)[:length]

    prompts = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    return [(step, one, MAX_TOKENS) for step, one in zip(STEPS, prompts, strict=True)]


def run(model: Path, speculation: dict | None, **engine: Any) -> dict:
    from tests.support.asking import generate, serve
    from tests.support.engines import Engines, scheduler
    from tests.support.watching import counters, watched

    settings = SETTINGS | engine.pop("tidal", {})
    if speculation is not None:
        engine["speculative_config"] = speculation
    llm = Engines()(
        model,
        tidal=settings,
        max_model_len=MODEL_LEN,
        max_num_batched_tokens=128,
        **engine,
    )
    with watched(llm) as seen:
        found = serve(llm, arrivals(), logprobs=3)
    core = scheduler(llm)
    # What a next turn finds of the first conversations in the prefix cache.
    turns = [
        prompt + answer.token_ids
        for (_, prompt, _), answer in zip(arrivals(), found, strict=True)
    ]
    again = generate(llm, turns, max_tokens=1)
    return {
        "answers": [dataclasses.asdict(answer) for answer in found],
        "cached": [answer.num_cached_tokens for answer in again],
        "counters": dict(counters(llm)),
        "scheduled": seen.tokens,
        "preemptions": seen.num_preemptions,
        "scheduler": type(core).__name__,
        "left": [len(core._clean_positions), len(core._to_announce)],
    }


def main() -> None:
    from tests.support.interpreter import patch_once

    patch_once()
    model, results = Path(sys.argv[1]), Path(sys.argv[2])
    # NOTE: vLLM's drafting code asks the GPU for its age.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    itself = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2}
    few_blocks = {"kv_cache_memory_bytes": 27 * BLOCK_BYTES}
    # What is computed again after a preemption is dense, so only there the same.
    exact = {"token_budget": MODEL_LEN, "min_sparse_len": 0}
    other = {"scope": "query_head", "select_attends": "chosen"}
    found = {
        "plain": run(model, None),
        "ngram": run(model, NGRAM),
        "other settings": run(model, NGRAM, tidal=other),
        "plain other settings": run(model, None, tidal=other),
        "preempted": run(model, NGRAM, tidal=exact, **few_blocks),
        "plain exact": run(model, None, tidal=exact),
        "draft model": run(model, itself),
    }
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
