"""Methods that choose by PyTorch ops, on kernels: sets of the reference, row by row."""

import math
import pkgutil
from dataclasses import replace

import pytest
import torch

from tests.kernels.batches import Batch, Sets
from tests.kernels.harness import assert_attends, batch_on, exact_of
from tests.support.rules import rule_of
from tidal_vllm.kernels import Kernels, choose, workspace
from tidal_vllm.methods import top_blocks
from tidal_vllm.registry import METHODS

RULE = rule_of(96, 16, sinks=4, recent=20)
LENS = (300, 0, -1, 170, 90)
DTYPE = torch.bfloat16
METHODS_IN_PYTORCH = [n for n, e in METHODS.items() if not e.captures_graphs]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    monkeypatch.setattr(workspace, "MAX_SPLITS", 3)
    monkeypatch.setattr(workspace, "MIN_SPLITS", 1)


@pytest.mark.parametrize("num_sets", [1, 2])
@pytest.mark.parametrize("method", METHODS_IN_PYTORCH)
def test_a_layer_that_chooses_and_attends(monkeypatch, device, method, num_sets):
    """Behind each row is what another layer left; rows come at once, or one by one."""
    kernels = choose(device, requested="triton", head_size=64, dtype=DTYPE)
    batch = batch_on(device, LENS, num_kv_heads=2, group=2, head_size=64)
    on_cpu = batch.to(torch.device("cpu"))
    on_cpu = replace(on_cpu, query=on_cpu.query.float())
    plain = choose("cpu", requested="reference", head_size=64, dtype=DTYPE)
    wanted = [
        layer(method, plain, on_cpu.rows([row]), num_sets)[0][0]
        for row in range(len(LENS))
    ]
    if num_sets > 1:
        monkeypatch.setattr(top_blocks, "SCRATCH_LIMIT", 1)
    found, output = layer(method, kernels, batch, num_sets)
    assert found == wanted
    assert [len(row[0]) for row in found] == [6, 0, 0, 6, 6]
    assert_attends(output, exact_of(batch, batch.positions(found, 16)))


def layer(
    method: str, kernels: Kernels, batch: Batch, num_sets: int
) -> tuple[Sets, torch.Tensor]:
    """What a layer chooses, and what it then gives; nothing where it is left out."""
    num_heads, head_size = batch.query.shape[1:]
    shape = (len(LENS) + 2, num_heads, num_sets, head_size, 25)
    int32 = dict(dtype=torch.int32, device=batch.device)
    args = batch.args(
        workspace=kernels.allocate_workspace(*shape, batch.device),
        output=torch.zeros_like(batch.query),
        select_block_size=16,
        topk_blocks=torch.full((len(LENS) + 2, num_sets, 6), -1, **int32),
        topk_lens=torch.zeros(len(LENS) + 2, num_sets, **int32),
    )
    if args.workspace.block_lse is not None:
        args.workspace.block_lse.fill_(math.inf)
    made = pkgutil.resolve_name(METHODS[method].path)(
        kernels, RULE, attends_to_chosen=True
    )
    position = torch.arange(batch.longest, device=batch.device)
    slots = batch.block_table[:, position // 16] * 16 + position % 16
    slots = slots.long().where(position < batch.seq_lens[:, None], -1)
    made.keys_written("layer", batch.kv_cache, slots.flatten())
    made.select("layer", args, batch.seq_lens)
    kernels.ops.sparse_decode(args, batch.seq_lens)
    rows = zip(args.topk_blocks.tolist(), args.topk_lens.tolist(), strict=True)
    sets = [
        [blocks[:n] for blocks, n in zip(row, lens, strict=True)] for row, lens in rows
    ]
    return sets[: len(batch.lens)], args.output
