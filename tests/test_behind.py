"""Writes that nobody waits for: their order, their errors, and their end."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from m3jax.checkpoints.places.behind import BUFFERS, Behind

SIZE, ALIGNMENT = 4096, 512


@pytest.fixture
def behind():
    own = Behind(SIZE, ALIGNMENT)
    yield own
    own.close()
    assert "m3jax-writer" not in [thread.name for thread in threading.enumerate()]


class Disk:
    """Keeps what is written; may be held up, or fail."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []
        self.goes = threading.Event()
        self.goes.set()
        self.fails_from = 1 << 30

    def write(self, values: np.ndarray, offset: int) -> None:
        assert self.goes.wait(30)
        if len(self.written) >= self.fails_from:
            raise OSError(28, "full", "file")
        assert (values.ctypes.data - offset) % ALIGNMENT == 0
        self.written.append((offset, values.tobytes()))


def test_a_copy_is_written_as_aligned_as_its_place(behind):
    disk, values = Disk(), np.arange(300, dtype=np.uint8)
    disk.goes.clear()
    for offset in (0, 7, 511, 1025):
        values[0] = offset % 251
        behind.write(disk.write, values, offset)
    values[:] = 0
    disk.goes.set()
    behind.flush()
    assert [offset for offset, _ in disk.written] == [0, 7, 511, 1025]
    rest = bytes(np.arange(1, 300).astype(np.uint8))
    assert [own[1:] for _, own in disk.written] == [rest] * 4
    assert [own[0] for _, own in disk.written] == [0, 7, 511 % 251, 1025 % 251]


def test_calls_come_when_all_before_is_written(behind):
    disk, seen = Disk(), []
    behind.then(lambda: seen.append(0))
    assert seen == [0]  # at once
    disk.goes.clear()
    for i in range(3):
        behind.write(disk.write, np.zeros(9, np.uint8), i)
        behind.then(lambda: seen.append(len(disk.written)))
    assert seen == [0]
    disk.goes.set()
    behind.flush()
    assert seen == [0, 1, 2, 3]


def test_memory_is_bounded(behind):
    """Who finds no buffer waits until one is written."""
    disk, count = Disk(), 3 * BUFFERS
    disk.goes.clear()
    handed = []

    def hand_over() -> None:
        for i in range(count):
            behind.write(disk.write, np.zeros(9, np.uint8), i)
            handed.append(i)

    thread = threading.Thread(target=hand_over)
    thread.start()
    thread.join(0.2)
    assert len(handed) == BUFFERS
    disk.goes.set()
    thread.join(30)
    behind.flush()
    assert [offset for offset, _ in disk.written] == list(range(count))


def test_after_an_error_nothing_is_done_and_all_hear_of_it():
    behind, disk, called = Behind(SIZE, ALIGNMENT), Disk(), []
    disk.fails_from = 1
    disk.goes.clear()
    for i in range(3):
        behind.write(disk.write, np.zeros(9, np.uint8), i)
        behind.then(lambda: called.append(len(disk.written)))
    disk.goes.set()
    for tells in (
        behind.flush,
        lambda: behind.write(disk.write, np.zeros(9, np.uint8), 9),
        lambda: behind.then(lambda: None),
        behind.close,
    ):
        with pytest.raises(OSError, match="full"):
            tells()
    assert len(disk.written) == 1
    assert called == [1]
    behind.close()
