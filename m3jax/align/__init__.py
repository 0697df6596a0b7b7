"""Puts the units of one network in the order of another's, so that they can be merged.

    permutations = m3jax.align.weight_matching(target, source, axes)
    aligned = m3jax.align.permute(source, permutations, axes)

`axes` says what may be permuted: {leaf's name: [group or None for each axis]}. All
axes of a group have the same entries. Of a decoder, `layout` says it:

    axes, units = m3jax.align.layout(config)
    permutations = m3jax.align.weight_matching(target, source, axes, units=units)

and `m3jax align` aligns a checkpoint.
"""

from m3jax.align.architectures import layout
from m3jax.align.axes import NO_PARTNER, Axes, Layout, Permutations, Units
from m3jax.align.checkpoint import Aligned, align
from m3jax.align.matching import weight_matching
from m3jax.align.permuting import inject, permute

__all__ = [
    "NO_PARTNER",
    "Aligned",
    "Axes",
    "Layout",
    "Permutations",
    "Units",
    "align",
    "inject",
    "layout",
    "permute",
    "weight_matching",
]
