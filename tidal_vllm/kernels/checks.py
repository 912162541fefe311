"""What the kernels ask of their tensors; each violation is a ValueError by name.

Only what the host knows: lengths, block ids and counts on the device are preconditions.
"""

import torch

FP8 = (torch.uint8, torch.float8_e4m3fn)
QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_SEQS = 65535  # rows are the last dimension of the grid


def check_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor | None,
    lse: torch.Tensor,
    partial_out: torch.Tensor | None,
    partial_lse: torch.Tensor,
) -> None:
    """Refuse what no decode op can take; `score_blocks` has no output."""
    _check("query", query, (None, None, None), QUERY_DTYPES, query.device)
    num_seqs, num_heads, head_size = query.shape
    if num_seqs > MAX_SEQS:
        raise ValueError(f"query has {num_seqs} rows: allowed at most {MAX_SEQS}")
    device = query.device
    cache_dtypes = (query.dtype, *FP8)
    cache_shape = (None, None, None, 2 * head_size)
    _check("kv_cache", kv_cache, cache_shape, cache_dtypes, device)
    num_kv_heads = kv_cache.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_heads} heads: must be a multiple of kv_cache's "
            f"{num_kv_heads}"
        )
    _check("block_table", block_table, (None, None), (torch.int32,), device, num_seqs)
    _check("seq_lens", seq_lens, (num_seqs,), (torch.int32,), device)
    num_splits = None
    if output is not None:
        shape = (num_seqs, num_heads, head_size)
        _check("output", output, shape, (query.dtype,), device)
        shape = (None, num_heads, None, head_size)
        _check_packed("partial_out", partial_out, shape, device, num_seqs)
        num_splits = partial_out.shape[2]
    _check_packed("lse", lse, (num_seqs, num_heads), device)
    shape = (None, num_heads, num_splits)
    _check_packed("partial_lse", partial_lse, shape, device, num_seqs)
    if not partial_lse.shape[2]:
        raise ValueError("partial_lse has no splits: needs at least one")


def check_sets(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    select_block_size: int,
    topk_blocks: torch.Tensor | None = None,
    topk_lens: torch.Tensor | None = None,
    block_lse: torch.Tensor | None = None,
) -> None:
    """Refuse a selection block that does not divide, and sets that do not fit."""
    num_seqs, num_heads = query.shape[:2]
    block_size, device = kv_cache.shape[2], query.device
    if select_block_size < 1 or block_size % select_block_size:
        raise ValueError(
            f"select_block_size = {select_block_size} must divide kv_cache's "
            f"block_size {block_size}"
        )
    if block_lse is not None:
        shape = (num_seqs, num_heads, None)
        _check("block_lse", block_lse, shape, (torch.float32,), device)
    if topk_blocks is not None:
        check_topk(topk_blocks, topk_lens, num_seqs, num_heads, device)


def check_topk(
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
    num_seqs: int,
    num_heads: int,
    device: torch.device,
) -> None:
    """Refuse sets that do not fit; they may have more rows than the batch."""
    int32 = (torch.int32,)
    shape = (None, None, None)
    _check("topk_blocks", topk_blocks, shape, int32, device, num_seqs)
    num_sets = topk_blocks.shape[1]
    if not num_sets or num_heads % num_sets:
        raise ValueError(f"topk_blocks has {num_sets} sets: must divide {num_heads}")
    _check("topk_lens", topk_lens, (None, num_sets), int32, device, num_seqs)


def check_select(
    block_lse: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    topk_blocks: torch.Tensor,
    topk_lens: torch.Tensor,
    mass: torch.Tensor,
) -> None:
    """Refuse what `select_blocks` cannot take."""
    device = block_lse.device
    _check("block_lse", block_lse, (None, None, None), (torch.float32,), device)
    num_seqs, num_heads, num_blocks = block_lse.shape
    if num_seqs > MAX_SEQS:
        raise ValueError(f"block_lse has {num_seqs} rows: allowed at most {MAX_SEQS}")
    _check_packed("lse", lse, (num_seqs, num_heads), device)
    _check("seq_lens", seq_lens, (num_seqs,), (torch.int32,), device)
    check_topk(topk_blocks, topk_lens, num_seqs, num_heads, device)
    shape = (None, topk_blocks.shape[1], num_blocks)
    _check("mass", mass, shape, (torch.float32,), device, num_seqs)


def _check(
    name: str,
    given: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    least_rows: int = 0,
) -> None:
    """Refuse another dtype, device, shape (None: any) or a strided last dimension."""
    if given.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {given.dtype}: allowed {allowed}")
    if given.device != device:
        raise ValueError(f"{name} is on {given.device}: the others are on {device}")
    fits = given.dim() == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, given.shape, strict=True)
    )
    if not fits:
        wanted = ["any" if size is None else size for size in shape]
        raise ValueError(f"{name} has shape {list(given.shape)}: allowed {wanted}")
    if given.shape[0] < least_rows:
        raise ValueError(f"{name} has {given.shape[0]} rows: needs {least_rows}")
    if given.stride(-1) != 1 and given.shape[-1] > 1:
        raise ValueError(f"{name} has last stride {given.stride(-1)}: allowed 1")


def _check_packed(
    name: str,
    given: torch.Tensor,
    shape: tuple[int | None, ...],
    device: torch.device,
    least_rows: int = 0,
) -> None:
    _check(name, given, shape, (torch.float32,), device, least_rows)
    if not given.is_contiguous():
        raise ValueError(f"{name} has strides {given.stride()}: must be contiguous")
