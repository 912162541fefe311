"""Run beside a tidal_vllm whose extension is the emulated one; prints JSON."""

import copy
import json
import math
import sys

import torch

import tidal_vllm.kernels.cuda as cuda
from tests.kernels.cuda.bad_inputs import BAD_INPUTS
from tests.kernels.cuda.op_arguments import (
    ATTENDING,
    OPS,
    call,
    decode_args,
    good_arguments,
    good_seq_lens,
)
from tidal_vllm.kernels import DecodeArgs, Requirements, reference


def refusals() -> dict[str, str]:
    """What torch.ops.tidal says to bad inputs."""
    found = {}
    for name, (op, changes, _) in BAD_INPUTS.items():
        try:
            getattr(torch.ops.tidal, op)(**good_arguments(op) | changes)
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def refused_arguments() -> dict[str, str]:
    """What the four functions say to a kind of lse that they do not take."""
    found = {}
    for op in OPS:
        args = decode_args()
        args.workspace.lse = args.workspace.lse.half()
        try:
            call(cuda, op, args, good_seq_lens(op))
            found[op] = "nothing was raised"
        except ValueError as error:
            found[op] = str(error)
    return found


def opchecks() -> dict[str, dict[str, str]]:
    return {
        op: torch.library.opcheck(
            getattr(torch.ops.tidal, op).default, (), good_arguments(op)
        )
        for op in OPS
    }


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference; infinities must be the same."""
    difference = torch.where(found == wanted, 0.0, found - wanted)
    return float(difference.abs().max().nan_to_num(math.inf))


def written(args: DecodeArgs, op: str) -> dict[str, torch.Tensor]:
    """What an op writes; of block_lse two rows' own blocks, all that means anything."""
    if op == "select_blocks":
        return {"blocks": args.topk_blocks, "lens": args.topk_lens}
    found = {"lse": args.workspace.lse}
    if op != "score_blocks":
        found["output"] = args.output
    if op != "sparse_decode":
        found["block_lse"] = args.workspace.block_lse[::2, :, :2]
    return found


def agreement() -> dict[str, dict[str, float]]:
    """How far each function is from the reference's."""
    found = {}
    for op in OPS:
        ours = decode_args()
        theirs = copy.deepcopy(ours)
        for ops, args in ((cuda, ours), (reference, theirs)):
            call(ops, op, args, good_seq_lens(op))
        wanted = written(theirs, op)
        found[op] = {
            name: distance(tensor, wanted[name])
            for name, tensor in written(ours, op).items()
        }
    return found


def longer_tensors() -> dict[str, bool]:
    """Whether only the rows of query are written, where all else has one row more."""
    found = {}
    for op in OPS:
        args = decode_args()
        before, shorter = copy.deepcopy(args), copy.deepcopy(args)
        shorter.query = shorter.query[:2]
        for given in (args, shorter):
            call(cuda, op, given, good_seq_lens(op))
        tensors = zip(*map(all_written, (shorter, args, before)), strict=True)
        found[op] = all(
            torch.equal(short[:2], full[:2]) and torch.equal(short[2:], unwritten[2:])
            for short, full, unwritten in tensors
        )
    return found


def all_written(args: DecodeArgs) -> tuple[torch.Tensor, ...]:
    """What any op writes, scratch left aside."""
    scores = (args.workspace.lse, args.workspace.block_lse)
    return args.output, *scores, args.topk_blocks, args.topk_lens


def far_blocks() -> dict[str, bool]:
    """Offsets of 2**31 and 2**32 elements; the memory between is never touched."""
    heads, size = 2, 128
    near = torch.randn(3, heads, 16, size).to(torch.float8_e4m3fn).view(torch.uint8)
    memory = torch.empty(2**32 + near.numel(), dtype=torch.uint8)
    far = memory.as_strided(near.shape, (2**31, 16 * size, size, 1))
    far.copy_(near)
    found = {}
    for op in ATTENDING:
        args = decode_args()
        args.block_table = torch.tensor([[2, 1], [0, 0], [1, 2]]).int()
        outputs = []
        for cache in (near, far):
            args.kv_cache = cache
            call(cuda, op, args, good_seq_lens(op))
            scored = op == "score_blocks"
            result = args.workspace.block_lse if scored else args.output
            outputs.append(result.clone())
        found[op] = torch.equal(*outputs) and bool(outputs[0].any())
    return found


def occupancies() -> dict[str, list[int] | str]:
    """What `occupancy` says: of good questions its numbers, of bad ones its refusal."""
    good = {
        "op": "dense_decode",
        "dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "head_size": 128,
        "device_index": 0,
    }
    changes = {op: {"op": op} for op in OPS} | {
        "fp8": {"kv_cache_dtype": "float8_e4m3fn"},
        "no op": {"op": "merge_splits"},
        "dtype": {"dtype": "float32"},
        "kv_cache_dtype": {"kv_cache_dtype": "float16"},
        "head_size": {"head_size": 80},
        "device_index": {"device_index": -1},
    }
    found = {}
    for name, change in changes.items():
        try:
            found[name] = torch.ops.tidal.occupancy(**good | change)
        except ValueError as error:
            found[name] = str(error)
    return found


def can_run() -> list[str]:
    """What `cannot_run` says of set-ups that the driver takes."""
    gpu = torch.device("cuda", 0)
    return [
        cuda.cannot_run(Requirements(gpu, 128, torch.float16, cache))
        for cache in ("auto", "fp8")
    ]


if __name__ == "__main__":
    schemas = {op: str(getattr(torch.ops.tidal, op).default._schema) for op in OPS}
    parts = (
        *(refusals, refused_arguments, opchecks),
        *(agreement, longer_tensors, far_blocks, occupancies, can_run),
    )
    result = {part.__name__: part() for part in parts}
    json.dump(result | {"schemas": schemas, "path": cuda.__file__}, sys.stdout)
