"""What was served in a window of time: requests as clusters, and steps with their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from aurora_sgl.store.models import AcceptanceEvent, AcceptanceMinute, Request, RequestTally, Server


@dataclass(frozen=True)
class Cluster:
    """One finished request under one version and draft shape, all of whose draft KV is of that
    version: it was prefilled after the swap."""

    request_id: int
    domain: str
    depth: int
    topk: int
    verify_steps: int
    accepted: int
    finished_at: datetime


def clusters(
    s: Session,
    group_id: int,
    version_id: int,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    after: tuple[datetime, int] | None = None,
    limit: int | None = None,
    newest: bool = False,
) -> list[Cluster]:
    """Finished requests of a version with drafts, in the order in which they finished.

    ``after`` is the (finished_at, request id) of the last one that is known. With a limit the
    first ones, or with ``newest`` the last ones.
    """
    r, t = Request, RequestTally
    query = (
        select(
            *(t.request_id, r.domain, t.depth, t.topk, t.verify_steps, t.accepted, r.finished_at)
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
        query = query.order_by(r.finished_at.desc(), r.id.desc(), t.depth, t.topk)
    else:
        query = query.order_by(r.finished_at, r.id, t.depth, t.topk)
    rows = [Cluster(**row._mapping) for row in s.execute(query.limit(limit))]
    return rows[::-1] if newest else rows


def tallies(s: Session, request_id: int) -> Sequence[RequestTally]:
    """Steps and accepted drafts of one request, by version and draft shape."""
    return s.scalars(select(RequestTally).where(RequestTally.request_id == request_id)).all()


def _behind(moment: datetime, request_id: int) -> ColumnElement[bool]:
    return or_(
        Request.finished_at > moment,
        and_(Request.finished_at == moment, Request.id > request_id),
    )


def first_finished(s: Session, group_id: int, since: datetime) -> datetime | None:
    """When the first request, with drafts or not, finished after a moment."""
    return s.scalar(
        select(func.min(Request.finished_at))
        .join(Server, Server.id == Request.server_id)
        .where(
            Server.group_id == group_id,
            Request.finished_at >= since,
            Request.status == "finished",
            Request.completion_tokens > 1,
        )
    )


@dataclass(frozen=True)
class Step:
    """One verify step with drafts, by a version alone."""

    request_id: int
    step: int
    at: datetime
    depth: int
    topk: int
    batch_size: int
    accepted: int
    kept: int


def steps_of_requests(s: Session, request_ids: Sequence[int], version_id: int) -> list[Step]:
    """Steps with drafts of these requests under one version, by request, in order."""
    e = AcceptanceEvent
    found: list[Step] = []
    for begin in range(0, len(request_ids), 400):
        query = (
            select(e.request_id, e.step, e.at, e.depth, e.topk, e.batch_size, e.accepted, e.kept)
            .where(
                e.request_id.in_(request_ids[begin : begin + 400]),
                e.drafter_version_id == version_id,
                e.depth > 0,
                ~e.mixed,
            )
            .order_by(e.request_id, e.step)
        )
        found += [Step(*row) for row in s.execute(query)]
    return found


def steps_between(
    s: Session, group_id: int, version_id: int, since: datetime, until: datetime
) -> list[Step]:
    """Steps with drafts that one version alone made in [since, until), by request, in order."""
    e = AcceptanceEvent
    query = (
        select(e.request_id, e.step, e.at, e.depth, e.topk, e.batch_size, e.accepted, e.kept)
        .join(Request, Request.id == e.request_id)
        .join(Server, Server.id == Request.server_id)
        .where(
            Server.group_id == group_id,
            e.at >= since,
            e.at < until,
            e.drafter_version_id == version_id,
            e.depth > 0,
            ~e.mixed,
        )
        .order_by(e.request_id, e.step)
    )
    return [Step(*row) for row in s.execute(query)]


def count_trainable(s: Session, group_id: int, *, since: datetime | None = None) -> int:
    """Finished requests with a trace that may be learnt from, finished after a moment."""
    query = (
        select(func.count())
        .select_from(Request)
        .join(Server, Server.id == Request.server_id)
        .where(
            Server.group_id == group_id,
            Request.status == "finished",
            Request.may_train,
            Request.traced,
        )
    )
    if since is not None:
        query = query.where(Request.finished_at > since)
    return s.scalar(query) or 0


def served_shape(s: Session, group_id: int) -> tuple[int, int, int] | None:
    """(depth, top-k, nodes) that the group's newest server was started with, running or not, or of
    most steps with drafts where it did not say; ``None``: nobody knows. Busy steps may carry
    smaller trees; what is trained and replayed are whole ones."""
    query = select(Server).where(Server.group_id == group_id)
    server = s.scalar(query.order_by(Server.state != "running", Server.id.desc()).limit(1))
    said = server.counters if server is not None else {}
    if said.get("depth") and said.get("topk") and said.get("nodes"):
        return int(said["depth"]), int(said["topk"]), int(said["nodes"])
    m = AcceptanceMinute
    steps = func.sum(m.verify_steps)
    minutes = (
        select(m.depth, m.topk, steps, func.sum(m.proposed))
        .join(Server, Server.id == m.server_id)
        .where(Server.group_id == group_id, m.depth > 0)
        .group_by(m.depth, m.topk)
        .order_by(steps.desc())
        .limit(1)
    )
    row = s.execute(minutes).one_or_none()
    return None if row is None else (row[0], row[1], 1 + round(int(row[3]) / int(row[2])))
