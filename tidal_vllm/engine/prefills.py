"""The requests of a sparse step that do not decode, as a batch of their own."""

from typing import Any, TypeAlias

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tidal_vllm.engine.batch import query_lens

# Which of a batch's requests, or of its query tokens: the last ones, or `[num_picked]`
# int64.
Picked: TypeAlias = slice | torch.Tensor


def prefills_of(
    common: CommonAttentionMetadata, num_decodes: int, is_prefill: torch.Tensor
) -> tuple[CommonAttentionMetadata, Picked]:
    """The requests that do not decode.

    Args:
        num_decodes: Requests at the front, up to the last that decodes.
        is_prefill: `[num_reqs]` bool on the CPU. All requests behind the decodes are
            taken, except those that pad a CUDA graph.

    Returns:
        The batch, and where its query tokens stand in the whole one.
    """
    starts = common.query_start_loc_cpu
    is_padded = int(starts[-1]) < common.num_actual_tokens
    if not is_padded and not is_prefill[:num_decodes].any():
        rest = requests_from(common, num_decodes)
        return rest, slice(int(starts[num_decodes]), None)
    behind = torch.arange(common.num_reqs) >= num_decodes
    lens = query_lens(common)
    requests = ((is_prefill | behind) & (lens > 0)).nonzero()[:, 0]
    lens, device = lens[requests], common.seq_lens.device
    ends = lens.cumsum(0, dtype=torch.int32)
    new_starts = torch.cat([lens.new_zeros(1), ends])
    shift = starts[requests] - new_starts[:-1]
    at = torch.arange(int(ends[-1])) + shift.repeat_interleave(lens)
    tokens = at.to(device)
    rest = _part(
        common,
        requests,
        requests.to(device),
        tokens,
        num_reqs=len(requests),
        num_actual_tokens=len(tokens),
        query_start_loc=new_starts.to(device),
        query_start_loc_cpu=new_starts,
    )
    return rest, tokens


def requests_from(
    common: CommonAttentionMetadata, first: int
) -> CommonAttentionMetadata:
    """The batch without its first requests, as views of what it holds."""
    start = int(common.query_start_loc_cpu[first])
    return _part(
        common,
        slice(first, None),
        slice(first, None),
        slice(start, None),
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - start,
        query_start_loc=common.query_start_loc[first:] - start,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - start,
    )


def _part(
    common: CommonAttentionMetadata,
    requests: Picked,
    rows: Picked,
    tokens: Picked,
    **sizes: Any,
) -> CommonAttentionMetadata:
    """Some requests of a batch.

    Args:
        requests, rows: The same requests, for tensors on the CPU and on the device.
        tokens: Their query tokens, for tensors on the device.
        sizes: Fields that say how many there are, and where they begin.
    """

    def pick(values: Any, which: Picked) -> Any:
        return None if values is None else values[which]

    return common.replace(
        seq_lens=common.seq_lens[rows],
        block_table_tensor=common.block_table_tensor[rows],
        slot_mapping=common.slot_mapping[tokens],
        positions=pick(common.positions, tokens),
        is_prefilling=pick(common.is_prefilling, requests),
        seq_lens_cpu_upper_bound=pick(common.seq_lens_cpu_upper_bound, requests),
        req_idx=pick(common.req_idx, requests),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **sizes,
    )
