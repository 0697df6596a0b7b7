"""Whether a recipe fits the models that it is to merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3jax.methods.fields import Weights
from m3jax.recipe import slices as layers
from m3jax.recipe import values
from m3jax.recipe.problems import Problems, RecipeError

if TYPE_CHECKING:
    from m3jax.recipe.recipe import Recipe


def check_models(recipe: Recipe, num_models: int, has_base: bool) -> None:
    """Raises RecipeError where the recipe does not fit so many models."""
    problems = Problems()
    if num_models < 1:
        problems.add("models", num_models, "at least one model")
    if recipe.slices:
        layers.check(recipe.slices, num_models, has_base)
        has_base = all(own.base is not None for own in recipe.slices)
        num_models = recipe.num_inputs(num_models)
        if readers := _readers(recipe):
            problems.add("slices", "…", f"none: method {readers[0]} reads statistics")
    mixup = recipe.mixup
    if values.wrong_length(mixup.ratios, num_models):
        problems.add("mixup.ratios", mixup.ratios, _each(num_models))
    for own in recipe.variants:
        _check_steps(own, problems, num_models, has_base)
    if mixup.on and not problems:
        _check_ratios(recipe, problems)
    if not has_base and recipe.exclude:
        problems.add("exclude", recipe.exclude, "a base (--base)")
    if not has_base and recipe.unmatched == "base":
        problems.add("unmatched", recipe.unmatched, "a base (--base)")
    problems.raise_if_any()


def check_statistics(recipe: Recipe, count: int, num_models: int) -> None:
    """Raises RecipeError unless there are as many as the methods read."""
    readers = _readers(recipe)
    needed = num_models if readers else 0
    if count != needed:
        allowed = (
            f"one per model, {needed} here, as in --statistics=A,B: method "
            f"{readers[0]} reads them"
            if needed
            else f"none: method {recipe.method.name} reads none"
        )
        raise RecipeError(f"statistics: {count} given; needs {allowed}")


def _readers(recipe: Recipe) -> list[str]:
    """The methods that read statistics beside the models."""
    methods = [own.method for own in recipe.variants]
    return [method.name for method in methods if method.beside]


def _each(num_models: int) -> str:
    return f"one number per model, {num_models} here"


def _check_steps(
    recipe: Recipe, problems: Problems, num_models: int, has_base: bool
) -> None:
    wanted = recipe.method.num_models
    if wanted not in (None, num_models):
        allowed = f"{wanted} models for method {recipe.method.name}"
        problems.add("models", num_models, allowed)
    for step in recipe.steps:
        for name in step.fields():
            value = getattr(step, name)
            if values.wrong_length(value, num_models):
                problems.add(f"{step.name}.{name}", value, _each(num_models))
        if step.needs_base and not has_base:
            what = "method" if step is recipe.method else "transforms"
            problems.add(what, step.name, "a base (--base)")


def _check_ratios(recipe: Recipe, problems: Problems) -> None:
    mixup = recipe.mixup
    fields = [own.method.fields().get("weights") for own in recipe.variants]
    if not any(isinstance(field, Weights) for field in fields):
        name = recipe.method.name
        what = "alpha" if mixup.ratios is None else "ratios"
        allowed = f"None (--config.mixup.{what}=None): method {name} has no ratios"
        problems.add(f"mixup.{what}", getattr(mixup, what), allowed)
    for own, field in zip(recipe.variants, fields, strict=True):
        if isinstance(field, Weights):
            _check_weights(own, field, problems)


def _check_weights(recipe: Recipe, field: Weights, problems: Problems) -> None:
    name, ratios = recipe.method.name, recipe.mixup.ratios
    if recipe.method.weights is not None:
        problems.add(
            f"{name}.weights",
            recipe.method.weights,
            "mixup.alpha=None and no mixup.ratios, which would take their place",
        )
    elif isinstance(ratios, tuple):
        if min(ratios) < field.low:
            problems.add("mixup.ratios", ratios, f"no negative number for {name}")
        if field.mean and abs(sum(ratios) - 1) > 1e-5:
            problems.add("mixup.ratios", ratios, f"a sum of 1 for method {name}")
