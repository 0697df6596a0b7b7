"""What an output says of itself: m3jax.json, the model card and the side files."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import xxhash

import m3jax
from m3jax.checkpoints import side_files
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.output.folder import MANIFEST, MODEL_CARD, OutputFolder
from m3jax.checkpoints.output.shards import Shard
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.record import model_card

FORMAT = 1  # of m3jax.json; `record` reads it
CHECKSUM = "xxh3_128"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is recorded of a merge.

    Attributes:
      recipe: its fields, as JSON values.
      statistics: checkpoints beside the models, of a method that reads them.
      measured: what the method says of the whole model, by name.
      documents: how inputs were made that go with the merge, as JSON values.
      input_checksums: per checkpoint (base first), over what was read from it.
      checksums: of each tensor written.
      config_changes: fields of config.json to set, or to remove (None); dotted names.
      tokenizer_from: ``base``, a model's name, or None for the first checkpoint.
      notes: what the user was told, a line each.
      side_files: the folder that each of them comes from, by name.
      other_files: contents of those that are not as they stand there; None for one
        that is left out.
    """

    recipe: Mapping[str, Any]
    seed: int
    ratios: Mapping[str, tuple[float, ...]] | None
    base: Checkpoint | None
    models: Sequence[Checkpoint]
    statistics: Sequence[Checkpoint]
    measured: Mapping[str, list[float]]
    documents: Sequence[Mapping[str, Any]]
    input_checksums: Sequence[str | None]
    shards: Sequence[Shard]
    checksums: Mapping[str, str]
    config_changes: Mapping[str, Any]
    tokenizer_from: str | None
    notes: Sequence[str]
    side_files: Mapping[str, Location]
    other_files: Mapping[str, bytes | None]


def write(folder: OutputFolder, facts: Facts) -> None:
    """Writes the side files, the model card and m3jax.json."""
    base = [facts.base] if facts.base else []
    checkpoints = [*base, *facts.models, *facts.statistics]
    files = side_files_of(facts.side_files, facts.other_files, facts.config_changes)
    files[MODEL_CARD] = model_card.render(
        facts.recipe, facts.seed, facts.ratios, facts.base, facts.models
    ).encode()
    for name, content in files.items():
        folder.write(name, content)
    folder.write(MANIFEST, _manifest(facts, checkpoints, files))


def side_files_of(
    folders: Mapping[str, Location],
    others: Mapping[str, bytes | None],
    config_changes: Mapping[str, Any],
) -> dict[str, bytes]:
    """The contents of the side files of an output, by name; see `Facts`.

    Raises:
      CheckpointError: one cannot be read.
    """
    files: dict[str, bytes] = {}
    for name, folder in folders.items():
        content = side_files.read_side_file(folder, name)
        if content is not None:
            files[name] = content
    for name, other in others.items():
        files.pop(name, None)
        if other is not None:
            files[name] = other
    if config_changes and side_files.CONFIG in files:
        config = json.loads(files[side_files.CONFIG])
        changed = side_files.changed(config, config_changes)
        files[side_files.CONFIG] = side_files.as_json(changed)
    return files


def _manifest(
    facts: Facts, checkpoints: Sequence[Checkpoint], files: Mapping[str, bytes]
) -> bytes:
    described = [
        describe(checkpoint, checksum)
        for checkpoint, checksum in zip(checkpoints, facts.input_checksums, strict=True)
    ]
    manifest = {
        "format": FORMAT,
        "recipe": facts.recipe,
        "seed": facts.seed,
        "ratios": facts.ratios and dict(facts.ratios),
        "base": described[0] if facts.base else None,
        "models": described[bool(facts.base) :][: len(facts.models)],
        "statistics": described[len(described) - len(facts.statistics) :],
        "measured": dict(facts.measured),
        **({"documents": list(facts.documents)} if facts.documents else {}),
        **{key: own for model in facts.models for key, own in model.built.items()},
        "tokenizer_from": facts.tokenizer_from,
        "notes": list(facts.notes),
        "versions": {
            "m3jax": m3jax.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
        },
        "checksum": CHECKSUM,
        "files": {
            name: xxhash.xxh3_128(content).hexdigest()
            for name, content in sorted(files.items())
        },
    }
    # A line for each tensor: thousands are written, and read, ten times as fast.
    tensors = [
        _json(name)
        + ": "
        + _json(
            {
                "file": shard.name,
                "dtype": entry.dtype.code,
                "shape": entry.shape,
                "checksum": facts.checksums[name],
            }
        )
        for shard in facts.shards
        for name, entry in shard.entries.items()
    ]
    text = json.dumps(manifest, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n  ".join(tensors)
    return f'{text},\n "tensors": {{\n  {lines}\n }}\n}}\n'.encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def describe(checkpoint: Checkpoint, checksum: str | None) -> dict[str, Any]:
    """What is recorded of an input."""
    return {
        "path": checkpoint.name,
        "revision": checkpoint.revision,
        "files": {file.path.name: file.size for file in checkpoint.files},
        "checksum": checksum,
    }
