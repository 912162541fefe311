"""Arguments that each op must refuse, by name, and what the message must say.

Each entry is (op, arguments that replace good ones, what the message must match).
"""

import torch

from tests.kernels.cuda.bad_select_inputs import SELECT
from tests.kernels.cuda.op_arguments import (
    ATTENDING,
    HKV,
    D,
    G,
    H,
    N,
    P,
    S,
    every_other,
    good_arguments,
)


def head_size_of(size: int) -> dict:
    return {
        "query": torch.zeros(S, H, size).bfloat16(),
        "kv_cache": torch.zeros(8, HKV, 16, 2 * size).bfloat16(),
    }


DENSE, SCORE, SPARSE = ATTENDING
INTS = {"dtype": torch.int32}
FP8_CACHE = torch.zeros(8, HKV, 16, 2 * D).to(torch.float8_e4m3fn)
ATTEND = {
    "query fp32": (
        DENSE,
        {"query": torch.zeros(S, H, D)},
        "query.dtype is float32; .*bfloat16 or float16",
    ),
    "query of two dims": (
        DENSE,
        {"query": torch.zeros(S, D).bfloat16()},
        r"query.dim\(\) is 2; allowed: 3",
    ),
    "query with gaps": (
        DENSE,
        {"query": every_other(good_arguments(DENSE)["query"])},
        r"query.stride\(2\) is 2",
    ),
    "head size 80": (
        DENSE,
        head_size_of(80),
        "head_size is 80; allowed: 64, 96, 128 or 256",
    ),
    "head size 512": (SPARSE, head_size_of(512), "head_size is 512"),
    "too many rows": (
        DENSE,
        {"query": torch.zeros(1, 1, 64).bfloat16().expand(65536, 1, 64)},
        r"query.size\(0\) is 65536",
    ),
    "kv_cache fp32": (
        DENSE,
        {"kv_cache": torch.zeros(8, HKV, 16, 2 * D)},
        "kv_cache.dtype is float32",
    ),
    "kv_cache of the other half type": (
        DENSE,
        {"kv_cache": torch.zeros(8, HKV, 16, 2 * D).half()},
        "kv_cache.dtype is float16; allowed: bfloat16 or float8_e4m3fn or uint8",
    ),
    "kv_cache of K alone": (
        DENSE,
        {"kv_cache": torch.zeros(8, HKV, 16, D).bfloat16()},
        r"kv_cache.size\(3\) is 64; allowed: 128, K and V",
    ),
    "kv_cache of five dims": (
        DENSE,
        {"kv_cache": torch.zeros(8, 2, HKV, 16, D).bfloat16()},
        r"kv_cache.dim\(\) is 5",
    ),
    "kv_cache without heads": (
        DENSE,
        {"kv_cache": torch.zeros(8, 0, 16, 2 * D).bfloat16()},
        r"kv_cache.size\(1\) is 0",
    ),
    "three KV heads for eight": (
        SPARSE,
        {"kv_cache": torch.zeros(8, 3, 16, 2 * D).bfloat16()},
        r"kv_cache.size\(1\) is 3; allowed: a divisor of query.size\(1\) = 8",
    ),
    "kv_cache with gaps": (
        DENSE,
        {"kv_cache": every_other(good_arguments(DENSE)["kv_cache"])},
        r"kv_cache.stride\(3\) is 2",
    ),
    "kv_cache rows of odd strides": (
        DENSE,
        {"kv_cache": torch.zeros(8, HKV, 16, 2 * D + 3).bfloat16()[..., : 2 * D]},
        r"kv_cache.stride\(\d\) is \d+; allowed: multiples of 16 bytes, 8 elements",
    ),
    "fp8 rows of odd strides": (
        DENSE,
        {
            "kv_cache": torch.zeros(8, HKV, 16, 2 * D + 8, dtype=torch.uint8)[
                ..., : 2 * D
            ]
        },
        "multiples of 16 bytes, 16 elements",
    ),
    "kv_cache at an odd address": (
        DENSE,
        {
            "kv_cache": torch.zeros(8 * HKV * 16 * 2 * D + 1)
            .bfloat16()[1:]
            .view(8, HKV, 16, 2 * D)
        },
        r"kv_cache.data_ptr\(\) is \d+; allowed: multiples of 16",
    ),
    "block_table int64": (
        DENSE,
        {"block_table": torch.zeros(S, 2, dtype=torch.int64)},
        "block_table.dtype is int64; allowed: int32",
    ),
    "block_table of one dim": (
        SPARSE,
        {"block_table": torch.zeros(S, **INTS)},
        r"block_table.dim\(\) is 1",
    ),
    "block_table too short": (
        DENSE,
        {"block_table": torch.zeros(S - 1, 2, **INTS)},
        r"block_table.size\(0\) is 2; allowed: 3 or more",
    ),
    "seq_lens int64": (
        DENSE,
        {"seq_lens": torch.zeros(S, dtype=torch.int64)},
        "seq_lens.dtype is int64",
    ),
    "seq_lens too short": (
        SPARSE,
        {"seq_lens": torch.zeros(S - 1, **INTS)},
        r"seq_lens.size\(0\) is 2",
    ),
    "seq_lens with gaps": (
        DENSE,
        {"seq_lens": torch.zeros(2 * S, **INTS)[::2]},
        r"seq_lens.stride\(0\) is 2",
    ),
    "output of another type": (
        DENSE,
        {"output": torch.zeros(S, H, D).half()},
        "output.dtype is float16; allowed: bfloat16",
    ),
    "output of another head count": (
        SPARSE,
        {"output": torch.zeros(S, H - 1, D).bfloat16()},
        r"output.size\(1\) is 7",
    ),
    "output with gaps": (
        DENSE,
        {"output": every_other(good_arguments(DENSE)["output"])},
        r"output.stride\(2\) is 2",
    ),
    "lse fp16": (
        DENSE,
        {"lse": torch.zeros(S, H).half()},
        "lse.dtype is float16; allowed: float32",
    ),
    "lse transposed": (DENSE, {"lse": torch.zeros(H, S).t()}, r"lse.stride\(1\) is 3"),
    "lse of wider rows": (
        SPARSE,
        {"lse": torch.zeros(S, H + 1)[:, :H]},
        r"lse.stride\(0\) is 9; allowed: 8: it must be contiguous",
    ),
    "partial_out without splits": (
        DENSE,
        {"partial_out": torch.zeros(S, H, 0, D), "partial_lse": torch.zeros(S, H, 0)},
        r"partial_out.size\(2\) is 0; allowed: 1 to",
    ),
    "partial_out too short": (
        SPARSE,
        {"partial_out": torch.zeros(S - 1, H, P, D)},
        r"partial_out.size\(0\) is 2",
    ),
    "partial_out bf16": (
        DENSE,
        {"partial_out": torch.zeros(S, H, P, D).bfloat16()},
        "partial_out.dtype is bfloat16",
    ),
    "partial_lse of fewer splits": (
        DENSE,
        {"partial_lse": torch.zeros(S, H, P - 1)},
        r"partial_lse.size\(2\) is 3; allowed: 4, as in partial_out",
    ),
    "partial_out at an odd address": (
        DENSE,
        {"partial_out": torch.zeros(S * H * P * D + 1)[1:].view(S, H, P, D)},
        r"partial_out.data_ptr\(\) is \d+; allowed: multiples of 16",
    ),
    "arrivals int64": (
        DENSE,
        {"arrivals": torch.zeros(S, H, dtype=torch.int64)},
        "arrivals.dtype is int64; allowed: int32",
    ),
    "arrivals too short": (
        SPARSE,
        {"arrivals": torch.zeros(S - 1, H, **INTS)},
        r"arrivals.size\(0\) is 2; allowed: 3 or more",
    ),
    "arrivals of other heads": (
        DENSE,
        {"arrivals": torch.zeros(S, H + 1, **INTS)},
        r"arrivals.size\(1\) is 9; allowed: 8",
    ),
    "arrivals of wider rows": (
        SPARSE,
        {"arrivals": torch.zeros(S, H + 1, **INTS)[:, :H]},
        r"arrivals.stride\(0\) is 9; allowed: 8: it must be contiguous",
    ),
    "scale NaN": (DENSE, {"scale": float("nan")}, "scale is nan; allowed: finite"),
    "k_scale without fp8": (
        DENSE,
        {"k_scale": 0.5},
        "k_scale is 0.5; allowed: 1.0 unless kv_cache is fp8",
    ),
    "v_scale without fp8": (SPARSE, {"v_scale": 2.0}, "v_scale is 2"),
    "v_scale infinite": (
        DENSE,
        {"kv_cache": FP8_CACHE, "v_scale": float("inf")},
        "v_scale is inf",
    ),
    "select_block_size 0": (
        DENSE,
        {"select_block_size": 0},
        "select_block_size is 0; allowed: 1 to",
    ),
    "select_block_size 5": (
        SPARSE,
        {"select_block_size": 5},
        "select_block_size is 5; allowed: divisors of the KV block size, 16",
    ),
    "select_block_size over tiles": (
        DENSE,
        {
            "kv_cache": torch.zeros(8, HKV, 48, 2 * D).bfloat16(),
            "select_block_size": 24,
        },
        "select_block_size is 24; allowed: 1, 2, 4, 8 and multiples of 16",
    ),
    "block_lse bf16": (
        DENSE,
        {"block_lse": torch.zeros(S, H, N).bfloat16()},
        "block_lse.dtype is bfloat16",
    ),
    "block_lse of other heads": (
        DENSE,
        {"block_lse": torch.zeros(S, H + 1, N)},
        r"block_lse.size\(1\) is 9",
    ),
    "topk_blocks int64": (
        SPARSE,
        {"topk_blocks": torch.zeros(S, G, 3, dtype=torch.int64)},
        "topk_blocks.dtype is int64",
    ),
    "topk_blocks too short": (
        SPARSE,
        {"topk_blocks": torch.zeros(S - 1, G, 3, **INTS)},
        r"topk_blocks.size\(0\) is 2",
    ),
    "three sets for eight heads": (
        SPARSE,
        {"topk_blocks": torch.zeros(S, 3, 3, **INTS)},
        r"topk_blocks.size\(1\) is 3; allowed: a divisor of the number of heads, 8",
    ),
    "two sets across three KV heads": (
        SPARSE,
        {
            "query": torch.zeros(S, 6, D).bfloat16(),
            "output": torch.zeros(S, 6, D).bfloat16(),
            "lse": torch.zeros(S, 6),
            "partial_out": torch.zeros(S, 6, P, D),
            "partial_lse": torch.zeros(S, 6, P),
            "arrivals": torch.zeros(S, 6, **INTS),
            "kv_cache": torch.zeros(8, 3, 16, 2 * D).bfloat16(),
        },
        r"topk_blocks.size\(1\) is 2; allowed: divisors or multiples of .* KV heads, 3",
    ),
    "topk_lens of other sets": (
        SPARSE,
        {"topk_lens": torch.zeros(S, G + 1, **INTS)},
        r"topk_lens.size\(1\) is 3",
    ),
    "topk_lens int64": (
        SPARSE,
        {"topk_lens": torch.zeros(S, G, dtype=torch.int64)},
        "topk_lens.dtype is int64",
    ),
}
# score_blocks refuses the same, but for what it takes no part in.
SCORES = {
    name: (SCORE, changes, message)
    for name, (op, changes, message) in ATTEND.items()
    if op == DENSE
    and changes.keys() <= good_arguments(SCORE).keys()
    and name != "partial_lse of fewer splits"
} | {
    "block_lse too short": (
        SCORE,
        {"block_lse": torch.zeros(S - 1, H, N)},
        r"block_lse.size\(0\) is 2; allowed: 3 or more",
    ),
    "partial_lse without splits": (
        SCORE,
        {"partial_lse": torch.zeros(S, H, 0)},
        r"partial_lse.size\(2\) is 0; allowed: 1 to",
    ),
    "partial_lse too short": (
        SCORE,
        {"partial_lse": torch.zeros(S - 1, H, P)},
        r"partial_lse.size\(0\) is 2; allowed: 3 or more",
    ),
}
# Tensors that an op needs and does not get, and those that it has no use for.
TAKEN = {
    DENSE: ("output", "partial_out"),
    SCORE: ("block_lse",),
    SPARSE: ("output", "partial_out", "topk_blocks", "topk_lens"),
}
NOT_TAKEN = {
    DENSE: ("topk_blocks", "topk_lens"),
    SCORE: ("output", "partial_out", "topk_blocks", "topk_lens"),
    SPARSE: ("block_lse",),
}
OPTIONAL = good_arguments(DENSE) | good_arguments(SPARSE)
MISSING = [
    (op, {name: None}, f"{name} is None; allowed: a tensor")
    for op, names in TAKEN.items()
    for name in names
]
UNWANTED = [
    (op, {name: OPTIONAL[name]}, f"{name} is a tensor; allowed: None")
    for op, names in NOT_TAKEN.items()
    for name in names
]
NO_SIZE = [
    (
        op,
        {"select_block_size": None},
        "select_block_size is None; allowed: an integer",
    )
    for op in ATTENDING
]
NAMED = [*ATTEND.items(), *SCORES.items(), *SELECT.items()]
BAD_INPUTS = {f"{entry[0]}: {name}": entry for name, entry in NAMED} | {
    f"{op}: {message}": (op, changes, message)
    for op, changes, message in (*MISSING, *UNWANTED, *NO_SIZE)
}
