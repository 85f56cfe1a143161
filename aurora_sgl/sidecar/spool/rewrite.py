"""Other frames in the place of some, in segments that a reader and a writer use.

A changed segment has the same length and the same places: a shorter frame is followed by one that
only fills. So cursors stay good, and a reader sees the old segment or the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from aurora_sgl.sidecar.spool.log import MAGIC, Spool
from aurora_sgl.sidecar.spool.scan import frame, stretches

#: Kind of a frame that stands for nothing.
FILLER = b"X"
#: Bytes of a frame before its data.
_HEADER = len(frame(b""))

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
    parts, place, count = [old[: len(MAGIC)]], len(MAGIC), 0
    file = BytesIO(old)
    file.seek(place)
    for data, stop, is_sound in stretches(file, len(old)):
        other = change(data) if is_sound else b""
        parts.append(old[place:stop] if other is None else _filled(other, stop - place))
        count += is_sound and other is not None
        place = stop
    new = b"".join(parts)
    return None if new == old else ChangedSegment(new, count)


def _filled(data: bytes, size: int) -> bytes:
    """A frame of ``data``, if any, and one that only fills: ``size`` bytes in all."""
    kept = frame(data) if data else b""
    rest = size - len(kept)
    if rest <= _HEADER:  # too short for a frame: it stays damage, of zeros
        return kept + bytes(rest)
    return kept + frame(FILLER + bytes(rest - _HEADER - 1))
