"""A task's model of what EMR-Merging wrote, from files and in memory."""

from __future__ import annotations

import json
import shutil

import checkpoints
import jax
import numpy as np
import pytest

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats import tree

# A scalar, an empty tensor, sizes that no byte of bits divides, and one that is copied.
SHAPES = {
    "model.layers.0.up.weight": (13, 29),
    "model.layers.0.scale": (),
    "model.layers.1.nothing": (0, 4),
    "model.norm.weight": (1025,),
    "head.weight": (3, 5),
}


@pytest.fixture(scope="module", params=[np.float32, checkpoints.BFLOAT16])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emr")
    base = checkpoints.random_model(0, SHAPES, request.param)
    ids = {"ids": np.arange(5)}
    checkpoints.write(folder / "base", {**base, **ids}, {"model_type": "any"})
    for k, name in enumerate(("maths", "code")):
        model = checkpoints.random_model(k + 1, SHAPES, request.param, base)
        checkpoints.write(folder / name, {**model, **ids}, {})
    m3jax.merge(
        folder / "base",
        [folder / "maths", folder / "code"],
        folder / "unified",
        m3jax.Recipe(method="emr", exclude=("head",), mixup=m3jax.Mixup(alpha=None)),
    )
    return folder


def wide(folder, name):
    found = checkpoints.read(folder / name)
    return {n: t.astype(np.float64) for n, t in found.items()}


def test_the_command_writes_the_papers_model_and_jit_makes_the_same_bits(
    run, folder, tmp_path
):
    base, models = wide(folder, "base"), [wide(folder, m) for m in ("maths", "code")]
    merged = [n for n in SHAPES if n != "head.weight"]
    tau = {n: [m[n] - base[n] for m in models] for n in merged}
    params = m3jax.modulation.load(folder / "unified")
    made, programs = jax.jit(m3jax.modulate), []
    for k, task in enumerate(("maths", "code")):
        output = tmp_path / task
        ran = run(
            "modulate", folder / "unified", f"--task={task}", f"--output={output}"
        )
        assert ran.code == 0, ran.err
        found = checkpoints.read(output)
        above = below = 0.0
        wanted = {}
        for name in merged:
            sign = np.where(sum(tau[name]) > 0, 1.0, -1.0)
            masks = [t * sign > 0 for t in tau[name]]
            unified = sign * np.max(
                [np.abs(t) * m for t, m in zip(tau[name], masks, strict=True)], axis=0
            )
            wanted[name] = masks[k] * unified
            above += np.abs(tau[name][k]).sum()
            below += np.abs(wanted[name]).sum()
        for name, own in wanted.items():
            expected = base[name] + above / below * own
            relative = 1e-6 if found[name].dtype == np.float32 else 2**-8
            np.testing.assert_allclose(
                found[name].astype(float), expected, rtol=relative, atol=1e-7
            )
        for name, own in (("head.weight", models[k]), ("ids", base)):
            np.testing.assert_array_equal(found[name].astype(float), own[name])
        # By number, as an argument: one program for all tasks.
        leaves, _ = tree.flatten(made(params, np.int32(k)))
        programs.append(made._cache_size())
        again, _ = tree.flatten(m3jax.modulate(params, task))
        for name, own in found.items():
            np.testing.assert_array_equal(own, np.asarray(leaves[name]))
            np.testing.assert_array_equal(own, np.asarray(again[name]))
    assert programs[0] == programs[1]


def test_in_memory_it_is_what_multitask_makes(folder):
    base, *models = (m3jax.load(folder / n) for n in ("base", "maths", "code"))
    for params in (base, *models):
        del params["head"]
    result = m3jax.multitask.emr(base, models)
    expected, _ = tree.flatten(m3jax.multitask.modulate(base, result, 1))
    params = m3jax.modulation.load(folder / "unified")
    found, _ = tree.flatten(m3jax.modulate(params, "code"))
    for name, own in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(own))


def test_what_was_not_merged_may_come_from_the_tasks_own_model(run, folder, tmp_path):
    model = checkpoints.read(folder / "code")
    model["head.weight"] = np.ones((7, 5), np.float32)
    checkpoints.write(tmp_path / "code", model, {})
    output = tmp_path / "out"
    ran = run(
        *("modulate", folder / "unified", "--task=1", f"--output={output}"),
        f"--unmerged_from={tmp_path}/code",
    )
    assert ran.code == 0, ran.err
    found = checkpoints.read(output)
    np.testing.assert_array_equal(found["head.weight"], model["head.weight"])
    assert json.loads((output / "config.json").read_text())["model_type"] == "any"


def test_the_unified_model_may_be_replaced(folder, tmp_path):
    shutil.copytree(folder / "unified", tmp_path / "unified")
    recipe = m3jax.Recipe(mixup=m3jax.Mixup(alpha=None))
    models = [folder / "maths"]
    replace = m3jax.Execution(overwrite=True)
    output = tmp_path / "unified"
    m3jax.merge(folder / "base", models, output, recipe, execution=replace)
    assert not [*output.glob("mask-*")]


def test_what_cannot_be_modulated_is_said_in_a_line(run, folder, tmp_path):
    unified = folder / "unified"
    assert run("modulate", unified).code == 2
    assert run("modulate", "--task=a").code == 2
    ran = run("modulate", unified, "--task=law", f"--output={tmp_path}/x")
    assert ran.code == 3
    assert "no task 'law'; the tasks are 0: maths, 1: code" in ran.error
    ran = run("modulate", folder / "maths", "--task=0")
    assert ran.code == 3
    assert "is no output of method emr" in ran.error
    ran = run("modulate", unified, "--task=0", f"--base={tmp_path}/gone")
    assert ran.code == 3
    assert "--base says where the base is" in ran.error
    small = {"model.norm.weight": np.ones(3, np.float32)}
    checkpoints.write(tmp_path / "other", small, {})
    ran = run("modulate", unified, "--task=0", f"--base={tmp_path}/other")
    assert ran.code == 3
    assert "is not the base of" in ran.error
    for k, flaw, said in (
        (0, None, "mask-0.safetensors"),
        (1, {"model.norm.weight.mask-1": np.zeros(3, np.uint8)}, "is no mask of"),
    ):
        broken = tmp_path / f"broken{k}"
        shutil.copytree(unified, broken)
        path = broken / f"mask-{k}.safetensors"
        path.unlink()
        if flaw is not None:
            import safetensors.numpy

            safetensors.numpy.save_file(flaw, path)
        with pytest.raises((CheckpointError, OSError), match=said):
            m3jax.modulation.load(broken)


def test_heads_of_their_own_shapes_are_kept_and_put_back(run, tmp_path):
    shapes = {"model.norm.weight": (8,), "score.weight": (2, 8), "score.bias": (2,)}
    base = checkpoints.random_model(0, shapes)
    checkpoints.write(tmp_path / "base", base, {"model_type": "any"})
    models = []
    for k, name in enumerate(("two", "five")):
        own = checkpoints.random_model(
            k + 1, {**shapes, "score.weight": (2 + 3 * k, 8)}
        )
        models.append(own)
        checkpoints.write(tmp_path / name, own, {})
    output = tmp_path / "unified"
    ran = run(
        *(
            "merge",
            f"--base={tmp_path}/base",
            f"--models={tmp_path}/two,{tmp_path}/five",
        ),
        *("--config.method=emr", "--config.exclude=('score',)", f"--output={output}"),
        "--config.mixup.alpha=None",
    )
    assert ran.code == 0, ran.err
    assert "2 excluded tensors of each model are kept" in ran.err
    assert run("verify", output).code == 0
    assert {*m3jax.load(output)} == {"model", "score"}
    params = m3jax.modulation.load(output)
    for k, task in enumerate(("two", "five")):
        made = tmp_path / f"made-{k}"
        ran = run("modulate", output, f"--task={task}", f"--output={made}")
        assert ran.code == 0, ran.err
        found = checkpoints.read(made)
        leaves, _ = tree.flatten(m3jax.modulate(params, task))
        for name in ("score.weight", "score.bias"):
            np.testing.assert_array_equal(found[name], models[k][name])
            np.testing.assert_array_equal(np.asarray(leaves[name]), models[k][name])
    ran = run(
        *("modulate", output, "--task=two", f"--output={tmp_path}/plain"),
        f"--unmerged_from={tmp_path}/base",
    )
    assert ran.code == 0, ran.err
    found = checkpoints.read(tmp_path / "plain")["score.weight"]
    np.testing.assert_array_equal(found, base["score.weight"])
    with pytest.raises(CheckpointError, match="differs between the tasks"):
        jax.jit(m3jax.modulate)(params, np.int32(0))
