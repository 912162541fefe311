"""What a decode op is given: one structure, for every op and every implementation."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from tidal_vllm.kernels.workspace import Workspace


@dataclass(slots=True)
class DecodeArgs:
    """One layer's decode rows, the KV that they attend to, and where results go.

    A row is one query token of one decoding sequence. Which rows an op works on, and
    how long their sequences are, comes beside this as `seq_lens`, `[>= num_rows]`
    int32: 0 marks a row of padding (zeros are written), a negative length leaves a row
    out (nothing of it is read, and what the op writes keeps that row as it was).
    """

    query: torch.Tensor
    """`[num_rows, num_heads, head_size]` bf16, fp16 or fp32."""
    kv_cache: torch.Tensor
    """`[num_blocks, num_kv_heads, block_size, 2 * head_size]`, K then V of a token side
    by side, any strides but the last; the query's dtype, or fp8 e4m3. Query head h
    reads KV head h // (num_heads // num_kv_heads)."""
    block_table: torch.Tensor
    """`[>= num_rows, max_blocks_per_seq]` int32, physical KV blocks of a row's
    sequence."""
    output: torch.Tensor
    """Like query; written by the ops that attend."""
    scale: float
    """What a dot product of query and key is multiplied by."""
    workspace: Workspace = field(default_factory=Workspace)
    """Scratch of the engine; `lse` and `block_lse` are what one op leaves for the
    next."""
    select_block_size: int | None = None
    """Tokens of a selection block; divides block_size. None where nothing is selected:
    `dense_decode` then leaves no block_lse."""
    topk_blocks: torch.Tensor | None = None
    """`[>= num_rows, num_sets, max_blocks]` int32, the logical selection blocks of each
    set, ascending, then -1. A set is what neighbouring query heads attend to together,
    num_heads // num_sets of them; num_sets divides num_heads. Written where blocks are
    selected, read by `sparse_decode`."""
    topk_lens: torch.Tensor | None = None
    """`[>= num_rows, num_sets]` int32, how many blocks of a set are in use."""
    k_scale: float = 1.0
    """What the keys of an fp8 cache are multiplied by; 1 for others."""
    v_scale: float = 1.0
    """What the values of an fp8 cache are multiplied by; 1 for others."""


class Rule(Protocol):
    """How many tokens a set keeps: `tidal_vllm.plan.rule.SelectionRule`, in tokens."""

    @property
    def token_budget(self) -> int: ...

    @property
    def select_block_size(self) -> int: ...

    @property
    def sink_tokens(self) -> int: ...

    @property
    def recent_tokens(self) -> int: ...

    @property
    def sparse_threshold(self) -> int: ...


class DecodeOps(Protocol):
    """What an implementation has: four functions of the same arguments.

    `tidal_vllm.kernels.reference` defines what each means.
    """

    def dense_decode(self, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        """Attend to whole sequences, into output, workspace.lse and .block_lse."""

    def score_blocks(self, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        """Leave the workspace.lse and .block_lse of `dense_decode`; V is not read."""

    def select_blocks(
        self, args: DecodeArgs, seq_lens: torch.Tensor, rule: Rule
    ) -> None:
        """Fill topk_blocks and topk_lens with the heaviest blocks of the workspace."""

    def sparse_decode(self, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        """Attend to the blocks of topk_blocks, into output and workspace.lse."""
