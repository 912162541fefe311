"""Timing on a GPU: graph replays over a cold L2, every trial kept, copies to compare.

On a CPU the same code runs with `--smoke`, to show that it runs: its times mean nothing
and are not written.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.machine import describe_run
from tidal_vllm.kernels import workspace

COPY_BYTES = 2 << 30
POISONED = 3
"""Exit status of a process in which the GPU refuses all further work."""


@dataclass
class Bench:
    """One script's run: where, how often, and what was found.

    Attributes:
        name: Of the benchmark; a field of every record.
        smoke: Tiny sizes, on whatever there is; no time is written.
        records: As printed and written, one JSON line each.
        num_wrong: Cases whose check or call failed.
    """

    name: str
    smoke: bool
    trials: int
    out: Path | None
    records: list[dict] = field(default_factory=list)
    num_wrong: int = 0

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu" and not self.smoke:
            raise SystemExit("no GPU here: only --smoke runs, and times nothing")
        self.packages = ("triton", "vllm", "tidal_vllm")
        self.about = describe_run(*self.packages)
        if library := os.environ.get("TIDAL_CUDA_LIBRARY"):
            self.about["library"] = Path(library).name
        self.copy_bytes_per_us, self.read_bytes_per_us = self._measure_bandwidth()
        copy, read = self.copy_bytes_per_us / 1e6, self.read_bytes_per_us / 1e6
        shown = f"copy {copy:.2f} TB/s, read {read:.2f} TB/s"
        shown = "smoke, no timings" if self.smoke else shown
        print(f"{self.name} on {self.device}: {shown}", flush=True)

    @property
    def l2_bytes(self) -> int:
        if self.device.type == "cpu":
            return 1 << 10
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    @cached_property
    def _flushed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read to empty the L2, four times its size, and a place for the sum.

        It is read and not written: dirty lines would be written back to memory while
        the next kernel is timed.
        """
        size = max(256 << 20, 4 * self.l2_bytes) // 4
        return (
            torch.ones(size, device=self.device),
            torch.empty((), device=self.device),
        )

    def _measure_bandwidth(self) -> tuple[float, float]:
        """Bytes per microsecond of a copy (read and written) and of a sum (read)."""
        size = COPY_BYTES if self.device.type == "cuda" else 1 << 20
        source = torch.ones(size // 4, device=self.device)
        target, total = torch.empty_like(source), torch.empty((), device=self.device)
        copied = self.time_us(lambda: target.copy_(source))
        summed = self.time_us(lambda: torch.sum(source, dim=0, out=total))
        return 2 * size / statistics.median(copied), size / statistics.median(summed)

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
        run = capture(call) if graph else call
        source, total = self._flushed
        times = []
        for _ in range(self.trials + 2):
            torch.sum(source, dim=0, out=total)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end))
        return [round(t, 2) for t in times[2:]]

    @contextmanager
    def case(self, case: dict, who: str) -> Iterator[None]:
        """Run a part that may fail: a failure ends this case alone, and is kept.

        Raises:
            SystemExit: The GPU refuses further work, as after an illegal address; the
                status is `POISONED`.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.skip(case, who, error)
        except Exception as error:
            self.fail(case, who, error)
            try:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            except RuntimeError:
                raise SystemExit(POISONED) from error

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
            of_read = num_bytes / middle / self.read_bytes_per_us
            record |= {"bytes": num_bytes, "share_of_copy": round(share, 4)}
            record |= {"share_of_read": round(of_read, 4)}
            shown += f"{100 * of_read:>7.1f} % of read bandwidth"
        if self.smoke:  # that it ran and was right; not how long it took
            record = {"benchmark": self.name, **case, "implementation": who}
            record["right"] = True
        label = " ".join([who, *(str(case[k]) for k in ("op", "scope") if k in case)])
        self._keep(record, f"{label:<38}{'   right' if self.smoke else shown}")
        return record

    def skip(self, case: dict, who: str, why: object) -> None:
        """Say that an implementation could not be measured, and why."""
        self._keep_failure(case, who, "skipped", why)

    def fail(self, case: dict, who: str, why: object) -> None:
        """Say that an implementation is wrong, or broke."""
        self.num_wrong += 1
        self._keep_failure(case, who, "wrong", why)

    def note(self, case: dict, **results: object) -> None:
        """Keep ratios and other things that follow from the records."""
        shown = ", ".join(f"{key} {value}" for key, value in results.items())
        self._keep({"benchmark": self.name, **case, **results}, f"    {shown}")

    def _keep_failure(self, case: dict, who: str, what: str, why: object) -> None:
        why = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else str(why)
        why = why.splitlines()[0][:300]
        record = {"benchmark": self.name, **case, "implementation": who, what: why}
        self._keep(record, f"{who:<30}   {what}: {why}")

    def _keep(self, record: dict, shown: str) -> None:
        if not self.smoke:
            record["copy_tb_per_s"] = round(self.copy_bytes_per_us / 1e6, 3)
            record["read_tb_per_s"] = round(self.read_bytes_per_us / 1e6, 3)
        record |= self.about
        self.records.append(record)
        print(shown, flush=True)
        if self.out is not None:
            records.append(self.out, record)


def capture(call: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph that holds what `call` launches."""
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


def count_kernels(call: Callable[[], object]) -> dict[str, int]:
    """The GPU kernels that one call launches, by name."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    averages = seen.key_averages()
    return {event.key: event.count for event in averages if event.device_time_total}


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser of the arguments that all scripts understand."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--smoke", action="store_true", help="tiny sizes, nothing timed")
    made.add_argument("--trials", type=int, default=20)
    made.add_argument("--out", type=Path, help="append JSON lines here")
    made.add_argument(
        "--implementations", nargs="+", help="what to measure; each in a process alone"
    )
    made.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    return made


def start(name: str, args: argparse.Namespace) -> Bench:
    torch.manual_seed(0)
    if args.smoke:  # an interpreter runs the parts of a kernel one after the other
        workspace.MAX_SPLITS, workspace.MIN_SPLITS = 4, 2
    return Bench(name, args.smoke, args.trials, args.out)
