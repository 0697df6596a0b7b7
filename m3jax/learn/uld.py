"""Universal logit distillation: between models of unlike vocabularies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m3jax.learn.pytrees import wide
from m3jax.learn.soup import IGNORED


def uld_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    student_labels: jax.Array | None = None,
    teacher_labels: jax.Array | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    top_k: int | None = None,
    standardize: bool = False,
) -> jax.Array:
    """The L1 distance of sorted probabilities, the mean over positions and examples.

    Σ_i |sort(softmax(z/T))_i − sort(softmax(t/T'))_i|, both falling, the shorter one
    padded with 0: permuting either vocabulary changes nothing. No gradient goes to the
    teacher; tied probabilities share the student's in some order.

    As DistillationLoss of Nicolas-BZRD/llm-recipes, by the authors of ULD. With
    `standardize`, z ← (z − mean)/(std + 1e-6) over the vocabulary, and with `top_k` the
    K largest of these are kept, before the softmax: ours, after the abstract of
    InfiFusion (arXiv 2501.02795), which names both but not their order; its authors
    used K = 10.

    Args:
      student_logits: (..., V).
      teacher_logits: (..., W); without labels of the same leading axes.
      student_labels, teacher_labels: both or none, (B, T) and (B, U) for logits
        (B, T, V) and (B, U, W); −100 outside the answer, which is one run. Position i
        predicts label i + 1, so the answers' rows start one before them, and the first
        min(both lengths) rows of each are compared. A label at position 0 is predicted
        by nothing and left out (ours).
      temperature: T.
      teacher_temperature: T', T by default.
      top_k: None keeps all.
      standardize: see above.

    Raises:
      ValueError: labels of one of the two only, or `top_k` below 1.
    """
    if (student_labels is None) != (teacher_labels is None):
        raise ValueError("student_labels and teacher_labels need each other")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} needs 1 or more, or None")
    other = temperature if teacher_temperature is None else teacher_temperature
    student = sorted_probabilities(student_logits, temperature, top_k, standardize)
    teacher = sorted_probabilities(
        jax.lax.stop_gradient(teacher_logits), other, top_k, standardize
    )
    if student_labels is None or teacher_labels is None:
        return jnp.mean(distance(student, teacher))
    rows = min(student.shape[1], teacher.shape[1])
    own, own_lengths = _answers(student, student_labels, rows)
    others, other_lengths = _answers(teacher, teacher_labels, rows)
    lengths = jnp.minimum(own_lengths, other_lengths)
    counted = (jnp.arange(rows)[None] < lengths[:, None]).astype(own.dtype)
    sums = jnp.sum(distance(own, others) * counted, axis=1)
    return jnp.mean(sums / jnp.maximum(lengths, 1).astype(sums.dtype))


def sorted_probabilities(
    logits: jax.Array, temperature: float, top_k: int | None, standardize: bool
) -> jax.Array:
    """Probabilities (..., K), falling; the steps of `uld_loss` before the distance."""
    z = logits.astype(wide(logits))
    if standardize:
        deviation = jnp.std(z, axis=-1, keepdims=True)
        z = (z - jnp.mean(z, axis=-1, keepdims=True)) / (deviation + 1e-6)
    kept = z.shape[-1] if top_k is None else min(top_k, z.shape[-1])
    # A softmax keeps the order of its logits, so it may as well come after the sort.
    return jax.nn.softmax(jax.lax.top_k(z, kept)[0] / temperature, axis=-1)


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Σ |a − b| over the last axis, the shorter one padded with 0."""
    width = max(a.shape[-1], b.shape[-1])
    a, b = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in (a, b)
    )
    return jnp.sum(jnp.abs(a - b), axis=-1)


def _answers(x: jax.Array, labels: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The rows that predict the labels, from the first on, and how many there are."""
    labelled = labels[:, 1:] != IGNORED
    start = jnp.argmax(labelled, axis=1)
    places = jnp.minimum(start[:, None] + jnp.arange(rows)[None], x.shape[1] - 1)
    return jnp.take_along_axis(x, places[..., None], axis=1), jnp.sum(labelled, axis=1)
