"""Saves a pytree of arrays, sharded or not, as a checkpoint folder."""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import jax
import numpy as np

from m3jax.checkpoints import side_files
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import boxes, tree
from m3jax.checkpoints.formats.boxes import Box
from m3jax.checkpoints.formats.dtypes import Dtype, of_numpy
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.output.destination import open_output, open_writer
from m3jax.checkpoints.output.folder import OutputFolder
from m3jax.checkpoints.output.orbax_output import OrbaxShard
from m3jax.checkpoints.output.shards import Shard, make_shards, write_index
from m3jax.checkpoints.places import hub, store
from m3jax.checkpoints.places.files import Location
from m3jax.engine.execution import FORMATS
from m3jax.engine.load import PIECE, num_threads
from m3jax.engine.plan import natural_order, split_shards
from m3jax.recipe import parse_size


def save(
    params: Any,
    path: str | PathLike[str],
    *,
    like: str | PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    format: str = "safetensors",
    config: Mapping[str, Any] | None = None,
) -> Location:
    """Saves a pytree as a checkpoint folder that transformers and safetensors read.

    Tensors are named by their paths, joined by ".", and keep their dtypes. The folder
    appears under its name when it is complete. It has no m3jax.json: how arrays came
    about is not known here; `m3jax.merge` records what it makes.

        >>> import jax.numpy as jnp, m3jax
        >>> _ = m3jax.save({"norm": {"weight": jnp.ones(4, jnp.bfloat16)}}, folder)
        >>> m3jax.load(folder)["norm"]["weight"].dtype
        dtype(bfloat16)

    Args:
      params: a pytree of arrays, of JAX (sharded or not) or NumPy.
      path: the folder to make, or its URL; there is none yet.
      like: a checkpoint (a path or a Hugging Face id) whose config.json, tokenizer and
        chat template go along; config.json then says the new dtype.
      max_shard_size: of a file, in bytes or as text such as ``5GB``.
      format: ``safetensors``, or ``orbax``: the folder then holds a subfolder
        ``default``, which Orbax restores, and is a step of its CheckpointManager.
      config: fields of config.json that are others than those of `like`.

    Returns:
      The folder.

    Raises:
      CheckpointError: the place is taken, or a leaf cannot be written; one line.
      OSError: the disk.
    """
    final = store.parse(fspath(path))
    leaves, _ = tree.flatten(params)
    dtypes = {name: _dtype(name, leaf) for name, leaf in leaves.items()}
    files = {} if like is None else _side_files(fspath(like), dtypes, config or {})
    if format not in FORMATS:
        raise ValueError(f"format={format!r} needs {' or '.join(FORMATS)}")
    shards: list[Shard] = (
        [OrbaxShard(described(leaves), tree.key_paths(params))]
        if format == "orbax"
        else shards_of(leaves, max_shard_size)
    )
    with open_output(final, overwrite=False, resume=False) as folder:
        write(folder, shards, leaves)
        for name, content in files.items():
            folder.write(name, content)
        folder.commit(fsync=True)
    return final


def described(leaves: Mapping[str, Any]) -> list[tuple[str, Dtype, tuple[int, ...]]]:
    """Name, dtype and shape of tensors, in the order of their layers."""
    names = sorted(leaves, key=natural_order)
    return [(name, _dtype(name, leaves[name]), leaves[name].shape) for name in names]


def shards_of(leaves: Mapping[str, Any], max_shard_size: int | str) -> list[Shard]:
    """The safetensors files for tensors, none larger than that where it can be."""
    entries = described(leaves)
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in entries]
    groups = split_shards(sizes, parse_size(max_shard_size))
    return make_shards([[entries[i] for i in group] for group in groups])


def write(folder: OutputFolder, shards: list[Shard], leaves: Mapping[str, Any]) -> None:
    """Writes tensors into the files of an output under construction."""
    folder.check_space(
        sum(s.size for s in shards), largest=max(s.largest for s in shards)
    )
    writer = open_writer(folder, shards)
    try:

        def write_one(place: tuple[int, str]) -> None:
            shard, name = place
            entry = shards[shard].entries[name]
            for box, values in pieces(leaves[name]):
                done = 0
                for start, count in boxes.runs(box, entry.shape):
                    offset = entry.start + start * entry.dtype.itemsize
                    writer.write(shard, offset, values[done : done + count])
                    done += count

        places = [(i, name) for i, s in enumerate(shards) for name in s.entries]
        with concurrent.futures.ThreadPoolExecutor(num_threads()) as pool:
            list(pool.map(write_one, places))  # raises what a thread has raised
    finally:
        writer.close()
    write_index(folder, shards)


def pieces(array: Any) -> Any:
    """The parts of a tensor that are this process's to write, in bounded memory.

    Yields:
      Box, and its elements on the host, 1-D.
    """
    shape, dtype = array.shape, np.dtype(array.dtype)
    parts: dict[Box, Any] = {}
    if isinstance(array, jax.Array):
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                parts[boxes.box_of(shard.index, shape)] = shard.data
    else:
        parts[boxes.whole(shape)] = np.asarray(array)
    limit = max(1, PIECE // dtype.itemsize)
    for box in (p for joined in boxes.joined(parts) for p in boxes.cut(joined, limit)):
        values = np.empty(boxes.box_shape(box), dtype)
        for own, data in parts.items():
            common = boxes.overlap(own, box)
            if common is not None:
                values[boxes.within(common, box)] = _on_host(
                    data, boxes.within(common, own)
                )
        yield box, values.reshape(-1)


def _on_host(data: Any, index: tuple[slice, ...]) -> np.ndarray:
    if isinstance(data, jax.Array) and next(iter(data.devices())).platform != "cpu":
        return np.asarray(data[index])  # not all of it: the array would keep a copy
    return np.asarray(data)[index]


def _dtype(name: str, leaf: Any) -> Dtype:
    try:
        return of_numpy(leaf.dtype)
    except (AttributeError, TypeError, ValueError):
        what = getattr(leaf, "dtype", type(leaf).__name__)
        raise CheckpointError(
            f"{shown(name)} is {what}, which a checkpoint cannot hold; needs an array "
            "of numbers"
        ) from None


def _side_files(
    like: str, dtypes: Mapping[str, Dtype], changes: Mapping[str, Any]
) -> dict[str, bytes]:
    location, _ = hub.locate(like)
    folder = location if location.is_dir() else location.parent
    files = {}
    for name in side_files.names_of(folder):
        content = side_files.read_side_file(folder, name)
        if content is not None:
            files[name] = content
    if side_files.CONFIG in files:
        config = load_json(
            files[side_files.CONFIG], str(folder / side_files.CONFIG), constants=True
        )
        config = {**_fitted(config, dtypes), **changes}
        files[side_files.CONFIG] = side_files.as_json(config)
    return files


def _fitted(config: dict[str, Any], dtypes: Mapping[str, Dtype]) -> dict[str, Any]:
    """The configuration, with the dtype that the tensors have now."""
    floats = {dtype.numpy.name for dtype in dtypes.values() if dtype.kind == "float"}
    fitted = dict(config)
    if len(floats) == 1:
        (name,) = floats
        fitted |= {field: name for field in ("dtype", "torch_dtype") if field in config}
    if not any(dtype.kind == "float8" for dtype in dtypes.values()):
        fitted.pop("quantization_config", None)
    return fitted
