"""The Flax NNX module: the pytree's own arrays, and what NNX does with them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

import m3jax
from m3jax.models.decoder import forward

optax = pytest.importorskip("optax")

FAMILIES = ("qwen3", "mistral", "gpt2")
TOKENS = jnp.asarray(tiny_models.prompts(2, 12))


@nnx.jit
def call(model, *inputs):
    return model(*inputs)


def make(family):
    parameters = tiny_models.parameters(family)
    return parameters, m3jax.Decoder(parameters, tiny_models.config(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_state_is_the_pytree_itself(family):
    parameters, model = make(family)
    assert jax.tree.structure(model.parameters) == jax.tree.structure(parameters)
    leaves = zip(
        jax.tree.leaves(model.parameters), jax.tree.leaves(parameters), strict=True
    )
    assert all(own is given for own, given in leaves)


def test_masks_of_integers_are_carried_along_and_not_learnt():
    parameters = tiny_models.parameters("gpt2")
    mask = jnp.ones((1, 1, 64, 64), jnp.uint8)
    for layer in parameters["transformer"]["h"].values():
        layer["attn"]["bias"] = mask
    model = m3jax.Decoder(parameters, tiny_models.config("gpt2"))
    assert model.parameters["transformer"]["h"]["1"]["attn"]["bias"] is mask
    slopes = nnx.to_pure_dict(nnx.grad(lambda model: model(TOKENS).mean())(model))
    assert set(slopes["transformer"]["h"]["1"]["attn"]) == {"c_attn", "c_proj"}


def test_parameters_that_are_not_the_configs_are_refused():
    parameters = tiny_models.parameters("qwen3")
    with pytest.raises(m3jax.CheckpointError, match="is not what its config"):
        m3jax.Decoder(parameters, tiny_models.config("mistral"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_function(family):
    parameters, model = make(family)
    valid = np.ones(TOKENS.shape, bool)
    valid[1, :5] = False
    config = tiny_models.config(family)
    expected = forward(parameters, TOKENS, config=config, valid=valid)
    np.testing.assert_allclose(call(model, TOKENS, valid), expected, atol=1e-5)


def test_a_merge_is_a_model_and_learns(tmp_path):
    family = "qwen3"
    base, a, b = (tiny_models.parameters(family, seed) for seed in range(3))
    merged = m3jax.merge_params(base, [a, b], m3jax.Recipe(method="ties"), 0)
    model = m3jax.Decoder(merged, tiny_models.config(family))
    optimiser = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimiser):
        def loss(model):
            logits = model(TOKENS[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, TOKENS[:, 1:]
            ).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimiser.update(model, gradient)
        return value

    losses = [float(step(model, optimiser)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    m3jax.save(model.parameters, tmp_path / "tuned")
    config = json.dumps(tiny_models.config_dict(family))
    (tmp_path / "tuned" / "config.json").write_text(config)
    again = m3jax.Decoder.load(str(tmp_path / "tuned"))
    np.testing.assert_array_equal(call(again, TOKENS), call(model, TOKENS))
