"""Through `choose`: one decode step as the engine runs it, and what is covered."""

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.batches import Batch, Sets
from tests.kernels.harness import (
    assert_attends,
    assert_same_lse,
    batch_on,
    exact_of,
)
from tests.support.rules import rule_of
from tidal_vllm.kernels import DecodeArgs, Kernels, choose, workspace
from tidal_vllm.validators import TidalConfigError

RULE = rule_of(96, 16, sinks=4, recent=20)
DTYPE = torch.bfloat16


@pytest.fixture(params=["auto", "triton"])
def engine_kernels(request, device):
    if device.type == "cpu" and request.param == "auto":
        pytest.skip("auto is the reference on a CPU")
    return choose(device, requested=request.param, head_size=64, dtype=DTYPE)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    monkeypatch.setattr(workspace, "MAX_SPLITS", 3)
    monkeypatch.setattr(workspace, "MIN_SPLITS", 1)


def decode_args(kernels: Kernels, batch: Batch, max_blocks: int = 20) -> DecodeArgs:
    """As an engine has them: a workspace and sets for five rows, of one set each."""
    num_heads, head_size = batch.query.shape[1:]
    shape = (5, num_heads, 1, head_size, max_blocks)
    int32 = dict(dtype=torch.int32, device=batch.device)
    return batch.args(
        workspace=kernels.allocate_workspace(*shape, batch.device),
        select_block_size=16,
        topk_blocks=torch.full((5, 1, 6), -1, **int32),
        topk_lens=torch.zeros(5, 1, **int32),
    )


def test_one_step(engine_kernels, device):
    batch = batch_on(device, (300, 0, 90), num_kv_heads=2, group=2, head_size=64)
    args, ops = decode_args(engine_kernels, batch), engine_kernels.ops

    ops.dense_decode(args, batch.seq_lens)
    assert_attends(args.output, exact_of(batch))
    assert_same_lse(args.workspace.lse[:3], exact_of(batch))

    ops.select_blocks(args, batch.seq_lens, RULE)
    assert args.topk_lens[:3, 0].tolist() == [6, 0, 6]

    args.output.fill_(math.nan)
    ops.sparse_decode(args, batch.seq_lens)
    wanted = exact_of(batch, batch.positions(sets_of(args), 16))
    assert_attends(args.output, wanted)
    assert_same_lse(args.workspace.lse[:3], wanted)


def sets_of(args: DecodeArgs) -> Sets:
    num_rows = len(args.query)
    rows = zip(args.topk_blocks[:num_rows], args.topk_lens[:num_rows], strict=True)
    return [
        [blocks[:n].tolist() for blocks, n in zip(row, lens.tolist(), strict=True)]
        for row, lens in rows
    ]


@pytest.mark.extended
def test_rows_that_choose_beside_rows_that_keep_their_choice(engine_kernels, device):
    """As a SELECT layer that attends to what it has chosen; two steps of it."""
    lens = (300, 90, 0, 170)
    batch = batch_on(device, lens, num_kv_heads=2, group=2, head_size=64)
    plain = choose("cpu", requested="reference", head_size=64, dtype=DTYPE)
    on_cpu = batch.to("cpu")
    on_cpu = replace(on_cpu, query=on_cpu.query.float())
    found = steps_of_a_select_layer(engine_kernels, batch)
    wanted = steps_of_a_select_layer(plain, on_cpu)
    for (output, sets), (_, wanted_sets) in zip(found, wanted, strict=True):
        assert sets == wanted_sets
        assert_attends(output, exact_of(batch, batch.positions(sets, 16)))


def steps_of_a_select_layer(
    kernels: Kernels, batch: Batch
) -> list[tuple[torch.Tensor, Sets]]:
    """Outputs and sets; in the second step rows 1 and 3 keep theirs, left out."""
    args, ops = decode_args(kernels, batch), kernels.ops
    found = []
    for keep in ([], [1, 3]):
        lens = batch.seq_lens.clone()
        lens[keep] = -1
        args.query = -batch.query if keep else batch.query
        ops.score_blocks(args, lens)
        ops.select_blocks(args, lens, RULE)
        args.query, args.output = batch.query, torch.full_like(batch.query, math.nan)
        ops.sparse_decode(args, batch.seq_lens)
        found.append((args.output, sets_of(args)))
    return found


@pytest.mark.parametrize(
    "needed, words",
    [
        ({"head_size": 512}, "head_size = 512: allowed 1 to 256"),
        ({"dtype": torch.float64}, "dtype = torch.float64: allowed torch.float16"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype = fp8_e5m2"),
        (
            {"kv_cache_dtype": "float16"},
            "float16 beside torch.bfloat16: allowed 'auto'",
        ),
        ({"select_block_size": 256}, "select_block_size = 256 at head_size 128"),
        ({"select_block_size": 128, "head_size": 256}, "must fit into 64 KiB"),
    ],
)
def test_triton_refuses(device, needed, words):
    needed = {"head_size": 128, "dtype": DTYPE, **needed}
    with pytest.raises(TidalConfigError) as caught:
        choose(device, requested="triton", **needed)
    assert "the Triton kernels do not cover" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "needed",
    [
        {"kv_cache_dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e4m3", "dtype": torch.float16},
        {"dtype": torch.float32, "head_size": 80},
        {"select_block_size": 128},
        {"select_block_size": 64, "head_size": 256},
    ],
)
def test_triton_covers(device, needed):
    needed = {"head_size": 128, "dtype": DTYPE, **needed}
    kernels = choose(device, requested="triton", **needed)
    assert (kernels.name, kernels.capturable) == ("triton", True)
    assert kernels.reason.startswith("Triton kernels on ")
