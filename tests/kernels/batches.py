"""Paged batches for the laws: every layout, dtype and head grouping, NaN elsewhere."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.kernels import exact
from tests.kernels.naive import Positions
from tidal_vllm.kernels import DecodeArgs
from tidal_vllm.plan.rule import num_sets

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
FP8 = torch.float8_e4m3fn


def _layout(
    order: tuple[int, int, int],
    pad: int = 0,
    lead: int = 0,
    element: int = 1,
    block_pad: int = 0,
) -> Callable[[int, int, int, int, torch.dtype], torch.Tensor]:
    """A maker of NaN caches with the dimensions in `order`, outermost first."""

    def make(
        num_blocks: int, heads: int, block_size: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        sizes = (num_blocks, heads, block_size, width)
        strides = [0, 0, 0, element]
        step = width * element + pad
        for dim in reversed(order):
            strides[dim] = step
            step = step * sizes[dim] + (block_pad if dim != 0 else 0)
        storage = torch.full((lead + step,), math.nan, dtype=dtype)
        return storage.as_strided(sizes, strides, lead)

    return make


Sets = list[list[list[int]]]
"""The logical selection blocks of each row's sets: [row][set][block]."""
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
    """Tensors of the ops, and the same K and V as they were before paging."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    keys: list[torch.Tensor]
    """`[seq_len, num_kv_heads, head_size]` of each row, on the CPU."""
    values: list[torch.Tensor]
    scale: float
    layout: str
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __repr__(self) -> str:
        heads = f"{self.num_heads} heads on {self.num_kv_heads} of {self.layout}"
        return f"<{self.lens} in {self.block_size}s, {heads}, {self.kv_cache.dtype}>"

    @property
    def paged(self) -> tuple[torch.Tensor, ...]:
        """The tensors that `dense_extend` begins with."""
        return self.query, self.kv_cache, self.block_table, self.seq_lens

    @property
    def lens(self) -> list[int]:
        """The seq_lens; negative for a row that is left out."""
        return self.seq_lens.tolist()

    @property
    def longest(self) -> int:
        return max([0, *self.lens])

    @property
    def device(self) -> torch.device:
        return self.query.device

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
        """Sets of one sequence under a scope."""
        return num_sets(scope, self.num_heads, self.num_kv_heads)

    def args(self, sets: Sets | None = None, **others) -> DecodeArgs:
        """What an op is given: the one place where tests spell it out.

        Args:
            sets: The blocks for `sparse_decode`.
            others: Any field of DecodeArgs; the output is NaN unless given.
        """
        if sets is not None:
            topk_blocks, topk_lens = as_tensors(sets)
            others["topk_blocks"] = topk_blocks.to(self.device)
            others["topk_lens"] = topk_lens.to(self.device)
        given = {
            "query": self.query,
            "kv_cache": self.kv_cache,
            "block_table": self.block_table,
            "output": torch.full_like(self.query, math.nan),
            "scale": self.scale,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
        }
        return DecodeArgs(**{**given, **others})

    def exact(
        self,
        positions_of: Positions | None = None,
        size: int | None = None,
        weights: float = 0.0,
    ) -> exact.Exact:
        """What decoding gives, and how far off it may be; see `exact.decode`."""
        keys = [rows.double() * self.k_scale for rows in self.keys]
        values = [rows.double() * self.v_scale for rows in self.values]
        query = self.query.cpu()
        return exact.decode(
            query, keys, values, self.scale, positions_of, size, weights
        )

    def positions(self, sets: Sets, size: int) -> Positions:
        """Which positions (row, head) attends to through its set."""
        lens = self.lens

        def positions_of(row: int, head: int) -> list[int]:
            blocks = sets[row][head // (self.num_heads // len(sets[row]))]
            every = (block * size + i for block in blocks for i in range(size))
            return [position for position in every if position < lens[row]]

        return positions_of

    def all_blocks(self, num_sets: int, size: int) -> Sets:
        """Every block of each row, in each set; none of a row that is left out."""
        return [
            [list(range(-(-n // size))) for _ in range(num_sets)] for n in self.lens
        ]

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

    def to(self, device: torch.device) -> "Batch":
        """The tensors of the ops on a device; the keys and values stay on the CPU."""
        return replace(
            self,
            query=self.query.to(device),
            kv_cache=_with_its_storage(self.kv_cache, device),
            block_table=self.block_table.to(device),
            seq_lens=self.seq_lens.to(device),
        )


def as_tensors(sets: Sets, spare: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets as topk_blocks, with -1 behind and `spare` columns more, and topk_lens."""
    lens = torch.tensor([[len(s) for s in row] for row in sets], dtype=torch.int32)
    blocks = torch.full((*lens.shape, int(lens.max()) + spare), -1, dtype=torch.int32)
    for row, of_row in enumerate(sets):
        for i, chosen in enumerate(of_row):
            blocks[row, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return blocks, lens


def make_batch(
    seq_lens: Sequence[int],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_size: int = 8,
    block_size: int = 16,
    layout: str = "LBNHC",
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    sharpness: float = 1.0,
    seed: int = 0,
    num_queries: int | None = None,
) -> Batch:
    """Random sequences in shuffled physical blocks; all that is unused is poison.

    Unused slots, padding and unowned blocks hold NaN, and unused entries of the block
    table point outside the cache. The first and last sequence share their full
    common blocks, as with prefix caching.

    Args:
        seq_lens: A negative one is a row that is left out: no tokens, and a block
            table row of anything.
        dtype: Of the KV cache, and of the query unless query_dtype is given.
        sharpness: Factor on the scale; 30 gives scores of a few hundred.
        num_queries: Rows of query; one per sequence when absent.
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
    query = torch.randn(num_queries, num_heads, head_size, generator=rng)
    left_out = torch.tensor(given) < 0
    anything = torch.randint(-(2**31), 2**31, table.shape, generator=rng)
    return Batch(
        query=query.to(query_dtype or dtype),
        kv_cache=cache,
        block_table=torch.where(left_out[:, None], anything, table).to(torch.int32),
        seq_lens=torch.tensor(given, dtype=torch.int32),
        keys=keys,
        values=values,
        scale=sharpness * head_size**-0.5,
        layout=layout,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def without_values(kv_cache: torch.Tensor) -> torch.Tensor:
    """A copy of the same strides in which all of V is NaN."""
    copy = _with_its_storage(kv_cache, kv_cache.device)
    values = copy[..., kv_cache.shape[3] // 2 :]
    values.copy_(torch.full(values.shape, math.nan).to(kv_cache.dtype))
    return copy


def _with_its_storage(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device with all of the tensor's storage, offset and strides."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    numel = tensor.untyped_storage().nbytes() // tensor.itemsize
    whole = whole.set_(tensor.untyped_storage(), 0, (numel,), (1,))
    whole = whole.to(device, copy=True)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def near(*sizes: int, limit: int) -> st.SearchStrategy[int]:
    """Lengths at and around the multiples of `sizes`, and any other."""
    edges = {
        k * s + d for s in sizes for k in range(limit // s + 1) for d in (-1, 0, 1)
    }
    edges = sorted(n for n in edges if 0 <= n <= limit)
    return st.one_of(st.sampled_from(edges), st.integers(0, limit))


@st.composite
def batches(
    draw: st.DrawFn,
    max_len: int = 100,
    min_seqs: int = 1,
    max_seqs: int = 3,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    leave_out: bool = True,
) -> Batch:
    """Batches of any shape; some rows left out, if wished."""
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


SELECT_BLOCK_SIZES = (1, 4, 16)
