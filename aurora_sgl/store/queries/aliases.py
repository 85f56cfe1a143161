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
    Server,
    Trial,
    TrialWindow,
)
from aurora_sgl.store.queries.stages import open_stage
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


@dataclass(frozen=True)
class WantedVersions:
    """What each server of a group should run: what ``staged`` has before the rest, the others what
    is wanted everywhere."""

    everywhere: WantedVersion
    staged: WantedVersion | None = None
    servers: frozenset[str] = frozenset()  # names of those of the open stage

    def of(self, server: str) -> WantedVersion:
        return self.staged if self.staged and server in self.servers else self.everywhere


def wanted_versions(
    s: Session, group_id: int, now: datetime | None = None
) -> WantedVersions | None:
    """The version of the running trial's window; else the live one, and for the servers of the open
    stage its version; ``None``: nothing is live.

    A window is over at its ``ends_at``, whether or not anything is left to close it.
    """
    live = desired_version(s, group_id)
    if live is None:
        return None
    moment = now or utc_now()
    window = s.execute(
        select(TrialWindow.version_id, Trial.id)
        .join(Trial, Trial.id == TrialWindow.trial_id)
        .where(
            Trial.group_id == group_id,
            Trial.status == "running",
            TrialWindow.finished_at.is_(None),
            TrialWindow.started_at <= moment,
            TrialWindow.ends_at > moment,
        )
        .order_by(Trial.id.desc(), TrialWindow.number.desc())
        .limit(1)
    ).one_or_none()
    if window is not None:
        return WantedVersions(WantedVersion(window.version_id, live[1], window.id))
    everywhere = WantedVersion(live[0], live[1], None)
    stage = open_stage(s, group_id)
    if stage is None:
        return WantedVersions(everywhere)
    staged = WantedVersion(stage.version_id, live[1], None, stage.id)
    return WantedVersions(everywhere, staged, frozenset(stage.servers))


def wanted_version(s: Session, group_id: int, now: datetime | None = None) -> WantedVersion | None:
    """What all servers but those of a stage should run; ``None``: nothing is live."""
    wanted = wanted_versions(s, group_id, now)
    return wanted.everywhere if wanted is not None else None


def wanted_by_server(s: Session, server_id: int) -> WantedVersion | None:
    """What this boot should run; ``None``: nothing is live in its group."""
    row = s.get_one(Server, server_id)
    wanted = wanted_versions(s, row.group_id)
    return wanted.of(row.name) if wanted is not None else None
