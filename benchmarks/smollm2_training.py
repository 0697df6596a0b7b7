"""Fine-tunes a checkpoint on prompts and completions, with AdamW.

The forward pass is m3jax's own, which is differentiable in the pytree of the
checkpoint; the loss is the cross-entropy of the completion's tokens, the one that ends
it included. A killed run goes on from the last state it has saved.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

import m3jax
from m3jax.models.likelihood import token_scores
from m3jax.models.parameters import load_model
from m3jax.models.tokenizer import Tokenizer

_MULTIPLE = 64  # tokens that lengths are rounded up to: few shapes, little padding
_WINDOW = 8  # batches whose sequences are sorted by length together


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
      steps: of the optimiser.
      batch: sequences a step.
      learning_rate: at its peak; a tenth of the steps lead to it, a cosine from it to
        zero.
      dtype: of the matrix products; weights and moments are in float32.
      seed: of the order of the examples.
      save_every: steps between saved states.
    """

    steps: int
    batch: int
    learning_rate: float
    dtype: str
    seed: int
    save_every: int


class Tokens(NamedTuple):
    """Tokens of an example, and how many of them, at the end, are to be learned."""

    tokens: list[int]
    learned: int


def tokenise(example: dict[str, str], tokenizer: Tokenizer) -> Tokens:
    """A chat of one prompt and its completion, up to the token that ends it."""
    asked = tokenizer.chat([{"role": "user", "content": example["prompt"]}])
    context = tokenizer.encode(asked, add_special_tokens=False)
    whole = tokenizer.encode(asked + example["completion"], add_special_tokens=False)
    whole.append(tokenizer.transformers.eos_token_id)
    return Tokens(whole, len(whole) - len(context))


def batches(
    sequences: Sequence[Tokens], size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches without end, every sequence once an epoch, those of like length together.

    Yields:
      tokens (B, T) int32, padded by 0; which are valid, and which are learned, bool.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(sequences))
        for start in range(0, len(order), size * _WINDOW):
            window = order[start : start + size * _WINDOW].tolist()
            window.sort(key=lambda i: len(sequences[i].tokens))
            groups = [window[i : i + size] for i in range(0, len(window), size)]
            for group in rng.permutation(len(groups)):
                if len(groups[group]) == size:  # one shape; the rest has its turn later
                    yield _padded([sequences[i] for i in groups[group]])


def _padded(
    rows: Sequence[Tokens],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    longest = max(len(row.tokens) for row in rows)
    shape = (len(rows), -(-longest // _MULTIPLE) * _MULTIPLE)
    tokens = np.zeros(shape, np.int32)
    valid, learned = np.zeros(shape, bool), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        length = len(row.tokens)
        tokens[i, :length] = row.tokens
        valid[i, :length] = True
        learned[i, length - row.learned : length] = True
    return tokens, valid, learned


def train(
    base: Path, examples: Sequence[dict[str, str]], output: Path, settings: Settings
) -> None:
    """Fine-tunes `base` and writes the checkpoint `output`; nothing if it is there."""
    if output.exists():
        return
    model, tokenizer = load_model(str(base)), Tokenizer(base)
    sequences = [tokenise(example, tokenizer) for example in examples]
    optimizer = _optimizer(settings)
    parameters = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.parameters)
    state = (parameters, optimizer.init(parameters))
    saved = output.with_name(f"{output.name}.state")
    first, state = _restore(saved, state)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, tokens: Any, valid: Any, learned: Any) -> tuple[Any, Any]:
        parameters, moments = state

        def loss(parameters: Any) -> Any:
            scores = token_scores(
                parameters,
                tokens,
                valid,
                config=model.config,
                dtype=jnp.dtype(settings.dtype),
            )
            mask = learned[:, 1:].astype(jnp.float32)
            return -jnp.sum(scores.log_likelihood * mask) / jnp.sum(mask)

        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, moments = optimizer.update(gradient, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), value

    source = batches(sequences, settings.batch, settings.seed)
    start, tokens_done = time.monotonic(), 0
    for i in range(settings.steps):
        batch = next(source)
        if i < first:  # the order of the batches goes on where it was
            continue
        state, value = step(state, *batch)
        tokens_done += int(batch[1].sum())
        if i % 5 == 0 or i == settings.steps - 1:
            speed = tokens_done / (time.monotonic() - start)
            logging.info(
                "%s: step %d of %d: loss %.4f, %.0f tokens/s",
                *(output.name, i + 1, settings.steps, value, speed),
            )
        if (i + 1) % settings.save_every == 0 and i + 1 < settings.steps:
            _save(saved, i + 1, state)
    m3jax.save(state[0], output, like=base)
    shutil.rmtree(saved, ignore_errors=True)


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, settings.steps // 10), settings.steps
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.0)
    )


def _save(folder: Path, step: int, state: Any) -> None:
    """The state after `step` steps, in the place of the one before."""
    leaves = {f"{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    m3jax.save(leaves, folder / f"{step}")
    for other in folder.iterdir():
        if other.name != f"{step}":
            shutil.rmtree(other)


def _restore(folder: Path, state: Any) -> tuple[int, Any]:
    """How many steps have been saved, and their state; `state` if there is none."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    if not steps:
        return 0, state
    leaves = m3jax.load(folder / f"{max(steps)}")
    structure = jax.tree.structure(state)
    ordered = [jnp.asarray(leaves[f"{i}"]) for i in range(structure.num_leaves)]
    logging.info("going on from step %d", max(steps))
    return max(steps), jax.tree.unflatten(structure, ordered)
