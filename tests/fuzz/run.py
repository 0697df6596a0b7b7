"""Coverage-guided fuzzing of the readers, with atheris.

    python tests/fuzz/run.py --seconds=200            all targets, one after another
    python tests/fuzz/run.py --seconds=200 header     one of them

An input that breaks a target's promise is written to `found-TARGET-…` in the current
folder, and the exit code is 1. Move it to tests/fuzz/corpus/TARGET: the tests read
everything that lies there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = ("header", "index", "config", "msgpack", "torch", "gguf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=200, help="for each target")
    arguments = parser.parse_args()
    if not set(arguments.targets) <= set(TARGETS):
        parser.error(f"targets are {', '.join(TARGETS)}")
    return max([run(target, arguments.seconds) for target in arguments.targets])


def run(target: str, seconds: int) -> int:
    """Fuzzes one target in a process of its own; returns 1 if it finds something."""
    with tempfile.TemporaryDirectory() as grown:
        for i, seed in enumerate(seeds(target)):
            (Path(grown) / f"seed-{i}").write_bytes(seed)
        started = subprocess.run(
            [
                *(sys.executable, __file__, "--fuzz", target, grown),
                f"-max_total_time={seconds}",
                f"-artifact_prefix=found-{target}-",
                f"-dict={HERE / 'json.dict'}",
                "-max_len=4096",  # bytes of an input
                "-timeout=10",  # seconds for an input: a hang
                "-rss_limit_mb=1024",
                "-print_final_stats=1",
            ],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        corpus = len(list(Path(grown).iterdir()))
    if started.returncode:
        print(started.stderr, file=sys.stderr)
        print(f"{target}: found something, see found-{target}-*")
        return 1
    facts = dict(re.findall(r"stat::(\w+):\s+(\d+)", started.stderr))
    covered = re.findall(r"cov: (\d+)", started.stderr)
    print(
        f"{target}: {int(facts['number_of_executed_units']):,} inputs in {seconds} s, "
        f"{covered[-1]} edges, corpus of {corpus}, peak {facts['peak_rss_mb']} MB: "
        "nothing found",
        flush=True,
    )
    return 0


def seeds(target: str) -> list[bytes]:
    """What the fuzzer starts from."""
    found = [path.read_bytes() for path in sorted((HERE / "corpus" / target).iterdir())]
    if target == "header":
        sys.path.insert(0, str(HERE.parent))
        from attacks.headers import DAMAGED, STRICTER, VALID

        files = [*VALID.values(), *(c for c, _ in (DAMAGED | STRICTER).values())]
        for content in files:
            size = int.from_bytes(content[:8], "little")
            text, data = content[8 : 8 + size], content[8 + size :]
            if len(text) < 4096:
                found.append(len(data).to_bytes(2, "little") + text)
    return found


def fuzz(target: str) -> None:
    """Runs libFuzzer in this process, until it finds something or the time is over."""
    import atheris

    sys.path.insert(0, str(HERE.parent))
    with atheris.instrument_imports(include=["m3jax.checkpoints", "fuzz"]):
        from fuzz import targets
    atheris.Setup([sys.argv[0], *sys.argv[3:]], getattr(targets, f"check_{target}"))
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz(sys.argv[2])
    else:
        sys.exit(main())
