"""One model for several tasks: a task vector, and for each task a mask and a scale.

    result = m3jax.multitask.emr(base, [maths, code])
    maths_again = m3jax.multitask.modulate(base, result, 0)

`emr` and `tall` find them; `modulate` gives the model of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.checkpoints.formats import tree
from m3jax.engine.in_memory import Leaves, measured
from m3jax.engine.trees import align_trees
from m3jax.methods.consensus import masks
from m3jax.methods.emr import elected, task_model
from m3jax.methods.step import Operands, sum_over_models
from m3jax.recipe import Recipe


class Multitask(NamedTuple):
    """What K models have in common, and how to have each of them back.

    Attributes:
      delta: τ, a pytree like the base's, float32.
      masks: M_k, the same with bool leaves (K, ...).
      scales: λ_k, (K,) float32.
    """

    delta: Any
    masks: Any
    scales: jax.Array


def emr(base: Any, models: Sequence[Any], *, rescale: str = "sum") -> Multitask:
    """EMR-Merging in memory; the formulas stand in `m3jax.methods.emr.Emr`.

    Args:
      base: the base model's pytree.
      models: K pytrees with the same leaves. Heads of differing shapes have to be left
        out, here and in `base`; `modulate` leaves them as they are.
      rescale: the rule of λ_k, ``sum``, ``mean`` or ``l2``.

    Returns:
      τ, the masks and the scales. Leaves that are no floats are 0 and masked.

    Raises:
      RecipeError: another rule.
      CheckpointError: the pytrees do not fit each other.
    """
    recipe = _recipe("emr", emr={"rescale": rescale})
    leaves, structure = align_trees(base, models, recipe)
    bench = Leaves(leaves, len(models))
    ((_, numbers),) = measured(bench, recipe, 0)
    scales = numbers.info[-1]["scales"][:, bench.merged[:1]]
    return _multitask(bench, structure, elected, jnp.asarray(scales[:, 0], jnp.float32))


def tall(base: Any, models: Sequence[Any], *, mask_scale: Any = 0.4) -> Multitask:
    """TALL masks, arXiv 2405.07813: τ = Σ τ_j, M_k = 1[|τ_k| > μ_k |τ − τ_k|], λ_k = 1.

    Args:
      base, models: as for `emr`.
      mask_scale: μ, one number or one per model, 0 or more.

    Returns:
      τ, the masks and scales of 1.

    Raises:
      ValueError: a scale is negative, or there is not one for each model.
      CheckpointError: the pytrees do not fit each other.
    """
    scale = np.asarray(mask_scale, np.float32)
    if scale.shape not in ((), (len(models),)) or not np.all(scale >= 0):
        raise ValueError(
            f"mask_scale={mask_scale!r} needs one number of 0 or more, or one for each "
            f"of the {len(models)} models"
        )
    scale = np.broadcast_to(scale, len(models))

    def rule(x: Operands) -> tuple[Any, Any]:
        tau = x.deltas
        own = jnp.asarray(scale, tau.dtype).reshape(-1, *(1,) * (tau.ndim - 1))
        return masks(tau, own), sum_over_models(tau)

    recipe = _recipe("task_arithmetic")
    leaves, structure = align_trees(base, models, recipe)
    bench = Leaves(leaves, len(models))
    return _multitask(bench, structure, rule, jnp.ones(len(models), jnp.float32))


def modulate(base: Any, result: Multitask, k: int) -> Any:
    """The model of task k: θ0 + λ_k M_k ⊙ τ, of the base's structure and dtypes.

    Args:
      base: the base model's pytree. Leaves that `result` lacks are kept as they are.
      result: of `emr` or `tall`.
      k: the task, from 0.

    Raises:
      IndexError: there is no task k.
    """
    count = len(result.scales)
    if not 0 <= k < count:
        raise IndexError(f"k={k} needs 0 to {count - 1}: the result has {count} tasks")
    leaves, structure = tree.flatten(base)
    delta, kept = tree.flatten(result.delta)[0], tree.flatten(result.masks)[0]
    made = []
    for name, leaf in leaves.items():
        if name in delta and jnp.issubdtype(leaf.dtype, jnp.floating):
            tau = delta[name]
            scale = result.scales[k].astype(tau.dtype)
            own = task_model(leaf.astype(tau.dtype), tau, kept[name][k], scale)
            leaf = own.astype(leaf.dtype)
        made.append(leaf)
    return structure(made)


def _recipe(method: str, **groups: Any) -> Recipe:
    return Recipe.from_dict({"method": method, "mixup": {"alpha": None}, **groups})


def _multitask(
    bench: Leaves,
    structure: Callable[[Any], Any],
    rule: Callable[[Operands], tuple[Any, Any]],
    scales: jax.Array,
) -> Multitask:
    """The pytrees of what a rule (operands -> masks, τ) makes of each leaf."""
    delta, kept = [], []
    for leaf in bench.leaves:
        if leaf.merged:
            dtype = leaf.compute_dtype
            models = jnp.stack([jnp.asarray(array, dtype) for array in leaf.models])
            mask, tau = rule(Operands(jnp.asarray(leaf.base, dtype), models))
        else:
            tau = jnp.zeros(np.shape(leaf.base), jnp.float32)
            mask = jnp.zeros((bench.num_models, *tau.shape), bool)
        delta.append(tau)
        kept.append(mask)
    return Multitask(structure(delta), structure(kept), scales)
