"""`m3jax COMMAND --help`: the common flags first, then the others in groups."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from types import ModuleType

from absl import flags

WIDTH = 80
_NAMES = 26  # columns of the flags; a longer one has a line of its own
_OTHERS = "Everywhere"
# Instead of the last word of a flag's name, in capitals.
_VALUES = {
    **dict.fromkeys(("to", "tokenizer_from", "unmerged_from"), "MODEL"),
    **dict.fromkeys(("documents", "export", "profile"), "DIR"),
    "plot": "FILE",
    "push_to": "ORG/NAME",
    "rename": "RULE",
}

Row = tuple[str, str]  # a flag as it is typed, and what it does


def text(name: str, module: ModuleType, everywhere: ModuleType) -> str:
    """What --help prints.

    A module says by `GROUPS` (a title, and names of flags) which of its flags belong
    together; those that no group names are the common ones, and come first, with the
    `ROWS` of what is no flag of absl's behind --output. Then comes the rest of its
    docstring, of which indented lines stay as they are, and its `MORE_HELP`.

    Args:
      name: of the command.
      module: of it, see `cli.run`.
      everywhere: the module of the flags that all commands have.
    """
    described, _, rest = (module.__doc__ or "").strip().partition("\n\n")
    groups: dict[str, list[Row]] = {"": []}
    for own in (module, *getattr(module, "SHARED", [])):
        titles = {
            name: title
            for title, named in getattr(own, "GROUPS", {}).items()
            for name in named
        }
        for title in dict.fromkeys(titles.values()):
            groups.setdefault(title, [])
        for flag in flags_of(own):
            groups[titles.get(flag, "")].append(_row(flags.FLAGS[flag]))
    groups[_OTHERS] = [_row(flags.FLAGS[flag]) for flag in flags_of(everywhere)]
    common = [name.partition("=")[0] for name, _ in groups[""]]
    place = common.index("--output") + 1 if "--output" in common else len(common)
    groups[""][place:place] = getattr(module, "ROWS", [])
    lines = [*wrapped(f"m3jax {name}: {described}"), "", *_usage(module.USAGE)]
    for title, rows in groups.items():
        if rows:
            lines += ["", *([f"{title}:"] if title else []), *listed(rows)]
    lines += ["", *_reflowed(rest)] if rest else []
    return "\n".join([*lines, *getattr(module, "MORE_HELP", [])])


def flags_of(module: ModuleType) -> list[str]:
    """The names of the flags that a module defines, in their order.

    absl knows but the last module that defines one of a name.
    """
    return [
        own.name for own in vars(module).values() if isinstance(own, flags.FlagHolder)
    ]


def words(names: Iterable[str]) -> list[str]:
    """Names as indented lines."""
    return wrapped("  ".join(names), indent="  ")


def _row(flag: flags.Flag) -> Row:
    help = (flag.help or "").partition(";\n    repeat")[0]  # absl's own words
    if flag.boolean:
        return f"--[no]{flag.name}", help + " [on]" * bool(flag.default)
    choices = list(getattr(flag.parser, "enum_values", ()))
    help = help.removeprefix(f"<{'|'.join(choices)}>: ")
    value = _VALUES.get(flag.name, flag.name.rpartition("_")[2].upper())
    if choices and len("|".join(choices)) < _NAMES:
        value = "|".join(choices)
    elif choices:
        help = f"{', '.join(choices)}: {help[:1].lower()}{help[1:]}"
    elif isinstance(flag.parser, (flags.IntegerParser, flags.FloatParser)):
        value = "N"
    elif isinstance(flag.parser, flags.ListParser):
        value = "A,B"
    default: object = flag.default
    if isinstance(default, list):
        default = ",".join(default)
    shown = f" [{default}]" if default not in (None, "") else ""
    return f"--{flag.name}={value}", help + shown


def listed(rows: Iterable[Row]) -> list[str]:
    """Names and what they are, in two columns."""
    lines = []
    for name, help in rows:
        first, *more = wrapped(help, indent=" " * (_NAMES + 2))
        if len(name) < _NAMES:
            lines += [f"  {name:{_NAMES}}{first.lstrip()}", *more]
        else:
            lines += [f"  {name}", first, *more]
    return lines


def _usage(usage: str) -> list[str]:
    ways = [way.strip() for way in usage.splitlines()]
    return [
        line
        for i, way in enumerate(ways)
        for line in wrapped(
            f"{'       ' if i else 'usage: '}{way}", later=" " * len("usage: m3jax ")
        )
    ]


def _reflowed(body: str) -> list[str]:
    lines: list[str] = []
    paragraph: list[str] = []
    for line in [*body.strip("\n").split("\n"), ""]:
        if line and not line.startswith(" "):
            paragraph.append(line)
            continue
        lines += wrapped(" ".join(paragraph)) if paragraph else []
        paragraph = []
        lines.append(line)
    return lines[:-1]


def wrapped(line: str, indent: str = "", later: str = "") -> list[str]:
    """A line as lines of a terminal's width; `later` indents all but the first."""
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=later or indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
