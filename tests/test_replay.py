"""m3jax.json makes a merge once more: of the same inputs, or a line says otherwise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from command_line import Run
from huggingface_hub import constants

OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


def model(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    base = random.normal(size=(20, 30)).astype(np.float32)
    change = np.random.default_rng(seed).normal(size=(20, 30)).astype(np.float32)
    return {"x.weight": base + np.float32(0.1) * change}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        checkpoints.write(tmp_path / name, model(seed), {"model_type": "llama"})
    return tmp_path


def merge(run: Run, *flags: str) -> str:
    """What it says beside progress."""
    ran = run("merge", *flags)
    assert ran.code == 0, ran.err
    return "\n".join(line for line in ran.err.splitlines() if "note: " in line)


def tensors(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_models_of_the_hub_are_those_of_then(
    models: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    """Though somebody has pushed another one under the same name since."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(models / "hub"))
    home = models / "hub" / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    for commit, seed in ((NEW, 7), (OLD, 3)):
        snapshot = home / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name, content in (
            ("model.safetensors", checkpoints.encode(model(seed))),
            ("config.json", b'{"model_type": "llama"}'),
        ):
            blob = hashlib.sha256(content).hexdigest()
            (home / "blobs" / blob).write_bytes(content)
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
        (home / "refs" / "main").write_text(commit)
    given = ("--base=base", "--models=org/name,a", "--tokenizer_from=org/name")
    merge(run, *given, "--output=merged")
    (home / "refs" / "main").write_text(NEW)
    assert merge(run, "--config=merged/m3jax.json", "--output=again") == ""
    assert tensors(models / "again") == tensors(models / "merged")
    assert "tensors are not those of the record" in merge(
        run, "--config=merged/m3jax.json", *given, "--output=other"
    )


def test_inputs_that_have_moved(
    models: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    merge(run, "--base=base", "--models=a,b", "--output=merged", "--seed=3")
    (models / "elsewhere").mkdir()
    monkeypatch.chdir(models / "elsewhere")
    config = "--config=../merged/m3jax.json"
    ran = run("merge", config, "--output=again")
    assert ran.code == 3
    assert ran.error == (
        f"m3jax merge: base: no such file or folder, as {config} names it; --base and "
        "--models say where its inputs are now"
    )
    given = ("--base=../base", "--models=../a,../b")
    assert merge(run, config, *given, "--output=again") == ""
    assert tensors(models / "elsewhere" / "again") == tensors(models / "merged")


def test_other_inputs_are_told_from_another_merge(models: Path, run: Run):
    merge(run, "--base=base", "--models=a,b", "--output=merged", "--seed=3")
    config = "--config=merged/m3jax.json"
    (models / "b" / "model.safetensors").write_bytes(checkpoints.encode(model(9)))
    assert merge(run, config, "--output=other") == (
        "m3jax: note: 1 of 1 tensors are not those of the record, such as 'x.weight': "
        "its inputs, versions or hardware were others"
    )
    assert merge(run, config, "--seed=4", "--output=seed") == ""  # as it was asked for
    assert merge(run, config, "--config.method=ties", "--output=ties") == ""
    record = json.loads((models / "other" / "m3jax.json").read_text())
    assert record["seed"] == 3
