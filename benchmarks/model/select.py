"""select_blocks: summing the masses of all candidates, then choosing row by row."""

import functools

from benchmarks.model.attend import ARRIVE, Prediction
from benchmarks.model.design import Choose, Design
from benchmarks.model.hardware import EMPTY, Gpu, Shape
from benchmarks.model.splits import ceil_div
from benchmarks.model.thread_blocks import Block, Kernel, Run, run_blocks

STORE = 0.3  # us, to add up the heads and to write the masses
PLACES = 2  # rows that a processor chooses for at a time


def select_blocks(
    gpu: Gpu,
    design: Design,
    shape: Shape,
    lens: tuple[int, ...],
    block: int,
    sets: int = 1,
) -> Prediction:
    """Choose for every row; `block`: tokens of a candidate; `sets`: of a row."""
    choose = design.choose
    candidates = tuple(ceil_div(length, block) for length in lens)
    choosing = max(choose_us(gpu, choose, count) for count in candidates)
    run = _masses(gpu, choose, candidates, sets, shape.num_heads // sets, choosing)
    launches, us = 1, gpu.launch_us + run.us
    if not choose.one_launch:
        rounds = ceil_div(len(lens) * sets, PLACES * gpu.processors)
        launches, us = 2, us + gpu.launch_us + rounds * choosing
    num_bytes = 4 * shape.num_heads * sum(candidates)
    grid = sets * len(lens) * ceil_div(max(candidates), choose.candidates_each)
    return Prediction(
        op="select_blocks",
        us=us,
        kv_bytes=0,
        other_bytes=num_bytes,
        launches=launches,
        blocks=grid,
        waves=run.waves,
        tail_us=run.tail_us,
        splits=1,
        least_us=gpu.least_us(num_bytes),
    )


def choose_us(gpu: Gpu, choose: Choose, candidates: int) -> float:
    """One thread block finds the heaviest of a row's candidates, and writes them."""
    reads = choose.passes if candidates > choose.held else choose.reads
    read_us = ceil_div(candidates, choose.chunk) * gpu.l2_load_us
    read_us += 4 * candidates / (gpu.l2_gb_per_s * 1e3)
    pass_us = choose.pass_us + ceil_div(candidates, choose.threads) * choose.round_us
    passes_us = reads * read_us + choose.passes * pass_us
    return gpu.load_us + passes_us + choose.rest_us


@functools.lru_cache(None)
def _masses(
    gpu: Gpu,
    choose: Choose,
    candidates: tuple[int, ...],
    sets: int,
    heads: int,
    choosing: float,
) -> Run:
    """Run the grid of the first kernel: tiles of candidates, sets, rows."""
    each = choose.candidates_each
    blocks = [
        Block(max(0, min(each, count - first)) * heads * 4, row * sets + nth)
        for row, count in enumerate(candidates)
        for nth in range(sets)
        for first in range(0, max(candidates), each)
    ]
    kernel = Kernel(
        resident=choose.resident,
        before_us=choose.chain * gpu.load_us,
        after_us=STORE + choose.count_us + (ARRIVE if choose.one_launch else 0.0),
        empty_us=EMPTY,
        join_us=choosing if choose.one_launch else 0.0,
        block_rate=choose.in_flight / gpu.load_us,
    )
    return run_blocks(blocks, kernel, gpu.processors, gpu.gather_bytes_per_us)
