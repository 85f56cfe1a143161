"""Copies rows of hidden states into the ring, in a thread of its own, and tells the sidecar.

The scheduler's thread only appends one item per step or prefill (see ``forward_rows``). What waits
here is bounded by whoever puts items in (see ``held``), what waits in the ring by its size. While
the ring is full, rows of traced requests wait as copies, so that SGLang's forwards can go; after
some seconds they are given up. The scheduler's thread never waits.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from aurora_sgl import wire
from aurora_sgl.engine.forward_rows import ForwardRows, GivenUp, Item, Message, messages
from aurora_sgl.engine.trace_budget import OpenTrace
from aurora_sgl.trace_ring import RingWriter

logger = logging.getLogger("aurora_sgl")

#: Seconds for which a full ring, or a sidecar that is not there, is waited for.
PATIENCE = 10.0
#: Seconds without any progress of the sidecar after which no request is traced.
BEHIND_SECONDS = 2.0
_LARGEST = 4 << 20  # bytes of one message's rows
_POLL, _QUIET = 0.01, 0.5  # seconds: between two looks, and until it sleeps
_TICK = 1.0  # seconds between two words to a sidecar that has something to free


class Copier:
    """``send`` takes a batch or returns False; the copier's thread alone calls it."""

    def __init__(
        self, send: Callable[[wire.TraceBatch], bool], boot_id: int, ring_bytes: int
    ) -> None:
        self.dropped: Counter[str] = Counter()  # traces, by reason
        self._send = send
        self._boot_id = boot_id
        self._ring_bytes = ring_bytes
        self._ring: RingWriter | None = None
        self._queue: deque[tuple[Item, int]] = deque()
        self._put_bytes = 0  # counted by the scheduler's thread
        self._done_bytes = 0  # counted by ours, as what follows
        self._kept_bytes = 0
        self._outbox: deque[Message] = deque()  # what waits for room
        self._untold: dict[int, OpenTrace] = {}  # given up, which the sidecar does not know yet
        self._begun: set[int] = set()  # requests that the sidecar has something of
        self._stuck_at: int | None = None  # what was freed when we lost patience
        self._unable = False
        self._sleeping = False
        self._wake = threading.Event()
        self._stopping = False
        self._sent_at = 0.0
        self._progress = (0, 0.0, 0.0)  # freed, when it became that, when it was looked at
        self._thread: threading.Thread | None = None

    # -- the scheduler's thread ------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Bytes of SGLang's tensors that wait to be copied, and of copies that wait for room."""
        return self._put_bytes - self._done_bytes + self._kept_bytes

    @property
    def freed(self) -> int:
        return self._ring.freed if self._ring is not None else 0

    @property
    def waiting(self) -> int:
        """Bytes of finished traces that the sidecar has not written yet."""
        return self._ring.waiting if self._ring is not None else 0

    def is_behind(self) -> bool:
        """Whether the sidecar takes nothing at present, so that no trace should begin."""
        now, freed = time.monotonic(), self.freed
        before, since, looked_at = self._progress
        owes = self._ring is not None and freed != self._ring.head
        if not owes or freed != before or now - looked_at > BEHIND_SECONDS / 2:
            since = now  # what was not looked at for a while may have been idle
        self._progress = (freed, since, now)
        return self._unable or self._is_stuck or now - since > BEHIND_SECONDS

    def put(self, item: Item, held: int = 0) -> None:
        """Queue an item that keeps ``held`` bytes of SGLang's memory."""
        self._put_bytes += held
        self._queue.append((item, held))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="aurora-copier", daemon=True)
            self._thread.start()
        if self._sleeping:
            self._wake.set()

    def close(self, seconds: float = 5.0) -> None:
        """Stop. What waits is not sent."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(seconds)
        if self._ring is not None and not (self._thread and self._thread.is_alive()):
            ring, self._ring = self._ring, None
            with contextlib.suppress(BufferError):  # a copy of it is still looked at
                ring.close()

    # -- our own ---------------------------------------------------------------------------------

    def _run(self) -> None:
        quiet_since = time.monotonic()
        while not self._stopping:
            if self._queue:
                self._take()
                quiet_since = time.monotonic()
            self._tick()
            if self._outbox:
                self._flush()
            if not self._queue:
                self._rest(time.monotonic() - quiet_since > _QUIET)

    def _take(self) -> None:
        item, held = self._queue.popleft()
        try:
            if isinstance(item, GivenUp):
                self._give_up(item.trace, "")
            else:
                for message in messages(item, min(_LARGEST, self._open_ring().largest)):
                    self._handle(message)
                    message.source = None
        except Exception as error:
            traces = item.traces if isinstance(item, ForwardRows) else {item.trace}
            self._failed(traces, error)
        finally:
            del item
            self._done_bytes += held

    def _handle(self, message: Message) -> None:
        """Send a message, or let it wait behind those that wait, as a copy of these rows alone."""
        if not self._outbox and self._post(message):
            return
        if self._is_stuck:
            self._lose(message)
            return
        message.keep()
        self._kept_bytes += message.bytes
        self._outbox.append(message)

    def _flush(self) -> None:
        """Send what waits as far as the ring has room; give it up when that takes too long."""
        while self._outbox:
            message = self._outbox[0]
            try:
                if not self._post(message):
                    break
            except Exception as error:
                self._failed(message.traces, error)
            self._forget(message)
        if self._outbox and time.monotonic() - self._outbox[0].since > PATIENCE:
            self._stuck_at = self.freed
            while self._outbox:
                self._lose(self._outbox[0])
                self._forget(self._outbox[0])

    def _forget(self, message: Message) -> None:
        self._outbox.popleft()
        self._kept_bytes -= message.bytes

    def _post(self, message: Message) -> bool:
        """Copy the rows of a message into the ring and send their headers. False: there is no
        room, or nobody takes them."""
        ring, before = self._open_ring(), self._open_ring().head
        if all(trace.broken for trace in message.traces):
            return True
        position = ring.allocate(message.bytes)
        if position is None:
            return False
        if message.spans:
            message.write(ring.rows(position, 1, message.bytes)[0])
        if not self._send(self._batch(message.headers(self._boot_id, position))):
            ring.give_back(before)
            return False
        self._sent_at, self._stuck_at = time.monotonic(), None
        if (tokens := message.tokens) is not None:
            self._begun.add(tokens.trace.request_id)
            if tokens.final:
                self._begun.discard(tokens.trace.request_id)
                tokens.trace.done_at = ring.head
        return True

    def _rest(self, long: bool) -> None:
        if self._outbox:
            time.sleep(_POLL / 4)
        elif not long:
            time.sleep(_POLL)  # not woken by each step: the lock is the scheduler's then
        else:
            self._sleeping = True
            if not self._queue and not self._stopping:
                self._wake.wait(_TICK if self._owes else None)
            self._sleeping = False
            self._wake.clear()

    @property
    def _is_stuck(self) -> bool:
        """Whether the sidecar has freed nothing since we lost patience."""
        return self._stuck_at is not None and self._stuck_at == self.freed

    def _lose(self, message: Message) -> None:
        for trace in message.traces:
            self._give_up(trace, "behind")

    def _failed(self, traces: set[OpenTrace], error: Exception) -> None:
        if not self.dropped["failed"]:
            logger.error("aurora: a trace failed and is dropped", exc_info=error)
        for trace in traces:
            self._give_up(trace, "failed")

    def _batch(
        self, headers: list[wire.TraceHeader], given_up: Sequence[int] = ()
    ) -> wire.TraceBatch:
        ring = self._open_ring()
        return wire.TraceBatch(self._boot_id, ring.path, ring.head, headers, list(given_up))

    def _tick(self) -> None:
        """Now and then: say how far the ring may be freed, which a sidecar that was started anew
        does not know, and which traces were given up."""
        ring, now = self._ring, time.monotonic()
        if ring is None or not self._owes or now - self._sent_at < _TICK:
            return
        self._sent_at = now
        if self._send(self._batch([], list(self._untold))):
            for trace in self._untold.values():
                trace.done_at = ring.head
            self._untold.clear()
            if ring.head == ring.freed:
                self._stuck_at = None  # it was away, and is there again

    @property
    def _owes(self) -> bool:
        """Whether the sidecar has something to hear, or has not said that it is there."""
        behind = self._ring is not None and self._ring.head != self._ring.freed
        return behind or bool(self._untold) or self._stuck_at is not None

    def _give_up(self, trace: OpenTrace, reason: str) -> None:
        """Take nothing more of a trace and let the sidecar forget it. ``reason``: ours; "" when
        the scheduler's thread has counted it."""
        trace.broken = True
        if trace.done_at is not None or trace.request_id in self._untold:
            return
        if reason:
            self.dropped[reason] += 1
        if trace.request_id in self._begun:
            self._begun.discard(trace.request_id)
            self._untold[trace.request_id] = trace
            self._sent_at = min(self._sent_at, time.monotonic() - _TICK)  # at the next look
        else:
            trace.done_at = 0

    def _open_ring(self) -> RingWriter:
        """Raises ``OSError`` when there is no memory for one; then nothing is traced any more."""
        if self._ring is None:
            try:
                self._ring = RingWriter(self._ring_bytes)
            except OSError:
                self._unable = True
                raise
        return self._ring
