"""What the server served, as its records come in: accept length by version and domain, how many
drafts steps accepted and where, and how long swaps took and held streams up."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from aurora_sgl import wire
from aurora_sgl.health import Observations
from aurora_sgl.store.domains import OTHER

#: Pairs of version and domain that are told apart; clients name domains as they like.
MOST_PAIRS = 200
#: Versions that are told of: those that were served last.
MOST_VERSIONS = 20
#: Positions in a draft that are told apart; those beyond count in the sums alone.
MOST_POSITIONS = 16
#: Microseconds within which steps after a swap belong to the same swap.
SAME_SWAP_US = 5_000_000
#: Microseconds between a swap and the waits of streams that are put down to it.
ANSWER_US = 30_000_000
#: Seconds: from a fast step of a small model to more than anybody waits for a token.
STALL_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
APPLY_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
STAGE_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass
class Sums:
    """Verify steps with drafts, and what they accepted."""

    verify_steps: int = 0
    accepted: int = 0


def _places() -> list[int]:
    return [0] * (MOST_POSITIONS + 1)


@dataclass
class PositionCounts:
    """Verify steps with drafts of one version. An index beyond the last counts as the last."""

    by_accepted: list[int] = field(default_factory=_places)  # steps by drafts accepted
    by_depth: list[int] = field(default_factory=_places)  # steps by the depth of their draft
    accepted: int = 0  # drafts of all steps

    def add(self, other: PositionCounts) -> None:
        self.by_accepted = [a + b for a, b in zip(self.by_accepted, other.by_accepted, strict=True)]
        self.by_depth = [a + b for a, b in zip(self.by_depth, other.by_depth, strict=True)]
        self.accepted += other.accepted

    def count(self, depth: int, accepted: int) -> None:
        self.by_accepted[accepted if accepted < MOST_POSITIONS else MOST_POSITIONS] += 1
        self.by_depth[depth if depth < MOST_POSITIONS else MOST_POSITIONS] += 1
        self.accepted += accepted


@dataclass(frozen=True)
class SwapTimes:
    """Of the swaps that were applied, in seconds."""

    apply: Observations = field(default_factory=lambda: Observations(APPLY_BOUNDS))
    stage: Observations = field(default_factory=lambda: Observations(STAGE_BOUNDS))
    stall: Observations = field(default_factory=lambda: Observations(STALL_BOUNDS))  # a stream


class LiveCounts:
    """Filled by the receiving thread, read by the one that answers Prometheus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[int, str], Sums] = {}
        self._positions: dict[int, PositionCounts] = {}  # the one that was served last at the end
        self._newest, self._newest_id = PositionCounts(), -1
        self._domains: dict[int, str] = {}  # of running requests
        self._last: dict[int, tuple[int, int]] = {}  # request -> (at_us, swap_age)
        self._swap_at = 0  # of the first step after the last swap that somebody waited for
        self.stall_ms = 0.0  # longest gap of a stream at the last swap
        self.longest_stall_ms = 0.0  # at any swap
        self.times = SwapTimes()

    def heard(self, record: wire.Record) -> None:
        if isinstance(record, wire.VerifyStep):
            self._step(record)
        elif isinstance(record, wire.RequestStarted):
            self._domains[record.request_id] = record.domain
        elif isinstance(record, wire.RequestFinished):
            self._domains.pop(record.request_id, None)
            self._last.pop(record.request_id, None)
        elif isinstance(record, wire.SwapDone) and record.ok:
            self.times.apply.observe(record.apply_ms / 1000)
            self.times.stage.observe(record.staged_ms / 1000)
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
            if step.version_id != self._newest_id:
                self._turn_to(step.version_id)
            self._newest.count(step.depth, step.accepted)

    def _turn_to(self, version_id: int) -> None:
        self._newest_id = version_id
        self._newest = self._positions.pop(version_id, PositionCounts())
        self._positions[version_id] = self._newest
        if len(self._positions) > MOST_VERSIONS:
            self._forget(next(iter(self._positions)))

    def _forget(self, version_id: int) -> None:
        del self._positions[version_id]
        self._sums = {key: sums for key, sums in self._sums.items() if key[0] != version_id}

    def _swapped(self, at_us: int, gap_ms: float) -> None:
        if at_us - self._swap_at > SAME_SWAP_US:
            self.stall_ms = 0.0
        self._swap_at = at_us
        self.stall_ms = max(self.stall_ms, gap_ms)
        self.longest_stall_ms = max(self.longest_stall_ms, gap_ms)
        self.times.stall.observe(gap_ms / 1000)

    def stall_of(self, done: wire.SwapDone) -> float | None:
        """How long the stream that waited longest had to wait, in ms; ``None``: nobody did.
        Ask some seconds after the swap, when every stream has made a step."""
        near = abs(self._swap_at - done.at_us) < ANSWER_US
        return self.stall_ms if near and self.stall_ms else None

    def sums(self, boot_version_id: int = 0) -> dict[tuple[int, str], Sums]:
        """By (version id, domain); the drafter that the server was started with has the id 0, or
        the one that is given."""
        totals: dict[tuple[int, str], Sums] = {}
        with self._lock:
            for (version_id, domain), mine in self._sums.items():
                total = totals.setdefault((version_id or boot_version_id, domain), Sums())
                total.verify_steps += mine.verify_steps
                total.accepted += mine.accepted
        return totals

    def positions(self, boot_version_id: int = 0) -> dict[int, PositionCounts]:
        """By version id, see :meth:`sums`."""
        totals: dict[int, PositionCounts] = {}
        with self._lock:
            for version_id, mine in self._positions.items():
                totals.setdefault(version_id or boot_version_id, PositionCounts()).add(mine)
        return totals
