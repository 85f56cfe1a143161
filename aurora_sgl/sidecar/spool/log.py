"""The local append-only spool: what the sidecar took, until the store has it.

A spool is a folder of numbered segments. A segment is a magic line and frames; a frame is
``length, crc32`` (little-endian uint32 each) and a payload, whose first byte is its kind.

Durability: a frame is in the kernel's page cache when :meth:`Spool.append` returns, so killing
the process loses nothing; :meth:`Spool.sync` (once a second, and at each rotation) puts it on the
disk, so a power cut loses at most about a second. A tail that was torn by a kill is cut off at
the next start.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from aurora_sgl.sidecar.files import FolderLock

MAGIC = b"AURSPL1\n"
SEGMENT_BYTES = 8 << 20
MAX_FRAME = 64 << 20
#: Seconds between two notes of when something arrived, and how many are kept at most.
MARK_SECONDS, MAX_MARKS = 1.0, 4096
HEADER = struct.Struct("<II")

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """A place in the spool, between two frames."""

    segment: int
    offset: int


class Frame(NamedTuple):
    kind: bytes  # one byte
    payload: bytes
    end: Position  # just after this frame


def _path(folder: Path, segment: int) -> Path:
    return folder / f"{segment:08d}.spool"


def _segments(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.spool"))


def sound_frames(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int]]:
    """Whole and sound frames from the file's position up to ``end``, each with its end offset."""
    offset = file.tell()
    while offset + HEADER.size < end:
        length, crc = HEADER.unpack(file.read(HEADER.size))
        if not 0 < length <= MAX_FRAME or offset + HEADER.size + length > end:
            return
        data = file.read(length)
        if len(data) != length or zlib.crc32(data) != crc:
            return
        offset += HEADER.size + length
        yield data, offset


def _write_at(fd: int, data: bytes, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(28, "short write")


class Spool:
    """One writer and one reader (which may be two threads) over the segments of a folder."""

    def __init__(self, folder: Path, limit_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Raises ``AuroraError`` when another process has the spool or it can't be written."""
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.segment_bytes = max(1 << 12, min(segment_bytes, limit_bytes // 8))
        self.dropped = 0  # frames refused because the spool or the disk was full
        self.damaged = 0  # segments with unreadable bytes in the middle
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)
        self._folder_lock = FolderLock(folder, "the spool")
        self._dirty = False
        segments = _segments(folder) or [1]
        self._sizes = {
            number: _path(folder, number).stat().st_size
            for number in segments
            if _path(folder, number).exists()
        }
        self._marks = self._found_marks()
        self._open_tail(segments[-1])

    def _found_marks(self) -> deque[tuple[Position, float]]:
        """When what lies here already came, roughly: by the times of the files."""
        now, marks = time.time(), deque[tuple[Position, float]]()
        for number in self._sizes:
            before = number - 1 if number - 1 in self._sizes else number
            written = min(now, _path(self.folder, before).stat().st_mtime)
            place = Position(number, len(MAGIC))
            marks.append((place, time.monotonic() - (now - written)))
        return marks

    def _open_tail(self, number: int) -> None:
        path = _path(self.folder, number)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._fd).st_size
        end = len(MAGIC)
        if os.pread(self._fd, end, 0) != MAGIC:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, MAGIC, 0)
        else:
            with path.open("rb") as file:
                file.seek(end)
                for _, offset in sound_frames(file, size):
                    end = offset
        if size > end:
            log.warning("cut %d bytes of a torn record off %s", size - end, path.name)
            os.ftruncate(self._fd, end)
        self._tail = Position(number, end)
        self._sizes[number] = end

    @property
    def start(self) -> Position:
        """The oldest place that can be read."""
        with self._lock:
            return Position(min(self._sizes), len(MAGIC))

    @property
    def tail(self) -> Position:
        with self._lock:
            return self._tail

    @property
    def size(self) -> int:
        """Bytes on disk."""
        with self._lock:
            return sum(self._sizes.values())

    def append(self, kind: bytes, payload: bytes) -> bool:
        """Take one frame. False when it was dropped (and counted): no room, or a failing disk."""
        data = kind + payload
        frame = HEADER.pack(len(data), zlib.crc32(data)) + data
        with self._lock:
            room = self.limit_bytes - sum(self._sizes.values())
            if len(data) > MAX_FRAME or len(frame) > room:
                self.dropped += 1
                return False
            try:
                if self._tail.offset + len(frame) > self.segment_bytes:
                    self._rotate()
                written = os.pwrite(self._fd, frame, self._tail.offset)
                if written != len(frame):
                    raise OSError(28, "short write")
            except OSError as error:
                if self.dropped == 0:
                    log.error("the spool %s can't be written: %s", self.folder, error.strerror)
                self.dropped += 1
                return False
            self._mark()
            self._tail = Position(self._tail.segment, self._tail.offset + len(frame))
            self._sizes[self._tail.segment] = self._tail.offset
            self._dirty = True
            self._grown.notify_all()
            return True

    def _mark(self) -> None:
        """Note that the frame at the tail came now."""
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][1] >= MARK_SECONDS:
            self._marks.append((self._tail, now))
        if len(self._marks) > MAX_MARKS:
            self._marks = deque(list(self._marks)[::2])

    def age(self, position: Position) -> float:
        """Seconds since the frame after ``position`` came, give or take one; 0 at the tail."""
        with self._lock:
            if position >= self._tail:
                return 0.0
            while len(self._marks) > 1 and self._marks[1][0] <= position:
                self._marks.popleft()
            return time.monotonic() - self._marks[0][1] if self._marks else 0.0

    def _rotate(self) -> None:
        if self._tail.offset <= len(MAGIC):
            return
        os.ftruncate(self._fd, self._tail.offset)
        os.fsync(self._fd)
        old = self._fd
        self._open_tail(self._tail.segment + 1)
        os.close(old)

    def sync(self) -> None:
        """Put what was appended on the disk."""
        with self._lock:
            if not self._dirty:
                return
            self._dirty = False
            fd = os.dup(self._fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def wait(self, position: Position, timeout: float) -> bool:
        """Wait until there is something after ``position``. False after ``timeout`` seconds."""
        with self._grown:
            return self._grown.wait_for(lambda: self._tail > position, timeout)

    def read(
        self, position: Position, max_frames: int = 4096, max_bytes: int = 4 << 20
    ) -> list[Frame]:
        """Frames after ``position``, oldest first; an empty list at the tail."""
        frames: list[Frame] = []
        size = 0
        while len(frames) < max_frames and size < max_bytes:
            with self._lock:
                tail = self._tail
                if position >= tail:
                    break
                end = self._sizes.get(position.segment, 0)
            sound = position.offset
            if end:
                with _path(self.folder, position.segment).open("rb") as file:
                    file.seek(position.offset)
                    for data, offset in sound_frames(file, end):
                        sound = offset
                        frames.append(Frame(data[:1], data[1:], Position(position.segment, offset)))
                        size += len(data)
                        if len(frames) >= max_frames or size >= max_bytes:
                            return frames
            if sound < end:
                self._skip_damage(position.segment, end - sound)
            if position.segment == tail.segment and sound == end:
                break
            position = Position(position.segment + 1, len(MAGIC))
        return frames

    def _skip_damage(self, segment: int, lost: int) -> None:
        with self._lock:
            self.damaged += 1
            if segment == self._tail.segment:
                self._rotate()
        log.error("skipped %d damaged bytes in %s", lost, _path(self.folder, segment))

    def release(self, position: Position) -> None:
        """Delete what lies wholly before ``position``: the store has it."""
        with self._lock:
            for segment in [n for n in self._sizes if n < position.segment]:
                _path(self.folder, segment).unlink(missing_ok=True)
                del self._sizes[segment]

    def segments(self) -> dict[int, tuple[Path, int]]:
        """Path and bytes of each segment, by number."""
        with self._lock:
            return {
                number: (_path(self.folder, number), end) for number, end in self._sizes.items()
            }

    def replace(self, number: int, data: bytes) -> None:
        """Put a segment with the same places in the place of one, whole or not at all; what was
        appended behind ``data`` meanwhile stays. Raises ``OSError``."""
        path = _path(self.folder, number)
        new = path.with_name(f"{path.name}.new")  # a kill leaves it; the next try writes it again
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_at(fd, data, 0)
            os.fsync(fd)
            with self._lock:
                if number not in self._sizes:  # the store has all of it: it is gone
                    return
                more = self._behind(path, len(data), self._sizes[number])
                if more:
                    _write_at(fd, more, len(data))
                    os.fsync(fd)
                os.replace(new, path)
                if number == self._tail.segment:
                    self._fd, fd = fd, self._fd
        finally:
            os.close(fd)
            new.unlink(missing_ok=True)

    @staticmethod
    def _behind(path: Path, begin: int, end: int) -> bytes:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def close(self) -> None:
        self.sync()
        with self._lock:
            os.close(self._fd)
        self._folder_lock.release()
