"""The extension as torch sees it, with the emulated device in place of CUDA's."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.bad_inputs import BAD_INPUTS
from tests.kernels.cuda.emulator import CSRC, FLAGS, HERE, ROOT
from tidal_vllm.kernels import reference

TORCH = Path(torch.__file__).parent
pytestmark = pytest.mark.extended
OPS = ("dense_decode", "score_blocks", "sparse_decode", "select_blocks")


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """What extension_child.py found in a package with an emulated _tidal_C.so."""
    site = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "tidal_vllm", site / "tidal_vllm", ignore=ignored)
    sources = [
        *(CSRC / "bindings.cpp", CSRC / "ops.cpp"),
        *(HERE / "host/emulated_device.cpp", HERE / "host/emulation.cpp"),
    ]
    flags = [*(f for f in FLAGS if "std" not in f), "-std=c++20", "-O0", "-fPIC"]
    flags += ["-shared", "-DTORCH_TARGET_VERSION=0x020B000000000000ULL"]
    folders = [f"-I{CSRC}", f"-I{HERE / 'host'}", "-isystem", str(TORCH / "include")]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    to = site / "tidal_vllm/_tidal_C.so"
    command = ["g++", *flags, *folders, *map(str, sources), "-o", str(to), *libraries]
    subprocess.run(command, check=True)
    path = os.pathsep.join((str(site), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cuda.extension_child"],
        capture_output=True,
        text=True,
        cwd=site,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["path"].startswith(str(site))
    return found


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_it_refuses(child, name):
    op, _, message = BAD_INPUTS[name]
    assert re.match(f"ValueError: {op}: .*{message}", child["refusals"][name]), child[
        "refusals"
    ][name]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(child, op):
    """Schema, fake tensors and autograd registration, by torch itself."""
    found = child["opchecks"][op]
    assert set(found.values()) == {"SUCCESS"}, found


def test_one_step_agrees_with_the_reference(child):
    found = child["agreement"]
    assert found["dense output"] <= 2**-7
    assert found["sparse output"] <= 2**-7
    assert found["lse"] <= 1e-5
    assert found["block_lse"] <= 1e-5
    assert found["scores"] == found["chosen blocks"] == found["padded row"] == 0


def test_a_cache_beyond_32_bit_offsets(child):
    assert child["far_blocks"] == dict.fromkeys(OPS[:3], True)


def test_schemas_name_what_is_written(child):
    writes = {
        op: re.findall(r"Tensor\(\w!\)\?? (\w+)", schema)
        for op, schema in child["schemas"].items()
    }
    partial = ["partial_out", "partial_lse"]
    assert writes == {
        "dense_decode": ["output", "lse", "block_lse", *partial],
        "score_blocks": ["lse", "block_lse", "partial_lse"],
        "sparse_decode": ["output", "lse", *partial],
        "select_blocks": ["topk_blocks", "topk_lens", "mass"],
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("good", ""),
        ("fp8", ""),
        ("nothing selected", ""),
        ("fp32", "dtype = torch.float32: allowed torch.bfloat16, torch.float16"),
        ("head size", "head_size = 80: allowed 64, 96, 128, 256"),
        ("cache", "kv_cache_dtype = float16 beside torch.bfloat16: allowed 'auto'"),
        ("block", "select_block_size = 24: allowed 1, 2, 4, 8 and multiples of 16"),
        ("Turing", "compute capability 7.5: allowed 8.0 and above"),
    ],
)
def test_it_says_what_it_does_not_cover(child, name, reason):
    found = child["doubts"][name]
    assert found.startswith(reason) if reason else found == ""


def test_without_the_extension_the_import_says_so():
    lines = "import tidal_vllm.kernels.cuda"
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=120
    )
    if (ROOT / "tidal_vllm/_tidal_C.so").exists():
        pytest.skip("the extension is built here")
    assert "ImportError: _tidal_C.so is not in" in done.stderr


def test_the_python_functions_take_the_inputs_of_the_reference():
    """In the same order, before what the kernels add."""
    tree = (ROOT / "tidal_vllm/kernels/cuda.py").read_text()
    for op in OPS:
        wanted = [
            name
            for name, p in inspect.signature(getattr(reference, op)).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        head = tree.split(f"def {op}(")[1].split(")")[0]
        assert re.findall(r"(\w+):", head)[: len(wanted)] == wanted
