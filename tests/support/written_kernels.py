"""Kernels as a GPU's are: they write into given tensors, and are told nothing else.

The reference ops behind the kernels' signatures, so that the engine's use of kernels
can be tested in fp32 and at speed. Outside what they must write they leave NaN.
"""

import math
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tidal_vllm import kernels as ops
from tidal_vllm.kernels import dispatch, reference


def dense_decode(
    query,
    kv_cache,
    block_table,
    seq_lens,
    output,
    lse,
    block_lse,
    partial_out,
    partial_lse,
    scale,
    k_scale,
    v_scale,
    select_block_size,
):
    assert (k_scale, v_scale) == (1.0, 1.0)
    _check(query, seq_lens, output, lse, partial_out, partial_lse)
    found = reference.dense_decode(
        query,
        kv_cache,
        block_table,
        seq_lens,
        scale=scale,
        select_block_size=select_block_size,
    )
    _write(found[:2], seq_lens, output, lse)
    if block_lse is not None:
        _write_blocks(found[2], seq_lens, block_lse, select_block_size)


def score_blocks(
    query,
    kv_cache,
    block_table,
    seq_lens,
    lse,
    block_lse,
    partial_lse,
    scale,
    k_scale,
    select_block_size,
):
    assert k_scale == 1.0
    assert query.shape[0] == seq_lens.shape[0] == lse.shape[0]
    assert partial_lse.shape[0] >= query.shape[0]
    for scratch in (lse, partial_lse):
        scratch.fill_(math.nan)
    found = reference.score_blocks(
        query,
        kv_cache,
        block_table,
        seq_lens,
        scale=scale,
        select_block_size=select_block_size,
    )
    _write(found[:1], seq_lens, lse)
    _write_blocks(found[1], seq_lens, block_lse, select_block_size)


def sparse_decode(
    query,
    kv_cache,
    block_table,
    topk_blocks,
    topk_lens,
    seq_lens,
    output,
    lse,
    partial_out,
    partial_lse,
    scale,
    k_scale,
    v_scale,
    select_block_size,
):
    assert (k_scale, v_scale) == (1.0, 1.0)
    _check(query, seq_lens, output, lse, partial_out, partial_lse)
    rows = query.shape[0]
    chosen = (topk_blocks[:rows], topk_lens[:rows])
    found = reference.sparse_decode(
        query,
        kv_cache,
        block_table,
        *chosen,
        seq_lens,
        scale=scale,
        select_block_size=select_block_size,
    )
    _write(found, seq_lens, output, lse)


def select_blocks(
    block_lse,
    lse,
    seq_lens,
    topk_blocks,
    topk_lens,
    mass,
    token_budget,
    select_block_size,
    sink_tokens,
    recent_tokens,
    sparse_threshold,
):
    assert mass.shape[0] >= seq_lens.shape[0]
    rule = SimpleNamespace(
        token_budget=token_budget,
        select_block_size=select_block_size,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
        sparse_threshold=sparse_threshold,
    )
    reference.select_blocks(
        block_lse,
        lse,
        seq_lens,
        rule=rule,
        topk_blocks=topk_blocks,
        topk_lens=topk_lens,
    )


def _check(query, seq_lens, output, lse, partial_out, partial_lse) -> None:
    assert query.shape == output.shape
    assert query.shape[0] == seq_lens.shape[0] == lse.shape[0]
    assert partial_out.shape[0] >= query.shape[0]
    assert partial_out.shape[:-1] == partial_lse.shape
    for scratch in (lse, partial_out, partial_lse):  # nothing outlives a layer
        scratch.fill_(math.nan)


def _write(found, seq_lens, *tensors) -> None:
    """All rows but those that are left out."""
    rows = seq_lens >= 0
    for one, tensor in zip(found, tensors, strict=True):
        tensor[rows] = one[rows]


def _write_blocks(found, seq_lens, block_lse, select_block_size) -> None:
    block_lse.fill_(math.nan)
    for row, seq_len in enumerate(seq_lens.tolist()):
        used = max(-(-seq_len // select_block_size), 0)
        block_lse[row, :, :used] = found[row, :, :used]


@contextmanager
def written_kernels():
    """Let `kernels = "triton"` of the configuration choose these."""
    made = ops.Kernels("written", "for a test", sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch._CANDIDATES, "triton", lambda case: ("", made))
        yield made
