"""The release, made as a maintainer makes it: an sdist, and from it the wheel."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from tests.kernels.cuda.emulator import ROOT

SHIPPED = (
    *("tidal_vllm", "csrc", "build_backend", "CMakeLists.txt", "MANIFEST.in"),
    *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
)
MODULE = "tidal_vllm/_tidal_C.so"
BUILD_SDIST = """
import sys
sys.path.insert(0, "build_backend")
import backend
backend.build_sdist(sys.argv[1])
"""


@dataclass(frozen=True)
class Release:
    """A wheel, the log of its build, and the module that was inside."""

    wheel: Path
    log: str
    module: Path


def copy_sources(folder: Path) -> Path:
    """What is shipped, without what builds in the checkout left there."""
    for name in SHIPPED:
        source, ignored = ROOT / name, shutil.ignore_patterns("*.so", "__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder)
    return folder


def build_sdist(sources: Path, out: Path) -> Path:
    out.mkdir()
    command = [sys.executable, "-c", BUILD_SDIST, str(out)]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def build_wheel(source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of an sdist or of a folder, and what its build printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout


def build_release(sdist: Path, out: Path) -> Release:
    wheel, log = build_wheel(sdist, out, TIDAL_BUILD_CUDA="1")
    with ZipFile(wheel) as archive:
        module = archive.extract(MODULE, out / "unpacked")
    return Release(wheel, log, Path(module))
