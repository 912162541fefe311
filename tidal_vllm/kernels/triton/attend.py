"""`dense_decode`, `score_blocks` and `sparse_decode` in Triton, on `split_kv`.

`tidal_vllm.kernels.arguments.DecodeArgs` gives shapes and dtypes. Beyond that, the last
dimension of each tensor is contiguous, an fp8 cache is float8_e4m3fn or uint8, and the
workspace is an allocated one. All three ops can be captured in a CUDA graph.

Compiled ahead of time for sm_80, sm_90, sm_100, sm_120 and gfx942, and run under
Triton's interpreter and on an H100. docs/triton.md has counts and a model.
"""

import math

import torch
import triton

from tidal_vllm.kernels.arguments import DecodeArgs
from tidal_vllm.kernels.triton.checks import FP8, check_dense, check_sparse
from tidal_vllm.kernels.triton.split_kv import attend_split, merge_splits
from tidal_vllm.kernels.triton.tiling import choose_tiling, device_limits
from tidal_vllm.kernels.workspace import MAX_SPLITS

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = math.log2(math.e)
MERGE_CHUNK = 16


def dense_decode(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Attend to whole sequences; `reference.dense_decode` defines it.

    The lse and block_lse of a row that is left out, and the block_lse behind a row's
    last block, stay as they were.

    Raises:
        ValueError: A dtype, device, shape or stride that does not fit. Lengths and
            block ids are preconditions.
    """
    partials = args.workspace.partials(args.query.shape[0])
    check_dense(args, seq_lens, partials, read_values=True)
    _attend(args, seq_lens, partials, sparse=False, read_values=True)


def score_blocks(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Score all blocks by K alone; `reference.score_blocks` defines it.

    The splits, tiles and sums are those of `dense_decode`; V is not read.

    Raises:
        ValueError: As `dense_decode`.
    """
    partials = args.workspace.partials(args.query.shape[0])
    check_dense(args, seq_lens, partials, read_values=False)
    _attend(args, seq_lens, partials, sparse=False, read_values=False)


def sparse_decode(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Attend to the chosen blocks; `reference.sparse_decode` defines it.

    Raises:
        ValueError: As `dense_decode`.
    """
    partials = args.workspace.partials(args.query.shape[0])
    check_sparse(args, seq_lens, partials)
    _attend(args, seq_lens, partials, sparse=True, read_values=True)


def _attend(
    args: DecodeArgs,
    seq_lens: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor],
    *,
    sparse: bool,
    read_values: bool,
) -> None:
    """Launch the two kernels; all arguments are checked."""
    query, kv_cache, lse = args.query, args.kv_cache, args.workspace.lse
    num_rows, num_heads, head_size = query.shape
    if num_rows == 0:
        return
    num_kv_heads, block_size = kv_cache.shape[1:3]
    num_sets = args.topk_blocks.shape[1] if sparse else 1
    size = args.select_block_size or 1
    keep_block_lse = not sparse and args.select_block_size is not None
    block_lse = args.workspace.block_lse if keep_block_lse else None
    partial_out, partial_lse = partials
    max_splits = partial_lse.shape[2]
    limits = device_limits(query.device)
    tiling = choose_tiling(
        num_rows=num_rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_sets=num_sets,
        head_size=head_size,
        query_bytes=query.element_size(),
        select_block_size=size,
        sparse=sparse,
        read_values=read_values,
        max_splits=max_splits,
        limits=limits,
    )

    fp8_bits = False
    if kv_cache.dtype in FP8:
        fp8_bits = not limits.native_fp8
        kv_cache = kv_cache.view(torch.uint8 if fp8_bits else torch.float8_e4m3fn)
    # NOTE: as bits, e4m3 reads as fp16 with an exponent that is smaller by 8.
    unit = 256.0 if fp8_bits else 1.0

    # The kernels read topk_blocks, and counts by their stride, in sparse_decode only.
    topk_blocks = args.topk_blocks if sparse else args.block_table
    counts = args.topk_lens if sparse else seq_lens
    topk_strides = args.topk_blocks.stride()[:2] if sparse else (0, 0)
    counts_stride = args.topk_lens.stride(0) if sparse else 0
    split_constants = dict(
        SPARSE=sparse,
        READ_VALUES=read_values,
        SIZE=size,
        MIN_BLOCKS=tiling.min_blocks,
        TILE_BLOCKS=tiling.tile_blocks,
        HEAD_SIZE=head_size,
        WIDTH=tiling.width,
        NUM_HEADS=num_heads,
    )
    programs = tiling.head_groups * tiling.head_tiles
    attend_split[(programs, tiling.num_splits, num_rows)](
        *(query, kv_cache, args.block_table, topk_blocks, counts, seq_lens),
        *(block_lse, partial_out if read_values else None, partial_lse),
        *(args.scale * args.k_scale * unit * LOG2_E, tiling.num_splits),
        *query.stride()[:2],
        *kv_cache.stride()[:3],
        args.block_table.stride(0),
        *topk_strides,
        counts_stride,
        *(block_lse.stride()[:2] if keep_block_lse else (0, 0)),
        max_splits,
        **split_constants,
        KEEP_BLOCK_LSE=keep_block_lse,
        FP8_BITS=fp8_bits,
        HEADS_PER_GROUP=tiling.heads_per_group,
        TILE_HEADS=tiling.tile_heads,
        HEAD_TILES=tiling.head_tiles,
        GROUPS_PER_KV_HEAD=tiling.head_groups // num_kv_heads,
        GROUPS_PER_SET=tiling.head_groups // num_sets,
        BLOCK_SIZE=block_size,
        SIZE_PADDED=tiling.size_padded,
        # The interpreter multiplies the bits of a bf16.
        IN_FP32=INTERPRETED,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    merge_splits[(num_heads, num_rows)](
        *(partial_out if read_values else None, partial_lse, counts, seq_lens),
        *(args.output if read_values else None, lse),
        *(args.v_scale * unit, tiling.num_splits),
        counts_stride,
        *(args.output.stride()[:2] if read_values else (0, 0)),
        max_splits,
        **split_constants,
        HEADS_PER_SET=num_heads // num_sets,
        MAX_SPLITS=max(MAX_SPLITS, triton.next_power_of_2(max_splits)),
        CHUNK=MERGE_CHUNK,
        num_warps=4,
    )
