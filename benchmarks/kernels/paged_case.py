"""Decoding sequences over a shuffled paged KV cache, and what is right for them."""

import copy
from dataclasses import dataclass

import torch

from benchmarks.kernels.timing import Bench
from tidal_vllm import kernels as ops
from tidal_vllm.kernels import reference
from tidal_vllm.plan.rule import SelectionRule, num_sets
from tidal_vllm.validators import TidalConfigError


@dataclass
class Shape:
    """The model's part of a case; Llama 3.1 8B by default."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return self.num_kv_heads * 2 * self.head_size * 2


@dataclass
class Case:
    """A batch of decodes, each over `context` tokens, at shuffled physical blocks."""

    shape: Shape
    batch: int
    context: int
    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def make(
        cls, shape: Shape, batch: int, context: int, device: torch.device
    ) -> "Case":
        """In layout LBNHC, vLLM's default; the last block of a row is not full."""
        dtype, size = getattr(torch, shape.dtype), shape.block_size
        per_row = -(-context // size)
        num_blocks = batch * per_row + 1  # block 0 is vLLM's null block
        heads, width = shape.num_kv_heads, 2 * shape.head_size
        physical = torch.empty(
            num_blocks, size, heads, width, dtype=dtype, device=device
        )
        for part in physical.split(4096):
            part.normal_()
        table = 1 + torch.randperm(num_blocks - 1, dtype=torch.int32, device=device)
        lens = torch.full((batch,), context - 5, dtype=torch.int32, device=device)
        query_shape = (batch, shape.num_heads, shape.head_size)
        return cls(
            shape=shape,
            batch=batch,
            context=context,
            query=torch.randn(query_shape, dtype=dtype, device=device),
            kv_cache=physical.transpose(1, 2),
            block_table=table.view(batch, per_row),
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
            "batch": self.batch,
            "context": self.context,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_size": shape.head_size,
            "block_size": shape.block_size,
            "dtype": shape.dtype,
        }

    def rows(self) -> list[int]:
        """Those that are checked: the oracle takes its time."""
        return sorted({0, self.batch // 2, self.batch - 1})

    def check_dense(self, output: torch.Tensor) -> None:
        """Raise unless a batch's output is dense attention."""
        for row in self.rows():
            wanted, _, _ = self.oracle(row)
            _require_close(output[row], wanted[0])

    def check_sparse(
        self, output: torch.Tensor, topk_blocks, topk_lens, size: int
    ) -> None:
        """Raise unless a batch's output is attention to the chosen blocks."""
        for row in self.rows():
            one = slice(row, row + 1)
            wanted, _ = reference.sparse_decode(
                self.query[one].float(),
                self.kv_cache,
                self.block_table[one],
                topk_blocks[one],
                topk_lens[one],
                self.seq_lens[one],
                scale=self.scale,
                select_block_size=size,
            )
            _require_close(output[row], wanted[0])

    def oracle(self, row: int, select_block_size: int | None = None):
        """`reference.dense_decode` of one row, in fp32."""
        one = slice(row, row + 1)
        return reference.dense_decode(
            self.query[one].float(),
            self.kv_cache,
            self.block_table[one],
            self.seq_lens[one],
            scale=self.scale,
            select_block_size=select_block_size,
        )


def _require_close(output: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within twice the rounding of the output's dtype, and a little."""
    assert not output.isnan().any(), "NaN in the output"
    rounding = (wanted.to(output.dtype).float() - wanted).abs().max()
    error = (output.float() - wanted).abs().max()
    allowed = 2 * rounding + 2e-3
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"


def rule_of(
    token_budget: int, select_block_size: int = 16, recent_fraction: float = 0.25
) -> SelectionRule:
    """The rule of TIDAL's default settings at a budget."""
    return SelectionRule(
        token_budget=token_budget,
        select_block_size=select_block_size,
        sink_tokens=4,
        recent_tokens=max(1, int(token_budget * recent_fraction)),
        sparse_threshold=token_budget,
    )


@dataclass
class Decoder:
    """Our ops on one case, with the buffers that they need.

    The ops take other lengths than the case's, to leave rows out.
    """

    case: Case
    rule: SelectionRule
    kernels: ops.Kernels
    scope: str = "sequence"

    def __post_init__(self) -> None:
        case, shape = self.case, self.case.shape
        device, longest = case.query.device, self.rule.num_blocks(case.context)
        sets = num_sets(self.scope, shape.num_heads, shape.num_kv_heads)
        self.workspace = self.kernels.allocate_workspace(
            case.batch, shape.num_heads, sets, shape.head_size, longest, device
        )
        kept = min(self.rule.budget_blocks, longest)
        blocks = torch.full((case.batch, sets, kept), -1, dtype=torch.int32)
        self.topk_blocks = blocks.to(device)
        self.topk_lens = torch.zeros(case.batch, sets, dtype=torch.int32, device=device)
        self.output = torch.empty_like(case.query)
        self.nobody = torch.full_like(case.seq_lens, -1)
        """Lengths that leave all rows out."""

    def over(self, case: Case) -> "Decoder":
        """The same buffers, selection included, over another KV cache."""
        other = copy.copy(self)
        other.case = case
        return other

    def dense(self, keep: bool = False, lens: torch.Tensor | None = None) -> None:
        """`dense_decode`; with `keep`, also block_lse, as a SELECT layer does."""
        size = self.rule.select_block_size if keep else None
        self.kernels.dense_decode(*self._sequences(lens), **self._more(size))

    def score(self, lens: torch.Tensor | None = None) -> None:
        more = self._more(self.rule.select_block_size)
        del more["output"]
        self.kernels.score_blocks(*self._sequences(lens), **more)

    def select(self, lens: torch.Tensor | None = None) -> None:
        self.kernels.select_blocks(
            self.case.seq_lens if lens is None else lens,
            rule=self.rule,
            workspace=self.workspace,
            topk_blocks=self.topk_blocks,
            topk_lens=self.topk_lens,
        )

    def sparse(self, lens: torch.Tensor | None = None) -> None:
        query, cache, table, lens = self._sequences(lens)
        chosen = (self.topk_blocks, self.topk_lens)
        more = self._more(self.rule.select_block_size)
        self.kernels.sparse_decode(query, cache, table, *chosen, lens, **more)

    def check(self) -> None:
        """Raise unless all ops are right on this case."""
        size = self.rule.select_block_size
        self.dense()
        self.case.check_dense(self.output)
        self.dense(keep=True)
        self.case.check_dense(self.output)
        self.select()
        self._check_selection()
        self.score()
        self.select()
        self._check_selection()
        self.output.zero_()
        self.sparse()
        self.case.check_sparse(self.output, self.topk_blocks, self.topk_lens, size)

    def _check_selection(self) -> None:
        """The sets are exactly the reference's, given the same block_lse."""
        wanted = torch.full_like(self.topk_blocks, -1)
        counts = torch.zeros_like(self.topk_lens)
        lens = self.case.seq_lens
        longest = self.rule.num_blocks(int(lens.max()))
        block_lse = self.workspace.block_lse[: self.case.batch, :, :longest]
        lse = self.workspace.lse[: self.case.batch]
        _, lse0, block_lse0 = self.case.oracle(0, self.rule.select_block_size)
        torch.testing.assert_close(lse[:1], lse0, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(block_lse[:1], block_lse0, atol=2e-2, rtol=1e-3)
        reference.select_blocks(
            block_lse,
            lse,
            lens,
            rule=self.rule,
            topk_blocks=wanted,
            topk_lens=counts,
        )
        assert torch.equal(self.topk_lens, counts), "wrong number of blocks"
        if self.kernels.name == "reference":
            assert torch.equal(self.topk_blocks, wanted)
            return
        _require_same_sets(self.topk_blocks, wanted, block_lse, lse)

    def _sequences(self, lens: torch.Tensor | None):
        case = self.case
        lens = case.seq_lens if lens is None else lens
        return case.query, case.kv_cache, case.block_table, lens

    def _more(self, select_block_size: int | None) -> dict:
        return {
            "scale": self.case.scale,
            "output": self.output,
            "workspace": self.workspace,
            "select_block_size": select_block_size,
        }


def _require_same_sets(found, wanted, block_lse, lse) -> None:
    """Equal but for blocks whose masses differ by rounding only."""
    num_sets, heads = found.shape[1], block_lse.shape[1]
    for row, set_ in (found != wanted).any(-1).nonzero().tolist():
        group = slice(set_ * heads // num_sets, (set_ + 1) * heads // num_sets)
        mass = (block_lse[row, group] - lse[row, group, None]).exp().sum(0)
        one, other = ({*t[row, set_].tolist()} for t in (found, wanted))
        gained, lost = (mass[sorted(part)].sum() for part in (one - other, other - one))
        assert abs(gained - lost) <= 1e-4 * mass.sum(), f"row {row} chose otherwise"


def kernels_here(bench: Bench, shape: Shape, asked: list[str] | None):
    """Our implementations that run on this machine; says why others do not."""
    found = []
    for name in asked or ["cuda", "triton"]:
        try:
            kernels = ops.choose(
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
