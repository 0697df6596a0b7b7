"""What can be wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the others of the merge.

    The message is one line for the person who started the merge: the file, the
    tensor, what was found, what is allowed, and what to do.
    """


def shown(text: object, limit: int = 120) -> str:
    """`text` from an untrusted file, quoted, on one line and of bounded length."""
    try:
        quoted = repr(text[:limit]) if isinstance(text, str) else ascii(text)
    except (RecursionError, ValueError):  # nested too deeply, or a number too long
        quoted = f"a monstrous {type(text).__name__}"
    quoted = "".join(c if c.isprintable() else "?" for c in quoted[: limit + 1])
    return quoted if len(quoted) <= limit else quoted[: limit - 3] + "..."
