"""The pytest plug-in of GPU runs: which tests it picks, and what it keeps of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import records

pytestmark = pytest.mark.extended  # a newcomer has no GPU to run on

ROOT = Path(__file__).parents[3]
TESTS = """
import pytest

@pytest.mark.parametrize("kernels", ["triton", "cuda"])
@pytest.mark.parametrize("setup", [pytest.param(0, id="fp8, d128"), 1])
def test_of_a_fixture(kernels, setup):
    pass

@pytest.mark.parametrize("kernels_of_module", ["emulation", "gpu"])
def test_of_the_extension(kernels_of_module):
    assert kernels_of_module != "emulation"

def test_of_the_gpu_alone():
    pytest.skip("no GPU")
"""
WRONG = """
import pytest

@pytest.mark.parametrize("n", range(9))
def test_wrong(n):
    assert n < 0
"""


def run(folder: Path, tests: str, *words: str) -> tuple[int, dict[str, str], dict]:
    """Exit status, outcomes by test, and the counts of a run."""
    (folder / "test_it.py").write_text(tests)
    out = folder / "records.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.parity", "--maxfail=5"]
    command += ["--records", str(out), *words, "test_it.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    found = records.read(out)
    outcomes = {r["test"].split("::")[1]: r["outcome"] for r in found if "test" in r}
    return done.returncode, outcomes, found[-1] if found else {}


def test_the_tests_of_an_implementation(tmp_path):
    status, outcomes, counts = run(tmp_path, TESTS, "--implementation", "cuda")
    assert status == 0
    assert outcomes == {
        "test_of_a_fixture[fp8, d128-cuda]": "passed",
        "test_of_a_fixture[1-cuda]": "passed",
        "test_of_the_extension[gpu]": "passed",
        "test_of_the_gpu_alone": "skipped",
    }
    assert tuple(counts[f"num_{n}"] for n in ("passed", "failed", "skipped")) == (
        3,
        0,
        1,
    )


def test_some_set_ups(tmp_path):
    words = ["--implementation", "triton", "--setups"]
    status, outcomes, _ = run(tmp_path, TESTS, *words, json.dumps(["fp8, d128"]))
    assert (status, list(outcomes)) == (0, ["test_of_a_fixture[fp8, d128-triton]"])
    (tmp_path / "records.jsonl").unlink()
    status, outcomes, _ = run(tmp_path, TESTS, *words, json.dumps(["fp8, d12"]))
    assert (status, outcomes) == (pytest.ExitCode.USAGE_ERROR, {})


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["here", "two processes"])
def test_it_stops_after_five_failures(tmp_path, workers):
    status, outcomes, counts = run(tmp_path, WRONG, *workers)
    assert status != 0
    assert 5 <= counts["num_failed"] == len(outcomes) < 9


def test_what_was_skipped_has_not_passed(tmp_path):
    only = "import pytest\ndef test_it():\n    pytest.skip('no GPU')\n"
    assert run(tmp_path, only)[0] == pytest.ExitCode.NO_TESTS_COLLECTED
    assert run(tmp_path, only, "--rehearse")[0] == 0
