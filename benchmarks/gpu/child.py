"""A command in a process of its own, with a time limit that ends all it has started."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PIPE_SECONDS = 5
"""How long the last lines may take once every process has ended."""
LAST_SECONDS = 10
"""How long what a command leaves behind may take to end by itself."""
TRACKER = "multiprocessing.resource_tracker"
"""In the command line of the process of Python's that removes shared memory once all
who had it are gone."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: The exit status; negative for a signal.
        timed_out: It was still running at its limit.
    """

    status: int
    timed_out: bool
    seconds: float

    @property
    def well(self) -> bool:
        return self.status == 0 and not self.timed_out

    def __str__(self) -> str:
        if self.timed_out:
            return f"killed at its limit of {self.seconds:.0f} s"
        return f"exit status {self.status} after {self.seconds:.1f} s"


def run_child(
    words: Sequence[str],
    limit: float,
    say: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Ended:
    """Run a command; nothing of its session is left when this returns, nor any child.

    A process that has left the session and whose parent has ended is not found.

    Args:
        limit: Seconds after which the command, and what it has started, is killed.
        say: Gets each line that the command prints, errors included, as it comes.
    """
    begun = time.monotonic()
    child = subprocess.Popen(
        list(words),
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=_read_lines, args=(child, say), daemon=True)
    reader.start()
    timed_out = False
    try:
        child.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:  # also where the user interrupts
        if child.poll() is None:
            _kill({pid for pid in _started_by(child.pid) if not _is_tracker(pid)})
            child.wait()
        _end(_started_by(child.pid))
        reader.join(PIPE_SECONDS)
    return Ended(child.returncode, timed_out, time.monotonic() - begun)


def _read_lines(child: subprocess.Popen, say: Callable[[str], None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        say(line.rstrip("\n"))


def _end(pids: set[int]) -> None:
    """Let processes end by themselves, and kill those that do not."""
    deadline = time.monotonic() + LAST_SECONDS
    while (running := set(filter(_is_running, pids))) and time.monotonic() < deadline:
        time.sleep(0.05)
    _kill(running)


def _is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie that waits for its parent."""
    try:
        return _stat(Path(f"/proc/{pid}"))[0] not in "ZX"
    except OSError:
        return False


def _is_tracker(pid: int) -> bool:
    try:
        return TRACKER in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return False


def _stat(folder: Path) -> list[str]:
    """STATE PPID PGRP SESSION ... of PID (NAME) STATE ...: proc(5).

    Raises:
        OSError: The process has ended.
    """
    return (folder / "stat").read_text().rpartition(")")[2].split()  # any NAME


def _kill(pids: set[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself
            continue


def _started_by(root: int) -> set[int]:
    """Processes of the session that `root` leads, and all descendants of these.

    A descendant may have made a session of its own, as engines' workers do.
    """
    parents, found = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = _stat(folder)
        except OSError:  # it has ended since it was listed
            continue
        pid, parent, session = int(folder.name), int(fields[1]), int(fields[3])
        parents[pid] = parent
        if pid == root or session == root:
            found.add(pid)
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found
