"""Served requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session, aliased

from aurora_sgl.store.models import Request, Server, Trace


@dataclass(frozen=True)
class RecentRequest:
    """A finished request with its trace."""

    request_id: int
    domain: str
    conversation_hash: str
    admitted_at: datetime
    finished_at: datetime
    sampling: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    uri: str
    sha256: str
    bytes: int
    start: int
    end: int
    output_start: int
    prompt_sha256: str
    head_sha256: str
    greedy: bool
    accept_rule: str  # greedy | target_sampling | rejection_sampling; "": not known
    donor_id: int | None = None  # the request whose trace holds the row before ``start``


def recent_requests(
    s: Session,
    group_id: int,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
    domains: Sequence[str] | None = None,
    only_trainable: bool = True,
    newest_first: bool = True,
) -> list[RecentRequest]:
    """Finished requests of a group that have a trace, finished in [since, until).

    With a limit the newest are taken, whatever the order; ``newest_first=False`` returns them in
    the order in which they finished.
    """
    query = (
        _with_traces()
        .join(Server, Server.id == Request.server_id)
        .where(Server.group_id == group_id, Request.status == "finished")
        .order_by(Request.finished_at.desc(), Request.id.desc())
    )
    if since is not None:
        query = query.where(Request.finished_at >= since)
    if until is not None:
        query = query.where(Request.finished_at < until)
    if domains is not None:
        query = query.where(Request.domain.in_(domains))
    if only_trainable:
        query = query.where(Request.may_train)
    if limit is not None:
        query = query.limit(limit)
    rows = [RecentRequest(**row._mapping) for row in s.execute(query)]
    return rows if newest_first else rows[::-1]


def donors(s: Session, rows: Sequence[RecentRequest]) -> list[RecentRequest]:
    """Requests whose traces hold what the traces of ``rows`` lack, but for those among ``rows``:
    they may be much older. Only such as may be learnt from."""
    held = {row.request_id for row in rows}
    more: list[RecentRequest] = []
    missing = {row.donor_id for row in rows} - held
    while wanted := sorted(one for one in missing if one is not None)[:500]:
        these = with_traces(s, wanted)
        more += these
        held |= set(wanted)
        missing = (missing | {row.donor_id for row in these}) - held
    return more


def with_traces(s: Session, request_ids: Sequence[int]) -> list[RecentRequest]:
    """Those of these requests that finished, have a trace and may be learnt from, by id."""
    rows: list[RecentRequest] = []
    for begin in range(0, len(request_ids), 500):
        query = _with_traces().where(
            Request.id.in_(request_ids[begin : begin + 500]),
            Request.may_train,
            Request.status == "finished",
        )
        rows += [RecentRequest(**row._mapping) for row in s.execute(query.order_by(Request.id))]
    return rows


def _with_traces() -> Select[Any]:
    """The columns of ``RecentRequest``."""
    return select(
        Request.id.label("request_id"),
        Request.domain,
        Request.conversation_hash,
        Request.admitted_at,
        Request.finished_at,
        Request.sampling,
        Request.prompt_tokens,
        Request.completion_tokens,
        Request.accept_rule,
        Trace.uri,
        Trace.sha256,
        Trace.bytes,
        Trace.start,
        Trace.end,
        Trace.output_start,
        Trace.prompt_sha256,
        Trace.head_sha256,
        Trace.greedy,
        Trace.donor_id,
    ).join(Trace, Trace.request_id == Request.id)


def count_finished(s: Session, group_id: int, *, since: datetime | None = None) -> int:
    """Finished requests of a group, with a trace or not."""
    query = (
        select(func.count())
        .select_from(Request)
        .join(Server, Server.id == Request.server_id)
        .where(Server.group_id == group_id, Request.status == "finished")
    )
    if since is not None:
        query = query.where(Request.finished_at >= since)
    return s.scalar(query) or 0


def request(s: Session, request_id: int) -> Request | None:
    return s.get(Request, request_id)


def accept_rules(s: Session, request_ids: Sequence[int]) -> dict[int, str]:
    """The accept rules of those of these requests that are still stored."""
    rules: dict[int, str] = {}
    for begin in range(0, len(request_ids), 400):
        part = request_ids[begin : begin + 400]
        query = select(Request.id, Request.accept_rule).where(Request.id.in_(part))
        rules |= {row.id: row.accept_rule for row in s.execute(query)}
    return rules


def requests_by_rid(s: Session, rid: str) -> Sequence[Request]:
    """Newest first. A client may send one rid many times; there is no index on it."""
    return s.scalars(select(Request).where(Request.rid == rid).order_by(Request.id.desc())).all()


def count_trainable(s: Session, group_id: int, *, since: datetime | None = None) -> int:
    """Finished requests that may be learnt from and still can, finished after a moment: their
    trace is there, and the one that holds its prefix, if it lacks one. (Of rows from before schema
    0014 only the trace is asked for.)"""
    donor = aliased(Trace)
    query = (
        select(func.count())
        .select_from(Request)
        .join(Server, Server.id == Request.server_id)
        .join(Trace, Trace.request_id == Request.id)
        .join(donor, donor.request_id == Trace.donor_id, isouter=True)
        .where(
            Server.group_id == group_id,
            Request.status == "finished",
            Request.may_train,
            or_(Trace.prefix_sha256 == "", donor.request_id.is_not(None)),
        )
    )
    if since is not None:
        query = query.where(Request.finished_at > since)
    return s.scalar(query) or 0


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
