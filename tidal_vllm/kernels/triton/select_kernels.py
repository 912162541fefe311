"""The Triton kernels of `select`: the exact heaviest blocks, without sorting them.

`weigh_blocks` sums each block's mass over the heads of a set; forced blocks weigh
infinitely. `choose_blocks`, one program per row and set, finds the smallest mass that
is kept digit by digit (a radix select: floats that are not negative are ordered as
their bits are), then writes what reaches it, in order. `weigh_blocks` counts the first
digit, of 13 bits, so `choose_blocks` reads the masses of a row at most three times. It
reads them once more where the smallest mass is out of the range of those digits, and
three times more where several are equal to it and not all of them are kept.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles what follows, and reads an annotation as an order of its own.

import triton
import triton.language as tl

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# Digits of 11, 11 and 9 bits hold the 31 bits of a float that is not negative.
KEY_BITS = tl.constexpr(31)
DIGIT_BITS = tl.constexpr(11)
BINS = tl.constexpr(1 << 11)
# The digit that `weigh_blocks` counts: 32 for each power of 2, from 2**-56 to 2**8.
# Smaller masses have the first one, larger masses the last one.
FIRST_SHIFT = tl.constexpr(31 - 13)
FIRST_DIGIT = tl.constexpr((127 - 56) << 5)
LARGEST_INT = tl.constexpr(2**31 - 1)
# Counts and marks are summed in groups first: a scan over a whole program at once takes
# about twice the instructions.
GROUP = tl.constexpr(32)
# A load is of 16 bytes where its four blocks are read or left together.
QUAD = tl.constexpr(4)
# Parts of a tile whose counts are in one int32.
PARTS = tl.constexpr(4)


@triton.jit
def weigh_blocks(
    block_lse,
    lse,
    seq_lens,
    mass,
    digit_counts,
    num_columns,  # of block_lse and mass
    stride_block_lse_row,
    stride_block_lse_head,
    stride_mass_row,
    stride_mass_set,
    SIZE: tl.constexpr,
    KEEP_ALL: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_SETS: tl.constexpr,
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
    # Up to three blocks behind the last one are read, and not used.
    readable = blocks < _whole_quads(num_blocks, num_columns)
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
    # `choose_blocks` loads whole quads too: what is negative is no block.
    keys = tl.where(blocks < num_blocks, weight.to(tl.int32, bitcast=True), -1)
    masses = mass + row * stride_mass_row + set_id * stride_mass_set
    tl.store(masses.to(tl.pointer_type(tl.int32)) + blocks, keys, mask=readable)

    # Triton 3.6 and 3.7 clamp floats alone.
    digits = tl.maximum((keys >> FIRST_SHIFT) - FIRST_DIGIT, 0)
    digits = tl.minimum(digits, BINS - 1)
    of_set = digit_counts + (row * NUM_SETS + set_id) * BINS
    tl.atomic_add(of_set + digits, 1, mask=keys >= 0, sem="relaxed")


@triton.jit
def _whole_quads(num_blocks, num_columns):
    """How many blocks can be read for a row of num_blocks, four at a time."""
    return tl.minimum(tl.cdiv(num_blocks, QUAD) * QUAD, num_columns)


@triton.jit
def _load_keys(masses, start, readable, TILE):
    """Bits of the masses: ordered like them; -1, below all, past the last block."""
    in_tile = tl.arange(0, TILE)
    tile = masses.to(tl.pointer_type(tl.int32)) + start
    return tl.load(tile + in_tile, mask=in_tile < readable - start, other=-1)


@triton.jit
def _count_digits(masses, readable, first_key, bits, shift, tied, AMONG_TIES, TILE):
    """Of the 2**bits keys from `first_key`, how many have each digit: `[BINS]`.

    A digit is what a key has from its bit `shift` on, above `first_key`.
    """
    counts = tl.zeros([BINS], tl.int32)
    num_keys = tl.full([], 1, tl.uint32) << bits
    for start in tl.range(0, readable, TILE):
        keys = _load_keys(masses, start, readable, TILE)
        if AMONG_TIES:
            blocks = start + tl.arange(0, TILE)
            keys = tl.where(keys == tied, LARGEST_INT - blocks, -1)
        # A key that is less than the first one, -1 included, is past the last one here.
        above = (keys - first_key).to(tl.uint32, bitcast=True)
        digits = (above >> shift).to(tl.int32, bitcast=True)
        counts += tl.histogram(digits, BINS, mask=above < num_keys)
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
def _find_key(masses, readable, key, bits, count, room, tied, AMONG_TIES, TILE):
    """The smallest key that is kept where the `room` largest keys are.

    A key is the bits of a mass, or AMONG_TIES, of the masses equal to `tied`, such that
    a block of smaller index has a larger key. The search ends early where all keys are
    kept that begin like the smallest: then the smallest number that begins so.

    Args:
        key: int32, how the key begins, and then as many zeros as `bits` says.
        bits: int32, how many bits of the key are not known.
        count: How many keys begin so; where nothing is known, any number above `room`.
        room: How many of those are kept.

    Returns:
        The key, how many keys begin like it, and how many of those are kept.
    """
    while (bits > 0) & (count > room):
        shift = tl.maximum(bits - DIGIT_BITS, 0)
        counts = _count_digits(
            masses, readable, key, bits, shift, tied, AMONG_TIES, TILE
        )
        digit, above, count = _find_digit(counts, room)
        key += digit << shift
        bits = shift
        room -= above
    return key, count, room


@triton.jit
def _sign(numbers):
    """1 where an int32 is negative, else 0."""
    return (numbers.to(tl.uint32, bitcast=True) >> 31).to(tl.int32, bitcast=True)


@triton.jit
def _write_taken(chosen, start, taken, written, TILE):
    """Append the blocks of a tile whose `taken` is 1, not 0; how many are written now.

    The four blocks of a quad stay in one thread, from their load to their stores.
    """
    evens, odds = tl.split(tl.reshape(taken, (TILE // QUAD, 2, 2)))
    first, third = tl.split(evens)
    second, fourth = tl.split(odds)
    of_quad = (first + second) + (third + fourth)
    # A group of quads has at most 128 blocks: one scan adds up groups of the four parts
    # of a tile at once, in a byte each.
    num_groups: tl.constexpr = TILE // QUAD // GROUP // PARTS
    byte = 8 * tl.arange(0, PARTS)[:, None, None]
    groups = tl.reshape(of_quad, (PARTS, num_groups, GROUP))
    packed = tl.sum(groups << byte, 0)
    in_group = (tl.sum(packed, 1)[None, :] >> tl.reshape(byte, (PARTS, 1))) & 255
    in_group = tl.reshape(in_group, (PARTS * num_groups,))
    before_group = written + tl.cumsum(in_group, 0) - in_group
    before_group = tl.reshape(before_group, (PARTS, num_groups))
    in_row = (tl.cumsum(packed, 1)[None, :, :] >> byte) & 255
    before = before_group[:, :, None] + in_row - groups
    at = tl.reshape(before, (TILE // QUAD,))
    blocks = start + QUAD * tl.arange(0, TILE // QUAD)
    tl.store(chosen + at, blocks, mask=first != 0)
    at += first
    tl.store(chosen + at, blocks + 1, mask=second != 0)
    at += second
    tl.store(chosen + at, blocks + 2, mask=third != 0)
    at += third
    tl.store(chosen + at, blocks + 3, mask=fourth != 0)
    return written + tl.sum(in_group, 0)


@triton.jit
def _write_row(chosen, masses, readable, smallest, last_tie, AMONG_TIES, TILE):
    """Write the blocks of at least `smallest`; AMONG_TIES, of equals until last_tie."""
    in_tile = tl.arange(0, TILE)
    written = tl.zeros([], tl.int32)
    for start in tl.range(0, readable, TILE):
        keys = _load_keys(masses, start, readable, TILE)
        # Signs take fewer instructions than comparing; no difference overflows.
        largest_left = smallest - 1
        if AMONG_TIES:
            largest_left += _sign(last_tie - start - in_tile)
        taken = _sign(largest_left - keys)
        written = _write_taken(chosen, start, taken, written, TILE)


@triton.jit(do_not_specialize=["max_blocks"])
def choose_blocks(
    mass,
    digit_counts,
    seq_lens,
    topk_blocks,
    topk_lens,
    num_columns,  # of mass
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
    else:
        bins = tl.arange(0, BINS)
        of_set = digit_counts + (row * tl.num_programs(0) + set_id) * BINS
        digit, above, count = _find_digit(tl.load(of_set + bins), kept)
        # By now all threads have read the counts, which have to be zeros again.
        tl.store(of_set + bins, tl.zeros([BINS], tl.int32))
        if kept > 0:
            readable = _whole_quads(num_blocks, num_columns)
            # The digits at both ends do not say how a key begins.
            known = (digit > 0) & (digit < BINS - 1)
            key = tl.where(known, (digit + FIRST_DIGIT) << FIRST_SHIFT, 0)
            bits = tl.where(known, FIRST_SHIFT, KEY_BITS)
            count = tl.where(known, count, kept + 1)
            room = tl.where(known, kept - above, kept)
            smallest, ties, room = _find_key(
                masses, readable, key, bits, count, room, 0, False, TILE
            )
            if ties > room:
                nothing = tl.zeros([], tl.int32)
                key, _, _ = _find_key(
                    *(masses, readable, nothing, nothing + KEY_BITS, ties, room),
                    *(smallest, True, TILE),
                )
                last_tie = LARGEST_INT - key
                _write_row(chosen, masses, readable, smallest, last_tie, True, TILE)
            else:
                _write_row(chosen, masses, readable, smallest, 0, False, TILE)
    for start in tl.range((kept // TILE) * TILE, max_blocks, TILE):
        slots = start + in_tile
        mask = (slots >= kept) & (slots < max_blocks)
        tl.store(chosen + slots, tl.full([TILE], -1, tl.int32), mask=mask)
