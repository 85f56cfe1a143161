"""Other frames in the place of some, in segments that a reader and a writer use.

A changed segment has the same length and the same places: a shorter frame is followed by one that
only fills. So cursors stay good, and a reader sees the old segment or the new one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from aurora_sgl.sidecar.spool.log import HEADER, MAGIC, Spool, sound_frames

#: Kind of a frame that stands for nothing.
FILLER = b"X"

#: A frame's kind and payload -> what stands in its place: at least 9 bytes less, or nothing at all
#: (``b""``); ``None``: the frame stays.
Change = Callable[[bytes], bytes | None]


class ChangedSegment(NamedTuple):
    data: bytes
    frames: int  # that are another


def rewrite(spool: Spool, change: Change) -> int:
    """Put other frames in the place of some; how many. Bytes that are no frame are overwritten:
    nobody can say whose they are. Raises ``OSError``; what was changed before it stays changed."""
    count = 0
    for number, (path, end) in spool.segments().items():
        changed = changed_segment(path, end, change)
        if changed is not None:
            spool.replace(number, changed.data)
            count += changed.frames
    return count


def changed_segment(path: Path, end: int, change: Change) -> ChangedSegment | None:
    """What :func:`rewrite` makes of a segment; ``None`` when it stays as it is, or is gone."""
    try:
        old = path.read_bytes()[:end]
    except FileNotFoundError:
        return None
    parts, place, count, has_damage = [old[: len(MAGIC)]], len(MAGIC), 0, False
    file = BytesIO(old)
    file.seek(place)
    for data, stop in sound_frames(file, len(old)):
        start = stop - HEADER.size - len(data)
        if start > place:
            has_damage = True
            parts.append(_filled(b"", start - place))
        other = change(data)
        parts.append(old[start:stop] if other is None else _filled(other, stop - start))
        count += other is not None
        place = stop
    if place < len(old):
        has_damage = True
        parts.append(_filled(b"", len(old) - place))
    return ChangedSegment(b"".join(parts), count) if count or has_damage else None


def _filled(data: bytes, size: int) -> bytes:
    """A frame of ``data``, if any, and one that only fills: ``size`` bytes in all."""
    frame = _frame(data) if data else b""
    rest = size - len(frame) - HEADER.size
    if rest == -HEADER.size:
        return frame
    return frame + (_frame(FILLER + bytes(rest - 1)) if rest > 0 else bytes(size))


def _frame(data: bytes) -> bytes:
    return HEADER.pack(len(data), zlib.crc32(data)) + data
