"""Spaces of coefficients: which tensors share one, and what it may be."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.learn.coefficients.constraints import CONSTRAINTS
from m3jax.mixup import group_of
from m3jax.recipe import RecipeError
from m3jax.recipe.problems import Problems

GRANULARITIES = ("model", "layer", "tensor", "column", "element")
REGULARISERS = ("l1", "l2", "similarity", "overlap", "weighted_overlap")
Shapes = Mapping[str, tuple[int, ...]]
Raw = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """The coefficients of K models, as arrays of shape (K, ...) for each tensor.

    Attributes:
      granularity: one for the ``model``, each ``layer``, each ``tensor``, each
        ``column`` (of the last axis; one for a bias, one by element for another vector)
        or each ``element``.
      layers: with ``layer``, how many layers in a row share.
      shared: all models share theirs.
      constraint: ``none``, ``clip``, ``sigmoid`` or ``tanh`` between the bounds,
        ``simplex`` (a softmax over the models) or ``share`` (the same of K − 1 numbers
        and 0: for two models σ(r) and 1 − σ(r)).
      bounds: lowest and highest coefficient.
      initial: one number or one per model; None: the method's own without M3.
      include: regular expressions, searched for in the names; the coefficients of
        tensors that none fits stay at `initial`. Empty: all are learned.
      regularisers: weights of ``l1``, ``l2``, ``similarity``, ``overlap`` and
        ``weighted_overlap`` of the raw numbers, as in `m3jax.learn.dam_loss`, biases
        left out. The last one is of the columns of matrices that are learned.

    Raises:
      RecipeError: naming each wrong field, its value and what is allowed.
    """

    granularity: str = "tensor"
    layers: int = 1
    shared: bool = False
    constraint: str = "none"
    bounds: tuple[float, float] = (0.0, 1.0)
    initial: Any = None
    include: tuple[str, ...] = ()
    regularisers: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems()
        problems.choice("space.granularity", self.granularity, GRANULARITIES)
        problems.choice("space.constraint", self.constraint, tuple(CONSTRAINTS))
        problems.patterns("space.include", tuple(self.include))
        for name in self.regularisers:
            problems.choice("space.regularisers", name, REGULARISERS)
        by_column = self.granularity == "column" and not self.shared
        if "weighted_overlap" in self.regularisers and not (
            by_column and self.constraint != "share"
        ):
            allowed = (
                "space.granularity=column, for each model, not as a share: it weighs "
                "columns of task vectors"
            )
            problems.add("space.regularisers", "weighted_overlap", allowed)
        if len(self.bounds) != 2 or not self.bounds[0] < self.bounds[1]:
            problems.add("space.bounds", self.bounds, "a lower and a higher number")
        if not isinstance(self.layers, int) or self.layers < 1:
            problems.add("space.layers", self.layers, "an integer, 1 or more")
        if self.shared and CONSTRAINTS.get(self.constraint, (0,) * 3)[2]:
            allowed = f"False for {self.constraint}, which is over the models"
            problems.add("space.shared", self.shared, allowed)
        problems.raise_if_any()

    @property
    def by_file(self) -> bool:
        """Whether the coefficients are too many for a recipe's numbers."""
        return self.granularity in ("column", "element")

    def learned(self, names: Iterable[str]) -> list[str]:
        """Those of the tensors whose coefficients are learned."""
        return [
            name
            for name in names
            if not self.include or any(re.search(own, name) for own in self.include)
        ]

    def group(self, name: str) -> str:
        """What shares coefficients with the tensor."""
        if self.granularity not in ("model", "layer"):
            return name
        found = group_of(name, self.granularity)
        numbered = re.fullmatch(r"((?:.*\.)?)(\d+)", found)
        if numbered is None or self.layers == 1:
            return found
        return f"{numbered[1]}{int(numbered[2]) // self.layers * self.layers}"

    def start(self, shapes: Shapes, equal: tuple[float, ...]) -> Raw:
        """The raw numbers of step 0 by group, float32.

        Args:
          shapes: of the tensors.
          equal: the coefficient of each model where `initial` is None.

        Raises:
          RecipeError: the constraint does not allow the initial coefficients.
        """
        initial = self.initial_of(equal)
        how, (low, high) = CONSTRAINTS[self.constraint], self.bounds
        with np.errstate(all="ignore"):
            raw = how.invert(np.array(initial, np.float64), low, high)
        allowed = np.all(np.isfinite(raw))
        if how.over_models:
            allowed &= abs(sum(initial) - 1) < 1e-6
        elif how.bounded:
            allowed &= low <= min(initial) and max(initial) <= high
        if self.shared:
            allowed &= len(set(initial)) == 1
            raw = raw[:1]
        if not allowed:
            what = (
                "positive numbers of sum 1"
                if how.over_models
                else f"numbers between {low:g} and {high:g}"
                if how.bounded
                else "finite numbers"
            )
            alike = ", the same for all models" * self.shared
            raise RecipeError(
                f"space.initial={initial} needs {what}{alike}, by constraint="
                f"{self.constraint}"
            )
        found: Raw = {}
        for name in self.learned(shapes):
            group = self.group(name)
            if group not in found:
                own = self._own(name, shapes[name])
                behind = raw.reshape(-1, *(1,) * len(own))
                shape = (len(raw), *own)
                found[group] = jnp.asarray(np.broadcast_to(behind, shape), jnp.float32)
        if not found:
            raise RecipeError(
                f"space.include={self.include!r} fits no tensor; needs one that does"
            )
        return found

    def initial_of(self, equal: tuple[float, ...]) -> tuple[float, ...]:
        """The coefficient of each model at the start."""
        if self.initial is None:
            return equal
        given = np.atleast_1d(np.array(self.initial, np.float64))
        if given.shape not in ((1,), (len(equal),)):
            raise RecipeError(
                f"space.initial={self.initial!r} needs one number, or one per model, "
                f"{len(equal)} here"
            )
        return tuple(np.broadcast_to(given, len(equal)).tolist())

    def coefficients(
        self, raw: Raw, shapes: Shapes, equal: tuple[float, ...]
    ) -> dict[str, jax.Array]:
        """(K, ...) of each tensor, ready to broadcast; differentiable in `raw`."""
        how = CONSTRAINTS[self.constraint]
        by_group = {group: how.apply(own, *self.bounds) for group, own in raw.items()}
        if self.shared:
            by_group = {
                group: jnp.broadcast_to(own, (len(equal), *own.shape[1:]))
                for group, own in by_group.items()
            }
        fixed = jnp.asarray(self.initial_of(equal), jnp.float32)
        found = {}
        learned = set(self.learned(shapes))
        for name, shape in shapes.items():
            own = by_group[self.group(name)] if name in learned else fixed
            if own.ndim != 1 + len(shape):
                own = own.reshape(-1, *(1,) * len(shape))
            found[name] = own
        return found

    def size(self, shapes: Shapes, num_models: int) -> int:
        """How many numbers are learned."""
        rows = {"share": num_models - 1}.get(self.constraint, num_models)
        groups = {
            self.group(name): math.prod(self._own(name, shapes[name]))
            for name in self.learned(shapes)
        }
        return (1 if self.shared else rows) * sum(groups.values())

    def _own(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes behind K of a group's raw array."""
        if self.granularity == "element":
            return shape
        if self.granularity != "column":
            return ()
        if len(shape) == 1 and name.rpartition(".")[2] == "bias":
            return (1,)
        return (*(1,) * (len(shape) - 1), *shape[-1:])


def penalty(space: Space, raw: Raw, columns: Mapping[str, jax.Array]) -> jax.Array:
    """Σ of the weighted regularisers over the groups of raw numbers.

    Args:
      columns: weights of ``weighted_overlap``, of the groups that it counts.
    """
    from m3jax.learn.distillation import of_coefficients, weighted_overlap

    total = jnp.zeros((), jnp.float32)
    for group, own in raw.items():
        if space.regularisers and group.rpartition(".")[2] != "bias":
            values = {"weighted_overlap": jnp.zeros_like(total), **of_coefficients(own)}
            if group in columns:
                values["weighted_overlap"] = weighted_overlap(own[:, 0], columns[group])
            for name, weight in space.regularisers.items():
                total = total + weight * values[name]
    return total
