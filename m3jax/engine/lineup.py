"""Lines up the tensors of the base and the models, or says why they do not fit."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.formats.dtypes import DTYPES, FLOAT32, FLOAT64, Dtype, of_numpy
from m3jax.checkpoints.source import Converted, Repeated, Source
from m3jax.engine import layer_config, vocabulary
from m3jax.engine.inputs import (
    MergeInputs,
    MismatchError,
    Origin,
    Part,
    TensorInputs,
)
from m3jax.engine.slices import stacked
from m3jax.methods.step import Spec
from m3jax.recipe import Recipe

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


def align(
    base: Checkpoint | None,
    models: list[Checkpoint],
    recipe: Recipe,
    statistics: list[Checkpoint] | None = None,
) -> MergeInputs:
    """Lines up the checkpoints' tensors by name.

    Args:
      base, models: the checkpoints.
      recipe: what is done to them.
      statistics: one checkpoint per model, for a method that reads what they hold.

    Raises:
      MismatchError: with every tensor that is missing, extra, or of another shape.
    """
    checkpoints = models if base is None else [base, *models]
    changes: dict[str, Any] = dict(checkpoints[0].changes)
    notes = [n for own in (*checkpoints, *(statistics or ())) for n in own.notes]
    tables = _untie(checkpoints, changes, notes)
    _check_related(checkpoints)
    problems: list[str] = []
    tensors: list[TensorInputs] = []
    if recipe.slices:
        has_base = recipe.slices[0].base is not None
        given = base is not None
        slots, stacks = stacked(checkpoints, tables, recipe, given, problems)
        names = sorted(slots[0])
        layer_config.follow(checkpoints[0], stacks, changes, notes)
    else:
        has_base = base is not None
        names = _names(checkpoints, tables, recipe, problems)
        slots = [
            {name: Origin(owner, name, table[name]) for name in names if name in table}
            for owner, table in zip(checkpoints, tables, strict=True)
        ]
    for name in names:
        if recipe.excludes(name):
            origin = slots[0][name]
            dtype = _output_dtype([origin.source], recipe)
            parts = {"": Part(dtype, origin.source.shape)}
            tensors.append(TensorInputs(name, origin, (), False, dtype, parts))
            continue
        found = [slot[name] for slot in slots]
        owners = [origin.owner for origin in found]
        sources = [origin.source for origin in found]
        kinds = {source.dtype.kind for source in sources}
        exact = kinds == {"exact"}
        if len(kinds) > 1 or (exact and len({s.dtype.code for s in sources}) > 1):
            problems.append(
                _differ(name, "dtype", owners, [s.dtype.code for s in sources])
            )
            continue
        if len({source.shape for source in sources}) > 1:
            fitted = vocabulary.fit(name, sources, owners, recipe.vocabulary)
            if fitted is None:
                problems.append(
                    _differ(name, "shape", owners, [list(s.shape) for s in sources])
                    + vocabulary.hint(name, sources, owners)
                )
                continue
            changes["vocab_size"] = fitted[0].shape[0]
            sources = fitted
        own_recipe = recipe.variants[recipe.variant_of(name)]
        dtype = _output_dtype(sources, recipe)
        origins = [
            dataclasses.replace(origin, source=source)
            for origin, source in zip(
                found, _alike(sources, has_base, recipe), strict=True
            )
        ]
        parts = {"": Part(dtype, sources[0].shape)}
        if not exact:
            count = len(slots) - has_base
            parts = _parts(own_recipe, sources[0].shape, dtype, count)
        own = origins.pop(0) if has_base else None
        kept = own if own_recipe.needs_base or exact else None
        beside = (
            {}
            if exact
            else _beside(name, sources[0], statistics or [], own_recipe, problems)
        )
        tensors.append(
            TensorInputs(name, kept, tuple(origins), not exact, dtype, parts, beside)
        )
    if problems:
        raise MismatchError(problems)
    if not tensors:
        raise MismatchError([f"{checkpoints[0].name}: holds no tensors"])
    used = {recipe.variant_of(tensor.name) for tensor in tensors if tensor.merged}
    for pattern in recipe.exclude:
        if not any(re.match(pattern, name) for name in tables[0]):
            notes.append(f"exclude: {pattern!r} matches no tensor")
    notes += [
        f"{field} has no effect: method {recipe.method.name} has none"
        for field in recipe.without_effect
    ]
    notes += [
        f"rules: {pattern!r} matches no tensor that is merged, or others come first"
        for place, (pattern, _) in enumerate(recipe.rules, start=1)
        if place not in used
    ]
    _note_changes(checkpoints[0], tensors, recipe, changes, notes)
    return MergeInputs(tuple(tensors), changes, tuple(notes))


def _beside(
    name: str,
    source: Source,
    statistics: list[Checkpoint],
    recipe: Recipe,
    problems: list[str],
) -> dict[str, tuple[Origin, ...]]:
    """What the statistics' checkpoints hold for a tensor: all of them, or none."""
    holders = [own for own in statistics if name in own.tensors]
    if not holders or not recipe.method.beside:
        return {}
    without = [own.name for own in statistics if name not in own.tensors]
    if without:
        problems.append(
            f"tensor {shown(name)} is missing in {', '.join(without)}, and not in "
            f"{holders[0].name}; measure the same tensors of all models"
        )
        return {}
    wanted = recipe.method.beside_shape(source.shape)
    for own in statistics:
        found = own.tensors[name]
        repeats = recipe.method.beside_repeats and repeatable(found.shape, source.shape)
        if found.shape != wanted and not repeats:
            problems.append(
                f"tensor {shown(name)} has shape {list(found.shape)} in {own.name}, "
                f"where {recipe.method.name} needs {list(wanted)}"
            )
            return {}
    (key,) = recipe.method.beside

    def fitted(found: Source) -> Source:
        found = _converted(found, FLOAT32)
        if found.shape == wanted:
            return found
        return Repeated(found, source.shape)

    made = [Origin(own, name, fitted(own.tensors[name])) for own in statistics]
    return {key: tuple(made)}


def repeatable(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor has as many axes, each as long or of one element."""
    return len(shape) == len(wanted) and all(
        own in (1, other) for own, other in zip(shape, wanted, strict=True)
    )


def _parts(
    recipe: Recipe, shape: tuple[int, ...], dtype: Dtype, num_models: int
) -> dict[str, Part]:
    """What the method makes of a tensor of that shape and output dtype."""
    made = recipe.method.outputs(Spec(shape), num_models)
    return {
        part: Part(
            DTYPES["U8"] if own.packed else of_numpy(own.dtype) if own.dtype else dtype,
            own.shape,
            own.packed,
        )
        for part, own in made.items()
    }


def _alike(sources: list[Source], has_base: bool, recipe: Recipe) -> list[Source]:
    """The sources of a tensor as a kernel takes them: the models of one dtype, and all
    of them float64 where one is or the recipe says so."""
    if sources[0].dtype.kind == "exact":
        return sources
    if recipe.compute == "float64" or any(own.dtype == FLOAT64 for own in sources):
        return [_converted(source, FLOAT64) for source in sources]
    base, models = sources[:has_base], sources[has_base:]
    if len({source.dtype.code for source in models}) > 1:
        models = [_converted(source, FLOAT32) for source in models]
    return [*base, *models]


def _converted(source: Source, dtype: Dtype) -> Source:
    return source if source.dtype == dtype else Converted(source, dtype)


def _check_related(checkpoints: list[Checkpoint]) -> None:
    """Raises CheckpointError if two checkpoints have no tensor in common."""
    first, *others = checkpoints
    for other in others:
        a, b = first.tensors, other.tensors
        if a and b and not set(a) & set(b):
            raise CheckpointError(
                f"{first.name} ({first.format}) and {other.name} ({other.format}) have "
                f"no tensor name in common: {shown(min(a))} stands in one and "
                f"{shown(min(b))} in the other; give checkpoints of one program"
            )


def _names(
    checkpoints: list[Checkpoint],
    tables: list[dict[str, Source]],
    recipe: Recipe,
    problems: list[str],
) -> list[str]:
    """The output's tensors: those of the first checkpoint, which all must have."""
    names = sorted(tables[0])
    for name in sorted(set().union(*tables)):
        without = [
            checkpoint.name
            for checkpoint, table in zip(checkpoints, tables, strict=True)
            if name not in table
        ]
        if not without or recipe.excludes(name):
            continue
        tied = " (its head is tied to its embedding)" if name == HEAD else ""
        problems.append(
            f"tensor {shown(name)} is missing in {', '.join(without)}{tied}; "
            "exclude it, or merge models of one architecture"
        )
    missing = set().union(*(set(names) - set(table) for table in tables))
    return [name for name in names if name not in missing or recipe.excludes(name)]


def _untie(
    checkpoints: list[Checkpoint], changes: dict[str, Any], notes: list[str]
) -> list[dict[str, Source]]:
    """Gives a tied model its own head where another model has one.

    A tied model's head *is* its embedding, so the merge of the heads is well defined
    and the output is untied.
    """
    tables = [dict(checkpoint.tensors) for checkpoint in checkpoints]
    if any(HEAD in table for table in tables):
        for checkpoint, table in zip(checkpoints, tables, strict=True):
            embeddings = [n for n in table if n.endswith(_EMBEDDINGS)]
            tied = (checkpoint.config or {}).get("tie_word_embeddings") is True
            if HEAD not in table and tied and len(embeddings) == 1:
                table[HEAD] = table[embeddings[0]]
                changes["tie_word_embeddings"] = False
                notes.append(
                    f"{checkpoint.name}: its head is tied; its embedding is merged as "
                    f"{HEAD}, and the output has a head of its own"
                )
    return tables


def _differ(
    name: str, what: str, checkpoints: list[Checkpoint], values: list[Any]
) -> str:
    each = ", ".join(
        f"{value} in {checkpoint.name}"
        for checkpoint, value in zip(checkpoints, values, strict=True)
    )
    return f"tensor {shown(name)} has {what} {each}"


def _output_dtype(sources: list[Source], recipe: Recipe) -> Dtype:
    first = sources[0]
    if recipe.dtype == "input" or first.dtype.kind == "exact":
        return first.output_dtype
    if recipe.dtype == "promote":
        dtypes = {source.output_dtype for source in sources}
        size = max(dtype.itemsize for dtype in dtypes)
        widest = [dtype for dtype in dtypes if dtype.itemsize == size]
        return widest[0] if len(widest) == 1 else FLOAT32  # bfloat16 and float16
    return of_numpy(recipe.dtype)


def _note_changes(
    first: Checkpoint,
    tensors: list[TensorInputs],
    recipe: Recipe,
    changes: dict[str, Any],
    notes: list[str],
) -> None:
    config = first.config or {}
    for own in {"quantization_config", "compression_config"} & config.keys():
        changes[own] = None
        notes.append(
            f"{' and '.join(first.dequantised)} weights are dequantised; the output is "
            "bfloat16"
            if first.dequantised
            else f"config.json's {own} is left out: no tensor is quantised"
        )
    floats = {t.dtype for t in tensors if t.dtype.kind == "float"}
    if recipe.dtype != "input" and len(floats) == 1:
        for field in ("dtype", "torch_dtype"):
            if field in config:
                changes[field] = floats.pop().numpy.name if floats else changes["dtype"]
    if "vocab_size" in changes:
        if config.get("vocab_size") == changes["vocab_size"]:
            del changes["vocab_size"]
        else:
            notes.append(
                f"the output has {changes['vocab_size']} vocabulary rows, "
                f"{first.name} has {config.get('vocab_size')}; --tokenizer_from names "
                "the model whose tokenizer goes along"
            )
