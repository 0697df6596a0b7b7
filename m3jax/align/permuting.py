"""Puts entries in their places, and mixes what stands there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.align.axes import (
    NO_PARTNER,
    Axes,
    Permutations,
    grouped,
    leaves_of,
    spread,
)
from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.formats import tree
from m3jax.search.pytrees import alike, is_floating


def permute(source: Any, permutations: Permutations, axes: Axes) -> Any:
    """The source with its units in the target's order: source[p] along every axis.

    Entries of units without a partner, p = −1, are 0. Leaves that `axes` does not name
    stay as they are.

    Raises:
      ValueError: a leaf or a group is missing, or `axes` or an index does not fit.
    """
    leaves, widths = leaves_of(source, axes, "the source")
    own = _checked(permutations, widths)
    _, rebuild = tree.flatten(source)
    for name, groups in axes.items():
        leaf = jnp.asarray(leaves[name])
        for axis, group, copies in grouped(groups):
            p = spread(own[group], copies, widths[group])
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
    leaves, widths = leaves_of(target, axes, "the target")
    own = {group: np.asarray(_of(permutations, group)) for group in widths}
    for group, p in own.items():
        if p.shape != (widths[group],):
            raise ValueError(
                f"permutations[{group!r}] has the shape {p.shape}; the target has "
                f"{widths[group]} units"
            )
    _, rebuild = tree.flatten(target)
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
            for axis, group, copies in grouped(groups):
                partner = np.tile(own[group] != NO_PARTNER, copies)
                there = _along(partner, axis, mixed.ndim)
                mixed = jnp.where(there, mixed, before)
        leaves[name] = mixed.astype(jnp.result_type(leaf))
    return rebuild(leaves.values())


def _along(flags: np.ndarray, axis: int, ndim: int) -> jax.Array:
    """(n,) as an array of that many axes with n entries on one of them."""
    return jnp.asarray(flags.reshape([-1 if i == axis else 1 for i in range(ndim)]))


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
