"""`vllm serve` with a mistake: ends with the reason, before it starts an engine."""

import subprocess

import pytest

from tests.support.server import command

pytestmark = pytest.mark.extended


def test_a_mistake_ends_the_server_with_the_reason(served):
    done = subprocess.run(
        command(served.folder, {"token_budget": 502}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "tidal.token_budget = 502: must be a positive multiple of" in done.stdout
    assert "EngineCore" not in done.stdout
