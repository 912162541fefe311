r"""What a GPU run has found: how its steps ended, and each target beside its bound.

python -m benchmarks.gpu.summary RESULTS        of all records in a file
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.gpu.targets import BIG, TARGETS, Target, ratio, value

PASS, FAIL, NOT_RUN = "pass", "FAIL", "not run"


def of(found: Sequence[dict]) -> str:
    """A Markdown page about a run's records."""
    variants = _variants(found)
    lines = ["| step | status | seconds | why |", "|---|---|---|---|"]
    for record in found:
        if record["benchmark"] == "step":
            why = (record["why"] or "").replace("|", "/")
            cells = (record["step"], record["status"], record["seconds"], why)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    for record in found:
        if record.get("wrong"):
            who = record.get("implementation", "engine")
            lines.append(f"\nWrong: {who}, {record['benchmark']}: {record['wrong']}")
    for library, of_library in variants.items():
        build = f" with {library}" if library and len(variants) > 1 else ""
        lines += ["", f"| target{build} | bound | measured | |", "|---|---|---|---|"]
        first = library == next(iter(variants))
        lines += [
            _row(target, of_library)
            for target in TARGETS
            if first or target.measure(of_library) is not None
        ]
    lines += ["", *_select_layer(found)]
    return "\n".join(lines).rstrip() + "\n"


def verdict(target: Target, found: Sequence[dict]) -> tuple[float | None, str]:
    """The number measured, and pass, FAIL or not run."""
    measured = target.measure(found)
    if measured is None:
        return None, NOT_RUN
    return measured, PASS if target.reached(measured) else FAIL


def _variants(found: Sequence[dict]) -> dict[str | None, list[dict]]:
    """The records that belong to each build of the extension, others' included."""
    names = list(dict.fromkeys(r["library"] for r in found if r.get("library")))
    return {
        name: [r for r in found if r.get("library", name) == name]
        for name in names or [None]
    }


def _row(target: Target, found: Sequence[dict]) -> str:
    measured, said = verdict(target, found)
    sign, unit = "<=" if target.at_most else ">=", target.unit and f" {target.unit}"
    shown = "" if measured is None else f"{measured:.4g}{unit}"
    return f"| {target.text} | {sign} {target.bound:g}{unit} | {shown} | {said} |"


def _select_layer(found: Sequence[dict]) -> list[str]:
    """What a SELECT layer costs beside dense attention, by size of the blocks."""
    dense = value(
        found,
        "median_us",
        **(BIG | {"op": "dense", "implementation": "flash_attn"}),
    )
    lines = []
    for size in (16, 4):
        ours = {"select_block_size": size, "implementation": "cuda"}
        ours |= {"kv_cache_dtype": "auto"}
        kept = value(found, "median_us", **BIG, **ours, op="dense + block_lse")
        share = ratio(kept, dense)
        if share is not None:
            lines.append(
                f"A SELECT layer by blocks of {size}, without choosing: {share:.3f} of "
                "FlashAttention 3 at 64 x 32768."
            )
    return lines


def main() -> int:
    print(of(records.read(Path(sys.argv[1]))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
