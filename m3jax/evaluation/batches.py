"""Groups token sequences of like length into batches of few shapes. Integers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_SHORTEST = 16  # slots; below it nothing is gained
_FEWEST = 8  # rows, so that small budgets share a shape


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences that are run together.

    Attributes:
      members: their indices; the rows behind them are padding.
      rows, slots: the shape.
    """

    members: tuple[int, ...]
    rows: int
    slots: int


def plan_batches(
    lengths: Sequence[int], tokens_per_batch: int, extra: int = 0
) -> list[Batch]:
    """Batches of every sequence once, long ones first.

    Shapes are powers of two, and one and a half times those: few, because each is a
    compilation, and little of them is padding. Long batches come first, so that a
    lack of memory shows at once.

    Args:
      lengths: tokens of each sequence.
      tokens_per_batch: bound of rows × (slots + extra), unless one row exceeds it.
      extra: slots that each row needs beside its own.
    """
    by_slots: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_slots.setdefault(_round_up(max(length, _SHORTEST)), []).append(i)
    batches = []
    for slots, members in sorted(by_slots.items(), reverse=True):
        most = 1 << (max(1, tokens_per_batch // (slots + extra)).bit_length() - 1)
        rows = min(most, max(_FEWEST, 1 << (len(members) - 1).bit_length()))
        for start in range(0, len(members), rows):
            part = tuple(members[start : start + rows])
            batches.append(Batch(part, rows, slots))
    return batches


def pad(
    sequences: Sequence[Sequence[int]], batch: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, slots) int32, padded on the right by 0, and which are valid."""
    tokens = np.zeros((batch.rows, batch.slots), np.int32)
    valid = np.zeros((batch.rows, batch.slots), bool)
    for row, member in enumerate(batch.members):
        sequence = sequences[member]
        tokens[row, : len(sequence)] = sequence
        valid[row, : len(sequence)] = True
    return tokens, valid


def _round_up(length: int) -> int:
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power
