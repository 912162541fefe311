"""SIGTERM, as containers send it: to a server that is busy, and to one that starts."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import uvicorn
import zmq

from tests.support.clients import NUM_PLAIN, NUM_STREAMS, Clients
from tests.support.processes import child_environment
from tests.support.server import HOST, START_S, Server, command, wait_until, warnings
from tidal_vllm.cpu import shutdown
from tidal_vllm.planted import make_prompt

TIDAL = {"token_budget": 256}
MAX_LEN = 2048
NO_PROFILE = "no profile knows this model: starting with the safest roles"


@pytest.fixture
def start(served, tmp_path) -> Iterator:
    """`start(**env)`: a server of two tensor-parallel ranks, not yet up."""
    arguments = ["--max-model-len", MAX_LEN, "--served-model-name", "planted"]
    arguments += ["--tensor-parallel-size", 2]
    servers = []

    def create(**env: str) -> Server:
        words = command(served.folder, TIDAL, *arguments)
        servers.append(Server(tmp_path / "log", words, **env))
        return servers[-1]

    yield create
    for server in servers:
        server.kill()


@pytest.mark.extended
@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
def test_a_busy_server(start, served, again):
    """Ends all requests, and has nothing to say but that no profile is known, once.

    What kept it from ending was a race: so twice, beside Ctrl-C in test_serve.py.
    """
    # vLLM's 5 seconds for its workers are for machines that are not busy.
    server = start(VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS="100")
    server.wait_for_start()
    text = make_prompt(served.spec, 300, 0.5, seed=5).text
    clients = Clients(server, "planted", text, MAX_LEN - 300)
    assert server.terminate() == 0
    assert clients.finish_reasons() == ["abort"] * (NUM_STREAMS + NUM_PLAIN)
    wait_until("all its processes end", lambda: not server.processes())
    clients.close()
    found = warnings(server.log.read_text())
    assert [NO_PROFILE in line for line in found] == [True], found


@pytest.mark.extended
def test_a_server_that_starts(start):
    server = start()
    log = server.log
    wait_until("its engine starts", lambda: "V1 LLM engine" in log.read_text(), START_S)
    assert server.terminate() == 128 + signal.SIGTERM
    wait_until("all its processes end", lambda: not server.processes())
    assert "Traceback" not in log.read_text()


def test_a_second_signal_does_not_kill_an_engine_that_is_ending():
    """As an engine ends: its handlers are gone, and Python has yet to finish."""
    ending = """
import multiprocessing, os, signal
from vllm.v1.engine.utils import SignalCallback
from tidal_vllm.plugin import register
multiprocessing.current_process().name = "EngineCore"
register()
callback = SignalCallback(print)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
callback.stop()
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", ending], env=child_environment())
    assert done.returncode == 0


def test_an_interrupt_while_an_engine_starts_is_not_dropped():
    from vllm.v1.engine import utils

    shutdown.install()
    with (
        pytest.raises(KeyboardInterrupt),
        utils.zmq_socket_ctx("inproc://start", zmq.ROUTER, bind=True),
    ):
        raise KeyboardInterrupt


def test_a_second_signal_lets_clients_go_at_once(monkeypatch):
    from vllm.entrypoints.launchers import launcher

    monkeypatch.setattr(shutdown, "CLIENT_S", 1e6)
    monkeypatch.setattr(launcher.NoSignalServer, "shutdown", uvicorn.Server.shutdown)
    shutdown._let_clients_go()

    async def run() -> None:
        asked = asyncio.Event()

        async def app(scope, receive, send) -> None:
            asked.set()
            while (await receive())["type"] != "http.disconnect":
                pass

        config = uvicorn.Config(app, host=HOST, port=0, lifespan="off")
        server = launcher.NoSignalServer(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        _, client = await asyncio.open_connection(*address)
        client.write(b"POST / HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\n{")
        await asked.wait()
        server.should_exit = True
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await serving

    asyncio.run(asyncio.wait_for(run(), 300))
