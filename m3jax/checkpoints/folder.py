"""Opens a checkpoint: a folder, a single file or a Hugging Face id.

Its tensors are safetensors, PyTorch's pickles, Flax's msgpack, GGUF or an Orbax pytree;
a PEFT adapter stands for its base with the adapter on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from m3jax.checkpoints import adapters, side_files, weights
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import (
    flax_msgpack,
    gguf,
    gguf_config,
    orbax,
    torch_file,
)
from m3jax.checkpoints.formats.index import check_index
from m3jax.checkpoints.formats.safetensors import header_of
from m3jax.checkpoints.formats.tree import SEPARATOR, KeyPath
from m3jax.checkpoints.places import hub
from m3jax.checkpoints.places.files import InputFile, Location, open_file
from m3jax.checkpoints.source import FileTensor, Source, Stored
from m3jax.checkpoints.sources import quantised

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; nothing but headers has been read.

    Attributes:
      name: the path or id as the user gave it.
      location: where it lies, on this machine or in a store.
      revision: the commit of a Hugging Face repository.
      stored: tensors as the files hold them, in order of their names.
      tensors: the tensors to merge, dequantised.
      files: the files that hold the tensors.
      config: config.json, if there is one.
      format: ``safetensors``, ``torch``, ``msgpack``, ``gguf`` or ``orbax``.
      paths: of each tensor in the pytree; None where names split at "." say it.
      cache_bytes: that opening it and reading hold beside the caller's buffers, at
        most.
      changes: fields of config.json that `config` has and its file has not; a value of
        None removes the field.
      notes: what was done to open it that a user may not expect, one line each.
      dequantised: the kinds of codes whose weights stand in `tensors`.
      built: what m3jax.json says of how it was put together, where it was.
      made: contents of side files that its folder lacks, by name.
      words: the folder of its tokenizer, where that is another than its own.
      parts: name and folder of each checkpoint that it is put together of, if of many.
    """

    name: str
    location: Location
    revision: str | None
    stored: Mapping[str, Stored]
    tensors: Mapping[str, Source]
    files: tuple[InputFile, ...]
    config: dict[str, Any] | None
    format: str = "safetensors"
    paths: Mapping[str, KeyPath] | None = None
    cache_bytes: int = 0
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dequantised: tuple[str, ...] = ()
    built: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    made: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    words: Location | None = None
    parts: tuple[tuple[str, Location], ...] = ()

    @property
    def parents(self) -> tuple[tuple[str, Location], ...]:
        """Name and folder of each checkpoint that this one is, or is made of."""
        return self.parts or ((self.name, self.folder),)

    @property
    def folder(self) -> Location:
        return self.location if self.location.is_dir() else self.location.parent

    @property
    def tokenizer_folder(self) -> Location:
        return self.words or self.folder

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(
    name: str, *, mergeable: bool = True, base: str | None = None
) -> Checkpoint:
    """Opens the checkpoint that `name` stands for and checks its files.

    Args:
      name: a folder with ``model.safetensors`` or an index and its shards, with an
        Orbax pytree or a ``.msgpack`` file of Flax, with a PEFT adapter, a single file,
        the URL of one of these in an object store, a Hugging Face id
        ``org/name[@revision]``, or ``BASE+ADAPTER`` of these.
      mergeable: dequantise, refuse what cannot be, and put an adapter on its base;
        False leaves `tensors` as they are stored.
      base: what an adapter is put on; None: the base that it names itself.

    Raises:
      CheckpointError: one line that names the file, the tensor and the flaw.
      OSError: a file cannot be read; it names the file.
    """
    together = None if hub.is_here(name) else adapters.parts(name)
    if together is not None:
        return _adapted(name, together[0], hub.locate(together[1])[0])
    location, revision = hub.locate(name)
    adapter = adapters.alone(location)
    if adapter is not None:
        if mergeable:
            return _adapted(name, base, adapter)
        return _adapter_alone(name, adapter, revision)
    is_folder = location.is_dir()
    config = side_files.read_config(location if is_folder else location.parent)
    item = _orbax_item(location) if is_folder else None
    with contextlib.ExitStack() as stack:
        if item is not None:
            opened = _Opened("orbax", *orbax.read_item(item))
        elif is_folder:
            opened = _open_files(weights.find(location), stack)
        else:
            opened = _open_files(weights.of_file(location, whole=mergeable), stack)
        stored = dict(sorted(opened.stored.items()))
        notes, made = opened.notes, {}
        if config is None and opened.format == weights.GGUF:
            file = opened.files[0]
            config, lacking = gguf_config.config_of(gguf.read_metadata(file), stored)
            beside = f"{file.path}: no {side_files.CONFIG} beside it"
            if config is None:
                line = f"and its metadata lack {lacking}; copy the original model's"
            else:
                line = "its metadata are read as one"
                made = {side_files.CONFIG: side_files.as_json(config)}
            notes = (*notes, f"{beside}, {line}")
        weighed = quantised.Weights(dict(stored), (), 0)
        if mergeable:
            try:
                weighed = quantised.weights_of(stored, config)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from None
        stack.pop_all()
    return Checkpoint(
        name,
        location,
        revision,
        stored,
        weighed.tensors,
        opened.files,
        config,
        opened.format,
        opened.paths,
        opened.cache_bytes + weighed.memory,
        notes=notes,
        dequantised=weighed.kinds,
        made=made,
    )


def _adapted(name: str, base: str | None, folder: Location) -> Checkpoint:
    """The base with the adapter of a folder on it; both names are the user's."""
    own = name.rpartition("+")[2]
    with contextlib.ExitStack() as stack:
        adapter = stack.enter_context(adapters.open_adapter(own, folder))
        base = base or adapter.config.base
        if base is None:
            raise CheckpointError(
                f"{own}: an adapter (LoRA) that does not say what it was trained on; "
                f"give BASE+{own}, or --base"
            )
        try:
            under = stack.enter_context(open_checkpoint(base))
        except CheckpointError as error:
            error.add_note(f"it is the base of the adapter {own}")
            raise
        made = adapters.adapted(name, under, adapter)
        stack.pop_all()
    return made


def _adapter_alone(name: str, folder: Location, revision: str | None) -> Checkpoint:
    """The adapter's own tensors, to look at."""
    adapter = adapters.open_adapter(name, folder)
    return Checkpoint(
        name,
        folder,
        revision,
        adapter.tensors,
        adapter.tensors,
        (adapter.file,),
        None,
        "adapter",
    )


class _Opened(NamedTuple):
    """What the files hold; see `Checkpoint`."""

    format: str
    stored: Mapping[str, Stored]
    paths: Mapping[str, KeyPath] | None
    cache_bytes: int
    files: tuple[InputFile, ...]
    notes: tuple[str, ...] = ()


def _orbax_item(folder: Location) -> Location | None:
    """The Orbax pytree of a folder that holds no safetensors files."""
    if any(path.name.endswith(".safetensors") for path in folder.iterdir()):
        return None
    return orbax.find_item(folder)


def _open_files(found: weights.Weights, stack: contextlib.ExitStack) -> _Opened:
    """Opens the files and puts together what they hold.

    Where there is an index, it decides which file a tensor is read from.
    """
    files: list[InputFile] = []
    stored: dict[str, Stored] = {}
    notes = [*found.notes]
    cache = 0
    held: dict[str, list[str]] = {}
    weight_map = found.weight_map
    flat = found.format == weights.MSGPACK and len(found.paths) > 1
    if weight_map and flat:
        weight_map = _nested_names(weight_map)
    for path in found.paths:
        files.append(stack.enter_context(open_file(path)))
        tensors, said, memory = _read(found.format, files, len(found.paths))
        tensors = _nested_names(tensors) if flat else tensors
        notes += said
        cache += memory
        for name, source in tensors.items():
            held.setdefault(name, []).append(path.name)
            if weight_map and weight_map.get(name) != path.name:
                continue
            if name in stored:
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} also stands in "
                    f"{shown(stored[name].place)}; remove one of them"
                )
            stored[name] = source
    if weight_map is not None:
        notes += check_index(found.index, weight_map, held)
    return _Opened(found.format, stored, None, cache, tuple(files), tuple(notes))


def _nested_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """What the shards of transformers' Flax models name as paths, by tensor names."""
    named = {name.replace("/", SEPARATOR): value for name, value in tensors.items()}
    if len(named) < len(tensors):
        raise CheckpointError("two tensors whose names differ by '/' and '.' alone")
    return named


def _read(
    form: str, files: list[InputFile], count: int
) -> tuple[Mapping[str, Stored], list[str], int]:
    """The tensors of the last file, of so many: notes, and what reading them holds."""
    file = files[-1]
    if form == weights.TORCH:
        return torch_file.read_tensors(file)
    if form == weights.MSGPACK:
        return flax_msgpack.read_tensors(file), [], flax_msgpack.memory(file)
    if form == weights.GGUF:
        return gguf.read_tensors(file, files[:-1], count)
    entries = header_of(file).tensors
    return {name: FileTensor(file, entry) for name, entry in entries.items()}, [], 0
