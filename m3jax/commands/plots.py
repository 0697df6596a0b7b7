"""The picture of a comparison; importing this imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from m3jax.checkpoints.errors import CheckpointError
from m3jax.commands import tensor_names
from m3jax.commands.tables import clean, percent
from m3jax.engine.compare import Comparison, Sums, add

_MOST_STACKS, _MOST_ROWS = 8, 32  # that have a panel; of a panel
_ROW, _WIDTH, _MARGIN = 0.24, 11.5, 2.4  # inches
_DECADES = 4  # of distances that have colours of their own
_LONGEST_NAME, _LONGEST_KIND = 100, 44  # characters
_INK = "#222222"
_OUTSIDE = "outside the layers"
_Panel = dict[str, dict[int, Sums]]  # kind -> layer -> sums


def difference(comparison: Comparison, a: str, b: str, path: Path) -> None:
    """Writes the picture of a comparison; see `draw`."""
    draw(comparison, a, b).savefig(path, dpi=160, metadata={"Software": None})


def draw(comparison: Comparison, a: str, b: str) -> Figure:
    """Draws a comparison: a panel per stack of layers, a row per kind of tensor.

    The colours are, for each layer, the relative distance on the left, the share of
    equal entries on the right; the number behind a row is that of all its tensors.

    Raises:
      CheckpointError: no tensor could be compared.
    """
    panels = _panels(comparison)
    if not panels:
        raise CheckpointError(f"{a} and {b} have no tensor in common; nothing to draw")
    rows = [len(panel) for panel in panels.values()]
    height = _MARGIN + _ROW * (sum(rows) + 3 * len(rows))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(_WIDTH, height), layout=layout)
    axes = figure.subplots(len(rows), 2, squeeze=False, height_ratios=rows)
    cells = [
        s for panel in panels.values() for row in panel.values() for s in row.values()
    ]
    for column, measure in zip(axes.T, _measures(cells), strict=True):
        for axis, (title, panel) in zip(column, panels.items(), strict=True):
            colors = _draw(axis, panel, measure)
            if title != _OUTSIDE:
                columns = _columns(panel)
                places = range(0, len(columns), -(-len(columns) // 8))
                axis.set_xticks(places, [str(columns[i]) for i in places])
        bar = figure.colorbar(
            colors,
            ax=column,
            location="bottom",
            aspect=45,
            format=lambda value, place: f"{100 * value:g} %",
        )
        bar.minorticks_off()
        bar.set_label(measure.label, color=_INK)
    for axis, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        axis.set_yticks(range(len(panel)), [_text(k, _LONGEST_KIND) for k in panel])
        heading = _text(title, _LONGEST_NAME)
        axis.set_title(heading, loc="left", weight="bold", fontsize=10, color=_INK)
    _titles(figure, comparison.total, a, b)
    return figure


def _panels(comparison: Comparison) -> dict[str, _Panel]:
    """Stack of layers -> kind -> layer -> sums, in the order of the data's flow."""
    named = [(tensor_names.describe(t.name), t) for t in comparison.weights]
    layers = [name for name, _ in named if name.layer is not None]
    collected: dict[str, dict[str, dict[int, list[Sums]]]] = {_OUTSIDE: {}}
    stacks = list(
        dict.fromkeys(_title(n) for n in sorted(layers, key=lambda n: n.order))
    )
    collected |= {title: {} for title in stacks[:_MOST_STACKS]}
    for name, tensor in sorted(named, key=lambda item: item[0].kind_order):
        outside = name.layer is None
        kind = tensor.name.removesuffix(".weight") if outside else name.label
        title = _title(name)
        if title not in collected:
            title = f"{len(stacks) - _MOST_STACKS} other stacks, by layer"
        row = collected.setdefault(title, {}).setdefault(kind, {})
        row.setdefault(name.layer or 0, []).append(tensor.sums)
    return {
        title: _few(
            {k: {i: add(s) for i, s in row.items()} for k, row in panel.items()}
        )
        for title, panel in collected.items()
        if panel
    }


def _columns(panel: _Panel) -> list[int]:
    """The layers, of which a strange name may skip a billion."""
    return sorted({layer for row in panel.values() for layer in row})


def _title(name: tensor_names.TensorName) -> str:
    return _OUTSIDE if name.layer is None else f"{name.stack or 'layers'}, by layer"


def _few(panel: _Panel) -> _Panel:
    """A panel of at most `_MOST_ROWS` rows; the smallest kinds are put together."""
    if len(panel) <= _MOST_ROWS:
        return panel
    by_size = sorted(panel, key=lambda kind: -add(panel[kind].values()).elements)
    others = by_size[_MOST_ROWS - 1 :]
    layers = sorted({layer for kind in others for layer in panel[kind]})
    joined = {
        layer: add(panel[kind][layer] for kind in others if layer in panel[kind])
        for layer in layers
    }
    kept = {kind: row for kind, row in panel.items() if kind not in set(others)}
    return {**kept, f"{len(others)} others": joined}


class _Measure(NamedTuple):
    """What is drawn of sums: number, colour and text."""

    label: str
    value: Callable[[Sums], float | None]
    text: Callable[[Sums], str]
    norm: Normalize
    colors: str


def _measures(cells: list[Sums]) -> tuple[_Measure, _Measure]:
    """Distances are logarithmic: norms move a hundred times less than the rest."""
    found = [distance for sums in cells if (distance := sums.relative_distance)]
    highest = 10.0 ** min(math.ceil(math.log10(max(found, default=1.0))), 300)
    lowest = 10.0 ** math.floor(math.log10(min(found, default=1.0)))
    lowest = min(max(lowest, highest / 10**_DECADES), highest / 10)
    return (
        _Measure(
            "distance  ‖A − B‖ / ‖A‖",
            lambda sums: sums.relative_distance,
            lambda sums: (
                "—"
                if sums.relative_distance is None
                else f"{100 * sums.relative_distance:.2g} %"
            ),
            LogNorm(lowest, highest, clip=True),
            "YlOrRd",
        ),
        _Measure(
            "share of equal entries",
            lambda sums: sums.equal_share,
            lambda sums: percent(sums.equal, sums.elements),
            Normalize(0, 1),
            "YlGnBu",
        ),
    )


def _draw(axis: Any, panel: _Panel, measure: _Measure) -> Any:
    """A row of cells for each kind; white where there is no tensor, or no number."""
    columns = {layer: place for place, layer in enumerate(_columns(panel))}
    cells = np.full((len(panel), len(columns)), np.nan)
    for place, row in enumerate(panel.values()):
        for layer, sums in row.items():
            cells[place, columns[layer]] = measure.value(sums)  # None becomes NaN
        axis.text(
            1.01,
            place,
            measure.text(add(row.values())),
            transform=axis.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=_INK,
        )
    edges = (np.arange(count + 1) - 0.5 for count in cells.shape[::-1])
    colors = axis.pcolormesh(
        *edges,
        cells,
        norm=measure.norm,
        cmap=measure.colors,
        edgecolor="white",
        linewidth=0.3,
    )
    axis.invert_yaxis()
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=8, colors=_INK)
    return colors


def _titles(figure: Figure, total: Sums, a: str, b: str) -> None:
    distance, cosine = total.relative_distance, total.cosine
    facts = [
        "" if distance is None else f"distance {100 * distance:.3g} %",
        "" if cosine is None else f"cosine {cosine:.8f}",
        f"{percent(total.equal, total.elements)} of {total.elements:,} entries equal",
        f"largest difference {total.largest:.3g}",
    ]
    names = [f"A  {_text(a, _LONGEST_NAME)}", f"B  {_text(b, _LONGEST_NAME)}"]
    text = "\n".join([*names, "  ·  ".join(filter(None, facts))])
    figure.suptitle(text, x=0.012, ha="left", fontsize=11, linespacing=1.5, color=_INK)


def _text(label: str, longest: int) -> str:
    """The end of a long name, `$` being no mathematics."""
    text = label if len(label) <= longest else "…" + label[1 - longest :]
    return clean(text).replace("$", r"\$")
