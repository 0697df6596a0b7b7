"""Pushes a complete output to a repository of the Hugging Face hub.

`huggingface_hub` does it, with the token of `hf auth login` or of HF_TOKEN. What a push
that was interrupted has sent is not sent again by the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.checkpoints.errors import shown
from m3jax.checkpoints.output.folder import OutputError
from m3jax.checkpoints.places import hub

# Of a model that was there before, since a reader would take them for parts of this.
_REPLACED = ["*.safetensors", "*.safetensors.index.json"]
_ANYWAY = (".gitattributes", "README.md", "LICENSE")  # of a new repository
_LOGIN = "run `hf auth login`, or set HF_TOKEN"
_HINTS = {
    "LocalTokenNotFoundError": f"there is no token on this machine: {_LOGIN}",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it",
}
_NETWORK = ("TransportError", "ConnectionError", "TimeoutError", "Timeout")
_STATUS = {
    400: "the hub does not take it: {}",
    401: "the hub does not know this token ({}): " + _LOGIN,
    403: "this token may not write there: {}",
    404: "it is not there, or not for this token to write to: {}",
}


class Repository(NamedTuple):
    """A repository of models, and its branch (None: its first, `main`)."""

    name: str
    branch: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.branch}" if self.branch else self.name


def parse(text: str) -> Repository:
    """The repository that ``org/name`` or ``org/name@branch`` says.

    Raises:
      ValueError: the hub has no such names.
    """
    name, at, branch = text.partition("@")
    if not hub.may_be_repository(name) or (at and not branch):
        raise ValueError(f"{text!r} needs org/name or org/name@branch, of the hub")
    return Repository(name, branch or None)


def check_free(to: Repository, *, overwrite: bool) -> None:
    """Asks the hub, before any work, whether the user's token may push there.

    Args:
      to: where to.
      overwrite: whether a model may be there already; its history then keeps it.

    Raises:
      OutputError: no, and why; one line.
      OSError: the hub does not answer.
    """
    with _explained(to):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import (
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        hub.quiet()
        api = HfApi()
        # `HfApi.whoami` asks the same, but waits for the answer without limit.
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2",
            headers=build_hf_headers(token=True),
            timeout=hub.TIMEOUT,
        )
        hf_raise_for_status(answer)
        _check_right(to, answer.json())
        try:
            found = api.model_info(to.name, revision=to.branch, timeout=hub.TIMEOUT)
        except Exception as error:
            if hub.is_one_of(error, "RepositoryNotFoundError", "RevisionNotFoundError"):
                return
            raise
    names = {file.rfilename for file in found.siblings or ()} - {*_ANYWAY}
    if names and not overwrite:
        raise OutputError(
            f"{to}: holds {shown(min(names))} and more already; --overwrite commits on "
            "top of it, --resume ends a push that was interrupted; or choose another "
            "name"
        )


def push(folder: Path, to: Repository, *, private: bool) -> str:
    """Makes the repository, and its branch, where they are missing, and pushes.

    Args:
      folder: the output, complete.
      to: where to.
      private: whether a repository that is made is.

    Returns:
      The address of the commit.

    Raises:
      OutputError: the hub refuses it; one line.
      OSError: the network.
    """
    with _explained(to):
        from huggingface_hub import HfApi

        hub.quiet()
        api = HfApi()
        api.create_repo(to.name, private=private or None, exist_ok=True)
        if to.branch:
            api.create_branch(to.name, branch=to.branch, exist_ok=True)
        return api.upload_folder(
            repo_id=to.name,
            folder_path=folder,
            revision=to.branch,
            commit_message="Merge by m3jax",
            delete_patterns=_REPLACED,
        ).commit_url


def _check_right(to: Repository, user: Any) -> None:
    """Raises OutputError if what the hub says of the user rules out that they write."""
    name = str(user.get("name"))
    namespace = to.name.partition("/")[0]
    own = [name, *[str(org.get("name")) for org in user.get("orgs") or ()]]
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise OutputError(
            f"{to}: the token of {name} is for reading alone; make one that may write, "
            "at huggingface.co/settings/tokens"
        )
    if namespace.casefold() not in map(str.casefold, own):
        raise OutputError(
            f"{to}: the token is that of {name}, who may write to {', '.join(own)}, "
            f"not to {namespace}"
        )


@contextlib.contextmanager
def _explained(to: Repository) -> Iterator[None]:
    """Has errors of the library be one line."""
    try:
        yield
    except OutputError:
        raise
    except Exception as raised:  # the library raises a dozen unrelated types
        error = raised
        if type(raised) is RuntimeError and isinstance(raised.__cause__, Exception):
            error = raised.__cause__  # of that a single file did not get through
        for kind in type(error).__mro__:
            if kind.__name__ in _HINTS:
                raise OutputError(f"{to}: {_HINTS[kind.__name__]}") from None
        said = getattr(error, "server_message", None) or str(error)
        line = shown(said.strip().partition("\n")[0], limit=200)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in _STATUS:
            raise OutputError(f"{to}: {_STATUS[status].format(line)}") from None
        reason = f"({type(error).__name__}: {line})"
        if hub.is_one_of(error, *_NETWORK):
            line = f"{to}: cannot be reached {reason}; check the network"
        else:
            line = f"{to}: the push failed {reason}"
        raise OSError(line) from None
