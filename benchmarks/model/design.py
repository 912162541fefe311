"""What tells the audited kernels from those of today, and CUDA from Triton.

Those of today are there twice: as they were guessed before a GPU ran them, and with the
constants that were then fitted to what an H100 measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.model import machine_code, splits
from benchmarks.model.machine_code import Loops


@dataclass(frozen=True)
class Choose:
    """How select_blocks sums masses and finds the heaviest blocks. Times in us.

    Attributes:
        candidates_each: Candidates of a thread block that sums masses.
        in_flight: Bytes that such a block has under way.
        resident: Such blocks of one processor.
        one_launch: The row's last block to arrive chooses; else a kernel of its own.
        passes: Over the row's masses, writing the set included.
        pass_us: Of a pass, whatever the row: barriers, finding the digit.
        threads: Of the block that chooses.
        round_us: Of a pass, for as many masses as there are threads.
        reads: How often the masses come from L2.
        chunk: Masses that are loaded at a time.
        held: A longer row comes from L2 in every pass.
        chain: Loads that need each other before a block sums masses, the first of the
            masses included.
        count_us: Of a block that sums masses, to count their first digits.
        rest_us: Of choosing, besides its passes over the masses.
    """

    candidates_each: int
    in_flight: int
    resident: int
    one_launch: bool
    passes: int
    pass_us: float
    threads: int
    round_us: float
    reads: int
    chunk: int
    held: int = 1 << 30
    chain: int = 3
    count_us: float = 0.0
    rest_us: float = 0.0


@dataclass(frozen=True)
class Design:
    """One generation of kernels.

    Attributes:
        merges_inside: The last thread block of a row and head group joins the splits;
            else a kernel of its own does.
        merge_chunk: Splits whose results are loaded at a time.
        dependent_launch: A kernel of ours that follows one of ours starts early.
        limit_splits: See benchmarks/model/splits.py.
        dense_tokens, sparse_tokens: A row is split no finer than this.
        splits_at_least: Of dense rows.
        dense_run: Consecutive tiles that a warp takes where dense.
        stream_share: Of `Gpu.gather_share`, while nothing but streaming goes on.
        sparse_us: What sparse_decode was measured to take besides; nobody knows why.
    """

    name: str
    loops: Loops
    choose: Choose
    merges_inside: bool
    merge_chunk: int
    dependent_launch: bool
    limit_splits: Callable[[int, int, int, int, int, bool], int]
    dense_tokens: int = 512
    sparse_tokens: int = 128
    splits_at_least: int = 8
    dense_run: int = 1
    stream_share: float = 1.0
    sparse_us: float = 0.0


AUDITED = Design(
    "CUDA, audited",
    machine_code.AUDITED,
    Choose(
        candidates_each=128,
        in_flight=4096,
        resident=16,
        one_launch=False,
        passes=5,
        pass_us=0.5,
        threads=1024,
        round_us=0.1,
        reads=1,
        chunk=1024,
    ),
    merges_inside=False,
    merge_chunk=4,
    dependent_launch=False,
    limit_splits=splits.limit_audited,
)
GUESSED = replace(
    AUDITED,
    name="CUDA, guessed",
    dense_run=4,
    loops=machine_code.PROTOTYPE,
    # One pass marks what has the first digit, 16,384 masses at a time. Around it: two
    # loads from L2, 0.35 each, of the counts and of the list's masses; and as much as
    # three passes over a short list, two for digits and one for the set.
    choose=Choose(
        candidates_each=512,
        in_flight=64 << 10,
        resident=2,
        one_launch=True,
        passes=1,
        pass_us=0.6,
        threads=512,
        round_us=0.032,
        reads=1,
        chunk=16384,
        chain=2,
        count_us=0.2,
        rest_us=2.5,
    ),
    merges_inside=True,
    merge_chunk=16,
    dependent_launch=True,
    limit_splits=splits.limit_splits,
)
TODAY = replace(
    GUESSED,
    name="CUDA, today",
    # Fitted to a544ee9, choosing for 16 x 64K by blocks of 16 and of 4.
    choose=replace(GUESSED.choose, round_us=0.1),
)
TRITON_AUDITED = replace(
    AUDITED,
    name="Triton, audited",
    loops=machine_code.TRITON,
    # One load of 2 KiB at a time; a pass for each bit.
    choose=Choose(
        candidates_each=512,
        in_flight=1450,
        resident=16,
        one_launch=False,
        passes=33,
        pass_us=0.13,
        threads=256,
        round_us=0.01,
        reads=1,
        chunk=8192,
        held=8192,
    ),
    stream_share=0.95,
    merge_chunk=16,
    limit_splits=splits.limit_triton,
    dense_tokens=256,
    splits_at_least=1,
)
TRITON_GUESSED = replace(
    TRITON_AUDITED,
    name="Triton, guessed",
    # The first digit is counted with the masses. Then one more digit (mostly) and the
    # set: each reads the masses, 8,192 at a time, by 12 and 15 instructions per mass
    # (counted for sm_90; 2.4 of a processor's per clock is a guess).
    choose=Choose(
        candidates_each=128,
        in_flight=16 << 10,
        resident=8,
        one_launch=False,
        passes=2,
        pass_us=1.0,
        threads=512,
        round_us=0.052,
        reads=2,
        chunk=8192,
        chain=2,
        count_us=0.2,
        rest_us=0.9,
    ),
)
TRITON = replace(
    TRITON_GUESSED,
    name="Triton, today",
    # Fitted to 45ff83b: both times to choosing for 16 x 64K and 64 x 128K by blocks of
    # 16 and of 4; the last one to sparse_decode with 1, 16 and 64 rows.
    choose=replace(TRITON_GUESSED.choose, pass_us=4.0, round_us=1.25),
    sparse_us=5.3,
)


def guessed(path: Path = machine_code.COUNTED) -> Design:
    """The CUDA kernels as they were guessed, with what a file counts."""
    return replace(GUESSED, loops=machine_code.read_loops(path))


def today(path: Path = machine_code.COUNTED) -> Design:
    """Today's CUDA kernels, with the instructions that a file counts."""
    loops = machine_code.read_loops(path)
    fitted = {k: v for k, v in machine_code.FITTED.items() if k in loops}
    return replace(TODAY, loops=loops | fitted)
