"""`select_blocks` in Triton: the exact heaviest blocks, without sorting them.

`_weigh_blocks` sums each block's mass over the heads of a set; forced blocks weigh
infinitely. `_choose_blocks`, one program per row and set, builds the smallest mass that
is kept bit by bit (floats that are not negative order like their bits), then writes the
blocks above it, and as many equal to it as there is room for, in order.

Compiled ahead of time for sm_80, sm_90 and gfx942 and run under Triton's interpreter;
not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl

from tidal_vllm.kernels.checks import check_select

WEIGH_TILE = 512
# A row of at most so many blocks is read once: 128K tokens in blocks of 16.
CHOOSE_TILE = 8192
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


def select_blocks(
    block_lse: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
    mass: torch.Tensor,
    token_budget: int,
    select_block_size: int,
    sink_tokens: int,
    recent_tokens: int,
    sparse_threshold: int,
) -> None:
    """Choose each set's blocks; `reference.select_blocks` defines it. Capturable.

    Args:
        block_lse: [num_seqs, num_heads, num_blocks] fp32, from `dense_decode`; only
            the blocks that a row has are read.
        lse: [num_seqs, num_heads] fp32.
        seq_lens: [num_seqs] int32, at most num_blocks * select_block_size; a row of a
            negative one keeps its sets as they are.
        topk_blocks: [>= num_seqs, num_sets, max_blocks] int32; the first num_seqs rows
            are written: logical blocks ascending, then -1.
        topk_lens: [>= num_seqs, num_sets] int32, written likewise.
        mass: [>= num_seqs, num_sets, num_blocks] fp32 scratch.
        token_budget, ...: The fields of `tidal_vllm.plan.policy.SelectionRule`. Its
            precondition, and that max_blocks has room for what a row keeps, are not
            checked again: what has no room is left out.

    Raises:
        ValueError: A dtype, device, shape or stride that does not fit.
    """
    check_select(block_lse, lse, seq_lens, topk_blocks, topk_lens, mass)
    num_seqs, num_heads, num_blocks = block_lse.shape
    num_sets, max_blocks = topk_blocks.shape[1:]
    if num_seqs == 0:
        return
    rule = dict(
        SIZE=select_block_size,
        KEEP_ALL=max(sparse_threshold, token_budget),
        BUDGET_BLOCKS=token_budget // select_block_size,
    )
    _weigh_blocks[(max(1, triton.cdiv(num_blocks, WEIGH_TILE)), num_sets, num_seqs)](
        *(block_lse, lse, seq_lens, mass),
        *block_lse.stride()[:2],
        *mass.stride()[:2],
        SIZE=rule["SIZE"],
        KEEP_ALL=rule["KEEP_ALL"],
        SINKS=triton.cdiv(sink_tokens, select_block_size),
        RECENT_TOKENS=max(recent_tokens, 1),
        NUM_HEADS=num_heads,
        HEADS_PER_SET=num_heads // num_sets,
        TILE=WEIGH_TILE,
        num_warps=4,
    )
    tile = min(CHOOSE_TILE, triton.next_power_of_2(max(num_blocks, max_blocks, 64)))
    _choose_blocks[(num_sets, num_seqs)](
        *(mass, seq_lens, topk_blocks, topk_lens, max_blocks),
        *mass.stride()[:2],
        *topk_blocks.stride()[:2],
        topk_lens.stride(0),
        **rule,
        TILE=tile,
        ONE_TILE=num_blocks <= tile,
        num_warps=8 if tile >= 2048 else 4,
    )


@triton.jit
def _weigh_blocks(
    block_lse,
    lse,
    seq_lens,
    mass,
    block_lse_s,
    block_lse_h,
    mass_s,
    mass_g,
    SIZE: tl.constexpr,
    KEEP_ALL: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_SET: tl.constexpr,
    TILE: tl.constexpr,
):
    chosen_by = tl.program_id(1).to(tl.int64)
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
        head = chosen_by * HEADS_PER_SET + nth
        at = block_lse + row * block_lse_s + head * block_lse_h + blocks
        of_block = tl.load(at, mask=mask, other=float("-inf"))
        weight += tl.exp(of_block - tl.load(lse + row * NUM_HEADS + head))
    weight = tl.where(weight != weight, 0.0, weight)
    weight = tl.minimum(weight, LARGEST_FLOAT)
    first_recent = (seq_len - RECENT_TOKENS) // SIZE
    forced = (blocks < SINKS) | (blocks >= first_recent)
    weight = tl.where(forced, float("inf"), weight)
    tl.store(mass + row * mass_s + chosen_by * mass_g + blocks, weight, mask=mask)


@triton.jit
def _load_keys(masses, blocks, num_blocks):
    """Bits of the masses: ordered like them; -1, below all, past the last block."""
    found = tl.load(masses + blocks, mask=blocks < num_blocks, other=0.0)
    return tl.where(blocks < num_blocks, found.to(tl.int32, bitcast=True), -1)


@triton.jit(do_not_specialize=["max_blocks"])
def _choose_blocks(
    mass,
    seq_lens,
    topk_blocks,
    topk_lens,
    max_blocks,
    mass_s,
    mass_g,
    topk_s,
    topk_g,
    topk_lens_s,
    SIZE: tl.constexpr,
    KEEP_ALL: tl.constexpr,
    BUDGET_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    chosen_by = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens + row)
    if seq_len < 0:
        return
    num_blocks = tl.cdiv(seq_len, SIZE)
    keep_all = seq_len <= KEEP_ALL
    kept = tl.minimum(tl.where(keep_all, num_blocks, BUDGET_BLOCKS), max_blocks)
    tl.store(topk_lens + row * topk_lens_s + chosen_by, kept)

    chosen = topk_blocks + row * topk_s + chosen_by * topk_g
    masses = mass + row * mass_s + chosen_by * mass_g
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
