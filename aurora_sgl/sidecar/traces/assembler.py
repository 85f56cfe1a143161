"""Puts the chunks of hidden states of one request together again.

Chunks are merged by absolute position and the later one wins (a retracted request sends some
positions again). Only requests whose consent is known from their ``RequestStarted`` record go on
to a file: the plugin does not send others, and if it did they would end here.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aurora_sgl import wire
from aurora_sgl.trace_format import ITEM_BYTES

#: Seconds without a chunk after which a request is given up.
IDLE_SECONDS = 300.0
#: Seconds that a finished trace waits for the record that says whether it may be kept.
CONSENT_SECONDS = 15.0
#: Requests whose consent is remembered.
MAX_KNOWN = 20_000

log = logging.getLogger(__name__)


@dataclass
class AssembledTrace:
    """A finished trace: features of positions ``start .. start + rows - 1``, as raw bytes."""

    header: wire.TraceHeader  # the last one of the request
    tokens: NDArray[np.int64]  # shape: [T], from position 0
    start: int
    aux: NDArray[np.uint8]  # shape: [rows, aux_width * item bytes]
    last: NDArray[np.uint8]  # shape: [rows, last_width * item bytes]
    step_starts: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return len(self.aux)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self.aux.nbytes + self.last.nbytes + self.tokens.nbytes


@dataclass
class _Open:
    header: wire.TraceHeader
    tokens: list[int] = field(default_factory=list)  # -1: not seen
    chunks: list[tuple[int, int, bytes, bytes]] = field(default_factory=list)
    step_starts: set[int] = field(default_factory=set)
    size: int = 0  # bytes held
    touched: float = 0.0
    final: bool = False

    def add(self, header: wire.TraceHeader, aux: bytes, last: bytes) -> int:
        """The bytes that were added. Raises ``ValueError`` for a chunk that can't be."""
        item = ITEM_BYTES.get(header.dtype, 0)
        width, last_width = header.aux_width * item, header.last_width * item
        if not width or header.start < 0:
            raise ValueError(f"dtype {header.dtype}, width {header.aux_width}")
        rows, rest = divmod(len(aux), width)
        if rest or len(last) != rows * last_width or rows > len(header.tokens):
            raise ValueError(f"{len(aux)} and {len(last)} bytes for {len(header.tokens)} tokens")
        if (header.dtype, header.aux_width, header.last_width) != (
            self.header.dtype,
            self.header.aux_width,
            self.header.last_width,
        ):
            raise ValueError("the width or dtype changed within a request")
        end = header.start + len(header.tokens)
        self.tokens.extend([-1] * (end - len(self.tokens)))
        self.tokens[header.start : end] = header.tokens
        self.step_starts.update(header.step_starts)
        if rows:
            self.chunks.append((header.start, rows, aux, last))
        self.header = header
        self.final = header.final
        added = len(aux) + len(last) + 8 * len(header.tokens)
        self.size += added
        return added

    def build(self) -> AssembledTrace | None:
        """None when tokens are missing or there are no rows."""
        if not self.chunks or -1 in self.tokens:
            return None
        first = min(start for start, _, _, _ in self.chunks)
        end = max(start + rows for start, rows, _, _ in self.chunks)
        item = ITEM_BYTES[self.header.dtype]
        aux = np.zeros((end - first, self.header.aux_width * item), np.uint8)
        last = np.zeros((end - first, self.header.last_width * item), np.uint8)
        mask = np.zeros(end - first, np.bool_)
        for start, rows, aux_bytes, last_bytes in self.chunks:
            here = slice(start - first, start - first + rows)
            aux[here] = np.frombuffer(aux_bytes, np.uint8).reshape(rows, -1)
            if last.shape[1]:
                last[here] = np.frombuffer(last_bytes, np.uint8).reshape(rows, -1)
            mask[here] = True
        if not mask.all():
            log.warning("trace of request %d has holes", self.header.request_id)
        lo, hi = longest_run(mask, max(0, self.header.output_start - 1 - first))
        return AssembledTrace(
            header=self.header,
            tokens=np.asarray(self.tokens, np.int64),
            start=first + lo,
            aux=aux[lo:hi],
            last=last[lo:hi],
            step_starts=np.asarray(sorted(self.step_starts), np.int64),
        )


def longest_run(mask: NDArray[np.bool_], output: int) -> tuple[int, int]:
    """``[lo, hi)`` of the run without holes with the most rows from ``output`` on.

    Replay and training need the answer's rows; among equals the longer run is taken.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    runs = [(int(lo), int(hi)) for lo, hi in edges.reshape(-1, 2)]
    return max(runs, key=lambda run: (max(0, run[1] - max(run[0], output)), run[1] - run[0]))


class TraceAssembler:
    """Unfinished traces of all requests, bounded in bytes. One thread uses it.

    The engine reserves room here for each request that it traces. If it is too little all the
    same, the request that would pass the bound is dropped, and no other.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.finished_bytes = 0  # of traces of which nothing more comes
        self.dropped: Counter[str] = Counter()  # by reason
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._may_train: OrderedDict[int, bool] = OrderedDict()
        self._given_up: OrderedDict[int, None] = OrderedDict()  # of which more may come

    def __len__(self) -> int:
        return len(self._open)

    def heard(self, record: wire.Record) -> None:
        """Learn the consent of a request from its record."""
        if isinstance(record, wire.RequestStarted):
            self._may_train[record.request_id] = record.may_train
            if len(self._may_train) > MAX_KNOWN:
                self._may_train.popitem(last=False)
            if not record.may_train:
                self._drop(record.request_id, "no_consent")

    def add(self, header: wire.TraceHeader, aux: bytes, last: bytes) -> None:
        """Take one chunk; a chunk that makes no sense drops its request."""
        key = header.request_id
        if self._may_train.get(key) is False:
            self.dropped["no_consent"] += 1
            return
        if key in self._given_up:
            return
        if key not in self._open:
            self._open[key] = _Open(header)
        entry = self._open[key]
        if self.bytes + len(aux) + len(last) + 8 * len(header.tokens) > self.limit_bytes:
            self.give_up(key, "memory")
            return
        entry.touched = time.monotonic()
        was_final = entry.final
        try:
            added = entry.add(header, aux, last)
        except ValueError as error:
            log.warning("trace of request %d dropped: %s", key, error)
            self.give_up(key, "malformed")
            return
        self.bytes += added
        if entry.final:
            self.finished_bytes += added if was_final else entry.size
        elif was_final:
            self.finished_bytes -= entry.size - added

    def give_up(self, key: int, reason: str) -> None:
        """Forget a request and what may still come of it."""
        self._drop(key, reason)
        self._given_up[key] = None
        if len(self._given_up) > MAX_KNOWN:
            self._given_up.popitem(last=False)

    def _drop(self, key: int, reason: str) -> None:
        if self._take(key) is not None:
            self.dropped[reason] += 1

    def _take(self, key: int) -> _Open | None:
        entry = self._open.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size
            self.finished_bytes -= entry.size if entry.final else 0
        return entry

    def take_finished(self, at_most: int) -> list[AssembledTrace]:
        """Traces that are whole and may be kept; gives up the ones that waited too long."""
        traces: list[AssembledTrace] = []
        now = time.monotonic()
        for key, entry in list(self._open.items()):
            age = now - entry.touched
            if entry.final and self._may_train.get(key):
                if len(traces) >= at_most:
                    continue
                trace = entry.build()
                if trace is None:
                    self._drop(key, "incomplete")
                    continue
                traces.append(trace)
                self._take(key)
            elif entry.final and age > CONSENT_SECONDS:
                self._drop(key, "no_consent")
            elif age > IDLE_SECONDS:
                self._drop(key, "unfinished")
        return traces
