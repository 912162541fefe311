"""Runs an op of any implementation on a batch, and judges what it gave.

A row that is left out must keep what was written before it; `dense`, `score`, `sparse`
and `select` check that. In what they return, such a row then looks like one of padding:
zeros, and -inf.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from tests.kernels import exact
from tests.kernels.batches import FP8, Batch, Sets, make_batch, without_values
from tests.kernels.conftest import INTERPRETED
from tests.kernels.naive import Positions
from tidal_vllm.kernels import (
    DecodeArgs,
    Requirements,
    Workspace,
    cuda_limits,
)
from tidal_vllm.kernels.arguments import Rule
from tidal_vllm.kernels.workspace import FIRST_DIGITS

KEPT = 42  # what rows that are left out hold, and must still hold after an op


@dataclass
class TestWorkspace(Workspace):
    """Scratch of as many splits, and as many rows too many, as a test wants."""

    __test__ = False

    def partials(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.partial_out, self.partial_lse


def make_workspace(
    batch: Batch, max_blocks: int = 0, splits: int = 4, poison: float = math.nan
) -> TestWorkspace:
    """Scratch full of `poison`; partial results have two rows too many."""
    num_rows, num_heads, head_size = batch.query.shape

    def full(*shape: int) -> torch.Tensor:
        return torch.full(shape, poison, device=batch.device)

    return TestWorkspace(
        lse=full(num_rows, num_heads),
        block_lse=full(num_rows, num_heads, max_blocks),
        partial_out=full(num_rows + 2, num_heads, splits, head_size),
        partial_lse=full(num_rows + 2, num_heads, splits),
        arrivals=make_arrivals(batch),
    )


def make_arrivals(batch: Batch) -> torch.Tensor:
    """The counters of the CUDA kernels, for two rows too many."""
    shape = (batch.query.shape[0] + 2, batch.query.shape[1])
    return torch.zeros(shape, dtype=torch.int32, device=batch.device)


def make_output(batch: Batch, poison: float, strided: bool) -> torch.Tensor:
    num_rows, num_heads, head_size = batch.query.shape
    shape = (num_rows, num_heads + (3 if strided else 0), head_size)
    output = torch.full(shape, poison, dtype=batch.query.dtype, device=batch.device)
    return output[:, :num_heads]


def batch_on(
    device: torch.device,
    lens: Sequence[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    **others,
) -> Batch:
    """`make_batch` where the kernels run; with fp8, over a cache in e4m3."""
    cache_dtype = FP8 if fp8 else dtype
    return make_batch(lens, dtype=cache_dtype, query_dtype=dtype, **others).to(device)


def dense(
    kernels: ModuleType,
    batch: Batch,
    size: int | None = None,
    splits: int = 4,
    poison: float = math.nan,
    strided: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The output, lse and block_lse of `dense_decode`.

    Args:
        size: The select_block_size; None for no block_lse.
        splits: Most splits of one row.
        poison: What the workspace and the output hold before.
        strided: Whether the output has room between its rows.
    """
    args = batch.args(
        output=make_output(batch, poison, strided),
        workspace=make_workspace(batch, _room(batch, size), splits, poison),
        select_block_size=size,
    )
    _attend(kernels, kernels.dense_decode, args, batch.seq_lens)
    lse, block_lse = args.workspace.lse, args.workspace.block_lse
    return args.output, lse, None if size is None else block_lse


def score(
    kernels: ModuleType,
    batch: Batch,
    size: int,
    splits: int = 4,
    poison: float = math.nan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lse and block_lse of `score_blocks`, over a cache whose values are NaN."""
    args = batch.args(
        kv_cache=without_values(batch.kv_cache),
        workspace=make_workspace(batch, _room(batch, size), splits, poison),
        select_block_size=size,
    )
    args.output.fill_(KEPT)
    _attend(kernels, kernels.score_blocks, args, batch.seq_lens)
    assert (args.output[batch.seq_lens >= 0] == KEPT).all(), "wrote the output"
    return args.workspace.lse, args.workspace.block_lse


def sparse(
    kernels: ModuleType,
    batch: Batch,
    sets: Sets,
    size: int,
    splits: int = 4,
    poison: float = math.nan,
    strided: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse of `sparse_decode` over `sets`."""
    args = batch.args(
        sets,
        output=make_output(batch, poison, strided),
        workspace=make_workspace(batch, splits=splits, poison=poison),
        select_block_size=size,
    )
    _attend(kernels, kernels.sparse_decode, args, batch.seq_lens)
    return args.output, args.workspace.lse


def select(
    kernels: ModuleType,
    block_lse: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: list[int],
    rule: Rule,
    num_sets: int = 1,
    max_blocks: int | None = None,
) -> list[list[list[int]] | None]:
    """The blocks [row][set] that `select_blocks` keeps; None for a row left out.

    Checks that behind them topk_blocks is -1, that all sets of a row keep as many, and
    that rows beyond the batch stay as they were.

    Args:
        max_blocks: Columns of topk_blocks; as many as there are blocks when absent.
    """
    args = selection_args(block_lse, lse, num_sets, max_blocks)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=block_lse.device)
    kernels.select_blocks(args, lens, rule)
    return chosen_blocks(args, seq_lens)


def chosen_blocks(
    args: DecodeArgs, seq_lens: list[int]
) -> list[list[list[int]] | None]:
    """The topk_blocks of `selection_args` after an op, with the checks of `select`."""
    topk_blocks, topk_lens = args.topk_blocks.cpu(), args.topk_lens.cpu()
    num_rows = len(seq_lens)
    assert (topk_blocks[num_rows:] == KEPT).all()
    assert (topk_lens[num_rows:] == KEPT).all()
    assert not args.workspace.digit_counts.any(), "the next op counts from zero"
    found = []
    for row, seq_len in enumerate(seq_lens):
        if seq_len < 0:
            assert (topk_blocks[row] == KEPT).all() and (topk_lens[row] == KEPT).all()
            found.append(None)
            continue
        kept = int(topk_lens[row, 0])
        assert (topk_lens[row] == kept).all()
        assert (topk_blocks[row, :, kept:] == -1).all(), "tail"
        found.append(topk_blocks[row, :, :kept].tolist())
    return found


def selection_args(
    block_lse: torch.Tensor,
    lse: torch.Tensor,
    num_sets: int = 1,
    max_blocks: int | None = None,
) -> DecodeArgs:
    """Arguments of `select_blocks`, with two rows more than the batch has.

    Args:
        block_lse: `[num_rows, num_heads, num_blocks]`.
        lse: `[num_rows, num_heads]`.
    """
    num_rows, num_heads, num_blocks = block_lse.shape
    device, rows = block_lse.device, num_rows + 2
    batch = make_batch([0] * num_rows, num_kv_heads=1, group=num_heads).to(device)
    columns = num_blocks if max_blocks is None else max_blocks
    int32 = dict(dtype=torch.int32, device=device)
    mass = torch.full((rows, num_sets, num_blocks), math.nan, device=device)
    workspace = Workspace(lse=lse, block_lse=block_lse, mass=mass)
    workspace.arrivals = make_arrivals(batch)
    workspace.digit_counts = torch.zeros(rows, num_sets, FIRST_DIGITS, **int32)
    return batch.args(
        workspace=workspace,
        topk_blocks=torch.full((rows, num_sets, columns), KEPT, **int32),
        topk_lens=torch.full((rows, num_sets), KEPT, **int32),
    )


def _room(batch: Batch, size: int | None) -> int:
    """Columns of block_lse, one too many; for a size that cannot be, any number."""
    return 0 if not size or size < 1 else -(-batch.longest // size) + 1


def _attend(
    kernels: ModuleType,
    op: Callable[[DecodeArgs, torch.Tensor], None],
    args: DecodeArgs,
    seq_lens: torch.Tensor,
) -> None:
    """Run an op, which must not write a row that is left out."""
    _skip_uncovered(kernels, args)
    left_out = seq_lens < 0
    written = (args.output, args.workspace.lse, args.workspace.block_lse)
    for tensor in written:
        tensor[left_out] = KEPT
    op(args, seq_lens)
    for tensor in written:
        assert (tensor[left_out] == KEPT).all(), "wrote a row that is left out"
    args.output[left_out] = 0.0
    found = (args.workspace.lse, args.workspace.block_lse)
    for given, sums in zip(written[1:], found, strict=True):
        if sums is given:  # the reference puts tensors of its own there, with -inf
            sums[left_out] = -math.inf


def _skip_uncovered(kernels: ModuleType, args: DecodeArgs) -> None:
    """CUDA covers less than Triton, and then Triton runs."""
    if not kernels.__name__.endswith(".cuda"):
        return
    query, cache = args.query, args.kv_cache
    needed = Requirements(
        device=query.device,
        head_size=query.shape[2],
        dtype=query.dtype,
        kv_cache_dtype="fp8" if cache.dtype is FP8 else "auto",
        select_block_size=args.select_block_size,
    )
    reason = cuda_limits.uncovered(needed)
    if any(stride * cache.itemsize % 16 for stride in cache.stride()[:3]):
        reason = "strides that are no multiple of 16 bytes"
    if args.topk_blocks is not None:
        sets, kv_heads = args.topk_blocks.shape[1], cache.shape[1]
        if sets % kv_heads and kv_heads % sets:  # no scope makes such sets
            reason = "sets that divide the heads of a KV head"
    if reason:
        pytest.skip(f"not covered: {reason}")


def some_blocks(batch: Batch, num_sets: int, size: int, seed: int = 0) -> Sets:
    """For each row and set some of its blocks, the last one often, in any order.

    A row that is left out has what are no blocks.
    """
    rng = torch.Generator().manual_seed(seed)
    sets = []
    for seq_len in batch.lens:
        if seq_len < 0:
            sets.append([[2**30, 2**31 - 1]] * num_sets)
            continue
        total = -(-seq_len // size)
        row = []
        for _ in range(num_sets):
            count = int(torch.randint(0, total + 1, (), generator=rng))
            row.append(torch.randperm(total, generator=rng)[:count].tolist())
        sets.append(row)
    return sets


def exact_of(
    batch: Batch,
    positions_of: Positions | None = None,
    size: int | None = None,
) -> exact.Exact:
    """Attention in float64; kernels round weights to the query's dtype."""
    dtype = batch.query.dtype
    rounded = dtype is not torch.float32
    weights = _roundings(dtype) * torch.finfo(dtype).eps / 2 if rounded else 0.0
    return batch.exact(positions_of, size, weights)


def _roundings(dtype: torch.dtype) -> int:
    """Triton's interpreter cuts a bf16 off, which costs up to twice a rounding."""
    return 2 if dtype is torch.bfloat16 and INTERPRETED else 1


def assert_attends(output: torch.Tensor, wanted: exact.Exact) -> None:
    bound = (wanted.output, wanted.output_error)
    exact.assert_within(output, *bound, "output", _roundings(output.dtype))


def assert_same_lse(lse: torch.Tensor, wanted: exact.Exact) -> None:
    exact.assert_within(lse, wanted.lse, wanted.lse_error, "lse")


def assert_equal(actual: Sequence, expected: Sequence) -> None:
    """Equal bit for bit, each tensor or None; a NaN equals a NaN."""
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.isnan(), other.isnan())
            assert torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))
