"""Rotary position embeddings: the frequencies, and the rotation by them.

Source: Su et al., arXiv 2104.09864; `linear` scaling: arXiv 2306.15595; `llama3`:
Llama 3.1's release. As transformers computes them, but in float64, rounded once.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions become angles.

    Attributes:
      theta: the base of the wavelengths.
      scaling: ``default``, ``linear`` or ``llama3``.
      factor: by which long wavelengths are stretched; `linear` stretches all.
      low_frequency_factor, high_frequency_factor: `llama3` stretches wavelengths
        above original_length / low wholly, below original_length / high not at all,
        and those between them in part.
      original_length: tokens, the context of the pretraining, for `llama3`.
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair of channels: (head_dim / 2,) float32."""
        frequency = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        if self.scaling == "linear":
            frequency = frequency / self.factor
        elif self.scaling == "llama3":
            turns = self.original_length * frequency / (2 * math.pi)
            low, high = self.low_frequency_factor, self.high_frequency_factor
            # Share that keeps its frequency: 0 for long waves, 1 for short ones.
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            frequency = frequency * (kept + (1 - kept) / self.factor)
        return frequency.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Turns channel pair (i, i + D/2) of each head by position · frequency i.

    Args:
      x: (B, T, heads, D).
      positions: (B, T) int32.
      frequencies: (D / 2,) float32.

    Returns:
      As `x`; the angles and the rotation are in float32.
    """
    angles = (
        positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # (B, T, 1, D/2)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # (B, T, heads, D/2)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
