"""dense_decode, score_blocks and sparse_decode: what one launch of them takes."""

import functools
from dataclasses import dataclass

from benchmarks.model.design import Design
from benchmarks.model.hardware import EMPTY, Gpu, Shape
from benchmarks.model.machine_code import loop_of
from benchmarks.model.splits import ceil_div, split_row, workspace_splits
from benchmarks.model.thread_blocks import Block, Kernel, Run, run_blocks

TILE = 16  # tokens that a warp takes at a time
# Loads before K and V arrive, each of which needs the one before: seq_lens,
# block_table, K and V; where sparse, topk_lens and topk_blocks as well.
DENSE_CHAIN, SPARSE_CHAIN = 3, 5
# us, fitted to the audit: the last tile and joining the warps; a fence, a barrier and
# an atomic.
JOIN_WARPS, ARRIVE = 0.8, 0.6
# Clocks that a warp takes for an instruction where no other warp holds it up, fitted:
# one thread block of dense_decode, 989 instructions, reaches 0.8 of its processor's
# share of the bandwidth; fp8, 1275 instructions, 1.4 times the tokens of bf16.
CLOCKS = {"bf16": 3.2, "fp8": 2.8}
# A processor keeps 1 KiB of shared memory of each thread block for itself.
RESERVED_KIB = 1
SLOTS = 4  # instructions that a processor issues per clock


@dataclass(frozen=True)
class Prediction:
    """What an op is predicted to take. A model's numbers, not measured.

    Attributes:
        us: With its launches, inside a CUDA graph of many kernels.
        kv_bytes: K and V that it has to read.
        other_bytes: What else of HBM it reads or writes: block_lse, topk_blocks.
        blocks: Thread blocks of the grid of its first kernel.
        waves: Of these with work, in units of what the GPU holds at once.
        tail_us: In which the GPU was no longer full.
        splits: Of the longest row.
    """

    op: str
    us: float
    kv_bytes: int
    other_bytes: int
    launches: int
    blocks: int
    waves: float
    tail_us: float
    splits: int
    least_us: float

    def alone_us(self, gpu: Gpu) -> float:
        """Of a CUDA graph of its own, as the benchmarks measure an op."""
        return self.us + gpu.graph_us

    def share_of_read(self, gpu: Gpu) -> float:
        """Alone, of the bytes of K and V, where there are any."""
        num_bytes = self.kv_bytes or self.other_bytes
        return num_bytes / self.alone_us(gpu) / gpu.read_bytes_per_us


def dense_decode(
    gpu: Gpu, design: Design, shape: Shape, lens: tuple[int, ...], block: int = 0
) -> Prediction:
    """Attend to whole sequences; `block`: selection blocks to keep scores for, or 0."""
    return _attend(gpu, design, shape, "dense_decode", lens, block)


def score_blocks(
    gpu: Gpu, design: Design, shape: Shape, lens: tuple[int, ...], block: int
) -> Prediction:
    """Score all selection blocks by K alone."""
    return _attend(gpu, design, shape, "score_blocks", lens, block)


def sparse_decode(
    gpu: Gpu, design: Design, shape: Shape, kept: tuple[int, ...], block: int = 16
) -> Prediction:
    """Attend to what was chosen; `kept`: tokens of each row."""
    return _attend(gpu, design, shape, "sparse_decode", kept, block)


def _attend(
    gpu: Gpu,
    design: Design,
    shape: Shape,
    op: str,
    lens: tuple[int, ...],
    block: int,
) -> Prediction:
    sparse, dense = op == "sparse_decode", op == "dense_decode"
    rows, tokens = len(lens), sum(lens)
    head_tiles = ceil_div(shape.heads_per_kv_head, 16)
    groups = shape.num_kv_heads * head_tiles
    splits = design.limit_splits(
        rows,
        groups,
        gpu.processors,
        workspace_splits(rows),
        1 if sparse else design.splits_at_least,
        sparse,
    )
    run_tokens = block if block > TILE else design.dense_run * TILE
    grain = TILE if sparse else run_tokens
    at_least = design.sparse_tokens if sparse else design.dense_tokens
    used = max(split_row(length, grain, splits, at_least)[0] for length in lens)
    head_token_bytes = shape.head_token_bytes // (2 if op == "score_blocks" else 1)
    kernel = _kernel(gpu, design, shape, op, block, used)
    run = _run(
        gpu,
        kernel,
        lens,
        (grain, splits, at_least),
        groups,
        head_token_bytes,
        design.stream_share,
    )

    launches, us = 1, gpu.launch_us + run.us
    if not design.merges_inside and splits > 1:
        launches, us = 2, us + gpu.launch_us + _merge_us(gpu, design, used)
    num_blocks = sum(ceil_div(length, block) for length in lens) if block else 0
    # block_lse is fp32 for each query head; topk_blocks is read once for all heads.
    scores = 4 * num_blocks * (1 if sparse else shape.num_heads)
    if scores and not sparse:
        us += scores / gpu.store_bytes_per_us
    us += design.sparse_us if sparse else 0.0
    kv_bytes = tokens * shape.num_kv_heads * head_token_bytes
    return Prediction(
        op=op,
        us=us,
        kv_bytes=kv_bytes,
        other_bytes=scores,
        launches=launches,
        blocks=rows * splits * groups,
        waves=run.waves,
        tail_us=run.tail_us,
        splits=used,
        least_us=gpu.least_us(kv_bytes + (0 if dense or sparse else scores)),
    )


def _kernel(
    gpu: Gpu, design: Design, shape: Shape, op: str, block: int, used: int
) -> Kernel:
    """What the thread blocks of a launch have in common."""
    sparse = op == "sparse_decode"
    loop = loop_of(design.loops, op, shape.stored, block)
    clocks = gpu.clock_ghz * 1000  # in a us
    tiles_us = clocks / loop.instructions  # of one warp that issues in every clock
    resident = min(
        loop.resident, int(gpu.shared_kib // (loop.shared_kib + RESERVED_KIB))
    )
    # What a thread block issues in a clock, where its processor is full.
    issued = min(loop.warps / CLOCKS[shape.stored], SLOTS / resident)
    inside = design.merges_inside and used > 1
    return Kernel(
        resident=resident,
        before_us=(SPARSE_CHAIN if sparse else DENSE_CHAIN) * gpu.load_us,
        after_us=JOIN_WARPS + (ARRIVE if inside else 0.0),
        empty_us=EMPTY,
        join_us=_join_us(gpu, design, shape, used) if inside else 0.0,
        block_rate=issued * loop.tile_bytes * tiles_us,
    )


def _join_us(gpu: Gpu, design: Design, shape: Shape, used: int) -> float:
    """One thread block joins the splits of its head group: latency, and L2's bytes."""
    heads = min(shape.heads_per_kv_head, 16)
    rounds = ceil_div(used, design.merge_chunk)
    read = used * heads * shape.head_size * 4
    return gpu.load_us + rounds * gpu.l2_load_us + read / (gpu.l2_gb_per_s * 1e3)


def _merge_us(gpu: Gpu, design: Design, used: int) -> float:
    """A kernel joins the splits, one thread block for each head: latency alone."""
    return (2 + ceil_div(used, design.merge_chunk)) * gpu.load_us


@functools.lru_cache(None)
def _run(
    gpu: Gpu,
    kernel: Kernel,
    lens: tuple[int, ...],
    cut: tuple[int, int, int],
    groups: int,
    head_token_bytes: int,
    stream_share: float,
) -> Run:
    """Run the grid: head groups, splits, rows. `cut`: grain, splits, fewest tokens."""
    grain, splits, at_least = cut
    blocks = []
    for row, length in enumerate(lens):
        used, each = split_row(length, grain, splits, at_least)
        for split in range(splits):
            tokens = min(length - split * each, each) if split < used else 0
            for group in range(groups):
                unit = row * groups + group if used > 1 else -1
                blocks.append(Block(tokens * head_token_bytes, unit))
    bandwidth = stream_share * gpu.gather_bytes_per_us
    return run_blocks(blocks, kernel, gpu.processors, bandwidth)
