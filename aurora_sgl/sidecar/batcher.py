"""Moves what the spool holds into the store, in batches, at least once.

Order of one batch: rows of each boot, then counts of what was lost, then trace rows, then the file
of what was refused, then the cursor; each is on the disk before the next begins. A kill in between
sends some of it again, which changes nothing: rows have keys, and counts are absolute per boot.

The store may forget: it fails over to a replica that is behind, or is restored. So its own
watermark is held against the cursor's on each new connection and in each batch, and where it is
less, what the spool still has is read again; what the store has is left out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from aurora_sgl import wire
from aurora_sgl.sidecar.frames import ENVELOPE, LOSS, TRACE, LossFrame, open_envelope
from aurora_sgl.sidecar.ledger import (
    SentEnvelope,
    count_forgotten,
    count_losses,
    is_stored,
)
from aurora_sgl.sidecar.refused import RefusedFile, RefusedRecord
from aurora_sgl.sidecar.servers import Registry
from aurora_sgl.sidecar.sift import Sift
from aurora_sgl.sidecar.spool.bypass import Bypass
from aurora_sgl.sidecar.spool.cursor import Boot, Cursor
from aurora_sgl.sidecar.spool.erase import SpoolEraser
from aurora_sgl.sidecar.spool.log import DAMAGED, START, Frame, Position, Spool
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.sidecar.traces.writer import TraceRow
from aurora_sgl.sidecar.watermarks import Watermarks
from aurora_sgl.store.faults import Kind, StoreBehind, fault_of, in_words
from aurora_sgl.store.ingest import RULES, IngestRules
from aurora_sgl.store.link import StoreAway, StoreLink

#: Seconds in which a batch gathers after its first frame.
GATHER_SECONDS = 0.25
RETRY_SECONDS = (0.5, 5.0)
BATCH_FRAMES = 2000
#: Seconds in which the cursor passes heartbeats without being saved: after a kill they are sent
#: again.
SAVE_SECONDS = 30.0
#: Rewinds within one round; a store that changes at every look has to wait.
REWINDS = 3
NEVER_SAID = "its server never said who it is"
DAMAGE = "damaged bytes of the spool"

Batch = list[SentEnvelope]

log = logging.getLogger(__name__)


@dataclass
class IntakeLoad:
    """What a run of frames holds, by boot."""

    batches: dict[int, Batch] = field(default_factory=lambda: defaultdict(list))
    notes: dict[int, list[LossFrame]] = field(default_factory=lambda: defaultdict(list))
    traces: list[TraceRow] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)  # bytes, and why
    again: list[TraceRow] = field(default_factory=list)  # of traces that were stored before
    count: int = 0  # frames; 0: not even the first may be stored yet
    end: Position = START  # behind them

    @property
    def only_heartbeats(self) -> bool:
        """Whether storing them once more costs nothing, and they hold nothing else."""
        others = any(self.notes.values()) or self.traces or self.unreadable or self.again
        sent = [one for batch in self.batches.values() for one in batch]
        return not others and all(
            len(one.records) == one.size == 1 and isinstance(one.records[0], wire.Hello)
            for one in sent
        )


class Intake:
    """The receiving end: every envelope goes into the spool, or past it, before anything else."""

    def __init__(self, spool: Spool, registry: Registry, bypass: Bypass | None = None) -> None:
        self._put = spool.append if bypass is None else bypass.put
        self._registry = registry
        self._refused: dict[int, tuple[int, int]] = {}
        self._full = False
        self.envelopes = 0
        self.malformed = 0
        self.lost: Counter[int] = Counter()  # records that had no room, by boot

    def take(self, data: bytes) -> list[wire.Record]:
        """Spool one message; the records that it holds (none for bytes that are no envelope)."""
        try:
            envelope, unreadable = open_envelope(data)
        except msgspec.DecodeError as error:
            self.malformed += 1
            log.warning("a message that is no envelope was dropped: %s", error)
            return []
        self.envelopes += 1
        boot = envelope.boot_id
        if boot in self._refused:
            loss = LossFrame(boot, *self._refused[boot])
            if self._put(LOSS, msgspec.msgpack.encode(loss)):
                del self._refused[boot]
        if not self._put(ENVELOPE, data):
            envelopes, records = self._refused.get(boot, (0, 0))
            if not self._full:
                log.error("the spool is full; records are dropped and counted")
            self._full = True
            size = len(envelope.records) + len(unreadable)
            self._refused[boot] = (envelopes + 1, records + size)
            self.lost[boot] += size
        else:
            self._full = False
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
        bypass: Bypass | None = None,
        adopt: Callable[[], int] | None = None,
        rules: IngestRules = RULES,
    ) -> None:
        """``bypass``: what the spool had no room for. ``adopt``: takes over more of what other
        sidecars left, and says how much; called until there is no more."""
        self._spool = spool
        self._cursor = cursor
        self._link = link
        self._registry = registry
        self._traces = traces
        self._bypass = Bypass(spool) if bypass is None else bypass
        self._adopt = adopt
        self.watermarks = Watermarks(spool, cursor, link, registry)
        self.refused = RefusedFile(spool.folder)
        self._eraser = SpoolEraser(spool, link, traces.delete, self._bypass)
        self._rules = rules
        self._stop = threading.Event()
        self._saved = cursor.position  # by the file, or as it should say
        self._save_at = 0.0
        self.trouble = ""  # why records wait, in words; "" when the last ones were stored
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """Until :meth:`stop`. Never raises: what can't be stored waits or is counted."""
        pause = RETRY_SECONDS[0]
        while not self._stop.is_set():
            self.look_for_purges()
            if not self._spool.wait(self._cursor.position, 0.5) and not len(self._bypass):
                self._between()
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
            if progress:
                self._between()
            else:
                self._stop.wait(pause)

    def stop(self) -> None:
        self._stop.set()

    def _between(self) -> None:
        """While nothing waits: what is due without a new record."""
        try:
            self._spool.release(self._saved)
            if self._adopt is not None:
                more = self._adopt()
                self._eraser.look_again()
                self._adopt = self._adopt if more else None
            if self._link.connections:
                self.watermarks.compare()
        except StoreAway:
            pass
        except Exception as error:
            log.error("between two batches: %s", in_words(error))

    def look_for_purges(self) -> None:
        """Take out of the spool what was purged meanwhile. Never raises."""
        try:
            self._eraser.look()
        except Exception:
            log.exception("purged requests stay in the spool; trying again")

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest record that is not in the store yet; 0 when all are."""
        return max(self._spool.age(self._cursor.position), self._bypass.age())

    def drain(self) -> bool:
        """Store all that waits now. False when something of it has to wait longer."""
        try:
            for _ in range(REWINDS):
                try:
                    return self._drain()
                except StoreBehind as behind:
                    self.watermarks.read_again({behind.boot_id: behind.taken})
                    self.trouble = str(behind)
        except StoreAway as away:
            self.trouble = str(away)
        except Exception as error:
            fault = fault_of(error)
            if fault is None or fault.kind is not Kind.LOST_ROW:
                raise
            log.warning("%s; making the servers' rows again", in_words(error))
            self.trouble = in_words(error)
            self.watermarks.row_is_gone()
        return False

    def _drain(self) -> bool:
        if self._spool.tail > self._cursor.position or len(self._bypass):
            self._link.engine()
            self.watermarks.compare()
        while True:
            if frames := self._spool.read(self._cursor.position, BATCH_FRAMES):
                if not self._store(frames, self._cursor.until):
                    return False
            elif frames := self._bypass.take(self._cursor.position, BATCH_FRAMES):
                stored = 0
                try:
                    stored = self._store(frames, START)
                finally:
                    self._bypass.done(stored)
                if not stored:
                    return False
            else:
                return True
            self.watermarks.settle()
            self.trouble = ""

    def _store(self, frames: list[Frame], until: Position) -> int:
        """How many of the frames were stored; up to ``until`` all were stored before."""
        load = self._gather(frames, until)
        if not load.count:
            return 0
        boots = {}
        refused: list[RefusedRecord] = []
        for boot_id in [*load.batches, *(b for b in load.notes if b not in load.batches)]:
            boots[boot_id] = msgspec.structs.replace(self._cursor.boot(boot_id))
            refused += self._store_boot(
                boot_id, boots[boot_id], load.batches[boot_id], load.notes[boot_id]
            )
        if load.again:
            load.traces += self._traces.missing(load.again)
        purged = self._traces.counts["purged"]
        self._traces.add(load.traces)
        if self._traces.counts["purged"] > purged:
            self._eraser.look_again()
        self._set_aside(refused, load.unreadable)
        self._cursor.boots.update(boots)
        self._cursor.position = load.end
        if not load.only_heartbeats or time.monotonic() >= self._save_at:
            self.save()
        return load.count

    def save(self) -> None:
        """Put the cursor on the disk; segments before it may go. On a full disk it goes on without:
        a restart then sends some of it again."""
        self._saved = self._cursor.position
        self._save_at = time.monotonic() + SAVE_SECONDS
        try:
            self._cursor.save()
        except OSError as error:
            if not self.counts["cursor_failures"]:
                log.error("the cursor of the spool can't be written: %s", error)
            self.counts["cursor_failures"] += 1
        self._spool.release(self._saved)

    def _gather(self, frames: list[Frame], until: Position) -> IntakeLoad:
        """What of the frames may be stored now: all up to the first that has to wait."""
        load = IntakeLoad()
        for frame in frames:
            again = frame.end <= until
            try:
                if not self._add(load, frame, again):
                    break
            except msgspec.DecodeError as error:
                if not again:
                    load.unreadable.append((frame.payload, str(error)))
            load.end = frame.end
            load.count += 1
        return load

    def _add(self, load: IntakeLoad, frame: Frame, again: bool) -> bool:
        if frame.kind == ENVELOPE:
            return self._add_envelope(load, frame.payload, again)
        if frame.kind == TRACE:
            row = msgspec.msgpack.decode(frame.payload, type=TraceRow)
            (load.again if again else load.traces).append(row)
        elif again:
            pass  # it was counted, and set aside
        elif frame.kind == LOSS:
            loss = msgspec.msgpack.decode(frame.payload, type=LossFrame)
            load.notes[loss.boot_id].append(loss)
        elif frame.kind == DAMAGED and frame.payload:
            load.unreadable.append((frame.payload, DAMAGE))
        return True

    def _add_envelope(self, load: IntakeLoad, payload: bytes, again: bool) -> bool:
        envelope, unreadable = open_envelope(payload)
        for record in envelope.records:
            if isinstance(record, wire.Hello):
                self._registry.learn(record)
        if why := self._registry.unsettled(envelope.boot_id):
            self.trouble = why
            return False
        boot, stores = self.watermarks.meet(envelope.boot_id)
        if is_stored(boot, envelope.seq):
            return True
        if again and not stores and envelope.seq <= boot.last_seq:
            return True
        size = len(envelope.records) + len(unreadable)
        load.batches[envelope.boot_id].append(
            SentEnvelope(envelope.seq, envelope.records, envelope.before, size)
        )
        if not again:
            load.unreadable += [(one, "this release can't read it") for one in unreadable]
        return True

    def _store_boot(
        self, boot_id: int, boot: Boot, batch: Batch, notes: list[LossFrame]
    ) -> list[RefusedRecord]:
        """Store what one boot sent; the records that will never be stored."""
        registration = self._registry.registration(boot_id)
        last, recovered = boot.last_seq, self.watermarks.recovered.get(boot_id, 0)
        if batch and batch[-1].seq <= recovered:
            notes = []
        count_forgotten(boot, batch)
        count_losses(boot, batch, notes)
        if registration is None:
            return _all(boot_id, batch, NEVER_SAID)
        if registration.refused:
            refused = _all(boot_id, batch, registration.refused)
        else:
            sift = Sift(
                self._link, registration.server_id, boot_id, self._rules, expected=boot.stored
            )
            if batch:
                sift.store([(one.seq, one.records) for one in batch])
                boot.stored = max(boot.stored, max(one.seq for one in batch))
                boot.stored_at = time.time()
            # Of what is read again the refused were counted and set aside the first time.
            refused = [one for one in sift.refused if one.seq > last]
            self.counts["events"] += sift.events
            if sift.purged:
                self._eraser.look_again()
            self.counts["records"] += sum(len(one.records) for one in batch) - len(refused)
        boot.rejected += sum(one.seq > recovered for one in refused)
        self.watermarks.tell_losses(registration.server_id, boot)
        return refused

    def _set_aside(self, refused: list[RefusedRecord], unreadable: list[tuple[bytes, str]]) -> None:
        """Raises ``StoreAway`` when the file can't be written: then they wait."""
        try:
            self.refused.keep(refused)
            for data, why in unreadable:
                self.refused.keep_bytes(data, why)
        except OSError as error:
            raise StoreAway(f"{self.refused.path} can't be written: {error.strerror}") from error
        self.counts["set_aside"] += len(refused) + len(unreadable)
        reasons = Counter([*(one.why for one in refused), *(why for _, why in unreadable)])
        for why, count in reasons.items():
            log.error("%d records are set aside in %s: %s", count, self.refused.path, why)


def _all(boot_id: int, batch: Batch, why: str) -> list[RefusedRecord]:
    return [RefusedRecord(boot_id, one.seq, record, why) for one in batch for record in one.records]
