"""What a run leaves behind: processes, shared memory, temporary files.

Only what is the run's own is looked at, for others may use the machine: processes that
inherited a mark in their environment, files below a temporary folder of the run, and
new shared memory that no living process has mapped.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

MARK = "TIDAL_VLLM_TEST_RUN"
SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 30  # seconds for what is about to end


class Leftovers:
    """Begins with a run; changes this process's environment until `collect`."""

    def __init__(self) -> None:
        usual = tempfile.gettempdir()
        # NOTE: short, because the paths of sockets must be.
        self._folder = Path(tempfile.mkdtemp(prefix="t-"))
        self._given = {name: os.environ.get(name) for name in ("TMPDIR", MARK)}
        self._mark = self._folder.name
        os.environ |= {"TMPDIR": str(self._folder), MARK: self._mark}
        # Where pytest keeps the folders of its last runs.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", usual)
        tempfile.tempdir = None
        self._shared_before = _shared_memory()

    def collect(self) -> list[str]:
        """What is left, a line each; it is removed."""
        end = time.monotonic() + PATIENCE
        while (processes := self._processes()) and time.monotonic() < end:
            time.sleep(0.2)
        lines = [f"process {pid}: {what}" for pid, what in processes.items()]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shared = _unmapped(_shared_memory() - self._shared_before)
        files = set(self._folder.iterdir())
        lines += [f"shared memory: {path}" for path in sorted(shared)]
        lines += [f"temporary file: {path}" for path in sorted(files)]
        for path in shared:
            path.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        for name, value in self._given.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        return lines

    def _processes(self) -> dict[int, str]:
        """Living processes with the mark, but for this one, and their commands."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            if folder.name == str(os.getpid()):
                continue
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes().split(b"\0")
                if f"{MARK}={self._mark}".encode() in environment:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    found[int(folder.name)] = b" ".join(words).decode(errors="replace")
        return found


def _shared_memory() -> set[Path]:
    return {
        path
        for path in SHARED_MEMORY.glob("*")
        if path.is_file() and path.owner() == Path("/proc/self").owner()
    }


def _unmapped(files: set[Path]) -> set[Path]:
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps") if files else ():
        with contextlib.suppress(OSError):
            mapped += maps.read_text()
    return {path for path in files if str(path) not in mapped}
