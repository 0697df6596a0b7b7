"""The table of an exploration: parents, baselines, draws and the winner."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from m3jax import programs
from m3jax.evaluation.results import as_json
from m3jax.exploration.search.result import Exploration, Row
from m3jax.exploration.search.trials import Scores
from m3jax.runs import bootstrap
from m3jax.runs.bootstrap import Interval

OBJECTIVE = "objective"
_DEVIATION = " ± deviation"
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
        text = f"{self.mean:.4f}"
        if self.interval is not None:
            text += f" [{self.interval[0]:.4f}, {self.interval[1]:.4f}]"
        if self.deviation is not None:
            text += f" ± {self.deviation:.4f}"
        return text

    def to_dict(self) -> dict[str, Any]:
        found = {
            "mean": self.mean,
            "interval": self.interval,
            "standard_deviation": self.deviation,
        }
        return {name: own for name, own in found.items() if own is not None}


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

    def texts(self, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as text; brief: the means alone, for a terminal's width."""
        header = [self.name, *self.columns]
        rows = [[name, *map(str, cells)] for name, cells in self.rows]
        if brief:
            rows = [
                [name.removesuffix(_DEVIATION), *(str(Cell(own.mean)) for own in cells)]
                for name, cells in self.rows
            ]
        if self.gains:
            header.append("winner less this")
            for row in rows:
                row.append(str(self.gains[row[0]]) if row[0] in self.gains else "")
        return header, rows


def tables(found: Exploration) -> list[Table]:
    """A table for each list of tasks."""
    return [_table(found, name) for name in found.rows[0].scored]


def as_dict(found: Exploration) -> dict[str, Any]:
    """All of the summary as JSON values."""
    summary = {
        "winner": found.winner.to_dict(),
        "models": list(found.models),
        "draws": len(found.draws),
        "seed": found.seed,
        **{table.name: table.to_dict() for table in tables(found)},
    }
    values: dict[str, Any] = as_json(summary)
    return values


def as_markdown(found: Exploration) -> str:
    """The tables for people."""
    lines = [f"# {title(found)}", "", *notes(found)]
    for table in tables(found):
        header, rows = table.texts()
        lines += ["", f"## {table.title}", "", _line(header)]
        lines.append(_line(["---", *["---:"] * (len(header) - 1)]))
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def title(found: Exploration) -> str:
    """How many draws of what."""
    methods = {
        draw.recipe.method.name if draw.program is None else "layer programs"
        for draw in found.draws
    }
    of = " | ".join(sorted(methods))
    return f"{len(found.draws)} draws of {of}, {' + '.join(found.models)}"


def notes(found: Exploration) -> list[str]:
    """What is to be known beside the tables."""
    winner = found.winner
    ratios = winner.mean_ratios
    drawn = (
        "" if ratios is None else "λ " + ", ".join(f"{r:.4f}" for r in ratios) + ", "
    )
    if winner.program is not None:
        drawn = (
            f"{programs.counted(winner.program, found.models)} "
            f"({programs.described(winner.program, found.models)}), "
        )
    lines = [f"The winner is draw {winner.index}: {drawn}seed {winner.seed}."]
    if len({trial.budget for trial in found.trials}) > 1:
        lines.append(
            f"Mean and deviation over the draws are at a budget of "
            f"{found.draws[0].budget}; the best of them went on to larger ones."
        )
    if found.rows[0].scored["validation"].examples is not None:
        lines.append("In brackets: 95 % of the means when the examples are resampled.")
    lines.append(
        "The winner was chosen by its "
        + (
            "score on validation, which therefore flatters it."
            if winner.answers is None
            else "answers on validation, whatever these score."
        )
    )
    return lines


def _table(found: Exploration, name: str) -> Table:
    tasks = list(found.rows[0].scored[name].scores)
    comparable = set(tasks) == set(found.rows[0].scored["validation"].scores)
    columns = [*tasks, OBJECTIVE] if comparable and len(tasks) > 1 else tasks
    samples = {row.name: _samples(found, row, name, comparable) for row in found.rows}
    rows = []
    for row in found.rows:
        means, own = row.scored[name].scores, samples[row.name]
        cells = (
            Cell(_value(found, means, column), _interval(own, column))
            for column in columns
        )
        rows.append((row.name, tuple(cells)))
    draws = [
        trial.scores if name == "validation" else trial.other.get(name, {})
        for trial in found.draws
    ]
    if all(draws):
        label = f"{len(draws)} draws, mean{_DEVIATION}"
        over = tuple(_over_draws(found, draws, column) for column in columns)
        rows.insert(len(rows) - 1, (label, over))
    *others, winner = found.rows
    gains = {}
    for row in others if comparable else ():
        ours, theirs = (found.objective(r.scored[name].scores) for r in (winner, row))
        apart = {
            column: own - samples[row.name][column]
            for column, own in samples[winner.name].items()
        }
        gains[row.name] = Cell(ours - theirs, _interval(apart, OBJECTIVE))
    return Table(name, _TITLES[name], tuple(columns), tuple(rows), gains)


def _samples(
    found: Exploration, row: Row, name: str, comparable: bool
) -> dict[str, Any]:
    """Resampled means by task, the objective among them; {} without examples."""
    examples = row.scored[name].examples
    if examples is None:
        return {}
    means = bootstrap.resampled(examples, found.seed)
    return {**means, OBJECTIVE: found.objective(means)} if comparable else means


def _interval(samples: Mapping[str, Any], column: str) -> Interval | None:
    return bootstrap.interval(samples[column]) if column in samples else None


def _value(found: Exploration, scores: Scores, column: str) -> float:
    return found.objective(scores) if column == OBJECTIVE else scores[column]


def _over_draws(found: Exploration, draws: Sequence[Scores], column: str) -> Cell:
    own = [_value(found, scores, column) for scores in draws]
    own = [value for value in own if math.isfinite(value)]
    return Cell(
        statistics.fmean(own) if own else math.nan,
        deviation=statistics.stdev(own) if len(own) > 1 else None,
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
