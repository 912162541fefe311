"""Whether times can be compared on a machine that others use, too."""

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

# Speed-ups of single trials, all but the best and the worst: the last is at most this
# many times the first. On quiet machines they differ by a few percent.
QUIET_SPREAD = 1.3
# Time that processes are kept waiting for a core, per time that they run.
QUIET_WAITING = 0.15


@dataclass(frozen=True)
class Race:
    """Times of two contenders, trial by trial, in turn.

    Attributes:
        dense: Seconds, one per trial.
        sparse: Seconds, of the same trials.
        waited: Seconds in which their processes could run, and had no core.
        ran: Seconds in which they ran.
    """

    dense: list[float]
    sparse: list[float]
    waited: float = 0.0
    ran: float = 0.0

    @property
    def _speed_ups(self) -> list[float]:
        pairs = zip(self.dense, self.sparse, strict=True)
        return sorted(dense / sparse for dense, sparse in pairs)

    @property
    def speed_up(self) -> float:
        """The median over the trials."""
        return median(self._speed_ups)

    def reason_unclear(self) -> str:
        """Why no speed-up should be told; empty where one can be."""
        if self.waited > QUIET_WAITING * self.ran:
            share = 100 * self.waited / (self.waited + self.ran)
            return (
                f"this machine is too busy to tell; vLLM was waiting for a core "
                f"{share:.0f} % of its time"
            )
        middle = self._speed_ups[1:-1] or self._speed_ups
        if middle[-1] > QUIET_SPREAD * middle[0]:
            return (
                "this machine is too busy to tell; the trials range from "
                f"{self._speed_ups[0]:.2f}x to {self._speed_ups[-1]:.2f}x"
            )
        return ""


def waiting_and_running() -> tuple[float, float]:
    """Seconds that all processes below this one waited for a core, and had one.

    From what Linux keeps of each thread; zeros where it keeps nothing.
    """
    import psutil

    waited = ran = 0
    for process in psutil.Process(os.getpid()).children(recursive=True):
        for file in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            try:
                nanoseconds = [int(word) for word in file.read_text().split()]
            except (OSError, ValueError):  # it has ended
                continue
            ran += nanoseconds[0]
            waited += nanoseconds[1]
    return waited / 1e9, ran / 1e9
