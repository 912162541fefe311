"""The Triton kernels of `select`: the exact heaviest blocks, without sorting them.

`weigh_blocks` sums each block's mass over the heads of a set; forced blocks weigh
infinitely. `choose_blocks`, one program per row and set, builds the smallest mass that
is kept bit by bit (floats that are not negative order like their bits), then writes the
blocks above it, and as many equal to it as there is room for, in order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles what follows, and reads an annotation as an order of its own.

import triton
import triton.language as tl

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def weigh_blocks(
    block_lse,
    lse,
    seq_lens,
    mass,
    stride_block_lse_row,
    stride_block_lse_head,
    stride_mass_row,
    stride_mass_set,
    SIZE: tl.constexpr,
    KEEP_ALL: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_SET: tl.constexpr,
    TILE: tl.constexpr,
):
    set_id = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens + row)
    num_blocks = tl.cdiv(seq_len, SIZE)
    first = tl.program_id(0) * TILE
    if (seq_len <= KEEP_ALL) | (first >= num_blocks):
        return
    blocks = first + tl.arange(0, TILE)
    mask = blocks < num_blocks
    weight = tl.zeros([TILE], tl.float32)
    for nth in tl.range(0, HEADS_PER_SET):
        head = set_id * HEADS_PER_SET + nth
        at = (
            block_lse
            + row * stride_block_lse_row
            + head * stride_block_lse_head
            + blocks
        )
        of_block = tl.load(at, mask=mask, other=float("-inf"))
        weight += tl.exp(of_block - tl.load(lse + row * NUM_HEADS + head))
    weight = tl.where(weight != weight, 0.0, weight)
    weight = tl.minimum(weight, LARGEST_FLOAT)
    first_recent = (seq_len - RECENT_TOKENS) // SIZE
    forced = (blocks < SINKS) | (blocks >= first_recent)
    weight = tl.where(forced, float("inf"), weight)
    tl.store(
        mass + row * stride_mass_row + set_id * stride_mass_set + blocks,
        weight,
        mask=mask,
    )


@triton.jit
def _load_keys(masses, blocks, num_blocks):
    """Bits of the masses: ordered like them; -1, below all, past the last block."""
    found = tl.load(masses + blocks, mask=blocks < num_blocks, other=0.0)
    return tl.where(blocks < num_blocks, found.to(tl.int32, bitcast=True), -1)


@triton.jit(do_not_specialize=["max_blocks"])
def choose_blocks(
    mass,
    seq_lens,
    topk_blocks,
    topk_lens,
    max_blocks,
    stride_mass_row,
    stride_mass_set,
    stride_topk_row,
    stride_topk_set,
    stride_topk_lens_row,
    SIZE: tl.constexpr,
    KEEP_ALL: tl.constexpr,
    BUDGET_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    set_id = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens + row)
    if seq_len < 0:
        return
    num_blocks = tl.cdiv(seq_len, SIZE)
    keep_all = seq_len <= KEEP_ALL
    kept = tl.minimum(tl.where(keep_all, num_blocks, BUDGET_BLOCKS), max_blocks)
    tl.store(topk_lens + row * stride_topk_lens_row + set_id, kept)

    chosen = topk_blocks + row * stride_topk_row + set_id * stride_topk_set
    masses = mass + row * stride_mass_row + set_id * stride_mass_set
    in_tile = tl.arange(0, TILE)
    if keep_all:
        for start in tl.range(0, kept, TILE):
            blocks = start + in_tile
            tl.store(chosen + blocks, blocks, mask=blocks < kept)
    else:
        # The largest bit pattern that at least `kept` keys reach: the last one kept.
        smallest = tl.zeros([], tl.int32)
        if ONE_TILE:
            keys = _load_keys(masses, in_tile, num_blocks)
        for nth in tl.range(0, 31):
            tried = smallest | (1 << (30 - nth))
            if ONE_TILE:
                reached = (keys >= tried).to(tl.int32)
            else:
                reached = tl.zeros([TILE], tl.int32)
                for start in tl.range(0, num_blocks, TILE):
                    some = _load_keys(masses, start + in_tile, num_blocks)
                    reached += (some >= tried).to(tl.int32)
            smallest = tl.where(tl.sum(reached, 0) >= kept, tried, smallest)

        above = tl.zeros([TILE], tl.int32)
        for start in tl.range(0, num_blocks, TILE):
            some = _load_keys(masses, start + in_tile, num_blocks)
            above += (some > smallest).to(tl.int32)
        room = kept - tl.sum(above, 0)  # for those equal to the smallest

        written = tl.zeros([], tl.int32)
        for start in tl.range(0, num_blocks, TILE):
            blocks = start + in_tile
            some = _load_keys(masses, blocks, num_blocks)
            ties = (some == smallest).to(tl.int32)
            first_ties = (ties > 0) & (tl.cumsum(ties, 0) <= room)
            taken = ((some > smallest) | first_ties).to(tl.int32)
            at = written + tl.cumsum(taken, 0) - 1
            tl.store(chosen + at, blocks, mask=taken > 0)
            room -= tl.sum(ties, 0)
            written += tl.sum(taken, 0)
    for start in tl.range((kept // TILE) * TILE, max_blocks, TILE):
        slots = start + in_tile
        mask = (slots >= kept) & (slots < max_blocks)
        tl.store(chosen + slots, tl.full([TILE], -1, tl.int32), mask=mask)
