"""The decode ops on the paged KV cache, and what can run them.

`choose` picks the implementation once per engine; all of them take one `DecodeArgs`.
`tidal_vllm.kernels.reference` defines what each op means, and has what the CPU needs
beside them: writing KV, and prefills.
"""

from tidal_vllm.kernels.arguments import DecodeArgs, DecodeOps
from tidal_vllm.kernels.choosing import choose, describe
from tidal_vllm.kernels.interface import Kernels, Requirements
from tidal_vllm.kernels.workspace import Workspace

__all__ = [
    "DecodeArgs",
    "DecodeOps",
    "Kernels",
    "Requirements",
    "Workspace",
    "choose",
    "describe",
]
