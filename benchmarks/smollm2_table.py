"""docs/SMOLLM2.md: what was drawn, searched and learned, in three tables."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import bench
import numpy as np

from m3jax.exploration.search.result import Exploration, Row
from m3jax.exploration.search.scoring import Scored
from m3jax.learn import Learning
from m3jax.runs import bootstrap

Scores = Mapping[str, float]
LISTS = ("validation", "test")
MEAN = "mean"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A way to merge, and what it found.

    Attributes:
      label: of its rows.
      found: one draw, or several and the winner.
      without: the label of its like without M3, or without masks, if there is one.
    """

    label: str
    found: Exploration
    without: str | None = None

    @property
    def winner(self) -> Row:
        return self.found.rows[-1]

    @property
    def drawn(self) -> bool:
        """Whether all its trials are draws of one recipe."""
        return self.without is not None


def main_table(entries: Sequence[Entry], skills: Sequence[str]) -> str:
    """Parents, draws and winners, on both lists of tasks; draws on validation alone.

    The best of each column is bold; a score that is no loss is better if greater.

    Args:
      entries: of the same parents.
      skills: the tasks whose mean loss is the objective.
    """
    parents = [row for row in entries[0].found.rows if row.kind == "parent"]
    columns = {
        name: [*skills, MEAN, *(t for t in own.scores if t not in skills)]
        for name, own in parents[0].scored.items()
    }
    rows: list[tuple[str, dict[str, list[Scores]]]] = [
        (row.name, _scores(row)) for row in parents
    ]
    for entry in entries:
        label, draws = entry.label, entry.found.draws
        if entry.drawn:
            several = {"validation": [trial.scores for trial in draws]}
            rows.append((f"{label}, {len(draws)} draws", several))
            ratios = entry.found.winner.mean_ratios
            label += ", winner" + (f" (λ = {ratios[0]:.2f})" if ratios else "")
        rows.append((label, _scores(entry.winner)))
    places = [(name, column) for name in LISTS for column in columns[name]]
    texts = [[label] for label, _ in rows]
    for name, column in places:
        values = [
            [_value(scores, column, skills) for scores in own.get(name, ())]
            for _, own in rows
        ]
        means = [round(statistics.fmean(own), 4) if own else None for own in values]
        told = [mean for mean in means if mean is not None]
        best = min(told) if column in (*skills, MEAN) else max(told)
        for text, own, mean in zip(texts, values, means, strict=True):
            cell = "" if mean is None else f"{mean:.4f}"
            if len(own) > 1:
                cell += f" ± {statistics.stdev(own):.4f}"
            text.append(f"**{cell}**" if mean == best else cell)
    return bench.table(["", *(f"{n}: {c}" for n, c in places)], texts)


def comparison(entries: Sequence[Entry], skills: Sequence[str]) -> tuple[str, str]:
    """A table of all entries against the first one on test, and a sentence that counts.

    Args:
      entries: the first one is the average with equal ratios.
      skills: as for `main_table`.
    """
    first, named = entries[0], {entry.label: entry for entry in entries}
    rows, better, worse = [], [], []
    for entry in entries[1:]:
        ours, seed = entry.winner.scored["test"], entry.found.seed
        others = first, named.get(entry.without or "")
        changes = [
            difference(ours, own.winner.scored["test"], skills, seed) if own else ()
            for own in others
        ]
        better += [entry.label] if changes[0][2] < 0 else []
        worse += [entry.label] if changes[0][1] > 0 else []
        texts = [
            "{:+.4f} [{:+.4f}, {:+.4f}]".format(*own) if own else "" for own in changes
        ]
        loss = _value(ours.scores, MEAN, skills)
        rows.append([entry.label, f"{loss:.4f}", *texts])
    header = ["", "test: mean", f"− {first.label}", "− without M3 or DARE"]
    sentence = (
        f"Of {len(rows)} ways to merge, {_listed(better)} better than "
        f"{first.label} and {_listed(worse)} worse, as far as an interval that "
        "excludes 0 can tell."
    )
    return bench.table(header, rows), sentence


def learned(found: Mapping[str, Learning], skills: Sequence[str]) -> str:
    """A table of losses on validation and of coefficients: mean, least and greatest.

    Args:
      found: by label.
      skills: whose experts the coefficients are of, in their order.
    """
    rows = []
    for label, own in found.items():
        looks = dict(own.looks)
        coefficients = np.stack([c.reshape(-1) for c in own.coefficients.values()])
        rows.append(
            [
                label,
                f"{looks[0]:.4f}",
                f"{looks[max(looks)]:.4f}",
                f"{own.step} of {max(looks)}",
                *(
                    f"{row.mean():.3f} ({row.min():.3f} to {row.max():.3f})"
                    for row in coefficients.T
                ),
            ]
        )
    header = ["", "loss at the start", "at the end", "step that counts", *skills]
    return bench.table(header, rows)


def difference(
    ours: Scored, theirs: Scored, skills: Sequence[str], seed: int
) -> tuple[float, float, float]:
    """Mean loss less that of others, and the ends of its 95 % interval.

    Both are resampled alike, so that what is hard for both cancels.
    """
    means = []
    for scored in (ours, theirs):
        assert scored.examples is not None
        samples = bootstrap.resampled({s: scored.examples[s] for s in skills}, seed)
        means.append(sum(samples.values()) / len(skills))
    ends = bootstrap.interval(means[0] - means[1])
    assert ends is not None
    values = [_value(scored.scores, MEAN, skills) for scored in (ours, theirs)]
    return values[0] - values[1], *ends


def _value(scores: Scores, column: str, skills: Sequence[str]) -> float:
    if column == MEAN:
        return statistics.fmean(scores[skill] for skill in skills)
    return scores[column]


def _scores(row: Row) -> dict[str, list[Scores]]:
    return {name: [own.scores] for name, own in row.scored.items()}


def _listed(labels: Sequence[str]) -> str:
    if not labels:
        return "none is"
    verb = "is" if len(labels) == 1 else "are"
    return f"{len(labels)} ({'; '.join(labels)}) {verb}"
