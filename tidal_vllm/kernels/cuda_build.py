"""How the CUDA extension gets built: for setup.py, and for advice to build it.

Imports the standard library alone, since setup.py loads this file by its path.
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
    """On PATH, in CUDA_HOME, or among Python's packages, where vLLM's are."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    # "cu13": the layout since CUDA 13; "cuda_nvcc": that of CUDA 12.
    folders = [home, *sorted(packages.glob("cu[0-9]*"), reverse=True)]
    folders.append(packages / "cuda_nvcc")
    path = os.pathsep.join(str(folder / "bin") for folder in folders)
    return shutil.which("nvcc") or shutil.which("nvcc", path=path)


def find_cmake() -> str | None:
    """On PATH, or beside Python, where its package puts it."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("cmake") or shutil.which("cmake", path=beside)


def advise(reason: str) -> str:
    """What a user is told who has a GPU without the kernels for it."""
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
    """What pip is told to build: where this package was installed from."""
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
