"""load, merge_params and save: the streamed merge's bytes, without its files."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from grids import thin

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats.tree import flatten, nest
from m3jax.engine import in_memory
from m3jax.engine.trees import align_trees
from m3jax.prng import SeedError
from m3jax.recipe import RecipeError

SEED = 7
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {
    "model.embed_tokens.weight": (131, 29),
    "model.layers.0.mlp.experts.weight": (3, 5, 7),
    "model.layers.1.scale": (),
    "model.layers.1.nothing.weight": (0, 4),
    "model.norm.weight": (1025,),
}
DARE = {
    "off": m3jax.Dare(),
    "random": m3jax.Dare(drop_rate=0.3),
    "random_weights": m3jax.Dare(drop_rate=(0.2, 0.6), target="weights"),
    "magnitude": m3jax.Dare(drop_rate=(0.6, 0.2), strategy="magnitude"),
    "magnitude_weights": m3jax.Dare(
        drop_rate=0.4, strategy="magnitude", target="weights", rescale=False
    ),
}
MIXUPS = {
    "off": m3jax.Mixup(alpha=None),
    "model": m3jax.Mixup(alpha=0.4),
    "layer": m3jax.Mixup(alpha=0.4, granularity="layer"),
    "tensor": m3jax.Mixup(alpha=0.4, granularity="tensor"),
}
METHODS = ("average", "task_arithmetic", "ties")

Tensors = dict[str, np.ndarray]


def random_trio(
    dtype: Any = np.float32, shapes: checkpoints.Shapes = SHAPES
) -> tuple[Tensors, Tensors, Tensors]:
    base = checkpoints.random_model(0, shapes, dtype)
    models = (checkpoints.random_model(i, shapes, dtype, base) for i in (1, 2))
    return base, *models


TRIO = random_trio()


def as_tree(tensors: Tensors) -> dict[str, Any]:
    return nest({name: jnp.asarray(tensor) for name, tensor in tensors.items()})


def streamed(folder: Path, trio: Any, recipe: m3jax.Recipe) -> Tensors:
    """What the merge from files to files writes for the same tensors."""
    for name, tensors in zip(("base", "a", "b"), trio, strict=True):
        checkpoints.write(folder / name, tensors)
    m3jax.merge(
        folder / "base", [folder / "a", folder / "b"], folder / "o", recipe, seed=SEED
    )
    return checkpoints.read(folder / "o")


def assert_same(tree: Any, expected: Tensors) -> None:
    found, _ = flatten(tree)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        array = found[name]
        assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape)
        assert np.asarray(array).tobytes() == tensor.tobytes(), name


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that XLA compiles meanwhile."""
    heard: list[str] = []

    def listen(event: str, seconds: float, **facts: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("method", "dare"), thin(METHODS, DARE))
def test_bits_are_those_of_the_streamed_merge(method: str, dare: str, tmp_path: Path):
    base, *models = map(as_tree, TRIO)
    for name, mixup in MIXUPS.items():
        recipe = m3jax.Recipe(
            method=method, mixup=mixup, dare=DARE[dare], scaling=1.3, trim_rate=0.3
        )
        expected = streamed(tmp_path / name, TRIO, recipe)
        assert_same(m3jax.merge_params(base, models, recipe, SEED), expected)


@pytest.mark.parametrize("method", METHODS)
def test_bits_are_those_of_numpy(method: str):
    """No product and sum become one fused multiply-add, with one rounding fewer."""
    base, a, b = (tensors["model.norm.weight"] for tensors in TRIO)
    p, q, s = (np.float32(number) for number in (0.3, 0.7, 1.3))
    x, y = a - base, b - base
    if method == "average":
        expected = p * a + q * b
    elif method == "task_arithmetic":
        expected = base + s * (p * x + q * y)
    else:
        agree = np.sign(x) == np.sign(y)
        mean = (p * x + q * y) / (p + q)
        winner = np.where(np.abs(x) > np.abs(y), p * x / p, q * y / q)
        expected = base + s * np.where(agree, mean, winner)
    recipe = m3jax.Recipe(
        method=method,
        mixup=m3jax.Mixup(ratios=(0.3, 0.7)),
        scaling=1.3,
        trim_rate=0.0,
    )
    trees = [{"x": jnp.asarray(tensor)} for tensor in (base, a, b)]
    merged = m3jax.merge_params(trees[0], trees[1:], recipe)["x"]
    np.testing.assert_array_equal(merged, expected)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method: str, tmp_path: Path):
    trio = random_trio(BFLOAT16)
    recipe = m3jax.Recipe(method=method, dare=DARE["random"])
    expected = streamed(tmp_path, trio, recipe)
    assert expected["model.norm.weight"].dtype == BFLOAT16
    base, *models = map(as_tree, trio)
    assert_same(m3jax.merge_params(base, models, recipe, SEED), expected)


def test_dtypes_mixed_and_changed(tmp_path: Path):
    """float16 base, one model of each precision, a float64 and an integer tensor."""
    trio = tuple(
        {
            "x": tensors["model.norm.weight"].astype(dtype),
            "y": tensors["model.embed_tokens.weight"].astype(np.float64),
            "z": np.arange(7, dtype=np.int32),
        }
        for tensors, dtype in zip(TRIO, (np.float16, BFLOAT16, np.float32), strict=True)
    )
    recipe = m3jax.Recipe(method="task_arithmetic", dtype="bfloat16")
    expected = streamed(tmp_path, trio, recipe)
    names = ("base", "a", "b")
    with jax.enable_x64(True):
        base, *models = (m3jax.load(tmp_path / name) for name in names)
        assert base["y"].dtype == np.float64
        assert_same(m3jax.merge_params(base, models, recipe, SEED), expected)
    base, *models = (m3jax.load(tmp_path / name) for name in names)
    assert base["y"].dtype == np.float32
    merged = m3jax.merge_params(base, models, recipe, SEED)
    assert_same({"x": merged["x"], "z": merged["z"]}, {n: expected[n] for n in "xz"})
    narrow, wide = (np.asarray(own["y"], np.float32) for own in (merged, expected))
    np.testing.assert_allclose(narrow, wide, rtol=2**-7, atol=0)  # a bit of bfloat16
    assert np.mean(narrow == wide) > 0.99
    kept = m3jax.merge_params(base, models, m3jax.Recipe(), SEED)
    assert [kept[name].dtype for name in "xyz"] == [np.float16, np.float32, np.int32]


def test_64_bits(tmp_path: Path):
    recipe = m3jax.Recipe(method="ties", dare=DARE["random"])
    trio = random_trio(np.float64, {"x": (57, 3)})
    for tensors in trio:
        tensors["i"] = np.array([2**53 + 1, -(2**62)])
    expected = streamed(tmp_path, trio, recipe)
    with jax.enable_x64(True):
        base, *models = map(as_tree, trio)
        assert base["x"].dtype == np.float64
        assert_same(m3jax.merge_params(base, models, recipe, SEED), expected)
        loaded = m3jax.load(tmp_path / "base")
        assert isinstance(loaded["i"], jax.Array)
        assert loaded["i"].tolist() == trio[0]["i"].tolist()
    loaded = m3jax.load(tmp_path / "base")
    assert isinstance(loaded["i"], np.ndarray)
    assert loaded["i"].tolist() == trio[0]["i"].tolist()


@pytest.mark.parametrize("vocabulary", ["mean", "truncate"])
def test_vocabulary(vocabulary: str, tmp_path: Path):
    trio = random_trio(BFLOAT16, {"model.embed_tokens.weight": (41, 6)})
    for tensors, rows in zip(trio, (39, 41, 40), strict=True):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][
            :rows
        ].copy()
    recipe = m3jax.Recipe(method="task_arithmetic", vocabulary=vocabulary)
    expected = streamed(tmp_path, trio, recipe)
    base, *models = map(as_tree, trio)
    assert_same(m3jax.merge_params(base, models, recipe, SEED), expected)


def test_excluded_leaves_are_the_base_own():
    base, *models = map(as_tree, TRIO)
    recipe = m3jax.Recipe(exclude=(r"model\.norm",))
    merged = m3jax.merge_params(base, models, recipe)
    assert merged["model"]["norm"]["weight"] is base["model"]["norm"]["weight"]


@pytest.mark.parametrize("seed", [0, SEED, 2**32 - 1])
def test_a_key_stands_for_its_seed(seed: int):
    base, *models = map(as_tree, random_trio(shapes={"x": (37,)}))
    recipe = m3jax.Recipe(dare=m3jax.Dare(drop_rate=0.5))
    expected = m3jax.merge_params(base, models, recipe, seed)["x"]
    key = jax.random.key(seed)
    for same in (key, jax.random.key_data(key), np.uint32(seed)):
        merged = m3jax.merge_params(base, models, recipe, same)["x"]
        np.testing.assert_array_equal(merged, expected)
    other = m3jax.merge_params(base, models, recipe, jax.random.split(key)[0])["x"]
    assert not np.array_equal(other, expected)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (-1, "needs 0 <= seed"),
        (0.0, "needs an integer"),
        (jnp.zeros(3, jnp.uint32), "one key"),
        (jax.random.split(jax.random.key(0)), "one key"),
        (jax.random.key(0, impl="rbg"), "threefry2x32"),
    ],
)
def test_wrong_keys(key: Any, message: str):
    base, *models = map(as_tree, random_trio(shapes={"x": (3,)}))
    with pytest.raises(SeedError, match=message):
        m3jax.merge_params(base, models, m3jax.Recipe(), key)


def test_the_structure_is_kept():
    """Lists, tuples, attributes and flat names: only the names count."""
    a, b, c = (jnp.full(5, value, jnp.float32) for value in (1, 2, 4))
    recipe = m3jax.Recipe(mixup=m3jax.Mixup(ratios=(0.5, 0.5)))
    first = {"layers": [{"w": b}, (c, None)]}
    second = {"layers.0.w": c, "layers.1.0": c}
    merged = m3jax.merge_params(
        {"layers": [{"w": a}, (a, None)]}, [first, second], recipe
    )
    assert jax.tree.structure(merged) == jax.tree.structure(first)
    assert merged["layers"][0]["w"].tolist() == [3.0] * 5


def test_one_compilation_serves_every_draw():
    """Ratios, rates, seeds, scaling and trim rates are arguments of the kernels."""
    trio = random_trio(shapes={f"layers.{i}.w": (33, 31) for i in range(6)})
    base, *models = map(as_tree, trio)
    for method, strategy in itertools.product(METHODS, ("random", "magnitude")):

        def merge(
            draw: int, method: str = method, strategy: str = strategy
        ) -> jax.Array:
            recipe = m3jax.Recipe(
                method=method,
                mixup=m3jax.Mixup(alpha=0.3 + draw / 10),
                dare=m3jax.Dare(drop_rate=draw / 40, strategy=strategy),
                scaling=1 - draw / 40,
                trim_rate=draw / 40,
            )
            return m3jax.merge_params(base, models, recipe, draw)["layers"]["0"]["w"]

        with compilations() as first:
            merge(20)
        with compilations() as others:
            results = {np.asarray(merge(draw)).tobytes() for draw in range(1, 33)}
        assert len(first) < 20
        assert (len(others), len(results)) == (0, 32)


def test_donated_inputs_are_given_up():
    base, *models = map(as_tree, TRIO)
    recipe = m3jax.Recipe(method="ties", dare=DARE["random"], exclude=(r"model\.norm",))
    expected = m3jax.merge_params(base, models, recipe, SEED)
    donated = models[0]["model"]["embed_tokens"]["weight"].unsafe_buffer_pointer()
    merged = m3jax.merge_params(base, models, recipe, SEED, donate=True)
    reused = merged["model"]["embed_tokens"]["weight"].unsafe_buffer_pointer()
    assert reused == donated
    assert_same(merged, {n: np.asarray(t) for n, t in flatten(expected)[0].items()})
    for tree in (base, *models):
        leaves, _ = flatten(tree)
        assert leaves["model.embed_tokens.weight"].is_deleted()
    assert not base["model"]["norm"]["weight"].is_deleted()
    trees = [as_tree(tensors) for tensors in random_trio(BFLOAT16)]
    wider = m3jax.Recipe(dtype="float32", exclude=("model.layers",))
    m3jax.merge_params(trees[0], trees[1:], wider, SEED, donate=True)
    assert trees[1]["model"]["norm"]["weight"].is_deleted()
    with pytest.raises(ValueError, match=r"'x' occurs more than once"):
        x = {"x": jnp.ones(3)}
        m3jax.merge_params(x, [x, {"x": jnp.ones(3)}], recipe, donate=True)


@pytest.mark.parametrize(("method", "dare"), thin(METHODS, ["off", "random"]))
def test_gradients_of_coefficients_and_scaling(method: str, dare: str):
    """jax.grad through the kernels, against differences of the merge itself."""
    trio = [as_tree(t) for t in random_trio(shapes={"x": (6, 7), "y": (31,)})]
    recipe = m3jax.Recipe(method=method, dare=DARE[dare], trim_rate=0.3)
    leaves, _ = align_trees(trio[0], trio[1:], recipe)
    bench = in_memory.Leaves(leaves, 2)
    ((job, numbers),) = in_memory.measured(bench, recipe, SEED)
    weights = [jnp.cos(jnp.arange(leaf.size * 1.0)) for leaf in leaves]

    def loss(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        changed = dict(zip(("weights", "scaling"), given, strict=True))
        own = {name: changed.get(name, old) for name, old in numbers.p[-1].items()}
        p = (*numbers.p[:-1], own)
        merged = in_memory.combine(bench, [(job, numbers._replace(p=p))])
        parts = [
            jnp.vdot(w, m[""].reshape(-1)) for w, m in zip(weights, merged, strict=True)
        ]
        return jnp.stack(parts).sum()

    start = (jnp.asarray([[0.3, 0.6], [0.7, 0.4]]), jnp.asarray([0.8, 0.8]))
    found = jax.grad(loss)(start)
    step = 0.02

    def slope(change: jax.Array | float, place: int) -> float:
        ends = []
        for sign in (1, -1):
            numbers = list(start)
            numbers[place] = start[place] + sign * step * change
            ends.append(float(loss(tuple(numbers))))
        return (ends[0] - ends[1]) / (2 * step)

    for way in itertools.product(range(2), range(2)):
        expected = slope(jnp.zeros((2, 2)).at[way].set(1.0), 0)
        assert float(found[0][way]) == pytest.approx(expected, rel=1e-2, abs=1e-4)
    for place in range(2):
        expected = slope(jnp.zeros(2).at[place].set(1.0), 1)
        assert float(found[1][place]) == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert float(jnp.abs(found[0]).max()) > 3e-3


def test_gradients_go_through_an_outer_jit():
    trio = [as_tree(t) for t in random_trio(shapes={"x": (6, 7)})]
    recipe = m3jax.Recipe(method="ties")
    leaves, _ = align_trees(trio[0], trio[1:], recipe)
    bench = in_memory.Leaves(leaves, 2)
    ((job, numbers),) = in_memory.measured(bench, recipe, SEED)

    def total(weights: jax.Array) -> jax.Array:
        changed = numbers._replace(p=({**numbers.p[0], "weights": weights},))
        return in_memory.combine(bench, [(job, changed)])[0][""].sum()

    given = jnp.asarray(numbers.p[0]["weights"], jnp.float32)
    expected = jax.grad(total)(given)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(given), expected, rtol=1e-5)


class TestWrongInputs:
    """Each is one line that names the leaf and what to do."""

    def merge(self, *changes: dict[str, Any], **settings: Any) -> Any:
        trees = [{"x": jnp.ones((4, 3)), "y": jnp.ones(2)} | c for c in changes]
        recipe = m3jax.Recipe(**settings)
        return m3jax.merge_params(trees[0], trees[1:], recipe)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (({}, {}, {"z": jnp.ones(1)}), "'z' is missing in base, models"),
            (({}, {}, {"x": jnp.ones((4, 2))}), r"'x' has shape .*\[4, 2\] in models"),
            (({}, {"y": jnp.ones(2, int)}, {}), "'y' has dtype"),
            (({}, {}, {"y": 1.0}), r"models\[1\]: 'y' is float, no array of numb"),
            (({"y": jnp.ones(2, complex)}, {}, {}), "base: 'y' is complex64, no"),
            (({"y": jax.random.key(1)}, {}, {}), r"base: 'y' is key<fry>, no array"),
            (
                tuple({"z": print if i else repr} for i in range(3)),
                r"base: 'z' is builtin_function_or_method, .* base and models\[0\]",
            ),
            (({}, {}, {"z": "a"}), r"models\[1\]: 'z' is str, .* base and models"),
            (
                tuple({"y": jnp.ones(2, jnp.float8_e4m3fn)} for _ in range(3)),
                "codes without their scales",
            ),
            (
                ({}, {"x": jnp.full((4, 3), jnp.nan)}, {}),
                r"models\[0\]: .*'x' holds NaN",
            ),
            (({"y": jnp.asarray([1, jnp.inf])}, {}, {}), "base: .*'y' holds NaN"),
            (
                tuple({"y": jnp.asarray([1, i])} for i in range(3)),
                r"'y' \(int32\) differs between base and models\[0\]",
            ),
        ],
    )
    def test_trees(self, changes: Any, message: str):
        with pytest.raises(CheckpointError, match=message) as caught:
            self.merge(*changes, method="task_arithmetic")
        assert "\n" not in str(caught.value)

    def test_overflow(self):
        big = {"x": jnp.full((4, 3), 1e5)}
        with pytest.raises(
            CheckpointError, match="'x': a merged value overflows float16"
        ):
            self.merge({}, big, big, dtype="float16")

    def test_nonfinite_if_allowed(self):
        trees = [{"x": jnp.asarray([1.0, value])} for value in (1, np.nan, 2)]
        merged = m3jax.merge_params(
            trees[0], trees[1:], m3jax.Recipe(), allow_nonfinite=True
        )
        assert merged["x"].tolist()[0] == 1.0
        assert np.isnan(merged["x"][1])

    def test_recipes(self):
        with pytest.raises(RecipeError, match="method='ties' needs a base"):
            m3jax.merge_params(None, [{}, {}], m3jax.Recipe(method="ties"))
        with pytest.raises(RecipeError, match="jax_enable_x64"):
            self.merge({}, {}, {}, dtype="float64")

    def test_names(self):
        with pytest.raises(CheckpointError, match=r"two tensors .* 'a\.b'"):
            flatten({"a": {"b": 1}, "a.b": 2})
        for names in (["a", "a.b"], ["a.b", "a"]):
            with pytest.raises(CheckpointError, match="cannot both be leaves"):
                nest(dict.fromkeys(names, 0))


def test_without_a_base():
    _, *models = map(as_tree, TRIO)
    with_base = m3jax.merge_params(as_tree(TRIO[0]), models, m3jax.Recipe(), SEED)
    without = m3jax.merge_params(None, models, m3jax.Recipe(), SEED)
    assert_same(without, {n: np.asarray(t) for n, t in flatten(with_base)[0].items()})


class TestSave:
    def test_bytes_are_those_of_safetensors(self, tmp_path: Path):
        tensors = {
            **TRIO[0],
            "bf": TRIO[1]["model.norm.weight"].astype(BFLOAT16),
            "i": np.array([2**53 + 1]),
            "flag": np.array([True, False]),
        }
        checkpoints.write(tmp_path / "in", tensors)
        tree = m3jax.load(tmp_path / "in")
        assert m3jax.save(tree, tmp_path / "out") == tmp_path / "out"
        assert [path.name for path in (tmp_path / "out").iterdir()] == [
            "model.safetensors"
        ]
        written = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert written == checkpoints.encode(tensors)

    def test_shards(self, tmp_path: Path):
        tensors = {f"layers.{i}.w": np.full(100, i, np.float32) for i in range(12)}
        m3jax.save(as_tree(tensors), tmp_path / "out", max_shard_size=900)
        assert len(list((tmp_path / "out").glob("model-*-of-00006.safetensors"))) == 6
        assert (tmp_path / "out" / "model.safetensors.index.json").exists()
        assert_same(m3jax.load(tmp_path / "out"), tensors)
        found = checkpoints.read(tmp_path / "out")
        assert {n: t.tobytes() for n, t in found.items()} == {
            n: t.tobytes() for n, t in tensors.items()
        }

    def test_transformers_loads_it(self, tmp_path: Path):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            dtype="float32",
        )
        model = transformers.LlamaForCausalLM(config).eval()
        model.save_pretrained(tmp_path / "in")
        params = m3jax.load(tmp_path / "in")
        halved = jax.tree.map(lambda leaf: (leaf / 2).astype(jnp.bfloat16), params)
        m3jax.save(halved, tmp_path / "out", like=tmp_path / "in")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert again.dtype == torch.bfloat16
        expected = {n: (t / 2).bfloat16() for n, t in model.state_dict().items()}
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, expected[name])

    def test_a_place_that_is_taken(self, tmp_path: Path):
        m3jax.save({"x": jnp.ones(2)}, tmp_path / "out")
        with pytest.raises(CheckpointError, match="exists already"):
            m3jax.save({"x": jnp.zeros(2)}, tmp_path / "out")
        assert m3jax.load(tmp_path / "out")["x"].tolist() == [1, 1]

    def test_what_cannot_be_saved(self, tmp_path: Path):
        with pytest.raises(CheckpointError, match="'x' is complex64"):
            m3jax.save({"x": jnp.ones(2, complex)}, tmp_path / "out")
        assert not list(tmp_path.iterdir())
