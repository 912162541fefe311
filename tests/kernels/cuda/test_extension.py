"""The extension as torch sees it, with the emulated device in place of CUDA's."""

import ast
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
from tests.kernels.cuda.emulator import CSRC, EMULATION, FLAGS, HERE, ROOT
from tests.kernels.cuda.op_arguments import ATTENDING, OPS
from tidal_vllm.kernels.arguments import DecodeOps

TORCH = Path(torch.__file__).parent
pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """What extension_child.py found in a package with an emulated _tidal_C.so."""
    site = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "tidal_vllm", site / "tidal_vllm", ignore=ignored)
    sources = [
        *(CSRC / "bindings.cpp", CSRC / "ops.cpp"),
        *(HERE / "host/emulated_device.cpp", *EMULATION),
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
    said = child["refusals"][name]
    assert re.match(f"ValueError: {op}: .*{message}", said), said


@pytest.mark.parametrize("op", OPS)
def test_the_functions_pass_a_refusal_on(child, op):
    said = child["refused_arguments"][op]
    assert said == f"{op}: lse.dtype is float16; allowed: float32"


@pytest.mark.parametrize("op", OPS)
def test_opcheck(child, op):
    """Schema, fake tensors and autograd registration, by torch itself."""
    found = child["opchecks"][op]
    assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("op", OPS)
def test_the_functions_agree_with_the_reference(child, op):
    allowed = {"output": 2**-7, "lse": 1e-5, "block_lse": 1e-5}
    found = child["agreement"][op]
    assert found and all(found[name] <= allowed.get(name, 0) for name in found), found


@pytest.mark.parametrize("op", OPS)
def test_the_rows_are_those_of_query(child, op):
    """The other tensors may have more."""
    assert child["longer_tensors"][op]


def test_a_cache_beyond_32_bit_offsets(child):
    assert child["far_blocks"] == dict.fromkeys(ATTENDING, True)


def test_schemas_name_what_is_written(child):
    """The ops that attend share one schema; each refuses what it does not write."""
    writes = {
        op: re.findall(r"Tensor\(\w!\)\?? (\w+)", schema)
        for op, schema in child["schemas"].items()
    }
    scratch = ["partial_lse", "arrivals"]
    attend = ["lse", *scratch, "output", "partial_out", "block_lse"]
    assert writes == {
        **dict.fromkeys(ATTENDING, attend),
        "select_blocks": [
            *("topk_blocks", "topk_lens", "mass", "arrivals", "digit_counts")
        ],
    }
    schemas = {child["schemas"][op].partition("(")[2] for op in ATTENDING}
    assert len(schemas) == 1


def test_occupancy(child):
    """Here of a GPU that is not there: threads and shared memory alone are known."""
    found = child["occupancies"]
    numbers = {name: use for name, use in found.items() if isinstance(use, list)}
    assert numbers.keys() == {*OPS, "fp8"}
    assert all(len(use) == 8 and use[1] > 0 and use[3] > 0 for use in numbers.values())
    assert numbers["fp8"][3] < numbers["dense_decode"][3]
    assert {name: use for name, use in found.items() if name not in numbers} == {
        "no op": "occupancy: op is merge_splits; allowed: dense_decode, score_blocks, "
        "sparse_decode or select_blocks",
        "dtype": "occupancy: dtype is float32; allowed: bfloat16 or float16",
        "kv_cache_dtype": "occupancy: kv_cache_dtype is float16; allowed: bfloat16 or "
        "float8_e4m3fn",
        "head_size": "occupancy: head_size is 80; allowed: 64, 96, 128 or 256",
        "device_index": "occupancy: device_index is -1; allowed: 0 or more",
    }


def test_the_driver_is_asked_about_every_kernel(child):
    assert child["can_run"] == ["", ""]


def test_without_the_extension_the_import_says_so():
    lines = "import tidal_vllm.kernels.cuda"
    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=120
    )
    if (ROOT / "tidal_vllm/_tidal_C.so").exists():
        pytest.skip("the extension is built here")
    assert "ImportError: _tidal_C.so is not in" in done.stderr


def test_the_module_has_the_functions_of_the_ops_and_one_more():
    """Read, not imported: the library is not here."""
    tree = ast.parse((ROOT / "tidal_vllm/kernels/cuda.py").read_text())
    found = {
        node.name: [argument.arg for argument in node.args.args]
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    wanted = {
        op: list(inspect.signature(getattr(DecodeOps, op)).parameters) for op in OPS
    }
    assert found.pop("cannot_run") == ["needed"]
    assert {op: ["self", *names] for op, names in found.items()} == wanted
