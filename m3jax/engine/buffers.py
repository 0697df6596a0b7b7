"""The memory of the threads that stream: allocated once, aligned, reused."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from m3jax.engine.inputs import TensorInputs
from m3jax.engine.plan import TILE, Item

_ALIGNMENT = 64  # bytes; what XLA's CPU backend asks of memory it uses in place


class Buffers:
    """The memory of one thread, reused for every chunk.

    Attributes:
      base: bytes of the base's part of a chunk.
      stack: bytes of all models' parts.
      beside: of what comes beside them.
    """

    def __init__(self, base_bytes: int, stack_bytes: int, beside_bytes: int):
        self.base = _aligned(base_bytes)
        self.stack = _aligned(stack_bytes)
        self.beside = _aligned(beside_bytes)


class Pool:
    """Buffers of which a thread takes as many at once as it needs."""

    def __init__(
        self, make: Callable[[], Buffers], count: int, first: Sequence[Buffers]
    ):
        """
        Args:
          make: a buffer, when it is needed.
          count: how many there are at most.
          first: some that are there already, for others to use at other times.
        """
        self._make = make
        self._free = list(first)
        self._left = count
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, count: int) -> Iterator[list[Buffers]]:
        """Waits for so many, at most all there are, and gives them back at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= count)
            self._left -= count
            own = [self._free.pop() for _ in range(min(count, len(self._free)))]
        try:
            own += [self._make() for _ in range(count - len(own))]
            yield own
        finally:
            with self._changed:
                self._left += count
                self._free += own
                self._changed.notify_all()


def buffer_bytes(
    tensors: Sequence[TensorInputs],
    items: Sequence[Item],
    tiles: int,
    units: Sequence[str] = ("element",),
) -> tuple[int, int, int]:
    """Bytes of a thread's buffers of the base, the models and what is beside them.

    Args:
      tensors, items: of the merge.
      tiles: of a chunk.
      units: that are worked on; rows and matrices may need more than a chunk.
    """
    base = stack = beside = 1
    seen = set()
    for tensor, item in zip(tensors, items, strict=True):
        elements = tiles * TILE
        if "matrix" in units and item.merged:
            elements = max(elements, item.size)
        elif "row" in units and item.merged and item.shape:
            elements = max(elements, 8 * item.shape[-1])
        kind = item.signature, tensor.base is None, elements
        if kind in seen:  # of thousands of tensors most are alike
            continue
        seen.add(kind)
        first = tensor.sources[0].dtype.itemsize
        own = first if not tensor.merged or tensor.base is not None else 0
        models = sum(m.source.dtype.itemsize for m in tensor.models)
        base = max(base, own * elements)
        stack = max(stack, (models if tensor.merged else first) * elements)
        if "matrix" not in units:
            others = [o.source for own in tensor.beside.values() for o in own]
            beside = max(beside, sum(s.dtype.itemsize for s in others) * elements)
    return base, stack, beside


def view(buffer: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The first bytes of a buffer as an array."""
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _aligned(size: int) -> np.ndarray:
    buffer = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size]
