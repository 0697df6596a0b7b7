"""Loads a checkpoint into device memory, each device its own shards."""

from __future__ import annotations

import concurrent.futures
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats import boxes, tree
from m3jax.checkpoints.formats.boxes import Box
from m3jax.checkpoints.formats.dtypes import FLOAT32, FLOAT64
from m3jax.checkpoints.source import Converted, Source, read_whole
from m3jax.engine.pipeline import available_cores
from m3jax.engine.sharding_rules import by_rules

# Bytes of a tensor that stand in host memory on their way to a device; each thread
# holds two such pieces.
PIECE = 64 << 20
MAX_THREADS = 4
_ALIGNMENT = 64  # bytes; XLA's CPU backend takes over such memory without a copy


def load(
    path: str | PathLike[str],
    sharding: Mesh
    | Sharding
    | Callable[[str, tuple[int, ...]], Sharding]
    | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint as a pytree: nested dicts, names split at ".".

    An Orbax pytree keeps its own structure, lists included.

        >>> import m3jax
        >>> _ = m3jax.save({"norm": {"weight": jnp.ones(4)}}, folder)
        >>> m3jax.load(folder)["norm"]["weight"]
        Array([1., 1., 1., 1.], dtype=float32)

    Sharded, every process reads the bytes of its own devices' shards and no others.
    On an accelerator host memory is bounded, whatever the size of the model: at most
    eight pieces of 64 MB.

    Args:
      path: a folder (of safetensors, or with an Orbax pytree or Flax's msgpack), a
        file of these or a Hugging Face id.
      sharding: where the arrays go. None: whole, to JAX's default device. A mesh:
        every tensor is split over all its devices along the first axis that divides.
        A sharding: all tensors have it. A function (name, shape) -> sharding, such as
        `m3jax.engine.sharding_rules.by_rules` makes: each tensor has its own.

    Returns:
      Arrays of the stored dtypes. float8, with the scales that stand beside it, comes
      as float32, in which it is merged, and so does float64 unless JAX has 64 bits
      on. 64-bit integers then come as NumPy arrays: they lose no bits.

    Raises:
      CheckpointError: one line that names the file and the tensor.
      ValueError: a sharding does not fit a tensor.
    """
    with open_checkpoint(fspath(path)) as checkpoint:
        tensors = [
            (_narrow(source), _sharding_of(name, source.shape, sharding))
            for name, source in checkpoint.tensors.items()
        ]
        # What the caller has set for its own thread, for ours too.
        x64 = _fits(np.dtype(np.int64))
        (device,) = jnp.zeros(()).devices()

        def read(tensor: tuple[Source, Sharding | None]) -> Any:
            with jax.enable_x64(x64), jax.default_device(device):
                return read_tensor(*tensor)

        with concurrent.futures.ThreadPoolExecutor(num_threads()) as pool:
            arrays = dict(zip(checkpoint.tensors, pool.map(read, tensors), strict=True))
        for file in checkpoint.files:
            file.check_unchanged()
    return tree.nest(arrays, checkpoint.paths)


def read_tensor(
    source: Source, sharding: Sharding | None = None, piece: int | None = None
) -> Any:
    """Reads one tensor, or this process's shards of it.

    Args:
      source: of the tensor.
      sharding: of the array; None for all of it on JAX's default device.
      piece: bytes of a piece on its way to a device. None: `PIECE`, but all at once
        to CPU devices, which take over the host's memory as it is.

    Returns:
      A `jax.Array`, or a NumPy array of 64-bit integers where JAX would cut them off.
    """
    shape, dtype = source.shape, source.dtype.numpy
    if not _fits(dtype):
        return read_whole(source)
    if piece is None:
        devices: Any = (
            jnp.zeros(()).devices() if sharding is None else sharding.device_set
        )
        on_cpu = all(device.platform == "cpu" for device in devices)
        piece = max(1, math.prod(shape)) * dtype.itemsize if on_cpu else PIECE
    holders: dict[Box, list[Any]] = {}
    if sharding is None:
        holders[boxes.whole(shape)] = [None]  # no device in particular
        return read_shards(source, holders, piece)[None]
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(boxes.box_of(index or (), shape), []).append(device)
    shards = read_shards(source, holders, piece)
    return jax.make_array_from_single_device_arrays(
        shape, sharding, list(shards.values()), dtype=dtype
    )


def read_shards(
    source: Source, holders: Mapping[Box, Sequence[Any]], piece: int
) -> dict[Any, jax.Array]:
    """Reads parts of a tensor, each byte once, and sends them to their devices.

    Args:
      source: of the tensor.
      holders: the devices that hold each part.
      piece: bytes to hold in host memory at a time; two of these are.

    Returns:
      The part of each device.
    """
    dtype = source.dtype.numpy
    limit = max(1, piece // dtype.itemsize)
    shards: dict[Any, jax.Array] = {}
    before: list[jax.Array] = []

    def blank(own: Box, device: Any) -> jax.Array:
        return jnp.zeros(boxes.box_shape(own), dtype, device=device)

    joined = boxes.joined(holders)
    for box in (part for whole in joined for part in boxes.cut(whole, limit)):
        values = _read(source, box)
        jax.block_until_ready(before)
        before = []
        for own, devices in holders.items():
            common = boxes.overlap(own, box)
            if common is None:
                continue
            for device in devices:
                sent = jax.device_put(values[boxes.within(common, box)], device)
                before.append(sent)
                if common == own:
                    shards[device] = sent
                    continue
                shard = shards.get(device)
                shard = blank(own, device) if shard is None else shard
                corner = [edges.start for edges in boxes.within(common, own)]
                shards[device] = _insert(shard, sent, np.array(corner))
    if math.prod(source.shape) == 0:
        shards = {d: blank(own, d) for own, devices in holders.items() for d in devices}
    return shards


@functools.partial(jax.jit, donate_argnums=0)
def _insert(array: jax.Array, part: jax.Array, corner: jax.Array) -> jax.Array:
    """The array with `part` put at `corner`, in place."""
    return jax.lax.dynamic_update_slice(array, part, tuple(corner))


def _read(source: Source, box: Box) -> np.ndarray:
    shape, dtype = boxes.box_shape(box), source.dtype.numpy
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    values = memory[first : first + size].view(dtype)
    read_box = getattr(source, "read_box", None)
    if read_box is not None:  # it is stored in boxes, too
        read_box(values.reshape(shape), box)
        return values.reshape(shape)
    place = 0
    for start, count in boxes.runs(box, source.shape):
        source.read_into(values[place : place + count], start)
        place += count
    return values.reshape(shape)


def _narrow(source: Source) -> Source:
    """float64 as float32, unless JAX has 64 bits on."""
    wide = source.dtype == FLOAT64 and not _fits(source.dtype.numpy)
    return Converted(source, FLOAT32) if wide else source


def _sharding_of(name: str, shape: tuple[int, ...], sharding: Any) -> Sharding | None:
    if isinstance(sharding, Mesh):
        sharding = by_rules(sharding)
    if callable(sharding):
        sharding = sharding(name, shape)
    if not isinstance(sharding, Sharding | None):
        raise TypeError(
            f"sharding={sharding!r} needs a Mesh, a Sharding, or a function "
            "(name, shape) -> Sharding"
        )
    if sharding is not None:
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise ValueError(f"tensor {shown(name)}: {error}") from None
    return sharding


def _fits(dtype: np.dtype) -> bool:
    """Whether JAX has this dtype, or would narrow it because 64 bits are off."""
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def num_threads() -> int:
    return min(MAX_THREADS, available_cores() + 1)
