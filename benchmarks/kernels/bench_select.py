r"""How long does choosing take, beside the top-k of others?

    python -m benchmarks.kernels.bench_select --out benchmarks/results/gpu.jsonl

`select_blocks` from `block_lse` of random attention: pool over heads, force, top-k,
sort. Rivals get the pooled mass ready-made and only find the top-k: `torch.topk`, and
vLLM's `top_k_per_row_decode`. The sets are checked against the reference before timing.
"""

import sys
from functools import partial

import torch

from benchmarks.kernels import timing
from benchmarks.kernels.decode_batch import Shape, default_rule, kernels_here, shape_of
from tidal_vllm.kernels import DecodeArgs, Workspace, reference
from tidal_vllm.plan.rule import num_sets

# Rows, context, budget, selection block; target in us, on an H200, scope sequence.
SMOKE = [(2, 96, 32, 8, None)]
SIZES = [
    (16, 65536, 4096, 16, 15),
    (64, 131072, 4096, 16, 30),
    (16, 131072, 4096, 16, None),
    (64, 32768, 4096, 16, None),
    (1, 131072, 4096, 16, None),
    (16, 131072, 4096, 1, None),
]


def make_scores(batch: int, heads: int, context: int, size: int, device):
    """block_lse and lse of scores with a few heavy blocks, as attention has."""
    num_blocks = -(-context // size)
    scores = torch.randn(batch, heads, num_blocks, device=device) * 2
    block_lse = scores + torch.log(torch.tensor(float(size)))
    return block_lse, block_lse.logsumexp(-1)


def run(bench, shape: Shape, rows, context, budget, size, target, args) -> None:
    about = {
        "rows": rows,
        "context": context,
        "token_budget": budget,
        "select_block_size": size,
        "num_heads": shape.num_heads,
    }
    print(f"{rows} rows of {context}, block {size}, budget {budget}", flush=True)
    block_lse, lse = make_scores(rows, shape.num_heads, context, size, bench.device)
    lens = torch.full((rows,), context, dtype=torch.int32, device=bench.device)
    rule, kept = default_rule(budget, size), budget // size
    pooled = (block_lse - lse[..., None]).exp().sum(1)
    for name, call in _rivals(pooled, lens // size, kept).items():
        try:
            bench.add(about, name, bench.time_us(call), pooled.nbytes)
        except Exception as error:  # this rival does not run on this machine
            bench.skip(about, name, error)
    for kernels in kernels_here(bench, shape, args.kernels):
        for scope in args.scopes:
            sets = num_sets(scope, shape.num_heads, shape.num_kv_heads)
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
            record = about | {"scope": scope, "target_us": target}
            record |= {"same_as_reference": same}
            num_bytes = block_lse.nbytes
            times = bench.time_us(select)
            bench.add(record, f"tidal {kernels.name}, {scope}", times, num_bytes)


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


def _rivals(pooled: torch.Tensor, counts: torch.Tensor, kept: int) -> dict:
    indices = torch.empty(
        pooled.shape[0], kept, dtype=torch.int32, device=pooled.device
    )

    def vllm_top_k():
        from vllm import _custom_ops

        rows = pooled.shape[0]
        _custom_ops.top_k_per_row_decode(
            pooled, 1, counts, indices, rows, pooled.stride(0), 1, kept
        )

    return {
        "torch.topk": lambda: pooled.topk(kept, sorted=False),
        "vllm top_k_per_row_decode": vllm_top_k,
    }


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--scopes", nargs="+", default=["sequence", "kv_head"])
    args = parser.parse_args()
    bench = timing.start("select_blocks", args)
    shape = shape_of(args)
    for size in SMOKE if args.smoke else SIZES:
        run(bench, shape, *size, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
