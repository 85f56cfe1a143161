"""Requests and their traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from aurora_sgl import wire
from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import AcceptanceEvent, Request, Server, Trace
from aurora_sgl.store.upsert import upsert


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
        select(
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
        )
        .join(Trace, Trace.request_id == Request.id)
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


def requests_by_rid(s: Session, rid: str) -> Sequence[Request]:
    """Newest first. A client may send one rid many times; there is no index on it."""
    return s.scalars(select(Request).where(Request.rid == rid).order_by(Request.id.desc())).all()


def add_trace(
    s: Session,
    *,
    request_id: int,
    uri: str,
    bytes: int,
    sha256: str,
    start: int,
    end: int,
    output_start: int,
    prompt_sha256: str,
    head_sha256: str,
    greedy: bool,
    aux_width: int,
    last_width: int,
    dtype: str,
    created_at: datetime | None = None,
) -> None:
    """Record a trace file; a second file of the same request takes the place of the first.

    The request's row must exist (ingest its start first).
    """
    row = {
        "request_id": request_id,
        "uri": uri,
        "bytes": bytes,
        "sha256": sha256,
        "created_at": created_at or utc_now(),
        "start": start,
        "end": end,
        "output_start": output_start,
        "prompt_sha256": prompt_sha256,
        "head_sha256": head_sha256,
        "greedy": greedy,
        "aux_width": aux_width,
        "last_width": last_width,
        "dtype": dtype,
    }
    changed = [column for column in row if column not in ("request_id", "created_at")]
    upsert(s.connection(), Trace, [{**row, "pinned": False}], ["request_id"], changed)
    s.execute(update(Request).where(Request.id == request_id).values(traced=True))


def trace(s: Session, request_id: int) -> Trace | None:
    """Where the hidden states of a request lie; None when it has no trace, or no longer."""
    return s.get(Trace, request_id)


def traces_oldest_first(
    s: Session, limit: int | None = None, *, with_pinned: bool = False
) -> Sequence[Trace]:
    query = select(Trace).order_by(Trace.created_at, Trace.request_id)
    if not with_pinned:
        query = query.where(~Trace.pinned)
    return s.scalars(query.limit(limit)).all()


def trace_bytes_total(s: Session) -> int:
    return int(s.scalar(select(func.coalesce(func.sum(Trace.bytes), 0))) or 0)


def delete_traces(s: Session, request_ids: Sequence[int]) -> None:
    """Forget these traces. Delete their files after the commit: a file without a row is only
    litter, a row without a file is a lie."""
    for begin in range(0, len(request_ids), 500):
        part = request_ids[begin : begin + 500]
        s.execute(delete(Trace).where(Trace.request_id.in_(part)))
        s.execute(update(Request).where(Request.id.in_(part)).values(traced=False))


def pin_traces(s: Session, request_ids: Sequence[int], pinned: bool = True) -> None:
    """Pinned traces are kept beyond the byte budget (a held-out set, for one)."""
    for begin in range(0, len(request_ids), 500):
        part = request_ids[begin : begin + 500]
        s.execute(update(Trace).where(Trace.request_id.in_(part)).values(pinned=pinned))


def count_events(s: Session, server_id: int) -> int:
    """Verify steps of one server that are in the store (until retention takes them)."""
    boot_id = s.scalar(select(Server.boot_id).where(Server.id == server_id))
    if boot_id is None:
        return 0
    first = wire.request_id(boot_id, 1) - 1
    last = first + (1 << wire.REQUEST_COUNTER_BITS) - 1
    return (
        s.scalar(
            select(func.count())
            .select_from(AcceptanceEvent)
            .where(AcceptanceEvent.request_id.between(first, last))
        )
        or 0
    )
