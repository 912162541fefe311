r"""What does it cost to keep the scores, beside dense decoding by others?

    python -m benchmarks.kernels.bench_dense_decode --out benchmarks/results/gpu.jsonl

One layer's decode attention over shuffled pages: ours with and without `block_lse`,
vLLM's FLASH_ATTN and TRITON_ATTN, xformers, FlashInfer (`--flashinfer`); and our
`score_blocks`, the scores alone. All outputs are checked against the fp32 oracle before
anything is timed. `share_of_copy`: bytes of K and V (`score_blocks`: of K) over the
time, against a copy's bandwidth.
"""

import sys
from functools import partial

from benchmarks.kernels import timing
from benchmarks.kernels.baselines import dense_baselines
from benchmarks.kernels.decode_batch import (
    DecodeBatch,
    Decoder,
    Shape,
    default_rule,
    kernels_here,
    shape_of,
)

TARGET = 1.05
SMOKE = [(2, 96)]
SIZES = [(16, 32768), (64, 32768), (16, 131072), (64, 131072), (1, 131072)]


def run(bench: timing.Bench, shape: Shape, batch: int, context: int, args) -> None:
    decodes = DecodeBatch.make(shape, batch, context, bench.device)
    about = decodes.describe()
    print(f"batch {batch}, context {context}", flush=True)
    best = {}
    for name, make in dense_baselines(decodes, args.flashinfer).items():
        try:
            call = make()
            decodes.check_dense(call())
            times = bench.time_us(call)
        except Exception as error:  # a rival that fails costs its own line only
            bench.skip(about, name, error)
            continue
        best[name] = bench.add(about, name, times, decodes.dense_bytes)["median_us"]
    for kernels in kernels_here(bench, shape, args.kernels):
        decoder = Decoder(decodes, default_rule(min(4096, context // 2)), kernels)
        decoder.check()
        for keep_scores in (False, True):
            name = f"tidal {kernels.name}" + (" + block_lse" if keep_scores else "")
            times = bench.time_us(partial(decoder.dense, keep_scores))
            record = bench.add(about, name, times, decodes.dense_bytes)
            if keep_scores and "vllm FLASH_ATTN" in best:
                ratio = record["median_us"] / best["vllm FLASH_ATTN"]
                bench.note(
                    about,
                    implementation=name,
                    ratio_to_flash_attn=round(ratio, 3),
                    target=TARGET,
                )
        times = bench.time_us(decoder.score)
        name = f"score_blocks, tidal {kernels.name}"
        bench.add(about, name, times, decodes.dense_bytes // 2)


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--flashinfer", action="store_true")
    args = parser.parse_args()
    bench = timing.start("dense_decode", args)
    shape = shape_of(args)
    for batch, context in SMOKE if args.smoke else SIZES:
        run(bench, shape, batch, context, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
