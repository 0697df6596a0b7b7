"""Reads what `torch.save` writes: `.bin`, `.pt`, `.pth`, `.ckpt`, without PyTorch.

Since PyTorch 1.6 that is a ZIP archive: a pickle, and a member for the bytes of each
storage, stored as they are, so that a tensor is a range of the file like one of
safetensors. Before, it was five pickles and then the storages, which is read as well.
The pickles are taken apart by `pickled`, which runs nothing.

A training checkpoint holds its model's tensors under `state_dict` or a like name,
beside numbers and an optimizer's state: those tensors are read, the rest is passed over
with a note. Tensors that are no row-major stretch of their storage are put into order
in memory, when they are first read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import pickled, zip_archive
from m3jax.checkpoints.formats.dtypes import DTYPES, Dtype
from m3jax.checkpoints.formats.pickled import Storage, View
from m3jax.checkpoints.formats.safetensors import TensorEntry
from m3jax.checkpoints.places.files import InputFile
from m3jax.checkpoints.source import FileTensor, Stored

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_PICKLE = 64_000_000  # bytes; that of 100 000 tensors has 25 MB
_MAX_NAME = 4096  # characters
_MODELS = ("state_dict", "model_state_dict", "model", "module")
# Of the first pickle of a file of before 1.6, and of its second.
_PROTO = b"\x80"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_TRUSTED = (
    "if you trust it, load it with torch.load(FILE, weights_only=False) and save the "
    "tensors alone: torch.save(model.state_dict(), FILE)"
)

_DAMAGED = "fetch it again, or save it again with torch.save"

Place = Callable[[Storage], int]  # its first byte in the file


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
      tensors: by name.
      notes: what is not read of it, one line each.
      memory: bytes that reading the tensors holds.
    """

    tensors: dict[str, Stored]
    notes: list[str]
    memory: int


@dataclasses.dataclass(frozen=True)
class Reordered:
    """A tensor whose elements lie in another order than its own, held in memory."""

    stretch: FileTensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> Dtype:
        return self.stretch.dtype

    @property
    def output_dtype(self) -> Dtype:
        return self.stretch.dtype

    @property
    def place(self) -> str:
        return self.stretch.place

    @functools.cached_property
    def _ordered(self) -> np.ndarray:
        stored = np.empty(self.stretch.shape, self.dtype.numpy)
        self.stretch.read_into(stored, 0)
        steps = [stride * stored.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(stored, self.shape, steps)
        return view.reshape(-1)

    def read_into(self, out: np.ndarray, start: int) -> None:
        out[:] = self._ordered[start : start + len(out)]


def read_tensors(file: InputFile) -> Contents:
    """The tensors of a file by name.

    Raises:
      CheckpointError: naming the file, what is wrong with it and the way out.
    """
    try:
        start = file.read(0, min(file.size, 4))
        if start == zip_archive.MAGIC:
            value, place = _archive(file)
        elif start.startswith(_PROTO):
            value, place = _before_archives(file)
        else:
            raise CheckpointError(
                f"starts with {shown(start)}, so it is no file of torch.save; "
                f"{_DAMAGED}"
            )
        views, notes = _state(value)
        tensors = {name: _stored(file, name, v, place) for name, v in views.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    memory = sum(
        math.prod(tensor.shape) * tensor.dtype.itemsize
        for tensor in tensors.values()
        if isinstance(tensor, Reordered)
    )
    return Contents(tensors, [f"{file.path}: {note}" for note in notes], 2 * memory)


def _archive(file: InputFile) -> tuple[Any, Place]:
    """The value of an archive's pickle, and what finds its storages."""
    try:
        members = zip_archive.members(file)
        names = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise CheckpointError("is no archive of torch.save: needs one data.pkl")
        folder = names[0].removesuffix("data.pkl")
        if any(n.startswith((f"{folder}code/", f"{folder}constants")) for n in members):
            raise CheckpointError("is a program of TorchScript, not tensors alone")
        order = members.get(f"{folder}byteorder")
        if order and _content(file, order, 16).strip() != b"little":
            raise CheckpointError("has numbers in another order of bytes than little")
        text = _content(file, members[names[0]], _MAX_PICKLE)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_DAMAGED}") from None
    value = _unpickled(text, 0).value

    @functools.cache
    def place(storage: Storage) -> int:
        member = members.get(f"{folder}data/{storage.key}")
        size = storage.count * _itemsize(storage)
        if member is None or member.size != size:
            found = "nothing" if member is None else f"{member.size} bytes"
            raise CheckpointError(
                f"has {found} for storage {shown(storage.key)} of {size} bytes; "
                f"{_DAMAGED}"
            )
        return zip_archive.start_of(file, member)

    return value, place


def _itemsize(storage: Storage) -> int:
    return 1 if storage.code is None else DTYPES[storage.code].itemsize


def _content(file: InputFile, member: zip_archive.Member, limit: int) -> bytes:
    if member.size > limit:
        raise CheckpointError(f"has {member.size} bytes as {shown(member.name)}")
    return file.read(zip_archive.start_of(file, member), member.size)


def _before_archives(file: InputFile) -> tuple[Any, Place]:
    """The same of a file of before PyTorch 1.6."""
    text = file.read(0, min(file.size, _MAX_PICKLE))
    magic = _unpickled(text, 0)
    if magic.value != _MAGIC:
        raise CheckpointError(
            "is a pickle, but not one of torch.save, so it holds no tensors; "
            f"{_TRUSTED}"
        )
    protocol = _unpickled(text, magic.stop)
    system = _unpickled(text, protocol.stop)
    little = isinstance(system.value, dict) and system.value.get("little_endian")
    if protocol.value != _PROTOCOL or little is not True:
        raise CheckpointError("is of an unknown kind of torch.save; save it again")
    value, stop, storages = _unpickled(text, system.stop)
    keys, stop, _ = _unpickled(text, stop)
    starts: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.code is None or key in starts:
            raise CheckpointError("names storages that it does not hold")
        size = storage.count * _itemsize(storage)
        if stop + 8 + size > file.size:
            raise CheckpointError(
                f"needs {stop + 8 + size} bytes, has {file.size}; it was cut off: "
                "fetch it again"
            )
        if int.from_bytes(file.read(stop, 8), "little") != storage.count:
            raise CheckpointError("has storages of other sizes than it says")
        starts[key], stop = stop + 8, stop + 8 + size
    if stop != file.size:
        raise CheckpointError(f"has {file.size - stop} bytes behind its end")

    def place(storage: Storage) -> int:
        if storage.key not in starts or storages[storage.key] != storage:
            raise CheckpointError(f"has no storage {shown(storage.key)}")
        return starts[storage.key]

    return value, place


def _unpickled(text: bytes, start: int) -> pickled.Pickle:
    try:
        return pickled.load(text, start)
    except pickled.ForeignError as error:
        raise CheckpointError(f"{error}; none of it was run; {_TRUSTED}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_DAMAGED}") from None


def _state(value: Any) -> tuple[dict[str, View], list[str]]:
    """A model's tensors among what was pickled, and what is said of the rest."""
    if not isinstance(value, dict):
        raise CheckpointError(
            f"holds a {type(value).__name__.lower()}, needs a dict of tensors; "
            f"{_TRUSTED}"
        )
    inner = [key for key in _MODELS if _views(value.get(key))]
    if len(inner) > 1:
        raise CheckpointError(
            f"holds tensors under {' and '.join(inner)}; save one of them alone: "
            f"torch.save(torch.load(FILE)[{inner[0]!r}], NEW_FILE)"
        )
    notes = []
    if inner:
        beside = [str(key) for key in value if key != inner[0]]
        notes += [f"its {inner[0]!r} is read{_passed_over(beside)}"]
        value = value[inner[0]]
    views = _views(value)
    deeper = [str(k) for k, v in value.items() if isinstance(v, dict) and _views(v)]
    if not views or (deeper and not inner):
        raise CheckpointError(
            f"holds {'no tensors' if not deeper else 'dicts of tensors'} under "
            f"{', '.join(map(shown, [*map(str, value)][:3])) or 'nothing'}; save the "
            "tensors alone: torch.save(model.state_dict(), FILE)"
        )
    others = [str(key) for key in value if key not in views]
    notes += [f"{len(views)} tensors are read{_passed_over(others)}"] * bool(others)
    return views, notes


def _passed_over(names: list[str]) -> str:
    few = ", ".join(shown(name, 40) for name in names[:3])
    return f"; {few}{', …' * (len(names) > 3)} passed over" if names else ""


def _views(value: Any) -> dict[str, View]:
    if not isinstance(value, Mapping):
        return {}
    return {
        key: view
        for key, view in value.items()
        if isinstance(key, str) and isinstance(view, View)
    }


def _stored(file: InputFile, name: str, view: View, place: Place) -> Stored:
    """The tensor in the file, once its elements are known to lie in its storage."""
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise CheckpointError(f"has a tensor named {shown(name)}; rename it")
    dtype, storage = DTYPES[view.code], view.storage
    count = storage.count * _itemsize(storage) // dtype.itemsize
    size = math.prod(view.shape)
    # Of an axis of one element the stride is of no matter.
    axes = [(n, s) for n, s in zip(view.shape, view.strides, strict=True) if n != 1]
    reach = 1 + sum((n - 1) * s for n, s in axes) if size else 0
    if view.offset + reach > count or size > count or len(view.shape) > 64:
        raise CheckpointError(
            f"says that {shown(name)}, {dtype.code} of shape {shown(view.shape)}, lies "
            f"in a storage of {count} elements; save it again with its tensors "
            "contiguous: torch.save({n: t.contiguous() for n, t in tensors.items()})"
        )
    start = place(storage) + view.offset * dtype.itemsize
    expected = [math.prod(view.shape[i + 1 :]) for i in range(len(view.shape))]
    in_order = not size or all(
        n == 1 or stride == own
        for n, stride, own in zip(view.shape, view.strides, expected, strict=True)
    )
    shape = view.shape if in_order else (reach,)
    entry = TensorEntry(dtype, shape, start, start + math.prod(shape) * dtype.itemsize)
    stretch = FileTensor(file, entry)
    return stretch if in_order else Reordered(stretch, view.shape, view.strides)
