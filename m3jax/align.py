"""Puts the units of one network in the order of another's, so that they can be merged.

    permutations = m3jax.align.weight_matching(target, source, axes)
    aligned = m3jax.align.permute(source, permutations, axes)

`axes` says what may be permuted: {leaf's name: [group or None for each axis]}. All
axes of a group have the same units. In a transformer the units between the two matrices
of an FFN are free; heads and the dimensions of rotary positions are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.formats import tree
from m3jax.search.pytrees import alike, is_floating

Axes: TypeAlias = Mapping[str, Sequence[str | None]]
Permutations: TypeAlias = Mapping[str, Any]
NO_PARTNER = -1
_LEAST_GAIN = 1e-12


def weight_matching(
    target: Any,
    source: Any,
    axes: Axes,
    *,
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
      max_iterations: rounds over the groups.
      key: a key of `jax.random`; the groups are then visited in random order, as in the
        original.

    Returns:
      For each group (units of the target,) int64: the source's unit to put there, or
      −1. It can be a local optimum.

    Raises:
      ValueError: a leaf is missing, `axes` does not fit its shape, or the axes of a
        group differ in width.
    """
    mine, widths = _arrays(target, axes, "the target")
    theirs, other_widths = _arrays(source, axes, "the source")
    for name, groups in axes.items():
        for axis, group in enumerate(groups):
            if group is None and mine[name].shape[axis] != theirs[name].shape[axis]:
                raise ValueError(
                    f"{shown(name)} has the shapes {mine[name].shape} and "
                    f"{theirs[name].shape}, which differ in axis {axis} of no group"
                )
    found = {
        group: np.where(np.arange(n) < other_widths[group], np.arange(n), NO_PARTNER)
        for group, n in widths.items()
    }
    for _ in range(max_iterations):
        order = list(found)
        if key is not None:
            key, own = jax.random.split(key)
            order = [order[i] for i in jax.random.permutation(own, len(order)).tolist()]
        gains = [_improve(group, found, mine, theirs, axes) for group in order]
        if not max(gains, default=0.0) > _LEAST_GAIN:
            break
    return found


def permute(source: Any, permutations: Permutations, axes: Axes) -> Any:
    """The source with its units in the target's order: source[p] along every axis.

    Entries of units without a partner, p = −1, are 0. Leaves that `axes` does not name
    stay as they are.

    Raises:
      ValueError: a leaf or a group is missing, or `axes` or an index does not fit.
    """
    _, widths = _arrays(source, axes, "the source", look=False)
    own = _checked(permutations, widths)
    leaves, rebuild = tree.flatten(source)
    for name, groups in axes.items():
        leaf = jnp.asarray(leaves[name])
        for axis, group in enumerate(groups):
            if group is not None:
                p = own[group]
                taken = jnp.take(leaf, jnp.asarray(np.maximum(p, 0)), axis=axis)
                there = _along(p != NO_PARTNER, axis, leaf.ndim)
                leaf = jnp.where(there, taken, jnp.zeros((), leaf.dtype))
        leaves[name] = leaf
    return rebuild(leaves.values())


def inject(
    target: Any,
    aligned: Any,
    permutations: Permutations,
    axes: Axes,
    *,
    gamma: float,
    unmatched: str = "keep",
) -> Any:
    """The target with a share of an aligned source: W ← (1 − γ) W + γ · aligned.

    Ours: the abstract of MAL (arXiv 2503.21657) names alignment and ratios, but its
    rule is not public. Leaves that `axes` does not name, or that are no floats, stay
    the target's.

    Args:
      aligned: of `permute`.
      gamma: γ in [0, 1].
      unmatched: entries with no partner stay (``keep``) or are multiplied by 1 − γ
        (``shrink``).

    Returns:
      A pytree of the target's structure and dtypes.

    Raises:
      ValueError: γ is outside [0, 1], another rule, or the shapes do not fit.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} needs a number from 0 to 1")
    if unmatched not in ("keep", "shrink"):
        raise ValueError(f"unmatched={unmatched!r} is neither 'keep' nor 'shrink'")
    _, widths = _arrays(target, axes, "the target", look=False)
    own = {group: np.asarray(_of(permutations, group)) for group in widths}
    for group, p in own.items():
        if p.shape != (widths[group],):
            raise ValueError(
                f"permutations[{group!r}] has the shape {p.shape}; the target has "
                f"{widths[group]} units"
            )
    leaves, rebuild = tree.flatten(target)
    others, _ = tree.flatten(aligned)
    for name, groups in axes.items():
        leaf = leaves[name]
        found = jnp.shape(others[name]) if name in others else None
        if found != jnp.shape(leaf):
            raise ValueError(
                f"{shown(name)} has the shape {jnp.shape(leaf)} in the target and "
                f"{found} in the aligned source; permute makes them fit"
            )
        if not is_floating(leaf):
            continue
        before, other = alike((leaf, others[name]))
        mixed = (1 - gamma) * before + gamma * other
        if unmatched == "keep":
            for axis, name_of_axis in enumerate(groups):
                if name_of_axis is not None:
                    partner = own[name_of_axis] != NO_PARTNER
                    there = _along(partner, axis, mixed.ndim)
                    mixed = jnp.where(there, mixed, before)
        leaves[name] = mixed.astype(jnp.result_type(leaf))
    return rebuild(leaves.values())


def _improve(
    group: str,
    found: dict[str, np.ndarray],
    target: Mapping[str, np.ndarray],
    source: Mapping[str, np.ndarray],
    axes: Axes,
) -> float:
    """Assigns the units of one group anew; how much that gains."""
    from scipy.optimize import linear_sum_assignment

    products: Any = 0.0
    for name, groups in axes.items():
        for axis, own in enumerate(groups):
            if own == group:
                other = source[name]
                for i, g in enumerate(groups):
                    if g is not None and i != axis:
                        other = _taken(other, found[g], i)
                a = np.moveaxis(target[name], axis, 0)
                b = np.moveaxis(other, axis, 0)
                products = products + a.reshape(len(a), -1) @ b.reshape(len(b), -1).T
    before, (n, m) = found[group], products.shape
    # Units of the target that get a column of 0 have no partner.
    padded = np.pad(products, ((0, 0), (0, max(n - m, 0))))
    _, columns = linear_sum_assignment(padded, maximize=True)
    found[group] = np.where(columns < m, columns, NO_PARTNER)
    old = products[before >= 0, before[before >= 0]].sum()
    return float(padded[np.arange(n), columns].sum() - old)


def _taken(array: np.ndarray, p: np.ndarray, axis: int) -> np.ndarray:
    there = np.asarray(p != NO_PARTNER).reshape(-1, *(1,) * (array.ndim - axis - 1))
    return np.where(there, np.take(array, np.maximum(p, 0), axis), 0.0)


def _along(flags: np.ndarray, axis: int, ndim: int) -> jax.Array:
    """(n,) as an array of that many axes with n entries on one of them."""
    return jnp.asarray(flags.reshape([-1 if i == axis else 1 for i in range(ndim)]))


def _arrays(
    params: Any, axes: Axes, what: str, look: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The leaves of `axes` in float64, where they are looked at; widths of groups."""
    leaves, _ = tree.flatten(params)
    arrays: dict[str, np.ndarray] = {}
    widths: dict[str, int] = {}
    for name, groups in axes.items():
        if name not in leaves:
            raise ValueError(f"{what} lacks {shown(name)}, which axes names")
        shape = jnp.shape(leaves[name])
        if len(shape) != len(groups):
            raise ValueError(
                f"{shown(name)} of {what} has the shape {shape}; axes names "
                f"{len(groups)} axes: {list(groups)}"
            )
        for size, group in zip(shape, groups, strict=True):
            if group is not None and widths.setdefault(group, size) != size:
                raise ValueError(
                    f"{shown(name)} of {what} has {size} units of the group {group!r}, "
                    f"other leaves have {widths[group]}"
                )
        if look:
            arrays[name] = np.asarray(leaves[name]).astype(np.float64)
    return arrays, widths


def _of(permutations: Permutations, group: str) -> Any:
    if group not in permutations:
        raise ValueError(f"permutations lacks the group {group!r}, which axes names")
    return permutations[group]


def _checked(
    permutations: Permutations, widths: Mapping[str, int]
) -> dict[str, np.ndarray]:
    own = {group: np.asarray(_of(permutations, group)) for group in widths}
    for group, width in widths.items():
        p = own[group]
        if p.ndim != 1 or np.any((p < NO_PARTNER) | (p >= width)):
            raise ValueError(
                f"permutations[{group!r}] needs one axis of indices from -1 to "
                f"{width - 1}, the units of the source"
            )
    return own
