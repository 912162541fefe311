"""What a result line says about where it was measured."""

import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
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
            **_gpu(),
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", *packages)},
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python {_program()} {shlex.join(sys.argv[1:])}".strip(),
    }


def _program() -> str:
    """The words behind `python` that started this process."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {module.name}" if module else sys.argv[0]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # imported from a folder, or not there at all
        return getattr(sys.modules.get(name), "__version__", None)


def _gpu() -> dict:
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "gpu": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "gpu_gib": round(found.total_memory / 2**30, 1),
        "driver": driver.read_text().split("  ")[1] if driver.exists() else None,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
