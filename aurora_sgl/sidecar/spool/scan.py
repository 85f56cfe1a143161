"""Frames in the bytes of a segment: the sound ones, and what lies between them where bytes were
damaged.

A frame is ``length, crc32`` (little-endian uint32 each) and the data, whose first byte is a capital
letter, its kind. There is no mark by which a frame is known: behind damaged bytes every place is
tried that can be a header, and a frame is one whose data have their checksum. No text of a client
looks like a header, since the highest byte of a length is at most 4 and no such character is in a
text that the engine sends.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_FRAME = 64 << 20
#: Damaged bytes that are given at once.
PIECE_BYTES = 1 << 20
_HEADER = struct.Struct("<II")
#: A length of at most MAX_FRAME, any checksum, and the kind.
_CAN_BE_HEADER = re.compile(rb"(?s)(?=.{3}[\x00-\x04].{4}[A-Z])")


class Stretch(NamedTuple):
    """A sound frame, or damaged bytes between two of them."""

    data: bytes  # kind and payload of a frame; damaged bytes as they lie there
    end: int  # the offset behind it in the segment
    sound: bool


def frame(data: bytes) -> bytes:
    """Data (kind and payload) as they are written."""
    return _HEADER.pack(len(data), zlib.crc32(data)) + data


def stretches(file: BinaryIO, end: int) -> Iterator[Stretch]:
    """All that lies from the file's position up to ``end``, without a gap. A file that ends
    earlier gives an empty piece of damage for the rest."""
    offset = file.tell()
    while offset < end:
        data = _next_frame(file, end - offset)
        if data is None:
            break
        offset += _HEADER.size + len(data)
        yield Stretch(data, offset, True)
    if offset < end:
        file.seek(offset)
        yield from _with_damage(file.read(end - offset), offset, end)


def _next_frame(file: BinaryIO, room: int) -> bytes | None:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    length, crc = _HEADER.unpack(header)
    if not 0 < length <= min(MAX_FRAME, room - _HEADER.size):
        return None
    data = file.read(length)
    return data if len(data) == length and zlib.crc32(data) == crc else None


def _with_damage(data: bytes, base: int, end: int) -> Iterator[Stretch]:
    place = 0
    while place < len(data):
        start = place if _end_of_frame(data, place) else _next_sound(data, place + 1)
        for cut in range(place, start, PIECE_BYTES):
            stop = min(cut + PIECE_BYTES, start)
            yield Stretch(data[cut:stop], base + stop, False)
        place = start
        if stop := _end_of_frame(data, place):
            yield Stretch(data[place + _HEADER.size : stop], base + stop, True)
            place = stop
    if base + len(data) < end:
        yield Stretch(b"", end, False)


def _next_sound(data: bytes, start: int) -> int:
    """Where the next sound frame begins; the end of the data when there is none."""
    for match in _CAN_BE_HEADER.finditer(data, start):
        if _end_of_frame(data, match.start()):
            return match.start()
    return len(data)


def _end_of_frame(data: bytes, start: int) -> int:
    """Behind the sound frame that begins here; 0 when none does."""
    first = start + _HEADER.size
    if first >= len(data):
        return 0
    length, crc = _HEADER.unpack_from(data, start)
    if not 0 < length <= min(MAX_FRAME, len(data) - first):
        return 0
    with memoryview(data) as view, view[first : first + length] as inside:
        return first + length if zlib.crc32(inside) == crc else 0
