"""Faults to plant: one line each that breaks a promise, and the tests that must see it.

`run.py` plants them. None of the tests is slow: `make test` alone catches all.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and who has to see it.

    Attributes:
      promise: what it breaks.
      file: in the package.
      old, new: the text that stands there once, and what it becomes.
      tests: what pytest runs, of which some must fail.
    """

    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = {
    "contracted product": Fault(
        "a product is rounded before it is added to anything, in every executor",
        "methods/step.py",
        "return jnp.where(jnp.isnan(values), values, values * factors)",
        "return values * factors",
        ("test_in_memory.py::test_bits_are_those_of_numpy",),
    ),
    "rounding twice": Fault(
        "the result is rounded once, to the dtype that is written",
        "engine/kernel.py",
        "parts[part].astype(dtype) for part",
        'parts[part].astype("float16" if dtype == "bfloat16" else dtype).astype(dtype)'
        " for part",
        ("test_bytes.py::test_bytes_of_version_0_1[average-bfloat16-streamed]",),
    ),
    "drop rate rounded down": Fault(
        "the drop rate is the multiple of 1/65536 that is nearest",
        "prng.py",
        "xp.round(xp.asarray(rates) * RATE_STEPS)",
        "xp.floor(xp.asarray(rates) * RATE_STEPS)",
        ("test_prng.py",),
    ),
    "ties without a majority": Fault(
        "TIES decides a vote of 0 by the majority of the whole model",
        "methods/ties.py",
        'jnp.where(total == 0, info["majority"], jnp.sign(total))',
        "jnp.sign(total)",
        (
            "test_methods.py::test_ties_elects_the_models_majority_where_an_entry_has_none",
        ),
    ),
    "another key of the ratios": Fault(
        "a seed draws the ratios that it has always drawn",
        "prng.py",
        "key = fold_in(root[None], RATIOS)",
        "key = fold_in(root[None], MASKS)",
        ("test_prng.py", "test_mixup.py"),
    ),
    "resumed unseen": Fault(
        "a resumed merge looks at what is on disk before it takes it over",
        "engine/recorder.py",
        'if self.checksums_on_disk(i, block) == entry["checksums"]:',
        'if entry["checksums"]:',
        ("test_resume.py",),
    ),
    "rows of other tokens": Fault(
        "each token gets its own row of each vocabulary",
        "checkpoints/sources/token_rows.py",
        "source.read_into(into, int(wanted[begin]) * width)",
        "source.read_into(into, int(places[begin]) * width)",
        ("test_tokens.py",),
    ),
    "a tensor dropped": Fault(
        "a tensor that the first checkpoint has under no name is never passed over",
        "checkpoints/naming/common.py",
        "return left | table",
        "return table",
        ("test_naming.py", "test_architectures.py"),
    ),
    "a hole in a file": Fault(
        "a safetensors file whose tensors leave a hole is refused",
        "checkpoints/formats/safetensors.py",
        "if start != end:",
        "if start < end:",
        ("test_safetensors.py",),
    ),
    "coefficients out of bounds": Fault(
        "learned coefficients stay within the bounds of their constraint",
        "learn/coefficients/constraints.py",
        "low + (high - low) * jax.nn.sigmoid(r)",
        "low + high * jax.nn.sigmoid(r)",
        (
            "test_learn_gradient.py::test_a_constraint_keeps_coefficients_within_its_bounds",
        ),
    ),
    "the document before the model": Fault(
        "a parameter of a model counts before that of mergekit's document",
        "recipe/mergekit_layout.py",
        "resolved(parameter, [given, *levels], shift)",
        "resolved(parameter, [*levels, given], shift)",
        ("test_mergekit.py::test_agrees_with_mergekit",),
    ),
    "checksums of something else": Fault(
        "m3jax.json holds the checksums of the inputs that were read",
        "engine/recorder.py",
        "done.append((item, own, digests[len(own) :]))",
        "done.append((item, own, digests[: len(own)]))",
        ("test_verify.py", "test_resume.py", "test_merge_command.py"),
    ),
}
