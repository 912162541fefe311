"""The chosen blocks, handed from layer to layer."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """The chosen blocks of every decoding sequence.

    A SELECT layer writes the rows of the step's decodes, the SPARSE layers after it
    read those rows. The buffers live as long as the engine, at fixed addresses.
    """

    topk_blocks: torch.Tensor
    """`[num_selections, max_num_seqs, num_sets, max_blocks]` int32, logical selection
    blocks, ascending; -1 behind the last. One selection, which SELECT layers overwrite
    in turn, or one for each of them where selections outlive a step."""
    topk_lens: torch.Tensor
    """`[num_selections, max_num_seqs, num_sets]` int32, how many of them are in use."""

    @classmethod
    def allocate(
        cls,
        num_selections: int,
        num_seqs: int,
        num_sets: int,
        max_blocks: int,
        device: torch.device,
    ) -> "Selection":
        shape = (num_selections, num_seqs, num_sets, max_blocks)
        blocks = torch.full(shape, -1, dtype=torch.int32, device=device)
        return cls(blocks, torch.zeros(shape[:3], dtype=torch.int32, device=device))

    @property
    def nbytes(self) -> int:
        return self.topk_blocks.nbytes + self.topk_lens.nbytes

    def append(self, grows: torch.Tensor, block: torch.Tensor) -> None:
        """Add a block behind the chosen ones, in all selections and sets of some rows.

        Args:
            grows: `[num_rows]` bool, for the first rows.
            block: `[num_rows]` int32; above all that the row holds, with room for it.
        """
        rows = slice(grows.shape[0])
        blocks, lens = self.topk_blocks[:, rows], self.topk_lens[:, rows]
        at = lens.long().clamp(max=blocks.shape[3] - 1)[..., None]
        old = blocks.gather(3, at)
        wide = (1, -1, 1, 1)
        blocks.scatter_(3, at, block.view(wide).where(grows.view(wide), old))
        lens += grows.view(1, -1, 1)
