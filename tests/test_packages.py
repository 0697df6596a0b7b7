"""The wheel holds every folder of the package."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_is_installed() -> None:
    """Those with Python files; configs/ is installed as m3jax.configs."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    own = {path.parent.relative_to(ROOT) for path in (ROOT / "m3jax").rglob("*.py")}
    more = {path.parent.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
    folders = own | {Path("m3jax") / path for path in more}
    found = {".".join(folder.parts) for folder in folders}
    assert set(told["packages"]) == found
