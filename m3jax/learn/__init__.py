"""What is learned from data: statistics of models, and coefficients of merges.

Pure functions on pytrees of JAX arrays; the learners need Optax
(``pip install '.[learn]'`` in a checkout).

result = m3jax.learn.adamerging(base, [maths, code], apply_fn, batches)
m3jax.save(result.params, "merged")
"""

import importlib
from typing import TYPE_CHECKING, Any

# Files are named by what they do, so that no module hides a function of its name.
_HOMES = {
    "Learned": "descent",
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
    from m3jax.learn.descent import Learned
    from m3jax.learn.distillation import dam_loss, dam_merge
    from m3jax.learn.elementwise import np_merge
    from m3jax.learn.entropy import adamerging
    from m3jax.learn.gram import grams
    from m3jax.learn.information import fisher
    from m3jax.learn.mofo import mofo_adamw
    from m3jax.learn.soup import learned_soup
    from m3jax.learn.uld import uld_loss


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
