"""`m3jax.learn(...)` on pytrees: what it finds, keeps and goes on from."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_learn import CASES, arrays, language_model, mlp, near, tensors

import m3jax
from m3jax.learn import Config, Optimizer, Space, dam_loss
from m3jax.learn.training.learner import learn

ARITHMETIC = m3jax.Recipe(method="task_arithmetic", mixup=m3jax.Mixup(alpha=None))


def cases(call: str) -> list[Any]:
    return [pytest.param(c, id=c["name"]) for c in CASES if c["call"] == call]


def tree_of(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 2)
    shapes = {"a": (4, 6), "b": (5,)}
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def moved(base: Any, *pairs: Any) -> Any:
    """The base plus task vectors by their coefficients."""
    return jax.tree.map(
        lambda x, *taus: x + sum(c * t for (c, _), t in zip(pairs, taus, strict=True)),
        base,
        *(tau for _, tau in pairs),
    )


def identity(params: Any, batch: Any) -> Any:
    return params


def away(params: Any, batch: Any) -> jax.Array:
    """The squared distance from the batch's params."""
    parts = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, batch)
    return sum(jax.tree.leaves(parts), jnp.zeros(()))


def quadratic(space: Space, steps: int = 300, **options: Any) -> Any:
    base, a, b = (tree_of(k) for k in range(3))
    models = [moved(base, (1.0, a)), moved(base, (1.0, b))]
    target = moved(base, (0.35, a), (0.8, b))
    rate = options.pop("rate", 0.05)
    config = Config(
        recipe=ARITHMETIC,
        space=space,
        objective=away,
        optimizer=Optimizer(rate=rate, schedule="cosine"),
        steps=steps,
        validate_every=max(steps, 1),
    )
    apply = options.pop("apply", identity)
    return learn(base, models, config, apply=apply, batches=[target], **options)


@pytest.mark.parametrize("granularity", ["model", "tensor", "column", "element"])
def test_the_optimum_of_a_quadratic_is_found(granularity: str):
    found = quadratic(Space(granularity=granularity, initial=0.0))
    if granularity in ("model", "tensor"):  # otherwise many merges are the target
        for own in found.coefficients.values():
            near(own.reshape(2), np.array([0.35, 0.8]), 2e-3)
    assert found.losses[-1] < 1e-4
    merged = m3jax.merge_params(
        tree_of(0),
        [moved(tree_of(0), (1.0, tree_of(k))) for k in (1, 2)],
        found.recipe,
        found.seed,
        statistics=found.statistics,
    )
    target = moved(tree_of(0), (0.35, tree_of(1)), (0.8, tree_of(2)))
    near(merged, target, 0.02)


def test_a_task_vector_of_noise_gets_no_coefficient():
    """One fine-tune solves the task, the other only adds noise to the weights."""
    generator = np.random.default_rng(0)
    solution = generator.normal(size=(3, 8)).astype(np.float32)
    base = {"w": jnp.zeros((3, 8)), "bias": jnp.zeros(3)}
    good = {"w": jnp.asarray(solution), "bias": jnp.zeros(3)}
    noise = {
        name: jnp.asarray(generator.normal(size=own.shape), jnp.float32)
        for name, own in base.items()
    }
    inputs = generator.normal(size=(6, 32, 8)).astype(np.float32)
    batches = [{"x": x, "labels": np.argmax(x @ solution.T, axis=1)} for x in inputs]

    def apply(params: Any, batch: Any) -> jax.Array:
        return 3 * (batch["x"] @ params["w"].T + params["bias"][None])

    config = Config(
        recipe=ARITHMETIC,
        space=Space(granularity="model", initial=0.5, constraint="clip"),
        objective={"cross_entropy": 1.0},
        optimizer=Optimizer(rate=0.03),
        steps=150,
    )
    found = learn(base, [good, noise], config, apply=apply, batches=batches)
    solves, disturbs = found.coefficients["w"].reshape(2)
    assert solves > 0.9 and abs(disturbs) < 0.05


@pytest.mark.parametrize("constraint", ["simplex", "share"])
def test_coefficients_stay_in_the_simplex(constraint: str):
    for steps in (0, 1, 40):
        found = quadratic(
            Space(granularity="column", constraint=constraint, initial=(0.4, 0.6)),
            steps,
            rate=0.5,
        )
        for own in found.coefficients.values():
            assert np.all(own >= 0)
            near(own.sum(axis=0), np.ones(own.shape[1:]), 1e-6)
    start = quadratic(Space(constraint=constraint, initial=(0.4, 0.6)), 0)
    near(start.coefficients["b"].reshape(2), np.array([0.4, 0.6]), 1e-6)


def test_models_may_share_and_tensors_stay_as_they_are():
    shared = quadratic(Space(shared=True, initial=0.5), 20)
    for own in shared.coefficients.values():
        assert own[0] == own[1] != 0.5
    fixed = quadratic(Space(include=("^a$",), initial=0.5), 20)
    assert np.all(fixed.coefficients["b"] == 0.5)
    assert np.all(fixed.coefficients["a"] != 0.5)


class Stop(BaseException):
    pass


def stopping_at(step: int) -> Any:
    def progress(done: int, *rest: Any) -> None:
        if done == step:
            raise Stop

    return progress


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix != ".png"
    }


def test_killed_and_resumed_is_the_same_as_not(tmp_path: Path):
    """At any steps, several times, to the byte; and so is the same seed again."""
    batches = [moved(tree_of(0), (0.1 * k, tree_of(1))) for k in range(5)]
    base = tree_of(0)
    models = [moved(base, (1.0, tree_of(k))) for k in (1, 2)]
    config = Config(
        recipe=ARITHMETIC,
        space=Space(granularity="element", initial=0.3),
        objective=away,
        scale_logits=True,
        optimizer=Optimizer(name="adamw", rate=0.02, schedule="linear", warmup=3),
        steps=17,
        save_every=4,
        validate_every=5,
    )
    run = functools.partial(
        learn,
        base,
        models,
        config,
        apply=identity,
        batches={"task": batches},
        validation_batches={"task": batches[:2]},
        seed=5,
    )
    whole = run(output=tmp_path / "whole")
    again = run(output=tmp_path / "again")
    assert whole.losses == again.losses
    generator = np.random.default_rng(1)
    for k, step in enumerate(sorted(generator.choice(np.arange(1, 17), 3, False))):
        with pytest.raises(Stop):
            run(
                output=tmp_path / "killed",
                resume=k > 0,
                progress=stopping_at(int(step)),
            )
    killed = run(output=tmp_path / "killed", resume=True)
    assert (killed.losses, killed.looks) == (whole.losses, whole.looks)
    names = {"summary.json", "coefficients-0.safetensors", "coefficients-1.safetensors"}
    for folder in ("again", "killed"):
        found, expected = digest(tmp_path / folder), digest(tmp_path / "whole")
        assert {n: found[n] for n in names} == {n: expected[n] for n in names}
    with pytest.raises(m3jax.CheckpointError, match="begun with seed = 5, now it is 6"):
        run(output=tmp_path / "whole", resume=True, seed=6)
    with pytest.raises(m3jax.CheckpointError, match="holds an earlier run of learning"):
        run(output=tmp_path / "whole")
    state = tmp_path / "killed" / "state.msgpack"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(m3jax.CheckpointError, match="is not as m3jax wrote it"):
        run(output=tmp_path / "killed", resume=True)


def test_the_best_on_validation_is_kept_and_patience_ends_it():
    """The training target is overshot as seen from the validation target."""
    base, tau = tree_of(0), tree_of(1)
    train, held = (moved(base, (c, tau)) for c in (1.0, 0.5))
    config = Config(
        recipe=ARITHMETIC,
        space=Space(granularity="model", initial=0.0),
        objective=away,
        optimizer=Optimizer(name="sgd", rate=1e-3),
        steps=400,
        validate_every=2,
        patience=3,
    )
    found = learn(
        base,
        [moved(base, (1.0, tau))],
        config,
        apply=identity,
        batches=[train],
        validation_batches=[held],
    )
    assert len(found.losses) < 400
    assert found.step < len(found.losses)
    assert found.step == min(found.looks, key=lambda look: look[1])[0]
    near(found.coefficients["a"].reshape(1), np.array([0.5]), 0.06)


def test_over_devices_it_finds_the_same(tmp_path: Path):
    base = {"a": np.asarray(tree_of(0)["a"])}
    paths = [
        str(checkpoints.write(tmp_path / f"m{k}", {"a": np.asarray(tree_of(k)["a"])}))
        for k in range(3)
    ]
    inputs = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    batch = {"x": inputs, "labels": np.arange(8) % 4}

    def apply(params: Any, batch: Any) -> jax.Array:
        return batch["x"] @ params["a"].T

    config = Config(
        recipe=ARITHMETIC,
        space=Space(granularity="element", initial=0.5),
        objective={"cross_entropy": 1.0, "entropy": 0.1},
        steps=4,
        remat=True,
    )
    run = functools.partial(
        learn, paths[0], paths[1:], config, apply=apply, batches=[batch]
    )
    del base
    one = run()
    for options in ({"mesh": {"rows": 2, "columns": 2}}, {"streamed": True}):
        other = run(**options)
        near(other.coefficients, one.coefficients, 1e-6)
        near(np.array(other.losses), np.array(one.losses), 1e-6)


# Golden trajectories of the systems, by the run instead of their own functions.


@pytest.mark.parametrize("case", cases("adamerging"))
def test_adamerging_goldens(case: dict[str, Any]):
    base, *models = map(tensors, (case["inputs"]["base"], *case["inputs"]["models"]))
    held, options = arrays(case["inputs"]["batches"]), case["options"]
    steps = options["steps"]
    tasks = {
        str(k): [{"x": np.asarray(x[k]), "head": held[f"head{k}"]} for x in held["x"]]
        for k in range(2)
    }
    density = options.get("density")
    transforms = () if density is None else (m3jax.Elect(density=density),)
    task_wise = options.get("granularity", "task") == "task"
    config = Config(
        recipe=m3jax.Recipe(method="task_arithmetic", transforms=transforms),
        space=Space(
            granularity="model" if task_wise else "tensor",
            constraint="clip",
            bounds=tuple(options.get("bounds", (0.0, 1.0))),
            initial=options.get("init", 0.3),
        ),
        optimizer=Optimizer(rate=options["learning_rate"]),
        steps=steps,
        shuffle=False,
    )

    def apply(params: Any, batch: Any) -> jax.Array:
        return mlp(params, batch["x"]) @ batch["head"].T

    found = learn(base, models, config, apply=apply, batches=tasks)
    expected, tolerance = arrays(case["outputs"]["result"]), case["tolerance"]
    near(np.array(found.losses, np.float32), expected["losses"], tolerance["absolute"])
    taus = [{n: own - base[n] for n, own in model.items()} for model in models]
    largest = max(float(jnp.max(jnp.abs(own))) for tau in taus for own in tau.values())
    merged = m3jax.merge_params(base, models, found.recipe, 0)
    allowed = tolerance["merged"] + 2 * tolerance["absolute"] * largest
    near(merged, tensors(case["outputs"]["merged"]), allowed)


@pytest.mark.parametrize("case", cases("learned_soup"))
def test_learned_soup_goldens(case: dict[str, Any]):
    models = list(map(tensors, case["inputs"]["models"]))
    held, options = arrays(case["inputs"]["batches"]), case["options"]
    batches = [
        {"x": x, "labels": y} for x, y in zip(held["x"], held["y"], strict=True)
    ][: options["steps"]]
    config = Config(
        recipe=m3jax.Recipe(),
        space=Space(constraint="simplex"),
        objective={"cross_entropy": 1.0},
        scale_logits=True,
        optimizer=Optimizer(
            name="adamw",
            rate=options["learning_rate"],
            options={"weight_decay": 0.0},
        ),
        steps=options["steps"],
        shuffle=False,
    )

    def apply(params: Any, batch: Any) -> jax.Array:
        return mlp(params, batch["x"])

    found = learn(None, models, config, apply=apply, batches=batches)
    expected, tolerance = arrays(case["outputs"]["result"]), case["tolerance"]
    near(np.array(found.losses, np.float32), expected["losses"], tolerance["absolute"])
    merged = m3jax.merge_params(None, models, found.recipe, 0)
    near(merged, tensors(case["outputs"]["merged"]), tolerance["merged"])


@pytest.mark.parametrize("case", cases("np_merge"))
def test_np_goldens(case: dict[str, Any]):
    a, b, target, curvature = (
        tensors(case["inputs"][name]) for name in ("a", "b", "target", "curvature")
    )
    options = case["options"]

    def objective(params: Any, batch: Any) -> jax.Array:
        parts = jax.tree.map(
            lambda p, t, h: jnp.sum(h * (p - t) ** 2) / 2, params, *batch
        )
        return sum(parts.values())

    config = Config(
        recipe=m3jax.Recipe(),
        space=Space(granularity="element", constraint="share"),
        objective=objective,
        optimizer=Optimizer(name=options["optimizer"], rate=options["learning_rate"]),
        steps=options["steps"],
    )
    found = learn(None, [a, b], config, apply=identity, batches=[(target, curvature)])
    tolerance = case["tolerance"]["absolute"]
    raw = tensors(case["outputs"]["raw"])
    near(
        {n: own[0] for n, own in found.coefficients.items()},
        jax.tree.map(jax.nn.sigmoid, raw),
        tolerance,
    )
    merged = m3jax.merge_params(
        None, [a, b], found.recipe, 0, statistics=found.statistics
    )
    near(merged, tensors(case["outputs"]["merged"]), tolerance)


@pytest.mark.parametrize("term", ["similarity", "weighted_overlap"])
def test_dam_gradients_are_those_of_its_own_loss(term: str):
    """KL to each expert, and a regulariser by column; `dam_loss` has goldens."""
    case = next(c for c in CASES if c["call"] == "dam" and "base" in c["inputs"])
    base = tensors(case["inputs"]["base"])
    models = [tensors(own) for own in case["inputs"]["models"]]
    held = arrays(case["inputs"]["tokens"])
    tasks = {
        str(k): [{"ids": held["ids"][k], "mask": held["mask"][k] != 0}]
        for k in range(3)
    }
    columns = ("up.weight", "head.weight")
    config = Config(
        recipe=m3jax.Recipe(),
        space=Space(granularity="column", include=columns, regularisers={term: 0.01}),
        objective={"kl": 1.0},
        optimizer=Optimizer(name="sgd", rate=1.0),
        steps=1,
    )
    found = learn(base, models, config, apply=language_model, batches=tasks)
    start = {
        name: jnp.full((3, *(1,) * (own.ndim - 1), own.shape[-1]), 1 / 3)
        if name in columns
        else jnp.full((3, *(1,) * own.ndim), 1 / 3)
        for name, own in models[0].items()
    }
    inputs = [own[0] for own in tasks.values()]

    def loss(trained: Any) -> jax.Array:
        terms = {"kl": 1.0, term: 0.01}
        return dam_loss(
            {**start, **trained},
            models,
            language_model,
            inputs,
            base=base,
            terms=terms,
            regularized=columns,
        )[0]

    value, gradient = jax.value_and_grad(loss)({n: start[n] for n in columns})
    assert abs(found.losses[0] - float(value)) < 1e-5
    for name in columns:
        expected = start[name] - gradient[name]
        near(found.coefficients[name], np.asarray(expected), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"granularity": "x"}}, "space.granularity='x' needs one of model"),
        ({"space": {"bounds": (1, 0)}}, "space.bounds="),
        ({"space": {"layer": 1}}, "unknown field 'space.layer'"),
        ({"spaces": {}}, "unknown field 'spaces'"),
        ({"optimizer": {"rate": -1}}, "optimizer.rate=-1 needs"),
        ({"optimizer": {"name": "chain"}}, "optimizer.name='chain' needs an optimiser"),
        ({"optimizer": {"options": {"x": 1}}}, "options of adam='x' needs one of"),
        ({"objective": {"x": 1}}, "objective='x' needs one of entropy"),
        ({"top_k": 3}, "top_k=3 needs None: entropy has none"),
        ({"scale_logits": 1}, "scale_logits=1 needs True or False"),
        (
            {"space": {"regularisers": {"weighted_overlap": 1.0}}},
            "space.regularisers='weighted_overlap' needs space.granularity=column",
        ),
        ({"steps": -1}, "steps=-1 needs an integer, 0 or more"),
        ({"recipe": {"method": "emr", "mixup": {"alpha": None}}}, "emr cannot be"),
        ({"space": {"constraint": "simplex"}}, "space.initial=.* sum 1"),
        ({"space": {"constraint": "clip", "initial": 2}}, "between 0 and 1"),
        ({"recipe": {"method": "ties"}}, "coefficients below 0"),
        ({"space": {"include": ("zz",)}}, "fits no tensor"),
        ({"task_weights": {"zz": 1}}, "task_weights has 'zz'"),
        (
            {
                "recipe": {"method": "ties"},
                "space": {"granularity": "element", "constraint": "clip"},
            },
            "needs a method that is linear",
        ),
    ],
)
def test_what_is_wrong_is_said(change: Any, message: str):
    fields = {"recipe": {"method": "task_arithmetic"}, **change}
    base = tree_of(0)
    with pytest.raises(ValueError, match=message):
        learn(
            base,
            [tree_of(1), tree_of(2)],
            Config.from_dict(fields),
            apply=lambda params, batch: params["a"],
            batches=[0],
        )


def test_configs_survive_json():
    config = Config(
        space=Space(granularity="layer", layers=2, constraint="tanh"),
        objective={"kl": 1.0, "entropy": 0.1},
        temperature=1.5,
        optimizer=Optimizer(name="adamw", options={"weight_decay": 0.1}),
    )
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert Space(granularity="layer", layers=2).group("model.layers.5.w") == (
        "model.layers.4"
    )
    rates = config.optimizer.rates(10)
    assert rates == 1e-3
    cosine = Optimizer(rate=0.1, schedule="cosine", warmup=2).rates(12)
    assert [round(float(cosine(s)), 6) for s in (0, 1, 2, 12)] == [0, 0.05, 0.1, 0]


def test_learn_is_a_function_and_a_module():
    assert m3jax.learn.fisher is not None
    with pytest.raises(ValueError, match="nothing to learn from"):
        m3jax.learn("base", ["a"])
