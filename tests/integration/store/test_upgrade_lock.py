"""The upgrade of a store that somebody else holds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.schema import _UPGRADE_LOCK


@pytest.fixture
def holder(postgres_database: str) -> Iterator[Connection]:
    """A session of another machine, which vanished in the middle of an upgrade."""
    engine = create_engine(
        postgres_database, connect_args={"fallback_application_name": "aurora-sgl far-away:77"}
    )
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
        yield connection
    engine.dispose()


def test_an_upgrade_lock_of_a_vanished_machine_costs_a_sentence_and_not_the_start(
    postgres_database: str, holder: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = store.connect(postgres_database)
    with pytest.raises(AuroraError) as caught:
        store.upgrade(engine, wait_seconds=0.3)
    line = str(caught.value)
    assert "somebody else has been upgrading the store" in line and "\n" not in line
    assert "aurora-sgl far-away:77" in line and "pg_terminate_backend" in line
    monkeypatch.setattr("aurora_sgl.store.link.UPGRADE_SECONDS", 0.3)
    link = StoreLink(postgres_database)
    with pytest.raises(StoreAway, match="far-away:77"):
        link.engine()
    holder.rollback()
    assert link.engine() is link.engine()
    assert store.current(engine) == store.head()
    link.close()
    # A store that has its schema needs no lock.
    holder.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
    assert store.upgrade(engine, wait_seconds=0) == store.head()
    engine.dispose()


def test_a_table_in_use_costs_an_upgrade_its_time_and_nobody_else_a_second(
    postgres_database: str,
) -> None:
    engine = store.connect(postgres_database)
    with engine.begin() as connection:  # the first migration will want this name
        connection.execute(text("CREATE TABLE alembic_version (version_num varchar(32) NOT NULL)"))
    with engine.connect() as reader:
        reader.execute(text("LOCK TABLE alembic_version IN SHARE MODE"))
        with pytest.raises(AuroraError, match=r"in use .*try again later") as caught:
            store.upgrade(engine, wait_seconds=0)
    assert "\n" not in str(caught.value)
    assert store.upgrade(engine, wait_seconds=0) == store.head()
    engine.dispose()


def test_a_sqlite_file_that_somebody_writes_is_looked_at_without_a_lock(
    upgraded_sqlite: Path, tmp_path: Path
) -> None:
    engine = store.connect(f"sqlite:///{shutil.copy(upgraded_sqlite, tmp_path / 'aurora.db')}")
    with engine.begin() as writer:
        writer.execute(text("UPDATE deployment_group SET name = name"))
        assert store.upgrade(engine, wait_seconds=0) == store.head()
    engine.dispose()
