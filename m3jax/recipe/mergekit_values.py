"""A parameter of mergekit's YAML as a value of ours: levels, filters, gradients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.recipe.mergekit_methods import Parameter
from m3jax.recipe.problems import RecipeError, nearest
from m3jax.recipe.values import Gradient, Rules

_WORDS = {"true": True, "false": False}
_Levels = Sequence[Mapping[str, Any]]


def resolved(parameter: Parameter, levels: _Levels, shift: int = 0) -> Any:
    """The value of a parameter: the first level that has one for a tensor counts.

    Args:
      parameter: which one.
      levels: parameters by name, the nearest first.
      shift: from a layer of the output to that of the model whose names the filters
        look at.

    Returns:
      A number, word, `Gradient` or `Rules`; None where no level has a required one.

    Raises:
      RecipeError: a value is none for this parameter.
    """
    rules: list[tuple[str, Any]] = []
    for level in levels:
        for pattern, value in _conditions(parameter, level.get(parameter.name)):
            if pattern in (None, "*"):
                return Rules(tuple(rules), value, shift) if rules else value
            rules.append((re.escape(pattern), value))
    if not rules:
        return parameter.default
    return Rules(tuple(rules), parameter.default, shift)


def mapping(value: Any, key: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{key}={value!r} needs keys and values")
    return value


def check_keys(
    prefix: str,
    given: Mapping[Any, Any],
    known: Sequence[str],
    later: Sequence[str] = (),
) -> None:
    """Raises RecipeError for a key that is unknown or not supported."""
    for key in given:
        if key in later:
            raise RecipeError(f"{prefix}{key} is not supported")
        if key not in known:
            raise RecipeError(f"unknown key {prefix}{key}{nearest(key, known)}")


def _conditions(parameter: Parameter, given: Any) -> list[tuple[str | None, Any]]:
    """Filters and their values; None without a filter."""
    name = parameter.name
    if given is None:
        return []
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list) or not any(isinstance(own, dict) for own in given):
        return [(None, _value(parameter, given))]
    found = []
    for own in given:
        own = mapping(own, name)
        check_keys(f"{name}.", own, ("filter", "value"))
        if "value" not in own:
            raise RecipeError(f"{name}: a filter has no value: {own!r}")
        pattern = own.get("filter")
        pattern = pattern if pattern is None else str(pattern)
        found.append((pattern, _value(parameter, own["value"])))
    return found


def _value(parameter: Parameter, value: Any) -> Any:
    if isinstance(value, list) and value and not parameter.word:
        return Gradient(tuple(_value(parameter, point) for point in value))
    if isinstance(value, str):
        value = _WORDS.get(value.lower(), value)
    if parameter.word and parameter.options != (True, False):
        if value not in parameter.options:
            allowed = ", ".join(map(str, parameter.options))
            raise RecipeError(f"{parameter.name}={value!r} needs one of {allowed}")
        return value
    if parameter.word or isinstance(parameter.default, bool):
        if value in (True, False) and isinstance(value, (bool, int, float)):
            return bool(value)
        raise RecipeError(f"{parameter.name}={value!r} needs true or false")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"{parameter.name}={value!r} needs a number") from None
