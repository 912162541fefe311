"""The ops in plain fp32 PyTorch: the oracle of every kernel, and what runs on the CPU.

Sequences are taken one by one, so a row's result never depends, not even in its last
bit, on the batch around it. Keys and values stream through a tile that stays in cache:
each tile gives an unnormalised softmax part, and the parts are combined at the end.

Shared by all ops:
    query: [num_seqs, num_heads, head_size], any float dtype; all arithmetic is fp32.
    kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], K then V of one
        token and head side by side; any strides, fp32, bf16 or fp16. Query head h
        reads KV head h // (num_heads // num_kv_heads).
    block_table: [num_seqs, max_blocks_per_seq] int32, physical block ids.
    seq_lens: [num_seqs] int32, tokens in the cache, the current one included; 0 marks
        a padded row. A negative one leaves the row out of the call: nothing of it is
        read; it comes back like a padded row, and stays as it is in tensors that are
        given to be written.
    lse: [num_seqs, num_heads] fp32, natural logarithm of the sum of exp(scale * q.k).
Slots outside a sequence's tokens are never used, whatever they hold. Each op reads
seq_lens on the host, so none can be captured in a CUDA graph.
"""

import itertools
import math

import torch

from tidal_vllm.kernels.reference.kv_rows import KVRuns

# Rows (K and V of one token and one KV head) per tile; 4096 are 4 MiB in fp32 at
# head_size 128. Measured on an EPYC with 1 MiB of L2 per core and 32 MiB of L3: 2048
# costs 4 to 20 % more in overhead per tile, 16384 16 to 80 % more in cache misses.
CHUNK_ROWS = 4096
# For extends, which do far more arithmetic per row, and merge their output per tile.
# Also the longest query they take at once, times the KV heads.
EXTEND_CHUNK_ROWS = 8192
# Query tokens that are taken at once where a window needs a mask; with a window of
# 4096 the mask is 9 MiB.
WINDOW_CHUNK = 512


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes new keys and values into their slots of the paged cache.

    Args:
        key: [>= num_tokens, num_kv_heads, head_size].
        value: like key.
        kv_cache: written; its dtype is converted to.
        slot_mapping: [num_tokens] integer, physical block * block_size + offset;
            negative for a padded token, which is not written.
    """
    _check_cache(key, kv_cache)
    num_tokens, block_size = slot_mapping.shape[0], kv_cache.shape[2]
    rows = torch.cat((key[:num_tokens], value[:num_tokens]), -1).to(kv_cache.dtype)
    padded = slot_mapping < 0
    if padded.any():
        rows, slot_mapping = rows[~padded], slot_mapping[~padded]
    slots = (slot_mapping // block_size, slot_mapping % block_size)
    kv_cache.transpose(1, 2).index_put_(slots, rows)


def dense_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    select_block_size: int | None = None,
    read_values: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attends one query token per sequence to the whole sequence, in one pass.

    Args:
        select_block_size: tokens per selection block; divides block_size. None: no
            block_lse.
        read_values: False is `score_blocks`: the output stays zeros.

    Returns:
        output: [num_seqs, num_heads, head_size] in query's dtype; zeros where
            seq_len is 0 or less.
        lse: -inf where seq_len is 0 or less.
        block_lse: [num_seqs, num_heads, ceil(max(seq_lens) / select_block_size)]
            fp32, lse over the tokens of each selection block, -inf beyond a row's
            last; or None.

    Raises:
        ValueError: the shapes do not fit, or select_block_size does not divide.
    """
    _check_cache(query, kv_cache)
    block_size, head_size = kv_cache.shape[2], query.shape[2]
    lens = seq_lens.tolist()
    block_lse = None
    if select_block_size is not None:
        _check_select_block(select_block_size, block_size)
        shape = (*query.shape[:2], _ceil_div(max([0, *lens]), select_block_size))
        block_lse = query.new_full(shape, -math.inf, dtype=torch.float32)
    if not read_values:
        kv_cache = kv_cache[..., :head_size]
    runs, output, lse = _begin(query, kv_cache, block_size, num_sets=1)
    for row, seq_len in enumerate(lens):
        if seq_len <= 0:
            continue
        q = _by_lane(query[row], scale, runs.lanes)
        used = _ceil_div(seq_len, block_size)
        ids = runs.locate(block_table[row, :used].long()[None])
        parts = []
        for start, part_ids in runs.tiles(ids, CHUNK_ROWS):
            kv = runs.read(part_ids)[:, : seq_len - start]
            scores = _scores(q, kv)
            if block_lse is not None:
                sums = _block_lse(scores, select_block_size).flatten(0, 1)
                first = start // select_block_size
                block_lse[row, :, first : first + sums.shape[1]] = sums
            parts.append(_softmax_part(scores, _values(kv) if read_values else None))
        _combine(parts, lse[row], output[row])
    return output, lse, block_lse


def score_blocks(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    select_block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the lse and block_lse of `dense_decode` from K alone; V is not read."""
    _, lse, block_lse = dense_decode(
        *(query, kv_cache, block_table, seq_lens),
        scale=scale,
        select_block_size=select_block_size,
        read_values=False,
    )
    return lse, block_lse


def select_blocks(
    block_lse: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    rule,
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
) -> None:
    """Chooses the selection blocks that each set keeps.

    A set keeps its forced blocks (those with one of the first sink_tokens or of the
    newest recent_tokens, the current one always) and the heaviest others, up to
    token_budget // select_block_size blocks; ties go to the smaller index. The mass of
    a block is the sum of exp(block_lse - lse) over the set's heads, so the choice holds
    the most attention mass that any such set can; a NaN weighs nothing. A sequence of
    at most max(sparse_threshold, token_budget) tokens keeps all its blocks.

    Args:
        block_lse: [num_seqs, num_heads, num_blocks] fp32, from `dense_decode`.
        rule: `tidal_vllm.plan.policy.SelectionRule`, or anything with its fields.
        topk_blocks: [>= num_seqs, num_sets, max_blocks] int32, written up to
            num_seqs: logical block indices, ascending, then -1. num_sets divides
            num_heads; the heads of a set are neighbours.
        topk_lens: [>= num_seqs, num_sets] int32, written up to num_seqs.

    Raises:
        ValueError: num_sets does not divide num_heads, max_blocks is too small for
            what a row keeps, or the forced blocks of a row exceed the budget.
    """
    num_heads, num_sets = block_lse.shape[1], topk_blocks.shape[1]
    if num_heads % num_sets:
        raise ValueError(f"num_sets = {num_sets} must divide num_heads = {num_heads}")
    size = rule.select_block_size
    keep_all_len = max(rule.sparse_threshold, rule.token_budget)
    for row, seq_len in enumerate(seq_lens.tolist()):
        if seq_len < 0:
            continue
        total = _ceil_div(seq_len, size)
        kept = total if seq_len <= keep_all_len else rule.token_budget // size
        if kept > topk_blocks.shape[2]:
            raise ValueError(
                f"max_blocks = {topk_blocks.shape[2]} is too small: a sequence of "
                f"{seq_len} tokens keeps {kept} blocks of {size}"
            )
        chosen = topk_blocks[row]
        chosen[:, kept:] = -1
        topk_lens[row] = kept
        if kept == total:
            chosen[:, :kept] = torch.arange(kept, device=chosen.device)
            continue
        sinks = _ceil_div(rule.sink_tokens, size)
        recent = (seq_len - max(rule.recent_tokens, 1)) // size
        if sinks + total - recent > kept:
            raise ValueError(
                f"token_budget = {rule.token_budget} holds {kept} blocks of {size}, "
                f"but {sinks + total - recent} are forced at {seq_len} tokens"
            )
        mass = (block_lse[row, :, :total] - lse[row, :, None]).exp()
        mass = mass.view(num_sets, -1, total).sum(1).nan_to_num_(0.0)
        mass[:, :sinks] = math.inf
        mass[:, recent:] = math.inf
        chosen[:, :kept] = _heaviest(mass, kept)


def sparse_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    select_block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends one query token per sequence to its chosen selection blocks.

    Args:
        topk_blocks: [num_seqs, num_sets, max_blocks] int32, logical selection
            blocks, each at most once per set, in any order; block b covers the
            positions from b * select_block_size, cut at seq_len. Precondition: the
            block table covers them. num_sets divides num_heads; the heads of a set
            are neighbours.
        topk_lens: [num_seqs, num_sets] int32, how many of them count; may differ.
        select_block_size: tokens; divides block_size.

    Returns:
        output: [num_seqs, num_heads, head_size] in query's dtype; zeros for an empty
            set.
        lse: over the chosen tokens; -inf for an empty set.

    Raises:
        ValueError: the shapes do not fit, or select_block_size does not divide.
    """
    num_sets, size = topk_blocks.shape[1], select_block_size
    _check_cache(query, kv_cache)
    _check_select_block(size, kv_cache.shape[2])
    if query.shape[1] % num_sets:
        raise ValueError(f"num_sets = {num_sets} must divide {query.shape[1]} heads")
    per_block = kv_cache.shape[2] // size
    runs, output, lse = _begin(query, kv_cache, size, num_sets)
    offsets = torch.arange(size, device=query.device)
    counts_of_rows = topk_lens.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        counts = counts_of_rows[row]
        most = max(counts)
        if seq_len <= 0 or most == 0:
            continue
        q = _by_lane(query[row], scale, runs.lanes)
        blocks = topk_blocks[row, :, :most].long()
        past_end = _ceil_div(seq_len, size)
        if min(counts) < most:  # what is not in a shorter set: a block past the end
            rank = torch.arange(most, device=query.device)
            blocks = blocks.where(rank < topk_lens[row, :, None], past_end)
        assert blocks.min() >= 0, f"negative block among the first {counts} of {row}"
        tokens_left = seq_len - blocks * size
        blocks = blocks.clamp(max=past_end - 1)
        physical = block_table[row][blocks // per_block].long()
        ids = runs.locate(physical, blocks % per_block * size)
        parts = []
        for start, part_ids in runs.tiles(ids, CHUNK_ROWS):
            kv = runs.read(part_ids)
            first = start // size
            left = tokens_left[:, first : first + part_ids.shape[1], None]
            cut = bool((left < size).any())
            if cut:
                beyond = (offsets >= left).flatten(1)
                beyond = beyond.repeat_interleave(runs.lanes // num_sets, 0)
                # Unused slots may hold NaN. By index: a mask would rewrite the tile.
                kv[beyond.nonzero(as_tuple=True)] = 0
            scores = _scores(q, kv)
            if cut:
                scores.masked_fill_(beyond[:, None], -math.inf)
            parts.append(_softmax_part(scores, _values(kv)))
        _combine(parts, lse[row], output[row])
    return output, lse


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
    """Attends the newest tokens of each sequence to all before them and themselves.

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
    _check_cache(query, kv_cache)
    num_kv_heads, block_size = kv_cache.shape[1:3]
    runs = KVRuns(kv_cache, block_size, num_sets=1)
    bounds = query_start_loc.tolist()
    lens = seq_lens[: len(bounds) - 1].tolist()
    output = torch.zeros_like(query)
    step = max(EXTEND_CHUNK_ROWS // num_kv_heads, 1)
    if sliding_window is not None:
        step = min(step, WINDOW_CHUNK)
    for row, (first, end) in enumerate(itertools.pairwise(bounds)):
        if end - first > lens[row]:
            raise ValueError(f"{end - first} query tokens in a sequence of {lens[row]}")
        used = _ceil_div(lens[row], block_size)
        ids = runs.locate(block_table[row, :used].long()[None])
        for start in range(first, end, step):
            part = slice(start, min(start + step, end))
            # [num_kv_heads, group, tokens, head_size]
            q = query[part].float().unflatten(1, (num_kv_heads, -1))
            q = q.permute(1, 2, 0, 3).contiguous()
            position = lens[row] - end + start
            if sliding_window is None:
                result = _extend(q, runs, ids, position, scale)
            else:
                result = _extend_window(q, runs, ids, position, scale, sliding_window)
            output[part] = result.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return output


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the attention over two disjoint sets of tokens into that over their union.

    Args:
        out_a, out_b: [..., head_size]; finite, zeros where lse is -inf.
        lse_a, lse_b: [...] fp32; -inf where the set is empty.

    Returns:
        output in out_a's dtype, and lse fp32.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)  # -inf less -inf is no weight
    weight_a = (lse_a - finite).exp()[..., None]
    weight_b = (lse_b - finite).exp()[..., None]
    output = out_a.float() * weight_a + out_b.float() * weight_b
    return output.to(out_a.dtype), lse


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _check_cache(query: torch.Tensor, kv_cache: torch.Tensor) -> None:
    num_heads, head_size = query.shape[1:]
    num_kv_heads, width = kv_cache.shape[1], kv_cache.shape[3]
    if width != 2 * head_size:
        raise ValueError(f"kv_cache rows of {width} must be 2 * head_size {head_size}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads must be a multiple of {num_kv_heads}")


def _check_select_block(select_block_size: int, block_size: int) -> None:
    if select_block_size < 1 or block_size % select_block_size:
        raise ValueError(
            f"select_block_size = {select_block_size} must divide {block_size}"
        )


def _begin(
    query: torch.Tensor, kv_cache: torch.Tensor, span: int, num_sets: int
) -> tuple[KVRuns, torch.Tensor, torch.Tensor]:
    """The cache's reader, and the result of a batch of empty rows."""
    lse = query.new_full(query.shape[:2], -math.inf, dtype=torch.float32)
    return KVRuns(kv_cache, span, num_sets), torch.zeros_like(query), lse


def _by_lane(query: torch.Tensor, scale: float, lanes: int) -> torch.Tensor:
    """[num_heads, head_size] to scaled fp32 [lanes, heads of a lane, head_size]."""
    return query.float().mul(scale).reshape(lanes, -1, query.shape[1])


def _keys(kv: torch.Tensor) -> torch.Tensor:
    return kv[..., : kv.shape[-1] // 2]


def _values(kv: torch.Tensor) -> torch.Tensor:
    return kv[..., kv.shape[-1] // 2 :]


def _scores(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Of rows that hold K, and perhaps V behind it."""
    return torch.bmm(q, kv[..., : q.shape[-1]].transpose(1, 2))


def _block_lse(scores: torch.Tensor, size: int) -> torch.Tensor:
    """[..., tokens] to the lse of each `size` tokens; the last may have fewer."""
    if size == 1:
        return scores
    missing = -scores.shape[-1] % size
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-math.inf)
    scores = scores.unflatten(-1, (-1, size))
    # By hand: torch.logsumexp takes three times as long on rows this short.
    top = scores.amax(-1, keepdim=True)
    return (scores - top).exp_().sum(-1).log_().add_(top.squeeze(-1))


def _softmax_part(
    scores: torch.Tensor, values: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """A tile's share of the softmax: largest score, sum and output relative to it.

    Without values there is no output.
    """
    lowest = torch.finfo(scores.dtype).min  # where all scores are -inf
    top = scores.amax(-1, keepdim=True).clamp_(min=lowest)
    weights = scores.sub_(top).exp_()
    part = (top, weights.sum(-1, keepdim=True))
    return part if values is None else (*part, torch.bmm(weights, values))


def _combine(
    parts: list[tuple[torch.Tensor, ...]], lse: torch.Tensor, output: torch.Tensor
) -> None:
    """Joins the tiles of one row, into [num_heads] and [num_heads, head_size]."""
    if len(parts) == 1:
        top, total, *outs = parts[0]
    else:
        tops, sums, *outs = (torch.stack(part) for part in zip(*parts, strict=True))
        top = tops.amax(0)
        weights = (tops - top).exp_()
        total = (weights * sums).sum(0)
        outs = [(weights * out).sum(0) for out in outs]
    for out in outs:
        # The largest score itself makes the total 1 or more, but for an empty set.
        output.copy_((out / total.clamp(min=1)).flatten(0, 1))
    lse.copy_(total.log_().add_(top).flatten())


def _heaviest(mass: torch.Tensor, kept: int) -> torch.Tensor:
    """[num_sets, kept] indices of the largest, ties to the smaller, ascending."""
    smallest = mass.topk(kept, sorted=False).values.amin(1, keepdim=True)
    above, ties = mass > smallest, mass == smallest
    room = kept - above.sum(1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(-1, kept)


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
    kv = runs.read(ids[:, first : _ceil_div(end, runs.span)])
    kv = kv[:, None, position - first * runs.span : end - first * runs.span]
    # As heads of a batch of KV heads: K and V are shared, not copied.
    state = _attend(q, kv.expand(-1, q.shape[1], -1, -1), scale, causal=True)

    # As one long query per KV head, for the context masks nothing.
    long_q = q.flatten(1, 2)[None]
    state = [part.reshape(*long_q.shape[1:3], *part.shape[3:]) for part in state]
    context = ids[:, : _ceil_div(position, runs.span)]
    for start, part_ids in runs.tiles(context, EXTEND_CHUNK_ROWS):
        kv = runs.read(part_ids)[None, :, : position - start]
        out, lse = _attend(long_q, kv, scale, causal=False)
        state = merge_states(*state, out[0], lse[0])
    return state[0].view(q.shape)


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
    kv = runs.read(ids[:, first : _ceil_div(end, runs.span)])
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
            q, _keys(kv), _values(kv), is_causal=causal, attn_mask=mask, scale=scale
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
    scores = q @ _keys(kv).transpose(2, 3) * scale
    if causal:
        past = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
        scores.masked_fill_(~past, -math.inf)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ _values(kv), lse
