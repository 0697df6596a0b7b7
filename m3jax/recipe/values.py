"""The value of a parameter, which may differ by model, by tensor and by layer.

    0.5                                         everywhere
    (0.2, 0.8)                                  one per model
    {"gradient": [0.0, 0.5, 1.0]}               over the layers, linear in between
    {"rules": {"mlp": 0.3, r"\\.0\\.": 0.5},      the first regular expression that is
     "otherwise": 0.7}                          found in the tensor's name

They nest: each model of a tuple and each rule may have a gradient. They are resolved
to tables of numbers, one per tensor, before anything is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from m3jax.methods.fields import Field, Number
from m3jax.recipe.problems import Problems, RecipeError, plain
from m3jax.traced import is_traced

LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_FIRST = re.compile(r"embed|wte|wpe", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Values at equal distances from the first layer to the last, linear in between.

    Embeddings count as the first layer, what stands behind the layers as the last.
    """

    points: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """A value for the tensors whose name a regular expression is found in.

    Attributes:
      rules: (pattern, value); the first that fits counts.
      otherwise: the value where none fits.
    """

    rules: tuple[tuple[str, Any], ...]
    otherwise: Any


def parse(value: Any) -> Any:
    """A value from JSON: lists stand for tuples, objects for `Gradient` and `Rules`.

    Raises:
      RecipeError: an object is neither.
    """
    if isinstance(value, Mapping):
        keys = set(value)
        if keys == {"gradient"}:
            return Gradient(tuple(plain(list(value["gradient"]))))
        if "rules" in keys and keys <= {"rules", "otherwise"}:
            rules = value["rules"]
            pairs = rules.items() if isinstance(rules, Mapping) else rules
            parsed = tuple((pattern, parse(own)) for pattern, own in pairs)
            return Rules(parsed, parse(value.get("otherwise")))
        raise RecipeError(
            f"{dict(value)!r} needs 'gradient', or 'rules' and 'otherwise'"
        )
    if isinstance(value, (list, tuple)):
        return tuple(map(parse, value))
    return plain(value)


def as_json(value: Any) -> Any:
    """The value as `parse` takes it."""
    if isinstance(value, Gradient):
        return {"gradient": list(value.points)}
    if isinstance(value, Rules):
        rules = [[pattern, as_json(own)] for pattern, own in value.rules]
        return {"rules": rules, "otherwise": as_json(value.otherwise)}
    if isinstance(value, tuple):
        return tuple(map(as_json, value))
    return value


def check(name: str, value: Any, field: Field, problems: Problems) -> None:
    """Notes every number or word in a value that the field does not allow."""
    if isinstance(value, Rules):
        problems.patterns(f"{name}.rules", tuple(p for p, _ in value.rules))
        for pattern, own in (*value.rules, ("otherwise", value.otherwise)):
            check(f"{name}[{pattern!r}]", own, field, problems)
    elif isinstance(value, Gradient) and isinstance(field, Number):
        if not value.points:
            problems.add(name, value, "one number or more")
        for i, point in enumerate(value.points):
            check(f"{name}.gradient[{i}]", point, field, problems)
    elif is_traced(value) and isinstance(field, Number):
        return
    elif isinstance(value, tuple) and isinstance(field, Number) and field.per_model:
        if not value:
            problems.add(name, value, "one number per model")
        for i, own in enumerate(value):
            check(f"{name}[{i}]", own, field, problems)
    elif not field.fits(value):
        problems.add(name, value, field.allowed)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The value with a function, linear where there is a gradient, of each number."""
    if isinstance(value, Rules):
        rules = tuple((pattern, mapped(own, function)) for pattern, own in value.rules)
        return Rules(rules, mapped(value.otherwise, function))
    if isinstance(value, Gradient):
        return Gradient(tuple(map(function, value.points)))
    if isinstance(value, tuple):
        return tuple(mapped(own, function) for own in value)
    return None if value is None else function(value)


def wrong_length(value: Any, num_models: int) -> bool:
    """Whether a tuple in it does not have one value per model."""
    if isinstance(value, Rules):
        values = [own for _, own in value.rules] + [value.otherwise]
        return any(wrong_length(own, num_models) for own in values)
    if is_traced(value):
        return value.ndim > 0 and value.shape[0] != num_models
    return isinstance(value, tuple) and len(value) != num_models


def of_tensor(value: Any, name: str, position: float) -> Any:
    """The value of one tensor, by model if it differs between them.

    Args:
      value: a number, word, tuple, `Gradient` or `Rules`.
      name: of the tensor.
      position: of its layer, from 0 to 1; see `positions`.
    """
    if isinstance(value, Rules):
        for pattern, own in value.rules:
            if re.search(pattern, name):
                return of_tensor(own, name, position)
        return of_tensor(value.otherwise, name, position)
    if isinstance(value, Gradient):
        places = np.linspace(0, 1, len(value.points))
        return float(np.interp(position, places, np.array(value.points, np.float64)))
    if isinstance(value, tuple):
        return tuple(of_tensor(own, name, position) for own in value)
    return value


def table(
    value: Any,
    field: Number,
    names: Sequence[str],
    num_models: int,
    xp: Any = np,
    places: Sequence[int] | None = None,
) -> Any:
    """The numbers of N tensors: (K, N) for a field by model, else (N,); float64.

    Args:
      value: of the field.
      field: of the step.
      names: of the tensors.
      num_models: K.
      xp: NumPy, or `jax.numpy` where the value is traced.
      places: of the tensors whose numbers count; None: of all.

    Raises:
      RecipeError: a tensor that counts gets no value.
    """
    shape = (num_models, len(names)) if field.per_model else (len(names),)
    if is_traced(value) or not varies(value):
        number = xp.asarray(np.nan if value is None else value, xp.result_type(float))
        behind = number[:, None] if number.ndim else number
        return xp.broadcast_to(behind, shape)
    rows = np.zeros(shape)
    where = positions(names)
    for i in range(len(names)) if places is None else places:
        rows[..., i] = np.array(of_tensor(value, names[i], where[i]), np.float64)
        if np.any(np.isnan(rows[..., i])):
            raise RecipeError(
                f"tensor {names[i]!r}: no rule gives it a value ({field.help}); add "
                "one without a filter"
            )
    return rows


def varies(value: Any) -> bool:
    """Whether it differs between tensors."""
    if isinstance(value, tuple):
        return any(map(varies, value))
    return isinstance(value, (Rules, Gradient))


def by_tensor(value: Any, names: Sequence[str]) -> list[Any]:
    """The word of each tensor."""
    if not varies(value):
        return [value] * len(names)
    where = zip(names, positions(names), strict=True)
    return [of_tensor(value, name, position) for name, position in where]


def positions(names: Sequence[str]) -> list[float]:
    """Where each tensor's layer stands between the first (0) and the last (1)."""
    layers: list[int | None] = [layer_of(name) for name in names]
    last = max((layer for layer in layers if layer is not None), default=0)
    outside: Callable[[str], float] = lambda name: 0.0 if _FIRST.search(name) else 1.0  # noqa: E731
    return [
        outside(name) if layer is None else layer / max(last, 1)
        for name, layer in zip(names, layers, strict=True)
    ]


def layer_of(name: str) -> int | None:
    """The first number in a tensor's name, which is that of its layer."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else None
