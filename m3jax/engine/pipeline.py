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


def reading_threads(asked: int | None) -> int:
    """Of a pass that only reads: as many as asked, or one more than cores up to 16."""
    return asked or min(16, available_cores() + 1)


class Stopped(Exception):
    """Another thread failed, or the user interrupted the run."""


class Line:
    """Hands items out in order, and lets them through a turnstile in that order.

    What must happen in order (running checksums, the journal) goes between `turn`'s
    ends; everything else of the items overlaps.
    """

    def __init__(self, count: int) -> None:
        """`count`: of the items, which are known here by their index."""
        self._count = count
        self._taken = self._passed = self._at_work = 0
        self._stopped = False
        self._changed = threading.Condition(threading.Lock())

    def take(self) -> int | None:
        """The next item, or None at the end; `give_back` has to follow."""
        with self._changed:
            if self._stopped or self._taken == self._count:
                return None
            self._taken += 1
            self._at_work += 1
            return self._taken - 1

    def give_back(self) -> None:
        """The thread that took an item has finished with it, or has failed."""
        with self._changed:
            self._at_work -= 1
            if self._at_work == 0:
                self._changed.notify_all()

    @contextlib.contextmanager
    def turn(self, index: int, clock: Clock) -> Iterator[None]:
        """Waits until all items before `index` are through; raises Stopped."""
        with clock.stage("waiting"), self._changed:
            self._changed.wait_for(lambda: self._stopped or self._passed == index)
            if self._stopped:
                raise Stopped
        yield
        with self._changed:
            self._passed += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Hands out nothing more, and makes waiting and later turns raise Stopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Returns when no thread holds an item and none will be handed out."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._at_work == 0 and (self._stopped or self._taken == self._count)
                )
            )


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
    workers: Sequence[Any],
    work: Callable[[T, Any, Any], None],
    clock: Clock,
) -> None:
    """Calls ``work(item, worker, turn)`` for all items, one thread per worker.

    Items start in order. `turn` is a context manager: its body runs for one item at a
    time, in order of the items. The first exception stops all threads, after the
    items in flight, and is raised here; so does KeyboardInterrupt. No thread is at
    work when this returns or raises, so buffers and files may then be let go.

    Args:
      items: the work.
      workers: what each thread owns (its buffers).
      work: is done once per item and calls `turn` at most once; if it does so for one
        item it does so for all.
      clock: counts the time spent waiting for a turn.

    Raises:
      OSError: the system starts no more threads.
    """
    line = Line(len(items))
    failures: list[BaseException] = []

    def loop(worker: Any) -> None:
        while (index := line.take()) is not None:
            try:
                work(items[index], worker, lambda index=index: line.turn(index, clock))
            except Stopped:
                pass
            except BaseException as error:
                failures.append(error)
                line.stop()
            finally:
                line.give_back()

    threads = [
        threading.Thread(target=loop, args=(worker,), name=f"m3jax-{i}", daemon=True)
        for i, worker in enumerate(workers[: max(1, len(items))])
    ]
    interrupted = _run(threads, line)
    for thread in threads:
        if thread.ident is not None:  # it was started
            thread.join()
    if interrupted is not None:
        raise interrupted
    if failures:
        del failures[1:]
        raise failures.pop()  # a list that kept it would keep the buffers alive


def _run(threads: Sequence[threading.Thread], line: Line) -> BaseException | None:
    """Starts the threads and waits for them; what Ctrl-C or SIGTERM raised meanwhile.

    A second Ctrl-C does not cut the orderly stop short. It does not rely on `join`:
    in Python before 3.13, an interrupted `join` takes a running thread for finished.
    """
    interrupted: BaseException | None = None
    while True:
        try:
            if interrupted is None:
                _start(threads)
            else:
                line.stop()
            line.wait_until_idle()
            return interrupted
        except BaseException as error:
            interrupted = interrupted or error


def _start(threads: Sequence[threading.Thread]) -> None:
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:
        raise OSError(
            f"the system does not start {len(threads)} threads; pass fewer --threads"
        ) from None
