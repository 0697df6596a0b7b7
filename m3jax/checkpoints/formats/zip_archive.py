"""Where the members of a ZIP archive lie that stores them as they are, as PyTorch does.

The directory at the archive's end says it all; of each member's own header only the
name and the length are looked at. Anything that two readers could take differently is
refused: bytes between directory and end, a name twice, a member that is compressed,
encrypted or outside the file. Both the 32-bit and the 64-bit form are read. No more
than the directory is read, and never more than the file has.
"""

from __future__ import annotations

import dataclasses
import struct

from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.places.files import InputFile

MAGIC = b"PK\x03\x04"
_MEMBER, _END = b"PK\x01\x02", b"PK\x05\x06"
_LOCATOR, _END_64 = b"PK\x06\x07", b"PK\x06\x06"
_MAX_DIRECTORY = 64_000_000  # bytes; that of 100 000 tensors has a tenth of it
_FULL, _FULL_16 = 0xFFFFFFFF, 0xFFFF  # «see the 64-bit field»
_ENCRYPTED = 0x1 | 0x40 | 0x2000


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive: where its own header begins, and its bytes."""

    name: str
    header: int
    size: int


def members(file: InputFile) -> dict[str, Member]:
    """The members of an archive by name.

    Raises:
      CheckpointError: what is wrong with it, without the file's name.
    """
    start, stop, count = _directory(file)
    if stop - start > _MAX_DIRECTORY:
        raise CheckpointError(f"its directory has {stop - start} bytes, too many")
    text = file.read(start, stop - start)
    found: dict[str, Member] = {}
    at = 0
    while at < len(text):
        member, at = _member(text, at)
        if member.name in found:
            raise CheckpointError(f"holds {shown(member.name)} twice")
        if member.header + 30 + member.size > start:
            raise CheckpointError(
                f"says that {shown(member.name)} has {member.size} bytes from byte "
                f"{member.header} on, its members end at byte {start}; it was cut off"
            )
        found[member.name] = member
    if len(found) != count:
        raise CheckpointError(f"holds {len(found)} members and counts {count}")
    return found


def start_of(file: InputFile, member: Member) -> int:
    """The place in the file of a member's first byte.

    Raises:
      CheckpointError: its own header says something else than the directory.
    """
    header = file.read(member.header, 30)
    name_size, extra_size = struct.unpack_from("<HH", header, 26)
    start = member.header + 30 + name_size + extra_size
    if (
        header[:4] != MAGIC
        or struct.unpack_from("<H", header, 8)[0]
        or start + member.size > file.size
        or file.read(member.header + 30, name_size) != member.name.encode()
    ):
        raise CheckpointError(
            f"has another {shown(member.name)} than its directory says; it is damaged"
        )
    return start


def _directory(file: InputFile) -> tuple[int, int, int]:
    """Start and stop of the directory, and the number of members."""
    tail_start = max(0, file.size - 22)
    tail = file.read(tail_start, file.size - tail_start)
    if len(tail) < 22 or tail[:4] != _END or tail[20:] != b"\0\0":
        raise CheckpointError("has no directory at its end; it was cut off")
    disks, _, count, size, start = struct.unpack("<IHHII", tail[4:20])
    end = tail_start
    locator = file.read(max(0, tail_start - 20), min(20, tail_start))
    if locator[:4] == _LOCATOR and len(locator) == 20:
        end, narrow = end - 76, (disks, count, size, start)
        record = file.read(max(0, end), 56)
        length, _, disks, _, count, size, start = struct.unpack("<QIQQQQQ", record[4:])
        wide = zip(narrow, (disks, count, size, start), strict=True)
        if (
            (record[:4], length) != (_END_64, 44)
            or struct.unpack("<IQI", locator[4:]) != (0, end, 1)
            or not all(few in (many, _FULL, _FULL_16) for few, many in wide)
        ):
            raise CheckpointError("has a damaged directory")
    if disks or start + size != end:
        raise CheckpointError(
            f"says that its directory ends at byte {start + size}, it ends at {end}; "
            "it is damaged"
        )
    return start, end, count


def _member(text: bytes, at: int) -> tuple[Member, int]:
    """The member whose entry begins at a place of the directory, and the next place."""
    if text[at : at + 4] != _MEMBER or len(text) < at + 46:
        raise CheckpointError("has a damaged directory")
    flags, method = struct.unpack_from("<HH", text, at + 8)
    packed, size, name_size, extra_size, comment_size, disk = struct.unpack_from(
        "<IIHHHH", text, at + 20
    )
    (header,) = struct.unpack_from("<I", text, at + 42)
    names = at + 46
    stop = names + name_size + extra_size + comment_size
    if stop > len(text) or disk not in (0, _FULL_16):
        raise CheckpointError("has a damaged directory")
    try:
        name = text[names : names + name_size].decode()
    except UnicodeDecodeError:
        raise CheckpointError("has a member whose name is no UTF-8") from None
    extra = text[names + name_size : names + name_size + extra_size]
    wide = _wide(extra, [value == _FULL for value in (size, packed, header)])
    size, packed, header = (
        value if full is None else full
        for value, full in zip((size, packed, header), wide, strict=True)
    )
    if method or packed != size or flags & _ENCRYPTED:
        raise CheckpointError(
            f"has {shown(name)} compressed or encrypted, PyTorch stores it as it is"
        )
    return Member(name, header, size), stop


def _wide(extra: bytes, wanted: list[bool]) -> list[int | None]:
    """The 64-bit numbers of an entry's extra field, for those that are wanted."""
    at = 0
    while at + 4 <= len(extra) and any(wanted):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1 and size >= 8 * sum(wanted) and at + 4 + size <= len(extra):
            values = iter(struct.unpack_from(f"<{sum(wanted)}Q", extra, at + 4))
            return [next(values) if want else None for want in wanted]
        at += 4 + size
    if any(wanted):
        raise CheckpointError("has a damaged directory")
    return [None] * len(wanted)
