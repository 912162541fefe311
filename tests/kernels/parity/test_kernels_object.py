"""Through `ops.choose`: one decode step as the engine runs it, and what is covered."""

import math

import pytest
import torch

from tests.kernels.parity.harness import (
    assert_attends,
    assert_same_lse,
    exact_of,
    make_paged,
    tokens_of,
)
from tidal_vllm import kernels as ops
from tidal_vllm.kernels import workspace
from tidal_vllm.plan.rule import SelectionRule
from tidal_vllm.validators import TidalConfigError

RULE = SelectionRule(
    token_budget=96,
    select_block_size=16,
    sink_tokens=4,
    recent_tokens=20,
    sparse_threshold=96,
)
DTYPE = torch.bfloat16


@pytest.fixture(params=["auto", "triton"])
def chosen(request, device):
    if device.type == "cpu" and request.param == "auto":
        pytest.skip("auto is the reference on a CPU")
    return ops.choose(device, requested=request.param, head_size=64, dtype=DTYPE)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    monkeypatch.setattr(workspace, "MAX_SPLITS", 3)
    monkeypatch.setattr(workspace, "MIN_SPLITS", 1)


def test_one_step(chosen, device):
    paged = make_paged(device, (300, 0, 90), num_kv_heads=2, group=2, head_size=64)
    args = (paged.query, paged.kv_cache, paged.block_table)
    work = chosen.allocate_workspace(5, 4, 1, 64, 20, device)
    output = torch.full_like(paged.query, math.nan)
    given = dict(scale=paged.batch.scale, output=output, workspace=work)
    topk_blocks = torch.empty(5, 1, 6, dtype=torch.int32, device=device)
    topk_lens = torch.empty(5, 1, dtype=torch.int32, device=device)

    chosen.dense_decode(*args, paged.seq_lens, **given, select_block_size=16)
    assert_attends(output, exact_of(paged), paged)
    assert_same_lse(work.lse, exact_of(paged), paged)

    chosen.select_blocks(
        paged.seq_lens,
        rule=RULE,
        workspace=work,
        topk_blocks=topk_blocks,
        topk_lens=topk_lens,
    )
    assert topk_lens[:3, 0].tolist() == [6, 0, 6]

    chosen.sparse_decode(
        *(*args, topk_blocks, topk_lens, paged.seq_lens),
        **given,
        select_block_size=16,
    )
    sets = as_lists(topk_blocks[:3], topk_lens[:3])
    wanted = exact_of(paged, tokens_of(paged, sets, 16))
    assert_attends(output, wanted, paged)
    assert_same_lse(work.lse, wanted, paged)


def as_lists(topk_blocks, topk_lens):
    return [
        [blocks[:n].tolist() for blocks, n in zip(row, lens, strict=True)]
        for row, lens in zip(topk_blocks, topk_lens.tolist(), strict=True)
    ]


@pytest.mark.extended
def test_rows_that_choose_beside_rows_that_keep_their_choice(chosen, device):
    """As a SELECT layer that attends to what it has chosen; two steps of it."""
    paged = make_paged(device, (300, 90, 0, 170), num_kv_heads=2, group=2, head_size=64)
    plain = ops.choose("cpu", requested="reference", head_size=64, dtype=DTYPE)
    found = [
        steps_of_a_select_layer(kernels, tensors, paged.batch.scale)
        for kernels, tensors in (
            (chosen, (paged.query, paged.kv_cache, paged.block_table, paged.seq_lens)),
            (plain, paged.cpu),
        )
    ]
    for (output, sets), (_, wanted) in zip(*found, strict=True):
        assert sets == wanted
        assert_attends(output, exact_of(paged, tokens_of(paged, sets, 16)), paged)


def steps_of_a_select_layer(kernels, tensors, scale):
    """Outputs and sets; in the second step rows 1 and 3 keep theirs, left out."""
    query, cache, table, seq_lens = tensors
    work = kernels.allocate_workspace(4, 4, 1, 64, 20, query.device)
    topk_blocks = torch.full((4, 1, 6), -1, dtype=torch.int32, device=query.device)
    topk_lens = torch.zeros(4, 1, dtype=torch.int32, device=query.device)
    given = dict(scale=scale, workspace=work, select_block_size=16)
    found = []
    for keep in ([], [1, 3]):
        lens = seq_lens.clone()
        lens[keep] = -1
        asked = -query if keep else query
        kernels.score_blocks(asked, cache, table, lens, **given)
        kernels.select_blocks(
            lens,
            rule=RULE,
            workspace=work,
            topk_blocks=topk_blocks,
            topk_lens=topk_lens,
        )
        output = torch.full_like(query, math.nan)
        kernels.sparse_decode(
            *(query, cache, table, topk_blocks, topk_lens, seq_lens),
            **given,
            output=output,
        )
        found.append((output, as_lists(topk_blocks, topk_lens)))
    return found


@pytest.mark.parametrize(
    "case, words",
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
def test_triton_refuses(device, case, words):
    case = {"head_size": 128, "dtype": DTYPE, **case}
    with pytest.raises(TidalConfigError) as caught:
        ops.choose(device, requested="triton", **case)
    assert "the Triton kernels do not cover" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "case",
    [
        {"kv_cache_dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e4m3", "dtype": torch.float16},
        {"dtype": torch.float32, "head_size": 80},
        {"select_block_size": 128},
        {"select_block_size": 64, "head_size": 256},
    ],
)
def test_triton_covers(device, case):
    case = {"head_size": 128, "dtype": DTYPE, **case}
    kernels = ops.choose(device, requested="triton", **case)
    assert (kernels.name, kernels.capturable) == ("triton", True)
    assert kernels.why.startswith("Triton kernels on ")
