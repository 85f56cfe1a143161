"""What no store will take, set aside beside the spool: one line of JSON a record, with the reason.

``refused.jsonl`` holds the record as it came (``data``, base64 of msgpack), so that :func:`read`
gives it back, for a look or for another try (see ``retry``). A kill may set the same record aside
twice; :func:`read` gives it once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from aurora_sgl import wire
from aurora_sgl.atomic import replace_file, sync_folder
from aurora_sgl.clock import utc_now

FILE = "refused.jsonl"
#: Bytes of the file after which records are only counted.
LIMIT_BYTES = 256 << 20

log = logging.getLogger(__name__)


class RefusedRecord(NamedTuple):
    """A record of an envelope, and why it is not in the store."""

    boot_id: int
    seq: int
    record: wire.Record
    why: str


class Line(msgspec.Struct):
    """One line of the file."""

    at: str  # when it was set aside, UTC
    why: str
    boot_id: int
    seq: int
    kind: str  # hello, start, step, finish, swap; "bytes" for what is no record
    data: bytes  # of an envelope with that record; of "bytes" as they came


class RefusedFile:
    """The writing end. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.unkept = 0  # lines that the file had no room for
        self._lock = threading.Lock()

    def keep(self, refused: Iterable[RefusedRecord]) -> None:
        """Raises ``OSError`` on a failing disk."""
        self._write(_line(one) for one in refused)

    def keep_bytes(self, data: bytes, why: str) -> None:
        """Bytes of the spool that this release can't read. Raises ``OSError``."""
        self._write([Line(utc_now().isoformat(), why, 0, 0, "bytes", data)])

    def keep_line(self, line: Line) -> None:
        """As it was set aside before. Raises ``OSError``."""
        self._write([line])

    def take_over(self, folder: Path) -> None:
        """What another spool had set aside. Raises ``OSError``."""
        if (folder / FILE).exists():
            with self._lock:
                self._append((folder / FILE).read_bytes())

    def forget_before(self, moment: datetime) -> int:
        """Delete what was set aside before a moment; how many lines. Raises ``OSError``."""
        if not self.path.exists():
            return 0
        with self._lock, locked(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if not _is_before(line, moment)]
            if len(kept) < len(lines):
                replace_file(self.path, b"".join(kept), mode=0o600)
            return len(lines) - len(kept)

    def _write(self, lines: Iterable[Line]) -> None:
        data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        if data:
            with self._lock:
                self._append(data)

    def _append(self, data: bytes) -> None:
        with locked(self.path) as fd:
            size = os.fstat(fd).st_size
            if size + len(data) > LIMIT_BYTES:
                if not self.unkept:
                    log.error("%s is full; what is refused is only counted", self.path)
                self.unkept += data.count(b"\n")
                return
            try:
                if os.write(fd, data) != len(data):
                    raise OSError(28, "no room")
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, size)
                raise
            if not size:
                sync_folder(self.path.parent)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """A descriptor of a file, made when needed, that nobody else writes or moves meanwhile."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not path.exists() or os.fstat(fd).st_ino != path.stat().st_ino:
                continue  # it was moved while we waited for it
            yield fd
            return
        finally:
            os.close(fd)


def lines(path: Path) -> Iterator[Line]:
    """What a file holds, each thing once; torn lines are left out."""
    contents = set()
    for raw in path.read_bytes().splitlines():
        line = _read_line(raw)
        if line is not None and line.data not in contents:
            contents.add(line.data)
            yield line


def read(path: Path) -> Iterator[RefusedRecord]:
    """The records of a file, each once; what is no record is left out."""
    for line in lines(path):
        if line.kind != "bytes":
            (record,) = wire.decode_envelope(line.data).records
            yield RefusedRecord(line.boot_id, line.seq, record, line.why)


def _is_before(line: bytes, moment: datetime) -> bool:
    """Torn lines stay: nobody can tell how old they are."""
    try:
        return datetime.fromisoformat(msgspec.json.decode(line, type=Line).at) < moment
    except (msgspec.DecodeError, ValueError, TypeError):
        return False


def rewrite_lines(path: Path, keeps: Callable[[Line], bool]) -> int:
    """Leave out lines that are not to be kept, and torn ones; how many. Raises ``OSError``."""
    if not path.exists():
        return 0
    with locked(path):
        old = path.read_bytes().splitlines()
        kept = [raw for raw in old if (line := _read_line(raw)) is not None and keeps(line)]
        if len(kept) < len(old):
            replace_file(path, b"".join(raw + b"\n" for raw in kept), mode=0o600)
        return len(old) - len(kept)


def _read_line(raw: bytes) -> Line | None:
    try:
        return msgspec.json.decode(raw, type=Line)
    except msgspec.DecodeError:
        return None


def _line(one: RefusedRecord) -> Line:
    kind = str(type(one.record).__struct_config__.tag)
    data = wire.encode(wire.Envelope(one.boot_id, one.seq, [one.record]))
    return Line(utc_now().isoformat(), one.why, one.boot_id, one.seq, kind, data)
