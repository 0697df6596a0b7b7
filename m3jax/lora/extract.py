"""An adapter out of a fine-tuned model: the best low-rank change of each weight."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from m3jax import prng
from m3jax.checkpoints import naming
from m3jax.checkpoints.adapters import EMBEDDINGS, HEAD, conv1d
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.source import Source, byte_size, read, read_whole
from m3jax.engine.inputs import MismatchError
from m3jax.engine.plan import natural_order
from m3jax.engine.progress import Progress
from m3jax.lora import factors
from m3jax.lora.factors import Svd
from m3jax.lora.output import AdapterWriter, task_of

_PART = 1 << 20  # elements that are compared at a time
_SKETCH = 3  # folded into the root key; see `prng`
# Of positions and kinds of tokens: no linear layers, though they are matrices.
_OTHER_EMBEDDING = re.compile(r"(embed\w*|wpe|shared|relative_attention_bias)\.weight$")
_FULL = 2048  # the longest short side whose SVD is computed in full by default


@dataclasses.dataclass(frozen=True)
class Fit:
    """How near an adapter's change of a tensor comes to what it stands for.

    Attributes:
      name: of the tensor.
      shape: of it.
      rank: of the adapter there; 0: the tensor is saved whole.
      error: ‖change − b·a‖_F / ‖change‖_F of the factors as they are stored.
      least: the least error that any change of this rank has; None: unknown, since the
        SVD was randomised.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    error: float
    least: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of an extraction.

    Attributes:
      rank: at most so much; None: no limit.
      energy: share of a change's sum of squares that is to be kept, so that the
        relative error is at most √(1 − energy); None: as much as the rank allows.
      svd: ``full``, ``randomised`` (needs a rank) or None: randomised where the short
        side of a weight is above 2048 and there is a rank.
      embeddings: ``whole`` or ``lora``: how embedding and head are stored.
      dtype: of the factors.
      seed: of the randomised SVD.
    """

    rank: int | None = None
    energy: float | None = None
    svd: str | None = None
    embeddings: str = "whole"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise ValueError("rank or energy is missing, or both: --rank=16")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} needs a positive integer")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy} needs 0 < energy <= 1")
        if self.svd == "randomised" and self.rank is None:
            raise ValueError("svd=randomised needs a rank")
        prng.check_seed(self.seed)


def extract(
    base: str,
    model: str,
    output: str,
    settings: Settings,
    progress: Progress | None = None,
) -> list[Fit]:
    """Writes the adapter that makes `model` of `base`, as nearly as the rank allows.

    Weights get factors; what is no matrix, embedding and head (unless asked
    otherwise), and what has more rows than the base's, is saved whole. Tensors that
    are equal stay out.

    Returns:
      A line for each tensor of the adapter.

    Raises:
      CheckpointError: the two do not fit; one line.
    """
    progress = progress or Progress()
    with (
        open_checkpoint(base) as under,
        open_checkpoint(model, base=base) as tuned,
    ):
        pairs = _lined_up(under, tuned, progress)
        transposed = {
            name: _is_transposed(name, source, under.tensors)
            for name, (source, _) in pairs.items()
        }
        writer, fits = AdapterWriter(settings.dtype), list[Fit]()
        sizes = {name: sum(map(byte_size, own)) for name, own in pairs.items()}
        progress.stage("extracting", sum(sizes.values()))
        for name in sorted(pairs, key=natural_order):
            fits += _extracted(
                name, *pairs[name], transposed[name], writer, settings, tuned
            )
            progress.advance(sizes[name])
        whole = [fit.name for fit in fits if not fit.rank]
        strange = [n for n in whole if not n.endswith((".weight", ".bias"))]
        if strange:
            progress.note(
                f"{len(strange)} tensors are no module's weight or bias, such as "
                f"{shown(strange[0])}: m3jax reads them in the adapter, peft may not"
            )
        writer.write(
            output,
            base=base,
            modules={name.rpartition(".")[0] for name in under.tensors},
            transposed=any(transposed.values()),
            task=task_of(under.config),
            record={
                "extract": dataclasses.asdict(settings)
                | {"base": base, "model": model},
                "tensors": {fit.name: dataclasses.asdict(fit) for fit in fits},
            },
        )
        for checkpoint in (under, tuned):
            for file in checkpoint.files:
                file.check_unchanged()
    return fits


def _lined_up(
    base: Checkpoint, model: Checkpoint, progress: Progress
) -> dict[str, tuple[Source, Source]]:
    """The tensors of both, by the base's names."""
    named = naming.common([base, model])
    for note in named.notes:
        progress.note(note)
    tables = [
        {name: own for name, own in table.items() if name not in named.copied}
        for table in named.tables
    ]
    problems = [
        f"tensor {shown(name)} is missing in {owner.name}; an adapter cannot bring or "
        "remove it"
        for owner, table, other in zip((base, model), tables, tables[::-1], strict=True)
        for name in sorted(set(other) - set(table))
    ]
    if problems:
        raise MismatchError(problems)
    pairs = {name: (tables[0][name], tables[1][name]) for name in tables[0]}
    for name, (a, b) in pairs.items():
        more_rows = _is_vocabulary(name) and a.shape[1:] == b.shape[1:]
        if a.shape != b.shape and not more_rows:
            problems.append(
                f"tensor {shown(name)} has shape {list(a.shape)} in {base.name}, "
                f"{list(b.shape)} in {model.name}"
            )
    if problems:
        raise MismatchError(problems)
    return pairs


def _extracted(
    name: str,
    base: Source,
    model: Source,
    transposed: bool,
    writer: AdapterWriter,
    settings: Settings,
    tuned: Checkpoint,
) -> Iterator[Fit]:
    """What the adapter has of one tensor: nothing, a pair or all of it."""
    if base.shape == model.shape and _equal(base, model):
        return
    vocabulary = _is_vocabulary(name)
    matrix = len(base.shape) == 2 and min(base.shape) and name.endswith(".weight")
    matrix = matrix and (vocabulary or not _OTHER_EMBEDDING.search(name))
    low = matrix and base.shape == model.shape and base.dtype.kind == "float"
    if not low or (vocabulary and settings.embeddings == "whole"):
        writer.whole(name, model)
        yield Fit(name, model.shape, 0, 0.0, 0.0)
        return
    change = read_whole(model).astype(np.float64) - read_whole(base)
    if not np.isfinite(change).all():
        raise CheckpointError(
            f"{tuned.name}: tensor {shown(name)} less the base's holds NaN or infinity"
        )
    embedding = name.endswith(EMBEDDINGS)
    if embedding or transposed:
        change = change.T
    total = float(np.square(change).sum())
    full, svd = _svd(change, name, settings)
    rank = factors.kept(svd, settings.rank, settings.energy, total)
    stored = writer.pair(
        name.removesuffix(".weight"), svd.cut(rank), embedding=embedding
    )
    change -= stored.dense
    error = factors.relative_error(math.sqrt(total), float(np.linalg.norm(change)))
    left = float(np.linalg.norm(svd.values[rank:])) if full else None
    least = None if left is None else factors.relative_error(math.sqrt(total), left)
    yield Fit(name, base.shape, rank, error, least)


def _svd(change: np.ndarray, name: str, settings: Settings) -> tuple[bool, Svd]:
    """Whether it is all of it, and the SVD."""
    rank, short = settings.rank, min(change.shape)
    sketched = settings.svd == "randomised" or (settings.svd is None and short > _FULL)
    if rank is None or not sketched or rank + factors.OVERSAMPLING >= short:
        return True, factors.exact(change)
    return False, factors.randomised(
        change, rank, _sketch(change.shape[1], name, settings)
    )


def _sketch(rows: int, name: str, settings: Settings) -> np.ndarray:
    """Normal numbers that follow from the seed and the tensor's name."""
    import jax

    assert settings.rank is not None
    words = prng.name_words([name])[0]
    key = prng.fold_in(prng.root_key(settings.seed), _SKETCH)
    for word in words:
        key = prng.fold_in(key, int(word))
    shape = (rows, settings.rank + factors.OVERSAMPLING)
    drawn = jax.random.normal(jax.random.wrap_key_data(jax.numpy.asarray(key)), shape)
    return np.asarray(drawn, np.float64)


def _equal(a: Source, b: Source) -> bool:
    size = math.prod(a.shape)
    for start in range(0, size, _PART):
        parts = [read(own, start, min(_PART, size - start)) for own in (a, b)]
        if parts[0].dtype != parts[1].dtype:
            parts = [part.astype(np.float64) for part in parts]
        if not np.array_equal(parts[0], parts[1]):
            return False
    return True


def _is_transposed(name: str, source: Source, tensors: Mapping[str, Any]) -> bool:
    """Whether a weight is stored (in, out), as GPT-2's Conv1D is."""
    return len(source.shape) == 2 and conv1d(name, tensors, False)


def _is_vocabulary(name: str) -> bool:
    return name.endswith((*EMBEDDINGS, f"{HEAD}.weight"))
