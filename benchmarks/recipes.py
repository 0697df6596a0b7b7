"""The merges that are measured, each as m3jax's flags and as mergekit's recipe.

mergekit has no M3. Its weights are numbers in a recipe, drawn or not, so a recipe
with M3 has the same counterpart as the one without.

Those called mergekit's are the same YAML on both sides: equal work.
"""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path

MODELS = ("base", "maths", "code")

_NO_MIXUP = {"mixup.alpha": "None"}
_MIXUP = {"mixup.alpha": "0.5"}
_DARE = {"dare.drop_rate": "0.2"}
_TIES = {"method": "ties", "trim_rate": "0.5"}


@dataclasses.dataclass(frozen=True)
class BenchmarkRecipe:
    """One merge.

    Attributes:
      fields: of m3jax's recipe, those that are not the default's.
      mergekit: the name of a file in mergekit/.
      reads_base: whether the merge reads the base's tensors; the floor does the same.
      same_yaml: m3jax reads mergekit's recipe.
    """

    fields: dict[str, str]
    mergekit: str
    reads_base: bool = True
    same_yaml: bool = False

    @property
    def flags(self) -> list[str]:
        return [f"--config.{name}={value}" for name, value in self.fields.items()]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The models whose tensors are read."""
        return MODELS if self.reads_base else MODELS[1:]


_AVERAGE = {"method": "average"}
_TASK_ARITHMETIC = {"method": "task_arithmetic"}
RECIPES = {
    "average": BenchmarkRecipe(_AVERAGE | _NO_MIXUP, "linear", False),
    "average + M3": BenchmarkRecipe(_AVERAGE | _MIXUP, "linear", False),
    "task arithmetic": BenchmarkRecipe(_TASK_ARITHMETIC | _NO_MIXUP, "task_arithmetic"),
    "task arithmetic + M3": BenchmarkRecipe(
        _TASK_ARITHMETIC | _MIXUP, "task_arithmetic"
    ),
    "DARE + average": BenchmarkRecipe(_DARE | _AVERAGE | _NO_MIXUP, "dare_linear"),
    "DARE + average + M3": BenchmarkRecipe(_DARE | _AVERAGE | _MIXUP, "dare_linear"),
    "DARE + task arithmetic": BenchmarkRecipe(
        _DARE | _TASK_ARITHMETIC | _NO_MIXUP, "dare_linear"
    ),
    "DARE + task arithmetic + M3": BenchmarkRecipe(
        _DARE | _TASK_ARITHMETIC | _MIXUP, "dare_linear"
    ),
    "TIES": BenchmarkRecipe(_TIES | _NO_MIXUP, "ties"),
    "TIES + M3": BenchmarkRecipe(_TIES | _MIXUP, "ties"),
    "DARE + TIES": BenchmarkRecipe(_DARE | _TIES | _NO_MIXUP, "dare_ties"),
    "DARE + TIES + M3": BenchmarkRecipe(_DARE | _TIES | _MIXUP, "dare_ties"),
    **{
        f"mergekit's {name}": BenchmarkRecipe({}, name, reads_base, same_yaml=True)
        for name, reads_base in (
            ("linear", False),
            ("task_arithmetic", True),
            ("dare_linear", True),
            ("ties", True),
            ("dare_ties", True),
            ("slerp", False),
            ("model_stock", True),
            ("karcher", False),
        )
    },
}
# What `make bench` measures: the paper's methods, and mergekit's own.
TABLE = [
    *("average + M3", "task arithmetic + M3", "DARE + average + M3"),
    *("TIES + M3", "DARE + TIES + M3"),
    *(name for name, recipe in RECIPES.items() if recipe.same_yaml),
]


def slug(name: str) -> str:
    """A recipe's name for flags: `dare_ties_m3`, `mergekits_ties`."""
    return name.lower().replace(" + ", "_").replace(" ", "_").replace("'", "")


def select(slugs: list[str]) -> dict[str, BenchmarkRecipe]:
    """Recipes by their names for flags; for ["all"] all, for ["table"] `TABLE`.

    Raises:
      ValueError: naming those that there are.
    """
    by_slug = {slug(name): name for name in RECIPES}
    by_slug |= {"all": "", "table": ""}
    unknown = [each for each in slugs if each not in by_slug]
    if unknown or not slugs:
        raise ValueError(f"no recipe {unknown}; there are {', '.join(by_slug)}")
    if "all" in slugs:
        return RECIPES
    if "table" in slugs:
        return {name: RECIPES[name] for name in TABLE}
    return {by_slug[each]: RECIPES[by_slug[each]] for each in slugs}


def mergekit_yaml(name: str, data: Path) -> str:
    """mergekit's recipe of this name for the models under `data`."""
    text = (Path(__file__).parent / "mergekit" / f"{name}.yaml").read_text()
    places = {model: str((data / model).resolve()) for model in MODELS}
    return string.Template(text).substitute(places)
