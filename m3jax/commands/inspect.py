"""Lists a checkpoint's tensors, dtypes, sizes and provenance; reads headers alone.

The table folds tensors that differ in their layer alone into one row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from absl import flags

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.record import Record, read_record
from m3jax.commands import reporting, tensor_names
from m3jax.commands.cli import UsageError
from m3jax.commands.tables import clean, fact, shape, table
from m3jax.recipe import Recipe, RecipeError

USAGE = "m3jax inspect DIR [--tensors | --json]"

# `diff` has flags of these names, too; a process runs one command.
_TENSORS = flags.DEFINE_bool(
    "tensors", False, "List every tensor by itself.", allow_override=True
)
_JSON = flags.DEFINE_bool(
    "json", False, "Print everything as JSON.", allow_override=True
)

# Of config.json (or its text_config): what says how a model is built.
_FACTS = (
    ("model_type", "num_experts", "num_local_experts", "num_experts_per_tok"),
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    ("num_attention_heads", "num_key_value_heads", "head_dim"),
    ("hidden_act", "max_position_embeddings", "rope_theta", "sliding_window"),
    ("tie_word_embeddings", "dtype", "torch_dtype", "quant_method"),
)


def main(positional: list[str]) -> int:
    if len(positional) != 1:
        raise UsageError(f"needs one checkpoint, not {len(positional)}; usage: {USAGE}")
    with open_checkpoint(positional[0], mergeable=False) as checkpoint:
        record, problem = _record(checkpoint)
        if _JSON.value:
            print(json.dumps(_as_json(checkpoint, record, problem), indent=1))
            return 0
        lines = [*_summary(checkpoint), *_architecture(checkpoint.config)]
        if record:
            lines += ["", *_provenance(record)]
        elif problem:
            lines += fact("provenance", f"cannot be used: {problem}")
        print("\n".join([*lines, "", *_tensors(checkpoint, folded=not _TENSORS.value)]))
    return 0


def _record(checkpoint: Checkpoint) -> tuple[Record | None, str | None]:
    """The record of the folder, or what is wrong with it."""
    try:
        record = (
            read_record(checkpoint.location) if checkpoint.location.is_dir() else None
        )
    except CheckpointError as error:
        return None, str(error)
    return record, None


def _kind(checkpoint: Checkpoint) -> str:
    count = len(checkpoint.files)
    if checkpoint.format == "orbax":
        return "folder with an Orbax pytree"
    if checkpoint.location.is_file():
        return f"a single {checkpoint.format} file"
    if checkpoint.format == "msgpack":
        return "folder with Flax's msgpack"
    held = "one safetensors file" if count == 1 else f"{count} shards and an index"
    if checkpoint.revision:
        return f"Hugging Face repository at {checkpoint.revision}, {held}"
    return f"folder, {held}"


def _summary(checkpoint: Checkpoint) -> list[str]:
    tensors = checkpoint.stored
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    in_file: dict[str, int] = {}
    for tensor in tensors.values():
        name = tensor.place
        in_file[name] = in_file.get(name, 0) + 1
    return [
        *fact("checkpoint", clean(checkpoint.name)),
        *fact("kind", _kind(checkpoint)),
        *fact("parameters", f"{count:,} in {_tensor_count(len(tensors))}"),
        *fact("bytes", reporting.size(_bytes(checkpoint, tensors))),
        *fact(
            "dtypes",
            [
                f"{dtype}: {facts['parameters']:,} parameters in "
                f"{_tensor_count(facts['tensors'])}"
                for dtype, facts in _dtypes(checkpoint).items()
            ]
            or ["none"],
        ),
        *fact(
            "files",
            [
                f"{clean(file.path.name)}, {reporting.size(file.size)}, "
                + _tensor_count(in_file.get(file.path.name, 0))
                for file in checkpoint.files
            ],
        ),
    ]


def _architecture(config: dict[str, Any] | None) -> list[str]:
    if config is None:
        return fact("architecture", "unknown: there is no config.json")
    facts = _config_facts(config)
    lines = [", ".join(_short(name) for name in facts.pop("architectures")[:3])]
    lines[0] = lines[0] or "unnamed in config.json"
    for group in _FACTS:
        found = [f"{field} {_short(facts[field])}" for field in group if field in facts]
        lines += [", ".join(found)] if found else []
    return fact("architecture", lines)


def _config_facts(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the architecture; nothing nested or strange."""
    names = config.get("architectures")
    names = names if isinstance(names, list) else []
    text, quantization = config.get("text_config"), config.get("quantization_config")
    merged = {**text, **config} if isinstance(text, dict) else dict(config)
    if isinstance(quantization, dict):
        merged["quant_method"] = quantization.get("quant_method")
    known = [field for group in _FACTS for field in group]
    return {
        "architectures": [name for name in names if isinstance(name, str)],
        **{f: merged[f] for f in known if isinstance(merged.get(f), str | int | float)},
    }


def _provenance(record: Record) -> list[str]:
    versions = ", ".join(f"{name} {v}" for name, v in record.versions.items())
    lines = [
        *fact("merged by", clean(versions)),
        *fact("method", f"{_short(record.recipe.get('method'))}, seed {record.seed}"),
        *fact("recipe", _recipe(record)),
        *fact("ratios", _lines(reporting.ratios(record.ratios))),
    ]
    checkpoints = [("base", record.base)] if record.base else []
    checkpoints += [(f"model {i}", m) for i, m in enumerate(record.models, start=1)]
    for role, checkpoint in checkpoints:
        revision = f" at {checkpoint['revision']}" if checkpoint["revision"] else ""
        lines += fact(role, clean(f"{checkpoint['path']}{revision}"))
    return lines


def _recipe(record: Record) -> list[str]:
    """The fields that are not the default."""
    try:
        recipe = Recipe.from_dict(record.recipe)
    except RecipeError as error:
        return [clean(f"not one that this m3jax knows: {error}")]
    fields, defaults = _dotted(recipe.to_dict()), _dotted(Recipe().to_dict())
    changed = [f"{n}={v!r}" for n, v in fields.items() if v != defaults[n]]
    return [clean(line) for line in changed] or ["all defaults"]


def _dotted(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= _dotted(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _tensors(checkpoint: Checkpoint, *, folded: bool) -> list[str]:
    """The table of tensors, one kind of all layers in a row if `folded`."""
    stored = checkpoint.stored
    if folded:
        groups = tensor_names.alike(
            stored, lambda name: (stored[name].dtype.code, stored[name].shape)
        )
    else:
        groups = [(name, [name]) for name in tensor_names.in_order(stored)]
    rows = [
        (
            label,
            str(len(names)),
            stored[names[0]].dtype.code,
            shape(stored[names[0]].shape),
            reporting.size(_bytes(checkpoint, names)),
        )
        for label, names in groups
    ]
    return table(("tensor", "count", "dtype", "shape", "bytes"), rows, "<><<>")


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Tensors, parameters and bytes of each dtype, the largest first."""
    found: dict[str, dict[str, int]] = {}
    for name, tensor in checkpoint.stored.items():
        facts = found.setdefault(
            tensor.dtype.code, {"tensors": 0, "parameters": 0, "bytes": 0}
        )
        facts["tensors"] += 1
        facts["parameters"] += math.prod(tensor.shape)
        facts["bytes"] += _bytes(checkpoint, [name])
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    tensors = [checkpoint.stored[name] for name in names]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)


def _tensor_count(count: int) -> str:
    return f"{count:,} tensor" + ("" if count == 1 else "s")


def _lines(text: str) -> list[str]:
    return [clean(line.strip()) for line in text.split("\n")]


def _short(value: object) -> str:
    """A value of an untrusted JSON file, on one short line."""
    text = clean(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _as_json(
    checkpoint: Checkpoint, record: Record | None, problem: str | None
) -> dict[str, Any]:
    tensors = checkpoint.stored
    return {
        "path": checkpoint.name,
        "location": str(checkpoint.location),
        "revision": checkpoint.revision,
        "kind": _kind(checkpoint),
        "parameters": sum(math.prod(t.shape) for t in tensors.values()),
        "bytes": _bytes(checkpoint, tensors),
        "dtypes": _dtypes(checkpoint),
        "files": {file.path.name: file.size for file in checkpoint.files},
        "architecture": None
        if checkpoint.config is None
        else _config_facts(checkpoint.config),
        "provenance": record
        and {
            "recipe": record.recipe,
            "seed": record.seed,
            "ratios": record.ratios,
            "base": record.base,
            "models": record.models,
            "tokenizer_from": record.tokenizer_from,
            "versions": record.versions,
        },
        "provenance_problem": problem,
        "tensors": {
            name: {
                "dtype": tensor.dtype.code,
                "shape": tensor.shape,
                "bytes": _bytes(checkpoint, [name]),
                "file": tensor.place,
            }
            for name, tensor in tensors.items()
        },
    }
