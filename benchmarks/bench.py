"""What the benchmark programs share: child processes, machine facts, numbers, tables.

A child's peak memory is `ru_maxrss`, which Linux never reports as less than the size
that its parent had when it started it. So this module imports nothing large, and the
programs import what is large after the last child.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent
_SAMPLE_SECONDS = 0.05
_READ_BLOCK = 4 << 20


@dataclasses.dataclass(frozen=True)
class Run:
    """One child process, from its start to its end.

    Attributes:
      wall, user, system: seconds.
      peak_bytes: the largest resident size, mapped files included.
      peak_anonymous_bytes: the largest size of memory that is not a file's, sampled
        every 50 ms: what the system cannot take back under pressure.
      disk_bytes: read from the disk rather than from the page cache.
      report: the JSON on the last line of its output, {} without one.
    """

    wall: float
    user: float
    system: float
    peak_bytes: int
    peak_anonymous_bytes: int
    disk_bytes: int
    report: dict[str, Any]


def run(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None
) -> Run:
    """Runs a command to its end and measures it.

    Raises:
      RuntimeError: if it fails, with the end of what it printed.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=errors,
            # Modules are compiled once, as pip leaves a package that it installs.
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(environment or {})},
        )
        with _AnonymousMemory(child.pid) as memory:
            _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            errors.seek(0)
            told = errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{command[0]} ended with {child.returncode}: {told}")
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    last = lines[-1] if lines else ""
    return Run(
        wall=wall,
        user=usage.ru_utime,
        system=usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        peak_anonymous_bytes=memory.peak,
        disk_bytes=usage.ru_inblock * 512,
        report=json.loads(last) if last.startswith("{") else {},
    )


class _AnonymousMemory:
    """Follows the anonymous memory of a process while the context lasts."""

    def __init__(self, pid: int):
        self.peak = 0
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> _AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            try:
                text = self._status.read_text()
            except OSError:  # it has ended
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)


def warm(folders: Iterable[Path]) -> None:
    """Reads all files of the folders, so that they are in the page cache."""
    buffer = bytearray(_READ_BLOCK)
    for path in _files(folders):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(folders: Iterable[Path]) -> None:
    """Drops all files of the folders from the page cache."""
    settle()  # only what the disk has can be dropped
    for path in _files(folders):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle() -> None:
    """Waits until the disk has what earlier runs left to write."""
    os.sync()


def meminfo(name: str) -> int:
    """Bytes of an entry of /proc/meminfo."""
    text = Path("/proc/meminfo").read_text()
    return int(re.search(rf"^{name}: +(\d+) kB$", text, re.MULTILINE)[1]) * 1024


def _files(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.iterdir())]


def machine(data: Path) -> dict[str, Any]:
    """What the times depend on, of this machine and of the disk that holds `data`."""
    processor = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": meminfo("MemTotal"),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(data),
    }


def _file_system(path: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    resolved = path.resolve()
    holders = [mount for mount in mounts if resolved.is_relative_to(mount[1])]
    return max(holders, key=lambda mount: len(mount[1]))[2]


def versions(names: Iterable[str], python: str | None = None) -> dict[str, str]:
    """Versions of installed packages, of this Python or of another environment's."""
    if python is None:
        found = {"python": platform.python_version()}
        return found | {name: importlib.metadata.version(name) for name in names}
    code = (
        "import importlib.metadata as m, json, platform, sys; print(json.dumps("
        "{'python': platform.python_version()} | {n: m.version(n) for n in "
        "sys.argv[1:]}))"
    )
    return json.loads(subprocess.check_output([python, "-c", code, *names]))


def commit() -> str | None:
    """The commit that is measured, marked where the code differs from it."""
    git = ["git", "-C", str(BENCHMARKS)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../m3jax"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (" with changes" if changed.returncode else "")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of a few measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def seconds(values: Mapping[str, float] | None) -> str:
    """A spread as text: median (least–greatest)."""
    if values is None:
        return "–"
    digits = 2 if values["median"] < 10 else 1
    median, least, greatest = (
        f"{values[name]:.{digits}f}" for name in ("median", "min", "max")
    )
    return f"{median} ({least}–{greatest})"


def times(ratio: float | None, digits: int = 2) -> str:
    return "–" if ratio is None else f"{ratio:.{digits}f} ×"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def peak(program: Mapping[str, Any]) -> str:
    """Peak resident size in GB, and how much of it no file backs."""
    anonymous = gigabytes(program["peak_anonymous_bytes"])
    return f"{gigabytes(program['peak_bytes'])} ({anonymous})"


def environment(results: Mapping[str, Any]) -> str:
    """Machine and versions in a line, for captions."""
    machine = results["machine"]
    parts = [
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['kernel']}, "
        f"{machine['file_system']}"
    ]
    for owner, found in results["versions"].items():
        if found:
            listed = ", ".join(f"{name} {version}" for name, version in found.items())
            parts.append(f"{owner}: {listed}")
    return "; ".join(parts) + "."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned and the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
