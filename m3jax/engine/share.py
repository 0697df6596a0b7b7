"""What each of several processes does of a merge.

Tensors are the unit: a process merges whole tensors, and in the reading passes before
that it measures the same ones, so that what it reads again is in its own memory. The
tensors of a process follow each other in the output's files. Files are kept whole
where they can be shared out evenly, and cut between tensors where there are too few.
"""

from __future__ import annotations

import dataclasses
import itertools

from m3jax.engine import plan
from m3jax.engine.prepared import Prepared
from m3jax.engine.processes import Processes

# How much longer than necessary the slowest process may take for whole files' sake.
_UNEVEN = 1.25


@dataclasses.dataclass(frozen=True)
class Share:
    """One process's part of a merge.

    Attributes:
      processes: all of them.
      items: positions of the tensors that are this process's.
    """

    processes: Processes
    items: range

    @classmethod
    def of(cls, prepared: Prepared, processes: Processes) -> Share:
        shares = share_out(prepared, processes.count)
        return cls(processes, shares[processes.index])


def share_out(prepared: Prepared, count: int) -> list[range]:
    """The tensors of each of `count` processes, about equal in bytes."""
    if count == 1:
        return [range(len(prepared.items))]
    sizes = [
        prepared.read_bytes([i]) + tensor.written_bytes
        for i, tensor in enumerate(prepared.inputs.tensors)
    ]
    by_tensor = plan.share_out(sizes, count)
    places = tuple(prepared.places[i, ""] for i in range(len(prepared.items)))
    by_file = _whole_files(sizes, places, count)
    slowest = [
        max(sum(sizes[i] for i in run) for run in shares)
        for shares in (by_file, by_tensor)
    ]
    return by_file if slowest[0] <= _UNEVEN * slowest[1] else by_tensor


def _whole_files(sizes: list[int], places: tuple[int, ...], count: int) -> list[range]:
    """Shares that do not cut a file; `places` is the file of each tensor, in order."""
    files = [
        list(group)
        for _, group in itertools.groupby(range(len(sizes)), places.__getitem__)
    ]
    ends = [0, *(group[-1] + 1 for group in files)]
    runs = plan.share_out([sum(sizes[i] for i in group) for group in files], count)
    return [range(ends[run.start], ends[run.stop]) for run in runs]
