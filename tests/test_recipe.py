"""The recipe: its defaults, and what it says about fields that are wrong."""

from __future__ import annotations

import json

import pytest

from m3jax import Dare, Mixup, Recipe, RecipeError
from m3jax.recipe import parse_size

DEFAULTS = {
    "method": "average",
    "mixup": {"alpha": 0.5, "ratios": None, "granularity": "model"},
    "scaling": 1.0,
    "trim_rate": 0.5,
    "dare": {
        "drop_rate": None,
        "rescale": True,
        "strategy": "random",
        "target": "delta",
    },
    "exclude": (),
    "vocabulary": "error",
    "dtype": "input",
    "max_shard_size": "5GB",
}


def test_defaults():
    assert Recipe().to_dict() == DEFAULTS


def test_dict_and_back():
    recipe = Recipe(
        method="ties",
        mixup=Mixup(alpha=None, ratios=(0.25, 0.75), granularity="layer"),
        dare=Dare(drop_rate=(0.1, 0.2), strategy="magnitude", target="weights"),
        exclude=(r"lm_head\.", "model.norm"),
        max_shard_size=1000,
    )
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    as_json = json.loads(json.dumps(recipe.to_dict()))  # lists stand for tuples
    assert Recipe.from_dict(as_json) == recipe
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"dare": {"drop_rate": 0.5}}).dare.rates(3) == (0.5,) * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "slerp"}, "method='slerp' needs one of average, task_arith"),
        ({"scaling": float("nan")}, "scaling=nan needs a finite number"),
        ({"scaling": "1"}, "scaling='1' needs a finite number"),
        ({"scaling": True}, "scaling=True needs a finite number"),
        ({"trim_rate": 1.5}, "trim_rate=1.5 needs a number from 0 to 1"),
        ({"trim_rate": None}, "trim_rate=None needs a number from 0 to 1"),
        ({"mixup": {"alpha": -0.1}}, "mixup.alpha=-0.1 needs a finite number, 0 or"),
        ({"mixup": {"alpha": float("inf")}}, "mixup.alpha=inf needs a finite number"),
        ({"mixup": {"ratios": 0.5}}, "mixup.ratios=0.5 needs a tuple of numbers"),
        ({"mixup": {"ratios": ()}}, "mixup.ratios=() needs a tuple of numbers"),
        ({"mixup": {"ratios": (1, "a")}}, "mixup.ratios[1]='a' needs a finite number"),
        ({"mixup": {"granularity": "row"}}, "mixup.granularity='row' needs one of"),
        ({"dare": {"drop_rate": 1.1}}, "dare.drop_rate=1.1 needs a number from 0 to"),
        ({"dare": {"drop_rate": (0.1, -1)}}, "dare.drop_rate[1]=-1 needs a number"),
        ({"dare": {"drop_rate": "0.1"}}, "dare.drop_rate='0.1' needs a number from"),
        ({"dare": {"rescale": 1}}, "dare.rescale=1 needs True or False"),
        ({"dare": {"strategy": "top"}}, "dare.strategy='top' needs one of random, m"),
        ({"dare": {"target": "both"}}, "dare.target='both' needs one of delta, wei"),
        ({"exclude": "lm_head"}, "exclude='lm_head' needs a tuple of regular expr"),
        ({"exclude": ("[",)}, "exclude[0]='[' needs a regular expression"),
        ({"vocabulary": "pad"}, "vocabulary='pad' needs one of error, mean, trunc"),
        ({"dtype": "int8"}, "dtype='int8' needs one of input, float32, float16, b"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples' needs such as"),
        ({"max_shard_size": 0}, "max_shard_size=0 needs such as 5GB or 200MB"),
        ({"alpha": 1}, "unknown recipe field 'alpha'; known: method, mixup"),
        ({"mixup": {"beta": 1}}, "unknown recipe field 'mixup.beta'; known: mixup.al"),
        ({"dare": {"p": 1}}, "unknown recipe field 'dare.p'; known: dare.drop_rate"),
        ({"mixup": 0.5}, "recipe field 'mixup' must be a group of fields"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(fields)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_all_wrong_fields_at_once():
    with pytest.raises(RecipeError) as error:
        Recipe(method="x", scaling=float("inf"), dtype="y")
    fields = {part.partition("=")[0] for part in str(error.value).split("; ")}
    assert fields == {"method", "scaling", "dtype"}


@pytest.mark.parametrize(
    ("recipe", "num_models", "has_base", "message"),
    [
        (Recipe(), 0, True, "models=0 needs at least one model"),
        (
            Recipe(mixup=Mixup(ratios=(0.5, 0.5))),
            3,
            True,
            "mixup.ratios=(0.5, 0.5) needs one number per model, 3 here",
        ),
        (
            Recipe(dare=Dare(drop_rate=(0.5,))),
            2,
            True,
            "dare.drop_rate=(0.5,) needs one number per model, 2 here",
        ),
        (
            Recipe(mixup=Mixup(ratios=(0.5, 0.6))),
            2,
            True,
            "mixup.ratios=(0.5, 0.6) needs a sum of 1 for method average",
        ),
        (
            Recipe(method="ties", mixup=Mixup(ratios=(1.5, -0.5))),
            2,
            True,
            "mixup.ratios=(1.5, -0.5) needs no negative number for ties",
        ),
        (Recipe(method="ties"), 2, False, "method='ties' needs a base"),
        (
            Recipe(method="task_arithmetic"),
            2,
            False,
            "method='task_arithmetic' needs a base",
        ),
        (Recipe(dare=Dare(drop_rate=0.1)), 2, False, "dare.target='delta' needs a"),
        (Recipe(exclude=("a",)), 2, False, "exclude=('a',) needs a base"),
    ],
)
def test_recipes_that_do_not_fit(recipe, num_models, has_base, message):
    with pytest.raises(RecipeError) as error:
        recipe.check(num_models=num_models, has_base=has_base)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("recipe", "num_models", "has_base"),
    [
        (Recipe(), 2, False),
        (Recipe(dare=Dare(drop_rate=0.5, target="weights")), 1, False),
        (Recipe(method="ties", mixup=Mixup(ratios=(0.0, 3.0))), 2, True),
        (Recipe(method="task_arithmetic", mixup=Mixup(ratios=(-1.0, 3.0))), 2, True),
        (Recipe(mixup=Mixup(ratios=(1 / 3, 1 / 3, 1 / 3))), 3, False),
        (Recipe(mixup=Mixup(ratios=(0.1, 0.9)), trim_rate=1, scaling=-2), 2, True),
    ],
)
def test_recipes_that_fit(recipe, num_models, has_base):
    recipe.check(num_models=num_models, has_base=has_base)


def test_exclude_matches_from_the_start():
    recipe = Recipe(exclude=(r"model\.norm", ".*lm_head"))
    assert recipe.excludes("model.norm.weight")
    assert recipe.excludes("model.lm_head.weight")
    assert not recipe.excludes("the.model.norm.weight")
    assert not recipe.excludes("modelxnorm")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("200 MB", 2 * 10**8),
        ("1.5kb", 1500),
        ("1TB", 10**12),
        ("77B", 77),
        ("1000000", 10**6),
        (4096, 4096),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size
