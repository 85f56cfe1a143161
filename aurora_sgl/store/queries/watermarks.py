"""How far the spool of each boot was taken."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.store.models import SpoolWatermark


def watermark(s: Session, server_id: int, boot_id: int) -> int:
    """The last envelope of a boot that was taken; 0: none."""
    return s.scalar(
        select(SpoolWatermark.last_seq).where(
            SpoolWatermark.server_id == server_id, SpoolWatermark.boot_id == boot_id
        )
    ) or 0  # fmt: skip
