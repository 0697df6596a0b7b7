"""Draws the folders of m3jax and which imports which: docs/architecture.png.

python benchmarks/architecture.py --output=docs/architecture.png
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from absl import app, flags

_OUTPUT = flags.DEFINE_string("output", "docs/architecture.png", "The picture.")

_PACKAGE = Path(__file__).parent.parent / "m3jax"
_WHAT = {
    "commands": "flags in, lines out",
    "lora": "adapters out of models",
    "moe": "mixtures of experts",
    "align": "units in another's order",
    "measuring": "Fisher, Gram, on tasks",
    "exploration": "many draws, the best one",
    "learn": "coefficients by gradient",
    "search": "other systems' searches",
    "runs": "what long runs have in common",
    "evaluation": "tasks and scores",
    "models": "forward passes",
    "engine": "plan, measure, kernel, write",
    "checkpoints": "formats, places, output, record",
    "recipe": "what is done, in numbers and words",
    "methods": "one file a method",
}


def imports() -> dict[str, set[str]]:
    """The folders whose modules each folder's modules import, types included."""
    found: dict[str, set[str]] = {name: set() for name in _WHAT}
    for path in _PACKAGE.rglob("*.py"):
        home = path.relative_to(_PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "m3jax" and len(parts) > 1 and home in found:
                    found[home] |= {parts[1]} & (found.keys() - {home})
    return found


def levels(arrows: dict[str, set[str]]) -> dict[str, int]:
    """How far each folder stands above the lowest that it imports."""
    height: dict[str, int] = {}

    def of(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            sys.exit(f"imports go in a circle: {' -> '.join((*above, name))}")
        if name not in height:
            below = [of(other, (*above, name)) for other in sorted(arrows[name])]
            height[name] = 1 + max(below, default=-1)
        return height[name]

    for name in arrows:
        of(name)
    return height


def main(arguments: list[str]) -> None:
    del arguments
    arrows = imports()
    missing = {
        path.parent.name for path in _PACKAGE.glob("*/__init__.py")
    } - _WHAT.keys()
    if missing:
        sys.exit(f"say what these folders are for: {', '.join(sorted(missing))}")
    height = levels(arrows)
    rows: dict[int, list[str]] = {}
    for name, level in height.items():
        rows.setdefault(level, []).append(name)
    place = {
        # Rows of one stand left and right in turn, so that arrows pass beside them.
        name: (
            (i + 0.5) / len(own) * 10 + (len(own) == 1) * (level % 3 - 1) * 1.6,
            level * 1.5,
        )
        for level, own in rows.items()
        for i, name in enumerate(own)
    }
    figure, axes = plt.subplots(figsize=(12, 1.5 * len(rows) + 0.5))
    for name, others in arrows.items():
        for other in others:
            axes.annotate(
                "",
                xy=(place[other][0], place[other][1] + 0.38),
                xytext=(place[name][0], place[name][1] - 0.38),
                arrowprops={"arrowstyle": "->", "color": "#8a8f98", "lw": 1.1},
            )
    for name, (x, y) in place.items():
        lines = sum(
            len(path.read_text().splitlines())
            for path in (_PACKAGE / name).rglob("*.py")
        )
        axes.text(
            x,
            y,
            f"{name}/\n{_WHAT[name]}\n{lines:,} lines",
            ha="center",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.45", "fc": "#f3f6fa", "ec": "#3b6ea5"},
        )
    axes.set_xlim(0, 10)
    axes.set_ylim(-0.8, max(y for _, y in place.values()) + 0.8)
    axes.axis("off")
    figure.savefig(_OUTPUT.value, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    app.run(main)
