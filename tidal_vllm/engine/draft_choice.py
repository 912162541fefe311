"""How far the choice that drafts attend to reaches, and what is newer."""

from dataclasses import dataclass

import torch

from tidal_vllm.engine.selection import Selection


@dataclass(frozen=True)
class DraftChoice:
    """The newest selection block of each request's choice.

    Drafts attend to blocks that began after the choice, too: a row's choice gets them
    as its sequence grows.
    """

    newest: torch.Tensor
    """`[max_num_seqs]` int32, the last selection block that a row's sets hold."""
    most: int
    """Tokens by which a sequence grows between two calls at most."""

    @classmethod
    def allocate(
        cls, draft_tokens: int, num_seqs: int, device: torch.device
    ) -> "DraftChoice":
        newest = torch.full((num_seqs,), -1, dtype=torch.int32, device=device)
        return cls(newest, draft_tokens + 1)

    def begin(self, seq_lens: torch.Tensor, select_block_size: int) -> None:
        """The first rows choose now, at these lengths."""
        rows = slice(seq_lens.shape[0])
        self.newest[rows] = (seq_lens - 1) // select_block_size

    def advance(
        self, seq_lens: torch.Tensor, select_block_size: int, selection: Selection
    ) -> None:
        """Give the first rows the blocks that began since; -1 leaves a row out."""
        rows = slice(seq_lens.shape[0])
        needed = (seq_lens - 1) // select_block_size
        for _ in range(-(-self.most // select_block_size)):
            grows = (seq_lens > 0) & (self.newest[rows] < needed)
            if not grows.any():
                return
            block = self.newest[rows] + grows.int()
            selection.append(grows, block)
            self.newest[rows] = block
