"""All that is chosen of a run, as plain data; `configs/learn` has the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from m3jax.learn.coefficients.space import Space
from m3jax.learn.training.optimizer import Optimizer
from m3jax.recipe import Mixup, Recipe, RecipeError
from m3jax.recipe.problems import Problems, plain

INPUTS = ("prompt", "text", "completion", "continuation")
DTYPES = ("float32", "bfloat16")


def _plain_merge() -> Recipe:
    return Recipe(method="task_arithmetic", mixup=Mixup(alpha=None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to learn, how, and on what.

    Attributes:
      recipe: how coefficients become a model; its method has to be differentiable.
      space: of the coefficients.
      objective: weights of ``entropy``, ``cross_entropy``, ``kl`` and ``uld``.
      temperature, top_k, standardize: of ``kl`` and ``uld``; None: their own defaults.
      task_weights: weights of tasks in the loss; 1 where none is given.
      inputs: what of a task's examples the model reads, and where it is scored:
        ``prompt`` (at the token behind it), ``text`` (at all tokens of the prompt),
        ``completion`` (at the answer, which is read: labels), or ``continuation``
        (at what the task's expert writes greedily behind the prompt: no labels).
      experts: which model belongs to which task, as task -> its place in the models;
        None: by name, or the k-th task to the k-th model.
      scale_logits: learn a number, too, that multiplies the logits and is no part of
        the merged model: β of learned soups, 1 at the start.
      optimizer: of the raw numbers.
      steps: at most so many.
      batch: examples of each task in a step.
      shuffle: a new order of the batches in every pass over them.
      validate_every: steps between two looks at the validation tasks.
      patience: looks in a row without a better one after which it ends; None: never.
        The best one is kept in any case.
      save_every: steps between two checkpoints of the run.
      remat: compute what is not a matrix product again on the way back, which takes
        less memory.
      dtype: of the merged model while it learns.

    Raises:
      RecipeError: naming each wrong field, its value and what is allowed.
    """

    recipe: Recipe = dataclasses.field(default_factory=_plain_merge)
    space: Space = dataclasses.field(default_factory=Space)
    objective: Any = dataclasses.field(default_factory=lambda: {"entropy": 1.0})
    temperature: float | None = None
    top_k: int | None = None
    standardize: bool | None = None
    task_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    inputs: str = "prompt"
    experts: Mapping[str, int] | None = None
    scale_logits: bool = False
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    steps: int = 500
    batch: int = 16
    shuffle: bool = True
    validate_every: int = 50
    patience: int | None = None
    save_every: int = 50
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        problems = Problems()
        if not isinstance(self.objective, Mapping) and not callable(self.objective):
            allowed = "weights of terms by name, or a function of (logits, batch)"
            problems.add("objective", self.objective, allowed)
        problems.choice("inputs", self.inputs, INPUTS)
        problems.choice("dtype", self.dtype, DTYPES)
        if not isinstance(self.scale_logits, bool):
            problems.add("scale_logits", self.scale_logits, "True or False")
        for name in ("steps", "batch", "validate_every", "save_every", "patience"):
            value, least = getattr(self, name), 0 if name == "steps" else 1
            if value is None and name == "patience":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problems.add(name, value, f"an integer, {least} or more")
        for task, weight in self.task_weights.items():
            problems.number(f"task_weights.{task}", weight)
        problems.raise_if_any()

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of JSON values, every field present."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        objective = self.objective
        words = [
            str(getattr(objective, own, None)) for own in ("__module__", "__qualname__")
        ]
        return found | {
            "recipe": self.recipe.to_dict(),
            "space": dataclasses.asdict(self.space),
            "optimizer": dataclasses.asdict(self.optimizer),
            "objective": ".".join(words) if callable(objective) else dict(objective),
            "task_weights": dict(self.task_weights),
            "experts": None if self.experts is None else dict(self.experts),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Config:
        """A config from nested mappings, lists standing for tuples.

        Raises:
          RecipeError: for an unknown field, by its dotted name, or a bad value.
        """
        groups = {"space": Space, "optimizer": Optimizer}
        _check_known("", fields, cls)
        made: dict[str, Any] = {}
        for name, value in fields.items():
            if name == "recipe" and isinstance(value, Mapping):
                value = Recipe.from_dict(value)
            elif name in groups and isinstance(value, Mapping):
                _check_known(f"{name}.", value, groups[name])
                value = groups[name](**{k: _plain(v) for k, v in value.items()})
            elif name != "recipe":
                value = _plain(value)
            made[name] = value
        return cls(**made)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    return plain(value)


def _check_known(prefix: str, fields: Mapping[str, Any], cls: type) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise RecipeError(
                f"unknown field {prefix + str(name)!r}; known: "
                f"{', '.join(prefix + own for own in known)}"
            )
