"""Every block of the documentation runs, or says why it does not.

The blocks of a page run from top to bottom, in a folder with the demo's models under
the names that the pages use. `<!-- not run: WHY -->` before a block leaves it out,
`<!-- slow: WHY -->` leaves it to `make test-long`; a block with a title is a file.
`make test` runs the pages that are read first, CI all of them.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from grids import thinned

import m3jax
from m3jax import Dare, Recipe
from m3jax.recipe.groups import group
from m3jax.recipe.recipe import FLAT

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DEMO = Path(m3jax.__file__).parent / "demo_data"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"))
}
NAMES = {
    "base": ("base", "BASE"),
    "maths": ("maths", "MATHS", "A", "a", "TUNED"),
    "code": ("code", "CODE", "B", "b"),
    "words": ("words", "WORDS", "C"),
}
ADAPTERS = {"ADAPTER": "maths", "ADAPTER_A": "maths", "ADAPTER_B": "code"}
_BLOCK = re.compile(
    r"(?:^<!-- (not run|slow): ([^>]+) -->\n)?"
    r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$',
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its mark and the reason, language, title and text."""

    mark: str
    reason: str
    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*own.groups(default="")) for own in _BLOCK.finditer(PAGES[page])]


RUNS = [
    page for page in PAGES if any(b.language in ("sh", "python") for b in blocks(page))
]
FIRST = {
    "README.md",
    "CONTRIBUTING.md",
    "docs/QUICKSTART.md",
    "docs/MERGEKIT.md",
    "docs/METHODS.md",
    "docs/RECIPE.md",
    "docs/REPRODUCIBILITY.md",
}
SLOW = [(page, b) for page in PAGES for b in blocks(page) if b.mark == "slow"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of a page, with what all pages have: tasks, and `m3jax`."""
    for where in (tmp_path, tmp_path / "tasks"):
        shutil.copytree(DEMO / "tasks", where, dirs_exist_ok=True)
        for path in where.glob("*.jsonl"):  # a few examples, for speed
            few = path.read_text().splitlines(keepends=True)[:8]
            path.write_text("".join(few))
    first, *_ = json.loads((tmp_path / "train.json").read_text())["tasks"]
    (tmp_path / "tasks.json").write_text(json.dumps(first))
    program = tmp_path / ".bin" / "m3jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m m3jax "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")  # of processes; pages set their own
    monkeypatch.chdir(tmp_path)
    # What users write need not be strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield tmp_path


def furnish(text: str, run: Any) -> None:
    """Puts the models and adapters that a text names into the current folder."""
    said = set(re.findall(r"\w+", text))
    for model, names in NAMES.items():
        for name in said & set(names):
            shutil.copytree(DEMO / model, name)
    for name in sorted(said & set(ADAPTERS)):
        command = ("lora", "extract", f"--base={DEMO / 'base'}", f"--output={name}")
        ran = run(*command, f"--model={DEMO / ADAPTERS[name]}", "--rank=4")
        assert ran.code == 0, ran.err


def write_files(found: list[Block]) -> None:
    """Writes the blocks that have a title."""
    for own in found:
        if own.title:
            Path(own.title).write_text(own.text)


def shell(text: str, run: Any) -> None:
    """Runs commands of m3jax here, one after the other, where they need no shell."""
    joined = text.replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in joined.splitlines()]
    commands = [command for command in commands if command]
    words = {command[0] for command in commands}
    if words <= {"m3jax", "cat", "cmp"} and not re.search(r"[|&;<>$]", joined):
        for command in commands:
            if command[0] == "m3jax":
                ran = run(*command[1:])
                assert ran.code == 0, (command, ran.err)
            else:
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return
    ended = subprocess.run(
        ["bash", "-euc", text], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, (text, ended.stderr)


@pytest.mark.parametrize("page", thinned(RUNS, FIRST.__contains__))
def test_blocks_run(page: str, folder: Path, run: Any):
    found = [own for own in blocks(page) if not own.mark]
    furnish("\n".join(own.text for own in found), run)
    write_files(found)
    names: dict[str, Any] = {"__name__": page}
    for own in found:
        if own.language == "sh":
            shell(own.text, run)
        elif own.language == "python":
            exec(compile(own.text, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), SLOW, ids=[page for page, _ in SLOW])
def test_slow_blocks_run(page: str, block: Block, folder: Path, run: Any):
    write_files(blocks(page))
    furnish(block.text, run)
    shell(block.text, run)


def test_every_fence_is_understood():
    """None is passed over because of how it is written."""
    for page, text in PAGES.items():
        assert text.count("\n```") == 2 * len(blocks(page)), page
        for mark in re.findall(r"<!--(.*?)-->", text, re.DOTALL):
            assert re.match(r" (not run|slow): \S", mark), (page, mark)


def test_recipe_table_has_every_field_with_its_default():
    table = PAGES["docs/RECIPE.md"].partition("| field |")[2]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `(.+?)` \|", table, re.M))
    expected = {name: str(default) for name, default in FLAT.items()}
    fields = {**Recipe().to_dict(), "dare": group(Dare())}
    for name, value in fields.items():
        if name in ("average", "transforms"):  # docs/METHODS.md has those of all steps
            continue
        own = value if isinstance(value, dict) else {"": value}
        for field, default in own.items():
            expected[f"{name}.{field}" if field else name] = str(default)
    assert rows == expected


def test_every_preset_of_learn_is_in_its_table():
    presets = {path.stem for path in (ROOT / "configs" / "learn").glob("[!_]*.py")}
    rows = re.findall(
        r"^\| (`[\w`, ]+`) \|.*\| (?:yes|no) \|$", PAGES["docs/LEARN.md"], re.M
    )
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == presets


def test_files_that_pages_name_exist():
    """mkdocs looks at the anchors as well (`make docs`)."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text):
            there = (ROOT / page).parent / target
            made = there == DOCS / "reference" / "methods.md"  # docs/site.py
            assert made or there.exists(), (page, target)


def test_the_reference_has_every_public_name():
    pages = (DOCS / "reference").glob("*.md")
    named = set(
        re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in pages), re.M)
    )
    expected = {f"m3jax.{name}" for name in m3jax.__all__}
    for module in (m3jax.learn, m3jax.search):
        expected.remove(module.__name__)
        expected |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert expected <= named


def modules_with_examples() -> list[str]:
    """Modules with doctests; what `>>>` stands for elsewhere is no Python."""
    folders = [ROOT / "m3jax" / name for name in ("methods", "engine", "exploration")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(files)
        if "\n        >>> " in path.read_text()
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_docstrings(name: str, tmp_path: Path):
    """`folder` is one that is not there yet."""
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, extraglobs={"folder": tmp_path / "folder"})
    assert (failed, tried > 0) == (0, True)
