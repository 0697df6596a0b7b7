"""Joins the processes that are at one exploration together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from os import PathLike, fspath
from pathlib import Path

from m3jax.checkpoints.errors import CheckpointError
from m3jax.engine.processes import Processes
from m3jax.exploration.report.folder import STUDY
from m3jax.exploration.sharing.storage import Storage, is_url
from m3jax.exploration.sharing.worker import Worker


@contextlib.contextmanager
def shared(
    study: str | PathLike[str] | None,
    output: Path | None,
    team: Processes,
    say: Callable[[str], None],
) -> Iterator[Worker | None]:
    """This process as one of several; None if it is alone.

    Args:
      study: that was asked for. Without one there is one in the output if the processes
        are several of `jax.distributed`, or if such processes have left it there.
      output: of the exploration.
      team: of `jax.distributed`.
      say: is told what becomes of the others.

    Raises:
      RecipeError, CheckpointError: as `Storage` does; or a process of the team does not
        see what the first one has begun.
    """
    own = None if output is None else output / STUDY
    if study is None and own is not None and (team.count > 1 or own.exists()):
        study = own
    if study is None:
        yield None
        return
    place = fspath(study)

    def opened() -> Storage:
        if not (team.first or is_url(place) or Path(place).exists()):
            raise CheckpointError(
                f"{place}: process {team.index} does not see what process 0 has begun "
                "there; choose a folder that all processes see, or a database's URL as "
                "--study"
            )
        return Storage(place)

    storage = team.first_then_others(opened)
    with Worker(storage, say) as worker:
        say(f"sharing the evaluations with all who name the study {storage.place}")
        yield worker
        say(worker.summary())
