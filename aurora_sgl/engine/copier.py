"""Copies rows of hidden states into the ring, in a thread of its own, and tells the sidecar.

The scheduler's thread only appends one item per step or prefill, which refers to the tensors of
SGLang's forward. NumPy copies without the interpreter lock. What waits here is bounded by whoever
puts items in (see ``held``), what waits in the ring by its size. While the sidecar does not read,
this thread waits; the scheduler's never does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aurora_sgl import wire
from aurora_sgl.engine.draft_tree import StepRows
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


@dataclass(frozen=True, slots=True)
class Layout:
    """Of the rows of a boot. Widths in elements."""

    dtype: str
    aux_width: int
    last_width: int
    item_bytes: int

    @property
    def aux_bytes(self) -> int:
        return self.aux_width * self.item_bytes

    @property
    def last_bytes(self) -> int:
        return self.last_width * self.item_bytes

    @property
    def row_bytes(self) -> int:
        return self.aux_bytes + self.last_bytes


@dataclass(slots=True)
class Span:
    """Rows of one request: those numbered ``aux`` and ``last`` of the item's tensors."""

    trace: OpenTrace
    start: int  # absolute position of the first row
    tokens: Sequence[int]  # one for each row
    aux: Sequence[int]
    last: Sequence[int]
    is_step: bool


@dataclass(slots=True)
class ForwardRows:
    """What one prefill or one step leaves behind for all traced requests of its batch."""

    layout: Layout
    aux: torch.Tensor  # [rows, aux_width] on CPU
    last: torch.Tensor | None  # [rows, last_width] on CPU
    pieces: list[Span] = field(default_factory=list)
    #: Of a step, in as few words as the scheduler's thread can say it: (trace, row of the batch,
    #: position, tokens) of each request.
    marks: list[tuple[OpenTrace, int, int, Sequence[int]]] = field(default_factory=list)
    step: StepRows | None = None

    @property
    def traces(self) -> set[OpenTrace]:
        return {piece.trace for piece in self.pieces} | {mark[0] for mark in self.marks}

    def all_pieces(self) -> list[Span]:
        """Of the step too: the root and the accepted drafts, whose auxiliary rows are in front of
        those of their request, and whose last states lie where their nodes are."""
        if self.step is None:
            return self.pieces
        observation, paths = self.step.observation, self.step.paths
        nodes = observation.shape.nodes
        pieces = [*self.pieces]
        for trace, row, start, tokens in self.marks:
            count, path = len(tokens), paths[row]
            first = observation.block(row) * nodes
            last = path[:count]
            if observation.blocks is not None:
                last = [node - row * nodes + first for node in last]
            pieces.append(Span(trace, start, tokens, range(first, first + count), last, True))
        return pieces

    @property
    def held(self) -> int:
        """Bytes of memory that are kept by it: those of whole forwards, not of these rows."""
        aux = self.aux.untyped_storage()
        last = self.last.untyped_storage() if self.last is not None else aux
        both = last.data_ptr() != aux.data_ptr()
        return aux.nbytes() + (last.nbytes() if both else 0)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens without rows: a whole prompt, or (``final``) the whole answer."""

    layout: Layout
    trace: OpenTrace
    start: int
    tokens: Sequence[int]
    final: bool = False


@dataclass(frozen=True, slots=True)
class GivenUp:
    trace: OpenTrace


Item = ForwardRows | Tokens | GivenUp


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
        self._done_bytes = 0  # counted by ours
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
        """Bytes of SGLang's tensors that wait to be copied."""
        return self._put_bytes - self._done_bytes

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
        stuck = self._stuck_at is not None and self._stuck_at == freed
        return self._unable or stuck or now - since > BEHIND_SECONDS

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
                self._one()
                quiet_since = time.monotonic()
            else:
                self._tick()
                self._rest(time.monotonic() - quiet_since > _QUIET)

    def _one(self) -> None:
        item, held = self._queue.popleft()
        try:
            self._handle(item)
        except Exception as error:
            if not self.dropped["failed"]:
                logger.error("aurora: a trace failed and is dropped", exc_info=error)
            for trace in item.traces if isinstance(item, ForwardRows) else {item.trace}:
                self._give_up(trace, "failed")
        finally:
            del item
            self._done_bytes += held

    def _rest(self, long: bool) -> None:
        if not long:
            time.sleep(_POLL)  # not woken by each step: the lock is the scheduler's then
            return
        self._sleeping = True
        if not self._queue and not self._stopping:
            self._wake.wait(_TICK if self._owes else None)
        self._sleeping = False
        self._wake.clear()

    def _handle(self, item: Item) -> None:
        if isinstance(item, GivenUp):
            self._give_up(item.trace, "")
        elif isinstance(item, ForwardRows):
            for group in _groups(item, self._most_rows(item.layout)):
                self._copy(item, group)
        elif not item.trace.broken:
            header = _header(self._boot_id, item.layout, item.trace, item.start, list(item.tokens),
                             final=item.final)  # fmt: skip
            if not self._deliver([header]):
                self._give_up(item.trace, "behind")
                return
            self._begun.add(item.trace.request_id)
            if item.final:
                self._begun.discard(item.trace.request_id)
                item.trace.done_at = self._open_ring().head

    def _most_rows(self, layout: Layout) -> int:
        return max(1, min(_LARGEST, self._open_ring().largest) // layout.row_bytes)

    def _copy(self, item: ForwardRows, group: list[Span]) -> None:
        """Copy the rows of a group into one place of the ring and send their headers."""
        group = [piece for piece in group if not piece.trace.broken]
        layout, ring = item.layout, self._open_ring()
        rows = sum(len(piece.tokens) for piece in group)
        if not rows:
            return
        before = ring.head
        position = self._room(rows * layout.row_bytes)
        if position is None:
            for piece in group:
                self._give_up(piece.trace, "behind")
            return
        last_at = position + rows * layout.aux_bytes
        into = ring.rows(position, rows, layout.aux_bytes)
        _gather(item.aux, [piece.aux for piece in group], into)
        if item.last is not None and layout.last_width:
            into = ring.rows(last_at, rows, layout.last_bytes)
            _gather(item.last, [piece.last for piece in group], into)
        del into
        headers = _headers(self._boot_id, layout, group, position, last_at)
        if not self._deliver(headers):
            ring.give_back(before)
            for piece in group:
                self._give_up(piece.trace, "behind")

    def _room(self, count: int) -> int | None:
        ring = self._open_ring()
        position: int | None = self._patiently(lambda: ring.allocate(count))
        return position

    def _deliver(self, headers: list[wire.TraceHeader]) -> bool:
        """Send headers; False: nobody takes them."""
        batch = self._batch(headers)

        def sent() -> bool | None:
            return self._send(batch) or None

        if self._patiently(sent) is None:
            return False
        self._sent_at = time.monotonic()
        return True

    def _batch(
        self, headers: list[wire.TraceHeader], given_up: Sequence[int] = ()
    ) -> wire.TraceBatch:
        ring = self._open_ring()
        return wire.TraceBatch(self._boot_id, ring.path, ring.head, headers, list(given_up))

    def _patiently(self, attempt: Callable[[], Any]) -> Any:
        """What ``attempt`` returns once it is not None; None when patience ends. After that it is
        tried but once each time, until the sidecar goes on."""
        deadline = time.monotonic() + PATIENCE
        while not self._stopping:
            outcome = attempt()
            if outcome is not None:
                self._stuck_at = None
                return outcome
            if self._stuck_at == self.freed or time.monotonic() > deadline:
                self._stuck_at = self.freed
                return None
            self._tick()
            time.sleep(0.002)
        return None

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


def _groups(item: ForwardRows, most: int) -> Iterator[list[Span]]:
    """The pieces of an item in order, in groups of at most ``most`` rows; long ones are cut."""
    group: list[Span] = []
    rows = 0
    for whole in item.all_pieces():
        for first in range(0, len(whole.tokens), most):
            piece = _part(whole, first, most) if len(whole.tokens) > most else whole
            if rows + len(piece.tokens) > most and group:
                yield group
                group, rows = [], 0
            group.append(piece)
            rows += len(piece.tokens)
    if group:
        yield group


def _part(piece: Span, first: int, count: int) -> Span:
    part = slice(first, first + count)
    return Span(
        piece.trace, piece.start + first, piece.tokens[part], piece.aux[part], piece.last[part],
        piece.is_step and first == 0,
    )  # fmt: skip


def _gather(source: torch.Tensor, rows: list[Sequence[int]], target: NDArray[np.uint8]) -> None:
    """Copy rows of a tensor, without the interpreter lock. ``target``: [rows, bytes]."""
    raw = source.contiguous().view(torch.uint8).numpy()
    done = 0
    if all(isinstance(part, range) for part in rows) and len(rows) * 16 < len(target):
        for part in rows:
            np.copyto(target[done : done + len(part)], raw[part[0] : part[-1] + 1])
            done += len(part)
        return
    numbers = np.fromiter((row for part in rows for row in part), np.intp, len(target))
    if numbers.min() < 0 or numbers.max() >= len(raw):
        raise IndexError("rows that the forward did not have")
    np.take(raw, numbers, axis=0, out=target, mode="clip")  # "raise" would buffer it


def _headers(
    boot_id: int, layout: Layout, group: list[Span], aux_at: int, last_at: int
) -> list[wire.TraceHeader]:
    """One for each piece of a group, whose rows lie one after the other from these positions."""
    headers = []
    for piece in group:
        aux_bytes = len(piece.tokens) * layout.aux_bytes
        last_bytes = len(piece.tokens) * layout.last_bytes
        headers.append(
            _header(
                boot_id,
                layout,
                piece.trace,
                piece.start,
                list(piece.tokens),
                steps=[piece.start] if piece.is_step else [],
                aux_at=aux_at,
                aux_bytes=aux_bytes,
                last_at=last_at,
                last_bytes=last_bytes,
            )
        )
        aux_at += aux_bytes
        last_at += last_bytes
    return headers


def _header(
    boot_id: int,
    layout: Layout,
    trace: OpenTrace,
    start: int,
    tokens: list[int],
    *,
    final: bool = False,
    steps: Sequence[int] = (),
    **places: int,
) -> wire.TraceHeader:
    return wire.TraceHeader(
        boot_id=boot_id,
        request_id=trace.request_id,
        start=start,
        tokens=tokens,
        dtype=layout.dtype,
        aux_width=layout.aux_width,
        last_width=layout.last_width,
        final=final,
        output_start=trace.output_start,
        greedy=trace.greedy,
        step_starts=list(steps),
        **places,
    )
