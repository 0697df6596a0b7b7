"""From what a user typed to a folder or file on this machine."""

from __future__ import annotations

import glob
import logging
import os
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.places import store
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.side_files import PATTERNS as SIDE_PATTERNS
from m3jax.checkpoints.side_files import SIDE_FILES

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_ADDRESS = re.compile(  # as a browser shows it
    r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)(?:/tree/([\w./-]+?))?/?"
)
# What the hub allows: at most 96 characters, no -- and no .. among them.
_REPOSITORY = re.compile(
    r"(?=.{3,96}$)(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*/[\w.-]*[A-Za-z0-9_](?<!\.git)",
    re.A,
)
# What a merge writes beside those: its record and its model card, for `verify`.
RECORD_FILES = ("m3jax.json", "README.md")
_BESIDE = (*SIDE_FILES, *RECORD_FILES, *SIDE_PATTERNS, "adapter_config.json")
_PATTERNS = ["*.safetensors", "*.safetensors.index.json", *_BESIDE]
_FORMATS = (
    (".safetensors", ".safetensors.index.json"),
    (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"),
    (".msgpack", ".msgpack.index.json"),
    (".gguf",),
)
_MAKERS = re.compile(r"consolidated")  # the same weights once more, as their maker has
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5}\.gguf)")  # of a split file
_NO_MODEL = re.compile(r"optimizer|scheduler|rng_state|training_args|scaler")
# Modules of sentence-transformers, and more chat templates.
_INNER = re.compile(r"(\d+_\w+/[\w.-]+\.(json|safetensors|bin|txt)|[\w]+/\w+\.jinja)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 10.0  # seconds; a server that does not answer would keep us for ever
# What `huggingface_hub`'s errors, or their base classes, mean for the user.
_HINTS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it, or fetch it elsewhere",
    "IncompleteSnapshotError": "the cache holds only a part of it, and the rest cannot "
    "be fetched now: connect to the network",
    "GatedRepoError": "accept its terms on huggingface.co and run `hf auth login`",
    "RevisionNotFoundError": "it has no such revision",
    "RepositoryNotFoundError": "there is no such model, or it is private: check the "
    "name, or run `hf auth login`",
    "HFValidationError": "it is no name of a model",
}


def is_here(path: str) -> bool:
    """Whether a file or folder of this machine has exactly this name."""
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111


def repository(name: str) -> str | None:
    """The hub's repository that a name stands for; None for a path of any kind."""
    found = _ADDRESS.fullmatch(name) or _HUB_ID.fullmatch(name)
    repo = found[1] if found and not is_here(name) else ""
    return repo if may_be_repository(repo) else None


def may_be_repository(name: str) -> bool:
    """Whether the hub allows ``org/name`` as the name of a repository."""
    return _REPOSITORY.fullmatch(name) is not None


def locate(path: str) -> tuple[Location, str | None]:
    """A path or URL, or a Hugging Face id ``org/name`` or ``org/name@revision``.

    What the Hugging Face cache holds is used without a network.

    Returns:
      The folder (or file), and the commit of a Hugging Face repository.

    Raises:
      CheckpointError: one line, if there is no such thing or it cannot be fetched.
    """
    if address := _ADDRESS.fullmatch(path):
        path = "@".join(filter(None, address.groups()))
    location = store.parse(path)
    if isinstance(location, store.StorePath):
        return store.locate(location), None
    # Path's own methods raise where there is no such user, or too long a name.
    local = os.path.expanduser(location if path else "")  # noqa: PTH111
    if os.path.exists(local):  # noqa: PTH110
        return Path(local), None
    hub_id = _HUB_ID.fullmatch(path)
    if hub_id is None or path.startswith((".", "-")) or ".." in path:
        raise CheckpointError(
            f"{path}: no such file or folder; give a folder, a safetensors file, or a "
            "Hugging Face id (org/name or org/name@revision)"
        )
    try:
        folder = _snapshot(hub_id["repo"], hub_id["revision"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # the library raises a dozen unrelated types
        raise CheckpointError(
            f"{path}: no such folder here, and Hugging Face's {hub_id['repo']} is "
            f"neither in the cache nor to be fetched: {_reason(error)}"
        ) from None
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else None


def _snapshot(repo: str, revision: str | None) -> Path:
    """The cached files of a repository, completed from the network if there is one."""
    # Imported here: it takes a third of a second, and most merges are local.
    from huggingface_hub import HfApi, snapshot_download

    quiet()

    def download(wanted: list[str], *, local_files_only: bool) -> Path:
        folder = snapshot_download(
            repo,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=wanted,
            # Folders, and the same weights once more in the format of their maker.
            ignore_patterns=["*/*", "consolidated*"] if local_files_only else None,
        )
        return Path(folder)

    try:
        # `snapshot_download` asks the same, but waits for the answer without limit.
        found = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
    except Exception as unreachable:
        try:
            return download(_PATTERNS, local_files_only=True)
        except Exception as missing:
            partial = is_one_of(missing, "IncompleteSnapshotError")
            raise (missing if partial else unreachable) from None
    names = wanted_of([file.rfilename for file in found.siblings or ()])
    _log.info("fetching what the cache lacks of Hugging Face's %s", repo)
    return download(list(map(glob.escape, names)), local_files_only=False)


def wanted_of(names: list[str]) -> list[str]:
    """What of a repository's files a merge can need.

    The tensors in the first format of those that are read, as `weights.find` takes it;
    of GGUF, which comes in many quantisations, only where there is one file, or the
    parts of one.

    Raises:
      CheckpointError: there are several files of GGUF and nothing else.
    """
    top = [name for name in names if "/" not in name and not _MAKERS.match(name)]
    side = [name for name in top if any(fnmatch(name, own) for own in _BESIDE)]
    side += [name for name in names if _INNER.fullmatch(name)]
    for suffixes in _FORMATS:
        tensors = [n for n in top if n.endswith(suffixes) and not _NO_MODEL.match(n)]
        sets = {m.groups() if (m := _PART.fullmatch(n)) else n for n in tensors}
        if suffixes == (".gguf",) and len(sets) > 1:
            raise CheckpointError(
                f"holds {len(tensors)} files of GGUF, such as {shown(tensors[0])}, and "
                "no other tensors; download one of them and give its path"
            )
        if tensors:
            return [*tensors, *side]
    return side


def quiet() -> None:
    """Has `huggingface_hub` say by exceptions alone what goes wrong.

    Its progress bars are for terminals; in a file each of their steps is a line.
    """
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    if not sys.stderr.isatty():
        disable_progress_bars()
    hub_logging.set_verbosity_error()
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def is_one_of(error: Exception, *names: str) -> bool:
    """Whether an error, or a base class of it, has one of these names.

    Importing the classes would be importing the library.
    """
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _reason(error: Exception) -> str:
    for kind in type(error).__mro__:
        if kind.__name__ in _HINTS:
            return _HINTS[kind.__name__]
    first_line = str(error).strip().split("\n")[0]
    return (
        f"check the network ({type(error).__name__}: {shown(first_line, limit=200)}), "
        "or give a local folder"
    )
