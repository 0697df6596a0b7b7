"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.formats.json_text import BOM, JsonCursor
from m3jax.checkpoints.names import is_plain_name
from m3jax.checkpoints.places.files import Location, read_small

_MAX_INDEX = 100_000_000  # bytes; the index of a model of 600 B parameters has 9 MB
_MAX_OTHER = 65536  # characters of what stands beside the weight map


def read_index(path: Location) -> dict[str, str]:
    """The file name of each tensor.

    Raises:
      CheckpointError: it is damaged, or names a file outside the folder.
    """
    try:
        return parse_index(read_small(path, _MAX_INDEX), str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; fetch it again, or mend it") from None


def parse_index(text: bytes, what: str) -> dict[str, str]:
    """Checks the text of an index; see `read_index`.

    Args:
      text: the JSON.
      what: its name in errors.
    """
    cursor = JsonCursor(text.removeprefix(BOM), what)
    weight_map: dict[str, str] = {}
    files: dict[str, str] = {}  # one string for each file, however many tensors
    seen = set()
    for key in cursor.members():
        if key in seen:
            raise CheckpointError(f"{what} has {shown(key)} twice")
        seen.add(key)
        if key != "weight_map":
            cursor.value(_MAX_OTHER)
            continue
        for tensor in cursor.members():
            name = cursor.string()
            if tensor in weight_map:
                raise CheckpointError(f"{what} has tensor {shown(tensor)} twice")
            if not is_plain_name(name):
                raise CheckpointError(
                    f"{what}: tensor {shown(tensor)} is said to be in {shown(name)}; "
                    "needs the plain name of a file in the same folder"
                )
            weight_map[tensor] = files.setdefault(name, name)
    cursor.end()
    if not weight_map:
        raise CheckpointError(f"{what}: has no weight_map of tensors to files")
    return weight_map


def check_index(
    index: object, weight_map: Mapping[str, str], held: Mapping[str, Sequence[str]]
) -> list[str]:
    """Checks the index, which is the authority, against what the files hold.

    Args:
      index: its path, for errors.
      weight_map: the file of each tensor, by the index.
      held: the files that hold each tensor.

    Returns:
      What is said of tensors in files where the index does not name them.

    Raises:
      CheckpointError: naming the first tensor that is not where the index says.
    """
    absent = [t for t, name in weight_map.items() if name not in held.get(t, ())]
    if absent:
        first, more = absent[0], len(absent) - 1
        elsewhere = f"; {shown(held[first][0])} does" if first in held else ""
        raise CheckpointError(
            f"{index}: tensor {shown(first)}{f' and {more} more' * bool(more)} is said "
            f"to be in {shown(weight_map[first])}, which does not hold it{elsewhere}; "
            "fetch the index and the files again, or mend the index"
        )
    stale = [
        f"{shown(tensor)} in {shown(name)}"
        for tensor, names in held.items()
        for name in names
        if weight_map.get(tensor) != name
    ]
    few = ", ".join([*stale[:2], "…"][: len(stale)])
    are = "tensors stand" if len(stale) > 1 else "tensor stands"
    return [
        f"{index}: {len(stale)} {are} where the index does not say ({few}), passed over"
    ] * bool(stale)
