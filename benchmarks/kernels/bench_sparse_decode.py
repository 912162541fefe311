r"""How close is sparse decoding to the memory bound, and to its share of dense?

    python -m benchmarks.kernels.bench_sparse_decode --out benchmarks/results/gpu.jsonl

One layer's `sparse_decode` over a selection that our ops made from the same queries,
per budget and scope, checked against the oracle; vLLM's FLASH_ATTN over the whole
context beside it. `share_of_copy` counts K and V of the kept tokens once per set.
"""

import sys

from benchmarks.kernels import timing
from benchmarks.kernels.baselines import flash_attn
from benchmarks.kernels.decode_batch import (
    DecodeBatch,
    Decoder,
    Shape,
    default_rule,
    kernels_here,
    shape_of,
)
from tidal_vllm.config import SCOPES
from tidal_vllm.plan.rule import may_differ_in_group

TARGETS = {"share_of_copy": 0.8, "ratio_to_dense": 0.11}
SMOKE = [(2, 96, 48)]
# Batch, context, budget.
SIZES = [
    *((16, 32768, 4096), (64, 32768, 4096), (64, 32768, 3264)),
    *((16, 131072, 4096), (64, 131072, 4096), (16, 131072, 13104)),
    *((64, 131072, 13104), (1, 131072, 4096), (4, 131072, 4096)),
]


def run(bench, shape: Shape, decodes: DecodeBatch, budget: int, args) -> None:
    about = decodes.describe() | {"token_budget": budget}
    sizes = f"batch {decodes.num_rows}, context {decodes.context}, budget {budget}"
    print(sizes, flush=True)
    dense = None
    try:
        call = flash_attn(decodes)
        decodes.check_dense(call())
        times = bench.time_us(call)
        dense = bench.add(about, "vllm FLASH_ATTN, dense", times, decodes.dense_bytes)
    except Exception as error:  # not on this machine
        bench.skip(about, "vllm FLASH_ATTN, dense", error)
    for kernels in kernels_here(bench, shape, args.kernels):
        for scope in args.scopes:
            decoder = Decoder(decodes, default_rule(budget), kernels, scope)
            decoder.check()
            times = bench.time_us(decoder.sparse)
            num_bytes = decodes.sparse_bytes(decoder.rule)
            name = f"tidal {kernels.name}, {scope}"
            if may_differ_in_group(scope):
                num_bytes = 0  # heads of a group may keep other tokens
            record = bench.add(about | {"scope": scope}, name, times, num_bytes)
            if dense is not None:
                ratio = record["median_us"] / dense["median_us"]
                bench.note(
                    about | {"scope": scope},
                    implementation=name,
                    ratio_to_dense=round(ratio, 4),
                    targets=TARGETS,
                )


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument(*("--scopes",), nargs="+", default=list(SCOPES))
    args = parser.parse_args()
    bench = timing.start("sparse_decode", args)
    shape = shape_of(args)
    decodes = None
    for batch, context, budget in SMOKE if args.smoke else SIZES:
        if decodes is None or (decodes.num_rows, decodes.context) != (batch, context):
            decodes = None  # before the next one is made
            decodes = DecodeBatch.make(shape, batch, context, bench.device)
        run(bench, shape, decodes, budget, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
