"""A PEFT adapter (LoRA): adapter_config.json, and what its tensors' names mean.

    base_model.model.MODULE.lora_A.weight            (r, in, ...)   B·A changes MODULE
    base_model.model.MODULE.lora_B.weight            (out, r, ...)
    base_model.model.MODULE.lora_embedding_A, _B     (r, V), (H, r)
    base_model.model.MODULE.lora_magnitude_vector    (out,)         DoRA's
    base_model.model.MODULE.lora_B.bias              (out,)         lora_bias
    base_model.model.MODULE.token_adapter.trainable_tokens_delta   (tokens, H) new rows
    base_model.model.NAME                     saved whole: modules_to_save, biases
    base_model.model.NAME.original_module     as it was before: passed over

A module's rank is `r`, its scaling alpha / r, with use_rslora alpha / √r; the first key
of rank_pattern and alpha_pattern that matches its name (a regular expression, of the
whole name or of its end behind a dot) stands before `r` and `lora_alpha`. These are
PEFT's rules, and `targets` is which modules it would have given an adapter.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.places.files import Location, inside, read_small

CONFIG, WEIGHTS, PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
PREFIX = "base_model.model."
_MAX_CONFIG = 8_000_000  # bytes
_MAX_PATTERN = 2_000  # characters of a regular expression that others wrote
_MAX_RANK = 1 << 20
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}
_PART_NAME = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")
_ADAPTER_NAME = re.compile(r"\.default(?=(\.weight|\.bias)?$)")  # in raw state dicts
# Fields that change nothing of what the tensors are, once they are trained.
_WITHOUT_EFFECT = """
    auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying
    eva_config inference_mode loftq_config lora_dropout lora_ga_config megatron_core
    modules_to_save peft_type peft_version qalora_group_size revision runtime_config
    task_type
"""
_READ = """
    alpha_pattern exclude_modules fan_in_fan_out init_lora_weights layers_pattern
    layers_to_transform lora_alpha lora_bias r rank_pattern target_modules
    trainable_token_indices use_dora use_rslora
"""
# They change the base's weights when the adapter is put on.
_ALTERING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclasses.dataclass(frozen=True)
class Module:
    """The tensors of an adapter that belong to one module, by their part's name.

    Attributes:
      name: of the module.
      tensors: the full names of ``a``, ``b``, ``bias``, ``magnitude`` and ``rows``.
      embedding: `a` and `b` are those of an embedding.
    """

    name: str
    tensors: Mapping[str, str]
    embedding: bool


class AdapterConfig:
    """adapter_config.json, checked.

    Attributes:
      base: what the adapter was made for, with its revision; None where it is not said.
      dora: whether modules have DoRA's magnitudes.
      transposed: fan_in_fan_out: square weights are stored (in, out).
    """

    def __init__(self, fields: Mapping[str, Any], file: str):
        """Takes the fields; `file` is their name in errors.

        Raises:
          CheckpointError: a field is wrong, or changes what cannot be merged.
        """
        self._fields, self._file = fields, file
        self._check_kind()
        self.dora = self._flag("use_dora")
        self.transposed = self._flag("fan_in_fan_out")
        self._stabilised = self._flag("use_rslora")
        self._rank = self._count("r", fields.get("r", 8))
        self._alpha = self._number("lora_alpha", fields.get("lora_alpha", 8))
        self._ranks = {
            key: self._count(f"rank_pattern.{key}", own)
            for key, own in self._mapping("rank_pattern").items()
        }
        self._alphas = {
            key: self._number(f"alpha_pattern.{key}", own)
            for key, own in self._mapping("alpha_pattern").items()
        }
        for key in (*self._ranks, *self._alphas):
            self._pattern(key, "rank_pattern or alpha_pattern")
        for field in ("target_modules", "exclude_modules"):
            if isinstance(fields.get(field), str):
                self._pattern(fields[field], field)
        self._layers = self._layer_numbers()

    @property
    def base(self) -> str | None:
        name, revision = (
            self._fields.get(field) for field in ("base_model_name_or_path", "revision")
        )
        if not isinstance(name, str) or not name:
            return None
        pinned = isinstance(revision, str) and revision and "@" not in name
        return f"{name}@{revision}" if pinned and "/" in name else name

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        return tuple(_words(self._fields.get("modules_to_save")))

    @property
    def task(self) -> str | None:
        task = self._fields.get("task_type")
        return task if isinstance(task, str) else None

    def rank(self, module: str) -> int:
        return _matching(self._ranks, module, self._rank)

    def scaling(self, module: str) -> float:
        rank, alpha = self.rank(module), _matching(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self._stabilised else rank)

    def tokens(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding that the adapter brings."""
        given = self._fields.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next(
                (own for key, own in given.items() if _ends(module, str(key))), None
            )
        if not isinstance(given, list) or not all(type(row) is int for row in given):
            raise self.wrong("trainable_token_indices", given, "needs a list of rows")
        return tuple(given)

    def targets(self, module: str) -> bool:
        """Whether PEFT gives this module an adapter."""
        excluded = self._fields.get("exclude_modules")
        if excluded and _selects(excluded, module):
            return False
        given = self._fields.get("target_modules")
        if given is None or given == "all-linear":
            return True
        if not _selects(given, module):
            return False
        if isinstance(given, str) or module in given or self._layers is None:
            return True
        return self._layer_of(module) in self._layers

    def wrong(self, field: str, value: object, why: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {field} = {shown(value)}: {why}")

    def _check_kind(self) -> None:
        kind = self._fields.get("peft_type", "LORA")
        if kind != "LORA":
            raise self.wrong("peft_type", kind, f"only LORA is read; {_MERGE_FIRST}")
        known = {*_WITHOUT_EFFECT.split(), *_READ.split()}
        for field, value in self._fields.items():
            if field not in known and value not in (None, False, [], {}, ""):
                why = f"an adapter with this field is not read; {_MERGE_FIRST}"
                raise self.wrong(shown(field)[1:-1], value, why)
        made = self._fields.get("init_lora_weights")
        if isinstance(made, str) and made.lower().startswith(_ALTERING):
            why = (
                "it goes with other weights than the base's own; save it with "
                "path_initial_model_for_weight_conversion, as PEFT's guide says"
            )
            raise self.wrong("init_lora_weights", made, why)

    def _flag(self, field: str) -> bool:
        value = self._fields.get(field) or False
        if not isinstance(value, bool):
            raise self.wrong(field, value, "needs true or false")
        return value

    def _count(self, field: str, value: Any) -> int:
        if type(value) is not int or not 0 < value <= _MAX_RANK:
            raise self.wrong(field, value, "needs a positive integer")
        return value

    def _number(self, field: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) < 1e30:
            raise self.wrong(field, value, "needs a number")
        return float(value)

    def _mapping(self, field: str) -> dict[str, Any]:
        value = self._fields.get(field) or {}
        if not isinstance(value, dict):
            raise self.wrong(field, value, "needs an object")
        return value

    def _pattern(self, pattern: str, field: str) -> None:
        try:
            if len(pattern) > _MAX_PATTERN:
                raise re.error(f"longer than {_MAX_PATTERN} characters")
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            why = f"no regular expression ({error})"
            raise self.wrong(field, pattern, why) from None

    def _layer_numbers(self) -> set[int] | None:
        given = self._fields.get("layers_to_transform")
        given = [given] if type(given) is int else given
        if not given:
            return None
        if not isinstance(given, list) or not all(type(own) is int for own in given):
            raise self.wrong("layers_to_transform", given, "needs numbers of layers")
        for pattern in _words(self._fields.get("layers_pattern")):
            self._pattern(pattern, "layers_pattern")
        return set(given)

    def _layer_of(self, module: str) -> int | None:
        patterns = _words(self._fields.get("layers_pattern"))
        forms = [rf"(?:^|.*?\.){own}\.(\d+)\." for own in patterns]
        for form in forms or [r".*?\.[^.]*\.(\d+)\."]:
            found = re.match(form, module)
            if found:
                return int(found[1])
        return None


_MERGE_FIRST = (
    "merge it into its base first, with peft: merge_and_unload() and "
    "save_pretrained(NEW_FOLDER)"
)


def read_config(folder: Location) -> AdapterConfig:
    """adapter_config.json of a folder."""
    path = inside(folder, CONFIG)
    content = read_small(path, _MAX_CONFIG)
    return AdapterConfig(load_json(content, str(path)), str(path))


def modules(names: Iterable[str]) -> tuple[list[Module], dict[str, str]]:
    """What the tensors of an adapter are, by their names.

    Returns:
      The modules that are changed, and the tensors that stand whole: the base's name
      of each, and its name here.
    """
    found: dict[str, dict[str, str]] = {}
    embeddings, others = set(), {}
    for name in names:
        if ".original_module." in name:  # what modules_to_save stands in the place of
            continue
        plain = _ADAPTER_NAME.sub("", name.removeprefix(PREFIX))
        part = _PART_NAME.fullmatch(plain)
        if part is None:
            for wrapper in ("base_layer", "modules_to_save"):
                plain = plain.replace(f".{wrapper}.", ".")
            others[plain] = name
            continue
        found.setdefault(part[1], {})[_PARTS[part[2]]] = name
        if part[2].startswith("lora_embedding"):
            embeddings.add(part[1])
    made = [Module(name, own, name in embeddings) for name, own in found.items()]
    return made, others


def _words(value: Any) -> list[str]:
    value = [value] if isinstance(value, str) and value else value
    return [own for own in value or () if isinstance(own, str)]


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _selects(given: Any, module: str) -> bool:
    """Whether a regular expression, or a list of names or ends of names, has it."""
    if isinstance(given, str):
        return re.fullmatch(given, module) is not None
    return any(_ends(module, own) for own in _words(given))


def _matching(values: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in values.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def shortest(chosen: Collection[str], modules: Collection[str]) -> list[str]:
    """Names that select these modules alone: the last parts of names where they do.

    Args:
      chosen: modules.
      modules: all that there are; what a last part would select beside stands in them.
    """
    names: dict[str, None] = {}
    for name in chosen:
        end = name.rpartition(".")[2]
        # PEFT looks for modules_to_save at the end of a name, be it within a word.
        alike = [own for own in modules if own.endswith(end)]
        names[end if alike and set(alike) <= set(chosen) else name] = None
    return sorted(names)
