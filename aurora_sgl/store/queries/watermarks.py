"""How far the spool of each boot was taken."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl.store.models import SpoolWatermark


def watermark(s: Session, server_id: int, boot_id: int) -> int:
    """The last envelope of a boot that was taken; 0: none."""
    return s.scalar(
        select(SpoolWatermark.last_seq).where(
            SpoolWatermark.server_id == server_id, SpoolWatermark.boot_id == boot_id
        )
    ) or 0  # fmt: skip


def watermarks(s: Session, boot_ids: Iterable[int]) -> dict[int, int]:
    """The same of several boots, whatever server row they have; those without any are left out."""
    rows = s.execute(
        select(SpoolWatermark.boot_id, func.max(SpoolWatermark.last_seq))
        .where(SpoolWatermark.boot_id.in_(list(boot_ids)))
        .group_by(SpoolWatermark.boot_id)
    )
    return {boot_id: last_seq for boot_id, last_seq in rows}
