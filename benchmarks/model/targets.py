"""The targets of the kernels, and what the model says to each; on an H100.

An op that is named by itself is alone in a CUDA graph, as the benchmarks measure it.
"""

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
# FlashAttention 3's share of read, alone in a CUDA graph: measured on an H100.
FA_SHARES = {
    (64, 32 * K): 0.987,
    (16, 32 * K): 0.965,
    (16, 128 * K): 0.978,
    (1, 128 * K): 0.877,
}


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
    design: Design,
    rows: int,
    kept: int,
    block: int = 16,
    shape: Shape = SHAPE,
    gpu: Gpu = H100,
) -> Prediction:
    return sparse_decode(gpu, design, shape, even(rows, kept), block)


def select(
    design: Design, rows: int, tokens: int, block: int = 16, gpu: Gpu = H100
) -> Prediction:
    return select_blocks(gpu, design, SHAPE, even(rows, tokens), block)


def dense(
    design: Design, rows: int, tokens: int, block: int = 16, gpu: Gpu = H100
) -> Prediction:
    """With scores kept for blocks."""
    return dense_decode(gpu, design, SHAPE, even(rows, tokens), block)


def flash_attention_us(rows: int, tokens: int) -> float:
    """As measured, alone in a CUDA graph."""
    share = FA_SHARES[rows, tokens]
    return dense_backend(H100, SHAPE, even(rows, tokens), share).alone_us(H100)


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
    for rows, tokens in FA_SHARES:
        op = dense(cuda, rows, tokens)
        ratio = op.alone_us(H100) / flash_attention_us(rows, tokens)
        found.append(
            Verdict(
                "dense that keeps scores <= 1.05 x FlashAttention",
                case(rows, tokens),
                f"{ratio:.3f}, {op.share_of_read(H100):.3f} of read",
                yes(ratio <= 1.05),
            )
        )
    return found


def _sparse(cuda: Design) -> list[Verdict]:
    found = []
    for rows, tokens, budget in ((64, 32 * K, 3264), (16, 128 * K, 13104)):
        us = sparse(cuda, rows, budget).alone_us(H100)
        ratio = us / flash_attention_us(rows, tokens)
        found.append(
            Verdict(
                "sparse at 10 % <= 0.11 x dense",
                f"{case(rows, tokens)}, budget {budget}",
                f"{ratio:.3f}",
                yes(ratio <= 0.11),
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
    share = op.share_of_read(gpu) * gpu.read_tb_per_s / gpu.copy_tb_per_s
    return Verdict(
        f"sparse >= {wanted:.0%} of copy" if wanted else "sparse, no target",
        of,
        f"{share:.3f} of copy, {op.share_of_read(gpu):.3f} of read, "
        f"{op.alone_us(gpu):.1f} us",
        yes(share >= wanted) if wanted else "",
    )


def _select(cuda: Design, triton: Design) -> list[Verdict]:
    found = []
    for rows, tokens, wanted in ((16, 64 * K, 15), (64, 128 * K, 30)):
        us = select(cuda, rows, tokens).alone_us(H100)
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
            ratio = 1 / op.share_of_read(H100)
            found.append(
                Verdict(
                    f"select within 2x of its bytes, {name}",
                    f"{case(rows, tokens)}, blocks of 4",
                    f"{op.alone_us(H100):.1f} us, {ratio:.2f} x",
                    yes(ratio <= 2),
                )
            )
    for rows, tokens, block in (
        (16, 64 * K, 16),
        (64, 128 * K, 16),
        (16, 64 * K, 4),
        (64, 128 * K, 4),
    ):
        us = select(triton, rows, tokens, block).alone_us(H100)
        ratio = us / select(cuda, rows, tokens, block).alone_us(H100)
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
        slow, fast = sparse(cuda, rows, budget), sparse(cuda, rows, budget, 16, FP8)
        ratio = slow.alone_us(H100) / fast.alone_us(H100)
        found.append(
            Verdict(
                "fp8 at least 1.7x over bf16 on the same tokens",
                f"sparse, batch {rows}, budget {budget}",
                f"{ratio:.2f} x",
                yes(ratio >= 1.7),
            )
        )
    return found


def to_everything(token_budget: int, select_block_size: int = 16) -> TidalConfig:
    """Settings whose SELECT layers attend to everything, as the targets were set."""
    return TidalConfig(
        token_budget=token_budget,
        select_block_size=select_block_size,
        select_attends="everything",
    )


def _stack(cuda: Design) -> list[Verdict]:
    found = []
    for rows, tokens, budget, wanted in (
        (64, 32 * K, 3264, 5.0),
        (1, 128 * K, 4096, 2.5),
    ):
        config = to_everything(budget)
        share = FA_SHARES[rows, tokens]
        step = decode_step(H100, cuda, SHAPE, even(rows, tokens), config, share)
        found.append(
            Verdict(
                f"stack >= {wanted} x, batch {rows}",
                f"{case(rows, tokens)}, budget {budget}",
                f"{step.speedup:.2f}",
                yes(step.speedup >= wanted),
            )
        )
    return found


def in_short(cuda: Design, gpu: Gpu) -> tuple[float, float, float, float, float]:
    """What changes with the assumptions: one figure of each op, and of the stack.

    Returns:
        Share of read of sparse with 4 rows and of dense with 16 x 32K, select_blocks
        for 16 x 64K in us, the stack's speed-up at 64 x 32K and at 1 x 128K.
    """
    few = sparse_decode(gpu, cuda, SHAPE, even(4, 4096), 16)
    many = dense_decode(gpu, cuda, SHAPE, even(16, 32 * K), 16)
    chosen = select_blocks(gpu, cuda, SHAPE, even(16, 64 * K), 16)
    speedups = []
    for rows, tokens, budget in ((64, 32 * K, 3264), (1, 128 * K, 4096)):
        config = to_everything(budget)
        share = FA_SHARES[rows, tokens]
        step = decode_step(gpu, cuda, SHAPE, even(rows, tokens), config, share)
        speedups.append(step.speedup)
    shares = few.share_of_read(gpu), many.share_of_read(gpu)
    return *shares, chosen.alone_us(gpu), *speedups


def select_layer(
    design: Design, rows: int, tokens: int, block: int, fa_share: float
) -> tuple[float, float, float]:
    """select_blocks alone in us, its share of dense, and a SELECT layer's share of it.

    Dense is FlashAttention's time for the layer. The SELECT layer is one that attends
    to everything: dense_decode that keeps the scores, and select_blocks.
    """
    whole = dense_backend(H100, SHAPE, even(rows, tokens), fa_share).us
    chosen = select(design, rows, tokens, block)
    layer_us = dense(design, rows, tokens, block).us + chosen.us
    return chosen.alone_us(H100), chosen.us / whole, layer_us / whole


def sparse_by_block(
    design: Design, rows: int, budget: int, fa_share: float, tokens: int
) -> list[tuple[int, float, float, float]]:
    """Per selection block: sparse in us, its share of read, the stack's speed-up."""
    found = []
    for block in (16, 4, 2, 1):
        config = to_everything(budget, block)
        kept = SelectionRule.from_config(config).kept_tokens(tokens)
        op = sparse(design, rows, kept, block)
        step = decode_step(H100, design, SHAPE, even(rows, tokens), config, fa_share)
        shown = op.alone_us(H100), op.share_of_read(H100), step.speedup
        found.append((block, *shown))
    return found
