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
`mixup`, `transforms`, `exclude`, `vocabulary`, `max_shard_size`; `threshold: model` for
one threshold over the whole model, and `rescaling: rate` for DARE's 1/(1 − p), as the
papers have them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.methods import TRANSFORMS
from m3jax.recipe import mergekit_tokenizer
from m3jax.recipe.documents import Document, in_order, with_output
from m3jax.recipe.mergekit_layout import laid_out
from m3jax.recipe.mergekit_methods import METHODS, MergekitMethod, Steps, method_of
from m3jax.recipe.mergekit_parts import Part, parts_of
from m3jax.recipe.mergekit_values import check_keys, mapping
from m3jax.recipe.problems import RecipeError
from m3jax.recipe.recipe import Recipe
from m3jax.recipe.values import as_json, mapped

_KEYS = (
    *mergekit_tokenizer.KEYS,
    "base_model",
    "dtype",
    "m3jax",
    "merge_method",
    "models",
    "modules",
    "name",
    "out_dtype",
    "parameters",
    "slices",
)
_OURS = (
    "exclude",
    "max_shard_size",
    "mixup",
    "rescaling",
    "seed",
    "threshold",
    "transforms",
    "vocabulary",
)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a YAML file asks for.

    Attributes:
      result: the document without a name.
      named: those that it needs, in order.
      notes: what is ignored, one line each.
    """

    result: Document
    named: tuple[Document, ...]
    notes: tuple[str, ...]


def parse(text: str) -> Configuration:
    """The documents of a YAML file.

    Raises:
      RecipeError: it is no YAML, a key is unknown or not supported, a value is missing
        or out of range, or the documents do not go together; one line that names the
        key.
    """
    loaded = _loaded(text)
    if len(loaded) == 1:
        loaded[0].pop("name", None)  # nobody calls it
    documents, notes = [], []
    for own in loaded:
        name = own.get("name")
        try:
            document, ignored = _document(own)
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}" if name else str(error)) from None
        documents.append(document)
        notes += [f"{name}: {note}" if name else note for note in ignored]
    named = [own.name for own in documents]
    documents = list(with_output(documents))
    notes += [
        f"{name}: no other document needs it, and it is the output"
        for name, own in zip(named, documents, strict=True)
        if name != own.name
    ]
    ordered = in_order(documents)
    notes += [
        f"{own.name}: no document needs it, and it is not merged"
        for own in documents
        if own not in ordered
    ]
    return Configuration(ordered[-1], ordered[:-1], tuple(notes))


def _document(document: dict[str, Any]) -> tuple[Document, tuple[str, ...]]:
    """A document, and what of it is ignored."""
    check_keys("", document, _KEYS)
    name = str(document.get("merge_method"))
    method = method_of(name)
    ours = mapping(document.get("m3jax"), "m3jax")
    check_keys("m3jax.", ours, _OURS)
    base = model_name(document.get("base_model"), "base_model")
    parts = parts_of(document, model_name)
    mixup = mapping(ours.get("mixup"), "m3jax.mixup")
    drawn = bool(mixup) and (mixup.get("alpha", 0.5), mixup.get("ratios")) != (
        None,
        None,
    )
    layout = laid_out(name, method, base, parts, drawn)
    plain = ("exclude", "vocabulary", "max_shard_size")
    recipe: dict[str, Any] = {key: ours[key] for key in plain if key in ours}
    recipe |= {"method": method.native, "mixup": {"alpha": None, **mixup}}
    recipe |= {"slices": layout.slices, **_dtypes(document)}
    recipe |= _transforms(ours, _ours(ours, layout.steps))
    donor = "base" if layout.base else base or layout.models[0]
    recipe |= mergekit_tokenizer.fields(document, donor, model_name)
    recipe["rules"] = [
        {
            "tensors": names,
            "method": method.native,
            **_transforms(ours, _ours(ours, steps)),
        }
        for names, steps in layout.rules
    ]
    made = Recipe.from_dict(recipe)
    whose = document.get("name")
    found = Document(layout.base, layout.models, made, ours.get("seed"), whose)
    return found, _ignored(name, method, parts)


def _loaded(text: str) -> list[dict[str, Any]]:
    import yaml

    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not valid YAML ({' '.join(str(error).split())})") from None
    documents = [own for own in documents if own is not None]
    if not documents or not all(isinstance(own, dict) for own in documents):
        raise RecipeError(
            "not a mergekit configuration: it needs merge_method and models"
        )
    return documents


def model_name(model: Any, key: str) -> str | None:
    """`PATH`, `PATH@REVISION`, either with `+ADAPTER`, or a mapping of the same, whose
    `override_architecture` is of no matter: names and shapes of tensors decide.

    Raises:
      RecipeError: it is none of these.
    """
    if isinstance(model, dict) and "model" in model:
        check_keys(f"{key}.", model, ("lora", "model", "override_architecture"))
        names = [
            _place(model[part], f"{key}.{part}")
            for part in ("model", "lora")
            if model.get(part) is not None
        ]
        return "+".join(names)
    return None if model is None else _place(model, key)


def _place(model: Any, key: str) -> str:
    if isinstance(model, dict):
        check_keys(f"{key}.", model, ("path", "revision"))
        revision = model.get("revision")
        model = model.get("path")
        if isinstance(model, str) and revision is not None:
            model = f"{model}@{revision}"
    if not isinstance(model, str) or not model:
        raise RecipeError(f"{key}={model!r} needs a folder, a file or org/name")
    return model


def _dtypes(document: Mapping[str, Any]) -> dict[str, str]:
    """What the models are merged in, and what is written."""
    words = [
        str(document[key]).removeprefix("torch.") if document.get(key) else ""
        for key in ("dtype", "out_dtype")
    ]
    compute = {"compute": "float64"} if words[0] == "float64" else {}
    return {"dtype": words[1] or words[0] or "promote", **compute}


def _ours(ours: Mapping[str, Any], steps: Steps) -> Steps:
    """The steps with the papers' threshold or rescaling, where the document says so."""
    steps = dict(steps)
    by = steps.get("sparsify", {}).get("by")
    for key, allowed, fitting in (
        ("threshold", ("tensor", "model"), ("magnitude", "outliers")),
        ("rescaling", ("norm", "rate"), ("random",)),
    ):
        word = ours.get(key)
        if word is None:
            continue
        if word not in allowed or by not in fitting:
            raise RecipeError(
                f"m3jax.{key}={word!r} needs {' or '.join(allowed)}, and a method that "
                f"keeps entries by {' or '.join(fitting)}"
            )
        if word == "model":
            steps["sparsify"] = {**steps["sparsify"], "over": "model"}
        if word == "rate":
            dropped = mapped(steps.pop("sparsify")["density"], lambda d: 1 - d)
            rescale = steps.pop("rescale")["norm"] != "none"
            steps = {"dare": {"drop_rate": dropped, "rescale": rescale}, **steps}
    return steps


def _transforms(ours: Mapping[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    """The groups of all steps: those of `m3jax.transforms` come first."""
    own = mapping(ours.get("transforms"), "m3jax.transforms")
    twice = set(own) & set(steps)
    if twice:
        raise RecipeError(
            f"m3jax.transforms.{min(twice)}: the merge_method has it already"
        )
    order = [*own, *(name for name in steps if name in TRANSFORMS)]
    groups = {name: mapping(fields, name) for name, fields in own.items()}
    plain = {
        name: {field: as_json(value) for field, value in fields.items()}
        for name, fields in steps.items()
    }
    return {"transforms": order, **groups, **plain}


def _ignored(
    name: str, method: MergekitMethod, parts: Sequence[Part]
) -> tuple[str, ...]:
    """What stands in the document without an effect, as in mergekit.

    Raises:
      RecipeError: it looks like a parameter of the method, misspelt.
    """
    parameters = method.parameters
    by_model = {p.name for p in parameters if p.per_model} | {"int8_mask"}
    everywhere = {p.name for p in parameters} | {"int8_mask"}
    of_others = {p.name for own in METHODS.values() for p in own.parameters}
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
