"""What the Triton kernels ask of their arguments; each violation is a ValueError.

A message names the argument, its value and what is allowed. Only what the host knows is
checked: lengths, block ids and counts on the device are preconditions.
"""

import torch

from tidal_vllm.kernels.arguments import DecodeArgs
from tidal_vllm.kernels.workspace import FIRST_DIGITS

FP8 = (torch.uint8, torch.float8_e4m3fn)
QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_ROWS = 65535  # rows are the last dimension of a grid

Shape = tuple[int | None, ...]
"""Sizes of a tensor's dimensions; None allows any."""


def check_dense(
    args: DecodeArgs,
    seq_lens: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor],
    read_values: bool,
) -> None:
    """Refuse what `dense_decode` (read_values) and `score_blocks` cannot take."""
    _check_attention(args, seq_lens, partials, read_values)
    if args.select_block_size is not None:
        _check_select_block(args)
        _check_block_lse(args)


def check_sparse(
    args: DecodeArgs,
    seq_lens: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Refuse what `sparse_decode` cannot take."""
    _check_attention(args, seq_lens, partials, read_values=True)
    _check_select_block(args)
    _check_topk(args)


def check_select(args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Refuse what `select_blocks` cannot take."""
    _check_query(args)
    num_rows, num_heads, _ = args.query.shape
    _check_int32("seq_lens", seq_lens, (None,), args)
    _check_block_lse(args)
    _check_packed("lse", args.workspace.lse, (None, num_heads), args)
    _check_topk(args)
    shape = (None, args.topk_blocks.shape[1], args.workspace.block_lse.shape[2])
    floats, device = (torch.float32,), args.query.device
    _check("mass", args.workspace.mass, shape, floats, device, num_rows)
    shape = (None, args.topk_blocks.shape[1], FIRST_DIGITS)
    digit_counts = args.workspace.digit_counts
    _check_packed("digit_counts", digit_counts, shape, args, torch.int32)


def _check_attention(
    args: DecodeArgs,
    seq_lens: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor],
    read_values: bool,
) -> None:
    """Refuse what none of the ops that read KV can take."""
    _check_query(args)
    query, device = args.query, args.query.device
    num_rows, num_heads, head_size = query.shape
    shape = (None, None, None, 2 * head_size)
    _check("kv_cache", args.kv_cache, shape, (query.dtype, *FP8), device)
    num_kv_heads = args.kv_cache.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_heads} heads: must be a multiple of kv_cache's "
            f"{num_kv_heads}"
        )
    _check_int32("block_table", args.block_table, (None, None), args)
    _check_int32("seq_lens", seq_lens, (None,), args)
    partial_out, partial_lse = partials
    num_splits = None
    if read_values:
        _check("output", args.output, tuple(query.shape), (query.dtype,), device)
        _check_packed(
            "partial_out", partial_out, (None, num_heads, None, head_size), args
        )
        num_splits = partial_out.shape[2]
    _check_packed("lse", args.workspace.lse, (None, num_heads), args)
    _check_packed("partial_lse", partial_lse, (None, num_heads, num_splits), args)
    if not partial_lse.shape[2]:
        raise ValueError("partial_lse has no splits: needs at least one")


def _check_query(args: DecodeArgs) -> None:
    shape = (None, None, None)
    _check("query", args.query, shape, QUERY_DTYPES, args.query.device)
    num_rows = args.query.shape[0]
    if num_rows > MAX_ROWS:
        raise ValueError(f"query has {num_rows} rows: allowed at most {MAX_ROWS}")


def _check_select_block(args: DecodeArgs) -> None:
    size, block_size = args.select_block_size, args.kv_cache.shape[2]
    if size is None or size < 1 or block_size % size:
        raise ValueError(
            f"select_block_size = {size} must divide kv_cache's block_size {block_size}"
        )


def _check_block_lse(args: DecodeArgs) -> None:
    num_rows, num_heads, _ = args.query.shape
    shape, floats = (None, num_heads, None), (torch.float32,)
    block_lse = args.workspace.block_lse
    _check("block_lse", block_lse, shape, floats, args.query.device, num_rows)


def _check_topk(args: DecodeArgs) -> None:
    _check_int32("topk_blocks", args.topk_blocks, (None, None, None), args)
    num_heads, num_sets = args.query.shape[1], args.topk_blocks.shape[1]
    if not num_sets or num_heads % num_sets:
        raise ValueError(f"topk_blocks has {num_sets} sets: must divide {num_heads}")
    _check_int32("topk_lens", args.topk_lens, (None, num_sets), args)


def _check_int32(
    name: str, given: torch.Tensor | None, shape: Shape, args: DecodeArgs
) -> None:
    """Refuse what is not int32 with a row for each of the query's, at least."""
    num_rows, device = args.query.shape[0], args.query.device
    _check(name, given, shape, (torch.int32,), device, num_rows)


def _check_packed(
    name: str,
    given: torch.Tensor | None,
    shape: Shape,
    args: DecodeArgs,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuse what is not contiguous `dtype` with a row for each of the query's."""
    num_rows, device = args.query.shape[0], args.query.device
    _check(name, given, shape, (dtype,), device, num_rows)
    if not given.is_contiguous():
        raise ValueError(f"{name} has strides {given.stride()}: must be contiguous")


def _check(
    name: str,
    given: torch.Tensor | None,
    shape: Shape,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    min_rows: int = 0,
) -> None:
    """Refuse another dtype, device or shape, too few rows, or a strided last dim."""
    if given is None:
        raise ValueError(f"{name} is missing")
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
    if given.shape[0] < min_rows:
        raise ValueError(f"{name} has {given.shape[0]} rows: needs {min_rows}")
    if given.stride(-1) != 1 and given.shape[-1] > 1:
        raise ValueError(f"{name} has last stride {given.stride(-1)}: allowed 1")
