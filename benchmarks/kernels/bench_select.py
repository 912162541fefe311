r"""How long does choosing take, beside the top-k of others?

    python -m benchmarks.kernels.bench_select --out benchmarks/results/gpu.jsonl

`select_blocks` from `block_lse` of random attention: pool over heads, force, top-k,
sort. Rivals get the pooled mass ready-made and only find the top-k: `torch.topk`, and
vLLM's `top_k_per_row_decode`. The sets are checked against the reference before timing.
Each implementation has a process of its own.

A case is ROWSxCONTEXT:BLOCK:BUDGET, in sequences and tokens.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.kernels import timing
from benchmarks.kernels.alone import each_alone
from benchmarks.kernels.decode_batch import Shape, default_rule, shape_of
from benchmarks.kernels.decoder import kernels_here
from tidal_vllm.config import SCOPES
from tidal_vllm.kernels import DecodeArgs, Workspace, reference
from tidal_vllm.plan.rule import num_sets

OURS = ("cuda", "triton", "reference")
SMOKE = ["2x96:8:32", "1x96:4:32"]
CASES = ["16x65536:16:4096", "64x131072:16:4096", "16x65536:4:4096"]
CASES += ["64x131072:4:4096", "16x131072:16:4096", "64x32768:16:4096"]
CASES += ["1x131072:16:4096", "16x131072:1:4096"]


def make_scores(
    batch: int, heads: int, context: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """block_lse and lse of scores with a few heavy blocks, as attention has."""
    num_blocks = -(-context // size)
    scores = torch.randn(batch, heads, num_blocks, device=device) * 2
    block_lse = scores + torch.log(torch.tensor(float(size)))
    return block_lse, block_lse.logsumexp(-1)


def measure(name: str, args: argparse.Namespace) -> int:
    """Measure one implementation on all cases; 1 if it is wrong somewhere."""
    bench = timing.start("select_blocks", args)
    shape = shape_of(args)
    cases = {case: read_case(case) for case in SMOKE if args.smoke}
    cases = cases or {case: read_case(case) for case in args.cases}
    for rows, context, size, budget in cases.values():
        about = {
            "op": "select",
            "rows": rows,
            "context": context,
            "token_budget": budget,
            "select_block_size": size,
            "num_heads": shape.num_heads,
        }
        print(f"{rows} rows of {context}, block {size}, budget {budget}", flush=True)
        given = (rows, shape.num_heads, context, size, bench.device)
        with bench.case(about, name):
            if name in RIVALS:
                scores = make_scores(*given)
                _run_rival(bench, name, about, *scores, context // size, budget // size)
                continue
        for scope in args.scopes:
            with bench.case(about | {"scope": scope}, name):
                scores = make_scores(*given)
                _run_ours(bench, shape, name, about | {"scope": scope}, *scores)
    return 1 if bench.num_wrong else 0


def read_case(case: str) -> tuple[int, int, int, int]:
    """Rows, context, selection block and budget of ROWSxCONTEXT:BLOCK:BUDGET."""
    try:
        sizes, size, budget = case.split(":")
        rows, context = map(int, sizes.split("x"))
        return rows, context, int(size), int(budget)
    except ValueError:
        raise SystemExit(
            f"--cases {case}: allowed is ROWSxCONTEXT:BLOCK:BUDGET, such as {CASES[0]}"
        ) from None


def _run_ours(
    bench: timing.Bench,
    shape: Shape,
    name: str,
    about: dict,
    block_lse: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    rows, context = about["rows"], about["context"]
    size, budget = about["select_block_size"], about["token_budget"]
    kernels = kernels_here(shape, name, bench.device)
    lens = torch.full((rows,), context, dtype=torch.int32, device=bench.device)
    rule, kept = default_rule(budget, size), budget // size
    sets = num_sets(about["scope"], shape.num_heads, shape.num_kv_heads)
    # What dense_decode would have left.
    workspace = kernels.allocate_workspace(
        *(rows, shape.num_heads, sets, shape.head_size),
        *(block_lse.shape[2], bench.device),
    )
    if kernels.name == "reference":
        workspace.block_lse, workspace.lse = block_lse, lse
    else:
        workspace.block_lse.copy_(block_lse)
        workspace.lse.copy_(lse)
    found = _make_args(shape, workspace, rows, sets, kept, bench.device)
    select = partial(kernels.ops.select_blocks, found, lens, rule)
    select()
    scores = Workspace(lse=lse, block_lse=block_lse)
    wanted = _make_args(shape, scores, rows, sets, kept, bench.device)
    reference.select_blocks(wanted, lens, rule)
    same = (found.topk_blocks == wanted.topk_blocks).float().mean().item()
    # Sums in another order: blocks at the edge may change places.
    assert same > 0.99, f"only {same:.1%} of the blocks are the reference's"
    times = bench.time_us(select)
    bench.add(about | {"same_as_reference": same}, name, times, block_lse.nbytes)


def _make_args(
    shape: Shape,
    workspace: Workspace,
    rows: int,
    sets: int,
    kept: int,
    device: torch.device,
) -> DecodeArgs:
    """Of a decode over one KV block, which nothing reads."""
    query = torch.zeros(rows, shape.num_heads, shape.head_size, device=device)
    cache = (1, shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
    return DecodeArgs(
        query=query,
        kv_cache=torch.zeros(cache, device=device),
        block_table=torch.zeros(rows, 1, dtype=torch.int32, device=device),
        output=query,
        scale=1.0,
        workspace=workspace,
        topk_blocks=torch.full((rows, sets, kept), -1, dtype=torch.int32).to(device),
        topk_lens=torch.zeros(rows, sets, dtype=torch.int32, device=device),
    )


def _run_rival(
    bench: timing.Bench,
    name: str,
    about: dict,
    block_lse: torch.Tensor,
    lse: torch.Tensor,
    num_blocks: int,
    kept: int,
) -> None:
    pooled = (block_lse - lse[..., None]).exp().sum(1)
    call = RIVALS[name](pooled, num_blocks, kept)
    try:
        call()
    except (ImportError, RuntimeError, AttributeError) as error:
        bench.skip(about, name, error)  # not on this machine
        return
    bench.add(about, name, bench.time_us(call), pooled.nbytes)


def _torch_topk(pooled: torch.Tensor, num_blocks: int, kept: int) -> Callable:
    return lambda: pooled.topk(kept, sorted=False)


def _vllm_top_k(pooled: torch.Tensor, num_blocks: int, kept: int) -> Callable:
    rows, device = pooled.shape[0], pooled.device
    indices = torch.empty(rows, kept, dtype=torch.int32, device=device)
    counts = torch.full((rows,), num_blocks, dtype=torch.int32, device=device)

    def run() -> None:
        from vllm import _custom_ops

        _custom_ops.top_k_per_row_decode(
            pooled, 1, counts, indices, rows, pooled.stride(0), 1, kept
        )

    return run


RIVALS = {"torch.topk": _torch_topk, "top_k_per_row_decode": _vllm_top_k}


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument(
        "--scopes", nargs="+", choices=SCOPES, default=["sequence", "kv_head"]
    )
    return each_alone(parser, [*OURS, *RIVALS], measure, ("cuda", "triton", *RIVALS))


if __name__ == "__main__":
    sys.exit(main())
