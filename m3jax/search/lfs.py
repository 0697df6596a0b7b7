"""LFS of "Fine, I'll Merge It Myself", arXiv 2502.04030: a method per group of layers.

A genotype is a dict: `layers_per_group` g; `filters`, such as ("self_attn", "mlp"); and
`groups`, for each g layers {"method": ..., "sets": {filter or "base": numbers}}.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from m3jax.checkpoints.errors import shown
from m3jax.search import lfs_methods
from m3jax.search.pytrees import (
    align,
    is_embedding,
    is_floating,
    normalized,
    place_of,
)

# Our and the published names of a method's numbers, and whether each model has its own.
_NUMBERS = {
    "linear": ({"weights": "weights"}, True),
    "slerp": ({"t": "slerp_t"}, True),
    "task_arithmetic": ({"scaling": "scaling_coefficient"}, False),
    "ties": (
        {"trim_rate": "param_value_mask_rate", "scaling": "scaling_coefficient"},
        False,
    ),
}
_BASE = "base"


def lfs_merge(base: Any, models: Sequence[Any], genotype: Mapping[str, Any]) -> Any:
    """The model of a genotype, tensor by tensor.

    linear: Σ w_k θ_k / Σ w_k. task_arithmetic: θ0 + s Σ τ_k. ties, per tensor: keep
    |τ_k| ≥ the ⌊n · trim_rate⌋-th smallest, elect the sign of the sum (where that is 0,
    the tensor's majority), θ0 + s · mean of the entries that agree. slerp: of the two
    models whose t, summed over the sets, are the largest, from the larger one by
    e^{t₂} / (e^{t₁} + e^{t₂}) along the angle of the whole tensors; linear where
    |cos| > 0.9995. Agrees with `LfsMerge` of Guinan-Su/auto-merge-llm.

    Args:
      base: θ0.
      models: K pytrees with the base's leaves.
      genotype: see the module. A tensor's set is the first filter in its name, else
        `base`. Embeddings follow group 0; what lies outside the layers otherwise, such
        as the head and the last norm, follows the last group.

    Returns:
      A pytree of the base's structure and dtypes; leaves that are no floats are its.

    Raises:
      ValueError: a method, a set or a number is missing or unknown, weights add up to
        0, or a layer has no group.
      CheckpointError: the pytrees do not fit each other.
    """
    groups, filters = genotype["groups"], tuple(genotype["filters"])
    size = genotype["layers_per_group"]
    if not groups or size < 1:
        raise ValueError(
            f"{len(groups)} groups of {size} layers: 1 or more of each are needed"
        )
    rules = [
        _rule(g, group, (*filters, _BASE), len(models))
        for g, group in enumerate(groups)
    ]
    aligned = align([base, *models])
    merged = []
    for name, (own, *others) in aligned.leaves.items():
        if is_floating(own):
            place = place_of(name)
            if place is not None:
                g = place.layer // size
            else:
                g = 0 if is_embedding(name) else len(groups) - 1
            if g >= len(groups):
                raise ValueError(
                    f"{shown(name)} lies in layer {g * size} or later, which none of "
                    f"the {len(groups)} groups of {size} layers holds"
                )
            chosen = next((text for text in filters if text in name), _BASE)
            own = rules[g][chosen](own, others).astype(jnp.result_type(own))
        merged.append(own)
    return aligned.rebuild(merged)


def lfs_genotype(
    published: Mapping[str, Any],
    *,
    model_names: Sequence[str],
    layers_per_group: int,
    filters: Sequence[str],
) -> dict[str, Any]:
    """The genotype of the flat names that auto-merge-llm publishes.

    Reads `layer_selection_method_{g}`,
    `model_{name}_layer_{g}_paramset_{set}_method_{method}_param_{weights|slerp_t}` and
    `layer_{g}_paramset_{set}_method_{method}_param_{scaling_coefficient|
    param_value_mask_rate}`; what belongs to methods that were not chosen is left out.

    Args:
      model_names: K, in the order of the models.

    Raises:
      ValueError: there is no group, a method is unknown, or a number is missing.
    """
    groups: list[dict[str, Any]] = []
    while (chosen := f"layer_selection_method_{len(groups)}") in published:
        g, method = len(groups), published[chosen]
        if method not in _NUMBERS:
            raise ValueError(f"{chosen}={method!r} is none of {sorted(_NUMBERS)}")
        names, per_model = _NUMBERS[method]
        sets = {}
        for part in (*filters, _BASE):
            sets[part] = {
                ours: [
                    _number(published, f"model_{model}_{_key(g, part, method, theirs)}")
                    for model in model_names
                ]
                if per_model
                else _number(published, _key(g, part, method, theirs))
                for ours, theirs in names.items()
            }
        groups.append({"method": method, "sets": sets})
    if not groups:
        raise ValueError("the genotype has no layer_selection_method_0")
    return {
        "layers_per_group": layers_per_group,
        "filters": list(filters),
        "groups": groups,
    }


def _key(group: int, part: str, method: str, number: str) -> str:
    return f"layer_{group}_paramset_{part}_method_{method}_param_{number}"


def _number(published: Mapping[str, Any], key: str) -> float:
    if key not in published:
        raise ValueError(f"the genotype has no {key}")
    return float(published[key])


def _rule(
    g: int, group: Mapping[str, Any], parts: Sequence[str], count: int
) -> dict[str, Any]:
    """For each set of a group what makes a tensor of the base's and the models'."""
    method, sets = group.get("method"), group.get("sets", {})
    if method not in _NUMBERS:
        raise ValueError(f"groups[{g}].method={method!r} is none of {sorted(_NUMBERS)}")
    names, per_model = _NUMBERS[method]
    if set(sets) != set(parts):
        raise ValueError(
            f"groups[{g}].sets has {sorted(sets)}; {sorted(parts)} are needed"
        )
    for part, numbers in sets.items():
        fits = set(numbers) == set(names) and (
            not per_model or all(len(row) == count for row in numbers.values())
        )
        if not fits:
            each = f", {count} numbers each" if per_model else ""
            raise ValueError(
                f"groups[{g}].sets.{part}={dict(numbers)!r} does not fit {method}, "
                f"which has {sorted(names)}{each}"
            )
    if method == "linear":
        rows = {
            part: normalized(
                numbers["weights"], count, f"groups[{g}].sets.{part}.weights"
            )
            for part, numbers in sets.items()
        }
        return {
            part: functools.partial(lfs_methods.linear, weights=rows[part])
            for part in sets
        }
    if method == "slerp":
        if count < 2:
            raise ValueError(f"groups[{g}].method='slerp' needs two models or more")
        totals = [sum(sets[part]["t"][k] for part in parts) for k in range(count)]
        pair = sorted(range(count), key=lambda k: -totals[k])[:2]
        return {
            part: functools.partial(lfs_methods.slerp, pair=pair, t=numbers["t"])
            for part, numbers in sets.items()
        }
    rule: Any = getattr(lfs_methods, method)
    return {part: functools.partial(rule, **sets[part]) for part in sets}
