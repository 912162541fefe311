"""Compiles every launch of a few decode steps for a GPU that is not there.

    python -m tests.kernels.compile_child sm_90 [--all]

With --all for every set-up, else for those of `OF_TARGET`, which take less time. Prints
a line of JSON per kernel: its name, set-up, op (of `attend_split`), shared memory and,
in `spills`, the bytes (NVIDIA) or registers (AMD) that did not fit into registers. On
NVIDIA also `instructions`: those of all warps of a program in the loop of
`attend_split`, for 8 KiB of KV cache.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.support.rules import rule_of
from tidal_vllm.kernels import DecodeArgs, Workspace
from tidal_vllm.kernels.triton import attend, ops, select, split_kv
from tidal_vllm.kernels.triton.tiling import DeviceLimits

BF16, FP16, FP32, FP8 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
)
# Name: query's dtype, head size, heads, KV heads, sets, cache's dtype, selection block.
SET_UPS = {
    "d128": (BF16, 128, 32, 8, 1, BF16, 16),
    "d128, blocks of 4": (BF16, 128, 32, 8, 1, BF16, 4),
    "d128, blocks of 2": (BF16, 128, 32, 8, 1, BF16, 2),
    "d128, blocks of 1": (BF16, 128, 32, 8, 1, BF16, 1),
    "d128 fp8": (BF16, 128, 32, 8, 1, FP8, 16),
    "d128 fp8, blocks of 4": (BF16, 128, 32, 8, 1, FP8, 4),
    "d64 tokens": (FP16, 64, 32, 8, 32, FP16, 1),
    "d256": (BF16, 256, 16, 8, 1, BF16, 16),
    "d96 MQA": (FP16, 96, 64, 1, 1, FP16, 16),
    "d128 fp32": (FP32, 128, 8, 8, 1, FP32, 16),
}
OF_TARGET = {
    "sm_80": ("d128 fp8",),
    "sm_90": (
        *("d128", "d128, blocks of 4", "d128, blocks of 2", "d128, blocks of 1"),
        *("d128 fp8", "d64 tokens", "d256"),
    ),
    "sm_100": ("d128", "d128 fp8"),
    "sm_120": ("d128", "d128 fp8"),
    "gfx942": ("d128 fp8",),
}
# As `tiling.device_limits` would answer.
LIMITS = {
    "sm_80": DeviceLimits(108, 5, False),
    "sm_90": DeviceLimits(132, 5, True),
    "sm_100": DeviceLimits(148, 5, True),
    "sm_120": DeviceLimits(188, 3, True),
    "gfx942": DeviceLimits(304, 2, False, warp_size=64),
}
RULE = rule_of(4096, 16, sinks=4, recent=1024)


class AbsentDriver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target_of(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def instructions_of_loop(cubin: bytes) -> int:
    """SASS instructions of the largest loop that multiplies matrices, of one warp."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.check_output(command, text=True)
    lines, labels, longest = [], {}, 0
    for line in text.splitlines():
        if label := re.match(r"(\.L\S+):", line.strip()):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(found[1])
            target = re.search(r"\bBRA\b.*?(\.L\w+)", found[1])
            loop = lines[labels[target[1]] :] if target and target[1] in labels else []
            if any(re.search("HG?MMA", one) for one in loop):
                longest = max(longest, sum("NOP" not in one for one in loop))
    return longest


def report(compiled: CompiledKernel, line: dict) -> None:
    asm = compiled.asm
    line["shared"] = compiled.metadata.shared
    if "cubin" in asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.check_output(command, text=True)
        line["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        line["spills"] = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
        line["async_16_bytes"] = len(re.findall(r"cp\.async.*0x10", asm["ptx"]))
        line["loads_16_bytes"] = len(re.findall(r"ld\.global.*\.v4\.b32", asm["ptx"]))
    else:
        text = asm["amdgcn"]
        line["registers"] = int(re.search(r"\.vgpr_count: +(\d+)", text)[1])
        line["spills"] = sum(map(int, re.findall(r"vgpr_spill_count: +(\d+)", text)))
    print(json.dumps(line), flush=True)


def op_of(constants: dict) -> str:
    """The op that launched `attend_split`."""
    if constants["SPARSE"]:
        return "sparse_decode"
    return "dense_decode" if constants["READ_VALUES"] else "score_blocks"


def main(target: str, everything: bool) -> None:
    driver.set_active(AbsentDriver(target_of(target)))
    attend.device_limits = select.device_limits = lambda device: LIMITS[target]
    current = [""]
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        line = {"kernel": self.fn.__name__, "setup": current[0]}
        if self is split_kv.attend_split:
            line["op"] = op_of(kwargs)
            if "cubin" in compiled.asm:
                tokens = kwargs["TILE_BLOCKS"] * kwargs["SIZE_PADDED"]
                parts = 1 + kwargs["READ_VALUES"]
                itemsize = args[1].element_size()
                tile_bytes = tokens * parts * kwargs["WIDTH"] * itemsize
                of_warp = instructions_of_loop(compiled.asm["cubin"])
                of_tile = of_warp * kwargs["num_warps"]
                line["instructions"] = round(of_tile * 8192 / tile_bytes)
        report(compiled, line)

    JITFunction.run = compile_only
    for name in SET_UPS if everything else OF_TARGET[target]:
        current[0] = name
        decode(*SET_UPS[name])
    for num_blocks, num_heads in ((131072, 32), (1024, 71)):
        current[0] = f"{num_blocks} blocks of {num_heads} heads"
        select_blocks(num_blocks, num_heads)


def decode(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    num_sets: int,
    cache_dtype: torch.dtype,
    size: int,
) -> None:
    int32 = torch.int32
    query = torch.zeros(4, num_heads, head_size, dtype=dtype)
    args = DecodeArgs(
        query=query,
        kv_cache=torch.zeros(64, num_kv_heads, 16, 2 * head_size, dtype=cache_dtype),
        block_table=torch.zeros(4, 16, dtype=int32),
        output=torch.zeros_like(query),
        scale=0.1,
        workspace=Workspace.allocate(4, num_heads, num_sets, head_size, 256, "cpu"),
        select_block_size=size,
        topk_blocks=torch.zeros(4, num_sets, 64, dtype=int32),
        topk_lens=torch.zeros(4, num_sets, dtype=int32),
    )
    seq_lens = torch.zeros(4, dtype=int32)
    for op in (ops.dense_decode, ops.score_blocks, ops.sparse_decode):
        op(args, seq_lens)


def select_blocks(num_blocks: int, num_heads: int) -> None:
    int32 = torch.int32
    query = torch.zeros(2, num_heads, 16)
    args = DecodeArgs(
        query=query,
        kv_cache=torch.zeros(1, 1, 16, 32),
        block_table=torch.zeros(2, 1, dtype=int32),
        output=query,
        scale=1.0,
        workspace=Workspace.allocate(2, num_heads, 1, 16, num_blocks, "cpu"),
        topk_blocks=torch.zeros(2, 1, 256, dtype=int32),
        topk_lens=torch.zeros(2, 1, dtype=int32),
    )
    ops.select_blocks(args, torch.zeros(2, dtype=int32), RULE)


if __name__ == "__main__":
    main(sys.argv[1], "--all" in sys.argv)
