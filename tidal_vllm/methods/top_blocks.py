"""The heaviest blocks by a method's own masses, for all rows of a batch at once.

`tidal_vllm.kernels.reference.select.top_blocks` says the same row by row, for the
reference op: there no row pays for the length of another, and lengths are on the host
to be checked. Here nothing is read back from the device but one length, so that the
work follows the longest sequence and not max_model_len.
"""

from collections.abc import Callable

import torch

from tidal_vllm.kernels import DecodeArgs
from tidal_vllm.plan.rule import SelectionRule

# Most bytes that a choice may take beside the workspace. Rows are taken in parts that
# stay below it, and at least one by one.
SCRATCH_LIMIT = 256 << 20
# Bytes that `top_blocks` takes for a mass: weights, masks, running sums and places.
_BYTES_PER_MASS = 32

Masses = Callable[[slice, torch.Tensor, int], torch.Tensor]
"""The masses of some rows, `[num_rows, num_sets, num_blocks]` fp32, from the rows,
their seq_lens `[num_rows]` int32 and num_blocks, the blocks of the batch's longest
sequence. Blocks behind a row's last one mean nothing."""


def choose_by_mass(
    args: DecodeArgs,
    seq_lens: torch.Tensor,
    rule: SelectionRule,
    masses: Masses,
    bytes_per_block: int,
) -> None:
    """Fill `args.topk_blocks` and `args.topk_lens` with the blocks of the most mass.

    Args:
        seq_lens: `[>= num_rows]` int32; 0 for padding, negative for a row that keeps
            what it has.
        bytes_per_block: What `masses` takes for a block of a row, at most, in bytes.
    """
    assert args.topk_blocks is not None and args.topk_lens is not None
    num_rows, num_sets = args.query.shape[0], args.topk_blocks.shape[1]
    seq_lens = seq_lens[:num_rows]
    num_blocks = rule.num_blocks(int(seq_lens.max()))
    if num_blocks <= 0:  # padding, and rows that keep what they have
        padding = seq_lens == 0
        args.topk_blocks[:num_rows].masked_fill_(padding[:, None, None], -1)
        args.topk_lens[:num_rows].masked_fill_(padding[:, None], 0)
        return
    row_bytes = num_blocks * (bytes_per_block + num_sets * _BYTES_PER_MASS)
    step = max(SCRATCH_LIMIT // row_bytes, 1)
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        lens = seq_lens[rows]
        mass = masses(rows, lens, num_blocks)
        top_blocks(args.topk_blocks[rows], args.topk_lens[rows], lens, rule, mass)


def top_blocks(
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    rule: SelectionRule,
    mass: torch.Tensor,
) -> None:
    """Write the blocks that each set keeps, ascending, and -1 behind them.

    A set keeps its forced blocks and the heaviest others, up to the budget; ties go to
    the smaller index. A sequence of at most rule.keep_all_len tokens keeps all its
    blocks.

    Precondition: max_blocks has room for what a row keeps, and the budget for the
    forced blocks, as `TidalConfig` sees to.

    Args:
        topk_blocks: `[num_rows, num_sets, max_blocks]` int32, written.
        topk_lens: `[num_rows, num_sets]` int32, written.
        seq_lens: `[num_rows]` int32; 0 for padding, negative for a row that keeps what
            it has.
        mass: `[num_rows, num_sets, num_blocks]` fp32, for at least the blocks of the
            longest sequence, and at least one; any order of weights, but no NaN among
            the blocks of a row that has to choose.
    """
    total = num_blocks_of(seq_lens, rule)
    index = torch.arange(mass.shape[2], device=mass.device)
    inside = index < total[:, None]
    weights = mass.masked_fill(~inside[:, None], -torch.inf)
    weights.masked_fill_(forced_blocks(seq_lens, rule, index)[:, None], torch.inf)
    # All rows that choose keep equally many blocks: those of the budget.
    kept = min(rule.budget_blocks, mass.shape[2])
    smallest = weights.topk(kept, sorted=False).values.amin(2, keepdim=True)
    above, ties = weights > smallest, weights == smallest
    room = kept - above.sum(2, keepdim=True)
    chosen = above | (ties & (ties.cumsum(2, dtype=torch.int32) <= room))
    keeps_all = (seq_lens <= rule.keep_all_len)[:, None, None]
    chosen = inside[:, None].where(keeps_all, chosen)
    # Each chosen block goes to its place in the list, the others behind the list's end.
    end = topk_blocks.shape[2]
    place = chosen.cumsum(2).sub_(1).clamp_(max=end).masked_fill_(~chosen, end)
    found = topk_blocks.new_full((*topk_blocks.shape[:2], end + 1), -1)
    found.scatter_(2, place, index.to(found.dtype).expand_as(place))
    chooses = (seq_lens >= 0)[:, None]
    topk_blocks.copy_(found[:, :, :end].where(chooses[..., None], topk_blocks))
    lens = chosen.sum(2, dtype=topk_lens.dtype)
    topk_lens.copy_(lens.where(chooses, topk_lens))


def num_blocks_of(seq_lens: torch.Tensor, rule: SelectionRule) -> torch.Tensor:
    """Blocks of each row's sequence, as seq_lens; 0 for rows that do not choose."""
    size = rule.select_block_size
    return (seq_lens.clamp(min=0) + (size - 1)) // size


def forced_blocks(
    seq_lens: torch.Tensor, rule: SelectionRule, index: torch.Tensor
) -> torch.Tensor:
    """Which blocks are kept anyway: those with a sink or one of the newest tokens.

    Args:
        seq_lens: `[num_rows]` int32.
        index: `[num_blocks]` int64, 0 and up.

    Returns:
        `[num_rows, num_blocks]` bool; of blocks that a row has.
    """
    newest = (seq_lens - max(rule.recent_tokens, 1)).clamp(min=0)
    recent = index >= (newest // rule.select_block_size)[:, None]
    sinks = index < rule.num_blocks(rule.sink_tokens)
    return (recent | sinks) & (index < num_blocks_of(seq_lens, rule)[:, None])
