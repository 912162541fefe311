"""Writing KV, and attending several query tokens of a sequence, in fp32 PyTorch.

Sequences are taken one by one, so a row's result never depends, not even in its last
bit, on the batch around it.
"""

import itertools
import math

import torch

from tidal_vllm.kernels.reference.kv_runs import KVRuns
from tidal_vllm.kernels.reference.shapes import (
    ceil_div,
    check_cache,
    keys_of,
    values_of,
)
from tidal_vllm.kernels.reference.softmax import merge_states

# Pairs (K and V of one token and one KV head) that are read at a time: twice those of a
# decode, since an extend does far more arithmetic per pair, and merges its output per
# tile. Also the longest query that is taken at once, times the KV heads.
EXTEND_TILE_PAIRS = 8192
# Query tokens that are taken at once where a window needs a mask; with a window of
# 4096 the mask is 9 MiB.
WINDOW_CHUNK = 512


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write new keys and values into their slots of the paged cache.

    Args:
        key: [>= num_tokens, num_kv_heads, head_size].
        value: like key.
        kv_cache: written; its dtype is converted to.
        slot_mapping: [num_tokens] integer, physical block * block_size + offset;
            negative for a padded token, which is not written.
    """
    check_cache(key, kv_cache)
    num_tokens, block_size = slot_mapping.shape[0], kv_cache.shape[2]
    rows = torch.cat((key[:num_tokens], value[:num_tokens]), -1).to(kv_cache.dtype)
    padded = slot_mapping < 0
    if padded.any():
        rows, slot_mapping = rows[~padded], slot_mapping[~padded]
    slots = (slot_mapping // block_size, slot_mapping % block_size)
    kv_cache.transpose(1, 2).index_put_(slots, rows)


def dense_extend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Attend the newest tokens of each sequence to all before them and themselves.

    Prefill, chunked prefill and any query of several tokens. Causal: the last query
    token is at position seq_len - 1, and the cache holds the query tokens' KV already.

    Args:
        query: [num_tokens, num_heads, head_size], the sequences one after another.
        query_start_loc: [num_seqs + 1] int32, on the CPU or query's device; sequence
            i owns rows query_start_loc[i] to query_start_loc[i + 1].
        sliding_window: tokens that a query token attends to, itself included; nothing
            before the first one's window is read. None: to all.

    Returns:
        [num_tokens, num_heads, head_size] in query's dtype; zeros for rows that
        belong to no sequence.

    Raises:
        ValueError: the shapes do not fit, or a sequence has more query tokens than
            seq_len.
    """
    check_cache(query, kv_cache)
    num_kv_heads, block_size = kv_cache.shape[1:3]
    runs = KVRuns(kv_cache, block_size, num_sets=1)
    bounds = query_start_loc.tolist()
    lens = seq_lens[: len(bounds) - 1].tolist()
    output = torch.zeros_like(query)
    step = max(EXTEND_TILE_PAIRS // num_kv_heads, 1)
    if sliding_window is not None:
        step = min(step, WINDOW_CHUNK)
    for row, (first, end) in enumerate(itertools.pairwise(bounds)):
        if end - first > lens[row]:
            raise ValueError(f"{end - first} query tokens in a sequence of {lens[row]}")
        used = ceil_div(lens[row], block_size)
        ids = runs.locate(block_table[row, :used].long()[None])
        for start in range(first, end, step):
            taken = slice(start, min(start + step, end))
            # [num_kv_heads, group, tokens, head_size]
            q = query[taken].float().unflatten(1, (num_kv_heads, -1))
            q = q.permute(1, 2, 0, 3).contiguous()
            position = lens[row] - end + start
            if sliding_window is None:
                result = _extend(q, runs, ids, position, scale)
            else:
                result = _extend_window(q, runs, ids, position, scale, sliding_window)
            output[taken] = result.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return output


def _extend(
    q: torch.Tensor, runs: KVRuns, ids: torch.Tensor, position: int, scale: float
) -> torch.Tensor:
    """Causal attention of query tokens from `position` on, all of one sequence.

    Args:
        q: [num_kv_heads, group, tokens, head_size] fp32, contiguous.
        ids: the sequence's blocks.
    """
    first = position // runs.span
    end = position + q.shape[2]
    kv = runs.read(ids[:, first : ceil_div(end, runs.span)])
    kv = kv[:, None, position - first * runs.span : end - first * runs.span]
    # As heads of a batch of KV heads: K and V are shared, not copied.
    output, lse = _attend(q, kv.expand(-1, q.shape[1], -1, -1), scale, causal=True)

    # The context needs no mask, so a group's heads become one long query per KV head.
    long_q = q.flatten(1, 2)[None]
    output, lse = output.reshape(long_q.shape[1:]), lse.reshape(long_q.shape[1:3])
    context = ids[:, : ceil_div(position, runs.span)]
    for start, tile_ids in runs.tiles(context, EXTEND_TILE_PAIRS):
        kv = runs.read(tile_ids)[None, :, : position - start]
        more_output, more_lse = _attend(long_q, kv, scale, causal=False)
        output, lse = merge_states(output, lse, more_output[0], more_lse[0])
    return output.view(q.shape)


def _extend_window(
    q: torch.Tensor,
    runs: KVRuns,
    ids: torch.Tensor,
    position: int,
    scale: float,
    window: int,
) -> torch.Tensor:
    """`_extend` for tokens that see `window` tokens each, themselves included."""
    oldest, end = max(position - window + 1, 0), position + q.shape[2]
    first = oldest // runs.span
    kv = runs.read(ids[:, first : ceil_div(end, runs.span)])
    kv = kv[:, None, oldest - first * runs.span : end - first * runs.span]
    at = torch.arange(oldest, end, device=q.device)
    distance = at[position - oldest :, None] - at
    hidden = (distance < 0) | (distance >= window)
    mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
    kv = kv.expand(-1, q.shape[1], -1, -1)
    return _attend(q, kv, scale, causal=False, mask=mask)[0]


def _attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [batch, heads, tokens, head_size] and its lse.

    Args:
        mask: [tokens, tokens of kv] fp32, added to the scores.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys_of(kv), values_of(kv), is_causal=causal, attn_mask=mask, scale=scale
        )
    return _attend_plain(q, kv, scale, causal, mask)


def _attend_plain(
    q: torch.Tensor,
    kv: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_attend` means, where torch has no op that also returns the lse."""
    scores = q @ keys_of(kv).transpose(2, 3) * scale
    if causal:
        past = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
        scores.masked_fill_(~past, -math.inf)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ values_of(kv), lse
