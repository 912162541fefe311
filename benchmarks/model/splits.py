"""Into how many splits a row is cut: what csrc/splits.h does, and what it did before.

A test compiles csrc/splits.h and compares every number with this file.
"""

# Of tidal_vllm/kernels/workspace.py, which needs torch: rows times splits, and the most
# and fewest splits of one row.
PARTIAL_ROWS, MAX_SPLITS, MIN_SPLITS = 1024, 128, 8


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def workspace_splits(num_rows: int) -> int:
    """The most splits of a row that the workspace has room for."""
    return max(MIN_SPLITS, min(MAX_SPLITS, PARTIAL_ROWS // max(num_rows, 1)))


def split_row(entries: int, grain: int, splits: int, at_least: int) -> tuple[int, int]:
    """How many splits a row has, and how many entries each of them but the last."""
    if entries == 0:
        return 0, 0
    grains = ceil_div(entries, grain)
    each = ceil_div(grains, min(splits, ceil_div(entries, at_least)))
    return ceil_div(grains, each), each * grain


def limit_splits(
    num_rows: int,
    blocks_per_row: int,
    processors: int,
    capacity: int,
    at_least: int,
    sparse: bool,
) -> int:
    """The most splits of a row, by csrc/splits.h."""
    wave, blocks = 2 * processors, num_rows * blocks_per_row
    if sparse:
        splits, fullest = 0, 0.0
        for waves in range(1 if blocks <= wave else 3, 9):
            if fullest >= 0.8:
                break
            found = waves * wave // blocks
            full = found * blocks / (waves * wave)
            if full > fullest:
                splits, fullest = found, full
    else:
        splits = min(8 * wave // blocks, max(32, wave // blocks))
    return max(1, min(splits, capacity), min(at_least, capacity))


def limit_audited(
    num_rows: int,
    blocks_per_row: int,
    processors: int,
    capacity: int,
    at_least: int,
    sparse: bool,
) -> int:
    """The same in the kernels that were audited: four waves, rounded up."""
    splits = ceil_div(8 * processors, num_rows * blocks_per_row)
    return max(1, min(splits, capacity), min(at_least, capacity))


def limit_triton(
    num_rows: int,
    blocks_per_row: int,
    processors: int,
    capacity: int,
    at_least: int,
    sparse: bool,
) -> int:
    """The same in Triton: 16 programs for each processor."""
    wanted = ceil_div(16 * processors, num_rows * blocks_per_row)
    return max(at_least, min(wanted, capacity))
