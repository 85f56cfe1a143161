"""New days while somebody holds the tables, and who may make them."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text, update
from sqlalchemy.exc import ProgrammingError

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.limits import Limits
from aurora_sgl.store import queries, retention
from aurora_sgl.store.housekeeper import Housekeeper
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.models import RetentionLimit
from aurora_sgl.store.partitions import ensure_partitions, name_of, partitions
from tests.conftest import new_database
from tests.support import store_samples as samples

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


@pytest.fixture
def postgres(postgres_url: str, upgraded_postgres: str) -> Iterator[Engine]:
    """A store that has no partition yet: every day is new to it."""
    with new_database(postgres_url, upgraded_postgres) as url:
        engine = store.connect(url, seconds=20)
        yield engine
        engine.dispose()


def register(engine: Engine) -> int:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        return queries.servers.register_server(s, group.id, samples.hello()).id


def serve(engine: Engine, server_id: int, number: int) -> int:
    """Ingest one request of today; how many events were new."""
    now = wire.now_us()
    steps = [samples.chain_step(number, i, 1, at_us=now + i) for i in range(3)]
    start = samples.started(number, at_us=now)
    return ingest(engine, server_id, samples.BOOT, [(number, [start, *steps])]).inserted_events


def count(engine: Engine, table: str) -> int:
    with store.reading(engine) as connection:
        return int(connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0)


def hold(connection: Connection) -> None:
    """As pg_dump does from its start to its end."""
    tables = connection.scalars(
        text("SELECT c.oid::regclass::text FROM pg_class c WHERE c.relkind IN ('r', 'p') "
             "AND c.relnamespace = 'public'::regnamespace")
    ).all()  # fmt: skip
    connection.execute(text(f"LOCK TABLE {', '.join(tables)} IN ACCESS SHARE MODE"))


class Watcher:
    """Reads all events, the default partition too, again and again; who would wait for a second
    behind somebody's lock gets an error."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stop = threading.Event()
        self.failures: list[BaseException] = []
        self.reads = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._engine.connect() as connection:
                    connection.execute(text("SET LOCAL lock_timeout = '1s'"))
                    connection.execute(text("SELECT count(*) FROM acceptance_event"))
                self.reads += 1
            except BaseException as error:
                self.failures.append(error)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self.failures == [] and self.reads


def test_at_a_new_day_nothing_waits_a_second_behind_pg_dump(
    postgres: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    server_id, today = register(postgres), utc_now().date()
    watcher = Watcher(postgres)
    with postgres.connect() as dump:
        hold(dump)
        begun = time.monotonic()
        for number in (1, 2, 3):  # only the first tries
            assert serve(postgres, server_id, number) == 3
        waited = time.monotonic() - begun
        watcher.end()
    assert waited < 5  # the lock's quarter of a second, and three batches on a busy machine
    assert count(postgres, "acceptance_event_default") == 9
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3  # a day each
    # It ends: the day gets its partition, and the rows that waited move in.
    assert today in ensure_partitions(postgres, at_once=True)
    assert (count(postgres, "acceptance_event_default"), count(postgres, name_of(today))) == (0, 9)


def test_another_lock_on_making_partitions_does_not_hold_up_ingest(postgres: Engine) -> None:
    from aurora_sgl.store.partitions import _LOCK

    server_id = register(postgres)
    with postgres.connect() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        assert serve(postgres, server_id, 1) == 3
    assert count(postgres, "acceptance_event_default") == 3


def test_a_day_with_many_rows_in_the_default_partition_stays_there(
    postgres: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_sgl.store.partitions._FEW", 2)
    server_id, today = register(postgres), utc_now().date()
    with postgres.connect() as dump:
        hold(dump)
        serve(postgres, server_id, 1)
    assert today not in ensure_partitions(postgres, at_once=True)
    with store.reading(postgres) as connection:
        assert len(partitions(connection)) == 2  # tomorrow and the day after
    assert serve(postgres, server_id, 2) == 3
    assert count(postgres, "acceptance_event_default") == 6


def test_a_large_default_partition_is_read_before_it_is_locked(
    postgres: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_id, today = register(postgres), utc_now().date()
    with postgres.connect() as dump:
        hold(dump)
        serve(postgres, server_id, 1)
    monkeypatch.setattr("aurora_sgl.store.partitions._LARGE", 0)
    notices: list[str] = []

    postgres.dispose()

    @event.listens_for(postgres, "connect")
    def listen(driver: psycopg.Connection[Any], _: object) -> None:
        driver.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
        driver.execute("SET client_min_messages = debug1")
        driver.commit()

    assert ensure_partitions(postgres) == []  # not beside the traffic
    days = [today + timedelta(days=ahead) for ahead in (1, 2)]
    assert ensure_partitions(postgres, at_once=True) == days
    implied = [line for line in notices if "is implied by existing constraints" in line]
    assert len(implied) == 2
    with store.reading(postgres) as connection:
        rules = text("SELECT count(*) FROM pg_constraint WHERE conname LIKE '%elsewhere'")
        assert connection.scalar(rules) == 0
    assert serve(postgres, server_id, 2) == 3


def statements(heading: str) -> str:
    """The SQL of a section of docs/operations.md."""
    section = OPERATIONS.read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sql\n(.*?)```", section, re.S)
    assert len(blocks) == 1
    return str(blocks[0])


def test_a_role_that_only_reads_and_writes_serves_and_one_that_owns_the_tables_migrates(
    postgres_database: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    url = make_url(postgres_database)
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    suffix = f"_of_{url.database}"
    sql = re.sub(r"\b(aurora_owner|aurora_writer)\b", rf"\1{suffix}", statements("### Two roles"))
    urls = {
        role: url.set(username=f"aurora_{role}{suffix}").render_as_string(hide_password=False)
        for role in ("owner", "writer")
    }
    with admin.connect() as connection:
        connection.exec_driver_sql(sql)
    owner = store.connect(urls["owner"])
    store.upgrade(owner)
    writer = store.connect(urls["writer"])
    try:
        assert store.upgrade(writer) == store.head()  # only looked at
        server_id = register(writer)
        assert serve(writer, server_id, 1) == serve(writer, server_id, 2) == 3
        assert count(writer, "acceptance_event_default") == 6
        assert len([r for r in caplog.records if "rights are missing" in r.getMessage()]) == 3
        with pytest.raises(ProgrammingError, match="must be owner"), writer.begin() as connection:
            connection.execute(text("DROP TABLE request"))
        # Daily, by the other role: `aurora-sgl db upgrade`.
        assert len(ensure_partitions(owner, ahead=7, at_once=True)) == 8
        assert serve(writer, server_id, 3) == 3
        assert count(writer, name_of(utc_now().date())) == 9
        _old_days_go(owner, writer, server_id, tmp_path)
    finally:
        owner.dispose()
        writer.dispose()
        with admin.connect() as connection:
            for role in ("writer", "owner"):
                connection.exec_driver_sql(f"DROP OWNED BY aurora_{role}{suffix} CASCADE")
                connection.exec_driver_sql(f"DROP ROLE aurora_{role}{suffix}")
        admin.dispose()


def _old_days_go(owner: Engine, writer: Engine, server_id: int, files: Path) -> None:
    """By rows, since the tables are not the writer's; and all else that is old goes too."""
    old = (utc_now() - timedelta(days=50)).replace(minute=30)  # a row at the hour stays as it is
    at_us = int(old.timestamp() * 1e6)
    ensure_partitions(owner, [old])
    steps = [samples.chain_step(9, i, 1, at_us=at_us + i) for i in range(3)]
    records = [samples.started(9, at_us=at_us), *steps, samples.finished(9, steps, at_us=at_us)]
    ingest(writer, server_id, samples.BOOT, [(9, records)])
    with store.session(writer) as s:
        group = queries.groups.group_by_name(s, "default")
        queries.limits.ensure_limits(s, group.id, Limits(request_days=40), "test")
        changed = update(RetentionLimit).values(updated_at=old)  # it is due at once
        s.execute(changed)
    link = StoreLink(writer.url.render_as_string(hide_password=False), "")
    report = Housekeeper(link, ArtifactRoot(str(files)), "test").round(writer, group.id)
    link.close()
    assert report is not None
    table = name_of(old.date())
    assert (report.events, report.requests, report.minutes) == (3, 1, 1)
    assert (report.partitions, report.emptied, report.not_ours) == ((), (), (table,))
    with store.session(writer, write=False) as s:
        run = queries.prune_runs.last(s, group.id, complete=True)
        assert run is not None and run.report["not_ours"] == [table]
    assert retention.drop_emptied(writer) == ()  # and no error
    assert retention.drop_emptied(owner) == (table,)
    with store.reading(owner) as connection:
        assert old.date() not in partitions(connection)
        assert utc_now().date() in partitions(connection)
