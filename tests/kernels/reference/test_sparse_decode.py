import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import harness, naive
from tests.kernels.batches import (
    DTYPES,
    GROUPS,
    LAYOUTS,
    SELECT_BLOCK_SIZES,
    Batch,
    Sets,
    batches,
    law,
    make_batch,
)
from tests.kernels.exact import assert_within, half_unit
from tests.kernels.harness import dense
from tidal_vllm.config import SCOPES
from tidal_vllm.kernels import reference
from tidal_vllm.kernels.reference import decode, merge_states


def run(
    batch: Batch, sets: Sets, size: int, tile_pairs: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    with mock.patch.object(decode, "TILE_PAIRS", tile_pairs):
        return harness.sparse(reference, batch, sets, size)


def assert_equivalent(one, other, bound):
    """Two computations of the same: each may err, and rounds to its dtype."""
    for actual, expected, error in zip(
        one, other, (bound.output_error, bound.lse_error), strict=True
    ):
        rounding = half_unit(expected.double().nan_to_num(neginf=0.0), expected.dtype)
        assert_within(actual, expected, 2 * error + rounding)


def check(batch, sets, size, tile_pairs=4096):
    output, lse = run(batch, sets, size, tile_pairs)
    positions_of = batch.positions(sets, size)
    exact, exact_lse, _ = naive.decode(
        batch.query, batch.keys, batch.values, batch.scale, positions_of
    )
    assert output.dtype == batch.query.dtype
    assert lse.dtype == torch.float32
    bound = batch.exact(positions_of)
    assert_within(output, exact, bound.output_error, "output")
    assert_within(lse, exact_lse, bound.lse_error, "lse")


@st.composite
def selections(draw, batch, ragged=True):
    """Any blocks in any order; sets of different lengths, empty ones too."""
    size = draw(st.sampled_from(SELECT_BLOCK_SIZES))
    num_sets = draw(
        st.sampled_from(
            [n for n in range(1, batch.num_heads + 1) if batch.num_heads % n == 0]
        )
    )
    sets = []
    for of_row in batch.all_blocks(num_sets, size):
        orders = [draw(st.permutations(blocks)) for blocks in of_row]
        cuts = [draw(st.integers(0, len(of_row[0]))) for _ in range(num_sets)]
        if not ragged:
            cuts = [cuts[0]] * num_sets
        sets.append([b[:cut] for b, cut in zip(orders, cuts, strict=True)])
    return size, sets


@law
@given(batches(max_len=70), st.data(), st.booleans(), st.sampled_from((1, 64, 4096)))
def test_it_means_what_the_loops_say(batch, data, ragged, tile_pairs):
    size, sets = data.draw(selections(batch, ragged))
    check(batch, sets, size, tile_pairs)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_dtype_and_scope(layout, dtype, scope):
    batch = make_batch([37, 0, 64], layout=layout, dtype=dtype)
    num_sets = batch.num_sets(scope)
    sets = [
        [[2, 0, 1][: 1 + i % 3] if n else [] for i in range(num_sets)]
        for n in batch.seq_lens.tolist()
    ]
    check(batch, sets, 16, tile_pairs=64)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("group", GROUPS)
def test_every_head_grouping(group, num_kv_heads, scope):
    batch = make_batch([50, 17], group=group, num_kv_heads=num_kv_heads)
    num_sets = batch.num_sets(scope)
    check(batch, [[[3, 1, 12]] * num_sets, [[4, 0]] * num_sets], 4)


def test_sets_that_cut_across_kv_heads():
    """6 heads on 3 KV heads in 2 sets: a set's heads read two KV heads."""
    batch = make_batch([40], num_kv_heads=3, group=2)
    check(batch, [[[0, 5, 9], [7]]], 4)


@law
@given(batches(), st.sampled_from(SELECT_BLOCK_SIZES), st.sampled_from(SCOPES))
def test_all_blocks_are_dense_attention(batch, size, scope):
    output, lse = run(batch, batch.all_blocks(batch.num_sets(scope), size), size)
    *whole, _ = dense(reference, batch)
    assert_equivalent((output, lse), whole, batch.exact())


@pytest.mark.parametrize("tile_pairs", [64, 4096])
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("size", SELECT_BLOCK_SIZES)
def test_the_order_of_blocks_changes_nothing(size, scope, layout, tile_pairs):
    """But for the order of fp32 sums."""
    batch = make_batch([300, 123], layout=layout)
    num_sets = batch.num_sets(scope)
    sets = batch.all_blocks(num_sets, size)
    output, lse = run(batch, sets, size, tile_pairs)
    bound = batch.exact()
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        mixed = [
            [[s[i] for i in torch.randperm(len(s), generator=rng)] for s in of_row]
            for of_row in sets
        ]
        again = run(batch, mixed, size, tile_pairs)
        assert_equivalent(again, (output, lse), bound)


@law
@given(batches(dtypes=(torch.float32,)), st.data())
def test_two_disjoint_sets_merge_to_their_union(batch, data):
    size, union = data.draw(selections(batch))
    cut = data.draw(st.integers(0, 10))
    left = [[s[:cut] for s in of_row] for of_row in union]
    right = [[s[cut:] for s in of_row] for of_row in union]
    merged = merge_states(*run(batch, left, size), *run(batch, right, size))
    bound = batch.exact(batch.positions(union, size))
    assert_equivalent(merged, run(batch, union, size), bound)


@law
@given(batches(dtypes=(torch.float32,)), st.data())
def test_the_complement_merges_to_dense_attention(batch, data):
    size, chosen = data.draw(selections(batch))
    everything = batch.all_blocks(len(chosen[0]), size)
    rest = [
        [sorted({*full} - {*s}) for s, full in zip(some, every, strict=True)]
        for some, every in zip(chosen, everything, strict=True)
    ]
    merged = merge_states(*run(batch, chosen, size), *run(batch, rest, size))
    *whole, _ = dense(reference, batch)
    assert_equivalent(merged, whole, batch.exact())


@pytest.mark.parametrize("scope", SCOPES)
def test_an_empty_set_gives_zeros_and_no_mass(scope):
    batch = make_batch([40, 40, 0])
    num_sets = batch.num_sets(scope)
    last_only = [[]] * (num_sets - 1) + [[1]]
    output, lse = run(batch, [[[]] * num_sets, last_only, [[]] * num_sets], 16)
    per_set = batch.num_heads // num_sets
    assert not output[[0, 2]].any()
    assert (lse[[0, 2]] == -math.inf).all()
    assert not output[1, :-per_set].any()
    assert (lse[1, :-per_set] == -math.inf).all()
    assert output[1, -per_set:].abs().sum() > 0
    assert lse[1, -per_set:].isfinite().all()


@pytest.mark.parametrize("seq_len", [0, -1, -30])
def test_a_padded_row_and_one_left_out_are_empty_whatever_their_sets_say(seq_len):
    batch = make_batch([seq_len, 20])
    output, lse = run(batch, [[[-5, 2**30]], [[0]]], 4)
    assert not output[0].any()
    assert (lse[0] == -math.inf).all()
    assert lse[1].isfinite().all()


def test_stale_blocks_past_the_end_hold_nothing():
    batch = make_batch([20])
    bound = batch.exact(batch.positions([[[0, 4]]], 4))
    with_stale = run(batch, [[[0, 5, 4, 9]]], 4)
    assert_equivalent(with_stale, run(batch, [[[0, 4]]], 4), bound)


@law
@given(batches(min_seqs=3), st.data())
def test_a_batch_permuted_gives_the_output_permuted_bit_for_bit(batch, data):
    size, sets = data.draw(selections(batch))
    order = data.draw(st.permutations(range(3)))[: data.draw(st.integers(1, 3))]
    output, lse = run(batch, sets, size)
    output2, lse2 = run(batch.rows(order), [sets[i] for i in order], size)
    assert torch.equal(output2, output[order])
    assert torch.equal(lse2, lse[order])


def test_more_rows_of_selection_than_sequences_are_left_alone():
    batch = make_batch([40, 20])
    sets = [[[1]], [[0, 4]]]
    args = batch.args([*sets, [[99]]], select_block_size=4)
    reference.sparse_decode(args, batch.seq_lens)
    expected = run(batch, sets, 4)
    assert torch.equal(args.output, expected[0])
    assert torch.equal(args.workspace.lse, expected[1])
    args = batch.args(sets, select_block_size=4)
    reference.sparse_decode(args, torch.cat([batch.seq_lens, torch.tensor([99])]))
    assert torch.equal(args.output, expected[0])


@pytest.mark.parametrize("select_block_size", [0, 3, 32])
def test_a_select_block_size_that_does_not_divide_is_refused(select_block_size):
    batch = make_batch([5])
    with pytest.raises(ValueError, match=f"select_block_size = {select_block_size}"):
        run(batch, [[[0]]], select_block_size)


def test_sets_that_do_not_divide_the_heads_are_refused():
    batch = make_batch([5])
    with pytest.raises(ValueError, match="num_sets = 3 must divide 4 heads"):
        run(batch, [[[0]] * 3], 4)


def test_a_negative_block_is_noticed():
    batch = make_batch([40])
    with pytest.raises(AssertionError, match="negative block"):
        run(batch, [[[0, -1]]], 4)
