"""A merge as a function of its coefficients, and its vector-Jacobian product.

θ = m(c) is made tensor by tensor, so the gradient in c is the pull-back of ∂L/∂θ
through each tensor's own m: one backward pass of the merged model, then one pass over
the tensors. Beside the merged model and its gradient, the arrays of one tensor are in
memory at a time where they come from files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m3jax.engine import in_memory, kernel
from m3jax.engine.kernel import At, Numbers, Program, take
from m3jax.engine.leaves import operands
from m3jax.engine.measure import measured_by, resolved
from m3jax.engine.placement import Placement
from m3jax.learn.gradient.tensors import Tensors
from m3jax.methods import METHODS
from m3jax.recipe import Mixup, Recipe, RecipeError
from m3jax.recipe.tokenizer import BY_ROW


class Merge:
    """m: from coefficients by tensor, (K, ...), to merged tensors.

    What the recipe's steps measure (TIES's thresholds and majority sign, angles) and
    draw (DARE's masks) is found once, and does not depend on the coefficients.
    """

    def __init__(
        self, tensors: Tensors, recipe: Recipe, seed: int, dtype: Any = jnp.float32
    ):
        """What is measured is found when it is first asked for.

        Args:
          tensors: base and models.
          recipe: whose weights the coefficients are; see `learnable`.
          seed: of masks.
          dtype: of the merged tensors. Gradients come in it, so it is float32 unless
            memory is short.
        """
        self.tensors = tensors
        self._recipe, self._seed = learnable(recipe), seed
        self._program = Program.of(self._recipe)
        bench = tensors.bench
        self._places = {bench.names[i]: i for i in bench.merged}
        self._dtype = jnp.dtype(dtype).name

    def __call__(self, coefficients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The merged tensors by name, unrounded but for the dtype."""
        return {
            name: _merged(coefficients[name], self._of(name), **self._static)
            for name in self._places
        }

    def pull_back(
        self, coefficients: Mapping[str, jax.Array], gradient: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """∂L/∂c of the same shapes, from ∂L/∂θ by name."""
        return {
            name: _pulled(
                coefficients[name], gradient[name], self._of(name), **self._static
            )
            for name in self._places
        }

    def task_vectors(self, name: str) -> jax.Array:
        """(K, ...) of a tensor, float32; the tensors have a base."""
        leaf = self.tensors.bench.leaves[self._places[name]]
        base = jnp.asarray(leaf.base, jnp.float32)
        return jnp.stack([jnp.asarray(own, jnp.float32) - base for own in leaf.models])

    @property
    def equal_weights(self) -> tuple[float, ...]:
        """The coefficient of each model where nothing is said."""
        count = self.tensors.bench.num_models
        return self._recipe.method.equal_weights(count) or ()

    @functools.cached_property
    def _numbers(self) -> Numbers:
        bench = self.tensors.bench
        ((job, numbers),) = in_memory.numbers_of(bench, self._recipe, self._seed)
        found = measured_by(bench, job, numbers, lambda name, find: find())
        return found._replace(p=resolved(found.p))

    @property
    def _static(self) -> dict[str, Any]:
        return {"program": self._program, "dtype": self._dtype}

    def _of(self, name: str) -> _Given:
        i, bench = self._places[name], self.tensors.bench
        leaf = bench.leaves[i]
        placement = Placement.of(leaf.models[0])
        axes = len(leaf.models[0].shape)
        own = take(self._numbers._replace(keys=None), i, axes)
        draw = bench.draw(At.method(self._program, self._numbers), i, placement)
        return _Given(leaf.base, leaf.models, own, draw)


class _Given(NamedTuple):
    """Arrays, numbers and masks of one tensor."""

    base: Any
    models: Any
    numbers: Numbers
    draw: Any


def learnable(recipe: Recipe) -> Recipe:
    """The recipe without M3, whose weights can be learned.

    Raises:
      RecipeError: its method is not differentiable in its weights.
    """
    if recipe.rules:
        raise RecipeError("a recipe with rules cannot be learned; give one method")
    if not recipe.method.differentiable:
        known = ", ".join(n for n, own in METHODS.items() if own.differentiable)
        raise RecipeError(
            f"method {recipe.method.name} cannot be learned; needs one of {known}"
        )
    for field in ("rules", "slices"):
        if getattr(recipe, field):
            raise RecipeError(
                f"{field}={getattr(recipe, field)!r} needs (): one method is learned, "
                "of all tensors as they are"
            )
    if recipe.vocabulary not in BY_ROW or recipe.compute != "float32":
        raise RecipeError(
            f"vocabulary={recipe.vocabulary}, compute={recipe.compute}: coefficients "
            "are learned in float32, and vocabularies fitted by rows"
        )
    others = [step.name for step in recipe.transforms if step.unit != "element"]
    if others:
        raise RecipeError(
            f"transforms={others} see rows, and cannot be learned through"
        )
    recipe = recipe.with_number(recipe.method.name, "weights", None)
    return dataclasses.replace(recipe, mixup=Mixup(alpha=None))


@functools.partial(jax.jit, static_argnames=("program", "dtype"))
def _merged(
    coefficients: jax.Array, given: _Given, *, program: Program, dtype: str
) -> jax.Array:
    x = operands(given.base, given.models, {})
    numbers = given.numbers
    p = {**numbers.p[-1], "weights": coefficients.astype(x.models.dtype)}
    with jax.numpy_rank_promotion("allow"):  # it is written for NumPy's tables
        info = program.method.derive(p, dict(numbers.info[-1]), jnp)
    own = Numbers((*numbers.p[:-1], p), (*numbers.info[:-1], info))
    dtypes = (("", dtype),)
    return kernel.merge(x, own, given.draw, program=program, dtypes=dtypes)[""]


@functools.partial(jax.jit, static_argnames=("program", "dtype"))
def _pulled(
    coefficients: jax.Array,
    gradient: jax.Array,
    given: _Given,
    *,
    program: Program,
    dtype: str,
) -> jax.Array:
    _, back = jax.vjp(
        lambda c: _merged(c, given, program=program, dtype=dtype), coefficients
    )
    return back(gradient.astype(dtype))[0]
