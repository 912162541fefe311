"""Timing on a GPU: graph replays over a cold L2, every trial kept, copies to compare.

On a CPU the same code runs with `--smoke`, to show that it runs; its times mean nothing
and are not written.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.machine import describe_run
from tidal_vllm.kernels import workspace

L2_BYTES = 256 << 20  # more than any L2 of today
COPY_BYTES = 2 << 30


@dataclass
class Bench:
    """One script's run: where, how often, and what was found.

    Attributes:
        name: Of the benchmark; a field of every record.
        smoke: Tiny sizes, on whatever there is; nothing is written.
        records: As printed and written, one JSON line each.
    """

    name: str
    smoke: bool
    trials: int
    out: Path | None
    records: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu" and not self.smoke:
            raise SystemExit("no GPU here: only --smoke runs, and times nothing")
        self.packages = ("triton", "vllm", "tidal_vllm")
        self.about = describe_run(*self.packages)
        copied = COPY_BYTES if self.device.type == "cuda" else 1 << 20
        source = torch.ones(copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = self.time_us(lambda: target.copy_(source))
        self.copy_bytes_per_us = 2 * copied / statistics.median(times)
        tb = f"copy {self.copy_bytes_per_us / 1e6:.2f} TB/s"
        shown = "smoke, no timings" if self.smoke else tb
        print(f"{self.name} on {self.device}: {shown}", flush=True)

    def time_us(self, call: Callable[[], object], graph: bool = True) -> list[float]:
        """Microseconds of each trial, the caches cold.

        Args:
            call: Only launches work on tensors that exist.
            graph: Capture it in a CUDA graph first, so that launches cost nothing.
        """
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return [1e6 * (time.perf_counter() - start)]
        call()
        run = _capture(call) if graph else call
        flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(self.trials + 2):
            flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end))
        return [round(t, 2) for t in times[2:]]

    def add(self, case: dict, who: str, times: list[float], num_bytes: int) -> dict:
        """Keep and print one result.

        Args:
            case: What was asked.
            who: The implementation.
            num_bytes: That any implementation must move; 0 where that says little.
        """
        middle = statistics.median(times)
        record = {
            "benchmark": self.name,
            **case,
            "implementation": who,
            "median_us": round(middle, 2),
            "trials_us": times,
        }
        shown = f"{middle:>10.1f} us"
        if num_bytes:
            share = num_bytes / middle / self.copy_bytes_per_us
            record |= {"bytes": num_bytes, "share_of_copy": round(share, 4)}
            shown += f"{100 * share:>7.1f} % of copy bandwidth"
        self._keep(record, f"{who:<30}{'   right' if self.smoke else shown}")
        return record

    def skip(self, case: dict, who: str, why: object) -> None:
        """Say that an implementation could not be measured, and why."""
        why = str(why).splitlines()[0][:300] if str(why) else repr(why)
        record = {"benchmark": self.name, **case, "implementation": who, "skipped": why}
        self._keep(record, f"{who:<30}   skipped: {why}")

    def note(self, case: dict, **results) -> None:
        """Keep ratios and other things that follow from the records."""
        shown = ", ".join(f"{key} {value}" for key, value in results.items())
        shown = "" if self.smoke else f"    {shown}"
        self._keep({"benchmark": self.name, **case, **results}, shown)

    def _keep(self, record: dict, shown: str) -> None:
        copy = {"copy_tb_per_s": round(self.copy_bytes_per_us / 1e6, 3)}
        record |= copy | self.about
        self.records.append(record)
        if shown:
            print(shown, flush=True)
        if self.out is not None and not self.smoke:
            with self.out.open("a") as out:
                out.write(json.dumps(record) + "\n")


def _capture(call: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser of the arguments that all scripts understand."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--smoke", action="store_true", help="tiny sizes, nothing timed")
    made.add_argument("--trials", type=int, default=20)
    made.add_argument("--out", type=Path, help="append JSON lines here")
    made.add_argument(
        "--kernels", nargs="+", help="of cuda, triton, reference; all that run here"
    )
    made.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    return made


def start(name: str, args: argparse.Namespace) -> Bench:
    torch.manual_seed(0)
    if args.smoke:  # an interpreter runs the parts of a kernel one after the other
        workspace.MAX_SPLITS, workspace.MIN_SPLITS = 4, 2
    return Bench(name, args.smoke, args.trials, args.out)
