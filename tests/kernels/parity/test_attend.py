"""dense_decode, score_blocks and sparse_decode against the reference, over set-ups."""

import math
from dataclasses import replace

import pytest
import torch
from reference.exact import assert_within, attend

from tidal_vllm.ops.reference import merge_states

from ..conftest import INTERPRETED
from .harness import (
    as_tensors,
    assert_attends,
    assert_same_lse,
    dense,
    exact_of,
    make_paged,
    reordered,
    score,
    some_blocks,
    sparse,
    tokens_of,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LENS = (301, 0, 17, -5)


def case(name, num_kv_heads, group, head_size, **others):
    shape = dict(num_kv_heads=num_kv_heads, group=group, head_size=head_size)
    return pytest.param({**shape, **others}, id=name)


CASES = [
    case("32/8 heads, d128", 8, 4, 128),
    case("28/4 heads, d128, LBHNC, fp16", 4, 7, 128, dtype=FP16, layout="LBHNC"),
    case("40/8 heads, d64, blocks of 32", 8, 5, 64, block_size=32),
    case("MHA, d96, fp16", 4, 1, 96, dtype=FP16),
    case("MQA, d256", 1, 8, 256, layout="LBHNC"),
    case("MQA, 40 heads in two tiles, d256", 1, 40, 256),
    case("MQA, 71 heads, d64", 1, 71, 64),
    case("d80, fp32", 2, 3, 80, dtype=FP32, layout="LBHNC"),
    case("d64, fp32, sharp", 2, 2, 64, dtype=FP32, sharpness=30.0),
    case("d128, sharp", 2, 2, 128, sharpness=30.0),
    case("fp8, d128", 2, 4, 128, fp8=True, k_scale=0.5, v_scale=3.0),
    case("fp8, d64, fp16, LBHNC", 2, 5, 64, fp8=True, dtype=FP16, layout="LBHNC"),
    case("fp8, d96, fp32, scaled", 1, 2, 96, fp8=True, dtype=FP32, k_scale=0.1),
    case("LHBNC", 2, 2, 64, layout="LHBNC"),
    case("LNBHC", 2, 2, 64, layout="LNBHC"),
    case("padded rows", 2, 2, 64, layout="LBNHC, padded rows"),
    case("odd strides", 3, 2, 64, layout="LBHNC, odd strides and offset"),
    case("slice of a bigger cache", 2, 2, 64, layout="LBNHC, slice of a bigger one"),
]
SCOPES = ("sequence", "kv_head", "query_head")
SIZES = (1, 16)
SETS = [("sequence", 1), ("sequence", 16), ("kv_head", 16), ("query_head", 1)]


def check_dense(kernels, paged, size, **call):
    """Rows that are left out were checked when the op was called."""
    output, lse, block_lse = dense(kernels, paged, size, **call)
    wanted = exact_of(paged, size=size)
    assert_attends(output, wanted, paged)
    check_scores(lse, block_lse, paged, size, wanted)


def check_scores(lse, block_lse, paged, size, wanted=None):
    wanted = wanted or exact_of(paged, size=size)
    assert_same_lse(lse, wanted, paged)
    if size is None:
        return
    for i, row in enumerate(paged.rows):
        used = -(-int(paged.batch.seq_lens[row]) // size)
        bound = (wanted.block_lse[i, :, :used], wanted.block_lse_error[i, :, :used])
        assert_within(block_lse[row, :, :used], *bound, f"block_lse of row {row}")
        assert block_lse[row, :, used:].isnan().all(), "wrote past a row's blocks"


def check_sparse(kernels, paged, sets, size, **call):
    output, lse = sparse(kernels, paged, sets, size, **call)
    wanted = exact_of(paged, tokens_of(paged, sets, size))
    assert_attends(output, wanted, paged)
    assert_same_lse(lse, wanted, paged)


class TestSetUps:
    @pytest.mark.parametrize("setup", CASES)
    @pytest.mark.parametrize("size", SIZES)
    def test_dense(self, kernels, device, setup, size):
        check_dense(kernels, make_paged(device, LENS, **setup), size)

    @pytest.mark.parametrize("setup", CASES)
    @pytest.mark.parametrize("size", SIZES)
    def test_scores(self, kernels, device, setup, size):
        paged = make_paged(device, LENS, **setup)
        check_scores(*score(kernels, paged, size), paged, size)

    @pytest.mark.parametrize("setup", CASES)
    @pytest.mark.parametrize("scope, size", SETS)
    def test_sparse(self, kernels, device, setup, scope, size):
        paged = make_paged(device, LENS, **setup)
        sets = some_blocks(paged, paged.batch.num_sets(scope), size, seed=1)
        check_sparse(kernels, paged, sets, size)

    @pytest.mark.parametrize("num_sets", [2, 6, 12])
    def test_sets_that_are_no_scope(self, kernels, device, num_sets):
        paged = make_paged(device, LENS, num_kv_heads=3, group=4, head_size=64)
        check_sparse(kernels, paged, some_blocks(paged, num_sets, 16), 16)

    @pytest.mark.parametrize("size, block_size", [(3, 48), (48, 48), (8, 16), (64, 64)])
    def test_other_selection_blocks(self, kernels, device, size, block_size):
        paged = make_paged(device, LENS, head_size=64, block_size=block_size)
        check_dense(kernels, paged, size)
        check_scores(*score(kernels, paged, size), paged, size)
        check_sparse(kernels, paged, some_blocks(paged, 1, size), size)

    def test_a_selection_block_larger_than_a_tile(self, kernels, device):
        paged = make_paged(device, [300, 65], head_size=256, block_size=64)
        check_dense(kernels, paged, 64)
        check_scores(*score(kernels, paged, 64), paged, 64)
        check_sparse(kernels, paged, some_blocks(paged, 1, 64), 64)


EDGES = sorted(
    {n + d for n in (16, 32, 64, 128, 256, 512) for d in (-1, 0, 1)} | {0, 1}
)


class TestLengths:
    @pytest.mark.parametrize("splits", [1, 2, 3, 8])
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_dense_at_every_boundary(self, kernels, device, head_size, splits):
        paged = make_paged(
            device, EDGES, num_kv_heads=1, group=2, head_size=head_size, dtype=FP16
        )
        check_dense(kernels, paged, 16, splits=splits)
        check_scores(*score(kernels, paged, 16, splits=splits), paged, 16)

    @pytest.mark.parametrize("splits", [1, 3, 8])
    @pytest.mark.parametrize("size", SIZES)
    def test_sparse_sets_of_every_size(self, kernels, device, size, splits):
        lens = [700] * len(EDGES)
        paged = make_paged(
            device, lens, num_kv_heads=1, group=2, head_size=64, dtype=FP16
        )
        total = -(-700 // size)
        counts = [min(n if size == 1 else n // 12, total) for n in EDGES]
        rng = torch.Generator().manual_seed(1)
        sets = [[torch.randperm(total, generator=rng)[:n].tolist()] for n in counts]
        check_sparse(kernels, paged, sets, size, splits=splits)

    def test_more_splits_than_a_merge_takes_at_once(self, kernels, device):
        paged = make_paged(device, [4500], num_kv_heads=1, group=1, head_size=64)
        check_dense(kernels, paged, None, splits=40)
        check_scores(*score(kernels, paged, 16, splits=40), paged, 16)

    def test_rows_left_out(self, kernels, device):
        """Of any negative length, between others of one split and several."""
        lens = (-1, 900, -(2**31), 0, 3, -900)
        paged = make_paged(device, lens, num_kv_heads=1, group=2, head_size=64)
        check_dense(kernels, paged, 16)
        check_scores(*score(kernels, paged, 16), paged, 16)
        check_sparse(kernels, paged, some_blocks(paged, 2, 16), 16)

    def test_all_rows_left_out(self, kernels, device):
        """Whatever else they hold; the buffers check themselves."""
        paged = make_paged(device, (-1, -40), head_size=64)
        paged.query.fill_(math.nan)
        dense(kernels, paged, 16)
        score(kernels, paged, 16)
        sparse(kernels, paged, some_blocks(paged, 1, 16), 16)

    def test_an_empty_batch(self, kernels, device):
        paged = reordered(make_paged(device, LENS, head_size=64), [])
        output, lse, _ = dense(kernels, replace_longest(paged))
        assert output.shape[0] == lse.shape[0] == 0

    def test_blocks_of_a_set_past_the_end_hold_nothing(self, kernels, device):
        paged = make_paged(device, [40], num_kv_heads=1, group=2, head_size=64)
        with_end, lse = sparse(kernels, paged, [[[0, 2, 3, 2000]]], 16)
        without, lse_without = sparse(kernels, paged, [[[0, 2]]], 16)
        assert torch.equal(with_end, without)
        assert torch.equal(lse, lse_without)

    def test_a_million_tokens_in_a_cache_beyond_two_giga_elements(
        self, kernels, device
    ):
        """Positions, table and cache offsets at the far end; the rest is never read."""
        seq_len, head_size, size = 2**20 - 3, 16, 16
        blocks = 2**31 // (16 * 2 * head_size) + 8
        cache = torch.empty(
            (blocks, 1, 16, 2 * head_size), dtype=torch.uint8, device=device
        )
        rng = torch.Generator().manual_seed(0)
        kv = torch.randn(2, 16, 2 * head_size, generator=rng).to(torch.float8_e4m3fn)
        cache[[3, blocks - 1], 0] = kv.view(torch.uint8).to(device)
        table = torch.full((1, 2**16), 2**30, dtype=torch.int32, device=device)
        table[0, [0, 2**16 - 1]] = torch.tensor(
            [3, blocks - 1], dtype=torch.int32, device=device
        )
        query = torch.randn(1, 2, head_size, generator=rng).half()
        output, lse = torch.empty_like(query).to(device), torch.empty(1, 2).to(device)
        sets = as_tensors([[[2**16 - 1, 0]]])
        kernels.sparse_decode(
            *(query.to(device), cache, table, *(t.to(device) for t in sets)),
            torch.tensor([seq_len], dtype=torch.int32, device=device),
            *(output, lse),
            torch.empty(1, 2, 4, head_size, device=device),
            torch.empty(1, 2, 4, device=device),
            *(1.0, 1.0, 1.0, size),
        )
        kv = kv.float().flatten(0, 1)[:29]
        seen, half = torch.ones(2, 29, dtype=torch.bool), 2**-11
        k, v = kv.split(head_size, -1)
        wanted = attend(query[0], k, v, 1.0, seen, weights=half)
        assert_within(output[0], wanted.output, wanted.output_error, "output")
        assert_within(lse[0], wanted.lse, wanted.lse_error, "lse")


def replace_longest(paged):
    """`Paged.longest` needs a row."""

    query, cache, table, _ = paged.cpu
    return replace(paged, cpu=(query, cache, table, torch.zeros(1, dtype=torch.int32)))


class TestLaws:
    SHAPE = dict(num_kv_heads=2, group=3, head_size=64)

    def paged(self, device, lens=(300, 0, 17, 150), **others):
        return make_paged(device, lens, **{**self.SHAPE, **others})

    @pytest.mark.parametrize("scope", SCOPES)
    def test_full_budget_is_dense(self, kernels, device, scope):
        paged = self.paged(device)
        num_sets = paged.batch.num_sets(scope)
        sets = [
            [list(range(-(-n // 16)))] * num_sets for n in paged.batch.seq_lens.tolist()
        ]
        output, lse = sparse(kernels, paged, sets, 16)
        assert_attends(output, exact_of(paged), paged)
        assert_same_lse(lse, exact_of(paged), paged)

    @pytest.mark.parametrize("size", SIZES)
    def test_scores_are_the_bits_of_dense_decode(self, kernels, device, size):
        if kernels.__name__.endswith(".triton_ops") and not INTERPRETED:
            pytest.skip("without p.v Triton may lay a tile out in another way")
        paged = self.paged(device, (900, 0, -5, 17))
        _, *expected = dense(kernels, paged, size)
        assert_equal(score(kernels, paged, size), expected)

    def test_disjoint_sets_merge_to_their_union(self, kernels, device):
        paged = self.paged(device, dtype=FP32)
        union = some_blocks(paged, 1, 16, seed=3)
        halves = [
            [[blocks[part::2] for blocks in row] for row in union] for part in (0, 1)
        ]
        (a, lse_a), (b, lse_b) = (sparse(kernels, paged, half, 16) for half in halves)
        merged, merged_lse = merge_states(a, lse_a, b, lse_b)
        wanted = exact_of(paged, tokens_of(paged, union, 16))
        assert_attends(merged, wanted, paged)
        assert_same_lse(merged_lse, wanted, paged)

    def test_an_empty_set_gives_zeros(self, kernels, device):
        paged = self.paged(device)
        output, lse = sparse(kernels, paged, [[[], [0]], *[[[], []]] * 3], 16)
        assert not output[0, :3].any() and not output[1:].any()
        assert lse[0, :3].isneginf().all() and lse[1:].isneginf().all()
        assert output[0, 3:].all() and lse[0, 3:].isfinite().all()

    def test_a_padded_row_gives_zeros_whatever_its_set_says(self, kernels, device):
        paged = self.paged(device)
        output, lse = sparse(kernels, paged, [[[0, 1, 2]]] * 4, 16)
        assert not output[1].any() and lse[1].isneginf().all()

    def test_physical_order_does_not_matter(self, kernels, device):
        paged = self.paged(device)
        rng = torch.Generator().manual_seed(5)
        cache = paged.kv_cache
        moved_to = torch.randperm(len(cache), generator=rng).to(device)
        moved = torch.empty_like(cache)
        moved[moved_to] = cache
        table = paged.block_table
        known = table < len(cache)
        table = torch.where(known, moved_to[table.where(known, 0).long()], table)

        other = replace(paged, kv_cache=moved, block_table=table.to(torch.int32))
        sets = some_blocks(paged, 2, 16)
        assert_equal(dense(kernels, paged, 1), dense(kernels, other, 1))
        assert_equal(sparse(kernels, paged, sets, 16), sparse(kernels, other, sets, 16))

    def test_a_permuted_batch_gives_permuted_results(self, kernels, device):
        paged = self.paged(device)
        order = [2, 3, 0, 1]
        other = reordered(paged, order)
        sets = some_blocks(paged, 2, 16)
        permuted = [sets[row] for row in order]
        expected = [result[order] for result in dense(kernels, paged, 16)]
        assert_equal(dense(kernels, other, 16), expected)
        expected = [result[order] for result in sparse(kernels, paged, sets, 16)]
        assert_equal(sparse(kernels, other, permuted, 16), expected)

    def test_a_row_does_not_see_the_others(self, kernels, device):
        paged = self.paged(device)
        other = reordered(paged, [0, 3, 3, 1])
        sets = some_blocks(paged, 2, 16)
        changed = [sets[0], [[], [2, 1]], [[0], []], sets[1]]
        for one, two in (
            (dense(kernels, paged), dense(kernels, other)),
            (
                sparse(kernels, paged, sets, 16),
                sparse(kernels, other, changed, 16),
            ),
        ):
            assert torch.equal(one[0][0], two[0][0])
            assert torch.equal(one[1][0], two[1][0])

    def test_runs_are_equal_bit_for_bit_whatever_the_buffers_held(
        self, kernels, device
    ):
        paged = self.paged(device)
        sets = some_blocks(paged, 2, 16)
        for poison in (0.0, math.inf):
            assert_equal(
                dense(kernels, paged, poison=poison)[:2], dense(kernels, paged)[:2]
            )
            assert_equal(
                sparse(kernels, paged, sets, 16, poison=poison),
                sparse(kernels, paged, sets, 16),
            )

    def test_strided_rows_of_query_and_output(self, kernels, device):
        paged = self.paged(device)

        wide = torch.full((4, 9, 80), math.nan, dtype=BF16, device=device)
        wide[:, 2:8, 8:72] = paged.query
        other = replace(paged, query=wide[:, 2:8, 8:72])
        sets = some_blocks(paged, 2, 16)
        expected = dense(kernels, paged, 16)
        assert_equal(dense(kernels, other, 16, strided=True), expected)
        expected = sparse(kernels, paged, sets, 16)
        assert_equal(sparse(kernels, other, sets, 16, strided=True), expected)

    def test_a_nan_in_a_used_slot_is_not_hidden(self, kernels, device):
        for fp8 in (False, True):
            paged = self.paged(device, lens=(40,), fp8=fp8)
            block = int(paged.block_table[0, 1])
            nan = torch.full((64,), math.nan, device=device).to(paged.kv_cache.dtype)
            paged.kv_cache[block, 0, 3, :64] = nan
            output, lse, _ = dense(kernels, paged)
            assert output[0, :3].isnan().all() and lse[0, :3].isnan().all()
            assert output[0, 3:].isfinite().all() and lse[0, 3:].isfinite().all()


def assert_equal(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
