"""Models of layers in a row: as recipes, with scales, of any depth, searched for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import m3jax
from m3jax import programs
from m3jax.checkpoints.formats import tree
from m3jax.evaluation.running import up_to_depth
from m3jax.models.decoder import forward
from m3jax.models.parameters import padded
from m3jax.programs import BASE, Block

PROGRAM = [(1, 0), (0, 0, 0.7), (BASE, 1, 1.5), (0, 1, 0.6), (1, 1, 1.3)]
UNSCALED = [block[:2] for block in PROGRAM]


def models(family: str = "llama2") -> list[dict[str, Any]]:
    return [tiny_models.parameters(family, seed) for seed in range(3)]


def child(family: str, program: Sequence[Sequence[Any]]) -> dict[str, Any]:
    base, *own = models(family)
    return m3jax.merge_params(base, own, programs.as_recipe(program), 0)


# A program is a recipe.


def test_the_recipe_of_a_program_makes_what_the_published_function_does():
    base, *own = models()
    made, _ = tree.flatten(child("llama2", UNSCALED))
    wanted, _ = tree.flatten(programs.apply(base, own, UNSCALED).params)
    assert set(made) == set(wanted)
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(made[name], leaf, name)


def test_a_recipe_tells_its_program():
    for program in (UNSCALED, PROGRAM, [(0, 0)], [(0, 0), (0, 1), (0, 0), (0, 1)]):
        recipe = programs.as_recipe(program)
        recipe = m3jax.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        found = programs.of_recipe(recipe)
        assert [own[:2] for own in found] == [own[:2] for own in program]
        scales = [Block(*own).scale for own in program[:-1]]
        np.testing.assert_allclose([own.scale for own in found[:-1]], scales)
    assert programs.of_recipe(m3jax.Recipe()) is None


def test_layers_that_follow_each_other_are_one_slice():
    recipe = programs.as_recipe([(0, 0), (0, 1), (1, 2), (1, 3), (1, 1)])
    pieces = [own.models[0] for own in recipe.slices]
    assert [(own.model, own.layers) for own in pieces] == [
        (0, (0, 2)),
        (1, (2, 4)),
        (1, (1, 2)),
    ]


def test_a_program_in_words():
    blocks = programs.of_recipe(programs.as_recipe(PROGRAM))
    names = ["code", "maths"]
    assert programs.described(blocks, names) == (
        "maths 0, code 0 ×0.7, base 1 ×1.5, code 1 ×0.6, maths 1"
    )
    assert programs.counted(blocks, names) == (
        "5 layers: 2 of code, 2 of maths, 1 of base"
    )


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ([], "has no block"),
        ([(0, 0, 0.0)], r"program\[0\] has the scale 0"),
        ([(0, 0), (0, 0, -1.0)], r"program\[1\] has the scale -1"),
        ([(0, 0, math.inf)], "has the scale inf"),
    ],
)
def test_what_is_no_model_is_no_recipe(program: Any, said: str):
    with pytest.raises(ValueError, match=said):
        programs.as_recipe(program)


@pytest.mark.parametrize(
    ("family", "epsilon"), [("llama_biased", 1e-12), ("qwen3", 1e-5), ("gpt2", 1e-5)]
)
def test_scales_in_the_weights_scale_hidden_states(family: str, epsilon: float):
    """transformers, whose layers' outputs are multiplied, is the oracle."""
    torch = pytest.importorskip("torch")
    import transformers

    fields = {**tiny_models.config_dict(family)}
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    norm = "layer_norm_epsilon" if family == "gpt2" else "rms_norm_eps"
    fields |= {depth: len(PROGRAM), norm: epsilon}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)

    def model(parameters: Any) -> Any:
        made = transformers.AutoModelForCausalLM.from_config(config).eval()
        leaves, _ = tree.flatten(parameters)
        state = {name: torch.tensor(np.asarray(leaf)) for name, leaf in leaves.items()}
        _, unexpected = made.load_state_dict(state, strict=False)
        assert not unexpected
        made.tie_weights()
        return made

    def scaled(scale: float) -> Callable[..., Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (scale * output[0], *output[1:])
            return scale * output

        return hook

    slow = model(child(family, UNSCALED))
    body = slow.transformer.h if family == "gpt2" else slow.model.layers
    for layer, block in zip(body, PROGRAM, strict=True):
        layer.register_forward_hook(scaled(Block(*block).scale))
    tokens = torch.tensor(tiny_models.prompts(2, 24), dtype=torch.long)
    with torch.no_grad():
        plain = model(child(family, UNSCALED))(tokens).logits.numpy()
        wanted = slow(tokens).logits.numpy()
        made = model(child(family, PROGRAM))(tokens).logits.numpy()
    assert np.abs(plain - wanted).max() > 0.1
    assert np.abs(made - wanted).max() < (1e-4 if epsilon < 1e-9 else 2e-3)


def test_only_layers_that_normalise_what_they_read_are_scaled():
    def names(family: str) -> list[str]:
        return list(tiny_models.tensors(family))

    for family in ("llama_biased", "qwen3", "gpt2"):
        assert programs.can_scale(names(family))
    assert programs.can_scale([n.removeprefix("transformer.") for n in names("gpt2")])
    olmo2 = "model.layers.0.post_feedforward_layernorm.weight"
    assert not programs.can_scale([*names("llama2"), olmo2])
    assert not programs.can_scale(["model.layers.0.weight", "model.layers.1.weight"])


def test_a_child_is_written_as_a_model_with_the_right_config(tmp_path: Any):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    family = "qwen2_window"
    for seed, name in enumerate(("base", "a", "b")):
        checkpoints.write(tmp_path / name, tiny_models.tensors(family, seed))
        config = json.dumps(tiny_models.config_dict(family))
        (tmp_path / name / "config.json").write_text(config)
    folders = [str(tmp_path / name) for name in ("a", "b")]
    recipe = programs.as_recipe(PROGRAM)
    m3jax.merge(str(tmp_path / "base"), folders, tmp_path / "child", recipe)
    fields = json.loads((tmp_path / "child" / "config.json").read_text())
    assert fields["num_hidden_layers"] == len(PROGRAM)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    assert len(made.model.layers) == len(PROGRAM)
    base, *own = models(family)
    leaves, _ = tree.flatten(m3jax.merge_params(base, own, recipe, 0))
    assert set(leaves) == set(made.state_dict())
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(made.state_dict()[name].numpy(), leaf, name)


# A model of any depth runs as one of few.


@pytest.mark.parametrize("family", ["llama_biased", "qwen3", "gpt2"])
def test_layers_of_zeros_change_nothing(family: str):
    config = tiny_models.config(family).of_layers([0, 1, 1])
    deeper = tiny_models.config(family).of_layers(up_to_depth([0, 1, 1, 1, 1]))
    assert deeper.num_layers == 6
    own = child(family, [(0, 0), (0, 1), (1, 1)])
    tokens = jnp.asarray(tiny_models.prompts(2, 12))
    plain = forward(own, tokens, config=config)
    deep = forward(padded(own, deeper), tokens, config=deeper)
    np.testing.assert_allclose(deep, plain, rtol=1e-5, atol=1e-5)
    assert padded(own, config) is own


def test_windows_follow_their_layers():
    config = tiny_models.config("qwen2_window")
    assert config.windows == (None, tiny_models.WINDOW)
    found = config.of_layers([1, 0, 1])
    assert found.windows == (tiny_models.WINDOW, None, tiny_models.WINDOW)
    assert found.num_layers == 3
