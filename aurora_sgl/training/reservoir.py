"""Requests kept against forgetting: an even sample of each domain's traffic, however old.

A run that only sees recent traffic loses what it does not see. Of each domain the ``reservoir``
requests with the smallest *place* are kept, a number that follows from the conversation alone: so
each conversation that was ever served has the same chance (reservoir sampling by random keys, Fan,
Muller and Rezucha 1962), one request of it at most, and a new one takes the place of another only
when its own is smaller. Their traces are pinned, so that the byte budget takes them last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest

from sqlalchemy.orm import Session

from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.sequences.splits import conversation_of, why_unusable
from aurora_sgl.store import queries
from aurora_sgl.store.pruning.kept import RESERVOIR
from aurora_sgl.store.queries.requests import RecentRequest

#: Domains that have a reservoir: those served last.
DOMAINS = 64


def place_of(row: RecentRequest) -> str:
    """Of a conversation among all others; the same for ever."""
    return sha256_bytes(f"reservoir:{conversation_of(row)}".encode())


def sample(rows: Iterable[RecentRequest], per_domain: int) -> list[RecentRequest]:
    """Of each domain the requests with the smallest places, one a conversation (its newest, or the
    one that is given first), for the ``DOMAINS`` that were served last. ``rows``: in any order."""
    newest = sorted(rows, key=lambda row: (row.finished_at, row.request_id), reverse=True)
    by_domain: dict[str, dict[str, RecentRequest]] = defaultdict(dict)
    for row in newest:
        if per_domain and not why_unusable(row):
            by_domain[row.domain].setdefault(place_of(row), row)
    chosen: list[RecentRequest] = []
    for places in list(by_domain.values())[:DOMAINS]:
        chosen += [places[place] for place in sorted(places)[:per_domain]]
    return chosen


def in_turns(rows: Iterable[RecentRequest], count: int) -> list[RecentRequest]:
    """The first ``count`` of the rows; domains and accept rules take turns, so that a small one is
    heard too."""
    strata: dict[tuple[str, str], list[RecentRequest]] = defaultdict(list)
    for row in rows:
        strata[row.domain, row.accept_rule].append(row)
    turns = zip_longest(*strata.values())
    return [row for turn in turns for row in turn if row is not None][:count]


def held(s: Session, group_id: int, *, besides: Iterable[RecentRequest]) -> list[RecentRequest]:
    """The requests of a group's reservoir whose traces are still there, but for those that are
    known already."""
    present = {row.request_id for row in besides}
    wanted = set(queries.traces.pinned_traces(s, group_id, RESERVOIR)) - present
    return queries.requests.with_traces(s, sorted(wanted))


def pin(s: Session, group_id: int, members: Iterable[RecentRequest]) -> None:
    """Make the reservoir of a group these requests. Traces that went meanwhile are no matter."""
    wanted = {row.request_id for row in members}
    pinned = set(queries.traces.pinned_traces(s, group_id, RESERVOIR))
    queries.traces.unpin_traces(s, sorted(pinned - wanted))
    queries.traces.pin_traces(s, sorted(wanted - pinned), RESERVOIR)
