"""Iso-CTS: common directions of all tasks, and some that each task has alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.methods.fields import share
from m3jax.methods.scaled import OfMatrices
from m3jax.methods.spectral import Triples, masked, polar_product, product, svd
from m3jax.methods.step import Numbers, Operands, register, sum_over_models


@register("iso_cts")
class IsoCts(OfMatrices):
    """θ0 + s · mean(S) P(U) P(V)ᵀ, of common and task-specific singular triples.

    Of q = min(m, n) triples c = int(q f) are meant to be common, f `common_fraction`;
    each of the K tasks gets d = round((q − c) / K), half to even, at most q // K, and
    then c = q − d K. Common are the first c triples of Σ λ_k τ_k; a task's own are the
    first d of λ_k τ_k − U_c U_cᵀ λ_k τ_k. U, S and V put them side by side; P is the
    polar factor. d = 0 is Iso-C. Tensors that are no matrices get
    θ0 + s · mean λ_k τ_k. Without M3 all λ_k are 1.

    Triples whose σ is only rounding, ≤ max(m, n) ε times the norm of Σ λ_k τ_k or of
    λ_k τ_k, are left out, which is ours, as the bound on d is: the reference has
    c < 0 for f near 0.

    Source: arXiv 2502.04959; agrees with fusion-bench 0.2.33 and the authors' code.
    """

    studies = (
        "as Iso-C it is for full fine-tunes, shown on vision models; that one "
        "collapses on LoRA experts (2505.19892)"
    )
    common_fraction: Any = share(
        default=0.8,
        help="f, share of the directions that are common to all tasks",
        search=(0.5, 1.0),
    )

    def of_matrices(self, tasks: Any, x: Operands, p: Numbers) -> Any:
        # How many triples count is a number of the recipe, so the shapes are those of
        # the most there may be, and the columns beyond are 0, which P(·) keeps.
        count, ranks = len(tasks), min(tasks[0].shape)
        common = jnp.floor(p["common_fraction"].reshape(()) * ranks)
        own = jnp.minimum(jnp.round((ranks - common) / count), ranks // count)
        total = sum_over_models(tasks)
        shared = _first(svd(total), ranks - own * count, total)
        inside = shared[0]
        specific = [
            _first(
                svd(task - product(inside, product(task.T, inside.T)), ranks // count),
                own,
                task,
            )
            for task in tasks
        ]
        triples = [*specific, shared]
        total = jnp.sum(jnp.concatenate([values for _, values, _ in triples]))
        alike = [
            (left, jnp.ones_like(values), right) for left, values, right in triples
        ]
        return polar_product(alike) * (total / ranks)


def _first(triples: Triples, count: jax.Array, whole: jax.Array) -> Triples:
    """The triples, 0 from `count` on and where σ is only rounding."""
    values = triples[1]
    epsilon = max(whole.shape) * float(np.finfo(np.float32).eps)
    real = values > jnp.linalg.norm(whole) * epsilon
    return masked(triples, real & (jnp.arange(len(values), dtype=count.dtype) < count))
