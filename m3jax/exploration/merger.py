"""Merges draw after draw in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from m3jax import mixup
from m3jax.engine import in_memory
from m3jax.engine.trees import align_trees
from m3jax.methods.method import Info
from m3jax.models.layers import Parameters
from m3jax.recipe import Recipe

Ratios = dict[str, tuple[float, ...]]


class Merger:
    """Base and models, aligned and checked once, to be merged many times.

    What differs between draws is an argument of the kernels: after the first merge
    nothing compiles, whatever the ratios, rates, scaling, trim rate and seeds.
    """

    def __init__(self, base: Any, models: Sequence[Any], recipe: Recipe):
        """Lines up the pytrees.

        Args:
          base, models: as for `m3jax.merge_params`.
          recipe: its method, exclude, vocabulary and dtype hold for all draws.

        Raises:
          RecipeError, CheckpointError: as `m3jax.merge_params` does.
        """
        recipe.check(num_models=len(models), has_base=base is not None)
        self._leaves, self._structure = align_trees(base, models, recipe)
        in_memory.check_inputs(self._leaves)
        self._num_models = len(models)
        self._names = [leaf.name for leaf in self._leaves if leaf.merged]
        self._measured: tuple[Any, Info] = (None, {})

    def __call__(self, recipe: Recipe, seed: int) -> Parameters:
        """The merged parameters: bit for bit those of `m3jax.merge_params`.

        NaN and infinity in them are left for the evaluator to find.
        """
        numbers = in_memory.draw(self._leaves, recipe, self._num_models, seed)
        info = self._info(recipe, seed, numbers)
        merged = in_memory.combine(self._leaves, recipe, numbers, info)
        return jax.tree.unflatten(self._structure, merged)

    def ratios(self, recipe: Recipe, seed: int) -> Ratios | None:
        """The ratios of a draw, for each group of tensors; None where M3 is off."""
        return mixup.draw_ratios(recipe.mixup, self._num_models, self._names, seed)

    def _info(self, recipe: Recipe, seed: int, numbers: in_memory.Draw) -> Info:
        """What the method measures; draws that differ in ratios alone share it."""
        masked = recipe.dare.drop_rate is not None and recipe.dare.strategy == "random"
        what = (recipe.trim_rate, recipe.dare, seed if masked else None)
        measured, info = self._measured  # another lane may replace it meanwhile
        if measured != what:
            info = in_memory.measure(self._leaves, recipe, numbers)
            self._measured = (what, info)
        return info
