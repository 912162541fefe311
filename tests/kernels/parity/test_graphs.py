"""On a GPU: a captured step replays to the bits of an eager one, on other lengths.

Rows that are left out change too.
"""

import pytest
import torch

from tests.kernels.parity.harness import make_paged
from tidal_vllm import kernels as ops
from tidal_vllm.plan.rule import SelectionRule

RULE = SelectionRule(
    token_budget=512,
    select_block_size=16,
    sink_tokens=4,
    recent_tokens=64,
    sparse_threshold=512,
)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("requested", ["triton", "auto"])
def test_replay_equals_eager(device, requested):
    dtype = torch.bfloat16
    chosen = ops.choose(device, requested=requested, head_size=128, dtype=dtype)
    batches = [
        make_paged(device, lens, num_kv_heads=2, group=4, head_size=128, seed=seed)
        for seed, lens in enumerate([(3000, 17, 900, 0, -1), (1, -1, 0, 513, 2999)])
    ]
    work = chosen.allocate_workspace(5, 8, 1, 128, 200, device)
    width = max(paged.block_table.shape[1] for paged in batches)
    blocks = max(len(paged.kv_cache) for paged in batches)
    query = torch.empty_like(batches[0].query)
    cache = torch.empty(blocks, 2, 16, 256, dtype=dtype, device=device)
    table = torch.zeros(5, width, dtype=torch.int32, device=device)
    seq_lens = torch.zeros(5, dtype=torch.int32, device=device)
    topk_blocks = torch.empty(2, 5, 1, 32, dtype=torch.int32, device=device)
    topk_lens = torch.zeros(2, 5, 1, dtype=torch.int32, device=device)
    outputs = torch.empty(2, *query.shape, dtype=dtype, device=device)
    given = dict(scale=batches[0].batch.scale, workspace=work)

    def select(choice):
        chosen.select_blocks(
            seq_lens,
            rule=RULE,
            workspace=work,
            topk_blocks=topk_blocks[choice],
            topk_lens=topk_lens[choice],
        )

    def step():
        chosen.dense_decode(
            *(query, cache, table, seq_lens),
            **given,
            output=outputs[0],
            select_block_size=16,
        )
        select(0)
        chosen.score_blocks(
            *(query, cache, table, seq_lens), **given, select_block_size=16
        )
        select(1)
        chosen.sparse_decode(
            *(query, cache, table, topk_blocks[1], topk_lens[1], seq_lens),
            **given,
            output=outputs[1],
            select_block_size=16,
        )

    def load(paged):
        query.copy_(paged.query)
        cache[: len(paged.kv_cache)] = paged.kv_cache
        table[:, : paged.block_table.shape[1]] = paged.block_table
        seq_lens.copy_(paged.seq_lens)
        for written in (outputs, topk_blocks, topk_lens):
            written.fill_(42)

    eager = []
    for paged in batches:
        load(paged)
        step()
        eager.append((outputs.clone(), topk_blocks.clone(), topk_lens.clone()))
    seq_lens.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for paged, expected in zip(batches, eager, strict=True):
        load(paged)
        graph.replay()
        found = (outputs, topk_blocks, topk_lens)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
