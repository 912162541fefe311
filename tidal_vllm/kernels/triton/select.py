"""`select_blocks` in Triton, on `select_kernels`.

Compiled ahead of time for sm_80, sm_90, sm_100, sm_120 and gfx942, and run under
Triton's interpreter and on an H100. docs/triton.md has counts and a model,
docs/gpu_results.md what was measured.
"""

import torch
import triton

from tidal_vllm.kernels.arguments import DecodeArgs, Rule
from tidal_vllm.kernels.triton.checks import check_select
from tidal_vllm.kernels.triton.select_kernels import choose_blocks, weigh_blocks
from tidal_vllm.kernels.triton.tiling import device_limits

# Numbers of block_lse that a program of `weigh_blocks` loads at once, 16 KiB, from so
# many heads and blocks: all of its loads are under way together.
WEIGH_ELEMENTS = 4096
MAX_WEIGH_HEADS, MAX_WEIGH_BLOCKS = 32, 1024
# A tile has four parts of groups of 32 times four blocks, at least one in each part.
MIN_CHOOSE_TILE, CHOOSE_TILE = 512, 8192
MIN_CHOOSE_THREADS, MAX_CHOOSE_THREADS = 128, 512


def select_blocks(args: DecodeArgs, seq_lens: torch.Tensor, rule: Rule) -> None:
    """Choose each set's blocks; `reference.select_blocks` defines it. Capturable.

    Of block_lse, the blocks that a row has are used; it must have room for the longest
    row. The forced blocks must fit the budget, as `Rule` says. Neither is
    checked here, and what topk_blocks has no room for is left out.
    workspace.digit_counts holds zeros before and after.

    Raises:
        ValueError: A dtype, device, shape or stride that does not fit.
    """
    check_select(args, seq_lens)
    num_rows, num_heads, _ = args.query.shape
    if num_rows == 0:
        return
    block_lse, mass = args.workspace.block_lse, args.workspace.mass
    digit_counts = args.workspace.digit_counts
    topk_blocks, topk_lens = args.topk_blocks, args.topk_lens
    num_sets, max_blocks = topk_blocks.shape[1:]
    num_blocks, size = block_lse.shape[2], rule.select_block_size
    keep_all_len = max(rule.sparse_threshold, rule.token_budget)
    heads_per_set = num_heads // num_sets
    heads = min(MAX_WEIGH_HEADS, triton.next_power_of_2(heads_per_set))
    weigh_tile = min(MAX_WEIGH_BLOCKS, WEIGH_ELEMENTS // heads)
    weigh_blocks[(max(1, triton.cdiv(num_blocks, weigh_tile)), num_sets, num_rows)](
        *(block_lse, args.workspace.lse, seq_lens, mass, digit_counts, num_blocks),
        *block_lse.stride()[:2],
        *mass.stride()[:2],
        SIZE=size,
        KEEP_ALL=keep_all_len,
        SINKS=triton.cdiv(rule.sink_tokens, size),
        RECENT_TOKENS=max(rule.recent_tokens, 1),
        NUM_HEADS=num_heads,
        NUM_SETS=num_sets,
        HEADS_PER_SET=heads_per_set,
        TILE_HEADS=heads,
        TILE=weigh_tile,
        num_warps=4,
    )
    tile = min(
        CHOOSE_TILE,
        triton.next_power_of_2(max(num_blocks, max_blocks, MIN_CHOOSE_TILE)),
    )
    threads = min(MAX_CHOOSE_THREADS, max(MIN_CHOOSE_THREADS, tile // 8))
    choose_blocks[(num_sets, num_rows)](
        *(mass, digit_counts, seq_lens, topk_blocks, topk_lens),
        *(num_blocks, max_blocks),
        *mass.stride()[:2],
        *topk_blocks.stride()[:2],
        topk_lens.stride(0),
        SIZE=size,
        KEEP_ALL=keep_all_len,
        BUDGET_BLOCKS=rule.token_budget // size,
        TILE=tile,
        num_warps=threads // device_limits(args.query.device).warp_size,
    )
