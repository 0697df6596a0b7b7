"""What an exploration found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from m3jax.exploration.search.scoring import Objective, Scored
from m3jax.exploration.search.trials import Trial


@dataclasses.dataclass(frozen=True)
class Row:
    """One set of parameters that the draws are compared with, or their winner.

    Attributes:
      name: of a parent, ``equal ratios``, ``plain METHOD`` or ``winner (draw N)``.
      kind: ``parent``, ``baseline`` or ``winner``.
      scored: on each list of tasks: ``validation``, and ``test`` and ``ood`` if given.
    """

    name: str
    kind: str
    scored: Mapping[str, Scored]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        lists = {name: own.to_dict() for name, own in self.scored.items()}
        return {"row": self.name, "kind": self.kind, "lists": lists}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Row:
        lists = {name: Scored.from_dict(own) for name, own in line["lists"].items()}
        return cls(line["row"], line["kind"], lists)


@dataclasses.dataclass(frozen=True)
class Exploration:
    """The trials of an exploration and what they are compared with.

    Attributes:
      trials: in the order in which they were run; with successive halving a draw
        that was kept has one for each budget.
      winner: the trial of highest objective on validation at the full budget.
      rows: parents (the base first, if there is one), baselines and the winner.
      objective: of scores on validation tasks.
      models: names of the models, in the order of the ratios.
      seed: of the exploration.
      statistics: that the winner's method reads beside the models, of each.
      replay: what `m3jax merge --config` needs to make the winner again.
    """

    trials: tuple[Trial, ...]
    winner: Trial
    rows: tuple[Row, ...]
    objective: Objective
    models: tuple[str, ...]
    seed: int
    statistics: tuple[Any, ...] = ()
    replay: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def draws(self) -> tuple[Trial, ...]:
        """The first trial of every draw: all at one budget."""
        seen = {trial.index: trial for trial in reversed(self.trials)}
        return tuple(seen[index] for index in sorted(seen))
