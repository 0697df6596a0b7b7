"""What a mergekit document's parts come to: slices, and one value of each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from m3jax.methods import METHODS, TRANSFORMS
from m3jax.methods.fields import Choice
from m3jax.recipe.mergekit_methods import Entries, MergekitMethod, Steps
from m3jax.recipe.mergekit_parts import Layers, Part
from m3jax.recipe.mergekit_values import resolved
from m3jax.recipe.problems import RecipeError
from m3jax.recipe.slices import Piece, Slice
from m3jax.recipe.values import BEFORE, Gradient, Rules, Runs


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
      rules: (pattern of names, fields), where the steps of other slices differ by more
        than numbers.
    """

    base: str | None
    models: tuple[str, ...]
    slices: tuple[Slice, ...]
    steps: Steps
    rules: tuple[tuple[str, Steps], ...]


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
      RecipeError: a parameter is missing, or the slices do not go together.
    """
    arranged: list[_Arranged] = []
    for part in parts:
        before = [own for own in arranged if own.part.module == part.module]
        sliced = part.layers is not None
        own_base, entries = method.arranged(name, part.base, part.entries, sliced)
        at = (before[-1].stop or 0) if before else 0
        arranged.append(_Arranged(part, own_base, entries, at))
    count = max(len(own.entries) for own in arranged)
    variants = [
        [
            (filters, method.steps(fields, own.base is not None))
            for filters, fields in _variants(
                method, _fields(name, method, own, drawn, count)
            )
        ]
        for own in arranged
    ]
    steps = [own[-1][1] for own in variants]
    words = [_words(own) for own in steps]

    def joined(i: int) -> Steps:
        """The steps of part i, as the parts whose words are the same have them."""
        same = zip(steps, words, strict=True)
        return _joined(arranged, [o if w == words[i] else steps[i] for o, w in same])

    first = arranged[0]
    if len(parts) == 1 and parts[0].layers is None and not parts[0].module:
        rules = [
            (_pattern(arranged, 0, filters), _joined(arranged, [own]))
            for filters, own in variants[0][:-1]
        ]
        return Layout(first.base, tuple(first.entries), (), joined(0), tuple(rules))
    bases = [own.base for own in arranged if own.base is not None]
    every = [model for own in arranged for model in own.entries]
    models = [m for m in dict.fromkeys([*every, *bases]) if m != base]
    if not models and base is not None:
        own_base, models = None, [base]
    else:
        own_base = base
    slices = tuple(own.slice(own_base, models, count) for own in arranged)
    rules = []
    if any(own != words[0] for own in words) or any(len(own) > 1 for own in variants):
        for i in sorted(range(len(parts)), key=lambda i: not parts[i].module):  # stable
            for filters, own in variants[i][:-1]:
                alike = _joined(arranged, [own] * len(parts))
                rules.append((_pattern(arranged, i, filters), alike))
            rules.append((_pattern(arranged, i), joined(i)))
    return Layout(own_base, tuple(models), slices, joined(0), tuple(rules))


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
            if value is None and parameter.required:
                raise RecipeError(
                    f"{name} needs the parameter {parameter.name!r}, in parameters"
                )
            continue
        values: list[Any] = []
        for model, given in own.entries.items():
            shift = own.shift(model)
            value = resolved(parameter, [given, *levels], shift)
            if value is None and (parameter.required or any(values)):
                raise RecipeError(
                    f"{model}: {name} needs the parameter {parameter.name!r}, in "
                    "models[].parameters or parameters"
                )
            values.append(value)
        fill = 0.0 if parameter.weight else values[-1]
        fields[parameter.name] = (*values, *[fill] * missing)
    return fields


def _variants(
    method: MergekitMethod, fields: dict[str, Any]
) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """The fields for tensors that filters of words tell apart.

    Returns:
      Patterns that are all found in a tensor's name, and fields without such filters;
      the first that fit count, and the last has no pattern.
    """
    for parameter in method.parameters:
        value = fields.get(parameter.name)
        if parameter.word and isinstance(value, Rules):
            return [
                ((*pattern, *more), own)
                for *pattern, word in (*value.rules, (value.otherwise,))
                for more, own in _variants(method, {**fields, parameter.name: word})
            ]
    return [((), fields)]


def _words(steps: Steps) -> dict[str, dict[str, Any]]:
    """What of the steps a kernel is compiled for."""
    kinds = {**TRANSFORMS, **METHODS}
    return {
        step: {
            name: value
            for name, value in own.items()
            if isinstance(kinds[step].fields()[name], Choice)
        }
        for step, own in steps.items()
    }


def _joined(parts: Sequence[_Arranged], steps: Sequence[Steps]) -> Steps:
    """The fields of the steps over all parts, whose words are the same."""
    joined: Steps = {}
    for step, first in steps[0].items():
        joined[step] = {}
        for field in first:
            values = [own[step][field] for own in steps]
            if _has_gradient(values[0]) or any(own != values[0] for own in values):
                values = [_over_layers(parts, values)]
            joined[step][field] = values[0]
    return joined


def _pattern(
    parts: Sequence[_Arranged], place: int, filters: Sequence[str] = ()
) -> str:
    """A regular expression for the names of the tensors of a part, in which patterns of
    `filters` are found."""
    own = parts[place]
    alike = [other for other in parts if other.part.module == own.part.module]
    outside = r"^(?!(?:.*\.)?\d+(?:\.|$))"
    before = rf"(?=.*(?i:{BEFORE.pattern}))"
    inside = r"^"
    if own.stop is not None:
        numbers = "|".join(map(str, range(own.at, own.stop)))
        inside = rf"^(?:(?!\d+(?:\.|$))[^.]*\.)*(?:{numbers})(?:\.|$)"
    ways = [inside]
    if own.stop is not None:
        ways += [outside + before] * (own is alike[0])
        ways += [outside + before.replace("(?=", "(?!", 1)] * (own is alike[-1])
    words = [*filters, *([own.part.module] if own.part.module else [])]
    ahead = "".join(rf"(?=.*?(?:{word}))" for word in words)
    return "|".join(way.replace("^", "^" + ahead, 1) for way in ways)


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
