"""dense_decode, score_blocks and sparse_decode against the reference, over set-ups."""

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.batches import Batch
from tests.kernels.conftest import INTERPRETED
from tests.kernels.exact import assert_within
from tests.kernels.harness import (
    assert_attends,
    assert_equal,
    assert_same_lse,
    batch_on,
    dense,
    exact_of,
    score,
    some_blocks,
    sparse,
)

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


def check_dense(kernels, batch, size, **call):
    output, lse, block_lse = dense(kernels, batch, size, **call)
    wanted = exact_of(batch, size=size)
    assert_attends(output, wanted)
    check_scores(lse, block_lse, batch, size, wanted)


def check_scores(lse, block_lse, batch, size, wanted=None):
    wanted = wanted or exact_of(batch, size=size)
    assert_same_lse(lse, wanted)
    if size is None:
        return
    for row, seq_len in enumerate(batch.lens):
        if seq_len < 0:
            continue
        used = -(-seq_len // size)
        bound = (wanted.block_lse[row, :, :used], wanted.block_lse_error[row, :, :used])
        assert_within(block_lse[row, :, :used], *bound, f"block_lse of row {row}")
        assert block_lse[row, :, used:].isnan().all(), "wrote past a row's blocks"


def check_sparse(kernels, batch, sets, size, **call):
    output, lse = sparse(kernels, batch, sets, size, **call)
    wanted = exact_of(batch, batch.positions(sets, size))
    assert_attends(output, wanted)
    assert_same_lse(lse, wanted)


@pytest.mark.parametrize("setup, size, num_sets", CASES)
def test_it_means_what_the_reference_says(kernels, device, setup, size, num_sets):
    batch = batch_on(device, LENS, **setup)
    check_dense(kernels, batch, size)
    check_scores(*score(kernels, batch, size), batch, size)
    check_sparse(kernels, batch, some_blocks(batch, num_sets, size, seed=1), size)
    for size, scope in SETS:
        sets = some_blocks(batch, batch.num_sets(scope), size, seed=2)
        check_dense(kernels, batch, size)
        check_sparse(kernels, batch, sets, size)


# Around a tile, what a split takes at least, and twice that.
EDGES = sorted({n + d for n in (16, 64, 128, 256, 512) for d in (-1, 0, 1)} | {0, 1})


@pytest.mark.extended
class TestLengths:
    @pytest.mark.parametrize("head_size, splits", [(64, 3), (128, 1)])
    def test_dense_at_every_boundary(self, kernels, device, head_size, splits):
        batch = batch_on(
            device, EDGES, num_kv_heads=1, group=2, head_size=head_size, dtype=FP16
        )
        check_dense(kernels, batch, 16, splits=splits)

    @pytest.mark.parametrize("size, splits", [(1, 3), (16, 8)])
    def test_sparse_sets_of_every_size(self, kernels, device, size, splits):
        lens = [700] * len(EDGES)
        batch = batch_on(
            device, lens, num_kv_heads=1, group=1, head_size=64, dtype=FP16
        )
        total = -(-700 // size)
        counts = [min(n if size == 1 else n // 12, total) for n in EDGES]
        rng = torch.Generator().manual_seed(1)
        sets = [[torch.randperm(total, generator=rng)[:n].tolist()] for n in counts]
        check_sparse(kernels, batch, sets, size, splits=splits)

    def test_more_splits_than_a_merge_takes_at_once(self, kernels, device):
        batch = batch_on(device, [4500], num_kv_heads=1, group=1, head_size=64)
        check_dense(kernels, batch, None, splits=40)

    def test_an_empty_batch(self, kernels, device):
        batch = batch_on(device, LENS, head_size=64).rows([])
        output, lse, _ = dense(kernels, batch)
        assert output.shape[0] == lse.shape[0] == 0

    def test_blocks_of_a_set_past_the_end_hold_nothing(self, kernels, device):
        batch = batch_on(device, [40], num_kv_heads=1, group=2, head_size=64)
        with_end, lse = sparse(kernels, batch, [[[0, 2, 3, 2000]]], 16)
        without, lse_without = sparse(kernels, batch, [[[0, 2]]], 16)
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
        query = torch.randn(1, 2, head_size, generator=rng).half().to(device)
        lens = torch.tensor([seq_len], dtype=torch.int32, device=device)
        kv = kv.float().flatten(0, 1)[:29, None]
        keys, values = kv.split(head_size, -1)
        batch = Batch(query, cache, table, lens, [keys], [values], 1.0, "one head")
        output, lse = sparse(kernels, batch, [[[2**16 - 1, 0]]], size)
        wanted = exact_of(batch)
        assert_attends(output, wanted)
        assert_same_lse(lse, wanted)


@pytest.mark.extended
class TestLaws:
    SHAPE = dict(num_kv_heads=2, group=3, head_size=64)

    def batch(self, device, lens=(300, 0, 17, 150), **others):
        return batch_on(device, lens, **{**self.SHAPE, **others})

    def test_scores_are_the_bits_of_dense_decode(self, kernels, device):
        if kernels.__name__.endswith(".triton.ops") and not INTERPRETED:
            pytest.skip("without p.v Triton may lay a tile out in another way")
        batch = self.batch(device, (900, 0, -5, 17))
        _, *expected = dense(kernels, batch, 16)
        assert_equal(score(kernels, batch, 16), expected)

    def test_an_empty_set_gives_zeros(self, kernels, device):
        batch = self.batch(device)
        output, lse = sparse(kernels, batch, [[[], [0]], *[[[], []]] * 3], 16)
        assert not output[0, :3].any() and not output[1:].any()
        assert lse[0, :3].isneginf().all() and lse[1:].isneginf().all()
        assert output[0, 3:].all() and lse[0, 3:].isfinite().all()

    def test_a_padded_row_gives_zeros_whatever_its_set_says(self, kernels, device):
        batch = self.batch(device)
        output, lse = sparse(kernels, batch, [[[0, 1, 2]]] * 4, 16)
        assert not output[1].any() and lse[1].isneginf().all()

    def test_a_row_does_not_see_the_others(self, kernels, device):
        batch = self.batch(device)
        other = batch.rows([0, 3, 3, 1])
        sets = some_blocks(batch, 2, 16)
        changed = [sets[0], [[], [2, 1]], [[0], []], sets[1]]
        for one, two in (
            (dense(kernels, batch), dense(kernels, other)),
            (
                sparse(kernels, batch, sets, 16),
                sparse(kernels, other, changed, 16),
            ),
        ):
            assert torch.equal(one[0][0], two[0][0])
            assert torch.equal(one[1][0], two[1][0])

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter has one order")
    def test_runs_are_equal_bit_for_bit(self, kernels, device):
        batch = self.batch(device)
        sets = some_blocks(batch, 2, 16)
        one, two = dense(kernels, batch), dense(kernels, batch, poison=math.inf)
        assert_equal(one[:2], two[:2])
        one, two = (
            sparse(kernels, batch, sets, 16, poison=poison)
            for poison in (math.nan, math.inf)
        )
        assert_equal(one, two)

    def test_strided_rows_of_query_and_output(self, kernels, device):
        batch = self.batch(device)

        wide = torch.full((4, 9, 80), math.nan, dtype=BF16, device=device)
        wide[:, 2:8, 8:72] = batch.query
        other = replace(batch, query=wide[:, 2:8, 8:72])
        sets = some_blocks(batch, 2, 16)
        expected = dense(kernels, batch, 16)
        assert_equal(dense(kernels, other, 16, strided=True), expected)
        expected = sparse(kernels, batch, sets, 16)
        assert_equal(sparse(kernels, other, sets, 16, strided=True), expected)

    def test_a_nan_in_a_used_slot_is_not_hidden(self, kernels, device):
        for fp8 in (False, True):
            batch = self.batch(device, lens=(40,), fp8=fp8)
            block = int(batch.block_table[0, 1])
            nan = torch.full((64,), math.nan, device=device).to(batch.kv_cache.dtype)
            batch.kv_cache[block, 0, 3, :64] = nan
            output, lse, _ = dense(kernels, batch)
            assert output[0, :3].isnan().all() and lse[0, :3].isnan().all()
            assert output[0, 3:].isfinite().all() and lse[0, 3:].isfinite().all()
