"""The SQL console can't write, and reads only what it may, on both databases."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import BoundedSemaphore
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Engine, text
from streamlit.testing.v1 import AppTest

from aurora_sgl import store
from aurora_sgl.clock import from_us
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries, sql_child
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.queries import sql_console
from aurora_sgl.store.queries.sql_console import Answer, make_sql_roles, run_sql, task_of
from dashboard.screens.sql import EXAMPLES
from tests.support import store_samples as samples

Ask = Callable[..., Answer]
AskHere = Callable[..., list[list[Any]]]
Roles = dict[str, str]


@pytest.fixture
def roles(engine: Engine) -> Roles:
    """Of a store with one version and some traffic."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        samples.add_version(s, group.id, "a")
        server_id = queries.servers.register_server(s, group.id, samples.hello()).id
    ingest(engine, server_id, samples.BOOT, samples.traffic(requests=4, steps=12))
    return {} if is_sqlite(engine) else make_sql_roles(engine)


@pytest.fixture
def ask(engine: Engine, roles: Roles) -> Ask:
    def ask_(statement: str, role: str = "operator", **more: object) -> Answer:
        return run_sql(
            engine, statement, with_tokens=role == "operator", role_url=roles.get(role, ""), **more
        )

    return ask_


@pytest.fixture
def ask_here(engine: Engine, roles: Roles) -> AskHere:
    """The same in this process, without the limits of one: a table of statements is quicker so."""

    def ask_(statement: str, role: str = "operator", seconds: float = 5.0) -> list[list[Any]]:
        task = task_of(
            engine, statement, with_tokens=role == "operator", role_url=roles.get(role, ""),
            rows=100, seconds=seconds,
        )  # fmt: skip
        try:
            read = sql_child.read_sqlite(task) if task.path else sql_child.read_postgres(task)
        except sql_child.RefusedStatement as refused:
            raise AuroraError(str(refused)) from None
        return read.rows

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


def test_it_writes_nothing_whatever_is_typed(ask_here: AskHere, engine: Engine) -> None:
    only = ONLY_SQLITE if is_sqlite(engine) else ONLY_POSTGRES
    before = ask_here("SELECT count(*) FROM request")
    for statement in [*WRITES, *only]:
        with pytest.raises(AuroraError) as refused:
            ask_here(statement)
        assert "\n" not in str(refused.value), statement
    assert ask_here("SELECT count(*) FROM request") == before
    with store.session(engine, write=False) as s:
        assert queries.switches.switches(s, 1) == []


def test_a_viewer_sees_no_token_and_no_conversation_hash_by_any_name(
    ask_here: AskHere, engine: Engine
) -> None:
    hidden = [
        "SELECT draft_tokens FROM acceptance_event",
        "SELECT hex(e.target_tokens) FROM acceptance_event e",
        "SELECT draft_tokens FROM v_acceptance_event",
        "SELECT draft_token FROM v_rejected_tokens",
        "SELECT x.t FROM (SELECT target_tokens AS t FROM acceptance_event) x",
        "SELECT conversation_hash FROM request",
        "SELECT max(prompt_sha256) FROM trace",
    ]
    if not is_sqlite(engine):
        hidden[1] = "SELECT encode(e.target_tokens, 'hex') FROM acceptance_event e"
        for statement in [*hidden, "SELECT * FROM acceptance_event"]:
            with pytest.raises(AuroraError, match="refused"):
                ask_here(statement, "viewer")
    else:
        for statement in hidden:
            rows = ask_here(statement, "viewer")
            assert all(row[0] in (None, "") for row in rows), statement
    assert ask_here("SELECT sum(accepted) FROM acceptance_event", "viewer")[0][0] > 0
    assert ask_here(hidden[0])[0][0]  # an operator sees them
    for role in ("viewer", "operator"):
        with pytest.raises(AuroraError, match="refused"):
            ask_here("SELECT value FROM store_key", role)


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


# -- limits: time, memory, rows, bytes, locks ---------------------------------------------------

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
MANY = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9000) "
HUGE = "hex(zeroblob(1900000))"
#: What each costs without limits: minutes, or gigabytes.
HOSTILE_SQLITE = {
    f"SELECT instr({HUGE}, hex(zeroblob(900000)) || '1')": "stopped after",
    f"{ENDLESS} SELECT max(i) FROM n": "stopped after",
    f"{MANY} SELECT count(*) FROM n a, n b, n c WHERE a.i + b.i = -c.i": "stopped after",
    f"{MANY} SELECT group_concat({HUGE}) FROM n": "too big",
    f"{MANY} SELECT json_group_array({HUGE}) FROM n": "too big",
    "SELECT printf('%.*c', 2000000000, 'x')": "too big|memory",
    f"SELECT replace({HUGE}, '0', 'xxxxxxxx')": "too big",
    "SELECT zeroblob(2000000000)": "too big",
    f"{MANY} SELECT count(*) FROM (SELECT DISTINCT hex(randomblob(50000)) FROM n)": "memory",
    f"{MANY} SELECT hex(randomblob(50000)) AS h FROM n ORDER BY h": "memory",
    f"SELECT {', '.join([HUGE] * 300)}": "memory|larger than 8 MB",
}
#: In PostgreSQL a server's work is bounded by time, a dashboard's also by bytes.
HOSTILE_POSTGRES = {
    "SELECT max(i) FROM generate_series(1, 1000000000000) AS n(i)": "stopped after",
    "SELECT repeat('x', 40000000)": "larger than 8 MB",
    "SELECT repeat('x', 400000000)": "memory|larger than 8 MB|without an answer",
}


def test_limits_of_time_and_memory_hold_for_any_statement(ask: Ask, engine: Engine) -> None:
    table = HOSTILE_SQLITE if is_sqlite(engine) else HOSTILE_POSTGRES
    for statement, words in table.items():
        begun = time.monotonic()
        # Which limit comes first depends on how busy the machine is.
        with pytest.raises(AuroraError, match=f"{words}|stopped after|memory") as refused:
            ask(statement, "viewer", seconds=0.5)
        assert "\n" not in str(refused.value), statement
        assert time.monotonic() - begun < 30, statement  # without limits: minutes


def test_limits_of_rows_and_bytes_cut_an_answer(ask: Ask, engine: Engine) -> None:
    wide = f"{MANY} SELECT {HUGE} FROM n"
    if not is_sqlite(engine):
        wide = "SELECT repeat('x', 3800000) FROM generate_series(1, 900)"
    answer = ask(wide, "viewer")
    assert answer.cut and len(answer.rows) == 2
    answer = ask(f"{ENDLESS} SELECT i FROM n", "viewer", rows=3)
    assert answer.cut and answer.rows == [(1,), (2,), (3,)]


def test_no_more_than_three_statements_run_at_once(ask: Ask, monkeypatch: Any) -> None:
    seats = BoundedSemaphore(1)
    monkeypatch.setattr(sql_console, "_SEATS", seats)
    with seats, pytest.raises(AuroraError, match="try again in a moment"):
        ask("SELECT 1", seconds=0.01)
    assert ask("SELECT 1").rows == [(1,)]


#: Each ran on a PostgreSQL of ours, or took something of it, before: by rights that everybody has.
NOT_ONLY_READING = [
    "SELECT set_config('statement_timeout', '0', false)",
    "SELECT set_config('statement_timeout', '0', false) WHERE false",
    "SELECT 1 FROM request WHERE set_config('lock_timeout', '0', false) IS NULL",
    "WITH x AS (SELECT set_config('a.b', '0', false)) SELECT * FROM x WHERE false",
    "SELECT 1 ORDER BY set_config('a.b', '0', false)",
    "SELECT * FROM generate_series(1, 2) WHERE EXISTS (SELECT set_config('a.b', '0', false))",
    "SELECT \"pg_catalog\".\"set_config\"('a.b', '0', false)",
    "SELECT U&\"s\\0065t_config\"('a.b', '0', false)",
    "SELECT s FROM request, LATERAL set_config('a.b', '0', false) AS s",
    "SELECT sum(length(set_config('a.b', id::text, false))) OVER () FROM request",
    "SET statement_timeout = 0",
    "SET LOCAL statement_timeout = 0",
    "RESET ALL",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_advisory_xact_lock(1, 2)",
    "SELECT pg_try_advisory_lock(i) FROM generate_series(1, 1000000) AS n(i)",
    "SELECT pg_advisory_lock_shared(71826218606433)",
    "SELECT pg_sleep(600)",
    "SELECT pg_sleep_for('10 minutes')",
    "SELECT pg_sleep_until('2099-01-01')",
    "SELECT * FROM dblink('host=localhost', 'SELECT 1') AS t(a int)",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_get(1)",
    "SELECT loread(1, 1)",
    "COPY request TO STDOUT",
    "COPY request FROM STDIN",
    "COPY (SELECT 1) TO '/tmp/x'",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_read_binary_file('/etc/passwd')",
    "SELECT pg_ls_dir('/')",
    "SELECT pg_stat_file('/etc/passwd')",
    "DO $$ BEGIN PERFORM pg_sleep(600); END $$",
    "SELECT query_to_xml('SELECT pg_sleep(600)', true, true, '')",
    "SELECT ts_stat('SELECT pg_sleep(600)::text::tsvector')",
    "SELECT pg_terminate_backend(1)",
    "SELECT pg_cancel_backend(1)",
    "SELECT pg_notify('a', 'b')",
    "SELECT pg_export_snapshot()",
    "SELECT nextval('request_id_seq')",
    "SELECT * FROM pg_locks",
    "SELECT * FROM pg_stat_activity",
    "SELECT * FROM pg_stats",
    "SELECT * FROM information_schema.tables",
    "UPDATE pg_settings SET setting = '0' WHERE name = 'statement_timeout'",
    "SELECT * FROM request FOR UPDATE",
    "SELECT 1 INTO TEMP x",
    "EXPLAIN ANALYZE SELECT pg_sleep(600)",
    "PREPARE x AS SELECT pg_sleep(600)",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "CALL pg_sleep(1)",
    "LISTEN x",
    "NOTIFY x",
    "LOAD 'auto_explain'",
    "CHECKPOINT",
    "DISCARD ALL",
    "COMMIT",
    "ROLLBACK; SELECT 1",
    "SET TRANSACTION READ WRITE",
    "START TRANSACTION READ WRITE",
    "SET ROLE postgres",
]


def test_set_config_advisory_locks_and_their_kind_are_impossible_in_postgresql(
    ask_here: AskHere, engine: Engine
) -> None:
    if is_sqlite(engine):
        return
    begun = time.monotonic()
    for statement in NOT_ONLY_READING:
        for role in ("viewer", "operator"):
            with pytest.raises(AuroraError) as refused:
                ask_here(statement, role)
            assert "\n" not in str(refused.value), statement
    assert time.monotonic() - begun < 60, "none of them waited"
    with store.reading(engine) as connection:
        locks = connection.execute(text("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"))
        assert locks.all() == []


def test_what_only_reads_is_not_refused_in_postgresql(ask_here: AskHere, engine: Engine) -> None:
    if is_sqlite(engine):
        return
    for statement in (
        'SELECT 1 AS ":funcid 2077 :commandType 6 :relid 1259"',
        "SELECT ':funcid 2077', ' :commandType 6 '",
        "VALUES (1), (2)",
        "TABLE request",
        "SELECT random() < 2, now() <= clock_timestamp(), gen_random_uuid()",
        "SELECT domain, count(*) FILTER (WHERE accepted > 1), percentile_cont(0.5) WITHIN GROUP "
        "(ORDER BY accepted), array_agg(id ORDER BY id), jsonb_agg(sampling) FROM request "
        "GROUP BY 1",
        "SELECT r.id, e.s FROM request r, LATERAL (SELECT sum(accepted) AS s FROM acceptance_event "
        "WHERE request_id = r.id) e WHERE r.rid ~ 'rid' ORDER BY to_char(r.admitted_at, 'HH24')",
        "SELECT row_number() OVER w, lag(step) OVER w FROM acceptance_event "
        "WINDOW w AS (PARTITION BY request_id ORDER BY step)",
        "SELECT date_bin('1 hour', at, '2026-01-01'), count(*) FROM acceptance_event GROUP BY 1",
        "SELECT s FROM generate_series(now() - interval '3 h', now(), '1 h') AS s",
    ):
        assert ask_here(statement), statement


def test_a_statement_is_run_once_and_says_its_columns_without_a_row(
    ask: Ask, engine: Engine
) -> None:
    assert ask("SELECT name, enabled FROM switch WHERE actor = 'nobody'").columns == [
        "name",
        "enabled",
    ]
    if is_sqlite(engine):
        return
    scans = text("SELECT seq_scan + coalesce(idx_scan, 0) FROM pg_stat_all_tables "
                 "WHERE relid = 'switch'::regclass")  # fmt: skip
    for _ in range(50):  # a session tells the statistics when it ends
        with engine.connect() as connection:
            count = connection.scalar(scans)
        if count:
            break
        time.sleep(0.1)
    assert count == 1


def test_numbers_of_the_pages_own_example_are_numbers_on_both_databases(ask: Ask) -> None:
    """PostgreSQL's sums are Decimals, of which a chart would be "No column ... holds numbers"."""
    answer = ask(EXAMPLES["For whom did it get better?"])
    frame = pd.DataFrame(answer.rows, columns=answer.columns)
    numbers = [name for name in frame if pd.api.types.is_numeric_dtype(frame[name])]
    assert numbers == ["version", "requests", "verify_steps", "accept_length"]
    app = AppTest.from_function(_chart_of, kwargs={"frame": frame}).run()
    assert not app.exception
    assert "No column" not in " ".join(element.value for element in app.caption)


def _chart_of(frame):  # type: ignore[no-untyped-def]  # its source alone is run
    from dashboard.screens import sql

    sql._chart(frame)


def test_times_and_json_come_as_they_are(ask: Ask, engine: Engine) -> None:
    if is_sqlite(engine):
        return
    (row,) = ask(
        "SELECT admitted_at, sampling, 1.5::numeric, 'NaN'::numeric, 10::numeric ^ 40, "
        "array[1, 2], '\\x00ff'::bytea, interval '1 h', null FROM request LIMIT 1"
    ).rows
    assert row[0] == from_us(samples.START_US) and row[1] == {"temperature": 0.0}
    assert row[2] == 1.5 and row[3] != row[3] and row[4] == 10**40
    assert row[5:] == ([1, 2], "00ff", "1:00:00", None)


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
