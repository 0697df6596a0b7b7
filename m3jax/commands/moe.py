"""Builds a mixture of experts from dense models of one architecture.

--config is a YAML with `base_model` and `experts`, as mergekit's (m3jax merge takes it,
too); or --base and --models name the base and the experts, whose gates are then random.
Llama and Mistral become Mixtral, with a shared expert DeepSeek-MoE; Qwen2 and Qwen3
become Qwen2-MoE and Qwen3-MoE. Attention, norms, embedding and head are the base's.
"""

from __future__ import annotations

from absl import flags

from m3jax.commands import config, merge
from m3jax.commands.cli import UsageError, define
from m3jax.moe.document import ARCHITECTURES, Expert, Mixture

USAGE = (
    "m3jax moe --config=FILE.yml --output=DIR\n"
    "       m3jax moe --base=DIR --models=A,B[,C...] --output=DIR"
)
SHARED = [merge, *merge.SHARED]
ROWS = merge.ROWS
GROUPS = {"Experts": ("gates", "experts_per_token", "architecture", "dtype")}

_GATES = define(
    "gates", ["random", "uniform_random"], "Of --models; a YAML has its own.", "random"
)
_PER_TOKEN = define("experts_per_token", int, "Experts that a token goes through.", 2)
_ARCHITECTURE = define(
    "architecture", list(ARCHITECTURES), "Of the output. [by the base's]"
)
_DTYPE = define("dtype", str, "Of the output; input: the widest input's.", "input")

failed = merge.failed


def prepare(arguments: list[str]) -> list[str]:
    """See `cli.run`."""
    return config.prepare(arguments)


def main(positional: list[str]) -> int:
    if config.asked(None, None, None).mixture is None:
        config.use(_from_flags())
        return merge.main(positional)
    for flag in (
        "base",
        "models",
        "gates",
        "experts_per_token",
        "architecture",
        "dtype",
    ):
        if flags.FLAGS[flag].present:
            raise UsageError(
                f"--{flag} is for a mixture without --config: say it there"
            )
    return merge.main(positional)


def _from_flags() -> Mixture:
    base, models = merge.named()
    if base is None or not models:
        raise UsageError(f"needs --config, or --base and --models; usage: {USAGE}")
    return Mixture(
        base=base,
        experts=tuple(Expert(model) for model in models),
        gates=_GATES.value,
        per_token=_PER_TOKEN.value,
        architecture=_ARCHITECTURE.value,
        dtype=None if _DTYPE.value == "input" else _DTYPE.value,
    )
