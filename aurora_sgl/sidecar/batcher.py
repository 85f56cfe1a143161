"""Moves what the spool holds into the store, in batches, at least once.

Order of one batch: rows of each boot, then counts of what was lost, then trace rows, then the
cursor. A kill in between sends some of it again, which changes nothing: rows have keys, and
counts are absolute per boot.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict

import msgspec

from aurora_sgl import wire
from aurora_sgl.sidecar.cursor import Boot, Cursor
from aurora_sgl.sidecar.servers import Known, Registry
from aurora_sgl.sidecar.spool import Frame, Spool
from aurora_sgl.sidecar.trace_files import TraceRow
from aurora_sgl.sidecar.trace_store import TraceStore
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.link import StoreAway, StoreLink

#: Kinds of spool frames.
ENVELOPE, TRACE, LOSS = b"E", b"T", b"L"

#: Seconds in which a batch gathers after its first frame.
GATHER_SECONDS = 0.25
RETRY_SECONDS = (0.5, 5.0)
BATCH_FRAMES = 2000

Batch = list[tuple[int, list[wire.Record]]]

log = logging.getLogger(__name__)


class Loss(msgspec.Struct, array_like=True, frozen=True):
    """Envelopes that the full spool refused, noted when it had room again."""

    boot_id: int
    envelopes: int
    records: int


class Intake:
    """The receiving end: every envelope goes into the spool before anything else."""

    def __init__(self, spool: Spool, registry: Registry) -> None:
        self._spool = spool
        self._registry = registry
        self._refused: dict[int, tuple[int, int]] = {}
        self.envelopes = 0
        self.malformed = 0

    def take(self, data: bytes) -> list[wire.Record]:
        """Spool one message; the records that it holds (none for bytes that are no envelope)."""
        try:
            envelope = wire.decode_envelope(data)
        except msgspec.DecodeError as error:
            self.malformed += 1
            log.warning("a message that is no envelope was dropped: %s", error)
            return []
        self.envelopes += 1
        boot = envelope.boot_id
        if boot in self._refused:
            loss = Loss(boot, *self._refused[boot])
            if self._spool.append(LOSS, msgspec.msgpack.encode(loss)):
                del self._refused[boot]
        if not self._spool.append(ENVELOPE, data):
            envelopes, records = self._refused.get(boot, (0, 0))
            if not envelopes:
                log.error("the spool is full; records are dropped and counted")
            self._refused[boot] = (envelopes + 1, records + len(envelope.records))
        for record in envelope.records:
            self._registry.heard(record)
        return envelope.records


class Batcher:
    """One thread that empties the spool into the store."""

    def __init__(
        self,
        spool: Spool,
        cursor: Cursor,
        link: StoreLink,
        registry: Registry,
        traces: TraceStore,
    ) -> None:
        self._spool = spool
        self._cursor = cursor
        self._link = link
        self._registry = registry
        self._traces = traces
        self._stop = threading.Event()
        self._orphans: set[int] = set()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """Until :meth:`stop`. Never raises: what can't be stored waits or is counted."""
        pause = RETRY_SECONDS[0]
        while not self._stop.is_set():
            if not self._spool.wait(self._cursor.position, 0.5):
                continue
            self._stop.wait(GATHER_SECONDS)
            try:
                progress = self.drain()
            except Exception:
                log.exception("the batcher failed; trying again")
                progress = False
            pause = RETRY_SECONDS[0] if progress else min(2 * pause, RETRY_SECONDS[1])
            if not progress:
                self._stop.wait(pause)

    def stop(self) -> None:
        self._stop.set()

    def drain(self) -> bool:
        """Store all that the spool holds now. False when something of it has to wait."""
        while frames := self._spool.read(self._cursor.position, BATCH_FRAMES):
            try:
                if not self._store(frames):
                    return False
            except StoreAway:
                return False
        return True

    def _store(self, frames: list[Frame]) -> bool:
        batches: dict[int, Batch] = defaultdict(list)
        notes: dict[int, list[Loss]] = defaultdict(list)
        rows: list[TraceRow] = []
        end = None
        for frame in frames:
            if frame.kind == ENVELOPE:
                envelope = wire.decode_envelope(frame.payload)
                for record in envelope.records:
                    if isinstance(record, wire.Hello):
                        self._registry.learn(record)
                if not self._may_store(envelope.boot_id):
                    break
                batches[envelope.boot_id].append((envelope.seq, envelope.records))
            elif frame.kind == LOSS:
                loss = msgspec.msgpack.decode(frame.payload, type=Loss)
                notes[loss.boot_id].append(loss)
            elif frame.kind == TRACE:
                rows.append(msgspec.msgpack.decode(frame.payload, type=TraceRow))
            end = frame.end
        if end is None:
            return False
        boots = {}
        for boot_id in [*batches, *(b for b in notes if b not in batches)]:
            boots[boot_id] = msgspec.structs.replace(self._cursor.boot(boot_id))
            self._store_boot(boot_id, boots[boot_id], batches[boot_id], notes[boot_id])
        self._traces.add(rows)
        self._cursor.boots.update(boots)
        self._cursor.position = end
        try:
            self._cursor.save()
        except OSError as error:  # a full disk: a restart would send some of it again
            if not self.counts["cursor_failures"]:
                log.error("the cursor of the spool can't be written: %s", error)
            self.counts["cursor_failures"] += 1
        else:
            self._spool.release(end)
        return True

    def _may_store(self, boot_id: int) -> bool:
        known = self._registry.known(boot_id)
        hello = self._registry.hello(boot_id)
        if known is None or hello is None:
            # Its Hello was lost. While that boot may still speak, its records wait.
            if self._registry.current in (0, boot_id):
                return False
            if boot_id not in self._orphans:
                self._orphans.add(boot_id)
                log.error("records of boot %d are dropped: it never said who it is", boot_id)
            return True
        return known.ready(hello)

    def _store_boot(self, boot_id: int, boot: Boot, batch: Batch, notes: list[Loss]) -> None:
        known = self._registry.known(boot_id)
        records = sum(len(records) for _, records in batch)
        if known is None:
            self.counts["orphaned"] += records
            return
        for loss in notes:
            boot.spool_full += loss.records
            boot.explained += loss.envelopes
        for seq, found in batch:
            gap = seq - boot.last_seq - 1
            if gap > 0:
                explained = min(gap, boot.explained)
                boot.explained -= explained
                boot.transport += gap - explained
            boot.last_seq = max(boot.last_seq, seq)
            for record in found:
                if isinstance(record, wire.Hello):
                    boot.hello = record
                    boot.dropped = max(boot.dropped, record.dropped)
        if known.refused:
            boot.rejected += records
        else:
            boot.rejected += self._ingest(known, boot_id, batch) if batch else 0
            self.counts["records"] += records
        lost = {
            "engine": boot.dropped,
            "transport": boot.transport,
            "spool": boot.spool_full,
            "rejected": boot.rejected,
        }
        with self._link.session() as s:
            for place, count in lost.items():
                queries.set_drops(s, known.server_id, place, count)

    def _ingest(self, known: Known, boot_id: int, batch: Batch) -> int:
        """Store a batch; the number of records that the store refuses for good."""
        try:
            with self._link.guard() as engine:
                self.counts["events"] += ingest(
                    engine, known.server_id, boot_id, batch
                ).inserted_events
            return 0
        except StoreAway:
            raise
        except Exception as error:
            if len(batch) > 1:
                half = len(batch) // 2
                first = self._ingest(known, boot_id, batch[:half])
                return first + self._ingest(known, boot_id, batch[half:])
            log.error("the store refuses an envelope: %s", str(error).splitlines()[0])
            return len(batch[0][1])
