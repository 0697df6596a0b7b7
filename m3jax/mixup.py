"""Draws the ratios of M3: λ ~ Beta(α, α), and Dirichlet(α, …, α) for K > 2.

Source: "Mixup Model Merge", arXiv 2502.15434. The paper has two models and one
draw for the whole model; the Dirichlet distribution is its extension to K models
(its two-model case is Beta(α, α)), and `granularity` draws once per layer or
tensor instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax import prng
from m3jax.recipe import Mixup
from m3jax.traced import is_traced


def group_of(name: str, granularity: str) -> str:
    """The name of the group of tensors that shares one draw with tensor `name`.

    ``model``: one group, named "". ``tensor``: the tensor's own name. ``layer``: the
    name up to its first number ("model.layers.3"), or, where there is none, the
    name of the module that holds it ("lm_head").
    """
    if granularity == "model":
        return ""
    if granularity == "tensor":
        return name
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name


def draw_ratios(
    mixup: Mixup, num_models: int, names: list[str], seed: int | jax.Array
) -> dict[str, Any] | None:
    """The ratios of each group of tensors.

    With key = the group's key (see `m3jax.prng`) the ratios of a group are
    ``jax.random.dirichlet(key, [α] * K, dtype="float64")`` rounded to float32, drawn
    on the host's CPU backend. The last bits of a draw depend on the instructions
    that XLA chooses for the machine; in float64 they are bits that the rounding
    removes, so every machine sees the same ratios. α = 0 gives the first model
    everything.

    Returns:
      {group: K ratios, float32 values}, or None where M3 is off.
    """
    if mixup.ratios is None and mixup.alpha is None:
        return None
    groups = sorted({group_of(name, mixup.granularity) for name in names} or {""})
    if is_traced(mixup.ratios):
        return dict.fromkeys(groups, mixup.ratios)
    if mixup.ratios is not None:
        fixed = tuple(float(np.float32(ratio)) for ratio in mixup.ratios)
        return dict.fromkeys(groups, fixed)
    if mixup.alpha == 0:
        return dict.fromkeys(groups, (1.0,) + (0.0,) * (num_models - 1))
    if num_models == 1:
        return dict.fromkeys(groups, (1.0,))
    whole_model = mixup.granularity == "model"
    root = prng.root_key(seed)
    if is_traced(root):
        return _drawn_by_a_callback(mixup, num_models, groups, root)
    keys = prng.ratio_keys(root, None if whole_model else groups)
    alpha = np.full(num_models, mixup.alpha, np.float64)
    with (
        jax.default_device(jax.local_devices(backend="cpu")[0]),
        jax.threefry_partitionable(True),
        jax.enable_x64(True),
    ):
        draws = _draw(keys, alpha)
    return {
        group: tuple(float(ratio) for ratio in draw)
        for group, draw in zip(groups, draws, strict=True)
    }


def coefficients(
    ratios: Mapping[str, Any] | None,
    names: Sequence[str],
    granularity: str,
    default: tuple[float, ...],
) -> Any:
    """The coefficient of each of K models for each of N tensors.

    Args:
      ratios: from `draw_ratios`.
      names: of the tensors.
      granularity: of the draws.
      default: K coefficients, for tensors without a draw and where M3 is off.

    Returns:
      (K, N) float64.
    """
    rows = [
        default if ratios is None else ratios.get(group_of(name, granularity), default)
        for name in names
    ]
    if any(map(is_traced, rows)):
        return jnp.stack([jnp.asarray(row, jnp.float32) for row in rows], axis=-1)
    return np.array(rows, np.float64).reshape(-1, len(default)).T.copy()


def _drawn_by_a_callback(
    mixup: Mixup, num_models: int, groups: list[str], root: Any
) -> dict[str, Any]:
    """The same draws where the seed is an argument of `jax.jit` or `jax.vmap`: float64
    is not to be had there, so the host draws."""

    def draw(key: Any) -> np.ndarray:
        drawn = draw_ratios(mixup, num_models, groups, jnp.asarray(np.asarray(key)))
        assert drawn is not None
        return np.array([drawn[group] for group in groups], np.float32)

    shape = jax.ShapeDtypeStruct((len(groups), num_models), jnp.float32)
    rows = jax.pure_callback(draw, shape, root, vmap_method="sequential")
    return {group: rows[i] for i, group in enumerate(groups)}


def _dirichlet(key: jax.Array, alpha: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.dirichlet(key, alpha, dtype=jnp.float64)


# It runs once, so that compiling it is what takes time: a second with all of XLA's
# optimisations, a quarter of one like this. What they change in a float64, the
# rounding removes.
_COMPILED_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
}
_dirichlet_fast = jax.jit(_dirichlet, compiler_options=_COMPILED_FAST)
_dirichlet_safe = jax.jit(_dirichlet)


def _draw(keys: np.ndarray, alpha: np.ndarray) -> list[np.ndarray]:
    """K ratios, float32, for each of the (G, 2) keys.

    One by one, so that one program makes them all: XLA's programs for different numbers
    of draws differ in the last bits.
    """
    with jax.ensure_compile_time_eval():  # also inside a caller's jit
        try:
            return [np.asarray(_dirichlet_fast(key, alpha), np.float32) for key in keys]
        except jax.errors.JaxRuntimeError:  # this version of XLA lacks an option
            return [np.asarray(_dirichlet_safe(key, alpha), np.float32) for key in keys]
