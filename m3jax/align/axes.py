"""What may be permuted: the axes of leaves, by groups of units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.formats import tree

# Of each leaf, by its name, and each of its axes: the group that it has the entries of;
# with a number, that many times over, one run of all behind the other; or None.
Axis: TypeAlias = "str | tuple[str, int] | None"
Axes: TypeAlias = Mapping[str, Sequence[Axis]]
Permutations: TypeAlias = Mapping[str, Any]
NO_PARTNER = -1


class Units(NamedTuple):
    """What the entries of a group are.

    Attributes:
      size: consecutive entries of a unit, which keep their order, as those of a head.
      within: the group of larger units that each hold an equal run of these, as heads
        of keys do those of queries; None: they are free.
    """

    size: int = 1
    within: str | None = None


ENTRIES = Units()


class Layout(NamedTuple):
    """The axes of a model.

    Attributes:
      axes: of its leaves.
      units: of the groups whose entries are not all free.
    """

    axes: dict[str, tuple[Axis, ...]]
    units: dict[str, Units]


class Grouped(NamedTuple):
    """An axis of a leaf that has a group."""

    axis: int
    group: str
    copies: int


def grouped(axes: Sequence[Axis]) -> Iterator[Grouped]:
    """The axes of a leaf that have groups."""
    for axis, own in enumerate(axes):
        if own is not None:
            group, copies = (own, 1) if isinstance(own, str) else own
            yield Grouped(axis, group, copies)


def leaves_of(params: Any, axes: Axes, what: str) -> tuple[dict[str, Any], dict]:
    """All leaves, and how many entries each group has.

    Raises:
      ValueError: a leaf is missing, `axes` does not fit it, or the axes of a group
        differ in width; `what` the pytree is, the message says.
    """
    leaves, _ = tree.flatten(params)
    widths: dict[str, int] = {}
    for name, own in axes.items():
        if name not in leaves:
            raise ValueError(f"{what} lacks {shown(name)}, which axes names")
        shape = jnp.shape(leaves[name])
        if len(shape) != len(own):
            raise ValueError(
                f"{shown(name)} of {what} has the shape {shape}; axes names "
                f"{len(own)} axes: {list(own)}"
            )
        for axis, group, copies in grouped(own):
            if shape[axis] % copies:
                raise ValueError(
                    f"{shown(name)} of {what} has {shape[axis]} entries in axis "
                    f"{axis}, which are not {copies} times those of {group!r}"
                )
            size = shape[axis] // copies
            if widths.setdefault(group, size) != size:
                raise ValueError(
                    f"{shown(name)} of {what} has {size} units of the group {group!r}, "
                    f"other leaves have {widths[group]}"
                )
    return leaves, widths


def spread(p: np.ndarray, copies: int, width: int) -> np.ndarray:
    """The indices along an axis with several copies of a group of `width` entries."""
    return np.concatenate(
        [np.where(p == NO_PARTNER, NO_PARTNER, p + k * width) for k in range(copies)]
    )


def taken(array: np.ndarray, p: np.ndarray, axis: int) -> np.ndarray:
    """array[p] along an axis, 0 where p = −1; in NumPy."""
    found = np.take(array, np.maximum(p, 0), axis)
    if (p == NO_PARTNER).any():
        there = (p != NO_PARTNER).reshape(-1, *(1,) * (array.ndim - axis - 1))
        found = np.where(there, found, np.zeros((), array.dtype))
    return found
