"""How fast the steps of running servers are, as their engines last said."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.step_cost import ShapeTimes, StepCost, TreeShare, tree_shares
from aurora_sgl.store.models import Server


@dataclass(frozen=True)
class StepTimes:
    """What one server last told of its steps."""

    server_id: int
    name: str
    seen_at: datetime
    cost: StepCost
    trees: tuple[TreeShare, ...] = ()


def step_times(
    s: Session, group_id: int, *, states: tuple[str, ...] = ("running",)
) -> list[StepTimes]:
    """Of the boots in these states, the newest first."""
    query = select(Server).where(Server.group_id == group_id, Server.state.in_(states))
    return [
        StepTimes(
            *(row.id, row.name, row.last_seen_at),
            StepCost.of(row.counters),
            tuple(tree_shares(row.counters)),
        )
        for row in s.scalars(query.order_by(Server.last_seen_at.desc()))
    ]


def shape_times(s: Session, group_id: int) -> dict[int, ShapeTimes]:
    """What steps of every boot that there is a row of take, as it said last, by its id."""
    query = select(Server.id, Server.counters).where(Server.group_id == group_id)
    return {row[0]: ShapeTimes.of(row[1] or {}) for row in s.execute(query)}
