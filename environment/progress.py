"""One line of progress per step, and a log of everything behind it."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

LAST_LINES = 15  # of the log, shown when a step fails
GRACE = 20  # seconds for an interrupted command to end by itself
# What `pip --progress-bar raw` writes where no terminal is.
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


class StepFailed(Exception):
    """A command of a step ended badly; the message says what to look at."""


class Step:
    """A step while it runs: `with Step(title, log) as step: step.run(command)`.

    Args:
        title: What is being done.
        log: File that the commands' output is appended to.
        live: Whether to rewrite one line as it goes on; by default on a terminal.
        keep_open: File descriptors that the commands inherit.
    """

    def __init__(
        self,
        title: str,
        log: Path,
        live: bool | None = None,
        keep_open: tuple[int, ...] = (),
    ) -> None:
        self.title, self.log, self.keep_open = title, log, keep_open
        self.live = sys.stdout.isatty() if live is None else live
        self.start = time.monotonic()
        self.note = ""
        self._doing = ""
        self._begin = 0

    def __enter__(self) -> "Step":
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        if not self.live:
            print(self.title, flush=True)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        outcome = "done" if kind is None else "stopped"
        line = f"{outcome} in {time.monotonic() - self.start:.0f} s{self.note}"
        if self.live:
            print(f"\r\033[K{self.title}: {line}", flush=True)
        else:
            print(f"    {line}", flush=True)

    def say(self, note: str) -> None:
        """Add a note to the line that says the step is done."""
        self.note += f"; {note}"

    def run(self, command: list[str]) -> str:
        """Run a command, its output into the log; give its output.

        Raises:
            StepFailed: It ended with another status than 0.
        """
        status, output = self._run(command)
        if status:
            raise StepFailed(self._failure(status))
        return output

    def fails(self, command: list[str]) -> bool:
        """Whether a command, run like any, ends with another status than 0."""
        return self._run(command)[0] != 0

    def _run(self, command: list[str]) -> tuple[int, str]:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=self.keep_open,
        )
        output: list[str] = []
        reader = threading.Thread(target=self._read, args=(child, command, output))
        reader.start()
        try:
            while reader.is_alive():
                reader.join(0.2)
                self._draw()
            status = child.wait()
        except BaseException:
            _end(child)
            raise
        return status, "".join(output)

    def _read(self, child, command: list[str], output: list[str]) -> None:
        with (
            child.stdout,  # closed whatever happens, so that the child cannot wait
            self.log.open("a", encoding="utf-8", errors="replace") as log,
        ):
            print("\n$", *command, file=log, flush=True)
            for raw in child.stdout:
                line = raw.decode(errors="replace")
                if found := _PROGRESS.search(line):
                    done, total = (int(number) / 1e6 for number in found.groups())
                    self._doing = re.sub(r" \[.*", "", self._doing)
                    self._doing += f" [{done:.0f} of {total:.0f} MB]"
                    continue
                output.append(line)
                log.write(line)
                log.flush()
                if line.strip():
                    self._doing = line.strip()

    def _draw(self) -> None:
        if not self.live:
            return
        seconds = time.monotonic() - self.start
        width = shutil.get_terminal_size().columns - 1
        line = f"{self.title}: {seconds:.0f} s  {self._doing}"
        sys.stdout.write(f"\r\033[K{line[:width]}")
        sys.stdout.flush()

    def _failure(self, status: int) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._begin)
            lines = log.read().splitlines()[-LAST_LINES:]
        return (
            f"{self.title}: exit status {status}. The last lines of "
            f"{os.path.relpath(self.log)}:\n    " + "\n    ".join(lines)
        )


def _end(child: subprocess.Popen) -> None:
    """Let an interrupted command end: a terminal's Ctrl-C reached it already."""
    child.terminate()
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
