"""Reads Orbax checkpoints: any part of any tensor, without restoring the whole.

What Orbax writes for a pytree is a folder that holds

    _METADATA                   the tree, in JSON: the path of every leaf and its kind
    manifest.ocdbt, d/          all arrays in one key-value store (OCDBT), or
    PATH.JOINED.BY.DOTS/        one folder for each array

and every array is a zarr array of version 2 or 3. TensorStore, which Orbax itself is
built on, reads them, in ranges. Orbax's own reading of the metadata is not used: it
opens whatever path a hostile tree names before anyone could look at it.
`CheckpointManager` puts such a folder, called an item, into the folder of a step.

A tensor's chunks are as large as the shards that wrote it, and are read whole. The
chunks that a stretch of rows crosses are kept until they have been used.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import boxes
from m3jax.checkpoints.formats.boxes import Box
from m3jax.checkpoints.formats.dtypes import Dtype, of_numpy
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.formats.tree import KeyPath, name_of
from m3jax.checkpoints.places.files import (
    InputFile,
    Location,
    exists,
    inside,
    open_file,
    read_small,
)

METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
ITEM = "default"  # what CheckpointManager calls the item of a step that has but one
SEQUENCE_KEY, DICT_KEY = 1, 2  # kinds of keys in the metadata
_MAX_METADATA = 40_000_000  # bytes; 300 bytes describe a leaf
_MAX_DIMENSIONS = 32  # TensorStore's limit
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")
_STORES = ("gs://", "s3://")  # that TensorStore reads by itself
_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class OrbaxTensor:
    """A tensor of an Orbax checkpoint.

    Attributes:
      store: TensorStore's handle.
      dtype, shape: of the tensor.
      name: of the tensor, for errors.
      item: the checkpoint's folder.
    """

    store: Any
    dtype: Dtype
    shape: tuple[int, ...]
    name: str
    item: Location

    @property
    def place(self) -> str:
        return self.item.name

    @property
    def output_dtype(self) -> Dtype:
        return self.dtype

    def read_into(self, out: np.ndarray, start: int) -> None:
        done = 0
        for box in boxes.of_run(start, len(out), self.shape) if len(out) else ():
            shape = boxes.box_shape(box)
            count = math.prod(shape)
            self.read_box(out[done : done + count].reshape(shape), box)
            done += count

    def read_box(self, out: np.ndarray, box: Box) -> None:
        """Fills `out`, of the box's shape, with that part of the tensor."""
        index = tuple(slice(start, stop) for start, stop in box)
        out[...] = _result(self.store[index].read(), self.item, self.name, "read")


class OrbaxFiles(InputFile):
    """All files of an Orbax checkpoint, as one: are they still as they were?

    Attributes:
      path: the folder of the item.
    """

    def __init__(self, path: Path):
        """Raises CheckpointError for a link that leads out, or what is no file."""
        self.path = path
        self._state = self._look()

    def close(self) -> None:
        """Nothing is held."""

    def _look(self) -> tuple[int, int]:
        """Bytes of all files, and the time of the last change in nanoseconds."""
        assert isinstance(self.path, Path)
        found = [file.stat() for file in _files(self.path, self.path.resolve())]
        changes = (stat.st_mtime_ns for stat in found)
        return sum(stat.st_size for stat in found), max(changes, default=0)


def find_item(folder: Location) -> Location | None:
    """The folder that holds the pytree of an Orbax checkpoint; None if it is none.

    Args:
      folder: that folder itself, or a step that `CheckpointManager` wrote.

    Raises:
      CheckpointError: it holds several, or was not finished.
    """
    steps: dict[int, Location] = {}
    found = [folder]
    if not exists(folder / METADATA):
        inner = _folders(folder)
        found = [path for path in inner if exists(path / METADATA)]
        for step in inner:
            number = step.name.rpartition("_")[2]
            items = _folders(step) if number.isdecimal() and not found else []
            if any(exists(item / METADATA) for item in items):
                steps[int(number)] = step
        found = found or [steps[number] for number in sorted(steps, reverse=True)]
    if not found:
        return None
    if steps or len(found) > 1:
        what = "steps of Orbax's CheckpointManager" if steps else "Orbax pytrees"
        names = ", ".join(shown(path.name) for path in found[:8])
        raise CheckpointError(
            f"{folder}: holds {len(found)} {what} ({names}); give one of them, as "
            f"{found[0]}"
        )
    for part in (folder, found[0]):
        if _UNFINISHED in part.name:
            raise CheckpointError(
                f"{part}: a save that was not finished; give a finished checkpoint"
            )
    return found[0]


def _folders(folder: Location) -> list[Location]:
    inner = [path for path in folder.iterdir() if path.is_dir()]
    return sorted(inner, key=lambda path: path.name)


def read_item(
    item: Location,
) -> tuple[dict[str, OrbaxTensor], dict[str, KeyPath], int, tuple[InputFile, ...]]:
    """Opens all tensors of a pytree.

    Returns:
      The tensors by name, each one's path in the pytree, the most bytes that reading
      them in order holds in memory beside the caller's buffers, and the files.

    Raises:
      CheckpointError: one line that names the file, the tensor and the flaw.
    """
    metadata = _metadata(item)
    leaves = _leaves(item, metadata)
    files: tuple[InputFile, ...]
    if isinstance(item, Path):
        files = (OrbaxFiles(item),)
    else:
        names = [name for name in (METADATA, MANIFEST) if exists(item / name)]
        files = tuple(open_file(item / name) for name in names)
    opened = _open(item, leaves, metadata, cache=0)
    tensors = {name: _tensor(item, name, store) for name, store in opened.items()}
    # Two stretches of rows may be in use at a time: the end of a tensor, or of its
    # chunks, and the beginning of the next.
    cache = 2 * max(map(_stretch, opened.values()), default=0)
    for name, store in _open(item, leaves, metadata, cache).items():
        tensors[name] = dataclasses.replace(tensors[name], store=store)
    return tensors, leaves, cache, files


def _metadata(item: Location) -> dict[str, Any]:
    path = inside(item, METADATA)
    metadata = load_json(read_small(path, _MAX_METADATA), str(path))
    if not isinstance(metadata.get("tree_metadata"), dict):
        raise CheckpointError(
            f"{path}: has no tree_metadata; save the checkpoint again with a current "
            "Orbax"
        )
    return metadata


def _leaves(item: Location, metadata: Mapping[str, Any]) -> dict[str, KeyPath]:
    """The path of each array, by its name."""
    paths: dict[str, KeyPath] = {}
    for entry in metadata["tree_metadata"].values():
        try:
            keys = [(k["key"], k["key_type"]) for k in entry["key_metadata"]]
            path = tuple(int(k) if t == SEQUENCE_KEY else str(k) for k, t in keys)
            value = entry["value_metadata"]
            kind, empty = value["value_type"], value.get("skip_deserialize")
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{item / METADATA}: has the entry {shown(entry)}, which is not as "
                "Orbax writes it; save the checkpoint again"
            ) from None
        name = name_of(path)
        if empty:  # None, or a container without leaves
            continue
        if kind not in _ARRAYS:
            raise CheckpointError(
                f"{item}: {shown(name)} is a {shown(kind)}; only arrays can be merged: "
                "save the parameters alone"
            )
        # It is that of the array's folder, too, and must not lead out of the item.
        leads_out = not {"", ".", ".."}.isdisjoint(name.split("/"))
        if leads_out or not name.isprintable() or name in paths:
            raise CheckpointError(
                f"{item / METADATA}: names a tensor {shown(name)}, "
                + ("twice" if name in paths else "which is no name")
                + "; rename it and save again"
            )
        paths[name] = path
    return paths


def _open(
    item: Location, leaves: Mapping[str, Any], metadata: Mapping[str, Any], cache: int
) -> dict[str, Any]:
    """TensorStore's handles, with a common cache of so many bytes."""
    import tensorstore

    folder = _url(item)
    base = f"{folder}|ocdbt:" if exists(item / MANIFEST) else folder
    # Where all chunks are written, one that is missing is no chunk of zeros.
    complete = metadata.get("store_array_data_equal_to_fill_value") is True
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") is True else "zarr",
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "fill_missing_data_reads": not complete,
    }
    pool = {"total_bytes_limit": min(cache, 2**62)}  # of 64 bits
    context = tensorstore.Context({"cache_pool": pool})
    opened = {
        name: tensorstore.open(
            {**spec, "kvstore": f"{base}{quote(name)}/"},
            context=context,
            open=True,
            read=True,
        )
        for name in leaves
    }
    return {name: _result(to, item, name, "opened") for name, to in opened.items()}


def _result(future: Any, item: Location, name: str, what: str) -> Any:
    try:
        return future.result()
    except (ValueError, OSError) as error:  # NOT_FOUND and DATA_LOSS among them
        reason = shown(str(error).strip().split("\n")[0], limit=200)
        raise CheckpointError(
            f"{item}: tensor {shown(name)} cannot be {what}: {reason}; save or copy "
            "the checkpoint again"
        ) from None


def _tensor(item: Location, name: str, store: Any) -> OrbaxTensor:
    try:
        dtype = of_numpy(store.dtype.numpy_dtype)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{item}: tensor {shown(name)}: {error}") from None
    shape = tuple(store.shape)
    if len(shape) > _MAX_DIMENSIONS or math.prod(shape) >= 2**62:
        raise CheckpointError(
            f"{item}: tensor {shown(name)} has shape {shown(list(shape))}, which "
            "overflows"
        )
    return OrbaxTensor(store, dtype, shape, name, item)


def _stretch(store: Any) -> int:
    """Bytes of all chunks that one element's row of chunks crosses."""
    shape = tuple(store.shape)
    chunk = store.chunk_layout.read_chunk.shape or shape
    if not shape:
        return 0
    rows = min(shape[0], chunk[0])
    return rows * math.prod(shape[1:]) * store.dtype.numpy_dtype.itemsize


def _url(item: Location) -> str:
    """The folder as TensorStore wants it, with a slash at the end."""
    if isinstance(item, Path):
        return f"file://{quote(str(item.resolve()))}/"
    if not str(item).startswith(_STORES):
        raise CheckpointError(
            f"{item}: Orbax checkpoints are read from here, {' and '.join(_STORES)}; "
            "copy it"
        )
    return f"{item}/"


def _files(folder: Path, home: Path) -> Iterator[os.DirEntry[str]]:
    """All files in and below a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and not Path(entry).resolve().is_relative_to(home):
                raise CheckpointError(
                    f"{entry.path}: a link that leads out of the checkpoint; copy the "
                    "file into it"
                )
            if entry.is_dir():
                yield from _files(Path(entry), home)
            elif entry.is_file():
                yield entry
            else:
                raise CheckpointError(f"{entry.path}: is no regular file; remove it")
