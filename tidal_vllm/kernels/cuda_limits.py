"""What the CUDA extension covers, known without loading its library."""

import torch

from tidal_vllm.kernels.interface import Requirements

HEAD_SIZES = (64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)
"""Compute capability of the oldest GPU that the extension runs on."""


def uncovered(needed: Requirements) -> str:
    """What an engine needs and the extension lacks, and what is allowed; or ""."""
    size = needed.select_block_size or 1
    if needed.dtype not in DTYPES:
        return f"dtype = {needed.dtype}: allowed {', '.join(map(str, DTYPES))}"
    if not needed.fp8 and needed.cache_dtype is not needed.dtype:
        return (
            f"kv_cache_dtype = {needed.kv_cache_dtype} beside {needed.dtype}: allowed "
            "'auto', the same dtype, 'fp8' or 'fp8_e4m3'"
        )
    if needed.head_size not in HEAD_SIZES:
        allowed = ", ".join(map(str, HEAD_SIZES))
        return f"head_size = {needed.head_size}: allowed {allowed}"
    if size not in (1, 2, 4, 8) and size % 16:
        return f"select_block_size = {size}: allowed 1, 2, 4, 8 and multiples of 16"
    capability = torch.cuda.get_device_capability(needed.device)
    if capability < OLDEST:
        found = ".".join(map(str, capability))
        return f"compute capability {found}: allowed 8.0 and above"
    return ""
