r"""How close is decode attention to the memory bound, and to FlashAttention?

    python -m benchmarks.kernels.bench_attend --out benchmarks/results/gpu.jsonl

One layer's decode attention over shuffled pages, for each implementation in a process
of its own. Ours: `dense_decode` without and with `block_lse`, `score_blocks`, and
`sparse_decode` over what our ops chose from the same queries, per scope. Others: dense
decoding by vLLM's FLASH_ATTN and TRITON_ATTN, xformers, and FlashInfer where asked for.
All outputs are checked against the fp32 oracle before anything is timed; what is wrong
is not timed.

A case is BATCHxCONTEXT:BUDGET, in sequences and tokens. `share_of_copy` counts K and V
of the tokens that are attended to once (`score_blocks`: K alone) and once per set,
against a copy's bandwidth.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial

import torch

from benchmarks.kernels import timing
from benchmarks.kernels.alone import each_alone
from benchmarks.kernels.baselines import BASELINES
from benchmarks.kernels.decode_batch import (
    DecodeBatch,
    Shape,
    default_rule,
    shape_of,
)
from benchmarks.kernels.decoder import Decoder, kernels_here, stands_in
from tidal_vllm.config import SCOPES
from tidal_vllm.plan.rule import may_differ_in_group

OURS = ("cuda", "triton", "reference")
# FlashInfer compiles for minutes, and the reference is slow.
DEFAULT = ("flash_attn", "cuda", "triton", "triton_attn", "xformers")
# The third as the default budget has it, the others 10 % of the context.
CASES = ["64x32768:3264", "16x32768:4096", "16x131072:13104", "1x131072:4096"]
CASES += ["4x131072:4096"]
SMOKE = ["2x96:48"]


def measure(name: str, args: argparse.Namespace) -> int:
    """Measure one implementation on all cases; 1 if it is wrong somewhere."""
    bench = timing.start("attend", args)
    shape = shape_of(args)
    if stands_in(name, bench.device):  # the reference reads no fp8
        shape.kv_cache_dtype = "auto"
    for case in args.cases:
        read_case(case)
    for case in SMOKE if args.smoke else args.cases:
        batch, context, budget = read_case(case)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        with bench.case({"batch": batch, "context": context}, name):
            print(f"batch {batch}, context {context}, budget {budget}", flush=True)
            decodes = DecodeBatch.make(shape, batch, context, bench.device)
            if name in BASELINES:
                run_baseline(bench, decodes, name)
            else:
                run_ours(bench, decodes, name, budget, args)
        decodes = None  # before the next one is made
    if args.launches and name in OURS and bench.device.type == "cuda":
        with bench.case({"op": "kernels"}, name):
            count_launches(bench, shape, name)
    return 1 if bench.num_wrong else 0


def read_case(case: str) -> tuple[int, int, int]:
    """Batch, context and budget of BATCHxCONTEXT:BUDGET."""
    sizes, _, budget = case.partition(":")
    try:
        batch, context = map(int, sizes.split("x"))
        return batch, context, int(budget)
    except ValueError:
        raise SystemExit(
            f"--cases {case}: allowed is BATCHxCONTEXT:BUDGET, such as {CASES[0]}"
        ) from None


def run_baseline(bench: timing.Bench, decodes: DecodeBatch, name: str) -> None:
    about = decodes.describe() | {"op": "dense"}
    try:
        call = BASELINES[name](decodes)
    except (ImportError, RuntimeError) as error:
        bench.skip(about, name, error)  # not on this machine
        return
    decodes.check_dense(call())
    bench.add(about, name, bench.time_us(call), decodes.dense_bytes)


def run_ours(
    bench: timing.Bench,
    decodes: DecodeBatch,
    name: str,
    budget: int,
    args: argparse.Namespace,
) -> None:
    kernels = kernels_here(decodes.shape, name, bench.device)
    for size in args.select_blocks:
        about = decodes.describe() | {"select_block_size": size}
        with bench.case(about, name):
            decoder = Decoder(decodes, default_rule(budget, size), kernels)
            decoder.check()
            _time_dense(bench, decoder, about, name)
        for scope in args.scopes:
            about |= {"op": "sparse", "scope": scope, "token_budget": budget}
            with bench.case(about, name):
                decoder = Decoder(decodes, default_rule(budget, size), kernels, scope)
                decoder.check()
                num_bytes = decodes.sparse_bytes(decoder.rule)
                if may_differ_in_group(scope):
                    num_bytes = 0  # heads of a group may keep other tokens
                bench.add(about, name, bench.time_us(decoder.sparse), num_bytes)


def _time_dense(bench: timing.Bench, decoder: Decoder, about: dict, name: str) -> None:
    num_bytes = decoder.decodes.dense_bytes
    timed = {
        "dense": (partial(decoder.dense, False), num_bytes),
        "dense + block_lse": (partial(decoder.dense, True), num_bytes),
        "score_blocks": (decoder.score, num_bytes // 2),
    }
    for op, (call, moved) in timed.items():
        bench.add(about | {"op": op}, name, bench.time_us(call), moved)


def count_launches(bench: timing.Bench, shape: Shape, name: str) -> None:
    """Note how many kernels each op launches, on a small batch; nothing is timed."""
    decodes = DecodeBatch.make(replace(shape), 2, 4096, bench.device)
    kernels = kernels_here(shape, name, bench.device)
    decoder = Decoder(decodes, default_rule(1024), kernels)
    ops = {"dense + block_lse": partial(decoder.dense, True), "sparse": decoder.sparse}
    for op, call in (ops | {"select": decoder.select}).items():
        found = timing.count_kernels(call)
        about = {"op": op, "implementation": name}
        bench.note(about, launches=sum(found.values()), kernels=found)


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--select-blocks", type=int, nargs="+", default=[16])
    parser.add_argument(
        "--launches",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count the kernels that each op launches",
    )
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=["sequence"])
    parser.add_argument(
        "--kv-cache-dtype", choices=["auto", "fp8"], default="auto", help="as in vLLM"
    )
    return each_alone(parser, [*OURS, *BASELINES], measure, DEFAULT)


if __name__ == "__main__":
    sys.exit(main())
