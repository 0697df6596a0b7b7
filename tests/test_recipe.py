"""The recipe: its defaults, and what it says about fields that are wrong."""

from __future__ import annotations

import json

import contract
import jax.numpy as jnp
import numpy as np
import pytest

from m3jax import Dare, Mixup, Recipe, RecipeError, TaskArithmetic, Ties
from m3jax.methods import METHODS
from m3jax.recipe import Gradient, Rules, parse_size
from m3jax.recipe.recipe import FLAT

DEFAULTS = {
    "method": "average",
    "transforms": (),
    "average": {"weights": None},
    "mixup": {"alpha": 0.5, "ratios": None, "granularity": "model"},
    "exclude": (),
    "vocabulary": "error",
    "tokenizer": {
        "tokens": (),
        "missing": "base",
        "pad_to_multiple_of": None,
        "chat_template": None,
        "config": None,
        "copy": True,
    },
    "dtype": "input",
    "max_shard_size": "5GB",
    "rename": (),
    "unmatched": "error",
    "rules": (),
    "compute": "float32",
    "slices": (),
}
# As version 0.1 wrote it.
VERSION_0_1 = {
    "method": "ties",
    "mixup": {"alpha": 0.5, "ratios": None, "granularity": "model"},
    "scaling": 0.7,
    "trim_rate": 0.2,
    "dare": {
        "drop_rate": [0.1, 0.2],
        "rescale": True,
        "strategy": "random",
        "target": "delta",
    },
    "exclude": ["lm_head"],
    "vocabulary": "error",
    "dtype": "input",
    "max_shard_size": "5GB",
}


def test_defaults():
    assert Recipe().to_dict() == DEFAULTS
    assert Recipe(method="ties", dare=Dare()).to_dict() == {
        **{name: own for name, own in DEFAULTS.items() if name != "average"},
        "method": "ties",
        "ties": {"weights": None, "scaling": 1.0, "trim_rate": 0.5},
    }


RECIPES = [
    Recipe(
        method="ties",
        mixup=Mixup(alpha=None, ratios=(0.25, 0.75), granularity="layer"),
        dare=Dare(drop_rate=(0.1, 0.2), strategy="magnitude", target="weights"),
        exclude=(r"lm_head\.", "model.norm"),
        max_shard_size=1000,
    ),
    Recipe(
        method=Ties(
            weights=(Rules((("mlp", 0.5),), 1.0), Gradient((0.0, 1.0))),
            scaling=Gradient((0.5, 1.0, 0.0)),
            trim_rate=Rules(((r"\.0\.", Gradient((0.1, 0.2))), ("norm", 0.0)), 0.5),
        ),
        mixup=Mixup(alpha=None),
        transforms=(Dare(drop_rate=(Gradient((0.1, 0.9)), 0.5)),),
    ),
    *(Recipe(method=contract.required(m), mixup=Mixup(alpha=None)) for m in METHODS),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method.name)
def test_dict_and_back(recipe):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    as_json = json.loads(json.dumps(recipe.to_dict()))  # lists stand for tuples
    assert Recipe.from_dict(as_json) == recipe
    assert hash(Recipe.from_dict(as_json)) == hash(recipe)


def test_the_flat_form_is_a_view():
    flat = Recipe.from_dict(VERSION_0_1)
    assert flat == Recipe(
        method=Ties(scaling=0.7, trim_rate=0.2),
        transforms=(Dare(drop_rate=(0.1, 0.2)),),
        exclude=("lm_head",),
    )
    assert (flat.method.name, flat.method.trim_rate) == ("ties", 0.2)
    assert flat == Recipe(
        method="ties",
        scaling=0.7,
        trim_rate=0.2,
        dare=Dare(drop_rate=(0.1, 0.2)),
        exclude=("lm_head",),
    )
    assert flat.without_effect == ()
    assert Recipe.from_dict({}) == Recipe()
    (dare,) = Recipe.from_dict({"dare": {"drop_rate": 0.5}}).transforms
    assert dare == Dare(drop_rate=0.5)


def test_flat_fields_without_effect_are_listed():
    recipe = Recipe.from_dict({**VERSION_0_1, "method": "average"})
    changed = [n for n in ("scaling", "trim_rate") if VERSION_0_1[n] != FLAT[n]]
    assert recipe.without_effect == tuple(changed)
    assert Recipe(scaling=3.0, trim_rate=0.5).without_effect == ("scaling",)
    assert Recipe(method="task_arithmetic", scaling=2.0).without_effect == ()
    recipe = Recipe(method="task_arithmetic", scaling=2.0, trim_rate=0.3)
    assert recipe.without_effect == ("trim_rate",)
    assert recipe == Recipe(method=TaskArithmetic(scaling=2.0))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_fields_of_another_method():
    """A default is no question; another value is a mistake."""
    groups = {"method": "average", "ties": {"trim_rate": 0.5, "weights": None}}
    assert Recipe.from_dict(groups) == Recipe()
    groups["ties"] |= {"trim_rate": 0.4}
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(groups)
    wanted = "ties.trim_rate=0.4: the method is average; of the methods, ties"
    assert str(error.value).startswith(wanted)
    assert str(error.value).endswith("have 'trim_rate'")


@pytest.mark.parametrize("made", [np.array, jnp.array, list, np.float32, jnp.float32])
def test_numbers_of_numpy_and_jax(made):
    """Scalars and arrays are the numbers in them."""
    if made in (np.float32, jnp.float32):
        recipe = Recipe(
            method="ties",
            scaling=made(0.5),
            mixup=Mixup(ratios=(made(0.25), made(0.75)), alpha=made(2.0)),
            dare=Dare(drop_rate=made(0.5)),
        )
        expected = Dare(drop_rate=0.5)
    else:
        recipe = Recipe(
            method="ties",
            scaling=0.5,
            mixup=Mixup(ratios=made([0.25, 0.75]), alpha=2.0),
            dare=Dare(drop_rate=made([0.5, 0.25])),
        )
        expected = Dare(drop_rate=(0.5, 0.25))
    assert recipe == Recipe(
        method=Ties(scaling=0.5),
        mixup=Mixup(ratios=(0.25, 0.75), alpha=2.0),
        transforms=(expected,),
    )
    assert json.loads(json.dumps(recipe.to_dict()))["mixup"]["ratios"] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "wobble"}, "method='wobble' needs one of "),
        ({"scaling": float("nan")}, "scaling=nan needs a finite number"),
        ({"scaling": "1"}, "scaling='1' needs a finite number"),
        ({"scaling": True}, "scaling=True needs a finite number"),
        ({"trim_rate": 1.5}, "trim_rate=1.5 needs a number from 0 to 1"),
        (
            {"method": "ties", "ties": {"trim_rate": None}},
            "trim_rate=None needs a number from 0 to 1",
        ),
        ({"method": "ties", "trim_rate": -0.1}, "trim_rate=-0.1 needs a number from"),
        ({"method": "ties", "scaling": "abc"}, "scaling='abc' needs a finite number"),
        (
            {"method": "ties", "ties": {"scaling": (1.0, 2.0)}},
            "scaling=(1.0, 2.0) needs a finite number",
        ),
        (
            {"method": "ties", "ties": {"weights": (1.0, "a")}},
            "ties.weights[1]='a' needs a finite number, 0 or more",
        ),
        (
            {"method": "ties", "trim_rate": {"rules": {"[": 1}, "otherwise": 2}},
            "trim_rate.rules[0]='[' needs a regular expression; "
            "trim_rate['otherwise']=2 needs a number from 0 to 1",
        ),
        (
            {"dare": {"drop_rate": {"gradient": [0.1, 2]}}},
            "dare.drop_rate.gradient[1]=2 needs a number from 0 to 1",
        ),
        (
            {"dare": {"drop_rate": {"slope": 1}}},
            "{'slope': 1} needs 'gradient', 'runs', or",
        ),
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
        ({"vocabulary": 1}, "vocabulary=1 needs one of error, mean, trunc"),
        (
            {"tokenizer": {"missing": "mean"}},
            "vocabulary='error' needs union, base or a model's name, for the tokenizer",
        ),
        (
            {"vocabulary": "union", "tokenizer": {"tokens": (("a", None, 3),)}},
            "tokenizer.tokens=(TokenRow(token='a', model=None, row=3, force=False),)",
        ),
        (
            {"vocabulary": "union", "tokenizer": {"pad_to_multiple_of": 0}},
            "tokenizer.pad_to_multiple_of=0 needs None, or a number from 1",
        ),
        (
            {"tokenizer": {"chat": "x"}},
            "unknown recipe field 'tokenizer.chat'; known: ",
        ),
        ({"dtype": "int8"}, "dtype='int8' needs one of input, float32, float16, b"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples' needs such as"),
        ({"max_shard_size": 0}, "max_shard_size=0 needs such as 5GB or 200MB"),
        ({"alpha": 1}, "unknown recipe field 'alpha'; it is a field of mixup.alpha, "),
        ({"drop": 1}, "unknown recipe field 'drop'; known: method, transforms, mixup"),
        ({"transforms": "dare"}, "transforms='dare' needs a tuple of names"),
        ({"transforms": ("drop",)}, "unknown recipe field 'transforms: drop'; known:"),
        ({"average": {"trim_rate": 1}}, "unknown recipe field 'average.trim_rate'; it"),
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
    with pytest.raises(RecipeError) as error:
        Recipe(
            method=Ties(scaling="a", trim_rate=2),
            dare=Dare(rescale=1),
            mixup=Mixup(alpha=-1, granularity="row"),
            exclude="a",
        )
    fields = {part.partition("=")[0] for part in str(error.value).split("; ")}
    assert fields == {
        "scaling",
        "trim_rate",
        "dare.rescale",
        "mixup.alpha",
        "mixup.granularity",
        "exclude",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": Dare()}, "method=Dare("),
        ({"transforms": (Ties(),)}, "transforms=(Ties("),
        ({"dare": 0.5}, "transforms=(0.5,) needs transforms, such as m3jax.Dare()"),
        ({"mixup": 0.5}, "mixup=0.5 needs an m3jax.Mixup"),
        (
            {"transforms": (Dare(drop_rate=0.1), Dare(drop_rate=0.2))},
            "transforms=['dare', 'dare'] needs each transform once",
        ),
    ],
)
def test_wrong_objects(fields, message):
    with pytest.raises(RecipeError) as error:
        Recipe(**fields)
    assert str(error.value).startswith(message)


def test_with_number():
    recipe = Recipe(method="ties", dare=Dare(drop_rate=0.1))
    assert recipe.with_number("ties", "trim_rate", 0.3).method == Ties(trim_rate=0.3)
    changed = recipe.with_number("dare", "drop_rate", 0.3)
    assert changed.transforms == (Dare(drop_rate=0.3),)
    added = Recipe().with_number("dare", "drop_rate", 0.3)
    assert added.transforms == (Dare(drop_rate=0.3),)
    assert added == Recipe(dare=Dare(drop_rate=0.3))


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
        (
            Recipe(dare=Dare(drop_rate=0.1)),
            2,
            False,
            "transforms='dare' needs a base (--base)",
        ),
        (
            Recipe(method=Ties(weights=(1.0, 2.0, 3.0)), mixup=Mixup(alpha=None)),
            2,
            True,
            "ties.weights=(1.0, 2.0, 3.0) needs one number per model, 2 here",
        ),
        (
            Recipe(method=Ties(weights=(1.0, 2.0))),
            2,
            True,
            "ties.weights=(1.0, 2.0) needs mixup.alpha=None and no mixup.ratios",
        ),
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
        (Recipe(method=Ties(weights=(0.0, 3.0)), mixup=Mixup(alpha=None)), 2, True),
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
