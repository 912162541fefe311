"""dense_decode, and score_blocks: its lse and block_lse, without V."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import naive
from tests.kernels.batches import (
    DTYPES,
    GROUPS,
    LAYOUTS,
    SELECT_BLOCK_SIZES,
    Batch,
    batches,
    law,
    make_batch,
)
from tests.kernels.exact import assert_within
from tests.kernels.harness import assert_equal, dense, score
from tidal_vllm.kernels import Workspace, reference
from tidal_vllm.kernels.reference import decode, kv_runs


def check(batch: Batch, select_block_size: int | None, tile_pairs: int = 4096) -> None:
    with mock.patch.object(decode, "TILE_PAIRS", tile_pairs):
        output, lse, block_lse = dense(reference, batch, select_block_size)
        scores_alone = (
            None
            if select_block_size is None
            else score(reference, batch, select_block_size)
        )
    exact, exact_lse, scores = naive.decode(
        batch.query, batch.keys, batch.values, batch.scale
    )
    bound = batch.exact(size=select_block_size)
    assert output.dtype == batch.query.dtype
    assert lse.dtype == torch.float32
    assert_within(output, exact, bound.output_error, "output")
    assert_within(lse, exact_lse, bound.lse_error, "lse")
    if select_block_size is None:
        assert block_lse is None
        return
    shape = (*batch.query.shape[:2], -(-batch.longest // select_block_size))
    exact_blocks = naive.block_lse(scores, *shape, select_block_size)
    scored_lse, scored = scores_alone
    assert_within(scored_lse, exact_lse, bound.lse_error, "lse without values")
    for found in (block_lse, scored):
        assert found.dtype == torch.float32
        assert_within(found, exact_blocks, bound.block_lse_error, "block_lse")


@law
@given(
    batches(),
    st.sampled_from((None, *SELECT_BLOCK_SIZES)),
    st.sampled_from((1, 64, 128, 4096)),
)
def test_it_means_what_the_loops_say(batch, select_block_size, tile_pairs):
    check(batch, select_block_size, tile_pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(layout, dtype):
    check(make_batch([37, 0, 64], layout=layout, dtype=dtype), 4, tile_pairs=64)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("group", GROUPS)
def test_every_head_grouping(group, num_kv_heads):
    check(make_batch([50, 17], group=group, num_kv_heads=num_kv_heads), 16)


@pytest.mark.parametrize("seq_len", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 97])
@pytest.mark.parametrize("select_block_size", SELECT_BLOCK_SIZES)
def test_lengths_around_block_and_tile_boundaries(seq_len, select_block_size):
    check(make_batch([seq_len]), select_block_size, tile_pairs=64)  # 32 tokens


@pytest.mark.parametrize("num_tiles", [1, 2])
def test_lengths_around_the_real_tile(num_tiles):
    edge = num_tiles * decode.TILE_PAIRS
    for seq_len in (edge - 1, edge, edge + 1):
        batch = make_batch([seq_len], num_kv_heads=1, group=2)
        output, lse, block_lse = dense(reference, batch, 16)
        exact = batch.exact(size=16)
        assert_within(output, exact.output, exact.output_error, "output")
        assert_within(lse, exact.lse, exact.lse_error, "lse")
        assert_within(block_lse, exact.block_lse, exact.block_lse_error, "block_lse")


def test_a_far_lighter_block_keeps_its_lse():
    """It must not underflow because another block is e**200 times heavier."""
    batch = make_batch([48], num_kv_heads=1, group=1, head_size=4)
    batch.query[:] = torch.tensor([1.0, 0, 0, 0])
    batch.kv_cache[batch.block_table[0, 1], :, :, 0] += 400
    batch.keys[0][16:32, :, 0] += 400
    check(batch, 16)
    check(batch, 4)


def test_an_empty_row_and_one_left_out_give_zeros_and_no_mass():
    batch = make_batch([0, 20, -3, 0])
    output, lse, block_lse = dense(reference, batch, 4)
    for row in (0, 2, 3):
        assert torch.equal(output[row], torch.zeros_like(output[row]))
        assert (lse[row] == -math.inf).all()
        assert (block_lse[row] == -math.inf).all()
    assert lse[1].isfinite().all()


def test_a_batch_of_empty_rows_and_an_empty_batch():
    for lens in ([0, 0], [-1, -20], []):
        batch = make_batch(lens)
        output, lse, block_lse = dense(reference, batch, 4)
        assert not output.any()
        assert (lse == -math.inf).all()
        assert block_lse.shape == (len(lens), batch.num_heads, 0)


@law
@given(batches(min_seqs=3), st.data())
def test_a_batch_permuted_gives_the_output_permuted_bit_for_bit(batch, data):
    order = data.draw(st.permutations(range(3)))[: data.draw(st.integers(1, 3))]
    output, lse, block_lse = dense(reference, batch, 4)
    output2, lse2, block_lse2 = dense(reference, batch.rows(order), 4)
    assert torch.equal(output2, output[order])
    assert torch.equal(lse2, lse[order])
    assert torch.equal(block_lse2, block_lse[order][..., : block_lse2.shape[2]])


def test_a_row_is_the_same_with_and_without_block_lse():
    batch = make_batch([200, 33])
    plain = dense(reference, batch)
    selecting = dense(reference, batch, 16)
    assert torch.equal(plain[0], selecting[0])
    assert torch.equal(plain[1], selecting[1])


def test_it_runs_outside_inference_mode_after_running_inside():
    batch = make_batch([40])
    kv_runs._scratch.buffers.clear()
    with torch.inference_mode():
        inside = dense(reference, batch)
    outside = dense(reference, batch)
    assert torch.equal(inside[0], outside[0])


def test_a_nan_in_one_sequence_stays_there():
    batch = make_batch([40, 40])
    batch.kv_cache[batch.block_table[1, 2], :, 0] = math.nan
    output, lse, _ = dense(reference, batch)
    assert not output[0].isnan().any()
    assert output[1].isnan().all()
    assert lse[1].isnan().all()


OPS = pytest.mark.parametrize("op", [reference.dense_decode, reference.score_blocks])


@OPS
@pytest.mark.parametrize("select_block_size", [0, -1, 3, 32])
def test_a_select_block_size_that_does_not_divide_is_refused(op, select_block_size):
    batch = make_batch([5])
    args = batch.args(select_block_size=select_block_size)
    with pytest.raises(ValueError, match=f"select_block_size = {select_block_size}"):
        op(args, batch.seq_lens)


@OPS
def test_shapes_that_do_not_fit_are_refused(op):
    batch = make_batch([5])
    args = batch.args(query=batch.query[..., :4], select_block_size=16)
    with pytest.raises(ValueError, match="2 \\* head_size"):
        op(args, batch.seq_lens)
    args = batch.args(query=batch.query[:, :3], select_block_size=16)
    with pytest.raises(ValueError, match="3 heads must be a multiple of 2"):
        op(args, batch.seq_lens)


def test_without_a_select_block_size_the_last_scores_stay():
    """A SELECT layer's scores outlive the plain decodes behind it."""
    batch = make_batch([40])
    scores = torch.zeros(1)
    args = batch.args(workspace=Workspace(block_lse=scores))
    reference.dense_decode(args, batch.seq_lens)
    assert args.workspace.block_lse is scores


@OPS
def test_lengths_beyond_the_batch_are_not_looked_at(op):
    batch = make_batch([40, 20])
    args, more = (batch.args(select_block_size=16) for _ in range(2))
    op(args, batch.seq_lens)
    op(more, torch.cat([batch.seq_lens, torch.tensor([2**20, 0, -1])]))
    found = [(a.output, a.workspace.lse, a.workspace.block_lse) for a in (more, args)]
    assert_equal(*found)
