"""Plants each fault of `faults.py` in a copy of the tree; its tests have to fail there.

    python tests/mutations/run.py ["name of a fault" ...]

Prints a line for each, with the first test that failed; exit code 1 where none did.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
_NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


def run(tree: Path, tests: Iterable[str]) -> tuple[int, str]:
    """pytest's exit code on some tests of a tree, and the first that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow"]
    command += ["-p", "no:cacheprovider", "--hypothesis-profile=first failure"]
    command += [f"tests/{test}" for test in tests]
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    env.setdefault("M3JAX_TEST_PROGRAMS", str(ROOT / ".pytest_cache" / "programs"))
    done = subprocess.run(
        command, cwd=tree, env=env, capture_output=True, text=True, check=False
    )
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else done.stdout[-2000:]


def caught(tree: Path, fault: Fault) -> tuple[bool, str]:
    """Whether the tests fail with the fault planted, and which one."""
    path = tree / "m3jax" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has no such line, or several"
    try:
        path.write_text(text.replace(fault.old, fault.new))
        code, failed = run(tree, fault.tests)
    finally:
        path.write_text(text)
    return code == 1, failed


def main(names: Iterable[str]) -> int:
    chosen = {name: FAULTS[name] for name in names} or FAULTS
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        shutil.copytree(ROOT, tree, ignore=_NOT_COPIED, symlinks=True)
        for name, fault in chosen.items():
            found, failed = caught(tree, fault)
            missed += not found
            print(f"{name:30} {'caught' if found else 'MISSED'}  {failed}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
