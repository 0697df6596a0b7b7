"""Which row of which checkpoint belongs to which token of an output's vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from m3jax.checkpoints.source import Source
from m3jax.checkpoints.sources.token_rows import TokenRows


@dataclasses.dataclass(frozen=True)
class Row:
    """Where the row of a token comes from that its models lack.

    Attributes:
      donor: number of the checkpoint; None: the row is 0.
      row: there.
      force: also in models that have the token.
    """

    donor: int | None
    row: int
    force: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
    """The rows of D checkpoints, brought to the order of one vocabulary.

    Attributes:
      own: (D, R) the row of each token in each checkpoint, −1 where it has none.
      default: (D, R) the rows whose mean a checkpoint gets that lacks the token.
      filled: (R,) rows without a token, or of tokens that nobody has: a checkpoint's
        mean row.
      forced: (R,) where even those that have the token get the default.
    """

    own: np.ndarray
    default: np.ndarray
    filled: np.ndarray
    forced: np.ndarray

    @property
    def digest(self) -> str:
        """Of all that decides which rows are read."""
        found = hashlib.sha256()
        for array in (self.own, self.default, self.filled, self.forced):
            found.update(array.tobytes())
        return found.hexdigest()

    def fit(self, which: int, sources: Sequence[Source]) -> TokenRows:
        """The tensor of checkpoint `which`, given that of every checkpoint."""
        return TokenRows(
            tuple(sources),
            self._tables[which],
            self.filled,
            sources[which].output_dtype,
        )

    @functools.cached_property
    def _tables(self) -> list[np.ndarray]:
        tables = []
        for which, own in enumerate(np.where(self.forced, np.int32(-1), self.own)):
            table = np.where(own >= 0, np.int32(-1), self.default)
            table[which] = np.where(own >= 0, own, table[which])
            tables.append(table)
        return tables


def align(
    tokens: Sequence[str | None],
    rows: int,
    ids: Sequence[Mapping[str, int]],
    sizes: Sequence[int],
    preferred: Sequence[int],
    given: Mapping[int, Row],
) -> Alignment:
    """Finds the rows of each token.

    Args:
      tokens: of the output, by id; None where an id has none.
      rows: of the output, at least as many.
      ids: of each checkpoint's tokens.
      sizes: rows that each checkpoint has; ids beyond have none.
      preferred: checkpoints whose row a token gets where it is missing, if they have
        it: the first of them counts. Where none has it, the mean of those that do.
      given: what is said of single tokens, by id in the output.
    """
    own = np.full((len(ids), rows), -1, np.int32)
    for d, (vocabulary, size) in enumerate(zip(ids, sizes, strict=True)):
        found = map(vocabulary.get, tokens, itertools.repeat(-1))  # type: ignore[arg-type]
        own[d, : len(tokens)] = np.fromiter(found, np.int32, len(tokens))
        own[d, own[d] >= size] = -1
    default = own.copy()
    for d in reversed(preferred):
        alone = np.full_like(own, -1)
        alone[d] = own[d]
        default = np.where(own[d] >= 0, alone, default)
    filled = np.asarray((own < 0).all(axis=0))
    forced = np.zeros(rows, bool)
    for place, row in given.items():
        default[:, place] = -1
        filled[place] = False
        forced[place] = row.force
        if row.donor is not None:
            default[row.donor, place] = row.row
    return Alignment(own, default, filled, forced)
