"""Runs programs that a model wrote, with limits, in a process of their own.

This keeps accidents in: endless loops, floods of memory and output, stray processes,
files left behind. It is no sandbox against an attacker, so nothing calls it unless
code execution was allowed by name. Where the system lets it (`unshare`), the program
has no network and its own process tree.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_MAX_OUTPUT = 1 << 20  # bytes of any file that the program writes
_LAST_LINE = 200  # characters of an error that are kept
# Sets the limits in the child: a function between fork and exec could deadlock, as
# JAX has threads. RLIMIT_NPROC is left alone, since it counts all of a user's.
_START = """
import resource, runpy, sys
seconds, memory, output = map(int, sys.argv[1:4])
for what, limit in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, output),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(what, (limit, limit))
runpy.run_path("program.py", run_name="__main__")
"""


def passes(program: str, *, seconds: float, megabytes: int) -> tuple[bool, str]:
    """Runs a program to its end.

    Args:
      program: Python source.
      seconds: of wall time, and of processor time, rounded up.
      megabytes: of address space.

    Returns:
      Whether it ran to its last line without an error, and if not, why not.
    """
    # A program that leaves early, with exit code 0, has not passed its tests.
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="m3jax-program-") as folder:
        here = Path(folder)
        (here / "program.py").write_text(
            f"{program}\n\nprint({token!r}, flush=True)\n",
            encoding="utf-8",
            errors="replace",
        )
        limits = [int(seconds) + 1, megabytes << 20, _MAX_OUTPUT]
        command = [sys.executable, "-I", "-c", _START, *map(str, limits)]
        with (here / "out").open("wb") as out, (here / "err").open("wb") as err:
            process = subprocess.Popen(
                [*_apart(), *command],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return False, f"took more than {seconds:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0 and _tail(here / "out") == token:
            return True, ""
        return False, _tail(here / "err") or f"ended early, with exit code {code}"


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")[-_LAST_LINE:]


@functools.cache
def _apart() -> tuple[str, ...]:
    """How to start a program apart from network and processes; () if nothing works."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    for options in (
        ("--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
        ("--map-root-user", "--net"),
    ):
        command = (unshare, *options)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [*command, sys.executable, "-I", "-c", ""],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=30,
            )
            if done.returncode == 0:
                return command
    return ()
