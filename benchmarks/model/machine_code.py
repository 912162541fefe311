"""Instructions of the kernels' main loops: counted by an audit, or in a file.

bf16 queries, 32 query and 8 KV heads of 128, sm_90a, nvcc 13.0.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
LOOPING = ("dense_decode", "score_blocks", "sparse_decode")
COUNTED = RESULTS / "machine_code.json"  # benchmarks/kernels/machine_code.py writes it
FIELDS = (
    *("stored", "head_size", "arch", "select_block_size", "instructions_per_tile"),
    *("tile_bytes", "blocks_per_processor", "shared_bytes"),
)


@dataclass(frozen=True)
class Loop:
    """The main loop of one kernel.

    Attributes:
        instructions: Of one warp for one tile.
        tile_bytes: Of K and V, or of K alone, of the tile's tokens.
        resident: Thread blocks of one processor at a time, by their registers and by an
            H100's shared memory.
        shared_kib: Shared memory of a thread block.
        warps: Of a thread block; each takes tiles of its own.
        source: Who counted.
    """

    instructions: float
    tile_bytes: int
    resident: int
    shared_kib: float
    warps: int
    source: str


# By kernel, type of the KV cache, and selection block; None: of any size.
Loops = dict[tuple[str, str, int | None], Loop]


def loop_of(loops: Loops, kernel: str, stored: str, block: int) -> Loop:
    """The loop of a kernel; one of blocks of 16 stands for sizes that nobody counted.

    Raises:
        KeyError: There is none for this kernel and this type.
    """
    for size in (block, 16):
        if (kernel, stored, size) in loops:
            return loops[kernel, stored, size]
    return loops[kernel, stored, None]


def _loops(
    source: str,
    resident: int,
    shared_kib: dict[str, float],
    counted: dict[tuple[str, str], int],
    guessed: dict[tuple[str, str], int],
) -> Loops:
    return {
        (kernel, stored, None): Loop(
            count,
            8192 // (2 if stored == "fp8" else 1) // (2 if "score" in kernel else 1),
            resident,
            shared_kib["score" if "score" in kernel else stored],
            4,
            source if (kernel, stored) in counted else "a guess",
        )
        for (kernel, stored), count in (counted | guessed).items()
    }


SHARED_KIB = {"bf16": 99, "fp8": 85, "score": 85}
AUDITED = _loops(
    "counted, audit",
    2,
    SHARED_KIB,
    {
        ("dense_decode", "bf16"): 989,
        ("sparse_decode", "bf16"): 844,
        ("score_blocks", "bf16"): 680,
        ("sparse_decode", "fp8"): 1275,
    },
    {("dense_decode", "fp8"): 1420, ("score_blocks", "fp8"): 890},
)
PROTOTYPE = _loops(
    "counted, prototype",
    2,
    SHARED_KIB,
    {("dense_decode", "bf16"): 590, ("sparse_decode", "bf16"): 408},
    {
        ("score_blocks", "bf16"): 406,
        ("sparse_decode", "fp8"): 640,
        ("dense_decode", "fp8"): 820,
        ("score_blocks", "fp8"): 500,
    },
)
# Nobody counted this one: fitted to score_blocks over fp8 at 64 x 32K on an H100.
FITTED = {
    ("score_blocks", "fp8", None): replace(
        PROTOTYPE["score_blocks", "fp8", None], instructions=450, source="fitted, H100"
    )
}
TRITON = _loops(
    "counted, audit",
    3,
    {"bf16": 71, "score": 71},
    {("dense_decode", "bf16"): 861, ("sparse_decode", "bf16"): 801},
    {("score_blocks", "bf16"): 430},
)


def read_loops(path: Path) -> Loops:
    """The loops of a file of counts; what it does not hold is the prototype's.

    Without the file, all of them are.

    Raises:
        ValueError: An entry without one of `FIELDS`, or no count above 0.
    """
    found = dict(PROTOTYPE)
    if not path.exists():
        return found
    for i, entry in enumerate(json.loads(path.read_text())):
        if entry["kernel"] not in LOOPING:
            continue
        missing = [key for key in FIELDS if key not in entry]
        if missing:
            raise ValueError(f"{path}: entry {i} lacks {missing}; needed {FIELDS}")
        count = entry["instructions_per_tile"]
        if count <= 0:
            raise ValueError(
                f"{path}: entry {i}: instructions_per_tile = {count}: allowed > 0"
            )
        if entry["head_size"] != 128 or entry["arch"] != "sm_90a":
            continue
        kernel, stored = entry["kernel"], entry["stored"]
        found.pop((kernel, stored, None), None)
        found[kernel, stored, entry["select_block_size"]] = Loop(
            count,
            entry["tile_bytes"],
            entry["blocks_per_processor"],
            entry["shared_bytes"] / 1024,
            4,
            f"counted, {path.name}",
        )
    return found
