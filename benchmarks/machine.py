"""What a result line says about where it was measured."""

import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch


def describe_run(*packages: str) -> dict:
    """The machine, the versions, the date and the command of this run.

    Args:
        packages: Distributions whose versions matter, beside torch.
    """
    return {
        "machine": {
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", *packages)},
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
