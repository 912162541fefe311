"""The Triton kernels of the decode ops, and what they cover."""

import torch

from tidal_vllm.kernels.checks import QUERY_DTYPES
from tidal_vllm.kernels.triton.attend import (
    INTERPRETED,
    dense_decode,
    fits,
    score_blocks,
    sparse_decode,
)
from tidal_vllm.kernels.triton.select import select_blocks

__all__ = ["dense_decode", "score_blocks", "select_blocks", "sparse_decode", "why_not"]

MAX_HEAD_SIZE = 256


def why_not(case) -> str:
    """What of a `dispatch.Case` is not covered, and what is; empty if all is."""
    device, dtype = case.device, case.dtype
    if device.type == "cpu" and not INTERPRETED:
        return "a CPU: allowed under Triton's interpreter only (TRITON_INTERPRET=1)"
    if dtype not in QUERY_DTYPES:
        return f"dtype = {dtype}: allowed {', '.join(map(str, QUERY_DTYPES))}"
    if not case.fp8 and case.cache_dtype is not dtype:
        return (
            f"kv_cache_dtype = {case.kv_cache_dtype} beside {dtype}: allowed 'auto', "
            "the same dtype, 'fp8' or 'fp8_e4m3'"
        )
    if not 1 <= case.head_size <= MAX_HEAD_SIZE:
        return f"head_size = {case.head_size}: allowed 1 to {MAX_HEAD_SIZE}"
    size = case.select_block_size or 1
    if not fits(case.head_size, size, dtype.itemsize):
        return (
            f"select_block_size = {size} at head_size {case.head_size} and {dtype}: "
            "K and V of a block must fit into 64 KiB"
        )
    if device.type == "cuda" and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            found = ".".join(map(str, capability))
            return f"compute capability {found}: allowed 8.0 and above"
    return ""
