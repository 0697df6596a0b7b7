"""Puts a model's units in the order of another's, before a merge of the two.

MODEL is written to --output with the units of its feed-forward layers and its heads of
attention in the places of those of --to that they are most alike. It computes what it
computed. Fine-tuned models of one base are aligned as they are; models that were
trained from different beginnings are not, and --units=ffn,heads,residual then aligns
the entries of the residual stream as well, with both models in memory.

Where --to has more units or heads, units of zeros are added, which add nothing.
"""

from __future__ import annotations

from m3jax.commands import process
from m3jax.commands.cli import UsageError, define, need
from m3jax.commands.tables import say

USAGE = "m3jax align MODEL --to=OTHER --output=DIR"
TAKES = (1, "one model")
LESS_MEMORY = "without residual among --units it takes two models' layer at a time"

_TO = define("to", str, "The model whose order it is.")
_OUTPUT = define("output", str, "The folder to make.")
_UNITS = define(
    "units", list, "What may be moved: ffn, heads, residual.", ["ffn", "heads"]
)


def main(positional: list[str]) -> int:
    need(USAGE, to=_TO.value, output=_OUTPUT.value)
    to, output = str(_TO.value), str(_OUTPUT.value)
    process.leave_at_once()
    from m3jax.align import align  # only now JAX
    from m3jax.align.architectures import GROUPS

    for own in _UNITS.value:
        if own not in GROUPS:
            raise UsageError(f"--units: {own!r} needs one of {', '.join(GROUPS)}")
    (model,) = positional
    made = align(model, to, output, groups=_UNITS.value, say=say)
    for kind, (units, moved, added) in made.moved.items():
        told = f", {added} of zeros added" if added else ""
        print(f"{kind:10} {moved} of {units} moved{told}")
    if not any(moved or added for _, moved, added in made.moved.values()):
        print("it was aligned before: the output is a copy")
    print(f"output     {made.output}")
    return 0
