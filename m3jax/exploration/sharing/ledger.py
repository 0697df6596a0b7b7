"""Who does which piece of a work that several workers share, and what came of it.

A ledger is read off a list of entries that all workers see in the same order, so that
all of them come to the same conclusions. An entry is of one claim:

    claim     a worker begins with a piece; void if the piece is done or held already
    done      with the piece's result; refused unless the claim still holds
    lost      the worker gave no sign of life; its piece is free again
    released  the worker gave the piece up; likewise
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

CLAIM, DONE, LOST, RELEASED = "claim", "done", "lost", "released"


class Entry(NamedTuple):
    """A line of a ledger.

    Attributes:
      kind: one of the four.
      piece: what is to be done, by name.
      claim: a name that no other claim has.
      worker: whose claim it is.
      result: of a piece that is done, JSON values.
    """

    kind: str
    piece: str
    claim: str
    worker: str
    result: Mapping[str, Any] | None = None


@dataclasses.dataclass
class Ledger:
    """What the entries say.

    Attributes:
      done: the entry with the result, by piece.
      held: the claim of every piece that somebody is at.
      lost: claims whose worker died; their pieces were begun once more.
      refused: results that came after their claim had been given up for lost.
    """

    done: dict[str, Entry] = dataclasses.field(default_factory=dict)
    held: dict[str, Entry] = dataclasses.field(default_factory=dict)
    lost: list[Entry] = dataclasses.field(default_factory=list)
    refused: list[Entry] = dataclasses.field(default_factory=list)

    def add(self, entries: Iterable[Entry]) -> None:
        """Reads on."""
        for entry in entries:
            piece = entry.piece
            holds = piece in self.held and self.held[piece].claim == entry.claim
            if entry.kind == CLAIM:
                if piece not in self.done:
                    self.held.setdefault(piece, entry)
            elif not holds:
                if entry.kind == DONE:
                    self.refused.append(entry)
            else:
                del self.held[piece]
                if entry.kind == DONE:
                    self.done[piece] = entry
                elif entry.kind == LOST:
                    self.lost.append(entry)

    def holds(self, entry: Entry) -> bool:
        """Whether a claim is the one that holds."""
        held = self.held.get(entry.piece)
        return held is not None and held.claim == entry.claim
