"""The README's Python example runs as it stands, and what it says of flags is true."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import m3jax
from m3jax import Dare, Recipe
from m3jax.recipe.groups import group
from m3jax.recipe.recipe import FLAT

README = Path(__file__).parent.parent / "README.md"
DEMO = Path(m3jax.__file__).parent / "demo_data"


def test_python_example_runs_and_both_ways_agree(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    streamed = Path("merged/model.safetensors").read_bytes()
    assert Path("merged-in-memory/model.safetensors").read_bytes() == streamed


def test_recipe_table_has_every_field_with_its_default():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `(.+?)` \|", README.read_text(), re.M))
    expected = {name: str(default) for name, default in FLAT.items()}
    fields = {**Recipe().to_dict(), "dare": group(Dare())}
    for name, value in fields.items():
        if name in ("average", "transforms"):  # docs/METHODS.md has those of all steps
            continue
        own = value if isinstance(value, dict) else {"": value}
        for field, default in own.items():
            expected[f"{name}.{field}" if field else name] = str(default)
    assert rows == expected


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
