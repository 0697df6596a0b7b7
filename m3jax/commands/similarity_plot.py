"""The picture of how like each other models are; importing this imports matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from m3jax.commands.similarity_report import by_layer
from m3jax.commands.tables import clean
from m3jax.engine.similarity import Similarity, add

_INK = "#222222"
_LONGEST = 24  # letters of a name
_MOST_LINES = 10  # pairs that have a line of their own
_MEASURES = (
    ("cosine", "cosines", (-1, 1)),
    ("sign agreement", "sign_agreement", (0, 1)),
)


def draw(found: Similarity) -> Figure:
    """Draws the whole models, a cell for each pair, and the layers, a line for each.

    A row of panels for the parameters, and one for the task vectors if there are any.
    """
    rows = len(found.tensors)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(14, 3.6 * rows + 0.4), layout=layout)
    panels = figure.subplots(rows, 4, squeeze=False, width_ratios=(1, 1.4) * 2)
    names = [_short(name) for name in found.names]
    for row, (of, tensors) in zip(panels, found.tensors.items(), strict=True):
        layers = {name: add(own) for name, own in by_layer(tensors).items()}
        for i, (label, measure, limits) in enumerate(_MEASURES):
            title = f"{of}: {label}"
            matrix = getattr(found.total(of), measure)
            _cells(row[2 * i], matrix, names, title, limits)
            stacked = np.array([getattr(own, measure) for own in layers.values()])
            _lines(row[2 * i + 1], stacked, names, list(layers), f"{title}, by layer")
    return figure


def _cells(
    axis: Any, matrix: np.ndarray, names: list[str], title: str, limits: tuple[int, int]
) -> None:
    colors = "RdBu" if limits[0] < 0 else "YlGnBu"
    axis.imshow(matrix, cmap=colors, vmin=limits[0], vmax=limits[1])
    places = range(len(names))
    axis.set_xticks(places, names, rotation=45, ha="right")
    axis.set_yticks(places, names)
    middle = sum(limits) / 2
    for i, j in np.ndindex(matrix.shape):
        strong = abs(matrix[i, j] - middle) > 0.35 * (limits[1] - limits[0])
        color = "white" if strong else _INK
        text = f"{matrix[i, j]:.3f}"
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_title(title, fontsize=10, color=_INK)
    axis.tick_params(length=0, labelsize=8, colors=_INK)


def _lines(
    axis: Any, stacked: np.ndarray, names: list[str], layers: list[str], title: str
) -> None:
    """A line per pair over the layers, in the order of the data's flow."""
    count = stacked.shape[1]
    pairs = [(i, j) for j in range(count) for i in range(j)]
    for i, j in pairs[:_MOST_LINES]:
        axis.plot(stacked[:, i, j], marker=".", label=f"{names[i]}, {names[j]}")
    step = -(-len(layers) // 12)
    places = range(0, len(layers), step)
    texts = [_short(layers[p].removesuffix(".weight")) for p in places]
    axis.set_xticks(places, texts, rotation=45, ha="right")
    more = len(pairs) - _MOST_LINES
    axis.legend(fontsize=7, title=f"and {more} more pairs" if more > 0 else None)
    axis.set_title(title, fontsize=10, color=_INK)
    axis.tick_params(labelsize=8, colors=_INK)
    axis.grid(alpha=0.3)


def _short(name: str) -> str:
    """The end of a name, `$` being no mathematics."""
    text = clean(name).rstrip("/").rpartition("/")[2]
    return text[-_LONGEST:].replace("$", r"\$")
