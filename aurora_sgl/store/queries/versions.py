"""Drafter versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ScalarSelect, select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import DrafterVersion
from aurora_sgl.store.upsert import insert_missing


def versions(s: Session, group_id: int) -> Sequence[DrafterVersion]:
    """Oldest first."""
    return s.scalars(
        select(DrafterVersion)
        .where(DrafterVersion.group_id == group_id)
        .order_by(DrafterVersion.id)
    ).all()


def version(s: Session, version_id: int) -> DrafterVersion:
    """Raises ``AuroraError`` when there is none."""
    row = s.get(DrafterVersion, version_id)
    if row is None:
        raise AuroraError(
            f"there is no drafter version {version_id}; see: aurora-sgl versions list"
        )
    return row


def lineage(s: Session, version_id: int) -> list[DrafterVersion]:
    """A version and those that it was made from, the newest first."""
    line = [version(s, version_id)]
    while line[-1].parent_id is not None:
        line.append(version(s, line[-1].parent_id))
    return line


def version_by_sha256(s: Session, group_id: int, weights_sha256: str) -> DrafterVersion | None:
    """``weights_sha256``: the whole hash, or the beginning of it."""
    return s.scalars(
        select(DrafterVersion)
        .where(
            DrafterVersion.group_id == group_id,
            DrafterVersion.weights_sha256.startswith(weights_sha256, autoescape=True),
        )
        .order_by(DrafterVersion.id)
    ).first()


def add_version(
    s: Session,
    *,
    group_id: int,
    architecture: str,
    weights_uri: str,
    weights_sha256: str,
    vocab_sha256: str,
    draft_vocab_size: int,
    target_model: str,
    source: str,
    target_revision: str = "",
    parent_id: int | None = None,
    training_run_id: int | None = None,
    note: str = "",
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> tuple[DrafterVersion, bool]:
    """The version with these weights in the group, and whether it is new."""
    row = {
        "group_id": group_id,
        "parent_id": parent_id,
        "created_at": utc_now(),
        "architecture": architecture,
        "weights_uri": weights_uri,
        "weights_sha256": weights_sha256,
        "vocab_sha256": vocab_sha256,
        "draft_vocab_size": draft_vocab_size,
        "target_model": target_model,
        "target_revision": target_revision,
        "training_run_id": training_run_id,
        "source": source,
        "note": note,
        "config": dict(config or {}),
        "metrics": dict(metrics or {}),
        "pinned": False,
    }
    before = version_by_sha256(s, group_id, weights_sha256)
    if before is not None:
        return before, False
    insert_missing(s.connection(), DrafterVersion, [row], ["group_id", "weights_sha256"])
    added = version_by_sha256(s, group_id, weights_sha256)
    assert added is not None
    return added, True


def set_pinned(s: Session, version_id: int, pinned: bool) -> DrafterVersion:
    row = version(s, version_id)
    row.pinned = pinned
    s.flush()
    return row


def set_pruned(s: Session, version_id: int) -> None:
    """Its weights are deleted."""
    version(s, version_id).pruned_at = utc_now()
    s.flush()


def set_restored(s: Session, version_id: int) -> None:
    """Its weights were imported again."""
    version(s, version_id).pruned_at = None
    s.flush()


def known_version(version_id: int) -> ScalarSelect[int]:
    """The id if there is such a version, else NULL: an engine may name one of another store."""
    return select(DrafterVersion.id).where(DrafterVersion.id == version_id).scalar_subquery()
