"""Verify steps with drafts of one version, for comparisons of live traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.store.models import AcceptanceEvent, Request, Server


@dataclass(frozen=True)
class Step:
    """One verify step with drafts, by a version alone."""

    request_id: int
    step: int
    at: datetime
    depth: int
    topk: int
    nodes: int
    batch_size: int
    accepted: int
    kept: int
    accept_rule: str
    domain: str = ""  # of ``steps_between`` only


def steps_of_requests(s: Session, request_ids: Sequence[int], version_id: int) -> list[Step]:
    """Steps with drafts of these requests under one version, by request, in order."""
    e = AcceptanceEvent
    steps: list[Step] = []
    for begin in range(0, len(request_ids), 400):
        query = (
            select(
                e.request_id,
                e.step,
                e.at,
                e.depth,
                e.topk,
                e.nodes,
                e.batch_size,
                e.accepted,
                e.kept,
                e.accept_rule,
            )
            .where(
                e.request_id.in_(request_ids[begin : begin + 400]),
                e.drafter_version_id == version_id,
                e.depth > 0,
                ~e.mixed,
            )
            .order_by(e.request_id, e.step)
        )
        steps += [Step(*row) for row in s.execute(query)]
    return steps


def steps_between(
    s: Session, group_id: int, version_id: int, since: datetime, until: datetime
) -> list[Step]:
    """Steps with drafts that one version alone made in [since, until), by request, in order."""
    e = AcceptanceEvent
    query = (
        select(
            *(e.request_id, e.step, e.at, e.depth, e.topk, e.nodes, e.batch_size, e.accepted),
            *(e.kept, e.accept_rule, Request.domain),
        )
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
