"""Runs m3jax's command line inside the test's process, as often as a test likes."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import signal
from collections.abc import Callable

import pytest
from absl.testing import flagsaver

from m3jax.__main__ import COMMANDS, main


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that an error has to be; progress is no error."""
        lines = [
            line for line in self.err.splitlines() if not line.startswith("m3jax: ")
        ]
        assert len(lines) == 1, self.err
        return lines[0]


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: `run("diff", a, b, "--json")`."""

    def run_(*arguments: object) -> Ran:
        if arguments and arguments[0] in COMMANDS:  # flagsaver keeps known flags alone
            importlib.import_module(f"m3jax.commands.{arguments[0]}")
        terminate = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with flagsaver.flagsaver():  # flags are the process's
                code = main([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, terminate)
            logging.captureWarnings(False)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run_
