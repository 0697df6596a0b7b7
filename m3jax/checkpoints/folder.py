"""Opens a checkpoint: a folder, a single file or a Hugging Face id.

Its tensors are safetensors, an Orbax pytree or Flax's msgpack; a PEFT adapter stands
for its base with the adapter on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from m3jax.checkpoints import adapters, side_files
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import flax_msgpack, orbax
from m3jax.checkpoints.formats.index import check_index, read_index
from m3jax.checkpoints.formats.safetensors import header_of
from m3jax.checkpoints.formats.tree import KeyPath
from m3jax.checkpoints.places import hub
from m3jax.checkpoints.places.files import (
    InputFile,
    Location,
    exists,
    inside,
    open_file,
)
from m3jax.checkpoints.source import FileTensor, Source, Stored
from m3jax.checkpoints.sources.float8 import dequantise

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLAX = ".msgpack"
_OTHER_FORMATS = (".gguf", ".ggml", ".h5", ".npz", ".onnx", ".tflite")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; nothing but headers has been read.

    Attributes:
      name: the path or id as the user gave it.
      location: where it lies, on this machine or in a store.
      revision: the commit of a Hugging Face repository.
      stored: tensors as the files hold them, in order of their names.
      tensors: the tensors to merge: float8 dequantised.
      files: the files that hold the tensors.
      config: config.json, if there is one.
      format: ``safetensors``, ``orbax`` or ``msgpack``.
      paths: of each tensor in the pytree; None where names split at "." say it.
      cache_bytes: that opening it and reading hold beside the caller's buffers, at
        most.
      changes: fields of config.json that `config` has and its file has not; a value of
        None removes the field.
      notes: what the user should know of how it was opened, one line each.
      built: what m3jax.json says of how it was put together, where it was.
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
    built: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Location:
        return self.location if self.location.is_dir() else self.location.parent

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
      mergeable: dequantise float8 and put an adapter on its base; False leaves
        `tensors` as they are stored.
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
        stored: Mapping[str, Stored]
        paths, cache = None, 0
        if item is not None:
            kind = "orbax"
            stored, paths, cache, files = orbax.read_item(item)
        else:
            kind, stored, files = _open_files(location, is_folder, stack)
            if kind == "msgpack":
                cache = flax_msgpack.memory(files[0])
        stored = dict(sorted(stored.items()))
        tensors = _mergeable(name, stored, config) if mergeable else dict(stored)
        stack.pop_all()
    return Checkpoint(
        name,
        location,
        revision,
        stored,
        tensors,
        files,
        config,
        kind,
        paths,
        cache,
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


def _orbax_item(folder: Location) -> Location | None:
    """The Orbax pytree of a folder that holds no safetensors files."""
    if any(path.name.endswith(".safetensors") for path in folder.iterdir()):
        return None
    return orbax.find_item(folder)


def _open_files(
    location: Location, is_folder: bool, stack: contextlib.ExitStack
) -> tuple[str, dict[str, Stored], tuple[InputFile, ...]]:
    """Format, tensors and files of a checkpoint whose tensors stand in plain files."""
    paths, weight_map = _weights(location) if is_folder else ([location], None)
    files: list[InputFile] = []
    stored: dict[str, Stored] = {}
    for path in paths:
        _check_format(path)
        files.append(stack.enter_context(open_file(path)))
        if path.name.endswith(_FLAX):
            return "msgpack", dict(flax_msgpack.read_tensors(files[0])), (files[0],)
        for tensor, entry in header_of(files[-1]).tensors.items():
            if tensor in stored:
                raise CheckpointError(
                    f"{path}: tensor {shown(tensor)} also stands in "
                    f"{shown(stored[tensor].place)}; remove one of them"
                )
            stored[tensor] = FileTensor(files[-1], entry)
    if weight_map is not None:
        held = {tensor: source.place for tensor, source in stored.items()}
        check_index(location / INDEX, weight_map, held)
    return "safetensors", stored, tuple(files)


def _mergeable(
    name: str, stored: Mapping[str, Stored], config: dict[str, Any] | None
) -> dict[str, Source]:
    try:
        tensors = dequantise(stored, config)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    return tensors


def _weights(folder: Location) -> tuple[list[Location], dict[str, str] | None]:
    """The files of a folder that hold its tensors, and its index if that is used.

    As in transformers, a whole `model.safetensors` has precedence over an index.
    """
    weight_map = None
    if exists(folder / WEIGHTS):
        names = [WEIGHTS]
    elif exists(folder / INDEX):
        weight_map = read_index(inside(folder, INDEX))
        names = sorted(set(weight_map.values()))
    else:
        present = sorted(path.name for path in folder.iterdir())
        visible = [name for name in present if not name.startswith(".")]
        names = [name for name in visible if name.endswith(".safetensors")]
        if not names:  # Flax's, if there is one
            flax = [name for name in visible if name.endswith(_FLAX)]
            names = flax if len(flax) == 1 else []
        if len(names) != 1 or names[0] in _ADAPTERS:
            raise CheckpointError(f"{folder}: {_no_weights(present, names)}")
    return [inside(folder, name) for name in names], weight_map


def _no_weights(present: list[str], safetensors: list[str]) -> str:
    """What is wrong with a folder of these files, and the way out."""
    if set(present) & set(_ADAPTERS):
        return (
            "holds an adapter (LoRA), not a model; merge it into its base model first, "
            "for example with peft: merge_and_unload() and save_pretrained(NEW_FOLDER)"
        )
    if safetensors:
        few = ", ".join([*map(shown, safetensors[:3]), "…"][: len(safetensors)])
        return (
            f"{len(safetensors)} safetensors files ({few}) and neither {WEIGHTS} nor "
            f"{INDEX}; give one file, or add the index"
        )
    for name in present:
        if name.endswith(_PICKLED):
            return f"only pickled weights ({shown(name)}); {_HOW_TO_UNPICKLE}"
        if name.endswith(_OTHER_FORMATS):
            return f"weights in another format ({shown(name)}); {_HOW_TO_CONVERT}"
    return (
        f"neither {WEIGHTS} nor {INDEX}; give the folder of a model in Hugging Face's "
        "format, or fetch it again if its download was interrupted"
    )


def _check_format(path: Location) -> None:
    if path.name.endswith(_PICKLED):
        raise CheckpointError(f"{path}: pickled weights; {_HOW_TO_UNPICKLE}")
    if path.name.endswith(_OTHER_FORMATS):
        raise CheckpointError(f"{path}: another format; {_HOW_TO_CONVERT}")


_HOW_TO_CONVERT = (
    "convert them to safetensors, for example with transformers: "
    "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)
_HOW_TO_UNPICKLE = f"unpickling runs code, so they are not read; {_HOW_TO_CONVERT}"
