"""`dense_decode`, `score_blocks` and `sparse_decode` in Triton, on `triton_split_kv`.

Compiled ahead of time for sm_80, sm_90 and gfx942 and run under Triton's interpreter;
not yet run on a GPU.
"""

import functools
import math

import torch
import triton

from tidal_vllm.kernels.checks import check_decode, check_sets
from tidal_vllm.kernels.triton.split_kv import attend_split, merge_splits
from tidal_vllm.kernels.workspace import MAX_SPLITS

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = math.log2(math.e)
# Tokens that a split takes at least, where a row has them.
DENSE_SPLIT, SPARSE_SPLIT = 256, 128
# Elements of K, or of V, in one tile; 32 KiB of both in 16 bits.
TILE_ELEMENTS = 8192
MAX_TILE_BYTES = 64 * 1024  # what a large selection block may stretch it to
# Programs to aim at; many, as the rows of a batch are of different lengths.
PROGRAMS_PER_SM = 16
MERGE_CHUNK = 16


def dense_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    block_lse: torch.Tensor | None,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    scale: float,
    k_scale: float,
    v_scale: float,
    select_block_size: int,
) -> None:
    """Attend to whole sequences; `reference.dense_decode` defines it. Capturable.

    Args:
        query: [num_seqs, num_heads, head_size] fp16, bf16 or fp32; last dim contiguous.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size] in query's
            dtype, or fp8 e4m3 (as uint8 or float8_e4m3fn); last dim contiguous.
        block_table: [>= num_seqs, max_blocks_per_seq] int32.
        seq_lens: [num_seqs] int32; 0 for a padded row, negative for one that is left
            out: what is written keeps it as it was.
        output: As query, any row strides; written, zeros for a padded row.
        lse: [num_seqs, num_heads] fp32; written, -inf for a padded row.
        block_lse: [num_seqs, num_heads, num_blocks] fp32, written for the selection
            blocks that a row has; or None.
        partial_out: [>= num_seqs, num_heads, splits, head_size] fp32 scratch.
        partial_lse: [>= num_seqs, num_heads, splits] fp32 scratch.
        k_scale, v_scale: What an fp8 cache's numbers are multiplied by; else 1.
        select_block_size: Tokens; divides block_size.

    Raises:
        ValueError: A dtype, device, shape or stride that does not fit. Lengths and
            block ids are preconditions.
    """
    check_decode(
        query, kv_cache, block_table, seq_lens, output, lse, partial_out, partial_lse
    )
    check_sets(query, kv_cache, select_block_size, block_lse=block_lse)
    _attend(
        *(query, kv_cache, block_table, None, None, seq_lens, output, lse, block_lse),
        *(partial_out, partial_lse, scale, k_scale, v_scale, select_block_size),
    )


def score_blocks(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    lse: torch.Tensor,
    block_lse: torch.Tensor,
    partial_lse: torch.Tensor,
    scale: float,
    k_scale: float,
    select_block_size: int,
) -> None:
    """Score all blocks by K alone; `reference.score_blocks` defines it. Capturable.

    The splits, tiles and sums are those of `dense_decode`; V is not read.

    Args:
        As `dense_decode`'s.

    Raises:
        ValueError: As `dense_decode`.
    """
    check_decode(query, kv_cache, block_table, seq_lens, None, lse, None, partial_lse)
    check_sets(query, kv_cache, select_block_size, block_lse=block_lse)
    _attend(
        *(query, kv_cache, block_table, None, None, seq_lens, None, lse, block_lse),
        *(None, partial_lse, scale, k_scale, 1.0, select_block_size),
    )


def sparse_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    scale: float,
    k_scale: float,
    v_scale: float,
    select_block_size: int,
) -> None:
    """Attend to the chosen blocks; `reference.sparse_decode` defines it. Capturable.

    Args:
        topk_blocks: [>= num_seqs, num_sets, max_blocks] int32, as the reference's.
        topk_lens: [>= num_seqs, num_sets] int32.
        Others as `dense_decode`'s.

    Raises:
        ValueError: As `dense_decode`.
    """
    check_decode(
        query, kv_cache, block_table, seq_lens, output, lse, partial_out, partial_lse
    )
    check_sets(query, kv_cache, select_block_size, topk_blocks, topk_lens)
    _attend(
        *(query, kv_cache, block_table, topk_blocks, topk_lens, seq_lens),
        *(output, lse, None, partial_out, partial_lse),
        *(scale, k_scale, v_scale, select_block_size),
    )


def fits(head_size: int, select_block_size: int, itemsize: int) -> bool:
    """Whether a selection block fits into a tile; itemsize is the query's."""
    tile = max(16, triton.next_power_of_2(select_block_size))
    return 2 * _width(head_size) * tile * itemsize <= MAX_TILE_BYTES


def _width(head_size: int) -> int:
    return max(16, triton.next_power_of_2(head_size))


@functools.cache
def _device_limits(device: torch.device) -> tuple[int, int, bool]:
    """Streaming multiprocessors (0: no GPU), pipeline stages, whether fp8 is native."""
    if device.type != "cuda":
        return 0, 2, False
    properties = torch.cuda.get_device_properties(device)
    num_sms = properties.multi_processor_count
    if torch.version.cuda is None:
        return num_sms, 2, False
    capability = (properties.major, properties.minor)
    # Of the stages that reading the block table leaves, 3 buffer one tile of K and V
    # and 5 buffer two (72 KiB), where there are at least 160 KiB of shared memory.
    roomy = capability == (8, 0) or capability[0] in (9, 10)
    return num_sms, 5 if roomy else 3, capability >= (8, 9)


def _attend(
    query,
    kv_cache,
    block_table,
    topk_blocks,
    topk_lens,
    seq_lens,
    output,
    lse,
    block_lse,
    partial_out,
    partial_lse,
    scale,
    k_scale,
    v_scale,
    size,
) -> None:
    num_seqs, num_heads, head_size = query.shape
    if num_seqs == 0:
        return
    num_kv_heads, block_size = kv_cache.shape[1:3]
    num_sets = 1 if topk_blocks is None else topk_blocks.shape[1]
    num_sms, stages, native_fp8 = _device_limits(query.device)

    lanes = math.lcm(num_kv_heads, num_sets)
    heads = num_heads // lanes
    width = _width(head_size)
    rows = min(max(16, triton.next_power_of_2(heads)), max(16, 8192 // width))
    head_tiles = triton.cdiv(heads, rows)
    size_padded = triton.next_power_of_2(size)
    # Twice the bytes in fp32: half the tokens.
    tokens = TILE_ELEMENTS * 2 // query.element_size() // width
    tile = max(16, min(128, tokens), size_padded)
    read_values = output is not None
    tile_bytes = (1 + read_values) * width * tile * query.element_size()
    if tile_bytes > MAX_TILE_BYTES // 2:
        stages = 1
    elif topk_blocks is not None and stages > 2:
        stages += 2  # for the sets
    tile_blocks = tile // size_padded

    num_splits = partial_lse.shape[2]
    if num_sms:
        programs = PROGRAMS_PER_SM * num_sms
        wanted = triton.cdiv(programs, num_seqs * lanes * head_tiles)
        num_splits = min(num_splits, wanted)
    least = DENSE_SPLIT if topk_blocks is None else SPARSE_SPLIT
    min_blocks = triton.cdiv(triton.cdiv(least, size), tile_blocks) * tile_blocks

    fp8_bits = False
    if kv_cache.dtype in (torch.uint8, torch.float8_e4m3fn):
        fp8_bits = not native_fp8
        kv_cache = kv_cache.view(torch.uint8 if fp8_bits else torch.float8_e4m3fn)
    # NOTE: as bits, e4m3 reads as fp16 with an exponent that is smaller by 8.
    unit = 256.0 if fp8_bits else 1.0

    sparse = topk_blocks is not None
    blocks = topk_blocks if sparse else block_table  # never read if dense
    counts = topk_lens if sparse else seq_lens
    set_strides = (
        (*topk_blocks.stride()[:2], topk_lens.stride(0)) if sparse else (0, 0, 0)
    )
    split_constants = dict(
        SPARSE=sparse,
        READ_VALUES=read_values,
        SIZE=size,
        MIN_BLOCKS=min_blocks,
        TILE_BLOCKS=tile_blocks,
    )
    attend_split[(lanes * head_tiles, num_splits, num_seqs)](
        *(query, kv_cache, block_table, blocks, counts, seq_lens),
        *(block_lse, partial_out, partial_lse),
        *(scale * k_scale * unit * LOG2_E, num_splits),
        *query.stride()[:2],
        *kv_cache.stride()[:3],
        block_table.stride(0),
        *set_strides,
        *(block_lse.stride()[:2] if block_lse is not None else (0, 0)),
        partial_lse.shape[2],
        **split_constants,
        KEEP_BLOCK_LSE=block_lse is not None,
        FP8_BITS=fp8_bits,
        HEAD_SIZE=head_size,
        WIDTH=width,
        NUM_HEADS=num_heads,
        HEADS=heads,
        ROWS=rows,
        HEAD_TILES=head_tiles,
        LANES_PER_KV_HEAD=lanes // num_kv_heads,
        LANES_PER_SET=lanes // num_sets,
        BLOCK_SIZE=block_size,
        SIZE_PADDED=size_padded,
        # The interpreter multiplies the bits of a bf16.
        IN_FP32=INTERPRETED,
        num_warps=4 if rows <= 32 and query.element_size() == 2 else 8,
        num_stages=stages,
    )
    merge_splits[(num_heads, num_seqs)](
        *(partial_out, partial_lse, counts, seq_lens, output, lse),
        *(v_scale * unit, num_splits),
        set_strides[2],
        *(output.stride()[:2] if read_values else (0, 0)),
        partial_lse.shape[2],
        **split_constants,
        HEAD_SIZE=head_size,
        WIDTH=width,
        NUM_HEADS=num_heads,
        HEADS_PER_SET=num_heads // num_sets,
        MAX_SPLITS=max(MAX_SPLITS, triton.next_power_of_2(partial_lse.shape[2])),
        CHUNK=MERGE_CHUNK,
        num_warps=4,
    )
