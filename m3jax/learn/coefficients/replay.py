"""A recipe that `m3jax merge` makes the learned model by, without data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from m3jax.learn.coefficients.space import Space
from m3jax.methods.coefficients import Coefficients
from m3jax.recipe import Recipe, RecipeError
from m3jax.recipe.values import Rules

Found = Mapping[str, np.ndarray]  # (K, ...) of each tensor


class Replay(NamedTuple):
    """What makes the learned model.

    Attributes:
      recipe: of the merge.
      statistics: for each model its coefficients by tensor, where they are too many for
        the recipe; else none.
    """

    recipe: Recipe
    statistics: tuple[dict[str, np.ndarray], ...] = ()


def check(space: Space, recipe: Recipe) -> None:
    """Raises RecipeError where what is learned could not be replayed."""
    name = recipe.method.name
    low = recipe.method.fields()["weights"].low
    least = {"none": -np.inf, "simplex": 0.0, "share": 0.0}
    if least.get(space.constraint, space.bounds[0]) < low:
        raise RecipeError(
            f"space.constraint={space.constraint} allows coefficients below {low:g}, "
            f"which method {name} does not; give clip, sigmoid or tanh bounds from "
            f"{low:g}, or simplex"
        )
    if space.by_file and name not in _LINEAR:
        raise RecipeError(
            f"space.granularity={space.granularity} needs a method that is linear in "
            f"the models, one of {', '.join(_LINEAR)}; {name} takes model, layer or "
            "tensor"
        )


def replay(recipe: Recipe, space: Space, found: Found) -> Replay:
    """The recipe with the coefficients that were found.

    Args:
      recipe: that was learned with, without M3.
      space: of the coefficients.
      found: float32.
    """
    method = recipe.method
    if space.by_file:
        of, scaled = _LINEAR[method.name](method, found)
        own = Coefficients(of=of)
        count = len(next(iter(found.values())))
        beside = tuple({name: c[k] for name, c in scaled.items()} for k in range(count))
        return Replay(dataclasses.replace(recipe, method=own), beside)
    rows = {name: tuple(map(float, c.reshape(-1))) for name, c in found.items()}
    values = list(rows.values())
    weights: Any = values[0]
    if any(own != weights for own in values):
        # Anchored names; what no tensor of these models has gets the last one's.
        rules = tuple((rf"\A{re.escape(name)}\Z", own) for name, own in rows.items())
        weights = Rules(rules, values[-1])
    return Replay(recipe.with_number(method.name, "weights", weights))


def _average(method: Any, found: Found) -> tuple[str, Found]:
    return "models", found


def _linear(method: Any, found: Found) -> tuple[str, Found]:
    if not method.normalize:
        return "models", found
    return "models", {n: c / c.sum(axis=0, keepdims=True) for n, c in found.items()}


def _task_arithmetic(method: Any, found: Found) -> tuple[str, Found]:
    scaling = np.float32(method.scaling)
    return "task_vectors", {name: scaling * c for name, c in found.items()}


# What a linear method combines, and by which coefficients.
_LINEAR = {
    "average": _average,
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
}
