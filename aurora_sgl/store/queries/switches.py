"""Kill switches."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import Switch
from aurora_sgl.store.upsert import upsert


def set_switch(
    s: Session, group_id: int, name: str, enabled: bool, *, actor: str, reason: str
) -> None:
    """Raises ``AuroraError`` without an actor or a reason."""
    if not actor.strip() or not reason.strip():
        raise AuroraError(f"switching {name} needs an actor and a reason (--reason)")
    row = {
        "group_id": group_id,
        "name": name,
        "enabled": enabled,
        "actor": actor,
        "reason": reason,
        "updated_at": utc_now(),
    }
    change = ["enabled", "actor", "reason", "updated_at"]
    upsert(s.connection(), Switch, [row], ["group_id", "name"], change)


def is_on(s: Session, group_id: int, name: str) -> bool:
    """A switch that was never set is on."""
    enabled = s.scalar(
        select(Switch.enabled).where(Switch.group_id == group_id, Switch.name == name)
    )
    return True if enabled is None else enabled


def switches(s: Session, group_id: int) -> Sequence[Switch]:
    return s.scalars(select(Switch).where(Switch.group_id == group_id).order_by(Switch.name)).all()
