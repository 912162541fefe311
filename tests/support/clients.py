"""Clients of every kind at once, to be there when a server is told to end."""

import json
import select
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from tests.support.server import Server, wait_until

NUM_STREAMS, NUM_PLAIN = 4, 8  # together more than the server runs at once
UNREAD = 2_000_000  # tokens, whose text is more than the buffers of a socket hold
ENDLESS = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}


class Clients:
    """Streams, requests that wait, and clients that neither read nor finish.

    Args:
        prompt: Text of the requests; their answers fill the model's context.
    """

    def __init__(
        self, server: Server, model: str, prompt: str, max_tokens: int
    ) -> None:
        def ask(stream: bool) -> Any:
            return server.client.completions.create(
                model=model,
                prompt=prompt,
                stream=stream,
                max_tokens=max_tokens,
                **ENDLESS,
            )

        self._streams = [ask(True) for _ in range(NUM_STREAMS)]
        for stream in self._streams:
            next(stream)
        pool = ThreadPoolExecutor(NUM_PLAIN)
        self._plain = [pool.submit(ask, False) for _ in range(NUM_PLAIN)]
        pool.shutdown(wait=False)
        silent, half, deaf = self._sockets = [socket.socket() for _ in range(3)]
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        address = urlsplit(server.url)
        for connection in self._sockets:
            connection.connect((address.hostname, address.port))
        half.sendall(_post("/v1/completions", b"{}")[:-1])
        deaf.sendall(
            _post("/detokenize", json.dumps({"tokens": [5] * UNREAD}).encode())
        )
        select.select([deaf], [], [])
        wait_until("requests wait", lambda: server.metric("num_requests_waiting") > 0)

    def finish_reasons(self) -> list[str]:
        """How each answer ended: streams, then plain ones."""
        chunks = [list(stream)[-1] for stream in self._streams]
        answers = chunks + [answer.result() for answer in self._plain]
        return [answer.choices[0].finish_reason for answer in answers]

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: me\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
