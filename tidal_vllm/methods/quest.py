"""Quest: blocks by an upper bound of their keys' scores, in every layer."""

import torch

from tidal_vllm.kernels import DecodeArgs, Kernels
from tidal_vllm.methods.base import Method
from tidal_vllm.methods.ranks import AgreeingRanks
from tidal_vllm.methods.top_blocks import choose_by_mass, forced_blocks, num_blocks_of
from tidal_vllm.plan.rule import SelectionRule

# Bytes of a head's score of a block: itself and what the softmax makes of it.
_BYTES_PER_SCORE = 16


class Quest(Method):
    """Quest, arXiv 2406.10774: what a page's keys can score at most decides.

    Each layer keeps, for every selection block and KV head, the elementwise minimum and
    maximum of the block's keys. No key of a block scores more than

        bound[head, block] = sum over d: max(q[d] * low[d], q[d] * high[d]),

    and the blocks of the highest bounds are kept. Heads that share a set add up their
    softmax over the bounds of blocks that are not forced, so that they weigh alike; a
    head with a set of its own is ranked by its bounds alone, as in the paper.

    The bounds belong to physical blocks, as the KV does: they are right for whatever
    sequence holds a block, after preemption, re-use and prefix-cache hits. After each
    write the bounds of every touched block are computed again, over its slots up to
    the last one written. Later slots hold keys of an earlier owner or of a rejected
    draft, since a sequence writes its keys in order.
    """

    def __init__(
        self,
        kernels: Kernels,
        rule: SelectionRule,
        attends_to_chosen: bool,
        ranks: AgreeingRanks | None = None,
    ) -> None:
        super().__init__(kernels, rule, attends_to_chosen, ranks)
        self.bounds: dict[str, torch.Tensor] = {}
        """By layer: `[num_kv_blocks * blocks of a KV block, num_kv_heads, 2,
        head_size]`, the lowest and the highest of a selection block's keys."""

    def take_over(self, former: Method) -> None:
        assert isinstance(former, Quest)
        self.bounds = former.bounds

    def keys_written(
        self, layer_name: str, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        slots = slot_mapping[slot_mapping >= 0]
        if not len(slots):
            return
        bounds, size = self._bounds(layer_name, kv_cache), self.rule.select_block_size
        blocks, nth = (slots // size).unique(return_inverse=True)
        last = torch.zeros_like(blocks).scatter_reduce(0, nth, slots % size, "amax")
        per_block = kv_cache.shape[2] // size
        keys = kv_cache[..., : kv_cache.shape[3] // 2].unflatten(2, (per_block, size))
        # [num_blocks, num_kv_heads, size, head_size]
        keys = keys[blocks // per_block, :, blocks % per_block]
        beyond = torch.arange(size, device=slots.device) > last[:, None]
        beyond = beyond[:, None, :, None]
        bounds[blocks, :, 0] = keys.masked_fill(beyond, torch.inf).amin(2)
        bounds[blocks, :, 1] = keys.masked_fill(beyond, -torch.inf).amax(2)

    def _bounds(self, layer_name: str, kv_cache: torch.Tensor) -> torch.Tensor:
        """The bounds of a layer's KV cache, made when its first keys are written.

        NOTE: while vLLM measures what CUDA graphs take, layers have a small KV cache,
        and another one afterwards.
        """
        num_kv_blocks, num_kv_heads, block_size, width = kv_cache.shape
        num_blocks = num_kv_blocks * (block_size // self.rule.select_block_size)
        shape = (num_blocks, num_kv_heads, 2, width // 2)
        if layer_name not in self.bounds or self.bounds[layer_name].shape != shape:
            self.bounds[layer_name] = kv_cache.new_zeros(shape)
        return self.bounds[layer_name]

    def select(self, layer_name: str, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        rule, num_sets = self.rule, args.topk_blocks.shape[1]
        per_block = args.kv_cache.shape[2] // rule.select_block_size
        all_bounds = self._bounds(layer_name, args.kv_cache)

        def masses(rows: slice, lens: torch.Tensor, num_blocks: int) -> torch.Tensor:
            index = torch.arange(num_blocks, device=lens.device)
            inside = index < num_blocks_of(lens, rule)[:, None]
            physical = args.block_table[rows][:, index // per_block].long()
            # What a block table holds behind a sequence may be anything.
            physical = (physical * per_block + index % per_block).where(inside, 0)
            scores = upper_bounds(args.query[rows], all_bounds[physical])
            out = forced_blocks(lens, rule, index) | ~inside
            return share_scores(args.scale * scores, num_sets, out)

        # The gathered bounds, and copies of them in fp32; the heads' scores.
        vectors = all_bounds[0].numel() * (all_bounds.itemsize + 8)
        per_row = vectors + args.query.shape[1] * _BYTES_PER_SCORE
        choose_by_mass(args, seq_lens, rule, masses, per_row)


def upper_bounds(query: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """What the keys of each block score at most, before scaling.

    Args:
        query: `[num_rows, num_heads, head_size]`.
        bounds: `[num_rows, num_blocks, num_kv_heads, 2, head_size]`, lowest and highest
            keys.

    Returns:
        `[num_rows, num_heads, num_blocks]` fp32.
    """
    q = query.float().unflatten(1, (bounds.shape[2], -1))  # [rows, kv_heads, group, D]
    # [rows, kv_heads, D, num_blocks]
    low, high = bounds.float().permute(3, 0, 2, 4, 1)
    # max(q * low, q * high) is q * high where q is positive, else q * low.
    found = q.clamp(min=0) @ high + q.clamp(max=0) @ low
    return found.flatten(1, 2)


def share_scores(
    scores: torch.Tensor, num_sets: int, left_out: torch.Tensor
) -> torch.Tensor:
    """One weight per set and block.

    Args:
        scores: `[num_rows, num_heads, num_blocks]` fp32.
        left_out: `[num_rows, num_blocks]` bool, blocks that are kept anyway, and those
            that a row does not have. They take no part in how the heads weigh: the
            newest one may hold keys of drafts behind the row.

    Returns:
        `[num_rows, num_sets, num_blocks]` fp32, -inf for blocks that are left out.
    """
    scores = scores.masked_fill(left_out[:, None], -torch.inf)
    by_set = scores.unflatten(1, (num_sets, -1))
    if by_set.shape[2] == 1:
        return by_set[:, :, 0]
    # In logarithms, so that blocks far below the best keep their order.
    return by_set.log_softmax(3).logsumexp(2)
