"""Arguments that do not fit are refused by name before anything is launched.

Of the Triton kernels; the CUDA extension has its own contract test.
"""

import pytest
import torch

from tests.kernels.batches import make_batch
from tests.kernels.harness import make_output, make_workspace
from tests.support.rules import rule_of
from tidal_vllm.kernels import DecodeArgs, Workspace, choose
from tidal_vllm.kernels.workspace import FIRST_DIGITS

FLOAT, INT = torch.float32, torch.int32
RULE = rule_of(32, 16, sinks=4, recent=8)


@pytest.fixture
def kernels(device):
    needed = {"head_size": 64, "dtype": torch.bfloat16}
    return choose(device, requested="triton", **needed).ops


def good_arguments(device) -> tuple[DecodeArgs, torch.Tensor]:
    """What each of the four ops takes: two rows of 40 tokens."""
    shape = {"num_kv_heads": 2, "group": 2, "head_size": 64, "dtype": torch.bfloat16}
    batch = make_batch([40, 40], **shape).to(device)
    work = make_workspace(batch, max_blocks=3, splits=3)
    work.mass = torch.zeros(2, 1, 3, device=device)
    work.digit_counts = torch.zeros(2, 1, FIRST_DIGITS, dtype=INT, device=device)
    work.partial_out, work.partial_lse = work.partial_out[:2], work.partial_lse[:2]
    topk = torch.zeros(2, 1, 5, dtype=INT, device=device)
    args = batch.args(
        output=make_output(batch, 0.0, strided=False),
        workspace=work,
        select_block_size=16,
        topk_blocks=topk,
        topk_lens=topk[:, :, 0].contiguous(),
    )
    return args, batch.seq_lens


# What an op does not look at.
UNREAD = {
    "dense_decode": ("topk_blocks", "topk_lens", "mass", "digit_counts"),
    "score_blocks": (
        *("topk_blocks", "topk_lens", "mass", "digit_counts"),
        *("output", "partial_out"),
    ),
    "sparse_decode": ("block_lse", "mass", "digit_counts"),
    "select_blocks": (
        *("kv_cache", "block_table", "output", "partial_out", "partial_lse"),
        *("k_scale", "v_scale", "scale", "select_block_size"),
    ),
}


def call(kernels, op, device, **changed) -> None:
    """Call an op with some fields of its arguments, or of the workspace, changed.

    What the op does not look at is missing.
    """
    args, seq_lens = good_arguments(device)
    places = {"seq_lens": None}
    places |= dict.fromkeys(vars(args.workspace), args.workspace)
    places |= dict.fromkeys(DecodeArgs.__dataclass_fields__, args)
    for name in UNREAD[op]:
        setattr(places[name], name, None)
    for name, change in changed.items():
        place = places[name]
        given = seq_lens if place is None else getattr(place, name)
        given = change(given) if callable(change) else change
        if place is None:
            seq_lens = given
        else:
            setattr(place, name, given)
    rule = (RULE,) if op == "select_blocks" else ()
    getattr(kernels, op)(args, seq_lens, *rule)


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
        if case[0] not in UNREAD["score_blocks"] and name != "lse of other splits"
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


MISSING = [
    *((op, "lse") for op in OPS),
    *((op, "block_lse") for op in ("dense_decode", "score_blocks", "select_blocks")),
    *((op, "topk_blocks") for op in OPS[2:]),
    *((op, "topk_lens") for op in OPS[2:]),
    ("sparse_decode", "select_block_size"),
    ("select_blocks", "mass"),
    ("select_blocks", "digit_counts"),
]


@pytest.mark.parametrize("op, name", MISSING)
def test_refuses_what_is_missing(kernels, device, op, name):
    with pytest.raises(ValueError, match=f"{name} (is missing|= None must divide)"):
        call(kernels, op, device, **{name: None})


@pytest.mark.parametrize("op", OPS[:3])
def test_refuses_a_workspace_that_does_not_fit(kernels, device, op):
    """Of another engine, say, or one that was never allocated."""
    for work, words in (
        (Workspace(), "room for 0 partial results: 2 rows of 0 heads"),
        (Workspace.allocate(1, 4, 1, 64, 3, device), "room for 512 partial results"),
        (
            Workspace.allocate(2, 2, 1, 64, 3, device),
            r"\w+ has shape \[2, 2\b",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call(kernels, op, device, workspace=work)


@pytest.mark.parametrize("op", OPS)
def test_takes_what_fits(kernels, device, op):
    call(kernels, op, device)
    fewer = {"topk_blocks": narrow(2, 4)} if op in OPS[2:] else {}
    call(kernels, op, device, **fewer, seq_lens=lambda t: t - 40)


@pytest.mark.parametrize("op", OPS)
def test_takes_more_rows_than_the_query_has(kernels, device, op):
    """vLLM pads tables and lengths; an engine's workspace has its most rows."""
    places = ("seq_lens", "block_table", "lse", "block_lse", "topk_blocks", "topk_lens")
    more = {
        name: lambda tensor: torch.cat([tensor, tensor])
        for name in places
        if name not in UNREAD[op]
    }
    call(kernels, op, device, **more)
