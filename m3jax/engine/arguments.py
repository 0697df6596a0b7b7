"""What Python callers write for paths and recipes: the obvious, or a clear refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from typing import Any

from m3jax.recipe import Recipe


def paths(given: Any, what: str) -> list[str]:
    """Paths of a list of them, or of a single one.

    Args:
      given: what was passed.
      what: the parameter's name, for errors.

    Raises:
      TypeError: it is neither; a dict's keys are no paths.
    """
    if isinstance(given, str | PathLike):
        return [fspath(given)]
    if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{what}={_short(given)} needs a list of paths or names")
    found = list(given)
    for one in found:
        if not isinstance(one, str | PathLike):
            raise TypeError(f"{what}: {_short(one)} needs to be a path or a name")
    return [fspath(one) for one in found]


def path(given: Any, what: str) -> str:
    """A path or a name; see `paths`."""
    if not isinstance(given, str | PathLike):
        raise TypeError(f"{what}={_short(given)} needs to be a path or a name")
    return fspath(given)


def recipe_of(given: Any) -> Recipe:
    """A recipe of one, of its fields as a dict (or ConfigDict), or of nothing.

    Raises:
      TypeError: it is none of these.
      RecipeError: its fields make no recipe.
    """
    if given is None:
        return Recipe()
    if hasattr(given, "to_dict") and not isinstance(given, Recipe):
        given = given.to_dict()
    if isinstance(given, dict):
        return Recipe.from_dict(given)
    if not isinstance(given, Recipe):
        raise TypeError(
            f"recipe={_short(given)} needs a Recipe or a dict of its fields, such as "
            "Recipe(method='ties')"
        )
    return given


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
