"""Rows of the decode ops where a decode has several query tokens, drafts to verify."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QueryRows:
    """One row for each query token of the decodes.

    The draft that a request verifies makes several query tokens of one sequence. Each
    becomes a row, as long as the sequence up to itself: it chooses and attends as it
    would if it were decoded alone, so speculation changes no answer.

    The buffers stand at fixed addresses, so a captured graph reads those of its own
    step, and nothing waits for the device.
    """

    seq_lens: torch.Tensor
    """`[max_rows]` int32; 0 behind the last query token."""
    block_table: torch.Tensor
    """`[max_rows, max_blocks_per_seq]` int32, that of a row's sequence."""
    numbers: torch.Tensor
    """`[max_rows]` int32, 0, 1, 2, ..."""

    @classmethod
    def allocate(
        cls, max_rows: int, max_blocks_per_seq: int, device: torch.device
    ) -> "QueryRows":
        """Allocate for at most so many query tokens of one step's decodes."""

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        numbers = torch.arange(max_rows, dtype=torch.int32, device=device)
        return cls(integers(max_rows), integers(max_rows, max_blocks_per_seq), numbers)

    def fill(
        self,
        num_rows: int,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in a step's decodes.

        Args:
            num_rows: Their query tokens; in a padded batch rows of padding follow.
            query_start_loc: `[num_decodes + 1]` int32.
            seq_lens: `[num_decodes]` int32, context and query tokens.
            block_table: `[num_decodes, >= max_blocks_per_seq]` int32.

        Returns:
            The rows' lengths and block table, views of the buffers.
        """
        rows, ends = self.numbers[:num_rows], query_start_loc[1:]
        decode = torch.searchsorted(ends, rows, right=True)
        decode.clamp_(max=ends.shape[0] - 1)
        lens = seq_lens[decode] - (ends[decode] - 1 - rows)
        self.seq_lens[:num_rows] = lens.where(rows < ends[-1], 0).clamp_(min=0)
        width = self.block_table.shape[1]
        torch.index_select(
            block_table[:, :width], 0, decode, out=self.block_table[:num_rows]
        )
        return self.seq_lens[:num_rows], self.block_table[:num_rows]


def row_lens(query_lens: list[int], seq_lens: list[int]) -> list[int]:
    """The lengths of `QueryRows.seq_lens`, on the host and without padding."""
    pairs = zip(query_lens, seq_lens, strict=True)
    return [end - back for count, end in pairs for back in reversed(range(count))]
