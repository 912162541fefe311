"""The extension is built for every target, beside any torch; no kernel spills."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.emulator import ROOT
from tidal_vllm.extension import BuildRecord, digest_of_sources, read_record
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
    """A folder of packages: this torch, with a stub in place of its CUDA library."""
    folder = tmp_path_factory.mktemp("packages")
    lib = folder / "torch/lib"
    lib.mkdir(parents=True)
    (folder / "torch/include").symlink_to(TORCH / "include")
    name = "libtorch_cuda.so"
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", f"-Wl,-soname,{name}"]
    subprocess.run([*command, "-o", str(lib / name)], input=STUB, text=True, check=True)
    return folder


def run_setup(packages, *arguments, **environment):
    """Run setup.py where Python's packages are those of a folder."""
    return subprocess.run(
        [sys.executable, str(CHILD), str(packages), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        timeout=840,
    )


@needs_nvcc
def test_every_kernel_is_built_for_every_target(made):
    found = re.findall(r"Compiling entry function '\w+' for '(\w+)'", made.log)
    assert {target: found.count(target) for target in set(found)} == dict.fromkeys(
        TARGETS, KERNELS
    )


@needs_nvcc
def test_no_kernel_spills_or_uses_local_memory(made):
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        made.log,
    )
    assert len(usage) >= len(TARGETS) * KERNELS
    assert set(usage) == {("0", "0", "0")}


@needs_nvcc
def test_two_thread_blocks_fit_on_a_processor(made):
    """A processor has 65,536 registers; a thread block at most 128 threads, of
    select_blocks 512 threads of at most 64 registers, by its launch bounds."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", made.log)]
    assert max(registers) <= 255
    of_compilers = r".*(?:csrc/\S*: |ptxas |nvcc )warning.*"
    assert not re.findall(of_compilers, made.log)


@needs_nvcc
def test_the_module_needs_torchs_cuda_library(made):
    """So the module cannot be loaded beside a torch without CUDA."""
    found = subprocess.check_output(["readelf", "-dW", made.module], text=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", found)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not re.search("R(UN)?PATH", found)
    assert not [name for name in needed if "cudart" in name or "python" in name]


@needs_nvcc
def test_of_torch_it_uses_the_stable_abi_alone(made):
    found = subprocess.check_output(
        ["readelf", "--dyn-syms", "-W", made.module], text=True
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
def test_the_module_loads_and_refuses_tensors_on_the_cpu(made, torch_with_cuda):
    stub = torch_with_cuda / "torch/lib/libtorch_cuda.so"
    if (TORCH / "lib/libtorch_cuda.so").exists():
        stub = TORCH / "lib/libtorch_cuda.so"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(stub), str(made.module)],
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


@needs_nvcc
def test_the_module_says_what_it_was_made_of(made):
    """Read without loading it; the digest is computed by CMake, and here."""
    nvcc = subprocess.check_output([find_nvcc(), "--version"], text=True)
    assert read_record(made.module) == BuildRecord(
        targets=TARGETS,
        ptx="compute_80",
        nvcc=re.search(r"V([\d.]+)", nvcc)[1],
        torch_abi="2.11",
        sources=digest_of_sources(ROOT),
    )


def line_of(done) -> str:
    return next(x for x in done.stdout.splitlines() if x.startswith("CUDA extension"))


def headers(packages: Path) -> Path:
    """The part of a torch without CUDA that a build needs, in a folder of packages."""
    (packages / "torch").mkdir()
    (packages / "torch/include").symlink_to(TORCH / "include")
    return packages


@needs_nvcc
def test_beside_a_torch_without_cuda_it_is_built_on_demand(tmp_path):
    packages = headers(tmp_path)
    done = run_setup(packages, "--version", TIDAL_BUILD_CUDA="auto")
    reason = f"the torch in {packages / 'torch'} is built without CUDA"
    assert line_of(done).startswith(f"CUDA extension: not built: {reason}; TIDAL_")
    done = run_setup(packages, "--version", TIDAL_BUILD_CUDA="1")
    assert "torch's headers are here (TIDAL_BUILD_CUDA=1)" in line_of(done)


@pytest.mark.parametrize("layout", ["cu13", "cuda_nvcc", None])
def test_finds_the_compiler_among_pythons_packages(monkeypatch, tmp_path, layout):
    """vLLM's requirements bring one, where neither PATH nor CUDA_HOME has any."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(cuda_build, "_packages", lambda: [tmp_path])
    if layout is not None:
        nvcc = tmp_path / "nvidia" / layout / "bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        assert find_nvcc() == str(nvcc)
    else:
        assert find_nvcc() is None


def test_no_compiler_builds_nothing(torch_with_cuda, tmp_path):
    found = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    done = run_setup(torch_with_cuda, "--version", **found)
    assert line_of(done) == "CUDA extension: not built: nvcc is not found"


def test_the_switch_turns_it_off(torch_with_cuda):
    done = run_setup(torch_with_cuda, "--version", TIDAL_BUILD_CUDA="0")
    assert line_of(done) == "CUDA extension: not built: TIDAL_BUILD_CUDA=0"


def test_the_switch_demands_it_of_a_build_alone(tmp_path):
    """An sdist is made anywhere; an isolated build says what it does not see."""
    done = run_setup(tmp_path, "--version", TIDAL_BUILD_CUDA="1")
    assert done.returncode == 0
    assert "torch is not installed for" in line_of(done)
    done = run_setup(tmp_path, "build_ext", TIDAL_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "TIDAL_BUILD_CUDA=1, but torch is not installed" in done.stdout


def test_a_torch_before_the_stable_abi(tmp_path):
    (tmp_path / "torch/include").mkdir(parents=True)
    done = run_setup(tmp_path, "--version")
    assert line_of(done).endswith(
        f"the torch in {tmp_path / 'torch'} is older than 2.11"
    )


def test_a_wrong_switch_is_refused(tmp_path):
    done = run_setup(tmp_path, "--version", TIDAL_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "TIDAL_BUILD_CUDA is 'yes'; allowed: auto, 0, 1" in done.stdout


def test_an_isolated_build_requires_what_it_does_not_find(torch_with_cuda, tmp_path):
    """Only where the kernels are demanded; what is at hand is not fetched."""

    def required(packages, switch):
        hidden = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
        done = run_setup(packages, "requires", TIDAL_BUILD_CUDA=switch, **hidden)
        return ast.literal_eval(done.stdout.splitlines()[-1])

    found = required(tmp_path, "1")
    names = ["torch>=2.11", "cmake>=3.18", "nvidia-cuda-nvcc==13.0.*"]
    assert [name for name in names if name in found] == names
    assert len(found) == 3 + len(cuda_build.NVCC_PACKAGES)
    assert "torch>=2.11" not in required(torch_with_cuda, "1")
    assert required(tmp_path, "auto") == ["setuptools'"]
