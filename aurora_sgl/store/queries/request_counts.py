"""Steps and accepted drafts of single requests: the clusters of a ratio's interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from aurora_sgl.store.models import Request, RequestTally, Server

#: Newest boots of a group that are looked at.
_BOOTS = 200


@dataclass(frozen=True)
class RequestCounts:
    """One finished request under one version and draft shape, all of whose draft KV is of that
    version: it was prefilled after the swap. Depth, top-k and nodes 0: shapes of all kinds."""

    request_id: int
    domain: str
    depth: int
    topk: int
    nodes: int  # with the root; 0: not known
    verify_steps: int
    accepted: int
    finished_at: datetime
    accept_rule: str  # of its steps, see ``request.accept_rule``


def request_counts(
    s: Session,
    group_id: int,
    version_id: int,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    after: tuple[datetime, int] | None = None,
    limit: int | None = None,
    newest: bool = False,
) -> list[RequestCounts]:
    """Finished requests of a version with drafts, in the order in which they finished.

    ``after`` is the (finished_at, request id) of the last one that is known. With a limit the
    first ones, or with ``newest`` the last ones. Where a server of the group chooses each step's
    tree by the drafter's confidence, the shapes of a request are taken together: the length that a
    chosen shape has says little of the drafter.
    """
    r, t = Request, RequestTally
    query = (
        select(
            *(t.request_id, r.domain, t.depth, t.topk, t.nodes),
            *(t.verify_steps, t.accepted, r.finished_at, r.accept_rule),
        )
        .join(t, t.request_id == r.id)
        .join(Server, Server.id == r.server_id)
        .where(
            Server.group_id == group_id,
            r.status == "finished",
            t.drafter_version_id == version_id,
            t.depth > 0,
            t.verify_steps > 0,
            ~t.mixed,
        )
    )  # fmt: skip
    if since is not None:
        query = query.where(r.finished_at >= since)
    if until is not None:
        query = query.where(r.finished_at < until)
    if after is not None:
        query = query.where(_behind(*after))
    if newest:
        query = query.order_by(r.finished_at.desc(), r.id.desc(), t.depth, t.topk, t.nodes)
    else:
        query = query.order_by(r.finished_at, r.id, t.depth, t.topk, t.nodes)
    rows = [RequestCounts(**row._mapping) for row in s.execute(query.limit(limit))]
    rows = rows[::-1] if newest else rows
    return _taken_together(rows) if chooses_trees(s, group_id) else rows


def chooses_trees(s: Session, group_id: int) -> bool:
    """Whether a server of the group chooses each step's tree, so that shapes say little of the
    drafter. By the servers that run; where none does, the newest one that did."""
    newest = select(Server.state, Server.counters).where(Server.group_id == group_id)
    boots = s.execute(newest.order_by(Server.id.desc()).limit(_BOOTS)).all()
    running = [boot for boot in boots if boot.state == "running"] or boots[:1]
    return any((boot.counters or {}).get("trees") == 1.0 for boot in running)


def _taken_together(rows: Sequence[RequestCounts]) -> list[RequestCounts]:
    """One for each request, which are in order."""
    return [
        replace(
            parts[0], depth=0, topk=0, nodes=0,
            verify_steps=sum(part.verify_steps for part in parts),
            accepted=sum(part.accepted for part in parts),
        )
        for parts in (list(group) for _, group in groupby(rows, key=lambda row: row.request_id))
    ]  # fmt: skip


def tallies(s: Session, request_id: int) -> Sequence[RequestTally]:
    """Steps and accepted drafts of one request, by version and draft shape."""
    return s.scalars(select(RequestTally).where(RequestTally.request_id == request_id)).all()


def _behind(moment: datetime, request_id: int) -> ColumnElement[bool]:
    return or_(
        Request.finished_at > moment,
        and_(Request.finished_at == moment, Request.id > request_id),
    )
