"""What draws are shown by: the parameters in which they differ, and their scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from m3jax import programs
from m3jax.exploration.report.summary import OBJECTIVE
from m3jax.exploration.search.result import Exploration, Row

_LARGEST = 1e300  # differences of numbers have to be finite


@dataclasses.dataclass(frozen=True)
class Axis:
    """A number of every draw.

    Attributes:
      name: of the parameter, or of the task.
      numbers: one a draw; NaN where it has none. Words count from 0.
      options: the words.
      lower: less is better.
      model: whose ratio it is.
    """

    name: str
    numbers: tuple[float, ...]
    options: tuple[str, ...] = ()
    lower: bool = False
    model: int | None = None

    def shown(self, draw: int) -> str:
        """The value of a draw, for people."""
        number = self.numbers[draw]
        if math.isnan(number):
            return "—"
        return self.options[int(number)] if self.options else f"{number:.4g}"


def parameters(found: Exploration) -> list[Axis]:
    """The ratios, and the fields of the recipe in which draws differ; or the draw.

    Ratios are means over the groups of tensors that they were drawn for. Those of two
    models add up to 1, so the first says it.
    """
    draws, count = found.draws, len(found.models)
    axes = _of_programs(found) if found.winner.program is not None else []
    ratios = [draw.mean_ratios or (math.nan,) * count for draw in draws]
    for i, name in enumerate(found.models[: 1 if count == 2 else count]):
        numbers = tuple(own[i] for own in ratios)
        axes.append(Axis(f"λ of {name}", numbers, model=i))
    recipes = [dict(_leaves(draw.recipe.to_dict())) for draw in draws]
    for path in dict.fromkeys(path for recipe in recipes for path in recipe):
        if path[:2] == ("mixup", "ratios") or _repeats(path, count):
            continue
        if axes and path[0] in ("slices", "passthrough"):
            continue  # they are the program
        values = [recipe.get(path) for recipe in recipes]
        axes.append(_axis(_label(path, found.models), values))
    differing = [axis for axis in axes if len({*axis.numbers} - {math.nan}) > 1]
    return differing or [Axis("draw", tuple(float(draw.index) for draw in draws))]


def _of_programs(found: Exploration) -> list[Axis]:
    """How many layers the draws have, and of which models."""
    each = [[block.model for block in draw.program or ()] for draw in found.draws]
    axes = [Axis("layers", tuple(float(len(own)) for own in each))]
    for model, name in [*enumerate(found.models), (programs.BASE, "base")]:
        numbers = tuple(float(own.count(model)) for own in each)
        axes.append(Axis(f"layers of {name}", numbers))
    return axes


def scores(found: Exploration) -> list[Axis]:
    """The tasks on validation, and the objective in front where there are several."""
    tasks = [
        Axis(
            task,
            tuple(_finite(draw.scores[task]) for draw in found.draws),
            lower=task in found.objective.losses,
        )
        for task in found.winner.scores
    ]
    objective = tuple(_finite(draw.objective) for draw in found.draws)
    return [Axis(OBJECTIVE, objective), *tasks] if len(tasks) > 1 else tasks


def score_of(found: Exploration, row: Row, name: str) -> float:
    """What a row has of `scores`; NaN where it is not finite."""
    own = row.scored["validation"].scores
    return _finite(own[name] if name in own else found.objective(own))


def front(tasks: Sequence[Axis]) -> list[int]:
    """The Pareto front: draws that no other one is as good as everywhere, and better.

    Those without some score are not among them.
    """
    signed = [
        tuple(-x if axis.lower else x for axis, x in zip(tasks, own, strict=True))
        for own in zip(*(axis.numbers for axis in tasks), strict=True)
    ]
    whole = [i for i, own in enumerate(signed) if not any(map(math.isnan, own))]
    found: list[int] = []
    # One that beats another comes before it here, or is beaten by one that does.
    for i in sorted(whole, key=lambda i: signed[i], reverse=True):
        if not any(_beats(signed[other], signed[i]) for other in found):
            found.append(i)
    return sorted(found)


def _beats(own: Sequence[float], other: Sequence[float]) -> bool:
    return own != other and all(x >= y for x, y in zip(own, other, strict=True))


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Path and value of all that is neither a mapping nor a list."""
    if isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            yield from _leaves(part, (*path, name))
    elif value is not None:
        yield path, value


def _repeats(path: tuple[Any, ...], count: int) -> bool:
    """Whether it is the second of two weights, which add up to 1."""
    return count == 2 and path[-2:] == ("weights", 1)


def _label(path: tuple[Any, ...], models: Sequence[str]) -> str:
    rule = ""
    if path[0] == "rules":
        rule, path = f"rule {path[1] + 1}: ", path[2:]
    *names, last = path
    if isinstance(last, int) and last < len(models) and path[0] != "slices":
        return f"{rule}{'.'.join(map(str, names))} of {models[last]}"
    return rule + ".".join(map(str, path))


def _axis(name: str, values: Sequence[Any]) -> Axis:
    given = [value for value in values if value is not None]
    if all(type(value) in (int, float) for value in given):
        numbers = (math.nan if value is None else float(value) for value in values)
        return Axis(name, tuple(numbers))
    words = [None if value is None else str(value) for value in values]
    options = sorted({word for word in words if word is not None})
    places = (math.nan if word is None else options.index(word) for word in words)
    return Axis(name, tuple(map(float, places)), tuple(options))


def _finite(number: float) -> float:
    return number if abs(number) < _LARGEST else math.nan
