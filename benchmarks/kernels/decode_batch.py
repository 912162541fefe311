"""Decoding sequences over a shuffled paged KV cache, and what is right for them."""

import argparse
import copy
from dataclasses import dataclass, replace

import torch

from benchmarks.kernels.timing import Bench
from tidal_vllm.config import TidalConfig
from tidal_vllm.kernels import DecodeArgs, Kernels, Workspace, choose, reference
from tidal_vllm.plan.rule import SelectionRule, num_sets
from tidal_vllm.validators import TidalConfigError


@dataclass
class Shape:
    """The shape of a model's attention; that of Llama 3.1 8B by default."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return self.num_kv_heads * 2 * self.head_size * 2


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that a script measures; a tiny one with `--smoke`."""
    tiny = (4, 2, 32) if args.smoke else ()
    return Shape(*tiny, dtype=args.dtype)


@dataclass
class DecodeBatch:
    """A batch of decodes, each over `context` tokens, at shuffled physical blocks."""

    shape: Shape
    num_rows: int
    context: int
    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def make(
        cls, shape: Shape, num_rows: int, context: int, device: torch.device
    ) -> "DecodeBatch":
        """A batch in layout LBNHC, vLLM's default, whose last blocks are not full."""
        dtype, size = getattr(torch, shape.dtype), shape.block_size
        per_row = -(-context // size)
        num_blocks = num_rows * per_row + 1  # block 0 is vLLM's null block
        heads, width = shape.num_kv_heads, 2 * shape.head_size
        physical = torch.empty(
            num_blocks, size, heads, width, dtype=dtype, device=device
        )
        for part in physical.split(4096):
            part.normal_()
        table = 1 + torch.randperm(num_blocks - 1, dtype=torch.int32, device=device)
        lens = torch.full((num_rows,), context - 5, dtype=torch.int32, device=device)
        query_shape = (num_rows, shape.num_heads, shape.head_size)
        return cls(
            shape=shape,
            num_rows=num_rows,
            context=context,
            query=torch.randn(query_shape, dtype=dtype, device=device),
            kv_cache=physical.transpose(1, 2),
            block_table=table.view(num_rows, per_row),
            seq_lens=lens,
        )

    @property
    def scale(self) -> float:
        return self.shape.head_size**-0.5

    @property
    def dense_bytes(self) -> int:
        """K and V of all tokens, once."""
        return int(self.seq_lens.sum()) * self.shape.token_bytes

    def sparse_bytes(self, rule: SelectionRule) -> int:
        """K and V of the kept tokens, once."""
        kept = sum(map(rule.kept_tokens, self.seq_lens.tolist()))
        return kept * self.shape.token_bytes

    def describe(self) -> dict:
        shape = self.shape
        return {
            "batch": self.num_rows,
            "context": self.context,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_size": shape.head_size,
            "block_size": shape.block_size,
            "dtype": shape.dtype,
        }

    def rows(self) -> list[int]:
        """The rows that are checked; the oracle takes too long for all of them."""
        return sorted({0, self.num_rows // 2, self.num_rows - 1})

    def check_dense(self, output: torch.Tensor) -> None:
        """Raise unless a batch's output is dense attention."""
        for row in self.rows():
            _require_close(output[row], self.oracle(row).output[0])

    def check_sparse(self, output: torch.Tensor, made: DecodeArgs) -> None:
        """Raise unless a batch's output is attention to the blocks of `made`."""
        for row in self.rows():
            one = slice(row, row + 1)
            args = self._oracle_args(one, made.select_block_size)
            args.topk_blocks = made.topk_blocks[one]
            args.topk_lens = made.topk_lens[one]
            reference.sparse_decode(args, self.seq_lens[one])
            _require_close(output[row], args.output[0])

    def oracle(self, row: int, select_block_size: int | None = None) -> DecodeArgs:
        """One row after `reference.dense_decode`, in fp32."""
        one = slice(row, row + 1)
        args = self._oracle_args(one, select_block_size)
        reference.dense_decode(args, self.seq_lens[one])
        return args

    def _oracle_args(self, rows: slice, select_block_size: int | None) -> DecodeArgs:
        query = self.query[rows].float()
        return DecodeArgs(
            query=query,
            kv_cache=self.kv_cache,
            block_table=self.block_table[rows],
            output=torch.empty_like(query),
            scale=self.scale,
            select_block_size=select_block_size,
        )


def _require_close(output: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise unless an output is within twice the rounding of its dtype, and 2e-3."""
    assert not output.isnan().any(), "NaN in the output"
    rounding = (wanted.to(output.dtype).float() - wanted).abs().max()
    error = (output.float() - wanted).abs().max()
    allowed = 2 * rounding + 2e-3
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"


def default_rule(token_budget: int, select_block_size: int = 16) -> SelectionRule:
    """The rule of TIDAL's default settings at a budget, in tokens."""
    config = TidalConfig(token_budget=token_budget, select_block_size=select_block_size)
    return SelectionRule.from_config(config)


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


def kernels_here(bench: Bench, shape: Shape, asked: list[str] | None) -> list[Kernels]:
    """The implementations that run on this machine; prints why others do not."""
    found = []
    for name in asked or ["cuda", "triton"]:
        try:
            kernels = choose(
                bench.device,
                requested=name,
                head_size=shape.head_size,
                dtype=getattr(torch, shape.dtype),
            )
        except (TidalConfigError, ValueError) as error:
            bench.skip({}, name, error)
        else:
            found.append(kernels)
    return found
