"""Lists the methods and transforms, with their parameters.

--markdown gives the tables of docs/METHODS.md.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from m3jax.commands.cli import UsageError
from m3jax.commands.tables import table
from m3jax.methods import METHODS, TRANSFORMS, Method, Step
from m3jax.methods.fields import Weights
from m3jax.recipe import values

USAGE = "m3jax methods [NAME ...] [--markdown]"

_MARKDOWN = flags.DEFINE_bool("markdown", False, "As tables in Markdown.")
_SCOPES = {"": "1", "tensor": "1 + per tensor", "layer": "1 + per layer"}


def main(positional: list[str]) -> int:
    steps = {**METHODS, **TRANSFORMS}
    for name in positional:
        if name not in steps:
            raise UsageError(f"no method {name!r}; there are {', '.join(steps)}")
    if _MARKDOWN.value:
        print(markdown())
        return 0
    for name, cls in steps.items():
        if not positional:
            print(f"{name:20}{summary(cls)}")
        elif name in positional:
            print("\n".join([f"{name}: {cls.__doc__ or ''}", *described(cls), ""]))
    return 0


def summary(cls: type[Step]) -> str:
    """The first sentence of a step's docstring."""
    text = " ".join((cls.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".")


def described(cls: type[Step]) -> list[str]:
    """The parameters of a step, as lines of a table."""
    rows = [
        (f"{cls.name}.{name}", shown(field.default), field.allowed, field.help)
        for name, field in cls.fields().items()
    ]
    return table(("parameter", "default", "allowed", "meaning"), rows, "<<<<")


def markdown() -> str:
    """What each step needs and costs, and its parameters."""
    lines = [
        "| method | result | needs the base | M3's ratios | sees whole | readings |",
        "|---|---|---|---|---|---|",
        *(_row(name, cls()) for name, cls in METHODS.items()),
        "",
        "| parameter | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    for cls in (*METHODS.values(), *TRANSFORMS.values()):
        lines += [
            f"| `{cls.name}.{name}` | `{_escaped(shown(field.default))}` | "
            f"{field.allowed} | {_escaped(field.help)} |"
            for name, field in cls.fields().items()
        ]
    return "\n".join(lines)


def _row(name: str, step: Method) -> str:
    weighs = isinstance(step.fields().get("weights"), Weights)
    return (
        f"| `{name}` | {_escaped(summary(type(step)))} | "
        f"{'yes' if step.needs_base else 'no'} | {'yes' if weighs else 'no'} | "
        f"{step.unit} | {_SCOPES.get(step.scope, '1 + whole model')} |"
    )


def shown(default: Any) -> str:
    """A default as a recipe says it."""
    return str(values.as_json(default))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
