"""What the server served, as its records come in: accept length by version and domain, and how
long a swap held a stream up."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from aurora_sgl import wire
from aurora_sgl.store.domains import OTHER

#: Pairs of version and domain that are told apart; clients name domains as they like.
MOST_PAIRS = 200
#: Microseconds within which steps after a swap belong to the same swap.
SAME_SWAP_US = 5_000_000
#: Microseconds between a swap and the waits of streams that are put down to it.
ANSWER_US = 30_000_000


@dataclass
class Sums:
    """Verify steps with drafts, and what they accepted."""

    verify_steps: int = 0
    accepted: int = 0


class LiveCounts:
    """Filled by the receiving thread, read by the one that answers Prometheus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[int, str], Sums] = {}
        self._domains: dict[int, str] = {}  # of running requests
        self._last: dict[int, tuple[int, int]] = {}  # request -> (at_us, swap_age)
        self._swap_at = 0  # of the first step after the last swap that somebody waited for
        self.stall_ms = 0.0  # longest gap of a stream at the last swap
        self.longest_stall_ms = 0.0  # at any swap

    def heard(self, record: wire.Record) -> None:
        if isinstance(record, wire.VerifyStep):
            self._step(record)
        elif isinstance(record, wire.RequestStarted):
            self._domains[record.request_id] = record.domain
        elif isinstance(record, wire.RequestFinished):
            self._domains.pop(record.request_id, None)
            self._last.pop(record.request_id, None)
        elif isinstance(record, wire.Hello) and len(self._domains) > 100_000:
            self._domains.clear()  # ends that were lost must not fill the memory
            self._last.clear()

    def _step(self, step: wire.VerifyStep) -> None:
        before = self._last.get(step.request_id)
        self._last[step.request_id] = (step.at_us, step.swap_age)
        if before is not None and step.swap_age < before[1]:
            self._swapped(step.at_us, (step.at_us - before[0]) / 1000)
        if step.depth == 0:
            return
        key = (step.version_id, self._domains.get(step.request_id, "default"))
        with self._lock:
            if key not in self._sums and len(self._sums) >= MOST_PAIRS:
                key = (step.version_id, OTHER)
            sums = self._sums.setdefault(key, Sums())
            sums.verify_steps += 1
            sums.accepted += step.accepted

    def _swapped(self, at_us: int, gap_ms: float) -> None:
        if at_us - self._swap_at > SAME_SWAP_US:
            self.stall_ms = 0.0
        self._swap_at = at_us
        self.stall_ms = max(self.stall_ms, gap_ms)
        self.longest_stall_ms = max(self.longest_stall_ms, gap_ms)

    def stall_of(self, done: wire.SwapDone) -> float | None:
        """How long the stream that waited longest had to wait, in ms; ``None``: nobody did.
        Ask some seconds after the swap, when every stream has made a step."""
        near = abs(self._swap_at - done.at_us) < ANSWER_US
        return self.stall_ms if near and self.stall_ms else None

    def sums(self) -> dict[tuple[int, str], Sums]:
        """By (version id, domain); version 0 is the drafter that the server was started with."""
        with self._lock:
            return {key: Sums(s.verify_steps, s.accepted) for key, s in self._sums.items()}
