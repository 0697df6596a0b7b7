"""A merge as mergekit's YAML, where that can say it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.methods import METHODS
from m3jax.recipe import mergekit
from m3jax.recipe.documents import Document
from m3jax.recipe.mergekit_methods import METHODS as THEIRS
from m3jax.recipe.problems import RecipeError
from m3jax.recipe.recipe import Recipe
from m3jax.recipe.values import Gradient, Rules, Runs, mapped

_FAMILY = {  # by what is kept and whether there is a vote
    (None, False): "task_arithmetic",
    ("magnitude", True): "ties",
    ("random", False): "dare_linear",
    ("random", True): "dare_ties",
    ("outliers", False): "breadcrumbs",
    ("outliers", True): "breadcrumbs_ties",
    ("rank", False): "della_linear",
    ("rank", True): "della",
}
_LINEAR = ("average", "task_arithmetic", "generalized_task_arithmetic")
_RENAMED = {
    "linear": {"weights": "weight"},
    "multislerp": {"weights": "weight", "normalize": "normalize_weights"},
    "karcher": {"max_steps": "max_iter", "tolerance": "tol"},
    "model_stock": {"by_row": "filter_wise"},
}


def write(documents: Sequence[Document]) -> str:
    """YAML that `mergekit.parse` makes the same merges of.

    Args:
      documents: the last one is the output.

    Raises:
      RecipeError: mergekit has no word for something; it names the field.
    """
    import yaml

    texts = []
    for own in documents:
        own = dataclasses.replace(own, recipe=_canonical(own))
        text = yaml.safe_dump(_document(own), sort_keys=False)
        alone = re.sub(r"\Aname: .*\n", "", text)
        _check_same(own.recipe, mergekit.parse(alone).result.recipe)
        texts.append(text)
    return "---\n".join(texts)


def _canonical(document: Document) -> Recipe:
    """The recipe with the method that mergekit has for the same, and weights in it."""
    recipe = document.recipe
    count = recipe.num_inputs(len(document.models))
    for field, plain in (("exclude", ()), ("vocabulary", "error"), ("rules", ())):
        if getattr(recipe, field) != plain:
            raise _unsaid(field, getattr(recipe, field))
    if recipe.mixup.alpha is not None and recipe.mixup.ratios is None:
        raise _unsaid("mixup.alpha", f"{recipe.mixup.alpha}, random ratios")
    method: Any = recipe.method
    theirs = THEIRS[method.name].parameters if method.name in THEIRS else ()
    weighed = method.name in _LINEAR or any(own.weight for own in theirs)
    if "weights" in method.fields() and (weighed or recipe.mixup.on):
        weights = recipe.mixup.ratios or method.weights or method.equal_weights(count)
        method = dataclasses.replace(method, weights=weights)
    made: Any = METHODS
    if method.name == "average":
        method = made["linear"](weights=method.weights, normalize=True)
    if method.name == "task_arithmetic":
        method = made["generalized_task_arithmetic"](
            weights=method.weights, scaling=method.scaling, normalize=False
        )
    return dataclasses.replace(
        recipe,
        method=method,
        mixup=dataclasses.replace(recipe.mixup, alpha=None, ratios=None),
        dtype="promote" if recipe.dtype == "input" else recipe.dtype,
        max_shard_size="5GB",
    )


def _check_same(wanted: Recipe, got: Recipe) -> None:
    """Raises RecipeError, naming the field, unless the YAML says all of the recipe."""
    ours, theirs = wanted.to_dict(), got.to_dict()
    for name, value in ours.items():
        if theirs.get(name) == value:
            continue
        if isinstance(value, Mapping) and isinstance(theirs.get(name), Mapping):
            differs = [n for n, own in value.items() if theirs[name].get(n) != own]
            raise _unsaid(f"{name}.{differs[0]}", value[differs[0]])
        raise _unsaid(name, value)


def _unsaid(field: str, value: Any) -> RecipeError:
    return RecipeError(f"mergekit's YAML has no word for {field}={value}")


def _document(document: Document) -> dict[str, Any]:
    recipe = document.recipe
    name, parameters = _parameters(recipe)
    base = document.base
    if not recipe.slices and THEIRS[name].base in ("model", "first"):
        # One of the models: another one would be merged, too.
        if THEIRS[name].base == "first":
            base = document.models[0]
        base = base if base in document.models else None
    written: dict[str, Any] = {"name": document.name} if document.name else {}
    written["merge_method"] = name
    if base is not None:
        written["base_model"] = base
    per_model = {p.name for p in THEIRS[name].parameters if p.per_model}
    each = {n: v for n, v in parameters.items() if n in per_model}
    shared = {n: v for n, v in parameters.items() if n not in per_model}
    if recipe.slices:
        written["slices"] = _slices(document, name, each, shared)
    else:
        values = {n: _yaml(v) for n, v in shared.items()}
        entries = zip(
            document.models, _by_model(each, len(document.models)), strict=True
        )
        written["models"] = [
            {"model": model, **({"parameters": own} if own else {})}
            for model, own in entries
        ]
        written |= {"parameters": values} if values else {}
    if recipe.compute == "float64":
        written["dtype"] = "float64"
    if recipe.dtype != "promote" and recipe.dtype != written.get("dtype"):
        written["out_dtype" if "dtype" in written else "dtype"] = recipe.dtype
    return written


def _slices(
    document: Document, name: str, each: Mapping[str, Any], shared: Mapping[str, Any]
) -> list[dict[str, Any]]:
    written = []
    with_base = THEIRS[name].base != "model"
    for i, own in enumerate(document.recipe.slices):
        if own.module:
            raise _unsaid("slices.module", own.module)

        def here(value: Any, i: int = i) -> Any:
            return value.runs[i][1] if isinstance(value, Runs) else value

        values = _by_model({n: here(v) for n, v in each.items()}, len(own.models))
        sources: dict[str, dict[str, Any]] = {}
        for piece, given in zip(
            own.pieces, [{}] * bool(own.base) + values, strict=True
        ):
            model = (
                document.base if piece.model is None else document.models[piece.model]
            )
            entry: dict[str, Any] = {"model": model}
            if piece.layers is None:
                raise _unsaid("slices.layers", None)
            entry["layer_range"] = list(piece.layers)
            if given:
                entry["parameters"] = given
            if model not in sources:  # what is repeated has weight 0, to fill up
                sources[str(model)] = entry
        parameters = {n: _yaml(here(v)) for n, v in shared.items()}
        more: dict[str, Any] = {"parameters": parameters} if parameters else {}
        if with_base and (own.base or THEIRS[name].base == "first"):
            more["base_model"] = next(iter(sources))
        written.append({"sources": list(sources.values()), **more})
    return written


def _parameters(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """mergekit's name of the method, and its parameters."""
    steps: dict[str, Any] = {step.name: step for step in recipe.transforms}
    method: Any = recipe.method
    if method.name == "generalized_task_arithmetic":
        sparsify, rescale = steps.pop("sparsify", None), steps.pop("rescale", None)
        by = sparsify.by if sparsify else None
        name = _FAMILY.get((by, bool(method.vote)), "")
        given = {
            "weight": method.weights,
            "normalize": _truth(method.normalize),
            "lambda": method.scaling,
        }
        if sparsify:
            given |= {"density": sparsify.density, "rescale": rescale is not None}
            given |= {"gamma": sparsify.gamma} if by == "outliers" else {}
            given |= {"epsilon": sparsify.epsilon} if by == "rank" else {}
    elif method.name == "nuslerp":
        name, along = "nuslerp", method.along
        given = {"weight": method.weights, "nuslerp_flatten": along == "whole"}
        given |= {"nuslerp_row_wise": along == "columns"}
    elif method.name == "slerp":
        name, given = "slerp", {"t": _second(method.weights)}
    else:
        name = method.name
        renames = _RENAMED.get(name, {})
        given = {renames.get(n, n): getattr(method, n) for n in method.fields()}
        if name in THEIRS:
            known = {p.name for p in THEIRS[name].parameters}
            given = {n: own for n, own in given.items() if n in known}
    if name not in THEIRS or THEIRS[name].native != method.name:
        raise _unsaid("method", recipe.method.name)
    if steps:
        raise _unsaid("transforms", ", ".join(steps))
    return name, given


def _second(weights: Any) -> Any:
    """t of slerp, of weights (1 − t, t)."""
    if isinstance(weights, Runs):
        return Runs(tuple((stop, _second(own)) for stop, own in weights.runs))
    return weights[1]


def _truth(value: Any) -> Any:
    return mapped(value, bool) if not isinstance(value, Gradient) else value


def _by_model(values: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The parameters of each model."""
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in values.items():
        for i, own in enumerate(each):
            if isinstance(value, Runs) and value.runs[0][0] is None:
                inner = value.runs[0][1]
                mine = inner[i] if isinstance(inner, tuple) else inner
            else:
                mine = value[i] if isinstance(value, tuple) else value
            own[name] = _yaml(mine)
    return each


def _yaml(value: Any) -> Any:
    """A value as the YAML has it.

    Raises:
      RecipeError: a rule is no plain text, or a gradient one of ours.
    """
    if isinstance(value, Runs) and value.runs[0][0] is None:
        value = value.runs[0][1]
    if isinstance(value, Gradient):
        return list(value.points)
    if isinstance(value, Rules):
        found = []
        for pattern, own in value.rules:
            text = re.sub(r"\\(.)", r"\1", pattern)
            if re.escape(text) != pattern:
                raise _unsaid("a rule", repr(pattern))
            found.append({"filter": text, "value": _yaml(own)})
        return [*found, {"value": _yaml(value.otherwise)}]
    if isinstance(value, (Runs, tuple)):
        raise _unsaid("a value", value)
    return value
