"""Checks a merged checkpoint against its record, m3jax.json."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import numpy as np
import xxhash

from m3jax.checkpoints import hub, side_files
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.files import (
    InputFile,
    Location,
    exists,
    inside,
    open_file,
)
from m3jax.checkpoints.folder import INDEX
from m3jax.checkpoints.index import read_index
from m3jax.checkpoints.orbax import ITEM
from m3jax.checkpoints.output import MANIFEST
from m3jax.checkpoints.record import Record, read_record
from m3jax.checkpoints.safetensors import Header, TensorEntry, header_of
from m3jax.engine.pipeline import Clock, available_cores, for_each
from m3jax.engine.progress import Progress
from m3jax.engine.verify_orbax import orbax_differences

_BLOCK = 4 << 20  # bytes that a thread reads at a time
_MAX_THREADS = 16


def verify(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Checks that a merged checkpoint is, to the bit, what its m3jax.json records.

    Every tensor must be in its file with its dtype, shape and checksum, every side
    file must have its checksum, the index must fit, and there must be no other
    tensors. Files that a merge does not write and that hold no tensors are ignored.

    Args:
      path: the folder that `merge` made, its URL, or a Hugging Face id.
      threads: that read; None: one more than cores, at most 16.
      progress: is told the bytes read.

    Returns:
      One line for each thing that is not as recorded; none if all is well.

    Raises:
      CheckpointError: there is no m3jax.json, or it is none that m3jax wrote.
      OSError: a file cannot be read.
    """
    folder, _ = hub.locate(fspath(path))
    record = read_record(folder) if folder.is_dir() else None
    if record is None:
        raise CheckpointError(
            f"{fspath(path)}: has no {MANIFEST}, the record that m3jax leaves in the "
            "folder of a merge; there is nothing to verify it against"
        )
    problems: list[str] = []
    threads = threads or min(_MAX_THREADS, available_cores() + 1)
    progress = progress or Progress()
    if any(tensor.file == ITEM for tensor in record.tensors.values()):
        problems += _side_files(folder, record)
        return problems + orbax_differences(folder, record, threads, progress)
    with contextlib.ExitStack() as stack:
        files = _open(folder, record, stack, problems)
        headers = _headers(files, problems)
        tensors = _tensors(record, headers, problems)
        problems += _unrecorded_files(folder, record)
        problems += _index(folder, record)
        problems += _side_files(folder, record)
        problems += _checksums(
            record,
            files,
            {
                name: headers[record.tensors[name].file].tensors[name]
                for name in tensors
            },
            threads,
            progress,
        )
    return problems


def _open(
    folder: Location, record: Record, stack: contextlib.ExitStack, problems: list[str]
) -> dict[str, InputFile]:
    """The recorded safetensors files."""
    files = {}
    for name in sorted({tensor.file for tensor in record.tensors.values()}):
        try:
            files[name] = stack.enter_context(open_file(inside(folder, name)))
        except CheckpointError as error:
            problems.append(str(error))
    return files


def _headers(files: Mapping[str, InputFile], problems: list[str]) -> dict[str, Header]:
    """The headers of the files whose headers can be read."""
    headers = {}
    for name, file in files.items():
        try:
            headers[name] = header_of(file)
        except CheckpointError as error:
            problems.append(str(error))
    return headers


def _tensors(
    record: Record, headers: Mapping[str, Header], problems: list[str]
) -> list[str]:
    """The tensors that stand where they should, with dtype and shape as recorded."""
    found = []
    for name, recorded in record.tensors.items():
        if recorded.file not in headers:
            continue  # which is a problem already
        entry = headers[recorded.file].tensors.get(name)
        if entry is None:
            problems.append(f"{recorded.file}: lacks tensor {shown(name)}")
        elif (entry.dtype.code, entry.shape) != (recorded.dtype, recorded.shape):
            problems.append(
                f"{recorded.file}: tensor {shown(name)} is {entry.dtype.code} of shape "
                f"{shown(list(entry.shape))}, recorded is {shown(recorded.dtype)} of "
                f"shape {shown(list(recorded.shape))}"
            )
        else:
            found.append(name)
    problems += [
        f"{file}: holds tensor {shown(name)}, which is not recorded"
        for file, header in headers.items()
        for name in header.tensors
        if name not in record.tensors or record.tensors[name].file != file
    ]
    return found


def _unrecorded_files(folder: Location, record: Record) -> Iterator[str]:
    recorded = {tensor.file for tensor in record.tensors.values()}
    for name in sorted(path.name for path in folder.iterdir()):
        if name.endswith(".safetensors") and name not in recorded:
            yield f"{shown(name)}: a safetensors file that is not recorded"


def _index(folder: Location, record: Record) -> list[str]:
    """What is wrong with the index, which there is where there are several files."""
    expected = {name: tensor.file for name, tensor in record.tensors.items()}
    needed = len(set(expected.values())) > 1
    if not exists(folder / INDEX):
        return [f"{INDEX}: is missing"] if needed else []
    if not needed:
        return [f"{INDEX}: is not recorded; the checkpoint is one file"]
    try:
        found = read_index(inside(folder, INDEX))
    except CheckpointError as error:
        return [str(error)]
    return [
        f"{INDEX}: tensor {shown(name)} is in {shown(found.get(name, 'no file'))}, "
        f"recorded is {shown(expected.get(name, 'no file'))}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]


def _side_files(folder: Location, record: Record) -> Iterator[str]:
    for name, recorded in record.files.items():
        try:
            content = side_files.read_side_file(inside(folder, name).parent, name)
        except CheckpointError as error:
            yield str(error)
            continue
        checksum = xxhash.xxh3_128(content or b"").hexdigest()
        if checksum != recorded:
            yield f"{name}: has checksum {checksum}, recorded is {recorded}"


def _checksums(
    record: Record,
    files: Mapping[str, InputFile],
    entries: Mapping[str, TensorEntry],
    threads: int,
    progress: Progress,
) -> list[str]:
    """The tensors whose bytes are not as recorded, read in the order of the files."""
    order = sorted(entries, key=lambda n: (record.tensors[n].file, entries[n].start))
    progress.stage("verifying", sum(e.stop - e.start for e in entries.values()))
    problems: dict[str, str] = {}

    def work(name: str, buffer: np.ndarray, turn: Any) -> None:
        recorded, entry = record.tensors[name], entries[name]
        checksum = xxhash.xxh3_128()
        for offset in range(entry.start, entry.stop, _BLOCK):
            part = buffer[: min(_BLOCK, entry.stop - offset)]
            files[recorded.file].read_into(memoryview(part), offset)
            checksum.update(part)
            progress.advance(len(part))
        if checksum.hexdigest() != recorded.checksum:
            problems[name] = (
                f"{recorded.file}: tensor {shown(name)} has checksum "
                f"{checksum.hexdigest()}, recorded is {recorded.checksum}"
            )

    buffers = [np.empty(_BLOCK, np.uint8) for _ in range(threads)]
    for_each(order, buffers, work, Clock())
    return [problems[name] for name in order if name in problems]
