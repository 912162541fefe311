"""Small arguments that the ops accept: for torch.ops.tidal, and as DecodeArgs.

S rows, H query heads, HKV KV heads, head size D, P splits, N selection blocks, G sets.
"""

import torch

from tidal_vllm.kernels import DecodeArgs, Workspace
from tidal_vllm.kernels.workspace import FIRST_DIGITS
from tidal_vllm.plan.rule import SelectionRule

S, H, HKV, D, P, N, G = 3, 8, 2, 64, 4, 6, 2
OPS = ("dense_decode", "score_blocks", "sparse_decode", "select_blocks")
ATTENDING = OPS[:3]
RULE = SelectionRule(
    token_budget=64,
    select_block_size=16,
    sink_tokens=4,
    recent_tokens=16,
    sparse_threshold=0,
)


def good_arguments(op: str) -> dict:
    """What an op of torch.ops.tidal accepts, by name."""
    if op == "select_blocks":
        return {
            "block_lse": torch.randn(S, H, N),
            "lse": torch.zeros(S, H),
            "seq_lens": good_seq_lens(op),
            "topk_blocks": torch.zeros(S, G, 4, dtype=torch.int32),
            "topk_lens": torch.zeros(S, G, dtype=torch.int32),
            "mass": torch.zeros(S, G, N),
            "arrivals": torch.zeros(S, H, dtype=torch.int32),
            "digit_counts": torch.zeros(S, G, FIRST_DIGITS, dtype=torch.int32),
            **vars(RULE),
        }
    arguments = {
        "query": torch.randn(S, H, D).bfloat16(),
        "kv_cache": torch.randn(8, HKV, 16, 2 * D).bfloat16(),
        "block_table": torch.arange(S * 2, dtype=torch.int32).view(S, 2),
        "seq_lens": good_seq_lens(op),
        "lse": torch.zeros(S, H),
        "partial_lse": torch.zeros(S, H, P),
        "arrivals": torch.zeros(S, H, dtype=torch.int32),
        "scale": 0.125,
        "k_scale": 1.0,
        "v_scale": 1.0,
        "select_block_size": 16,
    }
    if op != "score_blocks":
        arguments["output"] = torch.zeros(S, H, D, dtype=torch.bfloat16)
        arguments["partial_out"] = torch.zeros(S, H, P, D)
    if op == "sparse_decode":
        blocks = torch.tensor([0, 1, -1], dtype=torch.int32)
        arguments["topk_blocks"] = blocks.repeat(S, G, 1)
        arguments["topk_lens"] = torch.full((S, G), 2, dtype=torch.int32)
    else:
        arguments["block_lse"] = torch.zeros(S, H, N)
    return arguments


def good_seq_lens(op: str) -> torch.Tensor:
    """Lengths with a row of padding: for a decode of two KV blocks, or a selection."""
    lens = [90, 0, 33] if op == "select_blocks" else [20, 0, 32]
    return torch.tensor(lens, dtype=torch.int32)


def decode_args(device: str = "cpu") -> DecodeArgs:
    """What all four functions of `tidal_vllm.kernels.cuda` accept."""
    given = good_arguments("sparse_decode")
    workspace = Workspace.allocate(S, H, G, D, N, torch.device(device))
    workspace.lse.zero_()
    workspace.block_lse.copy_(torch.randn(S, H, N))
    workspace.mass.zero_()
    topk_blocks = torch.tensor([0, 1, -1, -1], dtype=torch.int32).repeat(S, G, 1)
    return DecodeArgs(
        query=given["query"].to(device),
        kv_cache=given["kv_cache"].to(device),
        block_table=given["block_table"].to(device),
        output=given["output"].to(device),
        scale=given["scale"],
        workspace=workspace,
        select_block_size=RULE.select_block_size,
        topk_blocks=topk_blocks.to(device),
        topk_lens=given["topk_lens"].to(device),
    )


def call(ops, op: str, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
    """Call one of the four functions of an implementation."""
    rule = [RULE] if op == "select_blocks" else []
    getattr(ops, op)(args, seq_lens, *rule)


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape and numbers, with gaps in the last dimension."""
    return tensor.repeat_interleave(2, -1)[..., ::2]
