"""How much each group keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, literal_column, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from aurora_sgl import wire
from aurora_sgl.limits import NAMES, Limits
from aurora_sgl.store.models import RetentionLimit, Server
from aurora_sgl.store.store_clock import store_now
from aurora_sgl.store.upsert import insert_missing, upsert


def limits(s: Session, group_id: int) -> Limits:
    """What the group keeps; a limit that nobody has set yet is the default's."""
    return Limits(**{row.name: row.value for row in rows(s, group_id) if row.name in NAMES})


def rows(s: Session, group_id: int) -> Sequence[RetentionLimit]:
    """The limits that were set, with who set them and when."""
    return s.scalars(select(RetentionLimit).where(RetentionLimit.group_id == group_id)).all()


def ensure_limits(s: Session, group_id: int, wanted: Limits, actor: str) -> None:
    """Set the limits that the group has none of; those that it has stay as they are."""
    insert_missing(
        s.connection(),
        RetentionLimit,
        _rows(s, group_id, wanted.as_rows(), actor),
        ["group_id", "name"],
    )


def set_limits(s: Session, group_id: int, values: Mapping[str, int], actor: str) -> None:
    """Raises nothing for odd values: see ``Limits.changed``."""
    upsert(
        s.connection(),
        RetentionLimit,
        _rows(s, group_id, values, actor),
        ["group_id", "name"],
        ["value", "actor", "updated_at"],
    )


def _rows(
    s: Session, group_id: int, values: Mapping[str, int], actor: str
) -> list[dict[str, object]]:
    now = store_now(s)
    return [
        {"group_id": group_id, "name": name, "value": value, "actor": actor, "updated_at": now}
        for name, value in values.items()
    ]


def is_of_group(request_id: InstrumentedAttribute[int], group_id: int) -> ColumnElement[bool]:
    """Whether the request with this id was served by the group: its boot stands in its id, so no
    look at ``request`` is needed."""
    boots = select(Server.boot_id).where(Server.group_id == group_id)
    bits: ColumnElement[int] = literal_column(
        str(wire.REQUEST_COUNTER_BITS)
    )  # PostgreSQL shifts by an integer
    return request_id.bitwise_rshift(bits).in_(boots)
