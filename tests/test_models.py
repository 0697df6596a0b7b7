"""The forward pass against transformers, and against itself with a mistake in it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from grids import slow, thin, thinned

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats import tree
from m3jax.models import layers
from m3jax.models.decoder import forward, parameter_shapes, read_config
from m3jax.models.likelihood import token_scores
from m3jax.models.parameters import check_parameters
from m3jax.models.rope import Rope

TOLERANCE = 1e-4  # absolute, of logits of size 1 to 5
MISTAKE = 1e-2


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """Logits by transformers, of every family."""
    torch = pytest.importorskip("torch")
    tokens = torch.tensor(tiny_models.prompts(2, 24), dtype=torch.long)
    with torch.no_grad():
        return {
            family: tiny_models.reference(family)(tokens).logits.numpy()
            for family in tiny_models.FAMILIES
        }


def _error(
    family: str,
    expected: dict[str, np.ndarray],
    *,
    parameters: Any = None,
    **changes: Any,
) -> float:
    """Largest difference from transformers, with some fields of the config changed."""
    config = dataclasses.replace(tiny_models.config(family), **changes)
    parameters = parameters or tiny_models.parameters(family)
    logits = forward(parameters, jnp.asarray(tiny_models.prompts(2, 24)), config=config)
    assert logits.dtype == jnp.float32
    return float(np.abs(np.asarray(logits) - expected[family]).max())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_equal_transformers(family, expected):
    assert np.abs(expected[family]).max() > 1
    assert _error(family, expected) < TOLERANCE


WRONG: list[tuple[str, dict[str, Any]]] = [
    *[
        (family, {"rope": Rope(theta=9000.0)})
        for family in ("llama2", "qwen2", "qwen3")
    ],
    ("llama_linear", {"rope": Rope(scaling="linear", factor=2.9)}),
    ("llama_linear", {"rope": Rope()}),
    ("llama3", {"rope": Rope()}),
    ("llama3", {"rope": Rope(10000.0, "llama3", 8.0, 0.5, 1.6, 64)}),
    ("llama3", {"rope": Rope(10000.0, "llama3", 8.0, 0.5, 1.5, 65)}),
    ("mistral", {"windows": (tiny_models.WINDOW + 1,) * 2}),
    ("mistral", {"windows": (tiny_models.WINDOW - 1,) * 2}),
    ("mistral", {"windows": (None,) * 2}),
    ("qwen2_window", {"windows": (tiny_models.WINDOW,) * 2}),
    ("qwen2_window", {"windows": (None, None)}),
    *[(f, {"rms_norm_eps": 1e-6}) for f in ("smollm2", "mistral", "qwen2", "qwen3")],
    ("qwen3", {"qk_norm": False}),
    ("gpt2", {"layer_norm_epsilon": 1e-6}),
    ("gpt2", {"activation": "gelu"}),
    ("gpt2_exact", {"activation": "gelu_new"}),
    ("gpt2", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}),
]


FIRST = {next(iter(case[1])): case for case in reversed(WRONG)}  # of each field
NAMED = [pytest.param(*case, id=f"{case[0]}-{next(iter(case[1]))}") for case in WRONG]


@pytest.mark.parametrize(
    ("family", "change"),
    thinned(NAMED, lambda param: param.values in FIRST.values()),
)
def test_wrong_config_is_seen(family, change, expected):
    assert _error(family, expected, **change) > TOLERANCE


@pytest.mark.parametrize(
    "family", thinned(tiny_models.FAMILIES, {"llama_biased", "gpt2"}.__contains__)
)
def test_every_tensor_matters(family, expected):
    """Rows in another order, or one more of a norm or bias, give other logits."""
    for name, tensor in tiny_models.tensors(family).items():
        wrong = dict(tiny_models.tensors(family))
        wrong[name] = tensor[::-1] if tensor.ndim > 1 else tensor * np.float32(1.1)
        parameters = tree.nest({n: jnp.asarray(t) for n, t in wrong.items()})
        if name.endswith("k_proj.bias"):
            continue  # shifts all scores of a query alike, but for its rotation
        error = _error(family, expected, parameters=parameters)
        assert error > MISTAKE, name


def test_a_text_that_is_too_long_for_gpt2_gives_nan():
    config, parameters = tiny_models.config("gpt2"), tiny_models.parameters("gpt2")
    length = config.max_position_embeddings
    tokens = jnp.asarray(tiny_models.prompts(1, length + 2))
    assert np.isnan(forward(parameters, tokens, config=config)).all()
    assert np.isfinite(forward(parameters, tokens[:, :length], config=config)).all()


def test_gpt2_without_a_prefix_and_with_masks_is_read_as_it_is(expected):
    """The original checkpoints' names."""
    prefix = "transformer."
    original = {
        name.removeprefix(prefix): tensor
        for name, tensor in tiny_models.tensors("gpt2").items()
    }
    masks = {"attn.bias": np.ones((1, 1, 64, 64)), "attn.masked_bias": np.float32(-1e4)}
    original |= {f"h.{i}.{name}": mask for i in (0, 1) for name, mask in masks.items()}
    parameters = tree.nest({n: jnp.asarray(t) for n, t in original.items()})
    check_parameters(parameters, tiny_models.config("gpt2"))
    assert _error("gpt2", expected, parameters=parameters) < TOLERANCE
    with pytest.raises(CheckpointError, match=r"lacks \'h\.1\.mlp\.c_fc\.bias\'"):
        del parameters["h"]["1"]["mlp"]["c_fc"]["bias"]
        check_parameters(parameters, tiny_models.config("gpt2"))


def test_untied_head_is_used_and_tied_one_is_the_embedding(expected):
    tied = tiny_models.tensors("smollm2")
    embedding = tied["model.embed_tokens.weight"]
    for head, same in ((embedding, True), (embedding[::-1], False)):
        parameters = tree.nest(
            {n: jnp.asarray(t) for n, t in {**tied, "lm_head.weight": head}.items()}
        )
        check_parameters(parameters, tiny_models.config("smollm2"))
        error = _error("smollm2", expected, parameters=parameters)
        assert (error < TOLERANCE) == same


@pytest.mark.parametrize("family", [slow("llama3"), "qwen2_window", slow("gpt2")])
def test_padding_and_batch_size_change_nothing(family):
    config, parameters = tiny_models.config(family), tiny_models.parameters(family)
    tokens = tiny_models.prompts(3, 12)
    lengths = (12, 7, 1)
    alone = [
        np.asarray(
            forward(parameters, jnp.asarray(tokens[i : i + 1, :n]), config=config)
        )[0]
        for i, n in enumerate(lengths)
    ]
    for side in ("left", "right", "both"):
        padded, valid = np.full((4, 16), 3, np.int32), np.zeros((4, 16), bool)
        for i, n in enumerate(lengths):
            start = {"left": 16 - n, "right": 0, "both": 2}[side]
            padded[i, start : start + n] = tokens[i, :n]
            valid[i, start : start + n] = True
        logits = forward(
            parameters, jnp.asarray(padded), config=config, valid=jnp.asarray(valid)
        )
        assert np.isfinite(logits).all()
        for i, row in enumerate(alone):
            np.testing.assert_allclose(logits[i][valid[i]], row, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "family"),
    thinned(
        thin([16, 19], ["llama3", "qwen2_window"]), lambda case: case.values[0] == 19
    ),
)
def test_long_texts_are_attended_to_in_blocks(family, length, monkeypatch):
    config, parameters = tiny_models.config(family), tiny_models.parameters(family)
    tokens = jnp.asarray(tiny_models.prompts(2, length))
    valid = np.ones((2, length), bool)
    valid[1, [0, 1, 2, 9, -1]] = False

    traced_anew = forward.__wrapped__  # what has been traced has the old number in it

    def logits_and_slope() -> tuple[np.ndarray, Any]:
        def loss(parameters):
            logits = traced_anew(parameters, tokens, config=config, valid=valid)
            return jnp.mean(logits[valid] ** 2), logits[valid]

        slope, logits = jax.jit(jax.grad(loss, has_aux=True))(parameters)
        return np.asarray(logits), slope

    whole, slope = logits_and_slope()
    monkeypatch.setattr(layers, "_QUERIES", 8)
    in_blocks, slope_in_blocks = logits_and_slope()
    np.testing.assert_allclose(in_blocks, whole, atol=1e-5)
    for found, wanted in zip(
        jax.tree.leaves(slope_in_blocks), jax.tree.leaves(slope), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_bfloat16_parameters_compute_in_bfloat16(expected):
    parameters = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16), tiny_models.parameters("llama2")
    )
    rough = _error("llama2", expected, parameters=parameters)
    tokens = jnp.asarray(tiny_models.prompts(2, 24))
    wide = forward(
        parameters, tokens, config=tiny_models.config("llama2"), dtype=jnp.float32
    )
    assert TOLERANCE < rough < 0.5
    assert float(np.abs(np.asarray(wide) - expected["llama2"]).max()) < rough


def test_gradient_is_right_and_compiles_once():
    config, parameters = tiny_models.config("qwen3"), tiny_models.parameters("qwen3")
    tokens, valid = jnp.asarray(tiny_models.prompts(2, 9)), np.ones((2, 9), bool)
    valid[1, :4] = False

    @jax.jit
    def loss(parameters):
        scores = token_scores(parameters, tokens, jnp.asarray(valid), config=config)
        return -jnp.mean(scores.log_likelihood, where=jnp.asarray(valid[:, :-1]))

    slope = jax.jit(jax.grad(loss))
    gradient = slope(parameters)
    assert jax.tree.structure(gradient) == jax.tree.structure(parameters)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
    # Along the gradient the loss rises by its squared length.
    length = sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(gradient))
    step = 1e-2 / length**0.5
    up, down = (
        loss(jax.tree.map(lambda p, g, s=s: p + s * step * g, parameters, gradient))
        for s in (1, -1)
    )
    assert float(up - down) / (2 * step) == pytest.approx(length, rel=0.02)
    slope(jax.tree.map(lambda p: p * 2, parameters))
    assert slope._cache_size() == 1
    assert loss._cache_size() == 1


def test_token_scores_are_the_log_softmax_of_the_logits():
    config, parameters = tiny_models.config("llama2"), tiny_models.parameters("llama2")
    tokens = jnp.asarray(tiny_models.prompts(3, 150))  # more than one block of rows
    logits = forward(parameters, tokens, config=config)
    expected = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
    )[..., 0]
    found = token_scores(parameters, tokens, jnp.ones((3, 150), bool), config=config)
    np.testing.assert_allclose(found.log_likelihood, expected, atol=1e-5)
    greedy = np.asarray(logits[:, :-1]).argmax(-1) == np.asarray(tokens[:, 1:])
    np.testing.assert_array_equal(found.greedy, greedy)
    assert greedy.any() and not greedy.all()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_config_json_of_transformers_is_read(family, tmp_path):
    """What save_pretrained writes means the same as what the test gave."""
    transformers = pytest.importorskip("transformers")
    fields = dict(tiny_models.config_dict(family))
    made = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    made.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert read_config(written) == tiny_models.config(family)


def test_rope_in_the_words_of_older_releases():
    old = tiny_models.config_dict("llama3")
    scaling = old.pop("rope_parameters")
    old["rope_theta"] = scaling.pop("rope_theta")
    for name in ("rope_type", "type"):
        renamed = {name if k == "rope_type" else k: v for k, v in scaling.items()}
        found = read_config({**old, "rope_scaling": renamed})
        assert found == tiny_models.config("llama3")
    found = read_config({**tiny_models.config_dict("llama2"), "rope_theta": 5e5})
    assert found.rope == Rope(theta=5e5)


@pytest.mark.parametrize(
    ("family", "attributes", "named"),
    [
        ("llama2", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama2", {"model_type": "bloom"}, "model_type"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama2", {"quantization_config": {"quant_method": "gptq"}}, "quantization"),
        ("llama2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ("llama2", {"rope_scaling": {"type": "linear"}}, "factor"),
        ("llama2", {"rope_scaling": {"mystery": 1}}, "rope_parameters.mystery"),
        ("llama2", {"sliding_window": 8}, "sliding_window"),
        ("llama2", {"logit_scale": 0.1}, "logit_scale"),
        ("llama2", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama2", {"hidden_size": None}, "hidden_size"),
        ("llama2", {"rms_norm_eps": 0}, "rms_norm_eps"),
        ("llama2", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("qwen2", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ("qwen3", {"head_dim": 15}, "head_dim"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_head": 3}, "n_head"),
        ("gpt2", {"n_layer": 10**6}, "n_layer"),
        ("gpt2", {"hidden_size": 32}, "hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(family, attributes, named):
    with pytest.raises(CheckpointError, match=named) as refused:
        read_config({**tiny_models.config_dict(family), **attributes}, "a.json")
    assert str(refused.value).startswith("a.json: ")
    assert "\n" not in str(refused.value)


# Optional attributes, beside those of the tests' own configs.
OPTIONAL = {
    "llama3": "rope_scaling rope_theta attention_bias mlp_bias hidden_act head_dim",
    "mistral": "head_dim rope_parameters",
    "qwen2_window": "layer_types rope_scaling",
    "qwen3": "layer_types sliding_window max_window_layers use_sliding_window",
    "gpt2": "activation_function n_inner tie_word_embeddings layer_norm_epsilon",
}
ODD: list[Any] = [
    *([], {}, [[]], [1, 2], ["full_attention", []], "x", "", True, None),
    *(-1, 0, 1.5, 10**30, math.inf, math.nan),
    *({"rope_type": []}, {"type": {}}, {"rope_theta": math.nan}, {"factor": "x"}),
]


@pytest.mark.parametrize("family", OPTIONAL)
def test_values_of_any_kind_are_read_or_refused_by_name(family):
    """A config is untrusted: whatever it holds, nothing but the refusal is raised."""
    fields = tiny_models.config_dict(family)
    refused = 0
    for attribute in (*fields, *OPTIONAL[family].split()):
        for value in ODD:
            try:
                found = read_config({**fields, attribute: value}, "a.json")
            except CheckpointError as error:
                assert str(error).startswith("a.json: ")
                refused += 1
            else:
                numbers = [v for v in vars(found).values() if isinstance(v, float)]
                assert all(map(math.isfinite, numbers)), (attribute, value)
    assert refused > 100


@pytest.mark.parametrize("absent", ["sliding_window", "num_key_value_heads"])
def test_absent_attribute_whose_default_is_a_trap_is_refused(absent):
    fields = tiny_models.config_dict("mistral")
    del fields[absent]
    with pytest.raises(CheckpointError, match=absent):
        read_config(fields)


def test_attributes_without_effect_are_passed_over():
    more = {"torch_dtype": "bfloat16", "_name_or_path": "x", "use_cache": False}
    fields = {**tiny_models.config_dict("llama2"), **more, "unheard_of": None}
    assert read_config(fields) == tiny_models.config("llama2")


def test_parameters_that_do_not_fit_are_named():
    config, right = tiny_models.config("llama2"), tiny_models.tensors("llama2")
    assert list(parameter_shapes(config)) == list(right)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4)}
    check_parameters(tree.nest({**right, **buffer}), config)
    wrong = dict(right)
    del wrong["lm_head.weight"]
    wrong["model.norm.weight"] = np.zeros(31)
    wrong["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32)
    with pytest.raises(CheckpointError) as refused:
        check_parameters(tree.nest(wrong), config, "there")
    assert str(refused.value) == (
        "there: is not what its config.json says: lacks 'lm_head.weight'; has "
        "'model.layers.0.self_attn.q_proj.bias', which llama does not know; "
        "'model.norm.weight' has shape [31], needs [32]"
    )
