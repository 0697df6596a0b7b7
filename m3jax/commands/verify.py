"""Checks a merged checkpoint against the record that m3jax left in it, m3jax.json.

Every tensor's dtype, shape and checksum, every side file and the index are checked;
every difference is a line, and the exit code is 1 if there is one.
"""

from __future__ import annotations

from m3jax.commands import reporting
from m3jax.commands.cli import DIFFERENT

USAGE = "m3jax verify DIR"
TAKES = (1, "one checkpoint")


def main(positional: list[str]) -> int:
    from m3jax.engine.verify import verify

    with reporting.progress() as progress:
        problems = verify(positional[0], progress=progress)
    for problem in problems:
        print(problem)
    if problems:
        count = f"{len(problems)} difference" + ("s" if len(problems) > 1 else "")
        print(f"{positional[0]}: {count} from its record, m3jax.json")
        return DIFFERENT
    print(f"{positional[0]}: every tensor and file is as m3jax.json records it")
    return 0
