"""The layers of a mergekit document: models, slices, modules; and what each is given.

A `Part` is a slice of a module; a document that has `models` alone is one part of all
layers. What a method's parameters are in each part becomes one value for the recipe.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from m3jax.methods import METHODS, TRANSFORMS
from m3jax.methods.fields import Choice
from m3jax.recipe.mergekit_methods import Entries, MergekitMethod, Steps
from m3jax.recipe.mergekit_values import check_keys, mapping, resolved
from m3jax.recipe.problems import RecipeError
from m3jax.recipe.slices import Piece, Slice
from m3jax.recipe.values import BEFORE, Gradient, Rules, Runs

Layers = tuple[int, int]
# Parts of a model by the names that mergekit has for them; another name is that of
# one of the words between the dots of its tensors' names.
_MODULES = {
    "default": "",
    "text_decoder": "language_model|text_model",
    "vision_tower": "vision_tower|vision_model|visual",
    "vision_encoder": "vision_tower|vision_model|visual",
    "audio_tower": "audio_tower|audio_model",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A slice of a document, or all of a module, or of all.

    Attributes:
      base: of the slice; None without one.
      entries: the parameters of each of its models.
      levels: those of the slice, its module and the document, the nearest first.
      layers: of each model; None: all.
      module: the pattern of its tensors' names; "": what no other module has.
    """

    base: str | None
    entries: Entries
    levels: tuple[Mapping[str, Any], ...]
    layers: Mapping[str, Layers] | None = None
    module: str = ""


def parts_of(
    document: Mapping[str, Any], model_name: Callable[[Any, str], str | None]
) -> list[Part]:
    """The parts of a document.

    Args:
      document: of the YAML.
      model_name: (reference, key) -> the name of a model.

    Raises:
      RecipeError: it has none of models, slices and modules, or several; a key or a
        value is wrong.
    """
    there = [key for key in ("models", "slices", "modules") if document.get(key)]
    if len(there) != 1:
        found = " and ".join(there) or "none of them"
        raise RecipeError(
            f"models, slices or modules: one of the three is needed, not {found}; "
            "models is a list of `model: NAME`"
        )
    read = _Reader(model_name)
    shared = mapping(document.get("parameters"), "parameters")
    base = model_name(document.get("base_model"), "base_model")
    if there != ["modules"]:
        return read.parts("", document, base, (shared,), "")
    parts = []
    for name, own in mapping(document["modules"], "modules").items():
        key = f"modules.{name}"
        own = mapping(own, key)
        check_keys(f"{key}.", own, ("base_model", "models", "parameters", "slices"))
        if bool(own.get("models")) == bool(own.get("slices")):
            raise RecipeError(f"{key} needs models or slices, one of the two")
        word = _MODULES.get(str(name), re.escape(str(name)))
        levels = (mapping(own.get("parameters"), f"{key}.parameters"), shared)
        pattern = rf"(?:^|\.)(?:{word})\." if word else ""
        parts += read.parts(f"{key}.", own, base, levels, pattern)
    return parts


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads models and slices; `name` makes a model's name of a reference."""

    name: Callable[[Any, str], str | None]

    def parts(
        self,
        prefix: str,
        own: Mapping[str, Any],
        base: str | None,
        levels: tuple[Mapping[str, Any], ...],
        module: str,
    ) -> list[Part]:
        base = self.name(own.get("base_model"), f"{prefix}base_model") or base
        if own.get("models"):
            entries, _ = self._entries(own["models"], f"{prefix}models", False)
            return [Part(base, entries, levels, None, module)]
        slices = own.get("slices")
        if not isinstance(slices, list):
            raise RecipeError(f"{prefix}slices={slices!r} needs a list of slices")
        return [
            self._slice(entry, f"{prefix}slices[{i}]", base, levels, module)
            for i, entry in enumerate(slices)
        ]

    def _slice(
        self,
        own: Any,
        key: str,
        base: str | None,
        levels: tuple[Mapping[str, Any], ...],
        module: str,
    ) -> Part:
        own = mapping(own, key)
        check_keys(f"{key}.", own, ("base_model", "parameters", "sources"))
        base = self.name(own.get("base_model"), f"{key}.base_model") or base
        entries, layers = self._entries(own.get("sources"), f"{key}.sources", True)
        lengths = {stop - first for first, stop in layers.values()}
        if len(lengths) > 1:
            each = ", ".join(f"{list(own)} of {model}" for model, own in layers.items())
            raise RecipeError(f"{key}: as many layers of each model are needed: {each}")
        nearest = mapping(own.get("parameters"), f"{key}.parameters")
        return Part(base, entries, (nearest, *levels), layers, module)

    def _entries(
        self, models: Any, key: str, sliced: bool
    ) -> tuple[Entries, dict[str, Layers]]:
        """The parameters of each model, and its layers."""
        if not isinstance(models, list) or not models:
            raise RecipeError(f"{key} is missing: a list of `model: NAME`")
        entries: Entries = {}
        layers: dict[str, Layers] = {}
        for i, entry in enumerate(models):
            own = f"{key}[{i}]"
            entry = mapping(entry, own)
            known = ("model", "parameters", *["layer_range"] * sliced)
            check_keys(f"{own}.", entry, known)
            name = self.name(entry.get("model"), f"{own}.model")
            if name is None:
                raise RecipeError(f"{own}.model is missing")
            if name in entries:
                raise RecipeError(f"{own}.model={name!r} is there twice")
            entries[name] = mapping(entry.get("parameters"), f"{own}.parameters")
            if sliced:
                layers[name] = _range(entry.get("layer_range"), f"{own}.layer_range")
        return entries, layers


def _range(given: Any, key: str) -> Layers:
    numbers = isinstance(given, list) and [type(own) for own in given] == [int, int]
    if not numbers or not 0 <= given[0] < given[1]:
        raise RecipeError(
            f"{key}={given!r} needs [first, stop]: the first layer from 0, and the one "
            "behind the last"
        )
    return given[0], given[1]


@dataclasses.dataclass(frozen=True)
class _Arranged:
    """A part as our method takes it.

    Attributes:
      part: of the document.
      base: what the method has as base; None without one.
      entries: the parameters of each model that it merges.
      at: the first layer of the output that is its.
    """

    part: Part
    base: str | None
    entries: Entries
    at: int

    @property
    def stop(self) -> int | None:
        """The layer of the output behind its last; None where it has all."""
        layers = self.part.layers
        if layers is None:
            return None
        first, stop = next(iter(layers.values()))
        return self.at + stop - first

    def layers(self, model: str) -> Layers | None:
        """Those of a model, or of the base, which need not stand in the slice."""
        ranges = self.part.layers
        if ranges is None:
            return None
        if model not in ranges and len(set(ranges.values())) > 1:
            raise RecipeError(
                f"base_model {model} is no source of a slice whose sources have "
                "different layers: put it there, with its layer_range"
            )
        return ranges.get(model) or next(iter(ranges.values()))

    def shift(self, model: str) -> int:
        """From a layer of the output to that of the model."""
        layers = self.layers(model)
        return 0 if layers is None else layers[0] - self.at

    def slice(self, base: str | None, models: list[str], count: int) -> Slice:
        """The part as one of the recipe's, its last model repeated up to `count`."""

        def piece(model: str) -> Piece:
            place = None if model == base else models.index(model)
            return Piece(place, self.layers(model))

        pieces = [piece(model) for model in self.entries]
        pieces += pieces[-1:] * (count - len(pieces))
        own = None if self.base is None else piece(self.base)
        return Slice(tuple(pieces), own, self.part.module)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a document's parts come to.

    Attributes:
      base, models: the checkpoints.
      slices: of the recipe; none where all layers are merged one by one.
      steps: fields of the recipe's steps.
    """

    base: str | None
    models: tuple[str, ...]
    slices: tuple[Slice, ...]
    steps: Steps


def laid_out(
    name: str,
    method: MergekitMethod,
    base: str | None,
    parts: Sequence[Part],
    drawn: bool,
) -> Layout:
    """The checkpoints, slices and steps of a document's parts.

    Args:
      name: of the method in the YAML; `method`: what it is.
      base: of the document.
      parts: of the document.
      drawn: whether M3 draws what takes the place of weights.

    Raises:
      RecipeError: a parameter is missing, or what cannot differ between slices does.
    """
    arranged: list[_Arranged] = []
    for part in parts:
        before = [own for own in arranged if own.part.module == part.module]
        sliced = part.layers is not None
        own_base, entries = method.arranged(name, part.base, part.entries, sliced)
        at = (before[-1].stop or 0) if before else 0
        arranged.append(_Arranged(part, own_base, entries, at))
    count = max(len(own.entries) for own in arranged)
    steps = [
        method.steps(_fields(name, method, own, drawn, count), own.base is not None)
        for own in arranged
    ]
    joined = _joined(arranged, steps)
    first = arranged[0]
    if len(parts) == 1 and parts[0].layers is None and not parts[0].module:
        return Layout(first.base, tuple(first.entries), (), joined)
    bases = [own.base for own in arranged if own.base is not None]
    every = [model for own in arranged for model in own.entries]
    models = [m for m in dict.fromkeys([*every, *bases]) if m != base]
    if not models and base is not None:
        own_base, models = None, [base]
    else:
        own_base = base
    slices = tuple(own.slice(own_base, models, count) for own in arranged)
    return Layout(own_base, tuple(models), slices, joined)


def _fields(
    name: str, method: MergekitMethod, own: _Arranged, drawn: bool, count: int
) -> dict[str, Any]:
    """The method's parameters in one part, by model for `count` models."""
    levels = own.part.levels
    missing = count - len(own.entries)
    if missing and (drawn or not method.takes_weight_0):
        raise RecipeError(
            f"a slice of {len(own.entries)} models beside one of {count}: {name} needs "
            "as many in each"
        )
    fields: dict[str, Any] = {}
    for parameter in method.parameters:
        if parameter.weight and drawn:
            continue  # M3 draws them
        if not parameter.per_model:
            value = fields[parameter.name] = resolved(parameter, levels)
            if value is None:
                raise RecipeError(
                    f"{name} needs the parameter {parameter.name!r}, in parameters"
                )
            continue
        values = []
        for model, given in own.entries.items():
            shift = own.shift(model)
            value = resolved(parameter, [given, *levels], shift)
            if value is None:
                raise RecipeError(
                    f"{model}: {name} needs the parameter {parameter.name!r}, in "
                    "models[].parameters or parameters"
                )
            values.append(value)
        fill = 0.0 if parameter.weight else values[-1]
        fields[parameter.name] = (*values, *[fill] * missing)
    return fields


def _joined(parts: Sequence[_Arranged], steps: Sequence[Steps]) -> Steps:
    """The fields of the steps over all parts."""
    joined: Steps = {}
    for step, first in steps[0].items():
        joined[step] = {}
        for field in first:
            values = [own[step][field] for own in steps]
            same = all(own == values[0] for own in values)
            described = (TRANSFORMS | METHODS)[step].fields()[field]
            if not same and isinstance(described, Choice):
                both = " and ".join(map(str, dict.fromkeys(values)))
                raise RecipeError(
                    f"{step}.{field} is {both} "
                    "in different slices, where it has to be the same"
                )
            if not same or _has_gradient(values[0]):
                values = [_over_layers(parts, values)]
            joined[step][field] = values[0]
    return joined


def _over_layers(parts: Sequence[_Arranged], values: Sequence[Any]) -> Any:
    """One value of those of the parts."""
    modules: dict[str, list[tuple[int | None, Any]]] = {}
    for own, value in zip(parts, values, strict=True):
        modules.setdefault(own.part.module, []).append((own.stop, value))
    each = {module: Runs(tuple(runs)) for module, runs in modules.items()}
    ends = list(each.values())
    if len(each) == 1:
        return ends[0]
    rules = [(module, value) for module, value in each.items() if module]
    if "" not in each:  # what no module has: see `engine.slices`
        rules.append((f"(?i){BEFORE.pattern}", ends[0]))
    return Rules(tuple(rules), each.get("", ends[-1]))


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Rules):
        own = [*(v for _, v in value.rules), value.otherwise]
        return any(map(_has_gradient, own))
    if isinstance(value, tuple):
        return any(map(_has_gradient, value))
    return isinstance(value, Gradient)
