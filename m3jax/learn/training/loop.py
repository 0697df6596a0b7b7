"""The loop: merge, one backward pass of the merged model, pull back, move."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from m3jax.checkpoints.errors import CheckpointError
from m3jax.learn.coefficients.space import penalty
from m3jax.learn.distillation import column_weights, is_linear
from m3jax.learn.gradient.pullback import Merge
from m3jax.learn.training import state as states
from m3jax.learn.training.config import Config
from m3jax.learn.training.data import TaskBatches, at_step
from m3jax.learn.training.objectives import Objective
from m3jax.learn.training.state import State

Apply = Callable[[Any, Any], jax.Array]
# step done, steps, loss, learning rate, seconds left if that can be told
Progress = Callable[[int, int, float, float, float | None], None]


SCALE = "scale of the logits"  # among the raw numbers; no tensor has spaces


def nothing(*_: Any) -> None:
    """Says nothing."""


@dataclasses.dataclass
class Descent:
    """A run, apart from where it stands.

    Attributes:
      merge: m, from coefficients to merged tensors.
      objective, apply: loss = objective(apply(params, batch), batch).
      config: the rest.
      seed: of the order of batches.
      tasks, validation: batches.
      place: puts a batch onto devices.
    """

    merge: Merge
    objective: Objective
    apply: Apply
    config: Config
    seed: int
    tasks: Sequence[TaskBatches]
    validation: Sequence[TaskBatches] = ()
    place: Callable[[Any], Any] = lambda batch: batch

    def __post_init__(self) -> None:
        self.space, self.shapes = self.config.space, self.merge.tensors.shapes
        self.equal = self.merge.equal_weights
        self._tx = self.config.optimizer.make(self.config.steps)
        self._rates = self.config.optimizer.rates(self.config.steps)
        loss = self.loss
        if self.config.remat:
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            loss = jax.checkpoint(loss, policy=keep)

        def accumulated(
            merged: Any, fixed: Any, batch: Any, weight: jax.Array, before: Any
        ) -> Any:
            value, gradient = jax.value_and_grad(loss)(merged, fixed, batch)
            return weight * value, jax.tree.map(
                lambda a, g: a + weight.astype(g.dtype) * g, before, gradient
            )

        self.accumulated = jax.jit(accumulated, donate_argnums=4)
        self._loss = jax.jit(self.loss)
        self._coefficients = jax.jit(self.coefficients)
        self._move = jax.jit(self._moved)

    @functools.cached_property
    def _columns(self) -> dict[str, jax.Array]:
        """The weights of ``weighted_overlap``, by tensor."""
        if "weighted_overlap" not in self.space.regularisers:
            return {}
        weights = jax.jit(column_weights)
        return {
            name: weights(self.merge.task_vectors(name))
            for name in self.space.learned(self.shapes)
            if is_linear(name, self.shapes[name])
        }

    def loss(self, merged: Any, fixed: Any, batch: Any) -> jax.Array:
        """The objective of a merged model at a batch; float32."""
        params = self.merge.tensors.params(_without_scale(merged), fixed)
        logits = self.apply(params, batch)
        if SCALE in merged:
            scale = merged[SCALE]
            logits = jax.tree.map(lambda own: own * scale.astype(own.dtype), logits)
        return self.objective(logits, batch).astype(jnp.float32)

    def coefficients(self, raw: Any) -> dict[str, jax.Array]:
        """(K, ...) by tensor."""
        return self.space.coefficients(_without_scale(raw), self.shapes, self.equal)

    def merged(self, raw: Any, coefficients: Any) -> dict[str, jax.Array]:
        """What the loss is a function of: tensors, and the scale if it is learned."""
        scale = {SCALE: raw[SCALE]} if SCALE in raw else {}
        return {**self.merge(coefficients), **scale}

    def start(self) -> State:
        """The state of step 0."""
        raw = self.space.start(self.shapes, self.equal)
        raw = {group: self._placed(group, own) for group, own in raw.items()}
        if self.config.scale_logits:
            raw[SCALE] = jnp.ones((), jnp.float32)
        return State(0, raw, self.optimizer_start(raw), raw)

    def optimizer_start(self, raw: Any) -> Any:
        """The optimiser's state of step 0."""
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
            return self._tx.init(raw)

    def rounded(self, raw: Any) -> Any:
        """The merged model in the dtypes of the output."""
        tensors = self.merge.tensors
        merged = self.merge(self._coefficients(raw))
        own = {name: merged[name].astype(tensors.dtypes[name]) for name in merged}
        return tensors.params(own, tensors.fixed)

    def gradient(self, raw: Any, step: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a step without regularisers, and ∂L/∂c by tensor; also ∂L/∂β."""
        coefficients, tensors = self._coefficients(raw), self.merge.tensors
        merged = self.merged(raw, coefficients)
        gradient = jax.tree.map(jnp.zeros_like, merged)
        total = jnp.zeros((), jnp.float32)
        batches = at_step(self.tasks, step, self.seed, shuffle=self.config.shuffle)
        for weight, batch in batches:
            value, gradient = self.accumulated(
                merged, tensors.fixed, self.place(batch), jnp.float32(weight), gradient
            )
            total = total + value
        del merged
        scale = {SCALE: gradient.pop(SCALE)} if SCALE in gradient else {}
        return total, {**self.merge.pull_back(coefficients, gradient), **scale}

    def step(self, state: State) -> State:
        """One step.

        Raises:
          CheckpointError: the loss is not finite.
        """
        loss, gradient = self.gradient(state.raw, state.step)
        raw, optimizer, penalised = self._move(
            state.raw, state.optimizer, gradient, loss, self._columns
        )
        value = float(penalised)
        if not math.isfinite(value):
            raise CheckpointError(
                f"the loss of step {state.step} is {value}: the models, or what they "
                "are merged into, overflow, or the learning rate is too high"
            )
        return state._replace(
            step=state.step + 1,
            raw=raw,
            optimizer=optimizer,
            losses=(*state.losses, value),
        )

    def look(self, state: State) -> State:
        """The state with its loss on validation; `best` is it if none was better."""
        if not self.validation:
            return state._replace(best=state.raw)
        merged = self.merged(state.raw, self._coefficients(state.raw))
        total = 0.0
        for task in self.validation:
            parts = [
                float(self._loss(merged, self.merge.tensors.fixed, self.place(batch)))
                for batch in task.batches
            ]
            total += task.weight * sum(parts) / len(parts)
        before = state.best_look
        better = before is None or total < before[1]
        return state._replace(
            looks=(*state.looks, (state.step, total)),
            best=state.raw if better else state.best,
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return float(self._rates(step) if callable(self._rates) else self._rates)

    def _moved(
        self, raw: Any, optimizer: Any, gradient: Any, loss: jax.Array, columns: Any
    ) -> Any:
        """∂L/∂c pulled back to the raw numbers, with the regularisers' own; a step."""
        import optax

        groups = _without_scale(raw)
        _, back = jax.vjp(self.coefficients, groups)
        value, own = jax.value_and_grad(lambda own: penalty(self.space, own, columns))(
            groups
        )
        total = jax.tree.map(jnp.add, back(_without_scale(gradient))[0], own)
        total |= {SCALE: gradient[SCALE]} if SCALE in gradient else {}
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self._tx.update(total, optimizer, raw)
            moved = optax.apply_updates(raw, updates)
        return moved, optimizer, loss + value

    def _placed(self, group: str, raw: jax.Array) -> jax.Array:
        """Coefficients by element lie as their tensor does."""
        if self.space.granularity != "element":
            return raw
        where = self.merge.tensors.sharding(group)
        if where is None:
            return raw
        from jax.sharding import NamedSharding, PartitionSpec

        spec = PartitionSpec(None, *where.spec)
        return jax.device_put(raw, NamedSharding(where.mesh, spec))


def run(
    descent: Descent,
    *,
    path: Path | None = None,
    header: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress = nothing,
) -> State:
    """Descends from step 0, or from where a run stands, to its end.

    Args:
      descent: the run.
      path: of its state; None keeps none.
      header: JSON values that the state has to belong to.
      resume: go on from the state, if there is one.
      progress: is told of every step.
    """
    config, facts = descent.config, dict(header or {})
    state = descent.start()
    if resume and path is not None and path.exists():
        state = states.load(state, facts, path)
    elif path is not None:
        states.save(state, facts, path)
    began, first = time.perf_counter(), state.step
    left: float | None
    while True:
        looked = state.looks and state.looks[-1][0] == state.step
        ended = state.step >= config.steps or _patience_is_out(state, config)
        if (state.step % config.validate_every == 0 or ended) and not looked:
            state = descent.look(state)
            ended = ended or _patience_is_out(state, config)
        if path is not None and (ended or state.step % config.save_every == 0):
            states.save(state, facts, path)
        if ended:
            return state
        state = descent.step(state)
        done, now = state.step - first, time.perf_counter()
        if done == 1:  # it has compiled, so it tells nothing of the others
            began, left = now, None
        else:
            left = (now - began) / (done - 1) * (config.steps - state.step)
        rate = descent.rate(state.step - 1)
        progress(state.step, config.steps, state.losses[-1], rate, left)


def _without_scale(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: own for name, own in named.items() if name != SCALE}


def _patience_is_out(state: State, config: Config) -> bool:
    if config.patience is None or state.best_look is None:
        return False
    best = state.best_look[0]
    return sum(step > best for step, _ in state.looks) >= config.patience
