"""--help: at 80 columns, the common flags first, none forgotten."""

from __future__ import annotations

import importlib
import re

import pytest
from command_line import Run

from m3jax.__main__ import COMMANDS
from m3jax.commands.help import flags_of
from m3jax.methods import METHODS, TRANSFORMS

every_command = pytest.mark.parametrize("command", COMMANDS)


def modules_of(command: str):
    module = importlib.import_module(f"m3jax.commands.{command}")
    return [module, *getattr(module, "SHARED", [])]


@every_command
def test_it_fits_a_terminal_and_names_every_flag_once(run: Run, command: str):
    ran = run(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert [line for line in ran.out.splitlines() if len(line) > 80] == []
    assert f"usage: m3jax {command}" in ran.out
    shown = re.findall(r"^  --(?:\[no\])?(\w+)(?=[= \n])", ran.out, re.MULTILINE)
    own = [name for module in modules_of(command) for name in flags_of(module)]
    how = ["how"] * 3 * (command == "lora")  # which its text lists once more
    assert sorted(set(shown) - {"config"}) == sorted({*own, "debug"})
    assert len(shown) - shown.count("config") == len({*own, "debug"}) + len(how)
    assert "repeat this option" not in ran.out


@every_command
def test_groups_name_flags_that_there_are(command: str):
    for module in modules_of(command):
        own = set(flags_of(module))
        grouped = [n for named in getattr(module, "GROUPS", {}).values() for n in named]
        assert set(grouped) <= own
        assert len(grouped) == len(set(grouped))


def test_the_common_flags_come_first(run: Run):
    first = run("merge", "--help").out.split("\n\n")[2]
    names = re.findall(r"^  --(?:\[no\])?([\w.]+)", first, re.MULTILINE)
    assert names == [
        *("base", "models", "output", "config", "config.FIELD"),
        *("seed", "overwrite", "resume", "dry_run"),
    ]
    assert "[0]" in first


def test_the_list_of_methods_fits_too(run: Run):
    listed = run("methods").out
    assert [line for line in listed.splitlines() if len(line) > 80] == []
    steps = METHODS | TRANSFORMS
    assert re.findall(r"^  (\w+)", listed, re.MULTILINE) == list(steps)
    own = run("methods", "dare").out
    for name, field in steps["dare"].fields().items():
        assert re.search(rf"^  dare\.{name} ", own, re.MULTILINE)
        assert field.allowed in " ".join(own.split())
