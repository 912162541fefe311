"""Everything but the CUDA extension is in pyproject.toml.

TIDAL_BUILD_CUDA decides at build time:
    auto (default)  build where nvcc, cmake and a torch with CUDA are found; a failure
                    leaves the package without the extension (Triton is used then)
    1               build; anything missing or failing is an error
    0               do not build
CMAKE_ARGS is handed on, for instance "-DTIDAL_CUDA_ARCHS=90a" for one GPU alone.
`pip install -v` shows the line that says what was decided.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
# NOTE: the package itself cannot be imported in a build environment.
BUILD = runpy.run_path(str(ROOT / "tidal_vllm/kernels/cuda_build.py"))
find_nvcc, find_cmake = BUILD["find_nvcc"], BUILD["find_cmake"]
SWITCH = "TIDAL_BUILD_CUDA"
# Outside pip's isolated build environment, where torch is not installed.
FIND_TORCH = (
    "import importlib.util as u; s = u.find_spec('torch'); "
    "print(s.submodule_search_locations[0] if s else '')"
)


def find_torch():
    command = [sys.executable, "-I", "-c", FIND_TORCH]
    done = subprocess.run(command, capture_output=True, text=True)
    found = done.stdout.strip()
    return Path(found) if found else None


def decide():
    """Whether to build the extension, and why."""
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"{SWITCH} is {switch!r}; allowed: auto, 0, 1")
    if switch == "0":
        return False, f"{SWITCH}=0"
    torch = find_torch()
    if find_nvcc() is None:
        reason = "nvcc is not found"
    elif find_cmake() is None:
        reason = "cmake is not found"
    elif torch is None:
        reason = f"torch is not installed for {sys.executable}"
    elif not (torch / "lib/libtorch_cuda.so").exists():
        reason = f"the torch in {torch} is built without CUDA"
    else:
        return True, f"nvcc and a torch with CUDA are here ({SWITCH}={switch})"
    if switch == "1":
        raise SystemExit(f"{SWITCH}=1, but {reason}")
    return False, reason


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension):
        build = Path(self.build_temp).resolve()
        configure = [
            *(find_cmake(), "-S", str(ROOT), "-B", str(build)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
            f"-DTORCH_DIR={find_torch()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = str(self.parallel or os.cpu_count() or 1)
        # NOTE: cmake may be a script whose Python package pip's isolation hides.
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        for command in (configure, [find_cmake(), "--build", str(build), "-j", jobs]):
            if subprocess.call(command, env=env):
                raise CompileError(f"this failed: {' '.join(command)}")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / "_tidal_C.so", target)


build_it, why = decide()
print(f"CUDA extension: {'building' if build_it else 'not built'}: {why}", flush=True)
required = os.environ.get(SWITCH) == "1"
extensions = [Extension("tidal_vllm._tidal_C", sources=[], optional=not required)]
setup(
    ext_modules=extensions if build_it else [],
    cmdclass={"build_ext": CMakeBuild},
)
