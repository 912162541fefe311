"""The Triton kernels of `attend`: one pass over K and V in splits, then a merge.

A head group is the query heads that share both their KV head and their set. Program
(head group and head tile, split, row) of `attend_split` reads its share of a row's
tokens for the heads of one group, so that each K and V is fetched once for all of them.
`merge_splits` joins a row's shares in a fixed order. The grid follows from shapes
alone; how many splits have work is decided on the device. A row that is left out has
none, and is not merged either.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles what follows, and reads an annotation as an order of its own.

import math

import triton
import triton.language as tl

LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _count_blocks(counts, seq_len, row, set_id, stride_counts_row, SPARSE, SIZE):
    """How many selection blocks a head group reads; 0 for a row padded or left out."""
    count = tl.cdiv(tl.maximum(seq_len, 0), SIZE)
    if SPARSE:
        chosen = counts + row * stride_counts_row + set_id
        count = tl.load(chosen, mask=seq_len > 0, other=0)
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
    # Straight from fp16, NVIDIA makes each bf16 by an instruction for conversions.
    return found.to(tl.float32).to(DTYPE)


@triton.jit
def _dot(a, b, IN_FP32):
    if IN_FP32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["num_splits", "partial_splits"])
def attend_split(
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
    stride_query_row,
    stride_query_head,
    stride_kv_block,
    stride_kv_head,
    stride_kv_token,
    stride_table_row,
    stride_topk_row,
    stride_topk_set,
    stride_counts_row,
    stride_block_lse_row,
    stride_block_lse_head,
    partial_splits,
    SPARSE: tl.constexpr,
    READ_VALUES: tl.constexpr,
    SIZE: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    KEEP_BLOCK_LSE: tl.constexpr,
    FP8_BITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    TILE_HEADS: tl.constexpr,  # of a group in one program, padded to what tl.dot takes
    HEAD_TILES: tl.constexpr,
    GROUPS_PER_KV_HEAD: tl.constexpr,
    GROUPS_PER_SET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    IN_FP32: tl.constexpr,
):
    head_group = tl.program_id(0) // HEAD_TILES
    head_tile = tl.program_id(0) % HEAD_TILES
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    set_id = head_group // GROUPS_PER_SET

    seq_len = tl.load(seq_lens + row)
    count = _count_blocks(counts, seq_len, row, set_id, stride_counts_row, SPARSE, SIZE)
    per_split = _blocks_per_split(count, num_splits, MIN_BLOCKS, TILE_BLOCKS)
    first = split * per_split
    if first >= count:
        return
    end = tl.minimum(first + per_split, count)

    dims = tl.arange(0, WIDTH)
    nth_head = head_tile * TILE_HEADS + tl.arange(0, TILE_HEADS)
    heads = head_group * HEADS_PER_GROUP + nth_head
    q_mask = (nth_head < HEADS_PER_GROUP)[:, None] & (dims < HEAD_SIZE)[None, :]
    q_at = (
        query
        + row * stride_query_row
        + heads[:, None] * stride_query_head
        + dims[None, :]
    )
    q = tl.load(q_at, mask=q_mask, other=0.0)

    slots = tl.arange(0, TILE_BLOCKS * SIZE_PADDED)
    nth_of_slot, offset_of_slot = slots // SIZE_PADDED, slots % SIZE_PADDED
    kv_of_head = (
        kv_cache + (head_group // GROUPS_PER_KV_HEAD).to(tl.int64) * stride_kv_head
    )
    table = block_table + row * stride_table_row
    chosen = topk_blocks + row * stride_topk_row + set_id.to(tl.int64) * stride_topk_set

    top = tl.full([TILE_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_HEADS], tl.float32)
    if READ_VALUES:
        acc = tl.zeros([TILE_HEADS, WIDTH], tl.float32)
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
        slot_at = (
            kv_of_head
            + physical.to(tl.int64) * stride_kv_block
            + in_block * stride_kv_token
        )
        kv_at = slot_at[:, None] + dims[None, :]
        kv_mask = used[:, None] & (dims < HEAD_SIZE)[None, :]
        keys = _read_tile(kv_at, kv_mask, q.dtype, FP8_BITS)
        if READ_VALUES:
            values = _read_tile(kv_at + HEAD_SIZE, kv_mask, q.dtype, FP8_BITS)

        scores = _dot(q, tl.trans(keys), IN_FP32) * score_scale
        scores = tl.where(used[None, :], scores, float("-inf"))
        if KEEP_BLOCK_LSE:
            if SIZE_PADDED == 1:
                kept = scores
            else:
                by_block = tl.reshape(scores, (TILE_HEADS, TILE_BLOCKS, SIZE_PADDED))
                tops = _finite(tl.max(by_block, 2))
                kept = tops + _log2(tl.sum(tl.exp2(by_block - tops[:, :, None]), 2))
            at = start + tl.arange(0, TILE_BLOCKS)
            kept_mask = (nth_head < HEADS_PER_GROUP)[:, None] & (at < end)[None, :]
            sums = (
                block_lse
                + row * stride_block_lse_row
                + heads[:, None] * stride_block_lse_head
            )
            tl.store(sums + at[None, :], kept * LN_2, mask=kept_mask)

        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - _finite(new_top)[:, None])
        rescale = tl.exp2(top - _finite(new_top))
        total = total * rescale + tl.sum(weights, 1)
        if READ_VALUES:
            added = _dot(weights.to(q.dtype), values, IN_FP32)
            acc = acc * rescale[:, None] + added
        top = new_top

    partials = (row * NUM_HEADS + heads) * partial_splits + split
    tl.store(
        partial_lse + partials,
        _finite(top) + _log2(total),
        mask=nth_head < HEADS_PER_GROUP,
    )
    if READ_VALUES:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_at = partial_out + partials[:, None] * HEAD_SIZE + dims[None, :]
        tl.store(out_at, out, mask=q_mask)


@triton.jit(do_not_specialize=["num_splits", "partial_splits"])
def merge_splits(
    partial_out,
    partial_lse,
    counts,
    seq_lens,
    output,
    lse,
    value_scale,
    num_splits,
    stride_counts_row,
    stride_output_row,
    stride_output_head,
    partial_splits,
    SPARSE: tl.constexpr,
    READ_VALUES: tl.constexpr,
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
    seq_len = tl.load(seq_lens + row)
    if seq_len < 0:
        return
    set_id = head // HEADS_PER_SET
    count = _count_blocks(counts, seq_len, row, set_id, stride_counts_row, SPARSE, SIZE)
    per_split = _blocks_per_split(count, num_splits, MIN_BLOCKS, TILE_BLOCKS)
    used = tl.cdiv(count, per_split)

    first_partial = (row * NUM_HEADS + head) * partial_splits
    splits = tl.arange(0, MAX_SPLITS)
    lses = tl.load(
        partial_lse + first_partial + splits, mask=splits < used, other=float("-inf")
    )
    top = _finite(tl.max(lses, 0))
    total = tl.sum(tl.exp2(lses - top), 0)
    tl.store(lse + row * NUM_HEADS + head, (top + _log2(total)) * LN_2)
    if READ_VALUES:
        dims = tl.arange(0, WIDTH)
        acc = tl.zeros([WIDTH], tl.float32)
        for start in tl.range(0, used, CHUNK):
            some = start + tl.arange(0, CHUNK)
            some_lses = tl.load(
                partial_lse + first_partial + some,
                mask=some < used,
                other=float("-inf"),
            )
            mask = (some < used)[:, None] & (dims < HEAD_SIZE)[None, :]
            at = (
                partial_out
                + (first_partial + some)[:, None] * HEAD_SIZE
                + dims[None, :]
            )
            outs = tl.load(at, mask=mask, other=0.0)
            acc += tl.sum(tl.exp2(some_lses - top)[:, None] * outs, 0)
        out = acc / tl.where(total == 0.0, 1.0, total) * value_scale
        out_at = output + row * stride_output_row + head * stride_output_head + dims
        tl.store(out_at, out.to(output.dtype.element_ty), mask=dims < HEAD_SIZE)
