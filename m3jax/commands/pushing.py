"""Pushes what a command has written to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from m3jax.commands.cli import UsageError, define
from m3jax.commands.tables import say

if TYPE_CHECKING:
    from m3jax.checkpoints.output.push import Repository

GROUPS = {"Hugging Face hub": ("push_to", "private")}
_PUSH_TO = define(
    "push_to",
    str,
    "org/name[@branch] of the Hugging Face hub, where the output then goes, too. The "
    "token is that of `hf auth login` or HF_TOKEN.",
)
_PRIVATE = define("private", bool, "A repository that --push_to makes is private.")


def asked(output: str | None, *, overwrite: bool) -> Repository | None:
    """Where to push to, if anywhere; asks the hub whether that may be, before any work.

    Args:
      output: the folder that will be pushed.
      overwrite: whether there may be a model already.

    Raises:
      UsageError, CheckpointError, OSError: one line each.
    """
    if _PUSH_TO.value is None:
        if _PRIVATE.value:
            raise UsageError("--private is of --push_to, which is missing")
        return None
    from m3jax.checkpoints.output import push
    from m3jax.checkpoints.places import store

    try:
        to = push.parse(_PUSH_TO.value)
    except ValueError as error:
        raise UsageError(f"--push_to={error}") from None
    if output is not None and not isinstance(store.parse(output), Path):
        raise UsageError(
            f"--push_to={to} needs an --output on this machine, not {output}"
        )
    push.check_free(to, overwrite=overwrite)
    return to


def push(output: Path, to: Repository) -> str:
    """Pushes a complete output, and returns its address.

    Raises:
      CheckpointError, OSError: one line, with a note that says what is not lost.
    """
    from m3jax.checkpoints.output import push

    say(f"pushing to {to}")
    try:
        return push.push(output, to, private=_PRIVATE.value)
    except BaseException as error:
        error.add_note(
            f"{output} is complete; the same command with --resume pushes it"
        )
        raise
