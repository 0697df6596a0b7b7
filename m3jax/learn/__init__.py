"""What is learned from data: coefficients of merges, and statistics of models.

`m3jax.learn(...)` is a run, from checkpoints and tasks to a recipe: see
`m3jax.learn.training.learner.learn`. Beside it stand pure functions on pytrees:

result = m3jax.learn.adamerging(base, [maths, code], apply_fn, batches)
m3jax.save(result.params, "merged")
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

# Files are named by what they do, so that no module hides a function of its name.
_HOMES = {
    "Config": "training.config",
    "Learned": "descent",
    "Learning": "report.result",
    "Optimizer": "training.optimizer",
    "Space": "coefficients.space",
    "adamerging": "entropy",
    "dam_loss": "distillation",
    "dam_merge": "distillation",
    "fisher": "information",
    "grams": "gram",
    "learned_soup": "soup",
    "mofo_adamw": "mofo",
    "np_merge": "elementwise",
    "uld_loss": "uld",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    # ruff: noqa: F401
    from m3jax.learn.coefficients.space import Space
    from m3jax.learn.descent import Learned
    from m3jax.learn.distillation import dam_loss, dam_merge
    from m3jax.learn.elementwise import np_merge
    from m3jax.learn.entropy import adamerging
    from m3jax.learn.gram import grams
    from m3jax.learn.information import fisher
    from m3jax.learn.mofo import mofo_adamw
    from m3jax.learn.report.result import Learning
    from m3jax.learn.soup import learned_soup
    from m3jax.learn.training.config import Config
    from m3jax.learn.training.optimizer import Optimizer
    from m3jax.learn.uld import uld_loss


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


class _Callable(types.ModuleType):
    """A module that is also the function it is named after."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from m3jax.learn.training.learner import learn

        return learn(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
