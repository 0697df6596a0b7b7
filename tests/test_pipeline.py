"""Threads that fail or are interrupted: all stop, none deadlocks, none is left."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
from interruptions import held

from m3jax.engine.pipeline import Clock, for_each


@pytest.fixture(autouse=True)
def no_deadlock():
    """A deadlock would hang the tests; this shows where, and ends them."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def test_turns_are_in_order():
    order = []

    def work(item, worker, turn):
        time.sleep(random.random() / 1000)
        with turn():
            order.append(item)

    for_each(range(300), range(16), work, Clock())
    assert order == list(range(300))


@pytest.mark.parametrize("seed", range(40))
def test_random_failures(seed):
    """Before, in and behind a turn, in several workers at once; also Ctrl-C."""
    rng = random.Random(seed)
    count, workers = rng.randrange(1, 120), rng.randrange(1, 33)
    fate = {
        rng.randrange(count): rng.choice(["before", "in", "behind", "Ctrl-C"])
        for _ in range(rng.randrange(1, 5))
    }
    pauses = [rng.random() / 2000 for _ in range(count)]
    at_work, turns = set(), []
    main = threading.main_thread().ident
    assert main is not None

    def work(item, worker, turn):
        assert worker not in at_work
        at_work.add(worker)
        try:
            time.sleep(pauses[item])
            if fate.get(item) == "before":
                raise RuntimeError(item)
            if fate.get(item) == "Ctrl-C":
                signal.pthread_kill(main, signal.SIGINT)
            with turn():
                turns.append(item)
                if fate.get(item) == "in":
                    raise RuntimeError(item)
            if fate.get(item) == "behind":
                raise RuntimeError(item)
        finally:
            at_work.discard(worker)

    try:
        for_each(range(count), range(workers), work, Clock())
    except RuntimeError as error:
        assert fate[error.args[0]] in ("before", "in", "behind")
    except KeyboardInterrupt:
        assert "Ctrl-C" in fate.values()
    else:
        pytest.fail("a failure was lost")
    assert not at_work
    assert turns == list(range(len(turns)))
    deadline = time.monotonic() + 10
    while any(name.startswith("m3jax-") for name in held()[1]):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_nothing_is_at_work_after_ctrl_c():
    """Else files would be closed, and buffers freed, under a thread that writes."""
    at_work = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def work(item, worker, turn):
        at_work.set()
        for _ in range(3):  # a user without patience
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.1)
        at_work.clear()

    with pytest.raises(KeyboardInterrupt):
        for_each([0], [0], work, Clock())
    assert not at_work.is_set()


def test_the_system_starts_no_more_threads(monkeypatch):
    start = threading.Thread.start
    started = []

    def fails(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(OSError, match="does not start 8 threads; pass fewer"):
        for_each(range(100), range(8), lambda *_: time.sleep(0.001), Clock())
    assert not any(thread.is_alive() for thread in started)


def test_a_failure_keeps_nothing_alive():
    """Buffers of a failed merge are gone at once, not when garbage is collected."""
    gc.disable()
    try:
        worker = np.zeros(1000)
        users = sys.getrefcount(worker)
        with contextlib.suppress(ZeroDivisionError):
            for_each([0], [worker], lambda *_: 1 / 0, Clock())
        assert sys.getrefcount(worker) == users
    finally:
        gc.enable()
