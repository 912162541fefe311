"""The Triton kernels of the decode ops, and what they cover."""

import torch

from tidal_vllm.kernels.interface import Requirements
from tidal_vllm.kernels.triton.attend import (
    INTERPRETED,
    dense_decode,
    score_blocks,
    sparse_decode,
)
from tidal_vllm.kernels.triton.checks import QUERY_DTYPES
from tidal_vllm.kernels.triton.select import select_blocks
from tidal_vllm.kernels.triton.tiling import fits

__all__ = [
    "dense_decode",
    "score_blocks",
    "select_blocks",
    "sparse_decode",
    "uncovered",
]

MAX_HEAD_SIZE = 256


def uncovered(needed: Requirements) -> str:
    """What an engine needs and these kernels lack, and what is allowed; or ""."""
    device, dtype = needed.device, needed.dtype
    if device.type == "cpu" and not INTERPRETED:
        return "a CPU: allowed under Triton's interpreter only (TRITON_INTERPRET=1)"
    if dtype not in QUERY_DTYPES:
        return f"dtype = {dtype}: allowed {', '.join(map(str, QUERY_DTYPES))}"
    if not needed.fp8 and needed.cache_dtype is not dtype:
        return (
            f"kv_cache_dtype = {needed.kv_cache_dtype} beside {dtype}: allowed 'auto', "
            "the same dtype, 'fp8' or 'fp8_e4m3'"
        )
    if not 1 <= needed.head_size <= MAX_HEAD_SIZE:
        return f"head_size = {needed.head_size}: allowed 1 to {MAX_HEAD_SIZE}"
    size = needed.select_block_size or 1
    if not fits(needed.head_size, size, dtype.itemsize):
        return (
            f"select_block_size = {size} at head_size {needed.head_size} and {dtype}: "
            "K and V of a block must fit into 64 KiB"
        )
    if device.type == "cuda" and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            found = ".".join(map(str, capability))
            return f"compute capability {found}: allowed 8.0 and above"
    return ""
