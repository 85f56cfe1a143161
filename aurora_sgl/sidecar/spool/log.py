"""The local append-only spool: what the sidecar took, until the store has it, and some time longer.

A spool is a folder of numbered segments. A segment is a magic line and frames (see ``scan``).

Durability: a frame is in the kernel's page cache when :meth:`Spool.append` returns, so killing
the process loses nothing; :meth:`Spool.sync` (once a second, and at each rotation) puts it on the
disk, so a power cut loses at most about a second. Nothing is ever cut: a torn tail or a flipped bit
is read over, and the bytes come out as a frame of the kind ``DAMAGED``.

Segments that the store has are kept for a while (:class:`Keep`), since a store that fails over may
forget what it had; they go first when there is no room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aurora_sgl.atomic import sync_folder
from aurora_sgl.sidecar.files import FolderLock
from aurora_sgl.sidecar.spool.scan import MAX_FRAME, Stretch, frame, stretches

MAGIC = b"AURSPL1\n"
SEGMENT_BYTES = 8 << 20
#: The kind of frames that hold what no frame is: damaged bytes.
DAMAGED = b"D"
#: Seconds between two notes of when something arrived, and how many are kept at most.
MARK_SECONDS, MAX_MARKS = 1.0, 4096

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """A place in the spool, between two frames."""

    segment: int
    offset: int


#: Before anything.
START = Position(0, 0)


class Frame(NamedTuple):
    kind: bytes  # one byte
    payload: bytes
    end: Position  # just after this frame


class Keep(NamedTuple):
    """How long, and how much, of what the store has is kept."""

    seconds: float = 0.0
    bytes: int = 0


NOTHING = Keep()


def _path(folder: Path, segment: int) -> Path:
    return folder / f"{segment:08d}.spool"


def _segments(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.spool"))


def _new_segment(path: Path) -> int:
    """A descriptor of a segment with its magic line; on ``OSError`` nothing is left of it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _write(fd, MAGIC, 0)
        sync_folder(path.parent)
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def _write(fd: int, data: bytes, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(28, "no room")


class Spool:
    """One writer and one reader (which may be two threads) over the segments of a folder."""

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
        keep: Keep = NOTHING,
    ) -> None:
        """Raises ``AuroraError`` when another process has the spool or it can't be written."""
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.segment_bytes = max(1 << 12, min(segment_bytes, limit_bytes // 8))
        self.keep = keep
        self.dropped = 0  # frames refused because the spool or the disk was full
        self.damaged = 0  # places with bytes that are no frame
        self.damaged_bytes = 0
        self._damage_end = START  # of the last one that was counted
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)
        self._folder_lock = FolderLock(folder, "the spool")
        self._dirty = self._complained = False
        segments = _segments(folder) or [1]
        self._sizes = {
            number: _path(folder, number).stat().st_size
            for number in segments
            if _path(folder, number).exists()
        }
        self._stored: dict[int, float] = {}  # segments that the store has, and since when
        self._marks = self._first_marks()
        self._fd = -1
        self._tail = Position(segments[-1], len(MAGIC))
        with contextlib.suppress(OSError):  # a full disk: then it is tried at each append
            self._open_tail()

    def _first_marks(self) -> deque[tuple[Position, float]]:
        """When what lies here already came, roughly: by the times of the files."""
        now, marks = time.time(), deque[tuple[Position, float]]()
        for number in self._sizes:
            before = number - 1 if number - 1 in self._sizes else number
            written = min(now, _path(self.folder, before).stat().st_mtime)
            place = Position(number, len(MAGIC))
            marks.append((place, time.monotonic() - (now - written)))
        return marks

    def _open_tail(self) -> None:
        """What lies in the newest segment stays as it is, damaged or not: writing goes on behind
        it."""
        number = self._tail.segment
        path, size = _path(self.folder, number), self._sizes.get(number, 0)
        if size < len(MAGIC):
            self._fd, size = _new_segment(path), len(MAGIC)
        else:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._tail = Position(number, size)
        self._sizes[number] = size

    @property
    def start(self) -> Position:
        """The oldest place that can be read."""
        with self._lock:
            return self._start()

    def _start(self) -> Position:
        return Position(min(self._sizes, default=self._tail.segment), len(MAGIC))

    @property
    def tail(self) -> Position:
        with self._lock:
            return self._tail

    @property
    def size(self) -> int:
        """Bytes on disk."""
        with self._lock:
            return sum(self._sizes.values())

    @property
    def kept_bytes(self) -> int:
        """Of those the bytes that the store has."""
        with self._lock:
            return sum(self._sizes[number] for number in self._stored)

    def append(self, kind: bytes, payload: bytes) -> bool:
        """Take one frame. False when it was refused (and counted): no room, or a failing disk."""
        data = frame(kind + payload)
        with self._lock:
            try:
                if len(payload) >= MAX_FRAME or not self._make_room(len(data)):
                    self.dropped += 1
                    return False
                self._append(data)
            except OSError as error:
                if not self._complained:
                    log.error("the spool %s can't be written: %s", self.folder, error.strerror)
                self._complained = True
                self.dropped += 1
                self._make_room(self.limit_bytes)  # what the store has goes: the disk needs it
                return False
            self._complained = False
            self._dirty = True
            self._grown.notify_all()
            return True

    def _append(self, data: bytes) -> None:
        """Raises ``OSError``; then all is as it was."""
        if self._fd < 0:
            self._open_tail()
        if self._tail.offset + len(data) > self.segment_bytes:
            self._rotate()
        try:
            _write(self._fd, data, self._tail.offset)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._tail.offset)
            raise
        self._mark()
        self._tail = Position(self._tail.segment, self._tail.offset + len(data))
        self._sizes[self._tail.segment] = self._tail.offset

    def _make_room(self, size: int) -> bool:
        """Whether the limit has room, if need be without segments that the store has."""
        while (room := self.limit_bytes - sum(self._sizes.values())) < size and self._stored:
            self._delete(min(self._stored))
        return room >= size

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
        """Go on in a new segment, or, on ``OSError``, stay in the old one."""
        if self._tail.offset <= len(MAGIC):
            return
        number = self._tail.segment + 1
        path = _path(self.folder, number)
        fd = _new_segment(path)
        try:
            os.ftruncate(self._fd, self._tail.offset)
            os.fsync(self._fd)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd
        self._tail = Position(number, len(MAGIC))
        self._sizes[number] = len(MAGIC)

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
        """Frames after ``position``, oldest first, damaged bytes among them; an empty list at the
        tail."""
        frames: list[Frame] = []
        size = 0
        while True:
            with self._lock:
                tail = self._tail
                end = self._sizes.get(position.segment, 0)
            if position >= tail:
                return frames
            for stretch in self._stretches(position, end):
                frames.append(self._frame(stretch, position.segment))
                size += len(stretch.data)
                if len(frames) >= max_frames or size >= max_bytes:
                    return frames
            if position.segment == tail.segment:
                return frames
            position = Position(position.segment + 1, len(MAGIC))

    def _stretches(self, position: Position, end: int) -> Iterator[Stretch]:
        if position.offset >= end:
            return
        try:
            with _path(self.folder, position.segment).open("rb") as file:
                file.seek(position.offset)
                yield from stretches(file, end)
        except FileNotFoundError as error:
            log.error("a segment of the spool is gone: %s", error)
            yield Stretch(b"", end, False)

    def _frame(self, stretch: Stretch, segment: int) -> Frame:
        end = Position(segment, stretch.end)
        if stretch.sound:
            return Frame(stretch.data[:1], stretch.data[1:], end)
        with self._lock:
            if end > self._damage_end:  # not when it is read again
                if Position(segment, stretch.end - len(stretch.data)) != self._damage_end:
                    self.damaged += 1
                    log.error("%s has damaged bytes before byte %d; they are set aside",
                              _path(self.folder, segment), stretch.end)  # fmt: skip
                self.damaged_bytes += len(stretch.data)
                self._damage_end = end
        return Frame(DAMAGED, stretch.data, end)

    def release(self, position: Position) -> None:
        """The store has what lies wholly before ``position``: delete it when it is old enough."""
        with self._lock:
            now = time.monotonic()
            for number in self._sizes:
                if number < position.segment:
                    self._stored.setdefault(number, now)
            kept = sum(self._sizes[number] for number in self._stored)
            for number in sorted(self._stored):
                if now - self._stored[number] < self.keep.seconds and kept <= self.keep.bytes:
                    break
                kept -= self._sizes[number]
                self._delete(number)

    def rewind(self) -> Position:
        """All that is still here is wanted again; where it begins."""
        with self._lock:
            self._stored.clear()
            return self._start()

    def _delete(self, number: int) -> None:
        with contextlib.suppress(OSError):
            _path(self.folder, number).unlink(missing_ok=True)
        del self._sizes[number]
        del self._stored[number]

    def segments(self) -> dict[int, tuple[Path, int]]:
        """Path and bytes of each segment, by number."""
        with self._lock:
            return {
                number: (_path(self.folder, number), end) for number, end in self._sizes.items()
            }

    def replace(self, number: int, data: bytes) -> None:
        """Put a segment with the same places in the place of one, whole or not at all; what was
        appended behind ``data`` meanwhile stays. One that went meanwhile does not come back.
        Raises ``OSError``."""
        path = _path(self.folder, number)
        new = path.with_name(f"{path.name}.new")  # a kill leaves it; the next try writes it again
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, data, 0)
            os.fsync(fd)
            with self._lock:
                if number not in self._sizes:
                    return
                more = self._behind(path, len(data), self._sizes[number])
                if more:
                    _write(fd, more, len(data))
                    os.fsync(fd)
                os.replace(new, path)
                if number == self._tail.segment and self._fd >= 0:
                    self._fd, fd = fd, self._fd
                sync_folder(self.folder)  # what is appended from now on lies in the new file
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
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        self._folder_lock.release()
