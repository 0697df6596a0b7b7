"""Sharded arrays: every layout gives the streamed merge's bits, nothing is gathered.

Eight virtual devices (conftest.py), as one axis and as 2 × 4.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from grids import slow, thinned
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import m3jax
from m3jax import prng
from m3jax.checkpoints.folder import open_checkpoint
from m3jax.checkpoints.formats import boxes
from m3jax.checkpoints.formats.boxes import Box
from m3jax.checkpoints.formats.tree import flatten, nest
from m3jax.checkpoints.places import files
from m3jax.engine import in_memory, leaves, load, save
from m3jax.engine.kernel import Program, Reducing, take
from m3jax.engine.placement import Placement, run_starts
from m3jax.engine.sharding_rules import by_rules
from m3jax.engine.trees import align_trees
from m3jax.methods import selection, sums

SEED = 7
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DEVICES = np.array(jax.devices())
LINE = Mesh(DEVICES, ("x",))
GRID = Mesh(DEVICES.reshape(2, 4), ("x", "y"))
EXPLICIT = Mesh(DEVICES.reshape(2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)

# Shards of odd sizes, and runs that begin in the middle of a mask block.
SHAPES = {
    "layers.0.w": (24, 29),
    "layers.1.w": (10, 36),
    "layers.1.narrow": (29, 24),  # 3 columns, of which XLA used to make other sums
    "layers.2.experts": (4, 6, 8),
    "layers.3.odd": (7, 5),
    "layers.3.scale": (),
}
LAYOUTS = {
    "rows": (LINE, (P("x"),)),
    "columns": (LINE, (P(None, "x"), P(None, None, "x"))),
    "grid": (GRID, (P("x", "y"), P("x"))),
    "turned_grid": (GRID, (P("y", "x"), P("y", None, "x"), P(None, "x"))),
    "explicit": (EXPLICIT, (P("x", "y"), P("x"))),
}


def layout(name: str, shape: tuple[int, ...]) -> NamedSharding:
    """The first of a layout's specs that divides the shape, or a copy everywhere."""
    mesh, specs = LAYOUTS[name]
    for spec in specs:
        sharding = NamedSharding(mesh, spec)
        if len(spec) <= len(shape):
            try:
                sharding.shard_shape(shape)
            except ValueError:
                continue
            return sharding
    return NamedSharding(mesh, P())


def random_trio(dtype: Any = np.float32) -> list[dict[str, np.ndarray]]:
    base = checkpoints.random_model(0, SHAPES, dtype)
    return [base, *(checkpoints.random_model(i, SHAPES, dtype, base) for i in (1, 2))]


def placed(tensors: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    return nest(
        {key: jax.device_put(t, layout(name, t.shape)) for key, t in tensors.items()}
    )


def recipe(method: str, strategy: str | None, target: str) -> m3jax.Recipe:
    return m3jax.Recipe(
        method=method,
        mixup=m3jax.Mixup(alpha=0.4, granularity="layer"),
        dare=m3jax.Dare(
            drop_rate=(0.3, 0.6) if strategy else None,
            strategy=strategy or "random",
            target=target,
        ),
        scaling=1.3,
        trim_rate=0.3,
    )


RECIPES = [
    recipe("average", "random", "weights"),
    recipe("task_arithmetic", "random", "delta"),
    recipe("ties", None, "delta"),
    recipe("ties", "random", "delta"),
    recipe("ties", "magnitude", "delta"),
]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    """What the merge from files to files writes, for each of RECIPES."""
    folder = tmp_path_factory.mktemp("streamed")
    for name, tensors in zip(("base", "a", "b"), random_trio(), strict=True):
        checkpoints.write(folder / name, tensors)
    models = [folder / "a", folder / "b"]
    results = []
    for i, own in enumerate(RECIPES):
        m3jax.merge(folder / "base", models, folder / str(i), own, seed=SEED)
        results.append(checkpoints.read(folder / str(i)))
    return results


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *(slow(pytest.param(name, slice(None))) for name in LAYOUTS),
        ("grid", slice(0, 2)),
        ("rows", slice(3, 4)),
    ],
)
def test_bits_are_those_of_the_streamed_merge(name: str, which: slice, streamed):
    base, *models = (placed(tensors, name) for tensors in random_trio())
    before, _ = flatten(base)
    for own, expected in list(zip(RECIPES, streamed, strict=True))[which]:
        merged, _ = flatten(m3jax.merge_params(base, models, own, SEED))
        for key, array in merged.items():
            assert array.sharding.is_equivalent_to(before[key].sharding, array.ndim)
            assert np.asarray(array).tobytes() == expected[key].tobytes(), (own, key)


def test_models_that_lie_elsewhere_follow_the_base(streamed):
    base, a, b = random_trio()
    trees = [placed(base, "grid"), placed(a, "rows"), nest(b)]
    merged, _ = flatten(m3jax.merge_params(trees[0], trees[1:], RECIPES[1], SEED))
    for key, array in merged.items():
        assert array.sharding == layout("grid", array.shape)
        assert np.asarray(array).tobytes() == streamed[1][key].tobytes()


def test_a_layout_that_is_no_mesh(streamed):
    """On one device that is not the default one."""
    base, a, b = (
        nest({key: jax.device_put(t, DEVICES[3]) for key, t in tensors.items()})
        for tensors in random_trio()
    )
    merged, _ = flatten(m3jax.merge_params(base, [a, b], RECIPES[1], SEED))
    for key, array in merged.items():
        assert array.devices() == {DEVICES[3]}
        assert np.asarray(array).tobytes() == streamed[1][key].tobytes()


def test_donated_shards():
    base, a, b = (placed(tensors, "grid") for tensors in random_trio())
    expected, _ = flatten(m3jax.merge_params(base, [a, b], RECIPES[1], SEED))
    expected = {key: np.asarray(array) for key, array in expected.items()}
    merged, _ = flatten(m3jax.merge_params(base, [a, b], RECIPES[1], SEED, donate=True))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((base, a, b)))
    for key, array in merged.items():
        np.testing.assert_array_equal(array, expected[key])


@pytest.mark.parametrize(
    ("shape", "mesh", "spec"),
    [
        ((4099,), LINE, P()),
        ((8, 1), LINE, P("x")),
        ((5, 24), LINE, P(None, "x")),
        ((16, 3), GRID, P(("y", "x"))),
        ((2, 3, 1, 4, 3), GRID, P("x", None, None, "y")),
        slow(pytest.param((3, 1), LINE, P())),
        slow(pytest.param((1,), LINE, P())),
        slow(pytest.param((8 * 37,), LINE, P("x"))),
        slow(pytest.param((16, 29), LINE, P("x"))),
        slow(pytest.param((5, 8), LINE, P(None, "x"))),
        slow(pytest.param((5, 64), LINE, P(None, "x"))),
        slow(pytest.param((6, 36), GRID, P("x", "y"))),
        slow(pytest.param((8, 36), GRID, P("y", "x"))),
        slow(pytest.param((5, 16, 3), GRID, P(None, ("x", "y")))),
        slow(pytest.param((2, 5, 8), GRID, P("x", None, "y"))),
        slow(pytest.param((4, 6, 7), GRID, P("y", "x", None))),
    ],
)
def test_masks(shape: tuple[int, ...], mesh: Mesh, spec: P):
    """Each device makes its own part of the documented mask."""
    names, rates = ["model.w"], (0.3, 0.8)
    keys = prng.mask_keys(prng.root_key(SEED), 2, names)[:, 0]
    thresholds = prng.drop_thresholds(np.array(rates))
    placement = Placement(shape, mesh, spec)
    masks = leaves.draw(keys, thresholds, "mask", placement=placement)
    for model, rate in enumerate(rates):
        expected = reference.plain_jax_mask(SEED, model, names[0], shape, rate)
        np.testing.assert_array_equal(masks[model], expected)
    if mesh.size > 1 and spec:
        assert not masks.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2**33 + 8,), P("x")),
        ((16, 2**33), P(None, "x")),
        ((40, 2**31, 3), P("x")),
        ((4, 3, 2**34), P(None, None, "x")),
    ],
)
def test_runs_of_huge_tensors(shape: tuple[int, ...], spec: P):
    """Numbers of elements beyond 32 bits."""
    placement = Placement(shape, LINE, spec)
    starts = jax.jit(
        jax.shard_map(
            lambda: jnp.concatenate(run_starts(placement), axis=1)[None],
            mesh=LINE,
            in_specs=(),
            out_specs=P("x"),
        )
    )()
    index = NamedSharding(LINE, spec).devices_indices_map(shape)
    for device, words in zip(DEVICES, np.asarray(starts).astype(object), strict=True):
        box = boxes.box_of(index[device], shape)
        expected = [start for start, _ in boxes.runs(box, shape)]
        assert [int(high) << 32 | int(low) for high, low in words] == expected


def test_masks_across_the_32_bit_boundary_of_blocks():
    blocks = np.array([[5, 2**32 - 2]], np.uint32)
    key, threshold = np.array([[3, 4]], np.uint32), np.uint32(20000)
    found = prng.packed_mask(
        jnp.asarray(key), jnp.asarray(blocks), threshold, 16, wraps=True
    )
    counters = [(5, 2**32 - 2), (5, 2**32 - 1), (6, 0), (6, 1)]
    parts = [
        prng.packed_mask(
            jnp.asarray(key), jnp.asarray([c], dtype=jnp.uint32), threshold, 4
        )
        for c in counters
    ]
    np.testing.assert_array_equal(found[0], np.concatenate(parts)[:, 0])


@pytest.mark.parametrize("name", thinned(LAYOUTS, {"turned_grid"}.__contains__))
def test_nothing_is_gathered(name: str):
    """The compiled kernels hold no exchange between devices, and no whole tensor."""
    trees = [placed(tensors, name) for tensors in random_trio()]
    own = recipe("ties", "random", "delta")
    program = Program.of(own)
    aligned, _ = align_trees(trees[0], trees[1:], own)
    bench = in_memory.Leaves(aligned, 2)
    ((_, numbers),) = in_memory.measured(bench, own, SEED)
    window = {name: np.zeros((2, 1), np.int32) for name in ("low", "shift")}
    for i, leaf in enumerate(aligned):
        placement = Placement.of(leaf.base)
        keys, thresholds = numbers.keys[:, i], program.threshold(numbers)[:, i]
        words = leaves._draw_words(keys, thresholds, kind="mask", placement=placement)
        masks = leaves._unpack(words, kind="mask", placement=placement)
        axes = len(placement.shape)
        at = {"placement": placement}
        kernels = [
            leaves._draw_words.lower(keys, thresholds, kind="mask", **at),
            leaves._unpack.lower(words, kind="mask", **at),
            leaves.all_finite.lower(leaf.base, **at),
            leaves._merge_leaf.lower(
                leaf.models[0],
                leaf.models[1:],
                leaf.base,
                {},
                take(numbers._replace(keys=None), i, axes),
                masks,
                program=program,
                dtypes=leaf.kernel_dtypes,
                **at,
            ),
            leaves.reduce_leaf.lower(
                leaf.models,
                leaf.base,
                {},
                take(numbers.first(1), i, 1),
                masks,
                take(window, 0, 1),
                how=Reducing(
                    program.before(1),
                    selection.Codes(sums.deltas),
                    ("histogram",),
                    count=True,
                ),
                **at,
            ),
        ]
        for kernel in kernels:
            assert not is_gathering(kernel, leaf.base)
    everywhere = NamedSharding(LAYOUTS[name][0], P())
    copied = jax.jit(lambda x: x + 1, out_shardings=everywhere)
    split = [leaf.base for leaf in aligned if not leaf.base.is_fully_replicated]
    assert all(is_gathering(copied.lower(array), array) for array in split)
    assert split


def is_gathering(kernel: Any, array: jax.Array) -> bool:
    """Whether devices exchange anything in a kernel, or hold more than their shards."""
    text = kernel.compile().as_text()
    whole = f"f32[{','.join(map(str, array.shape))}]"
    exchanges = re.search(r"all-|collective|reduce-scatter|send|recv", text)
    split = array.sharding.shard_shape(array.shape) != array.shape
    return exchanges is not None or (split and whole in text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "base"
    tensors = random_trio(BFLOAT16)[0]
    tensors["empty"] = np.zeros((8, 0), np.float32)
    tensors["flags"] = np.arange(16) % 3 == 0
    return checkpoints.write(folder, tensors)


class TestLoad:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_layouts(self, name: str, checkpoint: Path):
        expected = checkpoints.read(checkpoint)
        loaded = m3jax.load(checkpoint, lambda _, shape: layout(name, shape))
        found, _ = flatten(loaded)
        assert set(found) == set(expected)
        for key, array in found.items():
            assert array.sharding == layout(name, array.shape)
            assert np.asarray(array).tobytes() == expected[key].tobytes()

    def test_a_mesh_and_one_sharding_for_all(self, checkpoint: Path):
        found, _ = flatten(m3jax.load(checkpoint, GRID))
        expected = {
            "layers.0.w": P(("x", "y")),  # 24 rows
            "layers.1.w": P(),  # 10 × 36
            "layers.1.narrow": P(None, ("x", "y")),
            "layers.2.experts": P(None, None, ("x", "y")),
            "layers.3.odd": P(),
            "layers.3.scale": P(),
            "empty": P(("x", "y")),
            "flags": P(("x", "y")),
        }
        assert {key: array.sharding.spec for key, array in found.items()} == expected
        everywhere = NamedSharding(GRID, P())
        found, _ = flatten(m3jax.load(checkpoint, everywhere))
        assert {array.sharding for array in found.values()} == {everywhere}

    def test_rules(self):
        choose = by_rules(
            GRID, [(r".*\.o", 1), (r"norm", None), (r"e", P("y", "x")), (r"[^z].*", 0)]
        )
        every = ("x", "y")
        for name, shape, spec in [
            ("a.o", (8, 16), P(None, every)),
            ("a.o", (8, 15), P(every)),
            ("a.o", (8,), P(every)),
            ("a.q", (8, 16), P(every)),
            ("a.q", (7, 16), P(None, every)),
            ("a.q", (7, 15), P()),
            ("a.q", (), P()),
            ("norm", (8,), P()),
            ("e", (4, 2), P("y", "x")),
        ]:
            assert choose(name, shape) == NamedSharding(GRID, spec)
        with pytest.raises(ValueError, match="no sharding rule fits tensor 'z'"):
            choose("z", (8,))

    def test_a_sharding_that_does_not_fit(self, checkpoint: Path):
        with pytest.raises(ValueError, match=r"tensor 'layers\.1\.narrow'"):
            m3jax.load(checkpoint, NamedSharding(LINE, P("x")))
        with pytest.raises(TypeError, match="needs a Mesh"):
            m3jax.load(checkpoint, "rows")

    @pytest.mark.parametrize("name", ["rows", "columns", "grid", "turned_grid"])
    def test_bytes_read_are_the_share(self, name: str, checkpoint: Path, monkeypatch):
        """A process with some of the devices reads their shards, each byte once."""
        read: list[int] = []
        read_into = files.InputFile.read_into

        def counted(self: Any, out: memoryview, offset: int) -> None:
            read.append(len(out))
            read_into(self, out, offset)

        monkeypatch.setattr(files.InputFile, "read_into", counted)
        expected = checkpoints.read(checkpoint)
        with open_checkpoint(str(checkpoint)) as opened:
            for key, source in opened.tensors.items():
                sharding = layout(name, source.shape)
                index = sharding.devices_indices_map(source.shape)
                for local in (DEVICES[:4], DEVICES[[0, 3, 5]]):
                    holders: dict[Box, list[jax.Device]] = {}
                    for device in local:
                        box = boxes.box_of(index[device], source.shape)
                        holders.setdefault(box, []).append(device)
                    for piece in (10**9, 60):
                        read.clear()
                        shards = load.read_shards(source, holders, piece)
                        share = sum(math.prod(boxes.box_shape(box)) for box in holders)
                        assert sum(read) == share * source.dtype.itemsize
                        for device in local:
                            np.testing.assert_array_equal(
                                shards[device], expected[key][index[device]]
                            )

    def test_rows_are_read_in_one_go(self, checkpoint: Path, monkeypatch):
        """All columns of a process, read together, are whole rows."""
        calls: list[int] = []
        read_into = files.InputFile.read_into

        def counted(self: Any, out: memoryview, offset: int) -> None:
            calls.append(len(out))
            read_into(self, out, offset)

        monkeypatch.setattr(files.InputFile, "read_into", counted)
        m3jax.load(checkpoint, lambda _, shape: layout("columns", shape))
        # The flags too, but not what is empty; a header takes two.
        assert len(calls) == len(SHAPES) + 1 + 2

    def test_host_memory_is_bounded(self, checkpoint: Path, monkeypatch):
        """No more than a piece is read before what was read has been sent."""
        sizes: list[int] = []
        read = load._read

        def measured(source: Any, box: Box) -> np.ndarray:
            values = read(source, box)
            sizes.append(values.nbytes)
            return values

        monkeypatch.setattr(load, "_read", measured)
        with open_checkpoint(str(checkpoint)) as opened:
            source = opened.tensors["layers.0.w"]
            array = load.read_tensor(source, layout("columns", (24, 29)), piece=100)
        assert max(sizes) <= 100
        assert sum(sizes) == array.nbytes


@pytest.mark.parametrize("name", LAYOUTS)
def test_saved_bytes_do_not_depend_on_the_layout(
    name: str, tmp_path: Path, monkeypatch
):
    tensors = random_trio(BFLOAT16)[0]
    monkeypatch.setattr(save, "PIECE", 100)
    m3jax.save(placed(tensors, name), tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == checkpoints.encode(tensors)


class TestBoxes:
    SHAPES_AND_BOXES = st.lists(st.integers(1, 5), max_size=4).flatmap(
        lambda shape: st.tuples(
            st.just(tuple(shape)),
            st.tuples(
                *(
                    st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(
                        lambda edges: (min(edges), max(max(edges), min(edges) + 1))
                    )
                    for n in shape
                )
            ),
        )
    )

    @settings(max_examples=200, deadline=None)
    @given(case=SHAPES_AND_BOXES, limit=st.integers(1, 30))
    def test_runs_and_cuts(self, case: Any, limit: int):
        shape, box = case
        numbers = np.arange(math.prod(shape)).reshape(shape)
        expected = numbers[boxes.within(box, boxes.whole(shape))].reshape(-1).tolist()

        def elements(box: Box) -> list[int]:
            return [i for s, n in boxes.runs(box, shape) for i in range(s, s + n)]

        assert elements(box) == expected
        parts = list(boxes.cut(box, limit))
        assert [i for part in parts for i in elements(part)] == expected
        assert all(math.prod(boxes.box_shape(part)) <= limit for part in parts)

    def test_runs_are_as_long_as_can_be(self):
        assert list(boxes.runs(((2, 4), (0, 5)), (6, 5))) == [(10, 10)]
        assert list(boxes.runs(((2, 4), (1, 3)), (6, 5))) == [(11, 2), (16, 2)]
        assert list(boxes.runs(((0, 1), (2, 4), (0, 5)), (2, 6, 5))) == [(10, 10)]
        assert list(boxes.runs((), ())) == [(0, 1)]

    def test_joined(self):
        quarters = [((a, a + 2), (b, b + 3)) for a in (0, 2) for b in (0, 3)]
        assert boxes.joined(quarters) == [((0, 4), (0, 6))]
        assert boxes.joined(quarters[:2]) == [((0, 2), (0, 6))]
        assert boxes.joined(quarters[::2]) == [((0, 4), (0, 3))]
        assert boxes.joined(quarters[::3]) == [quarters[0], quarters[3]]
        assert boxes.joined(quarters[:3]) == [((0, 2), (0, 6)), quarters[2]]
        assert boxes.joined([()]) == [()]
        assert boxes.joined([]) == []

    def test_empty_boxes(self):
        assert list(boxes.cut(((0, 0), (0, 3)), 5)) == []
        assert boxes.overlap(((0, 2),), ((2, 4),)) is None
        assert boxes.overlap((), ()) == ()
