"""The picture of an exploration: score against ratio, a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from m3jax.exploration.result import Exploration, Row
from m3jax.exploration.trials import Trial

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_INK, _FAINT = "#222222", "#8A8A8A"
_COLUMNS = 3
_LONGEST = 28  # characters of a name


def draw(found: Exploration, path: Path) -> None:
    """Draws the scores on validation.

    With two models x is the ratio of the first. With more, every draw has a mark for
    each model, in its colour, at its ratio; so a parent stands where its own is 1. If
    no ratio differs, x is the number of the draw.
    """
    tasks = list(found.winner.scores)
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(
        figsize=(0.8 + 4.6 * columns, 1.0 + 3.7 * rows),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        _panel(axis, found, task)
    handles: dict[str, Any] = {}
    for axis in axes.flat[: len(tasks)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 2 * columns),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )
    figure.suptitle(
        f"{len(found.draws)} draws of {found.winner.recipe.method}, scores on "
        "validation",
        x=0.012,
        ha="left",
        fontsize=12,
        color=_INK,
    )
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _panel(axis: Any, found: Exploration, task: str) -> None:
    models = _shown_models(found)
    by_ratio = bool(models)
    several = len(models) > 1
    for model in models or (0,):
        place = _x if by_ratio else _index
        axis.scatter(
            [place(trial, model) for trial in found.draws],
            [trial.scores[task] for trial in found.draws],
            s=22,
            color=_COLORS[model % len(_COLORS)] if several else _FAINT,
            alpha=0.75,
            linewidths=0,
            label=f"draws, {_text(found.models[model])}" if several else "draws",
            zorder=3,
        )
        axis.scatter(
            [place(found.winner, model)],
            [_score(found.rows[-1], task)],
            s=150,
            marker="*",
            color="#F0C400",
            edgecolors=_INK,
            linewidths=0.8,
            label="winner",
            zorder=5,
        )
    _references(axis, found, task, by_ratio)
    if not by_ratio:
        axis.set_xlabel("draw", color=_INK)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        first = f"λ, the ratio of {_text(found.models[0])}"
        axis.set_xlabel("ratio of a model" if several else first, color=_INK)
        axis.set_xlim(-0.04, 1.04)
    axis.set_title(_text(task), loc="left", weight="bold", color=_INK, fontsize=10.5)
    lower = task in found.objective.losses
    axis.set_ylabel("loss (less is better)" if lower else "score", color=_INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_INK, labelsize=9)


def _references(axis: Any, found: Exploration, task: str, by_ratio: bool) -> None:
    """Parents at their end of the axis, baselines at equal ratios or as lines."""
    count = len(found.models)
    parents = [row for row in found.rows if row.kind == "parent"]
    if len(parents) > count:
        base = parents.pop(0)
        axis.axhline(
            _score(base, task), color=_INK, ls=(0, (1, 2)), lw=1.2, label="base"
        )
    for i, row in enumerate(parents):
        style = {"color": _COLORS[i % len(_COLORS)], "label": _text(row.name)}
        if by_ratio:
            x = 0.0 if count == 2 and i == 1 else 1.0
            axis.scatter(
                [x],
                [_score(row, task)],
                s=60,
                marker="D",
                zorder=4,
                clip_on=False,
                **style,
            )
        else:
            axis.axhline(_score(row, task), lw=1.2, **style)
    for row, mark in zip(
        [row for row in found.rows if row.kind == "baseline"], ("s", "^"), strict=True
    ):
        if by_ratio:
            axis.scatter(
                [1 / count],
                [_score(row, task)],
                s=55,
                marker=mark,
                facecolors="none",
                edgecolors=_INK,
                linewidths=1.3,
                zorder=4,
                label=row.name,
            )
        else:
            dashes = "--" if mark == "s" else "-."
            axis.axhline(_score(row, task), color=_INK, ls=dashes, lw=1, label=row.name)


def _shown_models(found: Exploration) -> Sequence[int]:
    """The models whose ratio is an x; none if no ratio differs between draws."""
    ratios = {trial.mean_ratios for trial in found.draws}
    if None in ratios or (len(ratios) == 1 and len(found.draws) > 1):
        return ()
    return range(1 if len(found.models) == 2 else len(found.models))


def _x(trial: Trial, model: int) -> float:
    assert trial.mean_ratios is not None
    return trial.mean_ratios[model]


def _index(trial: Trial, model: int) -> float:
    return trial.index


def _score(row: Row, task: str) -> float:
    return row.scored["validation"].scores[task]


def _text(label: str) -> str:
    """The end of a long name, `$` being no mathematics and `_` hiding no label."""
    text = label if len(label) <= _LONGEST else "…" + label[1 - _LONGEST :]
    text = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
