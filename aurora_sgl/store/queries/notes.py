"""Notes and tags of versions: rows are added, never changed."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import DrafterVersion, VersionNote


def add_note(s: Session, version_id: int, *, actor: str, kind: str, text: str) -> VersionNote:
    """``kind``: note, tag or untag; ``text``: the note, or the tag."""
    row = VersionNote(
        version_id=version_id, created_at=utc_now(), actor=actor, kind=kind, text=text
    )
    s.add(row)
    s.flush()
    return row


def notes_of(s: Session, version_id: int) -> Sequence[VersionNote]:
    """Of one version, oldest first."""
    return s.scalars(
        select(VersionNote).where(VersionNote.version_id == version_id).order_by(VersionNote.id)
    ).all()


def notes(s: Session, group_id: int) -> Sequence[VersionNote]:
    """Of all versions of a group, oldest first."""
    return s.scalars(
        select(VersionNote)
        .join(DrafterVersion, DrafterVersion.id == VersionNote.version_id)
        .where(DrafterVersion.group_id == group_id)
        .order_by(VersionNote.id)
    ).all()
