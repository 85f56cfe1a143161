"""Looking for single requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Float, cast, func, select
from sqlalchemy.orm import Session

from aurora_sgl.intervals import accept_length, or_none
from aurora_sgl.store.models import Request, RequestTally, Server


@dataclass(frozen=True)
class FoundRequest:
    """A finished request. ``accept_length`` is over all its verify steps, also those without
    drafts; ``None``: it made none."""

    request_id: int
    finished_at: datetime
    status: str
    domain: str
    server: str
    version_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    verify_steps: int
    accepted: int
    accept_length: float | None
    seconds: float
    finish_reason: str


def find_requests(
    s: Session,
    group_id: int,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    domains: Sequence[str] = (),
    rid: str | None = None,
    version_id: int | None = None,
    min_accept_length: float | None = None,
    max_accept_length: float | None = None,
    limit: int = 200,
) -> list[FoundRequest]:
    """Requests that ended in [since, until), newest first; ``rid``: what the client calls them."""
    r, t = Request, RequestTally
    length = 1 + cast(r.accepted, Float) / func.nullif(r.verify_steps, 0)
    query = (
        select(r, Server.name)
        .join(Server, Server.id == r.server_id)
        .where(Server.group_id == group_id, r.finished_at.is_not(None))
        .order_by(r.finished_at.desc(), r.id.desc())
        .limit(limit)
    )
    if since is not None:
        query = query.where(r.finished_at >= since)
    if until is not None:
        query = query.where(r.finished_at < until)
    if domains:
        query = query.where(r.domain.in_(domains))
    if rid is not None:
        query = query.where(r.rid == rid)
    if version_id is not None:
        tally = select(t.request_id).where(
            t.request_id == r.id, t.drafter_version_id == version_id, t.depth > 0
        )
        query = query.where(tally.exists())
    if min_accept_length is not None:
        query = query.where(length >= min_accept_length)
    if max_accept_length is not None:
        query = query.where(length <= max_accept_length)
    rows = s.execute(query).all()
    versions = _versions(s, [row[0].id for row in rows])
    return [_row(request, name, versions.get(request.id, ())) for request, name in rows]


def _versions(s: Session, request_ids: Sequence[int]) -> dict[int, tuple[int, ...]]:
    t = RequestTally
    versions: dict[int, tuple[int, ...]] = {}
    for begin in range(0, len(request_ids), 400):
        query = (
            select(t.request_id, t.drafter_version_id)
            .where(t.request_id.in_(request_ids[begin : begin + 400]), t.depth > 0)
            .distinct()
            .order_by(t.request_id, t.drafter_version_id)
        )
        for request_id, version_id in s.execute(query):
            versions[request_id] = (*versions.get(request_id, ()), version_id)
    return versions


def _row(r: Request, server: str, versions: tuple[int, ...]) -> FoundRequest:
    assert r.finished_at is not None
    return FoundRequest(
        request_id=r.id,
        finished_at=r.finished_at,
        status=r.status,
        domain=r.domain,
        server=server,
        version_ids=versions,
        prompt_tokens=r.prompt_tokens,
        completion_tokens=r.completion_tokens,
        verify_steps=r.verify_steps,
        accepted=r.accepted,
        accept_length=or_none(accept_length(r.accepted, r.verify_steps)),
        seconds=(r.finished_at - r.admitted_at).total_seconds(),
        finish_reason=r.finish_reason,
    )
