"""How a launch of the Triton kernels is cut, and that what the parts are for holds."""

import math

import pytest

from tidal_vllm.kernels.triton.tiling import (
    MAX_TILE_BYTES,
    DeviceLimits,
    Tiling,
    choose_tiling,
    fits,
)

HOPPER = DeviceLimits(num_sms=132, num_stages=5, native_fp8=True)
NO_GPU = DeviceLimits(num_sms=0, num_stages=2, native_fp8=False)
LLAMA = {
    "num_rows": 16,
    "num_heads": 32,
    "num_kv_heads": 8,
    "num_sets": 1,
    "head_size": 128,
    "query_bytes": 2,
    "select_block_size": 16,
    "sparse": False,
    "read_values": True,
    "max_splits": 64,
    "limits": HOPPER,
}


def tiling(**changes) -> Tiling:
    return choose_tiling(**{**LLAMA, **changes})


def test_llama_on_a_hopper():
    assert tiling() == Tiling(
        head_groups=8,
        heads_per_group=4,
        tile_heads=16,
        head_tiles=1,
        width=128,
        size_padded=16,
        tile_blocks=4,
        min_blocks=16,
        num_splits=17,
        num_warps=4,
        num_stages=5,
    )


@pytest.mark.parametrize(
    "num_sets, head_groups, heads_per_group",
    [(1, 8, 4), (2, 8, 4), (8, 8, 4), (16, 16, 2), (32, 32, 1)],
)
def test_a_head_group_shares_kv_head_and_set(num_sets, head_groups, heads_per_group):
    found = tiling(num_sets=num_sets)
    assert (found.head_groups, found.heads_per_group) == (head_groups, heads_per_group)


def test_many_heads_of_one_kv_head_take_several_programs():
    found = tiling(num_heads=71, num_kv_heads=1, head_size=256)
    assert (found.tile_heads, found.head_tiles) == (32, 3)
    assert tiling(num_heads=71, num_kv_heads=1, head_size=64).head_tiles == 1


def test_a_tile_has_half_the_tokens_in_fp32():
    half, full = tiling(), tiling(query_bytes=4)
    assert half.tile_blocks == 2 * full.tile_blocks
    assert full.num_warps == 2 * half.num_warps


def test_a_large_block_stretches_a_tile_and_is_not_buffered():
    found = tiling(select_block_size=128)
    assert (found.tile_blocks, found.num_stages) == (1, 1)
    assert tiling(select_block_size=128, read_values=False).num_stages == 5


def test_reading_through_topk_blocks_takes_two_stages_more():
    assert tiling(sparse=True).num_stages == 7
    assert tiling(sparse=True, limits=NO_GPU).num_stages == 2


def test_small_batches_are_split_more():
    """Up to what the workspace has room for; without a GPU always so."""
    splits = [tiling(num_rows=n).num_splits for n in (1, 4, 16, 64, 256, 65535)]
    assert splits == [64, 64, 17, 5, 2, 1]
    assert tiling(limits=NO_GPU).num_splits == 64


@pytest.mark.parametrize("sparse, min_tokens", [(False, 256), (True, 128)])
@pytest.mark.parametrize("size", [1, 3, 8, 16, 48, 64, 128])
def test_a_split_takes_whole_tiles_and_enough_tokens(size, sparse, min_tokens):
    found = tiling(select_block_size=size, sparse=sparse)
    assert found.min_blocks % found.tile_blocks == 0
    assert found.min_blocks * size >= min_tokens
    assert (found.min_blocks - found.tile_blocks) * size < min_tokens


@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("query_bytes", [2, 4])
def test_what_fits_makes_a_tile_that_fits(head_size, query_bytes):
    for size in (1, 3, 16, 48, 64, 128, 256):
        found = tiling(
            head_size=head_size, query_bytes=query_bytes, select_block_size=size
        )
        tokens = found.tile_blocks * found.size_padded
        num_bytes = 2 * found.width * tokens * query_bytes
        assert fits(head_size, size, query_bytes) is (num_bytes <= MAX_TILE_BYTES)
        assert found.width >= head_size and math.log2(found.width).is_integer()
