"""Without a GPU: the oracle of parity/test_xformers.py under Triton's interpreter.

`compat`, since not every supported vLLM comes with a Triton that xformers runs on;
elsewhere the test is skipped, and says so.
"""

import os
import subprocess
import sys

import pytest

from tests.kernels.conftest import HAS_GPU, INTERPRETED
from tests.support.processes import INTERPRETER, ROOT


@pytest.mark.extended
@pytest.mark.compat
@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the file itself runs here")
def test_xformers_agrees_with_our_kernels():
    pytest.importorskip("xformers")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-rs", "--tb=short"]
    command += ["-p", "no:cacheprovider", "tests/kernels/parity/test_xformers.py"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | INTERPRETER | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip(done.stdout.partition("SKIPPED ")[2].partition("\n")[0])
