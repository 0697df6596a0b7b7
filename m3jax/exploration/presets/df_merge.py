"""DF-Merge, arXiv 2504.18992: Bayesian optimisation of λ, the Fisher information at it.

θ(λ) = θ0 + K Σ_k F_k λ_k τ_k / Σ_k F_k is method `df_merge`; F_k is the Fisher
information at θ0 + λ_k τ_k on 30 validation examples of task k, measured anew in every
trial. λ is in [0, 1]^K: ten trials at random, then by a Gaussian process, 50 in the
paper.

Ours: optuna's process, which takes the logarithm of the expected improvement where the
release takes EI with ξ = 0.01; classes are the choices of a choice task (exact, as in
the paper), and otherwise the tokens of the answer, drawn from the model's own
distribution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from m3jax.engine.in_memory import merge_params
from m3jax.evaluation.evaluator import TaskEvaluator
from m3jax.exploration.fields import Searched
from m3jax.exploration.merger import Merger
from m3jax.exploration.presets.setting import Plan, Setting
from m3jax.exploration.search import samplers
from m3jax.exploration.search.searches import brackets
from m3jax.exploration.search.trials import Proposal
from m3jax.exploration.space import Space, Values
from m3jax.methods.df_merge import DfMerge
from m3jax.models.layers import Parameters
from m3jax.recipe import Mixup, Recipe, RecipeError

EXAMPLES = 30
_COEFFICIENTS = "coefficients"
Fisher = Callable[[Parameters, int], Any]  # of a model's own task


def plan(setting: Setting) -> Plan:
    """`draws` trials."""
    setting.check_averages()
    if not setting.has_base:
        raise RecipeError(f"preset={setting.name!r} needs a base")
    searched = Searched(_COEFFICIENTS, width=setting.num_models)
    found = samplers.optimised(
        setting.sampler or "gp",
        _Draws(
            setting.recipe,
            setting.seed,
            setting.budget,
            Space(setting.num_models, {_COEFFICIENTS: searched}),
        ),
        setting.objective,
        brackets(setting.draws, setting.budget, generation=setting.generation),
    )
    make = functools.partial(FisherMerger, _fisher(setting))
    return Plan(found, setting.draws, setting.objective, merger=make)


class _Draws(samplers.Draws):
    """Draws of the method's coefficients."""

    def with_values(self, index: int, values: Values) -> Proposal:
        method = DfMerge(coefficients=values[_COEFFICIENTS])
        recipe = dataclasses.replace(
            self.recipe, method=method, mixup=Mixup(alpha=None)
        )
        return self.proposal(index, recipe, new_seed=False)


class FisherMerger(Merger):
    """Measures the Fisher information for each draw, and merges with it."""

    def __init__(
        self, fisher: Fisher, base: Any, models: Sequence[Any], recipe: Recipe
    ):
        """Takes what measures it of a model; for the others see `Merger`."""
        super().__init__(base, models, recipe)
        self._fisher, self._base, self._models = fisher, base, tuple(models)
        self._latest: tuple[Recipe | None, list[Any]] = (None, [])

    def __call__(self, recipe: Recipe, seed: int) -> Parameters:
        if not recipe.method.beside:  # a baseline
            return super().__call__(recipe, seed)
        statistics = self.statistics(recipe)
        found: Parameters = merge_params(
            self._base,
            self._models,
            recipe,
            seed,
            statistics=statistics,
            allow_nonfinite=True,
        )
        return found

    def statistics(self, recipe: Recipe) -> list[Any]:
        """F_k at θ0 + λ_k τ_k, of each model."""
        latest, found = self._latest
        if latest != recipe:
            found = [
                self._fisher(self._moved(recipe, k, own), k)
                for k, own in enumerate(recipe.method.coefficients)
            ]
            self._latest = recipe, found
        return found

    def _moved(self, recipe: Recipe, k: int, coefficient: float) -> Parameters:
        own = dataclasses.replace(recipe, method="task_arithmetic")
        own = own.with_number("task_arithmetic", "scaling", coefficient)
        found: Parameters = merge_params(
            self._base, [self._models[k]], own, 0, allow_nonfinite=True
        )
        return found


def _fisher(setting: Setting) -> Fisher:
    """The evaluator's own, or that of its tasks, of which each model has one."""
    evaluator, key = setting.evaluator, jax.random.key(setting.seed)
    if hasattr(evaluator, "fisher"):
        return lambda parameters, k: evaluator.fisher(parameters, k, key)
    if not isinstance(evaluator, TaskEvaluator):
        raise RecipeError(
            f"preset={setting.name!r} measures the Fisher information, and the "
            "evaluator does not; choose tasks, or give it a method `fisher`"
        )
    tasks = evaluator.tasks
    if len(tasks) != setting.num_models:
        raise RecipeError(
            f"preset={setting.name!r} needs a validation task for each model, in the "
            f"models' order; there are {setting.num_models} models and the tasks "
            f"{', '.join(setting.tasks)}"
        )
    from m3jax.measuring.statistics import fisher_of
    from m3jax.measuring.texts import questions

    config, tokenizer = evaluator.config, evaluator.tokenizer
    length = config.max_position_embeddings
    asked = [questions([task], tokenizer, length, EXAMPLES) for task in tasks]

    def found(parameters: Parameters, k: int) -> Any:
        return fisher_of(
            parameters,
            config,
            asked[k],
            kind="exact" if tasks[k].kind == "choice" else "sampled",
            key=key,
            tokens_per_batch=evaluator.tokens_per_batch,
        )

    return found
