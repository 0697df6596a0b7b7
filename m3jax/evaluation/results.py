"""What an evaluation finds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Result:
    """The score of parameters at one task.

    Attributes:
      task: its name.
      metric: ``loss`` (nats per token, lower is better) or ``accuracy``.
      records: a JSON object for each example; ``score`` is what the mean is over.
      truncated: examples whose prompt lost its beginning, to fit into the model.
    """

    task: str
    metric: str
    records: tuple[dict[str, Any], ...]
    truncated: int

    @property
    def scores(self) -> np.ndarray:
        """(n,) float64."""
        return np.array([record["score"] for record in self.records], np.float64)

    @property
    def count(self) -> int:
        return len(self.records)

    @property
    def mean(self) -> float:
        """Every example counts alike, whatever its length."""
        return float(self.scores.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, by the deviation of the examples; NaN for one example."""
        if self.count < 2:
            return math.nan
        return float(self.scores.std(ddof=1) / math.sqrt(self.count))

    def to_dict(self) -> dict[str, Any]:
        """All but the records."""
        return {
            "task": self.task,
            "metric": self.metric,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "n": self.count,
            "truncated": self.truncated,
        }


def answers_of(results: Iterable[Result]) -> dict[str, list[str]]:
    """What the model wrote, or which choice it took, by task; losses have neither."""
    return {
        own.task: [str(_answer(record)) for record in own.records]
        for own in results
        if own.records and _answer(own.records[0]) is not None
    }


def _answer(record: Mapping[str, Any]) -> Any:
    return record.get("output", record.get("chosen"))


def as_json(value: Any) -> Any:
    """`value` with null for numbers that JSON has no word for: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value
