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
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.recipe.mergekit_layout import laid_out
from m3jax.recipe.mergekit_methods import METHODS
from m3jax.recipe.mergekit_parts import Part, parts_of
from m3jax.recipe.mergekit_values import check_keys, mapping, nearest
from m3jax.recipe.problems import RecipeError
from m3jax.recipe.recipe import Recipe
from m3jax.recipe.values import as_json

_KEYS = (
    "base_model",
    "dtype",
    "m3jax",
    "merge_method",
    "models",
    "modules",
    "out_dtype",
    "parameters",
    "slices",
)
_LATER = (
    "chat_template",
    "name",
    "tokenizer",
    "tokenizer_source",
)
_OURS = ("exclude", "max_shard_size", "mixup", "seed", "transforms", "vocabulary")


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
    check_keys("", document, _KEYS, _LATER)
    name = document.get("merge_method")
    if name not in METHODS:
        raise RecipeError(f"merge_method={name!r}{nearest(name, METHODS)}")
    ours = mapping(document.get("m3jax"), "m3jax")
    check_keys("m3jax.", ours, _OURS)
    base = _model_name(document.get("base_model"), "base_model")
    parts = parts_of(document, _model_name)
    mixup = mapping(ours.get("mixup"), "m3jax.mixup")
    drawn = bool(mixup) and (mixup.get("alpha", 0.5), mixup.get("ratios")) != (
        None,
        None,
    )
    method = METHODS[name]
    layout = laid_out(name, method, base, parts, drawn)
    plain = ("exclude", "vocabulary", "max_shard_size")
    recipe: dict[str, Any] = {key: ours[key] for key in plain if key in ours}
    recipe |= {"method": method.native, "mixup": {"alpha": None, **mixup}}
    recipe |= {"slices": layout.slices, **_dtypes(document)}
    recipe |= _transforms(ours, layout.steps)
    recipe["rules"] = [
        {"tensors": names, "method": method.native, **_transforms(ours, steps)}
        for names, steps in layout.rules
    ]
    return Document(
        layout.base,
        layout.models,
        Recipe.from_dict(recipe),
        ours.get("seed"),
        _ignored(name, parts),
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


def _dtypes(document: Mapping[str, Any]) -> dict[str, str]:
    """What the models are merged in, and what is written."""
    words = [
        str(document[key]).removeprefix("torch.") if document.get(key) else ""
        for key in ("dtype", "out_dtype")
    ]
    compute = {"compute": "float64"} if words[0] == "float64" else {}
    return {"dtype": words[1] or words[0] or "promote", **compute}


def _transforms(ours: Mapping[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    """The groups of all steps: those of `m3jax.transforms` come first."""
    own = mapping(ours.get("transforms"), "m3jax.transforms")
    twice = set(own) & set(steps)
    if twice:
        raise RecipeError(
            f"m3jax.transforms.{min(twice)}: the merge_method has it already"
        )
    order = [*own, *(name for name in steps if name in ("sparsify", "rescale"))]
    groups = {name: mapping(fields, name) for name, fields in own.items()}
    plain = {
        name: {field: as_json(value) for field, value in fields.items()}
        for name, fields in steps.items()
    }
    return {"transforms": order, **groups, **plain}


def _ignored(name: str, parts: Sequence[Part]) -> tuple[str, ...]:
    """What stands in the document without an effect, as in mergekit.

    Raises:
      RecipeError: it looks like a parameter of the method, misspelt.
    """
    parameters = METHODS[name].parameters
    by_model = {p.name for p in parameters if p.per_model} | {"int8_mask"}
    everywhere = {p.name for p in parameters} | {"int8_mask"}
    of_others = {p.name for method in METHODS.values() for p in method.parameters}
    notes = []

    def note(given: Any, known: set[str], where: str) -> None:
        if given in known:
            return
        near = difflib.get_close_matches(str(given), sorted(everywhere), 1, 0.75)
        if near and given not in of_others:
            raise RecipeError(
                f"{where}: unknown parameter {given!r}; did you mean {near[0]!r}?"
            )
        notes.append(f"{where}: {name} has no parameter {given!r} there: no effect")

    for part in parts:
        for model, own in part.entries.items():
            for given in own:
                note(given, by_model, f"parameters of {model}")
        for level in part.levels:
            for given in level:
                note(given, everywhere, "parameters")
    return tuple(dict.fromkeys(notes))
