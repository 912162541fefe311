"""How the CUDA extension is built: for setup.py, and to advise a user.

This module imports the standard library alone, since setup.py loads it by its path.
"""

import json
import os
import shlex
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

# nvcc, and the headers and the static runtime that it compiles against.
NVCC_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl")


def find_nvcc() -> str | None:
    """Look for nvcc on PATH, in CUDA_HOME, and among Python's packages.

    vLLM's requirements bring one as a package.
    """
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    # The packages of CUDA 13 lie in "cu13", those of CUDA 12 in "cuda_nvcc".
    folders = [home, *sorted(packages.glob("cu[0-9]*"), reverse=True)]
    folders.append(packages / "cuda_nvcc")
    path = os.pathsep.join(str(folder / "bin") for folder in folders)
    return shutil.which("nvcc") or shutil.which("nvcc", path=path)


def find_cmake() -> str | None:
    """Look for cmake on PATH, and beside Python, where its package puts it."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("cmake") or shutil.which("cmake", path=beside)


def advise(reason: str) -> str:
    """The advice for a user whose GPU has no CUDA kernels, for the given reason."""
    return (
        f"There is a GPU, but not the CUDA kernels for it: {reason}. "
        f"This builds them: {how_to_build()}"
    )


def how_to_build() -> str:
    """The command that builds the extension into this installation."""
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    missing = [] if find_cmake() else ["cmake"]
    missing += [] if find_nvcc() else NVCC_PACKAGES
    first = f"{pip} {' '.join(missing)} && " if missing else ""
    return f"{first}TIDAL_BUILD_CUDA=1 {pip} -v --no-deps {_source()}"


def _source() -> str:
    """What pip is to build: the place that this package was installed from."""
    try:
        text = distribution("tidal_vllm").read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    origin = json.loads(text) if text else {}
    url = urlparse(origin.get("url", ""))
    if url.scheme != "file":
        return "REPOSITORY"
    folder = shlex.quote(unquote(url.path))
    return f"-e {folder}" if origin.get("dir_info", {}).get("editable") else folder
