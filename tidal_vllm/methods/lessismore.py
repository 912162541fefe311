"""LessIsMore: the heads' own rankings of blocks, merged into one list."""

import math

import torch

from tidal_vllm.kernels import DecodeArgs
from tidal_vllm.kernels.reference import top_blocks
from tidal_vllm.methods.base import Method
from tidal_vllm.plan.rule import SelectionRule


class LessIsMore(Method):
    """LessIsMore, arXiv 2508.07101: one set for all heads, and a share for the newest.

    Layers choose as with TidalDecode. Each head ranks the blocks that are not forced by
    its own attention, best first; the lists are merged rank by rank, all first choices
    before all second ones, the heads in their order, and the set takes the first
    different blocks, as in the authors' code. So a head with a few strong preferences
    gets its blocks, however small its attention mass is beside that of other heads.
    """

    def select(self, layer_name: str, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        self.score_by_attention(args, seq_lens)
        num_sets = args.topk_blocks.shape[1]
        scores = args.workspace.block_lse.unflatten(1, (num_sets, -1))
        mass = scores.new_full((*scores.shape[:2], scores.shape[3]), -math.inf)
        for row, seq_len in enumerate(seq_lens.tolist()):
            if seq_len > self.rule.keep_all_len:
                total = self.rule.num_blocks(seq_len)
                mass[row, :, :total] = merge_rankings(
                    scores[row, :, :, :total], seq_len, self.rule
                )
        top_blocks(args, seq_lens, self.rule, mass)


def merge_rankings(
    scores: torch.Tensor, seq_len: int, rule: SelectionRule
) -> torch.Tensor:
    """The mass of each block of a sequence: the sooner in the merged list, the more.

    Args:
        scores: `[num_sets, heads of a set, num_blocks]` fp32, of each head's own scale.

    Returns:
        `[num_sets, num_blocks]` fp32; -inf for blocks that no head lists.
    """
    forced = torch.tensor(rule.forced_blocks(seq_len), device=scores.device)
    room = rule.budget_blocks - len(forced)
    num_sets, num_heads, num_blocks = scores.shape
    mass = scores.new_full((num_sets, num_blocks), -math.inf)
    if not room:
        return mass
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    scores = scores.index_fill(2, forced, -math.inf)
    # Stable: of blocks with equal scores the one of the smaller index comes first.
    best, ranked = scores.sort(dim=2, descending=True, stable=True)
    best, ranked = best[:, :, :room], ranked[:, :, :room]
    place = torch.arange(room * num_heads, device=scores.device, dtype=scores.dtype)
    place = place.view(room, num_heads).T.expand(num_sets, -1, -1)
    votes = (-place).masked_fill(best == -math.inf, -math.inf)
    return mass.scatter_reduce(1, ranked.flatten(1), votes.flatten(1), "amax")
