"""The laws of the ops under the other instruction sets that this processor has.

Each has vectors of another width, so sums in another order, and exponentials of its
own; a bound that holds on one of them only is found here, not on someone's machine.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
# What PyTorch, MKL and oneDNN call them; the best comes last.
SETS = {
    "DEFAULT": ("default", "SSE4_2", "SSE41"),
    "AVX2": ("avx2", "AVX2", "AVX2"),
    "AVX512": ("avx512", "AVX512", "AVX512_CORE"),
}
CORE = (
    "(loops or all_blocks or order_of_blocks or merge or real_tile or long_context "
    "or both_kernels or chunks_of_a_prefill) and not (extend and loops)"
)
here = torch.backends.cpu.get_cpu_capability()


@pytest.mark.extended
@pytest.mark.parametrize("name", SETS)
def test_the_laws_hold(name):
    if here not in SETS or name == here:
        pytest.skip("what this process runs on")
    if list(SETS).index(name) > list(SETS).index(here):
        pytest.skip(f"this processor has {here}")
    keys = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
    told = dict(zip(keys, SETS[name], strict=True))
    seen = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    run = [
        sys.executable,
        "-c",
        f"{seen}; import sys, pytest; sys.exit(pytest.main())",
        "-q",
    ]
    run += ["-p", "no:cacheprovider", "-k", CORE, "tests/kernels/reference"]
    done = subprocess.run(
        run,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **told, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith(name), done.stdout[-8000:] + done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-8000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 15, done.stdout[-2000:]
