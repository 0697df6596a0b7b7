"""What can be wrong with a checkpoint."""

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the others of the merge.

    The message is one line for the person who started the merge: the file, the
    tensor, what was found, what is allowed, and what to do.
    """


def few(flaws: Sequence[str], most: int = 3) -> str:
    """The first flaws on one line, and how many more there are."""
    more = f"; and {len(flaws) - most} more" if len(flaws) > most else ""
    return "; ".join(flaws[:most]) + more


def shown(text: object, limit: int = 120) -> str:
    """`text` from an untrusted file, quoted, on one line and of bounded length."""
    try:
        quoted = repr(text[:limit]) if isinstance(text, str) else ascii(text)
    except (RecursionError, ValueError):  # nested too deeply, or a number too long
        quoted = f"a monstrous {type(text).__name__}"
    quoted = "".join(c if c.isprintable() else "?" for c in quoted[: limit + 1])
    return quoted if len(quoted) <= limit else quoted[: limit - 3] + "..."
