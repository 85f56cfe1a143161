"""What versions served, told apart by what else decides how much is accepted: draft shape, accept
rule and domain. From the roll-ups, which have each request once in the rows of one draft shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.store.models import AcceptanceHour, AcceptanceMinute
from aurora_sgl.store.queries.clusters import BY_SHAPE, BY_VERSION
from aurora_sgl.store.queries.trends import element
from aurora_sgl.store.rollup import CLUSTER_SUMS


@dataclass(frozen=True)
class ServedStratum:
    """Depth, top-k and nodes are 0 where shapes are taken together; ``nodes`` 0 alone: not
    known."""

    domain: str
    accept_rule: str
    depth: int
    topk: int
    nodes: int  # with the root


@dataclass(frozen=True)
class DepthCounts:
    """Verify steps of one version in one stratum; ``reached[i]`` of them accepted a proposal at
    depth i + 1."""

    steps: int
    reached: tuple[int, ...]


def served_strata(
    s: Session, version_id: int, *, over_shapes: bool = False
) -> dict[ServedStratum, AcceptCounts]:
    """Steps with drafts of requests with draft KV of this version alone, ever. ``over_shapes``:
    a request under several draft shapes counts once, with all of them."""
    h = AcceptanceHour
    ends = _ends(s, version_id)
    if ends is None:
        return {}
    clusters = BY_VERSION if over_shapes else BY_SHAPE
    shape: list[Any] = [] if over_shapes else [h.depth, h.topk, h.nodes]
    requests, *squares = (func.sum(getattr(h, clusters + name)) for name in CLUSTER_SUMS)
    query = (
        select(h.domain, h.accept_rule, *shape, requests, func.sum(h.verify_steps),
               func.sum(h.accepted), *squares)
        .where(h.hour >= ends[0].replace(minute=0, second=0, microsecond=0), h.hour <= ends[1])
        .where(h.drafter_version_id == version_id, h.depth > 0, ~h.mixed)
        .group_by(h.domain, h.accept_rule, *shape)
    )  # fmt: skip
    strata = {}
    for row in s.execute(query):
        key = ServedStratum(row[0], row[1], *((0, 0, 0) if over_shapes else row[2:5]))
        strata[key] = AcceptCounts(*map(int, row[-6:]))
    return strata


def positions(
    s: Session, version_id: int, *, newest: timedelta
) -> Iterator[tuple[ServedStratum, DepthCounts]]:
    """Steps with drafts of the last ``newest`` in which this version served, by stratum."""
    m = AcceptanceMinute
    ends = _ends(s, version_id)
    if ends is None:
        return
    mine = (m.drafter_version_id == version_id, m.bucket_start > ends[1] - newest)
    deepest = s.scalar(select(func.max(m.depth)).where(*mine, m.depth > 0, ~m.mixed)) or 0
    keys = (m.domain, m.accept_rule, m.depth, m.topk, m.nodes)
    counts = [func.sum(func.coalesce(element(s, m.per_position, i), 0)) for i in range(deepest)]
    query = (
        select(*keys, func.sum(m.verify_steps), *counts)
        .where(*mine, m.depth > 0, ~m.mixed)
        .group_by(*keys)
    )
    for row in s.execute(query):
        stratum = ServedStratum(*row[:5])
        yield stratum, DepthCounts(int(row[5]), tuple(map(int, row[6 : 6 + stratum.depth])))


def _ends(s: Session, version_id: int) -> tuple[datetime, datetime] | None:
    """The first and the last minute of a version: its rows of hours lie between them."""
    m = AcceptanceMinute
    begin, end = (
        s.scalar(select(way(m.bucket_start)).where(m.drafter_version_id == version_id))
        for way in (func.min, func.max)
    )
    return None if begin is None or end is None else (begin, end)
