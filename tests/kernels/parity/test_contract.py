"""Arguments that do not fit are refused by name before anything is launched.

Of the Triton kernels; the CUDA extension has its own contract test.
"""

import pytest
import torch

from tidal_vllm import kernels as ops

FLOAT, INT = torch.float32, torch.int32


@pytest.fixture
def kernels(device):
    case = {"head_size": 64, "dtype": torch.bfloat16}
    return ops.choose(device, requested="triton", **case).module


def decode_arguments(device) -> dict:
    def zeros(*shape, dtype=FLOAT):
        return torch.zeros(shape, dtype=dtype, device=device)

    half = torch.bfloat16
    return {
        "query": zeros(2, 4, 64, dtype=half),
        "kv_cache": zeros(8, 2, 16, 128, dtype=half),
        "block_table": zeros(2, 3, dtype=INT),
        "topk_blocks": zeros(2, 1, 5, dtype=INT),
        "topk_lens": zeros(2, 1, dtype=INT),
        "seq_lens": zeros(2, dtype=INT),
        "output": zeros(2, 4, 64, dtype=half),
        "lse": zeros(2, 4),
        "block_lse": zeros(2, 4, 3),
        "partial_out": zeros(2, 4, 3, 64),
        "partial_lse": zeros(2, 4, 3),
        "scale": 1.0,
        "k_scale": 1.0,
        "v_scale": 1.0,
        "select_block_size": 16,
    }


def select_arguments(device) -> dict:
    taken = ("block_lse", "lse", "seq_lens", "topk_blocks", "topk_lens")
    tensors = decode_arguments(device)
    return {
        **{name: tensors[name] for name in taken},
        "mass": torch.zeros(2, 1, 3, device=device),
        "token_budget": 32,
        "select_block_size": 16,
        "sink_tokens": 4,
        "recent_tokens": 8,
        "sparse_threshold": 32,
    }


UNKNOWN = {
    "dense_decode": ("topk_blocks", "topk_lens"),
    "score_blocks": ("topk_blocks", "topk_lens", "output", "partial_out", "v_scale"),
    "sparse_decode": ("block_lse",),
}


def call(kernels, op, device, **changed) -> None:
    if op == "select_blocks":
        arguments = select_arguments(device)
    else:
        arguments = decode_arguments(device)
        for name in UNKNOWN[op]:
            del arguments[name]
    for name, change in changed.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    getattr(kernels, op)(*arguments.values())


def to(dtype):
    return lambda tensor: tensor.to(dtype)


def spread(tensor):
    """The same with its last dimension strided."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def skip_rows(tensor):
    """The same with room between its rows."""
    return tensor.repeat_interleave(2, 0)[::2]


def narrow(dim, size):
    return lambda tensor: tensor.narrow(dim, 0, size)


# op, argument, what is done to it, words of the message
DECODE_BAD = {
    "query in fp64": ("query", to(torch.float64), "query"),
    "query of integers": ("query", to(INT), "query"),
    "query with a strided head": ("query", spread, "query"),
    "cache in another float": ("kv_cache", to(torch.float16), "kv_cache"),
    "cache of signed bytes": ("kv_cache", to(torch.int8), "kv_cache"),
    "cache of another head size": ("kv_cache", narrow(3, 96), "kv_cache"),
    "cache of another rank": ("kv_cache", lambda t: t.flatten(1, 2), "kv_cache"),
    "cache with strided rows": ("kv_cache", spread, "kv_cache"),
    "heads that do not divide": (
        "kv_cache",
        lambda t: t.repeat(1, 2, 1, 1)[:, :3],
        "multiple",
    ),
    "table of int64": ("block_table", to(torch.int64), "block_table"),
    "table with too few rows": ("block_table", narrow(0, 1), "block_table"),
    "table with strided entries": ("block_table", spread, "block_table"),
    "lengths of int64": ("seq_lens", to(torch.int64), "seq_lens"),
    "a length too few": ("seq_lens", narrow(0, 1), "seq_lens"),
    "output in another dtype": ("output", to(FLOAT), "output"),
    "output of another shape": ("output", narrow(1, 3), "output"),
    "output with a strided head": ("output", spread, "output"),
    "lse in bf16": ("lse", to(torch.bfloat16), "lse"),
    "lse with holes": ("lse", spread, "lse"),
    "lse with room between rows": ("lse", skip_rows, "lse"),
    "partials with room between rows": ("partial_out", skip_rows, "partial_out"),
    "their lse with room": ("partial_lse", skip_rows, "partial_lse"),
    "partials in bf16": ("partial_out", to(torch.bfloat16), "partial_out"),
    "partials of too few rows": ("partial_out", narrow(0, 1), "partial_out"),
    "partials without splits": ("partial_out", narrow(2, 0), "partial"),
    "lse of other splits": ("partial_lse", narrow(2, 2), "partial_lse"),
    "a selection block of 0": ("select_block_size", 0, "select_block_size = 0"),
    "one that does not divide": ("select_block_size", 5, "select_block_size = 5"),
    "a negative one": ("select_block_size", -16, "select_block_size = -16"),
}
SETS_BAD = {
    "sets of int64": ("topk_blocks", to(torch.int64), "topk_blocks"),
    "sets of too few rows": ("topk_blocks", narrow(0, 1), "topk_blocks"),
    "sets of another rank": ("topk_blocks", lambda t: t[0], "topk_blocks"),
    "strided sets": ("topk_blocks", spread, "topk_blocks"),
    "three sets of four heads": ("topk_blocks", lambda t: t.repeat(1, 3, 1), "3 sets"),
    "no sets": ("topk_blocks", narrow(1, 0), "0 sets"),
    "counts of other sets": ("topk_lens", lambda t: t.repeat(1, 2), "topk_lens"),
    "counts of int64": ("topk_lens", to(torch.int64), "topk_lens"),
    "counts of too few rows": ("topk_lens", narrow(0, 1), "topk_lens"),
}
SCORE_BAD = {
    **{
        name: case
        for name, case in DECODE_BAD.items()
        if case[0] not in UNKNOWN["score_blocks"] and name != "lse of other splits"
    },
    "their lse without splits": ("partial_lse", narrow(2, 0), "partial_lse"),
    "their lse of too few rows": ("partial_lse", narrow(0, 1), "partial_lse"),
}
SELECT_BAD = {
    **SETS_BAD,
    "block_lse in bf16": ("block_lse", to(torch.bfloat16), "block_lse"),
    "block_lse of another rank": ("block_lse", lambda t: t[0], "block_lse"),
    "strided block_lse": ("block_lse", spread, "block_lse"),
    "lse with room between rows": ("lse", skip_rows, "lse"),
    "lse of other heads": ("lse", narrow(1, 3), "lse"),
    "a length too few": ("seq_lens", narrow(0, 1), "seq_lens"),
    "mass of fewer blocks": ("mass", narrow(2, 2), "mass"),
    "mass of too few rows": ("mass", narrow(0, 1), "mass"),
}
CASES = [
    pytest.param(op, *case, id=f"{op}: {name}")
    for op, table in {
        "dense_decode": DECODE_BAD,
        "score_blocks": SCORE_BAD,
        "sparse_decode": {**DECODE_BAD, **SETS_BAD},
        "select_blocks": SELECT_BAD,
    }.items()
    for name, case in table.items()
]
OPS = ("dense_decode", "score_blocks", "sparse_decode", "select_blocks")


@pytest.mark.parametrize("op, argument, change, words", CASES)
def test_refuses(kernels, device, op, argument, change, words):
    with pytest.raises(ValueError) as caught:
        call(kernels, op, device, **{argument: change})
    assert words in str(caught.value)


@pytest.mark.parametrize("op", OPS[:2])
def test_refuses_a_block_lse_that_does_not_fit(kernels, device, op):
    for change in (narrow(1, 3), narrow(0, 1), to(torch.bfloat16), spread):
        with pytest.raises(ValueError, match="block_lse"):
            call(kernels, op, device, block_lse=change)


@pytest.mark.parametrize("op", OPS)
def test_refuses_tensors_on_two_devices(kernels, device, op):
    """No data is looked at, so one on no device at all will do."""
    with pytest.raises(ValueError, match="lse"):
        call(kernels, op, device, lse=to("meta"))


@pytest.mark.parametrize("op", OPS)
def test_takes_what_fits(kernels, device, op):
    call(kernels, op, device)
    fewer = {"topk_blocks": narrow(2, 4)} if op not in OPS[:2] else {}
    call(kernels, op, device, **fewer, seq_lens=lambda t: t + 40)
