"""The way past the spool: what the disk has no room for waits in memory, behind what the spool
holds, so that a full disk loses nothing as long as the store takes it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from aurora_sgl.sidecar.spool.log import Frame, Position, Spool

#: Bytes that wait at most; never more than the spool may have.
MEMORY_BYTES = 32 << 20


class Bypass:
    """Order is kept: while something waits here, nothing new goes into the spool before it."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._limit = min(MEMORY_BYTES, spool.limit_bytes)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[bytes, bytes, float]] = deque()
        self._taken = 0  # of those the first, which the store is just taking
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, kind: bytes, payload: bytes) -> bool:
        """Into the spool, or into memory. False: there is no room in either."""
        with self._lock:
            self._spill()
            if not self._waiting and self._spool.append(kind, payload):
                return True
            if self.bytes + len(payload) > self._limit:
                return False
            self._waiting.append((kind, payload, time.monotonic()))
            self.bytes += len(payload)
            return True

    def spill(self) -> None:
        """Into the spool, as far as it has room again."""
        with self._lock:
            self._spill()

    def _spill(self) -> None:
        while self._waiting and not self._taken:
            kind, payload, _ = self._waiting[0]
            if not self._spool.append(kind, payload):
                return
            self._drop(1)

    def take(self, position: Position, count: int) -> list[Frame]:
        """The first that wait, once the spool was read to its end; :meth:`done` must follow."""
        with self._lock:
            if self._spool.tail > position:
                return []
            first = list(islice(self._waiting, count))
            self._taken = len(first)
        return [Frame(kind, payload, position) for kind, payload, _ in first]

    def done(self, count: int) -> None:
        """The store has the first ``count`` of those that were taken."""
        with self._lock:
            self._drop(count)
            self._taken = 0

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self.bytes -= len(self._waiting.popleft()[1])

    def rewrite(self, change: Callable[[bytes], bytes | None]) -> int:
        """As ``spool.rewrite`` does it with what lies on the disk; how many are another. Never
        between :meth:`take` and :meth:`done`."""
        with self._lock:
            others = [change(kind + payload) for kind, payload, _ in self._waiting]
            old = list(self._waiting)
            self._waiting.clear()
            self.bytes = 0
            for (kind, payload, since), other in zip(old, others, strict=True):
                if other is not None:
                    kind, payload = other[:1], other[1:]
                if kind:
                    self._waiting.append((kind, payload, since))
                    self.bytes += len(payload)
            return sum(other is not None for other in others)

    def age(self) -> float:
        """Seconds that the oldest has waited; 0 when none does."""
        with self._lock:
            return time.monotonic() - self._waiting[0][2] if self._waiting else 0.0
