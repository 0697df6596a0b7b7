"""Weights per group of layers: the genotype of Model-GLUE's CMA-ES, 2410.05357."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from m3jax.search.pytrees import (
    align,
    is_floating,
    normalized,
    num_layers,
    place_of,
    weighted_sum,
)


def merge_layer_groups(models: Sequence[Any], weights: Any) -> Any:
    """A weighted average of models with weights of its own for each group of layers.

    θ = Σ_k w_gk θ_k / Σ_k w_gk, where g is the group of the tensor's layer: G groups of
    L/G consecutive layers each; the last row is for what lies outside the layers.
    Agrees with `merge_models_group` of Model-GLUE's evolutionary_merge.py, in float32
    instead of its bfloat16. Its search: CMA-ES, population 15, σ 1/6, 500 trials.

    Args:
      models: K pytrees with the same leaves, of L layers.
      weights: (G + 1, K).

    Returns:
      A pytree of the first model's structure and dtypes. Leaves that are no floats are
      the first model's.

    Raises:
      ValueError: the weights have another shape, a row's sum is 0, or G does not
        divide L.
      CheckpointError: the pytrees do not fit each other.
    """
    table = np.asarray(weights, np.float64)
    if table.ndim != 2 or len(table) < 2:
        raise ValueError(
            f"weights has the shape {table.shape}; (groups + 1, {len(models)}) with "
            "one group or more is needed"
        )
    rows = [
        normalized(row, len(models), f"weights[{g}]") for g, row in enumerate(table)
    ]
    aligned = align(models)
    layers, groups = num_layers(aligned.leaves), len(rows) - 1
    if layers % groups or not layers:
        raise ValueError(
            f"{layers} layers cannot be divided into {groups} groups of equal size"
        )
    merged = []
    for name, leaves in aligned.leaves.items():
        place = place_of(name)
        row = rows[-1] if place is None else rows[place.layer // (layers // groups)]
        first = leaves[0]
        merged.append(
            weighted_sum(leaves, row).astype(first.dtype)
            if is_floating(first)
            else first
        )
    return aligned.rebuild(merged)
