"""The storage in which several processes keep the ledger of one search.

It is one of optuna's: a journal file on a disk that all of them see, NFS too, or a
database. Every entry is one of optuna's trials, whose numbers give the order; those of
results have the objective as their value.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.exploration.search.samplers import import_optuna
from m3jax.exploration.sharing.ledger import DONE, Entry

_NAME = "m3jax"  # of the study, unless the place says otherwise
_PART = 1 << 14  # characters; a text of a database may end at 65,535 bytes


class Storage:
    """Entries that all processes see in one order, and their signs of life.

    Attributes:
      place: without passwords, for people.
    """

    def __init__(self, place: str):
        """Opens a storage, or begins it.

        Args:
          place: the path of a journal file; or the URL of a database, where a name
            behind ``#`` tells several searches apart.

        Raises:
          RecipeError: optuna is missing.
          CheckpointError: there is no storage, and none can be made.
        """
        self._optuna = optuna = import_optuna("a shared study")
        url, _, name = place.partition("#") if is_url(place) else (place, "", "")
        self.place = _shown(url)
        with self._explained("cannot be opened as a study"):
            if is_url(url):
                storage: Any = url
            else:
                storage = optuna.storages.JournalStorage(_journal(url))
            self._study = optuna.create_study(
                storage=storage,
                study_name=name or _NAME,
                direction="maximize",
                load_if_exists=True,
            )
        self._read = 0

    def new(self) -> list[Entry]:
        """The entries since the last call."""
        with self._explained("cannot be read"):
            trials = self._study.get_trials(deepcopy=False)
        found = sorted(trials, key=lambda own: own.number)[self._read :]
        self._read += len(found)
        return [_entry(own.user_attrs) for own in found]

    def append(self, entry: Entry) -> None:
        """Adds an entry behind all others; it stays when this process dies."""
        text = json.dumps(entry._asdict(), allow_nan=False)
        starts = range(0, len(text), _PART)
        parts = {f"entry {i}": text[s : s + _PART] for i, s in enumerate(starts)}
        value = _value(entry)
        states = self._optuna.trial.TrialState
        trial = self._optuna.trial.create_trial(
            state=states.PRUNED if value is None else states.COMPLETE,
            value=value,
            user_attrs=parts,
        )
        with self._explained("cannot be written to"):
            self._study.add_trial(trial)

    def beat(self, worker: str, count: int) -> None:
        """Gives a sign of life."""
        self._study.set_user_attr(f"beat {worker}", count)

    def beats(self) -> dict[str, int]:
        """The last one of every worker."""
        with self._explained("cannot be read"):
            found = self._study.user_attrs
        return {
            name.removeprefix("beat "): count
            for name, count in found.items()
            if name.startswith("beat ")
        }

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Errors of optuna's, JSON's and a database's driver's, in one line."""
        try:
            yield
        except OSError:
            raise  # names its file
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self.place}: {what}: {why[:200]}") from error


def is_url(place: str) -> bool:
    """Whether it is a database's URL rather than a path."""
    return "://" in place


def _entry(parts: Mapping[str, str]) -> Entry:
    text = "".join(parts[f"entry {i}"] for i in range(len(parts)))
    return Entry(**json.loads(text))


def _value(entry: Entry) -> float | None:
    """The objective, of a trial that has a finite one."""
    if entry.kind != DONE or entry.result is None:
        return None
    value = entry.result.get("trial", {}).get("objective")
    return value if isinstance(value, float) and math.isfinite(value) else None


def _journal(path: str) -> Any:
    """A journal file whose last line may be torn: its writer died."""
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(path)

    class Journal(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
            lock.acquire()
            try:
                with Path(path).open("r+b") as file:
                    file.seek(_whole(file))
                    file.truncate()
                    file.write("".join(lines).encode())
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                lock.release()

    return Journal(path, lock)


def _whole(file: Any) -> int:
    """The bytes of a file up to its last newline."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def _shown(url: str) -> str:
    if not is_url(url):
        return url
    from sqlalchemy import make_url

    return make_url(url).render_as_string(hide_password=True)
