"""Purged requests out of spools and refused files, those of running sidecars too.

What the store has taken stays in its segment until that is full, and what it has refused for good,
so a purge of rows alone would leave tokens on the disk. A sidecar looks after its own spool: it
sees in the store that a purge began. Those of dead sidecars belong to whoever holds their lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Engine

from aurora_sgl import wire
from aurora_sgl.sidecar.frames import ENVELOPE, TRACE, RawEnvelope
from aurora_sgl.sidecar.refused import FILE, Line, rewrite_lines
from aurora_sgl.sidecar.retry import MOVED, all_lines
from aurora_sgl.sidecar.spool.bypass import Bypass
from aurora_sgl.sidecar.spool.log import Spool
from aurora_sgl.sidecar.spool.rewrite import changed_segment, rewrite
from aurora_sgl.sidecar.traces.writer import TraceRow
from aurora_sgl.store.connection import reading
from aurora_sgl.store.erased import NO_PURGE, erased_among, erased_ids, erasure_mark
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.purge_rows import purge_noted

#: Seconds between two looks of a running sidecar for a purge.
LOOK_SECONDS = 2.0
#: Tags of records that belong to one request, whose number comes next.
_OF_REQUESTS = ("start", "step", "finish")
_UNREADABLE = -1

Delete = Callable[[str], None]  # a trace file, by its URI

log = logging.getLogger(__name__)


class Inventory:
    """The requests of which something lies in frames and refused records."""

    def __init__(self) -> None:
        self.first: dict[int, wire.Record] = {}  # by request: its start, or what comes first
        self.numbers: set[int] = set()

    def look(self, data: bytes) -> None:
        """A frame's kind and payload. Never changes it."""
        if data[:1] == ENVELOPE:
            for raw in _records(data[1:]):
                self.note(raw)
        elif data[:1] == TRACE:
            self.numbers.add(_trace(data[1:]).request_id)

    def look_at_refused(self, folder: Path) -> None:
        for line in all_lines(folder):
            for raw in _records(line.data):
                self.note(raw)

    def note(self, raw: bytes) -> None:
        """An encoded record."""
        tag, number = tag_and_number(raw)
        if not 0 < number < 1 << 63:
            return
        self.numbers.add(number)
        if number in self.first and tag != "start":
            return
        with suppress(msgspec.DecodeError):
            self.first[number] = msgspec.msgpack.decode(raw, type=wire.Record)

    def purged(self, engine: Engine) -> set[int]:
        """Those that were purged; what a rule covers is noted in the store."""
        with engine.begin() as connection:
            by_rule = erased_among(connection, list(self.first.values()))
            return by_rule | erased_ids(connection, self.numbers)


def tag_and_number(raw: bytes) -> tuple[str, int]:
    """What kind an encoded record is of, and the number of its request; 0: it belongs to none,
    -1: it can't be read."""
    try:
        fields: Any = msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, ValueError):
        return "", _UNREADABLE
    if not isinstance(fields, list) or len(fields) < 2:
        return "", _UNREADABLE
    of_request = fields[0] in _OF_REQUESTS and isinstance(fields[1], int)
    return str(fields[0]), fields[1] if of_request else 0


def purged_in(folder: Path, engine: Engine) -> set[int]:
    """The purged requests of which something lies in a spool that somebody else may be writing."""
    inventory = Inventory()
    for path in sorted(folder.glob("[0-9]*.spool")):
        try:
            end = path.stat().st_size
        except FileNotFoundError:  # the store has it meanwhile
            continue
        changed_segment(path, end, inventory.look)
    inventory.look_at_refused(folder)
    return inventory.purged(engine)


def erase_spool(spool: Spool, engine: Engine, delete: Delete, bypass: Bypass | None = None) -> int:
    """Take purged requests out of a spool that is ours, out of what waits past it and out of what
    was set aside; frames and lines that changed.

    Of a request whose start lies here, only here may be known what its client called it: rows of
    what is recognised so go as well. Raises what the store raises, and ``OSError``.
    """
    inventory = Inventory()
    rewrite(spool, inventory.look)
    if bypass is not None:
        bypass.rewrite(inventory.look)
    inventory.look_at_refused(spool.folder)
    change = _Change(inventory.purged(engine), delete)
    count = rewrite(spool, change)
    if bypass is not None:
        count += bypass.rewrite(change)
    for name in (FILE, MOVED):
        count += rewrite_lines(spool.folder / name, change.keeps)
    for chunk in purge_noted(engine):
        for uri in chunk.uris:
            delete(uri)
    return count


class _Change:
    def __init__(self, purged: set[int], delete: Delete) -> None:
        self._purged, self._delete = purged, delete

    def __call__(self, data: bytes) -> bytes | None:
        """What stands for a frame; ``None``: itself."""
        kind, payload = data[:1], data[1:]
        if kind == TRACE:
            row = _trace(payload)
            if row.request_id not in self._purged:
                return None
            if row.uri:
                self._delete(row.uri)
            return b""
        if kind != ENVELOPE:
            return None
        try:
            envelope = msgspec.msgpack.decode(payload, type=RawEnvelope)
        except msgspec.DecodeError:  # nobody can say whose it is
            return b""
        kept = [raw for raw in envelope.records if not self._is_purged(bytes(raw))]
        if len(kept) == len(envelope.records):
            return None
        return kind + msgspec.msgpack.encode(msgspec.structs.replace(envelope, records=kept))

    def keeps(self, line: Line) -> bool:
        """Whether a refused record stays. Bytes that nobody can read go with any purge."""
        return not any(self._is_purged(raw) for raw in _records(line.data))

    def _is_purged(self, raw: bytes) -> bool:
        _, number = tag_and_number(raw)
        return number == _UNREADABLE or number in self._purged


def _trace(payload: bytes) -> TraceRow:
    try:
        return msgspec.msgpack.decode(payload, type=TraceRow)
    except msgspec.DecodeError:
        return TraceRow(0, "", 0, "", 0, 0, 0, 0, "", "", False, 0, 0, "")


def _records(payload: bytes) -> list[bytes]:
    """The records of an envelope, or bytes that are perhaps one."""
    try:
        envelope = msgspec.msgpack.decode(payload, type=RawEnvelope)
    except msgspec.DecodeError:
        return [payload]
    return [bytes(raw) for raw in envelope.records]


class SpoolEraser:
    """Looks after the spool of a running sidecar. One thread, the batcher's."""

    def __init__(self, spool: Spool, link: StoreLink, delete: Delete, bypass: Bypass) -> None:
        self._spool, self._link, self._delete = spool, link, delete
        self._bypass = bypass
        self._mark: tuple[Any, ...] = NO_PURGE
        self._due = 0.0

    def look_again(self) -> None:
        """More of a purged request came."""
        self._mark = ()

    def look(self) -> None:
        """Once in a while: was something purged since the last look? Never raises for a store
        that is away or a disk that fails: the next look tries again."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LOOK_SECONDS
        try:
            with self._link.guard() as engine:
                with reading(engine) as connection:
                    mark = erasure_mark(connection)
                if mark in (self._mark, NO_PURGE):  # bytes that nobody can read go with a purge
                    return
                count = erase_spool(self._spool, engine, self._delete, self._bypass)
        except StoreAway:
            return
        except OSError as error:
            log.error("purged requests could not be taken out of %s: %s", self._spool.folder, error)
            return
        self._mark = mark
        if count:
            log.info("took purged requests out of %d frames and refused records", count)
