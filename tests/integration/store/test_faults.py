"""Errors of the store against errors of the data, provoked on both databases."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url

from aurora_sgl import store, wire
from aurora_sgl.store import queries
from aurora_sgl.store.faults import POSTGRES, SQLITE, Kind, fault_of, in_words, is_away
from aurora_sgl.store.ingest import ingest
from tests.support import store_samples as samples

DATA, AWAY, BUSY, LOST = Kind.DATA, Kind.AWAY, Kind.BUSY, Kind.LOST_ROW

STATES = {
    "22001": DATA, "22003": DATA, "22007": DATA, "22008": DATA, "22021": DATA, "22P02": DATA,
    "22P03": DATA, "22P05": DATA, "23505": DATA, "23P01": DATA, "54000": DATA,
    "23503": LOST, "23502": AWAY,
    "40001": BUSY, "40P01": BUSY, "55P03": BUSY, "57014": BUSY,
    "08006": AWAY, "08P01": AWAY, "0A000": AWAY, "25006": AWAY, "25P02": AWAY, "28000": AWAY,
    "28P01": AWAY, "3D000": AWAY, "3F000": AWAY, "42501": AWAY, "42601": AWAY, "42703": AWAY,
    "42804": AWAY, "42P01": AWAY, "53100": AWAY, "53200": AWAY, "53300": AWAY, "54001": AWAY,
    "55000": AWAY, "57P01": AWAY, "57P03": AWAY, "58030": AWAY, "58P01": AWAY, "P0001": AWAY,
    "XX000": AWAY, "XX001": AWAY, "XX002": AWAY, "ZZ999": AWAY,
}  # fmt: skip


def test_every_state_of_postgresql_has_its_kind_and_words(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    found = {}
    for state in STATES:
        raising = f"DO $$ BEGIN RAISE EXCEPTION 'on purpose' USING ERRCODE = '{state}'; END $$"
        with pytest.raises(Exception) as caught, engine.begin() as connection:
            connection.exec_driver_sql(raising)
        fault = fault_of(caught.value)
        assert fault is not None and f"{fault.words} (on purpose)" == in_words(caught.value)
        assert is_away(caught.value) == (fault.kind in (AWAY, BUSY))
        found[state] = fault.kind
    engine.dispose()
    assert found == STATES


def test_the_tables_name_codes_that_there_are() -> None:
    classes = {state[:2] for state in POSTGRES}
    states = (getattr(kind, "sqlstate", None) for kind in vars(psycopg.errors).values())
    known = {state for state in states if isinstance(state, str)}
    assert {state for state in POSTGRES if len(state) == 5} <= known
    assert classes <= {state[:2] for state in known}
    codes = {
        value
        for name, value in vars(sqlite3).items()
        if name.startswith("SQLITE_") and isinstance(value, int)
    }
    assert set(SQLITE) <= codes | {3091}  # CONSTRAINT_DATATYPE, too new for Python 3.11


def provoke(engine: Engine, *statements: str, before: str = "") -> BaseException:
    if before:
        with engine.begin() as connection:
            connection.execute(text(before))
    with pytest.raises(Exception) as caught, engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    return caught.value


GROUP = "INSERT INTO deployment_group (id, name, target_model, target_revision, \
draft_architecture, generation, created_at) VALUES (1, 'g', 't', '', 'd', 0, '2026-01-01')"
SERVER = "INSERT INTO server (group_id, name, boot_id, sglang_version, live_sha256, state, dtype, \
phase, phase_reason, counters, notices, last_error, started_at, last_seen_at) \
VALUES ({group}, 'n', 7, '', '', '{state}', '', '', '', '{{}}', '{{}}', '', '2026-01-01', \
'2026-01-01')"


@pytest.mark.parametrize(
    ("statements", "before", "kind", "words"),
    [
        (["SELECT * FROM nowhere"], "", AWAY, "missing"),
        (["SELECT nothing FROM server"], "", AWAY, "missing"),
        (["SELECT * FROM server"], "ALTER TABLE server RENAME TO elsewhere", AWAY, "missing"),
        ([GROUP, GROUP], "", DATA, "rule"),
        ([GROUP, SERVER.format(group=1, state="odd")], "", DATA, "rule"),
        ([SERVER.format(group=99, state="running")], "", LOST, "gone"),
        ([GROUP], "ALTER TABLE deployment_group ADD COLUMN more int", None, ""),
    ],
)
def test_what_a_database_refuses_is_told_apart_on_both(
    engine: Engine, statements: list[str], before: str, kind: Kind | None, words: str
) -> None:
    if kind is None:  # a column more is no harm
        for statement in (before, *statements):
            with engine.begin() as connection:
                connection.execute(text(statement))
        return
    error = provoke(engine, *statements, before=before)
    fault = fault_of(error)
    assert fault is not None and fault.kind is kind
    assert words in fault.words


def _read_only(path: Path) -> None:
    sqlite3.connect(f"file:{path}?mode=ro", uri=True).execute("CREATE TABLE b (x)")


def _locked(path: Path) -> None:
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    sqlite3.connect(path, timeout=0, isolation_level=None).execute("BEGIN IMMEDIATE")


def _damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = b"\x99" * 4096
    path.write_bytes(content)
    sqlite3.connect(path).execute("SELECT * FROM a")


def _no_database(path: Path) -> None:
    path.write_bytes(b"no database at all" * 400)
    sqlite3.connect(path).execute("SELECT * FROM a")


def _full(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA max_page_count = 2")
    connection.execute("INSERT INTO a VALUES (zeroblob(100000))")


def _too_big(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100)
    connection.execute("INSERT INTO a VALUES (?)", ["x" * 101])


def _strict(path: Path) -> None:
    sqlite3.connect(path).execute("INSERT INTO strictly VALUES ('x')")


def _trigger(path: Path) -> None:
    sqlite3.connect(path).execute("INSERT INTO watched VALUES (1)")


def _huge_number(path: Path) -> None:
    sqlite3.connect(path).execute("INSERT INTO a VALUES (?)", [1 << 63])


def _half_an_emoji(path: Path) -> None:
    sqlite3.connect(path).execute("INSERT INTO a VALUES (?)", ["\ud83d"])


def _no_folder(path: Path) -> None:
    sqlite3.connect(path / "deeper" / "a.db")


def _denied(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)
    connection.execute("SELECT * FROM a")


@pytest.mark.parametrize(
    ("provocation", "kind", "words"),
    [
        (_read_only, AWAY, "read-only"),
        (_locked, BUSY, "busy"),
        (_damaged, AWAY, "damaged"),
        (_no_database, AWAY, "damaged"),
        (_full, AWAY, "no room"),
        (_no_folder, AWAY, "can't be read"),
        (_denied, AWAY, "rights"),
        (_trigger, AWAY, "can't be used"),
        (_too_big, DATA, "too long"),
        (_strict, DATA, "does not fit"),
        (_huge_number, DATA, "does not fit"),
        (_half_an_emoji, DATA, "does not fit"),
    ],
)
def test_what_sqlite_refuses_is_told_apart(
    tmp_path: Path, provocation: Callable[[Path], None], kind: Kind, words: str
) -> None:
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE a (x)")
        connection.execute("CREATE TABLE strictly (x INTEGER) STRICT")
        connection.execute("CREATE TABLE watched (x)")
        connection.execute(
            "CREATE TRIGGER t BEFORE INSERT ON watched BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises(Exception) as caught:
        provocation(path)
    fault = fault_of(caught.value)
    assert fault is not None and fault.kind is kind and words in fault.words


def register(engine: Engine) -> int:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        return queries.servers.register_server(s, group.id, samples.hello()).id


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("ALTER TABLE acceptance_event RENAME TO elsewhere", "missing or was changed"),
        ("ALTER TABLE acceptance_event RENAME COLUMN batch_size TO b", "missing or was changed"),
        ("REVOKE INSERT ON acceptance_event FROM {role}", "rights are missing"),
        ("REVOKE UPDATE ON request FROM {role}", "rights are missing"),
        ("REVOKE USAGE ON SCHEMA public FROM {role}", "missing"),
        ("ALTER DATABASE {name} SET default_transaction_read_only = on", "read-only"),
        ("DROP TABLE acceptance_event_default", "missing or was changed"),
    ],
)
def test_what_an_operator_can_break_in_postgresql_and_mend_again_is_the_stores_fault(
    postgres_database: str, broken: str, words: str
) -> None:
    url = make_url(postgres_database)
    role = f"role_of_{url.database}"
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    rights = f"""CREATE ROLE {role} LOGIN; REVOKE ALL ON SCHEMA public FROM PUBLIC;
        GRANT USAGE, CREATE ON SCHEMA public TO {role}"""
    with admin.connect() as connection:
        connection.exec_driver_sql(rights)
    engine = store.connect(re.sub("//postgres:", f"//{role}:", postgres_database))
    store.upgrade(engine)
    register(engine)
    engine.dispose()  # what is changed now shows on new connections
    with admin.connect() as connection:
        connection.exec_driver_sql(broken.format(role=role, name=url.database))
    # One day that has a partition already and one of long ago, which has none of its own.
    batch = [
        (1, [samples.started(1), samples.chain_step(1, 0, 1, at_us=1_000_000)]),
        (2, [samples.started(2), samples.chain_step(2, 0, 1, at_us=wire.now_us())]),
    ]
    with pytest.raises(Exception) as caught:
        ingest(engine, 1, samples.BOOT, batch)
    engine.dispose()
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")
    admin.dispose()
    assert is_away(caught.value), caught.value
    assert words in in_words(caught.value)
