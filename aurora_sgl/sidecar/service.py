"""The sidecar's threads and its main loop.

One thread receives (this one: sockets and spool), one fills the store, one writes trace files and
one talks to the engine about versions. All of them sleep while there is nothing to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import msgspec
import zmq

from aurora_sgl import wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import Settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.health import HealthServer
from aurora_sgl.processes.ending import Ending
from aurora_sgl.sidecar.batcher import Batcher, Intake
from aurora_sgl.sidecar.chores import Chores
from aurora_sgl.sidecar.endpoint import Endpoint
from aurora_sgl.sidecar.frames import TRACE
from aurora_sgl.sidecar.health import Status, open_health
from aurora_sgl.sidecar.ledger import losses
from aurora_sgl.sidecar.reconcile import Reconciler
from aurora_sgl.sidecar.served import LiveCounts
from aurora_sgl.sidecar.servers import NOT_IDENTIFIED, Registry, ReportedLive
from aurora_sgl.sidecar.spool.bypass import Bypass
from aurora_sgl.sidecar.spool.cursor import Boot, Cursor
from aurora_sgl.sidecar.spool.log import Keep
from aurora_sgl.sidecar.spool.slots import adopt, open_spool
from aurora_sgl.sidecar.swap.staging import Stager
from aurora_sgl.sidecar.traces.assembler import AssembledTrace, TraceAssembler
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.sidecar.traces.intake import TraceIntake
from aurora_sgl.sidecar.traces.writer import TraceWriter
from aurora_sgl.store.ingest import IngestRules
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.liveness import STALE_SECONDS

POLL_MS = 250
#: Messages that are taken in one round before anything else gets its turn.
ROUND_RECORDS, ROUND_TRACES = 1000, 8
#: Seconds that a leaving sidecar spends on what the engine sent last, and on the store.
DRAIN_SECONDS = 5.0
QUIET_SECONDS = 0.3
#: Seconds after which the main loop, which waits for nobody, will not go on.
STUCK_SECONDS = 60.0
#: Seconds after which a record that the store doesn't take makes the sidecar unready, when the
#: reason is known; else after ``STALE_SECONDS``, like a silent store or engine.
LATE_SECONDS = 3.0
#: Traces that wait for the disk; more stay with the assembler, whose memory is bounded.
TRACE_QUEUE, TRACE_QUEUE_BYTES = 64, 64 << 20

log = logging.getLogger(__name__)


class SidecarService:
    """Everything of one sidecar process."""

    def __init__(
        self,
        settings: Settings,
        endpoint: Path,
        *,
        spool: Path | None = None,
        parent_pid: int = 0,
        replica: int = 0,
    ) -> None:
        """``replica``: which of a server's sidecars this is. Raises ``AuroraError`` when a folder
        is in use, too long or not writable."""
        home = settings.home.resolve()
        self._endpoint = Endpoint(endpoint)
        try:
            keep = Keep(60 * settings.spool_keep_minutes, settings.spool_bytes // 4)
            self._spool = open_spool(home, spool, settings.spool_bytes, keep)
        except AuroraError:
            self._endpoint.close()
            raise
        self._cursor = Cursor(self._spool)
        more = partial(adopt, home, self._spool, self._cursor) if spool is None else None
        if more is not None:
            more()
        self._bypass = Bypass(self._spool)
        artifacts = ArtifactRoot(settings.artifact_root)
        self._artifacts = artifacts
        self._link = StoreLink(settings.store_url, "records wait in the spool", durable=True)
        self._registry = Registry(self._link, self._cursor, settings.group, settings.limits)
        self._intake = Intake(self._spool, self._registry, self._bypass)
        self._served = LiveCounts()
        self._assembler = TraceAssembler(settings.trace_memory_bytes)
        self._trace_intake = TraceIntake(self._assembler)
        self._writer = TraceWriter(artifacts, home / "tmp", settings.capture_format)
        self._traces: queue.Queue[tuple[AssembledTrace, wire.Hello | None] | None] = queue.Queue()
        self._queued_bytes = 0
        self._queued_lock = threading.Lock()
        self._trace_store = TraceStore(self._link, artifacts)
        self._batcher = Batcher(
            self._spool,
            self._cursor,
            self._link,
            self._registry,
            self._trace_store,
            self._bypass,
            more,
            IngestRules(settings.keep_opted_out_tokens, settings.most_domains),
        )
        self._reconciler = Reconciler(
            settings,
            self._link,
            self._registry,
            artifacts,
            Stager(artifacts, home, endpoint),
            self._endpoint.send,
            self._traces_lost,
            self._served.stall_of,
        )
        self._chores = Chores(
            self._link,
            artifacts,
            home / "tmp",
            self._batcher.refused,
            stored_boots=self._stored_boots,
            group_id=self._registry.current_group,
        )
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (
                ("batcher", self._batcher.run),
                ("reconciler", self._reconciler.run),
                ("traces", self._write_traces),
            )
        ]
        #: By boot: lost at the spool before this sidecar's time.
        self._lost_before = {b: boot.spool_full for b, boot in self._cursor.boots.items()}
        self._looked_at = time.monotonic()
        self._health = self._open_health(settings, endpoint, replica)
        self.ending = Ending()
        self._parent_fd = _watch(parent_pid)

    def _open_health(self, settings: Settings, endpoint: Path, replica: int) -> HealthServer | None:
        if settings.health_port < 0:
            return None
        server = open_health(
            settings.health_host,
            settings.health_port and settings.health_port + replica,
            endpoint,
            self.status,
            stuck=self.stuck,
            or_free="health_port" not in settings.model_fields_set,
        )
        if server.error:
            self._reconciler.standing["health"] = (
                f"{server.error}; choose another with AURORA_HEALTH_PORT."
            )
        return server

    def run(self) -> None:
        """Until a stop is asked for or the parent is gone; drains before it returns."""
        for thread in self._threads:
            thread.start()
        self._chores.start()
        poller = zmq.Poller()
        stop = self.ending.fileno()
        for source in (self._endpoint.records, self._endpoint.traces, stop):
            poller.register(source, zmq.POLLIN)
        if self._parent_fd >= 0:
            poller.register(self._parent_fd, zmq.POLLIN)
        log.info("ready: spool %s, %d bytes", self._spool.folder, self._spool.size)
        second = time.monotonic()
        while True:
            self._looked_at = time.monotonic()
            events = dict(poller.poll(POLL_MS))
            if stop in events:
                log.info("asked to stop")
                break
            if self._parent_fd >= 0 and self._parent_fd in events:
                log.info("the server is gone")
                break
            self._receive()
            self._finished()
            self._trace_intake.report(self._queued_bytes)
            if time.monotonic() - second >= 1.0:
                second = time.monotonic()
                self._bypass.spill()
                self._spool.sync()
        self._leave(engine_is_gone=self._parent_fd in events)

    def _receive(self) -> bool:
        """Take what lies in the sockets, up to a round. False when there was nothing."""
        took = False
        for _ in range(ROUND_RECORDS):
            try:
                data = self._endpoint.records.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            took = True
            for record in self._intake.take(data):
                self._assembler.heard(record)
                self._served.heard(record)
        for _ in range(ROUND_TRACES):
            try:
                frames = self._endpoint.traces.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            took = True
            self._trace_intake.take(frames, self._queued_bytes)
        return took

    def _finished(self) -> None:
        while self._traces.qsize() < TRACE_QUEUE and self._queued_bytes < TRACE_QUEUE_BYTES:
            traces = self._assembler.take_finished(1)
            if not traces:
                return
            with self._queued_lock:
                self._queued_bytes += traces[0].size
            hello = self._registry.hello(traces[0].header.boot_id)
            self._traces.put((traces[0], hello))

    def _write_traces(self) -> None:
        while (item := self._traces.get()) is not None:
            try:
                row = self._writer.write(*item)
                if row and not self._bypass.put(TRACE, msgspec.msgpack.encode(row)):
                    self._writer.dropped["spool"] += 1
                    self._artifacts.delete(row.uri)
            except Exception:
                log.exception("a trace was lost")
                self._writer.dropped["failed"] += 1
            with self._queued_lock:
                self._queued_bytes -= item[0].size

    def _stored_boots(self) -> Collection[int]:
        """Boots whose records went through this spool; none while anything waits in it."""
        waits = self._cursor.position < self._spool.tail
        return () if waits else tuple(self._cursor.boots)

    def _traces_lost(self) -> int:
        meant = ("no_consent",)
        lost = {**self._assembler.dropped, **self._writer.dropped}
        lost["without_request"] = self._trace_store.counts["without_request"]
        return sum(count for reason, count in lost.items() if reason not in meant)

    def _leave(self, engine_is_gone: bool) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        quiet = time.monotonic() + QUIET_SECONDS
        while time.monotonic() < min(quiet, deadline):
            if self._receive():
                quiet = time.monotonic() + QUIET_SECONDS
            else:
                time.sleep(0.02)
        self._spool.sync()
        self._finished()
        self._traces.put(None)
        self._batcher.stop()
        self._reconciler.stop()
        self._chores.stop()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            last = threading.Thread(target=self._last_words, args=(engine_is_gone,), daemon=True)
            last.start()
            last.join(max(0.5, deadline - time.monotonic()))
        self._reconciler.swaps.close()
        self._trace_intake.close()
        self._bypass.spill()
        self._spool.sync()
        if len(self._bypass):
            log.error("%d messages had no room on the disk and are lost", len(self._bypass))
        if self._health is not None:
            self._health.close()
        self._endpoint.close()

    def _last_words(self, engine_is_gone: bool) -> None:
        with contextlib.suppress(StoreAway):
            self._batcher.drain()
            self._batcher.save()
            self._reconciler.farewell(engine_is_gone)

    def stuck(self) -> str:
        """Why only a new process will help; "" while messages are taken."""
        age = time.monotonic() - self._looked_at
        if age > STUCK_SECONDS:
            return f"no message was taken for {age:.0f} s"
        ended = [one.name for one in self._threads if one.ident and not one.is_alive()]
        return f"the thread {ended[0]} has ended" if ended else ""

    def status(self) -> Status:
        """What ``/health`` and ``/metrics`` show."""
        live = self._registry.live(self._registry.current)
        hello = self._registry.hello(self._registry.current)
        age = self._batcher.oldest_seconds
        reason = self._reason(live, age)
        swaps, counts = self._reconciler.swaps, self._batcher.counts
        return Status(
            ready=not reason,
            reason=reason,
            live_version_id=live.version_id,
            live_sha256=live.sha256,
            phase=self._reconciler.phase.name,
            speculation_share=self._reconciler.phase.share,
            counters={
                "envelopes": self._intake.envelopes,
                "verify_steps": counts["events"],
                "records": counts["records"],
                "records_set_aside": counts["set_aside"],
                "records_refused_unkept": self._batcher.refused.unkept,
                "spool_damaged_places": self._spool.damaged,
                "spool_damaged_bytes": self._spool.damaged_bytes,
                "store_rewinds": self._batcher.watermarks.rewinds,
                "traces_written": self._writer.written,
                "swaps_applied": swaps.applied,
                "swaps_refused": swaps.refused,
            },
            gauges={
                "spool_bytes": self._spool.size,
                "spool_kept_bytes": self._spool.kept_bytes,
                "spool_limit_bytes": self._spool.limit_bytes,
                "spool_memory_bytes": self._bypass.bytes,
                **self._disk(),
                "traces_open": len(self._assembler),
                "trace_memory_bytes": self._assembler.bytes,
                "wanted_version": self._reconciler.desired,
                "last_swap_stall_seconds": self._served.stall_ms / 1000,
                "longest_swap_stall_seconds": self._served.longest_stall_ms / 1000,
            },
            lost=self._lost(hello),
            served=self._served.sums(self._reconciler.boot_version_id),
            positions=self._served.positions(self._reconciler.boot_version_id),
            swaps=self._served.times,
            notices={**(hello.notices if hello else {}), **self._notices()},
            engine=hello.counters if hello else {},
            oldest_unstored_seconds=age,
        )

    def _disk(self) -> dict[str, float]:
        """Of the file system that the spool is on."""
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(self._spool.folder)
            return {"disk_bytes": usage.total, "disk_free_bytes": usage.free}
        return {}

    def _lost(self, hello: wire.Hello | None) -> dict[str, float]:
        """What the server's present start has lost, as it happens: also what the store has not
        heard of yet."""
        boot_id = self._registry.current
        lost = losses(self._cursor.boots.get(boot_id) or Boot())
        lost["engine"] = max(lost["engine"], hello.dropped if hello else 0)
        before = self._lost_before.get(boot_id, 0)
        lost["spool"] = max(lost["spool"], before + self._intake.lost[boot_id])
        return {
            **lost,
            "trace": float(self._traces_lost()),
            "malformed": float(self._intake.malformed),
        }

    def _notices(self) -> dict[str, str]:
        """What is off in this sidecar."""
        refused = self._batcher.refused
        if refused.unkept:
            self._reconciler.standing["refused"] = (
                f"{refused.path} is full: records that the store refuses are only counted. See "
                "aurora-sgl db refused, then move the file away."
            )
        return self._reconciler.standing

    def _reason(self, live: ReportedLive, age: float) -> str:
        """Why the sidecar is not ready, in words; "" when it is."""
        now, trouble = time.monotonic(), self._batcher.trouble
        if age > (LATE_SECONDS if trouble else STALE_SECONDS):
            return f"records wait, the oldest for {age:.0f} s: {trouble or 'the store is slow'}"
        if now - self._link.last_ok > STALE_SECONDS or not self._link.last_ok:
            return "the store is away"
        if not live.heard_at or now - live.heard_at > STALE_SECONDS:
            return "the engine is silent"
        if self._reconciler.agrees:
            return ""
        if self._reconciler.error:
            return self._reconciler.error
        if not self._reconciler.desired:
            return NOT_IDENTIFIED
        return f"version {self._reconciler.desired} should be live"


def _watch(pid: int) -> int:
    """A descriptor that becomes readable when the process ends; -1 for no process.

    Raises ``AuroraError`` when it is gone already.
    """
    if not pid:
        return -1
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise AuroraError(f"the parent process {pid} is gone") from None
