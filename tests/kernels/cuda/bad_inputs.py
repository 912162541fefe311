"""Arguments that each op must refuse, by name, and what the message must say."""

import torch

S, H, HKV, D, P, N, G = 3, 8, 2, 64, 4, 6, 2


def attend_arguments() -> dict:
    return {
        "query": torch.randn(S, H, D).bfloat16(),
        "kv_cache": torch.randn(8, HKV, 16, 2 * D).bfloat16(),
        "block_table": torch.arange(S * 2, dtype=torch.int32).view(S, 2),
        "seq_lens": torch.tensor([20, 0, 32], dtype=torch.int32),
        "output": torch.zeros(S, H, D, dtype=torch.bfloat16),
        "lse": torch.zeros(S, H),
        "partial_out": torch.zeros(S, H, P, D),
        "partial_lse": torch.zeros(S, H, P),
        "scale": 0.125,
        "k_scale": 1.0,
        "v_scale": 1.0,
        "select_block_size": 16,
    }


def good_arguments(op: str) -> dict:
    if op == "dense_decode":
        return attend_arguments() | {"block_lse": torch.zeros(S, H, N)}
    if op == "score_blocks":
        unknown = ("output", "partial_out", "v_scale")
        dense = good_arguments("dense_decode")
        return {name: value for name, value in dense.items() if name not in unknown}
    if op == "sparse_decode":
        blocks = torch.tensor([0, 1, -1], dtype=torch.int32).repeat(S, G, 1)
        lens = torch.full((S, G), 2, dtype=torch.int32)
        return attend_arguments() | {"topk_blocks": blocks, "topk_lens": lens}
    return {
        "block_lse": torch.randn(S, H, N),
        "lse": torch.zeros(S, H),
        "seq_lens": torch.tensor([90, 0, 33], dtype=torch.int32),
        "topk_blocks": torch.zeros(S, G, 4, dtype=torch.int32),
        "topk_lens": torch.zeros(S, G, dtype=torch.int32),
        "mass": torch.zeros(S, G, N),
        "token_budget": 64,
        "select_block_size": 16,
        "sink_tokens": 4,
        "recent_tokens": 16,
        "sparse_threshold": 0,
    }


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape and numbers, with gaps in the last dimension."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def head_size_of(size: int) -> dict:
    return {
        "query": torch.zeros(S, H, size).bfloat16(),
        "kv_cache": torch.zeros(8, HKV, 16, 2 * size).bfloat16(),
    }


A, B = "dense_decode", "sparse_decode"
ints = {"dtype": torch.int32}
fp8_cache = torch.zeros(8, HKV, 16, 2 * D).to(torch.float8_e4m3fn)
# name: (op, arguments that replace good ones, what the message must match)
ATTEND = {
    "query fp32": (
        A,
        {"query": torch.zeros(S, H, D)},
        "query.dtype is float32; .*bfloat16 or float16",
    ),
    "query of two dims": (
        A,
        {"query": torch.zeros(S, D).bfloat16()},
        r"query.dim\(\) is 2; allowed: 3",
    ),
    "query with gaps": (
        A,
        {"query": every_other(attend_arguments()["query"])},
        r"query.stride\(2\) is 2",
    ),
    "head size 80": (
        A,
        head_size_of(80),
        "head_size is 80; allowed: 64, 96, 128 or 256",
    ),
    "head size 512": (B, head_size_of(512), "head_size is 512"),
    "too many rows": (
        A,
        {"query": torch.zeros(1, 1, 64).bfloat16().expand(65536, 1, 64)},
        r"query.size\(0\) is 65536",
    ),
    "kv_cache fp32": (
        A,
        {"kv_cache": torch.zeros(8, HKV, 16, 2 * D)},
        "kv_cache.dtype is float32",
    ),
    "kv_cache of the other half type": (
        A,
        {"kv_cache": torch.zeros(8, HKV, 16, 2 * D).half()},
        "kv_cache.dtype is float16; allowed: bfloat16 or float8_e4m3fn or uint8",
    ),
    "kv_cache of K alone": (
        A,
        {"kv_cache": torch.zeros(8, HKV, 16, D).bfloat16()},
        r"kv_cache.size\(3\) is 64; allowed: 128, K and V",
    ),
    "kv_cache of five dims": (
        A,
        {"kv_cache": torch.zeros(8, 2, HKV, 16, D).bfloat16()},
        r"kv_cache.dim\(\) is 5",
    ),
    "kv_cache without heads": (
        A,
        {"kv_cache": torch.zeros(8, 0, 16, 2 * D).bfloat16()},
        r"kv_cache.size\(1\) is 0",
    ),
    "three KV heads for eight": (
        B,
        {"kv_cache": torch.zeros(8, 3, 16, 2 * D).bfloat16()},
        r"kv_cache.size\(1\) is 3; allowed: a divisor of query.size\(1\) = 8",
    ),
    "kv_cache with gaps": (
        A,
        {"kv_cache": every_other(attend_arguments()["kv_cache"])},
        r"kv_cache.stride\(3\) is 2",
    ),
    "kv_cache rows of odd strides": (
        A,
        {"kv_cache": torch.zeros(8, HKV, 16, 2 * D + 3).bfloat16()[..., : 2 * D]},
        r"kv_cache.stride\(\d\) is \d+; allowed: multiples of 16 bytes, 8 elements",
    ),
    "fp8 rows of odd strides": (
        A,
        {
            "kv_cache": torch.zeros(8, HKV, 16, 2 * D + 8, dtype=torch.uint8)[
                ..., : 2 * D
            ]
        },
        "multiples of 16 bytes, 16 elements",
    ),
    "kv_cache at an odd address": (
        A,
        {
            "kv_cache": torch.zeros(8 * HKV * 16 * 2 * D + 1)
            .bfloat16()[1:]
            .view(8, HKV, 16, 2 * D)
        },
        r"kv_cache.data_ptr\(\) is \d+; allowed: multiples of 16",
    ),
    "block_table int64": (
        A,
        {"block_table": torch.zeros(S, 2, dtype=torch.int64)},
        "block_table.dtype is int64; allowed: int32",
    ),
    "block_table of one dim": (
        B,
        {"block_table": torch.zeros(S, **ints)},
        r"block_table.dim\(\) is 1",
    ),
    "block_table too short": (
        A,
        {"block_table": torch.zeros(S - 1, 2, **ints)},
        r"block_table.size\(0\) is 2; allowed: 3 or more",
    ),
    "seq_lens int64": (
        A,
        {"seq_lens": torch.zeros(S, dtype=torch.int64)},
        "seq_lens.dtype is int64",
    ),
    "seq_lens too short": (
        B,
        {"seq_lens": torch.zeros(S - 1, **ints)},
        r"seq_lens.size\(0\) is 2",
    ),
    "seq_lens with gaps": (
        A,
        {"seq_lens": torch.zeros(2 * S, **ints)[::2]},
        r"seq_lens.stride\(0\) is 2",
    ),
    "output of another type": (
        A,
        {"output": torch.zeros(S, H, D).half()},
        "output.dtype is float16; allowed: bfloat16",
    ),
    "output of another head count": (
        B,
        {"output": torch.zeros(S, H - 1, D).bfloat16()},
        r"output.size\(1\) is 7",
    ),
    "output with gaps": (
        A,
        {"output": every_other(attend_arguments()["output"])},
        r"output.stride\(2\) is 2",
    ),
    "lse fp16": (
        A,
        {"lse": torch.zeros(S, H).half()},
        "lse.dtype is float16; allowed: float32",
    ),
    "lse transposed": (A, {"lse": torch.zeros(H, S).t()}, r"lse.stride\(1\) is 3"),
    "lse of wider rows": (
        B,
        {"lse": torch.zeros(S, H + 1)[:, :H]},
        r"lse.stride\(0\) is 9; allowed: 8: it must be contiguous",
    ),
    "partial_out without splits": (
        A,
        {"partial_out": torch.zeros(S, H, 0, D), "partial_lse": torch.zeros(S, H, 0)},
        r"partial_out.size\(2\) is 0; allowed: 1 to",
    ),
    "partial_out too short": (
        B,
        {"partial_out": torch.zeros(S - 1, H, P, D)},
        r"partial_out.size\(0\) is 2",
    ),
    "partial_out bf16": (
        A,
        {"partial_out": torch.zeros(S, H, P, D).bfloat16()},
        "partial_out.dtype is bfloat16",
    ),
    "partial_lse of fewer splits": (
        A,
        {"partial_lse": torch.zeros(S, H, P - 1)},
        r"partial_lse.size\(2\) is 3; allowed: 4, as in partial_out",
    ),
    "scale NaN": (A, {"scale": float("nan")}, "scale is nan; allowed: finite"),
    "k_scale without fp8": (
        A,
        {"k_scale": 0.5},
        "k_scale is 0.5; allowed: 1.0 unless kv_cache is fp8",
    ),
    "v_scale without fp8": (B, {"v_scale": 2.0}, "v_scale is 2"),
    "v_scale infinite": (
        A,
        {"kv_cache": fp8_cache, "v_scale": float("inf")},
        "v_scale is inf",
    ),
    "select_block_size 0": (
        A,
        {"select_block_size": 0},
        "select_block_size is 0; allowed: 1 to",
    ),
    "select_block_size 5": (
        B,
        {"select_block_size": 5},
        "select_block_size is 5; allowed: divisors of the KV block size, 16",
    ),
    "select_block_size over tiles": (
        A,
        {
            "kv_cache": torch.zeros(8, HKV, 48, 2 * D).bfloat16(),
            "select_block_size": 24,
        },
        "select_block_size is 24; allowed: 1, 2, 4, 8 and multiples of 16",
    ),
    "block_lse bf16": (
        A,
        {"block_lse": torch.zeros(S, H, N).bfloat16()},
        "block_lse.dtype is bfloat16",
    ),
    "block_lse of other heads": (
        A,
        {"block_lse": torch.zeros(S, H + 1, N)},
        r"block_lse.size\(1\) is 9",
    ),
    "topk_blocks int64": (
        B,
        {"topk_blocks": torch.zeros(S, G, 3, dtype=torch.int64)},
        "topk_blocks.dtype is int64",
    ),
    "topk_blocks too short": (
        B,
        {"topk_blocks": torch.zeros(S - 1, G, 3, **ints)},
        r"topk_blocks.size\(0\) is 2",
    ),
    "three sets for eight heads": (
        B,
        {"topk_blocks": torch.zeros(S, 3, 3, **ints)},
        r"topk_blocks.size\(1\) is 3; allowed: a divisor of the number of heads, 8",
    ),
    "two sets across three KV heads": (
        B,
        {
            "query": torch.zeros(S, 6, D).bfloat16(),
            "output": torch.zeros(S, 6, D).bfloat16(),
            "lse": torch.zeros(S, 6),
            "partial_out": torch.zeros(S, 6, P, D),
            "partial_lse": torch.zeros(S, 6, P),
            "kv_cache": torch.zeros(8, 3, 16, 2 * D).bfloat16(),
        },
        r"topk_blocks.size\(1\) is 2; allowed: divisors or multiples of .* KV heads, 3",
    ),
    "topk_lens of other sets": (
        B,
        {"topk_lens": torch.zeros(S, G + 1, **ints)},
        r"topk_lens.size\(1\) is 3",
    ),
    "topk_lens int64": (
        B,
        {"topk_lens": torch.zeros(S, G, dtype=torch.int64)},
        "topk_lens.dtype is int64",
    ),
}
SCORES = "score_blocks"
# What it shares with dense_decode, and what only has splits in partial_lse there.
SCORE = {
    f"{name}, to be scored": (SCORES, changes, message)
    for name, (op, changes, message) in ATTEND.items()
    if op == A
    and changes.keys() <= good_arguments(SCORES).keys()
    and name != "partial_lse of fewer splits"
} | {
    "block_lse too short": (
        SCORES,
        {"block_lse": torch.zeros(S - 1, H, N)},
        r"block_lse.size\(0\) is 2; allowed: 3 or more",
    ),
    "partial_lse without splits": (
        SCORES,
        {"partial_lse": torch.zeros(S, H, 0)},
        r"partial_lse.size\(2\) is 0; allowed: 1 to",
    ),
    "partial_lse too short": (
        SCORES,
        {"partial_lse": torch.zeros(S - 1, H, P)},
        r"partial_lse.size\(0\) is 2; allowed: 3 or more",
    ),
}
C = "select_blocks"
SELECT = {
    "block_lse of two dims": (
        C,
        {"block_lse": torch.zeros(S, N)},
        r"block_lse.dim\(\) is 2",
    ),
    "block_lse fp16": (
        C,
        {"block_lse": torch.zeros(S, H, N).half()},
        "block_lse.dtype is float16",
    ),
    "block_lse too short": (
        C,
        {"block_lse": torch.zeros(S - 1, H, N)},
        r"block_lse.size\(0\) is 2",
    ),
    "block_lse with gaps": (
        C,
        {"block_lse": every_other(torch.zeros(S, H, N))},
        r"block_lse.stride\(2\) is 2",
    ),
    "lse of other heads": (C, {"lse": torch.zeros(S, H - 1)}, r"lse.size\(1\) is 7"),
    "seq_lens fp32": (C, {"seq_lens": torch.zeros(S)}, "seq_lens.dtype is float32"),
    "topk_blocks too narrow": (
        C,
        {"topk_blocks": torch.zeros(S, G, 3, **ints)},
        r"topk_blocks.size\(2\) is 3; allowed: 4 or more",
    ),
    "topk_blocks too narrow for the threshold": (
        C,
        {"sparse_threshold": 80},
        r"topk_blocks.size\(2\) is 4; allowed: 5 or more",
    ),
    "three sets": (
        C,
        {"topk_blocks": torch.zeros(S, 3, 4, **ints)},
        r"topk_blocks.size\(1\) is 3",
    ),
    "mass too narrow": (
        C,
        {"mass": torch.zeros(S, G, N - 1)},
        r"mass.size\(2\) is 5; allowed: 6 or more",
    ),
    "mass of other sets": (
        C,
        {"mass": torch.zeros(S, G + 1, N)},
        r"mass.size\(1\) is 3",
    ),
    "token_budget 0": (C, {"token_budget": 0}, "token_budget is 0; allowed: 1 to"),
    "token_budget between blocks": (
        C,
        {"token_budget": 70},
        "token_budget is 70; allowed: multiples of select_block_size = 16",
    ),
    "no room for the forced": (
        C,
        {"recent_tokens": 50},
        "token_budget is 64; allowed: room for the forced tokens, 6 blocks of 16",
    ),
    "negative sink_tokens": (
        C,
        {"sink_tokens": -1},
        "sink_tokens is -1; allowed: 0 to",
    ),
    "negative recent_tokens": (C, {"recent_tokens": -1}, "recent_tokens is -1"),
    "threshold beyond int32": (
        C,
        {"sparse_threshold": 2**31},
        "sparse_threshold is 2147483648",
    ),
    "select_block_size 0 ": (C, {"select_block_size": 0}, "select_block_size is 0"),
}
BAD_INPUTS = ATTEND | SCORE | SELECT
