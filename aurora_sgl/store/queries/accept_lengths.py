"""Accept lengths of what was served, with the delta method's interval over requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Row, Select, func, select
from sqlalchemy.orm import Session

from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.store.models import (
    AcceptanceEvent,
    AcceptanceMinute,
    Request,
    RequestTally,
    Server,
)
from aurora_sgl.store.queries.clusters import BY_SHAPE, BY_VERSION, WHOLE, cluster_sums


@dataclass(frozen=True)
class AcceptLength:
    """Verify steps of one version (and domain). ``accept_length`` counts the bonus token."""

    version_id: int
    domain: str  # "": all of them
    requests: int
    verify_steps: int
    proposed: int
    accepted: int
    completion_tokens: int
    accept_length: float
    ci_low: float | None  # 95%, requests as clusters; None below two requests
    ci_high: float | None


def accept_length_by_version(
    s: Session,
    group_id: int,
    *,
    min_swap_age: int = 0,
    since: datetime | None = None,
    until: datetime | None = None,
    depth: int | None = None,
    topk: int | None = None,
    nodes: int | None = None,
    accept_rule: str | None = None,
    domains: Sequence[str] | None = None,
    with_mixed: bool = False,
    by_domain: bool = False,
) -> list[AcceptLength]:
    """What each version reached, over steps with proposals; in the order of version ids.

    Only requests whose draft KV is of one version, unless ``with_mixed``. Read from the roll-ups
    (times are then cut to the minute), which can't count a request once under a part of a draft
    shape or under one with mixed steps: that, and ``min_swap_age``, is read from the events.
    """
    shape = {"depth": depth, "topk": topk, "nodes": nodes}
    is_whole = None not in shape.values()
    narrowed = any(value is not None for value in shape.values())
    from_events = min_swap_age > 0 or (narrowed and (with_mixed or not is_whole))
    table = AcceptanceEvent if from_events else AcceptanceMinute
    domain = Request.domain if from_events else AcceptanceMinute.domain
    if from_events:
        query = _from_events(since, until, by_domain).where(
            AcceptanceEvent.swap_age >= min_swap_age
        )
    else:
        clusters = BY_SHAPE if is_whole else WHOLE if with_mixed else BY_VERSION
        query = _from_minutes(since, until, by_domain, clusters)
    query = query.where(Server.group_id == group_id)
    for name, value in (shape | {"accept_rule": accept_rule}).items():
        if value is not None:
            query = query.where(getattr(table, name) == value)
    if not with_mixed:
        query = query.where(~table.mixed)
    if domains is not None:
        query = query.where(domain.in_(domains))
    if from_events:
        query = _clustered(query)
    return [_accept_length(row) for row in s.execute(query)]


def per_request(
    s: Session,
    group_id: int,
    version_id: int,
    *,
    depth: int | None = None,
    topk: int | None = None,
    nodes: int | None = None,
    with_mixed: bool = False,
) -> list[tuple[int, int, int]]:
    """(request id, verify steps, accepted) under one version: what pairs and resamples."""
    query = (
        select(
            RequestTally.request_id,
            func.sum(RequestTally.verify_steps),
            func.sum(RequestTally.accepted),
        )
        .join(Request, Request.id == RequestTally.request_id)
        .join(Server, Server.id == Request.server_id)
        .where(
            Server.group_id == group_id,
            RequestTally.drafter_version_id == version_id,
            RequestTally.depth > 0,
        )
        .group_by(RequestTally.request_id)
        .order_by(RequestTally.request_id)
    )
    if depth is not None:
        query = query.where(RequestTally.depth == depth)
    if topk is not None:
        query = query.where(RequestTally.topk == topk)
    if nodes is not None:
        query = query.where(RequestTally.nodes == nodes)
    if not with_mixed:
        query = query.where(~RequestTally.mixed)
    return [(int(row[0]), int(row[1]), int(row[2])) for row in s.execute(query)]


def _from_minutes(
    since: datetime | None, until: datetime | None, by_domain: bool, clusters: str
) -> Select[*tuple[object, ...]]:
    m = AcceptanceMinute
    keys = [m.drafter_version_id, *([m.domain] if by_domain else [])]
    names = ("requests", "steps2", "accepted2", "product")
    query = (
        select(
            *keys,
            func.sum(m.verify_steps).label("steps"),
            func.sum(m.proposed).label("proposed"),
            func.sum(m.accepted).label("accepted"),
            func.sum(m.completion_tokens).label("kept"),
            *(total.label(name) for total, name in zip(cluster_sums(clusters), names, strict=True)),
        )
        .join(Server, Server.id == m.server_id)
        .where(m.depth > 0)
        .group_by(*keys)
        .order_by(*keys)
    )
    if since is not None:
        query = query.where(m.bucket_start >= since.replace(second=0, microsecond=0))
    if until is not None:
        query = query.where(m.bucket_start < until)
    return query


def _from_events(
    since: datetime | None, until: datetime | None, by_domain: bool
) -> Select[*tuple[object, ...]]:
    e = AcceptanceEvent
    keys = [e.drafter_version_id, *([Request.domain] if by_domain else [])]
    query = (
        select(
            *keys,
            func.count().label("n"),
            func.sum(e.proposed).label("proposed"),
            func.sum(e.accepted).label("y"),
            func.sum(e.kept).label("kept"),
        )
        .join(Request, Request.id == e.request_id)
        .join(Server, Server.id == Request.server_id)
        .where(e.depth > 0)
        .group_by(*keys, e.request_id)
    )
    if since is not None:
        query = query.where(e.at >= since)
    if until is not None:
        query = query.where(e.at < until)
    return query


def _clustered(per_request: Select[*tuple[object, ...]]) -> Select[*tuple[object, ...]]:
    r = per_request.subquery().c
    keys = [r.drafter_version_id, *([r.domain] if "domain" in r else [])]
    return (
        select(
            *keys,
            func.count().label("requests"),
            func.sum(r.n).label("steps"),
            func.sum(r.proposed).label("proposed"),
            func.sum(r.y).label("accepted"),
            func.sum(r.kept).label("kept"),
            func.sum(r.n * r.n).label("steps2"),
            func.sum(r.y * r.y).label("accepted2"),
            func.sum(r.n * r.y).label("product"),
        )
        .group_by(*keys)
        .order_by(*keys)
    )


def _accept_length(row: Row[*tuple[object, ...]]) -> AcceptLength:
    counts = AcceptCounts(
        int(row.requests), int(row.steps), int(row.accepted),
        float(row.steps2), float(row.accepted2), float(row.product),
    )  # fmt: skip
    interval = counts.interval
    return AcceptLength(
        version_id=row.drafter_version_id,
        domain=getattr(row, "domain", ""),
        requests=counts.requests,
        verify_steps=int(row.steps),
        proposed=int(row.proposed),
        accepted=int(row.accepted),
        completion_tokens=int(row.kept),
        accept_length=counts.accept_length,
        ci_low=interval[0] if interval else None,
        ci_high=interval[1] if interval else None,
    )
