"""Aligns a checkpoint with another one, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from m3jax.align.architectures import by_layer, layout, part_of
from m3jax.align.axes import (
    ENTRIES,
    NO_PARTNER,
    Axis,
    Layout,
    grouped,
    spread,
    taken,
)
from m3jax.align.matching import weight_matching
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.formats import tree
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.source import Source, read_whole
from m3jax.engine.save import save
from m3jax.models.config import Config
from m3jax.models.decoder import read_config
from m3jax.models.parameters import check_parameters

Places = dict[str, np.ndarray]  # of the entries of each group
# What two models have in common, and what may be more in the one that is aligned to.
_SAME = ("family", "num_layers", "hidden_size", "head_dim")
_WIDTHS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


class Moved(NamedTuple):
    """What became of the units of one kind.

    Attributes:
      units: of the aligned model.
      moved: of these, those that another place had before.
      added: of these, those of zeros.
    """

    units: int
    moved: int
    added: int


@dataclasses.dataclass(frozen=True)
class Aligned:
    """A checkpoint that was written.

    Attributes:
      output: its folder.
      moved: by kind, ``ffn``, ``heads``, ``residual``.
    """

    output: Location
    moved: dict[str, Moved]


def align(
    model: str | PathLike[str],
    to: str | PathLike[str],
    output: str | PathLike[str],
    *,
    groups: Sequence[str] = ("ffn", "heads"),
    say: Callable[[str], None] = lambda line: None,
) -> Aligned:
    """Writes a model with its units in the order of another one's.

    It computes what it computed: units are permuted, and where the other model has more
    of them, units of zeros are added, which add nothing. Layer by layer, that of both
    models in memory in float64; with ``residual``, all layers.

    Args:
      model: a checkpoint of one of the architectures that m3jax can run.
      to: another one, of as many layers and of the same width.
      output: the folder to make.
      groups: of ``ffn``, ``heads`` and ``residual``; see `layout`.
      say: is told how far it is.

    Raises:
      CheckpointError: a checkpoint cannot be read, the two do not fit, or the place is
        taken; one line.
      ValueError: a group has another name.
      OSError: the disk.
    """
    with open_checkpoint(fspath(model)) as own, open_checkpoint(fspath(to)) as other:
        configs = _config(own), _config(other)
        _check(own, other, *configs)
        wanted = layout(configs[1], groups, names=other.tensors)
        parts = by_layer(wanted)
        found: Places = {}
        for number, part in enumerate(parts, start=1):
            found |= _matched(part, own, other)
            if len(parts) > 1:
                say(f"layer {number} of {len(parts)}")
        leaves: dict[str, Any] = {
            name: _Permuted(source, wanted.axes.get(name, ()), found)
            for name, source in own.tensors.items()
        }
        made = save(
            tree.nest(leaves),
            output,
            like=fspath(model),
            config=_changes(*configs),
        )
    return Aligned(made, _counted(found, wanted))


class _Permuted:
    """A tensor that is read and put in order when it is written."""

    def __init__(self, source: Source, axes: Sequence[Axis], places: Places):
        self._source, self._axes, self._places = source, axes, places
        shape = list(source.shape)
        for axis, group, copies in grouped(axes):
            shape[axis] = copies * len(places[group])
        self.shape, self.dtype = tuple(shape), source.output_dtype.numpy

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        found = read_whole(self._source)
        for axis, group, copies in grouped(self._axes):
            width = found.shape[axis] // copies
            found = taken(found, spread(self._places[group], copies, width), axis)
        return found.astype(self.dtype)


def _config(checkpoint: Checkpoint) -> Config:
    if checkpoint.config is None:
        raise CheckpointError(
            f"{checkpoint.name}: has no config.json, which says what may be permuted"
        )
    config = read_config(checkpoint.config, f"config.json of {checkpoint.name}")
    check_parameters(checkpoint.tensors, config, checkpoint.name)
    return config


def _check(own: Checkpoint, other: Checkpoint, mine: Config, theirs: Config) -> None:
    """Raises CheckpointError where one model cannot be put in the other's order."""
    for field in _SAME:
        values = getattr(mine, field), getattr(theirs, field)
        if values[0] != values[1]:
            raise CheckpointError(
                f"{own.name} has {field} = {values[0]}, {other.name} {values[1]}; "
                "aligned are models that have it in common"
            )
    for field in _WIDTHS:
        values = getattr(mine, field, 0), getattr(theirs, field, 0)
        if values[0] > values[1]:
            raise CheckpointError(
                f"{own.name} has {field} = {values[0]}, more than the {values[1]} of "
                f"{other.name}: units would be lost; align {other.name} to {own.name}"
            )
    groups = [c.num_attention_heads // c.num_key_value_heads for c in (mine, theirs)]
    if groups[0] > groups[1]:
        raise CheckpointError(
            f"{own.name} has {groups[0]} heads of queries for each of keys, "
            f"{other.name} {groups[1]}; it needs at least as many"
        )


def _matched(part: Layout, own: Checkpoint, other: Checkpoint) -> Places:
    """The places of the units of a part, each of which keeps one."""
    target, source = (
        tree.nest({name: read_whole(one.tensors[name]) for name in part.axes})
        for one in (other, own)
    )
    return weight_matching(target, source, part.axes, units=part.units, keep_all=True)


def _changes(mine: Config, theirs: Config) -> dict[str, Any]:
    """Fields of config.json that follow from units that were added."""
    fields = [own for own in _WIDTHS if hasattr(mine, own)]
    changed = {
        field: getattr(theirs, field)
        for field in fields
        if getattr(mine, field) != getattr(theirs, field)
    }
    if "num_attention_heads" in changed:
        changed["head_dim"] = theirs.head_dim
    return changed


def _counted(places: Places, layout: Layout) -> dict[str, Moved]:
    found: dict[str, Moved] = {}
    for group, entries in places.items():
        size, within = layout.units.get(group, ENTRIES)
        if within is None and f"{group.removesuffix('keys')}queries" in places:
            continue  # they go with their heads of queries
        own = entries[::size]
        there = np.arange(len(own)) * size
        added = int((own == NO_PARTNER).sum())
        moved = int((own != there).sum()) - added
        before = found.get(part_of(group), Moved(0, 0, 0))
        now = Moved(len(own), moved, added)
        found[part_of(group)] = Moved(*map(sum, zip(before, now, strict=True)))
    return found
