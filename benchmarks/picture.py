"""Draws the picture of end_to_end.py: one line per recipe, a dot per program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

_PROGRAMS = {  # colours that the colour-blind tell apart (Okabe and Ito)
    "floor": ("reading and writing only, one pass", "#777777", "D"),
    "m3jax": ("m3jax", "#0072B2", "o"),
    "mergekit": ("mergekit 0.1.5", "#D55E00", "s"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Dots at the medians, lines from least to greatest, seconds on a log scale."""
    rows = results["rows"][::-1]  # the first one on top
    figure, axes = plt.subplots(
        figsize=(9, 1.6 + 0.42 * len(rows)), layout="constrained"
    )
    for height, row in enumerate(rows):
        if row["mergekit"]:
            ends = [row[name]["wall"]["median"] for name in ("m3jax", "mergekit")]
            axes.plot(ends, [height] * 2, color="#dddddd", linewidth=5, zorder=1)
            middle = (ends[0] * ends[1]) ** 0.5
            faster = row["times_faster"]
            label = f"{faster:.0f} times" if faster >= 10 else f"{faster:.1f} times"
            axes.annotate(
                f"{label} faster",
                (middle, height),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#444444",
            )
        for name, (_, colour, marker) in _PROGRAMS.items():
            if row[name]:
                wall = row[name]["wall"]
                axes.plot(
                    [wall["min"], wall["max"]],
                    [height] * 2,
                    color=colour,
                    linewidth=1.5,
                    zorder=2,
                )
                axes.plot(wall["median"], height, marker, color=colour, zorder=3)
    for title, colour, marker in _PROGRAMS.values():
        axes.plot([], [], marker, color=colour, label=title)
    axes.set_yticks(range(len(rows)), [row["recipe"] for row in rows])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("seconds, whole process (median, least to greatest; log scale)")
    axes.grid(axis="x", which="major", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    machine = results["machine"]
    axes.set_title(
        f"Merging two models of {results['parameters'] / 1e9:.2g} G parameters "
        f"on {machine['cores']} cores",
        loc="left",
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
