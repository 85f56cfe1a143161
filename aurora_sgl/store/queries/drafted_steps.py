"""Verify steps with drafts, summed by what decides how long each took."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl.store.models import AcceptanceMinute, Server


class DraftedSteps(NamedTuple):
    """Steps of one boot in one domain, at one load and in one draft shape."""

    server_id: int
    domain: str
    batch_bucket: int  # the largest of its group of batch sizes
    depth: int
    nodes: int  # with the root; 0: not known
    steps: int
    tokens: int  # kept


def drafted_steps(
    s: Session, group_id: int, since: datetime, until: datetime
) -> list[DraftedSteps]:
    """Of all requests of a group in a span of minutes, those with draft KV of several versions
    too: they were served."""
    m = AcceptanceMinute
    servers = select(Server.id).where(Server.group_id == group_id)
    keys = (m.server_id, m.domain, m.batch_bucket, m.depth, m.nodes)
    query = (
        select(*keys, func.sum(m.verify_steps), func.sum(m.completion_tokens))
        .where(m.server_id.in_(servers), m.depth > 0)
        .where(m.bucket_start >= since, m.bucket_start < until)
        .group_by(*keys)
    )
    return [DraftedSteps(*row[:5], int(row[5]), int(row[6])) for row in s.execute(query)]
