"""Pictures of a run; importing this imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from m3jax.learn.report.result import Learning
from m3jax.recipe.values import layer_of

_INK, _FAINT, _COLOR = "#222222", "#B8B8B8", "#2F6DB5"
_ROW, _CELL = 0.22, 0.34  # inches
_LONGEST = 44  # characters of a kind of tensor
_OUTSIDE = "–"  # the column of tensors outside the layers


def curves(found: Learning, path: Path) -> None:
    """The loss of every step, and on validation."""
    figure = Figure(figsize=(7, 3.6), layout=ConstrainedLayoutEngine())
    axis = figure.subplots()
    losses = np.array(found.losses, np.float64)
    steps = np.arange(len(losses))
    axis.plot(steps, losses, color=_FAINT, linewidth=0.9, label="each step")
    width = max(1, len(losses) // 25)
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        place = np.arange(len(smooth)) + (width - 1) / 2
        axis.plot(place, smooth, color=_INK, linewidth=1.4, label=f"mean of {width}")
    if found.looks:
        style: Any = {"color": _COLOR, "marker": "o", "markersize": 4, "linewidth": 1.2}
        axis.plot(*zip(*found.looks, strict=True), label="validation", **style)
        dashed: Any = {"color": _COLOR, "linewidth": 0.8, "linestyle": "--"}
        axis.axvline(found.step, label="kept", **dashed)
    axis.set_xlabel("step", color=_INK)
    axis.set_ylabel("loss", color=_INK)
    axis.spines[["top", "right"]].set_visible(False)
    if len(losses) or found.looks:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def coefficients(found: Learning, names: Sequence[str], path: Path) -> None:
    """The mean coefficient of each tensor: a panel a model, a row for each kind of
    tensor, a column for each layer."""
    kinds: dict[str, dict[int | None, np.ndarray]] = {}
    for name, own in found.coefficients.items():
        layer = layer_of(name)
        kind = name if layer is None else name.replace(f".{layer}.", ".N.", 1)
        means = own.reshape(len(own), -1).mean(axis=1) if own.size else np.zeros(0)
        kinds.setdefault(kind, {})[layer] = means
    layers = sorted(
        {layer for row in kinds.values() for layer in row},
        key=lambda layer: -1 if layer is None else layer,
    )
    count = len(next(iter(found.coefficients.values())))
    table = np.full((count, len(kinds), len(layers)), np.nan)
    for row, by_layer in enumerate(kinds.values()):
        for layer, values in by_layer.items():
            table[:, row, layers.index(layer)] = values
    width = 4.2 + count * max(1.2, _CELL * len(layers))
    figure = Figure(
        figsize=(width, 1.6 + _ROW * len(kinds)), layout=ConstrainedLayoutEngine()
    )
    axes = figure.subplots(1, count, squeeze=False)[0]
    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    margin = 0.0 if high > low else 0.5
    for k, axis in enumerate(axes):
        image = axis.imshow(
            table[k], aspect="auto", vmin=low - margin, vmax=high + margin
        )
        axis.set_title(names[k] if k < len(names) else f"model {k}", fontsize=9)
        axis.set_xticks(
            range(len(layers)),
            [_OUTSIDE if layer is None else str(layer) for layer in layers],
            fontsize=7,
        )
        labels = map(_label, kinds) if k == 0 else [""] * len(kinds)
        axis.set_yticks(range(len(kinds)), list(labels), fontsize=7)
    bar = figure.colorbar(image, ax=list(axes), location="bottom", aspect=45)
    bar.set_label("mean coefficient; columns are layers", color=_INK)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _label(kind: str) -> str:
    """A kind of tensor, its end if it is too long."""
    own = kind.removesuffix(".weight")
    return own if len(own) <= _LONGEST else f"…{own[1 - _LONGEST :]}"
