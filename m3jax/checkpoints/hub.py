"""From what a user typed to a folder or file on this machine."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.side_files import SIDE_FILES

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# What a merge writes beside those: its record and its model card, for `verify`.
RECORD_FILES = ("m3jax.json", "README.md")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate(path: str) -> tuple[Path, str | None]:
    """A local path, or a Hugging Face id ``org/name`` or ``org/name@revision``.

    What the Hugging Face cache holds is used without a network.

    Returns:
      The folder (or file), and the commit of a Hugging Face repository.

    Raises:
      CheckpointError: one line, if there is no such thing or it cannot be fetched.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local, None
    hub_id = _HUB_ID.fullmatch(path)
    if hub_id is None or path.startswith((".", "-")):
        raise CheckpointError(f"{path}: no such file or folder")
    # Imported here: it takes a third of a second, and most merges are local.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging as hub_logging

    hub_logging.set_verbosity_error()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if constants.HF_HUB_OFFLINE:
        disable_progress_bars()
    try:
        folder = snapshot_download(
            hub_id["repo"],
            revision=hub_id["revision"],
            allow_patterns=[
                "*.safetensors",
                "*.safetensors.index.json",
                *SIDE_FILES,
                *RECORD_FILES,
            ],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the library raises a dozen unrelated types
        reason = shown(str(error).strip().split("\n")[0], limit=200)
        raise CheckpointError(
            f"{path}: no such folder here, and Hugging Face's {hub_id['repo']} is "
            f"neither in the cache nor to be fetched ({type(error).__name__}: {reason})"
        ) from None
    commit = Path(folder).name
    return Path(folder), commit if _COMMIT.fullmatch(commit) else None
