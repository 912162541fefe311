"""Named cases of the decode ops, and how results are judged."""

import math
from dataclasses import dataclass

import pytest
import torch

from tests.kernels import exact
from tests.kernels.batches import FP8, Batch, make_batch, without_values
from tests.kernels.naive import Positions

K_SCALE, V_SCALE = 0.75, 1.5


@dataclass(frozen=True)
class KernelCase:
    """The shape of a batch, and how the ops are to take it.

    Attributes:
        lens: The length of each row's sequence; 0 for a row of padding, negative for a
            row that is left out.
        splits: Room in the workspace: the most splits of one row.
        sharpness: Factor on the scale; 30 gives scores of a few hundred.
    """

    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    layout: str = "LBNHC"
    block_size: int = 16
    select_block_size: int = 16
    lens: tuple[int, ...] = (70, 0, -9, 17, 1)
    splits: int = 4
    sharpness: float = 1.0

    def make(self, seed: int = 0) -> Batch:
        """A random batch of this shape."""
        return make_batch(
            self.lens,
            num_kv_heads=self.num_kv_heads,
            group=self.num_heads // self.num_kv_heads,
            head_size=self.head_size,
            block_size=self.block_size,
            layout=self.layout,
            dtype=FP8 if self.fp8 else self.dtype,
            query_dtype=self.dtype,
            k_scale=K_SCALE if self.fp8 else 1.0,
            v_scale=V_SCALE if self.fp8 else 1.0,
            sharpness=self.sharpness,
            seed=seed,
        )


# Lengths at and around each boundary: a tile (16 tokens), the tiles of four warps (64),
# and the shortest split (128 where sparse; 512 where dense).
EDGES = tuple(sorted({e + d for e in (16, 64, 128) for d in (-1, 0, 1)}))
CASES = {
    "Llama-3 heads, 32 on 8": KernelCase(32, 8),
    "Qwen2.5-7B heads, 28 on 4, group 7": KernelCase(28, 4),
    "multi-head, 6 on 6": KernelCase(6, 6),
    "multi-query, 20 on 1: a second tile of four": KernelCase(20, 1),
    "16 heads over many tiles": KernelCase(16, 1, head_size=64, lens=(900,), splits=1),
    "head size 64": KernelCase(head_size=64),
    "head size 96": KernelCase(head_size=96),
    "head size 256": KernelCase(head_size=256),
    "fp16": KernelCase(dtype=torch.float16),
    "fp8": KernelCase(fp8=True),
    "fp8 under fp16": KernelCase(fp8=True, dtype=torch.float16),
    "fp8, head size 64": KernelCase(fp8=True, head_size=64),
    "fp8, head size 96": KernelCase(fp8=True, head_size=96),
    "fp8, head size 256": KernelCase(fp8=True, head_size=256),
    "LBHNC": KernelCase(layout="LBHNC"),
    "LHBNC": KernelCase(layout="LHBNC"),
    "LNBHC": KernelCase(layout="LNBHC"),
    "LBNHC, slice of a bigger one": KernelCase(layout="LBNHC, slice of a bigger one"),
    "KV blocks of 48": KernelCase(block_size=48),
    "fours in KV blocks of 544, over splits": KernelCase(
        4, 2, 64, block_size=544, select_block_size=4, lens=(1700, 545, 133)
    ),
    "KV blocks of 8, smaller than a tile": KernelCase(
        block_size=8, select_block_size=2, lens=(300, 7)
    ),
    "single tokens": KernelCase(select_block_size=1),
    "selection blocks of 2": KernelCase(select_block_size=2),
    "selection blocks of 4": KernelCase(select_block_size=4),
    "selection blocks of 8": KernelCase(select_block_size=8),
    "selection blocks of 32": KernelCase(
        block_size=32, select_block_size=32, lens=(131, 32, 1)
    ),
    "selection blocks of 48 in 96": KernelCase(
        block_size=96, select_block_size=48, lens=(300, 97, 64, 48, 5)
    ),
    "every edge": KernelCase(4, 1, lens=EDGES, head_size=64),
    "every edge, single tokens": KernelCase(
        4, 1, lens=EDGES, head_size=64, select_block_size=1
    ),
    "four splits and more": KernelCase(2, 1, lens=(2100, 511, 512, 513, 1024, 0)),
    "selection blocks of 64 over splits": KernelCase(
        2, 1, lens=(1700, 1025), block_size=64, select_block_size=64, head_size=64
    ),
    "scores of hundreds": KernelCase(sharpness=30.0),
    "16 heads, fours, scores of hundreds": KernelCase(
        16, 1, 64, select_block_size=4, sharpness=30.0, lens=(300, 3)
    ),
    "eights and scores of hundreds": KernelCase(
        select_block_size=8, sharpness=30.0, lens=(300, 3)
    ),
    "rows left out": KernelCase(lens=(-1, 700, 0, -(2**31), 17, -1)),
    "all rows left out": KernelCase(lens=(-1, -40)),
}
# One case of each kind: for quick runs, and for tests that run a case several times.
SMALL = (
    *("Llama-3 heads, 32 on 8", "fp8", "head size 256", "four splits and more"),
    "rows left out",
)
EVERY = [
    pytest.param(name, marks=[] if name in SMALL else pytest.mark.extended)
    for name in CASES
]
KEPT = 42.0  # held by a row that is left out, before an op and after it


def attend_tensors(batch: Batch, case: KernelCase) -> dict[str, torch.Tensor]:
    """Tensors for the ops that attend; those that are written start as NaN.

    Query, output and block table are parts of wider tensors, with odd strides; the
    partial results have room for one row more than there is.
    """
    rows, heads, size = batch.query.shape
    wide = torch.full((rows, heads + 1, size + 17), math.nan, dtype=batch.query.dtype)
    query = torch.full_like(wide, math.nan)[:, 1:, 3 : size + 3]
    query.copy_(batch.query)
    table = batch.block_table
    wide_table = torch.full((rows, table.shape[1] + 3), 2**30, dtype=torch.int32)
    wide_table[:, 1:-2] = table
    shape = (rows + 1, heads, case.splits)
    return {
        "query": query,
        "kv_cache": batch.kv_cache,
        "block_table": wide_table[:, 1:-2],
        "seq_lens": batch.seq_lens,
        "output": wide[:, :heads, :size],
        "lse": torch.full((rows, heads), math.nan),
        "partial_out": torch.full((*shape, size), math.nan),
        "partial_lse": torch.full(shape, math.nan),
        "arrivals": torch.zeros(rows + 1, heads, dtype=torch.int32),
    }


def run(
    kernels, op: str, tensors: dict, outputs: tuple[str, ...], **numbers: float
) -> None:
    """Run an op, which must not write a row that is left out.

    Its counters must be zeros again, so that the next op, or a replayed graph, finds
    them so.
    """
    left_out = tensors["seq_lens"] < 0
    for name in outputs:
        tensors[name][left_out] = KEPT
    kernels.run(op, tensors, (*outputs, "arrivals"), **numbers)
    assert not tensors["arrivals"].any(), "arrivals do not end as zeros"
    for name in outputs:
        assert (tensors[name][left_out] == KEPT).all(), f"{name}: row not left out"


def scales_of(batch: Batch) -> dict[str, float]:
    names = ("scale", "k_scale", "v_scale")
    return {name: getattr(batch, name) for name in names}


def room_for_block_lse(batch: Batch, case: KernelCase) -> torch.Tensor:
    most = -(-max(0, *case.lens) // case.select_block_size)
    return torch.full((*batch.query.shape[:2], most + 3), math.nan)


def run_dense(kernels, batch: Batch, case: KernelCase, scores: bool = True) -> dict:
    """The tensors of dense_decode after it ran; without block_lse unless `scores`."""
    tensors, outputs, numbers = attend_tensors(batch, case), ["output", "lse"], {}
    if scores:
        tensors["block_lse"] = room_for_block_lse(batch, case)
        outputs.append("block_lse")
        numbers["select_block_size"] = case.select_block_size
    numbers |= scales_of(batch)
    run(kernels, "dense_decode", tensors, tuple(outputs), **numbers)
    return tensors


def run_score(kernels, batch: Batch, case: KernelCase, poison: bool = True) -> dict:
    """The tensors of score_blocks after it ran.

    Args:
        poison: Whether all values of the cache are NaN.
    """
    tensors = attend_tensors(batch, case)
    del tensors["output"], tensors["partial_out"]
    if poison:
        tensors["kv_cache"] = without_values(batch.kv_cache)
    tensors["block_lse"] = room_for_block_lse(batch, case)
    run(
        kernels,
        "score_blocks",
        tensors,
        ("lse", "block_lse"),
        select_block_size=case.select_block_size,
        **scales_of(batch),
    )
    return tensors


def run_sparse(
    kernels, batch: Batch, case: KernelCase, blocks: torch.Tensor, lens: torch.Tensor
) -> dict:
    """The tensors of sparse_decode after it ran over topk_blocks and topk_lens."""
    tensors = attend_tensors(batch, case)
    tensors |= {"topk_blocks": blocks, "topk_lens": lens}
    run(
        kernels,
        "sparse_decode",
        tensors,
        ("output", "lse"),
        select_block_size=case.select_block_size,
        **scales_of(batch),
    )
    return tensors


def exact_of(
    batch: Batch, case: KernelCase, positions: Positions | None = None
) -> exact.Exact:
    """The result in float64; its error allows for weights in the query's dtype."""
    weights = torch.finfo(case.dtype).eps / 2
    return batch.exact(positions, case.select_block_size, weights)


def assert_output(got: dict, wanted: exact.Exact, batch: Batch) -> None:
    """Judge the output of all rows but those left out, which `run` has checked."""
    rows = batch.seq_lens >= 0
    bound = (wanted.output[rows], wanted.output_error[rows])
    exact.assert_within(got["output"][rows], *bound, "output")


def assert_lse(got: dict, wanted: exact.Exact, batch: Batch) -> None:
    rows = batch.seq_lens >= 0
    bound = (wanted.lse[rows], wanted.lse_error[rows])
    exact.assert_within(got["lse"][rows], *bound, "lse")


def assert_scores(
    got: dict, wanted: exact.Exact, batch: Batch, case: KernelCase
) -> None:
    """Judge lse and block_lse."""
    assert_lse(got, wanted, batch)
    for row, seq_len in enumerate(case.lens):
        if seq_len < 0:
            continue
        used = -(-seq_len // case.select_block_size)
        bound = (t[row, :, :used] for t in (wanted.block_lse, wanted.block_lse_error))
        found = got["block_lse"][row]
        exact.assert_within(found[:, :used], *bound, f"block_lse of row {row}")
        assert found[:, used:].isnan().all(), "written past the row"


def make_sets(
    batch: Batch, case: KernelCase, scope: str, seed: int = 0, most: int = 40
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random topk_blocks and topk_lens, each set in random order.

    Behind each set stand blocks that no block table covers. Every third set is empty.
    The set of a row of padding is not, since a replayed CUDA graph may leave it so. A
    row that is left out claims more blocks than there is room for.
    """
    rng = torch.Generator().manual_seed(seed)
    num_sets = batch.num_sets(scope)
    shape = (len(case.lens), num_sets, most + 2)
    blocks = torch.full(shape, 2**26, dtype=torch.int32)
    lens = torch.zeros(shape[:2], dtype=torch.int32)
    for row, seq_len in enumerate(case.lens):
        total = -(-max(seq_len, 1) // case.select_block_size)
        for i in range(num_sets):
            chosen = torch.randperm(total, generator=rng)
            few = int(torch.randint(1, total + 1, (1,), generator=rng))
            count = 0 if (row + i) % 3 == 2 else min(few, most)
            blocks[row, i, :count] = chosen[:count].to(torch.int32)
            lens[row, i] = count if seq_len >= 0 else 2**30
    return blocks, lens


def positions_of(
    case: KernelCase, blocks: torch.Tensor, lens: torch.Tensor
) -> Positions:
    """A function of (row, head): the positions that the head attends to."""
    size, num_sets = case.select_block_size, blocks.shape[1]

    def positions(row: int, head: int) -> list[int]:
        i = head // (case.num_heads // num_sets)
        chosen = blocks[row, i, : int(lens[row, i])].tolist()
        every = (b * size + t for b in chosen for t in range(size))
        return [t for t in every if t < case.lens[row]]

    return positions
