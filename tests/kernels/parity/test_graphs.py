"""On a GPU: a captured step replays to the bits of an eager one, on other lengths.

Rows that are left out change too.
"""

import pytest
import torch

from tests.kernels.harness import batch_on
from tests.support.rules import rule_of
from tidal_vllm.kernels import DecodeArgs, choose

RULE = rule_of(512, 16, sinks=4, recent=64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("requested", ["triton", "auto"])
def test_replay_equals_eager(device, requested):
    dtype = torch.bfloat16
    kernels = choose(device, requested=requested, head_size=128, dtype=dtype)
    batches = [
        batch_on(device, lens, num_kv_heads=2, group=4, head_size=128, seed=seed)
        for seed, lens in enumerate([(3000, 17, 900, 0, -1), (1, -1, 0, 513, 2999)])
    ]
    width = max(batch.block_table.shape[1] for batch in batches)
    blocks = max(len(batch.kv_cache) for batch in batches)
    query = torch.empty_like(batches[0].query)
    cache = torch.empty(blocks, 2, 16, 256, dtype=dtype, device=device)
    table = torch.zeros(5, width, dtype=torch.int32, device=device)
    seq_lens = torch.zeros(5, dtype=torch.int32, device=device)
    topk_blocks = torch.empty(2, 5, 1, 32, dtype=torch.int32, device=device)
    topk_lens = torch.zeros(2, 5, 1, dtype=torch.int32, device=device)
    outputs = torch.empty(2, *query.shape, dtype=dtype, device=device)
    work = kernels.allocate_workspace(5, 8, 1, 128, 200, device)

    def args(nth: int) -> DecodeArgs:
        return batches[0].args(
            query=query,
            kv_cache=cache,
            block_table=table,
            output=outputs[nth],
            workspace=work,
            select_block_size=16,
            topk_blocks=topk_blocks[nth],
            topk_lens=topk_lens[nth],
        )

    dense_args, sparse_args, ops = args(0), args(1), kernels.ops

    def step():
        ops.dense_decode(dense_args, seq_lens)
        ops.select_blocks(dense_args, seq_lens, RULE)
        ops.score_blocks(sparse_args, seq_lens)
        ops.select_blocks(sparse_args, seq_lens, RULE)
        ops.sparse_decode(sparse_args, seq_lens)

    def load(batch):
        query.copy_(batch.query)
        cache[: len(batch.kv_cache)] = batch.kv_cache
        table[:, : batch.block_table.shape[1]] = batch.block_table
        seq_lens.copy_(batch.seq_lens)
        for written in (outputs, topk_blocks, topk_lens):
            written.fill_(42)

    eager = []
    for batch in batches:
        load(batch)
        step()
        eager.append((outputs.clone(), topk_blocks.clone(), topk_lens.clone()))
    seq_lens.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for batch, expected in zip(batches, eager, strict=True):
        load(batch)
        graph.replay()
        found = (outputs, topk_blocks, topk_lens)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
