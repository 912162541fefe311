r"""Does sparse decoding answer as dense attention does? Every configuration, one run.

    python -m benchmarks.quality MODEL --cells 4096:0.1:32x256 --out FILE
    python -m benchmarks.quality --report FILE

MODEL is any Hugging Face folder or name. Natural text is forced token by token, through
vLLM's engine on the decode path, once densely and once under each configuration, on the
same prompts: KL divergence of the next token, agreement, perplexity. docs/quality.md
says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.quality.harness.cells import parse_cell
from benchmarks.quality.harness.configurations import Reads, in_cell, peers, read_file
from benchmarks.quality.harness.texts import cuts, read, tokens_of


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.report:
            from benchmarks.model.page import written
            from benchmarks.quality.harness.page import PAGE, tables
            from benchmarks.quality.harness.report import cells_of, draw, report

            found = records.read(args.report)
            print(report(found))
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
    add("--cells", nargs="+", default=["4096:0.1:32x256"], metavar="CELL")
    add("--configs", type=Path, help="a JSON file of settings by name")
    add("--only", nargs="+", metavar="NAME", help="of the peers and --configs")
    add("--reads", nargs="*", type=float, default=[], help="KV read, shares of dense")
    add("--equal-to", metavar="NAME", help="and what this one reads at its budget")
    add("--text", type=Path, help="a text file; default: Python's documentation")
    add("--group", type=int, default=8, help="sequences that decode together")
    add("--greedy", type=int, default=0, help="tokens of a free continuation, too")
    add("--dtype", default="auto", help="as vLLM's")
    add("--max-num-batched-tokens", type=int, default=8192)
    add("--kv-cache-gib", type=float, help="default: what the sequences need")
    add("--gpu-memory-utilization", type=float, default=0.9, help="as vLLM's")
    add("--out", type=Path, help="append JSON lines here; what it holds is kept")
    add("--report", type=Path, metavar="FILE", help="print tables of a file and end")
    add("--picture", type=Path, help="with --report: draw its first cell")
    add("--write-page", action="store_true", help="with --report: docs/quality.md")
    return parser


def run_record(setup: dict) -> dict:
    """Where the records that follow in a file were measured."""
    from benchmarks.machine import describe_run

    kind = {"benchmark": "quality", "measure": "run", "setup": setup}
    return kind | describe_run("vllm", "tidal_vllm", "transformers")


def _measure(args: argparse.Namespace) -> int:
    if not args.model or not args.out:
        raise ValueError("MODEL and --out are needed to measure, --report to read")
    cells = [parse_cell(text) for text in args.cells]
    from transformers import AutoConfig, AutoTokenizer

    own = {"trust_remote_code": False}
    config = AutoConfig.from_pretrained(args.model, **own).get_text_config()
    longest = config.max_position_embeddings
    for cell in cells:
        if cell.context > longest:
            raise ValueError(
                f"--cells {cell.name}: this model reads {longest} tokens at most"
            )
    tokenizer = AutoTokenizer.from_pretrained(args.model, **own)
    text, fingerprint = tokens_of(
        read(args.text), lambda t: tokenizer(t, verbose=False)["input_ids"]
    )
    from tidal_vllm.calibrate.engine import switches

    with switches():
        from benchmarks.quality.harness.engine import Engine, planner
        from benchmarks.quality.harness.forced import Forced

        most = min(args.group, max(cell.sequences for cell in cells))
        context = max(cell.context for cell in cells)
        more = {
            "max_model_len": context + 1 + args.greedy,
            "max_num_seqs": most,
            "max_num_batched_tokens": args.max_num_batched_tokens,
            "dtype": args.dtype,
            "gpu_memory_utilization": args.gpu_memory_utilization,
        }
        if args.kv_cache_gib:
            more["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
        setup = {
            "model": Path(args.model).name,
            "dtype": args.dtype,
            "text": fingerprint,
        }
        forced = Forced(
            args.out,
            setup,
            args.group,
            lambda settings: Engine(args.model, settings, **more),
            args.greedy,
        )
        layers = range(config.num_hidden_layers)
        named = peers(layers) | (read_file(args.configs) if args.configs else {})
        if args.only:
            unknown = [name for name in args.only if name not in named]
            if unknown:
                raise ValueError(
                    f"--only {unknown[0]}: must be among {', '.join(named)}"
                )
        reads = Reads(planner(args.model, max_model_len=context + 1, dtype=args.dtype))
        work = []
        for cell in cells:
            equal = named if not args.only else {n: named[n] for n in args.only}
            if args.equal_to and args.equal_to not in equal:
                raise ValueError(f"--equal-to {args.equal_to}: must be measured too")
            made = in_cell(
                equal, reads, cell.middle, cell.share, args.reads, args.equal_to
            )
            pieces = cuts(text, cell.sequences, cell.context, cell.tokens + 1)
            work.append((cell, made, pieces))
        records.append(args.out, run_record(setup))
        forced.run(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
