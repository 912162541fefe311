"""`vllm serve` as users start it: a process, its log, a port."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai

from tests.support.processes import living
from tidal_vllm.engine.metrics import COUNTING_WORKER

VLLM = Path(sys.executable).with_name("vllm")
START_S, STOP_S = 500, 200
HOST = "127.0.0.1"


def command(model: Path, tidal: dict, *arguments: str | int) -> list[str]:
    """`vllm serve` with TIDAL and a small KV cache."""
    given = {
        "--attention-backend": "tidal",
        "--additional-config": json.dumps({"tidal": tidal}),
        "--worker-extension-cls": COUNTING_WORKER,
        "--kv-cache-memory-bytes": 1 << 28,
        "--max-num-seqs": 8,
        "--host": HOST,
    }
    words = [word for pair in given.items() for word in pair]
    return [str(word) for word in (VLLM, "serve", model, *words, *arguments)]


def warnings(log: str) -> list[str]:
    """Lines that ask for attention, but for the one on this machine's ulimit."""
    lines = re.findall(
        r"^.*(?:WARN|ERROR|CRITICAL|Warning|Traceback|leaked).*$", log, re.M
    )
    return [line for line in lines if "Found ulimit of" not in line]


def wait_until(what: str, true: Callable[[], bool], timeout: float = STOP_S) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.2)


class Server:
    """A running server."""

    def __init__(self, log: Path, words: list[str], **env: str) -> None:
        # A free port, which nobody else is given while this socket is bound to it;
        # the server may bind it too, for both allow it and this one does not listen.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind((HOST, 0))
        port = self._port.getsockname()[1]
        self.log, self.url = log, f"http://{HOST}:{port}"
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [*words, "--port", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | env,
                start_new_session=True,
            )

    def wait_for_start(self) -> None:
        wait_until("server starts", self._is_up, START_S)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=400
        )

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return self._get("/health") == ""
        except OSError:
            return False

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=200) as reply:
            return reply.read().decode()

    def metric(self, name: str) -> float:
        """A gauge or counter of vLLM's, summed over its labels."""
        lines = re.findall(rf"^vllm:{name}{{.*}} (.+)$", self._get("/metrics"), re.M)
        assert lines, name
        return sum(map(float, lines))

    def counters(self) -> dict[str, int]:
        """TIDAL's counters in the engine's worker (a development route of vLLM's)."""
        body = json.dumps({"method": "decode_counters"}).encode()
        request = urllib.request.Request(
            f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=200) as reply:
            return json.load(reply)["results"][0]

    def is_idle(self) -> bool:
        return self.metric("num_requests_running") == 0

    def press_ctrl_c(self) -> int:
        """The exit code. A terminal sends SIGINT to every process of the job."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_S)

    def terminate(self) -> int:
        """The exit code. `kill` and containers send SIGTERM to the server alone."""
        self.process.terminate()
        return self.process.wait(STOP_S)

    def processes(self) -> list[int]:
        """The server and all that it started, as far as they live."""
        return living(self.process.pid)

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(STOP_S)
        self._port.close()
