"""Thread blocks that share a GPU's bandwidth, one kernel at a time.

Each thread block waits for its first bytes, streams, then ends; the next one takes its
place. What streams at the same time shares the bandwidth evenly, up to what a thread
block can take. This is where waves, tails and the cost of small thread
blocks come from.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

GOLDEN = 0.6180339887  # its multiples are spread evenly, and the same in every run
# Real thread blocks do not end in step: each is taken for up to so much larger or
# smaller than it is.
SPREAD = 0.1


@dataclass(frozen=True)
class Block:
    """One thread block: what it streams, and what it waits for."""

    num_bytes: float = 0.0
    """Of HBM; 0 for a block that finds nothing to do."""
    unit: int = -1
    """Blocks of one unit, at least 0, are joined by the last of them to end."""


@dataclass(frozen=True)
class Kernel:
    """What all thread blocks of a launch have in common. Times in us.

    Attributes:
        resident: Blocks of one processor at a time.
        before_us: From a block's start to its first bytes.
        after_us: From its last bytes to its end.
        empty_us: Of a block that finds nothing to do.
        join_us: What the last block of a unit takes longer.
        block_rate: What a block can stream by itself, bytes per us.
    """

    resident: int
    before_us: float
    after_us: float
    empty_us: float = 0.0
    join_us: float = 0.0
    block_rate: float = math.inf


@dataclass
class Run:
    """How a launch went."""

    us: float
    """From the first block's start to the last one's end."""
    tail_us: float
    """Of these, with places that no block was left for."""
    waves: float
    """Blocks with something to do, in units of what the GPU holds at once."""


def run_blocks(
    blocks: Sequence[Block],
    kernel: Kernel,
    processors: int,
    bandwidth: float,
    spread: float = SPREAD,
) -> Run:
    """Run the thread blocks of one launch, in the order of the grid.

    Args:
        bandwidth: Bytes per us that all blocks share.
        spread: See `SPREAD`.
    """
    # All blocks that stream do so at the same rate. So one clock will do, of bytes per
    # block since the start, and for each block the reading at which it has all of its.
    streaming: list[tuple[float, int]] = []
    clock = 0.0
    waiting: list[tuple[float, int, bool]] = []  # time, block, whether it then streams
    missing: dict[int, int] = {}
    for block in blocks:
        if block.num_bytes > 0:
            missing[block.unit] = missing.get(block.unit, 0) + 1
    busy = sum(missing.values())
    now, dry, begun = 0.0, math.inf, 0

    def begin() -> None:
        nonlocal begun, dry
        if begun == len(blocks):
            dry = min(dry, now)
            return
        works = blocks[begun].num_bytes > 0
        first = kernel.before_us if works else kernel.empty_us
        heapq.heappush(waiting, (now + first, begun, works))
        begun += 1

    places = processors * kernel.resident
    for _ in range(places):
        begin()
    while waiting or streaming:
        rate = min(kernel.block_rate, bandwidth / max(1, len(streaming)))
        wait = (streaming[0][0] - clock) / rate if streaming else math.inf
        if waiting and waiting[0][0] - now < wait:
            then, nth, streams = heapq.heappop(waiting)
            clock += rate * (then - now)
            now = then
            if streams:
                off = 1 + spread * (2 * (nth * GOLDEN % 1) - 1)
                heapq.heappush(streaming, (clock + blocks[nth].num_bytes * off, nth))
            else:
                begin()
            continue
        clock, nth = heapq.heappop(streaming)
        now += wait
        unit, after = blocks[nth].unit, kernel.after_us
        missing[unit] -= 1
        if unit >= 0 and missing[unit] == 0:
            after += kernel.join_us
        heapq.heappush(waiting, (now + after, nth, False))
    return Run(now, now - min(dry, now), busy / places)
