"""Whether an output is there already, complete: what `--resume` then has left to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import m3jax
from m3jax.checkpoints.output.folder import MANIFEST, OutputError
from m3jax.checkpoints.places.files import Location, exists
from m3jax.checkpoints.record import provenance
from m3jax.checkpoints.record.record import Record, TensorRecord, read_record
from m3jax.engine.prepared import Prepared


def is_complete(final: Location) -> bool:
    """Whether a folder of this machine holds the record of a merge.

    A store is not asked: how old an input is beside what lies there, nobody can say.
    """
    return isinstance(final, Path) and exists(final / MANIFEST)


def record_of(final: Path, prepared: Prepared) -> Record:
    """The record of an output that is what this merge would make.

    Inputs count by what is recorded of them, and by their time of change, as `make`
    has it: reading them again would take as long as merging them.

    Raises:
      OutputError: it is another merge's; the message says in what.
    """
    record = read_record(final)
    assert record is not None
    if different := next(_differences(final, record, prepared), None):
        raise OutputError(
            f"{final}: exists already, and is not what this merge would make: "
            f"{different}; pass --overwrite to replace it"
        )
    return record


def _differences(final: Path, record: Record, prepared: Prepared) -> Iterator[str]:
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    for name, own in {"m3jax": m3jax.__version__, **versions}.items():
        if record.versions.get(name) != own:
            yield f"{name} was {record.versions.get(name)}, and is {own}"
    if record.seed != prepared.seed:
        yield f"its seed is {record.seed}, not {prepared.seed}"
    if record.recipe != json.loads(json.dumps(prepared.recipe.to_dict())):
        yield "its recipe is another one"
    if record.tokenizer_from != prepared.execution.tokenizer_from:
        yield "it has another model's tokenizer"
    inputs = [*([record.base] if record.base else []), *record.models]
    inputs += record.statistics
    theirs = [{**own, "checksum": None} for own in inputs]
    if theirs != [provenance.describe(own, None) for own in prepared.checkpoints]:
        yield "its base or models are others"
    if any(model.built for model in prepared.models):
        yield "it may be of other experts"
    yield from _files(final, record, prepared)


def _files(final: Path, record: Record, prepared: Prepared) -> Iterator[str]:
    made = (final / MANIFEST).stat().st_mtime_ns
    for checkpoint in prepared.checkpoints:
        for file in checkpoint.files:
            if not isinstance(file.version, int) or file.version > made:
                yield f"{file.path} may have changed since"
    expected: dict[str, Any] = {
        name: (shard.name, entry.dtype.code, tuple(entry.shape))
        for shard in prepared.shards
        for name, entry in shard.entries.items()
    }
    if expected != {name: _place(own) for name, own in record.tensors.items()}:
        yield "its tensors are others"
    for shard in prepared.shards:
        for name, size, _ in shard.files():
            path = final / name
            if not path.is_file() or path.stat().st_size != size:
                yield f"its file {name} is missing or has another size"


def _place(tensor: TensorRecord) -> tuple[str, str, tuple[int, ...]]:
    return tensor.file, tensor.dtype, tensor.shape
