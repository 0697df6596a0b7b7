"""Writes that nobody waits for: a thread makes them, in the order they are handed over.

A disk takes one large write at a time about as fast as several, and a thread that
waits for its own computes nothing meanwhile. What is to be written is copied into one
of a few buffers, which are used again; who finds none free waits for the disk after
all.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

import numpy as np

# One is written while the others are filled or wait.
BUFFERS = 6


class Behind:
    """The thread, and its buffers.

    The first error ends the writing: what is handed over later is not done, and the
    error is raised to those who hand over more, and by `flush` and `close`.
    """

    def __init__(self, size: int, alignment: int):
        """`size`: bytes of a buffer; `alignment`: of its first one."""
        self._size, self._alignment = size, alignment
        self._free: list[np.ndarray | None] = [None] * BUFFERS  # made when needed
        self._tasks: collections.deque[tuple[Callable[[], None], np.ndarray | None]]
        self._tasks = collections.deque()
        self._undone = 0  # tasks that wait or are under way
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._changed = threading.Condition()

    def write(
        self,
        write: Callable[[np.ndarray, int], None],
        values: np.ndarray,
        offset: int,
    ) -> None:
        """Has bytes written by ``write(copy of them, offset)``.

        The copy starts as far behind a multiple of the alignment as the offset does;
        with that distance it must fit a buffer.

        Raises:
          OSError: an earlier write failed, or the system starts no more threads.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._failure)
            self._check()
            buffer = self._free.pop()
        if buffer is None:
            memory = np.empty(self._size + self._alignment, np.uint8)
            start = -memory.ctypes.data % self._alignment
            buffer = memory[start : start + self._size]
        phase = offset % self._alignment
        copy = buffer[phase : phase + len(values)]
        copy[:] = values
        with self._changed:
            self._put(lambda: write(copy, offset), buffer)

    def then(self, call: Callable[[], None]) -> None:
        """Calls when all that was handed over before is written; at once if it is.

        Raises:
          OSError: an earlier write failed.
        """
        with self._changed:
            self._check()
            if self._undone:
                self._put(call, None)
                return
        call()

    def flush(self) -> None:
        """Waits until all is written.

        Ctrl-C does not cut it short, and is raised at its end.

        Raises:
          OSError: a write failed.
        """
        interrupted: BaseException | None = None
        while True:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: not self._undone)
                    break
            except BaseException as error:
                interrupted = interrupted or error
        if interrupted is not None:
            raise interrupted
        self._check()

    def close(self) -> None:
        """The same, and ends the thread; a second call does nothing."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _put(self, task: Callable[[], None], buffer: np.ndarray | None) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name="m3jax-writer", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                raise OSError("the system does not start one more thread") from None
        self._tasks.append((task, buffer))
        self._undone += 1
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closed)
                if not self._tasks:
                    return
                task, buffer = self._tasks.popleft()
            try:
                if self._failure is None:
                    task()
            except BaseException as error:
                self._failure = error
            del task
            with self._changed:
                self._undone -= 1
                if buffer is not None:
                    self._free.append(buffer)
                self._changed.notify_all()
