"""Several processes at one merge: the same bytes, and what happens when one is lost."""

from __future__ import annotations

import json

import checkpoints
import distributed
import ml_dtypes
import numpy as np
import pytest
from interruptions import Merge, partial_of

import m3jax

SHAPES = {
    "model.embed_tokens.weight": (131, 29),
    "model.layers.0.norm.weight": (1025,),
    **{f"model.layers.{i}.up_proj.weight": (41, 71) for i in range(6)},
    "model.layers.5.nothing.weight": (0, 4),
    "model.layers.5.scale": (),
    "model.norm.weight": (29,),
}
FILES = {"max_shard_size": "6KB"}  # nine files
DARE = m3jax.Dare(drop_rate=0.3)
RECIPES = {
    "average": m3jax.Recipe(**FILES),
    "one file": m3jax.Recipe(),
    "task arithmetic": m3jax.Recipe(method="task_arithmetic", **FILES),
    "per tensor": m3jax.Recipe(mixup=m3jax.Mixup(granularity="tensor"), **FILES),
    "ties": m3jax.Recipe(method="ties"),
    "ties after DARE": m3jax.Recipe(method="ties", dare=DARE, **FILES),
    "by magnitude": m3jax.Recipe(
        method="task_arithmetic",
        dare=m3jax.Dare(drop_rate=0.3, strategy="magnitude"),
        **FILES,
    ),
}
PASSES = {"ties": 2, "ties after DARE": 2, "by magnitude": 2}  # at least; else 1

MERGES = """
import json, pathlib, sys
import jax
index, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import m3jax
from m3jax.checkpoints.source import FileTensor
from test_distributed import RECIPES
assert (jax.device_count(), jax.local_device_count()) == (8, 4)
read, read_into = [0], FileTensor.read_into
def counted(self, out, start):
    read[0] += out.nbytes
    read_into(self, out, start)
FileTensor.read_into = counted
results = {}
for name, recipe in RECIPES.items():
    read[0] = 0
    result = m3jax.merge(
        folder / "base",
        [folder / "a", folder / "b"],
        folder / "two" / name,
        recipe,
        seed=7,
        execution=m3jax.Execution(chunk_size=4096, threads=2),
    )
    assert (folder / "two" / name / "m3jax.json").exists()
    results[name] = [read[0], result.checksums, result.ratios, str(result.output)]
print(json.dumps(results))
"""

# What the two are given is not the same; each then says what it was told.
FAILURES = """
import json, pathlib, sys
import jax
index, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import m3jax
from m3jax.checkpoints.output import part
from m3jax.engine import processes
processes.BEAT, part._SECONDS = 0.3, 0.5
def merge(models=("a", "b"), output="out", seed=0, **fields):
    try:
        paths = [folder / model for model in models]
        m3jax.merge(
            folder / "base", paths, folder / output, m3jax.Recipe(**fields), seed=seed
        )
        said = "done"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
merge(seed=index)
merge(scaling=0.5 + index, method="task_arithmetic")
merge(models=("a", ["b", "longer"][index]))
merge(models=("a", ["b", "missing"][index]))
merge(output=f"{index}/out")
merge(models=("a", "nan"))
merge()
"""


@pytest.fixture(scope="module")
def merge(tmp_path_factory) -> Merge:
    folder = tmp_path_factory.mktemp("models")
    base = checkpoints.random_model(0, SHAPES, checkpoints.BFLOAT16)
    ids = {"ids": np.arange(9)}
    checkpoints.write(folder / "base", {**base, **ids}, {"model_type": "llama"})
    for seed, name in ((1, "a"), (2, "b")):
        model = checkpoints.random_model(seed, SHAPES, checkpoints.BFLOAT16, base)
        checkpoints.write(folder / name, {**model, **ids})
    longer = {**model, **ids, "z": np.zeros(3, ml_dtypes.bfloat16)}
    checkpoints.write(folder / "longer", longer)
    last = "model.norm.weight"  # the second process's, in the output's order
    nan = {**model, **ids, last: np.full_like(model[last], np.nan)}
    checkpoints.write(folder / "nan", nan)
    return Merge(folder / "base", (folder / "a", folder / "b"))


@pytest.fixture(scope="module")
def expected(merge) -> dict[str, dict[str, str]]:
    """Of each recipe the output's checksums, made by one process."""
    digests = {}
    for name, recipe in RECIPES.items():
        output = merge.base.parent / "one" / name
        merge(output, recipe)
        digests[name] = checkpoints.digest(output)
    return digests


def test_same_bytes_and_each_reads_its_share(merge, expected):
    folder = merge.base.parent
    ended = distributed.run_script(MERGES, folder)
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    first, second = (json.loads(e.out) for e in ended)
    stored = sum(
        array.nbytes
        for name in ("base", "a", "b")
        for array in checkpoints.read(folder / name).values()
    )
    for name, recipe in RECIPES.items():
        assert checkpoints.digest(folder / "two" / name) == expected[name], name
        assert first[name][1:] == second[name][1:]  # the result is everybody's
        needed = stored
        if recipe.method.name == "average":  # reads no base, but for what it copies
            needed = stored * 2 / 3
        read = [first[name][0], second[name][0]]
        assert sum(read) >= 0.99 * PASSES.get(name, 1) * needed
        assert max(read) < 0.6 * sum(read), (name, read)
    assert not list((folder / "two").glob(".*"))


def test_failures_are_told_to_all(merge):
    folder = merge.base.parent
    ended = distributed.run_script(FAILURES, folder)
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    told = [[json.loads(line) for line in e.out.splitlines()] for e in ended]
    seeds, recipes, models, missing, places, nan, last = zip(*told, strict=True)
    assert seeds[0] == seeds[1]
    assert "process 1 differs in the seed (1 instead of 0)" in seeds[0]
    assert "process 1 differs in the recipe. If" in recipes[1]
    # A model that does not fit the base fails before anything is compared.
    assert "ProcessError: process 1 of 2 failed:" in models[0] and "'z'" in models[0]
    assert "CheckpointError" in missing[1] and "failed" in missing[0]
    assert "process 1 does not see what process 0 writes there" in places[1]
    assert places[0].startswith("ProcessError: process 1 of 2 failed:")
    assert nan[1].startswith("CheckpointError") and "model.norm.weight" in nan[1]
    assert nan[0].startswith("ProcessError: process 1 of 2 failed:")
    assert last == ("done", "done")
    assert sorted(p.name for p in folder.glob("*out*")) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process(victim, merge, expected, tmp_path):
    output = tmp_path / "merged"
    arguments = merge.arguments(output, ["--config.method=ties"])
    ended = distributed.run_commands(arguments, victim=victim, tensors=2)
    killed, other = ended[victim], ended[1 - victim]
    assert killed.code == -9
    assert other.code == 4, other.err
    assert not output.exists()
    if victim == 1:
        assert other.line.startswith(
            "m3jax merge: process 1 of 2 has given no sign of life for 3 s: it was "
        )
        assert "--resume" in other.line
    else:
        assert other.line.startswith("m3jax: process 1 of 2 was ended by JAX")
    assert other.seconds < 40  # a bound for a busy machine
    assert list(partial_of(output).glob("journal*.jsonl"))
    if victim == 0:  # one process alone takes over from two
        assert merge(output, RECIPES["ties"], resume=True).resumed >= 2
    else:
        again = distributed.run_commands([*arguments, "--resume"])
        assert [e.code for e in again] == [0, 0], again[0].err + again[1].err
        assert "had been written before" in again[0].out
        assert again[1].out == again[1].err == ""  # the first one speaks
    assert checkpoints.digest(output) == expected["ties"]
    assert not partial_of(output).exists()
