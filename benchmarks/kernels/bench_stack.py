r"""All of a model's decode attention in one CUDA graph, dense and by roles.

    python -m benchmarks.kernels.bench_stack --out benchmarks/results/gpu.jsonl

32 layers of Llama 3.1 8B's shape: 2 DENSE through vLLM's FLASH_ATTN, 2 SELECT and 28
SPARSE, against 32 layers of FLASH_ATTN (TRITON_ATTN where that does not load). SELECT
layers attend to everything or to what they chose (`select_attends`), and choose in
every step or in one of four (`reselect_interval`): then the time is that of four steps,
by four. Checked against the oracle before timing; each implementation has a process of
its own.

Layers take turns on as many KV caches as fit into memory; the record says how many.
A case in which the L2 could still hold what the last turn on a cache has read is left
out.

A case is BATCHxCONTEXT:BUDGET, in sequences and tokens.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from benchmarks.kernels import timing
from benchmarks.kernels.alone import each_alone
from benchmarks.kernels.baselines import BASELINES
from benchmarks.kernels.bench_attend import OURS, read_case
from benchmarks.kernels.decode_batch import (
    DecodeBatch,
    Shape,
    default_rule,
    fill_randomly,
    shape_of,
)
from benchmarks.kernels.decoder import Decoder, kernels_here
from tidal_vllm.config import SELECT_ATTENDS, TidalConfig
from tidal_vllm.plan.roles import LayerPlan, Role
from tidal_vllm.plan.steps import kv_read_share

NUM_LAYERS = 32
SMOKE = ["1x96:48"]
# 10 % of the context as budget, then the default.
CASES = ["64x32768:3264", "64x65536:6544", "64x131072:13104", "16x131072:13104"]
CASES += ["64x32768:4096", "64x131072:4096", "16x8192:4096", "1x131072:4096"]
SPARE_BYTES = 8 << 30
"""Memory left to kernels, graphs and what the oracle needs."""


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
    on_gpu = bench.device.type == "cuda"
    if on_gpu:  # what torch keeps of the case before would count as used
        torch.cuda.empty_cache()
    first = DecodeBatch.make(shape, batch, context, bench.device)
    batches, needed = [first], first.kv_cache.nbytes
    while len(batches) < most:
        if on_gpu and torch.cuda.mem_get_info()[0] < needed + SPARE_BYTES:
            break
        cache = torch.empty_like(first.kv_cache)
        fill_randomly(cache)
        fields = {**vars(first), "kv_cache": cache, "oracles": {}}
        batches.append(DecodeBatch(**fields))
    return batches


def measure(name: str, args: argparse.Namespace) -> int:
    """Measure one implementation on all cases; 1 if it is wrong somewhere."""
    bench = timing.start("stack", args)
    shape = shape_of(args)
    if args.smoke:
        args.layers, args.caches, args.intervals = 4, 2, [1, 2]
    for case in args.cases:
        read_case(case)
    for case in SMOKE if args.smoke else args.cases:
        batch, context, budget = read_case(case)
        about = {"batch": batch, "context": context, "token_budget": budget}
        print(f"batch {batch}, context {context}, budget {budget}", flush=True)
        with bench.case(about, name):
            _run(bench, shape, about, name, args)
    return 1 if bench.num_wrong else 0


def _run(
    bench: timing.Bench,
    shape: Shape,
    case: dict,
    name: str,
    args: argparse.Namespace,
) -> None:
    kernels, rule = (
        kernels_here(shape, name, bench.device),
        default_rule(case["token_budget"]),
    )
    most = min(args.caches, args.layers)
    batches = make_batches(shape, case["batch"], case["context"], bench, most)
    first = batches[0]
    about = case | first.describe() | {"num_layers": args.layers}
    about["kv_caches"] = len(batches)
    between = len(batches) * first.sparse_bytes(rule)
    print(f"  {len(batches)} KV caches; {between >> 20} MiB are read between two turns")
    if between < 3 * bench.l2_bytes:
        bench.skip(about, name, f"{between} bytes between two turns: may be L2 hits")
        return
    dense_name, dense_of = _dense_layers(bench, about, batches)

    def dense() -> None:
        for layer in range(args.layers):
            dense_of[layer % len(batches)]()

    num_bytes = args.layers * first.dense_bytes
    base = bench.add(
        about | {"op": "all dense"}, dense_name, bench.time_us(dense), num_bytes
    )
    plan = LayerPlan(tuple(roles(args.layers)), "benchmark")
    decoder = Decoder(first, rule, kernels)
    decoder.check()
    decoders = [decoder.over(decodes) for decodes in batches]
    stack = Stack(plan.roles, dense_of, decoders)
    for attends, interval in product(SELECT_ATTENDS, args.intervals):
        settings = {"reselect_interval": interval, "select_attends": attends}
        setup = about | {"op": "by roles", "dense_layers": dense_name} | settings
        with bench.case(setup, name):
            steps = partial(stack.decode, interval, attends)
            steps()
            decoders[(args.layers - 1) % len(batches)].check_sparse()
            config = TidalConfig(
                token_budget=case["token_budget"],
                select_block_size=rule.select_block_size,
                **settings,
            )
            share = kv_read_share(plan, config, int(first.seq_lens[0]))
            times = [t / interval for t in bench.time_us(steps)]
            ours = bench.add(setup, name, times, int(share * num_bytes))
            if not bench.smoke:
                speedup = base["median_us"] / ours["median_us"]
                bench.note(
                    setup | {"implementation": name},
                    speedup=round(speedup, 3),
                    speedup_by_bytes=round(1 / share, 3),
                )


def _dense_layers(
    bench: timing.Bench, about: dict, batches: list[DecodeBatch]
) -> tuple[str, list[Callable[[], object]]]:
    """The baseline of this machine, by name, with a call for each batch.

    Raises:
        RuntimeError: There is none.
    """
    for name in ("flash_attn", "triton_attn"):
        try:
            calls = [BASELINES[name](decodes) for decodes in batches]
        except (ImportError, RuntimeError) as error:
            bench.skip(about, name, error)  # not on this machine
            continue
        batches[0].check_dense(calls[0]())
        return name, calls
    raise RuntimeError("no dense baseline runs here: nothing to compare with")


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
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--caches", type=int, default=NUM_LAYERS, help="at most")
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 4])
    return each_alone(parser, OURS, measure, ("cuda", "triton"))


if __name__ == "__main__":
    sys.exit(main())
