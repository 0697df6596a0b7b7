"""M3's part of a recipe: how the ratio of each model is found."""

from __future__ import annotations

import dataclasses
from typing import Any

from m3jax.recipe.problems import Problems, plain

GRANULARITIES = ("model", "layer", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixup:
    """M3: how the ratio of each model is found.

    Attributes:
      alpha: λ ~ Beta(α, α); for K > 2 models Dirichlet(α, …, α). ``None``: M3
        off; 0: λ = 1, so that the first model gets the whole weight.
      ratios: fixed ratios, one per model, instead of a draw; also an array, through
        which `jax.grad` and `jax.vmap` may go.
      granularity: one draw per ``model``, per ``layer`` or per ``tensor``.
    """

    alpha: float | None = 0.5
    ratios: Any = None
    granularity: str = "model"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", plain(self.ratios))
        object.__setattr__(self, "alpha", plain(self.alpha))

    @property
    def on(self) -> bool:
        """Whether the models have ratios."""
        return self.alpha is not None or self.ratios is not None

    def check(self, problems: Problems) -> None:
        """Notes what is out of range."""
        problems.choice("mixup.granularity", self.granularity, GRANULARITIES)
        if self.alpha is not None:
            problems.number("mixup.alpha", self.alpha, 0.0)
        if self.ratios is not None:
            problems.numbers("mixup.ratios", self.ratios)
