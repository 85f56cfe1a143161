"""Moves what the spool holds into the store, in batches, at least once.

Order of one batch: rows of each boot, then counts of what was lost, then trace rows, then the file
of what was refused, then the cursor. A kill in between sends some of it again, which changes
nothing: rows have keys, and counts are absolute per boot.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import msgspec

from aurora_sgl import wire
from aurora_sgl.sidecar.frames import ENVELOPE, LOSS, TRACE, LossFrame, open_envelope
from aurora_sgl.sidecar.refused import RefusedFile, RefusedRecord
from aurora_sgl.sidecar.servers import Registry
from aurora_sgl.sidecar.sift import Sift
from aurora_sgl.sidecar.spool.cursor import Boot, Cursor
from aurora_sgl.sidecar.spool.erase import SpoolEraser
from aurora_sgl.sidecar.spool.log import Frame, Position, Spool
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.sidecar.traces.writer import TraceRow
from aurora_sgl.store import queries
from aurora_sgl.store.faults import Kind, fault_of, in_words
from aurora_sgl.store.link import StoreAway, StoreLink

#: Seconds in which a batch gathers after its first frame.
GATHER_SECONDS = 0.25
RETRY_SECONDS = (0.5, 5.0)
BATCH_FRAMES = 2000
NEVER_SAID = "its server never said who it is"

Batch = list[tuple[int, list[wire.Record]]]

log = logging.getLogger(__name__)


@dataclass
class IntakeLoad:
    """What a run of frames holds, by boot."""

    batches: dict[int, Batch] = field(default_factory=lambda: defaultdict(list))
    notes: dict[int, list[LossFrame]] = field(default_factory=lambda: defaultdict(list))
    traces: list[TraceRow] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)  # bytes, and why
    end: Position | None = None  # None: not even the first frame may be stored yet


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
            envelope, _ = open_envelope(data)
        except msgspec.DecodeError as error:
            self.malformed += 1
            log.warning("a message that is no envelope was dropped: %s", error)
            return []
        self.envelopes += 1
        boot = envelope.boot_id
        if boot in self._refused:
            loss = LossFrame(boot, *self._refused[boot])
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
        self._refused = RefusedFile(spool.folder)
        self._eraser = SpoolEraser(spool, link, traces.delete)
        self._stop = threading.Event()
        self.trouble = ""  # why records wait, in words; "" when the last ones were stored
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """Until :meth:`stop`. Never raises: what can't be stored waits or is counted."""
        pause = RETRY_SECONDS[0]
        while not self._stop.is_set():
            self.look_for_purges()
            if not self._spool.wait(self._cursor.position, 0.5):
                continue
            self._stop.wait(GATHER_SECONDS)
            try:
                progress = self.drain()
            except Exception as error:
                if self.trouble != in_words(error):
                    log.exception("the batcher failed; trying again")
                self.trouble = in_words(error)
                progress = False
            pause = RETRY_SECONDS[0] if progress else min(2 * pause, RETRY_SECONDS[1])
            if not progress:
                self._stop.wait(pause)

    def stop(self) -> None:
        self._stop.set()

    def look_for_purges(self) -> None:
        """Take out of the spool what was purged meanwhile. Never raises."""
        try:
            self._eraser.look()
        except Exception:
            log.exception("purged requests stay in the spool; trying again")

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest record that is not in the store yet; 0 when all are."""
        return self._spool.age(self._cursor.position)

    def drain(self) -> bool:
        """Store all that the spool holds now. False when something of it has to wait."""
        while frames := self._spool.read(self._cursor.position, BATCH_FRAMES):
            try:
                if not self._store(frames):
                    return False
            except StoreAway as away:
                self.trouble = str(away)
                return False
            except Exception as error:
                fault = fault_of(error)
                if fault is None or fault.kind is not Kind.LOST_ROW:
                    raise
                log.warning("%s; making the servers' rows again", in_words(error))
                self.trouble = in_words(error)
                self._registry.forget()
                return False
            self.trouble = ""
        return True

    def _store(self, frames: list[Frame]) -> bool:
        load = self._gather(frames)
        if load.end is None:
            return False
        boots = {}
        refused: list[RefusedRecord] = []
        for boot_id in [*load.batches, *(b for b in load.notes if b not in load.batches)]:
            boots[boot_id] = msgspec.structs.replace(self._cursor.boot(boot_id))
            refused += self._store_boot(
                boot_id, boots[boot_id], load.batches[boot_id], load.notes[boot_id]
            )
        self._traces.add(load.traces)
        self._set_aside(refused, load.unreadable)
        self._cursor.boots.update(boots)
        self._cursor.position = load.end
        try:
            self._cursor.save()
        except OSError as error:  # a full disk: a restart would send some of it again
            if not self.counts["cursor_failures"]:
                log.error("the cursor of the spool can't be written: %s", error)
            self.counts["cursor_failures"] += 1
        else:
            self._spool.release(load.end)
        return True

    def _gather(self, frames: list[Frame]) -> IntakeLoad:
        """What of the frames may be stored now: all up to the first that has to wait."""
        load = IntakeLoad()
        for frame in frames:
            try:
                if not self._add(load, frame):
                    break
            except msgspec.DecodeError as error:
                load.unreadable.append((frame.payload, str(error)))
            load.end = frame.end
        return load

    def _add(self, load: IntakeLoad, frame: Frame) -> bool:
        if frame.kind == ENVELOPE:
            envelope, unreadable = open_envelope(frame.payload)
            for record in envelope.records:
                if isinstance(record, wire.Hello):
                    self._registry.learn(record)
            if why := self._registry.unsettled(envelope.boot_id):
                self.trouble = why
                return False
            load.batches[envelope.boot_id].append((envelope.seq, envelope.records))
            load.unreadable += [(one, "this release can't read it") for one in unreadable]
        elif frame.kind == LOSS:
            loss = msgspec.msgpack.decode(frame.payload, type=LossFrame)
            load.notes[loss.boot_id].append(loss)
        elif frame.kind == TRACE:
            load.traces.append(msgspec.msgpack.decode(frame.payload, type=TraceRow))
        return True

    def _store_boot(
        self, boot_id: int, boot: Boot, batch: Batch, notes: list[LossFrame]
    ) -> list[RefusedRecord]:
        """Store what one boot sent; the records that will never be stored."""
        registration = self._registry.registration(boot_id)
        if registration is None:
            return _all(boot_id, batch, NEVER_SAID)
        _account(boot, batch, notes)
        if registration.refused:
            refused = _all(boot_id, batch, registration.refused)
        else:
            sift = Sift(self._link, registration.server_id, boot_id)
            if batch:
                sift.store(batch)
            refused = sift.refused
            self.counts["events"] += sift.events
            if sift.purged:
                self._eraser.look_again()
            self.counts["records"] += sum(len(records) for _, records in batch) - len(refused)
        boot.rejected += len(refused)
        lost = {
            "engine": boot.dropped,
            "transport": boot.transport,
            "spool": boot.spool_full,
            "rejected": boot.rejected,
        }
        with self._link.session() as s:
            for place, count in lost.items():
                queries.drops.set_drops(s, registration.server_id, place, count)
        return refused

    def _set_aside(self, refused: list[RefusedRecord], unreadable: list[tuple[bytes, str]]) -> None:
        """Raises ``StoreAway`` when the file can't be written: then they wait."""
        try:
            self._refused.keep(refused)
            for data, why in unreadable:
                self._refused.keep_bytes(data, why)
        except OSError as error:
            raise StoreAway(f"{self._refused.path} can't be written: {error.strerror}") from error
        self.counts["set_aside"] += len(refused) + len(unreadable)
        reasons = Counter([*(one.why for one in refused), *(why for _, why in unreadable)])
        for why, count in reasons.items():
            log.error("%d records are set aside in %s: %s", count, self._refused.path, why)


def _account(boot: Boot, batch: Batch, notes: list[LossFrame]) -> None:
    """Count what the numbers of the envelopes say is missing."""
    for loss in notes:
        boot.spool_full += loss.records
        boot.explained += loss.envelopes
    for seq, records in batch:
        gap = seq - boot.last_seq - 1
        if gap > 0:
            explained = min(gap, boot.explained)
            boot.explained -= explained
            boot.transport += gap - explained
        boot.last_seq = max(boot.last_seq, seq)
        for record in records:
            if isinstance(record, wire.Hello):
                boot.hello = record
                boot.dropped = max(boot.dropped, record.dropped)


def _all(boot_id: int, batch: Batch, why: str) -> list[RefusedRecord]:
    return [
        RefusedRecord(boot_id, seq, record, why) for seq, records in batch for record in records
    ]
