"""Freezes of a group: while one goes on, nothing is promoted by itself. People may, and the watch
still rolls back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries
from aurora_sgl.store.models import FreezeWindow


def sentence(freeze: FreezeWindow) -> str:
    return f"frozen until {freeze.ends_at:%Y-%m-%d %H:%M} UTC by {freeze.actor}: {freeze.reason}"


def refusal(s: Session, group_id: int, now: datetime | None = None) -> str:
    """Why nothing may go live by itself now; "": it may."""
    freeze = queries.freezes.current_freeze(s, group_id, now)
    return sentence(freeze) if freeze is not None else ""


def current(engine: Engine, group: str) -> FreezeWindow | None:
    """The freeze that goes on; ``None``: none does."""
    with store.session(engine, write=False) as s:
        return queries.freezes.current_freeze(s, queries.groups.group_by_name(s, group).id)


def freezes(engine: Engine, group: str, *, limit: int | None = None) -> Sequence[FreezeWindow]:
    """All of a group, also those that are over, are to come or were lifted; last end first."""
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, group).id
        return queries.freezes.freezes(s, group_id, limit=limit)


def add(
    engine: Engine,
    group: str,
    *,
    starts_at: datetime,
    ends_at: datetime,
    actor: str,
    reason: str,
) -> FreezeWindow:
    """Freeze a group from one moment to another.

    Raises ``AuroraError`` without actor or reason, and when the end is not after the beginning or
    is past.
    """
    _require(actor, reason)
    if ends_at <= starts_at:
        raise AuroraError(
            f"a freeze must end after it begins: {starts_at:%Y-%m-%d %H:%M} to "
            f"{ends_at:%Y-%m-%d %H:%M} UTC"
        )
    if ends_at <= utc_now():
        raise AuroraError(f"this freeze would be over already: {ends_at:%Y-%m-%d %H:%M} UTC")
    with store.session(engine) as s:
        group_id = queries.groups.lock_group(s, queries.groups.group_by_name(s, group).id).id
        row = queries.freezes.add_freeze(
            s, group_id, starts_at=starts_at, ends_at=ends_at, actor=actor.strip(),
            reason=reason.strip(),
        )  # fmt: skip
        queries.audit.add_audit(
            s, group_id, actor=actor, action="freeze", subject=f"freeze {row.id}", reason=reason,
            after={"from": starts_at.isoformat(), "to": ends_at.isoformat()},
        )  # fmt: skip
        return row


def lift(engine: Engine, group: str, freeze_id: int, *, actor: str, reason: str) -> FreezeWindow:
    """End a freeze before its time, or one that has not begun.

    Raises ``AuroraError`` when there is none of this number, when it is over or was lifted, and
    without actor or reason.
    """
    _require(actor, reason)
    with store.session(engine) as s:
        group_id = queries.groups.lock_group(s, queries.groups.group_by_name(s, group).id).id
        row = queries.freezes.freeze(s, group_id, freeze_id)
        if row.lifted_at is not None:
            raise AuroraError(f"freeze {freeze_id} was lifted before, by {row.lifted_by}")
        now = utc_now()
        if row.ends_at <= now:
            raise AuroraError(f"freeze {freeze_id} is over since {row.ends_at:%Y-%m-%d %H:%M} UTC")
        row.lifted_at, row.lifted_by = now, actor.strip()
        queries.audit.add_audit(
            s, group_id, actor=actor, action="lift", subject=f"freeze {freeze_id}", reason=reason,
            before={"to": row.ends_at.isoformat()},
        )  # fmt: skip
        return row


def _require(actor: str, reason: str) -> None:
    if not actor.strip() or not reason.strip():
        raise AuroraError("a freeze needs an actor and a reason (--reason)")
