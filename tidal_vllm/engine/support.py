"""What a device can run: dtypes, KV cache layouts, head sizes, block sizes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Support:
    """What one kind of device can do.

    On a GPU the dense backend and the kernels have a say too, once the model is known.
    """

    dtypes: tuple[torch.dtype, ...]
    kv_cache_dtypes: tuple[str, ...]
    layout: KVCacheLayout
    """The preferred one. Any is read right."""
    block_size: int
    """Tokens; what a KV block must be a multiple of."""
    default_block_size: int
    """Tokens of a KV block where the user does not say."""
    head_sizes: tuple[int, ...] = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


ON_CPU = Support(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    kv_cache_dtypes=("auto", "float16", "bfloat16"),
    # The PyTorch ops read a head's block as one run; heads side by side cost them a
    # quarter more (benchmarks/kernels/bench_reference_ops.py).
    layout=KVCacheLayout.LBHNC,
    block_size=1,
    default_block_size=128,
)
ON_GPU = Support(
    dtypes=(torch.bfloat16, torch.float16),
    kv_cache_dtypes=("auto", "float16", "bfloat16", "fp8", "fp8_e4m3"),
    # All heads of a token side by side: a set that they share is read in long runs.
    layout=KVCacheLayout.LBNHC,
    block_size=16,
    default_block_size=16,
)


def supported_here() -> Support:
    return ON_CPU if current_platform.device_type == "cpu" else ON_GPU


def kv_block_size(vllm_config: "VllmConfig") -> int:
    """Tokens of a KV block, as far as the config tells.

    NOTE: vLLM 0.33 makes up its mind once the model is loaded, where the user did not
    say. Until then the config holds a default that may be another.
    """
    cache = vllm_config.cache_config
    if cache.user_specified_block_size or cache.block_size != cache.DEFAULT_BLOCK_SIZE:
        return cache.block_size
    return supported_here().default_block_size
