"""What the scheduler of a group does and will do next."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import SchedulerState
from aurora_sgl.store.upsert import upsert


def scheduler_state(s: Session, group_id: int) -> SchedulerState | None:
    return s.get(SchedulerState, group_id, populate_existing=True)


def set_scheduler_state(
    s: Session,
    group_id: int,
    *,
    holder: str,
    state: str,
    reason: str,
    next_action: str,
    next_at: datetime | None,
    details: Mapping[str, Any],
) -> None:
    row = {
        "group_id": group_id,
        "holder": holder,
        "state": state,
        "reason": reason,
        "next_action": next_action,
        "next_at": next_at,
        "details": dict(details),
        "updated_at": utc_now(),
    }
    upsert(s.connection(), SchedulerState, [row], ["group_id"], [c for c in row if c != "group_id"])
