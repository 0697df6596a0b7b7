"""The picture of an exploration: score against ratio, a panel for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from m3jax.exploration.search.result import Exploration, Row
from m3jax.exploration.search.trials import Trial

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_INK, _FAINT, _GOLD = "#222222", "#8A8A8A", "#F0C400"
_COLUMNS = 3
_LEGEND_COLUMNS = (4, 7, 10)  # at most, for one, two and three panels in a row
_LONGEST = 28  # characters of a name


@dataclasses.dataclass(frozen=True)
class _Axis:
    """What the x of a panel is.

    Attributes:
      label: of the axis.
      value: x of a draw.
      model: whose ratio x is; None where it is something else.
    """

    label: str
    value: Callable[[Trial], float]
    model: int | None = None


def draw(found: Exploration, path: Path) -> None:
    """Draws the scores on validation, of all draws at one budget.

    x is λ, the ratio of the first of two models; of more than two it is, in each panel,
    the model that is best at that task. Where all draws have the same ratios, x is the
    first field of the recipe in which they differ.
    """
    tasks = list(found.winner.scores)
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(
        figsize=(0.8 + 4.6 * columns, 1.1 + 3.6 * rows),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08),
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        _panel(axis, found, task)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend_rows = -(-len(labels) // _LEGEND_COLUMNS[columns - 1])
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=-(-len(labels) // legend_rows),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    made = found.winner.recipe.method.name.replace("_", " ")
    made = made if found.winner.program is None else "layer programs"
    figure.suptitle(
        f"{len(found.draws)} draws of {made}, scores on validation",
        x=0.012,
        ha="left",
        fontsize=12,
        color=_INK,
    )
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _panel(axis: Any, found: Exploration, task: str) -> None:
    x = _x_axis(found, task)
    draws = [(x.value(trial), trial.scores[task]) for trial in found.draws]
    style: dict[str, Any] = {"s": 24, "color": _FAINT, "alpha": 0.8, "linewidths": 0}
    axis.scatter(*zip(*draws, strict=True), label="draws", zorder=3, **style)
    _references(axis, found, task, x.model)
    best = x.value(found.winner), _score(found.rows[-1], task)
    style = {"s": 150, "marker": "*", "color": _GOLD, "edgecolors": _INK}
    axis.scatter(*best, label="winner", zorder=5, linewidths=0.8, **style)
    axis.set_xlabel(x.label, color=_INK)
    if x.model is not None:
        axis.set_xlim(-0.04, 1.04)
    elif x.label in ("draw", "layers"):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(_text(task), loc="left", weight="bold", color=_INK, fontsize=10.5)
    lower = task in found.objective.losses
    axis.set_ylabel("loss (less is better)" if lower else "score", color=_INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_INK, labelsize=9)


def _references(axis: Any, found: Exploration, task: str, model: int | None) -> None:
    """The base as a line; parents and baselines where their ratios are, or as lines."""
    count = len(found.models)
    parents = [row for row in found.rows if row.kind == "parent"]
    baselines = [row for row in found.rows if row.kind == "baseline"]

    def put(row: Row, x: float | None, line: Mapping[str, Any], **mark: Any) -> None:
        y, name = _score(row, task), row.name
        name = name.replace("_", " ") if row.kind == "baseline" else _text(name)
        if x is None:
            axis.axhline(y, label=name, **line)
        else:
            axis.scatter([x], [y], label=name, zorder=4, **mark)

    if len(parents) > count:
        put(parents.pop(0), None, {"color": _INK, "ls": (0, (1, 2)), "lw": 1.3})
    for i, row in enumerate(parents):
        color = _COLORS[i % len(_COLORS)]
        put(
            row,
            None if model is None else float(i == model),
            {"color": color, "lw": 1.3},
            s=60,
            marker="D",
            color=color,
            clip_on=False,
            edgecolors="white",
            linewidths=0.6,
        )
    for row, marker, dashes in zip(baselines, "s^", ("--", "-."), strict=False):
        put(
            row,
            None if model is None else 1 / count,
            {"color": _INK, "ls": dashes, "lw": 1},
            s=55,
            marker=marker,
            facecolors="none",
            edgecolors=_INK,
            linewidths=1.3,
        )


def _x_axis(found: Exploration, task: str) -> _Axis:
    draws = found.draws
    if found.winner.program is not None:
        return _Axis("layers", lambda trial: len(trial.program or ()))
    drawn = all(trial.mean_ratios for trial in draws)
    if drawn and len({trial.mean_ratios for trial in draws}) > 1:
        model = 0 if len(found.models) == 2 else _expert(found, task)
        return _Axis(
            f"λ, the ratio of {_text(found.models[model])}",
            lambda trial: (trial.mean_ratios or ())[model],
            model,
        )
    same = {tuple(type(step) for step in trial.recipe.steps) for trial in draws}
    for place, step in enumerate(draws[0].recipe.steps if len(same) == 1 else ()):
        for name in step.fields():

            def value(trial: Trial, place: int = place, name: str = name) -> Any:
                return getattr(trial.recipe.steps[place], name)

            values = {value(trial) for trial in draws}
            if len(values) > 1 and all(isinstance(own, float) for own in values):
                return _Axis(name.replace("_", " "), value)
    return _Axis("draw", lambda trial: trial.index)


def _expert(found: Exploration, task: str) -> int:
    """The model that is best at a task."""
    parents = [row for row in found.rows if row.kind == "parent"]
    scores = [_score(row, task) for row in parents[-len(found.models) :]]
    better = min if task in found.objective.losses else max
    return scores.index(better(scores))


def _score(row: Row, task: str) -> float:
    return row.scored["validation"].scores[task]


def _text(label: str) -> str:
    """The end of a long name, `$` being no mathematics and `_` hiding no label."""
    text = label if len(label) <= _LONGEST else "…" + label[1 - _LONGEST :]
    text = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
