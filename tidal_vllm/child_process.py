"""Python code in a process of its own, for whatever may break or hang."""

import subprocess
import sys

TIMEOUT = 900  # seconds; a cold disk takes its time


def python_command(code: str) -> list[str]:
    """The command that runs code without the current folder on Python's path."""
    first = "import sys; sys.path = [p for p in sys.path if p]; "
    return [sys.executable, "-c", first + code]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; its errors are part of its output.

    Raises:
        subprocess.TimeoutExpired: The code took longer than ``TIMEOUT``.
    """
    return subprocess.run(
        python_command(code),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        check=False,
    )


def last_words(output: str, status: int) -> str:
    """The last line that a process wrote, and its exit status."""
    lines = output.strip().splitlines()
    return f"{lines[-1] if lines else 'no message'} (exit status {status})"
