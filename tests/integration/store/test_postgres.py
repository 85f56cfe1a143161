"""PostgreSQL as people run it: options in the URL, schemas, a pooler, a peer that goes silent."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, inspect, make_url, text

from aurora_sgl import store, wire
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import postgres, queries
from aurora_sgl.store.events import insert_events
from aurora_sgl.store.faults import Kind, fault_of
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.link import StoreAway, StoreLink
from aurora_sgl.store.options import SECONDS
from aurora_sgl.store.partitions import partitions
from aurora_sgl.store.postgres import ImpatientConnection
from aurora_sgl.store.queries.sql_console import make_sql_roles, run_sql
from tests.conftest import new_database
from tests.support import store_samples as samples
from tests.support.pgbouncer import pgbouncer
from tests.support.swallowing_proxy import SwallowingProxy

Silent = tuple[SwallowingProxy, StoreLink]


def register(engine: Engine, boot_id: int = samples.BOOT) -> int:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        return queries.servers.register_server(s, group.id, samples.hello(boot_id)).id


def batch(number: int, steps: int = 5) -> list[tuple[int, list[wire.Record]]]:
    """One request of today."""
    now = wire.now_us()
    rows = [samples.chain_step(number, i, 1, at_us=now + i) for i in range(steps)]
    records: list[wire.Record] = [
        samples.started(number, at_us=now), *rows, samples.finished(number, rows, at_us=now),
    ]  # fmt: skip
    return [(number, records)]


@pytest.fixture
def upgraded(postgres_url: str, upgraded_postgres: str) -> Iterator[str]:
    """The URL of a store at the newest schema."""
    with new_database(postgres_url, upgraded_postgres) as url:
        yield url


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("connect_timeout", "7", None),
        ("application_name", "ours", "SHOW application_name"),
        ("keepalives_idle", "33", None),
        ("tcp_user_timeout", "1234", None),
        ("sslmode", "disable", None),
        ("target_session_attrs", "read-write", None),
        ("options", "-c work_mem=5MB -c search_path=elsewhere", "SHOW work_mem"),
    ],
)
def test_every_option_of_the_url_is_kept(
    postgres_url: str, option: str, value: str, shown: str | None
) -> None:
    url = make_url(postgres_url).update_query_dict({option: value})
    engine = store.connect(url.render_as_string(hide_password=False))
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, ImpatientConnection)
        assert driver.info.get_parameters()[option] == value
        if shown:
            assert connection.scalar(text(shown)) in (value, "5MB")
        assert connection.scalar(text("SHOW timezone")) == "UTC"
    engine.dispose()


def test_tables_lie_in_the_schema_that_the_urls_search_path_names(postgres_database: str) -> None:
    admin = create_engine(postgres_database, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("CREATE SCHEMA aurora"))
    engine = store.connect(f"{postgres_database}&options=-csearch_path%3Daurora")
    store.upgrade(engine)
    ingest(engine, register(engine), samples.BOOT, batch(1))
    tables = inspect(admin)
    assert {"acceptance_event", "alembic_version"} <= set(tables.get_table_names("aurora"))
    assert len(tables.get_view_names("aurora")) >= 5
    assert tables.get_table_names("public") == tables.get_view_names("public") == []
    with engine.connect() as connection:
        assert len(partitions(connection)) == 3
    # The SQL page's roles read there too.
    roles = make_sql_roles(engine)
    answer = run_sql(
        engine, "SELECT count(*) FROM request", with_tokens=False, role_url=roles["viewer"]
    )
    assert answer.rows == [(1,)]
    engine.dispose()
    admin.dispose()


def test_a_schema_that_is_not_there_is_one_line(postgres_database: str) -> None:
    engine = store.connect(f"{postgres_database}&options=-csearch_path%3Dnowhere")
    with pytest.raises(AuroraError, match="no schema has been selected") as caught:
        store.upgrade(engine)
    assert "\n" not in str(caught.value)
    engine.dispose()


def test_all_of_ours_works_through_pgbouncer_in_transaction_mode(postgres_database: str) -> None:
    with pgbouncer(postgres_database, connections=2) as url:
        engine = store.connect(url, seconds=20)
        store.upgrade(engine)
        server_id = register(engine)
        failures: list[BaseException] = []

        def serve(boot_id: int) -> None:
            try:
                with store.session(engine) as s:
                    group = queries.groups.group_by_name(s, "default").id
                    own = queries.servers.register_server(s, group, samples.hello(boot_id)).id
                for number in range(1, 13):  # psycopg prepares a statement at its sixth time
                    start = samples.started(number, boot_id=boot_id)
                    step = samples.chain_step(number, 0, 1, boot_id=boot_id)
                    ingest(engine, own, boot_id, [(number, [start, step])])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=serve, args=(boot,)) for boot in (101, 102, 103)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        ingest(engine, server_id, samples.BOOT, batch(1))
        with store.reading(engine) as connection:
            assert connection.scalar(text("SELECT count(*) FROM acceptance_event")) == 41
        _nothing_is_left_behind(url, postgres_database)
        link = StoreLink(url)
        with link.session(write=False) as s:
            assert queries.groups.group_by_name(s, "default").id
        link.close()
        engine.dispose()


def _nothing_is_left_behind(pooled: str, direct: str) -> None:
    """Who gets our connections next finds none of our settings, statements or locks."""
    names = ("timezone", "statement_timeout", "lock_timeout", "search_path",
             "idle_in_transaction_session_timeout", "default_transaction_read_only")  # fmt: skip
    shown = []
    for url in (pooled, direct.replace("+psycopg", "")):
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
            shown.append([connection.execute(f"SHOW {name}").fetchone() for name in names])
            row = connection.execute(
                "SELECT (SELECT count(*) FROM pg_prepared_statements), "
                "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')"
            ).fetchone()
            assert row == (0, 0)
    assert shown[0] == shown[1]


@pytest.fixture
def silent(upgraded: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    """A proxy, and a link through it that takes a second without an answer for the end."""
    monkeypatch.setattr(postgres, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(postgres, "ASIDE_SECONDS", 1.0)
    proxy = SwallowingProxy(upgraded)
    link = StoreLink(proxy.url)
    with link.session() as s:
        queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
    link.engine().update_execution_options(**{SECONDS: 1.0})
    yield proxy, link
    link.close()
    proxy.close()


@pytest.mark.parametrize("moment", ["a statement", "a copy", "a commit"])
def test_a_connection_that_went_silent_costs_seconds(silent: Silent, moment: str) -> None:
    """The peer takes all and answers nothing, as after a failover; it was 110 s and more."""
    proxy, link = silent
    with (
        pytest.raises(StoreAway, match="can't be reached"),
        link.guard() as engine,
        engine.begin() as connection,
    ):
        connection.execute(text("UPDATE deployment_group SET target_revision = 'lost'"))
        proxy.swallow()
        if moment == "a statement":
            connection.execute(text("SELECT 1"))
        elif moment == "a copy":
            insert_events(connection, [samples.chain_step(1, 0, 1)], 0)
    with link.session(write=False) as s:  # on a new connection
        assert queries.groups.group_by_name(s, "default").target_revision == ""


def test_a_pooled_connection_that_went_silent_is_noticed_before_it_is_used(
    silent: Silent,
) -> None:
    proxy, link = silent
    proxy.swallow()
    with link.session(write=False) as s:
        assert queries.groups.group_by_name(s, "default").id


def test_a_peer_that_is_gone_is_noticed_by_the_kernel_within_seconds(upgraded: str) -> None:
    proxy = SwallowingProxy(upgraded)
    engine = store.connect(proxy.url)
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, ImpatientConnection)
        with socket.socket(fileno=os.dup(driver.pgconn.socket)) as line:

            def tcp(name: int) -> int:
                return line.getsockopt(socket.IPPROTO_TCP, name)

            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert tcp(socket.TCP_USER_TIMEOUT) == 10_000
            probes = tcp(socket.TCP_KEEPCNT) * tcp(socket.TCP_KEEPINTVL)
            assert tcp(socket.TCP_KEEPIDLE) + probes <= 12
    engine.dispose()
    proxy.close()


def test_a_statement_that_takes_too_long_is_the_stores_fault_and_leaves_no_limit_behind(
    upgraded: str,
) -> None:
    engine = store.connect(upgraded, seconds=0.2)
    with pytest.raises(Exception) as caught, engine.connect() as connection:
        connection.execute(text("SELECT pg_sleep(5)"))
    fault = fault_of(caught.value)
    assert fault is not None and fault.kind is Kind.BUSY
    with engine.execution_options(**{SECONDS: None}).connect() as connection:
        assert connection.scalar(text("SHOW statement_timeout")) == "0"
    engine.dispose()


def test_a_read_only_standby_is_said_in_one_line(upgraded: str, postgres_database: str) -> None:
    """A database that refuses writes as a standby does, with and without the schema."""
    for url in (upgraded, postgres_database):
        admin = create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            name = make_url(url).database
            connection.exec_driver_sql(
                f"ALTER DATABASE {name} SET default_transaction_read_only = on"
            )
        admin.dispose()
    line = "read-only, as a standby is: AURORA_DATABASE_URL must name its primary"
    engine = store.connect(upgraded)
    assert store.upgrade(engine) == store.head()  # only looked at
    with store.session(engine, write=False) as s:
        assert queries.groups.groups(s) == []  # a dashboard may read there
    engine.dispose()
    link = StoreLink(upgraded)
    with pytest.raises(StoreAway, match=line), link.session() as s:
        queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
    link.close()
    empty = store.connect(postgres_database)
    with pytest.raises(AuroraError, match=line) as caught:
        store.upgrade(empty)
    assert "\n" not in str(caught.value)
    empty.dispose()
