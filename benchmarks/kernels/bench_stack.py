r"""All of a model's decode attention in one CUDA graph, dense and by roles.

    python -m benchmarks.kernels.bench_stack --out benchmarks/results/gpu.jsonl

32 layers of Llama 3.1 8B's shape: 2 DENSE through vLLM's FLASH_ATTN, 2 SELECT and 28
SPARSE, against 32 layers of FLASH_ATTN (TRITON_ATTN where that does not load). SELECT
layers attend to everything or to what they chose (`select_attends`), and choose in
every step or in one of four (`reselect_interval`): then the time is that of four steps,
by four. Layers take turns on as many KV caches as fit into memory, so that none finds
its tokens in the L2 that the last one left; the record says how many. Checked against
the oracle before timing.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from benchmarks.kernels import timing
from benchmarks.kernels.baselines import flash_attn, triton_attn
from benchmarks.kernels.decode_batch import (
    DecodeBatch,
    Decoder,
    Shape,
    default_rule,
    kernels_here,
    shape_of,
)
from tidal_vllm.config import SELECT_ATTENDS, TidalConfig
from tidal_vllm.plan.roles import LayerPlan, Role
from tidal_vllm.plan.steps import kv_read_share

# Speed-up over dense to reach, by reselect_interval. NOTE: with 2 DENSE layers and 10 %
# of the context as budget, the bytes alone bound the second at 5.9.
TARGETS = {1: 4.5, 4: 8.0}
NUM_LAYERS = 32
SMOKE = [(1, 96, 48)]
# Batch, context, budget: 10 % of the context, then the default.
SIZES = [
    *((64, 32768, 3264), (64, 65536, 6544), (64, 131072, 13104)),
    *((16, 131072, 13104), (64, 32768, 4096), (64, 131072, 4096)),
    *((16, 8192, 4096), (1, 131072, 4096)),
]


def roles(num_layers: int) -> list[Role]:
    """Roles as in the packaged profile of Llama 3.1 8B: DENSE 0 and 1, SELECT 2, 13."""
    selecting = {2, 13}
    return [
        Role.DENSE if i < 2 else Role.SELECT if i in selecting else Role.SPARSE
        for i in range(num_layers)
    ]


def make_batches(
    shape: Shape, batch: int, context: int, bench: timing.Bench, most: int
) -> list[DecodeBatch]:
    """Batches of the same queries and block tables, each with a KV cache of its own."""
    first = DecodeBatch.make(shape, batch, context, bench.device)
    batches, needed = [first], first.kv_cache.nbytes
    for _ in range(1, min(most, NUM_LAYERS)):
        if bench.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            if free < needed + (8 << 30):
                break
        cache = torch.empty_like(first.kv_cache)
        for part in cache.split(4096):
            part.normal_()
        fields = {**vars(first), "kv_cache": cache}
        batches.append(DecodeBatch(**fields))
    return batches


def run(bench, shape, batch: int, context: int, budget: int, args) -> None:
    print(f"batch {batch}, context {context}, budget {budget}", flush=True)
    batches = make_batches(shape, batch, context, bench, args.caches)
    about = batches[0].describe() | {
        "token_budget": budget,
        "num_layers": args.layers,
        "kv_caches": len(batches),
    }
    dense_of, dense_name = None, ""
    for name, make in (("FLASH_ATTN", flash_attn), ("TRITON_ATTN", triton_attn)):
        try:
            calls = [make(decodes) for decodes in batches]
            batches[0].check_dense(calls[0]())
        except Exception as error:  # not on this machine
            bench.skip(about, f"vllm {name}", error)
            continue
        dense_of, dense_name = calls, name
        break
    if dense_of is None:
        raise SystemExit("no dense baseline runs here: nothing to compare with")

    def dense() -> None:
        for layer in range(args.layers):
            dense_of[layer % len(batches)]()

    times = bench.time_us(dense)
    num_bytes = args.layers * batches[0].dense_bytes
    base = bench.add(about, f"vllm {dense_name}, all dense", times, num_bytes)
    plan = LayerPlan(tuple(roles(args.layers)), "benchmark")
    for kernels in kernels_here(bench, shape, args.kernels):
        rule = default_rule(budget)
        first = Decoder(batches[0], rule, kernels)
        first.check()
        decoders = [first.over(decodes) for decodes in batches]
        stack = Stack(plan.roles, dense_of, decoders)
        for attends, interval in product(SELECT_ATTENDS, args.intervals):
            steps = partial(stack.decode, interval, attends)
            steps()
            decoders[(args.layers - 1) % len(batches)].check_sparse()
            settings = {"reselect_interval": interval, "select_attends": attends}
            config = TidalConfig(token_budget=budget, **settings)
            share = kv_read_share(plan, config, int(batches[0].seq_lens[0]))
            times = [t / interval for t in bench.time_us(steps)]
            name, setup = f"tidal {kernels.name}", about | settings
            ours = bench.add(setup, name, times, int(share * num_bytes))
            bench.note(
                setup,
                implementation=name,
                speedup=round(base["median_us"] / ours["median_us"], 3),
                speedup_by_bytes=round(1 / share, 3),
                target=TARGETS.get(interval),
            )


@dataclass
class Stack:
    """A model's attention layers by role, which take turns on the batches."""

    roles: tuple[Role, ...]
    dense_of: list[Callable[[], object]]
    decoders: list[Decoder]

    def decode(self, interval: int, attends: str) -> None:
        """Decode as many steps as one selection holds for."""
        for step in range(interval):
            for layer, role in enumerate(self.roles):
                turn = layer % len(self.decoders)
                if role is Role.DENSE:
                    self.dense_of[turn]()
                elif role is Role.SELECT:
                    self._select(self.decoders[turn], step == 0, interval, attends)
                else:
                    self.decoders[turn].sparse()

    def _select(self, decoder: Decoder, chooses: bool, interval, attends) -> None:
        """Run every op, as a captured graph does; the lengths say for which rows."""
        lens = None if chooses else decoder.nobody
        if attends == "chosen":
            decoder.score(lens)
            decoder.select(lens)
            decoder.sparse()
            return
        decoder.dense(keep_scores=True, lens=lens)
        decoder.select(lens)
        if interval > 1:
            decoder.sparse(decoder.nobody if chooses else None)


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--caches", type=int, default=NUM_LAYERS, help="at most")
    parser.add_argument("--intervals", type=int, nargs="+", default=list(TARGETS))
    args = parser.parse_args()
    bench = timing.start("stack", args)
    shape = shape_of(args)
    if args.smoke:
        args.layers, args.caches, args.intervals = 4, 2, [1, 2]
    for size in SMOKE if args.smoke else SIZES:
        run(bench, shape, *size, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
