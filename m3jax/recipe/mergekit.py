"""mergekit's YAML as a recipe: what a document of mergekit 0.1.5 asks for.

    merge_method: ties
    base_model: BASE
    models:
      - model: A
        parameters: {weight: 0.6, density: [1, 0.5]}
      - model: B
    parameters:
      weight:
        - {filter: mlp, value: 0.3}
        - value: 0.5
    m3jax: {seed: 3, exclude: [lm_head.weight]}

A model's parameters stand before those of the document. A list of numbers is a
gradient over the layers; a list of filters holds for the tensors whose names contain
them, the others go on to the next level. `m3jax` has what mergekit does not: `seed`,
`mixup`, `transforms`, `exclude`, `vocabulary`, `max_shard_size`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from m3jax.recipe import mergekit_tokenizer
from m3jax.recipe.mergekit_methods import METHODS, Parameter
from m3jax.recipe.problems import RecipeError
from m3jax.recipe.recipe import Recipe
from m3jax.recipe.values import LAYER, Gradient, Rules, as_json

_KEYS = (
    *mergekit_tokenizer.KEYS,
    "base_model",
    "dtype",
    "m3jax",
    "merge_method",
    "models",
    "out_dtype",
    "parameters",
)
_LATER = ("modules", "name", "slices")
_OURS = ("exclude", "max_shard_size", "mixup", "seed", "transforms", "vocabulary")
_WORDS = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Document:
    """What a YAML document asks for.

    Attributes:
      base, models: paths or Hugging Face ids.
      recipe: what to do with them.
      seed: of the document; None where it has none.
      notes: what is ignored, one line each.
    """

    base: str | None
    models: tuple[str, ...]
    recipe: Recipe
    seed: int | None
    notes: tuple[str, ...]


def parse(text: str) -> Document:
    """The document of a YAML file.

    Raises:
      RecipeError: it is no YAML, a key is unknown or not supported, a value is missing
        or out of range; one line that names the key.
    """
    document = _loaded(text)
    _check_keys("", document, _KEYS, _LATER)
    name = document.get("merge_method")
    if name not in METHODS:
        raise RecipeError(f"merge_method={name!r}{_nearest(name, METHODS)}")
    ours = _mapping(document.get("m3jax"), "m3jax")
    _check_keys("m3jax.", ours, _OURS)
    base = _model_name(document.get("base_model"), "base_model")
    entries = _entries(document.get("models"))
    shared = _mapping(document.get("parameters"), "parameters")
    method = METHODS[name]
    base, entries = method.arranged(name, base, entries)
    mixup = _mapping(ours.get("mixup"), "m3jax.mixup")
    drawn = bool(mixup) and (mixup.get("alpha", 0.5), mixup.get("ratios")) != (
        None,
        None,
    )
    fields: dict[str, Any] = {}
    for parameter in method.parameters:
        if parameter.weight and drawn:
            continue  # M3 draws them
        given = [[own, shared] for own in entries.values()]
        levels = given if parameter.per_model else [[shared]]
        resolved = [_resolved(parameter, own) for own in levels]
        for own, model in zip(resolved, entries, strict=False):
            if own is None and parameter.required:
                whose = f"{model}: " if parameter.per_model else ""
                where = "models[].parameters or " * parameter.per_model + "parameters"
                raise RecipeError(
                    f"{whose}{name} needs the parameter {parameter.name!r}, in {where}"
                )
        fields[parameter.name] = tuple(resolved) if parameter.per_model else resolved[0]
    steps = method.steps(fields, base is not None)
    plain = ("exclude", "vocabulary", "max_shard_size")
    recipe: dict[str, Any] = {key: ours[key] for key in plain if key in ours}
    recipe |= {"method": method.native, "mixup": {"alpha": None, **mixup}}
    recipe |= {"dtype": _dtype(document), **_transforms(ours, steps)}
    recipe |= mergekit_tokenizer.fields(document, base, _model_name, _check_keys)
    return Document(
        base,
        tuple(entries),
        Recipe.from_dict(recipe),
        ours.get("seed"),
        _ignored(method.parameters, entries, shared),
    )


def _loaded(text: str) -> dict[str, Any]:
    import yaml

    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not valid YAML ({' '.join(str(error).split())})") from None
    if len(documents) != 1:
        raise RecipeError(
            f"{len(documents)} documents where one is allowed: several YAML documents "
            "in a file are not supported"
        )
    if not isinstance(documents[0], dict):
        raise RecipeError(
            "not a mergekit configuration: it needs merge_method and models"
        )
    return documents[0]


def _check_keys(
    prefix: str,
    mapping: Mapping[Any, Any],
    known: Sequence[str],
    later: Sequence[str] = (),
) -> None:
    """Raises RecipeError for a key that is unknown or not supported."""
    for key in mapping:
        if key in later:
            raise RecipeError(f"{prefix}{key} is not supported")
        if key not in known:
            raise RecipeError(f"unknown key {prefix}{key}{_nearest(key, known)}")


def _nearest(word: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}"


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{key}={value!r} needs keys and values")
    return value


def _model_name(model: Any, key: str) -> str | None:
    if isinstance(model, dict):
        path = model.get("model", model)
        if set(model) <= {"model", "path"}:
            model = path.get("path") if isinstance(path, dict) else path
    if model is not None and (not isinstance(model, str) or not model or "+" in model):
        raise RecipeError(
            f"{key}={model!r} needs a folder, a file or org/name; adapters (+, lora) "
            "are not supported"
        )
    return model


def _entries(models: Any) -> dict[str, dict[str, Any]]:
    """The parameters of each model."""
    if not isinstance(models, list) or not models:
        raise RecipeError("models is missing: a list of `model: NAME`")
    entries: dict[str, dict[str, Any]] = {}
    for i, entry in enumerate(models):
        key = f"models[{i}]"
        entry = _mapping(entry, key)
        _check_keys(f"{key}.", entry, ("model", "parameters"))
        name = _model_name(entry.get("model"), f"{key}.model")
        if name is None:
            raise RecipeError(f"{key}.model is missing")
        if name in entries:
            raise RecipeError(f"{key}.model={name!r} is there twice")
        entries[name] = _mapping(entry.get("parameters"), f"{key}.parameters")
    return entries


def _resolved(parameter: Parameter, levels: Sequence[Mapping[str, Any]]) -> Any:
    """The value of a parameter: the first level that has one counts."""
    rules: list[tuple[str, Any]] = []
    for level in levels:
        for pattern, value in _conditions(parameter, level.get(parameter.name)):
            if pattern in (None, "*"):
                return Rules(tuple(rules), value) if rules else value
            rules.append((re.escape(pattern), value))
    return Rules(tuple(rules), parameter.default) if rules else parameter.default


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
        own = _mapping(own, name)
        _check_keys(f"{name}.", own, ("filter", "value"))
        if "value" not in own:
            raise RecipeError(f"{name}: a filter has no value: {own!r}")
        pattern = own.get("filter")
        found.append(
            (
                pattern if pattern is None else str(pattern),
                _value(parameter, own["value"]),
            )
        )
    return found


def _value(parameter: Parameter, value: Any) -> Any:
    if isinstance(value, list) and value and not parameter.word:
        points = tuple(float(_value(parameter, point)) for point in value)
        # mergekit: what lies outside the layers is at their beginning.
        return Rules(((LAYER.pattern, Gradient(points)),), points[0])
    if isinstance(value, str):
        value = _WORDS.get(value.lower(), value)
    if isinstance(value, bool) or parameter.word:
        if value in (True, False) and isinstance(value, (bool, int, float)):
            return bool(value)
        raise RecipeError(f"{parameter.name}={value!r} needs true or false")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"{parameter.name}={value!r} needs a number") from None


def _dtype(document: Mapping[str, Any]) -> str:
    dtype = document.get("out_dtype") or document.get("dtype")
    return str(dtype).removeprefix("torch.") if dtype else "promote"


def _transforms(ours: Mapping[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    """The groups of all steps: those of `m3jax.transforms` come first."""
    own = _mapping(ours.get("transforms"), "m3jax.transforms")
    twice = set(own) & set(steps)
    if twice:
        raise RecipeError(
            f"m3jax.transforms.{min(twice)}: the merge_method has it already"
        )
    order = [*own, *(name for name in steps if name in ("sparsify", "rescale"))]
    groups = {name: _mapping(fields, name) for name, fields in own.items()}
    plain = {
        name: {field: as_json(value) for field, value in fields.items()}
        for name, fields in steps.items()
    }
    return {"transforms": order, **groups, **plain}


def _ignored(
    parameters: Iterable[Parameter],
    entries: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
) -> tuple[str, ...]:
    """What stands in the document without an effect, as in mergekit."""
    by_model = {p.name for p in parameters if p.per_model} | {"int8_mask"}
    everywhere = {p.name for p in parameters} | {"int8_mask"}
    notes = []
    for model, own in entries.items():
        notes += [
            f"models: {model}: the parameter {name!r} has no effect there"
            for name in own
            if name not in by_model
        ]
    for name in shared:
        if name not in everywhere:
            hint = difflib.get_close_matches(str(name), sorted(everywhere), 1)
            near = f"; did you mean {hint[0]!r}?" if hint else ""
            notes.append(f"the parameter {name!r} has no effect{near}")
    return tuple(notes)
