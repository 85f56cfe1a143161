"""What was set aside as refused: a look at it, and another try once its cause is mended.

A retry moves ``refused.jsonl`` aside first, so that the sidecar goes on writing into a new one and
waits for nobody; what is refused again is put back into that. A retry that is killed leaves the
moved file, and the next one begins with it: what was stored by then changes nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.sidecar.frames import open_envelope
from aurora_sgl.sidecar.refused import FILE, Line, RefusedFile, RefusedRecord, lines, locked
from aurora_sgl.store import queries
from aurora_sgl.store.faults import Kind, fault_of, in_words
from aurora_sgl.store.ingest import ingest

MOVED = "refused.retry.jsonl"
NO_SERVER = "its server has no row in this store"


class RefusedGroup(NamedTuple):
    """Records that were set aside for one reason."""

    why: str
    kind: str
    records: int
    first: str  # when, UTC
    last: str


def folders(home: Path) -> list[Path]:
    """Spools of this machine in which something was set aside. Raises ``OSError`` where nobody may
    look (``glob`` would find nothing there)."""
    try:
        names = sorted(os.listdir(home / "spool"))
    except FileNotFoundError:
        return []
    spools = [home / "spool" / name for name in names if name[0].isdigit()]
    return [one for one in spools if (one / FILE).exists() or (one / MOVED).exists()]


def refused_groups(folder: Path) -> list[RefusedGroup]:
    """What lies in a spool's files, by reason and kind, the most first."""
    moments: dict[tuple[str, str], list[str]] = {}
    for line in all_lines(folder):
        moments.setdefault((line.why, line.kind), []).append(line.at)
    rows = [
        RefusedGroup(why, kind, len(times), min(times), max(times))
        for (why, kind), times in moments.items()
    ]
    return sorted(rows, key=lambda row: -row.records)


def all_lines(folder: Path) -> Iterator[Line]:
    """What was set aside in a spool, also what a retry is at."""
    for name in (MOVED, FILE):
        if (folder / name).exists():
            yield from lines(folder / name)


def retry(engine: Engine, folder: Path) -> Counter[str]:
    """Try to store what was set aside; how many were ``stored``, ``refused`` again, or are
    ``unreadable`` still. Raises what the database raises when it is not there, and ``OSError``:
    what was not stored by then is still in the files."""
    moved = folder / MOVED
    if (folder / FILE).exists():
        with locked(folder / FILE):
            if moved.exists():  # what an earlier one left
                with moved.open("ab") as file:
                    file.write((folder / FILE).read_bytes())
                (folder / FILE).unlink()
            else:
                os.rename(folder / FILE, moved)
    if not moved.exists():
        return Counter()
    counts = _retry_file(engine, folder, moved)
    moved.unlink()
    return counts


def _retry_file(engine: Engine, folder: Path, moved: Path) -> Counter[str]:
    back = RefusedFile(folder)
    counts: Counter[str] = Counter()
    stored: Counter[int] = Counter()
    for line in lines(moved):
        records = _records(line)
        if records is None:
            back.keep_line(line)
            counts["unreadable"] += 1
            continue
        for one in records:
            if why := _store(engine, one):
                back.keep([one._replace(why=why)])
                counts["refused"] += 1
            else:
                counts["stored"] += 1
                stored[one.boot_id] += line.kind != "bytes"
    with store.session(engine) as s:
        for boot_id, count in stored.items():
            server = queries.servers.server_of_boot(s, boot_id)
            if server is not None:
                queries.drops.add_drops(s, server.id, queries.drops.STORED_LATER, count)
    return counts


def _store(engine: Engine, one: RefusedRecord) -> str:
    """Why a record can't be stored; "" when the store has it now."""
    with store.session(engine, write=False) as s:
        server = queries.servers.server_of_boot(s, one.boot_id)
        if server is None:
            return NO_SERVER
        server_id, error = server.id, server.last_error
    if error and error == one.why:  # it serves another target than its group
        return one.why
    try:
        ingest(engine, server_id, one.boot_id, [(one.seq, [one.record])], partial=True)
    except Exception as failure:
        fault = fault_of(failure)
        if fault is None or fault.kind is not Kind.DATA:
            raise
        return in_words(failure)
    return ""


def _records(line: Line) -> list[RefusedRecord] | None:
    """The records of a line; ``None`` where this release can't read it either."""
    try:
        if line.kind != "bytes":
            envelope, unreadable = open_envelope(line.data)
            boot_id, seq, records = line.boot_id, line.seq, envelope.records
        else:
            record: wire.Record = msgspec.msgpack.decode(line.data, type=wire.Record)
            unreadable, seq, records = [], 0, [record]
            boot_id = _boot_of(record)
    except msgspec.DecodeError:
        return None
    if unreadable:
        return None
    return [RefusedRecord(boot_id, seq, record, line.why) for record in records]


def _boot_of(record: wire.Record) -> int:
    if isinstance(record, wire.RequestStarted | wire.VerifyStep | wire.RequestFinished):
        return record.request_id >> wire.REQUEST_COUNTER_BITS
    return record.boot_id
