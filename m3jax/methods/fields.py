"""The parameters of a step: what each may be, said once.

Checks, flags, search ranges, the docs table and m3jax.json follow from what stands
here. A number may also be given by model, by rules on tensor names, or as a gradient
over the layers: see `m3jax.recipe.values`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from m3jax.traced import is_traced


@dataclasses.dataclass(frozen=True)
class Field:
    """One parameter of a step.

    Attributes:
      help: what it means, with its unit.
      default: where the recipe says nothing.
    """

    help: str
    default: Any

    @property
    def allowed(self) -> str:
        """What a value may be, for errors and the docs."""
        raise NotImplementedError

    def fits(self, value: Any) -> bool:
        """Whether one value, of one tensor and one model, is allowed."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Number(Field):
    """A number of float64.

    Attributes:
      low, high: bounds, both allowed.
      search: the range that an exploration takes where it is told none.
      per_model: it may differ between the models; the kernel then gets (K, N).
      optional: None is allowed, and means "off".
      integer: it has to be one.
    """

    low: float = float("-inf")
    high: float = float("inf")
    search: tuple[float, float] | None = None
    per_model: bool = False
    optional: bool = False
    integer: bool = False

    @property
    def allowed(self) -> str:
        finite = (abs(self.low) < float("inf"), abs(self.high) < float("inf"))
        kind = "an integer" if self.integer else "a number"
        return {
            (False, False): f"{kind.replace('a ', 'a finite ')}",
            (True, False): f"{kind.replace('a ', 'a finite ')}, {self.low:g} or more",
            (True, True): f"{kind} from {self.low:g} to {self.high:g}",
            (False, True): f"{kind.replace('a ', 'a finite ')}, {self.high:g} or less",
        }[finite]

    def fits(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, (bool, str, bytes)) or getattr(value, "shape", ()) != ():
            return False
        if is_traced(value):
            return True
        try:
            number = float(value)
        except (TypeError, ValueError):
            return False
        whole = not self.integer or number.is_integer()
        return whole and self.low <= number <= self.high and abs(number) < float("inf")


@dataclasses.dataclass(frozen=True)
class Weights(Number):
    """λ, the coefficient of each model: M3 draws it where it is on.

    Attributes:
      equal: K -> the coefficient of each model where the recipe gives none.
      mean: M3's ratios have to sum to 1, since the method does not divide by the sum.
    """

    mean: bool = False
    equal: Callable[[int], float] = lambda num_models: 1.0


@dataclasses.dataclass(frozen=True)
class Switch(Number):
    """Yes or no, which may differ between tensors: a number, 0 for no."""

    low: float = 0.0
    high: float = 1.0

    @property
    def allowed(self) -> str:
        return "True or False"

    def fits(self, value: Any) -> bool:
        return isinstance(value, bool) or super().fits(value)


@dataclasses.dataclass(frozen=True)
class Choice(Field):
    """One of a few words (or `True` and `False`); a kernel is compiled for each.

    Attributes:
      options: the words. Those of a mapping may become more.
    """

    options: Collection[Any] = (True, False)

    @property
    def allowed(self) -> str:
        if self.options == (True, False):
            return "True or False"
        return "one of " + ", ".join(map(str, self.options))

    def fits(self, value: Any) -> bool:
        return any(type(value) is type(o) and value == o for o in self.options)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Values at equal distances from the first layer to the last, linear in between.

    Embeddings count as the first layer, what stands behind the layers as the last. Of
    booleans each holds up to the next one, and the first outside the layers.
    """

    points: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """A value for the tensors whose name a regular expression is found in.

    Attributes:
      rules: (pattern, value); the first that fits counts.
      otherwise: the value where none fits.
      shift: added to the number of the name's layer before the patterns look at it:
        where a slice takes the layer from, in the model.
    """

    rules: tuple[tuple[str, Any], ...]
    otherwise: Any
    shift: int = 0


@dataclasses.dataclass(frozen=True)
class Runs:
    """A value for each run of layers, one run behind the other.

    A `Gradient` in it goes from the first layer of its run to the last; a run of one
    layer has its end. What stands before the layers has the beginning of the first
    run, what stands behind them that of the last.

    Attributes:
      runs: (stop, value): for the layers before `stop` that no earlier run has; None:
        for all that are left, of each stack of layers on its own.
    """

    runs: tuple[tuple[int | None, Any], ...]


def number(*, default: Any, help: str, **settings: Any) -> Any:
    """A field of a step that holds a number; the settings are those of `Number`."""
    return _field(Number(help, default, **settings))


def share(*, default: Any, help: str, **settings: Any) -> Any:
    """A field of a step that holds a number from 0 to 1."""
    return number(default=default, help=help, low=0.0, high=1.0, **settings)


def scaling(*, search: tuple[float, float] = (0.5, 1.5)) -> Any:
    """The field of a step for s, which is 1 where nothing is said."""
    return number(
        default=1.0, help="s, multiplies the merged task vector", search=search
    )


def weights(*, default: None = None, **settings: Any) -> Any:
    """The field of a step that M3's ratios go to; the settings are of `Weights`."""
    text = "λ, one per model; None: equal, or drawn by M3"
    return _field(Weights(text, default, per_model=True, optional=True, **settings))


def choice(*, default: Any, help: str, options: Collection[Any] = (True, False)) -> Any:
    """A field of a step that holds one of a few words."""
    return _field(Choice(help, default, options))


def switch(*, default: bool, help: str) -> Any:
    """A field of a step that is on or off, by tensor."""
    return _field(Switch(help, default))


def _field(described: Field) -> Any:
    return dataclasses.field(
        default=described.default, metadata={"field": described}, kw_only=True
    )
