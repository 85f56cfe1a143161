"""Alembic's environment. ``aurora_sgl.store.upgrade`` hands over an open connection; called by
hand (``alembic -c migrations/alembic.ini ...``) it connects to the store of the settings."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import Connection

from aurora_sgl.store.connection import connect
from aurora_sgl.store.models import Base


def include(_: Any, name: str | None, kind: str, *rest: Any) -> bool:
    """What autogenerate compares: not the day partitions, which are made while the store runs,
    and not the indexes of ``acceptance_event``, which differ between the databases."""
    hot = name is not None and name.startswith(("acceptance_event_", "ix_acceptance_event_"))
    return not (kind in ("table", "index") and hot)


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_object=include,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with connect().begin() as connection:
        run(connection)
