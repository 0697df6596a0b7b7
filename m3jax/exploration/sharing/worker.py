"""One search by several processes: each piece of its work is done by one of them.

All of them run the same search, which is a function of its seed and of what it was
sent; so they ask for the same pieces, and end with the same trials. Who does a piece
follows from the ledger, which they share. A worker that gives no sign of life loses its
claims, which are counted, and others begin with its pieces anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from m3jax.exploration.search.places import in_order
from m3jax.exploration.sharing.ledger import CLAIM, DONE, LOST, RELEASED, Entry, Ledger
from m3jax.exploration.sharing.storage import Storage
from m3jax.runs.log import Line, compare

T = TypeVar("T")
L = TypeVar("L")

BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a worker counts as dead
_HEADER = "header"
POLL = 0.5  # seconds until a worker looks again what the others have done


class Worker:
    """One process of several at a search. Use as a context manager.

    Attributes:
      name: of this process.
    """

    def __init__(self, storage: Storage, say: Callable[[str], None]):
        """`say` is told of workers that died."""
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
        self._storage, self._say = storage, say
        self._ledger = Ledger()
        self._open: dict[str, Entry] = {}
        self._heard: dict[str, tuple[int | None, float]] = {}
        self._lock = threading.Lock()
        self._leaving = threading.Event()
        self._beating = threading.Thread(
            target=self._beat, name="m3jax-beat", daemon=True
        )

    def agree(self, header: Line) -> None:
        """Raises CheckpointError if the search was begun with another header."""
        header = json.loads(json.dumps(header))  # tuples become lists
        ((found, _),) = self.each({_HEADER: header}, lambda own, _: own, [None])
        compare(self._storage.place, found, header, "study")

    def each(
        self, items: Mapping[str, T], work: Callable[[T, L], Line], places: Sequence[L]
    ) -> Generator[tuple[Line, bool]]:
        """Yields what the work gives for each item, in their order, whoever does it.

        Args:
          items: by the name of the piece.
          work: gives JSON values.
          places: of this process; a place has one piece at a time.

        Yields:
          What came of a piece, and whether this process has done it.
        """
        left = dict(items)

        def do(name: str, place: L) -> None:
            claim = self._take(name)
            if claim is None:
                return
            self._open[name] = claim
            result = work(items[name], place)
            self._storage.append(claim._replace(kind=DONE, result=result))
            del self._open[name]

        def ready() -> Iterator[tuple[Line, bool]]:
            done = self._look().done
            while (name := next(iter(left), None)) is not None and name in done:
                del left[name]
                found = done[name]
                yield dict(found.result or {}), found.worker == self.name

        while True:
            yield from ready()
            if not left:
                return
            free = [name for name in left if self._is_free(name)]
            if not free:
                time.sleep(POLL)
                continue
            with contextlib.closing(in_order(do, free, places)) as found:
                for _ in found:
                    yield from ready()

    def summary(self) -> str:
        """Who did how much, and what was begun more than once."""
        ledger = self._look()
        done = [own for own in ledger.done.values() if own.piece != _HEADER]
        here = sum(own.worker == self.name for own in done)
        text = f"{here} of {len(done)} evaluations were done by this process"
        if ledger.lost:
            names = ", ".join(own.piece for own in ledger.lost)
            text += f"; begun by workers that died, and done again: {names}"
        if ledger.refused:
            names = ", ".join(own.piece for own in ledger.refused)
            text += f"; done twice, by workers that were thought dead: {names}"
        return text

    def _look(self) -> Ledger:
        """The ledger as it is now."""
        with self._lock:
            self._ledger.add(self._storage.new())
            now = time.monotonic()
            for worker, beat in self._storage.beats().items():
                if self._heard.get(worker, (None,))[0] != beat:
                    self._heard[worker] = beat, now
            return self._ledger

    def _is_free(self, piece: str) -> bool:
        """Whether nobody who lives has done it or is at it, as far as we know."""
        if piece in self._ledger.done:
            return False
        held = self._ledger.held.get(piece)
        return held is None or self._is_dead(held.worker)

    def _is_dead(self, worker: str) -> bool:
        now = time.monotonic()
        _, heard = self._heard.setdefault(worker, (None, now))
        return worker != self.name and now - heard > SILENCE

    def _take(self, piece: str) -> Entry | None:
        """A claim of ours that holds; None if somebody else has the piece."""
        ledger = self._look()
        if not self._is_free(piece):
            return None
        held = ledger.held.get(piece)
        if held is not None:
            self._storage.append(held._replace(kind=LOST))
        own = Entry(CLAIM, piece, uuid.uuid4().hex, self.name)
        self._storage.append(own)
        if not self._look().holds(own):
            return None  # another one was faster
        if held is not None:
            self._say(
                f"{piece} is done again: {held.worker} had begun it, and has given no "
                f"sign of life for {SILENCE:.0f} s"
            )
        return own

    def _beat(self) -> None:
        count = 0
        while True:
            # What is wrong with the storage, those who need it will say.
            with contextlib.suppress(Exception):
                self._storage.beat(self.name, count)
            if self._leaving.wait(BEAT):
                return
            count += 1

    def __enter__(self) -> Worker:
        self._beating.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._leaving.set()
        self._beating.join()
        for claim in list(self._open.values()):
            with contextlib.suppress(Exception):  # then they count as lost
                self._storage.append(claim._replace(kind=RELEASED))
