"""The buffers that one kernel writes and another reads, allocated once per engine."""

import math
from dataclasses import dataclass

import torch

# Most and fewest splits of one row. Between the two a batch gets as many as keep rows
# times splits at PARTIAL_ROWS (16 MiB of partial results at 32 heads of 128).
MAX_SPLITS = 128
MIN_SPLITS = 8
PARTIAL_ROWS = 1024
# Floats that a CUDA kernel loads at once; lines of block_lse begin at multiples of it.
QUAD = 4
# Values of the first digit of a mass, as the kernels count them: kFirstDigits of
# csrc/params.h, BINS of triton/select_kernels.py.
FIRST_DIGITS = 2048


@dataclass
class Workspace:
    """Scratch of one engine: all layers share it, nothing in it outlives a layer.

    Kernels write into it at addresses that never change, so a CUDA graph can replay
    over it. The reference ops allocate tensors of their own, and only put them here; a
    row that was left out is -inf in them.
    """

    lse: torch.Tensor | None = None
    """`[>= num_rows, num_heads]` fp32, of the last decode op."""
    block_lse: torch.Tensor | None = None
    """`[>= num_rows, num_heads, max_blocks]` fp32, of the last `score_blocks`, or
    `dense_decode` with a select_block_size; only a row's own blocks mean something."""
    mass: torch.Tensor | None = None
    """`[>= num_rows, num_sets, max_blocks]` fp32."""
    partial_out: torch.Tensor | None = None
    """fp32, flat; `partials` gives its shape for a batch."""
    partial_lse: torch.Tensor | None = None
    """fp32, flat."""
    arrivals: torch.Tensor | None = None
    """`[>= num_rows, num_heads]` int32: how many thread blocks of a CUDA kernel have
    ended their part of a row. Zeros when allocated, and zeros again after each op, so
    nothing clears them in a CUDA graph. Two ops that run at once, on two streams, must
    not share them, nor anything else here."""
    digit_counts: torch.Tensor | None = None
    """`[>= num_rows, num_sets, FIRST_DIGITS]` int32: how many masses have which first
    digit, counted while masses are summed. Zeros as `arrivals` are."""
    num_heads: int = 0
    head_size: int = 0

    @classmethod
    def allocate(
        cls,
        max_num_rows: int,
        num_heads: int,
        num_sets: int,
        head_size: int,
        max_blocks: int,
        device: torch.device,
    ) -> "Workspace":
        """Allocate everything that the kernels need.

        Args:
            max_num_rows: Most rows of one decode step, rows of padding included.
            num_heads: Query heads of this rank.
            num_sets: Sets per row; 0 where nothing is ever selected.
            max_blocks: Selection blocks of the longest sequence; 0 likewise.
        """

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        def lines(num_lines: int) -> torch.Tensor:
            padded = floats(max_num_rows, num_lines, -(-max_blocks // QUAD) * QUAD)
            return padded[..., :max_blocks]

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        most = max(n * num_splits(n) for n in range(1, max_num_rows + 1)) * num_heads
        return cls(
            lse=floats(max_num_rows, num_heads),
            block_lse=lines(num_heads),
            mass=lines(num_sets),
            partial_out=floats(most * head_size),
            partial_lse=floats(most),
            arrivals=zeros(max_num_rows, num_heads),
            digit_counts=zeros(max_num_rows, num_sets, FIRST_DIGITS),
            num_heads=num_heads,
            head_size=head_size,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, padding included."""
        buffers = (
            *(self.lse, self.block_lse, self.mass),
            *(self.partial_out, self.partial_lse),
            *(self.arrivals, self.digit_counts),
        )
        return sum(b.untyped_storage().nbytes() for b in buffers if b is not None)

    def renew_counters(self) -> None:
        """Allocate the counters anew, zeros.

        vLLM's sleep mode drops what was allocated with the model, level 2 for good, and
        keeps what was allocated with the metadata builders.
        """
        if self.arrivals is not None:
            self.arrivals = torch.zeros_like(self.arrivals)
        if self.digit_counts is not None:
            self.digit_counts = torch.zeros_like(self.digit_counts)

    def partials(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views for a batch: `[num_rows, num_heads, splits, head_size]`, and its lse.

        A small batch gets more splits out of the same memory.

        Raises:
            ValueError: The workspace is too small for so many rows, or not allocated.
        """
        shape = (num_rows, self.num_heads, num_splits(num_rows))
        needed = math.prod(shape)
        room = 0 if self.partial_lse is None else self.partial_lse.numel()
        if self.partial_out is None or needed > room:
            raise ValueError(
                f"workspace has room for {room} partial results: {num_rows} rows of "
                f"{self.num_heads} heads need {needed}"
            )
        out = self.partial_out[: needed * self.head_size].view(*shape, self.head_size)
        return out, self.partial_lse[:needed].view(shape)


def num_splits(num_rows: int) -> int:
    """The most splits of each row of a batch; >= 1."""
    return max(MIN_SPLITS, min(MAX_SPLITS, PARTIAL_ROWS // max(num_rows, 1)))
