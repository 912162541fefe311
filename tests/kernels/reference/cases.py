"""Paged batches for the laws: every layout, dtype and head grouping, NaN elsewhere."""

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.kernels.reference import exact

# Deterministic: the same examples in every run, on every machine.
law = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

GROUPS = (1, 2, 3, 5, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _layout(order, pad=0, lead=0, element=1, block_pad=0):
    """A maker of NaN caches with the dimensions in `order`, outermost first."""

    def make(num_blocks, heads, block_size, width, dtype):
        sizes = (num_blocks, heads, block_size, width)
        strides = [0, 0, 0, element]
        step = width * element + pad
        for dim in reversed(order):
            strides[dim] = step
            step = step * sizes[dim] + (block_pad if dim != 0 else 0)
        storage = torch.full((lead + step,), math.nan, dtype=dtype)
        return storage.as_strided(sizes, strides, lead)

    return make


LAYOUTS = {
    "LBNHC": _layout((0, 2, 1)),
    "LBHNC": _layout((0, 1, 2)),
    "LHBNC": _layout((1, 0, 2)),
    "LNBHC": _layout((2, 0, 1)),
    "LBNHC, padded rows": _layout((0, 2, 1), pad=8),
    "LBHNC, padded rows": _layout((0, 1, 2), pad=8),
    "LBNHC, padded tokens and blocks": _layout((0, 2, 1), block_pad=8),
    "LBHNC, padded heads and blocks": _layout((0, 1, 2), block_pad=8),
    "LBNHC, slice of a bigger one": _layout((0, 2, 1), block_pad=640, lead=320),
    "LBHNC, odd strides and offset": _layout((0, 1, 2), pad=3, lead=5, block_pad=1),
    "LBNHC, odd strides and offset": _layout((0, 2, 1), pad=3, lead=5, block_pad=1),
    "LBNHC, every other element": _layout((0, 2, 1), element=2),
}


@dataclass(frozen=True, repr=False)
class Batch:
    """Arguments of the ops, and the same K and V as they were before paging."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scale: float
    layout: str

    def __repr__(self) -> str:
        heads = f"{self.num_heads} heads on {self.num_kv_heads} of {self.layout}"
        lens = self.seq_lens.tolist()
        return f"<{lens} in {self.block_size}s, {heads}, {self.kv_cache.dtype}>"

    @property
    def paged(self):
        """The tensors that every attention op begins with."""
        return self.query, self.kv_cache, self.block_table, self.seq_lens

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_cache.shape[1]

    @property
    def block_size(self) -> int:
        return self.kv_cache.shape[2]

    def num_sets(self, scope: str) -> int:
        return {
            "sequence": 1,
            "kv_head": self.num_kv_heads,
            "query_head": self.num_heads,
        }[scope]

    def exact(self, positions_of=None, size: int | None = None) -> exact.Exact:
        """What decoding gives, and how far off fp32 may be."""
        kv = (self.keys, self.values)
        return exact.decode(self.query, *kv, self.scale, positions_of, size)

    def rows(self, order: list[int]) -> "Batch":
        """The same sequences in another order, some perhaps left out or repeated."""
        return replace(
            self,
            query=self.query[order],
            block_table=self.block_table[order],
            seq_lens=self.seq_lens[order],
            keys=[self.keys[i] for i in order],
            values=[self.values[i] for i in order],
        )


def make_batch(
    seq_lens,
    *,
    num_kv_heads=2,
    group=2,
    head_size=8,
    block_size=16,
    layout="LBNHC",
    dtype=torch.float32,
    sharpness=1.0,
    seed=0,
    num_queries=None,
) -> Batch:
    """Random sequences in shuffled physical blocks; all that is unused is poison.

    Unused slots, padding and unowned blocks hold NaN, and unused entries of the block
    table point outside the cache. The first and last sequence share their full
    common blocks, as with prefix caching.

    Args:
        seq_lens: a negative one is a row that is left out: no tokens, and a block
            table row of anything.
        sharpness: factor on the scale; 30 gives scores of a few hundred.
        num_queries: rows of query; one per sequence when absent.
    """
    rng = torch.Generator().manual_seed(seed)
    given, lens = list(seq_lens), [max(n, 0) for n in seq_lens]
    needed = [-(-n // block_size) for n in lens]
    num_blocks = sum(needed) + 3
    cache = LAYOUTS[layout](num_blocks, num_kv_heads, block_size, 2 * head_size, dtype)
    pool = torch.randperm(num_blocks, generator=rng).tolist()
    table = torch.full((len(lens), max(needed, default=0) + 2), 2**30)
    shape = (num_kv_heads, head_size)
    keys = [torch.randn(n, *shape, generator=rng).to(dtype) for n in lens]
    values = [torch.randn(n, *shape, generator=rng).to(dtype) for n in lens]
    last = max((row for row, n in enumerate(given) if n >= 0), default=0)
    shared = min(lens[0], lens[last]) // block_size if last else 0
    for row, seq_len in enumerate(lens):
        blocks = [pool.pop() for _ in range(needed[row])]
        if shared and row == last:
            blocks[:shared] = table[0, :shared].tolist()
            for rows in (keys, values):
                rows[row][: shared * block_size] = rows[0][: shared * block_size]
        table[row, : needed[row]] = torch.tensor(blocks, dtype=torch.int64)
        for t in range(seq_len):
            slot = cache[blocks[t // block_size], :, t % block_size]
            slot[:, :head_size] = keys[row][t]
            slot[:, head_size:] = values[row][t]
    num_queries = len(lens) if num_queries is None else num_queries
    num_heads = num_kv_heads * group
    query = torch.randn(num_queries, num_heads, head_size, generator=rng).to(dtype)
    left_out = torch.tensor(given) < 0
    anything = torch.randint(-(2**31), 2**31, table.shape, generator=rng)
    return Batch(
        query=query,
        kv_cache=cache,
        block_table=torch.where(left_out[:, None], anything, table).to(torch.int32),
        seq_lens=torch.tensor(given, dtype=torch.int32),
        keys=keys,
        values=values,
        scale=sharpness * head_size**-0.5,
        layout=layout,
    )


def without_values(kv_cache: torch.Tensor) -> torch.Tensor:
    """A copy of the same strides in which all of V is NaN."""
    storage = kv_cache.untyped_storage().clone()
    copy = torch.empty(0, dtype=kv_cache.dtype, device=kv_cache.device).set_(storage)
    copy = copy.as_strided(kv_cache.shape, kv_cache.stride(), kv_cache.storage_offset())
    values = copy[..., kv_cache.shape[3] // 2 :]
    values.copy_(torch.full(values.shape, math.nan).to(kv_cache.dtype))
    return copy


def near(*sizes: int, limit: int) -> st.SearchStrategy[int]:
    """Lengths at and around the multiples of `sizes`, and any other."""
    edges = {
        k * s + d for s in sizes for k in range(limit // s + 1) for d in (-1, 0, 1)
    }
    edges = sorted(n for n in edges if 0 <= n <= limit)
    return st.one_of(st.sampled_from(edges), st.integers(0, limit))


@st.composite
def batches(
    draw, max_len=100, min_seqs=1, max_seqs=3, dtypes=DTYPES, leave_out=True
) -> Batch:
    block_size = draw(st.sampled_from((16, 32, 48)))
    length = near(block_size, limit=max_len)
    if leave_out:
        length = st.one_of(length, length, length, st.sampled_from((-1, -50)))
    lens = draw(st.lists(length, min_size=min_seqs, max_size=max_seqs))
    return make_batch(
        lens,
        num_kv_heads=draw(st.sampled_from((1, 2, 3))),
        group=draw(st.sampled_from(GROUPS)),
        head_size=draw(st.sampled_from((4, 8))),
        block_size=block_size,
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        dtype=draw(st.sampled_from(dtypes)),
        sharpness=draw(st.sampled_from((1.0, 1.0, 30.0))),
        seed=draw(st.integers(0, 2**16)),
    )


SCOPES = ("sequence", "kv_head", "query_head")
SELECT_BLOCK_SIZES = (1, 4, 16)
