"""Runs mergekit 0.1.5's own black-box tests on m3jax.

    python benchmarks/mergekit/black_box.py --mergekit=install

Fetches mergekit's source distribution and runs those of its tests that merge a YAML,
66 cases, with `run_merge` replaced by a call of `m3jax merge` (common.py). None of its
code is kept here. What follows `--` goes to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from absl import app, flags

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import programs  # noqa: E402 - a neighbour's

_DATA = flags.DEFINE_string("data", "/tmp/m3jax-benchmarks", "For all that it fetches.")
_MERGEKIT = flags.DEFINE_string("mergekit", "", "A Python with mergekit, or install.")

_DISTRIBUTION = "mergekit-0.1.5"
_TRUNCATION = (
    "truncation_preserves_donor_config",
    "default_and_allow_crimes_do_not_truncate",
    "tokenizer_alignment_takes_precedence",
    "truncation_copies_out_of_range_metadata",
    "embedding_and_head_are_truncated_independently",
    "missing_tokenizer_does_not_prevent_truncation",
)
_AXIS = (
    "phi_alignment_reorders_and_resizes_biases",
    "phi_truncation_handles_output_bias",
)
TESTS = (
    "tests/test_basic_merges.py",
    "tests/test_tokenizer.py",
    "tests/test_chat_template.py",
    "tests/test_merge_dtypes.py::test_yaml_mixed_checkpoint_precisions",
    *(f"tests/test_embedding_truncation.py::test_{name}" for name in _TRUNCATION),
    *(f"tests/test_vocabulary_axis.py::test_{name}" for name in _AXIS),
)


def fetch(data: Path) -> Path:
    """The folder with mergekit's tests, and common.py among them."""
    archive = data / f"{_DISTRIBUTION}.tar.gz"
    if not archive.exists():
        only = ["--no-deps", "--no-binary=mergekit", "mergekit==0.1.5", "-d", str(data)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *only]
        subprocess.run(command, check=True)
    root = data / "mergekit-tests"
    shutil.rmtree(root, ignore_errors=True)
    with tarfile.open(archive) as own:
        names = [n for n in own.getnames() if n.startswith(f"{_DISTRIBUTION}/tests/")]
        own.extractall(root, [own.getmember(n) for n in names], filter="data")
    tests = root / _DISTRIBUTION / "tests"
    shutil.copy(HERE / "common.py", tests)
    (tests / "__init__.py").touch()
    return tests.parent


def main(arguments: list[str]) -> None:
    data = Path(_DATA.value)
    data.mkdir(parents=True, exist_ok=True)
    python = programs.find_mergekit(_MERGEKIT.value, data)
    if python is None:
        raise app.UsageError("--mergekit=install makes an environment with mergekit")
    install = [python, "-m", "pip", "install", "--quiet", "pytest"]
    subprocess.run(install, check=True)
    folder = fetch(data)
    environment = {
        **os.environ,
        "M3JAX_PYTHON": sys.executable,
        "M3JAX_PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    plain = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "tests.common"]
    command = [python, "-m", "pytest", *plain, *(arguments[1:] or TESTS)]
    sys.exit(subprocess.run(command, cwd=folder, env=environment).returncode)


if __name__ == "__main__":
    app.run(main)
