"""The chosen blocks, handed from layer to layer, and for how many steps they hold."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """The chosen blocks of every decoding sequence.

    A SELECT layer writes the rows of the step's decodes, the SPARSE layers after it
    read them. The buffers live as long as the engine, at fixed addresses.
    """

    topk_blocks: torch.Tensor
    """`[num_choices, max_num_seqs, num_sets, max_blocks]` int32, logical selection
    blocks, ascending; -1 behind the last. One choice, which SELECT layers overwrite in
    turn, or one for each of them where choices outlive a step."""
    topk_lens: torch.Tensor
    """`[num_choices, max_num_seqs, num_sets]` int32, how many of them are in use."""

    @classmethod
    def allocate(
        cls,
        num_choices: int,
        num_seqs: int,
        num_sets: int,
        max_blocks: int,
        device: torch.device,
    ) -> "Selection":
        shape = (num_choices, num_seqs, num_sets, max_blocks)
        blocks = torch.full(shape, -1, dtype=torch.int32, device=device)
        return cls(blocks, torch.zeros(shape[:3], dtype=torch.int32, device=device))

    @property
    def nbytes(self) -> int:
        return self.topk_blocks.nbytes + self.topk_lens.nbytes

    def append(self, grows: torch.Tensor, block: torch.Tensor) -> None:
        """Add a block behind the chosen ones, in all choices and sets of some rows.

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


@dataclass(frozen=True)
class Reuse:
    """Which rows keep the last step's choice (`reselect_interval`), on the device.

    A row keeps it while it holds the sequence that it held in the step before, one
    token longer: if the slot of its newest token then is that of the token before its
    newest now. No two sequences write to one block. A sequence that vLLM has moved to
    another row, or that sat out a step, chooses anew.

    Nothing waits for the device, and the results stand at fixed addresses, so a
    captured graph reads those of its own step.
    """

    interval: int
    """Steps for which a choice holds."""
    select_lens: torch.Tensor
    """`[max_num_seqs]` int32, the lengths of rows that choose anew; -1 for others."""
    reuse_lens: torch.Tensor
    """`[max_num_seqs]` int32, the lengths of rows that do not; -1 for others."""
    age: torch.Tensor
    """`[max_num_seqs]` int32, steps since a row's choice was made."""
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

    def choose_anew(self, seq_lens: torch.Tensor) -> None:
        """Let all of the first rows choose, whatever they hold."""
        rows = slice(seq_lens.shape[0])
        self.select_lens[rows] = seq_lens
        self.reuse_lens[rows] = -1

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
