"""Two real processes with four virtual devices each, for tests to start and watch."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

DEVICES = 4
TIMEOUT = 120  # seconds; for a busy machine

# A process that is m3jax's command line, but for shorter times and a sudden death.
COMMAND = """
import os, sys
from m3jax.__main__ import main
from m3jax.engine import processes, recorder
processes.BEAT, processes.SILENCE = 0.3, 3.0
victim, tensors = int(sys.argv[1]), int(sys.argv[2])
keep, kept = recorder.Recorder.keep, []
def keep_and_die(self, done):
    import jax
    keep(self, done)
    kept.extend(done)
    if len(kept) >= tensors and jax.process_index() == victim:
        os.kill(os.getpid(), 9)
recorder.Recorder.keep = keep_and_die
sys.exit(main(sys.argv[3:]))
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: exit code, what it printed, seconds after the start."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def line(self) -> str:
        """The last line of what it said on standard error."""
        return self.err.strip().splitlines()[-1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(*commands: Sequence[object], timeout: float = TIMEOUT) -> list[Ended]:
    """Runs Python with these arguments, all at once."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    ended = []
    try:
        for process in running:
            out, err = process.communicate(timeout=timeout)
            seconds = time.monotonic() - started
            ended.append(Ended(process.returncode, out, err, seconds))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return ended


def run_script(
    script: str, *arguments: object, timeout: float = TIMEOUT
) -> list[Ended]:
    """Two processes run a script; it gets index, port, and these arguments."""
    port = free_port()
    commands = [["-c", script, index, port, *arguments] for index in range(2)]
    return run(*commands, timeout=timeout)


def run_commands(
    arguments: Sequence[str], *, victim: int = -1, tensors: int = 0
) -> list[Ended]:
    """Two processes of the command line; one kills itself after some tensors."""
    flags = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
    return run(
        *(
            ["-c", COMMAND, victim, tensors, *arguments, *flags, f"--process_id={i}"]
            for i in range(2)
        )
    )
