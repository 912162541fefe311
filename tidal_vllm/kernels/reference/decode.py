"""The decode ops in fp32 PyTorch: the oracle of every kernel, and what the CPU runs.

`tidal_vllm.kernels.arguments.DecodeArgs` gives shapes and dtypes. Rows are taken one by
one, so a row's result never depends, not even in its last bit, on the batch around it.
Keys and values stream through a tile that stays in the processor's cache: each tile
leaves the state of its own softmax, and the states are joined at the end. Slots outside
a sequence's tokens are never used, whatever they hold. Each op reads seq_lens on the
host, so none can be captured in a CUDA graph. The reference cannot read an fp8 cache:
`k_scale` and `v_scale` must be 1.
"""

import math

import torch

from tidal_vllm.kernels.arguments import DecodeArgs
from tidal_vllm.kernels.reference.kv_runs import KVRuns
from tidal_vllm.kernels.reference.shapes import (
    ceil_div,
    check_cache,
    check_select_block,
    values_of,
)
from tidal_vllm.kernels.reference.softmax import join_tiles, tile_state

# Pairs (K and V of one token and one KV head) per tile; 4096 are 4 MiB in fp32 at
# head_size 128. Measured on an EPYC with 1 MiB of L2 per core and 32 MiB of L3: 2048
# costs 4 to 20 % more in overhead per tile, 16384 16 to 80 % more in cache misses.
TILE_PAIRS = 4096


def dense_decode(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Attend each row's query token to its whole sequence, in one pass.

    Leaves:
        output: zeros for a row of padding.
        workspace.lse: `[num_rows, num_heads]` fp32, the natural logarithm of the sum of
            exp(scale * q.k); -inf for rows of padding, and rows that are left out.
        workspace.block_lse: `[num_rows, num_heads, ceil(max(seq_lens) /
            select_block_size)]` fp32, lse over the tokens of each selection block,
            -inf behind a row's last; unless select_block_size is None.

    Raises:
        ValueError: The shapes do not fit, or select_block_size does not divide.
    """
    _attend_densely(args, seq_lens, read_values=True)


def score_blocks(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Leave the lse and block_lse of `dense_decode`; neither V nor output is touched.

    Raises:
        ValueError: As `dense_decode`.
    """
    _attend_densely(args, seq_lens, read_values=False)


def _attend_densely(
    args: DecodeArgs, seq_lens: torch.Tensor, read_values: bool
) -> None:
    query, size = args.query, args.select_block_size
    check_cache(query, args.kv_cache)
    block_size, head_size = args.kv_cache.shape[2], query.shape[2]
    lens = seq_lens.tolist()[: query.shape[0]]
    block_lse = None
    if size is not None:
        check_select_block(size, block_size)
        shape = (*query.shape[:2], ceil_div(max([0, *lens]), size))
        block_lse = query.new_full(shape, -math.inf, dtype=torch.float32)
        args.workspace.block_lse = block_lse
    kv_cache = args.kv_cache if read_values else args.kv_cache[..., :head_size]
    runs, lse = KVRuns(kv_cache, block_size, num_sets=1), _empty_lse(args)
    for row, seq_len in enumerate(lens):
        if seq_len == 0 and read_values:
            args.output[row] = 0
        if seq_len <= 0:
            continue
        q = _by_head_group(query[row], args.scale, runs.num_head_groups)
        used = ceil_div(seq_len, block_size)
        ids = runs.locate(args.block_table[row, :used].long()[None])
        states = []
        for start, tile_ids in runs.tiles(ids, TILE_PAIRS):
            kv = runs.read(tile_ids)[:, : seq_len - start]
            scores = _scores(q, kv)
            if block_lse is not None:
                sums = _block_lse(scores, size).flatten(0, 1)
                first = start // size
                block_lse[row, :, first : first + sums.shape[1]] = sums
            states.append(tile_state(scores, values_of(kv) if read_values else None))
        join_tiles(states, lse[row], args.output[row])


def sparse_decode(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Attend each row's query token to the selection blocks of its sets.

    The blocks of a set may come in any order, each at most once; block b covers the
    positions from b * select_block_size, cut at seq_len. Precondition: the block table
    covers them.

    Leaves:
        output: zeros for a row of padding, and for an empty set.
        workspace.lse: over the chosen tokens; -inf for an empty set.

    Raises:
        ValueError: The shapes do not fit, or select_block_size does not divide.
    """
    query, kv_cache, size = args.query, args.kv_cache, args.select_block_size
    num_sets = args.topk_blocks.shape[1]
    check_cache(query, kv_cache)
    check_select_block(size, kv_cache.shape[2])
    if query.shape[1] % num_sets:
        raise ValueError(f"num_sets = {num_sets} must divide {query.shape[1]} heads")
    per_block = kv_cache.shape[2] // size
    runs, lse = KVRuns(kv_cache, size, num_sets), _empty_lse(args)
    offsets = torch.arange(size, device=query.device)
    counts_of_rows = args.topk_lens[: query.shape[0]].tolist()
    for row, seq_len in enumerate(seq_lens.tolist()[: query.shape[0]]):
        counts = counts_of_rows[row]
        most = max(counts)
        if seq_len == 0 or (seq_len > 0 and most == 0):
            args.output[row] = 0
        if seq_len <= 0 or most == 0:
            continue
        q = _by_head_group(query[row], args.scale, runs.num_head_groups)
        blocks = args.topk_blocks[row, :, :most].long()
        past_end = ceil_div(seq_len, size)
        if min(counts) < most:  # what is not in a shorter set: a block past the end
            rank = torch.arange(most, device=query.device)
            blocks = blocks.where(rank < args.topk_lens[row, :, None], past_end)
        assert blocks.min() >= 0, f"negative block among the first {counts} of {row}"
        tokens_left = seq_len - blocks * size
        blocks = blocks.clamp(max=past_end - 1)
        physical = args.block_table[row][blocks // per_block].long()
        ids = runs.locate(physical, blocks % per_block * size)
        states = []
        for start, tile_ids in runs.tiles(ids, TILE_PAIRS):
            kv = runs.read(tile_ids)
            first = start // size
            left = tokens_left[:, first : first + tile_ids.shape[1], None]
            cut = bool((left < size).any())
            if cut:
                beyond = (offsets >= left).flatten(1)
                beyond = beyond.repeat_interleave(runs.num_head_groups // num_sets, 0)
                # Unused slots may hold NaN. By index: a mask would rewrite the tile.
                kv[beyond.nonzero(as_tuple=True)] = 0
            scores = _scores(q, kv)
            if cut:
                scores.masked_fill_(beyond[:, None], -math.inf)
            states.append(tile_state(scores, values_of(kv)))
        join_tiles(states, lse[row], args.output[row])


def _empty_lse(args: DecodeArgs) -> torch.Tensor:
    """The workspace's lse of a batch in which no row has attended yet."""
    shape = args.query.shape[:2]
    args.workspace.lse = args.query.new_full(shape, -math.inf, dtype=torch.float32)
    return args.workspace.lse


def _by_head_group(
    query: torch.Tensor, scale: float, num_head_groups: int
) -> torch.Tensor:
    """`[num_heads, head_size]`, scaled, to fp32 `[head groups, heads, head_size]`."""
    return query.float().mul(scale).reshape(num_head_groups, -1, query.shape[1])


def _scores(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Dot products with the keys of kv, which may hold V behind K."""
    return torch.bmm(q, kv[..., : q.shape[-1]].transpose(1, 2))


def _block_lse(scores: torch.Tensor, size: int) -> torch.Tensor:
    """`[..., tokens]` to the lse of each `size` tokens; the last may have fewer."""
    if size == 1:
        return scores
    missing = -scores.shape[-1] % size
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-math.inf)
    scores = scores.unflatten(-1, (-1, size))
    # By hand: torch.logsumexp takes three times as long on rows this short.
    top = scores.amax(-1, keepdim=True)
    return (scores - top).exp_().sum(-1).log_().add_(top.squeeze(-1))
