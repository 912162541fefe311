r"""The tables of docs/gpu_results.md, from what runs on a GPU have kept.

    python -m benchmarks.gpu.report benchmarks/results/gpu_h100.jsonl --write-page

Each record names its run, and the build of the kernels: a commit, and what was changed.
A ratio is one of two numbers of one run. Without `--write-page` the tables are printed.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.gpu.builds import ATTEND, FIRST, PRESENT, TRITON
from benchmarks.gpu.summary import verdict
from benchmarks.gpu.targets import TARGETS, Records
from benchmarks.model.page import markdown

PAGE = Path(__file__).parents[2] / "docs/gpu_results.md"


def of_builds(found: Records, *builds: str) -> list[dict]:
    """The records of some builds, and those of implementations that are not ours."""
    return [r for r in found if r.get("build") in (None, *builds)]


def newest(found: Records, **case: object) -> dict | None:
    """The last record of a case that was timed."""
    for record in reversed(found):
        if "median_us" in record and all(record.get(k) == v for k, v in case.items()):
            return record
    return None


def tables(found: Records) -> dict[str, str]:
    """Every table of the page by its marker."""
    return {
        "targets": targets(found),
        "attend": attend(found),
        "small": small_and_fp8(found),
        "variants": variants(found),
        "select": select(found),
        "stack": stack(found),
        "engine": engine(found),
    }


def runs_of(found: Records) -> dict[int, list[dict]]:
    numbers = sorted({r["run"] for r in found})
    return {n: [r for r in found if r["run"] == n] for n in numbers}


def targets(found: Records) -> str:
    """Each target beside what the first build and the present ones reached."""
    runs = runs_of(found)
    columns = [of_builds(runs[1], FIRST), of_builds(runs[3], *PRESENT)]
    rows = []
    for target in TARGETS:
        sign = "<=" if target.at_most else ">="
        row = [target.text, f"{sign} {target.bound:g} {target.unit}".rstrip()]
        for column in columns:
            measured, said = verdict(target, column)
            digits = {"us": 1, "x": 2}.get(target.unit, 4)
            shown = f"{measured:.{digits}f} {target.unit}".rstrip() if measured else ""
            row.append(f"{shown}, {said}" if shown else "")
        rows.append(row)
    return markdown(("", "target", "first build", "present builds"), rows)


def cases(found: Records, *keys: str) -> list[tuple]:
    """Distinct values of some keys, in the order of their first record."""
    return list(dict.fromkeys(tuple(r[k] for k in keys) for r in found))


def attend(found: Records) -> str:
    """Attention of one layer, microseconds, of the last run."""
    found = [r for r in runs_of(found)[3] if r["benchmark"] == "attend"]
    rows = []
    for name, build in (("cuda", ATTEND), ("triton", TRITON)):
        of_build = of_builds(found, build)
        ours = [r for r in of_build if r["implementation"] == name]
        keys = ("batch", "context", "select_block_size")
        for batch, context, size in cases(ours, *keys):
            at = {"batch": batch, "context": context}
            flash = newest(of_build, **at, op="dense", implementation="flash_attn")
            mine = {**at, "implementation": name, "select_block_size": size}
            ops = ("dense", "dense + block_lse", "score_blocks", "sparse")
            times = [newest(of_build, **mine, op=op) for op in ops]
            assert flash is not None
            sparse, kept = times[3], times[1]
            if sparse is None or kept is None:
                continue
            rows.append(
                [
                    *(name, f"{batch} x {context // 1024}K", f"{size}"),
                    f"{flash['median_us']:.0f}",
                    *("" if t is None else f"{t['median_us']:.0f}" for t in times[:3]),
                    f"{kept['median_us'] / flash['median_us']:.3f}",
                    f"{sparse['token_budget']}",
                    f"{sparse['median_us']:.1f}",
                    f"{sparse['share_of_read']:.2f}",
                    f"{flash['median_us'] / sparse['median_us']:.1f}x",
                ]
            )
    header = (
        *("", "batch x context", "block", "FlashAttention 3", "dense"),
        *("dense + scores", "scores alone", "dense + scores / FlashAttention 3"),
        *("budget", "sparse", "of read bandwidth", "FlashAttention 3 / sparse"),
    )
    return markdown(header, rows)


def small_and_fp8(found: Records) -> str:
    """Blocks of few tokens, and fp8, of the first build; 64 x 32K, microseconds."""
    found = of_builds(runs_of(found)[1], FIRST)
    rows = []
    for cache, sizes in (("auto", (16, 4, 2, 1)), ("fp8", (16,))):
        for size in sizes:
            at = {"batch": 64, "context": 32768, "kv_cache_dtype": cache}
            at |= {"implementation": "cuda", "select_block_size": size}
            ops = ("dense", "dense + block_lse", "score_blocks", "sparse")
            times = [newest(found, **at, op=op) for op in ops]
            shown = [f"{t['median_us']:.0f}" for t in times if t is not None]
            rows.append(["bf16" if cache == "auto" else cache, f"{size}", *shown])
    header = ("KV cache", "block", "dense", "dense + scores", "scores alone", "sparse")
    return markdown(header, rows)


def variants(found: Records) -> str:
    """Builds beside each other, each as a ratio to FlashAttention 3 of its run."""
    at = [(64, 32768), (16, 32768), (16, 131072), (4, 131072), (1, 131072)]
    rows = []
    for run, of_run in runs_of(found).items():
        ours = [r for r in of_run if r["benchmark"] == "attend" and r.get("build")]
        for build in dict.fromkeys(r["build"] for r in ours):
            row = [f"{run}", f"`{build}`"]
            for op in ("dense + block_lse", "sparse"):
                for batch, context in at:
                    case = {"batch": batch, "context": context}
                    mine = newest(
                        [r for r in ours if r.get("kv_cache_dtype") == "auto"],
                        **case,
                        build=build,
                        op=op,
                        select_block_size=16,
                    )
                    case |= {"op": "dense", "implementation": "flash_attn"}
                    flash = newest(of_run, **case)
                    if mine is None or flash is None:
                        row.append("")
                    else:
                        row.append(f"{mine['median_us'] / flash['median_us']:.3f}")
            if any(row[2:]):
                rows.append(row)
    names = [f"{batch} x {context // 1024}K" for batch, context in at]
    scored = [f"scores, {name}" for name in names]
    return markdown(("run", "build", *scored, *(f"sparse, {n}" for n in names)), rows)


def select(found: Records) -> str:
    """Choosing, in microseconds, by build."""
    found = [r for r in found if r["benchmark"] == "select_blocks" and "build" in r]
    keys = ("rows", "context", "select_block_size")
    rows = []
    for run, name, build in cases(found, "run", "implementation", "build"):
        mine = {"run": run, "implementation": name, "build": build}
        times = [
            newest(found, **mine, **dict(zip(keys, case, strict=True)))
            for case in cases(found, *keys)
        ]
        if any(times):
            shown = [
                ""
                if t is None
                else f"{t['median_us']:.1f} ({1 / t['share_of_read']:.1f})"
                for t in times
            ]
            rows.append([f"{run}", name, f"`{build}`", *shown])
    header = [f"{r} x {c // 1024}K, block {s}" for r, c, s in cases(found, *keys)]
    return markdown(("run", "", "build", *header), rows)


def stack(found: Records) -> str:
    """Attention of a model's 32 layers in one graph, milliseconds."""
    found = [r for r in found if r["benchmark"] == "stack"]
    rows = []
    for record in found:
        if "speedup" not in record:
            continue
        at = {key: record[key] for key in ("run", "batch", "context")}
        dense = newest(found, **at, op="all dense")
        mine = newest(found, **at, select_attends=record["select_attends"])
        assert dense is not None and mine is not None
        rows.append(
            [
                f"{at['run']}",
                f"{at['batch']} x {at['context'] // 1024}K",
                f"{record['token_budget']}",
                record["select_attends"],
                *(f"{r['median_us'] / 1000:.2f}" for r in (dense, mine)),
                f"{record['speedup']:.2f}x",
                f"{record['speedup_by_bytes']:.2f}x",
            ]
        )
    header = ("run", "batch x context", "budget", "`select_attends`")
    header += ("dense", "by roles")
    return markdown((*header, "speed-up", "by bytes alone"), rows)


def engine(found: Records) -> str:
    """A decode step of vLLM's engine, milliseconds."""
    rows = [
        [
            f"{r['run']}",
            f"{r['batch']} x {r['context'] // 1024}K",
            f"{r['token_budget']}",
            *(f"{r[f'{name}_step_ms']:.2f}" for name in ("dense", "tidal")),
            f"{r['speedup']:.2f}x",
        ]
        for r in found
        if r["benchmark"] == "decode_engine"
    ]
    header = ("run", "batch x context", "budget", "FLASH_ATTN", "TIDAL", "speed-up")
    return markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--write-page", action="store_true", help=f"into {PAGE.name}")
    args = parser.parse_args(argv)
    made = tables(records.read(args.results))
    if not args.write_page:
        print("\n\n".join(made.values()))
        return 0
    text = PAGE.read_text()
    for name, table in made.items():
        marked = rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
        text, count = re.subn(
            marked, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{PAGE}: {count} tables {name}; allowed is one")
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
