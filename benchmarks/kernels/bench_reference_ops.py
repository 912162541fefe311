r"""How close do the PyTorch ops come to the speed of a copy of the same bytes?

    python -m benchmarks.kernels.bench_reference_ops \
        --out benchmarks/results/reference_ops.jsonl

One decoding sequence over shuffled blocks, per op and KV layout; every output is
checked against float64 before it is timed. One JSON line per case, every trial kept,
in milliseconds; `share_of_copy` is the fastest trial against the fastest copy of the
bytes that the op must read.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.machine import describe_run
from tidal_vllm.kernels import DecodeArgs, Workspace, reference
from tidal_vllm.plan.rule import SelectionRule

LAYOUTS = {"LBHNC": (0, 1, 2, 3), "LBNHC": (0, 2, 1, 3)}
NUM_KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 2, 2, 128, 128
SCALE = HEAD_SIZE**-0.5
SELECT_BLOCK_SIZE = 16


def make_case(
    context: int, layout: str, budget: int
) -> tuple[DecodeArgs, torch.Tensor]:
    """One decode over a shuffled paged cache in one layout, and its seq_lens."""
    order = LAYOUTS[layout]
    num_blocks = context // BLOCK_SIZE
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    physical = torch.randn([shape[axis] for axis in order])
    cache = physical.permute([order.index(axis) for axis in range(4)])
    query = torch.randn(1, NUM_KV_HEADS * GROUP, HEAD_SIZE)
    table = torch.randperm(num_blocks, dtype=torch.int32)[None]
    args = DecodeArgs(
        query=query,
        kv_cache=cache,
        block_table=table,
        output=torch.empty_like(query),
        scale=SCALE,
        select_block_size=SELECT_BLOCK_SIZE,
        topk_blocks=torch.full((1, 1, budget // SELECT_BLOCK_SIZE), -1).int(),
        topk_lens=torch.zeros(1, 1, dtype=torch.int32),
    )
    # As in most steps, the last block is not full.
    return args, torch.tensor([context - 5], dtype=torch.int32)


def attend_float64(args: DecodeArgs, positions: torch.Tensor) -> torch.Tensor:
    """Attention to the given positions, by definition."""
    blocks = args.kv_cache[args.block_table[0].long()].double()
    kv = blocks.permute(1, 0, 2, 3).flatten(1, 2)[:, positions]
    key, value = kv.split(HEAD_SIZE, -1)
    grouped = args.query.double().view(NUM_KV_HEADS, GROUP, HEAD_SIZE)
    weights = (SCALE * grouped @ key.transpose(1, 2)).softmax(-1)
    return (weights @ value).view(1, -1, HEAD_SIZE)


def time_ms(call, trials: int) -> list[float]:
    call()
    times = []
    for _ in range(trials):
        start = time.perf_counter()
        call()
        times.append(round(1e3 * (time.perf_counter() - start), 4))
    return times


def run(context: int, layout: str, budget: int, trials: int) -> list[dict]:
    """Check and time each op on one case."""
    args, lens = make_case(context, layout, budget)
    plain = replace(args, select_block_size=None)
    rule = SelectionRule(
        token_budget=budget,
        select_block_size=SELECT_BLOCK_SIZE,
        sink_tokens=4,
        recent_tokens=budget // 4,
        sparse_threshold=budget,
    )
    reference.dense_decode(args, lens)
    oracle = attend_float64(args, torch.arange(int(lens)))
    torch.testing.assert_close(args.output.double(), oracle, atol=1e-5, rtol=1e-5)

    select = partial(reference.select_blocks, args, lens, rule)
    select()
    blocks = args.topk_blocks[0, 0, :, None] * SELECT_BLOCK_SIZE
    positions = (blocks + torch.arange(SELECT_BLOCK_SIZE)).flatten().long()
    positions = positions[positions < int(lens)]
    oracle = attend_float64(args, positions)
    # With a workspace of its own: select_blocks is timed with the dense scores.
    sparse_args = replace(args, workspace=Workspace())
    sparse = partial(reference.sparse_decode, sparse_args, lens)
    sparse()
    torch.testing.assert_close(args.output.double(), oracle, atol=1e-5, rtol=1e-5)

    token_bytes = NUM_KV_HEADS * 2 * HEAD_SIZE * 4
    target = torch.empty(args.kv_cache.numel())
    source = torch.randn(args.kv_cache.numel())
    copies = {
        tokens: time_ms(
            lambda n=tokens: target[: n * token_bytes // 4].copy_(
                source[: n * token_bytes // 4]
            ),
            trials,
        )
        for tokens in (context, budget)
    }
    calls = {
        "dense_decode": (partial(reference.dense_decode, plain, lens), context),
        "dense_decode with block_lse": (
            partial(reference.dense_decode, args, lens),
            context,
        ),
        "select_blocks": (select, 0),
        "sparse_decode": (sparse, budget),
    }
    records = []
    for name, (call, tokens) in calls.items():
        record = {
            "benchmark": "reference_ops",
            "op": name,
            "layout": layout,
            "context": context,
            "token_budget": budget,
            "num_kv_heads": NUM_KV_HEADS,
            "num_heads": NUM_KV_HEADS * GROUP,
            "head_size": HEAD_SIZE,
            "bytes": tokens * token_bytes,
            "trials_ms": time_ms(call, trials),
            **describe_run("tidal_vllm"),
        }
        if tokens:
            fastest = min(record["trials_ms"])
            record["copy_trials_ms"] = copies[tokens]
            record["share_of_copy"] = round(min(copies[tokens]) / fastest, 3)
        records.append(record)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for context in args.contexts:
            for layout in LAYOUTS:
                for record in run(context, layout, args.token_budget, args.trials):
                    share = record.get("share_of_copy")
                    print(
                        f"{context:>6} {layout} {record['op']:<28}"
                        f"{min(record['trials_ms']):>8.3f} ms"
                        + (f"  {share:.2f} of copy speed" if share else ""),
                        flush=True,
                    )
                    if args.out:
                        with args.out.open("a") as out:
                            out.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
