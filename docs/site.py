"""The pages of the site that are made rather than written; a hook of mkdocs.yml.

README.md is the home page, and the other files of `_PAGES` are pages as they stand. The
commands' page is what `--help` prints, the methods' page their docstrings. A link to a
file of the repository that is no page keeps its text alone.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from m3jax.__main__ import COMMANDS, main
from m3jax.methods import METHODS, TRANSFORMS

_ROOT = Path(__file__).parents[1]
# Pages that are files of the repository outside docs/.
_PAGES = {
    "index.md": "README.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "BENCHMARKS.md": "benchmarks/README.md",
}
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made."""
    made = {page: (_ROOT / file).read_text() for page, file in _PAGES.items()}
    made |= {"reference/commands.md": _commands(), "reference/methods.md": _methods()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Makes links between files of the repository links between pages."""
    own = page.file.src_uri
    folder = posixpath.dirname(_PAGES.get(own, f"docs/{own}"))
    pages = {file: page for page, file in _PAGES.items()}

    def relinked(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups(default="")
        file = posixpath.normpath(posixpath.join(folder, target))
        found = pages.get(file, file.removeprefix("docs/"))
        if files.get_file_from_path(found) is None:
            if not (_ROOT / file).exists():
                return link[0]  # mkdocs says that it leads nowhere
            return text
        there = posixpath.relpath(found, posixpath.dirname(own) or ".")
        text = _title(file) if text.endswith(".md") else text
        return f"{image}[{text}]({there}{anchor})"

    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(relinked, part) for part in parts[::2]]
    return "".join(parts)


def _title(file: str) -> str:
    """The heading of a page that is a file."""
    heading, _, _ = (_ROOT / file).read_text().partition("\n")
    return heading.removeprefix("# ")


def _commands() -> str:
    lines = ["# Commands", "", "What `m3jax COMMAND --help` prints.", ""]
    for name in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main([name, "--help"])
        lines += [f"## m3jax {name}", "", "```text", printed.getvalue(), "```", ""]
    return "\n".join(lines)


def _methods() -> str:
    lines = [
        "# Methods",
        "",
        "As `m3jax methods NAME` prints them; their parameters and what to believe of",
        "them are in [METHODS.md](../METHODS.md).",
    ]
    options = "show_root_heading: false\n      show_root_toc_entry: false"
    for title, steps in (("Methods", METHODS), ("Transforms", TRANSFORMS)):
        lines += ["", f"## {title}"] if title == "Transforms" else []
        for name, step in steps.items():
            lines += ["", f"### {name}", "", f"`m3jax.{step.__name__}`", ""]
            lines += [f"::: {step.__module__}.{step.__name__}", "    options:"]
            lines += [f"      {options}", "      members: false"]
    return "\n".join(lines)
