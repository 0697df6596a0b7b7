"""Base and models as a user gives them: paths, or pytrees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import jax

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats import tree
from m3jax.checkpoints.places import store
from m3jax.checkpoints.places.files import InputFile

_SAMPLE, _SAMPLES = 4096, 16  # bytes, and so many stretches of them


def local(output: str) -> Path:
    """The folder of an output, which cannot be in a store."""
    path = store.parse(output)
    if not isinstance(path, Path):
        raise CheckpointError(
            f"{output}: it is written to a folder of this machine; choose "
            "another --output, and copy it afterwards"
        )
    return path


def is_path(model: Any) -> bool:
    """Whether it is a path rather than a pytree."""
    return isinstance(model, str | PathLike)


def names_of(models: Sequence[Any]) -> list[str]:
    """Short names of the models, all different."""
    paths = [fspath(m) if is_path(m) else f"model {i}" for i, m in enumerate(models)]
    names = [Path(path).name or path for path in paths]
    return names if len({"base", *names}) == len(names) + 1 else paths


def described(model: Any, *, anywhere: bool = False) -> Any:
    """What tells an input from another one, without reading all of it.

    Args:
      anywhere: a copy on another machine is the same input.
    """
    if model is None:
        return None
    if not is_path(model):
        leaves = jax.tree.leaves_with_path(model)
        return [
            [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)]
            for path, leaf in leaves
        ]
    with open_checkpoint(fspath(model)) as checkpoint:
        if anywhere and checkpoint.files:
            return [
                [file.path.name, file.size, _sampled(file)] for file in checkpoint.files
            ]
        files = [
            [str(file.path.resolve()), file.size, file.version]
            for file in checkpoint.files
        ]
    return {"path": fspath(model), "files": files}


def _sampled(file: InputFile) -> str:
    """A digest of some of a file, from its beginning to its end."""
    count = min(_SAMPLE, file.size)
    last = file.size - count
    starts = [last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    content = b"".join(file.read(start, count) for start in starts)
    return hashlib.sha256(content).hexdigest()


def tensor_names(model: Any) -> list[str]:
    """The names of a model's tensors."""
    if not is_path(model):
        return list(tree.flatten(model)[0])
    with open_checkpoint(fspath(model)) as checkpoint:
        return list(checkpoint.tensors)
