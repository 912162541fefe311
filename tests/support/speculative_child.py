"""Speculative decoding on the real engine: arguments FOLDER RESULTS REQUESTS NAME...

REQUESTS is how many there are, "all" or "few"; a NAME is one of `RUNS`. RESULTS is
written, as JSON; drafts are built beside it. In a process of its own: vLLM's sampler of
drafts is a Triton kernel, and Triton reads TRITON_INTERPRET when it is imported.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.models import build_eagle_head, build_random_model, random_prompt

VOCAB_SIZE, NUM_LAYERS, MODEL_LEN = 16, 4, 400
BLOCK_BYTES = NUM_LAYERS * 2 * 16 * 2 * 32 * 4  # 16 tokens, 2 KV heads of 32, fp32
SETTINGS = {
    "dense_layers": [0],
    "select_layers": [1],
    "token_budget": 64,
    "select_block_size": 8,
    "select_attends": "everything",
}
# Few words, so that drafts are found, and prompts that repeat themselves; they arrive
# in chunks beside decodes. The first two stay short for a while.
LENGTHS, STEPS, MAX_TOKENS = (40, 20, 333, 150), (0, 0, 2, 6), 24
FEW_TOKENS = 8  # of the first and the last of these requests


def arrivals(few: bool = False) -> list[tuple[int, list[int], int]]:
    def prompt(seed: int, length: int) -> list[int]:
        words = [token % VOCAB_SIZE for token in random_prompt(30, seed)]
        return (words * 20)[:length]

    prompts = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    found = [(step, one, MAX_TOKENS) for step, one in zip(STEPS, prompts, strict=True)]
    if few:
        return [(0, found[i][1], FEW_TOKENS) for i in (0, 3)]
    return found


def run(
    requests: list[tuple[int, list[int], int]],
    model: Path,
    speculation: dict | None,
    **engine: Any,
) -> dict:
    from tests.support.asking import generate, serve
    from tests.support.engines import Engines, runner, scheduler
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
        found = serve(llm, requests, logprobs=3)
    core = scheduler(llm)
    layers = runner(llm).vllm_config.compilation_config.static_forward_context
    # What a next turn finds of the first conversations in the prefix cache.
    turns = [
        prompt + answer.token_ids
        for (_, prompt, _), answer in zip(requests, found, strict=True)
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
        # By layer: whether vLLM says that it drafts, and whether it can be sparse.
        "layers": {
            name: [layer.is_draft_layer, layer.impl.state is not None]
            for name, layer in layers.items()
            if hasattr(layer, "impl")  # experts are among them
        },
    }


def assert_alike(results: dict, speculative: str, plain: str) -> None:
    """Both runs gave the same tokens, by the same probabilities."""
    pairs = zip(results[speculative]["answers"], results[plain]["answers"], strict=True)
    for found, wanted in pairs:
        assert found["token_ids"] == wanted["token_ids"]
        for step, expected in zip(found["logprobs"], wanted["logprobs"], strict=True):
            for token in step.keys() & expected.keys():
                assert abs(step[token] - expected[token]) < 1e-3


NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


def draft_model(folder: Path) -> dict:
    return {
        "method": "draft_model",
        "model": str(folder),
        "num_speculative_tokens": 2,
    }


def shallow_model(folder: Path) -> dict:
    """A draft model of another depth and other heads than the target."""
    heads = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    build_random_model(
        folder, "llama", num_hidden_layers=1, vocab_size=VOCAB_SIZE, **heads
    )
    return draft_model(folder)


def eagle(folder: Path, target: Path) -> dict:
    return {
        "method": "eagle",
        "model": str(build_eagle_head(folder, target)),
        "num_speculative_tokens": 2,
        "draft_load_config": {"load_format": "dummy"},
    }


# MTP: the target's config names a further layer, which drafts.
MTP = {
    "method": "mtp",
    "num_speculative_tokens": 1,
    "draft_load_config": {"load_format": "dummy"},
}


def mixture(folder: Path) -> Path:
    """A target for MTP, of layers without experts and one with."""
    if folder.exists():
        return folder
    return build_random_model(
        folder,
        "glm4_moe",
        num_hidden_layers=NUM_LAYERS,
        vocab_size=VOCAB_SIZE,
        first_k_dense_replace=NUM_LAYERS - 1,
        num_nextn_predict_layers=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
    )


FEW_BLOCKS = {"kv_cache_memory_bytes": 27 * BLOCK_BYTES}
# What is computed again after a preemption is dense, so only there the same.
EXACT = {"tidal": {"token_budget": MODEL_LEN, "min_sparse_len": 0}}
OTHER = {"tidal": {"scope": "query_head", "select_attends": "chosen"}}
# Arguments of `run`, of a target, and a folder to build others in.
RUNS: dict[str, Callable[[Path, Path], tuple[Path, dict | None, dict]]] = {
    "plain": lambda target, _: (target, None, {}),
    "ngram": lambda target, _: (target, NGRAM, {}),
    "other settings": lambda target, _: (target, NGRAM, OTHER),
    "plain other settings": lambda target, _: (target, None, OTHER),
    "preempted": lambda target, _: (target, NGRAM, EXACT | FEW_BLOCKS),
    "plain exact": lambda target, _: (target, None, EXACT),
    "draft model": lambda target, _: (target, draft_model(target), {}),
    "shallow draft": lambda target, at: (target, shallow_model(at / "shallow"), {}),
    "eagle": lambda target, at: (target, eagle(at / "eagle", target), {}),
    "plain mixture": lambda _, at: (mixture(at / "mixture"), None, {}),
    "mtp": lambda _, at: (mixture(at / "mixture"), MTP, {}),
}


def main() -> None:
    from tests.support.interpreter import patch_once

    patch_once()
    target, results = map(Path, sys.argv[1:3])
    requests, names = arrivals(few=sys.argv[3] == "few"), sys.argv[4:]
    # NOTE: vLLM's drafting code asks the GPU for its age.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    found = {}
    for name in names:
        model, speculation, engine = RUNS[name](target, results.parent)
        found[name] = run(requests, model, speculation, **engine)
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
