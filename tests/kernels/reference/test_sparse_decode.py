import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.reference import naive
from tests.kernels.reference.cases import (
    DTYPES,
    GROUPS,
    LAYOUTS,
    SCOPES,
    SELECT_BLOCK_SIZES,
    batches,
    law,
    make_batch,
)
from tests.kernels.reference.exact import assert_within, half_unit
from tidal_vllm.kernels.reference import decode as reference
from tidal_vllm.kernels.reference.decode import (
    dense_decode,
    merge_states,
    sparse_decode,
)


def to_tensors(sets, spare=2):
    """Nested lists [row][set][block] as topk_blocks, -1 behind, and topk_lens."""
    lens = torch.tensor([[len(s) for s in row] for row in sets], dtype=torch.int32)
    blocks = torch.full((*lens.shape, int(lens.max()) + spare), -1, dtype=torch.int32)
    for row, of_row in enumerate(sets):
        for i, chosen in enumerate(of_row):
            blocks[row, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return blocks, lens


def run(batch, sets, size, chunk_rows=4096):
    query, kv_cache, block_table, seq_lens = batch.paged
    with mock.patch.object(reference, "CHUNK_ROWS", chunk_rows):
        return sparse_decode(
            query,
            kv_cache,
            block_table,
            *to_tensors(sets),
            seq_lens,
            scale=batch.scale,
            select_block_size=size,
        )


def positions(batch, sets, size):
    def of(row, head):
        chosen = sets[row][head // (batch.num_heads // len(sets[row]))]
        every = [b * size + i for b in chosen for i in range(size)]
        return [t for t in every if t < len(batch.keys[row])]

    return of


def assert_equivalent(one, other, bound):
    """Two computations of the same: each may err, and rounds to its dtype."""
    for actual, expected, error in zip(
        one, other, (bound.output_error, bound.lse_error), strict=True
    ):
        rounding = half_unit(expected.double().nan_to_num(neginf=0.0), expected.dtype)
        assert_within(actual, expected, 2 * error + rounding)


def check(batch, sets, size, chunk_rows=4096):
    output, lse = run(batch, sets, size, chunk_rows)
    positions_of = positions(batch, sets, size)
    exact, exact_lse, _ = naive.decode(
        batch.query, batch.keys, batch.values, batch.scale, positions_of
    )
    assert output.dtype == batch.query.dtype
    assert lse.dtype == torch.float32
    bound = batch.exact(positions_of)
    assert_within(output, exact, bound.output_error, "output")
    assert_within(lse, exact_lse, bound.lse_error, "lse")


def all_blocks(batch, num_sets, size):
    return [
        [list(range(-(-n // size))) for _ in range(num_sets)]
        for n in batch.seq_lens.tolist()
    ]


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
    for of_row in all_blocks(batch, num_sets, size):
        orders = [draw(st.permutations(blocks)) for blocks in of_row]
        cuts = [draw(st.integers(0, len(of_row[0]))) for _ in range(num_sets)]
        if not ragged:
            cuts = [cuts[0]] * num_sets
        sets.append([b[:cut] for b, cut in zip(orders, cuts, strict=True)])
    return size, sets


@law
@given(batches(max_len=70), st.data(), st.booleans(), st.sampled_from((1, 64, 4096)))
def test_it_means_what_the_loops_say(batch, data, ragged, chunk_rows):
    size, sets = data.draw(selections(batch, ragged))
    check(batch, sets, size, chunk_rows)


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
    check(batch, sets, 16, chunk_rows=64)


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
    output, lse = run(batch, all_blocks(batch, batch.num_sets(scope), size), size)
    *dense, _ = dense_decode(*batch.paged, scale=batch.scale)
    assert_equivalent((output, lse), dense, batch.exact())


@pytest.mark.parametrize("chunk_rows", [64, 4096])
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("size", SELECT_BLOCK_SIZES)
def test_the_order_of_blocks_changes_nothing(size, scope, layout, chunk_rows):
    """But for the order of fp32 sums."""
    batch = make_batch([300, 123], layout=layout)
    num_sets = batch.num_sets(scope)
    sets = all_blocks(batch, num_sets, size)
    output, lse = run(batch, sets, size, chunk_rows)
    bound = batch.exact()
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        mixed = [
            [[s[i] for i in torch.randperm(len(s), generator=rng)] for s in of_row]
            for of_row in sets
        ]
        again = run(batch, mixed, size, chunk_rows)
        assert_equivalent(again, (output, lse), bound)


@law
@given(batches(dtypes=(torch.float32,)), st.data())
def test_two_disjoint_sets_merge_to_their_union(batch, data):
    size, union = data.draw(selections(batch))
    cut = data.draw(st.integers(0, 10))
    left = [[s[:cut] for s in of_row] for of_row in union]
    right = [[s[cut:] for s in of_row] for of_row in union]
    merged = merge_states(*run(batch, left, size), *run(batch, right, size))
    bound = batch.exact(positions(batch, union, size))
    assert_equivalent(merged, run(batch, union, size), bound)


@law
@given(batches(dtypes=(torch.float32,)), st.data())
def test_the_complement_merges_to_dense_attention(batch, data):
    size, chosen = data.draw(selections(batch))
    everything = all_blocks(batch, len(chosen[0]), size)
    rest = [
        [sorted({*full} - {*s}) for s, full in zip(some, every, strict=True)]
        for some, every in zip(chosen, everything, strict=True)
    ]
    merged = merge_states(*run(batch, chosen, size), *run(batch, rest, size))
    *dense, _ = dense_decode(*batch.paged, scale=batch.scale)
    assert_equivalent(merged, dense, batch.exact())


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
    bound = batch.exact(positions(batch, [[[0, 4]]], 4))
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
    blocks, lens = to_tensors([*sets, [[99]]])
    output, lse = sparse_decode(
        *batch.paged[:3],
        blocks,
        lens,
        batch.seq_lens,
        scale=batch.scale,
        select_block_size=4,
    )
    expected = run(batch, sets, 4)
    assert torch.equal(output, expected[0])
    assert torch.equal(lse, expected[1])


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
