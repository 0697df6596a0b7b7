"""m3jax merges fine-tuned language models in JAX.

recipe = m3jax.Recipe(method="ties", mixup=m3jax.Mixup(alpha=0.4))
m3jax.merge("base", ["maths", "code"], "merged", recipe, seed=0)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Names are imported when they are used: `m3jax --help` must not wait for JAX.
_HOMES = {
    "CheckpointError": "m3jax.checkpoints.errors",
    "Decoder": "m3jax.models.module",
    "Evaluator": "m3jax.evaluation.evaluator",
    "Execution": "m3jax.engine.execution",
    "Exploration": "m3jax.exploration.search.result",
    "MergeResult": "m3jax.engine.merge",
    "Mixup": "m3jax.recipe",
    "Recipe": "m3jax.recipe",
    "RecipeError": "m3jax.recipe",
    "TaskEvaluator": "m3jax.evaluation.evaluator",
    "TokenRow": "m3jax.recipe",
    "TokenizerConfig": "m3jax.recipe",
    "explore": "m3jax.exploration.explore",
    "load": "m3jax.engine.load",
    "merge": "m3jax.engine.merge",
    "merge_params": "m3jax.engine.in_memory",
    "modulate": "m3jax.modulation",
    "save": "m3jax.engine.save",
    "verify": "m3jax.engine.verify",
}
_MODULES = (
    "align",
    "keymap",
    "learn",
    "modulation",
    "multitask",
    "programs",
    "search",
)
__all__ = sorted((*_HOMES, *_MODULES))

if TYPE_CHECKING:
    # ruff: noqa: F401
    from m3jax import align, keymap, learn, modulation, multitask, programs, search
    from m3jax.checkpoints.errors import CheckpointError
    from m3jax.engine.execution import Execution
    from m3jax.engine.in_memory import merge_params
    from m3jax.engine.load import load
    from m3jax.engine.merge import MergeResult, merge
    from m3jax.engine.save import save
    from m3jax.engine.verify import verify
    from m3jax.evaluation.evaluator import Evaluator, TaskEvaluator
    from m3jax.exploration.explore import explore
    from m3jax.exploration.search.result import Exploration
    from m3jax.methods.dare import Dare
    from m3jax.methods.linear import Average, TaskArithmetic
    from m3jax.methods.ties import Ties
    from m3jax.models.module import Decoder
    from m3jax.modulation import modulate
    from m3jax.recipe import Mixup, Recipe, RecipeError, TokenizerConfig, TokenRow


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"m3jax.{name}")
    # A submodule is looked for by `import` itself; a step is found by its class's name.
    if name[:1].isupper():
        from m3jax.methods import METHODS, TRANSFORMS

        for step in (*METHODS.values(), *TRANSFORMS.values()):
            if step.__name__ == name:
                return step
    raise AttributeError(f"module 'm3jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
