"""Tensors that some of the checkpoints lack: an error, the base's, or left out."""

from __future__ import annotations

from collections.abc import Callable

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.naming.table import Table, counted

HINT = (
    "--config.unmatched=base keeps the base's and passes over what it lacks, skip "
    "leaves them out; --rename=REGEX=REPLACEMENT brings other names to the base's"
)


def settle(
    checkpoints: list[Checkpoint],
    tables: list[Table],
    policy: str,
    excluded: Callable[[str], bool],
    problems: list[str],
    notes: list[str],
) -> tuple[list[str], frozenset[str]]:
    """The output's tensors, of those that the tables hold.

    Args:
      checkpoints, tables: the first's names are the output's. Where the policy is
        ``base``, a model that lacks a tensor gets the base's.
      policy: ``error``, ``base`` or ``skip``.
      excluded: tensors of the first that need not be anywhere else.
      problems, notes: get a line for each tensor, or one for all.

    Returns:
      Names, in order, and those that are the first's because no model has them.
    """
    names = []
    kept: list[str] = []
    lent: list[str] = []
    left: list[str] = []
    for name in sorted(set().union(*tables)):
        without = [i for i, table in enumerate(tables) if name not in table]
        if not without or (excluded(name) and name in tables[0]):
            names.append(name)
        elif excluded(name):
            continue
        elif policy == "error":
            lacking = ", ".join(checkpoints[i].name for i in without)
            problems.append(f"tensor {shown(name)} is missing in {lacking}")
        elif policy == "skip" or 0 in without:
            left.append(name)
        else:
            names.append(name)
            alone = len(without) == len(tables) - 1
            (kept if alone else lent).append(name)
            for i in without if not alone else ():
                tables[i][name] = tables[0][name]
    first = checkpoints[0].name
    if kept:
        notes.append(f"no model has {counted(kept)}: as in {first}")
    if lent:
        notes.append(f"some models lack {counted(lent)}: theirs count as {first}'s")
    if left:
        notes.append(f"not in the output: {counted(left)}, which some lack")
    return names, frozenset(kept)
