"""The SQL console can't write, and reads only what it may, on both databases."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.queries.sql_console import Answer, make_sql_roles, run_sql
from tests.support import store_samples as samples

Ask = Callable[..., Answer]


@pytest.fixture
def ask(engine: Engine) -> Ask:
    """Asks a store with one version, some traffic and one switch that was turned."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        samples.add_version(s, group.id, "a")
        server_id = queries.servers.register_server(s, group.id, samples.hello()).id
    ingest(engine, server_id, samples.BOOT, samples.traffic(requests=4, steps=12))
    roles = {} if is_sqlite(engine) else make_sql_roles(engine)

    def ask_(statement: str, role: str = "operator", **more: object) -> Answer:
        return run_sql(
            engine, statement, with_tokens=role == "operator", role_url=roles.get(role, ""), **more
        )

    return ask_


def test_tables_and_views_are_read(ask: Ask) -> None:
    assert ask("SELECT count(*) AS n FROM acceptance_event;").rows[0][0] > 40
    for view in ("v_accept_length_by_version", "v_accept_length_by_domain_hour",
                 "v_acceptance_event", "v_rejected_tokens", "v_deployment_history"):  # fmt: skip
        assert ask(f"SELECT * FROM {view}").columns
    both = ask("WITH r AS (SELECT id FROM request) SELECT count(*) FROM r JOIN request USING (id)")
    assert both.rows == [(4,)]


WRITES = [
    "DELETE FROM request",
    "UPDATE alias SET version_id = 1",
    "INSERT INTO switch VALUES (1, 'learning', 1, 'x', 'x', '2026-01-01')",
    "DROP TABLE request",
    "CREATE TABLE x (a int)",
    "CREATE TEMP TABLE x (a int)",
    "ALTER TABLE request ADD COLUMN x int",
    "WITH gone AS (DELETE FROM request RETURNING 1) SELECT * FROM gone",
    "SELECT 1; DELETE FROM request",
    "BEGIN; DELETE FROM request; COMMIT",
    "VACUUM",
    "REINDEX",
]
ONLY_SQLITE = [
    "PRAGMA user_version = 5",
    "PRAGMA query_only = OFF",
    "ATTACH DATABASE '/tmp/other.db' AS other",
    "SELECT load_extension('x')",
    "SELECT sql FROM sqlite_master",
    "SELECT * FROM alembic_version",
    "REPLACE INTO lease VALUES ('x', 'x', 1, '', '')",
]
ONLY_POSTGRES = [
    "SET default_transaction_read_only = off; DELETE FROM request",
    "SET SESSION AUTHORIZATION postgres",
    "SELECT set_config('default_transaction_read_only', 'off', false) FROM pg_authid",
    "COPY request TO PROGRAM 'cat'",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT rolpassword FROM pg_authid",
    "SELECT * FROM alembic_version",
    "SELECT lo_import('/etc/passwd')",
    "TRUNCATE request",
    "LOCK TABLE request",
]


def test_it_writes_nothing_whatever_is_typed(ask: Ask, engine: Engine) -> None:
    only = ONLY_SQLITE if is_sqlite(engine) else ONLY_POSTGRES
    before = ask("SELECT count(*) FROM request").rows
    for statement in [*WRITES, *only]:
        with pytest.raises(AuroraError) as refused:
            ask(statement)
        assert "\n" not in str(refused.value), statement
    assert ask("SELECT count(*) FROM request").rows == before
    with store.session(engine, write=False) as s:
        assert queries.switches.switches(s, 1) == []


def test_a_viewer_sees_no_token_by_any_name(ask: Ask, engine: Engine) -> None:
    hidden = [
        "SELECT draft_tokens FROM acceptance_event",
        "SELECT hex(e.target_tokens) FROM acceptance_event e",
        "SELECT draft_tokens FROM v_acceptance_event",
        "SELECT draft_token FROM v_rejected_tokens",
        "SELECT x.t FROM (SELECT target_tokens AS t FROM acceptance_event) x",
    ]
    if not is_sqlite(engine):
        hidden[1] = "SELECT encode(e.target_tokens, 'hex') FROM acceptance_event e"
        for statement in [*hidden, "SELECT * FROM acceptance_event"]:
            with pytest.raises(AuroraError, match="refused"):
                ask(statement, "viewer")
    else:
        for statement in hidden:
            rows = ask(statement, "viewer").rows
            assert all(row[0] in (None, "") for row in rows), statement
    assert ask("SELECT sum(accepted) FROM acceptance_event", "viewer").rows[0][0] > 0
    assert ask(hidden[0]).rows[0][0]  # an operator sees them


def test_a_long_statement_is_stopped_and_a_long_answer_is_cut(ask: Ask) -> None:
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    )
    begun = time.monotonic()
    with pytest.raises(AuroraError, match="stopped after 0 s"):
        ask(endless, seconds=0.3)
    assert time.monotonic() - begun < 5
    million = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)"
    begun = time.monotonic()
    answer = ask(f"{million} SELECT i FROM n", rows=100)
    assert len(answer.rows) == 100 and answer.cut
    assert time.monotonic() - begun < 5


def test_mistakes_are_answered_with_what_the_database_says(ask: Ask) -> None:
    for statement, words in {
        "SELECT * FROM requst": "requst",
        "SELEC 1": "SELEC",
        "": "type",
    }.items():
        with pytest.raises(AuroraError, match=words) as error:
            ask(statement)
        assert "\n" not in str(error.value)


def test_postgresql_without_its_roles_says_how_to_make_them(engine: Engine) -> None:
    if is_sqlite(engine):
        with pytest.raises(AuroraError, match="SQLite needs no roles"):
            make_sql_roles(engine)
        return
    with pytest.raises(AuroraError, match="aurora-sgl dashboard sql-role"):
        run_sql(engine, "SELECT 1", with_tokens=True)
