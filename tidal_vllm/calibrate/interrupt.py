"""Ctrl-C that is not lost."""

from __future__ import annotations

import signal
import threading


class Interrupts:
    """Remembers Ctrl-C while it is entered, for `check` to raise it once more.

    Python drops a KeyboardInterrupt that comes up in a finalizer or a callback of C
    code, of which an engine has many; the run would go on as if nothing had happened.
    """

    def __init__(self) -> None:
        self._seen = False

    def __enter__(self) -> Interrupts:
        # NOTE: Python lets only the main thread set handlers, and calls them there.
        self._ours = threading.current_thread() is threading.main_thread()
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one."""
        if self._seen:
            raise KeyboardInterrupt

    def _handle(self, *_) -> None:
        self._seen = True
        raise KeyboardInterrupt
