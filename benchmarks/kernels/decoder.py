"""The decode ops of one implementation on a batch, with their checks."""

import copy
import os
from dataclasses import dataclass, replace

import torch

from benchmarks.kernels.decode_batch import DecodeBatch, Shape
from tidal_vllm.kernels import DecodeArgs, Kernels, Workspace, choose, reference
from tidal_vllm.plan.rule import SelectionRule, num_sets


@dataclass
class Decoder:
    """The decode ops on one batch, with the buffers that they need.

    Each op takes lengths of its own, `lens`, which leave rows out where negative. By
    default these are the lengths of the batch.
    """

    decodes: DecodeBatch
    rule: SelectionRule
    kernels: Kernels
    scope: str = "sequence"

    def __post_init__(self) -> None:
        decodes, shape = self.decodes, self.decodes.shape
        device, longest = decodes.query.device, self.rule.num_blocks(decodes.context)
        sets = num_sets(self.scope, shape.num_heads, shape.num_kv_heads)
        workspace = self.kernels.allocate_workspace(
            decodes.num_rows, shape.num_heads, sets, shape.head_size, longest, device
        )
        kept = min(self.rule.budget_blocks, longest)
        blocks = torch.full((decodes.num_rows, sets, kept), -1, dtype=torch.int32)
        self.args = DecodeArgs(
            query=decodes.query,
            kv_cache=decodes.kv_cache,
            block_table=decodes.block_table,
            output=torch.empty_like(decodes.query),
            scale=decodes.scale,
            workspace=workspace,
            select_block_size=self.rule.select_block_size,
            topk_blocks=blocks.to(device),
            topk_lens=torch.zeros(
                decodes.num_rows, sets, dtype=torch.int32, device=device
            ),
        )
        self.nobody = torch.full_like(decodes.seq_lens, -1)
        """Lengths that leave all rows out."""

    def over(self, decodes: DecodeBatch) -> "Decoder":
        """The same buffers, selection included, over another KV cache."""
        other = copy.copy(self)
        other.decodes = decodes
        other.args = replace(
            self.args,
            query=decodes.query,
            kv_cache=decodes.kv_cache,
            block_table=decodes.block_table,
        )
        return other

    def dense(
        self, keep_scores: bool = False, lens: torch.Tensor | None = None
    ) -> None:
        """`dense_decode`; with `keep_scores` also block_lse, as a SELECT layer."""
        args = self.args
        if not keep_scores:
            args = replace(args, select_block_size=None)
        self.kernels.ops.dense_decode(args, self._lens(lens))

    def score(self, lens: torch.Tensor | None = None) -> None:
        self.kernels.ops.score_blocks(self.args, self._lens(lens))

    def select(self, lens: torch.Tensor | None = None) -> None:
        self.kernels.ops.select_blocks(self.args, self._lens(lens), self.rule)

    def sparse(self, lens: torch.Tensor | None = None) -> None:
        self.kernels.ops.sparse_decode(self.args, self._lens(lens))

    def check(self) -> None:
        """Raise unless all ops are right on this batch."""
        self.dense()
        self.decodes.check_dense(self.args.output)
        self.dense(keep_scores=True)
        self.decodes.check_dense(self.args.output)
        self.select()
        self._check_selection()
        self.score()
        self.select()
        self._check_selection()
        self.args.output.zero_()
        self.sparse()
        self.check_sparse()

    def check_sparse(self) -> None:
        """Raise unless the output is attention to the blocks that are selected."""
        self.decodes.check_sparse(self.args.output, self.args)

    def _check_selection(self) -> None:
        """Raise unless the sets are the reference's, given the same block_lse."""
        args, lens = self.args, self.decodes.seq_lens
        longest = self.rule.num_blocks(int(lens.max()))
        block_lse = args.workspace.block_lse[: self.decodes.num_rows, :, :longest]
        lse = args.workspace.lse[: self.decodes.num_rows]
        exact = self.decodes.oracle(0, self.rule.select_block_size).workspace
        torch.testing.assert_close(lse[:1], exact.lse, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(block_lse[:1], exact.block_lse, atol=2e-2, rtol=1e-3)
        wanted = replace(
            args,
            workspace=Workspace(lse=lse, block_lse=block_lse),
            topk_blocks=torch.full_like(args.topk_blocks, -1),
            topk_lens=torch.zeros_like(args.topk_lens),
        )
        reference.select_blocks(wanted, lens, self.rule)
        assert torch.equal(args.topk_lens, wanted.topk_lens), "wrong number of blocks"
        if self.kernels.name == "reference":
            assert torch.equal(args.topk_blocks, wanted.topk_blocks)
            return
        _require_same_sets(args.topk_blocks, wanted.topk_blocks, block_lse, lse)

    def _lens(self, lens: torch.Tensor | None) -> torch.Tensor:
        return self.decodes.seq_lens if lens is None else lens


def _require_same_sets(
    found: torch.Tensor,
    wanted: torch.Tensor,
    block_lse: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Raise unless sets are equal, but for blocks whose masses differ by rounding."""
    num_sets, num_heads = found.shape[1], block_lse.shape[1]
    for row, set_id in (found != wanted).any(-1).nonzero().tolist():
        first, end = (i * num_heads // num_sets for i in (set_id, set_id + 1))
        heads = slice(first, end)
        mass = (block_lse[row, heads] - lse[row, heads, None]).exp().sum(0)
        one, other = ({*blocks[row, set_id].tolist()} for blocks in (found, wanted))
        gained, lost = (mass[sorted(part)].sum() for part in (one - other, other - one))
        assert abs(gained - lost) <= 1e-4 * mass.sum(), f"row {row} chose otherwise"


def stands_in(name: str, device: torch.device) -> bool:
    """Whether the reference stands in for an implementation.

    On a CPU, for what needs a GPU: CUDA, and Triton without its interpreter.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cpu" and not (name == "triton" and interpreted)


def kernels_here(shape: Shape, name: str, device: torch.device) -> Kernels:
    """An implementation of the decode ops.

    Raises:
        TidalConfigError: It does not run here; the message says why.
    """
    if stands_in(name, device):
        name = "reference"
    return choose(
        device,
        requested=name,
        head_size=shape.head_size,
        dtype=getattr(torch, shape.dtype),
        kv_cache_dtype=shape.kv_cache_dtype,
    )
