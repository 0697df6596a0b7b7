"""Runs the chunks of a pass on a few threads, and knows where their time goes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Turnstile:
    """Lets work items through one at a time, in order of their index.

    What must happen in order (running checksums, the journal) goes between `turn`'s
    ends; everything else of the items overlaps.
    """

    def __init__(self) -> None:
        self._next = 0
        self._broken = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, index: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._next == index)
            if self._broken:
                raise Stopped
        yield
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def break_(self) -> None:
        """Makes every waiting and later turn raise Stopped."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()


class Stopped(Exception):
    """Another thread failed, or the user interrupted the run."""


class Clock:
    """Seconds spent in each stage, summed over threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + spent


def for_each(
    items: Sequence[T],
    lanes: Sequence[Any],
    work: Callable[[T, Any, Any], None],
    clock: Clock,
) -> None:
    """Calls ``work(item, lane, turn)`` for all items, one thread per lane.

    Items start in order. `turn` is a context manager: its body runs for one item at a
    time, in order of the items. The first exception stops all threads, after the
    items in flight, and is raised here; so does KeyboardInterrupt.

    Args:
      items: the work.
      lanes: what each thread owns (its buffers).
      work: is done once per item and calls `turn` exactly once.
      clock: counts the time spent waiting for a turn.
    """
    turnstile = Turnstile()
    lock = threading.Lock()
    pending = iter(enumerate(items))
    stopping = threading.Event()
    failures: list[BaseException] = []

    def loop(lane: Any) -> None:
        while not stopping.is_set():
            with lock:
                index, item = next(pending, (-1, None))
            if item is None:
                return

            @contextlib.contextmanager
            def turn(index: int = index) -> Iterator[None]:
                with contextlib.ExitStack() as stack:
                    with clock.stage("waiting"):
                        stack.enter_context(turnstile.turn(index))
                    yield

            try:
                work(item, lane, turn)
            except Stopped:
                return
            except BaseException as error:
                failures.append(error)
                stopping.set()
                turnstile.break_()
                return

    threads = [
        threading.Thread(target=loop, args=(lane,), name=f"m3jax-{i}", daemon=True)
        for i, lane in enumerate(lanes[: max(1, len(items))])
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # KeyboardInterrupt, or SIGTERM made into an exception
        stopping.set()
        turnstile.break_()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
