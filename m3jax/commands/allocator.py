"""Keeps freed memory for reuse, instead of giving it back and asking for it again.

XLA's CPU backend allocates every kernel's output. glibc serves blocks of megabytes
with fresh pages and returns them when they are freed, and touching a fresh page costs
several times what filling a used one does. A merge makes and frees thousands of equal
blocks, so the few that are alive at a time are kept, and in one place: with a place for
each thread, as glibc has it, they would be kept several times.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 32 << 20  # bytes; glibc accepts no larger threshold for mmap


def keep_freed_memory() -> None:
    """Sets glibc's thresholds; does nothing on another C library."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_ARENA_MAX, 1)
