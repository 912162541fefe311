"""What an audit of the kernels' machine code modelled, and this model beside it.

The audit came before the first redesign: it counted SASS instructions and simulated
thread blocks, and ran nothing on a GPU. Its figures are kept here to say how far two
models of the same kernels agree, with the H100 that both of them assumed.
"""

from dataclasses import dataclass

from benchmarks.model import targets
from benchmarks.model.design import AUDITED, TRITON_AUDITED
from benchmarks.model.hardware import ASSUMED_H100 as H100
from benchmarks.model.step import decode_step
from benchmarks.model.targets import SHAPE, K, case, even

FA_SHARES = (0.75, 0.85, 0.95)  # of copy, which nobody had measured


@dataclass(frozen=True)
class Compared:
    """One figure of the audit: a number, or the two ends of a range."""

    what: str
    low: float
    high: float
    found: float

    @property
    def off(self) -> float:
        """How far the model is outside the range, as a share of its nearer end."""
        if self.found < self.low:
            return self.found / self.low - 1
        return max(0.0, self.found / self.high - 1)

    @property
    def said(self) -> str:
        return f"{self.low:g}" + (f" to {self.high:g}" if self.high > self.low else "")


def compare() -> list[Compared]:
    """Every modelled figure of the audit's tables, for the kernels it looked at."""
    found = []

    def add(what: str, low: float, value: float, high: float | None = None) -> None:
        found.append(Compared(what, low, low if high is None else high, value))

    for rows, tokens, share in (
        (1, 128 * K, 0.84),
        (16, 32 * K, 0.895),
        (64, 32 * K, 0.935),
    ):
        op = targets.dense(AUDITED, rows, tokens, gpu=H100)
        name = f"dense with scores, {case(rows, tokens)}, share of copy"
        add(name, share, op.share_of_read(H100))
    for rows, budget, share in (
        (64, 4096, 0.91),
        (16, 13104, 0.89),
        (16, 4096, 0.81),
        (4, 4096, 0.53),
        (1, 4096, 0.31),
    ):
        op = targets.sparse(AUDITED, rows, budget, gpu=H100)
        name = f"sparse, batch {rows}, budget {budget}, share of copy"
        add(name, share, op.share_of_read(H100))
    whole = 64 * 32 * K * SHAPE.token_bytes / H100.read_bytes_per_us
    us = targets.sparse(AUDITED, 64, 3264, gpu=H100).us
    for fa_share, ratio in ((0.75, 0.083), (0.95, 0.105)):
        name = f"sparse at 10 % over dense, FlashAttention's share {fa_share}"
        add(name, ratio, us * fa_share / whole)
    for design, name, ranges in (
        (AUDITED, "CUDA", ((13, 17), (33, 40))),
        (TRITON_AUDITED, "Triton", ((38, 38), (48, 48))),
    ):
        for (rows, tokens), (low, high) in zip(
            ((16, 64 * K), (64, 128 * K)), ranges, strict=True
        ):
            us = targets.select(design, rows, tokens, gpu=H100).us
            add(f"select, {name}, {case(rows, tokens)}, us", low, us, high)
    for fa_share, speedup in zip(FA_SHARES, (5.4, 5.0, 4.6), strict=True):
        config = targets.to_everything(3264)
        step = decode_step(H100, AUDITED, SHAPE, even(64, 32 * K), config, fa_share)
        name = f"stack, 64 x 32K, FlashAttention's share {fa_share}, speed-up"
        add(name, speedup, step.speedup)
    config = targets.to_everything(4096)
    step = decode_step(H100, AUDITED, SHAPE, even(1, 128 * K), config, 0.85)
    add("stack, 1 x 128K, FlashAttention's share 0.85, speed-up", 4.5, step.speedup, 5)
    for rows, budget in ((64, 4096), (16, 13104)):
        op = targets.sparse(TRITON_AUDITED, rows, budget, gpu=H100)
        name = f"sparse, Triton, batch {rows}, budget {budget}, share of copy"
        add(name, 0.85, op.share_of_read(H100), 0.9)
    slow = targets.sparse(AUDITED, 64, 4096, 16, targets.FP8, H100).us
    fast = targets.sparse(AUDITED, 64, 4096, gpu=H100).us
    add("sparse, fp8 over bf16, batch 64", 1.4, fast / slow)
    return found
