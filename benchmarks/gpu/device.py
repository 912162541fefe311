r"""What the GPU is, and what it can move: the first step of a GPU run.

    python -m benchmarks.gpu.device --out FILE

One JSON line each: the device and its clocks, at rest and right after work; the
bandwidth of a copy (bytes read and written) and of a sum (bytes read); the time of a
CUDA graph that holds one kernel of one element, which any timed graph takes at least;
and how many thread blocks of each CUDA kernel a multiprocessor holds, beside what the
table of machine code says. `--smoke` runs without a GPU: nothing is queried.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kernels import timing

MACHINE_CODE = Path(__file__).parents[1] / "results/machine_code.json"
QUERY = (
    *("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm"),
    *("clocks.max.mem", "temperature.gpu", "power.draw", "power.limit", "memory.used"),
)
# Kernels and what their KV cache is stored in; selecting reads none.
KERNELS = (
    *(("dense_decode", "bfloat16"), ("score_blocks", "bfloat16")),
    *(("sparse_decode", "bfloat16"), ("sparse_decode", "float8_e4m3fn")),
    ("select_blocks", "bfloat16"),
)
# What torch.ops.tidal.occupancy gives: KernelUse of csrc/launch.h.
OCCUPANCY = (
    *("blocks_per_processor", "threads", "registers", "shared_bytes", "local_bytes"),
    *("binary_version", "ptx_version", "programmatic"),
)
# Multiprocessors, shared memory, registers and L2 of torch's device properties.
PROPERTIES = (
    *("name", "major", "minor", "multi_processor_count", "total_memory"),
    *("L2_cache_size", "shared_memory_per_multiprocessor", "regs_per_multiprocessor"),
)


def main() -> int:
    args = timing.parser(__doc__).parse_args()
    bench = timing.start("device", args)
    tiny = torch.zeros(1, device=bench.device)
    parts: dict[str, Callable[[], dict]] = {
        "properties": properties,
        "clocks after work": clocks,
        "bandwidth": lambda: {
            "copy_tb_per_s": round(bench.copy_bytes_per_us / 1e6, 3),
            "read_tb_per_s": round(bench.read_bytes_per_us / 1e6, 3),
        },
        "empty graph": lambda: {
            "median_us": statistics.median(bench.time_us(lambda: tiny.add_(1)))
        },
        "occupancy": occupancy,
    }
    for name, part in parts.items():
        if args.smoke and name in ("properties", "clocks after work", "occupancy"):
            found: dict = {"stand_in": "no GPU was asked"}
        else:
            try:
                found = part()
            except Exception as error:  # one query that fails hides no other
                bench.fail({"query": name}, "device", error)
                continue
        bench.note({"query": name}, **found)
    return 0


def properties() -> dict:
    found = torch.cuda.get_device_properties(0)
    tools = {tool: shutil.which(tool) for tool in ("nvidia-smi", "nvcc", "ncu")}
    return {name: getattr(found, name, None) for name in PROPERTIES} | tools


def clocks() -> dict:
    """What nvidia-smi says of the first GPU; its clocks in MHz."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERY)}"]
    done = subprocess.run(
        [*command, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return dict(zip(QUERY, done.stdout.strip().split(", "), strict=True))


def occupancy() -> dict:
    """What each CUDA kernel takes of this GPU, as CUDA says and as was computed.

    Raises:
        ImportError: The extension is not here.
    """
    import tidal_vllm.kernels.cuda  # noqa: F401, which loads torch.ops.tidal

    counted = []
    for op, stored in KERNELS:
        numbers = torch.ops.tidal.occupancy(op, "bfloat16", stored, 128, 0)
        about = {"kernel": op, "element": "bfloat16", "stored": stored}
        counted.append(about | dict(zip(OCCUPANCY, numbers, strict=True)))
    computed = json.loads(MACHINE_CODE.read_text()) if MACHINE_CODE.exists() else []
    keys = ("kernel", "element", "stored", "head_size", "arch", "blocks_per_processor")
    return {
        "counted": counted,
        "computed": [{key: row.get(key) for key in keys} for row in computed],
    }


if __name__ == "__main__":
    sys.exit(main())
