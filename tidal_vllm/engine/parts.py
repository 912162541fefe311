"""A sparse step's decode rows, in parts that fit into the workspace."""

import torch

from tidal_vllm.engine.batch import DecodePart, TidalMetadata
from tidal_vllm.engine.state import SparseState


def parts_of(
    state: SparseState, batch: TidalMetadata, left_out: torch.Tensor | None = None
) -> list[DecodePart]:
    """The step's decode rows in parts that fit into the workspace.

    Args:
        left_out: `[num_decode_tokens]` bool, rows that the ops leave out.
    """
    selection, num_rows = state.selection, batch.num_decode_tokens
    seq_lens = batch.seq_lens
    select_lens, lens_after_select = state.reuse.split(seq_lens)
    if state.method.attends_to_chosen:
        lens_after_select = seq_lens
    if left_out is not None:

        def without(lens: torch.Tensor) -> torch.Tensor:
            return lens[:num_rows].masked_fill(left_out, -1)

        seq_lens, select_lens = without(seq_lens), without(select_lens)
        if lens_after_select is not None:
            lens_after_select = without(lens_after_select)
    parts = []
    for first in range(0, num_rows, state.max_part_rows):
        rows = slice(first, min(first + state.max_part_rows, num_rows))
        topk = zip(selection.topk_blocks, selection.topk_lens, strict=True)
        after = None if lens_after_select is None else lens_after_select[rows]
        part = DecodePart(
            rows=rows,
            block_table=batch.block_table[rows],
            seq_lens=seq_lens[rows],
            select_lens=select_lens[rows],
            lens_after_select=after,
            topk=[(blocks[rows], lens[rows]) for blocks, lens in topk],
        )
        parts.append(part)
    return parts
