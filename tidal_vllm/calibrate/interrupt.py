"""Ctrl-C and SIGTERM that are not lost."""

from __future__ import annotations

import signal
import threading


class Interrupts:
    """Makes SIGINT and SIGTERM a KeyboardInterrupt, which `check` raises once more.

    Python drops a KeyboardInterrupt that comes up in a finalizer or a callback of C
    code, of which an engine has many; the run would go on as if nothing had happened.
    A signal that this process was started to ignore, as SIGINT in a background job,
    stays ignored.

    Attributes:
        signum: The signal that came, if any.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> Interrupts:
        # NOTE: Python lets only the main thread set handlers, and calls them there.
        may_handle = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if may_handle else ()
        self._before = {
            number: signal.signal(number, self._handle)
            for number in numbers
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one."""
        if self.signum is not None:
            raise KeyboardInterrupt

    def exit_code(self) -> int:
        """What a shell expects of a program that a signal stopped."""
        return 128 + (self.signum or signal.SIGINT)

    def _handle(self, number: int, _: object) -> None:
        self.signum = number
        raise KeyboardInterrupt
