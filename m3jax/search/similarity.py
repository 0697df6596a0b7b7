"""How like each other models are, and which to merge first: Model-GLUE, 2410.05357."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.search.pytrees import align, alike, is_floating

_LEAST_NORM = 1e-8


def similarity_matrix(
    models: Sequence[Any],
    base: Any = None,
    *,
    of: str = "weights",
    per: str = "column",
    include: str = "",
) -> jax.Array:
    """The mean cosine between the tensors of each two models.

    S_ij = mean over tensors of the mean over columns c of
    ⟨x_ic, x_jc⟩ / (max(‖x_ic‖, 1e-8) max(‖x_jc‖, 1e-8)). A column is what the first
    axis runs over; a tensor of one axis is one column; a column of zeros counts as 0.
    Agrees with `get_sim` of Model-GLUE's heuristic_merge.py (weights, columns); one
    vector per tensor and task vectors are ours.

    Args:
      models: K pytrees with the same leaves.
      base: needed for task vectors only.
      of: ``weights``, or ``delta`` for x_k = θ_k − θ0.
      per: ``column``, or ``tensor`` for one cosine of the flattened tensor.
      include: a regular expression that is searched for in the names; the release's is
        ``self_attn|mlp``.

    Returns:
      (K, K) float32.

    Raises:
      ValueError: another `of` or `per`, no base for task vectors, or no such tensor.
      CheckpointError: the pytrees do not fit each other.
    """
    if of not in ("weights", "delta") or per not in ("column", "tensor"):
        raise ValueError(
            f"of={of!r}, per={per!r}: of is 'weights' or 'delta', per is 'column' or "
            "'tensor'"
        )
    if of == "delta" and base is None:
        raise ValueError("of='delta' needs a base")
    against = () if base is None else (base,)
    total, count = np.zeros((len(models), len(models))), 0
    for name, leaves in align([*models, *against]).leaves.items():
        if not re.search(include, name) or not is_floating(leaves[0]):
            continue
        if 0 in jnp.shape(leaves[0]):
            continue
        arrays = alike(leaves)
        stacked = jnp.stack(arrays[: len(models)])
        if of == "delta":
            stacked = stacked - arrays[-1][None]
        total += np.asarray(_cosines(stacked, per), np.float64)
        count += 1
    if not count:
        raise ValueError(f"include={include!r} is in the name of no tensor of floats")
    return jnp.asarray(total / count, jnp.float32)


def clusters(
    similarity: Any, threshold: float, *, rule: str = "leader"
) -> list[list[int]]:
    """Groups of models that are more like each other than `threshold`.

    ``leader``: each model joins the first cluster whose FIRST member it is like, or
    opens one. ``connected``: connected components of S > threshold. Both are ours: the
    release compares all with model 0 and drops what is unlike it. Its threshold is
    0.95.

    Args:
      similarity: S, (K, K).

    Returns:
      Lists of indices, each rising, in the order of their first members.

    Raises:
      ValueError: another rule, or S is not square.
    """
    matrix = np.asarray(similarity)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"similarity has the shape {matrix.shape}; (K, K) is needed")
    if rule not in ("leader", "connected"):
        raise ValueError(f"rule={rule!r} is neither 'leader' nor 'connected'")
    found: list[list[int]] = []
    for k in range(len(matrix)):
        looked_at = slice(1) if rule == "leader" else slice(None)
        like = [
            cluster
            for cluster in found
            if any(matrix[k, member] > threshold for member in cluster[looked_at])
        ]
        if not like:
            found.append([k])
            continue
        like[0].append(k)
        for other in like[1:] if rule == "connected" else ():
            # Model k is what connects them.
            like[0].extend(other)
            found.remove(other)
    return [sorted(cluster) for cluster in found]


def _cosines(stacked: jax.Array, per: str) -> jax.Array:
    """(K, K): the mean over the columns of one tensor's K versions."""
    count = len(stacked)
    rows = stacked.shape[1] if per == "column" and stacked.ndim > 1 else -1
    columns = stacked.reshape(count, rows, 1 if rows == -1 else -1)
    norms = jnp.sqrt(jnp.sum(jnp.square(columns), axis=1, keepdims=True))
    units = columns / jnp.maximum(norms, _LEAST_NORM)
    products = jnp.einsum(
        "irc,jrc->ij", units, units, precision=jax.lax.Precision.HIGHEST
    )
    return products / columns.shape[-1]
