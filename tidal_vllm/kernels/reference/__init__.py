"""The ops in plain PyTorch: what they mean, and what runs on the CPU."""

from tidal_vllm.kernels.reference.decode import (
    dense_decode,
    dense_extend,
    merge_states,
    score_blocks,
    select_blocks,
    sparse_decode,
    write_kv,
)

__all__ = [
    "dense_decode",
    "dense_extend",
    "merge_states",
    "score_blocks",
    "select_blocks",
    "sparse_decode",
    "write_kv",
]
