"""FlashAttention as vLLM ships it: from vLLM, or alone, from a pack.

The pack (`benchmarks/gpu/pack.py`) holds vLLM's `flash_attn_interface.py` and the
compiled module beside it as the package `vllm_flash_attn`; neither imports the rest of
vLLM until asked for other versions.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from tidal_vllm.kernels import DecodeArgs, reference

PACKED = "vllm_flash_attn.flash_attn_interface"


@dataclass(frozen=True)
class FlashAttention:
    """The two functions of the interface that decoding needs, and which version."""

    attend: Callable[..., object]
    schedule: Callable[..., torch.Tensor | None]
    version: int


def load(device: torch.device, head_size: int) -> FlashAttention:
    """The version that vLLM takes on this GPU, of a pack if there is one.

    On a CPU a stand-in: the arguments are checked against the interface's signatures,
    and the reference computes the output.

    Raises:
        ImportError: Neither a pack nor vLLM is here.
        RuntimeError: FlashAttention does not run on this GPU.
    """
    try:
        interface = importlib.import_module(PACKED)
        packed = True
    except ModuleNotFoundError:
        interface = importlib.import_module("vllm." + PACKED)
        packed = False
    if device.type == "cpu":
        return _stand_in(interface)
    version: int | None = 3
    if not packed:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=head_size)
    elif not interface.FA3_AVAILABLE:
        raise RuntimeError(
            f"FlashAttention 3 does not load: {interface.FA3_UNAVAILABLE_REASON}"
        )
    elif torch.cuda.get_device_capability(device)[0] != 9:
        raise RuntimeError("FlashAttention 3 runs on compute capability 9.x only")
    if version is None:
        raise RuntimeError("vLLM's FlashAttention does not load here")
    return FlashAttention(
        interface.flash_attn_varlen_func, interface.get_scheduler_metadata, version
    )


def _stand_in(interface: ModuleType) -> FlashAttention:
    takes = inspect.signature(interface.flash_attn_varlen_func)
    plans = inspect.signature(interface.get_scheduler_metadata)

    def attend(**given: torch.Tensor) -> None:
        takes.bind(**given)
        cache = torch.cat([given["k"], given["v"]], -1).transpose(1, 2)
        args = DecodeArgs(
            query=given["q"],
            kv_cache=cache,
            block_table=given["block_table"],
            output=given["out"],
            scale=given["softmax_scale"],
        )
        reference.dense_decode(args, given["seqused_k"])

    def schedule(**given: object) -> None:
        plans.bind(**given)

    return FlashAttention(attend, schedule, 3)
