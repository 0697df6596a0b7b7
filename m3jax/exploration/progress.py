"""How far a search is: the best so far, and about how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from m3jax.exploration.search.trials import Trial, best


class Progress:
    """Follows the trials of a search.

    Trials at different budgets are not compared: the best is one of the latest
    trial's budget.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """`clock` gives seconds."""
        self._clock = clock
        self._best: dict[int | None, Trial] = {}
        self._first: float | None = None
        self._since = 0

    def add(self, trial: Trial, *, recorded: bool) -> None:
        """Takes note of a trial; one that an earlier run recorded took no time."""
        known = self._best.get(trial.budget)
        self._best[trial.budget] = (
            trial if known is None else best([known, trial], 1)[0]
        )
        if recorded:
            return
        if self._first is None:  # it has compiled; the time of others counts from here
            self._first = self._clock()
        else:
            self._since += 1

    def text(self, trial: Trial, left: int | None) -> str:
        """What is to be said behind a trial.

        Args:
          trial: the latest one.
          left: how many are left; None: unknown.
        """
        found = self._best[trial.budget]
        scores = list(found.scores.values())
        value = scores[0] if len(scores) == 1 else found.objective
        told = f"best so far draw {found.index} ({value:.4f})"
        if left and self._since and self._first is not None:
            seconds = (self._clock() - self._first) / self._since * left
            told += f", about {duration(seconds)} left"
        return told


def duration(seconds: float) -> str:
    """As people say it: ``8 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
