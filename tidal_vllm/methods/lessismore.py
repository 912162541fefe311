"""LessIsMore: the heads' own rankings of blocks, merged into one list."""

import torch

from tidal_vllm.kernels import DecodeArgs
from tidal_vllm.methods.base import Method
from tidal_vllm.methods.top_blocks import choose_by_mass, forced_blocks, num_blocks_of
from tidal_vllm.plan.rule import SelectionRule

# Bytes of a head's score of a block while it is ranked: the score, its place and the
# sort's own copies of both.
_BYTES_PER_SCORE = 32


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
        block_lse = args.workspace.block_lse

        def masses(rows: slice, lens: torch.Tensor, num_blocks: int) -> torch.Tensor:
            # The kernels leave a part of a line as it was: what is behind a row's last
            # block may be of another layer.
            scores = block_lse[rows, :, :num_blocks].unflatten(1, (num_sets, -1))
            return merge_rankings(scores, lens, self.rule)

        per_block = args.query.shape[1] * _BYTES_PER_SCORE
        choose_by_mass(args, seq_lens, self.rule, masses, per_block)


def merge_rankings(
    scores: torch.Tensor, seq_lens: torch.Tensor, rule: SelectionRule
) -> torch.Tensor:
    """The mass of each block of a sequence: the sooner in the merged list, the more.

    Args:
        scores: `[num_rows, num_sets, heads of a set, num_blocks]` fp32, of each head's
            own scale; blocks behind a row's last one mean nothing.
        seq_lens: `[num_rows]` int32.

    Returns:
        `[num_rows, num_sets, num_blocks]` fp32; -inf for blocks that no head lists,
        forced ones among them.
    """
    num_heads, num_blocks = scores.shape[2:]
    index = torch.arange(num_blocks, device=scores.device)
    forced = forced_blocks(seq_lens, rule, index)
    unlisted = forced | (index >= num_blocks_of(seq_lens, rule)[:, None])
    unlisted = unlisted[:, None, None] | scores.isnan()
    # Stable: of blocks with equal scores the one of the smaller index comes first.
    best, ranked = scores.masked_fill(unlisted, -torch.inf).sort(
        dim=3, descending=True, stable=True
    )
    best, ranked = best[..., : rule.budget_blocks], ranked[..., : rule.budget_blocks]
    rank = torch.arange(best.shape[3], device=scores.device)
    head = torch.arange(num_heads, device=scores.device)
    place = (rank * num_heads + head[:, None]).to(scores.dtype)
    room = rule.budget_blocks - forced.sum(1)
    beyond = (rank >= room[:, None])[:, None, None] | (best == -torch.inf)
    votes = (-place).expand_as(best).masked_fill(beyond, -torch.inf)
    mass = scores.new_full((*scores.shape[:2], num_blocks), -torch.inf)
    return mass.scatter_reduce(2, ranked.flatten(2), votes.flatten(2), "amax")
