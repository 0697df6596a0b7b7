"""The user's own rules of renaming: a regular expression and what replaces it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.naming.table import Table, counted
from m3jax.checkpoints.source import Source


def apply(
    table: Mapping[str, Source], wanted: Collection[str], rules: Sequence[str]
) -> tuple[Table, list[str], set[str]]:
    """Renames the tensors that the first checkpoint does not have.

    Args:
      table: of a model.
      wanted: the first checkpoint's names, which stay as they are.
      rules: ``REGEX=REPLACEMENT`` each, for `re.sub`, in this order.

    Returns:
      The table, what was done, and the rules that matched.

    Raises:
      CheckpointError: two tensors would have one name.
    """
    made: Table = {}
    used: set[str] = set()
    moved: list[str] = []
    for name, source in table.items():
        new = name
        for rule in rules if name not in wanted else ():
            pattern, _, replacement = rule.rpartition("=")
            new, count = re.subn(pattern, replacement, new)
            used |= {rule} if count else set()
        if new in made or (new != name and new in table and new in wanted):
            raise CheckpointError(
                f"rename makes {shown(new)} of {shown(name)}, which is there already; "
                "give a rule that matches less"
            )
        made[new] = source
        moved += [f"{name} = {new}"] * (new != name)
    return made, [f"rename: {counted(moved)}"] if moved else [], used
