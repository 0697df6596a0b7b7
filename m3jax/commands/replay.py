"""A merge once more, by its m3jax.json: which inputs those were, and whether it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.places import hub


def pinned(record: Mapping[str, Any]) -> dict[str, str]:
    """Of inputs from the hub, by their names: the name of the commit that was read."""
    found = {}
    for own in _inputs(record):
        head = str(own.get("path")).partition("+")[0]
        repository, revision = hub.repository(head), own.get("revision")
        if repository and isinstance(revision, str):
            found[head] = f"{repository}@{revision}"
    return found


def check_there(source: str, record: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a recorded input is a path that leads nowhere."""
    if "versions" not in record:  # no record, but a recipe that names its models
        return
    made = {str(own.get("path")) for own in record.get("documents", ())}
    for own in _inputs(record) if "moe" not in record else ():
        for path in str(own.get("path")).split("+"):
            known = path in made or hub.repository(path) or "://" in path
            if not known and not hub.is_here(path):
                raise CheckpointError(
                    f"{path}: no such file or folder, as --config={source} names it; "
                    "--base and --models say where its inputs are now"
                )


def differing(record: Mapping[str, Any], checksums: Mapping[str, str]) -> str | None:
    """What to say if tensors are not those that a record has; None if all are."""
    recorded = record.get("tensors")
    if not isinstance(recorded, dict):
        return None
    theirs = {name: dict(own).get("checksum") for name, own in recorded.items()}
    names = sorted({*theirs, *checksums})
    other = [name for name in names if theirs.get(name) != checksums.get(name)]
    if not other:
        return None
    return (
        f"{len(other)} of {len(names)} tensors are not those of the record, such as "
        f"{shown(other[0])}: its inputs, versions or hardware were others"
    )


def _inputs(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    base, models = record.get("base"), record.get("models", ())
    yield from [base] if base else []
    yield from models
    yield from record.get("statistics", ())
