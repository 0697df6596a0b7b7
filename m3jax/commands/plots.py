"""The picture of a comparison; importing this imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from m3jax.checkpoints.errors import CheckpointError
from m3jax.commands import tensor_names
from m3jax.commands.tables import clean
from m3jax.engine.compare import Comparison, Sums, add

# Okabe and Ito's colours, which the colour-blind can tell apart, and two more.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_COLORS += ["#882255", "#777777"]
_INK, _FAINT = "#222222", "#8A8A8A"
_MOST_LINES = len(_COLORS)
_FEW_LAYERS = 40  # up to which a line has a mark at every layer
_LONGEST_NAME = 60  # characters
_LONGEST_KIND = 24
_LEGEND_COLUMNS = 4

_OUTSIDE = "outside the layers"
_Series = dict[str, dict[int, Sums]]  # kind -> layer -> sums


def difference(comparison: Comparison, a: str, b: str, path: Path) -> None:
    """Draws a comparison: a column per part of the model, x is the layer.

    The upper row has the relative distance, the lower one the share of equal entries.

    Raises:
      CheckpointError: no tensor could be compared.
    """
    panels = _panels(comparison)
    if not panels:
        raise CheckpointError(f"{a} and {b} have no tensor in common; nothing to draw")
    widths = [_width(title, series) for title, series in panels.items()]
    figure = Figure(
        figsize=(1.6 + sum(widths), 7.0),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
    )
    axes = figure.subplots(
        2, len(panels), squeeze=False, sharex="col", width_ratios=widths
    )
    _titles(figure, comparison.total, a, b)
    for column, (title, series) in zip(axes.T, panels.items(), strict=True):
        draw = _draw_bars if title == _OUTSIDE else _draw_lines
        draw(column[0], series, _distance)
        _from_zero(column[0], series)
        draw(column[1], series, _equal)
        column[1].set_ylim(0, 100)
        pad = 28 if max(map(len, panels.values())) <= _LEGEND_COLUMNS else 44
        column[0].set_title(title, loc="left", weight="bold", color=_INK, pad=pad)
        if title != _OUTSIDE:
            _legend(column[0], len(series))
            column[1].set_xlabel("layer", color=_INK)
            column[1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes[0, 0].set_ylabel("distance  ‖A − B‖ / ‖A‖,  %", color=_INK)
    axes[1, 0].set_ylabel("equal entries,  %", color=_INK)
    for axis in axes.flat:
        _plain(axis)
    figure.align_ylabels(axes[:, 0])
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _panels(comparison: Comparison) -> dict[str, _Series]:
    """Part of the model -> kind -> layer -> sums, in the order of the data's flow."""
    named = [(tensor_names.describe(t.name), t.sums) for t in comparison.tensors]
    stacks = {name.stack for name, sums in named if name.layer is not None}
    collected: dict[str, dict[str, dict[int, list[Sums]]]] = {}
    for name, sums in sorted(named, key=lambda item: item[0].order):
        inside = name.layer is not None
        kind = f"{name.stack} {name.kind}" if inside and len(stacks) > 1 else name.kind
        series = collected.setdefault(name.part if inside else _OUTSIDE, {})
        series.setdefault(kind, {}).setdefault(name.layer or 0, []).append(sums)
    order = sorted(collected, key=lambda part: (*tensor_names.PARTS, part).index(part))
    return {
        part: _few(
            {
                kind: {layer: add(sums) for layer, sums in layers.items()}
                for kind, layers in collected[part].items()
            }
        )
        for part in order
    }


def _few(series: _Series) -> _Series:
    """At most as many kinds as there are colours; the smallest are put together."""
    if len(series) <= _MOST_LINES:
        return series
    by_size = sorted(series, key=lambda kind: -add(series[kind].values()).elements)
    kept = set(by_size[: _MOST_LINES - 1])
    others: dict[int, Sums] = {}
    for kind in by_size[_MOST_LINES - 1 :]:
        for layer, sums in series[kind].items():
            others[layer] = others.get(layer, Sums()) + sums
    found = {kind: layers for kind, layers in series.items() if kind in kept}
    return found | {f"{len(series) - len(kept)} others": dict(sorted(others.items()))}


def _width(title: str, series: _Series) -> float:
    """Inches."""
    if title == _OUTSIDE:
        return 0.9 + 0.55 * len(series)
    return 3.6


def _distance(sums: Sums) -> float | None:
    relative = sums.relative_distance
    return None if relative is None else 100 * relative


def _equal(sums: Sums) -> float | None:
    share = sums.equal_share
    return None if share is None else 100 * share


def _draw_lines(
    axis: Any, series: _Series, value: Callable[[Sums], float | None]
) -> None:
    for (kind, layers), color in zip(series.items(), _COLORS, strict=False):
        points = [(layer, value(sums)) for layer, sums in layers.items()]
        points = [(layer, y) for layer, y in points if y is not None]
        axis.plot(
            *zip(*points, strict=True) if points else ([], []),
            color=color,
            linewidth=1.6,
            marker="o" if len(points) <= _FEW_LAYERS else None,
            markersize=3.5,
            label=_text(kind, _LONGEST_KIND),
            clip_on=False,
        )


def _draw_bars(
    axis: Any, series: _Series, value: Callable[[Sums], float | None]
) -> None:
    labels = [_text(kind, _LONGEST_KIND) for kind in series]
    heights = [value(add(layers.values())) for layers in series.values()]
    axis.bar(labels, [height or 0 for height in heights], color=_COLORS[0], width=0.55)
    axis.set_xlim(-0.7, len(labels) - 0.3)
    axis.tick_params(axis="x", rotation=35)
    for label in axis.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")


def _from_zero(axis: Any, series: _Series) -> None:
    """Each panel has its own scale: norms move a hundred times less than the rest."""
    sums = [sums for layers in series.values() for sums in layers.values()]
    highest = max((_distance(one) or 0 for one in sums), default=0)
    axis.set_ylim(0, 1.08 * highest or 1)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")


def _legend(axis: Any, count: int) -> None:
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=min(count, _LEGEND_COLUMNS),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=1.2,
        columnspacing=1.1,
        handletextpad=0.5,
        borderaxespad=0.2,
    )


def _titles(figure: Figure, total: Sums, a: str, b: str) -> None:
    facts = []
    if (distance := _distance(total)) is not None:
        facts.append(f"distance {distance:.3g} %")
    if total.cosine is not None:
        facts.append(f"cosine {total.cosine:.8f}")
    if (equal := _equal(total)) is not None:
        facts.append(f"{equal:.2f} % of {total.elements:,} entries equal")
    facts.append(f"largest difference {total.largest:.3g}")
    names = [f"A  {_text(a, _LONGEST_NAME)}", f"B  {_text(b, _LONGEST_NAME)}"]
    figure.suptitle(
        "\n".join([*names, "  ·  ".join(facts)]),
        x=0.012,
        ha="left",
        fontsize=12,
        linespacing=1.5,
        color=_INK,
    )


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_INK, labelsize=9)


def _text(label: str, longest: int) -> str:
    """The end of a long name, `$` being no mathematics and `_` hiding no label."""
    text = label if len(label) <= longest else "…" + label[1 - longest :]
    text = clean(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
