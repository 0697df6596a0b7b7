"""Merges that feed each other, from files to files; see `m3jax.recipe.documents`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.output.destination import open_output, open_writer
from m3jax.checkpoints.output.folder import MANIFEST, work_folder
from m3jax.checkpoints.output.shards import write_index
from m3jax.checkpoints.record import provenance
from m3jax.engine.execution import Execution
from m3jax.engine.journal import fingerprint
from m3jax.engine.merge import merge
from m3jax.engine.prepare import prepare
from m3jax.engine.prepared import Prepared
from m3jax.engine.progress import Progress
from m3jax.recipe.documents import Document


def merge_named(
    documents: Sequence[Document],
    folder: Path,
    *,
    seed: int,
    execution: Execution,
    progress: Progress,
) -> dict[str, str]:
    """Merges the documents that others need; those that are finished stay.

    A finished one is known by a digest of its recipe, seed and inputs beside it; one
    that was interrupted goes on.

    Args:
      documents: with names, in order.
      folder: which gets a checkpoint for each.
      seed: of the whole; see `Document.seeded`.
      execution: how to run them.
      progress: is told what happens.

    Returns:
      The path of each, by its name.

    Raises:
      CheckpointError, RecipeError, OSError: as `merge`; an input is missing.
    """
    check_inputs(documents)
    paths: dict[str, str] = {}
    for own in documents:
        assert own.name is not None
        output, digest_file = folder / own.name, folder / f"{own.name}.json"
        given, own_seed = own.renamed(paths), own.seeded(seed)
        own_execution = _execution(execution, output)
        with prepare(
            given.base, given.models, given.recipe, own_seed, own_execution
        ) as prepared:
            digest = {"fingerprint": fingerprint(prepared)}
        paths[own.name] = str(output)
        if _is_finished(output, digest_file, digest):
            progress.note(f"{own.name}: finished before, and kept in {output}")
            continue
        progress.note(f"{own.name}: goes to {output}")
        merge(
            given.base,
            given.models,
            output,
            given.recipe,
            seed=own_seed,
            execution=own_execution,
            progress=progress,
        )
        digest_file.write_text(json.dumps(digest))
    return paths


def planned(
    documents: Sequence[Document], folder: Path, *, seed: int, execution: Execution
) -> Iterator[tuple[Document, Prepared]]:
    """Plans documents that others need, without merging them.

    Args:
      documents: in order; all but the last one have a name.
      folder: which gets, for each with a name, what a plan looks at: files that have
        headers, sizes and no elements, so that they take no room, and side files.
      seed, execution: of the whole.

    Yields:
      Each document, with those before it as its inputs, and its plan.

    Raises:
      CheckpointError, RecipeError, OSError: as `prepare`; an input is missing.
    """
    check_inputs(documents)
    paths: dict[str, str] = {}
    for own in documents:
        given, own_execution = own.renamed(paths), execution
        if own.name is not None:
            paths[own.name] = str(folder / own.name)
            own_execution = _execution(execution, folder / own.name)
        with prepare(
            given.base, given.models, given.recipe, own.seeded(seed), own_execution
        ) as prepared:
            yield given, prepared
            if own.name is not None:
                _outline(prepared, folder / own.name)


def _outline(prepared: Prepared, output: Path) -> None:
    """Writes all of an output but its elements."""
    with open_output(output, overwrite=False, resume=False) as folder:
        open_writer(folder, prepared.shards).close()
        write_index(folder, prepared.shards)
        files = provenance.side_files_of(
            prepared.side_files, prepared.other_files, prepared.inputs.config
        )
        for name, content in files.items():
            folder.write(name, content)
        folder.commit(fsync=False)


def _execution(execution: Execution, output: Path) -> Execution:
    """How a document with a name is run."""
    return dataclasses.replace(
        execution,
        overwrite=True,
        resume=work_folder(output).exists(),
        tokenizer_from=None,
    )


def check_inputs(documents: Sequence[Document]) -> None:
    """Raises CheckpointError if a checkpoint that some document needs is missing."""
    names = {own.name for own in documents}
    for own in documents:
        for reference in own.inputs:
            if reference.partition("+")[0] not in names:
                try:
                    open_checkpoint(reference).close()
                except (CheckpointError, OSError) as error:
                    known = ", ".join(sorted(name for name in names if name))
                    raise CheckpointError(
                        f"{error}; and no document has that name: there are {known}"
                    ) from None


def _is_finished(output: Path, digest_file: Path, digest: dict[str, Any]) -> bool:
    if not (output / MANIFEST).is_file() or not digest_file.is_file():
        return False
    try:
        return bool(json.loads(digest_file.read_text()) == digest)
    except (OSError, ValueError):
        return False
