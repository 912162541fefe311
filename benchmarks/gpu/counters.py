r"""Hardware counters of the decode kernels, by Nsight Compute.

    python -m benchmarks.gpu.counters --out FILE

Starts itself under `ncu`, which reads counters of one call of `sparse_decode`,
`dense_decode` with scores, and `select_blocks` each; one JSON line per kernel. The
clocks stay as they are. Without `ncu` it says so, and fails; with `--smoke` it makes
the same calls without it.
"""

import csv
import os
import shutil
import subprocess
import sys
from functools import partial

import torch

from benchmarks.kernels import timing
from benchmarks.kernels.decode_batch import DecodeBatch, default_rule, shape_of
from benchmarks.kernels.decoder import Decoder, kernels_here

# Bytes of device memory and L2, share of their peak, and why warps wait.
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    "launch__grid_size",
)
BATCH, CONTEXT, BUDGET = 16, 32768, 3264
CALLS_ONLY = "TIDAL_CALLS_ONLY"
"""Set in the environment of the process that ncu watches."""


def main() -> int:
    parser = timing.parser(__doc__)
    args = parser.parse_args()
    if os.environ.get(CALLS_ONLY):
        call_each(args)
        return 0
    bench = timing.start("counters", args)
    env, command = os.environ | {CALLS_ONLY: "1"}, sys.orig_argv
    if not args.smoke:
        if shutil.which("ncu") is None:
            bench.skip({}, "ncu", "not on PATH")
            return 1
        command = [*watcher(), *sys.orig_argv]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:] + done.stderr[-4000:], flush=True)
        return 1
    found = read_counters(done.stdout)
    for record in found:
        bench.note({"implementation": "cuda"}, **record)
    return 0 if found or args.smoke else 1


def watcher() -> list[str]:
    """ncu and its options: only between the calls' start and stop."""
    return [
        *("ncu", "--profile-from-start", "off", "--clock-control", "none"),
        *("--csv", "--page", "raw", "--print-units", "base"),
        *("--metrics", ",".join(METRICS)),
    ]


def call_each(args) -> None:
    """Call each op once, warm, while the profiler is on."""
    shape = shape_of(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, context, budget = (2, 96, 48) if args.smoke else (BATCH, CONTEXT, BUDGET)
    decodes = DecodeBatch.make(shape, batch, context, device)
    kernels = kernels_here(shape, "cuda", device)
    decoder = Decoder(decodes, default_rule(budget), kernels)
    for call in (partial(decoder.dense, True), decoder.select, decoder.sparse):
        call()
        if device.type == "cpu":
            continue
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def read_counters(printed: str) -> list[dict]:
    """The metrics of each kernel in ncu's CSV; lines before its header are others'."""
    lines = printed.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID",')]
    if not starts:
        return []
    names, units, *rows = csv.reader(lines[starts[0] :])
    found = []
    for row in rows:
        given = dict(zip(names, row, strict=False))
        record: dict = {"kernel": given["Kernel Name"]}
        for name, unit in zip(names, units, strict=False):
            if name in METRICS:
                number = float(given[name].replace(",", ""))
                record[name] = number
                record.setdefault("units", {})[name] = unit
        found.append(record)
    return found


if __name__ == "__main__":
    sys.exit(main())
