"""`dense_decode` and `sparse_decode` in Triton: one pass over K and V, split, merged.

Program (lane, split, row) of `_attend_split` reads its share of a row's tokens for the
query heads of one lane: those that share both KV head and set, so each K and V is
fetched once for all of them. `_merge_splits` joins a row's shares in a fixed order. The
grid follows from shapes alone; how many splits have work is decided on the device.

Compiled ahead of time for sm_80, sm_90 and gfx942 and run under Triton's interpreter;
not yet run on a GPU.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from tidal_vllm.ops.checks import check_decode, check_sets
from tidal_vllm.ops.workspace import MAX_SPLITS

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
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
        seq_lens: [num_seqs] int32; 0 for a padded row.
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
    if 2 * width * tile * query.element_size() > MAX_TILE_BYTES // 2:
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
        SPARSE=sparse, SIZE=size, MIN_BLOCKS=min_blocks, TILE_BLOCKS=tile_blocks
    )
    _attend_split[(lanes * head_tiles, num_splits, num_seqs)](
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
    _merge_splits[(num_heads, num_seqs)](
        *(partial_out, partial_lse, counts, seq_lens, output, lse),
        *(v_scale * unit, num_splits),
        set_strides[2],
        *output.stride()[:2],
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


@triton.jit
def _count_blocks(counts, seq_lens, row, chosen_by, counts_s, SPARSE, SIZE):
    """How many selection blocks a lane reads; 0 for a padded row."""
    seq_len = tl.load(seq_lens + row)
    count = tl.cdiv(seq_len, SIZE)
    if SPARSE:
        chosen = tl.load(counts + row * counts_s + chosen_by)
        count = tl.where(seq_len > 0, chosen, 0)
    return count


@triton.jit
def _blocks_per_split(count, num_splits, MIN_BLOCKS, TILE_BLOCKS):
    per_split = tl.maximum(tl.cdiv(count, num_splits), MIN_BLOCKS)
    return tl.cdiv(per_split, TILE_BLOCKS) * TILE_BLOCKS


@triton.jit
def _finite(top):
    """What to subtract from scores whose largest is `top`; -inf less -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _log2(total):
    found = tl.log2(tl.where(total == 0.0, 1.0, total))
    return tl.where(total == 0.0, float("-inf"), found)


@triton.jit
def _read_tile(pointers, mask, DTYPE, FP8_BITS):
    """Load keys or values, zeros where masked."""
    found = tl.load(pointers, mask=mask, other=0.0)
    if FP8_BITS:
        bits = found.to(tl.uint16)
        magnitude = bits & 0x7F
        shifted = tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7)  # NaN
        bits = ((bits & 0x80) << 8) | shifted
        found = bits.to(tl.uint16).to(tl.float16, bitcast=True)
    return found.to(DTYPE)


@triton.jit
def _dot(a, b, IN_FP32):
    if IN_FP32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["num_splits", "partial_splits"])
def _attend_split(
    query,
    kv_cache,
    block_table,
    topk_blocks,
    counts,
    seq_lens,
    block_lse,
    partial_out,
    partial_lse,
    score_scale,  # of a dot product, to a score in units of log 2
    num_splits,
    query_s,
    query_h,
    kv_b,
    kv_h,
    kv_t,
    table_s,
    topk_s,
    topk_g,
    counts_s,
    block_lse_s,
    block_lse_h,
    partial_splits,
    SPARSE: tl.constexpr,
    SIZE: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    KEEP_BLOCK_LSE: tl.constexpr,
    FP8_BITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a lane
    ROWS: tl.constexpr,  # of them in one tile, padded to what tl.dot takes
    HEAD_TILES: tl.constexpr,
    LANES_PER_KV_HEAD: tl.constexpr,
    LANES_PER_SET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    IN_FP32: tl.constexpr,
):
    lane = tl.program_id(0) // HEAD_TILES
    head_tile = tl.program_id(0) % HEAD_TILES
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    chosen_by = lane // LANES_PER_SET

    seq_len = tl.load(seq_lens + row)
    count = _count_blocks(counts, seq_lens, row, chosen_by, counts_s, SPARSE, SIZE)
    per_split = _blocks_per_split(count, num_splits, MIN_BLOCKS, TILE_BLOCKS)
    first = split * per_split
    if first >= count:
        return
    end = tl.minimum(first + per_split, count)

    dims = tl.arange(0, WIDTH)
    in_tile = head_tile * ROWS + tl.arange(0, ROWS)
    heads = lane * HEADS + in_tile
    q_mask = (in_tile < HEADS)[:, None] & (dims < HEAD_SIZE)[None, :]
    q_at = query + row * query_s + heads[:, None] * query_h + dims[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0)

    slots = tl.arange(0, TILE_BLOCKS * SIZE_PADDED)
    nth_of_slot, offset_of_slot = slots // SIZE_PADDED, slots % SIZE_PADDED
    kv_of_head = kv_cache + (lane // LANES_PER_KV_HEAD).to(tl.int64) * kv_h
    table = block_table + row * table_s
    chosen = topk_blocks + row * topk_s + chosen_by.to(tl.int64) * topk_g

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(first, end, TILE_BLOCKS):
        nth = start + nth_of_slot
        used = nth < end
        blocks = nth
        if SPARSE:
            blocks = tl.load(chosen + nth, mask=used, other=0)
        tokens = blocks * SIZE + offset_of_slot
        used = used & (tokens < seq_len)
        if SIZE != SIZE_PADDED:
            used = used & (offset_of_slot < SIZE)
        physical = tl.load(table + tokens // BLOCK_SIZE, mask=used, other=0)
        in_block = (tokens % BLOCK_SIZE).to(tl.int64)
        slot_at = kv_of_head + physical.to(tl.int64) * kv_b + in_block * kv_t
        kv_at = slot_at[:, None] + dims[None, :]
        kv_mask = used[:, None] & (dims < HEAD_SIZE)[None, :]
        keys = _read_tile(kv_at, kv_mask, q.dtype, FP8_BITS)
        values = _read_tile(kv_at + HEAD_SIZE, kv_mask, q.dtype, FP8_BITS)

        scores = _dot(q, tl.trans(keys), IN_FP32) * score_scale
        scores = tl.where(used[None, :], scores, float("-inf"))
        if KEEP_BLOCK_LSE:
            if SIZE_PADDED == 1:
                kept = scores
            else:
                by_block = tl.reshape(scores, (ROWS, TILE_BLOCKS, SIZE_PADDED))
                tops = _finite(tl.max(by_block, 2))
                kept = tops + _log2(tl.sum(tl.exp2(by_block - tops[:, :, None]), 2))
            at = start + tl.arange(0, TILE_BLOCKS)
            kept_mask = (in_tile < HEADS)[:, None] & (at < end)[None, :]
            sums = block_lse + row * block_lse_s + heads[:, None] * block_lse_h
            tl.store(sums + at[None, :], kept * LN_2, mask=kept_mask)

        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - _finite(new_top)[:, None])
        rescale = tl.exp2(top - _finite(new_top))
        total = total * rescale + tl.sum(weights, 1)
        added = _dot(weights.to(q.dtype), values, IN_FP32)
        acc = acc * rescale[:, None] + added
        top = new_top

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    parts = (row * NUM_HEADS + heads) * partial_splits + split
    tl.store(partial_lse + parts, _finite(top) + _log2(total), mask=in_tile < HEADS)
    out_at = partial_out + parts[:, None] * HEAD_SIZE + dims[None, :]
    tl.store(out_at, out, mask=q_mask)


@triton.jit(do_not_specialize=["num_splits", "partial_splits"])
def _merge_splits(
    partial_out,
    partial_lse,
    counts,
    seq_lens,
    output,
    lse,
    value_scale,
    num_splits,
    counts_s,
    output_s,
    output_h,
    partial_splits,
    SPARSE: tl.constexpr,
    SIZE: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_SET: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    chosen_by = head // HEADS_PER_SET
    count = _count_blocks(counts, seq_lens, row, chosen_by, counts_s, SPARSE, SIZE)
    per_split = _blocks_per_split(count, num_splits, MIN_BLOCKS, TILE_BLOCKS)
    used = tl.cdiv(count, per_split)

    first_part = (row * NUM_HEADS + head) * partial_splits
    dims = tl.arange(0, WIDTH)
    splits = tl.arange(0, MAX_SPLITS)
    lses = tl.load(
        partial_lse + first_part + splits, mask=splits < used, other=float("-inf")
    )
    top = _finite(tl.max(lses, 0))
    total = tl.sum(tl.exp2(lses - top), 0)
    acc = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, used, CHUNK):
        some = start + tl.arange(0, CHUNK)
        part_lse = tl.load(
            partial_lse + first_part + some, mask=some < used, other=float("-inf")
        )
        mask = (some < used)[:, None] & (dims < HEAD_SIZE)[None, :]
        at = partial_out + (first_part + some)[:, None] * HEAD_SIZE + dims[None, :]
        parts = tl.load(at, mask=mask, other=0.0)
        acc += tl.sum(tl.exp2(part_lse - top)[:, None] * parts, 0)
    out = acc / tl.where(total == 0.0, 1.0, total) * value_scale
    out_at = output + row * output_s + head * output_h + dims
    tl.store(out_at, out.to(output.dtype.element_ty), mask=dims < HEAD_SIZE)
    tl.store(lse + row * NUM_HEADS + head, (top + _log2(total)) * LN_2)
