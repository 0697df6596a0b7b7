"""Checks a merged checkpoint against its record, m3jax.json.

The tensors of an Orbax checkpoint are compared by what they hold, not by the files that
hold it: a checkpoint that Orbax has read and written again is still the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import xxhash

from m3jax.checkpoints import side_files
from m3jax.checkpoints import source as sources
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import orbax
from m3jax.checkpoints.formats.index import read_index
from m3jax.checkpoints.formats.safetensors import header_of
from m3jax.checkpoints.output.folder import MANIFEST
from m3jax.checkpoints.output.shards import index_of, of_model
from m3jax.checkpoints.places import hub
from m3jax.checkpoints.places.files import Location, exists, inside, open_file
from m3jax.checkpoints.record.record import Record, read_record
from m3jax.checkpoints.source import FileTensor, Source
from m3jax.engine.pipeline import Clock, for_each, reading_threads
from m3jax.engine.progress import Progress

_Place = tuple[str, str]  # file and name of a tensor


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
    recorded = {(tensor.file, name) for name, tensor in record.tensors.items()}
    found: dict[_Place, Source] = {}
    lost: set[str] = set()
    problems: list[str] = []
    with contextlib.ExitStack() as stack:
        for file in sorted({file for file, _ in recorded}):
            try:
                found |= _open(folder, file, stack)
            except CheckpointError as error:
                problems.append(str(error))
                lost.add(file)
        problems += [
            f"{file}: lacks tensor {shown(name)}"
            for file, name in sorted(recorded - found.keys())
            if file not in lost
        ]
        problems += [
            f"{file}: holds tensor {shown(name)}, which is not recorded"
            for file, name in sorted(found.keys() - recorded)
        ]
        problems += _other_files(folder, record)
        problems += _side_files(folder, record)
        present = {place: found[place] for place in sorted(recorded & found.keys())}
        problems += _differences(
            record, present, reading_threads(threads), progress or Progress()
        )
    return problems


def _open(
    folder: Location, file: str, stack: contextlib.ExitStack
) -> Mapping[_Place, Source]:
    """The tensors of a recorded file, or of the folder of an Orbax checkpoint."""
    if file == orbax.ITEM:
        tensors, *_ = orbax.read_item(folder / file)
        return {(file, name): tensor for name, tensor in tensors.items()}
    opened = stack.enter_context(open_file(inside(folder, file)))
    return {
        (file, name): FileTensor(opened, entry)
        for name, entry in header_of(opened).tensors.items()
    }


def _other_files(folder: Location, record: Record) -> Iterator[str]:
    """What is wrong with the index, and files of tensors that should not be there."""
    recorded = {name: tensor.file for name, tensor in record.tensors.items()}
    expected = {name: file for name, file in recorded.items() if of_model(file)}
    files = set(recorded.values())
    for name in sorted(path.name for path in folder.iterdir()):
        if name.endswith(".safetensors") and name not in files:
            yield f"{shown(name)}: a safetensors file that is not recorded"
    files = set(expected.values())
    index = index_of(files)
    if not exists(folder / index):
        if len(files) > 1:
            yield f"{index}: is missing"
        return
    if len(files) == 1:
        yield f"{index}: is not recorded; the checkpoint is one file"
        return
    try:
        found = read_index(inside(folder, index))
    except CheckpointError as error:
        yield str(error)
        return
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            yield (
                f"{index}: tensor {shown(name)} is in "
                f"{shown(found.get(name, 'no file'))}, recorded is "
                f"{shown(expected.get(name, 'no file'))}"
            )


def _side_files(folder: Location, record: Record) -> Iterator[str]:
    for name, recorded in record.files.items():
        try:
            inside(folder, name)  # or it is missing
            content = side_files.read_side_file(folder, name)
        except CheckpointError as error:
            yield str(error)
            continue
        checksum = xxhash.xxh3_128(content or b"").hexdigest()
        if checksum != recorded:
            yield f"{name}: has checksum {checksum}, recorded is {recorded}"


def _differences(
    record: Record, present: Mapping[_Place, Source], threads: int, progress: Progress
) -> list[str]:
    """The tensors whose dtype, shape or bytes are not as recorded."""
    problems: dict[_Place, str] = {}
    labels = {(file, name): f"{file}: tensor {shown(name)}" for file, name in present}
    for place, tensor in present.items():
        recorded = record.tensors[place[1]]
        if (tensor.dtype.code, tensor.shape) != (recorded.dtype, recorded.shape):
            problems[place] = (
                f"{labels[place]} is {tensor.dtype.code} of shape "
                f"{shown(list(tensor.shape))}, recorded is {shown(recorded.dtype)} of "
                f"shape {shown(list(recorded.shape))}"
            )
    whole = {place: found for place, found in present.items() if place not in problems}
    progress.stage("verifying", sum(map(sources.byte_size, whole.values())))

    def work(place: _Place, nothing: None, turn: Any) -> None:
        recorded = record.tensors[place[1]].checksum
        try:
            checksum = sources.checksum(whole[place], progress.advance)
        except CheckpointError as error:
            problems[place] = str(error)
            return
        if checksum != recorded:
            problems[place] = (
                f"{labels[place]} has checksum {checksum}, recorded is {recorded}"
            )

    for_each(list(whole), [None] * threads, work, Clock())
    return [problems[place] for place in present if place in problems]
