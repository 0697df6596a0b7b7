"""The recipe of a merge: what is done to the tensors, apart from which files.

A recipe is plain data. It holds no path and no seed, so one recipe serves any
set of models, and the pair (recipe, seed) fixes every number of a merge.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

METHODS_WITH_BASE = {"task_arithmetic", "ties"}
METHODS = ("average", "task_arithmetic", "ties")
GRANULARITIES = ("model", "layer", "tensor")
STRATEGIES = ("random", "magnitude")
TARGETS = ("delta", "weights")
VOCABULARIES = ("error", "mean", "truncate")
DTYPES = ("input", "float32", "float16", "bfloat16", "float64")

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}


class RecipeError(ValueError):
    """A field of the recipe is unknown, out of range, or does not fit the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixup:
    """M3: how the ratio of each model is found.

    Attributes:
      alpha: λ ~ Beta(α, α); for K > 2 models Dirichlet(α, …, α). ``None``: M3
        off; 0: λ = 1, so that the first model gets the whole weight.
      ratios: fixed ratios, one per model, instead of a draw.
      granularity: one draw per ``model``, per ``layer`` or per ``tensor``.
    """

    alpha: float | None = 0.5
    ratios: tuple[float, ...] | None = None
    granularity: str = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dare:
    """DARE: random (or magnitude) drop, and rescale.

    Attributes:
      drop_rate: p, one number or one per model; ``None``: off.
      rescale: multiply what is kept by 1/(1 − p).
      strategy: ``random``, or ``magnitude`` (per tensor, smallest first).
      target: ``delta`` masks θ_i − θ0, ``weights`` masks θ_i itself.
    """

    drop_rate: float | tuple[float, ...] | None = None
    rescale: bool = True
    strategy: str = "random"
    target: str = "delta"

    def rates(self, num_models: int) -> tuple[float, ...] | None:
        """The drop rate of each model, or None where DARE is off."""
        if self.drop_rate is None:
            return None
        if isinstance(self.drop_rate, tuple):
            return self.drop_rate
        return (self.drop_rate,) * num_models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the merged numbers, apart from inputs and seed.

    Attributes:
      method: ``average``, ``task_arithmetic`` or ``ties``.
      mixup: how the ratios are found.
      scaling: s, multiplies the merged task vector.
      trim_rate: r of TIES, the share of each model's task vector that is set to
        zero, smallest first, over the whole model.
      dare: drop and rescale before the method.
      exclude: regular expressions (``re.match``) of tensors taken from the base.
      vocabulary: what to do about different vocabulary sizes: ``error``,
        ``mean`` (append mean rows) or ``truncate``.
      dtype: dtype of the output; ``input`` keeps each tensor's own.
      max_shard_size: of an output file, in bytes or as text such as ``5GB``.

    Raises:
      RecipeError: naming each wrong field, its value and what is allowed.
    """

    method: str = "average"
    mixup: Mixup = dataclasses.field(default_factory=Mixup)
    scaling: float = 1.0
    trim_rate: float = 0.5
    dare: Dare = dataclasses.field(default_factory=Dare)
    exclude: tuple[str, ...] = ()
    vocabulary: str = "error"
    dtype: str = "input"
    max_shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.choice("method", self.method, METHODS)
        problems.choice("mixup.granularity", self.mixup.granularity, GRANULARITIES)
        problems.choice("dare.strategy", self.dare.strategy, STRATEGIES)
        problems.choice("dare.target", self.dare.target, TARGETS)
        problems.choice("vocabulary", self.vocabulary, VOCABULARIES)
        problems.choice("dtype", self.dtype, DTYPES)
        problems.number("scaling", self.scaling)
        problems.number("trim_rate", self.trim_rate, 0.0, 1.0)
        if self.mixup.alpha is not None:
            problems.number("mixup.alpha", self.mixup.alpha, 0.0)
        if self.mixup.ratios is not None:
            problems.numbers("mixup.ratios", self.mixup.ratios)
        if isinstance(self.dare.drop_rate, tuple):
            problems.numbers("dare.drop_rate", self.dare.drop_rate, 0.0, 1.0)
        elif self.dare.drop_rate is not None:
            problems.number("dare.drop_rate", self.dare.drop_rate, 0.0, 1.0)
        if not isinstance(self.dare.rescale, bool):
            problems.add("dare.rescale", self.dare.rescale, "True or False")
        problems.patterns("exclude", self.exclude)
        try:
            parse_size(self.max_shard_size)
        except ValueError:
            problems.add("max_shard_size", self.max_shard_size, "such as 5GB or 200MB")
        problems.raise_if_any()

    def check(self, *, num_models: int, has_base: bool) -> None:
        """Raises RecipeError where the recipe does not fit this set of models."""
        problems = _Problems()
        if num_models < 1:
            problems.add("models", num_models, "at least one model")
        for field, value in (
            ("mixup.ratios", self.mixup.ratios),
            ("dare.drop_rate", self.dare.drop_rate),
        ):
            if isinstance(value, tuple) and len(value) != num_models:
                problems.add(field, value, f"one number per model, {num_models} here")
        ratios = self.mixup.ratios
        if ratios is not None and not problems:
            if self.method == "average" and abs(math.fsum(ratios) - 1) > 1e-5:
                problems.add("mixup.ratios", ratios, "a sum of 1 for method average")
            if self.method == "ties" and min(ratios) < 0:
                problems.add("mixup.ratios", ratios, "no negative number for ties")
        if not has_base:
            if self.method in METHODS_WITH_BASE:
                problems.add("method", self.method, "a base: give --base")
            if self.dare.drop_rate is not None and self.dare.target == "delta":
                problems.add("dare.target", "delta", "a base: give --base")
            if self.exclude:
                problems.add("exclude", self.exclude, "a base: give --base")
        problems.raise_if_any()

    def excludes(self, name: str) -> bool:
        """Whether tensor `name` is taken from the base unmerged."""
        return any(re.match(pattern, name) for pattern in self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested dicts of JSON values, every field present."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """A recipe from nested mappings, lists standing for tuples.

        Raises:
          RecipeError: for an unknown field (by its dotted name) or a bad value.
        """
        return cls(
            **{
                **_known_fields(cls, fields, ""),
                "mixup": Mixup(
                    **_known_fields(Mixup, fields.get("mixup", {}), "mixup.")
                ),
                "dare": Dare(**_known_fields(Dare, fields.get("dare", {}), "dare.")),
            }
        )


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``5GB``, ``200 MB`` or ``1000000`` (decimal units).

    Raises:
      ValueError: if it is not a positive size.
    """
    text = str(size).strip().upper()
    unit = next((u for u in _UNITS if text.endswith(u)), "")
    value = float(text.removesuffix(unit)) * _UNITS.get(unit, 1)
    if isinstance(size, bool) or not 1 <= value < 2**62:
        raise ValueError(f"not a size: {size!r}")
    return int(value)


def _known_fields(cls: type, fields: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise RecipeError(f"recipe field {prefix[:-1]!r} must be a group of fields")
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise RecipeError(
            f"unknown recipe field {prefix + unknown[0]!r}; "
            f"known: {', '.join(prefix + name for name in known)}"
        )
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
    }


class _Problems:
    """Collects what is wrong with a recipe, to raise it once."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, field: str, value: object, allowed: str) -> None:
        self._lines.append(f"{field}={value!r} needs {allowed}")

    def choice(self, field: str, value: object, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            self.add(field, value, "one of " + ", ".join(allowed))

    def number(
        self, field: str, value: object, low: float = -math.inf, high: float = math.inf
    ) -> None:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (ok and math.isfinite(value) and low <= value <= high):  # type: ignore
            bounds = {
                (-math.inf, math.inf): "a finite number",
                (0.0, math.inf): "a finite number, 0 or more",
            }.get((low, high), f"a number from {low:g} to {high:g}")
            self.add(field, value, bounds)

    def numbers(self, field: str, values: object, *bounds: float) -> None:
        if not isinstance(values, tuple) or not values:
            self.add(field, values, "a tuple of numbers, one per model")
            return
        for i, value in enumerate(values):
            self.number(f"{field}[{i}]", value, *bounds)

    def patterns(self, field: str, values: object) -> None:
        if not isinstance(values, tuple):
            self.add(field, values, "a tuple of regular expressions, as ('lm_head.*',)")
            return
        for i, value in enumerate(values):
            try:
                re.compile(value)
            except (re.error, TypeError):
                self.add(f"{field}[{i}]", value, "a regular expression")

    def raise_if_any(self) -> None:
        if self._lines:
            raise RecipeError("; ".join(self._lines))
