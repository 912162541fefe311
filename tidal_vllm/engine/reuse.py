"""For how many decode steps a row keeps its selection (`reselect_interval`).

`EveryStep` is the default, `Reuse` what an interval above 1 makes of it. The metadata
builder calls both in the same way.
"""

from dataclasses import dataclass

import torch

from tidal_vllm.engine.selection import Selection


class EveryStep:
    """SELECT layers choose for all rows in every step."""

    def leave_out(self, num_rows: int) -> None:
        """Nothing outlives a step that a dummy step could overwrite."""

    def forget(self, rows: torch.Tensor) -> None:
        """Nothing is kept for the next step."""

    def advance(
        self,
        step: int,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        select_block_size: int,
        selection: Selection,
    ) -> None:
        """Nothing is kept for the next step."""

    def split(self, seq_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All rows choose, and none reuses its selection."""
        return seq_lens, None


@dataclass(frozen=True)
class Reuse(EveryStep):
    """Which rows keep the last step's selection, decided on the device.

    A row keeps its selection while it holds the sequence that it held in the step
    before, one token longer: if the KV slot of the row's newest token then is the slot
    of the token before its newest now. No two sequences write to one block. A sequence
    that vLLM has moved to another row, or that sat out a step, chooses anew.

    Nothing waits for the device, and the results stand at fixed addresses, so a
    captured graph reads those of its own step.
    """

    interval: int
    """Decode steps for which a selection holds."""
    select_lens: torch.Tensor
    """`[max_num_seqs]` int32, the lengths of rows that choose anew; -1 for others."""
    reuse_lens: torch.Tensor
    """`[max_num_seqs]` int32, the lengths of rows that do not; -1 for others."""
    age: torch.Tensor
    """`[max_num_seqs]` int32, steps since a row's selection was made."""
    newest: torch.Tensor
    """`[max_num_seqs]` int64, slot of a row's newest token."""
    seen: torch.Tensor
    """`[max_num_seqs]` int64, the step that a row was last part of."""

    @classmethod
    def allocate(cls, interval: int, num_seqs: int, device: torch.device) -> "Reuse":
        def filled(dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_seqs,), -1, dtype=dtype, device=device)

        small, large = torch.int32, torch.int64
        buffers = [filled(dtype) for dtype in (small, small, small, large, large)]
        return cls(interval, *buffers)

    def split(self, seq_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The lengths of rows that choose, and of rows that reuse their selection."""
        return self.select_lens, self.reuse_lens

    def leave_out(self, num_rows: int) -> None:
        """Let the first rows neither choose nor attend: those of a dummy step.

        A dummy step of vLLM's (a warm-up, the capture of a graph, a step beside other
        data-parallel ranks) must not write what the rows' requests have chosen.
        """
        self.select_lens[:num_rows] = -1
        self.reuse_lens[:num_rows] = -1

    def forget(self, rows: torch.Tensor) -> None:
        """Let some of the first rows choose anew in the next step.

        Args:
            rows: `[num_rows]` bool.
        """
        self.newest[: rows.shape[0]].masked_fill_(rows, -1)

    def advance(
        self,
        step: int,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        select_block_size: int,
        selection: Selection,
    ) -> None:
        """Decide for the decodes of a step; kept sets get the block of a new token.

        Args:
            step: Counts the engine's steps, sparse or not.
            seq_lens: `[num_rows]` int32; 0 for padded rows.
            block_table: `[>= num_rows, max_blocks_per_seq]` int32.
            block_size: Tokens of a KV block.
        """
        rows = slice(seq_lens.shape[0])
        lens = seq_lens.long()

        def slot(position: torch.Tensor) -> torch.Tensor:
            position = position.clamp(min=0)
            nth = (position // block_size)[:, None]
            physical = block_table[rows].gather(1, nth)[:, 0].long()
            return physical * block_size + position % block_size

        same = (self.newest[rows] == slot(lens - 2)) & (self.seen[rows] == step - 1)
        keeps = same & (lens > 1) & (self.age[rows] + 1 < self.interval)
        self.age[rows] = (self.age[rows] + 1) * keeps
        self.newest[rows] = slot(lens - 1)
        self.seen[rows] = step
        self.select_lens[rows] = seq_lens.masked_fill(keeps, -1)
        self.reuse_lens[rows] = seq_lens.masked_fill(~keeps, -1)

        block, offset = (lens - 1) // select_block_size, (lens - 1) % select_block_size
        selection.append(keeps & (offset == 0), block.int())
