"""Weights of old versions. Their rows stay: they say where the later ones come from."""

from __future__ import annotations

from typing import Protocol

from sqlalchemy import Engine, Select, exists, func, or_, select
from sqlalchemy.orm import aliased

from aurora_sgl.store import queries
from aurora_sgl.store.connection import session
from aurora_sgl.store.models import (
    Alias,
    DrafterVersion,
    RolloutStage,
    Server,
    TrainingRun,
    Trial,
)
from aurora_sgl.store.pruning.pace import PrunePace


class Files(Protocol):
    """What prune needs of ``artifacts.ArtifactRoot``."""

    def exists(self, uri: str) -> bool: ...

    def delete(self, uri: str) -> None: ...


def unused(group_id: int, keep_versions: int) -> Select[DrafterVersion]:
    """Versions that are not pinned, have no alias (live, candidate, previous), run on no server,
    are no part of a run, trial or stage that goes on, and are not among the newest."""
    v, newer = DrafterVersion, aliased(DrafterVersion)
    rank = (
        select(func.count())
        .where(newer.group_id == v.group_id, newer.id > v.id)
        .correlate(v)
        .scalar_subquery()
    )
    serves = or_(Server.live_version_id == v.id, Server.boot_version_id == v.id)
    staged = or_(RolloutStage.baseline_id == v.id, RolloutStage.version_id == v.id)
    tried = or_(Trial.baseline_id == v.id, Trial.candidate_id == v.id)
    return (
        select(v)
        .where(
            v.group_id == group_id,
            ~v.pinned,
            v.pruned_at.is_(None),
            rank >= keep_versions,
            ~exists().where(Alias.version_id == v.id),
            ~exists().where(Server.state == "running", serves),
            ~exists().where(TrainingRun.status == "running", TrainingRun.base_version_id == v.id),
            ~exists().where(Trial.status == "running", tried),
            ~exists().where(RolloutStage.status.in_(queries.stages.OPEN), staged),
        )
        .order_by(v.id)
    )


def count_old(engine: Engine, files: Files, group_id: int, keep_versions: int) -> tuple[int, ...]:
    """Ids of the versions that :func:`prune_weights` would take the weights of."""
    with session(engine, write=False) as s:
        versions = s.scalars(unused(group_id, keep_versions)).all()
    return tuple(version.id for version in versions if files.exists(version.weights_uri))


def prune_weights(
    engine: Engine, files: Files, pace: PrunePace, group_id: int, keep_versions: int
) -> tuple[tuple[int, ...], list[str]]:
    """Ids of the versions whose weights go, and their folders; those that lie elsewhere are left to
    whoever has them. Under the lock of the group: none of them goes live meanwhile."""
    here = set(count_old(engine, files, group_id, keep_versions))
    if not here:
        return (), []
    uris: list[str] = []
    gone: list[int] = []
    with session(engine) as s:
        queries.groups.lock_group(s, group_id)
        for version in s.scalars(unused(group_id, keep_versions)).all():
            if version.id not in here:
                continue
            queries.versions.set_pruned(s, version.id)
            gone.append(version.id)
            others = select(func.count()).where(
                DrafterVersion.weights_uri == version.weights_uri,
                DrafterVersion.pruned_at.is_(None),
            )
            if not s.scalar(others):  # another group may have the same drafter
                uris.append(version.weights_uri)
    pace.rest(0.05)
    return tuple(gone), uris
