"""Without a GPU: the parity tests under Triton's interpreter, in a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED

ROOT = Path(__file__).parents[2]
TIERS = [
    pytest.param("not extended", id="representative"),
    pytest.param("extended", id="the rest", marks=pytest.mark.extended),
]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("tier", TIERS)
def test_parity(tier):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", tier]
    command += ["-p", "no:cacheprovider", "tests/kernels/parity"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 20, done.stdout[-2000:]
