"""Lists a checkpoint's tensors, dtypes, sizes and provenance; reads headers alone.

The table folds tensors that differ in their layer alone into one row.
"""

from __future__ import annotations

import collections
import json
import math
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.record.record import Record, read_record
from m3jax.commands import reporting, tensor_names
from m3jax.commands.cli import define
from m3jax.commands.tables import clean, fact, shape, table
from m3jax.recipe import Recipe, RecipeError
from m3jax.recipe.groups import dotted, group

USAGE = "m3jax inspect DIR [--tensors | --json]"
TAKES = (1, "one checkpoint")


_TENSORS = define("tensors", bool, "List every tensor by itself.")
_JSON = define("json", bool, "Print everything as JSON.")

# Of config.json (or its text_config): what says how a model is built.
_FACTS = (
    ("model_type", "num_experts", "num_local_experts", "num_experts_per_tok"),
    ("vocab_size", "hidden_size", "intermediate_size"),
    ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    ("head_dim", "hidden_act", "sliding_window"),
    ("max_position_embeddings", "rope_theta"),
    ("tie_word_embeddings", "dtype", "torch_dtype", "quant_method"),
)


_PROVENANCE = (
    "recipe",
    "seed",
    "ratios",
    "base",
    "models",
    "tokenizer_from",
    "versions",
)


def main(positional: list[str]) -> int:
    with open_checkpoint(positional[0], mergeable=False) as checkpoint:
        facts = _facts(checkpoint)
    print(json.dumps(facts, indent=1) if _JSON.value else "\n".join(_report(facts)))
    return 0


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that is known, as --json prints it."""
    tensors: dict[str, dict[str, Any]] = {
        name: {
            "dtype": tensor.dtype.code,
            "shape": tensor.shape,
            "bytes": math.prod(tensor.shape) * tensor.dtype.itemsize,
            "file": tensor.place,
        }
        for name, tensor in checkpoint.stored.items()
    }
    dtypes: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        of_dtype = dtypes.setdefault(
            tensor["dtype"], {"tensors": 0, "parameters": 0, "bytes": 0}
        )
        of_dtype["tensors"] += 1
        of_dtype["parameters"] += math.prod(tensor["shape"])
        of_dtype["bytes"] += tensor["bytes"]
    record, problem = _record(checkpoint)
    return {
        "path": checkpoint.name,
        "location": str(checkpoint.location),
        "revision": checkpoint.revision,
        "kind": _kind(checkpoint),
        "parameters": sum(facts["parameters"] for facts in dtypes.values()),
        "bytes": sum(facts["bytes"] for facts in dtypes.values()),
        "dtypes": dict(sorted(dtypes.items(), key=lambda item: -item[1]["bytes"])),
        "files": {file.path.name: file.size for file in checkpoint.files},
        "architecture": _architecture(checkpoint.config),
        "provenance": record and {name: getattr(record, name) for name in _PROVENANCE},
        "provenance_problem": problem,
        "tensors": tensors,
    }


def _record(checkpoint: Checkpoint) -> tuple[Record | None, str | None]:
    """The record of the folder, or what is wrong with it."""
    if not checkpoint.location.is_dir():
        return None, None
    try:
        return read_record(checkpoint.location), None
    except CheckpointError as error:
        return None, str(error)


_FORMATS = {"torch": "PyTorch", "gguf": "GGUF"}  # as people call them


def _kind(checkpoint: Checkpoint) -> str:
    count = len(checkpoint.files)
    if checkpoint.format == "orbax":
        return "folder with an Orbax pytree"
    if checkpoint.format == "adapter":
        return "an adapter (LoRA), to be put on its base: BASE+ADAPTER"
    if checkpoint.location.is_file():
        return f"a single {_FORMATS.get(checkpoint.format, checkpoint.format)} file"
    if checkpoint.format == "msgpack":
        return "folder with Flax's msgpack"
    named = _FORMATS.get(checkpoint.format, checkpoint.format)
    held = f"one {named} file" if count == 1 else f"{count} shards of {named}"
    if checkpoint.revision:
        return f"Hugging Face repository at {checkpoint.revision}, {held}"
    return f"folder, {held}"


def _architecture(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """What config.json says of the architecture; nothing nested or strange."""
    if config is None:
        return None
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


def _report(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    tensors = facts["tensors"]
    in_file = collections.Counter(tensor["file"] for tensor in tensors.values())
    dtypes = [
        f"{dtype}: {of_dtype['parameters']:,} parameters in "
        + _count(of_dtype["tensors"])
        for dtype, of_dtype in facts["dtypes"].items()
    ]
    files = [
        f"{clean(name)}, {reporting.size(size)}, {_count(in_file[name])}"
        for name, size in facts["files"].items()
    ]
    lines = [
        *fact("checkpoint", clean(facts["path"])),
        *fact("kind", facts["kind"]),
        *fact("parameters", f"{facts['parameters']:,} in {_count(len(tensors))}"),
        *fact("bytes", reporting.size(facts["bytes"])),
        *fact("dtypes", dtypes or ["none"]),
        *fact("files", files),
        *fact("architecture", _architecture_lines(facts["architecture"])),
    ]
    if facts["provenance"]:
        lines += ["", *_provenance(facts["provenance"])]
    elif facts["provenance_problem"]:
        lines += fact("provenance", f"cannot be used: {facts['provenance_problem']}")
    return [*lines, "", *_table(tensors)]


def _architecture_lines(facts: dict[str, Any] | None) -> list[str]:
    if facts is None:
        return ["unknown: there is no config.json"]
    names = ", ".join(_short(name) for name in facts["architectures"][:3])
    groups = [
        ", ".join(
            f"{field} {_short(facts[field])}" for field in group if field in facts
        )
        for group in _FACTS
    ]
    return [names or "unnamed in config.json", *filter(None, groups)]


def _provenance(record: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    ratios = reporting.ratios(record["ratios"]).split("\n")
    method = _short(record["recipe"].get("method"))
    lines = [
        *fact("merged by", clean(versions)),
        *fact("method", f"{method}, seed {record['seed']}"),
        *fact("recipe", _recipe(record["recipe"])),
        *fact("ratios", [clean(line.strip()) for line in ratios]),
    ]
    checkpoints = {"base": record["base"]} if record["base"] else {}
    checkpoints |= {f"model {i}": m for i, m in enumerate(record["models"], start=1)}
    for role, checkpoint in checkpoints.items():
        revision = f" at {checkpoint['revision']}" if checkpoint["revision"] else ""
        lines += fact(role, clean(f"{checkpoint['path']}{revision}"))
    return lines


def _recipe(recorded: dict[str, Any]) -> list[str]:
    """The fields that are not the default."""
    try:
        recipe = Recipe.from_dict(recorded)
    except RecipeError as error:
        return [clean(f"not one that this m3jax knows: {error}")]
    fields = dotted(recipe.to_dict())
    defaults = dotted(Recipe(method=recipe.method.name).to_dict())
    steps = [group(type(step)()) for step in recipe.transforms]
    for step, own in zip(recipe.transforms, steps, strict=True):
        defaults |= dotted({step.name: own})
    defaults |= {"method": Recipe().method.name}
    changed = [f"{n}={v!r}" for n, v in fields.items() if v != defaults[n]]
    return [clean(line) for line in changed] or ["all defaults"]


def _table(tensors: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each tensor, or for one kind of all layers."""
    if _TENSORS.value:
        groups = [(name, [name]) for name in tensor_names.in_order(tensors)]
    else:
        groups = tensor_names.alike(
            tensors, lambda name: (tensors[name]["dtype"], tensors[name]["shape"])
        )
    rows = [
        (
            label,
            str(len(names)),
            tensors[names[0]]["dtype"],
            shape(tensors[names[0]]["shape"]),
            reporting.size(sum(tensors[name]["bytes"] for name in names)),
        )
        for label, names in groups
    ]
    return table(("tensor", "count", "dtype", "shape", "bytes"), rows, "<><<>")


def _count(tensors: int) -> str:
    return f"{tensors:,} tensor" + "s" * (tensors != 1)


def _short(value: object) -> str:
    """A value of an untrusted JSON file, on one short line."""
    text = clean(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= 60 else text[:57] + "..."
