"""Gates of a mixture: one vector for each layer and expert, (layers, experts, width).

    hidden        the hidden state that enters the layer, at a prompt's last token
    hidden_avg    its mean over the prompt's tokens
    cheap_embed   the mean of the tokens' embeddings, the same for every layer
    random        normal;  uniform_random: uniform in ±1/√width

Prompts begin with the tokenizer's first token. The vectors of an expert's positive
prompts are averaged, those of its negative ones too; the gate is their difference,
scaled to length 1. With cheap_embed both means are scaled to length 1 first. That is
what mergekit 0.1.5 makes of one prompt each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m3jax import prng
from m3jax.checkpoints.errors import CheckpointError
from m3jax.models.decoder import compute_dtype, embedding
from m3jax.models.layers import positions_of
from m3jax.models.llama import layer_inputs
from m3jax.models.parameters import Model, load_model
from m3jax.models.tokenizer import Tokenizer
from m3jax.moe.document import Expert

_GATES = 4  # folded into the root key; see `prng`

Vectors = Callable[[str], np.ndarray]  # a prompt's, (layers, width)


def gates(
    kind: str, base: str, experts: Sequence[Expert], layers: int, width: int, seed: int
) -> np.ndarray:
    """The gates of all experts in all layers, float32.

    Args:
      kind: a name of `document.GATES`.
      base: the model that reads the prompts.
      experts: with their prompts; one without positive prompts has gates of 0.
      layers, width: of the model.
      seed: of random gates.
    """
    if kind in ("random", "uniform_random"):
        drawn = [_random(kind, i, layers, width, seed) for i in range(len(experts))]
        return np.stack(drawn, 1)
    model = load_model(base)
    if model.config.family == "gpt2":
        raise CheckpointError(f"{base}: gates of prompts need a model of Llama's kind")
    vectors = _vectors(kind, model, layers)
    unit_first = kind == "cheap_embed"
    return np.stack([_gate(e, vectors, unit_first, layers, width) for e in experts], 1)


def _gate(
    expert: Expert, vectors: Vectors, unit_first: bool, layers: int, width: int
) -> np.ndarray:
    """(layers, width): positive less negative prompts, of length 1."""
    if not expert.positive:
        return np.zeros((layers, width), np.float32)
    mean = np.mean([vectors(prompt) for prompt in expert.positive], axis=0)
    mean = _unit(mean) if unit_first else mean
    if expert.negative:
        away = np.mean([vectors(prompt) for prompt in expert.negative], axis=0)
        mean = mean - (_unit(away) if unit_first else away)
    return _unit(mean).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; 0 stays."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths, lengths, 1.0)


def _vectors(kind: str, model: Model, layers: int) -> Vectors:
    """What a prompt's vectors are."""
    tokenizer = Tokenizer(model.folder)

    def tokens_of(prompt: str) -> list[int]:
        found = tokenizer.encode(prompt, add_special_tokens=False)
        first = tokenizer.transformers.bos_token_id
        found = found if first is None else [first, *found]
        if not found:
            raise CheckpointError(f"{model.folder}: prompt {prompt!r} has no tokens")
        return found

    if kind == "cheap_embed":
        table = embedding(model.parameters, model.config)

        def embedded(prompt: str) -> np.ndarray:
            rows = np.asarray(table[jnp.asarray(tokens_of(prompt))], np.float64)
            return np.broadcast_to(rows.mean(axis=0), (layers, rows.shape[1]))

        return embedded
    dtype = compute_dtype(model.parameters, model.config)

    def hidden(prompt: str) -> np.ndarray:
        tokens = tokens_of(prompt)
        padded = 1 << (len(tokens) - 1).bit_length()  # so that few shapes are compiled
        valid = jnp.arange(padded)[None] < len(tokens)
        inputs = layer_inputs(
            model.parameters,
            jnp.asarray([tokens + [0] * (padded - len(tokens))], jnp.int32),
            positions_of(valid),
            config=model.config,
            dtype=dtype,
        )
        states = np.asarray(inputs[:, 0, : len(tokens)], np.float64)  # (L, T, H)
        return states.mean(axis=1) if kind == "hidden_avg" else states[:, -1]

    return hidden


def _random(kind: str, expert: int, layers: int, width: int, seed: int) -> np.ndarray:
    root = prng.fold_in(prng.root_key(seed), _GATES)
    key = jax.random.wrap_key_data(jnp.asarray(prng.fold_in(root, expert)))
    if kind == "random":
        return np.asarray(jax.random.normal(key, (layers, width), jnp.float32))
    edge = 1 / math.sqrt(width)
    return np.asarray(
        jax.random.uniform(key, (layers, width), jnp.float32, -edge, edge)
    )
