"""SIGTERM, as containers send it: to a server that is busy, and to one that starts."""

import signal
from collections.abc import Iterator

import pytest

from tidal_vllm.planted import make_prompt

from .clients import NUM_PLAIN, NUM_STREAMS, Clients
from .server import START_S, Server, command, wait_until, warnings

TIDAL = {"token_budget": 256}
MAX_LEN = 2048
NO_PROFILE = "no profile knows this model: starting with the safest roles"


@pytest.fixture
def start(planted, tmp_path) -> Iterator:
    """`start(**env)`: a server of two tensor-parallel ranks, not yet up."""
    arguments = ["--max-model-len", MAX_LEN, "--served-model-name", "planted"]
    arguments += ["--tensor-parallel-size", 2]
    servers = []

    def create(**env: str) -> Server:
        words = command(planted.folder, TIDAL, *arguments)
        servers.append(Server(tmp_path / "log", words, **env))
        return servers[-1]

    yield create
    for server in servers:
        server.kill()


def test_a_busy_server(start, planted):
    """Ends all requests, and has nothing to say but that no profile is known, once."""
    # vLLM's 5 seconds for its workers are for machines that are not busy.
    server = start(VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS="100")
    server.wait_for_start()
    text = make_prompt(planted.spec, 300, 0.5, seed=5).text
    clients = Clients(server, "planted", text, MAX_LEN - 300)
    assert server.terminate() == 0
    assert clients.finish_reasons() == ["abort"] * (NUM_STREAMS + NUM_PLAIN)
    wait_until("all its processes end", lambda: not server.processes())
    clients.close()
    (warning,) = warnings(server.log.read_text())
    assert NO_PROFILE in warning


def test_a_server_that_starts(start):
    server = start()
    log = server.log
    wait_until("its engine starts", lambda: "V1 LLM engine" in log.read_text(), START_S)
    assert server.terminate() == 128 + signal.SIGTERM
    wait_until("all its processes end", lambda: not server.processes())
    assert "Traceback" not in log.read_text()
