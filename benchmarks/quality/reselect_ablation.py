"""What does a choice that holds for some steps buy, and what does it cost?

Long outputs are forced on vLLM's engine token by token, once dense and once for each
`reselect_interval` and `select_attends`, on one engine in one run. Reported for each:

    kv_read     KV bytes of a step as a share of dense, at the middle of the output
    kl          KL divergence of the next token from the dense run's, in nats; its mean
                over the output, over each quarter of it, and its 99th percentile
    agreement   share of steps whose likeliest token is the dense run's

    python -m benchmarks.quality.reselect_ablation --model random --out results.jsonl
    python -m benchmarks.quality.reselect_ablation --report results.jsonl

The second command prints the results as tables. Models are those of
`correction_ablation.py`. Nothing is timed: what a step must read is known, and what
that takes on a CPU says nothing of a GPU, which `bench_stack.py` measures.
"""

import argparse
import json
import sys
from itertools import product

from benchmarks.machine import describe_run
from benchmarks.quality.correction_ablation import (
    compare,
    keep,
    make_texts,
    name_of,
    prepare_model,
    setup_of,
)
from benchmarks.quality.correction_ablation import parse as parse_correction
from tidal_vllm.config import SELECT_ATTENDS, TidalConfig
from tidal_vllm.plan.steps import kv_read_share

INTERVALS = (1, 2, 4, 8, 16)


def settings_of(args, interval: int, attends: str) -> dict:
    return {
        "token_budget": args.token_budget,
        "select_block_size": args.select_block_size,
        "dense_layers": args.dense_layers,
        "select_layers": args.select_layers,
        "reselect_interval": interval,
        "select_attends": attends,
    }


def measure(args) -> dict:
    # Imports vLLM, which a report does not need.
    from benchmarks.quality.teacher import TaughtEngine

    taught = TaughtEngine(
        prepare_model(args),
        settings_of(args, 1, "everything"),
        max_model_len=args.context + args.output_tokens + 16,
        max_num_seqs=args.sequences,
        max_num_batched_tokens=4096,
        dtype=args.dtype,
    )
    prompts, outputs = make_texts(taught, args)
    middle = args.context + args.output_tokens // 2
    runs: dict[str, dict] = {}
    dense = taught.run(prompts, outputs, sparse=False, interval=None)
    again = taught.run(prompts, outputs, sparse=False, interval=None)
    runs["dense"] = {"kv_read": 1.0, **compare(again, dense)}
    for attends, interval in product(args.attends, args.reselect_intervals):
        settings = settings_of(args, interval, attends)
        taught.configure(settings)
        run = taught.run(prompts, outputs, sparse=True, interval=None)
        share = kv_read_share(taught.plan, TidalConfig(**settings), middle)
        name = f"{interval} {attends}"
        runs[name] = {"kv_read": round(share, 4), **compare(run, dense)}
        print(name, runs[name], flush=True)
    return {
        "benchmark": "reselect_ablation",
        "runs": runs,
        "setup": setup_of(args),
        **describe_run("vllm", "tidal_vllm"),
    }


def table(record: dict) -> str:
    """Markdown: a row per setting."""
    head = ["reselect_interval", "select_attends", "KV read"]
    head += ["mean KL", "last quarter", "99 %", "agreement"]
    rows = []
    for name, run in record["runs"].items():
        settings = ["dense", ""] if name == "dense" else name.split()
        row = [
            *settings,
            f"{run['kv_read']:.1%}",
            f"{run['kl_mean']:.4f}",
            f"{run['kl_by_quarter'][-1]:.4f}",
            f"{run['kl_p99']:.3f}",
            f"{run['agreement']:.2%}",
        ]
        rows.append(row)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse() -> argparse.Namespace:
    """The arguments of `correction_ablation.py`, and those of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reselect-intervals", type=int, nargs="+", default=list(INTERVALS)
    )
    parser.add_argument(
        "--attends", nargs="+", choices=SELECT_ATTENDS, default=list(SELECT_ATTENDS)
    )
    ours, rest = parser.parse_known_args()
    args = parse_correction(rest)
    vars(args).update(vars(ours))
    return args


def main() -> int:
    args = parse()
    if args.report:
        for line in args.report.read_text().splitlines():
            record = json.loads(line)
            print(f"{name_of(record)}\n\n{table(record)}\n")
        return 0
    keep(measure(args), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
