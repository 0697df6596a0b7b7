"""Compares two checkpoints tensor by tensor.

For each tensor A of the first and B of the second, as flat vectors:

    distance   ‖A − B‖ / ‖A‖
    cosine     A · B / (‖A‖ ‖B‖)
    equal      share of entries with the same bits (or value, if dtypes differ)
    largest    max |A − B|

Rows of several tensors take the norms over all their entries; those of integers (such
as position_ids) are left out of them, and mentioned if they differ. "—" is undefined: a
division by 0. Entries that are NaN or infinite are left out of all but `equal`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m3jax.checkpoints.folder import open_checkpoint
from m3jax.commands import reporting, tensor_names
from m3jax.commands.cli import DIFFERENT, UsageError, define, local
from m3jax.commands.tables import clean, percent, shape, table
from m3jax.engine.compare import Compared, Comparison, Described, Sums, add, compare
from m3jax.evaluation import results

USAGE = "m3jax diff A B [--tensors | --json] [--plot=FILE.png] [--exit_code]"
TAKES = (2, "two checkpoints")


_TENSORS = define("tensors", bool, "List every tensor by itself.")
_JSON = define("json", bool, "Print everything as JSON.")
_PLOT = define("plot", str, "PNG to draw, by layer and kind of tensor.")
_EXIT_CODE = define("exit_code", bool, "Exit with 1 if anything differs.")

_HEADER = ("distance", "cosine", "equal", "largest")


def main(positional: list[str]) -> int:
    if _PLOT.value is not None:
        check_plot(local(_PLOT.value))
    with (
        open_checkpoint(positional[0], mergeable=False) as a,
        open_checkpoint(positional[1], mergeable=False) as b,
        reporting.progress() as progress,
    ):
        comparison = compare(a, b, progress=progress)
    if _JSON.value:
        print(json.dumps(_as_json(comparison, a.name, b.name), indent=1))
    else:
        print("\n".join(_report(comparison, a.name, b.name, every=_TENSORS.value)))
    if _PLOT.value is not None:
        from m3jax.commands import plots

        plots.difference(comparison, a.name, b.name, local(_PLOT.value))
    return DIFFERENT if _EXIT_CODE.value and not comparison.same else 0


def check_plot(path: Path) -> None:
    """Finds out before a long comparison that its picture could not be drawn."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot={path} needs the name of a .png file")
    if not path.parent.is_dir():
        raise UsageError(f"--plot={path}: {path.parent} is not a folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib; install it from a checkout: pip install '.[plot]'"
        ) from None


def _report(comparison: Comparison, a: str, b: str, *, every: bool) -> list[str]:
    lines = [f"A  {clean(a)}", f"B  {clean(b)}", ""]
    if not comparison.tensors:
        return [*lines, "no tensor has one shape in A and B", *_remarks(comparison)]
    shown = comparison.tensors if every else comparison.weights
    named = [(tensor_names.describe(tensor.name), tensor) for tensor in shown]
    named.sort(key=lambda item: item[0].order)
    rows = _grouped(
        (t.name if every or n.layer is None else f"{n.stack}.{n.layer}".strip("."), t)
        for n, t in named
    )
    if not every:
        named.sort(key=lambda item: item[0].kind_order)
        rows += [(), *_grouped((name.label, tensor) for name, tensor in named)]
    rows += [(), _row(f"all {len(comparison.weights)} tensors", comparison.total)]
    lines += table(("tensors", *_HEADER), rows, "<>>>>")
    return [*lines, *_remarks(comparison)]


def _grouped(labelled: Iterable[tuple[str, Compared]]) -> list[tuple[str, ...]]:
    """A row per label, in order of its first tensor."""
    groups: dict[str, list[Sums]] = {}
    for label, tensor in labelled:
        groups.setdefault(label, []).append(tensor.sums)
    return [_row(name, add(sums)) for name, sums in groups.items()]


def _row(label: str, sums: Sums) -> tuple[str, ...]:
    return (
        label,
        _number(sums.relative_distance, ".3e"),
        _number(sums.cosine, ".8f"),
        percent(sums.equal, sums.elements),
        _number(sums.largest, ".3e"),
    )


def _number(value: float | None, spec: str) -> str:
    return "—" if value is None else "0" if value == 0 else f"{value:{spec}}"


def _remarks(comparison: Comparison) -> list[str]:
    """What could not be compared, or is not only a matter of values."""
    tensors, lines = comparison.tensors, []
    some_left_out = len(comparison.weights) < len(tensors)
    remarks: list[dict[str, str]] = [
        {name: _unpaired(*sides) for name, sides in comparison.unpaired.items()},
        {
            t.name: f"dtype is {t.dtypes[0]} in A, {t.dtypes[1]} in B"
            for t in tensors
            if len({*t.dtypes}) > 1
        },
        {
            t.name: f"{t.sums.nonfinite:,} entries are NaN or infinite in A or B"
            for t in tensors
            if t.sums.nonfinite
        },
        {
            t.name: f"integers, {percent(t.sums.equal, t.sums.elements)} of them equal"
            for t in tensors
            if some_left_out and t.integer and not t.same
        },
    ]
    for said in remarks:  # tensors of which the same is said share a line
        for label, names in tensor_names.alike(said, said.__getitem__):
            count = f" ({len(names)} tensors)" if len(names) > 1 else ""
            lines.append(f"{label}{count}: {said[names[0]]}")
    lines += [f"note: {clean(note)}" for note in comparison.notes]
    if comparison.same:
        lines.append("A and B are equal: the same tensors with the same bits")
    return ["", *lines] if lines else []


def _unpaired(a: Described | None, b: Described | None) -> str:
    if a and b:
        return f"shape is {shape(a[1])} in A, {shape(b[1])} in B"
    code, sizes = a or b or ("", ())
    return f"only in {'A' if a else 'B'}: {code}, {shape(sizes)}"


def _as_json(comparison: Comparison, a: str, b: str) -> dict[str, Any]:
    unpaired = comparison.unpaired.items()
    return {
        "a": a,
        "b": b,
        "same": comparison.same,
        "total": _sums_as_json(comparison.total),
        "tensors": {
            t.name: {"shape": t.shape, "dtypes": t.dtypes, **_sums_as_json(t.sums)}
            for t in comparison.tensors
        },
        "only_a": {n: _described(x) for n, (x, y) in unpaired if x and not y},
        "only_b": {n: _described(y) for n, (x, y) in unpaired if y and not x},
        "shapes": {n: (x[1], y[1]) for n, (x, y) in unpaired if x and y},
        "notes": comparison.notes,
    }


def _sums_as_json(sums: Sums) -> dict[str, Any]:
    """Numbers that JSON can hold: None where one is undefined."""
    found = {
        "relative_distance": sums.relative_distance,
        "cosine": sums.cosine,
        "equal_share": sums.equal_share,
        "largest_difference": sums.largest,
        "distance": sums.distance,
        "norm_a": math.sqrt(sums.a_squared),
        "norm_b": math.sqrt(sums.b_squared),
        "elements": sums.elements,
        "equal": sums.equal,
        "nonfinite": sums.nonfinite,
    }
    return results.as_json(found)


def _described(tensor: Described) -> dict[str, Any]:
    return {"dtype": tensor[0], "shape": tensor[1]}
