"""Saved views: pages of the dashboard as somebody looked at them, under names."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import SavedView


def saved_views(s: Session, group_id: int) -> Sequence[SavedView]:
    """Of a group, by name."""
    rows = s.scalars(select(SavedView).where(SavedView.group_id == group_id)).all()
    return sorted(rows, key=lambda row: (row.name.casefold(), row.id))


def count_saved_views(s: Session, group_id: int) -> int:
    return s.scalar(select(func.count()).where(SavedView.group_id == group_id)) or 0


def saved_view(s: Session, group_id: int, view_id: int) -> SavedView:
    """Raises ``AuroraError`` when the group has none of this number."""
    row = s.get(SavedView, view_id)
    if row is None or row.group_id != group_id:
        raise AuroraError(f"saved view {view_id} is not there any more")
    return row


def add_saved_view(
    s: Session, group_id: int, *, name: str, page: str, query: str, actor: str
) -> SavedView:
    row = SavedView(
        group_id=group_id, name=name, page=page, query=query, actor=actor, created_at=utc_now()
    )
    s.add(row)
    s.flush()
    return row


def delete_saved_view(s: Session, row: SavedView) -> None:
    s.delete(row)
    s.flush()
