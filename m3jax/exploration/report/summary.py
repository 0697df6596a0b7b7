"""The table of an exploration: parents, baselines, draws and the winner."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from m3jax.exploration.report import bootstrap
from m3jax.exploration.report.bootstrap import Interval
from m3jax.exploration.search.result import Exploration, Row
from m3jax.exploration.search.trials import Scores, finite

OBJECTIVE = "objective"
_TITLES = {
    "validation": "validation (the winner is chosen on it)",
    "test": "test",
    "ood": "out of distribution",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A score: a mean, with its interval over examples or deviation over draws."""

    mean: float
    interval: Interval | None = None
    deviation: float | None = None

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "—"
        if self.interval is not None:
            return f"{self.mean:.4f} [{self.interval[0]:.4f}, {self.interval[1]:.4f}]"
        if self.deviation is not None:
            return f"{self.mean:.4f} ± {self.deviation:.4f}"
        return f"{self.mean:.4f}"

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"mean": finite(self.mean)}
        if self.interval is not None:
            found["interval"] = list(self.interval)
        if self.deviation is not None:
            found["standard_deviation"] = finite(self.deviation)
        return found


@dataclasses.dataclass(frozen=True)
class Table:
    """One list of tasks: a row for each set of parameters.

    Attributes:
      name: of the list.
      title: what it is for.
      columns: tasks, and the objective where there are several of them.
      rows: name and cells.
      gains: for each row by name, the winner's objective less its own.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    gains: dict[str, Cell]

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": {
                name: {
                    column: cell.to_dict()
                    for column, cell in zip(self.columns, cells, strict=True)
                }
                for name, cells in self.rows
            },
            "winner_less": {name: cell.to_dict() for name, cell in self.gains.items()},
        }

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as text."""
        header = [self.name, *self.columns]
        rows = [[name, *map(str, cells)] for name, cells in self.rows]
        if self.gains:
            header.append("winner less this")
            for row in rows:
                row.append(str(self.gains[row[0]]) if row[0] in self.gains else "")
        return header, rows


def tables(found: Exploration) -> list[Table]:
    """A table for each list of tasks."""
    return [_table(found, name) for name in found.rows[0].scored]


def as_json(found: Exploration) -> dict[str, Any]:
    """All of the summary as JSON values."""
    return {
        "winner": found.winner.to_dict(),
        "models": list(found.models),
        "draws": len(found.draws),
        "seed": found.seed,
        **{table.name: table.to_dict() for table in tables(found)},
    }


def as_markdown(found: Exploration) -> str:
    """The tables for people."""
    winner = found.winner
    lines = [
        f"# {len(found.draws)} draws of {winner.recipe.method}, "
        f"{' + '.join(found.models)}",
        "",
        *notes(found),
    ]
    for table in tables(found):
        header, rows = table.texts()
        lines += ["", f"## {table.title}", "", _line(header)]
        lines.append(_line(["---", *["---:"] * (len(header) - 1)]))
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def notes(found: Exploration) -> list[str]:
    """What is to be known beside the tables."""
    winner = found.winner
    ratios = winner.mean_ratios
    drawn = (
        "" if ratios is None else "λ " + ", ".join(f"{r:.4f}" for r in ratios) + ", "
    )
    lines = [f"The winner is draw {winner.index}: {drawn}seed {winner.seed}."]
    if len({trial.budget for trial in found.trials}) > 1:
        lines.append(
            f"Mean and deviation over the draws are at a budget of "
            f"{found.draws[0].budget}; the best of them went on to larger ones."
        )
    if found.rows[0].scored["validation"].examples is not None:
        lines.append(
            "In brackets: 95 % of the means when the examples are resampled. The "
            "winner was chosen by its score on validation, which therefore flatters it."
        )
    return lines


def _table(found: Exploration, name: str) -> Table:
    tasks = list(found.rows[0].scored[name].scores)
    comparable = set(tasks) == set(found.rows[0].scored["validation"].scores)
    columns = [*tasks, OBJECTIVE] if comparable and len(tasks) > 1 else tasks
    samples = {row.name: _samples(found, row, name, comparable) for row in found.rows}
    rows = [
        (row.name, _cells(found, row, name, columns, samples[row.name]))
        for row in found.rows
    ]
    draws = [
        trial.scores if name == "validation" else trial.other.get(name)
        for trial in found.draws
    ]
    if all(draws):
        label = f"{len(draws)} draws, mean ± deviation"
        own = [scores for scores in draws if scores]
        rows.insert(len(rows) - 1, (label, _over_draws(found, own, columns)))
    winner = found.rows[-1]
    gains = {}
    if comparable:
        for row in found.rows[:-1]:
            gains[row.name] = _gain(found, winner, row, name, samples)
    return Table(name, _TITLES[name], tuple(columns), tuple(rows), gains)


def _samples(found: Exploration, row: Row, name: str, comparable: bool) -> Any:
    """Resampled means by task, the objective among them; {} without examples."""
    examples = row.scored[name].examples
    if examples is None:
        return {}
    means = bootstrap.resampled(examples, found.seed)
    if comparable:
        means[OBJECTIVE] = found.objective(means)
    return means


def _cells(
    found: Exploration, row: Row, name: str, columns: Sequence[str], samples: Any
) -> tuple[Cell, ...]:
    scores = row.scored[name].scores
    return tuple(
        Cell(
            found.objective(scores) if column == OBJECTIVE else scores[column],
            bootstrap.interval(samples[column]) if column in samples else None,
        )
        for column in columns
    )


def _over_draws(
    found: Exploration, draws: Sequence[Scores], columns: Sequence[str]
) -> tuple[Cell, ...]:
    cells = []
    for column in columns:
        own = [
            found.objective(scores) if column == OBJECTIVE else scores[column]
            for scores in draws
        ]
        own = [value for value in own if math.isfinite(value)]
        deviation = statistics.stdev(own) if len(own) > 1 else None
        cells.append(
            Cell(statistics.fmean(own) if own else math.nan, deviation=deviation)
        )
    return tuple(cells)


def _gain(found: Exploration, winner: Row, row: Row, name: str, samples: Any) -> Cell:
    ours, theirs = (found.objective(r.scored[name].scores) for r in (winner, row))
    pair = [samples[r.name].get(OBJECTIVE) for r in (winner, row)]
    apart = None if pair[0] is None else bootstrap.interval(pair[0] - pair[1])
    return Cell(ours - theirs, apart)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
