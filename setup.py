"""Everything but the CUDA extension is in pyproject.toml.

TIDAL_BUILD_CUDA decides at build time:
    auto (default)  build where nvcc, cmake and a torch with CUDA are found; a failure
                    leaves the package without the extension (Triton is used then)
    1               build; anything missing or failing is an error. A torch without
                    CUDA will do: the module is for another one, and needs no GPU here
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
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
# NOTE: the package itself cannot be imported in a build environment.
BUILD = runpy.run_path(str(ROOT / "tidal_vllm/kernels/cuda_build.py"))
find_nvcc, find_cmake, find_torch = map(
    BUILD.get, ("find_nvcc", "find_cmake", "find_torch")
)
manylinux = runpy.run_path(str(ROOT / "build_backend/wheel_tag.py"))["manylinux"]
SWITCH = "TIDAL_BUILD_CUDA"
MODULE = "_tidal_C.so"


def switch():
    value = os.environ.get(SWITCH, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{SWITCH} is {value!r}; allowed: auto, 0, 1")
    return value


def decide():
    """Whether the extension can and should be built, and why."""
    if switch() == "0":
        return False, f"{SWITCH}=0"
    torch = find_torch()
    if torch is None:
        return False, (
            f"torch is not installed for {sys.executable}, and an isolated build sees "
            f"no other; {SWITCH}=1 brings one, --no-build-isolation takes what is there"
        )
    if not (torch / "include/torch/csrc/stable/library.h").exists():
        return False, f"the torch in {torch} is older than 2.11"
    if find_nvcc() is None:
        return False, "nvcc is not found"
    if find_cmake() is None:
        return False, "cmake is not found"
    kind = "a torch with CUDA"
    if not (torch / "lib/libtorch_cuda.so").exists():
        kind = "torch's headers"
        if switch() == "auto":
            reason = f"the torch in {torch} is built without CUDA"
            return False, f"{reason}; {SWITCH}=1 builds for another one"
    return True, f"{find_nvcc()} and {kind} are here ({SWITCH}={switch()})"


class CMakeBuild(build_ext):
    def run(self):
        if switch() == "1" and not build_it:
            raise SystemExit(f"{SWITCH}=1, but {why}")
        super().run()

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
        # NOTE: nvcc 13.0 looks for these in lib64, its package has them in lib.
        libraries = Path(find_nvcc()).parents[1] / "lib"
        if (libraries / "libcudart_static.a").exists():
            paths = [str(libraries), *filter(None, [env.get("LIBRARY_PATH")])]
            env["LIBRARY_PATH"] = os.pathsep.join(paths)
        for command in (configure, [find_cmake(), "--build", str(build), "-j", jobs]):
            if subprocess.call(command, env=env):
                raise CompileError(f"this failed: {' '.join(command)}")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / MODULE, target)


class Wheel(bdist_wheel):
    def get_tag(self):
        """One tag for every Python; a failed build leaves a wheel for every machine."""
        *_, platform = super().get_tag()
        module = Path(self.bdist_dir) / "tidal_vllm" / MODULE
        if not module.exists():
            platform = "any"
        elif not self.plat_name_supplied:
            platform = manylinux(module, platform)
        return "py3", "none", platform


build_it, why = decide()
print(f"CUDA extension: {'building' if build_it else 'not built'}: {why}", flush=True)
required = switch() == "1"
extensions = [Extension("tidal_vllm._tidal_C", sources=[], optional=not required)]
setup(
    ext_modules=extensions if build_it or required else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
