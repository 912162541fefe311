"""How a launch of the Triton kernels is cut into programs and tiles, by arithmetic."""

import functools
import math
from dataclasses import dataclass

import torch
import triton

# Tokens that a split takes at least, where a row has them.
DENSE_SPLIT, SPARSE_SPLIT = 256, 128
# Elements of K, or of V, in one tile; 32 KiB of both in 16 bits.
TILE_ELEMENTS = 8192
MAX_TILE_TOKENS = 128
MAX_TILE_BYTES = 64 * 1024  # what a large selection block may stretch a tile to
# Programs to aim at; many, as the rows of a batch are of different lengths.
PROGRAMS_PER_SM = 16
MIN_DOT = 16  # what `tl.dot` takes at least, in each dimension


@dataclass(frozen=True)
class DeviceLimits:
    """What of a device decides about tiles."""

    num_sms: int
    """Streaming multiprocessors; 0 without a GPU."""
    num_stages: int
    """Stages of the pipeline that loads tiles."""
    native_fp8: bool
    """Whether the device converts fp8 e4m3 by itself."""
    warp_size: int = 32
    """Threads of a warp; 64 on AMD's data centre GPUs."""


@functools.cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Ask the driver about a device; once per process."""
    if device.type != "cuda":
        return DeviceLimits(0, 2, False)
    properties = torch.cuda.get_device_properties(device)
    num_sms = properties.multi_processor_count
    if torch.version.cuda is None:
        return DeviceLimits(num_sms, 2, False, properties.warp_size)
    capability = (properties.major, properties.minor)
    # Of the stages that reading the block table leaves, 3 buffer one tile of K and V
    # and 5 buffer two (72 KiB), where there are at least 160 KiB of shared memory.
    roomy = capability == (8, 0) or capability[0] in (9, 10)
    return DeviceLimits(num_sms, 5 if roomy else 3, capability >= (8, 9))


@dataclass(frozen=True)
class Tiling:
    """What one launch of `attend_split` and `merge_splits` is compiled and cut for.

    A head group is the query heads that share both their KV head and their set, so
    that each K and V is fetched once for all of them.
    """

    head_groups: int
    heads_per_group: int
    tile_heads: int
    """Query heads of one program, padded to a power of two."""
    head_tiles: int
    """Programs that share the heads of a group; 1 but for very large groups."""
    width: int
    """head_size, padded to a power of two."""
    size_padded: int
    """Tokens of a selection block, padded to a power of two."""
    tile_blocks: int
    """Selection blocks of one tile."""
    min_blocks: int
    """Selection blocks that a split takes at least, in whole tiles."""
    num_splits: int
    """The most splits of one row."""
    num_warps: int
    num_stages: int


def choose_tiling(
    *,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    num_sets: int,
    head_size: int,
    query_bytes: int,
    select_block_size: int,
    sparse: bool,
    read_values: bool,
    max_splits: int,
    limits: DeviceLimits,
) -> Tiling:
    """Choose the tiling of a launch.

    Args:
        query_bytes: Of one element of the query; a tile holds K and V in its dtype.
        select_block_size: Tokens; 1 where nothing is selected.
        sparse: Whether blocks are read through topk_blocks.
        max_splits: What the workspace has room for.
    """
    head_groups = math.lcm(num_kv_heads, num_sets)
    heads_per_group = num_heads // head_groups
    width = _power_of_two(head_size)
    # A program keeps an fp32 sum of tile_heads * width: 8192 of them fit in registers.
    most_heads = max(MIN_DOT, 8192 // width)
    tile_heads = min(_power_of_two(heads_per_group), most_heads)
    head_tiles = triton.cdiv(heads_per_group, tile_heads)

    size_padded = triton.next_power_of_2(select_block_size)
    # Twice the bytes in fp32: half the tokens.
    tokens = min(MAX_TILE_TOKENS, TILE_ELEMENTS * 2 // query_bytes // width)
    tile_tokens = max(MIN_DOT, tokens, size_padded)
    tile_blocks = tile_tokens // size_padded

    num_stages = limits.num_stages
    tile_bytes = (1 + read_values) * width * tile_tokens * query_bytes
    if tile_bytes > MAX_TILE_BYTES // 2:
        num_stages = 1
    elif sparse and num_stages > 2:
        num_stages += 2  # for reading topk_blocks

    num_splits = max_splits
    if limits.num_sms:
        programs = PROGRAMS_PER_SM * limits.num_sms
        wanted = triton.cdiv(programs, num_rows * head_groups * head_tiles)
        num_splits = min(max_splits, wanted)
    min_tokens = SPARSE_SPLIT if sparse else DENSE_SPLIT
    min_blocks = triton.cdiv(min_tokens, select_block_size)
    return Tiling(
        head_groups=head_groups,
        heads_per_group=heads_per_group,
        tile_heads=tile_heads,
        head_tiles=head_tiles,
        width=width,
        size_padded=size_padded,
        tile_blocks=tile_blocks,
        min_blocks=triton.cdiv(min_blocks, tile_blocks) * tile_blocks,
        num_splits=num_splits,
        num_warps=4 if tile_heads <= 32 and query_bytes == 2 else 8,
        num_stages=num_stages,
    )


def fits(head_size: int, select_block_size: int, query_bytes: int) -> bool:
    """Whether K and V of a selection block fit into a tile."""
    tile_tokens = _power_of_two(select_block_size)
    return 2 * _power_of_two(head_size) * tile_tokens * query_bytes <= MAX_TILE_BYTES


def _power_of_two(size: int) -> int:
    """The power of two that holds `size`, and that `tl.dot` takes."""
    return max(MIN_DOT, triton.next_power_of_2(size))
