"""Steps as groups of JSON values, one under the name of each: files and flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from m3jax.methods import METHODS, TRANSFORMS, Step
from m3jax.recipe import values
from m3jax.recipe.mixup import Mixup
from m3jax.recipe.problems import Problems, RecipeError, plain
from m3jax.traced import is_traced


def as_groups(steps: tuple[Step, ...]) -> dict[str, Any]:
    """Transforms and method by name, with a group of parameters each."""
    *transforms, method = steps
    return {
        "method": method.name,
        "transforms": tuple(step.name for step in transforms),
        **{step.name: group(step) for step in steps},
    }


def from_groups(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """The transforms, and the method or, where it has no group, its name.

    Raises:
      RecipeError: for an unknown step or parameter, or one of another method.
    """
    groups = {**TRANSFORMS, **METHODS}
    method = fields.get("method", "average")
    problems = Problems()
    problems.choice("method", method, tuple(METHODS))
    order = fields.get("transforms", ())
    if not isinstance(order, (list, tuple)):
        problems.add("transforms", order, "a tuple of names, such as ('dare',)")
    problems.raise_if_any()
    for name, own in fields.items():
        if name in groups:
            check_known(f"{name}.", own, [*groups[name].fields()])
    for name in METHODS:
        if name != method and name in fields:
            _check_unset(name, fields[name], method)
    steps = {name: groups[name](**fields[name]) for name in fields if name in groups}
    check_known("transforms: ", order, [*TRANSFORMS])
    order = [*order, *(name for name in TRANSFORMS if name not in order)]
    transforms = [steps[name] for name in order if name in steps]
    return (*transforms, steps.get(method, method))


def parsed_rules(rules: Any) -> tuple[Any, ...]:
    """The rules of a recipe from what `to_dict` makes of them."""
    if not isinstance(rules, (list, tuple)):
        raise RecipeError(f"rules={rules!r} needs a list of groups")
    return tuple(map(_rule, rules))


def _rule(fields: Any) -> tuple[str, tuple[Any, ...]]:
    if not isinstance(fields, Mapping) or "tensors" not in fields:
        raise RecipeError(
            f"rules: {fields!r} needs to be a group with 'tensors', a regular "
            "expression, and 'method'"
        )
    known = ["tensors", "method", "transforms", *TRANSFORMS, *METHODS]
    check_known("rules: ", fields, known)
    try:
        steps = from_groups(fields)
    except RecipeError as error:
        raise RecipeError(f"rules[{fields['tensors']!r}]: {error}") from None
    return fields["tensors"], steps


def group(step: Step) -> dict[str, Any]:
    """The parameters of a step as JSON values."""
    return {name: values.as_json(getattr(step, name)) for name in step.fields()}


def dotted(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested groups by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inner = isinstance(value, dict)
        found |= dotted(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def check_known(prefix: str, fields: Any, known: list[str]) -> None:
    """Raises RecipeError for a field that is unknown here, saying where it is known."""
    if not isinstance(fields, (Mapping, list, tuple)):
        raise RecipeError(f"recipe field {prefix[:-1]!r} must be a group of fields")
    for name in fields:
        if name in known:
            continue
        homes = ["mixup"] * (name in {f.name for f in dataclasses.fields(Mixup)})
        homes += [step for step, cls in METHODS.items() if name in cls.fields()]
        where = (
            f"; it is a field of {', '.join(f'{home}.{name}' for home in homes)}"
            if homes
            else f"; known: {', '.join(prefix + own for own in known)}"
        )
        raise RecipeError(f"unknown recipe field {prefix + str(name)!r}{where}")


def _check_unset(name: str, fields: Mapping[str, Any], method: str) -> None:
    """Raises RecipeError if a field of another method than the chosen one is set."""
    defaults = group(METHODS[name]())
    for field, value in fields.items():
        if not _same(value, defaults[field]):
            homes = [own for own, cls in METHODS.items() if field in cls.fields()]
            raise RecipeError(
                f"{name}.{field}={value!r}: the method is {method}; of the methods, "
                f"{', '.join(homes)} have {field!r}"
            )


def _same(a: Any, b: Any) -> bool:
    if is_traced(a) or is_traced(b):
        return a is b
    return bool(np.array_equal(plain(a), plain(b))) if a is not None else b is None
