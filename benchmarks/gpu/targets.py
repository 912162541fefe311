"""What the kernels have to reach, and how a run's records say whether they do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Records = Sequence[dict]
BIG, LONG = {"batch": 64, "context": 32768}, {"batch": 1, "context": 131072}


@dataclass(frozen=True)
class Target:
    """One number to reach.

    Attributes:
        text: What is measured, and the case.
        bound: To be reached.
        at_most: Whether the bound is an upper one.
        measure: The number, from one run's records; None where records are missing.
        unit: Behind the numbers.
    """

    text: str
    bound: float
    at_most: bool
    measure: Callable[[Records], float | None]
    unit: str = ""

    def reached(self, measured: float) -> bool:
        return measured <= self.bound if self.at_most else measured >= self.bound


def value(records: Records, key: str, **case: object) -> float | None:
    """A number of the newest record of a case; None where there is none."""
    for record in reversed(records):
        if key in record and all(record.get(k) == v for k, v in case.items()):
            return record[key]
    return None


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _dense(records: Records, case: dict, **more: object) -> float | None:
    return value(records, "median_us", benchmark="attend", **case, **more)


def _flash_attn(records: Records, case: dict) -> float | None:
    return _dense(records, case, op="dense", implementation="flash_attn")


def _ours(records: Records, key: str, op: str, case: dict, **more: object):
    kept = {"implementation": "cuda", "select_block_size": 16, "kv_cache_dtype": "auto"}
    kept |= more
    return value(records, key, benchmark="attend", op=op, **case, **kept)


def _scores_kept(batch: int, context: int) -> Target:
    case = {"batch": batch, "context": context}
    return Target(
        f"dense that keeps scores / FlashAttention 3, {batch} x {context}",
        *(1.05, True),
        lambda r: ratio(
            _ours(r, "median_us", "dense + block_lse", case), _flash_attn(r, case)
        ),
    )


def _sparse_to_dense(batch: int, context: int, budget: int) -> Target:
    case = {"batch": batch, "context": context}
    return Target(
        f"sparse at {budget} / FlashAttention 3, {batch} x {context}",
        *(0.11, True),
        lambda r: ratio(
            _ours(r, "median_us", "sparse", case, token_budget=budget),
            _flash_attn(r, case),
        ),
    )


def _sparse_of_copy(batch: int, context: int, budget: int, share: float) -> Target:
    case = {"batch": batch, "context": context, "token_budget": budget}
    return Target(
        f"sparse at {budget}, share of copy, {batch} x {context}",
        *(share, False),
        lambda r: _ours(r, "share_of_copy", "sparse", case),
    )


def _small_blocks(size: int) -> Target:
    return Target(
        f"sparse by blocks of {size} / blocks of 16, bytes per second, 64 x 32768",
        *(0.97, False),
        lambda r: ratio(
            _ours(r, "share_of_copy", "sparse", BIG, select_block_size=size),
            _ours(r, "share_of_copy", "sparse", BIG),
        ),
    )


def _selection(rows: int, context: int, size: int) -> dict:
    case = {"rows": rows, "context": context, "select_block_size": size}
    return case | {"benchmark": "select_blocks", "scope": "sequence"}


def _select_us(rows: int, context: int, microseconds: float) -> Target:
    case = _selection(rows, context, 16) | {"implementation": "cuda"}
    return Target(
        f"select_blocks, {rows} x {context}, blocks of 16",
        *(microseconds, True),
        lambda r: value(r, "median_us", **case),
        "us",
    )


def _select_bytes(rows: int, context: int, size: int, name: str) -> Target:
    case = _selection(rows, context, size) | {"implementation": name}

    def times_its_bytes(records: Records) -> float | None:
        return ratio(1.0, value(records, "share_of_read", **case))

    return Target(
        f"select_blocks by {name} / reading its bytes, {rows} x {context}, "
        f"blocks of {size}",
        *(2.0, True),
        times_its_bytes,
    )


def _triton_select(rows: int, context: int, size: int) -> Target:
    case = _selection(rows, context, size)
    return Target(
        f"select_blocks, Triton / CUDA, {rows} x {context}, blocks of {size}",
        *(1.5, True),
        lambda r: ratio(
            value(r, "median_us", **case, implementation="triton"),
            value(r, "median_us", **case, implementation="cuda"),
        ),
    )


def _stack(case: dict, bound: float) -> Target:
    about = case | {"benchmark": "stack", "implementation": "cuda"}
    about |= {"reselect_interval": 1, "select_attends": "everything"}
    return Target(
        f"attention of 32 layers, speed-up, {case['batch']} x {case['context']}",
        *(bound, False),
        lambda r: value(r, "speedup", **about),
        "x",
    )


FP8 = Target(
    "sparse over fp8, speed-up over bf16 on the same tokens, 64 x 32768",
    *(1.7, False),
    lambda r: ratio(
        _ours(r, "median_us", "sparse", BIG),
        _ours(r, "median_us", "sparse", BIG, kv_cache_dtype="fp8"),
    ),
    "x",
)
LAUNCHES = Target(
    "launches of a SPARSE layer",
    *(1, True),
    lambda r: value(
        r, "launches", benchmark="attend", op="sparse", implementation="cuda"
    ),
)
TARGETS = (
    *(_scores_kept(*case) for case in ((64, 32768), (16, 32768), (16, 131072))),
    _scores_kept(1, 131072),
    _sparse_to_dense(64, 32768, 3264),
    _sparse_to_dense(16, 131072, 13104),
    _sparse_of_copy(64, 32768, 3264, 0.8),
    _sparse_of_copy(16, 131072, 13104, 0.8),
    _sparse_of_copy(16, 32768, 4096, 0.8),
    _sparse_of_copy(4, 131072, 4096, 0.7),
    LAUNCHES,
    *(_small_blocks(size) for size in (4, 2, 1)),
    FP8,
    _select_us(16, 65536, 15),
    _select_us(64, 131072, 30),
    *(
        _select_bytes(rows, context, size, name)
        for name in ("cuda", "triton")
        for rows, context in ((16, 65536), (64, 131072))
        for size in (16, 4)
    ),
    *(
        _triton_select(rows, context, size)
        for rows, context in ((16, 65536), (64, 131072))
        for size in (16, 4)
    ),
    _stack(BIG, 5.0),
    _stack(LONG, 2.5),
)
