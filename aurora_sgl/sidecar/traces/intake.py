"""Takes messages of the trace socket, and rows out of the ring that they speak of."""

from __future__ import annotations

import logging

import msgspec

from aurora_sgl import wire
from aurora_sgl.sidecar.traces.assembler import TraceAssembler
from aurora_sgl.trace_ring import RingReader

log = logging.getLogger(__name__)


class TraceIntake:
    """One thread uses it, the assembler's."""

    def __init__(self, assembler: TraceAssembler) -> None:
        self._assembler = assembler
        self._ring: RingReader | None = None
        self._unreadable = ""  # the path of a ring that can't be opened

    def take(self, frames: list[bytes], waiting: int = 0) -> None:
        """One message. ``waiting``: bytes of whole traces that wait for the disk elsewhere."""
        try:
            if len(frames) == 1:
                self._take_batch(wire.decode_trace_batch(frames[0]), waiting)
            else:
                header, aux, last = frames
                self._assembler.add(wire.decode_trace_header(header), aux, last)
        except (ValueError, msgspec.DecodeError) as error:
            self._assembler.dropped["malformed"] += 1
            log.warning("a message that is no trace was dropped: %s", error)

    def _take_batch(self, batch: wire.TraceBatch, waiting: int) -> None:
        ring = self._open(batch.ring)
        for header in batch.headers:
            self._take_rows(header, ring)
        for request_id in batch.given_up:
            self._assembler.give_up(request_id, "given_up")
        if ring is not None:
            self.report(waiting)  # before the engine takes back what it reserved for them
            ring.free(batch.end)

    def _take_rows(self, header: wire.TraceHeader, ring: RingReader | None) -> None:
        if ring is None:
            self._assembler.give_up(header.request_id, "ring")
            return
        try:
            aux = ring.read(header.aux_at, header.aux_bytes)
            last = ring.read(header.last_at, header.last_bytes)
        except ValueError as error:
            log.warning("trace of request %d dropped: %s", header.request_id, error)
            self._assembler.give_up(header.request_id, "malformed")
            return
        self._assembler.add(header, aux, last)

    def report(self, waiting: int) -> None:
        """Say to the engine how much of our memory holds traces that are whole."""
        if self._ring is not None:
            self._ring.report(self._assembler.finished_bytes + waiting)

    def _open(self, path: str) -> RingReader | None:
        """The engine's ring; None when it can't be opened, which is logged once."""
        if self._ring is not None and self._ring.path == path:
            return self._ring
        if path == self._unreadable:
            return None
        self.close()
        try:
            self._ring = RingReader(path)
        except (OSError, ValueError) as error:
            self._unreadable = path
            log.error("hidden states can't be read, nothing is traced: %s", error)
        return self._ring

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
