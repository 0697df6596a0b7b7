"""The files beside the tensors: configuration, tokenizer, chat template, code.

They are copied, up to a size limit, and never executed: from a fixed list of names;
what config.json and the tokenizer's and processor's configurations name (the code of
`auto_map` and what it imports from its folder, vocabulary files); the modules of
sentence-transformers; licences. A link that leads out of the folder is refused: a
downloaded model could otherwise have a private file of its user's published with the
merge.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats.json_text import BOM, load_json
from m3jax.checkpoints.names import is_plain_name
from m3jax.checkpoints.places.files import (
    Location,
    exists,
    inside,
    open_small,
    read_small,
)

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODULES = "modules.json"
VOCABULARY_FILES = (  # a tokenizer has at least one of them
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "target.spm",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
)
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TEMPLATES_FOLDER = "additional_chat_templates"
OF_TOKENIZER = (
    *VOCABULARY_FILES,
    "added_tokens.json",
    "bpe.codes",
    "entity_vocab.json",
    "merges.txt",
    "normalizer.json",
    "special_tokens_map.json",
    "target_vocab.json",
    TOKENIZER_CONFIG,
)
_OF_PROCESSOR = (
    "audio_processor_config.json",
    "feature_extractor_config.json",
    "image_processor_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
TOKENIZER_FILES = (*OF_TOKENIZER, *CHAT_TEMPLATES, *_OF_PROCESSOR)
SENTENCES = (
    MODULES,
    "config_sentence_transformers.json",
    "router_config.json",
    "sentence_bert_config.json",
)
SIDE_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES, *SENTENCES)
LICENCE = re.compile(
    r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-][\w.-]{1,60})?", re.IGNORECASE
)
# Of the hub's repositories, beside those.
PATTERNS = ("*.py", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_AUTO_MAP = "auto_map"
_IMPORT = re.compile(rb"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+))", re.M)
_MODULE_FILES = (".json", ".safetensors", ".bin", ".txt", ".model")
_MAX_CODE = 4_000_000  # bytes of a file of Python
_MENDED = ("generation_config.json",)  # or left out, with a note
_MAX_CHECKED = 4_000_000  # bytes of a file that is looked through before a merge
_FEW = 200  # files that one folder names
MAX_SIDE_FILE = 256_000_000  # bytes; the largest tokenizers are a tenth of it
MAX_MODULE = 1_000_000_000  # bytes; the weights of a layer behind an encoder
_MAX_CONFIG = 8_000_000  # bytes; the longest lists of labels take an eighth of it


def names_of(folder: Location) -> list[str]:
    """The names of a folder's side files, in order; "a/b" for b in its folder a.

    Raises:
      CheckpointError: one that names others cannot be read.
    """
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    found = {name for name in SIDE_FILES if exists(folder / name)}
    found |= {name for name in present if LICENCE.fullmatch(name)}
    found |= {name for name in present if name.endswith(".tiktoken")}
    for config in (CONFIG, TOKENIZER_CONFIG, *_OF_PROCESSOR):
        if config in found:
            found |= _named(folder, config) & present
    found |= _imported(folder, found, present)
    if _TEMPLATES_FOLDER in present:
        found |= _within(folder, _TEMPLATES_FOLDER, (".jinja",))
    if MODULES in found:
        for module in _modules(folder):
            if module in present:
                found |= _within(folder, module, _MODULE_FILES)
    return sorted(found)


def weights_of_modules(folder: Location) -> list[str]:
    """The weights of sentence-transformers' layers behind the encoder, "a/b" each."""
    if not folder.is_dir() or not exists(folder / MODULES):
        return []
    return [
        name
        for name in names_of(folder)
        if "/" in name and name.endswith((".safetensors", ".bin"))
    ]


def check_side_files(owners: Mapping[str, Location]) -> None:
    """Checks that side files can be read, before something long begins.

    Args:
      owners: the folder of each, by name.

    Raises:
      CheckpointError: one is no regular file of the folder, larger than the limit, or
        no JSON where its name says so.
    """
    for name, folder in owners.items():
        with open_small(inside(folder, name), _limit(name)) as file:
            plain = name.endswith(".json") and name not in _MENDED
            if plain and file.size <= _MAX_CHECKED:
                _parsed(file.read(0, file.size), str(folder / name))


def _parsed(content: bytes, what: str) -> Any:
    try:
        return json.loads(content.removeprefix(BOM))
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{what}: is not valid JSON; fetch it again, or mend it"
        ) from None


def read_side_file(
    folder: Location, name: str, limit: int | None = None
) -> bytes | None:
    """The content of a side file, or None where the folder has none.

    A byte order mark before JSON is left out: loaders refuse it.

    Raises:
      CheckpointError: it is no regular file of the folder, or larger than `limit`.
    """
    if "/" not in name and not exists(folder / name):
        return None
    content = read_small(inside(folder, name), limit or _limit(name))
    return content.removeprefix(BOM) if name.endswith(".json") else content


def belongs_to_model(name: str) -> bool:
    """Whether a side file is the model's rather than the tokenizer's.

    Where another model's tokenizer goes along, those of the model stay.
    """
    own = name == CONFIG or name in SENTENCES or name.endswith(".py")
    return own or "/" in name or LICENCE.fullmatch(name) is not None


def _limit(name: str) -> int:
    """Bytes of a side file at most; a module of sentence-transformers has weights."""
    return MAX_MODULE if "/" in name else MAX_SIDE_FILE


def _named(folder: Location, config: str) -> set[str]:
    """What the configuration names: files of code and of the vocabulary."""
    fields = _fields(folder, config)
    code: list[Any] = [fields.get(_AUTO_MAP)]
    found = {
        value
        for key, value in fields.items()
        if isinstance(key, str) and key.endswith("_file") and is_plain_name(value)
    }
    while code and len(found) < _FEW:
        value = code.pop()
        if isinstance(value, dict):
            code += list(value.values())[:_FEW]
        elif isinstance(value, list):
            code += value[:_FEW]
        elif isinstance(value, str) and "--" not in value:  # those are another's
            module = f"{value.rpartition('.')[0]}.py"
            found |= {module} if is_plain_name(module) else set()
    return found


def _imported(folder: Location, found: set[str], present: set[str]) -> set[str]:
    """The files of code that those found import from their own folder, and so on."""
    seen: set[str] = set()
    left = [name for name in found if name.endswith(".py")]
    while left and len(seen) < _FEW:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        text = read_small(inside(folder, name), _MAX_CODE)
        for pair in _IMPORT.findall(text):
            module = f"{b''.join(pair).decode(errors='replace')}.py"
            if module in present:
                left.append(module)
    return seen


def _modules(folder: Location) -> list[str]:
    """The folders of sentence-transformers' modules."""
    content = read_side_file(folder, MODULES, _MAX_CONFIG) or b"[]"
    modules = _parsed(content, str(folder / MODULES))
    listed = modules if isinstance(modules, list) else []
    paths: list[Any] = [m.get("path") for m in listed if isinstance(m, dict)][:_FEW]
    return [path for path in paths if is_plain_name(path)]


def _within(folder: Location, inner: str, suffixes: tuple[str, ...]) -> set[str]:
    if not (folder / inner).is_dir():
        return set()
    names = sorted(path.name for path in (folder / inner).iterdir())[:_FEW]
    return {f"{inner}/{name}" for name in names if name.endswith(suffixes)}


def _fields(folder: Location, name: str) -> dict[str, Any]:
    content = read_side_file(folder, name, _MAX_CONFIG)
    try:
        return load_json(content or b"{}", str(folder / name), constants=True)
    except CheckpointError:
        return {}  # whoever needs it says so


def read_config(folder: Location) -> dict[str, Any] | None:
    """config.json as a dict, or None where there is none."""
    content = read_side_file(folder, CONFIG, _MAX_CONFIG)
    if content is None:
        return None
    # State-space models' time_step_limit is written as [0.0, Infinity].
    try:
        return load_json(content, str(folder / CONFIG), constants=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; fetch it again, or mend it") from None


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other fields: their dotted names and values, None to remove."""
    made = copy.deepcopy(dict(config))
    for name, value in changes.items():
        *path, field = name.split(".")
        fields = functools.reduce(lambda own, key: own.setdefault(key, {}), path, made)
        fields.pop(field, None) if value is None else fields.update({field: value})
    return made


def as_json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def sizes(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Where config.json has a vocab_size, nested ones too: dotted name and value."""
    for name, own in config.items():
        if isinstance(own, dict):
            yield from sizes(own, f"{prefix}{name}.")
        elif name == "vocab_size":
            yield prefix + name, own


def size_changes(config: Mapping[str, Any], rows: int, before: int) -> dict[str, int]:
    """Changes to config.json for another number of rows than there was."""
    found = list(sizes(config))
    named = [name for name, size in found if size == before]
    if not named:  # it never fitted, or stands nowhere: where a loader looks first
        nested = [name for name, _ in found if "." in name]
        top = "vocab_size" in config or not nested
        named = ["vocab_size"] if top else nested[:1]
    of_name = dict(found)
    return {name: rows for name in named if of_name.get(name) != rows}
