"""Whether inputs are read through the page cache or past it.

What the cache holds is read from it. What it does not hold, and has no room for, would
push out what others need there, and each byte would be copied once more by the kernel:
that is read directly (see `direct`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from m3jax.checkpoints.places.direct import Buffers
from m3jax.checkpoints.places.files import InputFile

_ROOM = 0.5  # share of the memory that is free that the inputs may take
_HELD = 0.5  # share of the inputs from which on the cache is used
_LOOKS = 64  # at a file, evenly spread


def choose(files: Iterable[InputFile]) -> str | None:
    """Has files that do not fit into the page cache read past it.

    Args:
      files: that a merge reads, to the end.

    Returns:
      A line for the log; None where they fit and there was nothing to choose.
    """
    local = [file for file in files if isinstance(file.path, Path)]
    size, room = sum(file.size for file in local), available_memory()
    if room is None or fit(local):
        return None
    sizes = f"{size / 1e9:.1f} GB of inputs, {room / 1e9:.1f} GB of memory"
    held = cached_share(local)
    if held is None or held >= _HELD:
        what = "unknown" if held is None else f"{held:.0%} of them lie there"
        return f"reading through the page cache ({what}): {sizes}"
    buffers = Buffers()
    refused = [file for file in local if not file.read_directly(buffers)]
    if len(refused) < len(local):
        return f"reading past the page cache: {sizes}"
    return f"reading through the page cache, there is no way past it here: {sizes}"


def fit(files: Iterable[InputFile]) -> bool:
    """Whether the page cache has room for files, as far as the system says."""
    room = available_memory()
    return room is None or sum(file.size for file in files) <= _ROOM * room


def available_memory() -> int | None:
    """Bytes that the system could give, this process's group's limit included."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no Linux; no group, or one without a limit
        pass
    return min(found, default=None)


def cached_share(files: Iterable[InputFile]) -> float | None:
    """How much of the files' bytes the page cache holds, by a few looks at each.

    None where the system does not say.
    """
    held = total = 0.0
    for file in files:
        places = range(0, file.size, max(1, file.size // _LOOKS))
        looks = [file.is_cached(place) for place in places]
        if None in looks:
            return None
        held += file.size * sum(map(bool, looks)) / max(len(looks), 1)
        total += file.size
    return held / total if total else 1.0
