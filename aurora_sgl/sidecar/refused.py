"""What no store will take, set aside beside the spool: one line of JSON a record, with the reason.

``refused.jsonl`` holds the record as it came (``data``, base64 of msgpack), so that :func:`read`
gives it back, for a look or for another try. A kill may set the same record aside twice;
:func:`read` gives it once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from aurora_sgl import wire
from aurora_sgl.atomic import replace_file
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
    """The writing end. One thread."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._full = False

    def keep(self, refused: Iterable[RefusedRecord]) -> None:
        """Raises ``OSError`` on a failing disk."""
        self._write(_line(one) for one in refused)

    def keep_bytes(self, data: bytes, why: str) -> None:
        """Bytes of the spool that this release can't read. Raises ``OSError``."""
        self._write([Line(utc_now().isoformat(), why, 0, 0, "bytes", data)])

    def take_over(self, folder: Path) -> None:
        """What another spool had set aside. Raises ``OSError``."""
        if (folder / FILE).exists():
            self._append((folder / FILE).read_bytes())

    def _write(self, lines: Iterable[Line]) -> None:
        data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        if data:
            self._append(data)

    def _append(self, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size + len(data) > LIMIT_BYTES:
                if not self._full:
                    log.error("%s is full; what is refused is only counted", self.path)
                self._full = True
                return
            if os.write(fd, data) != len(data):
                os.ftruncate(fd, size)
                raise OSError(28, "no room")
            os.fsync(fd)
        finally:
            os.close(fd)


def read(path: Path) -> Iterator[RefusedRecord]:
    """The records of a file, each once; what is no record and torn lines are left out."""
    envelopes = set()
    for line in lines(path):
        if line.kind == "bytes" or line.data in envelopes:
            continue
        envelopes.add(line.data)
        (record,) = wire.decode_envelope(line.data).records
        yield RefusedRecord(line.boot_id, line.seq, record, line.why)


def lines(path: Path) -> Iterator[Line]:
    """All whole lines of a file."""
    for raw in path.read_bytes().splitlines():
        if (line := _read_line(raw)) is not None:
            yield line


def rewrite_lines(path: Path, keeps: Callable[[Line], bool]) -> int:
    """Leave out lines that are not to be kept, and torn ones; how many. The writing end must rest.
    Raises ``OSError``."""
    try:
        old = path.read_bytes().splitlines()
    except FileNotFoundError:
        return 0
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
