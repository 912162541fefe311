"""The Triton kernels of `select`: the exact heaviest blocks, without sorting them.

`weigh_blocks` sums each block's mass over the heads of a set; forced blocks weigh
infinitely. `choose_blocks`, one program per row and set, finds the smallest mass that
is kept digit by digit (a radix select: floats that are not negative are ordered as
their bits are), then writes what reaches it, in order. It reads the masses of a row at
most four times, or seven times where several are equal to the smallest and not all of
them are kept.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles what follows, and reads an annotation as an order of its own.

import triton
import triton.language as tl

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# Three digits hold the 31 bits of a float that is not negative.
DIGIT_BITS = tl.constexpr(11)
BINS = tl.constexpr(1 << 11)
KEY_BITS = tl.constexpr(33)
LARGEST_INT = tl.constexpr(2**31 - 1)
# Counts and marks are summed in groups first: a scan over a whole program at once takes
# about twice the instructions.
GROUP = tl.constexpr(32)


@triton.jit
def weigh_blocks(
    block_lse,
    lse,
    seq_lens,
    mass,
    num_columns,  # of block_lse
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
    TILE_HEADS: tl.constexpr,
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
    # A load is of 16 bytes where its four blocks are read or left together, so up to
    # three blocks behind the last one are read, and not used.
    readable = blocks < tl.minimum(tl.cdiv(num_blocks, 4) * 4, num_columns)
    weight = tl.zeros([TILE], tl.float32)
    for start in tl.static_range(0, HEADS_PER_SET, TILE_HEADS):
        nth = start + tl.arange(0, TILE_HEADS)
        of_set = nth < HEADS_PER_SET
        heads = set_id * HEADS_PER_SET + nth
        totals = tl.load(lse + row * NUM_HEADS + heads, mask=of_set, other=0.0)
        at = (
            block_lse
            + row * stride_block_lse_row
            + heads[:, None] * stride_block_lse_head
            + blocks[None, :]
        )
        mask = of_set[:, None] & readable[None, :]
        of_block = tl.load(at, mask=mask, other=float("-inf"))
        weight += tl.sum(tl.exp(of_block - totals[:, None]), 0)
    weight = tl.where(weight != weight, 0.0, weight)
    weight = tl.minimum(weight, LARGEST_FLOAT)
    first_recent = (seq_len - RECENT_TOKENS) // SIZE
    forced = (blocks < SINKS) | (blocks >= first_recent)
    weight = tl.where(forced, float("inf"), weight)
    tl.store(
        mass + row * stride_mass_row + set_id * stride_mass_set + blocks,
        weight,
        mask=blocks < num_blocks,
    )


@triton.jit
def _load_keys(masses, blocks, num_blocks):
    """Bits of the masses: ordered like them; -1, below all, past the last block."""
    bits = masses.to(tl.pointer_type(tl.int32))
    return tl.load(bits + blocks, mask=blocks < num_blocks, other=-1)


@triton.jit
def _count_digits(masses, num_blocks, prefix, shift, tied, AMONG_TIES, TILE):
    """Of the keys that begin with `prefix`, how many have each digit next: `[BINS]`."""
    counts = tl.zeros([BINS], tl.int32)
    for start in tl.range(0, num_blocks, TILE):
        blocks = start + tl.arange(0, TILE)
        keys = _load_keys(masses, blocks, num_blocks)
        if AMONG_TIES:
            keys = tl.where(keys == tied, LARGEST_INT - blocks, -1)
        digits = (keys >> shift) - (prefix << DIGIT_BITS)
        asked = (digits >= 0) & (digits < BINS)
        counts += tl.histogram(digits, BINS, mask=asked)
    return counts


@triton.jit
def _last_reached(counts, room):
    """Sum up from the end to the `room`-th: its index, the sums before and with it."""
    sums = tl.cumsum(counts, 0, reverse=True)
    reached = sums >= room
    before = tl.max(tl.where(reached, 0, sums), 0)
    after = tl.min(tl.where(reached, sums, LARGEST_INT), 0)
    return tl.sum(reached.to(tl.int32), 0) - 1, before, after


@triton.jit
def _find_digit(counts, room):
    """The digit of the `room`-th largest key; how many keys are above it, have it."""
    groups = tl.reshape(counts, (BINS // GROUP, GROUP))
    group, above, _ = _last_reached(tl.sum(groups, 1), room)
    is_group = tl.arange(0, BINS // GROUP)[:, None] == group
    of_group = tl.sum(tl.where(is_group, groups, 0), 0)
    digit, before, after = _last_reached(of_group, room - above)
    return group * GROUP + digit, above + before, after - before


@triton.jit
def _find_key(masses, num_blocks, room, tied, AMONG_TIES, TILE):
    """The smallest key that is kept where the `room` largest keys are.

    A key is the bits of a mass, or AMONG_TIES, of the masses equal to `tied`, such that
    a block of smaller index has a larger key. The search ends early where all keys are
    kept that begin like the smallest: then the smallest number that begins so.

    Returns:
        The key, how many keys begin like it, and how many of those are kept.
    """
    prefix = tl.zeros([], tl.int32)
    count = room + 1
    shift = KEY_BITS
    while (shift > 0) & (count > room):
        shift -= DIGIT_BITS
        counts = _count_digits(
            masses, num_blocks, prefix, shift, tied, AMONG_TIES, TILE
        )
        digit, above, count = _find_digit(counts, room)
        prefix = (prefix << DIGIT_BITS) | digit
        room -= above
    return prefix << shift, count, room


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
    elif kept > 0:
        smallest, ties, room = _find_key(masses, num_blocks, kept, 0, False, TILE)
        last_tie = num_blocks  # the last block that is kept of those with that key
        if ties > room:
            key, _, _ = _find_key(masses, num_blocks, room, smallest, True, TILE)
            last_tie = LARGEST_INT - key

        written = tl.zeros([], tl.int32)
        for start in tl.range(0, num_blocks, TILE):
            blocks = start + in_tile
            keys = _load_keys(masses, blocks, num_blocks)
            taken = keys >= tl.where(blocks <= last_tie, smallest, smallest + 1)
            groups = tl.reshape(taken.to(tl.int32), (TILE // GROUP, GROUP))
            in_group = tl.sum(groups, 1)
            before = written + tl.cumsum(in_group, 0) - in_group
            at = before[:, None] + tl.cumsum(groups, 1) - 1
            blocks = tl.reshape(blocks, (TILE // GROUP, GROUP))
            tl.store(chosen + at, blocks, mask=groups > 0)
            written += tl.sum(in_group, 0)
    for start in tl.range((kept // TILE) * TILE, max_blocks, TILE):
        slots = start + in_tile
        mask = (slots >= kept) & (slots < max_blocks)
        tl.store(chosen + slots, tl.full([TILE], -1, tl.int32), mask=mask)
