"""An orderly end of `vllm serve`: every stream ends, every client is let go.

In vLLM 0.32 and 0.33 a signal kills the engine, closes the sockets, whose reader
then reports the engine's death to all open requests, and cancels that reader. The
last two race: a reader that is cancelled first leaves its requests open, and the
HTTP server waits for them for good, as it does for clients that stopped reading.
A reader that wins logs the orderly end as an error (vLLM issue 48745).

Changes vLLM at run time: `AsyncLLM.shutdown`, `AsyncMPClient.get_output_async`,
`zmq_socket_ctx` where an engine is waited for, `NoSignalServer.shutdown`, the handlers
of SIGINT and SIGTERM, `SignalCallback.stop` in the engine's process, and a thread there
that watches its parent.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from vllm import envs
from vllm.logger import init_logger

if TYPE_CHECKING:
    import uvicorn
    from vllm.v1.engine.async_llm import AsyncLLM

logger = init_logger("vllm.tidal.shutdown")

ENGINE_S = 30.0  # for the step in progress, and Python's own end
WATCH = "tidal-watch-parent"  # a thread
CLIENT_S = 5.0  # for clients to read what they were sent


def install() -> None:
    """End servers of this process in order; more than once is once."""
    from vllm.utils.async_utils import run_in_loop
    from vllm.v1.engine import utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    _end_at_start_too()
    end_with_parent()
    stock_shutdown = AsyncLLM.shutdown
    stock_output = AsyncMPClient.get_output_async
    if hasattr(stock_shutdown, "is_orderly"):
        return

    def shutdown(self, timeout: float | None = None) -> None:
        # NOTE: also called by the finalizer of an engine that never started.
        if client := getattr(self, "engine_core", None):
            client.is_ending = True
        _let_clients_go()
        # NOTE: 0 is for the requests, which the engine aborts at once; vLLM's process
        # manager takes it for the engine too, and kills it in mid-step.
        if timeout == 0:
            timeout = ENGINE_S + envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS
        stock_shutdown(self, timeout=timeout)
        if reader := getattr(self, "output_handler", None):
            run_in_loop(reader.get_loop(), _end_requests, self)
        # NOTE: a server freezes its heap; Triton would call what stays there leaked.
        gc.unfreeze()

    async def get_output_async(self):
        try:
            return await stock_output(self)
        except EngineDeadError:
            if getattr(self, "is_ending", False):
                raise asyncio.CancelledError from None  # as the reader's stock end
            raise

    stock_context = utils.zmq_socket_ctx

    @contextlib.contextmanager
    def zmq_socket_ctx(*args, **kwargs):
        # NOTE: the stock one drops a KeyboardInterrupt of its body, which is the wait
        # for an engine to start.
        dropped = None
        with stock_context(*args, **kwargs) as opened:
            try:
                yield opened
            except KeyboardInterrupt as error:
                dropped = error
        if dropped is not None:
            raise dropped

    utils.zmq_socket_ctx = zmq_socket_ctx
    shutdown.is_orderly = True
    AsyncLLM.shutdown = shutdown
    AsyncMPClient.get_output_async = get_output_async


def end_with_parent() -> None:
    """In an engine's own process: end when whoever started it is gone.

    vLLM's engine would stay, with the model's memory, after a script that was killed.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not _is_engine():
        return
    if WATCH in [thread.name for thread in threading.enumerate()]:
        return  # not so in a forked process

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ENGINE_S)  # while the engine ends, that signal counts for nothing
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name=WATCH, daemon=True).start()


def end_once() -> None:
    """In an engine's own process: no signal disturbs an end that has begun.

    A Ctrl-C reaches the engine too, and then the server sends it a SIGTERM. vLLM is
    back to the default handlers when it lets go of the engine: that signal would kill
    Python in mid-end, which then reports leaked semaphores.
    """
    utils = sys.modules.get("vllm.v1.engine.utils")
    if utils is None or not _is_engine():
        return
    stock = utils.SignalCallback.stop
    if hasattr(stock, "ends_once"):
        return

    def stop(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        stock(self)

    stop.ends_once = True
    utils.SignalCallback.stop = stop


def _is_engine() -> bool:
    return multiprocessing.current_process().name.startswith("EngineCore")


def _end_at_start_too() -> None:
    """Let a server end while it waits for its engine to start.

    NOTE: asyncio leaves a SIGINT until that is over, and the KeyboardInterrupt that
    vLLM makes of a SIGTERM would leave a traceback.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if getattr(handler, "__name__", None) == "_interrupt_init":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _exit)


def _exit(number: int, _) -> None:
    raise SystemExit(128 + number)


def _end_requests(engine: "AsyncLLM") -> None:
    """Give what is still open the finish reason "abort"."""
    processor = engine.output_processor
    processor.abort_requests(list(processor.request_states), internal=True)


def _let_clients_go() -> None:
    """Bound how long vLLM's HTTP server waits for its clients when it ends."""
    launcher = sys.modules.get("vllm.entrypoints.launchers.launcher")
    if launcher is None:  # an engine without a server
        return
    stock = launcher.NoSignalServer.shutdown
    if hasattr(stock, "lets_go"):
        return

    async def shutdown(self, sockets=None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(CLIENT_S, _disconnect, self)
        # NOTE: vLLM's handlers ignore a second signal, whatever its log promises.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, partial(_disconnect, self))
        try:
            await stock(self, sockets)
        finally:
            timer.cancel()

    shutdown.lets_go = True
    launcher.NoSignalServer.shutdown = shutdown


def _disconnect(server: "uvicorn.Server") -> None:
    connections = list(server.server_state.connections)
    logger.info("Closing the connections of %d clients", len(connections))
    for connection in connections:
        # NOTE: uvloop wakes the answer in progress before it tells of the end.
        if (cycle := getattr(connection, "cycle", None)) is not None:
            cycle.disconnected = True
        connection.transport.abort()
