"""What is learned from data: golden numbers of the systems, and identities."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m3jax
from m3jax import learn

optax = pytest.importorskip("optax")

GOLDEN = Path(__file__).parent / "golden_systems"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def by_call(*calls: str) -> list[Any]:
    named = [(f"{case['system']}-{case['name']}", case) for case in CASES]
    return [pytest.param(c, id=name) for name, c in named if c["call"] in calls]


# The networks of the goldens.


def linear(params: Any, x: jax.Array, prefix: str = "") -> jax.Array:
    bias = params[prefix + "bias"]
    bias = bias.reshape(*(1,) * (x.ndim - 1), -1)
    return x @ params[prefix + "weight"].T + bias


def hidden(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(linear(params, x, "layers.0."))


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return linear(params, hidden(params, x), "layers.1.")


def choices(params: Any, example: Any) -> jax.Array:
    """Mean log-probabilities of the tokens of each answer; −100 is padding."""
    inputs, answers = example
    middle = jnp.mean(params["embedding"][inputs], axis=0)
    logits = (params["output"] @ middle)[None] + params["position"]
    own = jax.nn.log_softmax(logits)[jnp.arange(3)[None], jnp.maximum(answers, 0)]
    known = (answers != -100).astype(jnp.float32)
    return jnp.sum(own * known, axis=1) / jnp.sum(known, axis=1)


def language_model(params: Any, inputs: Any) -> jax.Array:
    x = params["embed.weight"][inputs["ids"]]
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    x = x * params["norm.weight"].reshape(1, 1, -1)
    return jnp.tanh(linear(params, x, "up.")) @ params["head.weight"].T


NETWORKS = {
    "linear": lambda params, x: jax.nn.log_softmax(linear(params, x)),
    "mlp": lambda params, x: jax.nn.log_softmax(mlp(params, x)),
    "choices": choices,
}


@pytest.mark.parametrize("case", by_call("fisher", "fisher_sampled"))
def test_fisher(case: dict[str, Any]):
    params = tensors(case["inputs"]["params"])
    held, options = arrays(case["inputs"]["examples"]), dict(case["options"])
    network = NETWORKS[options.pop("network")]
    examples = held["x"] if "x" in held else (held["inputs"], held["labels"])
    if options["kind"] == "empirical":
        options["labels"] = held["y"]
    if options["kind"] == "sampled":
        options["key"] = jax.random.key(0)
    found = learn.fisher(network, params, examples, **options)
    expected = tensors(case["outputs"]["fisher"])
    if "relative_l1" in case["tolerance"]:
        total = sum(float(jnp.sum(own)) for own in expected.values())
        away = sum(float(jnp.sum(jnp.abs(found[n] - expected[n]))) for n in expected)
        assert away <= case["tolerance"]["relative_l1"] * total
    else:
        near(found, expected, **case["tolerance"])


@pytest.mark.parametrize("case", by_call("grams"))
def test_grams(case: dict[str, Any]):
    params = tensors(case["inputs"]["params"])
    batches = list(arrays(case["inputs"]["batches"]).values())

    def inputs(params: Any, x: jax.Array) -> Any:
        return {"layers.0.weight": x, "layers.1.weight": hidden(params, x)}

    expected = tensors(case["outputs"]["grams"])
    near(learn.grams(inputs, params, batches), expected, **case["tolerance"])
    # Tokens left out and other batches change nothing.
    padded = [jnp.concatenate([x, jnp.full_like(x, 9)], axis=0) for x in batches]
    halves = [half for x in padded for half in (x[: len(x) // 2], x[len(x) // 2 :])]

    def known(params: Any, x: jax.Array) -> Any:
        return inputs(params, x[x[..., 0] != 9])

    near(learn.grams(known, params, halves), expected, **case["tolerance"])


@pytest.mark.parametrize("case", by_call("adamerging"))
def test_adamerging(case: dict[str, Any]):
    base, *models = map(tensors, (case["inputs"]["base"], *case["inputs"]["models"]))
    held, options = arrays(case["inputs"]["batches"]), dict(case["options"])
    heads = [held["head0"], held["head1"]]
    rate, steps = options.pop("learning_rate"), options.pop("steps")

    def apply_fn(params: Any, x: jax.Array, task: int) -> jax.Array:
        return mlp(params, x) @ heads[task].T

    tx = optax.adam(rate)
    found = learn.adamerging(
        base, models, apply_fn, held["x"][:steps], tx=tx, **options
    )
    expected, tolerance = arrays(case["outputs"]["result"]), case["tolerance"]
    same_history(found, found.history, found.coefficients, expected, tolerance)
    near(found.params, tensors(case["outputs"]["merged"]), tolerance["merged"])


@pytest.mark.parametrize("case", by_call("learned_soup"))
def test_learned_soup(case: dict[str, Any]):
    models = list(map(tensors, case["inputs"]["models"]))
    held, options = arrays(case["inputs"]["batches"]), case["options"]
    batches = list(zip(held["x"], held["y"], strict=True))[: options["steps"]]
    tx = optax.adamw(options["learning_rate"], weight_decay=0.0)
    found = learn.learned_soup(models, mlp, batches, tx=tx)
    expected, tolerance = arrays(case["outputs"]["result"]), case["tolerance"]
    own = found.history["alpha"]
    same_history(found, own, found.coefficients["alpha"], expected, tolerance)
    near(found.history["beta"], expected["beta"], tolerance["absolute"])
    near(found.params, tensors(case["outputs"]["merged"]), tolerance["merged"])


@pytest.mark.parametrize("case", by_call("np_merge"))
def test_np_merge(case: dict[str, Any]):
    a, b, target, curvature = (
        tensors(case["inputs"][name]) for name in ("a", "b", "target", "curvature")
    )
    options = case["options"]

    def loss(params: Any, batch: Any) -> jax.Array:
        del batch
        parts = jax.tree.map(
            lambda p, t, h: jnp.sum(h * (p - t) ** 2) / 2, params, target, curvature
        )
        return sum(parts.values())

    run = functools.partial(learn.np_merge, a, b, loss)
    tx = getattr(optax, options["optimizer"])(options["learning_rate"])
    found = run(range(options["steps"]), tx=tx)
    tolerance = case["tolerance"]["absolute"]
    near(found.coefficients, tensors(case["outputs"]["raw"]), tolerance)
    near(found.params, tensors(case["outputs"]["merged"]), tolerance)
    losses = arrays(case["outputs"]["losses"])["losses"]  # about 30: float32's end
    near(found.losses, losses, tolerance, relative=2e-7)
    # A step of SGD at rate 1 is the gradient.
    first = run([0], tx=optax.sgd(1.0)).coefficients
    gradient = tensors(case["outputs"]["gradient0"])
    near(jax.tree.map(jnp.negative, first), gradient, 2e-6)


@pytest.mark.parametrize("case", by_call("dam"))
def test_dam(case: dict[str, Any]):
    base, *models = map(tensors, (case["inputs"]["base"], *case["inputs"]["models"]))
    coefficients = tensors(case["inputs"]["coefficients"])
    held, options = arrays(case["inputs"]["tokens"]), dict(case["options"])
    inputs = [{"ids": held["ids"][k], "mask": held["mask"][k]} for k in range(3)]
    trainable = options.pop("trainable")

    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(trained: Any) -> Any:
        own = {**coefficients, **trained}
        return learn.dam_loss(own, models, language_model, inputs, base=base, **options)

    (loss, terms), gradient = run({name: coefficients[name] for name in trainable})
    expected = case["outputs"]["terms"]
    near(loss, expected["total"], **case["tolerance"])
    assert set(terms) == set(expected)
    for name, value in expected.items():
        near(terms[name], value, **case["tolerance"])
    near(gradient, tensors(case["outputs"]["gradient"]), **case["tolerance"])
    merged = learn.dam_merge(coefficients, models, nonlinearity=options["nonlinearity"])
    near(merged, tensors(case["outputs"]["merged"]), **case["tolerance"])


@pytest.mark.parametrize("case", by_call("mofo"))
def test_mofo(case: dict[str, Any]):
    held, options = arrays(case["inputs"]["arrays"]), dict(case["options"])
    tx = learn.mofo_adamw(options.pop("learning_rate"), **options)
    params = {name: held[f"start/{name}"] for name in ("a", "b")}
    state, path = tx.init(params), []
    for step in range(5):
        gradients = {name: held[f"grads/{name}"][step] for name in params}
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    expected = arrays(case["outputs"]["trajectory"])
    found = {name: jnp.stack([own[name] for own in path]) for name in params}
    near(found, expected, **case["tolerance"])


@pytest.mark.parametrize("case", by_call("uld_rows", "uld_batch"))
def test_uld(case: dict[str, Any]):
    held = dict(arrays(case["inputs"]["arrays"]))
    student, teacher = held.pop("student"), held.pop("teacher")

    @jax.jit
    @jax.value_and_grad
    def run(student: jax.Array) -> jax.Array:
        return learn.uld_loss(student, teacher, **held, **case["options"])

    value, gradient = run(student)
    tolerance = case["tolerance"]["absolute"]
    near(value, case["outputs"]["value"], tolerance)
    if "gradient" in case["outputs"]:
        expected = arrays(case["outputs"]["gradient"])["gradient"]
        # Tied logits share their gradient in any order.
        tied = (student[..., :, None] == student[..., None, :]).astype(jnp.float32)
        for own in (gradient, expected):
            assert own.shape == student.shape
        summed = [
            jnp.einsum("...vw,...w->...v", tied, own) for own in (gradient, expected)
        ]
        near(*summed, tolerance)


def tensors(file: str) -> dict[str, jax.Array]:
    held = checkpoints.decode((GOLDEN / file).read_bytes())
    return {name: jnp.asarray(own) for name, own in held.items()}


def arrays(file: str) -> dict[str, jax.Array]:
    """As JAX has them: float32 and int32."""
    with np.load(GOLDEN / file) as held:
        return {
            name: jnp.asarray(
                held[name], "float32" if held[name].dtype.kind == "f" else "int32"
            )
            for name in held
        }


def near(found: Any, expected: Any, absolute: float, relative: float = 0.0) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=relative, atol=absolute),
        found,
        expected,
    )


def same_history(
    found: Any, history: Any, last: Any, expected: Any, tolerance: Any
) -> None:
    near(found.losses, expected["losses"], tolerance["absolute"])
    path = expected.get("trajectory")
    if path is None:
        start = "trajectory/"
        path = {
            name.removeprefix(start): own
            for name, own in expected.items()
            if name.startswith(start)
        }
    near(history, path, tolerance["absolute"])
    near(last, jax.tree.map(lambda own: own[-1], history), 0)
