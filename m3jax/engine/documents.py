"""Merges that feed each other, from files to files; see `m3jax.recipe.documents`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.output.folder import MANIFEST, work_folder
from m3jax.engine.journal import fingerprint
from m3jax.engine.merge import merge
from m3jax.engine.prepare import Execution, prepare
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
      seed: of those that have none of their own.
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
        given = own.renamed(paths)
        own_seed = seed if own.seed is None else own.seed
        own_execution = dataclasses.replace(
            execution,
            overwrite=True,
            resume=work_folder(output).exists(),
            tokenizer_from=None,
        )
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


def _is_finished(output: Path, digest_file: Path, digest: dict[str, str]) -> bool:
    if not (output / MANIFEST).is_file() or not digest_file.is_file():
        return False
    try:
        return bool(json.loads(digest_file.read_text()) == digest)
    except (OSError, ValueError):
        return False
