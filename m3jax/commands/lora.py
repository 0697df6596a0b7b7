"""Makes LoRA adapters: of a fine-tuned model, or of several adapters.

extract: the best low-rank change of each weight that makes --model of --base, to
--rank, or to the --energy (share of the sum of squares) that is to be kept. Norms,
biases, embedding and head are saved whole where they changed.

merge: --models are adapters; the recipe (--config, as for `m3jax merge`, M3's draws
included) merges what they change, ΔW, never A and B apart:
  --how=concatenate  their weighted sum, exactly; the ranks add up
  --how=svd          any recipe; the best change of --rank or --energy
  --how=core         any recipe, in the space that they share, exactly

Either makes a PEFT folder, prints what each tensor's change loses, and the least loss
that its rank allows; `m3jax merge --models=BASE+ADAPTER` takes it from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from m3jax.commands import config, reporting
from m3jax.commands.cli import UsageError, define, define_names, names, need
from m3jax.commands.tables import shape, table

if TYPE_CHECKING:
    from m3jax.lora.extract import Fit

USAGE = (
    "m3jax lora extract --base=DIR --model=DIR --output=DIR --rank=N\n"
    "       m3jax lora merge --models=A,B[,C...] --output=DIR [--how=core] "
    "[--config=FILE]"
)
TAKES = None
GROUPS = {
    "extract": ("model", "energy", "svd", "embeddings"),
    "merge": ("models", "how"),
}
ROWS = config.ROWS


_BASE = define("base", str, "The base model: a folder, a file or org/name.")
_MODEL = define("model", str, "The fine-tuned model.")
_MODELS = define_names("models", "The adapters, comma-separated.")
_OUTPUT = define("output", str, "The folder to make.")
_RANK = define("rank", int, "At most so much, for every tensor.")
_ENERGY = define(
    "energy", float, "Share of each change's sum of squares to keep, 0 to 1."
)
_SVD = define(
    "svd",
    ["full", "randomised"],
    "Of each change. [full; of more than 2048 rows and columns randomised]",
)
_EMBEDDINGS = define(
    "embeddings",
    ["whole", "lora"],
    "How a changed embedding and head are stored.",
    "whole",
)
_HOW = define("how", ["concatenate", "svd", "core"], "See below.", "concatenate")
_DTYPE = define(
    "factors_dtype",
    ["float32", "bfloat16", "float16"],
    "Of A and B in the adapter.",
    "float32",
)
_SEED = define("seed", int, "Of ratios, masks and a randomised SVD. [0]")

_OF_OTHERS = {"extract": ("models", "how"), "merge": ("model", "svd", "embeddings")}

prepare = config.prepare  # --config, whose fields depend on the file it names


def main(positional: list[str]) -> int:
    if positional not in (["extract"], ["merge"]):
        raise UsageError(f"needs extract or merge; usage: {USAGE}")
    for flag in _OF_OTHERS[positional[0]]:
        if flags.FLAGS[flag].present:
            raise UsageError(f"--{flag} is not of `m3jax lora {positional[0]}`")
    output = _OUTPUT.value
    need(USAGE, output=output)
    fits = _extract(output) if positional == ["extract"] else _merge(output)
    print("\n".join([*_report(fits), f"{'output':11}{output}"]))
    return 0


def _extract(output: str) -> list[Fit]:
    if _BASE.value is None or _MODEL.value is None:
        raise UsageError(f"--base and --model are needed; usage: {USAGE}")
    from m3jax.checkpoints.output.destination import check_free
    from m3jax.checkpoints.places import store
    from m3jax.lora.extract import Settings, extract

    settings = Settings(
        rank=_RANK.value,
        energy=_ENERGY.value,
        svd=_SVD.value,
        embeddings=_EMBEDDINGS.value,
        dtype=_DTYPE.value,
        seed=_SEED.value or 0,
    )
    check_free(store.parse(output), overwrite=False, resume=False)
    with reporting.progress() as progress:
        return extract(_BASE.value, _MODEL.value, output, settings, progress)


def _merge(output: str) -> list[Fit]:
    asked = config.asked(_BASE.value, names(_MODELS), _SEED.value)
    if len(asked.models) < 2:
        raise UsageError(f"--models needs two adapters or more; usage: {USAGE}")
    from m3jax.checkpoints.output.destination import check_free
    from m3jax.checkpoints.places import store
    from m3jax.lora.combine import combine

    check_free(store.parse(output), overwrite=False, resume=False)
    return combine(
        asked.models,
        output,
        asked.recipe,
        how=_HOW.value,
        rank=_RANK.value,
        energy=_ENERGY.value,
        base=asked.base,
        seed=asked.seed,
        dtype=_DTYPE.value,
    )


def _report(fits: list[Fit]) -> list[str]:
    rows = [
        (
            fit.name,
            shape(fit.shape),
            str(fit.rank) if fit.rank else "whole",
            f"{fit.error:.5f}",
            "—" if fit.least is None else f"{fit.least:.5f}",
        )
        for fit in fits
    ]
    return table(("tensor", "shape", "rank", "error", "least"), rows, "<<>>>")
