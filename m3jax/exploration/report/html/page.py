"""The page itself: one file that needs nothing else, and no network."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from m3jax import programs
from m3jax.exploration.report import summary
from m3jax.exploration.report.html import axes, marks
from m3jax.exploration.report.html.axes import Axis
from m3jax.exploration.report.html.parallel import parallel
from m3jax.exploration.report.html.scatter import scatter, style_of
from m3jax.exploration.report.html.svg import element, text
from m3jax.exploration.search.result import Exploration

MOST = 12  # parameters that are drawn
_PAIRS = 6  # of tasks


def render(found: Exploration) -> str:
    """The page of an exploration; the same text for the same exploration."""
    style, script = (
        resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("style.css", "script.js")
    )
    # Nothing is fetched, and no script runs but this one, whatever a name holds.
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    title = summary.title(found)
    body = [
        element("h1", text(title)),
        *(element("p", text(note)) for note in summary.notes(found)),
        *_tables(found),
        *_charts(found),
        *_recipe(found.replay),
        *_trials(found),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{element('title', text(title))}\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _digest(content: str) -> str:
    own = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(own).decode()}"


def _tables(found: Exploration) -> list[str]:
    parts = []
    for table in summary.tables(found):
        header, rows = table.texts()
        parts.append(element("h2", text(table.title)))
        parts.append(_table(header, rows, {len(rows) - 1: {"class_": "won"}}))
    return parts


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    attributes: Mapping[int, Mapping[str, Any]],
) -> str:
    """A table; some rows with attributes."""
    head = element("tr", *(element("th", text(own), scope="col") for own in header))
    lines = (
        element(
            "tr", *(element("td", _cell(own)) for own in row), **attributes.get(i, {})
        )
        for i, row in enumerate(rows)
    )
    own = element("table", element("thead", head), element("tbody", *lines))
    return element("div", own, class_="table", tabindex=0)


def _cell(content: str) -> str:
    """A score with its interval below it, or any text."""
    score, bracket, interval = content.partition(" [")
    below = element("small", text(bracket.strip() + interval)) if bracket else ""
    return text(score) + below


def _charts(found: Exploration) -> list[str]:
    scores, every = axes.scores(found), axes.parameters(found)
    tasks = scores[-len(found.winner.scores) :]
    drawn = every[:MOST]
    parts = [
        element("h2", "Draws by their scores on validation"),
        *_notes(found, every),
    ]
    front = axes.front(tasks) if len(tasks) > 1 else []
    parts.append(_legend(found, bool(front)))
    if len(scores) > 1:
        options = (
            element("option", text(own.name), value=i) for i, own in enumerate(scores)
        )
        choice = element("select", *options, id="score")
        parts.append(element("label", "Score ", choice, class_="none"))
    for i, score in enumerate(scores):
        less = " (less is better)" if score.lower else ""
        panels = [element("figure", scatter(found, axis, score)) for axis in drawn]
        heading = element("h3", text(score.name + less))
        grid = element("div", *panels, class_="panels")
        parts.append(element("section", heading, grid, data_score=i))
    if front:
        pairs = list(itertools.combinations(tasks, 2))[:_PAIRS]
        panels = [
            element(
                "figure",
                element("figcaption", text(f"{marks.short(y.name)}, upwards")),
                scatter(found, x, y, front, joined=len(tasks) == 2),
            )
            for x, y in pairs
        ]
        parts.append(element("h2", "Pareto front"))
        told = (
            "No other draw is as good as one of these on every task, and better on one."
        )
        parts.append(element("p", told))
        parts.append(element("div", *panels, class_="panels"))
    parts.append(element("h2", "Parallel coordinates"))
    told = (
        "A line for each draw; the winner is gold, the best quarter blue. Up is better."
    )
    parts.append(element("p", told))
    lines = parallel(found, [*drawn, *tasks, *scores[: len(scores) - len(tasks)]])
    parts.append(element("div", lines, class_="wide", tabindex=0))
    return parts


def _notes(found: Exploration, every: Sequence[Axis]) -> list[str]:
    """What the charts leave out."""
    notes = []
    if len({trial.budget for trial in found.trials}) > 1:
        notes.append(
            f"Draws are shown at a budget of {found.draws[0].budget}, parents and "
            "baselines at the full one."
        )
    if len(every) > MOST:
        notes.append(
            f"The first {MOST} of {len(every)} parameters; trials.jsonl has them all."
        )
    lost = sum(draw.objective != draw.objective for draw in found.draws)
    if lost:
        notes.append(f"{lost} of {len(found.draws)} draws have no finite score.")
    return [element("p", text(note)) for note in notes]


def _legend(found: Exploration, front: bool) -> str:
    entries = [("draw", "draw"), ("winner", found.rows[-1].name)]
    entries += [("draw marked", "on the Pareto front")] if front else []
    entries += [
        (style_of(found, place), row.name) for place, row in enumerate(found.rows[:-1])
    ]
    items = (element("li", marks.key(style), text(name)) for style, name in entries)
    return element("ul", *items, class_="legend")


def _recipe(replay: Mapping[str, Any]) -> list[str]:
    content = json.dumps(replay, indent=1, ensure_ascii=False, allow_nan=False)
    # What cannot be seen is escaped as JSON does it, so that a copy is as good.
    lines = (
        text("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line))
        for line in content.split("\n")
    )
    told = "As in winner.json: m3jax merge --config=winner.json --output=DIR makes it."
    return [
        element("h2", "The winner's recipe"),
        element("p", text(told)),
        element("button", "Copy", type="button", id="copy", class_="none"),
        element("pre", "\n".join(lines), id="recipe", tabindex=0),
    ]


def _trials(found: Exploration) -> list[str]:
    """All trials, those at larger budgets among them, in a table that is folded."""
    parameters, scores = axes.parameters(found)[:MOST], axes.scores(found)
    place = {draw.index: i for i, draw in enumerate(found.draws)}
    budgets = len({trial.budget for trial in found.trials}) > 1
    header = ["draw", *(["budget"] if budgets else [])]
    header += [axis.name for axis in (*parameters, *scores)]
    header += ["program"] if found.winner.program is not None else []
    rows, attributes = [], {}
    for i, trial in enumerate(found.trials):
        row = [str(trial.index), *([str(trial.budget)] if budgets else [])]
        row += [axis.shown(place[trial.index]) for axis in parameters]
        own = {summary.OBJECTIVE: trial.objective, **trial.scores}
        row += [str(summary.Cell(own[axis.name])) for axis in scores]
        if trial.program is not None:
            row.append(programs.described(trial.program, found.models))
        rows.append(row)
        attributes[i] = {"data_draw": trial.index}
    label = element("summary", text(f"All {len(found.trials)} trials"))
    return [
        element("h2", "Trials"),
        element("details", label, _table(header, rows, attributes)),
    ]
