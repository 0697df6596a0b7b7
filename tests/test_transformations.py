"""merge_params under jit, grad and vmap, and on any pytree: the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grids import slow, thin, thinned

import m3jax
from m3jax.checkpoints.formats.tree import flatten
from m3jax.engine.trees import align_trees

SEED = 7
METHODS = ("average", "task_arithmetic", "ties")
SHAPES = {"layers.0.w": (33, 31), "layers.1.norm": (301,), "scale": ()}
DARE = {
    "off": m3jax.Dare(),
    "random": m3jax.Dare(drop_rate=(0.3, 0.6)),
    "magnitude": m3jax.Dare(drop_rate=0.4, strategy="magnitude"),
}
MIXUPS = {
    "off": m3jax.Mixup(alpha=None),
    "model": m3jax.Mixup(alpha=0.4),
    "layer": m3jax.Mixup(alpha=0.4, granularity="layer"),
}

Merge = Callable[..., Any]


def trees(dtype: Any = np.float32) -> tuple[Any, list[Any]]:
    base = checkpoints.random_model(0, SHAPES, dtype)
    models = [checkpoints.random_model(i, SHAPES, dtype, base) for i in (1, 2)]
    base, *models = (jax.tree.map(jnp.asarray, own) for own in (base, *models))
    return base, models


def same(a: Any, b: Any) -> None:
    """Bit for bit; scalars, which XLA's CPU backend contracts, up to two bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if "scale" in jax.tree_util.keystr(path) and x.dtype == np.float32:
            np.testing.assert_array_max_ulp(np.asarray(x), np.asarray(y), 2)
        else:
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("method", "dare", "mixup"), thin(METHODS, DARE, MIXUPS))
def test_jit_over_arrays(method: str, dare: str, mixup: str):
    """Thresholds and majority of TIES are exact inside a jit too."""
    base, models = trees()
    recipe = m3jax.Recipe(
        method=method, mixup=MIXUPS[mixup], dare=DARE[dare], scaling=1.3, trim_rate=0.3
    )
    merge = lambda base, models: m3jax.merge_params(base, models, recipe, SEED)  # noqa: E731
    same(jax.jit(merge)(base, models), merge(base, models))


@pytest.mark.parametrize("method", thinned(METHODS, {"task_arithmetic"}.__contains__))
def test_jit_over_bfloat16(method: str):
    base, models = trees(checkpoints.BFLOAT16)
    recipe = m3jax.Recipe(method=method, dare=DARE["random"])
    merge = lambda base, models: m3jax.merge_params(base, models, recipe, SEED)  # noqa: E731
    same(jax.jit(merge)(base, models), merge(base, models))


@pytest.mark.parametrize(
    ("method", "granularity"),
    thinned(
        thin(METHODS, ["model", "layer", "tensor"]),
        lambda case: case.values[0] != "ties",  # twelve seconds of compilation
    ),
)
def test_jit_and_vmap_over_seeds(method: str, granularity: str):
    """The ratios and masks of a traced key are those of its seed."""
    base, models = trees()
    mixup = m3jax.Mixup(alpha=0.4, granularity=granularity)
    recipe = m3jax.Recipe(method=method, mixup=mixup, dare=DARE["random"])
    merge = lambda key: m3jax.merge_params(base, models, recipe, key)  # noqa: E731
    seeds = [0, 5, 2**31]
    expected = [merge(seed) for seed in seeds]
    same(jax.jit(merge)(jax.random.key(seeds[1])), expected[1])
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    found = jax.vmap(merge)(keys)
    same(found, jax.tree.map(lambda *own: jnp.stack(own), *expected))
    same(jax.jit(jax.vmap(merge))(keys), found)
    assert not np.array_equal(
        expected[0]["layers.1.norm"], expected[1]["layers.1.norm"]
    )


@pytest.mark.parametrize(("method", "dare"), thin(METHODS, ["off", "random"]))
def test_vmap_over_ratios(method: str, dare: str):
    base, models = trees()

    def merge(ratios: Any) -> Any:
        mixup = m3jax.Mixup(alpha=None, ratios=ratios)
        recipe = m3jax.Recipe(method=method, mixup=mixup, dare=DARE[dare])
        return m3jax.merge_params(base, models, recipe, SEED)

    rows = jnp.asarray([[0.25, 0.75], [0.3, 0.7], [1.0, 0.0]])
    expected = [merge(row) for row in rows]
    found = jax.vmap(merge)(rows)
    same(found, jax.tree.map(lambda *own: jnp.stack(own), *expected))
    same(jax.jit(merge)(rows[1]), expected[1])
    same(jax.jit(jax.vmap(merge))(rows), found)


@pytest.mark.parametrize("method", ["task_arithmetic", slow("ties")])
def test_vmap_over_scaling(method: str):
    base, models = trees()

    def merge(scaling: Any) -> Any:
        recipe = m3jax.Recipe(method=method, scaling=scaling)
        return m3jax.merge_params(base, models, recipe, SEED)

    numbers = jnp.asarray([0.5, 1.0, -2.0])
    expected = [merge(number) for number in numbers]
    same(jax.vmap(merge)(numbers), jax.tree.map(lambda *own: jnp.stack(own), *expected))


@pytest.mark.parametrize(
    ("method", "way"), thin(METHODS, ["plain", "inside", "outside"])
)
def test_grad_through_ratios_and_scaling(method: str, way: str):
    """Against the closed form of the linear methods, and differences of TIES."""
    base, models = trees()
    weights = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size) / 9), base)

    def merge(ratios: Any, scaling: Any) -> Any:
        own = {} if method == "average" else {"scaling": scaling}
        mixup = m3jax.Mixup(alpha=None, ratios=ratios)
        recipe = m3jax.Recipe(method=method, mixup=mixup, **own)
        return m3jax.merge_params(base, models, recipe, SEED)

    if way == "inside":
        merge = jax.jit(merge)

    def dot(tree: Any) -> jax.Array:
        parts = jax.tree.map(lambda w, m: jnp.vdot(w, m.reshape(-1)), weights, tree)
        return jnp.stack(jax.tree.leaves(parts)).sum()

    grad = jax.grad(lambda *given: dot(merge(*given)), argnums=(0, 1))
    if way == "outside":
        grad = jax.jit(grad)
    ratios, scaling = jnp.asarray([0.3, 0.7]), jnp.asarray(0.8)
    by_ratio, by_scaling = grad(ratios, scaling)
    deltas = [jax.tree.map(jnp.subtract, model, base) for model in models]
    if method == "average":
        expected = [dot(model) for model in models]
        assert float(by_scaling) == 0
    elif method == "task_arithmetic":
        expected = [scaling * dot(delta) for delta in deltas]
        wanted = float(ratios[0] * dot(deltas[0]) + ratios[1] * dot(deltas[1]))
        assert float(by_scaling) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    else:
        steps = jnp.asarray([[0.02, 0.0], [0.0, 0.02]])
        ends = [
            [dot(merge(ratios + sign * step, scaling)) for sign in (1, -1)]
            for step in steps
        ]
        expected = [(up - down) / 0.04 for up, down in ends]
        up, down = (dot(merge(ratios, scaling + sign * 0.02)) for sign in (1, -1))
        wanted = float(up - down) / 0.04
        assert float(by_scaling) == pytest.approx(wanted, rel=1e-2, abs=1e-3)
    np.testing.assert_allclose(by_ratio, jnp.stack(expected), rtol=1e-2, atol=1e-3)
    assert float(jnp.abs(by_ratio).max()) > 3e-3


def test_grad_through_the_models():
    """The transpose of an average: each model gets its ratio."""
    base, models = trees()
    recipe = m3jax.Recipe(mixup=m3jax.Mixup(ratios=(0.25, 0.75)))

    def total(models: Any) -> jax.Array:
        return m3jax.merge_params(base, models, recipe)["layers.1.norm"].sum()

    for grad in (jax.grad(total), jax.jit(jax.grad(total))):
        for found, ratio in zip(grad(models), (0.25, 0.75), strict=True):
            np.testing.assert_array_equal(found["layers.1.norm"], np.full(301, ratio))
            assert not np.any(found["layers.0.w"])


@pytest.mark.parametrize(
    "ratios",
    [
        [0.25, 0.75],
        np.array([0.25, 0.75]),
        np.array([0.25, 0.75], np.float16),
        jnp.array([0.25, 0.75]),
        (np.float32(0.25), np.float64(0.75)),
        [jnp.float32(0.25), jnp.bfloat16(0.75)],
    ],
)
def test_numbers_of_numpy_and_jax(ratios: Any):
    base, models = trees()

    def merge(ratios: Any, scaling: Any) -> Any:
        mixup = m3jax.Mixup(alpha=None, ratios=ratios)
        recipe = m3jax.Recipe(method="ties", mixup=mixup, scaling=scaling)
        return m3jax.merge_params(base, models, recipe, SEED)

    for scaling in (np.float32(0.5), jnp.asarray(0.5), np.array(0.5)):
        same(merge(ratios, scaling), merge((0.25, 0.75), 0.5))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: Any
    bias: Any
    name: str = dataclasses.field(metadata={"static": True}, default="linear")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    layers: list[Linear]
    ends: tuple[Any, ...]
    activation: Any
    key: Any
    step: Any


def model(value: float, *, step: int = 0, key: int = 0) -> Model:
    value = float(value)
    return Model(
        layers=[
            Linear(jnp.full((3, 2), value + i), jnp.full(2, value)) for i in (0, 1)
        ],
        ends=(jnp.full(4, value), {"x": jnp.full((), value)}),
        activation=jax.nn.relu,
        key=jax.random.key(key),
        step=jnp.asarray(step),
    )


class TestPytrees:
    RECIPE = m3jax.Recipe(mixup=m3jax.Mixup(ratios=(0.25, 0.75)))

    def test_dataclasses_lists_and_tuples(self):
        merged = m3jax.merge_params(model(0), [model(1), model(3)], self.RECIPE)
        assert isinstance(merged, Model)
        same(
            dataclasses.replace(merged, key=None, activation=None),
            dataclasses.replace(model(2.5), key=None, activation=None),
        )
        assert merged.activation is jax.nn.relu
        assert merged.layers[0].name == "linear"

    def test_names(self):
        names = [leaf.name for leaf in align_trees(None, [model(1)], m3jax.Recipe())[0]]
        assert names == [
            "layers.0.weight",
            "layers.0.bias",
            "layers.1.weight",
            "layers.1.bias",
            "ends.0",
            "ends.1.x",
            "activation",
            "key",
            "step",
        ]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"key": 1}, r"base: 'key' is key<fry>, no array of numbers, and differs"),
            ({"step": 9}, r"'step' \(int32\) differs between base and models\[1\]"),
        ],
    )
    def test_keys_and_counters(self, changes: dict[str, int], message: str):
        """They are the base's where excluded, and must be equal otherwise."""
        given = model(0), [model(1), model(3, **changes)]
        with pytest.raises(m3jax.CheckpointError, match=message):
            m3jax.merge_params(*given, self.RECIPE)
        recipe = dataclasses.replace(self.RECIPE, exclude=("key", "step"))
        merged = m3jax.merge_params(*given, recipe)
        assert merged.key is given[0].key
        assert merged.step is given[0].step
        assert merged.ends[0].tolist() == [2.5] * 4

    def test_functions(self):
        other = dataclasses.replace(model(3), activation=jax.nn.gelu)
        with pytest.raises(m3jax.CheckpointError, match="'activation' is "):
            m3jax.merge_params(model(0), [model(1), other], self.RECIPE)
        recipe = dataclasses.replace(self.RECIPE, exclude=("activation",))
        merged = m3jax.merge_params(model(0), [model(1), other], recipe)
        assert merged.activation is jax.nn.relu

    def test_under_jit(self):
        """Keys and counters are arguments as well: nobody can look at them."""
        given = [dataclasses.replace(model(i), activation=None) for i in (0, 1, 3)]
        merge = lambda base, *models: m3jax.merge_params(base, models, self.RECIPE)  # noqa: E731
        same(
            dataclasses.replace(jax.jit(merge)(*given), key=None),
            dataclasses.replace(merge(*given), key=None),
        )


class Network(nnx.Module):
    def __init__(self, seed: int):
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Linear(3, 4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class TestNnx:
    def test_state(self):
        states = [nnx.state(Network(seed), nnx.Param) for seed in range(3)]
        recipe = m3jax.Recipe(method="ties", dare=DARE["random"])
        merged = m3jax.merge_params(states[0], states[1:], recipe, SEED)
        assert isinstance(merged, nnx.State)
        base, *models = (nnx.to_pure_dict(state) for state in states)
        expected = m3jax.merge_params(base, models, recipe, SEED)
        same(nnx.to_pure_dict(merged), expected)
        names = [leaf.name for leaf in align_trees(states[0], states[1:], recipe)[0]]
        assert set(names) == set(flatten(base)[0])
        assert "inner.kernel" in names
        network = Network(0)
        nnx.update(network, merged)
        np.testing.assert_array_equal(
            network.inner.kernel[...], expected["inner"]["kernel"]
        )

    def test_random_state_is_excluded(self):
        states = [nnx.state(Network(seed)) for seed in range(3)]
        with pytest.raises(m3jax.CheckpointError, match=r"dropout\.rngs"):
            m3jax.merge_params(states[0], states[1:])
        recipe = m3jax.Recipe(exclude=(r".*\.rngs\.",))
        merged = m3jax.merge_params(states[0], states[1:], recipe)
        assert jax.tree.structure(merged) == jax.tree.structure(states[0])
        nnx.update(Network(0), merged)
