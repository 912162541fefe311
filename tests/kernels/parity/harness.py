"""Paged batches on the device under test, kernels called as ops, and the tolerance."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from tests.kernels.conftest import INTERPRETED
from tests.kernels.reference import exact
from tests.kernels.reference.cases import Batch, make_batch, without_values
from tidal_vllm.kernels.dispatch import Case

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
    as_read = relaid(stored, torch.float32, "cpu")
    head_size = query.shape[2]
    as_read[..., :head_size] *= k_scale
    as_read[..., head_size:] *= v_scale
    return Paged(
        batch=batch,
        query=query.to(device),
        kv_cache=relaid(stored, stored.dtype, device),
        block_table=batch.block_table.to(device),
        seq_lens=batch.seq_lens.to(device),
        cpu=(query.float(), as_read, batch.block_table, batch.seq_lens),
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


def exact_of(paged, positions_of=None, size=None) -> exact.Exact:
    """Attention in float64 over the cache as it is, in rows that are not left out."""
    query, cache, table, _ = paged.cpu
    head_size, block_size = query.shape[2], cache.shape[2]
    keys, values = [], []
    for row, seq_len in enumerate(paged.batch.seq_lens.clamp(min=0).tolist()):
        at = torch.arange(seq_len)
        kv = cache[table[row][at // block_size].long(), :, at % block_size]
        keys.append(kv[..., :head_size])
        values.append(kv[..., head_size:])
    dtype = paged.query.dtype
    weights = 0.0 if dtype is torch.float32 else _roundings(dtype) * _unit(dtype)
    kv = (keys, values)
    found = exact.decode(query, *kv, paged.batch.scale, positions_of, size, weights)
    return found[paged.rows]


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _roundings(dtype: torch.dtype) -> int:
    """Triton's interpreter cuts a bf16 off, which costs up to twice a rounding."""
    return 2 if dtype is torch.bfloat16 and INTERPRETED else 1


def assert_attends(output, wanted: exact.Exact, paged) -> None:
    """The output, without rows that are left out."""
    output = output[: len(paged.batch.seq_lens)][paged.rows]
    bound = (wanted.output, wanted.output_error)
    exact.assert_within(output, *bound, "output", _roundings(output.dtype))


def assert_same_lse(lse, wanted: exact.Exact, paged) -> None:
    lse = lse[: len(paged.batch.seq_lens)][paged.rows]
    exact.assert_within(lse, wanted.lse, wanted.lse_error, "lse")


def tokens_of(paged, sets, size):
    """Positions that a head attends to through its set."""
    lens = paged.batch.seq_lens.tolist()
    heads_per_set = paged.query.shape[1] // len(sets[0])

    def positions(row, head):
        blocks = torch.tensor(sets[row][head // heads_per_set], dtype=torch.int64)
        at = (blocks[:, None] * size + torch.arange(size)).flatten()
        return at[at < lens[row]]

    return positions
