"""Kill switches of a group: ``learning`` and ``auto_promote``. Both are on until turned off.

Without learning no training run goes on and no hidden states are captured; without auto_promote
nothing goes live by itself. Who turned which, when and why stays in the audit.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries

LEARNING, AUTO_PROMOTE = "learning", "auto_promote"
NAMES = (LEARNING, AUTO_PROMOTE)

#: Why a run that the switch ended failed, whether its scheduler or the run itself saw it first.
LEARNING_WENT_OFF = "learning was switched off"


@dataclass(frozen=True)
class SwitchState:
    """``actor``, ``reason`` and ``updated_at`` are of the last change; empty: never changed."""

    name: str
    on: bool
    actor: str = ""
    reason: str = ""
    updated_at: datetime | None = None


@dataclass(frozen=True)
class SwitchChange:
    """What was done, or with ``dry_run`` would be done."""

    name: str
    before: bool
    after: bool
    changed: bool  # False: it stood so already, nothing was written
    dry_run: bool


def read(engine: Engine, group: str) -> list[SwitchState]:
    """Every switch of a group, in the order of ``NAMES``."""
    with store.session(engine, write=False) as s:
        rows = {
            row.name: row
            for row in queries.switches.switches(s, queries.groups.group_by_name(s, group).id)
        }
    return [
        SwitchState(name, row.enabled, row.actor, row.reason, row.updated_at)
        if (row := rows.get(name)) is not None
        else SwitchState(name, True)
        for name in NAMES
    ]


def turn(
    engine: Engine,
    group: str,
    name: str,
    on: bool,
    *,
    actor: str,
    reason: str,
    dry_run: bool = False,
) -> SwitchChange:
    """Turn a switch. Raises ``AuroraError`` for an unknown one, and without actor or reason."""
    if name not in NAMES:
        raise AuroraError(f"there is no switch {name!r}; there is: {', '.join(NAMES)}")
    if not actor.strip() or not reason.strip():
        raise AuroraError(f"switching {name} needs an actor and a reason (--reason)")
    with store.session(engine) as s:
        group_id = queries.groups.lock_group(s, queries.groups.group_by_name(s, group).id).id
        before = queries.switches.is_on(s, group_id, name)
        changed = before != on
        if changed and not dry_run:
            queries.switches.set_switch(
                s, group_id, name, on, actor=actor.strip(), reason=reason.strip()
            )
            queries.audit.add_audit(
                s,
                group_id,
                actor=actor,
                action="switch",
                subject=name,
                reason=reason,
                before={"on": before},
                after={"on": on},
            )
    return SwitchChange(name, before, on, changed, dry_run)
