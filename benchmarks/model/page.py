"""The tables of docs/performance_model.md, between markers, and how they get there."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.model import audit, design, measured, targets
from benchmarks.model.attend import dense_decode, sparse_decode
from benchmarks.model.design import AUDITED, TRITON, Design
from benchmarks.model.hardware import BYTES_PER_US
from benchmarks.model.machine_code import loop_of
from benchmarks.model.splits import limit_audited
from benchmarks.model.targets import H100, SHAPE, K, case

PAGE = Path(__file__).parents[2] / "docs/performance_model.md"
BEGIN, END = "<!-- table: {} -->", "<!-- end of table -->"
FA_SHARE = 0.98  # where a case was not measured: about what large batches reach


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(counts: Path = design.machine_code.COUNTED) -> dict[str, str]:
    """Every table of the page by its marker.

    Args:
        counts: Instructions per tile; the prototype's where there is no such file.
    """
    cuda = design.today(counts)
    return {
        "measured": beside_measured(counts),
        "inputs": inputs(cuda),
        "targets": verdicts(cuda),
        "assumptions": assumptions(cuda),
        "audit": compared(),
        "splits": splits(cuda),
        "select_layer": select_layer(cuda),
        "blocks": blocks(cuda),
    }


def beside_measured(counts: Path) -> str:
    rows = [
        (
            *(m.kernels, m.op, m.case),
            f"{m.before:.1f}",
            f"{m.us:.1f}",
            f"{m.before / m.us:.2f}",
            f"{m.now:.1f}",
            f"{m.now / m.us:.2f}",
        )
        for m in measured.compare(counts)
    ]
    header = (
        *("kernels", "op", "case", "model, as it was", "measured", "ratio"),
        *("model, today", "ratio"),
    )
    return markdown(header, rows)


def inputs(cuda: Design) -> str:
    rows = []
    for key, loop in sorted(cuda.loops.items(), key=str):
        kernel, stored, block = key
        audited = loop_of(AUDITED.loops, kernel, stored, 16)
        rows.append(
            (
                kernel,
                stored,
                f"{block or 'any'}",
                f"{audited.instructions:g}",
                f"{loop.instructions:g}",
                f"{loop.tile_bytes / K:g} KiB",
                f"{loop.resident}",
                loop.source,
            )
        )
    header = (
        *("kernel", "KV cache", "selection block", "instructions per tile, audited"),
        *("today", "tile"),
        *("thread blocks per processor", "source of today's"),
    )
    return markdown(header, rows)


def verdicts(cuda: Design) -> str:
    rows = [(v.target, v.case, v.found, v.met) for v in targets.verdicts(cuda, TRITON)]
    return markdown(("target", "case", "model", "met, by the model"), rows)


def assumptions(cuda: Design) -> str:
    rows = []
    for name, changes in (
        ("as above", {}),
        ("a dependent load 1 us", {"load_us": 1.0}),
        ("programmatic dependent launch gains nothing", {"dependent_launch_us": 1.2}),
        ("gathering 0.9 of read", {"gather_share": 0.9}),
    ):
        few, many, us, large, single = targets.in_short(cuda, replace(H100, **changes))
        shares = f"{few:.3f}", f"{many:.3f}"
        rows.append((name, *shares, f"{us:.1f}", f"{large:.2f}", f"{single:.2f}"))
    header = (
        *("assumption", "sparse, batch 4", "dense, 16 x 32K", "select, 16 x 64K, us"),
        *("stack, 64 x 32K", "stack, 1 x 128K"),
    )
    return markdown(header, rows)


def compared() -> str:
    rows = [
        (c.what, c.said, f"{c.found:.3g}", f"{c.off:+.1%}") for c in audit.compare()
    ]
    return markdown(("audited kernels", "the audit", "this model", "off"), rows)


def ragged(num_rows: int, longest: int) -> tuple[int, ...]:
    """A row in four of the longest length, the others spread evenly below it."""
    shorter = range(longest // num_rows, longest, longest // num_rows)
    return tuple(longest if i % 4 == 0 else shorter[i - 1] for i in range(num_rows))


def splits(cuda: Design) -> str:
    """Sparse and dense by batch: splits, waves, us and share, audited and today."""
    rows = []
    for op, make, sizes, lens_of in (
        ("sparse, 4096", sparse_decode, (1, 4, 16, 64, 72), targets.even),
        ("sparse, ragged to 4096", sparse_decode, (12, 24, 64), ragged),
        ("dense, 32K", dense_decode, (1, 4, 16, 64), targets.even),
        ("dense, ragged to 32K", dense_decode, (4, 16, 64), ragged),
    ):
        for num_rows in sizes:
            lens = lens_of(num_rows, 4096 if "sparse" in op else 32 * K)
            line = [op, str(num_rows)]
            for kernels in (AUDITED, cuda):
                made = make(H100, kernels, SHAPE, lens, 16)
                line += [
                    f"{made.splits}",
                    f"{made.waves:.2f}",
                    f"{made.alone_us(H100):.1f}",
                    f"{made.share_of_read(H100):.3f}",
                ]
            old = make(H100, replace(cuda, limit_splits=limit_audited), SHAPE, lens, 16)
            rows.append([*line, f"{old.alone_us(H100):.1f}"])
    header = ["op, tokens", "batch"]
    for name in ("audited", "today"):
        header += [f"splits, {name}", "waves", "us", "share of read"]
    return markdown([*header, "us, today but for the splits"], rows)


def select_layer(cuda: Design) -> str:
    rows = []
    for num_rows, tokens in ((16, 64 * K), (64, 32 * K), (64, 128 * K)):
        for block in (16, 4):
            for kernels in (cuda, TRITON):
                us, share, layer = targets.select_layer(
                    kernels, num_rows, tokens, block, FA_SHARE
                )
                read = 4 * SHAPE.num_heads * num_rows * tokens // block
                rows.append(
                    (
                        case(num_rows, tokens),
                        f"{block}",
                        kernels.name.split(",")[0],
                        f"{read / 1e6:.1f} MB",
                        f"{read / BYTES_PER_US / H100.read_tb_per_s:.1f}",
                        f"{us:.1f}",
                        f"{share:.2%}",
                        f"{layer:.3f}",
                    )
                )
    header = (
        *(
            "batch x context",
            "selection block",
            "kernels",
            "block_lse",
            "reading it, us",
        ),
        *("select_blocks, us", "of a dense layer", "SELECT layer / dense layer"),
    )
    return markdown(header, rows)


def blocks(cuda: Design) -> str:
    rows = [
        (
            case(n, tokens),
            str(budget),
            str(block),
            f"{us:.1f}",
            f"{share:.3f}",
            f"{x:.2f}",
        )
        for n, tokens, budget in (
            (64, 32 * K, 3264),
            (16, 64 * K, 4096),
            (1, 128 * K, 4096),
        )
        for block, us, share, x in targets.sparse_by_block(
            cuda, n, budget, FA_SHARE, tokens
        )
    ]
    header = (
        *(
            "batch x context",
            "budget",
            "selection block",
            "sparse, us",
            "share of read",
        ),
        "stack, speed-up over dense",
    )
    return markdown(header, rows)


def written(text: str, made: dict[str, str]) -> str:
    """A page's text with its tables made anew.

    Raises:
        ValueError: The page has no place for a table.
    """
    for name, table in made.items():
        begin = BEGIN.format(name)
        before, marked, rest = text.partition(f"{begin}\n")
        _, ended, after = rest.partition(END)
        if not (marked and ended):
            raise ValueError(f"the page has no {begin} with {END} behind it")
        text = f"{before}{begin}\n{table}\n{END}{after}"
    return text
