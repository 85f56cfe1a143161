"""What servers learnt of their trees, kept for their next start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import TreeMemory
from aurora_sgl.store.upsert import storable, upsert


def tree_memory(s: Session, group_id: int, name: str) -> TreeMemory | None:
    return s.get(TreeMemory, (group_id, name), populate_existing=True)


def set_tree_memory(
    s: Session, group_id: int, name: str, *, version_id: int | None, state: Mapping[str, Any]
) -> None:
    """``version_id``: of the drafter that was live."""
    row = {
        "group_id": group_id,
        "name": name,
        "version_id": version_id,
        "state": storable(state),
        "updated_at": utc_now(),
    }
    change = ["version_id", "state", "updated_at"]
    upsert(s.connection(), TreeMemory, [row], ["group_id", "name"], change)
