"""One step's batch: where its decodes end, and what the layers are told of it."""

from dataclasses import dataclass

import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from tidal_vllm.plan.roles import Role
from tidal_vllm.plan.rule import SelectionRule


@dataclass(frozen=True, slots=True)
class DecodePart:
    """Some rows of a step's decodes: views that every layer of the step shares.

    A row is one query token of a decode. `seq_lens` and the like are `[num_rows]`
    int32; 0 marks padding, -1 a row that an op leaves out.
    """

    rows: slice
    """Where the rows stand in the batch's query tokens."""
    block_table: torch.Tensor
    """`[num_rows, max_blocks_per_seq]` int32, of each row's sequence."""
    seq_lens: torch.Tensor
    """Tokens of the row's sequence, up to the row's own."""
    select_lens: torch.Tensor
    """As seq_lens; -1 for a row that keeps its selection in this step."""
    lens_after_select: torch.Tensor | None
    """As seq_lens; -1 for a row whose SELECT layer has attended to everything while it
    chose. None where that is so for all rows."""
    topk: list[tuple[torch.Tensor, torch.Tensor]]
    """`topk_blocks` `[num_rows, num_sets, max_blocks]` and `topk_lens` `[num_rows,
    num_sets]` of each of the engine's selections."""


@dataclass
class TidalMetadata(AttentionMetadata):
    """One step's batch, decodes first; one object for all layers of a group."""

    num_decodes: int
    """Requests of the batch that decode: their prompt is done. Those that pad a CUDA
    graph are among them."""
    num_decode_tokens: int
    """Their query tokens, each a row of the decode ops: one per request, and one for
    each token of a draft that it verifies. Rows of padding are among them."""
    seq_lens: torch.Tensor
    """`[>= num_decode_tokens]` int32, tokens of the sequence up to a row's; 0 for
    padding."""
    block_table: torch.Tensor
    """`[>= num_decode_tokens, max_blocks_per_seq]` int32, of each row's sequence."""
    dense: AttentionMetadata
    """The dense backend's metadata of the whole batch."""
    prefills: AttentionMetadata | None
    """The dense backend's metadata of the requests behind the decodes; None in a step
    that is not sparse, and where all requests decode."""
    sparse: bool
    """Whether SELECT and SPARSE layers act as such in this step. Otherwise every
    layer takes the dense path."""
    parts: list[DecodePart]
    """The decodes, in parts that fit into the workspace; none unless sparse."""
    roles: dict[str, Role]
    """Role of each layer by its name, where any is sparse."""
    selection_index: dict[str, int]
    """Index in `Selection` of what a SELECT layer writes and SPARSE layers read, by
    the layer's name."""
    rule: SelectionRule


def count_decodes(
    common: CommonAttentionMetadata, max_decode_query_len: int = 1
) -> int:
    """Requests at the front of a batch that decode: their prompt is done.

    Args:
        max_decode_query_len: Query tokens that a decode may have; more than one are
            drafts to verify.

    Requests that pad a CUDA graph have no query token; they count as decodes, behind
    which nothing follows. A prompt's last token may come as a chunk of its own. It is
    prefill all the same: dense, so that its KV is what a dense model writes.
    """
    if common.max_query_len <= max_decode_query_len and common.is_prefilling is None:
        return common.num_reqs
    starts = common.query_start_loc_cpu
    is_prefill = starts[1:] - starts[:-1] > max_decode_query_len
    if common.is_prefilling is not None:
        # NOTE: the V2 model runner pads the other rows, but not this one.
        known = common.is_prefilling[: common.num_reqs]
        is_prefill[: known.shape[0]] |= known
    if not is_prefill.any():
        return common.num_reqs
    return int(is_prefill.int().argmax())


def requests_from(
    common: CommonAttentionMetadata, first: int
) -> CommonAttentionMetadata:
    """The batch without its first requests, as a batch of its own."""
    start = int(common.query_start_loc_cpu[first])

    def tail(rows: torch.Tensor | None) -> torch.Tensor | None:
        return None if rows is None else rows[first:]

    return common.replace(
        query_start_loc=common.query_start_loc[first:] - start,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - start,
        seq_lens=common.seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - start,
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[start:],
        positions=None if common.positions is None else common.positions[start:],
        is_prefilling=tail(common.is_prefilling),
        seq_lens_cpu_upper_bound=tail(common.seq_lens_cpu_upper_bound),
        req_idx=tail(common.req_idx),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def is_captured(
    compilation: CompilationConfig,
    common: CommonAttentionMetadata,
    max_decode_query_len: int = 1,
) -> bool:
    """Whether vLLM may replay a full CUDA graph of decodes for this batch.

    Both model runners pad such a batch to a size that was captured, and take short
    chunks of prompts for decodes.

    Args:
        max_decode_query_len: Query tokens that a decode may have; a graph has as many
            for each of its requests.
    """
    query_len, num_tokens = common.max_query_len, common.num_actual_tokens
    sizes = compilation.cudagraph_capture_sizes or ()
    return (
        query_len <= max_decode_query_len
        and common.num_reqs * query_len == num_tokens
        and compilation.cudagraph_mode is not None
        and compilation.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        and any(-(-size // query_len) * query_len == num_tokens for size in sizes)
    )
