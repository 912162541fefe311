"""The targets of the kernels, and what the model says to each; on an H100."""

from dataclasses import dataclass, replace

from benchmarks.model.attend import Prediction, dense_decode, sparse_decode
from benchmarks.model.design import Design
from benchmarks.model.hardware import GPUS, SHAPES, Gpu, Shape
from benchmarks.model.select import select_blocks
from benchmarks.model.step import decode_step, dense_backend
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.rule import SelectionRule

H100, H200 = GPUS["h100"], GPUS["h200"]
SHAPE = SHAPES["llama-3.1-8b"]
FP8 = replace(SHAPE, stored="fp8")
# What is left of it on each of eight ranks.
ONE_KV_HEAD = replace(SHAPE, num_heads=4, num_kv_heads=1)
K = 1024
# FlashAttention's share of copy is not known: nobody has measured it here.
FA_SHARES = (0.75, 0.85, 0.95)


@dataclass(frozen=True)
class Verdict:
    """One line of the table of targets: a model's numbers, not measured."""

    target: str
    case: str
    found: str
    met: str


def size(tokens: int) -> str:
    return f"{tokens // K}K" if tokens % K == 0 else str(tokens)


def case(rows: int, tokens: int) -> str:
    return f"{rows} x {size(tokens)}"


def even(rows: int, tokens: int) -> tuple[int, ...]:
    return (tokens,) * rows


def sparse(
    design: Design, rows: int, kept: int, block: int = 16, shape: Shape = SHAPE
) -> Prediction:
    return sparse_decode(H100, design, shape, even(rows, kept), block)


def select(design: Design, rows: int, tokens: int, block: int = 16) -> Prediction:
    return select_blocks(H100, design, SHAPE, even(rows, tokens), block)


def dense(design: Design, rows: int, tokens: int, block: int = 16) -> Prediction:
    """With scores kept for blocks."""
    return dense_decode(H100, design, SHAPE, even(rows, tokens), block)


def yes(met: bool) -> str:
    return "yes" if met else "**no**"


def verdicts(cuda: Design, triton: Design) -> list[Verdict]:
    """Every target, by the model."""
    return [
        *_dense(cuda),
        *_sparse(cuda),
        *_select(cuda, triton),
        *_fp8(cuda),
        *_stack(cuda),
    ]


def _dense(cuda: Design) -> list[Verdict]:
    found = []
    for rows, tokens in ((1, 128 * K), (16, 32 * K), (64, 32 * K)):
        share = dense(cuda, rows, tokens).share_of_copy(H100)
        found.append(
            Verdict(
                "dense that keeps scores <= 1.05 x FlashAttention",
                case(rows, tokens),
                f"{share:.3f} of copy",
                f"yes, if FlashAttention's share is below {1.05 * share:.3f}",
            )
        )
    return found


def _sparse(cuda: Design) -> list[Verdict]:
    found = []
    for rows, tokens, budget in ((64, 32 * K, 3264), (16, 128 * K, 13104)):
        whole = dense_backend(H100, SHAPE, even(rows, tokens), 1.0).us
        us = sparse(cuda, rows, budget).us
        ratios = [us / (whole / share) for share in FA_SHARES]
        found.append(
            Verdict(
                "sparse at 10 % <= 0.11 x dense",
                f"{case(rows, tokens)}, budget {budget}",
                " / ".join(f"{ratio:.3f}" for ratio in ratios) + " (*)",
                yes(max(ratios) <= 0.11),
            )
        )
    for rows, budget, wanted in (
        (64, 4096, 0.8),
        (16, 13104, 0.8),
        (16, 4096, 0.8),
        (4, 4096, 0.7),
        (1, 4096, None),
    ):
        op = sparse(cuda, rows, budget)
        found.append(_share(op, H100, f"batch {rows}, budget {budget}", wanted))
    for name, gpu, shape, wanted in (
        ("H200", H200, SHAPE, 0.7),
        ("one KV head", H100, ONE_KV_HEAD, None),
    ):
        op = sparse_decode(gpu, cuda, shape, even(4, 4096), 16)
        found.append(_share(op, gpu, f"batch 4, budget 4096, {name}", wanted))
    launches = sparse(cuda, 1, 4096).launches
    found.append(
        Verdict(
            "one launch per SPARSE layer",
            "any",
            f"{launches}",
            yes(launches == 1),
        )
    )
    return found


def _share(op: Prediction, gpu: Gpu, of: str, wanted: float | None) -> Verdict:
    share = op.share_of_copy(gpu)
    return Verdict(
        f"sparse >= {wanted:.0%} of copy" if wanted else "sparse, no target",
        of,
        f"{share:.3f}, {op.us:.1f} us",
        yes(share >= wanted) if wanted else "",
    )


def _select(cuda: Design, triton: Design) -> list[Verdict]:
    found = []
    for rows, tokens, wanted in ((16, 64 * K, 15), (64, 128 * K, 30)):
        us = select(cuda, rows, tokens).us
        found.append(
            Verdict(
                f"select <= {wanted} us",
                f"{case(rows, tokens)}, blocks of 16",
                f"{us:.1f} us",
                yes(us <= wanted),
            )
        )
    for name, design in (("CUDA", cuda), ("Triton", triton)):
        for rows, tokens in ((16, 64 * K), (64, 128 * K)):
            op = select(design, rows, tokens, 4)
            ratio = op.us * H100.copy_bytes_per_us / op.other_bytes
            found.append(
                Verdict(
                    f"select within 2x of its bytes, {name}",
                    f"{case(rows, tokens)}, blocks of 4",
                    f"{op.us:.1f} us, {ratio:.2f} x",
                    yes(ratio <= 2),
                )
            )
    for rows, tokens, block in (
        (16, 64 * K, 16),
        (64, 128 * K, 16),
        (16, 64 * K, 4),
        (64, 128 * K, 4),
    ):
        us = select(triton, rows, tokens, block).us
        ratio = us / select(cuda, rows, tokens, block).us
        found.append(
            Verdict(
                "Triton's selection within 1.5x of CUDA's",
                f"{case(rows, tokens)}, blocks of {block}",
                f"{us:.1f} us, {ratio:.2f} x",
                yes(ratio <= 1.5),
            )
        )
    return found


def _fp8(cuda: Design) -> list[Verdict]:
    found = []
    for rows, budget in ((64, 4096), (16, 13104), (16, 4096), (4, 4096), (1, 4096)):
        ratio = sparse(cuda, rows, budget).us / sparse(cuda, rows, budget, 16, FP8).us
        found.append(
            Verdict(
                "fp8 at least 1.7x over bf16 on the same tokens",
                f"sparse, batch {rows}, budget {budget}",
                f"{ratio:.2f} x",
                yes(ratio >= 1.7),
            )
        )
    return found


def _stack(cuda: Design) -> list[Verdict]:
    found = []
    for rows, tokens, budget, wanted in (
        (64, 32 * K, 3264, 5.0),
        (1, 128 * K, 4096, 2.5),
    ):
        config = TidalConfig(token_budget=budget)
        speedups = [
            decode_step(H100, cuda, SHAPE, even(rows, tokens), config, share).speedup
            for share in FA_SHARES
        ]
        met = [
            f"{share}"
            for share, s in zip(FA_SHARES, speedups, strict=True)
            if s >= wanted
        ]
        every = len(met) == len(FA_SHARES)
        found.append(
            Verdict(
                f"stack >= {wanted} x, batch {rows}",
                f"{case(rows, tokens)}, budget {budget}",
                " / ".join(f"{speedup:.1f}" for speedup in speedups) + " (*)",
                "yes" if every else f"where FlashAttention's share is {', '.join(met)}",
            )
        )
    return found


def in_short(cuda: Design, gpu: Gpu) -> tuple[float, float, float, float]:
    """What changes with the assumptions: one figure of each op, and of the stack.

    Returns:
        Share of copy of sparse with 4 rows and of dense with 16 x 32K, select_blocks
        for 16 x 64K in us, the stack's speed-up at 64 x 32K.
    """
    few = sparse_decode(gpu, cuda, SHAPE, even(4, 4096), 16)
    many = dense_decode(gpu, cuda, SHAPE, even(16, 32 * K), 16)
    chosen = select_blocks(gpu, cuda, SHAPE, even(16, 64 * K), 16)
    config = TidalConfig(token_budget=3264)
    step = decode_step(gpu, cuda, SHAPE, even(64, 32 * K), config, FA_SHARES[1])
    return few.share_of_copy(gpu), many.share_of_copy(gpu), chosen.us, step.speedup


def select_layer(
    design: Design, rows: int, tokens: int, block: int, fa_share: float
) -> tuple[float, float, float]:
    """select_blocks in us, as a share of dense, and a SELECT layer as a share of it.

    Dense is FlashAttention's time for the layer. The SELECT layer is one that attends
    to everything: dense_decode that keeps the scores, and select_blocks.
    """
    whole = dense_backend(H100, SHAPE, even(rows, tokens), fa_share).us
    chosen = select(design, rows, tokens, block).us
    kept = dense(design, rows, tokens, block).us
    return chosen, chosen / whole, (kept + chosen) / whole


def sparse_by_block(
    design: Design, rows: int, budget: int, fa_share: float, tokens: int
) -> list[tuple[int, float, float, float]]:
    """Per selection block: sparse in us, its share of copy, the stack's speed-up."""
    found = []
    for block in (16, 4, 2, 1):
        config = TidalConfig(token_budget=budget, select_block_size=block)
        kept = SelectionRule.from_config(config).kept_tokens(tokens)
        op = sparse(design, rows, kept, block)
        step = decode_step(H100, design, SHAPE, even(rows, tokens), config, fa_share)
        found.append((block, op.us, op.share_of_copy(H100), step.speedup))
    return found
