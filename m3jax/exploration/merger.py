"""Merges draw after draw in device memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from m3jax import mixup
from m3jax.engine import in_memory
from m3jax.engine.trees import align_trees
from m3jax.methods.step import Info
from m3jax.models.layers import Parameters
from m3jax.recipe import Recipe

Ratios = dict[str, tuple[float, ...]]


class Merger:
    """Base and models, aligned and checked once, to be merged many times.

    What differs between draws is an argument of the kernels: after the first merge
    nothing compiles, whatever the ratios, rates, scaling, trim rate, seeds and slices.
    """

    def __init__(self, base: Any, models: Sequence[Any], recipe: Recipe):
        """Lines up the pytrees.

        Args:
          base, models: as for `m3jax.merge_params`.
          recipe: its method, exclude, vocabulary and dtype hold for all draws. With
            slices, the pytrees are kept whole, for draws that have slices of their own.

        Raises:
          RecipeError, CheckpointError: as `m3jax.merge_params` does.
        """
        recipe.check(num_models=len(models), has_base=base is not None)
        self._trees = (base, models) if recipe.slices else None
        if recipe.slices:
            recipe = dataclasses.replace(recipe, method="average", slices=())
        leaves, self._structure = align_trees(base, models, recipe)
        in_memory.check_inputs(leaves)
        self._bench = in_memory.Leaves(leaves, len(models))
        self._names = [leaf.name for leaf in leaves if leaf.merged]
        self._measured: dict[str, tuple[Any, Info]] = {}

    def __call__(self, recipe: Recipe, seed: int) -> Parameters:
        """The merged parameters: bit for bit those of `m3jax.merge_params`.

        NaN and infinity in them are left for the evaluator to find.
        """
        if recipe.slices:
            assert self._trees is not None
            made: Parameters = in_memory.merge_params(
                *self._trees, recipe, seed, allow_nonfinite=True
            )
            return made
        what = self._reads(recipe, seed)

        def kept(name: str, find: Callable[[], Info]) -> Info:
            before, info = self._measured.get(name, (None, {}))
            if before != what:  # another draw may replace it meanwhile
                info = find()
                self._measured[name] = (what, info)
            return info

        numbers = in_memory.measured(self._bench, recipe, seed, kept)
        merged = in_memory.combine(self._bench, numbers)
        return in_memory.unflatten(self._structure, merged)

    def ratios(self, recipe: Recipe, seed: int) -> Ratios | None:
        """The ratios of a draw, for each group of tensors; None where M3 is off."""
        count = self._bench.num_models
        return mixup.draw_ratios(recipe.mixup, count, self._names, seed)

    def statistics(self, recipe: Recipe) -> list[Any]:
        """What was measured for a draw, a pytree of each model; [] where nothing is."""
        return []

    def _reads(self, recipe: Recipe, seed: int) -> Any:
        """All that statistics depend on; draws that differ in nothing else share them.

        What a method measures may depend on its weights, unless it says otherwise.
        """
        patterns = [pattern for pattern, _ in recipe.rules]
        return patterns, [_read_by(own, seed) for own in recipe.variants]


def _read_by(recipe: Recipe, seed: int) -> Any:
    """The same of a recipe without rules."""
    drawn = any(step.draws for step in recipe.transforms)
    method = recipe.method
    weighs = method.weighs_statistics
    numbers = {name: getattr(method, name) for name in method.fields()}
    for name in () if weighs else ("weights", "scaling"):
        numbers.pop(name, None)
    own = (recipe.mixup, seed) if weighs else None
    return method.name, numbers, recipe.transforms, seed if drawn else None, own
