"""docs/LEARN.md: its Python example runs, and what it says of presets is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "LEARN.md").read_text()


def test_python_example_runs_and_learns():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    found: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(example, "docs/LEARN.md", "exec"), found)
    losses = found["found"].losses
    assert losses[-1] < losses[0]
    assert found["logits"].shape == (32, 4)
    for own in found["found"].coefficients.values():
        assert np.all((own > 0) & (own < 1))


def test_every_preset_is_in_the_table():
    presets = {p.stem for p in (ROOT / "configs" / "learn").glob("[!_]*.py")}
    rows = re.findall(r"^\| (`[\w`, ]+`) \|.*\| (?:yes|no) \|$", TEXT, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == presets
