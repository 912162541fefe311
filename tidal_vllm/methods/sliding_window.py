"""The sliding window: the sinks and the newest blocks, whatever the query is."""

import torch

from tidal_vllm.kernels import DecodeArgs
from tidal_vllm.kernels.reference import top_blocks
from tidal_vllm.methods.base import Method


class SlidingWindow(Method):
    """StreamingLLM, arXiv 2309.17453: attention sinks, and a window of newest tokens.

    The mass of a block is its index: the budget goes to the sinks and the newest
    blocks. Tokens between them are lost, which is what other methods are measured by.
    """

    def select(self, layer_name: str, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        longest = self.rule.num_blocks(int(seq_lens.max()))
        index = torch.arange(max(longest, 0), device=seq_lens.device)
        shape = (seq_lens.shape[0], args.topk_blocks.shape[1], -1)
        top_blocks(args, seq_lens, self.rule, index.float().expand(shape))
