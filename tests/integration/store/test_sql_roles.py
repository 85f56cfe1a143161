"""Who holds a password of the SQL page's roles asks PostgreSQL itself, without the page between."""

from __future__ import annotations

import itertools
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, inspect, make_url, text
from sqlalchemy.exc import ProgrammingError

from aurora_sgl import store
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import Base
from aurora_sgl.store.queries import sql_console
from tests.conftest import new_database
from tests.support import store_samples as samples

ROLES = ("viewer", "operator")
#: What a viewer's role does not read; the page's own list is not asked here.
TOKENS = {
    ("acceptance_event", "draft_tokens"), ("acceptance_event", "target_tokens"),
    ("request", "conversation_hash"), ("trace", "prompt_sha256"), ("trace", "head_sha256"),
    ("trace", "prompt_key"), ("trace", "answer_key"), ("trace", "prefix_sha256"),
    ("erasure", "salt"), ("erasure", "key_hash"),
}  # fmt: skip
#: What neither reads: the key of the hashes.
SECRETS = {("store_key", "name"), ("store_key", "value")}
#: Of PostgreSQL itself, or of other files and programs of its machine.
ELSEWHERE = (
    "SELECT rolpassword FROM pg_authid",
    "SELECT * FROM pg_statistic",
    "SELECT pg_read_file('/etc/passwd')",
    "COPY (SELECT 1) TO PROGRAM 'cat'",
    "COPY request TO '/tmp/x'",
    "SELECT * FROM alembic_version",
    "CREATE TABLE mine (a int)",
    "CREATE ROLE mine",
    "ALTER ROLE postgres PASSWORD 'mine'",
    "GRANT SELECT ON store_key TO PUBLIC",
)


@pytest.fixture(scope="module")
def holders(postgres_url: str, upgraded_postgres: str) -> Iterator[SimpleNamespace]:
    """The store, and a connection of each role that has switched off what it may."""
    with new_database(postgres_url, upgraded_postgres) as url:
        engine = store.connect(url)
        with store.session(engine) as s:
            group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLM")
            server_id = queries.servers.register_server(s, group.id, samples.hello()).id
        ingest(engine, server_id, samples.BOOT, samples.traffic(requests=2, steps=4))
        connections: dict[str, Connection] = {}
        for role, role_url in sql_console.make_sql_roles(engine).items():
            own = create_engine(role_url, isolation_level="AUTOCOMMIT").connect()
            for setting in ("default_transaction_read_only = off", "statement_timeout = 0"):
                own.exec_driver_sql(f"SET {setting}")
            connections[role] = own
        yield SimpleNamespace(engine=engine, **connections)
        for own in connections.values():
            own.close()
            own.engine.dispose()
        engine.dispose()


def refused(connection: Connection, statement: str) -> bool:
    """By a right that is not there, and by nothing else."""
    try:
        connection.exec_driver_sql(statement)
    except ProgrammingError as error:
        assert getattr(error.orig, "sqlstate", "") == "42501", (statement, error.orig)
        return True
    return False


def test_the_two_roles_read_what_the_page_shows_them_and_no_other_column(
    holders: SimpleNamespace,
) -> None:
    every = {
        (table.name, column.name) for table in Base.metadata.tables.values()
        for column in table.columns
    }  # fmt: skip
    assert every > TOKENS | SECRETS
    for role, hidden in (("viewer", TOKENS | SECRETS), ("operator", SECRETS)):
        own = getattr(holders, role)
        closed = {(t, c) for t, c in every if refused(own, f'SELECT "{c}" FROM "{t}" LIMIT 1')}
        assert closed == hidden, role
    views = set(inspect(holders.engine).get_view_names())
    closed = {view for view in views if refused(holders.viewer, f'SELECT * FROM "{view}" LIMIT 1')}
    assert closed == {"v_acceptance_event", "v_rejected_tokens"}
    assert not [v for v in views if refused(holders.operator, f'SELECT * FROM "{v}" LIMIT 1')]


def test_neither_role_finds_tokens_by_another_way(holders: SimpleNamespace) -> None:
    """By a day's partition, by what the planner keeps of columns, by the role of the other one."""
    with store.reading(holders.engine) as connection:
        partitions = connection.execute(text(
            "SELECT inhrelid::regclass::text FROM pg_inherits "
            "WHERE inhparent = 'acceptance_event'::regclass")).scalars().all()  # fmt: skip
    assert partitions
    with holders.engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    stats = "SELECT count(*) FROM pg_stats WHERE attname IN ('draft_tokens', 'conversation_hash')"
    assert holders.viewer.exec_driver_sql(stats).scalar() == 0
    with holders.engine.connect() as connection:
        assert connection.exec_driver_sql(stats).scalar()  # there are some
        others = [holders.viewer.engine.url.username, holders.operator.engine.url.username]
    for role in ROLES:
        own = getattr(holders, role)
        for partition in partitions:
            assert refused(own, f"SELECT draft_tokens FROM {partition}")
        for other in {*others, "postgres"} - {own.engine.url.username}:
            assert refused(own, f'SET ROLE "{other}"')
        for statement in ELSEWHERE:
            assert refused(own, statement), statement


def test_neither_role_writes_though_it_switches_reading_only_off(holders: SimpleNamespace) -> None:
    tables = sorted(Base.metadata.tables)
    statements = [
        *(f'DELETE FROM "{table}"' for table in tables),
        *(f'INSERT INTO "{table}" DEFAULT VALUES' for table in tables),
        *(f'TRUNCATE "{table}"' for table in tables),
        *(f'UPDATE "{t.name}" SET "{next(iter(t.columns)).name}" = NULL'
          for t in Base.metadata.tables.values()),
        "DROP TABLE request", "ALTER TABLE request ADD COLUMN x int",
        "DO $$ BEGIN LOCK TABLE request IN ROW EXCLUSIVE MODE; END $$",
        "SELECT * FROM request FOR UPDATE",
    ]  # fmt: skip
    before = everything(holders.engine)
    for role, statement in itertools.product(ROLES, statements):
        own = getattr(holders, role)
        assert own.exec_driver_sql("SHOW transaction_read_only").scalar() == "off"
        assert refused(own, statement), (role, statement)
    assert everything(holders.engine) == before


def everything(engine: Engine) -> dict[str, list[Any]]:
    with store.reading(engine) as connection:
        return {name: sorted(map(repr, connection.execute(table.select())))
                for name, table in Base.metadata.tables.items()}  # fmt: skip


def test_passwords_lie_in_a_file_of_the_owner_and_new_ones_void_them(
    holders: SimpleNamespace, tmp_path: Path
) -> None:
    """The server of the tests asks for no password: what others compare with is looked at."""
    query = "SELECT rolname, rolpassword FROM pg_authid WHERE rolname LIKE 'aurora_sql_%%'"
    path = tmp_path / "dashboard" / "sql-roles.json"
    kept, passwords = [], set()
    path.parent.mkdir()
    for _ in range(2):
        urls = sql_console.make_sql_roles(holders.engine)
        passwords |= {make_url(url).password for url in urls.values()}
        sql_console.keep_roles(path, urls)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert sql_console.kept_role(path, "viewer") == urls["viewer"] != urls["operator"]
        with holders.engine.connect() as connection:
            kept.append(dict(connection.exec_driver_sql(query).tuples().all()))
    assert len(passwords) == 4
    first, second = kept
    mine = {getattr(holders, role).engine.url.username for role in ROLES}
    assert mine <= set(first) and all(first[name] != second[name] for name in mine)
