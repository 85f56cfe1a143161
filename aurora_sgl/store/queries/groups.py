"""Deployment groups."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import DeploymentGroup
from aurora_sgl.store.upsert import insert_missing, storable


def ensure_group(
    s: Session, name: str, target_model: str, target_revision: str, draft_architecture: str
) -> DeploymentGroup:
    """The group of that name, made when it is missing.

    Raises ``AuroraError`` when it exists for another target, revision or draft architecture.
    """
    wanted = {
        "target_model": storable(target_model),
        "target_revision": storable(target_revision),
        "draft_architecture": storable(draft_architecture),
    }
    row = {"name": name, **wanted, "generation": 0, "created_at": utc_now()}
    insert_missing(s.connection(), DeploymentGroup, [row], ["name"])
    group = s.scalars(select(DeploymentGroup).where(DeploymentGroup.name == name)).one()
    for field, value in wanted.items():
        if getattr(group, field) != value:
            raise AuroraError(
                f"group {name!r} has {field} {getattr(group, field)!r}, this server has "
                f"{value!r}; give this server another group with AURORA_GROUP"
            )
    return group


def group_by_name(s: Session, name: str) -> DeploymentGroup:
    """Raises ``AuroraError`` when there is none."""
    group = s.scalars(select(DeploymentGroup).where(DeploymentGroup.name == name)).one_or_none()
    if group is None:
        names = ", ".join(repr(other.name) for other in groups(s)) or "none yet"
        raise AuroraError(f"there is no deployment group {name!r} (there is: {names})")
    return group


def group(s: Session, group_id: int) -> DeploymentGroup:
    """Raises ``AuroraError`` when there is none."""
    row = s.get(DeploymentGroup, group_id)
    if row is None:
        raise AuroraError(f"there is no deployment group with id {group_id}")
    return row


def groups(s: Session) -> Sequence[DeploymentGroup]:
    return s.scalars(select(DeploymentGroup).order_by(DeploymentGroup.id)).all()


def lock_group(s: Session, group_id: int) -> DeploymentGroup:
    """The group with its row locked until the transaction ends: one change of what is live at a
    time. (SQLite has locked the whole database by then, see ``store.session``.)"""
    group = s.scalars(
        select(DeploymentGroup)
        .where(DeploymentGroup.id == group_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one_or_none()
    if group is None:
        raise AuroraError(f"there is no deployment group with id {group_id}")
    return group
