"""Lists the methods and transforms, with their parameters.

--markdown gives the tables of docs/METHODS.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from m3jax.commands import help
from m3jax.commands.cli import UsageError, define
from m3jax.methods import METHODS, TRANSFORMS, Step
from m3jax.methods.fields import Weights
from m3jax.recipe import values

USAGE = "m3jax methods [NAME ...] [--markdown]"
TAKES = None

_MARKDOWN = define("markdown", bool, "As tables in Markdown.")


def main(positional: list[str]) -> int:
    steps = {**METHODS, **TRANSFORMS}
    for name in positional:
        if name not in steps:
            raise UsageError(f"no method {name!r}; there are {', '.join(steps)}")
    if _MARKDOWN.value:
        print(markdown())
        return 0
    if not positional:
        rows = ((name, summary(cls)) for name, cls in steps.items())
        print("\n".join(help.listed(rows)))
    for name, cls in steps.items():
        if name in positional:
            text = inspect.cleandoc(cls.__doc__ or "")
            print("\n".join([f"{name}: {text}", "", *described(cls), ""]))
            if cls.studies:
                print("\n".join(help.wrapped(f"Found in use: {cls.studies}")))
    return 0


def summary(cls: type[Step]) -> str:
    """The first sentence of a step's docstring."""
    text = " ".join((cls.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".")


def described(cls: type[Step]) -> list[str]:
    """The parameters of a step: meaning, what is allowed, default."""
    return help.listed(
        (
            f"{cls.name}.{name}",
            f"{field.help}; {field.allowed} [{shown(field.default)}]",
        )
        for name, field in cls.fields().items()
    )


def source(cls: type[Step]) -> str:
    """Where a step comes from, what it agrees with, and where it departs from that."""
    text = " ".join((cls.__doc__ or "").split())
    return text.rpartition("Source: ")[2] if "Source: " in text else ""


def markdown() -> str:
    """What each step needs and costs, what is known of it, and its parameters."""
    steps = [*METHODS.values(), *TRANSFORMS.values()]
    return "\n".join(
        [
            *_table("method | result | needs | M3's ratios | cost", map(_row, steps)),
            "",
            *_table("method | source, agreement | found in use", map(_known, steps)),
            "",
            *_table(
                "parameter | default | allowed | meaning",
                (
                    (f"`{cls.name}.{n}`", f"`{shown(f.default)}`", f.allowed, f.help)
                    for cls in steps
                    for n, f in cls.fields().items()
                ),
            ),
        ]
    )


def _table(header: str, rows: Iterable[Iterable[str]]) -> list[str]:
    line = "|---" * (header.count("|") + 1) + "|"
    cells = (" | ".join(text.replace("|", "\\|") for text in row) for row in rows)
    return [f"| {header} |", line, *(f"| {row} |" for row in cells)]


def _row(cls: type[Step]) -> tuple[str, ...]:
    """What a step does, needs and costs, with its defaults."""
    step = cls()
    needs = ["base"] * step.needs_base + ["statistics of each model"] * bool(
        step.beside
    )
    weighs = isinstance(step.fields().get("weights"), Weights)
    reads = {"": "one reading", "model": "one and those of the whole model"}
    holds = {"element": "chunks", "row": "rows", "matrix": "whole matrices"}
    cost = reads.get(step.scope, f"one and those by {step.scope}")
    return (
        f"`{cls.name}`",
        summary(cls),
        ", ".join(needs) or "nothing",
        "yes" if weighs else "no",
        f"{cost}; {holds[step.unit]}",
    )


def _known(cls: type[Step]) -> tuple[str, ...]:
    return f"`{cls.name}`", source(cls), cls.studies or "—"


def shown(default: Any) -> str:
    """A default as a recipe says it."""
    return str(values.as_json(default))
