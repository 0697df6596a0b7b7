"""Ctrl-C and SIGTERM: an orderly end of what runs, and at once where nothing does yet.

An exception that a signal's handler raises within an import may be lost, be taken for
an error of the import, or abort the process where the import is one of C++.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
_ENDS = {
    signal.SIGINT: (b"m3jax: interrupted\n", INTERRUPTED),
    signal.SIGTERM: (b"m3jax: terminated\n", TERMINATED),
}
_SOON = 0.01  # seconds
Handler = Callable[[int, FrameType | None], None]


class Terminated(BaseException):
    """SIGTERM arrived."""


def leave(signum: int, frame: FrameType | None = None) -> None:
    """A handler: says why in one line, and ends the process without any cleaning up."""
    line, code = _ENDS[signal.Signals(signum)]
    os.write(2, line)
    os._exit(code)


def stop(signum: int, frame: FrameType | None) -> None:
    """A handler: raises KeyboardInterrupt or Terminated; leaves from an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            leave(signum)
        frame = frame.f_back
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Has a handler for both signals; what the parent had ignored stays so.

    Where Python drops what the handler raises (in a finalizer, or in JAX's callback of
    the garbage collection), the signal is sent once more.
    """
    before = {number: signal.getsignal(number) for number in _ENDS}
    report = sys.unraisablehook

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt | Terminated):
            interrupted = issubclass(dropped.exc_type, KeyboardInterrupt)
            number = signal.SIGINT if interrupted else signal.SIGTERM
            # By a thread: here, what the handler raises would be dropped as well.
            threading.Timer(_SOON, os.kill, (os.getpid(), number)).start()
        else:
            report(dropped)

    try:
        for number, old in before.items():
            if old is not signal.SIG_IGN:
                signal.signal(number, handler)
        sys.unraisablehook = again
        yield
    finally:
        sys.unraisablehook = report
        for number, old in before.items():
            signal.signal(number, old)
