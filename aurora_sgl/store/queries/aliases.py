"""Aliases (live, candidate, previous) that point to versions, and what the servers should run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import (
    Alias,
    DeploymentGroup,
    RolloutStage,
    Server,
    Trial,
    TrialWindow,
)
from aurora_sgl.store.queries.stages import OPEN
from aurora_sgl.store.upsert import upsert


def aliases(s: Session, group_id: int) -> dict[str, int]:
    """Version id by name (live, candidate, previous); a name that points nowhere is missing."""
    rows = s.execute(select(Alias.name, Alias.version_id).where(Alias.group_id == group_id))
    return {row.name: row.version_id for row in rows}


def set_alias(s: Session, group_id: int, name: str, version_id: int | None) -> None:
    """Point a name to a version; ``None`` removes it. ``live`` moves only by a deployment, see
    ``rollout.promote``."""
    if version_id is None:
        s.execute(delete(Alias).where(Alias.group_id == group_id, Alias.name == name))
        return
    row = {
        "group_id": group_id,
        "name": name,
        "version_id": version_id,
        "updated_at": utc_now(),
    }
    upsert(s.connection(), Alias, [row], ["group_id", "name"], ["version_id", "updated_at"])


def desired_version(s: Session, group_id: int) -> tuple[int, int] | None:
    """(version id, generation) that the servers of the group should run; ``None``: nothing was
    promoted yet."""
    row = s.execute(
        select(Alias.version_id, DeploymentGroup.generation)
        .join(DeploymentGroup, DeploymentGroup.id == Alias.group_id)
        .where(Alias.group_id == group_id, Alias.name == "live")
    ).one_or_none()
    return None if row is None else (row.version_id, row.generation)


@dataclass(frozen=True)
class WantedVersion:
    """What the servers of a group, or one of them, should run now."""

    version_id: int
    generation: int
    trial_id: int | None  # set while a trial decides, not a deployment
    stage_id: int | None = None  # of a server that runs a version before the rest


def wanted_version(
    s: Session, group_id: int, now: datetime | None = None, *, server: str = ""
) -> WantedVersion | None:
    """The version of the running trial's window, else for the server of this name that of the open
    stage it belongs to, else the live one; ``None``: nothing is live.

    A window is over at its ``ends_at``, whether or not anything is left to close it.
    """
    live = desired_version(s, group_id)
    if live is None:
        return None
    window = s.execute(
        select(TrialWindow.version_id, Trial.id)
        .join(Trial, Trial.id == TrialWindow.trial_id)
        .where(
            Trial.group_id == group_id,
            Trial.status == "running",
            TrialWindow.finished_at.is_(None),
            TrialWindow.started_at <= (now or utc_now()),
            TrialWindow.ends_at > (now or utc_now()),
        )
        .order_by(Trial.id.desc(), TrialWindow.number.desc())
        .limit(1)
    ).one_or_none()
    if window is not None:
        return WantedVersion(window.version_id, live[1], window.id)
    if server:
        stage = s.execute(
            select(RolloutStage.id, RolloutStage.version_id, RolloutStage.servers)
            .where(RolloutStage.group_id == group_id, RolloutStage.status.in_(OPEN))
            .order_by(RolloutStage.id.desc())
            .limit(1)
        ).one_or_none()
        if stage is not None and server in stage.servers:
            return WantedVersion(stage.version_id, live[1], None, stage.id)
    return WantedVersion(live[0], live[1], None)


def wanted_by_server(s: Session, server_id: int) -> WantedVersion | None:
    """What this boot should run; ``None``: nothing is live in its group."""
    row = s.get_one(Server, server_id)
    return wanted_version(s, row.group_id, server=row.name)
