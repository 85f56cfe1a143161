"""How much a group keeps: shown and changed by people, with who, when and why in the audit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.limits import MEANING, NAMES
from aurora_sgl.store import queries


@dataclass(frozen=True)
class LimitState:
    """``set_by`` empty: nobody has set it yet, and the default is shown."""

    name: str
    value: int | None
    meaning: str
    set_by: str = ""
    updated_at: datetime | None = None


@dataclass(frozen=True)
class LimitChange:
    """What was changed, or with ``dry_run`` would be: value before and after, by name."""

    before: dict[str, int | None]
    after: dict[str, int]
    dry_run: bool


def read(engine: Engine, group: str) -> list[LimitState]:
    """Every limit of a group."""
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, group).id
        values = asdict(queries.limits.limits(s, group_id))
        rows = {row.name: row for row in queries.limits.rows(s, group_id)}
    return [
        LimitState(
            name,
            values[name],
            MEANING[name],
            rows[name].actor if name in rows else "",
            rows[name].updated_at if name in rows else None,
        )
        for name in NAMES
    ]


def change(
    engine: Engine,
    group: str,
    values: Mapping[str, int],
    *,
    actor: str,
    reason: str,
    dry_run: bool = False,
) -> LimitChange:
    """Change limits of a group. Raises ``AuroraError`` for unknown ones, for values that make no
    sense together, and without actor or reason."""
    if not actor.strip() or not reason.strip():
        raise AuroraError("changing what a group keeps needs an actor and a reason (--reason)")
    with store.session(engine) as s:
        group_id = queries.groups.lock_group(s, queries.groups.group_by_name(s, group).id).id
        limits = queries.limits.limits(s, group_id)
        limits.changed(values)
        old = asdict(limits)
        after = {name: value for name, value in values.items() if old[name] != value}
        if not dry_run:
            queries.limits.set_limits(s, group_id, values, actor.strip())
        for name, value in after.items() if not dry_run else ():
            queries.audit.add_audit(
                s,
                group_id,
                actor=actor,
                action="limit",
                subject=name,
                reason=reason,
                before={"value": old[name]},
                after={"value": value},
            )
    return LimitChange({name: old[name] for name in after}, after, dry_run)
