"""The operations on the paged KV cache, dispatched to what can run them.

Each op means what `reference` says. The decode ops run through `Kernels`, chosen once
per engine by `choose`; writing KV and extending run on PyTorch, here for the CPU.
"""

from tidal_vllm.kernels.dispatch import Kernels, choose, describe
from tidal_vllm.kernels.reference.decode import (
    dense_decode,
    dense_extend,
    merge_states,
    score_blocks,
    select_blocks,
    sparse_decode,
    write_kv,
)
from tidal_vllm.kernels.workspace import Workspace

__all__ = [
    "Kernels",
    "Workspace",
    "choose",
    "dense_decode",
    "dense_extend",
    "describe",
    "merge_states",
    "score_blocks",
    "select_blocks",
    "sparse_decode",
    "write_kv",
]
