r"""Does sparse decoding answer as dense attention does? Every configuration, one run.

    python -m benchmarks.quality MODEL --cells 4096:0.1:32x256 --out FILE
    python -m benchmarks.quality MODEL --suites niah_single_1 --lengths 4096 --out FILE
    python -m benchmarks.quality --report FILE

MODEL is any Hugging Face folder or name. Natural text is forced token by token, through
vLLM's engine on the decode path, once densely and once under each configuration, on the
same prompts: KL divergence of the next token, agreement, perplexity. Questions of known
answer are asked through the same engine and scored. docs/quality.md says what is
measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.quality.harness.cells import parse_cell
from benchmarks.quality.harness.configurations import (
    Configuration,
    Reads,
    in_cell,
    peers,
    read_file,
)
from benchmarks.quality.harness.questions import questions
from benchmarks.quality.harness.texts import cuts, fingerprint_of, read, tokens_of

DTYPES = ("auto", "bfloat16", "float16", "float32")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.report:
            from benchmarks.model.page import written
            from benchmarks.quality.harness.page import PAGE, tables
            from benchmarks.quality.harness.report import cells_of, draw, report

            found = _records_of(args.report)
            print(report(found, args.against))
            if args.write_page:
                PAGE.write_text(written(PAGE.read_text(), tables(found)))
            if args.picture:
                draw(next(iter(cells_of(found).values())), args.picture)
            return 0
        return _measure(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", help="a folder or a name")
    add("--cells", nargs="+", metavar="CELL", help="text; default: 4096:0.1:32x256")
    add("--suites", nargs="+", default=[], metavar="SUITE", help="questions, instead")
    add("--lengths", nargs="+", type=int, default=[4096], help="of the questions")
    add("--tasks", type=int, default=32, help="of each suite and length")
    add("--share", type=float, default=0.1, help="the questions' budget, of a length")
    add("--configs", type=Path, help="a JSON file of settings by name")
    add("--only", nargs="+", metavar="NAME", help="of the peers and --configs")
    add("--reads", nargs="*", type=float, default=[], help="KV read, shares of dense")
    add("--equal-to", metavar="NAME", help="and what this one reads at its budget")
    add("--text", type=Path, help="a text file; default: Python's documentation")
    add("--group", type=int, default=8, help="sequences that decode together")
    add("--greedy", type=int, default=0, help="tokens of a free continuation, too")
    add("--dtype", choices=DTYPES, default="auto", help="as vLLM's")
    add("--max-num-batched-tokens", type=int, default=8192)
    add("--kv-cache-gib", type=float, help="default: what the sequences need")
    add("--gpu-memory-utilization", type=float, default=0.9, help="as vLLM's")
    add("--out", type=Path, help="append JSON lines here; what it holds is kept")
    add("--report", type=Path, metavar="FILE", help="print tables of a file and end")
    add("--against", metavar="NAME", help="with --report: KL less this one's")
    add("--picture", type=Path, help="with --report: draw its first cell")
    add("--write-page", action="store_true", help="with --report: docs/quality.md")
    return parser


def _records_of(path: Path) -> list[dict]:
    """The records of a file.

    Raises:
        ValueError: There is no such file, or it holds something else; in one line.
    """
    try:
        found = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--report {path}: {error}") from error
    if not any(isinstance(r, dict) and r.get("benchmark") == "quality" for r in found):
        raise ValueError(f"--report {path}: must be what --out of this command wrote")
    return found


def run_record(setup: dict) -> dict:
    """Where the records that follow in a file were measured."""
    from benchmarks.machine import describe_run

    kind = {"benchmark": "quality", "measure": "run", "setup": setup}
    return kind | describe_run("vllm", "tidal_vllm", "transformers")


def _measure(args: argparse.Namespace) -> int:
    if not args.model or not args.out:
        raise ValueError("MODEL and --out are needed to measure, --report to read")
    if args.against:
        raise ValueError(f"--against {args.against}: must stand beside --report")
    _check_ranges(args)
    default = [] if args.suites else ["4096:0.1:32x256"]
    cells = [parse_cell(text) for text in args.cells or default]
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: must be a file in a folder that exists")
    longest, tokenizer = _load(args.model)
    for cell in cells:
        if cell.context + args.greedy >= longest:
            raise ValueError(
                f"--cells {cell.name}: this model reads {longest} tokens, and one more "
                f"and --greedy ({args.greedy}) have to fit behind a cell's"
            )
    text, fingerprint = tokens_of(
        read(args.text), lambda t: tokenizer(t, verbose=False)["input_ids"]
    )
    asked = [
        questions(args.model, tokenizer, suite, length, args.tasks, longest)
        for length in args.lengths
        for suite in args.suites
    ]
    forced_len = max((cell.context + 1 + args.greedy for cell in cells), default=0)
    from tidal_vllm.calibrate.engine import switches

    with switches():
        from benchmarks.quality.harness.answers import Answers
        from benchmarks.quality.harness.engine import Engine, planner
        from benchmarks.quality.harness.forced import Forced

        most = [cell.sequences for cell in cells] + [args.tasks] * bool(asked)
        more = {
            "max_model_len": max([forced_len, *(each.room for each in asked)]),
            "max_num_seqs": min(args.group, max(most)),
            "max_num_batched_tokens": args.max_num_batched_tokens,
            "dtype": args.dtype,
            "gpu_memory_utilization": args.gpu_memory_utilization,
        }
        planned = planner(
            args.model, max_model_len=more["max_model_len"], dtype=args.dtype
        )
        if args.kv_cache_gib:
            more["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
        setup = {
            "model": Path(args.model).name,
            "model_sha256": fingerprint_of(args.model),
            "dtype": args.dtype,
            "text": fingerprint,
            "group": args.group,
        }

        def start(settings: dict[str, Any]) -> Engine:
            return Engine(args.model, settings, **more)

        reads, named = Reads(planned), _named(args, planned({}).full_layers)

        def under(context: int, share: float) -> list[Configuration]:
            return in_cell(named, reads, context, share, args.reads, args.equal_to)

        text_work = [
            (
                cell,
                under(cell.middle, cell.share),
                cuts(text, cell.sequences, cell.context, cell.tokens + 1),
            )
            for cell in cells
        ]
        work = [(each, under(each.length, args.share)) for each in asked]
        records.append(args.out, run_record(setup))
        Forced(args.out, setup, args.group, start, args.greedy).run(text_work)
        Answers(args.out, setup, args.share, start).run(work)
    return 0


def _check_ranges(args: argparse.Namespace) -> None:
    """Refuse numbers before an engine starts.

    Raises:
        ValueError: Names the option, the value and what is allowed.
    """
    for name, allowed, fits in (
        ("share", "above 0 and below 1", lambda x: 0 < x < 1),
        ("reads", "above 0, at most 1", lambda x: 0 < x <= 1),
        ("group", "1 or more", lambda x: x >= 1),
        ("greedy", "0 or more", lambda x: x >= 0),
        ("max_num_batched_tokens", "1 or more", lambda x: x >= 1),
        ("kv_cache_gib", "from 0.001 to 1000000", lambda x: 0.001 <= x <= 1e6),
        ("gpu_memory_utilization", "above 0, at most 1", lambda x: 0 < x <= 1),
    ):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not fits(value):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {value}: must be {allowed}")


def _load(model: str) -> tuple[int, Any]:
    """How many tokens a model reads, and its tokenizer.

    Raises:
        ValueError: There is no such model, or it lacks a tokenizer; in one line.
    """
    from transformers import AutoConfig, AutoTokenizer

    own = {"trust_remote_code": False}
    if model.startswith((".", "/", "~")) and not Path(model, "config.json").is_file():
        raise ValueError(f"MODEL {model}: must be a folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(model, **own).get_text_config()
        return config.max_position_embeddings, AutoTokenizer.from_pretrained(
            model, **own
        )
    except Exception as error:  # of any class, with damaged files
        reason, *_ = f"{type(error).__name__}: {error}".splitlines()
        raise ValueError(f"MODEL {model}: {reason}") from error


def _named(args: argparse.Namespace, layers: Sequence[int]) -> dict[str, dict]:
    """The settings that are compared, by name.

    Raises:
        ValueError: --only or --equal-to names others.
    """
    named = peers(layers) | (read_file(args.configs) if args.configs else {})
    unknown = [name for name in args.only or () if name not in named]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: must be among {', '.join(named)}")
    if args.only:
        named = {name: named[name] for name in args.only}
    if args.equal_to and args.equal_to not in named:
        raise ValueError(f"--equal-to {args.equal_to}: must be measured too")
    return named


if __name__ == "__main__":
    sys.exit(main())
