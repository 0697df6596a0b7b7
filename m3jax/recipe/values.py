"""The value of a parameter, which may differ by model, by tensor and by layer.

    0.5                                         everywhere
    (0.2, 0.8)                                  one per model
    {"gradient": [0.0, 0.5, 1.0]}               over the layers, linear in between
    {"rules": {"mlp": 0.3, r"\\.0\\.": 0.5},      the first regular expression that is
     "otherwise": 0.7}                          found in the tensor's name
    {"runs": [[4, 0.3], [None, 0.5]]}           the layers before 4, and those left

They nest: each model of a tuple and each rule may have a gradient. They are resolved
to tables of numbers, one per tensor, before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3jax.methods.fields import Field, Gradient, Number, Rules, Runs
from m3jax.recipe.problems import Problems, RecipeError, plain
from m3jax.traced import is_traced

LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_FIRST = re.compile(r"embed|wte|wpe", re.IGNORECASE)
BEFORE = re.compile(r"embed|wte|wpe|(?:^|\.)shared\.", re.IGNORECASE)  # T5: shared


class Place(NamedTuple):
    """Where a tensor stands.

    Attributes:
      position: of its layer between the first (0) and the last (1) of all.
      layer: None outside the layers.
      last: the last layer of its stack: of the names that are alike up to the number.
    """

    position: float
    layer: int | None
    last: int


def parse(value: Any) -> Any:
    """A value from JSON: lists for tuples, objects for `Gradient`, `Rules` and `Runs`.

    Raises:
      RecipeError: an object is neither.
    """
    if isinstance(value, Mapping):
        keys = set(value)
        if keys == {"gradient"}:
            return Gradient(tuple(plain(list(value["gradient"]))))
        if keys == {"runs"}:
            return Runs(tuple((stop, parse(own)) for stop, own in value["runs"]))
        if "rules" in keys and keys <= {"rules", "otherwise", "shift"}:
            rules = value["rules"]
            pairs = rules.items() if isinstance(rules, Mapping) else rules
            parsed = tuple((pattern, parse(own)) for pattern, own in pairs)
            otherwise = parse(value.get("otherwise"))
            return Rules(parsed, otherwise, value.get("shift", 0))
        raise RecipeError(
            f"{dict(value)!r} needs 'gradient', 'runs', or 'rules' and 'otherwise'"
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
        shift = {"shift": value.shift} if value.shift else {}
        return {"rules": rules, "otherwise": as_json(value.otherwise), **shift}
    if isinstance(value, Runs):
        return {"runs": [[stop, as_json(own)] for stop, own in value.runs]}
    if isinstance(value, tuple):
        return tuple(map(as_json, value))
    return value


def check(name: str, value: Any, field: Field, problems: Problems) -> None:
    """Notes every number or word in a value that the field does not allow."""
    if isinstance(value, Rules):
        problems.patterns(f"{name}.rules", tuple(p for p, _ in value.rules))
        for pattern, own in (*value.rules, ("otherwise", value.otherwise)):
            check(f"{name}[{pattern!r}]", own, field, problems)
    elif isinstance(value, Runs):
        stops = [stop for stop, _ in value.runs]
        if not stops or None in stops[:-1] or any(_is_no_stop(own) for own in stops):
            problems.add(f"{name}.runs", stops, "layers, the last of them may be null")
        for stop, own in value.runs:
            check(f"{name}.runs[{stop}]", own, field, problems)
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


def _is_no_stop(stop: Any) -> bool:
    return stop is not None and (type(stop) is not int or stop < 0)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The value with a function, linear where there is a gradient, of each number."""
    if isinstance(value, Rules):
        rules = tuple((pattern, mapped(own, function)) for pattern, own in value.rules)
        return Rules(rules, mapped(value.otherwise, function), value.shift)
    if isinstance(value, Runs):
        return Runs(tuple((stop, mapped(own, function)) for stop, own in value.runs))
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
    if isinstance(value, Runs):
        return any(wrong_length(own, num_models) for _, own in value.runs)
    if is_traced(value):
        return value.ndim > 0 and value.shape[0] != num_models
    return isinstance(value, tuple) and len(value) != num_models


def of_tensor(value: Any, name: str, place: Place) -> Any:
    """The value of one tensor, by model if it differs between them.

    Args:
      value: a number, word, tuple, `Gradient`, `Rules` or `Runs`.
      name: of the tensor.
      place: see `places_of`.
    """
    if isinstance(value, Rules):
        looked_at = renumbered(name, value.shift) if value.shift else name
        for pattern, own in value.rules:
            if re.search(pattern, looked_at):
                return of_tensor(own, name, place)
        return of_tensor(value.otherwise, name, place)
    if isinstance(value, Runs):
        return of_tensor(*_of_run(value, name, place))
    if isinstance(value, Gradient) and isinstance(value.points[0], bool):
        position = 0.0 if place.layer is None else place.position
        return value.points[int(position * (len(value.points) - 1))]
    if isinstance(value, Gradient):
        points = np.linspace(0, 1, len(value.points))
        own = np.array(value.points, np.float64)
        return float(np.interp(place.position, points, own))
    if isinstance(value, tuple):
        return tuple(of_tensor(own, name, place) for own in value)
    return value


def _of_run(value: Runs, name: str, place: Place) -> tuple[Any, str, Place]:
    """The value of a tensor's run, and its place in there."""
    layer = place.layer
    if layer is None:
        own = value.runs[0 if stands_before(name) else -1][1]
        return own, name, place._replace(position=0.0)
    first = 0
    for stop, own in value.runs:
        stop = place.last + 1 if stop is None else stop
        if layer < stop:
            steps = stop - 1 - first
            position = (layer - first) / steps if steps else 1.0
            return own, name, place._replace(position=position)
        first = stop
    raise RecipeError(f"tensor {name!r}: layer {layer} is behind the last run's {stop}")


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
    where = places_of(names)
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
    return isinstance(value, (Rules, Runs, Gradient))


def by_tensor(value: Any, names: Sequence[str]) -> list[Any]:
    """The word of each tensor."""
    if not varies(value):
        return [value] * len(names)
    where = zip(names, places_of(names), strict=True)
    return [of_tensor(value, name, place) for name, place in where]


def places_of(names: Sequence[str]) -> list[Place]:
    """Where each tensor stands among the others."""
    lasts: dict[str, int] = {}
    for name in names:
        found = LAYER.search(name)
        if found:
            stack = name[: found.start()]
            lasts[stack] = max(lasts.get(stack, 0), int(found.group(1)))
    end = max(lasts.values(), default=0)

    def place(name: str) -> Place:
        found = LAYER.search(name)
        if found is None:
            return Place(0.0 if _FIRST.search(name) else 1.0, None, end)
        layer = int(found.group(1))
        return Place(layer / max(end, 1), layer, lasts[name[: found.start()]])

    return list(map(place, names))


def stands_before(name: str) -> bool:
    """Whether a tensor outside the layers stands before them: an embedding does."""
    return bool(BEFORE.search(name))


def renumbered(name: str, shift: int) -> str:
    """The name of the tensor that stands so many layers further on."""
    found = LAYER.search(name)
    if found is None:
        return name
    return name[: found.start(1)] + str(int(found[1]) + shift) + name[found.end(1) :]


def layer_of(name: str) -> int | None:
    """The first number in a tensor's name, which is that of its layer."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else None
