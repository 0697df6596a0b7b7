"""Ctrl-C and SIGTERM at every moment of a command, from its first imports on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interruptions import Merge, partial_of, write_models

from m3jax.commands import signals

ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
numbers = pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)


@pytest.fixture(scope="module")
def merge(tmp_path_factory) -> Merge:
    shapes = {f"model.layers.{i}.up_proj.weight": (331, 487) for i in range(16)}
    return write_models(tmp_path_factory.mktemp("models"), shapes)


def stopped_after(
    seconds: float, number: signal.Signals, arguments: list[str]
) -> tuple[int, list[str]]:
    """Exit code and errors of a command that gets a signal so long after its start.

    Its start is when Python has come to m3jax; the interpreter's own is not m3jax's.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "m3jax", *arguments],
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not catches(process.pid, signal.SIGTERM):
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    progress = re.compile(r"m3jax: (measuring|merging|note)")
    return process.returncode, [s for s in err.splitlines() if not progress.match(s)]


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"SigCgt:\s*(\w+)", status)
    return caught is not None and int(caught[1], 16) >> (number - 1) & 1 == 1


def check(seconds: float, number: signal.Signals, merge: Merge, output: Path) -> None:
    arguments = merge.arguments(output, ["--config.method=ties"])
    code, lines = stopped_after(seconds, number, arguments)
    if output.exists():  # the machine was faster
        return
    expected, said = ENDS[number]
    assert (code, len(lines)) == (expected, 1), (seconds, lines)
    assert re.match(rf"m3jax( merge)?: {said}", lines[0]), (seconds, lines)
    kept = (partial_of(output) / "journal.jsonl").exists()
    assert ("--resume goes on from there" in lines[0]) == kept, (seconds, lines)


@numbers
def test_a_few_moments(number, merge, tmp_path):
    for i, seconds in enumerate((0, 0.1, 0.3, 0.6)):
        check(seconds, number, merge, tmp_path / str(i))


@pytest.mark.slow
@numbers
def test_every_moment(number, merge, tmp_path):
    for i in range(40):
        check(0.05 * i, number, merge, tmp_path / str(i))


@numbers
@pytest.mark.parametrize("command", ["inspect", "diff", "evaluate", "explore", "demo"])
def test_other_commands(command, number):
    code, lines = stopped_after(0, number, [command])
    assert (code, lines) == (ENDS[number][0], [f"m3jax: {ENDS[number][1]}"])


class Dropped:
    """Raises where Python drops what is raised."""

    def __init__(self, act: Callable[[], None]):
        self._act = act

    def __del__(self) -> None:
        self._act()


@numbers
def test_a_signal_that_a_finalizer_drops_comes_again(number):
    report, before = sys.unraisablehook, signal.getsignal(number)
    with (
        pytest.raises((KeyboardInterrupt, signals.Terminated)),
        signals.handled_by(signals.stop),
    ):
        Dropped(lambda: (os.kill(os.getpid(), number), time.sleep(0.01)))
        time.sleep(60)
    assert (sys.unraisablehook, signal.getsignal(number)) == (report, before)


@numbers
def test_an_import_is_left_at_once(number, tmp_path):
    """No exception can be lost that is not raised."""
    (tmp_path / "swallows.py").write_text(
        "import os, time\n"
        f"try: os.kill(os.getpid(), {int(number)}); time.sleep(60)\n"
        "except BaseException: print('swallowed')\n"
    )
    program = (
        "from m3jax.commands import signals\n"
        "with signals.handled_by(signals.stop): import swallows\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    code, said = ENDS[number]
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"m3jax: {said}\n"


def test_what_the_parent_ignored_stays_ignored():
    """`nohup`, or a shell's `&`: Ctrl-C is not for them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled_by(signals.stop):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
