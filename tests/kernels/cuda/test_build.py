"""setup.py builds the extension for every target; no kernel spills a register."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulator import ROOT
from tidal_vllm.kernels import cuda_build
from tidal_vllm.kernels.cuda_build import find_cmake, find_nvcc

TORCH = Path(torch.__file__).parent
CHILD = Path(__file__).parent / "build_child.py"
TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
# Each op that attends: 2 dtypes, fp8 or not, 4 head sizes. select_blocks: 1 kernel.
KERNELS = 3 * 2 * 2 * 4 + 1
STUB = "int aoti_torch_get_current_cuda_stream(int d, void** s) { *s = 0; return d; }"
NO_NVCC = find_nvcc() is None
needs_nvcc = pytest.mark.skipif(
    NO_NVCC or find_cmake() is None, reason="needs nvcc and cmake"
)

pytestmark = [
    pytest.mark.extended,
    pytest.mark.serial,
]


@pytest.fixture(scope="module")
def torch_with_cuda(tmp_path_factory):
    """This torch's folder, with a stub in place of its CUDA library."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "include").symlink_to(TORCH / "include")
    lib = folder / "lib"
    lib.mkdir()
    (lib / "libtorch_cpu.so").symlink_to(TORCH / "lib/libtorch_cpu.so")
    name = "libtorch_cuda.so"
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", f"-Wl,-soname,{name}"]
    subprocess.run([*command, "-o", str(lib / name)], input=STUB, text=True, check=True)
    return folder


def run_setup(folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(CHILD), str(folder), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        timeout=840,
    )


@pytest.fixture(scope="module")
def built(torch_with_cuda, tmp_path_factory):
    """The module and what its build printed."""
    out = tmp_path_factory.mktemp("built")
    folders = ("--build-lib", out / "lib", "--build-temp", out / "temp")
    done = run_setup(torch_with_cuda, "build_ext", *folders, TIDAL_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout[-6000:]
    return out / "lib/tidal_vllm/_tidal_C.so", done.stdout


@needs_nvcc
def test_every_kernel_is_built_for_every_target(built):
    found = re.findall(r"Compiling entry function '\w+' for '(\w+)'", built[1])
    assert {target: found.count(target) for target in set(found)} == dict.fromkeys(
        TARGETS, KERNELS
    )


@needs_nvcc
def test_no_kernel_spills_or_uses_local_memory(built):
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        built[1],
    )
    assert len(usage) >= len(TARGETS) * KERNELS
    assert set(usage) == {("0", "0", "0")}


@needs_nvcc
def test_two_thread_blocks_fit_on_a_processor(built):
    """A processor has 65,536 registers; a thread block at most 128 threads, of
    select_blocks 512 threads of at most 64 registers, by its launch bounds."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", built[1])]
    assert max(registers) <= 255
    assert "warning" not in built[1]


@needs_nvcc
def test_the_module_needs_torchs_cuda_library(built):
    """So the module cannot be loaded beside a torch without CUDA."""
    found = subprocess.check_output(["readelf", "-dW", built[0]], text=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", found)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not re.search("R(UN)?PATH", found)
    assert not [name for name in needed if "cudart" in name or "python" in name]


@needs_nvcc
def test_of_torch_it_uses_the_stable_abi_alone(built):
    found = subprocess.check_output(
        ["readelf", "--dyn-syms", "-W", built[0]], text=True
    )
    undefined = re.findall(r" UND (\w+)", found)
    assert "aoti_torch_get_current_cuda_stream" in undefined
    assert not [name for name in undefined if re.match("_ZNK?(2at|3c10|5torch)", name)]


LOAD = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
from tests.kernels.cuda.op_arguments import OPS, good_arguments
for op in OPS:
    try:
        getattr(torch.ops.tidal, op)(**good_arguments(op))
    except ValueError as error:
        print(error)
"""


@needs_nvcc
def test_the_module_loads_and_refuses_tensors_on_the_cpu(built, torch_with_cuda):
    stub = torch_with_cuda / "lib/libtorch_cuda.so"
    if (TORCH / "lib/libtorch_cuda.so").exists():
        stub = TORCH / "lib/libtorch_cuda.so"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(stub), str(built[0])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        "dense_decode: query.device is cpu; allowed: cuda",
        "score_blocks: query.device is cpu; allowed: cuda",
        "sparse_decode: query.device is cpu; allowed: cuda",
        "select_blocks: seq_lens.device is cpu; allowed: cuda",
    ], done.stderr


def line_of(done) -> str:
    return next(x for x in done.stdout.splitlines() if x.startswith("CUDA extension"))


def test_a_torch_without_cuda_builds_nothing(tmp_path):
    done = run_setup(tmp_path, "--version", TIDAL_BUILD_CUDA="auto")
    assert done.returncode == 0
    wanted = f"the torch in {tmp_path} is built without CUDA"
    if NO_NVCC:
        wanted = "nvcc is not found"
    assert line_of(done) == f"CUDA extension: not built: {wanted}"


@pytest.mark.parametrize("layout", ["cu13", "cuda_nvcc", None])
def test_finds_the_compiler_among_pythons_packages(monkeypatch, tmp_path, layout):
    """vLLM's requirements bring one, where neither PATH nor CUDA_HOME has any."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(cuda_build.sysconfig, "get_path", lambda name: str(tmp_path))
    if layout is not None:
        nvcc = tmp_path / "nvidia" / layout / "bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        assert find_nvcc() == str(nvcc)
        assert "nvidia-cuda-nvcc" not in cuda_build.how_to_build()
    else:
        assert find_nvcc() is None
        assert "install cmake nvidia-cuda-nvcc" in cuda_build.how_to_build()
    assert "TIDAL_BUILD_CUDA=1 " in cuda_build.how_to_build()


def test_no_compiler_builds_nothing(torch_with_cuda, tmp_path):
    found = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    done = run_setup(torch_with_cuda, "--no-packages", "--version", **found)
    assert line_of(done) == "CUDA extension: not built: nvcc is not found"


def test_the_switch_turns_it_off(torch_with_cuda):
    done = run_setup(torch_with_cuda, "--version", TIDAL_BUILD_CUDA="0")
    assert line_of(done) == "CUDA extension: not built: TIDAL_BUILD_CUDA=0"


@needs_nvcc
def test_the_switch_demands_it(tmp_path):
    done = run_setup(tmp_path, "--version", TIDAL_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "TIDAL_BUILD_CUDA=1, but the torch in" in done.stdout


def test_a_wrong_switch_is_refused(tmp_path):
    done = run_setup(tmp_path, "--version", TIDAL_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "TIDAL_BUILD_CUDA is 'yes'; allowed: auto, 0, 1" in done.stdout


def test_the_sources_travel_with_a_source_distribution():
    manifest = (ROOT / "MANIFEST.in").read_text().split()
    assert {"CMakeLists.txt", "csrc"} <= set(manifest)
