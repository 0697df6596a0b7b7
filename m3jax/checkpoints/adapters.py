"""Adapters: a LoRA folder put on the checkpoint that it was trained on.

`BASE+ADAPTER` is a checkpoint like any other: the base's tensors, those that the
adapter changes made as they are read (`sources.lora`). A folder that holds nothing but
an adapter stands for the same, on the base of the merge, or else on the base that its
adapter_config.json names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from m3jax.checkpoints import side_files, weights
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import peft, torch_file
from m3jax.checkpoints.formats.peft import AdapterConfig, Module
from m3jax.checkpoints.formats.safetensors import header_of
from m3jax.checkpoints.naming import ties
from m3jax.checkpoints.places.files import (
    InputFile,
    Location,
    exists,
    inside,
    open_file,
)
from m3jax.checkpoints.source import FileTensor, Source, Stored
from m3jax.checkpoints.sources.lora import (
    KEPT,
    Adapted,
    Factor,
    Replaced,
    Shifted,
    WithRows,
    whole,
)
from m3jax.checkpoints.tokens.vocabulary import fingerprint

if TYPE_CHECKING:
    from m3jax.checkpoints.folder import Checkpoint

HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


def parts(name: str) -> tuple[str, str] | None:
    """Base and adapter of `BASE+ADAPTER`; None for a name without "+"."""
    base, plus, adapter = name.rpartition("+")
    return (base, adapter) if plus and base and adapter else None


def alone(location: Location) -> Location | None:
    """The folder of an adapter that this folder or file is; None if it is none.

    An adapter beside the weights of a model is a leftover.
    """
    if location.name in (peft.WEIGHTS, peft.PICKLED) and location.is_file():
        return location.parent if exists(location.parent / peft.CONFIG) else None
    if not location.is_dir() or not exists(location / peft.CONFIG):
        return None
    held = any(exists(location / own) for own in (peft.WEIGHTS, peft.PICKLED))
    return location if held and not weights.any_of(location) else None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter; nothing but its config and its header has been read.

    Attributes:
      name: as the user gave it.
      folder: where it lies.
      config: adapter_config.json.
      file: of the tensors.
      tensors: as they are stored.
      modules: the modules that it changes.
      others: tensors that stand whole: the base's name of each, and its name here.
    """

    name: str
    folder: Location
    config: AdapterConfig
    file: InputFile
    tensors: Mapping[str, Stored]
    modules: tuple[Module, ...]
    others: Mapping[str, str]

    def factors(self, module: Module) -> tuple[Factor, Factor]:
        """A as (in, r) and B as (out, r), once their shapes are known to fit.

        Raises:
          CheckpointError: naming the tensor and both shapes.
        """
        found = []
        for part in ("a", "b"):
            name = module.tensors.get(part)
            if name is None:
                raise self.flaw(module.name, f"has no lora_{part.upper()}")
            source = self.tensors[name]
            axis, rank = "ab".index(part), self.config.rank(module.name)
            if len(source.shape) < 2 or source.shape[axis] != rank:
                raise self.flaw(
                    name,
                    f"has shape {list(source.shape)}, where {peft.CONFIG} gives the "
                    f"rank {rank}",
                )
            if source.dtype.kind != "float":
                raise self.flaw(name, f"is {source.dtype.code}, needs a float dtype")
            found.append(Factor(source, part == "a", f"{self.file.path}: {name}"))
        return found[0], found[1]

    def flaw(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {shown(name)} {what}")

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_adapter(name: str, folder: Location) -> Adapter:
    """Opens the adapter in a folder.

    Raises:
      CheckpointError: one line that names the file and the flaw.
    """
    if not exists(folder / peft.CONFIG):
        raise CheckpointError(f"{folder}: has no {peft.CONFIG}, so it is no adapter")
    config = peft.read_config(folder)
    held = [own for own in (peft.WEIGHTS, peft.PICKLED) if exists(folder / own)]
    if not held:
        raise CheckpointError(f"{folder}: has no {peft.WEIGHTS}; fetch it again")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_file(inside(folder, held[0])))
        tensors: Mapping[str, Stored] = (
            torch_file.read_tensors(file).tensors
            if held[0] == peft.PICKLED
            else {n: FileTensor(file, e) for n, e in header_of(file).tensors.items()}
        )
        modules, others = peft.modules(tensors)
        if not modules:
            raise CheckpointError(
                f"{file.path}: holds no lora_A and lora_B, so it is no adapter (LoRA); "
                "give it as a model, without its adapter_config.json"
            )
        stack.pop_all()
    return Adapter(name, folder, config, file, tensors, tuple(modules), others)


def adapted(name: str, base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint `base` with an adapter on it.

    Args:
      name: of the result.
      base: stays open as long as the result, which closes it.
      adapter: the same.

    Raises:
      CheckpointError: a tensor of the adapter does not fit the base.
    """
    changed = _Changes(base, adapter)
    notes = changed.notes()
    tensors = {**base.tensors, **changed.tensors}
    return dataclasses.replace(
        base,
        name=name,
        tensors=dict(sorted(tensors.items())),
        stored=dict(sorted({**base.stored, **changed.tensors}.items())),
        files=(*base.files, adapter.file),
        config=base.config and side_files.changed(base.config, changed.config),
        changes={**base.changes, **changed.config},
        notes=(*base.notes, *notes),
        words=adapter.folder if _has_words(adapter.folder) else base.words,
        parts=(*base.parents, (adapter.name, adapter.folder)),
        cache_bytes=base.cache_bytes + changed.cache_bytes,
    )


class _Changes:
    """The tensors that an adapter makes other than the base's."""

    def __init__(self, base: Checkpoint, adapter: Adapter):
        self._base, self._adapter = base, adapter
        self._limbs = functools.lru_cache(KEPT)(whole)
        self._place = adapter.file.path.name
        self._passed_over: list[str] = []
        self._ranks: list[int] = []
        self.tensors: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.cache_bytes = 0
        targeted = []
        for module in adapter.modules:
            if "rows" in module.tensors or adapter.config.targets(module.name):
                targeted.append(module)
            else:
                self._passed_over.append(module.name)
        names = [f"{module.name}.weight" for module in targeted]
        self._named = _renaming([*names, *adapter.others], base, adapter)
        for own, stored in adapter.others.items():
            self._replace(own, stored)
        for module in targeted:
            self._change(module)

    def notes(self) -> list[str]:
        adapter, made_for = self._adapter, self._adapter.config.base
        ranks = sorted(set(self._ranks))
        kind = "a DoRA adapter" if adapter.config.dora else "a LoRA adapter"
        span = "–".join(map(str, dict.fromkeys([*ranks[:1], *ranks[-1:]])))
        of = f" of rank {span}" if ranks else ""
        same = made_for is None or _last(made_for) == _last(self._base.name)
        said = "" if same else f"; it says it was made for {shown(made_for)}"
        lines = [
            f"{adapter.name}: {kind}{of}, put on {self._base.name} "
            f"({len(self.tensors)} tensors){said}"
        ]
        if self._has_other_words():
            lines.append(
                f"{adapter.name}: has a tokenizer of its own, which counts as this "
                "model's (--tokenizer_from writes it)"
            )
        if self._passed_over:
            lines.append(
                f"{adapter.name}: {len(self._passed_over)} modules passed over as peft "
                f"does: {peft.CONFIG} does not target {shown(self._passed_over[0])}"
            )
        return lines

    def _has_other_words(self) -> bool:
        """Whether the adapter's folder has another vocabulary than the base's."""
        own = fingerprint(self._adapter.folder)
        return own not in (None, fingerprint(self._base.tokenizer_folder))

    def _source(self, name: str) -> tuple[str, Source | None]:
        """The base's name and tensor, as it is by now."""
        own = self._named(name)
        return own, self.tensors.get(own, self._base.tensors.get(own))

    def _required(self, name: str) -> tuple[str, Source]:
        own, source = self._source(name)
        if source is None and name == f"{HEAD}.weight":
            source = self._untied()
        if source is None:
            raise self._adapter.flaw(
                name, f"changes a tensor that {self._base.name} does not have"
            )
        return own, source

    def _untied(self) -> Source | None:
        """The embedding of a tied base, whose head then becomes its own."""
        base = self._base
        embeddings = [name for name in base.tensors if name.endswith(EMBEDDINGS)]
        if len(embeddings) != 1 or not ties.is_tied(base.config):
            return None
        self.config |= ties.untied(base.config)
        return base.tensors[embeddings[0]]

    def _replace(self, name: str, stored: str) -> None:
        own, source = self._source(name)
        given = self._adapter.tensors[stored]
        if source is None:
            own, source = self._required(name)
        rows_alone = given.shape[1:] == source.shape[1:] and len(given.shape) == 2
        if given.shape != source.shape and not rows_alone:
            raise self._adapter.flaw(
                stored,
                f"has shape {list(given.shape)}, the base's {shown(own)} "
                f"{list(source.shape)}",
            )
        if given.shape != source.shape:
            self.config |= side_files.size_changes(
                self._base.config or {}, given.shape[0], source.shape[0]
            )
        self.tensors[own] = Replaced(given, source, self._place)

    def _change(self, module: Module) -> None:
        name, source = self._required(f"{module.name}.weight")
        if source.dtype.kind != "float":
            raise self._adapter.flaw(
                module.name,
                f"changes {shown(name)}, which is {source.dtype.code} in "
                f"{self._base.name}: the weights of a quantised model have to be "
                "dequantised first",
            )
        tensors, config = self._adapter.tensors, self._adapter.config
        if "rows" in module.tensors:
            self._rows(module, name, source)
        if "bias" in module.tensors:
            bias, own = self._required(f"{module.name}.bias")
            change = tensors[module.tensors["bias"]]
            self._check(module.tensors["bias"], change.shape, own.shape)
            scaling = config.scaling(module.name)
            self.tensors[bias] = Shifted(own, change, scaling, self._place)
        if "a" not in module.tensors and "b" not in module.tensors:
            return
        a, b = self._adapter.factors(module)
        transposed = module.embedding or self._transposed(name, source, a, b)
        left, right = (a, b) if transposed else (b, a)
        self._check(module.name, (left.rows, right.rows), _matrix(source.shape))
        magnitude = None
        if config.dora:
            if "magnitude" not in module.tensors:
                raise self._adapter.flaw(module.name, "has no lora_magnitude_vector")
            magnitude = tensors[module.tensors["magnitude"]]
            outputs = math.prod(magnitude.shape)
            self._check(module.tensors["magnitude"], (outputs,), (b.rows,))
        self._ranks.append(a.rank)
        size = 16 * KEPT * right.rows * right.rank  # two limbs of float64
        self.cache_bytes = max(self.cache_bytes, size)
        self.tensors[name] = Adapted(
            source,
            left,
            right,
            config.scaling(module.name),
            self._place,
            self._limbs,
            magnitude,
            transposed,
        )

    def _rows(self, module: Module, name: str, source: Source) -> None:
        stored = module.tensors["rows"]
        rows, places = (
            self._adapter.tensors[stored],
            self._adapter.config.tokens(module.name),
        )
        self._check(stored, rows.shape, (len(places), *source.shape[1:]))
        if any(not 0 <= place < source.shape[0] for place in places):
            raise self._adapter.config.wrong(
                "trainable_token_indices", max(places), f"{name} has fewer rows"
            )
        self.tensors[name] = WithRows(source, rows, places, self._place)

    def _transposed(self, name: str, source: Source, a: Factor, b: Factor) -> bool:
        """Whether a weight is stored (in, out), as GPT-2's Conv1D does.

        The shapes say so, or those of another layer of its name; where all are square,
        fan_in_fan_out.
        """
        if a.rows != b.rows:
            return _matrix(source.shape) == (a.rows, b.rows)
        return conv1d(name, self._base.tensors, self._adapter.config.transposed)

    def _check(
        self, name: str, found: tuple[int, ...], needed: tuple[int, ...]
    ) -> None:
        if found != needed:
            raise self._adapter.flaw(
                name,
                f"is for a weight of shape {list(found)}, {self._base.name} has "
                f"{list(needed)}; give the base that the adapter was trained on",
            )


def _has_words(folder: Location) -> bool:
    return any(exists(folder / name) for name in side_files.VOCABULARY_FILES)


def conv1d(name: str, tensors: Mapping[str, Source], otherwise: bool) -> bool:
    """Whether a square weight is stored (in, out): as layers of its kind are that have
    a bias and are not square."""
    if name.rpartition(".")[0].rpartition(".")[2] not in (
        "c_attn",
        "c_fc",
        "c_proj",
        "q_attn",
    ):
        return otherwise
    for other, source in tensors.items():
        bias = tensors.get(f"{other.removesuffix('weight')}bias")
        kind = other.removesuffix(".weight").rpartition(".")[2]
        if kind.startswith("c_") and bias is not None and len(source.shape) == 2:
            rows, columns = source.shape
            if rows != columns:
                return bias.shape == (columns,)
    return otherwise


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1], math.prod(shape[1:])) if len(shape) > 1 else shape


def _renaming(
    names: list[str], base: Checkpoint, adapter: Adapter
) -> Callable[[str], str]:
    """From the adapter's names to the base's: what stands in front of all of them in
    the one, and not in the other, is put there or taken away.

    Raises:
      CheckpointError: naming tensors that the base has not.
    """
    if not names:
        raise CheckpointError(
            f"{adapter.file.path}: holds no tensor that {peft.CONFIG} targets"
        )
    # The head is outside of what such a prefix stands for, and may be tied.
    inner = [name for name in names if not name.startswith(f"{HEAD}.")]
    missing = [name for name in inner if name not in base.tensors]
    if not missing:
        return lambda name: name
    probe = missing[0]
    more = {n.removesuffix(probe) for n in base.tensors if n.endswith(f".{probe}")}
    less = {probe.removesuffix(n) for n in base.tensors if probe.endswith(f".{n}")}
    fitting = [
        (cut, put)
        for cut, put in sorted([*(("", own) for own in more), *((o, "") for o in less)])
        if all(n.startswith(cut) and put + n[len(cut) :] in base.tensors for n in inner)
    ]
    if len(fitting) != 1:
        few = ", ".join(map(shown, missing[:3]))
        raise CheckpointError(
            f"{adapter.name}: changes {len(missing)} tensors that {base.name} does not "
            f"have: {few}; give the base that the adapter was trained on"
        )
    ((cut, put),) = fitting

    def renamed(name: str) -> str:
        return name if name in base.tensors else put + name.removeprefix(cut)

    return lambda name: name if name.startswith(f"{HEAD}.") else renamed(name)


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].partition("@")[0]
