"""The recipe of a merge: what is done to the tensors, apart from which files."""

from m3jax.recipe.mixup import Mixup
from m3jax.recipe.problems import RecipeError
from m3jax.recipe.recipe import Recipe
from m3jax.recipe.sizes import parse_size
from m3jax.recipe.slices import Piece, Slice
from m3jax.recipe.tokenizer import TokenizerConfig, TokenRow
from m3jax.recipe.values import Gradient, Rules, Runs

__all__ = [
    "Gradient",
    "Mixup",
    "Piece",
    "Recipe",
    "RecipeError",
    "Rules",
    "Runs",
    "Slice",
    "TokenRow",
    "TokenizerConfig",
    "parse_size",
]
