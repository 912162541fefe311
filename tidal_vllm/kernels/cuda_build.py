"""What the CUDA extension is built with: for setup.py and the build backend.

This module imports the standard library alone, since both load it by its path.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# A driver of CUDA 13.0 runs what any nvcc 13 compiled for its GPU, but compiles PTX for
# a newer GPU only if nvcc was no newer than the driver. So the oldest nvcc is taken,
# with its own parts: nvidia-cuda-nvcc requires them in any version.
NVCC = "==13.0.*"
NVCC_PACKAGES = (
    *("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm"),
    *("nvidia-cuda-runtime", "nvidia-cuda-cccl"),
)
TORCH = "torch>=2.11"  # the first whose stable ABI has what csrc/bindings.cpp uses
CMAKE = "cmake>=3.18"  # as CMakeLists.txt says


def find_nvcc() -> str | None:
    """Look for nvcc on PATH, in CUDA_HOME, and among Python's packages.

    vLLM's requirements bring one as a package.
    """
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = [home]
    for packages in _packages():
        # The packages of CUDA 13 lie in "cu13", those of CUDA 12 in "cuda_nvcc".
        nvidia = packages / "nvidia"
        folders += sorted(nvidia.glob("cu[0-9]*"), reverse=True)
        folders.append(nvidia / "cuda_nvcc")
    path = os.pathsep.join(str(folder / "bin") for folder in folders)
    return shutil.which("nvcc") or shutil.which("nvcc", path=path)


def find_cmake() -> str | None:
    """Look for cmake among Python's packages, and on PATH.

    The script that the package puts on PATH does not find its package where a build is
    isolated, so the program itself comes first.
    """
    path = os.pathsep.join(str(p / "cmake/data/bin") for p in _packages())
    return shutil.which("cmake", path=path) or shutil.which("cmake")


def find_torch() -> Path | None:
    """The folder of the torch package, whose headers and libraries a build takes."""
    folders = (packages / "torch" for packages in _packages())
    return next((folder for folder in folders if (folder / "include").is_dir()), None)


def missing_requirements() -> list[str]:
    """The packages that an isolated build of the extension has to install."""
    missing = [] if find_torch() else [TORCH]
    missing += [] if find_cmake() else [CMAKE]
    missing += [] if find_nvcc() else [name + NVCC for name in NVCC_PACKAGES]
    return missing


def _packages() -> Iterator[Path]:
    """The folders of Python's packages, also those that pip's isolation hides."""
    yield from map(Path, filter(None, sys.path))
    for kind in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(kind))
