"""Merges that are killed or stopped at random moments, and resumed.

Each is a process of its own that runs the command line. What it leaves is looked at:
nothing under the output's name, or a whole checkpoint that verifies. The same command
with --resume then gives the bytes of a merge that nobody disturbed.

The few in the fast suite start a fresh interpreter. The many, `pytest -m slow`, are
forked from a process that has imported jax, so that they spend their time merging.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
from grids import thinned
from interruptions import Merge, journal_of, partial_of, write_models

import m3jax
from m3jax.checkpoints.places import durable

SHAPES = {
    **{f"model.layers.{i}.up_proj.weight": (331, 487) for i in range(16)},
    "model.norm.weight": (487,),
}  # 2.6 million parameters
RECIPES = {
    "average": [],
    "ties": ["--config.method=ties", "--config.max_shard_size=1MB"],
    "ties after DARE": ["--config.method=ties", "--config.dare.drop_rate=0.4"],
    "by magnitude": [
        "--config.method=task_arithmetic",
        "--config.dare.drop_rate=0.4",
        "--config.dare.strategy=magnitude",
        "--config.max_shard_size=1MB",
    ],
}
EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
TIMES = {signal.SIGKILL: 16, signal.SIGTERM: 5, signal.SIGINT: 3}  # for each recipe
SEED = 20260101
PATIENCE = 300  # seconds


@dataclasses.dataclass
class Ended:
    """What a process printed on standard error, and its exit code."""

    code: int
    err: str


# Starts a merge in a process; gives its number and what waits for its end.
Start = Callable[[list[str]], tuple[int, Callable[[], Ended]]]


@pytest.fixture(scope="module")
def merge(tmp_path_factory) -> Merge:
    return write_models(tmp_path_factory.mktemp("models"), SHAPES)


def fresh(arguments: list[str]) -> tuple[int, Callable[[], Ended]]:
    """Starts a process as a shell would."""
    process = subprocess.Popen(
        [sys.executable, "-m", "m3jax", *arguments],
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def wait() -> Ended:
        _, err = process.communicate(timeout=PATIENCE)
        return Ended(process.returncode, err)

    return process.pid, wait


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Start:
    """Starts processes that have done their imports."""
    context = multiprocessing.get_context("forkserver")
    preload = ["m3jax.commands.merge", "m3jax.engine.merge", "test_kill"]
    context.set_forkserver_preload(preload)
    log = tmp_path_factory.mktemp("log") / "log"

    def start(arguments: list[str]) -> tuple[int, Callable[[], Ended]]:
        process = context.Process(target=command_line, args=(arguments, log))
        with pytest.MonkeyPatch.context() as patch:  # for the server, which it starts
            patch.setenv("XLA_FLAGS", "")
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            process.start()
        assert process.pid is not None

        def wait() -> Ended:
            process.join(PATIENCE)
            assert process.exitcode is not None, "it hangs"
            ended = Ended(process.exitcode, log.read_text())
            process.close()
            return ended

        return process.pid, wait

    return start


def command_line(arguments: list[str], log: Path) -> None:
    """The command line in a forked process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from m3jax.__main__ import main

    sys.exit(main(arguments))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stage_of(output: Path) -> str:
    """How far a merge came."""
    if output.exists():
        return "complete"
    if not journal_of(output).exists():
        return "nothing journalled"
    if (partial_of(output) / "checkpoint" / "m3jax.json").exists():
        return "all but the name"
    entries = durable.read_lines(journal_of(output))
    return "tensors" if any("tensor" in entry for entry in entries) else "statistics"


def journal_lines(output: Path) -> float:
    """How many lines the journal has; infinitely many when it is gone for good."""
    if output.exists():
        return float("inf")
    try:
        return journal_of(output).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def check_what_is_left(output: Path, number: signal.Signals, ended: Ended) -> None:
    """Nothing or all under the output's name; what is said of the rest is true."""
    assert ended.code in (EXIT_CODES[number], 0), ended
    if output.exists():
        assert m3jax.verify(output) == []
        return
    assert ended.code == EXIT_CODES[number]
    assert "Traceback" not in ended.err
    if number != signal.SIGKILL:
        kept = journal_of(output).exists()
        assert partial_of(output).exists() == kept
        assert ("--resume goes on from there" in ended.err) == kept


# test_signals sends the other one, at many moments.
@pytest.mark.parametrize(
    "number",
    thinned(EXIT_CODES, lambda number: number != signal.SIGTERM),
    ids=lambda number: number.name,
)
def test_a_fresh_process(number, merge, tmp_path):
    recipe = m3jax.Recipe(method="ties", max_shard_size="1MB")
    merge(tmp_path / "reference", recipe, chunk_size=1 << 17)
    output = tmp_path / "merged"
    pid, wait = fresh(merge.arguments(output, RECIPES["ties"]))
    wait_until(lambda: journal_lines(output) > 4)
    os.kill(pid, number)
    check_what_is_left(output, number, wait())
    assert stage_of(output) == "tensors"
    assert merge(output, recipe, resume=True, chunk_size=1 << 17).resumed > 0
    assert checkpoints.digest(output) == checkpoints.digest(tmp_path / "reference")
    assert not partial_of(output).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("number", TIMES, ids=lambda number: number.name)
def test_random_moments(number, name, forked, merge, tmp_path):
    output = tmp_path / "merged"
    arguments = merge.arguments(output, RECIPES[name])

    def started() -> bool:
        return partial_of(output).exists() or output.exists()

    def remove_output() -> None:
        for path in output.iterdir():
            path.unlink()
        output.rmdir()

    pid, wait = forked(arguments)
    wait_until(started)
    began = time.monotonic()
    assert wait().code == 0
    duration = time.monotonic() - began
    expected = checkpoints.digest(output)
    moments = random.Random(f"{SEED} {number} {name}")
    stages: collections.Counter[str] = collections.Counter()
    for i in range(TIMES[number]):
        remove_output()
        pid, wait = forked(arguments)
        wait_until(started)
        # Some of the moments are a time, which can be one in a reading pass. Most are
        # a place in the journal and a little later, so that a busy machine does not
        # move them all to before or behind what matters.
        share = (i + moments.random()) / TIMES[number]
        if share < 0.3:
            time.sleep(duration * 2 * share)
        else:
            lines = int((share - 0.3) / 0.7 * (len(SHAPES) + 3))
            wait_until(lambda lines=lines: journal_lines(output) >= lines)
            time.sleep(moments.random() * duration / 30)
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(pid, number)
        check_what_is_left(output, number, wait())
        stages[stage_of(output)] += 1
        if not output.exists():
            _, wait = forked([*arguments, "--resume"])
            ended = wait()
            assert ended.code == 0, ended.err
        elif partial_of(output).exists():  # killed before it had tidied up
            _, wait = forked([*arguments, "--resume", "--overwrite"])
            assert wait().code == 0
        assert checkpoints.digest(output) == expected
        assert not partial_of(output).exists()
    print(f"\n{number.name}, {name}: {dict(sorted(stages.items()))}")
    assert stages["complete"] < TIMES[number]
