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
    # The coefficients' own tolerance moves the merge by as much of the task vectors.
    taus = [{n: own - base[n] for n, own in model.items()} for model in models]
    largest = max(float(jnp.max(jnp.abs(own))) for tau in taus for own in tau.values())
    allowed = tolerance["merged"] + 2 * tolerance["absolute"] * largest
    near(found.params, tensors(case["outputs"]["merged"]), allowed)
    if options["density"] is None:
        merged = {}
        for name, own in base.items():
            raw = found.coefficients
            factors = np.clip(raw[name] if isinstance(raw, dict) else raw, 0, 1)
            moved = sum(f * tau[name] for f, tau in zip(factors, taus, strict=True))
            merged[name] = own + moved
        near(found.params, merged, tolerance["merged"])


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

    @jax.jit
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


# Identities.


def test_only_what_needs_optax_imports_it():
    code = (
        "import sys, m3jax; m3jax.learn; assert 'jax' not in sys.modules; "
        "m3jax.learn.fisher, m3jax.learn.uld_loss, m3jax.learn.dam_loss; "
        "m3jax.learn.mofo_adamw, m3jax.learn.adamerging, m3jax.learn.Learned; "
        "assert 'optax' not in sys.modules and 'fisher' in dir(m3jax.learn)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fisher_of_a_linear_model_has_a_closed_form():
    """F[c, j] = mean x_j² p_c (1 − p_c); of scores not normalised mean x_j² p_c."""
    x = random(0, 9, 4)
    params = {"a": {"weight": random(1, 3, 4)}, "unused": jnp.ones(2)}
    for network in (
        lambda p, e: p["a"]["weight"] @ e,
        lambda p, e: jax.nn.log_softmax(p["a"]["weight"] @ e),
    ):
        found = learn.fisher(network, params, x)
        p = jax.nn.softmax(x @ params["a"]["weight"].T)
        normalized = (p * (1 - p)).T @ x**2 / 9
        plain = p.T @ x**2 / 9
        is_normalized = abs(float(jnp.exp(network(params, x[0])).sum()) - 1) < 1e-5
        expected = normalized if is_normalized else plain
        near(found["a"]["weight"], expected, 1e-6)
        assert found["unused"].tolist() == [0, 0]
    labels = jnp.argmax(p, axis=1)
    own = learn.fisher(network, params, x, kind="empirical", labels=labels)
    away = jax.nn.one_hot(labels, 3) - p
    near(own["a"]["weight"], (away**2).T @ x**2 / 9, 1e-6)
    # Fewer draws than classes: each is one squared gradient.
    key = jax.random.key(1)
    draws = [
        learn.fisher(network, params, x, kind="sampled", samples=n, key=key)
        for n in (1, 2)
    ]
    assert all(float(own["a"]["weight"].sum()) > 0 for own in draws)


def test_adamerging_descends_the_entropy_within_the_bounds():
    base, *models = ({"a": {"w": random(k, 3, 4)}, "n": jnp.int32(5)} for k in range(3))
    batch = [random(7, 6, 4), random(8, 6, 4)]

    def apply_fn(params: Any, x: jax.Array, task: int) -> jax.Array:
        del task
        return x @ params["a"]["w"].T

    run = functools.partial(learn.adamerging, base, models, apply_fn)
    found = run([batch] * 30, granularity="tensor", tx=optax.adam(0.05))
    assert found.losses[-1] < found.losses[0]
    assert found.params["n"] == 5
    assert found.history["a"]["w"].shape == (31, 2)

    def slope(init: float) -> np.ndarray:
        path = run([batch], init=init, tx=optax.sgd(1.0)).history
        return np.asarray(path[0] - path[1])

    # At a bound the gradient is the inner one, outside it is 0.
    for init, inner in ((1.0, 0.9999), (1.001, None), (0.0, 1e-4), (-0.001, None)):
        step = slope(init)
        if inner is None:
            assert not np.any(step)
        else:
            np.testing.assert_allclose(step, slope(inner), rtol=0.01)
    near(run([], init=2.0).params["a"]["w"], sum_of(base, models), 1e-6)
    # ++ with all entries: those of the other sign are left out, nothing is averaged.
    taus = np.stack([m["a"]["w"] - base["a"]["w"] for m in models])
    agreeing = np.where(np.sign(taus) == np.sign(taus.sum(0)), taus, 0)
    plus = run([], init=1.0, density=1.0).params["a"]["w"]
    near(plus, base["a"]["w"] + agreeing.sum(0), 1e-6)


def sum_of(base: Any, models: Any) -> jax.Array:
    return base["a"]["w"] + sum(m["a"]["w"] - base["a"]["w"] for m in models)


def test_a_soup_is_inside_the_simplex_of_its_models():
    models = [{"w": random(k, 3, 4).astype(jnp.bfloat16)} for k in range(3)]
    inputs, labels = random(5, 8, 4), jnp.arange(8) % 3

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"].astype(jnp.float32).T

    run = functools.partial(learn.learned_soup, models, apply_fn)
    start = run([]).params["w"]
    assert start.dtype == jnp.bfloat16
    stacked = jnp.stack([m["w"].astype(jnp.float32) for m in models])
    near(start, jnp.mean(stacked, axis=0).astype(jnp.bfloat16), 0.02)
    found = run([(inputs, labels)] * 20)
    merged = found.params["w"].astype(jnp.float32)
    assert found.losses[-1] < found.losses[0]
    assert bool(jnp.all(merged <= jnp.max(stacked, axis=0)))
    assert bool(jnp.all(merged >= jnp.min(stacked, axis=0)))
    # Labels of −100 do not count.
    ignored = jnp.concatenate([labels[:4], jnp.full(4, -100)])
    near(run([(inputs, ignored)]).losses, run([(inputs[:4], labels[:4])]).losses, 1e-6)


def test_np_merge_leaves_what_both_models_agree_in():
    a = {"w": random(0, 5)}
    b = {"w": a["w"].at[1:3].add(1.0)}
    found = learn.np_merge(a, b, lambda p, _: jnp.sum(p["w"] ** 2), [0] * 3)
    assert (np.asarray(found.coefficients["w"]) != 0).tolist() == [
        *(False, True, True, False, False)
    ]


def test_dam_of_experts_that_are_one_model():
    model = {"up": {"weight": random(0, 5, 4), "bias": random(1, 5)}}
    third = {
        "up": {"weight": jnp.full((3, 1, 4), 1 / 3), "bias": jnp.full((3, 1), 1 / 3)}
    }
    inputs = [{"x": random(k, 2, 3, 4), "mask": jnp.ones((2, 3))} for k in range(3)]

    def apply_fn(params: Any, inputs: Any) -> jax.Array:
        return linear(params["up"], inputs["x"])

    near(learn.dam_merge(third, [model] * 3), model, 1e-6)
    loss, terms = learn.dam_loss(
        third, [model] * 3, apply_fn, inputs, terms={"kl": 1.0, "mse": 1.0}
    )
    near((loss, terms["kl"]), (0.0, 0.0), 1e-6)
    # Equal rows: cos 1 of the weight, the bias is not regularised.
    own = {"similarity": 0.5}
    near(learn.dam_loss(third, [model] * 3, apply_fn, inputs, terms=own)[0], 0.5, 1e-6)
    short = {"up": {"weight": third["up"]["weight"]}}
    with pytest.raises(ValueError, match=r"up\.bias' are missing"):
        learn.dam_merge(short, [model] * 3)
    other = {"up": {"weight": random(0, 5, 3), "bias": random(1, 5)}}
    with pytest.raises(m3jax.CheckpointError, match=r"up\.weight.*\(5, 3\)"):
        learn.dam_merge(third, [model, other, model])


def test_mofo_of_all_elements_is_adamw():
    params = {"w": random(0, 3, 4), "one": jnp.float32(2)}
    tx, adamw = learn.mofo_adamw(0.1, fraction=1.0), optax.adamw(0.1, weight_decay=0.01)
    own, other = tx.init(params), adamw.init(params)
    for k in range(3):
        gradients = {"w": random(k, 3, 4), "one": jnp.float32(k - 1)}
        moved, own = tx.update(gradients, own, params)
        with jax.numpy_dtype_promotion("standard"):
            expected, other = adamw.update(gradients, other, params)
        near(moved, expected, 1e-6)
    few = learn.mofo_adamw(lambda count: 0.1, fraction=0.01, weight_decay=0.0)
    moved, _ = few.update(gradients, few.init(params), params)
    assert int(jnp.sum(moved["w"] != 0)) == 1 and moved["one"] != 0


def test_uld_does_not_see_the_order_of_a_vocabulary():
    student, teacher = random(0, 2, 6, 5), random(1, 2, 7, 9)
    own = jnp.array([[-100, -100, 1, 2, 3, -100], [-100, 1, 2, -100, -100, -100]])
    other = jnp.array([[-100, 1, 2, -100, -100, -100, -100], [-100] * 7])
    options = {"student_labels": own, "teacher_labels": other, "temperature": 2.0}
    loss = jax.jit(functools.partial(learn.uld_loss, **options))
    value = loss(student, teacher)
    moved = loss(student[..., ::-1], teacher[..., ::-1])
    near(moved, value, 1e-7)
    # Two rows of the first example, none of the second.
    rows = learn.uld_loss(student[0, 1:3], teacher[0, :2], temperature=2.0)
    near(value, rows / 2, 1e-6)
    near(learn.uld_loss(student, student[..., ::-1]), 0.0, 1e-6)
    gradient = jax.grad(lambda t: loss(student, t))(teacher)
    assert not np.any(gradient)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learn.fisher(choices, {}, [jnp.ones(2)], kind="all"), "kind='all'"),
        (lambda: learn.fisher(choices, {}, [jnp.ones(2)], kind="empirical"), "labels"),
        (lambda: learn.fisher(choices, {}, [jnp.ones(2)], kind="sampled"), "a key"),
        (lambda: learn.fisher(choices, {}, [jnp.ones(0)]), "0 examples"),
        (lambda: learn.grams(choices, {}, []), "batches"),
        (lambda: learn.adamerging({}, [{}], mlp, [], granularity="x"), "granularity"),
        (lambda: learn.adamerging({}, [{}], mlp, [], density=2), "density=2"),
        (lambda: learn.learned_soup([], mlp, []), "one model or more"),
        (lambda: learn.dam_loss({}, [], mlp, [], terms={"k": 1}), "terms .'k'."),
        (lambda: learn.dam_loss({}, [], mlp, [], normalize="x"), "normalize='x'"),
        (lambda: learn.dam_merge({}, [{}], nonlinearity="x"), "nonlinearity='x'"),
        (lambda: learn.mofo_adamw(0.1, fraction=0), "fraction=0"),
        (lambda: learn.uld_loss(jnp.ones(2), jnp.ones(2), top_k=0), "top_k=0"),
    ],
)
def test_what_is_wrong_is_said(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


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
