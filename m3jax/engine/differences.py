"""What tells checkpoints apart beside their tensors: a line each, before a merge.

Tensors of equal names and shapes may belong to models that compute differently: another
rope, another number of heads, another end token, or a model that was never tuned from
this base. The output gets one of everything, so the user hears of what the others have.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from m3jax.checkpoints import side_files
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.source import Source, read
from m3jax.engine.inputs import TensorInputs

_MAX_JSON = 64_000_000  # bytes of a file that is looked into
# Fields of config.json that change nothing of what a model computes from its tensors,
# or of which something else speaks: vocabularies, ties, end tokens.
_SILENT = [
    "_*",
    "architectures",
    "auto_map",
    "*dtype",
    "dropout*",
    "*_dropout*",
    "*drop*",
    "*initializer*",
    "*init*",
    "*loss*",
    "output_*",
    "return_dict*",
    "use_return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "pretraining_tp",
    "use_cache",
    "gradient_checkpo*",
    "quantization_config",
    "transformers_version",
    "*name_or_path",
    "unsloth*",
    "*attn_impl*",
    "use_flash*",
    "torchscript",
    "vocab_size",
    "tie_word_embeddings",
    "*token_id",
    "*token_index",
    "num_nextn_predict_layers",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "text_config",
    "model_max_length",
    "*_mtp_*",
    "tokenizer_class",
    "max_length",
    "is_decoder",
]
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
_OTHERS = "; --tokenizer_from takes another model's"
_MISSING = object()
_SAMPLED = 6  # tensors
_ELEMENTS = 4096  # of each
_FEWEST = 512  # that say anything: the cosine of chance is about 1/√n
# Fine-tunes measure above 0.9 here, unrelated models of one architecture within 0.05.
_UNRELATED = 0.3


def found(
    checkpoints: Sequence[Checkpoint],
    tensors: Sequence[TensorInputs],
    tokenizer_from: Checkpoint,
    owners: Mapping[str, Location] | None = None,
    *,
    asked: bool = False,
    speaks: bool = True,
) -> list[str]:
    """The lines.

    Args:
      checkpoints: of the merge; the first gives config.json.
      tensors: what is made of them.
      tokenizer_from: gives the tokenizer, chat template and generation config.
      owners: the folders of the side files that go along, where they are others.
      asked: it was asked for.
      speaks: whether that is all there is to chat template and end tokens.
    """
    names = [own.name for own in checkpoints]
    flat = [effective(own.config or {}) for own in checkpoints]
    lines = []
    for field in sorted(set().union(*flat)):
        values = [own.get(field, _MISSING) for own in flat]
        line = _differ(f"config.json: {field}", names, values, names[0])
        lines += [line] if line else []
    whose = tokenizer_from.name
    folders = {own.folder: own.name for own in reversed(checkpoints)}

    def giver(file: str) -> str:
        folder = (owners or {}).get(file)
        return whose if folder is None else folders.get(folder, whose)

    generation = [_json(own.folder, GENERATION) for own in checkpoints]
    ends = [
        _ends(own.config or {}, more)
        for own, more in zip(checkpoints, generation, strict=True)
    ]
    templates = [_template(own) for own in checkpoints]
    talk = [
        _differ("the end token", names, ends, giver(GENERATION)),
        _differ("the chat template", names, templates, giver(TEMPLATE), text=_length),
    ]
    way_out = "" if asked else _OTHERS
    lines += [own + way_out for own in talk if own and speaks]
    keys = sorted(set().union(*(own or {} for own in generation)))
    for key in keys:
        if not any(fnmatch.fnmatch(key, own) for own in _SILENT):
            values = [(own or {}).get(key, _MISSING) for own in generation]
            what = f"{GENERATION}: {key}"
            lines += [_differ(what, names, values, giver(GENERATION))]
    lines += _of_modules(checkpoints)
    lines += unrelated(checkpoints, tensors)
    return [line for line in lines if line]


def _of_modules(checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """A line for each layer of sentence-transformers whose weights, which stand beside
    the model's and are copied, are others in another checkpoint."""
    first, *others = checkpoints
    for name in side_files.weights_of_modules(first.folder):
        own = side_files.read_side_file(first.folder, name)
        differ = [
            other.name
            for other in others
            if name in side_files.weights_of_modules(other.folder)
            and side_files.read_side_file(other.folder, name) != own
        ]
        if differ:
            yield (
                f"{name} is another in {', '.join(dict.fromkeys(differ))}; it is not "
                f"merged, the output has that of {first.name}"
            )


def effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that change what a model computes.

    Those of a `text_config` count as the model's own; those of other parts have dotted
    names. The forms of transformers 4 and 5 of a rope are made one.
    """
    text = config.get("text_config")
    whole = {**config, **(text if isinstance(text, dict) else {})}
    fields: dict[str, Any] = {}
    for key, value in whole.items():
        if any(fnmatch.fnmatch(key, own) for own in _SILENT):
            continue
        if isinstance(value, dict):
            fields |= {f"{key}.{n}": v for n, v in effective(value).items()}
        else:
            fields[key] = value
    return fields | _rope(whole)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, whichever form config.json has them in."""
    given = config.get("rope_parameters")
    parameters = given if isinstance(given, dict) else {}
    if any(isinstance(own, dict) for own in parameters.values()):
        return {"rope_parameters": parameters}
    scaling = config.get("rope_scaling")
    scaling = dict(scaling) if isinstance(scaling, dict) else dict(parameters)
    theta = scaling.pop("rope_theta", config.get("rope_theta", _MISSING))
    kind = scaling.pop("type", scaling.pop("rope_type", "default"))
    made = {} if theta is _MISSING else {"rope_theta": theta}
    if theta is not _MISSING or kind != "default":
        plain = kind in ("default", None)
        made["rope_scaling"] = None if plain else {"rope_type": kind, **scaling}
    return made


def unrelated(
    checkpoints: Sequence[Checkpoint], tensors: Sequence[TensorInputs]
) -> Iterator[str]:
    """A line for each model whose weights have nothing to do with the first's.

    The cosine of a sample: of tensors spread over the model, a run of elements from
    the middle of each.
    """
    first, *others = checkpoints
    weights = [
        tensor
        for tensor in tensors
        if tensor.merged and len(tensor.shape) > 1 and math.prod(tensor.shape) >= 64
    ]
    step = max(1, len(weights) // _SAMPLED)
    for model in others:
        sums = np.zeros(3)
        count = 0
        for tensor in weights[step // 2 :: step][:_SAMPLED]:
            own = next((o for o in tensor.models if o.owner is model), None)
            base = None if own is None else _source_of(first, tensor, own.name)
            if own is None or base is None or own.source.shape != base.shape:
                continue
            a, b = _sample(base), _sample(own.source)
            fine = np.isfinite(a) & np.isfinite(b)
            a, b = a[fine], b[fine]
            sums += a @ a, b @ b, a @ b
            count += len(a)
        norm = math.sqrt(sums[0]) * math.sqrt(sums[1])
        if count >= _FEWEST and norm and sums[2] / norm < _UNRELATED:
            yield (
                f"{model.name}: its weights have a cosine of {sums[2] / norm:.2f} with "
                f"{first.name}'s, in a sample; is it a fine-tune of that model?"
            )


def _source_of(
    checkpoint: Checkpoint, tensor: TensorInputs, name: str
) -> Source | None:
    """A checkpoint's tensor of that name; a layer may stand in another's place."""
    for origin in tensor.origins:
        if origin.owner is checkpoint and origin.name == name:
            return origin.source
    return checkpoint.tensors.get(name)


def _sample(source: Source) -> np.ndarray:
    """Elements from the middle of a tensor, float64, about their mean."""
    size = math.prod(source.shape)
    count = min(size, _ELEMENTS)
    wide = read(source, (size - count) // 2, count).astype(np.float64)
    finite = wide[np.isfinite(wide)]
    return wide - (finite.mean() if len(finite) else 0)


def _differ(
    what: str,
    names: Sequence[str],
    values: Sequence[Any],
    whose: str,
    text: Callable[[Any], str] = lambda value: shown(value, 60),
) -> str:
    """A line if the values that are there differ; "" if not."""
    groups: list[tuple[Any, list[str]]] = []
    for name, value in zip(names, values, strict=True):
        if value is _MISSING:
            continue
        for known, holders in groups:
            if (known == value and type(known) is type(value)) or _equal(known, value):
                holders.append(name)
                break
        else:
            groups.append((value, [name]))
    if len(groups) < 2:
        return ""
    each = "; ".join(
        f"{text(value)} in {', '.join(dict.fromkeys(own))}" for value, own in groups
    )
    return f"{what} is {each}; the output has that of {whose}"


def _equal(a: Any, b: Any) -> bool:
    """Whether two numbers are the same, an int and a float that is one included."""
    numbers = all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b)
    )
    return numbers and a == b


def _length(text: str | None) -> str:
    return "none" if text is None else f"one of {len(text)} characters"


def _ends(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Any:
    """The token ids at which a model ends, sorted; `_MISSING` where nothing says so."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    for own in (generation or {}, config, inner):
        ids = own.get("eos_token_id")
        if ids is not None:
            every = ids if isinstance(ids, list) else [ids]
            return sorted(i for i in every if isinstance(i, int))
    return _MISSING


def _template(checkpoint: Checkpoint) -> str | None:
    """The text of a checkpoint's chat template, wherever it stands."""
    folder = checkpoint.tokenizer_folder
    try:
        own = side_files.read_side_file(folder, TEMPLATE, _MAX_JSON)
    except CheckpointError:
        own = None
    if own is not None:
        return own.decode("utf-8", "replace").strip()
    for file in ("chat_template.json", "tokenizer_config.json"):
        found = (_json(folder, file) or {}).get("chat_template")
        if found:
            return str(found).strip()
    return None


def _json(folder: Location, name: str) -> dict[str, Any] | None:
    """A side file's content; None without one, or where it is not JSON."""
    try:
        content = side_files.read_side_file(folder, name, _MAX_JSON)
        if content is None:
            return None
        return load_json(content, name, constants=True)
    except CheckpointError:
        return None
