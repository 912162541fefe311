"""Fresh processes with an environment of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIDAL_VLLM = Path(sys.executable).with_name("tidal-vllm")
TIMEOUT = 300  # seconds


def run(
    command: Sequence[str | Path], first_on_path: Path | None = None, **env: str
) -> subprocess.CompletedProcess:
    """Run a command; stdout and stderr come back as one text, in `stdout`.

    Args:
        first_on_path: A folder that Python looks into before all others.
        env: Additions to the environment.
    """
    path = [str(first_on_path)] if first_on_path else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | env,
    )


def run_python(code: str, *arguments: str | Path, **kwargs):
    return run([sys.executable, "-c", code, *arguments], **kwargs)


def write_distribution(folder: Path, name: str, version: str) -> Path:
    """Metadata that says a version of a package is installed in this folder."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text)
    return folder
