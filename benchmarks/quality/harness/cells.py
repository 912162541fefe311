"""What is measured: cells of a context, a budget and some forced tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CELL = re.compile(r"(\d+):(0?\.\d+):(\d+)x(\d+)")
ALLOWED = (
    "must be CONTEXT:SHARE:SEQUENCESxTOKENS, such as 4096:0.1:32x256: sequences of "
    "4096 tokens, of which the last 256 are forced, and a budget of 10 %"
)


@dataclass(frozen=True)
class Cell:
    """Sequences of one length under budgets of one share of it.

    Attributes:
        context: Tokens of a sequence, those that are forced included.
        share: The budget's share of the context.
        sequences: How many.
        tokens: Decode steps of each; the prompt's own next token is not counted.
    """

    context: int
    share: float
    sequences: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.context}:{self.share:g}:{self.sequences}x{self.tokens}"

    @property
    def middle(self) -> int:
        """Sequence length of the middle decode step."""
        return self.context - self.tokens // 2


def parse_cell(text: str) -> Cell:
    """A cell from the command line.

    Raises:
        ValueError: Another form, no token or sequence, or no room for a prompt.
    """
    found = _CELL.fullmatch(text)
    if not found:
        raise ValueError(f"--cells {text}: {ALLOWED}")
    context, share, sequences, tokens = found.groups()
    cell = Cell(int(context), float(share), int(sequences), int(tokens))
    if not cell.sequences or not 0 < cell.tokens < cell.context - 1 or not cell.share:
        raise ValueError(f"--cells {text}: {ALLOWED}")
    return cell
