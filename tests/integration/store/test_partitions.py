"""Retention, and the day partitions of PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, text

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.limits import Limits
from aurora_sgl.rollout import promote
from aurora_sgl.store import queries, retention
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import AcceptanceEvent, AcceptanceMinute, DrafterVersion, RequestTally
from aurora_sgl.store.partitions import ensure_partitions, name_of, partitions
from aurora_sgl.store.retention import PruneReport
from tests.support import store_samples as samples

NOW = utc_now().replace(hour=12, minute=0, second=0, microsecond=0)


@pytest.fixture
def postgres(postgres_database: str) -> Iterator[Engine]:
    engine = store.connect(postgres_database)
    store.upgrade(engine)
    yield engine
    engine.dispose()


def serve(engine: Engine, ages: list[float], boot_id: int = samples.BOOT) -> int:
    """One finished request of two steps for each age in days."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        server_id = queries.servers.register_server(s, group.id, samples.hello(boot_id)).id
    for number, age in enumerate(ages, start=1):
        at_us = int((NOW - timedelta(days=age)).timestamp() * 1e6)
        steps = [samples.chain_step(number, i, 1, at_us=at_us + i, boot_id=boot_id) for i in (0, 1)]
        records: list[wire.Record] = [
            samples.started(number, at_us=at_us, boot_id=boot_id),
            *steps,
            samples.finished(number, steps, at_us=at_us + 9, boot_id=boot_id),
        ]
        ingest(engine, server_id, boot_id, [(number, records)])
    return server_id


def left(engine: Engine) -> list[int]:
    with store.reading(engine) as connection:
        ids = connection.scalars(
            select(AcceptanceEvent.request_id).distinct().order_by(AcceptanceEvent.request_id)
        )
        return [request_id & 0xFFFFFFFF for request_id in ids]


def prune(
    engine: Engine,
    files: ArtifactRoot,
    *,
    days: int,
    trace_bytes: int | None = None,
    weights: bool = False,
    keep_versions: int = 10,
    dry_run: bool = False,
    now: datetime = NOW,
) -> PruneReport:
    """A round over the first group in which requests and minutes stay."""
    limits = Limits(trace_bytes, days, 10_000, 10_000, 10_000, keep_versions)
    return retention.prune(engine, files, 1, limits, with_weights=weights, dry_run=dry_run, now=now)


def no_files(tmp_path: Path) -> ArtifactRoot:
    return ArtifactRoot(str(tmp_path / "artifacts"))


def test_old_events_go_and_their_sums_stay(engine: Engine, tmp_path: Path) -> None:
    serve(engine, [40, 31, 30, 3, 0])
    with store.reading(engine) as connection:
        minutes = connection.execute(select(AcceptanceMinute)).all()
    would = prune(engine, no_files(tmp_path), days=30, dry_run=True, now=NOW)
    assert (would.events, would.dry_run, left(engine)) == (4, True, [1, 2, 3, 4, 5])
    done = prune(engine, no_files(tmp_path), days=30, now=NOW)
    assert done == PruneReport(**{**would.__dict__, "dry_run": False})
    assert left(engine) == [3, 4, 5]
    with store.reading(engine) as connection:
        assert connection.execute(select(AcceptanceMinute)).all() == minutes
        assert len(connection.execute(select(RequestTally)).all()) == 3
    again = prune(engine, no_files(tmp_path), days=30, now=NOW)
    assert (again.events, again.partitions) == (0, ())


def test_more_events_than_one_chunk_go(engine: Engine, tmp_path: Path) -> None:
    server_id = serve(engine, [])
    at_us = int((NOW - timedelta(days=100)).timestamp() * 1e6)
    steps = [samples.chain_step(1, i, 0, at_us=at_us + i) for i in range(6_001)]
    ingest(engine, server_id, samples.BOOT, [(1, [samples.started(1), *steps])])
    assert prune(engine, no_files(tmp_path), days=1, now=NOW).events == 6_001
    assert left(engine) == []


def test_a_number_of_days_without_sense_is_refused(engine: Engine, tmp_path: Path) -> None:
    serve(engine, [])
    with pytest.raises(AuroraError, match="event_days is 0"):
        prune(engine, no_files(tmp_path), days=0)


def test_the_oldest_traces_go_until_the_rest_fits(engine: Engine, tmp_path: Path) -> None:
    serve(engine, [4, 3, 2, 1])
    artifacts = no_files(tmp_path)
    (tmp_path / "t").write_bytes(b"x" * 100)
    for number in range(1, 5):
        uri = f"traces/20261101/{number}.safetensors"
        artifacts.put_file(tmp_path / "t", uri)
        with store.session(engine) as s:
            queries.traces.add_trace(
                s,
                request_id=wire.request_id(samples.BOOT, number),
                uri=uri,
                bytes=100 if number > 1 else 60,  # a pinned one within its share
                sha256="",
                start=0,
                end=9,
                output_start=3,
                prompt_sha256="",
                head_sha256="",
                greedy=True,
                aux_width=9,
                last_width=3,
                dtype="bfloat16",
                created_at=NOW - timedelta(days=5 - number),
            )
    with store.session(engine) as s:
        queries.traces.pin_traces(s, [wire.request_id(samples.BOOT, 1)], "test")
    would = prune(engine, artifacts, days=30, trace_bytes=250, dry_run=True, now=NOW)
    assert (would.traces, would.trace_bytes) == (2, 200)
    assert artifacts.exists("traces/20261101/2.safetensors")
    prune(engine, artifacts, days=30, trace_bytes=250, now=NOW)
    kept = [artifacts.exists(f"traces/20261101/{number}.safetensors") for number in range(1, 5)]
    assert kept == [True, False, False, True]
    with store.session(engine, write=False) as s:
        assert queries.traces.trace_bytes_total(s) == 160


def test_only_weights_that_nothing_points_to_go(engine: Engine, tmp_path: Path) -> None:
    serve(engine, [])
    artifacts = no_files(tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text("{}")
    with store.session(engine) as s:
        ids = [samples.add_version(s, 1, letter) for letter in "abcdef"]
        queries.versions.set_pinned(s, ids[0], True)
        queries.servers.touch_server(s, 1, live_version_id=ids[1])
    for letter in "abcdef":
        artifacts.put_folder(tmp_path / "w", f"versions/{letter * 16}/")
    promote(engine, ids[2], actor="ada", reason="good")
    arguments = {"days": 30, "weights": True, "keep_versions": 1}
    would = prune(engine, artifacts, **arguments, dry_run=True)
    assert would.versions == (ids[3], ids[4])
    assert artifacts.exists("versions/dddddddddddddddd/")
    assert prune(engine, artifacts, **arguments).versions == (ids[3], ids[4])
    there = [artifacts.exists(f"versions/{letter * 16}/") for letter in "abcdef"]
    assert there == [True, True, True, False, False, True]
    with store.session(engine, write=False) as s:
        assert len(queries.versions.versions(s, 1)) == 6  # the rows stay
    with pytest.raises(AuroraError, match="were deleted"):
        promote(engine, ids[3], actor="ada", reason="back")
    with store.reading(engine) as connection:
        pruned = connection.scalars(
            select(DrafterVersion.id).where(DrafterVersion.pruned_at.is_not(None))
        ).all()
    assert sorted(pruned) == [ids[3], ids[4]]


def test_a_day_gets_its_partition_before_its_first_event(postgres: Engine) -> None:
    serve(postgres, [0, 1])
    today = NOW.date()
    with postgres.connect() as connection:
        days = partitions(connection)
        assert days == [today + timedelta(days=n) for n in (-1, 0, 1, 2)]
        where = dict(
            connection.execute(
                text("SELECT request_id, tableoid::regclass::text FROM acceptance_event")
            )
            .tuples()
            .all()
        )
    assert where[wire.request_id(samples.BOOT, 1)] == name_of(today)
    assert where[wire.request_id(samples.BOOT, 2)] == name_of(today - timedelta(days=1))
    assert ensure_partitions(postgres) == []


def test_stray_times_go_to_the_default_partition_and_are_pruned_too(
    postgres: Engine, tmp_path: Path
) -> None:
    serve(postgres, [5_000, -400, 0])
    with postgres.connect() as connection:
        stray = connection.scalars(text("SELECT request_id FROM acceptance_event_default")).all()
    assert sorted({request_id & 0xFF for request_id in stray}) == [1, 2]
    prune(postgres, no_files(tmp_path), days=30, now=NOW)
    assert left(postgres) == [2, 3]


def test_rows_that_waited_in_the_default_partition_move_into_their_day(postgres: Engine) -> None:
    serve(postgres, [0])
    today = NOW.date()
    with postgres.begin() as connection:
        connection.execute(text("CREATE TEMP TABLE held AS SELECT * FROM acceptance_event"))
        connection.execute(text(f"DROP TABLE {name_of(today)}"))
        connection.execute(text("INSERT INTO acceptance_event SELECT * FROM held"))
        found = connection.scalar(text("SELECT count(*) FROM acceptance_event_default"))
    assert found == 2
    assert ensure_partitions(postgres) == [today]
    with postgres.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM acceptance_event_default")) == 0
        assert connection.scalar(text(f"SELECT count(*) FROM {name_of(today)}")) == 2


def test_retention_drops_whole_partitions(postgres: Engine, tmp_path: Path) -> None:
    serve(postgres, [9, 8, 1])
    days = [NOW.date() - timedelta(days=age) for age in (9, 8)]
    report = prune(postgres, no_files(tmp_path), days=5, now=NOW)
    assert report.partitions == tuple(name_of(day) for day in days)
    with postgres.connect() as connection:
        assert not set(days) & set(partitions(connection))
    assert left(postgres) == [3]


def test_servers_that_ingest_at_once_share_new_partitions_without_a_deadlock(
    postgres: Engine,
) -> None:
    failures: list[BaseException] = []

    def one(boot_id: int) -> None:
        try:
            serve(postgres, [30, 29, 28, 1, 0], boot_id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(boot,)) for boot in (101, 102, 103)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with postgres.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM acceptance_event")) == 30
        assert connection.scalar(text("SELECT count(*) FROM acceptance_event_default")) == 0


def test_a_partition_is_named_after_its_utc_day() -> None:
    assert name_of(date(2026, 11, 24)) == "acceptance_event_p20261124"
    assert datetime(2026, 11, 24, 0, 30, tzinfo=UTC).date() == date(2026, 11, 24)
