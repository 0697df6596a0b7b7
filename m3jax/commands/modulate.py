"""Makes a task's model of what EMR-Merging wrote.

FOLDER is an output of `m3jax merge --config.method=emr`: the unified model, a file of
masks for each task, and their scales. The task's model is θ0 + λ M ⊙ τ, with θ0 the
base that the merge read, which has to be there still.
"""

from __future__ import annotations

from m3jax.commands import process
from m3jax.commands.cli import UsageError, define

USAGE = "m3jax modulate FOLDER --task=NAME [--output=DIR]"
TAKES = (1, "one folder")

_TASK = define(
    "task", str, "A model that was merged: the last part of its path, or its number."
)
_OUTPUT = define("output", str, "The folder to make. [FOLDER-NAME]")
_BASE = define("base", str, "The base model. [where the merge read it]")
_UNMERGED_FROM = define(
    "unmerged_from",
    str,
    "A model that gives what was excluded from the merge, such as a head. [the folder, "
    "which has the task's own]",
)


def main(positional: list[str]) -> int:
    if _TASK.value is None:
        raise UsageError(f"needs --task; usage: {USAGE}")
    process.leave_at_once()
    from m3jax import modulation  # only now JAX

    (folder,) = positional
    output = _OUTPUT.value or f"{folder.rstrip('/')}-{_TASK.value}"
    made = modulation.write(
        folder,
        _TASK.value,
        output,
        base=_BASE.value,
        unmerged_from=_UNMERGED_FROM.value,
    )
    print(f"output     {made}")
    return 0
