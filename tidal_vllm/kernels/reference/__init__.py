"""The ops in plain PyTorch: what every kernel means, and what runs on the CPU."""

from tidal_vllm.kernels.reference.decode import (
    dense_decode,
    score_blocks,
    sparse_decode,
)
from tidal_vllm.kernels.reference.prefill import dense_extend, write_kv
from tidal_vllm.kernels.reference.select import block_mass, select_blocks, top_blocks
from tidal_vllm.kernels.reference.softmax import merge_states

__all__ = [
    "block_mass",
    "dense_decode",
    "dense_extend",
    "merge_states",
    "score_blocks",
    "select_blocks",
    "sparse_decode",
    "top_blocks",
    "write_kv",
]
