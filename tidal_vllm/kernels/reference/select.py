"""Choosing blocks in fp32 PyTorch: the mass of a block, and the heaviest blocks.

`select_blocks` is `top_blocks` of `block_mass`. Methods with masses of their own choose
by `tidal_vllm.methods.top_blocks`, which means the same: all rows at once, for a GPU.
For one row on a CPU that takes two to three times as long.
"""

import math

import torch

from tidal_vllm.kernels.arguments import DecodeArgs, Rule
from tidal_vllm.kernels.reference.shapes import ceil_div


def select_blocks(args: DecodeArgs, seq_lens: torch.Tensor, rule: Rule) -> None:
    """Choose the blocks of the most attention mass, after an op that left block_lse.

    The choice holds the most mass that any set of its size can: `block_mass` says what
    a block weighs, `top_blocks` what a set keeps.
    """
    top_blocks(args, seq_lens, rule, block_mass(args))


def block_mass(args: DecodeArgs) -> torch.Tensor:
    """The post-softmax attention mass of each block, summed over the heads of a set.

    That is exp(block_lse - lse) of the op before, TidalDecode's score (arXiv
    2410.05076); a NaN weighs nothing.

    Returns:
        `[num_rows, num_sets, num_blocks]` fp32. Blocks behind a row's last one mean
        nothing.
    """
    block_lse, lse = args.workspace.block_lse, args.workspace.lse
    num_heads, num_sets = block_lse.shape[1], args.topk_blocks.shape[1]
    if num_heads % num_sets:
        raise ValueError(f"num_sets = {num_sets} must divide num_heads = {num_heads}")
    mass = (block_lse - lse[..., None]).exp()
    return mass.unflatten(1, (num_sets, -1)).sum(2).nan_to_num_(0.0)


def top_blocks(
    args: DecodeArgs, seq_lens: torch.Tensor, rule: Rule, mass: torch.Tensor
) -> None:
    """Write the blocks that each set keeps into topk_blocks and topk_lens.

    A set keeps its forced blocks (those with one of the first sink_tokens or of the
    newest recent_tokens, the current one always) and the heaviest others, up to
    token_budget // select_block_size blocks; ties go to the smaller index. A sequence
    of at most max(sparse_threshold, token_budget) tokens keeps all its blocks.

    Args:
        seq_lens: `[num_rows]` int32; 0 for padding, negative for a row that keeps what
            it has.
        rule: What a set keeps, in tokens.
        mass: `[num_rows, num_sets, >= num_blocks]` fp32; any order of weights.

    Raises:
        ValueError: max_blocks is too small for what a row keeps, or the forced blocks
            of a row exceed the budget.
    """
    size = rule.select_block_size
    keep_all_len = max(rule.sparse_threshold, rule.token_budget)
    for row, seq_len in enumerate(seq_lens.tolist()[: args.query.shape[0]]):
        if seq_len < 0:
            continue
        total = ceil_div(seq_len, size)
        kept = total if seq_len <= keep_all_len else rule.token_budget // size
        chosen = args.topk_blocks[row]
        if kept > chosen.shape[1]:
            raise ValueError(
                f"max_blocks = {chosen.shape[1]} is too small: a sequence of "
                f"{seq_len} tokens keeps {kept} blocks of {size}"
            )
        chosen[:, kept:] = -1
        args.topk_lens[row] = kept
        if kept == total:
            chosen[:, :kept] = torch.arange(kept, device=chosen.device)
            continue
        sinks = ceil_div(rule.sink_tokens, size)
        recent = (seq_len - max(rule.recent_tokens, 1)) // size
        if sinks + total - recent > kept:
            raise ValueError(
                f"token_budget = {rule.token_budget} holds {kept} blocks of {size}, "
                f"but {sinks + total - recent} are forced at {seq_len} tokens"
            )
        weights = mass[row, :, :total].clone()
        weights[:, :sinks] = math.inf
        weights[:, recent:] = math.inf
        chosen[:, :kept] = _heaviest(weights, kept)


def _heaviest(mass: torch.Tensor, kept: int) -> torch.Tensor:
    """`[num_sets, kept]` indices of the largest, ties to the smaller, ascending."""
    smallest = mass.topk(kept, sorted=False).values.amin(1, keepdim=True)
    above, ties = mass > smallest, mass == smallest
    room = kept - above.sum(1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(-1, kept)
