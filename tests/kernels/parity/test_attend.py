"""dense_decode, score_blocks and sparse_decode against the reference, over set-ups."""

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.conftest import INTERPRETED
from tests.kernels.parity.harness import (
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
from tests.kernels.reference.exact import assert_within, attend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# A row left out among rows of two splits, one and none.
LENS = (301, 0, -(2**31), 17)


def case(name, num_kv_heads, group, head_size, size, num_sets, quick=False, **others):
    shape = dict(num_kv_heads=num_kv_heads, group=group, head_size=head_size)
    marks = [] if quick else pytest.mark.extended
    return pytest.param({**shape, **others}, size, num_sets, id=name, marks=marks)


# Name: KV heads, heads for each, head size, selection block, sets.
CASES = [
    case("8/2 heads, d128", 2, 4, 128, 16, 1, quick=True),
    case("MQA, 33 heads in two tiles, d256", 1, 33, 256, 16, 1, quick=True),
    case("fp8, d128", 2, 4, 128, 16, 2, quick=True, fp8=True, k_scale=0.5, v_scale=3.0),
    case("odd strides", 3, 2, 64, 1, 6, True, layout="LBHNC, odd strides and offset"),
    case("14/2 heads, fp16, LBHNC", 2, 7, 128, 1, 14, dtype=FP16, layout="LBHNC"),
    case("10/2 heads, blocks of 32", 2, 5, 64, 16, 2, block_size=32),
    case("MHA, d96, fp16", 4, 1, 96, 1, 1, dtype=FP16),
    case("d80, fp32, LBHNC", 2, 3, 80, 1, 2, dtype=FP32, layout="LBHNC"),
    case("fp32, sharp", 2, 2, 64, 16, 1, dtype=FP32, sharpness=30.0),
    case("fp8, fp16, LBHNC", 1, 5, 64, 1, 1, fp8=True, dtype=FP16, layout="LBHNC"),
    case("fp8, d96, fp32", 1, 2, 96, 16, 2, fp8=True, dtype=FP32, k_scale=0.1),
    case("LNBHC", 2, 2, 64, 16, 4, layout="LNBHC"),
    case("slice", 2, 2, 64, 1, 1, layout="LBNHC, slice of a bigger one"),
    case("2 sets of 3 KV heads", 3, 4, 64, 16, 2),
    case("6 sets of 3 KV heads", 3, 4, 64, 16, 6),
    case("blocks of 3 in 48", 2, 2, 64, 3, 1, block_size=48),
    case("blocks of 48", 2, 2, 64, 48, 1, block_size=48),
    case("blocks of 8", 2, 2, 64, 8, 1),
    case("blocks larger than a tile", 2, 2, 256, 64, 1, block_size=64),
]
# Each is compiled anew on a GPU; to the interpreter they are all the same.
SETS = [] if INTERPRETED else [(1, "sequence"), (16, "kv_head"), (1, "query_head")]


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


@pytest.mark.parametrize("setup, size, num_sets", CASES)
def test_it_means_what_the_reference_says(kernels, device, setup, size, num_sets):
    paged = make_paged(device, LENS, **setup)
    check_dense(kernels, paged, size)
    check_scores(*score(kernels, paged, size), paged, size)
    check_sparse(kernels, paged, some_blocks(paged, num_sets, size, seed=1), size)
    for size, scope in SETS:
        sets = some_blocks(paged, paged.batch.num_sets(scope), size, seed=2)
        check_dense(kernels, paged, size)
        check_sparse(kernels, paged, sets, size)


# Around a tile, what a split takes at least, and twice that.
EDGES = sorted({n + d for n in (16, 64, 128, 256, 512) for d in (-1, 0, 1)} | {0, 1})


@pytest.mark.extended
class TestLengths:
    @pytest.mark.parametrize("head_size, splits", [(64, 3), (128, 1)])
    def test_dense_at_every_boundary(self, kernels, device, head_size, splits):
        paged = make_paged(
            device, EDGES, num_kv_heads=1, group=2, head_size=head_size, dtype=FP16
        )
        check_dense(kernels, paged, 16, splits=splits)

    @pytest.mark.parametrize("size, splits", [(1, 3), (16, 8)])
    def test_sparse_sets_of_every_size(self, kernels, device, size, splits):
        lens = [700] * len(EDGES)
        paged = make_paged(
            device, lens, num_kv_heads=1, group=1, head_size=64, dtype=FP16
        )
        total = -(-700 // size)
        counts = [min(n if size == 1 else n // 12, total) for n in EDGES]
        rng = torch.Generator().manual_seed(1)
        sets = [[torch.randperm(total, generator=rng)[:n].tolist()] for n in counts]
        check_sparse(kernels, paged, sets, size, splits=splits)

    def test_more_splits_than_a_merge_takes_at_once(self, kernels, device):
        paged = make_paged(device, [4500], num_kv_heads=1, group=1, head_size=64)
        check_dense(kernels, paged, None, splits=40)

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


@pytest.mark.extended
class TestLaws:
    SHAPE = dict(num_kv_heads=2, group=3, head_size=64)

    def paged(self, device, lens=(300, 0, 17, 150), **others):
        return make_paged(device, lens, **{**self.SHAPE, **others})

    def test_scores_are_the_bits_of_dense_decode(self, kernels, device):
        if kernels.__name__.endswith(".triton_ops") and not INTERPRETED:
            pytest.skip("without p.v Triton may lay a tile out in another way")
        paged = self.paged(device, (900, 0, -5, 17))
        _, *expected = dense(kernels, paged, 16)
        assert_equal(score(kernels, paged, 16), expected)

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

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter has one order")
    def test_runs_are_equal_bit_for_bit(self, kernels, device):
        paged = self.paged(device)
        sets = some_blocks(paged, 2, 16)
        one, two = dense(kernels, paged), dense(kernels, paged, poison=math.inf)
        assert_equal(one[:2], two[:2])
        one, two = (
            sparse(kernels, paged, sets, 16, poison=poison)
            for poison in (math.nan, math.inf)
        )
        assert_equal(one, two)

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
