"""`m3jax learn`, from checkpoints and tasks to a recipe that merges the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import tiny_models
import tiny_tokenizer
from command_line import Run
from grids import slow

import m3jax

FAMILY = "one_layer"
PRESETS = Path(__file__).parent.parent / "configs" / "learn"
NAMES = sorted(path.stem for path in PRESETS.glob("[!_]*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A base, two models of it, one of another vocabulary's order, and tasks."""
    here = tmp_path_factory.mktemp("learn")
    generator = np.random.default_rng(5)
    base = tiny_models.tensors(FAMILY)
    for name, change in (("base", 0), ("a", 0.2), ("b", 0.2)):
        own = {}
        for key, tensor in base.items():
            noise = generator.standard_normal(tensor.shape).astype(np.float32)
            own[key] = tensor + np.float32(change * tensor.std()) * noise
        own = {n: t.astype(checkpoints.BFLOAT16) for n, t in own.items()}
        checkpoints.write(here / name, own, tiny_models.config_dict(FAMILY))
        tiny_tokenizer.write(here / name)
    other = tiny_models.tensors("gpt2", seed=3)
    checkpoints.write(here / "other", other, tiny_models.config_dict("gpt2"))
    tiny_tokenizer.write(here / "other")
    letters = list("abcdefgh")
    for part in ("train", "validation", "test"):
        tasks = []
        for name in ("copy", "pick"):
            lines = [
                {
                    "question": "".join(generator.choice(letters, 5)),
                    "answer": "".join(generator.choice(letters, 3)),
                    "right": int(generator.integers(2)),
                }
                for _ in range(5)
            ]
            data = f"{name}_{part}.jsonl"
            (here / data).write_text("".join(json.dumps(line) + "\n" for line in lines))
            common = {"data": data, "prompt": "{question}", "name": name}
            tasks.append(
                {"kind": "exact_match", "answer": "{answer}", "max_new_tokens": 4}
                | common
                if name == "copy"
                else {"kind": "choice", "choices": ["ab", "cd"], "answer": "{right}"}
                | common
            )
        (here / f"{part}.json").write_text(json.dumps(tasks))
    return here


def arguments(folder: Path, where: Path, preset: str | None, **flags: Any) -> list[str]:
    given = {
        "base": folder / "base",
        "models": f"{folder}/a,{folder}/b",
        "tasks": folder / "train.json",
        "output": where,
        "config.steps": 3,
        "config.batch": 4,
        "config.experts": "(('copy', 0), ('pick', 1))",
        **flags,
    }
    source = [] if preset is None else [f"--config={PRESETS / preset}.py"]
    own = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return ["learn", *source, *own]


def test_every_system_has_a_preset():
    systems = ("adamerging", "adamerging_pp", "dam", "learned_soup", "np_merge")
    assert sorted((*systems, "distil", "safety_align", "uld_fusion")) == NAMES


@pytest.mark.parametrize("preset", ["adamerging", slow("adamerging_pp"), slow("dam")])
def test_a_run_is_replayed_bit_for_bit(
    preset: str, folder: Path, tmp_path: Path, run: Run
):
    """By `m3jax merge` from the recipe alone; and its files are all there."""
    flags = {
        "validation_tasks": folder / "validation.json",
        "test_tasks": folder / "test.json",
        "export": tmp_path / "best",
        "config.validate_every": 2,
    }
    ran = run(*arguments(folder, tmp_path / "out", preset, **flags))
    assert ran.code == 0, ran.err
    assert "95 % interval" in ran.out and "mean" in ran.out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    by_column = {f"coefficients-{k}.safetensors" for k in range(2)}
    common = {"state.msgpack", "recipe.json", "summary.json"}
    pictures = {"curves.png", "coefficients.png"}
    assert files == common | pictures | (by_column if preset == "dam" else set())
    again = run(
        "merge", f"--config={tmp_path}/out/recipe.json", f"--output={tmp_path}/again"
    )
    assert again.code == 0, again.err
    digest = checkpoints.digest(tmp_path / "again")
    assert digest == checkpoints.digest(tmp_path / "best")
    chunked = run(
        "merge",
        f"--config={tmp_path}/out/recipe.json",
        f"--output={tmp_path}/chunked",
        "--chunk_size=1024",
    )
    assert chunked.code == 0 and checkpoints.digest(tmp_path / "chunked") == digest
    assert run("verify", tmp_path / "again").code == 0


@pytest.mark.slow
def test_killed_at_random_and_resumed(folder: Path, tmp_path: Path):
    """By SIGKILL, between any two steps or in one: the same files as without."""
    steps = 30

    def start(output: Path, *more: str) -> subprocess.Popen:
        flags = {"config.steps": steps, "config.save_every": 3}
        flags["validation_tasks"] = folder / "validation.json"
        flags["config.validate_every"] = 5
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "m3jax"),
                *arguments(folder, output, "learned_soup", **flags),
                *more,
            ],
            env={**os.environ, "XLA_FLAGS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def files(output: Path) -> dict[str, str]:
        names = ("recipe.json", "summary.json")
        texts = {name: (output / name).read_text() for name in names}
        return {n: own.replace(str(output), "OUTPUT") for n, own in texts.items()}

    assert start(tmp_path / "whole").wait() == 0
    expected = files(tmp_path / "whole")
    generator = np.random.default_rng()
    for attempt in range(2):
        output = tmp_path / str(attempt)
        process, state = start(output), output / "state.msgpack"
        while not state.exists():
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 3))
        process.kill()
        assert process.wait(timeout=10) in (-9, 0)
        assert start(output, "--resume").wait() == 0
        assert files(output) == expected


@pytest.mark.slow
def test_from_files_it_is_the_same_run(folder: Path, tmp_path: Path, run: Run):
    found = []
    for flags in ((), ("--streamed",), ("--mesh=rows=2,columns=2",)):
        where = tmp_path / str(len(found))
        ran = run(*arguments(folder, where, "distil"), *flags)
        assert ran.code == 0, ran.err
        found.append(json.loads((where / "summary.json").read_text())["losses"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] == pytest.approx(found[2], abs=4e-3)  # bfloat16 teachers
    assert found[0][0] != found[0][-1]


@pytest.mark.parametrize("preset", [n for n in NAMES if n not in ("dam",)])
@pytest.mark.slow
def test_presets_run(preset: str, folder: Path, tmp_path: Path, run: Run):
    ran = run(*arguments(folder, tmp_path / "out", preset))
    assert ran.code == 0, ran.err


def test_a_teacher_of_another_architecture(folder: Path, tmp_path: Path, run: Run):
    teachers = f"{folder}/other,{folder}/other"
    flags: dict[str, Any] = {"teachers": teachers, "config.steps": 2}
    tasks = json.loads((folder / "train.json").read_text())[:1]
    (folder / "copy.json").write_text(json.dumps(tasks))
    flags |= {"tasks": folder / "copy.json", "config.experts": "(('copy', 1),)"}
    ran = run(*arguments(folder, tmp_path / "out", "uld_fusion", **flags))
    assert ran.code == 0, ran.err
    losses = json.loads((tmp_path / "out" / "summary.json").read_text())["losses"]
    assert all(0 < loss <= 2 for loss in losses)
    ran = run(*arguments(folder, tmp_path / "kl", "distil", **flags))
    assert ran.code == 2 and "kl compares token by token" in ran.error


def test_the_plan_says_what_it_takes(folder: Path, run: Run):
    ran = run(*arguments(folder, None, "distil"), "--dry_run")
    assert ran.code == 0, ran.err
    rows = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    elements = sum(t.size for t in tiny_models.tensors(FAMILY).values())
    assert rows["models"].startswith(f"{6 * elements / 1000:.1f} kB")
    assert rows["merged"].startswith(f"{4 * elements / 1000:.1f} kB")
    assert "B for one batch, by the compiler" in rows["backward"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ({"tasks": None}, 2, "--tasks is missing"),
        ({"output": None}, 2, "--output is missing"),
        ({"tasks": "{folder}/no.json"}, 2, "no.json: No such file"),
        ({"base": "{folder}/no"}, 3, "no"),
        ({"test_tasks": "{folder}/train.json"}, 2, "training task 'copy' and test"),
        (
            {"models": "{folder}/a", "config.experts": None},
            2,
            "experts={'copy': 0, 'pick': 0} (--config.experts=\"(('copy', 0),",
        ),
        ({"config.space.granularty": "model"}, 2, "did you mean space.granularity"),
        ({"config.inputs": "'x'"}, 2, "inputs='x' needs one of prompt"),
        ({"config.objective": "3"}, 2, "needs pairs"),
        ({"config.experts": "(('copy', 5),)"}, 2, "needs a place from 0 to 1"),
        ({"mesh": "rows=99"}, 2, "mesh=rows=99"),
        (
            {
                "config.objective": "(('cross_entropy', 1.0),)",
                "config.inputs": "prompt",
            },
            2,
            "needs labels",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    flags: Any, code: int, message: str, folder: Path, tmp_path: Path, run: Run
):
    flags = {
        name: value and str(value).format(folder=folder)
        for name, value in flags.items()
    }
    ran = run(*arguments(folder, tmp_path / "out", "distil", **flags))
    assert ran.code == code and message in ran.error
    assert not (tmp_path / "out").exists()


def test_configs_of_merge_are_refused(folder: Path, tmp_path: Path, run: Run):
    source = PRESETS.parent / "ties.py"
    ran = run(*arguments(folder, tmp_path, None), f"--config={source}")
    assert ran.code == 2 and "is of `m3jax merge`" in ran.error
    assert m3jax.__version__
