"""The decode ops of the CUDA extension, `csrc/`; cannot be imported where not built.

Each means what the function of the same name in `reference` says, writes into given
tensors, allocates nothing and never waits for the GPU, so that a CUDA graph can hold
it. Results are the same bits from run to run, and a row's do not depend on the others.
None of this has run on a GPU yet: the kernels' source is tested under an emulation on
the CPU (tests/kernels/cuda).

Shared by all, S rows, H query heads, Hkv KV heads, head size D:
    query: [S, H, D] bf16 or fp16, last dim contiguous; D is 64, 96, 128 or 256.
    kv_cache: [num_blocks, Hkv, block_size, 2 * D], K then V; query's dtype, or fp8 e4m3
        (float8_e4m3fn or uint8); strides but the last are multiples of 16 bytes.
    block_table: [>= S, blocks] int32. Precondition: covers seq_lens.
    seq_lens: [>= S] int32; 0 marks a padded row: zeros, and lse -inf. A negative one
        leaves the row out: nothing of it is read, and what is written keeps it.
    output: [>= S, H, D] as query, written. lse: [>= S, H] fp32, written.
    partial_out, partial_lse: [>= S, H, P, D] and [>= S, H, P] fp32, workspace; P is the
        most splits of a row.
    scale, k_scale, v_scale: what q.k is multiplied by, and what fp8 numbers are.
A wrong argument raises ValueError, which names it, its value and what is allowed.
"""

from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_tidal_C.so"

if not LIBRARY.exists():
    raise ImportError(f"{LIBRARY.name} is not in {LIBRARY.parent}")
try:
    torch.ops.load_library(LIBRARY)
except OSError as error:
    raise ImportError(f"{LIBRARY} cannot be loaded: {error.__cause__}") from error


@torch.library.register_fake("tidal::dense_decode")
@torch.library.register_fake("tidal::score_blocks")
@torch.library.register_fake("tidal::sparse_decode")
@torch.library.register_fake("tidal::select_blocks")
def _write_only(*args) -> None:
    """What a compiler sees: the written tensors keep their shapes."""


def dense_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    block_lse: torch.Tensor | None,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    scale: float,
    k_scale: float,
    v_scale: float,
    select_block_size: int,
) -> None:
    """`reference.dense_decode`.

    Args:
        block_lse: [>= S, H, N] fp32, or None to keep no scores. Written for the blocks
            of each row, the rest is left alone.
        select_block_size: tokens, a divisor of the KV block size; 1, 2, 4, 8 or a
            multiple of 16.
    """
    torch.ops.tidal.dense_decode(
        query,
        kv_cache,
        block_table,
        seq_lens,
        output,
        lse,
        block_lse,
        partial_out,
        partial_lse,
        scale,
        k_scale,
        v_scale,
        select_block_size,
    )


def score_blocks(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    lse: torch.Tensor,
    block_lse: torch.Tensor,
    partial_lse: torch.Tensor,
    scale: float,
    k_scale: float,
    select_block_size: int,
) -> None:
    """`reference.score_blocks`: the lse and block_lse of `dense_decode`, without V.

    Args:
        block_lse, select_block_size: as `dense_decode`'s.
    """
    torch.ops.tidal.score_blocks(
        query,
        kv_cache,
        block_table,
        seq_lens,
        lse,
        block_lse,
        partial_lse,
        scale,
        k_scale,
        select_block_size,
    )


def sparse_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    scale: float,
    k_scale: float,
    v_scale: float,
    select_block_size: int,
) -> None:
    """`reference.sparse_decode`.

    Args:
        topk_blocks: [>= S, G, max_blocks] int32; G sets, one for several KV heads or
            several for one, neighbouring heads together.
        topk_lens: [>= S, G] int32.
        select_block_size: tokens, a divisor of the KV block size.
    """
    torch.ops.tidal.sparse_decode(
        query,
        kv_cache,
        block_table,
        topk_blocks,
        topk_lens,
        seq_lens,
        output,
        lse,
        partial_out,
        partial_lse,
        scale,
        k_scale,
        v_scale,
        select_block_size,
    )


def select_blocks(
    block_lse: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
    mass: torch.Tensor,
    token_budget: int,
    select_block_size: int,
    sink_tokens: int,
    recent_tokens: int,
    sparse_threshold: int,
) -> None:
    """`reference.select_blocks`, for the rows of seq_lens.

    Args:
        block_lse: [>= S, H, N] fp32. Precondition: N covers seq_lens.
        topk_blocks: [>= S, G, max_blocks] int32, written: ascending, then -1.
        topk_lens: [>= S, G] int32, written.
        mass: [>= S, G, >= N] fp32, workspace.
        token_budget, sink_tokens, recent_tokens, sparse_threshold: tokens, as in
            `policy.SelectionRule`. The forced tokens of any length must fit the budget.
    """
    torch.ops.tidal.select_blocks(
        block_lse,
        lse,
        seq_lens,
        topk_blocks,
        topk_lens,
        mass,
        token_budget,
        select_block_size,
        sink_tokens,
        recent_tokens,
        sparse_threshold,
    )
