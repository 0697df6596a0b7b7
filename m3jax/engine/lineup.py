"""Lines up the tensors of the base and the models, or says why they do not fit."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax.checkpoints import naming
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.formats.dtypes import DTYPES, FLOAT32, FLOAT64, Dtype, of_numpy
from m3jax.checkpoints.naming.table import Table
from m3jax.checkpoints.side_files import size_changes
from m3jax.checkpoints.source import Converted, Repeated, Source
from m3jax.engine import layer_config, progress, unmatched, vocabulary
from m3jax.engine.by_token import ByToken, Compared
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
from m3jax.recipe.values import layer_of

_NOTHING = Compared()
# Of config.json: what tells models apart whose tensors do not fit, the plainest first.
_SIZES = (
    *("model_type", "num_hidden_layers", "n_layer", "hidden_size", "n_embd"),
    *("intermediate_size", "num_attention_heads", "num_key_value_heads"),
)


def align(
    base: Checkpoint | None,
    models: list[Checkpoint],
    recipe: Recipe,
    statistics: list[Checkpoint] | None = None,
    tokens: ByToken | Compared = _NOTHING,
) -> MergeInputs:
    """Lines up the checkpoints' tensors by name.

    Args:
      base, models: the checkpoints.
      recipe: what is done to them.
      statistics: one checkpoint per model, for a method that reads what they hold.
      tokens: how rows of tokens fit, or what a merge by rows must know of them.

    Raises:
      MismatchError: with every tensor that is missing, extra, or of another shape.
    """
    checkpoints = models if base is None else [base, *models]
    named = _named(checkpoints, recipe)
    tables = named.tables
    changes: dict[str, Any] = {**checkpoints[0].changes, **named.config}
    notes = [n for own in (*checkpoints, *(statistics or ())) for n in own.notes]
    notes += named.notes
    _check_related(checkpoints, tables)
    notes += tokens.notes
    problems: list[str] = []
    if isinstance(tokens, Compared):
        problems += tokens.problems
    resized: dict[str, list[Origin]] = {}
    tensors: list[TensorInputs] = []
    copied = named.copied
    hint = ""
    if recipe.slices:
        has_base = recipe.slices[0].base is not None
        given = base is not None
        slots, stacks = stacked(checkpoints, tables, recipe, given, problems)
        names = sorted(slots[0])
        layer_config.follow(checkpoints[0], stacks, changes, notes)
    else:
        has_base = base is not None
        names, kept = unmatched.settle(
            checkpoints,
            tables,
            recipe.unmatched,
            lambda name: name in named.copied or recipe.excludes(name),
            problems,
            notes,
        )
        copied |= kept
        hint = unmatched.HINT if problems else ""
        slots = [
            {name: Origin(owner, name, table[name]) for name in names if name in table}
            for owner, table in zip(checkpoints, tables, strict=True)
        ]
    for name in names:
        found = [slot[name] for slot in slots if name in slot]
        fitted = None
        if len(found) == len(slots):
            fitted = _fitted(name, found, recipe, tokens)
        if fitted is not None:
            resized[name] = found
            found = [
                dataclasses.replace(origin, source=source)
                for origin, source in zip(found, fitted, strict=True)
            ]
        if name in copied or recipe.excludes(name):
            origin = slots[0][name] if fitted is None else found[0]
            dtype = _output_dtype([origin.source], recipe)
            if name in named.copied:
                dtype = origin.source.output_dtype
            parts = {"": Part(dtype, origin.source.shape)}
            tensors.append(TensorInputs(name, origin, (), False, dtype, parts))
            if recipe.method.by_task and name not in copied:
                tensors += _heads(name, slots[has_base:])
            continue
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
            problems.append(
                _differ(name, "shape", owners, [list(s.shape) for s in sources])
                + vocabulary.hint(name, sources, owners)
            )
            continue
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
        read = own if own_recipe.needs_base or exact else None
        beside = (
            {}
            if exact
            else _beside(name, sources[0], statistics or [], own_recipe, problems)
        )
        tensors.append(
            TensorInputs(name, read, tuple(origins), not exact, dtype, parts, beside)
        )
    if problems:
        raise MismatchError(
            problems, "; ".join(filter(None, (_built(checkpoints), hint)))
        )
    if not tensors:
        raise MismatchError([f"{checkpoints[0].name}: holds no tensors"])
    used = {recipe.variant_of(tensor.name) for tensor in tensors if tensor.merged}
    for pattern in recipe.exclude:
        if not any(re.match(pattern, name) for table in tables for name in table):
            notes.append(f"exclude: {pattern!r} matches no tensor")
    notes += [
        f"{field} has no effect: {why}" for field, why in recipe.idle_fields().items()
    ]
    notes += [
        f"rules: {pattern!r} matches no tensor that is merged, or others come first"
        for place, (pattern, _) in enumerate(recipe.rules, start=1)
        if place not in used
    ]
    _note_heads(tensors, notes)
    _note_changes(checkpoints[0], tensors, recipe, changes, notes)
    _note_width(tensors, notes)
    changes |= _resizing(checkpoints[0], tensors, resized, recipe, notes)
    return MergeInputs(tuple(tensors), changes, tuple(notes))


def _fitted(
    name: str, found: list[Origin], recipe: Recipe, tokens: ByToken | Compared
) -> list[Source] | None:
    """The sources with the rows of one vocabulary; None where there is nothing to do,
    or nothing that can be done."""
    owners = [origin.owner for origin in found]
    sources = [origin.source for origin in found]
    if isinstance(tokens, ByToken):
        return tokens.fit(name, sources, owners)
    if len({source.shape for source in sources}) == 1:
        return None
    return vocabulary.fit(name, sources, owners, recipe.vocabulary)


def _named(checkpoints: list[Checkpoint], recipe: Recipe) -> naming.Named:
    """The checkpoints' tensors by one set of names.

    Models of slices have layers of their own, so those may be missing, and a buffer of
    a layer goes with it.
    """
    if not recipe.slices:
        return naming.common(checkpoints, recipe.rename, recipe.excludes)
    return naming.common(
        checkpoints,
        recipe.rename,
        lambda name: layer_of(name) is not None or recipe.excludes(name),
        keep_buffers=True,
    )


def _heads(name: str, models: Sequence[Mapping[str, Origin]]) -> list[TensorInputs]:
    """What each model has of an excluded tensor, as it is, for `Method.by_task`."""
    return [
        TensorInputs(
            f"{name}.head-{k}",
            own[name],
            (),
            False,
            own[name].source.output_dtype,
            {"": Part(own[name].source.output_dtype, own[name].source.shape)},
            file=f"head-{k}",
        )
        for k, own in enumerate(models)
        if name in own and own[name].source.dtype.kind != "exact"
    ]


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


def _check_related(checkpoints: list[Checkpoint], tables: list[Table]) -> None:
    """Raises CheckpointError if two checkpoints have no tensor in common."""
    first, *others = checkpoints
    for other, b in zip(others, tables[1:], strict=True):
        a = tables[0]
        if bool(a) != bool(b):
            empty = other if a else first
            raise CheckpointError(
                f"{empty.name} ({empty.format}) holds no tensors; fetch it again, or "
                "save it again"
            )
        if a and not set(a) & set(b):
            raise CheckpointError(
                f"{first.name} ({first.format}) and {other.name} ({other.format}) have "
                f"no tensor name in common: {shown(min(a))} stands in one and "
                f"{shown(min(b))} in the other; give checkpoints of one program, or "
                "--rename=REGEX=REPLACEMENT for the models' names"
            )


def _built(checkpoints: list[Checkpoint]) -> str:
    """How config.json says that models are built, where they are not built alike."""
    first = checkpoints[0]
    for field in _SIZES:
        said = []
        for own in (first, *checkpoints[1:]):
            text = (own.config or {}).get("text_config")
            fields = {**(own.config or {}), **(text if isinstance(text, dict) else {})}
            said.append((own.name, fields.get(field)))
        other = next((pair for pair in said if pair[1] not in (None, said[0][1])), None)
        if said[0][1] is not None and other is not None:
            return (
                f"they are not built alike: config.json's {field} is "
                f"{shown(said[0][1])} in {first.name}, {shown(other[1])} in {other[0]}"
            )
    return ""


def _differ(
    name: str, what: str, checkpoints: list[Checkpoint], values: list[Any]
) -> str:
    each = ", ".join(
        f"{value} in {checkpoint.name}"
        for checkpoint, value in zip(checkpoints, values, strict=True)
    )
    pairs = zip(checkpoints, values, strict=True)
    empty = ", ".join(checkpoint.name for checkpoint, value in pairs if value == [0])
    hint = (
        f" ({empty} was saved with empty tensors, as DeepSpeed's ZeRO-3 does without "
        "gathering them: make its weights with zero_to_fp32.py)"
    )
    return f"tensor {shown(name)} has {what} {each}{hint if empty else ''}"


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


def _note_heads(tensors: list[TensorInputs], notes: list[str]) -> None:
    """Notes what is kept of each model beside the merge, for its task."""
    heads = [tensor for tensor in tensors if tensor.file]
    if heads:
        names = {tensor.name.rpartition(".")[0] for tensor in heads}
        kept = progress.size(sum(tensor.written_bytes for tensor in heads))
        notes.append(
            f"{len(names)} excluded tensors of each model are kept beside the masks, "
            f"for its task: {kept} in all"
        )


def _note_width(tensors: list[TensorInputs], notes: list[str]) -> None:
    """Says where the output is larger than the models, being of a wider dtype."""
    merged = [tensor for tensor in tensors if tensor.merged]
    theirs = {own.source.output_dtype for t in merged for own in t.models}
    widest = max((dtype.itemsize for dtype in theirs), default=0)
    wider = [tensor for tensor in merged if tensor.dtype.itemsize > widest]
    elements = [math.prod(tensor.shape) for tensor in merged]
    more = sum(
        math.prod(tensor.shape) * (tensor.dtype.itemsize - widest) for tensor in wider
    )
    if not more or more < sum(elements) * widest // 2:
        return
    ours = ", ".join(sorted({tensor.dtype.numpy.name for tensor in wider}))
    names = sorted(dtype.numpy.name for dtype in theirs)
    notes.append(
        f"the output is {ours}, the models are {', '.join(names)}: it takes "
        f"{1 + more / (sum(elements) * widest):.1f} times their size; "
        f"--config.dtype={names[0]} would not"
    )


def _resizing(
    first: Checkpoint,
    tensors: list[TensorInputs],
    resized: dict[str, list[Origin]],
    recipe: Recipe,
    notes: list[str],
) -> dict[str, Any]:
    """Changes to config.json for tensors of other rows than the first checkpoint's."""
    changes: dict[str, Any] = {}
    for tensor in tensors:
        if tensor.name in resized and not recipe.keeps_config:
            rows, before = tensor.shape[0], resized[tensor.name][0].source.shape[0]
            changes |= size_changes(first.config or {}, rows, before)
    if resized and recipe.vocabulary == "truncate":
        origins = resized[min(resized)]
        had = dict.fromkeys(f"{o.owner.name} {o.source.shape[0]}" for o in origins)
        kept = min(origin.source.shape[0] for origin in origins)
        notes.append(
            f"{', '.join(sorted(resized))}: truncated to {kept} rows ({', '.join(had)})"
        )
        named = dict(vocabulary.sizes(first.config or {}))
        if recipe.keeps_config and set(named.values()) - {kept}:
            told = ", ".join(f"{name}={size}" for name, size in named.items())
            notes.append(
                f"config.json keeps {told}, as mergekit has it: transformers does not "
                "load the output; --config.tokenizer.config=fit makes it follow"
            )
    return changes
