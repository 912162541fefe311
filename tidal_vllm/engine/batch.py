"""One step's batch: where its decodes end, and what the layers are told of it."""

from dataclasses import dataclass, field, replace

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
    """Requests at the front of the batch, up to the last that decodes: its prompt is
    done. Those that pad a CUDA graph are among them."""
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
    """The dense backend's metadata of the requests that do not decode; None in a step
    that is not sparse, and where all requests decode."""
    prefill_tokens: slice | torch.Tensor
    """Where the query tokens of `prefills` stand: behind the decodes, or `[num_tokens]`
    int64 where some stand before a decode."""
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
    choosing: list[DecodePart] = field(default_factory=list)
    """In lossless mode, of a dense step: a row of each request, by which SELECT layers
    choose what the next drafts attend to. None in other steps."""
    choosing_tokens: torch.Tensor | None = None
    """`[num_reqs]` int32, where those rows stand in the batch's query tokens."""

    @classmethod
    def of_rows(
        cls, seq_lens: torch.Tensor, block_table: torch.Tensor, like: "TidalMetadata"
    ) -> "TidalMetadata":
        """One row of each request that runs sparsely, as yet without parts.

        Args:
            seq_lens: `[num_reqs]` int32.
            like: The metadata of a step of the same layers.
        """
        return replace(
            like,
            num_decodes=seq_lens.shape[0],
            num_decode_tokens=seq_lens.shape[0],
            seq_lens=seq_lens,
            block_table=block_table,
            prefills=None,
            prefill_tokens=slice(0),
            sparse=True,
            parts=[],
            choosing=[],
            choosing_tokens=None,
        )


def find_prefills(
    common: CommonAttentionMetadata, max_decode_query_len: int = 1
) -> torch.Tensor | None:
    """Which requests of a batch do not decode, `[num_reqs]` bool; None if all do.

    Args:
        max_decode_query_len: Query tokens that a decode may have; more than one are
            drafts to verify.

    Requests that pad a CUDA graph have no query token; they count as decodes, behind
    which nothing follows. A prompt's last token may come as a chunk of its own. It is
    prefill all the same: dense, so that its KV is what a dense model writes.
    """
    if common.max_query_len <= max_decode_query_len and common.is_prefilling is None:
        return None
    is_prefill = query_lens(common) > max_decode_query_len
    if common.is_prefilling is not None:
        # NOTE: the V2 model runner pads the other rows, but not this one.
        known = common.is_prefilling[: common.num_reqs]
        is_prefill[: known.shape[0]] |= known
    return is_prefill if is_prefill.any() else None


def count_decodes(
    common: CommonAttentionMetadata,
    is_prefill: torch.Tensor | None,
    max_decode_query_len: int = 1,
) -> int:
    """Requests at the front of a batch, up to the last that decodes.

    The V1 model runner puts all decodes first. The V2 runner puts requests with drafts
    first, then those with as many query tokens as drafts have, then the others by
    their number. So short chunks of prompts may stand between decodes, but no long one.

    Args:
        is_prefill: Of `find_prefills`.
    """
    if is_prefill is None:
        return common.num_reqs
    lens = query_lens(common)
    behind_a_long_one = (lens > max_decode_query_len).cumsum(0) > 0
    decodes = (~is_prefill & (lens > 0) & ~behind_a_long_one).nonzero()
    return int(decodes[-1]) + 1 if decodes.numel() else 0


def query_lens(common: CommonAttentionMetadata) -> torch.Tensor:
    """Query tokens of each request, `[num_reqs]` int32 on the CPU."""
    starts = common.query_start_loc_cpu
    return starts[1:] - starts[:-1]


def is_dummy(common: CommonAttentionMetadata) -> bool:
    """Whether no request is real: a warm-up, or a step for other ranks' sake.

    vLLM makes up requests that do not prefill and have no token but those of the step.
    A request that decodes has its prompt behind it.
    """
    lens = common.seq_lens_cpu_upper_bound
    if common.is_prefilling is None or lens is None:
        return False
    has_context = lens[: common.num_reqs] > query_lens(common)
    return not (common.is_prefilling.any() or has_context.any())


def rows_of(
    common: CommonAttentionMetadata, requests: torch.Tensor
) -> torch.Tensor | None:
    """The query tokens of some of the first requests, `[num_tokens]` bool.

    Args:
        requests: `[num_requests]` bool on the CPU. None comes back if it has none.
    """
    if not requests.any():
        return None
    counts = query_lens(common)[: requests.shape[0]]
    return requests.repeat_interleave(counts).to(common.seq_lens.device)


def is_captured(
    compilation: CompilationConfig,
    common: CommonAttentionMetadata,
    max_decode_query_len: int = 1,
) -> bool:
    """Whether vLLM may replay a full CUDA graph of decodes for this batch.

    Both model runners pad such a batch to a size that was captured. Where chunks of
    prompts are among its requests, it depends: the V1 runner looks at the number of
    their tokens alone; the V2 runner takes a prompt's last token for a decode, drafts
    behind it included, and does not replay for other chunks.

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
