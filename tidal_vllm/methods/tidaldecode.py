"""TidalDecode: blocks of the most attention mass, chosen in few layers."""

import torch

from tidal_vllm.kernels import DecodeArgs
from tidal_vllm.methods.base import Method


class TidalDecode(Method):
    """TidalDecode, arXiv 2410.05076: what matters to one layer matters to the next.

    Few layers look at the whole KV cache and choose; the layers behind each of them
    attend to what it chose. The mass of a block is the post-softmax attention of a
    set's heads to its tokens,

        mass[set, block] = sum over heads of the set: exp(block_lse - lse),

    so heads weigh alike, and a set holds the most attention that its size allows. Where
    the heads of a set lie on several tensor parallel ranks, the sum goes over all of
    them (`tidal_vllm.methods.ranks`).
    """

    def select(self, layer_name: str, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        self.score_by_attention(args, seq_lens)
        self.choose_by_attention(args, seq_lens)
