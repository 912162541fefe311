"""Paged batches on the device under test, kernels called as ops, and the tolerance."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from reference.cases import Batch, make_batch, without_values

from tidal_vllm.ops import reference
from tidal_vllm.ops.dispatch import Case

from ..conftest import INTERPRETED

FP8 = torch.float8_e4m3fn
KEPT = 42.0  # what rows that are left out hold, and must still hold after an op


def relaid(tensor: torch.Tensor, dtype: torch.dtype, device) -> torch.Tensor:
    """A copy in another dtype or place, with all its storage and its strides."""
    size, stride = tensor.size(), tensor.stride()
    storage = tensor.as_strided(
        (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0
    )
    return (
        storage.to(dtype).to(device).as_strided(size, stride, tensor.storage_offset())
    )


@dataclass(frozen=True)
class Paged:
    """A batch where the kernels run, and the same on the CPU for the reference."""

    batch: Batch
    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cpu: tuple[torch.Tensor, ...]
    """query, kv_cache (fp32, scales applied), block_table and seq_lens."""
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def device(self):
        return self.query.device

    @property
    def rows(self) -> list[int]:
        """Those that are not left out."""
        return (self.batch.seq_lens >= 0).nonzero().flatten().tolist()

    @property
    def longest(self) -> int:
        return int(self.cpu[3].clamp(min=0).max())


def make_paged(
    device, lens, *, dtype=torch.bfloat16, fp8=False, k_scale=1.0, v_scale=1.0, **shape
) -> Paged:
    """`make_batch` where the kernels run; with fp8, its cache rounded to e4m3."""
    batch = make_batch(lens, dtype=torch.float32 if fp8 else dtype, **shape)
    query = batch.query.to(dtype)
    stored = relaid(batch.kv_cache, FP8 if fp8 else dtype, "cpu")
    exact = relaid(stored, torch.float32, "cpu")
    head_size = query.shape[2]
    exact[..., :head_size] *= k_scale
    exact[..., head_size:] *= v_scale
    return Paged(
        batch=batch,
        query=query.to(device),
        kv_cache=relaid(stored, stored.dtype, device),
        block_table=batch.block_table.to(device),
        seq_lens=batch.seq_lens.to(device),
        cpu=(query.float(), exact, batch.block_table, batch.seq_lens),
        k_scale=k_scale,
        v_scale=v_scale,
    )


def reordered(paged: Paged, order: list[int]) -> Paged:
    rows = {
        name: getattr(paged, name)[order]
        for name in ("query", "block_table", "seq_lens")
    }
    query, cache, table, lens = paged.cpu
    cpu = (query[order], cache, table[order], lens[order])
    return replace(paged, batch=paged.batch.rows(order), cpu=cpu, **rows)


def _skip_uncovered(kernels, paged: Paged, size: int | None) -> None:
    """CUDA covers less than Triton, and then Triton runs."""
    if not kernels.__name__.endswith(".cuda"):
        return
    dtype, cache = paged.query.dtype, paged.kv_cache
    cache_dtype = "fp8" if cache.dtype is FP8 else "auto"
    case = Case(paged.device, paged.query.shape[2], dtype, cache_dtype, size)
    reason = kernels.why_not(case)
    if any(stride * cache.itemsize % 16 for stride in cache.stride()[:3]):
        reason = "strides that are no multiple of 16 bytes"
    if reason:
        pytest.skip(f"not covered: {reason}")


def _buffers(paged: Paged, splits: int, poison: float, strided: bool):
    num_seqs, num_heads, head_size = paged.query.shape
    pad = 3 if strided else 0

    def full(*shape, dtype=torch.float32):
        return torch.full(shape, poison, dtype=dtype, device=paged.device)

    output = full(num_seqs, num_heads + pad, head_size, dtype=paged.query.dtype)
    return (
        output[:, :num_heads],
        full(num_seqs, num_heads),
        full(num_seqs + 2, num_heads, splits, head_size),
        full(num_seqs + 2, num_heads, splits),
    )


def _block_lse(paged: Paged, size: int, poison: float) -> torch.Tensor:
    shape = (*paged.query.shape[:2], -(-paged.longest // size) + 1)
    return torch.full(shape, poison, device=paged.device)


def _call(op, paged: Paged, written, *arguments) -> None:
    """Run an op, which must not write a row that is left out."""
    left_out = paged.seq_lens < 0
    written = [tensor for tensor in written if tensor is not None]
    for tensor in written:
        tensor[left_out] = KEPT
    op(*arguments)
    for tensor in written:
        assert (tensor[left_out] == KEPT).all(), "wrote a row that is left out"


def dense(kernels, paged, size=None, splits=4, poison=math.nan, strided=False):
    """dense_decode; block_lse holds `poison` where nothing was written."""
    _skip_uncovered(kernels, paged, size)
    output, lse, *partials = _buffers(paged, splits, poison, strided)
    block_lse = None if size is None else _block_lse(paged, size, poison)
    _call(
        *(kernels.dense_decode, paged, (output, lse, block_lse)),
        *(paged.query, paged.kv_cache, paged.block_table, paged.seq_lens),
        *(output, lse, block_lse, *partials),
        *(paged.batch.scale, paged.k_scale, paged.v_scale, size or 1),
    )
    return output, lse, block_lse


def score(kernels, paged, size, splits=4, poison=math.nan):
    """score_blocks over a cache whose values are all NaN."""
    _skip_uncovered(kernels, paged, size)
    _, lse, _, partial_lse = _buffers(paged, splits, poison, strided=False)
    block_lse, cache = _block_lse(paged, size, poison), without_values(paged.kv_cache)
    _call(
        *(kernels.score_blocks, paged, (lse, block_lse)),
        *(paged.query, cache, paged.block_table, paged.seq_lens),
        *(lse, block_lse, partial_lse, paged.batch.scale, paged.k_scale, size),
    )
    return lse, block_lse


def sparse(kernels, paged, sets, size, splits=4, poison=math.nan, strided=False):
    """sparse_decode over `sets`, [num_seqs][num_sets] lists of blocks."""
    _skip_uncovered(kernels, paged, size)
    output, lse, *partials = _buffers(paged, splits, poison, strided)
    topk_blocks, topk_lens = as_tensors(sets)
    _call(
        *(kernels.sparse_decode, paged, (output, lse)),
        *(paged.query, paged.kv_cache, paged.block_table),
        *(topk_blocks.to(paged.device), topk_lens.to(paged.device), paged.seq_lens),
        *(output, lse, *partials),
        *(paged.batch.scale, paged.k_scale, paged.v_scale, size),
    )
    return output, lse


def as_tensors(sets) -> tuple[torch.Tensor, torch.Tensor]:
    lens = torch.tensor([[len(blocks) for blocks in row] for row in sets])
    width = int(lens.max()) + 2
    padded = [
        [[*blocks, *[-1] * (width - len(blocks))] for blocks in row] for row in sets
    ]
    return torch.tensor(padded, dtype=torch.int32), lens.to(torch.int32)


def some_blocks(paged, num_sets, size, seed=0):
    """For each row and set some of its blocks, the last one often, in any order.

    A row that is left out has what are no blocks.
    """
    rng = torch.Generator().manual_seed(seed)
    sets = []
    for seq_len in paged.batch.seq_lens.tolist():
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


def reference_dense(paged, size=None):
    return reference.dense_decode(
        *paged.cpu, scale=paged.batch.scale, select_block_size=size
    )


def reference_sparse(paged, sets, size):
    query, cache, table, lens = paged.cpu
    return reference.sparse_decode(
        *(query, cache, table, *as_tensors(sets), lens),
        scale=paged.batch.scale,
        select_block_size=size,
    )


def low_precision(paged, positions_of, dtype=None) -> torch.Tensor:
    """Attention as it is without care: every step rounded to `dtype`, the query's."""
    query, cache, table, _ = paged.cpu
    dtype = dtype or paged.query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    num_seqs, num_heads, head_size = query.shape
    group = num_heads // cache.shape[1]
    output = torch.zeros(query.shape)
    for row in range(num_seqs):
        for head in range(num_heads):
            at = positions_of(row, head)
            if not len(at):
                continue
            blocks = table[row][at // cache.shape[2]].long()
            kv = cache[blocks, head // group, at % cache.shape[2]].to(dtype)
            scores = kv[:, :head_size] @ query[row, head].to(dtype)
            scores = (scores * paged.batch.scale).to(wide)
            weights = _rounded(scores.softmax(0), dtype)
            values = kv[:, head_size:].to(wide)
            output[row, head] = _rounded(weights @ values, dtype)
    return output


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the precision of dtype; Triton's interpreter cuts a bf16 off."""
    if dtype is torch.bfloat16 and INTERPRETED:
        return (exact.view(torch.int32) & -(2**16)).view(torch.float32)
    return exact.to(dtype).to(exact.dtype)


def assert_attends(actual, exact, careless) -> None:
    """At most twice as far off as a computation in the same precision."""
    actual, exact = actual.cpu().float(), exact.float()
    assert actual.isfinite().all()
    error = (actual - exact).abs().max()
    allowed = 2 * (careless - exact).abs().max() + 1e-5
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


def assert_same_lse(actual, exact, paged) -> None:
    """Scores are fp32 sums of exact products: off by a few units in the last place."""
    actual = actual.cpu()
    assert torch.equal(actual.isneginf(), exact.isneginf())
    error = (actual - exact).masked_fill(exact.isneginf(), 0.0).abs()
    largest = exact[exact.isfinite()].abs().max() if exact.isfinite().any() else 0.0
    assert (error <= 4e-6 * max(1.0, float(largest)) + 4e-6).all(), error.max()


def all_tokens(paged):
    lens = paged.batch.seq_lens.clamp(min=0).tolist()
    return lambda row, head: torch.arange(lens[row])


def tokens_of(paged, sets, size):
    """Positions that a head attends to through its set."""
    lens = paged.batch.seq_lens.tolist()
    heads_per_set = paged.query.shape[1] // len(sets[0])

    def positions(row, head):
        blocks = torch.tensor(sets[row][head // heads_per_set], dtype=torch.int64)
        at = (blocks[:, None] * size + torch.arange(size)).flatten()
        return at[at < lens[row]]

    return positions
