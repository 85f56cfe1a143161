"""How fast the steps of running servers are, as their engines last said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.store.models import Server
from aurora_sgl.wire import by_size


@dataclass(frozen=True)
class StepTimes:
    """Median times of a verify step of one server, in milliseconds; ``None``: not measured.

    ``gain``: speed with drafts over that without at the same load; ``gains``: the same by the
    largest of each group of batch sizes."""

    server_id: int
    name: str
    plain_ms: float | None
    draft_ms: float | None
    said_at: datetime
    gain: float | None = None
    gains: Mapping[int, float] = field(default_factory=dict)

    @property
    def break_even(self) -> float | None:
        """The accept length at which a step with drafts pays for itself."""
        return self.draft_ms / self.plain_ms if self.plain_ms and self.draft_ms else None


def step_times(
    s: Session, group_id: int, *, states: tuple[str, ...] = ("running",)
) -> list[StepTimes]:
    """Of the boots in these states, the newest first."""
    query = select(Server).where(Server.group_id == group_id, Server.state.in_(states))
    return [
        StepTimes(
            row.id,
            row.name,
            float(row.counters.get("step_ms_plain") or 0) or None,
            float(row.counters.get("step_ms_spec") or 0) or None,
            row.last_seen_at,
            float(row.counters.get("gain") or 0) or None,
            by_size(row.counters, "gain"),
        )
        for row in s.scalars(query.order_by(Server.last_seen_at.desc()))
    ]
