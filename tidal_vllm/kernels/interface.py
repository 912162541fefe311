"""What an engine knows of the decode ops that run in it, and what it asked of them."""

from dataclasses import dataclass

import torch

from tidal_vllm.kernels.arguments import DecodeOps
from tidal_vllm.kernels.workspace import Workspace

FP8_CACHES = ("fp8", "fp8_e4m3")
_CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Requirements:
    """What an engine will ask of the ops, as far as an implementation may care."""

    device: torch.device
    head_size: int
    dtype: torch.dtype
    """The query's."""
    kv_cache_dtype: str
    """As in vLLM's configuration: "auto" is `dtype`."""
    select_block_size: int | None = None
    """Tokens; None where nothing is selected."""

    @property
    def fp8(self) -> bool:
        return self.kv_cache_dtype in FP8_CACHES

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """The KV cache's dtype, where it is one of torch's plain floats."""
        if self.kv_cache_dtype == "auto":
            return self.dtype
        return _CACHE_DTYPES.get(self.kv_cache_dtype)


@dataclass(frozen=True)
class Kernels:
    """The decode ops of one engine, and what is to be known about them.

    Attributes:
        name: "reference", "triton" or "cuda".
        reason: One line for the doctor and the start-up table: what runs, and what was
            passed over.
        ops: The module with the ops; `tidal_vllm.kernels.arguments` says what they
            take. A row of a negative length is left out of an op, so several ops can
            share a batch and its output, and the device decides, within one CUDA
            graph, which rows an op works on.
        capturable: Whether a CUDA graph can hold the ops. The reference ops read
            lengths on the host.
        advice: What would make faster kernels run here, or newer ones, and how;
            mostly empty.
    """

    name: str
    reason: str
    ops: DecodeOps
    capturable: bool = False
    advice: str = ""

    def allocate_workspace(
        self,
        max_num_rows: int,
        num_heads: int,
        num_sets: int,
        head_size: int,
        max_blocks: int,
        device: torch.device,
    ) -> Workspace:
        """What these ops need of `Workspace.allocate`; the reference needs nothing."""
        if not self.capturable:
            return Workspace()
        return Workspace.allocate(
            max_num_rows, num_heads, num_sets, head_size, max_blocks, device
        )
