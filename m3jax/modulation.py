"""A task's model, made of what EMR-Merging wrote: one model, and masks and scales.

    m3jax merge --config.method=emr ... --output=unified
    m3jax modulate unified --task=maths

In memory, a task is a number of the same program, so that changing it compiles nothing:

    params = m3jax.modulation.load("unified")
    maths = jax.jit(m3jax.modulate)(params, params.tasks.index("maths"))
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.formats import tree
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.record.record import read_record
from m3jax.checkpoints.source import Derived, Source, read, read_whole
from m3jax.engine.load import load as load_params
from m3jax.engine.save import save
from m3jax.methods.emr import task_model

_BLOCK = 1 << 18  # elements that are computed at a time, a multiple of 8


@dataclasses.dataclass(frozen=True)
class Unified:
    """The model of all tasks and what makes each task's of it; a pytree.

    Attributes:
      base, unified: θ0 and θ0 + τ, nested dicts.
      masks: M_k by the tensor's name, (K, ⌈n / 8⌉) uint8: bits of `numpy.packbits`.
        Tensors without masks were not merged.
      scales: λ_k, (K,) float32.
      heads: what was excluded from the merge, of each task's own model, by name and
        place of the task.
      tasks: their names; no leaf.
    """

    base: Any
    unified: Any
    masks: dict[str, jax.Array]
    scales: jax.Array
    heads: dict[str, dict[int, jax.Array]]
    tasks: tuple[str, ...]


jax.tree_util.register_dataclass(
    Unified,
    data_fields=["base", "unified", "masks", "scales", "heads"],
    meta_fields=["tasks"],
)


def modulate(params: Unified, task: Any) -> Any:
    """θ0 + λ_k M_k ⊙ τ, with the structure and dtypes of the unified model.

    Args:
      params: from `load`.
      task: a task's name, or its number from 0, which may be an argument of a `jit`
        around this; one that is out of range then counts from the end, or is the last.

    Raises:
      CheckpointError: there is no such task, or tasks have heads of their own shapes
        and the task is an argument of a `jit`.
    """
    known = isinstance(task, str) or not isinstance(task, jax.core.Tracer)
    if known:
        task = place_of(task, params.tasks)
    leaves, structure = tree.flatten(params.unified)
    base, _ = tree.flatten(params.base)
    scale, made = params.scales[task], []
    for name, leaf in leaves.items():
        if name in params.masks:
            dtype = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
            own, wide = (jnp.asarray(x, dtype) for x in (base[name], leaf))
            bits = jnp.unpackbits(params.masks[name][task], count=leaf.size)
            mask = bits.reshape(leaf.shape).astype(bool)
            found = task_model(own, wide - own, mask, scale.astype(dtype))
            leaf = found.astype(leaf.dtype)
        elif name in params.heads:
            heads = params.heads[name]
            if known:
                leaf = heads.get(task, leaf)
            else:
                each = [heads.get(k, leaf) for k in range(len(params.tasks))]
                leaf = _stacked(each, name)[task]
        made.append(leaf)
    return structure(made)


def _stacked(heads: list[jax.Array], name: str) -> jax.Array:
    if len({(own.shape, own.dtype) for own in heads}) > 1:
        shapes = ", ".join(f"{own.dtype} {list(own.shape)}" for own in heads)
        raise CheckpointError(
            f"tensor {shown(name)} differs between the tasks ({shapes}): give the task "
            "by name, not as an argument of jit"
        )
    return jnp.stack(heads)


def load(
    folder: str | PathLike[str], base: str | PathLike[str] | None = None
) -> Unified:
    """Loads what EMR-Merging wrote; the masks stay packed.

    Args:
      folder: an output of method `emr`.
      base: the base model; None: that of the folder's record.

    Raises:
      CheckpointError: it is no such folder, or not the base that it was made with.
    """
    with _opened(fspath(folder), base) as emr:
        masks = {
            name: jnp.stack([jnp.asarray(read_whole(mask)) for mask in own])
            for name, own in emr.masks.items()
        }
        return Unified(
            base=load_params(emr.base.name),
            unified=load_params(fspath(folder)),
            masks=masks,
            scales=jnp.asarray(emr.scales, jnp.float32),
            heads={
                name: {k: jnp.asarray(read_whole(own[k])) for k in own}
                for name, own in emr.heads.items()
            },
            tasks=emr.tasks,
        )


def write(
    folder: str | PathLike[str],
    task: str | int,
    output: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    unmerged_from: str | PathLike[str] | None = None,
) -> Location:
    """Writes a task's model as a checkpoint, streamed: a tensor per thread in memory.

    The bytes are those of `modulate`.

    Args:
      folder: an output of method `emr`.
      task: a name or a number from 0.
      output: the folder to make.
      base: the base model; None: that of the folder's record.
      unmerged_from: a model that gives the tensors of floats which were not merged;
        None: the folder has them, those that were excluded from the task's own model,
        such as its head, and others from the base.

    Raises:
      CheckpointError: as for `load`, or there is no such task, or the place is taken.
      OSError: the disk.
    """
    with contextlib.ExitStack() as stack:
        emr = stack.enter_context(_opened(fspath(folder), base))
        k = place_of(task, emr.tasks)
        heads = {name: own[k] for name, own in emr.heads.items() if k in own}
        if unmerged_from is not None:
            own = stack.enter_context(open_checkpoint(fspath(unmerged_from)))
            heads = {n: s for n, s in own.tensors.items() if n not in emr.masks}
        leaves: dict[str, Any] = {}
        for name, source in emr.unified.tensors.items():
            if name in emr.masks:
                own_mask = emr.masks[name][k]
                made: Source = _Modulated(
                    source, emr.base.tensors[name], own_mask, emr.scales[k]
                )
            else:
                floats = source.dtype.kind != "exact"
                made = heads.get(name, source) if floats else source
            leaves[name] = _Whole(made)
        return save(tree.nest(leaves), output, like=fspath(folder))


def place_of(task: Any, tasks: tuple[str, ...]) -> int:
    """The number of a task that is given by name or number.

    Raises:
      CheckpointError: there is no such task.
    """
    if not isinstance(task, str) and 0 <= int(task) < len(tasks):
        return int(task)
    if tasks.count(task) == 1:
        return tasks.index(task)
    if isinstance(task, str) and task.isdecimal() and int(task) < len(tasks):
        return int(task)
    known = ", ".join(f"{i}: {name}" for i, name in enumerate(tasks))
    raise CheckpointError(f"no task {task!r}; the tasks are {known}")


@dataclasses.dataclass(frozen=True)
class _Emr:
    """An output of `emr`, opened."""

    base: Checkpoint
    unified: Checkpoint
    masks: Mapping[str, tuple[Source, ...]]  # of each task, by the tensor's name
    heads: Mapping[str, Mapping[int, Source]]  # likewise, by the task's place
    scales: tuple[float, ...]
    tasks: tuple[str, ...]


@contextlib.contextmanager
def _opened(folder: str, base: Any) -> Any:
    with contextlib.ExitStack() as stack:
        unified = stack.enter_context(open_checkpoint(folder))
        record = read_record(unified.folder)
        if record is None or record.recipe.get("method") != "emr" or not record.base:
            raise CheckpointError(
                f"{folder}: is no output of method emr; merge with --config.method=emr"
            )
        scales = record.measured.get("scales", ())
        if len(scales) != len(record.models):
            raise CheckpointError(
                f"{folder}: its m3jax.json has {len(scales)} scales of "
                f"{len(record.models)} models; merge again"
            )
        name = record.base["path"] if base is None else fspath(base)
        try:
            opened = stack.enter_context(open_checkpoint(name))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --base says where the base is") from None
        sizes = {file.path.name: file.size for file in opened.files}
        if sizes != record.base["files"]:
            raise CheckpointError(
                f"{name}: is not the base of {folder}: its files have {sizes} bytes, "
                f"those that were merged {record.base['files']}; give it with --base"
            )
        paths = [str(model["path"]).rstrip("/") for model in record.models]
        short = [path.rpartition("/")[2] for path in paths]
        yield _Emr(
            opened,
            unified,
            _masks(unified, opened, len(scales), stack),
            _heads(unified, len(scales), stack),
            scales,
            tuple(short if len({*short}) == len(short) else paths),
        )


def _masks(
    unified: Checkpoint, base: Checkpoint, count: int, stack: contextlib.ExitStack
) -> dict[str, tuple[Source, ...]]:
    """The masks by the name of the tensor that they are of, all K of each."""
    found: dict[str, list[Source]] = {}
    for k in range(count):
        path = f"{unified.folder}/mask-{k}.safetensors"
        masks = stack.enter_context(open_checkpoint(path, mergeable=False))
        for name, mask in masks.stored.items():
            own = name.removesuffix(f".mask-{k}")
            found.setdefault(own, []).append(mask)
            source, start = unified.tensors.get(own), base.tensors.get(own)
            packed = () if source is None else (-(-math.prod(source.shape) // 8),)
            if source is None or mask.shape != packed or mask.dtype.code != "U8":
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} ({mask.dtype.code}, "
                    f"{list(mask.shape)}) is no mask of a tensor of {unified.name}"
                )
            if start is None or start.shape != source.shape:
                there = "lacks it" if start is None else f"has {list(start.shape)}"
                raise CheckpointError(
                    f"tensor {shown(own)} has shape {list(source.shape)} in "
                    f"{unified.name}; the base {base.name} {there}"
                )
    for name, own_masks in found.items():
        if len(own_masks) != count:
            raise CheckpointError(
                f"{unified.name}: tensor {shown(name)} has {len(own_masks)} masks for "
                f"{count} tasks; merge again"
            )
    return {name: tuple(masks) for name, masks in found.items()}


def _heads(
    unified: Checkpoint, count: int, stack: contextlib.ExitStack
) -> dict[str, dict[int, Source]]:
    """What was excluded, of each task's model, by its name in the unified one."""
    found: dict[str, dict[int, Source]] = {}
    for k in range(count):
        path = unified.folder / f"head-{k}.safetensors"
        if path.is_file():
            heads = stack.enter_context(open_checkpoint(str(path), mergeable=False))
            for name, own in heads.stored.items():
                found.setdefault(name.removesuffix(f".head-{k}"), {})[k] = own
    return found


@dataclasses.dataclass(frozen=True)
class _Modulated(Derived):
    """A tensor of a task's model, as `task_model` makes it of that of all tasks."""

    base: Source
    mask: Source
    scale: float

    def read_into(self, out: np.ndarray, start: int) -> None:
        wide: Any = np.float64 if self.dtype.numpy == np.float64 else np.float32
        for first in range(0, len(out), _BLOCK):
            part = out[first : first + _BLOCK]
            own, tau = (
                read(source, start + first, len(part)).astype(wide)
                for source in (self.base, self.source)
            )
            tau -= own
            skipped = (start + first) % 8
            begin = (start + first) // 8
            count = -(-(skipped + len(part)) // 8)
            packed = read(self.mask, begin, count)
            kept = np.unpackbits(packed)[skipped : skipped + len(part)].astype(bool)
            tau *= np.float32(self.scale).astype(wide)
            part[:] = (own + np.where(kept, tau, wide(0))).astype(out.dtype)


class _Whole:
    """A tensor that is read when it is written."""

    def __init__(self, source: Source):
        self._source = source
        self.shape, self.dtype = source.shape, source.dtype.numpy

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return read_whole(self._source)
