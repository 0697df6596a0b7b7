"""RMM's agent, arXiv 2503.21272: a policy and a value, each a small network, and PPO.

Networks of two hidden layers of 64 and tanh; Adam, 3e-4 for the policy and 1e-3 for the
value; 40 epochs of `m3jax.search.ppo_loss` over a buffer. Agrees with `PPO` of
WuDiHJQ/Reinforced-Model-Merging, commit 7b940fe, but for the random numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m3jax.search.policy import ppo_loss, ppo_returns

_HIDDEN, _EPOCHS = 64, 40
_SHORTEST = 64  # slots of a buffer; below it nothing is gained
_ADAM = {"policy": optax.adam(3e-4), "value": optax.adam(1e-3)}


class Agent(NamedTuple):
    """What has been learned.

    Attributes:
      networks: ``policy`` and ``value``, layers of weight (out, in) and bias (out,).
      moments: of Adam, for each.
    """

    networks: Any
    moments: Any


class Step(NamedTuple):
    """An action that was taken.

    Attributes:
      observation: (O,) that the policy saw.
      action: what it chose.
      log_prob: of the action.
      value: that was expected of the state.
      reward: of the action.
      terminal: the episode ended with it.
    """

    observation: np.ndarray
    action: int
    log_prob: float = 0.0
    value: float = 0.0
    reward: float = 0.0
    terminal: bool = False


@functools.partial(jax.jit, static_argnums=(1, 2))
def new_agent(key: jax.Array, observations: int, actions: int) -> Agent:
    """An agent that has learned nothing: weights and biases uniform in ±1/√fan-in."""
    policy, value = jax.random.split(key)
    networks = {
        "policy": _network(policy, (observations, _HIDDEN, _HIDDEN, actions)),
        "value": _network(value, (observations, _HIDDEN, _HIDDEN, 1)),
    }
    return Agent(networks, {n: own.init(networks[n]) for n, own in _ADAM.items()})


def act(agent: Agent, observation: np.ndarray, key: jax.Array, step: int) -> Step:
    """An action, drawn from the policy with ``fold_in(key, step)``."""
    observation = np.asarray(observation, np.float32)
    drawn = _drawn(agent.networks, observation, key, np.int32(step))
    action, log_prob, value = jax.device_get(drawn)
    return Step(observation, int(action), float(log_prob), float(value))


def learn(agent: Agent, buffer: Sequence[Step]) -> Agent:
    """The agent, after 40 epochs over the steps of some episodes, two or more."""
    returns = ppo_returns([s.reward for s in buffer], [s.terminal for s in buffer])
    # Few lengths, because each is a compilation.
    slots = max(_SHORTEST, 1 << (len(buffer) - 1).bit_length())
    missing = slots - len(buffer)

    def padded(values: Any, dtype: Any) -> np.ndarray:
        own = np.asarray(values, dtype)
        return np.pad(own, ((0, missing), *((0, 0),) * (own.ndim - 1)))

    return _learned(
        agent,
        padded([s.observation for s in buffer], np.float32),
        padded([s.action for s in buffer], np.int32),
        padded([s.log_prob for s in buffer], np.float32),
        padded([s.value for s in buffer], np.float32),
        padded(returns, np.float32),
        padded(np.ones(len(buffer)), bool),
    )


def _network(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    shapes = [(out, width + 1) for width, out in itertools.pairwise(widths)]
    ends = np.cumsum([out * columns for out, columns in shapes]).tolist()
    drawn = jax.random.uniform(key, (ends[-1],), jnp.float32, -1.0, 1.0)
    layers = []
    for shape, own in zip(shapes, jnp.split(drawn, ends[:-1]), strict=True):
        own = own.reshape(shape) / math.sqrt(shape[1] - 1)
        layers.append({"weight": own[:, :-1], "bias": own[:, -1]})
    return layers


def _forward(layers: Sequence[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """(..., in) to (..., out)."""
    for i, layer in enumerate(layers):
        x = jnp.tanh(x) if i else x
        bias = layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
        x = jnp.einsum("...i,oi->...o", x, layer["weight"], precision="highest") + bias
    return x


@jax.jit
def _drawn(networks: Any, observation: jax.Array, key: jax.Array, step: Any) -> Any:
    log_probs = jax.nn.log_softmax(_forward(networks["policy"], observation))
    action = jax.random.categorical(jax.random.fold_in(key, step), log_probs)
    return action, log_probs[action], _forward(networks["value"], observation)[0]


@jax.jit
def _learned(
    agent: Agent,
    observations: jax.Array,
    actions: jax.Array,
    old_log_probs: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    taken: jax.Array,
) -> Agent:
    def loss(networks: Any) -> jax.Array:
        log_probs = jax.nn.log_softmax(_forward(networks["policy"], observations))
        own = jnp.take_along_axis(log_probs, actions[:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        values = _forward(networks["value"], observations)[:, 0]
        return ppo_loss(
            own, old_log_probs, values, old_values, returns, entropy, taken=taken
        )

    def epoch(_: Any, agent: Agent) -> Agent:
        gradient = jax.grad(loss)(agent.networks)
        networks, moments = {}, {}
        for name, adam in _ADAM.items():
            with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
                step, moments[name] = adam.update(gradient[name], agent.moments[name])
            networks[name] = optax.apply_updates(agent.networks[name], step)
        return Agent(networks, moments)

    return jax.lax.fori_loop(0, _EPOCHS, epoch, agent)
