"""`LLM(...)` in a plain script, its engine in a spawned process: output and ending."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import warnings

# The script waits for its engine to end, and warns where a busy machine lets it wait.
pytestmark = pytest.mark.serial

SCRIPT = Path(__file__).parents[1] / "support" / "ask_offline.py"


@pytest.fixture(scope="module")
def output(served) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, served.folder],
        # vLLM's 5 seconds for the engine's end are for machines that are not busy.
        env=os.environ | {"VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_answers_exactly(output):
    assert re.findall(r"^exact: (.+)$", output, re.M) == ["True"] * 3


def test_decodes_sparsely(output):
    assert int(re.search(r"^sparse steps: (.+)$", output, re.M)[1]) > 0


def test_beam_search_is_dense(output):
    """As the README says of it; the planted answer is the likeliest beam."""
    assert "exact by beam search: True" in output
    assert "sparse steps of beam search: 0" in output


def test_the_engine_has_its_own_process(output):
    assert re.search(r"\(EngineCore pid=\d+\) .*TIDAL sparse decoding of", output)


def test_prints_the_plan_once(output):
    assert output.count("TIDAL sparse decoding of") == 1


def test_warns_of_nothing(output):
    assert warnings(output) == []
