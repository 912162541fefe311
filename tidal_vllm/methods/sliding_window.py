"""The sliding window: the sinks and the newest blocks, whatever the query is."""

import torch

from tidal_vllm.kernels import DecodeArgs
from tidal_vllm.methods.base import Method
from tidal_vllm.methods.top_blocks import choose_by_mass


class SlidingWindow(Method):
    """StreamingLLM, arXiv 2309.17453: attention sinks, and a window of newest tokens.

    The mass of a block is its index: the budget goes to the sinks and the newest
    blocks. Tokens between them are lost, which is what other methods are measured by.
    """

    def select(self, layer_name: str, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        def masses(rows: slice, lens: torch.Tensor, num_blocks: int) -> torch.Tensor:
            index = torch.arange(num_blocks, device=lens.device).float()
            return index.expand(len(lens), args.topk_blocks.shape[1], -1)

        choose_by_mass(args, seq_lens, self.rule, masses, bytes_per_block=0)
