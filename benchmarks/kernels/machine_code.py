r"""What the machine code of the CUDA kernels says, without a GPU.

    python -m benchmarks.kernels.machine_code           # prints the table
    python -m benchmarks.kernels.machine_code --write   # and keeps it

Compiles each kernel for one architecture and counts the instructions of its main loop,
which takes one tile of 16 tokens at a time. Needs nvcc, and nvdisasm, which the
packages `nvidia-cuda-nvdisasm` and `triton` bring. `--write` replaces
benchmarks/results/machine_code.json and the table in docs/cuda.md.

The main loop is the shortest piece of code from a label to a branch back to it that
holds the most tensor-core instructions. All its instructions are counted once, though
some run in some tiles only: the addresses are looked up in every second tile, the
output is rescaled where the maximum of a head has grown. `least_instructions_per_tile`
counts the shortest way through.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tidal_vllm.kernels.cuda_build import find_nvcc

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/machine_code.json"
DOCS = ROOT / "docs/cuda.md"
BEGIN, END = "<!-- machine_code: begin -->", "<!-- machine_code: end -->"
HEAD_SIZE = 128

# Kernel, type of query and output, type of the KV cache, selection block. The block is
# None where one code serves all sizes. A kernel that writes block_lse is compiled with
# the size known, so that the code of other sizes is not counted.
VARIANTS = [
    ("sparse_decode", "bf16", "bf16", None),
    ("sparse_decode", "bf16", "fp8", None),
    *(("dense_decode", "bf16", "bf16", size) for size in (16, 4, 2, 1)),
    ("dense_decode", "bf16", "fp8", 16),
    *(("score_blocks", "bf16", "bf16", size) for size in (16, 4)),
]
STORED = {"bf16": "bf16", "fp8": "fp8_e4m3"}
# Of one processor, by the architecture's name without its suffix: bytes of shared
# memory, and most threads. A processor has 65,536 registers; CUDA keeps 1 KiB of each
# thread block.
PROCESSORS = {
    "sm_80": (164 << 10, 2048),
    "sm_89": (100 << 10, 1536),
    "sm_90": (228 << 10, 2048),
    "sm_100": (228 << 10, 2048),
    "sm_120": (100 << 10, 1536),
}
REGISTERS, KEPT_BY_CUDA = 65536, 1 << 10

SOURCE = """
#include "dense_decode.cuh"
#include "sparse_decode.cuh"
using namespace tidal;
// The numbers are read back from the name of the kernel.
template <class S, int kVariant, int kShared, int kThreads, int kStages, int kTileBytes>
TIDAL_KERNEL(S::threads, S::blocks_per_processor) counted(const AttendParams given) {
  AttendParams p = given;
  %s
}
"""
ATTEND = """
  if constexpr (kVariant == {index}) {{
    {block}
    {op}_block<S>(p);
  }}"""
BLOCK = (
    "p.select_block_size = {size}; p.by_grain_tiles.value = 1;"
    " __builtin_assume(p.block_lse != nullptr);"
)
INSTANCE = """
using S{index} = Shape<{element}, {stored}, {head_size}, {values}>;
template __global__ void counted<S{index}, {index}, S{index}::shared_bytes,
    S{index}::threads, S{index}::stages, kTileTokens * S{index}::token_bytes>(
    const AttendParams);
"""


def find_nvdisasm() -> str | None:
    """Look for nvdisasm on PATH, beside nvcc, and among Python's packages."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [folder / "bin" for folder in sorted(packages.glob("*"), reverse=True)]
    if nvcc := find_nvcc():
        folders.insert(0, Path(nvcc).resolve().parent)
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    path = os.pathsep.join(map(str, folders))
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=path)


def nvcc_version() -> str | None:
    """The version of nvcc, such as "13.0.88"; None without nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    said = subprocess.check_output([nvcc, "--version"], text=True)
    found = re.search(r"V([\d.]+)", said)
    return found.group(1) if found else None


def main_loop(code: str) -> tuple[int, int]:
    """The instructions of the main loop: all of them, and the fewest of one pass.

    Args:
        code: What nvdisasm prints for one kernel.
    """
    instructions, labels = _parse(code)
    tensor = [0]
    for text in instructions:
        tensor.append(tensor[-1] + bool(re.search(r"\b[HQ]?G?MMA\.", text)))
    loops = []
    for at, text in enumerate(instructions):
        target = _target(text, labels)
        if target is not None and target <= at:
            loops.append((tensor[at] - tensor[target], target - at - 1, target))
    if not loops or max(loops)[0] == 0:
        raise ValueError("the kernel has no loop with tensor-core instructions")
    _, minus_length, begin = max(loops)
    body = range(begin, begin - minus_length)
    # The fewest instructions from each one to the branch back, which is the last.
    fewest = {body[-1]: 1}
    for at in reversed(body[:-1]):
        text = instructions[at]
        after = [] if re.match(r"(BRA(?!\.DIV)|EXIT)\b", text) else [at + 1]
        target = _target(text, labels)
        if target is not None and at < target < body.stop:
            after.append(target)
        fewest[at] = 1 + min((fewest[i] for i in after), default=len(instructions))
    return len(body), fewest[begin]


def _parse(code: str) -> tuple[list[str], dict[str, int]]:
    """All instructions, and the index of the one behind each label."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found.group(1))
    return instructions, labels


def _target(text: str, labels: dict[str, int]) -> int | None:
    """Where a branch goes, other than to code for lanes that have parted."""
    found = re.search(r"\bBRA\b(?!\.DIV).*\(\.(L_x_\d+)\)", text)
    return labels.get(found.group(1)) if found else None


def _source() -> str:
    attends, instances = [], []
    for index, (kernel, element, stored, size) in enumerate(VARIANTS):
        op = "sparse_decode" if kernel == "sparse_decode" else "dense_decode"
        block = "" if size is None else BLOCK.format(size=size)
        attends.append(ATTEND.format(index=index, block=block, op=op))
        shape = {"element": element, "stored": STORED[stored], "head_size": HEAD_SIZE}
        values = str(kernel != "score_blocks").lower()
        instances.append(INSTANCE.format(index=index, values=values, **shape))
    return SOURCE % "".join(attends) + "".join(instances)


def _compile(source: Path, arch: str, code: Path) -> str:
    """Compile a file to `code`; return what ptxas says of each kernel."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not found; pip install nvidia-cuda-nvcc")
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch={arch}"]
    command += ["-cubin", "-Xptxas=-v", "-o", str(code), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stderr}")
    return done.stderr


def _usage(said: str) -> Iterator[tuple[str, dict[str, int]]]:
    """From what ptxas says: each kernel's mangled name, and what it uses."""
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stores, loads, registers, rest in re.findall(pattern, said, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield (
            name,
            {
                "registers": int(registers),
                "spilled_bytes": int(stores) + int(loads),
                "shared_bytes": int(shared.group(1)) if shared else 0,
            },
        )


def blocks_per_processor(arch: str, registers: int, shared: int, threads: int) -> int:
    """How many thread blocks one processor holds at once."""
    memory, most_threads = PROCESSORS[arch.rstrip("af")]
    of_block = -(-registers // 8) * 8 * threads
    by_memory = memory // (shared + KEPT_BY_CUDA)
    return min(REGISTERS // of_block, by_memory, most_threads // threads)


def measure(arch: str = "sm_90a") -> list[dict]:
    """One object per kernel: the rows of the table."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise FileNotFoundError(
            "nvdisasm is not found; pip install nvidia-cuda-nvdisasm"
        )
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder) / "attend.cu", Path(folder) / "attend.cubin"
        source.write_text(_source())
        said = _compile(source, arch, code)
        printed = subprocess.check_output([nvdisasm, "-c", str(code)], text=True)
        select = _compile(ROOT / "csrc/select_blocks.cu", arch, code)
    version = nvcc_version()
    parts = re.split(r"^\.text\.(\w+):\n", printed, flags=re.MULTILINE)
    code_of = dict(zip(parts[1::2], parts[2::2], strict=True))
    rows = {}
    for name, usage in _usage(said):
        numbers = [int(n) for n in re.findall(r"Li(\d+)E", name)[-5:]]
        index, shared, threads, stages, tile_bytes = numbers
        kernel, element, stored, size = VARIANTS[index]
        everything, fewest = main_loop(code_of[name])
        usage["shared_bytes"] += shared
        blocks = blocks_per_processor(
            arch, usage["registers"], usage["shared_bytes"], threads
        )
        rows[index] = {
            "kernel": kernel,
            "element": element,
            "stored": stored,
            "head_size": HEAD_SIZE,
            "select_block_size": size,
            "arch": arch,
            "instructions_per_tile": everything,
            "least_instructions_per_tile": fewest,
            "tile_bytes": tile_bytes,
            **usage,
            "blocks_per_processor": blocks,
            "bytes_in_flight": blocks * threads // 32 * (stages - 1) * tile_bytes,
            "nvcc": version,
        }
    attending = [rows[index] for index in sorted(rows)]
    nothing = dict.fromkeys(attending[0])
    return attending + [
        nothing
        | {"kernel": "select_blocks", "entry": _plain(name), "arch": arch}
        | usage
        | {"nvcc": version}
        for name, usage in _usage(select)
    ]


def _plain(mangled: str) -> str:
    """The name of a function of the namespace tidal."""
    found = re.match(r"_ZN5tidal(\d+)", mangled)
    if found is None:
        return mangled
    return mangled[found.end() : found.end() + int(found.group(1))]


COLUMNS = {
    "kernel": lambda row: row.get("entry", row["kernel"]),
    "KV cache": lambda row: row["stored"],
    "selection block": lambda row: row["select_block_size"],
    "instructions per tile": lambda row: (
        row["tile_bytes"]
        and f"{row['least_instructions_per_tile']} to {row['instructions_per_tile']}"
    ),
    "bytes per tile": lambda row: row["tile_bytes"],
    "registers": lambda row: row["registers"],
    "spilled bytes": lambda row: row["spilled_bytes"],
    "shared memory": lambda row: row["shared_bytes"],
    "thread blocks per processor": lambda row: row["blocks_per_processor"],
    "bytes in flight": lambda row: row["bytes_in_flight"],
}


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    first = rows[0]
    lines = [
        f"{first['arch']}, nvcc {first['nvcc']}, heads of {HEAD_SIZE}, bf16 query:",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        values = (value(row) for value in COLUMNS.values())
        cells = ("" if value is None else str(value) for value in values)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a", help="such as sm_80; %(default)s")
    parser.add_argument("--write", action="store_true", help="keep the table")
    arguments = parser.parse_args()
    if arguments.arch.rstrip("af") not in PROCESSORS:
        allowed = ", ".join(PROCESSORS)
        parser.error(f"--arch is {arguments.arch}; allowed: {allowed}, sm_90a, sm_100a")
    rows = measure(arguments.arch)
    text = table(rows)
    print(text)
    if arguments.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        before, rest = DOCS.read_text().split(BEGIN)
        after = rest.split(END)[1]
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
