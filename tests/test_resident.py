"""What is measured of one tensor: at one reading where it fits the buffers."""

from __future__ import annotations

import collections
import os
import shutil
import threading
from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
from grids import thin
from interruptions import Observer, write_models

import m3jax
from m3jax.engine import chunks, resident, tiles
from m3jax.engine.buffers import Buffers, Pool
from m3jax.engine.kernel import Numbers, Program, Reducing
from m3jax.methods import METHODS, TRANSFORMS, sums
from m3jax.methods.step import Operands, Problem, Reduction, run_statistics
from m3jax.recipe import Gradient, Rules

SHAPES = {
    "model.embed_tokens.weight": (97, 71),
    "model.layers.0.norm.weight": (1025,),
    "model.layers.0.up_proj.weight": (41, 71),
    "model.layers.1.nothing.weight": (0, 4),
    "model.layers.1.scale": (),
    "model.norm.weight": (29,),
}
SPARSIFY, RESCALE = TRANSFORMS["sparsify"], TRANSFORMS["rescale"]
NO_M3 = m3jax.Mixup(alpha=None)
RECIPES = {
    "largest": m3jax.Recipe(
        transforms=(SPARSIFY(by="magnitude", density=0.4),),
        method="task_arithmetic",
        mixup=NO_M3,
    ),
    "outliers": m3jax.Recipe(
        transforms=(SPARSIFY(by="outliers", density=0.4),), method="task_arithmetic"
    ),
    "random, rescaled": m3jax.Recipe(
        transforms=(SPARSIFY(by="random", density=0.4), RESCALE(norm="l1")),
        method="task_arithmetic",
        mixup=m3jax.Mixup(alpha=1.0, granularity="tensor"),
    ),
    "other numbers by tensor": m3jax.Recipe(
        transforms=(SPARSIFY(by="magnitude", density=Rules((("norm", 0.9),), 0.4)),),
        method=METHODS["task_arithmetic"](weights=Gradient((0.2, 1.0))),
        mixup=NO_M3,
    ),
    "model stock": m3jax.Recipe(method="model_stock", mixup=NO_M3),
    "slerp": m3jax.Recipe(method="slerp", mixup=NO_M3),
    "sce": m3jax.Recipe(method="sce", mixup=NO_M3),
}


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), SHAPES)


@pytest.fixture
def read(monkeypatch):
    """Bytes that the passes' threads read, by the suffix of the file."""
    real, found = os.preadv, collections.Counter()

    def preadv(fd, views, offset, *flags):
        count = real(fd, views, offset, *flags)
        if threading.current_thread().name.startswith("m3jax-"):
            found[Path(f"/proc/self/fd/{fd}").readlink().suffix] += count
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return found


def without(patch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: everything is measured before anything is merged."""
    patch.setattr(resident, "places", lambda *arguments: [])


@pytest.mark.parametrize(("chunk_size", "recipe"), thin([1024, None], RECIPES))
def test_one_reading_gives_the_same_bytes(
    recipe, chunk_size, merge, read, tmp_path, monkeypatch
):
    merge(tmp_path / "once", RECIPES[recipe], chunk_size=chunk_size)
    once = read[".safetensors"]
    folders = (merge.base, *merge.models)
    files = [path for folder in folders for path in folder.glob("*.safetensors")]
    assert once <= sum(path.stat().st_size for path in files)
    read.clear()
    without(monkeypatch)
    progress = Observer()
    merge(tmp_path / "often", RECIPES[recipe], progress, chunk_size=chunk_size)
    assert read[".safetensors"] > 1.9 * once
    assert any(stage.startswith("measuring") for stage in progress.stages)
    assert checkpoints.digest(tmp_path / "once") == checkpoints.digest(
        tmp_path / "often"
    )


@pytest.mark.parametrize("recipe", ["largest", "random, rescaled"])
def test_what_does_not_fit_is_measured_before(recipe, merge, tmp_path, monkeypatch):
    """One tensor is larger than half of the buffers; resumed with others, too."""
    output, expected = tmp_path / "merged", tmp_path / "expected"
    merge(expected, RECIPES[recipe])
    monkeypatch.setattr(resident, "_MOST", 10 * 6 * 1024)
    progress = Observer(8)
    with pytest.raises(KeyboardInterrupt):
        merge(output, RECIPES[recipe], progress)
    assert progress.stages[0].startswith("measuring")
    monkeypatch.setattr(resident, "_MOST", 1 << 30)
    merge(output, RECIPES[recipe], resume=True)
    assert checkpoints.digest(output) == checkpoints.digest(expected)
    assert m3jax.verify(output) == []


def test_masks_are_drawn_once(merge, tmp_path, monkeypatch):
    drawn = []

    def counting(kind, made_of):
        drawn.append(kind)
        return real(kind, made_of)

    real = tiles.drawn_beforehand
    monkeypatch.setattr(tiles, "drawn_beforehand", counting)
    merge(tmp_path / "merged", RECIPES["random, rescaled"], chunk_size=2048)
    elements = [int(np.prod(shape)) for shape in SHAPES.values()]
    assert 1 <= len(drawn) <= sum(-(-size // 1024) for size in elements)
    once = len(drawn)
    without(monkeypatch)
    merge(tmp_path / "other", RECIPES["random, rescaled"], chunk_size=2048)
    assert len(drawn) - once > 2 * once * 0.9


@pytest.mark.parametrize("recipe", ["largest", "outliers"])
def test_a_sample_of_what_is_in_memory_changes_nothing(
    recipe, merge, tmp_path, monkeypatch
):
    """It chooses a window for the threshold of a tensor, good or bad."""
    monkeypatch.setattr(resident.Resident, "few", 0)
    merge(tmp_path / "without", RECIPES[recipe])
    monkeypatch.setattr(resident, "_SAMPLED", 1)
    monkeypatch.setattr(resident, "_SAMPLE", 2048)
    merge(tmp_path / "with", RECIPES[recipe])
    merge(tmp_path / "chunk", RECIPES[recipe], chunk_size=None)
    digests = [
        checkpoints.digest(tmp_path / name) for name in ("without", "with", "chunk")
    ]
    assert digests[0] == digests[1] == digests[2]


def test_values_that_are_not_finite_are_refused(tmp_path):
    own = write_models(tmp_path / "models", SHAPES)
    bad = checkpoints.read(own.models[1])
    bad["model.layers.0.norm.weight"][7] = np.nan
    shutil.rmtree(own.models[1])
    checkpoints.write(own.models[1], bad)
    with pytest.raises(m3jax.CheckpointError, match=r"norm.weight.*nan.*\[7\]"):
        own(tmp_path / "merged", RECIPES["largest"])


def test_several_sums_write_out_little():
    """XLA's intermediates of dot products are a few blocks, not several chunks."""
    count = 1024
    shape = jax.ShapeDtypeStruct((count, 1024), np.float32)
    stack = jax.ShapeDtypeStruct((2, *shape.shape), np.float32)
    unit = jax.ShapeDtypeStruct((3, count, 1), np.float32)
    limbs: list[Reduction] = []

    def answer(reduction: Reduction) -> tuple[np.ndarray, ...]:
        limbs.append(reduction)
        return tuple(np.ones(3) for _ in reduction.combine)

    run_statistics(sums.gram(sums.deltas, Problem(2, 7, {})), answer)
    program, last = Program((), METHODS["average"]()), limbs[-1]
    how = Reducing(program, last.function, last.combine, count=False)
    kernel = tiles.reduce_tiles(how, None)
    valid = jax.ShapeDtypeStruct((count, 1), np.int32)
    x = Operands(shape, stack)
    lowered = kernel.lower(x, Numbers((), ()), None, {"unit": unit}, valid)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1 << 20


def test_buffers_are_shared():
    """Threads that want more than is left wait; none starves, and all come back."""
    pool = Pool(lambda: Buffers(1, 1, 1), 5, [Buffers(1, 1, 1)])
    held, most, lock = 0, 0, threading.Lock()

    def work(count: int) -> None:
        nonlocal held, most
        for _ in range(50):
            with pool.take(count) as own:
                assert len({id(one) for one in own}) == count
                with lock:
                    held += count
                    most = max(most, held)
                with lock:
                    held -= count

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 5
    with pytest.raises(ZeroDivisionError), pool.take(5):
        raise ZeroDivisionError
    with pool.take(5) as own:
        assert len(own) == 5


def test_a_failure_stops_the_others(merge, tmp_path, monkeypatch):
    """A thread that fails while others wait for buffers does not leave them waiting."""
    monkeypatch.setattr(resident, "_MOST", 30 * 6 * 1024)
    monkeypatch.setattr(
        chunks.Work, "check_result", lambda *arguments: 1 / 0, raising=True
    )
    with pytest.raises(ZeroDivisionError):
        merge(tmp_path / "merged", RECIPES["largest"])
