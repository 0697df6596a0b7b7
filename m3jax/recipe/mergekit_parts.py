"""The layers of a mergekit document: models, slices, modules; and what each is given.

A `Part` is a slice of a module; a document that has `models` alone is one part of all
layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from m3jax.recipe.mergekit_methods import Entries
from m3jax.recipe.mergekit_values import check_keys, mapping
from m3jax.recipe.problems import RecipeError

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
        known = ("base_model", "parameters", "residual_weight", "sources")
        check_keys(f"{key}.", own, known)
        base = self.name(own.get("base_model"), f"{key}.base_model") or base
        entries, layers = self._entries(own.get("sources"), f"{key}.sources", True)
        lengths = {stop - first for first, stop in layers.values()}
        if len(lengths) > 1:
            each = ", ".join(f"{list(own)} of {model}" for model, own in layers.items())
            raise RecipeError(f"{key}: as many layers of each model are needed: {each}")
        nearest = mapping(own.get("parameters"), f"{key}.parameters")
        idle = "residual_weight"  # which mergekit reads, and does nothing with
        nearest |= {idle: own[idle]} if own.get(idle) is not None else {}
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
