"""Run beside a tidal_vllm whose extension is the emulated one; prints JSON."""

import json
import math
import sys
from types import SimpleNamespace

import torch

import tidal_vllm.kernels.cuda as cuda
from tests.kernels.cuda.bad_inputs import BAD_INPUTS, good_arguments
from tidal_vllm.kernels import reference

OPS = ("dense_decode", "score_blocks", "sparse_decode", "select_blocks")


def refusals() -> dict[str, str]:
    found = {}
    for name, (op, changes, _) in BAD_INPUTS.items():
        try:
            getattr(cuda, op)(**good_arguments(op) | changes)
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def opchecks() -> dict[str, dict[str, str]]:
    return {
        op: torch.library.opcheck(
            getattr(torch.ops.tidal, op).default, (), good_arguments(op)
        )
        for op in OPS
    }


def agreement() -> dict[str, float]:
    """One decode step through the Python functions, against the reference."""
    arguments = good_arguments("dense_decode")
    cuda.dense_decode(**arguments)
    paged = [arguments[n] for n in ("query", "kv_cache", "block_table", "seq_lens")]
    output, lse, block_lse = reference.dense_decode(
        *paged, scale=0.125, select_block_size=16
    )
    scored = good_arguments("score_blocks")
    for name in ("query", "kv_cache"):
        scored[name] = arguments[name]
    cuda.score_blocks(**scored)
    sparse = good_arguments("sparse_decode") | dict(
        zip(("query", "kv_cache", "block_table", "seq_lens"), paged, strict=True)
    )
    cuda.sparse_decode(**sparse)
    select = good_arguments("select_blocks")
    cuda.select_blocks(**select)
    expected = torch.zeros_like(select["topk_blocks"])
    names = ("token_budget", "select_block_size", "sink_tokens", "recent_tokens")
    rule = SimpleNamespace(sparse_threshold=0, **{n: select[n] for n in names})
    reference.select_blocks(
        *(select[n] for n in ("block_lse", "lse", "seq_lens")),
        rule=rule,
        topk_blocks=expected,
        topk_lens=torch.zeros_like(select["topk_lens"]),
    )
    return {
        "dense output": float((arguments["output"] - output).abs().max()),
        "sparse output": float((sparse["output"] - output).abs().max()),
        "lse": float((arguments["lse"] - lse).nan_to_num(0.0).abs().max()),
        "block_lse": float(
            (arguments["block_lse"][0, :, :2] - block_lse[0]).abs().max()
        ),
        "scores": max(
            float((scored[name] - arguments[name]).nan_to_num(0.0).abs().max())
            for name in ("lse", "block_lse")
        ),
        "chosen blocks": float((select["topk_blocks"] != expected).sum()),
        "padded row": float(arguments["lse"][1].max() != -math.inf),
    }


def far_blocks() -> dict[str, bool]:
    """Offsets of 2**31 and 2**32 elements; the memory between is never touched."""
    heads, size = 2, 128
    near = torch.randn(3, heads, 16, size).to(torch.float8_e4m3fn).view(torch.uint8)
    memory = torch.empty(2**32 + near.numel(), dtype=torch.uint8)
    far = memory.as_strided(near.shape, (2**31, 16 * size, size, 1))
    far.copy_(near)
    found = {}
    for op in OPS[:3]:
        written = "block_lse" if op == "score_blocks" else "output"
        arguments = good_arguments(op)
        arguments["block_table"] = torch.tensor([[2, 1], [0, 0], [1, 2]]).int()
        outputs = []
        for cache in (near, far):
            getattr(cuda, op)(**arguments | {"kv_cache": cache})
            outputs.append(arguments[written].clone())
        found[op] = torch.equal(*outputs) and bool(outputs[0].any())
    return found


def doubts() -> dict[str, str]:
    torch.cuda.get_device_capability = lambda device: (9, 0)
    good = {
        "device": torch.device("cuda"),
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "cache_dtype": torch.bfloat16,
        "fp8": False,
        "select_block_size": 16,
    }
    cases = {
        "good": {},
        "fp8": {"fp8": True, "cache_dtype": None, "kv_cache_dtype": "fp8"},
        "nothing selected": {"select_block_size": None},
        "fp32": {"dtype": torch.float32},
        "head size": {"head_size": 80},
        "cache": {"cache_dtype": torch.float16, "kv_cache_dtype": "float16"},
        "block": {"select_block_size": 24},
    }
    found = {
        name: cuda.why_not(SimpleNamespace(**good | changes))
        for name, changes in cases.items()
    }
    torch.cuda.get_device_capability = lambda device: (7, 5)
    return found | {"Turing": cuda.why_not(SimpleNamespace(**good))}


if __name__ == "__main__":
    schemas = {op: str(getattr(torch.ops.tidal, op).default._schema) for op in OPS}
    parts = (refusals, opchecks, agreement, far_blocks, doubts)
    result = {part.__name__: part() for part in parts}
    json.dump(result | {"schemas": schemas, "path": cuda.__file__}, sys.stdout)
