"""Accept lengths over time, from the roll-ups: what the dashboard draws."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from operator import add
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    String,
    case,
    cast,
    func,
    literal,
    select,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import INTERVAL, TIMESTAMP
from sqlalchemy.orm import Session

from aurora_sgl.intervals import AcceptCounts, or_none
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.models import AcceptanceEvent, AcceptanceMinute, Request, RequestTally, Server
from aurora_sgl.store.queries.clusters import BY_SHAPE, BY_VERSION, cluster_sums

K = TypeVar("K", bound=Hashable)
S = TypeVar("S", bound=Select[Any])

SUMS, OVER_REQUESTS = 8, 4  # numbers of a ``ServedCounts``, and those that are over requests
#: Width of a bucket, and how many characters of SQLite's text of a time name it.
BUCKETS = {"minute": 16, "10 minutes": 15, "hour": 13, "day": 10}
MINUTE = timedelta(minutes=1)  # of a roll-up
_REST = "1970-01-01 00:00:00"


@dataclass(frozen=True)
class ServedCounts:
    """Sums over verify steps with drafts; squares are over requests, see ``AcceptanceMinute``."""

    requests: int = 0
    verify_steps: int = 0
    proposed: int = 0
    accepted: int = 0
    completion_tokens: int = 0
    steps2: int = 0
    accepted2: int = 0
    product: int = 0

    @property
    def counts(self) -> AcceptCounts:
        return AcceptCounts(
            self.requests, self.verify_steps, self.accepted, self.steps2, self.accepted2,
            self.product,
        )  # fmt: skip

    def values(self) -> tuple[int, ...]:
        return (
            self.requests, self.verify_steps, self.proposed, self.accepted,
            self.completion_tokens, self.steps2, self.accepted2, self.product,
        )  # fmt: skip

    def __add__(self, other: ServedCounts) -> ServedCounts:
        return ServedCounts(*map(add, self.values(), other.values()))

    @property
    def accept_length(self) -> float | None:
        return or_none(self.counts.accept_length)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, requests as clusters. Exact where whole requests were summed; a bucket that cuts
        requests in two counts the later part without its request."""
        return self.counts.interval


@dataclass(frozen=True)
class TrendPoint:
    """What one version served to one domain in one bucket of time, under one draft shape.

    Sums of ``served`` over points count a request once whatever shapes it had, sums of
    ``of_shape`` once for each: for points of one shape.
    ``histogram[i]``: steps with i accepted proposals; empty unless it was asked for.
    """

    bucket: datetime
    version_id: int
    domain: str
    depth: int
    topk: int
    nodes: int  # 0: not known
    served: ServedCounts
    histogram: tuple[int, ...] = ()
    of_shape: ServedCounts = ServedCounts()


@dataclass(frozen=True)
class Filter:
    """What is looked at; empty lists mean everything. Times are cut to the minute. Of a draft shape
    all three or none."""

    group_id: int
    since: datetime | None = None
    until: datetime | None = None
    server_ids: tuple[int, ...] = ()
    domains: tuple[str, ...] = ()
    version_ids: tuple[int, ...] = ()
    depth: int | None = None
    topk: int | None = None
    nodes: int | None = None


def trend(
    s: Session, wanted: Filter, bucket: str, *, with_histogram: bool = False
) -> list[TrendPoint]:
    """By bucket (a key of ``BUCKETS``, in UTC), version, domain and draft shape, in this order.

    Steps with drafts, of requests with draft KV of one version only.
    """
    m = AcceptanceMinute
    deepest = -1
    if with_histogram:
        deepest = s.scalar(_where(select(func.max(m.depth)), wanted)) or -1
    counts = [func.sum(func.coalesce(element(s, m.histogram, i), 0)) for i in range(deepest + 1)]
    start = _bucket(s, bucket).label("start")
    keys = (start, m.drafter_version_id, m.domain, m.depth, m.topk, m.nodes)
    query = select(*keys, *_sums(), *counts)
    query = _where(query, wanted).group_by(*keys).order_by(*keys)
    has_shape = wanted.depth is not None
    points, moments = [], dict[str | datetime, datetime]()
    for row in s.execute(query):
        moment = moments.get(row[0]) or moments.setdefault(row[0], _time(row[0]))
        numbers = [int(value) for value in row[len(keys) :]]
        of_shape, wider = ServedCounts(*numbers[:SUMS]), numbers[SUMS : SUMS + OVER_REQUESTS]
        histogram = tuple(numbers[SUMS + OVER_REQUESTS :])
        served = of_shape if has_shape else _over_shapes(of_shape, *wider)
        key = (row[1], row[2], row[3], row[4], row[5])
        points.append(TrendPoint(moment, *key, served, histogram, of_shape))
    return points


def total(points: Iterable[TrendPoint]) -> ServedCounts:
    return by(points, lambda p: 0).get(0, ServedCounts())


def by(
    points: Iterable[TrendPoint], key: Callable[[TrendPoint], K], *, of_shape: bool = False
) -> dict[K, ServedCounts]:
    """Sums by what ``key`` says of a point, in the order of first appearance. ``of_shape``: points
    of a key have one draft shape."""
    totals: dict[K, list[int]] = {}
    for point in points:
        name, values = key(point), (point.of_shape if of_shape else point.served).values()
        sums = totals.get(name)
        totals[name] = list(values) if sums is None else list(map(add, sums, values))
    return {name: ServedCounts(*sums) for name, sums in totals.items()}


def histograms(points: Iterable[TrendPoint], key: Callable[[TrendPoint], K]) -> dict[K, list[int]]:
    """Steps with i accepted proposals, by what ``key`` says of a point."""
    totals: dict[K, list[int]] = {}
    for point in points:
        sums = totals.setdefault(key(point), [])
        sums += [0] * (len(point.histogram) - len(sums))
        for i, count in enumerate(point.histogram):
            sums[i] += count
    return totals


def extent(s: Session, wanted: Filter) -> tuple[datetime, datetime] | None:
    """The first and the last verify step with drafts, for a bucket's span; to the minute where
    events are gone already. ``None``: there was none."""
    m = AcceptanceMinute
    ends: list[ColumnElement[Any]] = [func.min(m.bucket_start), func.max(m.bucket_start)]
    begin, end = s.execute(_where(select(*ends), wanted)).one()
    if begin is None:
        return None
    first, last = (_steps_of_minute(s, wanted, minute) for minute in (begin, end))
    return first[0] or begin, last[1] or end + MINUTE


def _steps_of_minute(
    s: Session, wanted: Filter, minute: datetime
) -> tuple[datetime | None, datetime | None]:
    e, r = AcceptanceEvent, Request
    servers = select(Server.id).where(Server.group_id == wanted.group_id)
    query = (
        select(func.min(e.at), func.max(e.at))
        .join(r, r.id == e.request_id)
        .where(e.at >= minute, e.at < minute + MINUTE, e.depth > 0, ~e.mixed)
        .where(r.server_id.in_(wanted.server_ids or servers))
    )
    if wanted.version_ids:
        query = query.where(e.drafter_version_id.in_(wanted.version_ids))
    if wanted.domains:
        query = query.where(r.domain.in_(wanted.domains))
    row = s.execute(query).one()
    return row[0], row[1]


def served_by_version(s: Session, version_ids: Sequence[int]) -> dict[int, ServedCounts]:
    """All that versions served so far, from the sums of single requests: exact intervals."""
    t = RequestTally
    request = (
        select(
            t.drafter_version_id.label("version_id"),
            func.sum(t.verify_steps).label("n"),
            func.sum(t.accepted).label("y"),
        )
        .where(t.depth > 0, ~t.mixed)
        .group_by(t.request_id, t.drafter_version_id)
        .subquery()
        .c
    )
    n, y = func.sum(request.n), func.sum(request.y)
    query = select(
        *(request.version_id, func.count(), n, literal(0), y, n + y),
        func.sum(request.n * request.n),
        func.sum(request.y * request.y),
        func.sum(request.n * request.y),
    ).group_by(request.version_id)
    asked = set(version_ids)
    return {row[0]: ServedCounts(*map(int, row[1:])) for row in s.execute(query) if row[0] in asked}


def last_minute(s: Session, group_id: int) -> datetime | None:
    """The newest minute in which a verify step was made, with drafts or not."""
    m = AcceptanceMinute
    servers = select(Server.id).where(Server.group_id == group_id)
    query = select(m.bucket_start).where(m.server_id.in_(servers))
    return s.scalar(query.order_by(m.bucket_start.desc()).limit(1))


def tokens_kept(
    s: Session, group_id: int, since: datetime, until: datetime
) -> tuple[int, int, int]:
    """(tokens, verify steps, verify steps with drafts) of all requests in a span of minutes."""
    m = AcceptanceMinute
    servers = select(Server.id).where(Server.group_id == group_id)
    query = select(
        func.coalesce(func.sum(m.completion_tokens), 0),
        func.coalesce(func.sum(m.verify_steps), 0),
        func.coalesce(func.sum(case((m.depth > 0, m.verify_steps), else_=0)), 0),
    ).where(m.server_id.in_(servers), m.bucket_start >= since, m.bucket_start < until)
    row = s.execute(query).one()
    return int(row[0]), int(row[1]), int(row[2])


def domains(s: Session, group_id: int, since: datetime | None = None) -> list[str]:
    """Domains that were served since then, by name."""
    query = _where(select(AcceptanceMinute.domain).distinct(), Filter(group_id, since))
    return sorted(s.scalars(query))


def _sums() -> list[ColumnElement[Any]]:
    """Those of a ``ServedCounts`` of one draft shape, and the four over all shapes."""
    m = AcceptanceMinute
    columns = (m.verify_steps, m.proposed, m.accepted, m.completion_tokens)
    requests, *squares = cluster_sums(BY_SHAPE)
    steps = [func.sum(column) for column in columns]
    return [requests, *steps, *squares, *cluster_sums(BY_VERSION)]


def _over_shapes(
    of_shape: ServedCounts, requests: int, steps2: int, accepted2: int, product: int
) -> ServedCounts:
    return replace(of_shape, requests=requests, steps2=steps2, accepted2=accepted2, product=product)


def _where(query: S, wanted: Filter) -> S:
    m = AcceptanceMinute
    servers = select(Server.id).where(Server.group_id == wanted.group_id)
    query = query.where(m.server_id.in_(servers), m.depth > 0, ~m.mixed)
    if wanted.since is not None:
        query = query.where(m.bucket_start >= wanted.since.replace(second=0, microsecond=0))
    if wanted.until is not None:
        query = query.where(m.bucket_start < wanted.until)
    if wanted.server_ids:
        query = query.where(m.server_id.in_(wanted.server_ids))
    if wanted.domains:
        query = query.where(m.domain.in_(wanted.domains))
    if wanted.version_ids:
        query = query.where(m.drafter_version_id.in_(wanted.version_ids))
    if wanted.depth is not None:
        query = query.where(m.depth == wanted.depth)
    if wanted.topk is not None:
        query = query.where(m.topk == wanted.topk)
    if wanted.nodes is not None:
        query = query.where(m.nodes == wanted.nodes)
    return query


def _bucket(s: Session, bucket: str) -> ColumnElement[Any]:
    start = AcceptanceMinute.bucket_start
    if is_sqlite(s.connection()):
        return type_coerce(func.substr(start, 1, BUCKETS[bucket]), String)
    minutes = {"minute": "1 minute", "10 minutes": "10 minutes", "hour": "1 hour", "day": "1 day"}
    width = cast(literal(minutes[bucket]), INTERVAL)
    origin = cast(literal("1970-01-01T00:00:00Z"), TIMESTAMP(timezone=True))
    return func.date_bin(width, start, origin)


def _time(value: str | datetime) -> datetime:
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    return datetime.fromisoformat(value + _REST[len(value) :]).replace(tzinfo=UTC)


def element(s: Session, column: Any, index: int) -> ColumnElement[Any]:
    """One number of a list that a column holds."""
    if is_sqlite(s.connection()):
        return func.json_extract(type_coerce(column, String), f"$[{index}]")
    return cast(func.jsonb_extract_path_text(column, str(index)), BigInteger)
