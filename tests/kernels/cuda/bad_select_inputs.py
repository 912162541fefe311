"""Arguments that select_blocks must refuse; `bad_inputs` says what an entry is."""

import torch

from tests.kernels.cuda.op_arguments import G, H, N, S, every_other
from tidal_vllm.kernels.workspace import FIRST_DIGITS

INTS = {"dtype": torch.int32}


OP = "select_blocks"
SELECT = {
    "block_lse of two dims": (
        OP,
        {"block_lse": torch.zeros(S, N)},
        r"block_lse.dim\(\) is 2",
    ),
    "block_lse fp16": (
        OP,
        {"block_lse": torch.zeros(S, H, N).half()},
        "block_lse.dtype is float16",
    ),
    "block_lse too short": (
        OP,
        {"block_lse": torch.zeros(S - 1, H, N)},
        r"block_lse.size\(0\) is 2",
    ),
    "block_lse with gaps": (
        OP,
        {"block_lse": every_other(torch.zeros(S, H, N))},
        r"block_lse.stride\(2\) is 2",
    ),
    "lse of other heads": (OP, {"lse": torch.zeros(S, H - 1)}, r"lse.size\(1\) is 7"),
    "seq_lens fp32": (OP, {"seq_lens": torch.zeros(S)}, "seq_lens.dtype is float32"),
    "topk_blocks too narrow": (
        OP,
        {"topk_blocks": torch.zeros(S, G, 3, **INTS)},
        r"topk_blocks.size\(2\) is 3; allowed: 4 or more",
    ),
    "topk_blocks too narrow for the threshold": (
        OP,
        {"sparse_threshold": 80},
        r"topk_blocks.size\(2\) is 4; allowed: 5 or more",
    ),
    "three sets": (
        OP,
        {"topk_blocks": torch.zeros(S, 3, 4, **INTS)},
        r"topk_blocks.size\(1\) is 3",
    ),
    "mass too narrow": (
        OP,
        {"mass": torch.zeros(S, G, N - 1)},
        r"mass.size\(2\) is 5; allowed: 6 or more",
    ),
    "mass of other sets": (
        OP,
        {"mass": torch.zeros(S, G + 1, N)},
        r"mass.size\(1\) is 3",
    ),
    "arrivals int64": (
        OP,
        {"arrivals": torch.zeros(S, H, dtype=torch.int64)},
        "arrivals.dtype is int64; allowed: int32",
    ),
    "arrivals too short": (
        OP,
        {"arrivals": torch.zeros(S - 1, H, **INTS)},
        r"arrivals.size\(0\) is 2; allowed: 3 or more",
    ),
    "digit_counts int64": (
        OP,
        {"digit_counts": torch.zeros(S, G, FIRST_DIGITS, dtype=torch.int64)},
        "digit_counts.dtype is int64; allowed: int32",
    ),
    "digit_counts too short": (
        OP,
        {"digit_counts": torch.zeros(S - 1, G, FIRST_DIGITS, **INTS)},
        r"digit_counts.size\(0\) is 2; allowed: 3 or more",
    ),
    "digit_counts of other sets": (
        OP,
        {"digit_counts": torch.zeros(S, G + 1, FIRST_DIGITS, **INTS)},
        r"digit_counts.size\(1\) is 3; allowed: 2",
    ),
    "digit_counts of other digits": (
        OP,
        {"digit_counts": torch.zeros(S, G, FIRST_DIGITS + 1, **INTS)},
        r"digit_counts.size\(2\) is 2049; allowed: 2048",
    ),
    "digit_counts of wider lines": (
        OP,
        {"digit_counts": torch.zeros(S, G, FIRST_DIGITS + 1, **INTS)[..., :-1]},
        r"digit_counts.stride\(1\) is 2049; allowed: 2048: it must be contiguous",
    ),
    "token_budget 0": (OP, {"token_budget": 0}, "token_budget is 0; allowed: 1 to"),
    "token_budget between blocks": (
        OP,
        {"token_budget": 70},
        "token_budget is 70; allowed: multiples of select_block_size = 16",
    ),
    "no room for the forced": (
        OP,
        {"recent_tokens": 50},
        "token_budget is 64; allowed: room for the forced tokens, 6 blocks of 16",
    ),
    "negative sink_tokens": (
        OP,
        {"sink_tokens": -1},
        "sink_tokens is -1; allowed: 0 to",
    ),
    "negative recent_tokens": (OP, {"recent_tokens": -1}, "recent_tokens is -1"),
    "threshold beyond int32": (
        OP,
        {"sparse_threshold": 2**31},
        "sparse_threshold is 2147483648",
    ),
    "select_block_size 0": (OP, {"select_block_size": 0}, "select_block_size is 0"),
}
