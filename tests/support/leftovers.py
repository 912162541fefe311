"""What a run leaves behind: processes, shared memory, temporary files.

Only what is the run's own is looked at, for others may use the machine: processes that
inherited a mark in their environment, shared memory that one of them had mapped, and
files below a temporary folder of the run.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

MARK = "TIDAL_VLLM_TEST_RUN"
SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 30  # seconds for what is about to end
LOOKS = 10  # seconds in which new shared memory finds its process


class Leftovers:
    """Begins with a run; changes this process's environment until `collect`."""

    def __init__(self) -> None:
        usual = tempfile.gettempdir()
        # NOTE: short, because the paths of sockets must be.
        self._folder = Path(tempfile.mkdtemp(prefix="t-"))
        self._given = {name: os.environ.get(name) for name in ("TMPDIR", MARK)}
        self._mark = f"{MARK}={self._folder.name}".encode()
        os.environ |= {"TMPDIR": str(self._folder), MARK: self._folder.name}
        # What is meant to stay: pytest's folders of the last runs, PyTorch's cache.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", usual)
        cache = Path(usual, f"torchinductor_{os.environ.get('USER') or os.getuid()}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
        # One of vLLM 0.33's dependencies makes its cache where it is imported.
        for name in ("CUTE_DSL_CACHE_DIR", "CUTE_EXPERIMENTAL_DSL_CACHE_DIR"):
            os.environ.setdefault(name, str(cache.with_name("cutlass_python_cache")))
        tempfile.tempdir = None
        self._shared: set[Path] = set()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._find_shared_memory, daemon=True)
        self._watch.start()

    def collect(self) -> list[str]:
        """What is left, a line each; it is removed."""
        end = time.monotonic() + PATIENCE
        while (processes := self._processes()) and time.monotonic() < end:
            time.sleep(0.2)
        lines = [f"process {pid}: {_command(pid)}" for pid in processes]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ended.set()
        self._watch.join()
        shared = {path for path in self._shared - _mapped(os.getpid()) if path.exists()}
        files = {path for path in self._folder.iterdir() if not _is_vllms(path)}
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

    def _processes(self) -> list[int]:
        """Living processes with the mark, but for this one."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                marked = self._mark in (folder / "environ").read_bytes().split(b"\0")
                if marked and folder.name != str(os.getpid()):
                    found.append(int(folder.name))
        return found

    def _find_shared_memory(self) -> None:
        before, looks = {*SHARED_MEMORY.iterdir()}, Counter()
        while not self._ended.wait(1):
            looks.update({*SHARED_MEMORY.iterdir()} - before - self._shared)
            new = {path for path, count in looks.items() if count <= LOOKS}
            for pid in self._processes() if new - self._shared else ():
                self._shared |= new & _mapped(pid)


def _is_vllms(path: Path) -> bool:
    """Whether vLLM leaves it, too, where its processes end in order: nothing of ours.

    Those are the sockets between its processes, and the file by which the ranks of an
    engine find each other.
    """
    return path.is_socket() or path.name.startswith("vllm_dist_")


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b" ".join(words).decode(errors="replace")
    return "(ended)"


def _mapped(pid: int) -> set[Path]:
    """Shared memory that a process has mapped."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        paths = (line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line)
        return {Path(path.removesuffix(" (deleted)")) for path in paths}
    return set()
