"""Finds which unit of one network does what a unit of another one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from m3jax.align.axes import (
    ENTRIES,
    NO_PARTNER,
    Axes,
    Units,
    grouped,
    leaves_of,
    spread,
    taken,
)
from m3jax.checkpoints.errors import shown

_LEAST_GAIN = 1e-12


def weight_matching(
    target: Any,
    source: Any,
    axes: Axes,
    *,
    units: Mapping[str, Units] | None = None,
    keep_all: bool = False,
    max_iterations: int = 100,
    key: Any = None,
) -> dict[str, np.ndarray]:
    """Git Re-Basin's weight matching, arXiv 2209.04836, for widths that may differ.

    Maximises Σ over leaves of ⟨target, permuted source⟩ by coordinate descent from the
    identity: for each group in turn the linear assignment of
    C_ij = Σ over its leaves ⟨target unit i, source unit j⟩, the other axes permuted as
    they are then, until no group gains more than 1e-12. Agrees with `weight_matching`
    of samuela/git-re-basin with its groups in order. Ours: a wider source leaves units
    out, a narrower one leaves units of the target without a partner (C is padded with
    columns of 0). Computed in float64 on the host.

    Args:
      target, source: pytrees that have the leaves of `axes`.
      axes: see the module. Groups are visited in the order of their first appearance.
      units: of groups whose entries are not free one by one. Units within others are
        assigned for each pair of these, and the pairs by what both gain (ours).
      keep_all: each unit of a narrower source gets a place, the best even if it gains
        less than none: permuted, the source then computes what it did.
      max_iterations: rounds over the groups.
      key: a key of `jax.random`; the groups are then visited in random order, as in the
        original.

    Returns:
      For each group (entries of the target,) int64: the source's unit to put there, or
      −1. It can be a local optimum.

    Raises:
      ValueError: a leaf is missing, `axes` does not fit its shape, or the axes of a
        group differ in width.
    """
    mine, widths = _arrays(target, axes, "the target")
    theirs, other_widths = _arrays(source, axes, "the source")
    for name, own in axes.items():
        fixed = set(range(len(own))) - {axis for axis, _, _ in grouped(own)}
        for axis in sorted(fixed):
            if mine[name].shape[axis] != theirs[name].shape[axis]:
                raise ValueError(
                    f"{shown(name)} has the shapes {mine[name].shape} and "
                    f"{theirs[name].shape}, which differ in axis {axis} of no group"
                )
    units = dict(units or {})
    for sizes in (widths, other_widths):
        _check_units(units, sizes)
    found = {
        group: np.where(np.arange(n) < other_widths[group], np.arange(n), NO_PARTNER)
        for group, n in widths.items()
    }
    match = _Matching(mine, theirs, axes, units, other_widths, found, keep_all)
    free = [own for own in found if units.get(own, ENTRIES).within is None]
    alone = all(len([*grouped(own)]) < 2 for own in axes.values())
    for _ in range(max_iterations):
        order = free
        if key is not None:
            key, own_key = jax.random.split(key)
            places = jax.random.permutation(own_key, len(free)).tolist()
            order = [free[i] for i in places]
        gains = [match.improve(group) for group in order]
        if alone or not max(gains, default=0.0) > _LEAST_GAIN:
            break
    return found


class _Matching:
    """The permutations found so far, and what makes them better."""

    def __init__(
        self,
        target: Mapping[str, np.ndarray],
        source: Mapping[str, np.ndarray],
        axes: Axes,
        units: Mapping[str, Units],
        widths: Mapping[str, int],
        found: dict[str, np.ndarray],
        keep_all: bool,
    ):
        self._target, self._source, self._axes = target, source, axes
        self._units, self._widths, self._found = units, widths, found
        self._keep_all = keep_all

    def improve(self, group: str) -> float:
        """Assigns the units of a group anew, and those within; how much that gains."""
        inner = [own for own in self._found if self._of(own).within == group]
        products = self._products(group)
        gain = -self._value(group, products)
        n, m = products.shape
        assigned = {}
        for own in inner:
            parts = self._products(own)
            gain -= self._value(own, parts)
            rows, columns = len(parts) // n, parts.shape[1] // m
            blocks = parts.reshape(n, rows, m, columns).swapaxes(1, 2)
            pairs = {(a, b): self._assigned(blocks[a, b]) for a, b in np.ndindex(n, m)}
            assigned[own] = {place: p for place, (p, _) in pairs.items()}
            values = [value for _, value in pairs.values()]
            products = products + np.reshape(values, (n, m))
        p, value = self._assigned(products)
        self._set(group, p)
        for own in inner:
            columns = self._widths[own] // self._of(own).size // m
            rows = len(self._found[own]) // self._of(own).size // n
            none = np.full(rows, NO_PARTNER)
            places = [
                none if b < 0 else _moved(assigned[own][a, b], b * columns)
                for a, b in enumerate(p.tolist())
            ]
            self._set(own, np.concatenate(places))
        return gain + value

    def _products(self, group: str) -> np.ndarray:
        """C, (units of the target, units of the source), all other axes permuted."""
        size, products = self._of(group).size, np.zeros(())
        for name, own in self._axes.items():
            for axis, other, copies in grouped(own):
                if other != group:
                    continue
                theirs = self._source[name]
                for i, g, c in grouped(own):
                    if i != axis:
                        p = spread(self._found[g], c, self._widths[g])
                        theirs = taken(theirs, p, i)
                a, b = (
                    _by_unit(array, axis, copies, size)
                    for array in (self._target[name], theirs)
                )
                products = products + a @ b.T
        return products

    def _value(self, group: str, products: np.ndarray) -> float:
        """What the permutation found so far makes of them; 0 where it is none of units.

        The one to begin with need not be, where the widths differ.
        """
        size = self._of(group).size
        p = self._found[group][::size]
        there = (p >= 0) & (p % size == 0)
        return float(products[np.flatnonzero(there), p[there] // size].sum())

    def _assigned(self, products: np.ndarray) -> tuple[np.ndarray, float]:
        """The best partner of each row, or −1, and the sum over the pairs."""
        from scipy.optimize import linear_sum_assignment

        n, m = products.shape
        if not self._keep_all:  # a row that gets a column of 0 has no partner
            products = np.pad(products, ((0, 0), (0, max(n - m, 0))))
        rows, columns = linear_sum_assignment(products, maximize=True)
        p = np.full(n, NO_PARTNER)
        p[rows] = np.where(columns < m, columns, NO_PARTNER)
        return p, float(products[rows, columns].sum())

    def _set(self, group: str, p: np.ndarray) -> None:
        """Keeps a permutation of units as one of entries."""
        size = self._of(group).size
        entries = p[:, None] * size + np.arange(size)
        self._found[group] = np.where(p[:, None] < 0, NO_PARTNER, entries).reshape(-1)

    def _of(self, group: str) -> Units:
        return self._units.get(group, ENTRIES)


def _by_unit(array: np.ndarray, axis: int, copies: int, size: int) -> np.ndarray:
    """(units, all that belongs to each)."""
    moved = np.moveaxis(array, axis, 0)
    units = len(moved) // copies // size
    split = moved.reshape(copies, units, size, -1)
    return split.swapaxes(0, 1).reshape(units, -1)


def _moved(p: np.ndarray, first: int) -> np.ndarray:
    return np.where(p == NO_PARTNER, NO_PARTNER, p + first)


def _check_units(units: Mapping[str, Units], widths: Mapping[str, int]) -> None:
    for group, (size, within) in units.items():
        if group not in widths:
            continue
        if within is not None and (
            within not in widths or units.get(within, ENTRIES).within is not None
        ):
            raise ValueError(
                f"units of {group!r} lie within {within!r}, which needs to be a group "
                "that lies within no other"
            )
        count = 1
        if within is not None:
            count = widths[within] // units.get(within, ENTRIES).size
        if widths[group] % (size * count):
            raise ValueError(
                f"the group {group!r} has {widths[group]} entries, which are not "
                f"{count} times units of {size}"
            )


def _arrays(
    params: Any, axes: Axes, what: str
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The leaves of `axes` in float64, and the widths of the groups."""
    leaves, widths = leaves_of(params, axes, what)
    arrays = {name: np.asarray(leaves[name]).astype(np.float64) for name in axes}
    return arrays, widths
