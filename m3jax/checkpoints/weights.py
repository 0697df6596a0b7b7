"""Which files of a folder hold its tensors, by their names alone.

The first of these that the folder has, as in transformers: safetensors, PyTorch's
pickles, Flax's msgpack, GGUF. Of each format first the one whole file that transformers
writes, then the index and its shards, then a complete set of shards without its index,
then a single file of any name. What trainers leave beside a model (`optimizer.pt`,
`training_args.bin`, ...) is never taken for one.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from typing import NoReturn

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats import torch_file
from m3jax.checkpoints.formats.index import read_index
from m3jax.checkpoints.places.files import Location, exists, inside

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What the files of a model are called in transformers, and in diffusers.
STEMS = ("model", "diffusion_pytorch_model")
SAFETENSORS, TORCH, MSGPACK, GGUF = "safetensors", "torch", "msgpack", "gguf"
# For each format, the file that transformers writes, and how names may end.
_FORMS = {
    SAFETENSORS: (WEIGHTS, (".safetensors",)),
    TORCH: ("pytorch_model.bin", torch_file.SUFFIXES),
    MSGPACK: ("flax_model.msgpack", (".msgpack",)),
    GGUF: ("model.gguf", (".gguf",)),
}
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_INDEX_END = ".index.json"
_PIPELINE = "model_index.json"
_FEW = 100  # folders that are looked into
_OTHER_FORMATS = (".ggml", ".h5", ".npz", ".onnx", ".tflite")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<place>\d{5,9})-of-(?P<count>\d{5,9})\.\w+")
_NO_MODEL = re.compile(
    r"(adapter_model|global_step|mp_rank|optimizer|random_states|rng_state|scaler"
    r"|scheduler|trainer_state|training_args|zero_pp_rank)\b.*|.*_(mp|pp)_rank_.*"
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The files that hold a checkpoint's tensors.

    Attributes:
      format: one of those above.
      paths: of the files.
      index: the path of the index, None without one.
      weight_map: what the index says, the file of each tensor.
      notes: what is done that a user may not expect, one line each.
    """

    format: str
    paths: tuple[Location, ...]
    index: Location | None = None
    weight_map: dict[str, str] | None = None
    notes: tuple[str, ...] = ()


def find(folder: Location) -> Weights:
    """The files of a folder that hold its tensors.

    Raises:
      CheckpointError: it has none that can be read, or it is not clear which.
    """
    present = sorted(path.name for path in folder.iterdir())
    visible = [name for name in present if not name.startswith(".")]
    for form, (whole, suffixes) in _FORMS.items():
        names = [n for n in visible if n.endswith(suffixes) and not _NO_MODEL.match(n)]
        indexes = [n for n in visible if n.endswith(f"{suffixes[0]}.index.json")]
        if exists(folder / whole):
            return Weights(form, (inside(folder, whole),))
        own = f"{whole}.index.json"
        if exists(folder / own) or len(indexes) == 1:
            return _by_index(folder, form, own if own in present else indexes[0])
        if not names:
            continue
        found = _set(folder, form, names, whole.partition(".")[0])
        if found is not None:
            return found
        if len(names) == 1:
            return Weights(form, (inside(folder, names[0]),))
        _refuse_several(folder, names, whole)
    raise CheckpointError(f"{folder}: {_nothing(present) or _elsewhere(folder)}")


def any_of(folder: Location) -> bool:
    """Whether a folder holds weights of a model, whole or not."""
    names = [path.name for path in folder.iterdir()]
    return any(
        name.endswith(suffixes) and not _NO_MODEL.match(name) and name[0] != "."
        for name in names
        for _, suffixes in _FORMS.values()
    )


def of_file(path: Location, *, whole: bool) -> Weights:
    """What a single file stands for: an index, the shards that it names.

    Raises:
      CheckpointError: it is one shard of several, where it has to be a `whole` model.
    """
    if path.name.endswith(_INDEX_END):
        model = path.parent / path.name.removesuffix(_INDEX_END)
        return _by_index(path.parent, format_of(model), path.name)
    form, shard = format_of(path), _SHARD.fullmatch(path.name)
    if whole and form != GGUF and shard is not None and int(shard["count"]) > 1:
        raise CheckpointError(
            f"{path}: is one of {int(shard['count'])} shards of a model; give the "
            f"folder, {path.parent}"
        )
    return Weights(form, (path,))


def format_of(path: Location) -> str:
    """The format of a single file, by its name; safetensors where it says nothing.

    Raises:
      CheckpointError: it is of a format that is not read.
    """
    for form, (_, suffixes) in _FORMS.items():
        if path.name.endswith(suffixes):
            return form
    if path.name.endswith(_OTHER_FORMATS):
        raise CheckpointError(f"{path}: another format; {_HOW_TO_CONVERT}")
    return SAFETENSORS


def _by_index(folder: Location, form: str, name: str) -> Weights:
    index = inside(folder, name)
    weight_map = read_index(index)
    files = sorted(set(weight_map.values()))
    paths = tuple(inside(folder, file) for file in files)
    return Weights(form, paths, index, weight_map)


def _set(folder: Location, form: str, names: list[str], stem: str) -> Weights | None:
    """A complete set of shards, None where no name is one of a set's."""
    sets: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for name in names:
        shard = _SHARD.fullmatch(name)
        if shard is not None:
            key = shard["stem"], int(shard["count"])
            sets[key][int(shard["place"])] = name
    if not sets:
        return None
    ours = {key: own for key, own in sets.items() if key[0] == stem} or sets
    whole = {
        key: own for key, own in ours.items() if set(own) == {*_places(key[1], own)}
    }
    if len(whole) != 1:
        (first, count), own = next(iter(ours.items()))
        missing = next((i for i in range(1, count + 1) if i not in own), None)
        if len(ours) > 1 or missing is None:
            raise CheckpointError(
                f"{folder}: holds {len(ours)} sets of shards and no index, such as "
                f"{shown(min(own.values()))}; remove all but one of them"
            )
        suffix = min(own.values()).rpartition(".")[2]
        raise CheckpointError(
            f"{folder}: shard '{first}-{missing:05d}-of-{count:05d}.{suffix}' is "
            f"missing, {len(own)} of {count} are there; download it again"
        )
    ((first, count), own) = next(iter(whole.items()))
    paths = tuple(inside(folder, own[place]) for place in sorted(own))
    note = f"{folder}: no index; its complete set of {count} shards is read"
    return Weights(form, paths, notes=(note,))


def _places(count: int, own: dict[int, str]) -> range:
    """1 to `count`, or nothing that a set could have where there are too few names."""
    return range(1, count + 1) if len(own) == count else range(0)


def _refuse_several(folder: Location, names: list[str], whole: str) -> NoReturn:
    few = ", ".join([*map(shown, names[:3]), "…"][: len(names)])
    suffix = whole.rpartition(".")[2]
    raise CheckpointError(
        f"{folder}: {len(names)} {suffix} files ({few}) and neither {whole} nor "
        f"{whole}.index.json; give one file, as {folder / names[0]}"
        f"{', or add the index' * (suffix != GGUF)}"
    )


def _nothing(present: list[str]) -> str:
    """What these files are instead of a model's, and the way out; "" if unknown."""
    config, *tensors = ADAPTERS
    if set(present) & set(ADAPTERS):
        missing = tensors[0] if config in present else config
        return f"holds an adapter (LoRA) and has no {missing}; fetch it again"
    for name in present:
        if name.endswith(_OTHER_FORMATS):
            return f"weights in another format ({shown(name)}); {_HOW_TO_CONVERT}"
        if name.endswith(".distcp"):
            return (
                "a distributed checkpoint of PyTorch; make one file of it: python -m "
                "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.bin"
            )
        if re.fullmatch(r"(bf16_)?zero_pp_rank_.*|zero_to_fp32\.py", name):
            return (
                "a checkpoint of DeepSpeed's ZeRO, in parts; its zero_to_fp32.py makes "
                "a model of it"
            )
    return ""


def _elsewhere(folder: Location) -> str:
    """What is wrong with a folder without weights, and where there are some."""
    inner = [path for path in folder.iterdir() if path.is_dir()][:_FEW]
    inner += [
        own for path in inner if path.name == "snapshots" for own in path.iterdir()
    ]
    held = [path for path in inner if path.name[0] != "." and any_of(path)]
    if not held:
        return (
            f"neither {WEIGHTS} nor {INDEX}; give the folder of a model in Hugging "
            "Face's format, or fetch it again if its download was interrupted"
        )
    held.sort(key=lambda path: (len(path.name), path.name))
    names = [str(path)[len(str(folder)) + 1 :] for path in held]
    few = ", ".join([*map(shown, names[:3]), "…"][: len(names)])
    pipeline = exists(folder / _PIPELINE)
    what = "a pipeline of diffusers, whose parts are" if pipeline else "no weights, but"
    return (
        f"{what} in {few}; give {'each' if pipeline else 'one'} of them by itself, as "
        f"{held[-1]}"
    )


_HOW_TO_CONVERT = (
    "convert them to safetensors where they were made, or give the same model as "
    "safetensors or .bin"
)
