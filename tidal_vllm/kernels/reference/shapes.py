"""Shapes of the paged KV cache that the reference ops rely on."""

import torch


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def check_cache(query: torch.Tensor, kv_cache: torch.Tensor) -> None:
    """Refuse a query (or key) of other heads than the KV cache has."""
    num_heads, head_size = query.shape[1:]
    num_kv_heads, width = kv_cache.shape[1], kv_cache.shape[3]
    if width != 2 * head_size:
        raise ValueError(f"kv_cache rows of {width} must be 2 * head_size {head_size}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads must be a multiple of {num_kv_heads}")


def check_select_block(select_block_size: int, block_size: int) -> None:
    """Refuse a selection block that would reach over the end of a KV block."""
    if select_block_size < 1 or block_size % select_block_size:
        raise ValueError(
            f"select_block_size = {select_block_size} must divide {block_size}"
        )


def keys_of(kv: torch.Tensor) -> torch.Tensor:
    """`[..., 2 * head_size]` to its first half."""
    return kv[..., : kv.shape[-1] // 2]


def values_of(kv: torch.Tensor) -> torch.Tensor:
    """`[..., 2 * head_size]` to its second half."""
    return kv[..., kv.shape[-1] // 2 :]
