"""Thread blocks that share a GPU's bandwidth, one kernel at a time.

Each thread block waits for its first bytes, streams, then ends; the next one takes its
place. What streams at the same time shares the bandwidth evenly, up to what a thread
block and a processor can take. This is where waves, tails and the cost of small thread
blocks come from.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """What all thread blocks of a launch have in common. Times in us, bytes per us.

    Attributes:
        resident: Blocks of one processor at a time.
        before_us: From a block's start to its first bytes.
        after_us: From its last bytes to its end.
        empty_us: Of a block that finds nothing to do.
        join_us: What the last block of a unit takes longer.
        block_rate: What a block can stream by itself.
        processor_rate: What the blocks of a processor can stream together.
    """

    resident: int
    before_us: float
    after_us: float
    empty_us: float = 0.0
    join_us: float = 0.0
    block_rate: float = math.inf
    processor_rate: float = math.inf


@dataclass
class Run:
    """How a launch went."""

    us: float
    """From the first block's start to the last one's end."""
    tail_us: float
    """Of these, with places that no block was left for."""
    waves: float
    """Blocks with something to do, in units of what the GPU holds at once."""


@dataclass
class _Streams:
    """The blocks that stream, by how many of their processor do so.

    All blocks of a class stream at the same rate. So a class needs one clock, of bytes
    streamed per block since the start, and each block the reading at which it ends.
    """

    kernel: Kernel
    bandwidth: float
    clocks: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ends: list[list[tuple[float, int]]] = field(default_factory=list)
    class_of: dict[int, int] = field(default_factory=dict)
    end_of: dict[int, float] = field(default_factory=dict)
    on_processor: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where a processor sets no limit, all blocks are alike.
        limited = math.isfinite(self.kernel.processor_rate)
        self.num_classes = self.kernel.resident if limited else 1
        self.clocks = [0.0] * self.num_classes
        self.counts = [0] * self.num_classes
        self.ends = [[] for _ in range(self.num_classes)]
        self.limits = [
            min(self.kernel.block_rate, self.kernel.processor_rate / (i + 1))
            for i in range(self.num_classes)
        ]

    def __bool__(self) -> bool:
        return bool(self.class_of)

    def rates(self) -> list[float]:
        """Bytes per us of a block of each class: slow classes first, the rest even."""
        left, blocks = self.bandwidth, sum(self.counts)
        found = [0.0] * self.num_classes
        for i in sorted(range(self.num_classes), key=self.limits.__getitem__):
            if self.counts[i]:
                found[i] = min(self.limits[i], left / blocks)
                left -= found[i] * self.counts[i]
                blocks -= self.counts[i]
        return found

    def next_end(self, rates: list[float]) -> tuple[float, int]:
        """In how many us the next block has streamed all its bytes, and its class."""
        first, where = math.inf, -1
        for i, ends in enumerate(self.ends):
            while ends and not self._is_at(ends[0], i):
                heapq.heappop(ends)  # of a block that has changed its class
            if ends:
                wait = max(0.0, ends[0][0] - self.clocks[i]) / rates[i]
                first, where = min((first, where), (wait, i))
        return first, where

    def _is_at(self, entry: tuple[float, int], where: int) -> bool:
        end, block = entry
        return self.class_of.get(block) == where and self.end_of[block] == end

    def advance(self, rates: list[float], us: float) -> None:
        for i, rate in enumerate(rates):
            self.clocks[i] += rate * us

    def add(self, block: int, processor: int, num_bytes: float) -> None:
        beside = self.on_processor.setdefault(processor, set())
        self._reclass(beside, len(beside))
        beside.add(block)
        self._enter(block, min(len(beside), self.num_classes) - 1, num_bytes)

    def remove_first(self, where: int, processor_of: dict[int, int]) -> int:
        block = self.ends[where][0][1]
        self._leave(block)
        beside = self.on_processor[processor_of[block]]
        beside.discard(block)
        self._reclass(beside, len(beside) - 1)
        return block

    def _reclass(self, blocks: set[int], to: int) -> None:
        if self.num_classes > 1:
            for block in sorted(blocks):
                self._enter(block, to, self._leave(block))

    def _enter(self, block: int, to: int, num_bytes: float) -> None:
        self.class_of[block] = to
        self.counts[to] += 1
        self.end_of[block] = self.clocks[to] + num_bytes
        heapq.heappush(self.ends[to], (self.end_of[block], block))

    def _leave(self, block: int) -> float:
        """Take a block out of its class; returns the bytes that it has left."""
        was = self.class_of.pop(block)
        self.counts[was] -= 1
        return self.end_of.pop(block) - self.clocks[was]


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
    streams = _Streams(kernel, bandwidth)
    waiting: list[tuple[float, int, bool]] = []  # time, block, whether it then streams
    processor_of: dict[int, int] = {}
    missing: dict[int, int] = {}
    for block in blocks:
        if block.num_bytes > 0:
            missing[block.unit] = missing.get(block.unit, 0) + 1
    busy = sum(missing.values())
    now, dry, begun = 0.0, math.inf, 0

    def begin(processor: int) -> None:
        nonlocal begun, dry
        if begun == len(blocks):
            dry = min(dry, now)
            return
        processor_of[begun] = processor
        works = blocks[begun].num_bytes > 0
        first = kernel.before_us if works else kernel.empty_us
        heapq.heappush(waiting, (now + first, begun, works))
        begun += 1

    for place in range(processors * kernel.resident):
        begin(place % processors)
    while waiting or streams:
        rates = streams.rates()
        wait, where = streams.next_end(rates)
        if waiting and waiting[0][0] - now < wait:
            then, block, streaming = heapq.heappop(waiting)
            streams.advance(rates, then - now)
            now = then
            if streaming:
                off = 1 + spread * (2 * (block * GOLDEN % 1) - 1)
                streams.add(block, processor_of[block], blocks[block].num_bytes * off)
            else:
                begin(processor_of[block])
            continue
        streams.advance(rates, wait)
        now += wait
        block = streams.remove_first(where, processor_of)
        unit, after = blocks[block].unit, kernel.after_us
        missing[unit] -= 1
        if unit >= 0 and missing[unit] == 0:
            after += kernel.join_us
        heapq.heappush(waiting, (now + after, block, False))
    return Run(now, now - min(dry, now), busy / (processors * kernel.resident))
