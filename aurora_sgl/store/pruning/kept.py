"""Which traces of a group are kept within its budget, and which go.

A trace whose prefix came from the cache is worth something only with its *donor*, the trace that
holds the prefix's rows, and so on back to position 0. So each is kept with its donors or not at
all; a donor that many need counts once. Kept are, newest first:

1. pinned traces, up to ``PINNED_SHARE`` of the budget,
2. traces of held-out conversations, up to ``HELD_OUT_SHARE`` of it: the evidence of the gate,
3. all others, up to the first that finds no room.

What 1 and 2 leave of their shares is for 3, where pinned and held-out ones beyond them compete by
age like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from aurora_sgl.split_place import GATE_SHARE, place

PINNED_SHARE, HELD_OUT_SHARE = 0.25, 0.2
#: Why training pins traces by itself. Unlike what people pin, these grow too old with the others.
RESERVOIR = "reservoir"
#: Beyond so many traces some more go at once: finding out which looks at all of them.
_MANY, _SLACK = 1000, 64


@dataclass(frozen=True)
class HeldTrace:
    """A trace in the store."""

    request_id: int
    uri: str
    bytes: int
    created_at: datetime
    donor_id: int | None
    pinned: bool
    key: str  # of the split: see ``sequences.splits.split_key``

    @property
    def is_held_out(self) -> bool:
        return place(self.key) < GATE_SHARE


def victims(traces: Sequence[HeldTrace], budget: int) -> list[HeldTrace]:
    """Those that go, the oldest first; none while all fit."""
    if sum(trace.bytes for trace in traces) <= budget:
        return []
    if len(traces) > _MANY:
        budget -= budget // _SLACK
    newest_first = sorted(traces, key=_age, reverse=True)
    room = _Room(traces)
    for trace in newest_first:
        if trace.pinned:
            room.keep(trace, PINNED_SHARE * budget)
    limit = room.taken + HELD_OUT_SHARE * budget
    for trace in newest_first:
        if trace.is_held_out and not room.keep(trace, limit):
            break
    for trace in newest_first:
        if not room.keep(trace, budget):
            break
    return [trace for trace in reversed(newest_first) if trace.request_id not in room.kept]


def _age(trace: HeldTrace) -> tuple[datetime, int]:
    return trace.created_at, trace.request_id


class _Room:
    def __init__(self, traces: Sequence[HeldTrace]) -> None:
        self._by_id = {trace.request_id: trace for trace in traces}
        self.kept: set[int] = set()
        self.taken = 0

    def keep(self, trace: HeldTrace, limit: float) -> bool:
        """Keep a trace and its donors if they find room, or say that they don't."""
        more: dict[int, int] = {}
        one: HeldTrace | None = trace
        while one is not None and one.request_id not in self.kept and one.request_id not in more:
            more[one.request_id] = one.bytes
            one = self._by_id.get(one.donor_id) if one.donor_id is not None else None
        size = sum(more.values())
        if self.taken + size > limit:
            return not more
        self.kept |= more.keys()
        self.taken += size
        return True
