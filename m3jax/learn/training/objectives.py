"""What is descended: functions of a merged model's logits on a batch.

A batch is a dict of arrays. Logits are (B, R, V) at R scored positions of each row, or
(B, C) of classes; ``mask`` (B, R) says which positions are real, ``labels`` are the
tokens or classes that come there (−100: none), and ``teacher…`` is what `teach` made of
a teacher's logits at the same positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from m3jax.learn.distillation import of_expert
from m3jax.learn.entropy import mean_entropy
from m3jax.learn.soup import cross_entropy
from m3jax.learn.uld import distance, sorted_probabilities
from m3jax.recipe.problems import Problems

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """One term.

    Attributes:
      needs_labels, needs_teacher: what a batch has to hold.
    """

    needs_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    def teach(self, logits: jax.Array) -> dict[str, jax.Array]:
        """What is kept of a teacher's logits, by name."""
        del logits
        return {}

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        raise NotImplementedError


class Entropy(Objective):
    """−Σ p log p, the mean over positions, or examples: AdaMerging's."""

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        return mean_entropy(logits, batch)


class CrossEntropy(Objective):
    """−log p(label), the mean where there are labels."""

    needs_labels = True

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        return cross_entropy(logits, batch["labels"])


@dataclasses.dataclass(frozen=True)
class KL(Objective):
    """T² Σ p (log p − log q), the mean over positions; p the teacher's, both softmax of
    logits / T: DAM's.

    Attributes:
      temperature: T.
      top_k: both over the teacher's k likeliest tokens alone; None: all.
    """

    temperature: float = 2.0
    top_k: int | None = None
    needs_teacher = True

    def teach(self, logits: jax.Array) -> dict[str, jax.Array]:
        if self.top_k is None:
            return {"teacher": logits}
        values, tokens = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))
        return {"teacher": values, "teacher_tokens": tokens}

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        if "teacher_tokens" in batch:
            logits = jnp.take_along_axis(logits, batch["teacher_tokens"], axis=-1)
        mask = batch.get("mask", jnp.ones(logits.shape[:-1], bool))
        own = {"mask": mask}
        return of_expert(logits, batch["teacher"], own, self.temperature)["kl"]


@dataclasses.dataclass(frozen=True)
class ULD(Objective):
    """Σ |sort(q) − sort(p)|, the mean over positions: of any two vocabularies.

    Attributes:
      temperature: of both.
      top_k: the K largest logits are kept; None: all.
      standardize: z-score the logits over the vocabulary first.
    """

    temperature: float = 1.0
    top_k: int | None = 10
    standardize: bool = True
    needs_teacher = True

    def teach(self, logits: jax.Array) -> dict[str, jax.Array]:
        return {"teacher_sorted": self._sorted(logits)}

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        away = distance(self._sorted(logits), batch["teacher_sorted"])
        ones = jnp.ones(away.shape, bool)
        counted = batch.get("mask", ones) & batch.get("teacher_mask", ones)
        weight = counted.astype(away.dtype)
        return jnp.sum(away * weight) / jnp.maximum(jnp.sum(weight), 1)

    def _sorted(self, logits: jax.Array) -> jax.Array:
        return sorted_probabilities(
            logits, self.temperature, self.top_k, self.standardize
        )


@dataclasses.dataclass(frozen=True)
class Function(Objective):
    """A user's own function of (logits, batch)."""

    function: Callable[[Any, Any], jax.Array]

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        return self.function(logits, batch)


OBJECTIVES: dict[str, type[Objective]] = {
    "entropy": Entropy,
    "cross_entropy": CrossEntropy,
    "kl": KL,
    "uld": ULD,
}


class Weighted(Objective):
    """Σ w · term, of terms that look at the same logits and batch."""

    def __init__(self, terms: list[tuple[float, Objective]]):
        self.terms = terms

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        return any(own.needs_labels for _, own in self.terms)

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        return any(own.needs_teacher for _, own in self.terms)

    def teach(self, logits: jax.Array) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for _, own in self.terms:
            found |= own.teach(logits)
        return found

    def __call__(self, logits: jax.Array, batch: Batch) -> jax.Array:
        parts = [
            jnp.asarray(weight, jnp.float32) * own(logits, batch).astype(jnp.float32)
            for weight, own in self.terms
        ]
        return sum(parts[1:], parts[0])


def make(
    weights: Mapping[str, float] | Callable[[Any, Any], jax.Array],
    options: Mapping[str, Any],
) -> Weighted:
    """The objective of weights by name, or of a function.

    Args:
      weights: of terms of `OBJECTIVES`; or (logits, batch) -> scalar.
      options: ``temperature``, ``top_k`` and ``standardize`` of those that have them;
        None: their own default.

    Raises:
      RecipeError: an unknown term, or an option that no term has.
    """
    if callable(weights):
        return Weighted([(1.0, Function(weights))])
    problems = Problems()
    if not weights:
        problems.add("objective", dict(weights), "a weight of one term or more")
    for name, weight in weights.items():
        problems.choice("objective", name, tuple(OBJECTIVES))
        problems.number(f"objective.{name}", weight)
    problems.raise_if_any()
    given = {name: value for name, value in options.items() if value is not None}
    terms, used = [], set()
    for name, weight in weights.items():
        cls = OBJECTIVES[name]
        known = {field.name for field in dataclasses.fields(cls)} & set(given)
        used |= known
        terms.append((weight, cls(**{field: given[field] for field in known})))
    for field in set(given) - used:
        problems.add(field, given[field], f"None: {', '.join(weights)} has none")
    problems.raise_if_any()
    return Weighted(terms)
