"""Names of files that others wrote down."""

from __future__ import annotations

_MAX_FILE_NAME = 255  # characters; the limit of file systems


def is_plain_name(name: object) -> bool:
    """Whether `name` can only be that of a file in the folder that speaks of it."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name) <= _MAX_FILE_NAME
        and name not in (".", "..")
        and not set("/\\") & set(name)
    )


def is_inner_name(name: object) -> bool:
    """Whether `name` can only be that of a file in the folder, or in one within it."""
    parts = name.split("/") if isinstance(name, str) else []
    return 1 <= len(parts) <= 2 and all(map(is_plain_name, parts))
