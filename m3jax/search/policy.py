"""What RMM's policy learns from, arXiv 2503.21272: rewards, returns and PPO's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LEAST_DEVIATION = 1e-7


def dynamic_average_reward(
    rewards: Sequence[float],
    *,
    fraction: float,
    beta: float = 0.8,
    episodes: int | None = None,
) -> np.ndarray:
    """Averages rewards that were measured on parts of the data.

    With p = round(1/fraction) and b = β i/E, episode i = 1, ..., E: r_i stays where
    (i − 1) mod p = 0, else r_i ← b r_{i−1} + (1 − b) r_i with the averaged r_{i−1}.
    Agrees with train_RMM.py of WuDiHJQ/Reinforced-Model-Merging, commit 7b940fe, where
    1/fraction is an integer (the release tests the remainder of a float).

    Args:
      rewards: (n,) of the first n episodes.
      fraction: of the data that one episode sees, in (0, 1].
      beta: of the last episode.
      episodes: E, n by default.

    Returns:
      (n,) float64.

    Raises:
      ValueError: `fraction` is outside (0, 1], or there are more rewards than episodes.
    """
    total = len(rewards) if episodes is None else episodes
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} needs a number above 0 and up to 1")
    if len(rewards) > total:
        raise ValueError(f"{len(rewards)} rewards are more than episodes={total}")
    period = round(1 / fraction)
    averaged: list[float] = []
    for i, reward in enumerate(rewards):
        if i % period:
            b = beta * (i + 1) / total
            reward = b * averaged[-1] + (1 - b) * reward
        averaged.append(float(reward))
    return np.asarray(averaged, np.float64)


def ppo_returns(
    rewards: Sequence[float], terminal: Sequence[bool], *, gamma: float = 0.99
) -> jax.Array:
    """Discounted returns of a buffer of episodes, normalised over the buffer.

    G_t = r_t + γ G_{t+1} within an episode; then (G − mean) / (std + 1e-7) with the
    unbiased deviation. Agrees with `PPO.update` of WuDiHJQ/Reinforced-Model-Merging.

    Args:
      rewards: (T,), episodes one after the other, T ≥ 2.
      terminal: (T,), whether an episode ends with that step.

    Returns:
      (T,) float32, computed in float64 on the host.

    Raises:
      ValueError: the lengths differ, or there are fewer than two steps.
    """
    if len(rewards) != len(terminal) or len(rewards) < 2:
        raise ValueError(
            f"{len(rewards)} rewards and {len(terminal)} terminal flags: two or more "
            "of the same number are needed"
        )
    returns = np.zeros(len(rewards))
    later = 0.0
    for t in reversed(range(len(rewards))):
        later = float(rewards[t]) + (0.0 if terminal[t] else gamma * later)
        returns[t] = later
    deviation = returns.std(ddof=1) + _LEAST_DEVIATION
    return jnp.asarray((returns - returns.mean()) / deviation, jnp.float32)


def ppo_loss(
    log_probs: Any,
    old_log_probs: Any,
    values: Any,
    old_values: Any,
    returns: Any,
    entropy: Any,
    *,
    taken: Any = None,
    clip: float = 0.2,
    value_weight: float = 0.5,
    entropy_weight: float = 1e-4,
) -> jax.Array:
    """PPO's clipped loss, arXiv 1707.06347, with a value and an entropy term.

    mean(−min(ρ A, clip(ρ, 1 ± c) A) + w_v mean((V − G)²) − w_h H), where
    ρ = exp(log π − log π_old) and A = G − V_old. Differentiable in `log_probs`,
    `values` and `entropy`. Agrees with `PPO.update` of
    WuDiHJQ/Reinforced-Model-Merging: γ 0.99, Adam 3e-4 for the policy and 1e-3 for the
    value, 40 epochs every 4 episodes.

    Args:
      log_probs, old_log_probs: (T,) of the actions taken, now and when they were taken.
      values, old_values: (T,) V and V_old.
      returns: (T,) G, of `ppo_returns`.
      entropy: (T,) H of the policy now.
      taken: (T,) bool, False for padding; None: all steps count.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: the shapes differ.
    """
    given = (log_probs, old_log_probs, values, old_values, returns, entropy)
    arrays = [jnp.asarray(array, jnp.float32) for array in given]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        shapes = [array.shape for array in arrays]
        raise ValueError(f"the arrays have the shapes {shapes}; all need the same (T,)")
    new, old, value, old_value, target, spread = arrays
    ratio = jnp.exp(new - old)
    advantage = target - old_value
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    policy = -jnp.minimum(ratio * advantage, clipped * advantage)
    error = jnp.mean(jnp.square(value - target), where=taken)
    own = jnp.mean(policy - entropy_weight * spread, where=taken)
    return own + value_weight * error
