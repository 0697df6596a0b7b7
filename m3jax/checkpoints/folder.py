"""Opens a checkpoint: a folder, a single safetensors file or a Hugging Face id."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from m3jax.checkpoints import hub, side_files
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.float8 import dequantise
from m3jax.checkpoints.safetensors import Header, load_json, open_regular, read_header
from m3jax.checkpoints.sources import FileTensor, Float32, InputFile, Source

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_INDEX = 100_000_000  # bytes; the index of a model of 600 B parameters has 9 MB


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; nothing but headers has been read.

    Attributes:
      name: the path or id as the user gave it.
      location: where it lies on this machine.
      revision: the commit of a Hugging Face repository.
      stored: tensors as the files hold them, in order of their names.
      tensors: the tensors to merge: float8 dequantised, float64 as float32.
      files: the files that hold the tensors.
      config: config.json, if there is one.
    """

    name: str
    location: Path
    revision: str | None
    stored: Mapping[str, FileTensor]
    tensors: Mapping[str, Source]
    files: tuple[InputFile, ...]
    config: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        return self.location if self.location.is_dir() else self.location.parent

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(name: str, *, mergeable: bool = True) -> Checkpoint:
    """Opens the checkpoint that `name` stands for and checks its files.

    Args:
      name: a folder with ``model.safetensors`` or an index and its shards, a single
        safetensors file, or a Hugging Face id ``org/name[@revision]``.
      mergeable: dequantise float8; False leaves `tensors` as they are stored.

    Raises:
      CheckpointError: one line that names the file, the tensor and the flaw.
    """
    location, revision = hub.locate(name)
    headers: dict[Path, Header] = {}
    for path in _weight_files(location):
        headers[path] = read_header(path)
    if location.is_dir() and (location / INDEX) in _listed(location):
        _check_index(location / INDEX, headers)
    config = side_files.read_config(
        location if location.is_dir() else location.parent
    )
    files: list[InputFile] = []
    try:
        stored: dict[str, FileTensor] = {}
        for path, header in headers.items():
            files.append(InputFile(path, header.file_size))
            for tensor, entry in header.tensors.items():
                if tensor in stored:
                    raise CheckpointError(
                        f"{path}: tensor {shown(tensor)} also stands in "
                        f"{stored[tensor].file.path.name}"
                    )
                stored[tensor] = FileTensor(files[-1], entry)
        stored = dict(sorted(stored.items()))
        tensors: dict[str, Source] = dict(stored)
        if mergeable:
            try:
                tensors = dequantise(tensors, config)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from None
            for tensor, source in tensors.items():
                if source.dtype.code == "F64":
                    tensors[tensor] = Float32(source)
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(
        name, location, revision, stored, tensors, tuple(files), config
    )


def _listed(folder: Path) -> set[Path]:
    """The index is used unless a whole `model.safetensors` stands beside it."""
    weights, index = folder / WEIGHTS, folder / INDEX
    return {weights} if weights.exists() else {index} if index.exists() else set()


def _weight_files(location: Path) -> list[Path]:
    if not location.is_dir():
        return [location]
    listed = _listed(location)
    if location / INDEX in listed:
        names = sorted(set(_weight_map(location / INDEX).values()))
    elif listed:
        names = [WEIGHTS]
    else:
        names = sorted(path.name for path in location.glob("*.safetensors"))
        if len(names) != 1:
            raise CheckpointError(_no_weights(location, names))
    return [inside(location, name) for name in names]


def _no_weights(folder: Path, names: list[str]) -> str:
    if names:
        return (
            f"{folder}: {len(names)} safetensors files ({', '.join(names[:3])}, …) "
            f"and neither {WEIGHTS} nor {INDEX}; give one file, or add the index"
        )
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        return (
            f"{folder}: only pickled weights (.bin or .pt), which are not read because "
            "unpickling runs code; convert them, for example with transformers: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return f"{folder}: neither {WEIGHTS} nor {INDEX}"


def _weight_map(index: Path) -> dict[str, str]:
    with open(open_regular(index), "rb") as file:
        text = file.read(_MAX_INDEX + 1)
    if len(text) > _MAX_INDEX:
        raise CheckpointError(f"{index}: larger than {_MAX_INDEX} bytes")
    weight_map = load_json(text, str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensors to files")
    for tensor, name in weight_map.items():
        if not is_plain_name(name):
            raise CheckpointError(
                f"{index}: tensor {shown(tensor)} is said to be in {shown(name)}; "
                "needs the plain name of a file in the same folder"
            )
    return weight_map


def is_plain_name(name: object) -> bool:
    """Whether `name` can only be that of a file in the folder that speaks of it."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name) < 256
        and name not in (".", "..")
        and not set("/\\") & set(name)
    )


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder; a link may lead only into the hub's cache.

    Raises:
      CheckpointError: the file is missing, or a link that leads elsewhere.
    """
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{folder}: file {shown(name)} is missing")
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise CheckpointError(
            f"{path}: a link that leads out of the folder, to {target}; copy the file "
            "into the folder"
        )
    return path


def _check_index(index: Path, headers: Mapping[Path, Header]) -> None:
    weight_map = _weight_map(index)
    held = {(t, path.name) for path, header in headers.items() for t in header.tensors}
    said = set(weight_map.items())
    for tensor, name in sorted(said - held)[:1]:
        raise CheckpointError(
            f"{index}: tensor {shown(tensor)} is said to be in {shown(name)}, "
            "which does not hold it"
        )
    for tensor, name in sorted(held - said)[:1]:
        raise CheckpointError(
            f"{index}: does not name tensor {shown(tensor)}, which {shown(name)} holds"
        )
