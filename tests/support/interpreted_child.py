"""Runs the GPU path under Triton's interpreter: arguments FOLDER WINDOWED RESULTS.

In a process of its own, since Triton reads TRITON_INTERPRET when it is imported. The
decode kernels, vLLM's own Triton attention and the V2 model runner's kernels are all
interpreted. RESULTS is written, as JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tidal_vllm.kernels import workspace

MODEL_LEN = 232  # 14.5 blocks of 16: vLLM rounds the width of its block table up
SETTINGS = {
    "dense_layers": [0],
    "select_layers": [1],
    "token_budget": 32,
    "select_block_size": 8,
}
# Chunks of 48 tokens, so that prompts come in parts beside decodes; the last prompt
# shares two blocks with the first.
LENGTHS, STEPS, MAX_TOKENS = (62, 9, 36), (0, 1, 2), (9, 8, 5)
# Of WINDOWED, whose first and last layers slide.
WINDOWED = {"dense_layers": [], "select_layers": [1]}
EXACT = {"token_budget": MODEL_LEN, "min_sparse_len": 0, "select_attends": "chosen"}
REUSING = {"reselect_interval": 3}


def arrivals() -> list[tuple[int, list[int], int]]:
    from tests.support.models import random_prompt

    # Seeds without near ties: rounding would decide.
    prompts = [random_prompt(n, seed=n + 116) for n in LENGTHS]
    prompts.append(prompts[0][:33] + random_prompt(10, seed=5))
    return list(zip((*STEPS, 5), prompts, (*MAX_TOKENS, 4), strict=True))


def start(engines: Any, folder: Path, **tidal: Any) -> Any:
    return engines(
        folder,
        tidal=SETTINGS | tidal,
        max_num_seqs=4,
        dtype="float16",
        max_model_len=MODEL_LEN,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=8 << 20,
    )


def answers(llm: Any, requests: int = 4) -> dict:
    from tests.support.asking import serve
    from tests.support.engines import impls, runner, scheduler
    from tests.support.watching import counters

    # Where all blocks are kept nothing is polluted: correct as if it were.
    core, low = scheduler(llm), {"token_budget": 24, "sparse_threshold": 24}
    core.selection_rule = dataclasses.replace(core.selection_rule, **low)
    found = serve(llm, arrivals()[:requests], logprobs=3)
    impl = impls(llm)[0]
    return {
        "answers": [dataclasses.asdict(answer) for answer in found],
        "counters": dict(counters(llm)),
        "corrections": core.correction_counters.corrections,
        "kernels": impl.kernels.name,
        "dense": impl.dense_backend.get_name(),
        "runner": type(runner(llm)).__module__,
    }


def warmed(llm: Any) -> bool:
    """Whether a new builder's launches leave the engine's buffers as they are.

    But for counters, which it allocates anew, zeros.
    """
    from tests.support.engines import builders, impls

    state, (old,) = impls(llm)[0].state, builders(llm)
    selection, workspace = vars(state.selection), vars(state.workspace)
    buffers = [v for v in (selection | workspace).values() if torch.is_tensor(v)]
    for buffer in buffers:
        buffer.fill_(7)
    type(old)(old.kv_cache_spec, old.layer_names, old.vllm_config, old.device)
    counters = (state.workspace.arrivals, state.workspace.digit_counts)
    untouched = all(bool((buffer == 7).all()) for buffer in buffers)
    return len(buffers) >= 8 and untouched and not any(c.any() for c in counters)


def replays(llm: Any) -> dict:
    """A replayed step of four rows, the last of them padding, and the same eagerly."""
    from tests.support.engines import impls, reconfigured, runner
    from tests.support.replay import Graph, common_metadata, random_table, run_layers
    from tidal_vllm.methods.ranks import AgreeingRanks

    generator = torch.Generator().manual_seed(1)
    layers = runner(llm).vllm_config.compilation_config.static_forward_context
    for layer in layers.values():
        layer.kv_cache.normal_(generator=generator)
    impl = impls(llm)[0]
    query = torch.randn(4, impl.num_heads, impl.head_size, generator=generator)
    query, table, lens = query.half(), random_table(4), [200, 40, 33, 0]

    def eager(graph: Graph) -> torch.Tensor:
        real = common_metadata([1, 1, 1], lens[:3], block_table_tensor=table[:3])
        batch = graph.builder.build(0, real)
        assert batch.sparse
        return run_layers(llm, batch, query[:3])

    graph = Graph(llm, 4)
    found = graph.replay(lens, table, query)
    equal = torch.equal(found[:, :3], eager(graph))
    summed: list[tuple[int, ...]] = []

    def sum_over_ranks(mass: torch.Tensor) -> torch.Tensor:
        summed.append(tuple(mass.shape))
        return 2 * mass  # as if another rank had found the same

    method = impl.state.method
    method.ranks = AgreeingRanks(1, 0, sum_over_ranks)
    agreed = torch.equal(found[:, :3], eager(graph)) and summed == [(3, 1, 29)]
    method.ranks = None
    with reconfigured(llm, **SETTINGS, kernels="reference"):
        wanted = eager(Graph(llm, 4))
    differences = (found[:, :3] - wanted).abs().flatten(1).amax(1)
    # NOTE: layer 0 is vLLM's, which leaves rows of padding to whoever reads them.
    return {
        "equal": equal,
        "agreed": agreed,
        "padding": found[1:, 3].abs().max().item(),
        "differences": differences.tolist(),
    }


def main() -> None:
    from tests.support.engines import Engines
    from tests.support.interpreter import patch_once, record_variants

    patch_once()
    variants = record_variants()
    folder, windowed, results = map(Path, sys.argv[1:])
    # The interpreter runs one program after the other: fewer of them.
    workspace.MAX_SPLITS, workspace.MIN_SPLITS = 4, 2
    # NOTE: vLLM's Triton code asks the GPU for its age before it writes KV.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    engines = Engines()
    exact = start(engines, folder, kernels="triton", correction_interval=2, **EXACT)
    reusing = start(engines, folder, kernels="triton", **REUSING)
    windows = start(engines, windowed, kernels="triton", **WINDOWED)
    at_start = set(variants)
    found = {
        "sparse": answers(reusing),
        "exact": answers(exact),
        "windowed": answers(windows, 2),
        "at start": sorted({name for name, *_ in at_start}),
        "first in a request": sorted(map(list, variants - at_start)),
        "replay": replays(start(engines, folder, kernels="triton")),
        "untouched": warmed(exact),
    }
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
