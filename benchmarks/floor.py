"""The floor of a merge: reads every input byte and writes the output, no arithmetic.

    python benchmarks/floor.py --inputs=/tmp/trio/maths,/tmp/trio/code \
        --output=/tmp/floor --threads=3 --block=4194304

A few threads share out the inputs' blocks. Each reads the same block of all inputs
with `preadv` into buffers that it allocated once, and writes one of them to the
output with `pwrite`, past the page cache where the system can: what m3jax does in a
pass, less the merging. No merge of these files with this operating system's reads and
writes is faster. Prints one line of JSON.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

_INPUTS = flags.DEFINE_list("inputs", None, "Checkpoint folders.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to make.", required=True)
_THREADS = flags.DEFINE_integer("threads", 3, "Threads that read and write.")
_BLOCK = flags.DEFINE_integer("block", 4 << 20, "Bytes read at a time from an input.")
_DIRECT = flags.DEFINE_bool("direct", True, "Write past the page cache.")
_DIRECT_READS = flags.DEFINE_bool(
    "direct_reads", False, "Read past the page cache, too."
)
_FSYNC = flags.DEFINE_bool("fsync", False, "Wait until the disk has the output.")


class Block(NamedTuple):
    """The same bytes of one file of every input, and where they go."""

    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[int, int]
    offset: int
    size: int

    @property
    def whole(self) -> bool:
        """Only whole pages can be read and written past the cache."""
        return self.size % mmap.PAGESIZE == 0


def open_files(
    folders: list[Path], output: Path, *, direct: bool, direct_reads: bool
) -> list[tuple[list[tuple[int, int]], tuple[int, int], int]]:
    """Per weights file: two descriptors of each input, two of the output, its size.

    The second ones go past the page cache, if that is asked for, where it can be.

    Raises:
      ValueError: if the folders do not hold files of the same names and sizes.
    """
    listings = [
        {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        for folder in folders
    ]
    if not listings[0] or any(listing != listings[0] for listing in listings):
        raise ValueError(f"--inputs need the same files in each folder: {listings}")
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, size in sorted(listings[0].items()):
        inputs = [
            _pair(folder / name, os.O_RDONLY, direct=direct_reads) for folder in folders
        ]
        with (output / name).open("wb") as file:
            file.truncate(size)
        files.append((inputs, _pair(output / name, os.O_WRONLY, direct=direct), size))
    return files


def _pair(path: Path, mode: int, *, direct: bool) -> tuple[int, int]:
    cached = uncached = os.open(path, mode)
    if direct and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # this file system cannot
            uncached = os.open(path, mode | os.O_DIRECT)
    return cached, uncached


def copy(blocks: list[Block], threads: int, block_size: int) -> float:
    """Reads all blocks of all inputs and writes each once; returns the seconds."""
    lock = threading.Lock()
    pending = iter(blocks)

    def work() -> None:
        buffers = [_buffer(block_size) for _ in blocks[0].inputs]
        while True:
            with lock:
                block = next(pending, None)
            if block is None:
                return
            whole, size = block.whole, block.size
            for fds, buffer in zip(block.inputs, buffers, strict=True):
                _transfer(_read, fds[whole], buffer[:size], block.offset)
            fd = block.outputs[whole]
            _transfer(os.pwrite, fd, buffers[-1][:size], block.offset)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for worker in [pool.submit(work) for _ in range(threads)]:
            worker.result()
        return time.perf_counter() - start


def _buffer(size: int) -> memoryview:
    """Private memory at the start of a page, in huge pages where the system can."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _read(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, [view], offset)


def _transfer(
    call: Callable[[int, memoryview, int], int], fd: int, view: memoryview, offset: int
) -> None:
    while len(view):
        count = call(fd, view, offset)
        if count == 0:
            raise OSError("a file became shorter while it was read")
        view, offset = view[count:], offset + count


def main(argv: list[str]) -> None:
    del argv
    folders = [Path(name) for name in _INPUTS.value]
    files = open_files(
        folders,
        Path(_OUTPUT.value),
        direct=_DIRECT.value,
        direct_reads=_DIRECT_READS.value,
    )
    block = _BLOCK.value + -_BLOCK.value % mmap.PAGESIZE
    blocks = [
        Block(tuple(inputs), outputs, offset, min(block, size - offset))
        for inputs, outputs, size in files
        for offset in range(0, size, block)
    ]
    streaming = copy(blocks, _THREADS.value, block)
    start = time.perf_counter()
    if _FSYNC.value:
        for _, (output, _), _ in files:
            os.fsync(output)
    commit = time.perf_counter() - start
    written = sum(size for _, _, size in files)
    result = {
        "wall": {"passes": streaming, "commit": commit},
        "read_bytes": written * len(_INPUTS.value),
        "written_bytes": written,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
