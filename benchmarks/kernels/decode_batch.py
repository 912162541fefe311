"""Decoding sequences over a shuffled paged KV cache, and what is right for them."""

import argparse
from dataclasses import dataclass, field

import torch

from tidal_vllm.config import TidalConfig
from tidal_vllm.kernels import DecodeArgs, reference
from tidal_vllm.plan.rule import SelectionRule

FP8 = torch.float8_e4m3fn


@dataclass
class Shape:
    """The shape of a model's attention; that of Llama 3.1 8B by default."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    """As in vLLM: "auto" is `dtype`, "fp8" is e4m3, here with scales of 1."""

    @property
    def fp8(self) -> bool:
        return self.kv_cache_dtype == "fp8"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return self.num_kv_heads * 2 * self.head_size * (1 if self.fp8 else 2)


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that a script measures; a tiny one with `--smoke`."""
    tiny = (4, 2, 32) if args.smoke else ()
    stored = getattr(args, "kv_cache_dtype", "auto")
    return Shape(*tiny, dtype=args.dtype, kv_cache_dtype=stored)


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
    oracles: dict[tuple[int, int | None], DecodeArgs] = field(default_factory=dict)
    """What `oracle` gave, by row and select_block_size."""

    @classmethod
    def make(
        cls, shape: Shape, num_rows: int, context: int, device: torch.device
    ) -> "DecodeBatch":
        """A batch in layout LBNHC, vLLM's default, whose last blocks are not full."""
        dtype, size = getattr(torch, shape.dtype), shape.block_size
        per_row = -(-context // size)
        num_blocks = num_rows * per_row + 1  # block 0 is vLLM's null block
        heads, width = shape.num_kv_heads, 2 * shape.head_size
        stored = FP8 if shape.fp8 else dtype
        physical = torch.empty(
            num_blocks, size, heads, width, dtype=stored, device=device
        )
        fill_randomly(physical)
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
            "kv_cache_dtype": shape.kv_cache_dtype,
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
        """One row after `reference.dense_decode`, in fp32; computed once."""
        if (row, select_block_size) not in self.oracles:
            one = slice(row, row + 1)
            args = self._oracle_args(one, select_block_size)
            reference.dense_decode(args, self.seq_lens[one])
            args.kv_cache = self.kv_cache  # a copy of it would take much memory
            self.oracles[row, select_block_size] = args
        return self.oracles[row, select_block_size]

    def _oracle_args(self, rows: slice, select_block_size: int | None) -> DecodeArgs:
        """Of one row; the reference reads no fp8, so that row's blocks are widened."""
        query, table, cache = self.query[rows].float(), self.block_table[rows], None
        if self.shape.fp8:
            used = self.kv_cache[table[0].long()]
            cache, table = used.float(), torch.arange(table.shape[1])[None]
        return DecodeArgs(
            query=query,
            kv_cache=self.kv_cache if cache is None else cache,
            block_table=table.to(query.device, torch.int32),
            output=torch.empty_like(query),
            scale=self.scale,
            select_block_size=select_block_size,
        )


def fill_randomly(kv_cache: torch.Tensor) -> None:
    """Fill a cache `[num_blocks, ...]` with normal numbers, part by part."""
    for part in kv_cache.split(4096):
        if part.dtype is FP8:  # nothing draws random numbers in fp8
            part.copy_(torch.randn(part.shape, device=part.device))
        else:
            part.normal_()


def _require_close(output: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise unless an output is within twice the rounding of its dtype, and 2e-3."""
    assert not output.isnan().any(), "NaN in the output"
    rounding = (wanted.to(output.dtype).float() - wanted).abs().max()
    error = (output.float() - wanted).abs().max()
    allowed = 2 * rounding + 2e-3
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"


def default_rule(token_budget: int, select_block_size: int = 16) -> SelectionRule:
    """The rule of TIDAL's default settings but for budget and block size, tokens."""
    config = TidalConfig(token_budget=token_budget, select_block_size=select_block_size)
    return SelectionRule.from_config(config)
