"""The operations on the paged KV cache, dispatched to what can run them.

Each op means what `reference` says. Today the reference is also the only
implementation: PyTorch, on whatever device the tensors are.
"""

import torch

from tidal_vllm.ops.reference import (
    dense_decode,
    dense_extend,
    merge_states,
    select_blocks,
    sparse_decode,
    write_kv,
)

__all__ = [
    "dense_decode",
    "dense_extend",
    "describe",
    "merge_states",
    "select_blocks",
    "sparse_decode",
    "write_kv",
]


def describe(device: torch.device) -> str:
    """One line on which implementation runs on a device."""
    if device.type == "cpu":
        return "PyTorch reference ops (CPU)"
    return (
        f"PyTorch reference ops on {device.type}: correct, not fast, "
        "and not yet run on a GPU"
    )
