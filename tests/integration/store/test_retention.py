"""One round of retention: what goes, what stays, and that nobody waits for it."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, func, select, text, update

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.limits import Limits
from aurora_sgl.store import queries
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.housekeeper import Housekeeper
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.liveness import scheduler_lease_name
from aurora_sgl.store.models import (
    AcceptanceEvent,
    AcceptanceMinute,
    PruneRun,
    Request,
    RequestTally,
    RetentionLimit,
)
from aurora_sgl.store.partitions import name_of
from aurora_sgl.store.pruning import minutes
from aurora_sgl.store.pruning.kept import RESERVOIR
from aurora_sgl.store.pruning.pace import MOST_ROWS, Interrupted, PrunePace
from aurora_sgl.store.retention import prune
from aurora_sgl.store.rollup import add_lists
from aurora_sgl.store.store_clock import store_now
from tests.integration.store.test_limits import link_of
from tests.support import store_samples as samples
from tests.support.hour_sums import assert_hours_are_sums
from tests.support.traces import add_trace, trace_row

NOW = utc_now().replace(hour=12, minute=0, second=0, microsecond=0)
OLD, YOUNG = 801, 802  # boots of servers of two groups


def join(engine: Engine, group: str, boot_id: int) -> tuple[int, int]:
    """The group's and the server's id."""
    with store.session(engine) as s:
        row = queries.groups.ensure_group(s, group, "target", "", "LlamaForCausalLMEagle3")
        return row.id, queries.servers.register_server(s, row.id, samples.hello(boot_id)).id


def serve(
    engine: Engine, server_id: int, boot_id: int, ages: list[float], steps: int = 2
) -> list[int]:
    """One finished request for each age in days; their ids."""
    ids = []
    for number, age in enumerate(ages, start=1):
        at_us = int((NOW - timedelta(days=age)).timestamp() * 1e6)
        rows = [
            samples.chain_step(number, i, i % 3, at_us=at_us + i, boot_id=boot_id)
            for i in range(steps)
        ]
        records: list[wire.Record] = [
            samples.started(number, at_us=at_us, boot_id=boot_id),
            *rows,
            samples.finished(number, rows, at_us=at_us + steps, boot_id=boot_id),
        ]
        ingest(engine, server_id, boot_id, [(number, records)])
        ids.append(wire.request_id(boot_id, number))
    return ids


def column(engine: Engine, what: Any) -> list[Any]:
    with store.reading(engine) as connection:
        return list(connection.scalars(select(what).distinct().order_by(what)))


def test_requests_go_with_their_traces_and_tallies_and_pinned_ones_stay(
    engine: Engine, tmp_path: Path
) -> None:
    group_id, server_id = join(engine, "default", OLD)
    ids = serve(engine, server_id, OLD, [400, 300, 200, 100, 1])
    root = ArtifactRoot(str(tmp_path / "artifacts"))
    (tmp_path / "t").write_bytes(b"x")
    with store.session(engine) as s:
        for one in ids:
            root.put_file(tmp_path / "t", add_trace(s, one).uri)
        queries.traces.pin_traces(s, [ids[1]], "test")
        queries.traces.pin_traces(s, [ids[0]], RESERVOIR)  # no promise of an age is broken for it
    limits = Limits(event_days=30, request_days=150)
    would = prune(engine, root, group_id, limits, dry_run=True, now=NOW)
    assert (would.requests, column(engine, Request.id)) == (2, ids)
    assert prune(engine, root, group_id, limits, now=NOW).requests == 2
    assert column(engine, Request.id) == [ids[1], ids[3], ids[4]]
    assert [root.exists(trace_row(one).uri) for one in ids] == [False, True, False, True, True]
    assert column(engine, RequestTally.request_id) == [ids[4]]
    assert prune(engine, root, group_id, limits, now=NOW).requests == 0


def test_requests_that_nobody_will_end_go_with_their_server(engine: Engine, tmp_path: Path) -> None:
    group_id, server_id = join(engine, "default", OLD)
    at_us = int((NOW - timedelta(days=300)).timestamp() * 1e6)
    ingest(engine, server_id, OLD, [(1, [samples.started(1, at_us=at_us, boot_id=OLD)])])
    root = ArtifactRoot(str(tmp_path))
    assert prune(engine, root, group_id, Limits(), now=NOW).requests == 0, "its server runs"
    with store.session(engine) as s:
        queries.servers.touch_server(s, server_id, state="stopped")
    assert prune(engine, root, group_id, Limits(), now=NOW).requests == 1


def test_each_group_keeps_its_own_days_of_events(engine: Engine, tmp_path: Path) -> None:
    """They share one table, in PostgreSQL by days."""
    root = ArtifactRoot(str(tmp_path))
    ages = [50.0, 20.0, 5.0]
    (a, server_a), (b, server_b) = join(engine, "a", OLD), join(engine, "b", YOUNG)
    of_a = serve(engine, server_a, OLD, ages)
    of_b = serve(engine, server_b, YOUNG, ages)
    with store.session(engine) as s:
        queries.limits.set_limits(s, a, {"event_days": 40}, "test")
        queries.limits.set_limits(s, b, {"event_days": 10}, "test")
    would = prune(engine, root, b, dry_run=True, now=NOW)
    done = prune(engine, root, b, now=NOW)
    assert would.events == done.events == 6, "what neither keeps, and its own"
    assert column(engine, AcceptanceEvent.request_id) == [of_a[1], of_a[2], of_b[2]]
    assert prune(engine, root, a, now=NOW).events == 0


def test_a_file_of_sqlite_gives_back_the_room_of_what_went(tmp_path: Path) -> None:
    engine = store.connect(f"sqlite:///{tmp_path / 'store.db'}")
    store.upgrade(engine)
    group_id, server = join(engine, "a", OLD)
    serve(engine, server, OLD, [50.0], steps=3000)
    assert prune(engine, ArtifactRoot(str(tmp_path)), group_id, Limits(), now=NOW).events == 3000
    with store.reading(engine) as connection:
        assert connection.exec_driver_sql("PRAGMA freelist_count").scalar() == 0


# -- roll-ups ------------------------------------------------------------------------------------


def sums(engine: Engine) -> dict[str, int]:
    names = [c.name for c in AcceptanceMinute.__table__.columns if c.name not in minutes.KEY]
    with store.reading(engine) as connection:
        rows = connection.execute(select(AcceptanceMinute)).mappings().all()
    total: dict[str, Any] = {}
    for row in rows:
        for name in names:
            old = total.get(name, [] if isinstance(row[name], list) else 0)
            total[name] = add_lists(old, row[name]) if isinstance(old, list) else old + row[name]
    return total


def test_minutes_become_hours_and_no_sum_changes(engine: Engine, tmp_path: Path) -> None:
    root = ArtifactRoot(str(tmp_path))
    group_id, server_id = join(engine, "default", OLD)
    _, other = join(engine, "other", YOUNG)
    minute = 1 / 1440
    for one, boot_id in ((server_id, OLD), (other, YOUNG)):
        serve(engine, one, boot_id, [40 + n * 20 * minute for n in range(7)] + [1, 1 + minute])
    before, rows = sums(engine), len(column(engine, AcceptanceMinute.bucket_start))
    assert rows == 9
    would = prune(engine, root, group_id, Limits(), dry_run=True, now=NOW)
    done = prune(engine, root, group_id, Limits(), now=NOW)
    assert would.minutes == done.minutes >= 4
    assert sums(engine) == before
    assert_hours_are_sums(engine)
    with store.reading(engine) as connection:
        mine = select(AcceptanceMinute.bucket_start).where(AcceptanceMinute.server_id == server_id)
        times = list(connection.scalars(mine.order_by(AcceptanceMinute.bucket_start)))
        theirs = select(func.count()).select_from(AcceptanceMinute)
        assert connection.scalar(theirs.where(AcceptanceMinute.server_id == other)) == rows
    assert [moment.minute for moment in times[:-2]] == [0] * (len(times) - 2) and len(times) < 7
    assert times[-1] - times[-2] == timedelta(minutes=1), "young ones stay as they are"
    assert prune(engine, root, group_id, Limits(), now=NOW).minutes == 0
    late = samples.chain_step(1, 99, 1, at_us=int(times[0].timestamp() * 1e6) + 61_000_000,
                              boot_id=OLD)  # fmt: skip
    ingest(engine, server_id, OLD, [(999, [late])])
    after = sums(engine)
    assert after["verify_steps"] == before["verify_steps"] + 1
    assert prune(engine, root, group_id, Limits(), now=NOW).minutes == 1, "a late record joins"
    assert sums(engine) == after
    assert prune(engine, root, group_id, Limits(minute_days=30, hour_days=35), now=NOW).hours > 0
    assert len(column(engine, AcceptanceMinute.bucket_start)) == rows
    assert_hours_are_sums(engine)


MINUTE_ROWS = st.fixed_dictionaries(
    {
        "bucket_start": st.integers(0, 59).map(lambda m: datetime(2026, 1, 1, 5, m)),
        "server_id": st.just(1),
        **{n: st.integers(1, 2) for n in ("drafter_version_id", "depth", "topk", "nodes")},
        "domain": st.sampled_from(["chat", "客服"]),
        "accept_rule": st.just("greedy"),
        "batch_bucket": st.integers(1, 2),
        "mixed": st.booleans(),
        **{
            c.name: st.lists(st.integers(0, 9), max_size=4)
            if c.name in ("histogram", "per_position")
            else st.integers(0, 1000)
            for c in AcceptanceMinute.__table__.columns
            if c.name not in minutes.KEY
        },
    }
)


@settings(max_examples=50, deadline=None)
@given(st.lists(MINUTE_ROWS, max_size=20))
def test_whatever_the_rows_of_an_hour_are_their_sums_stay(rows: list[dict[str, Any]]) -> None:
    hour = datetime(2026, 1, 1, 5)
    new = minutes.merged([dict(row) for row in rows], hour)
    keys = [tuple(row[name] for name in minutes.KEY) for row in new]
    assert len(keys) == len(set(keys)) and {row["bucket_start"] for row in new} <= {hour}
    for name in rows[0].keys() - set(minutes.KEY) if rows else ():
        if isinstance(rows[0][name], list):
            for place in range(4):
                parts = [r[name][place] for r in rows if len(r[name]) > place]
                whole = [r[name][place] for r in new if len(r[name]) > place]
                assert sum(parts) == sum(whole)
        else:
            assert sum(r[name] for r in rows) == sum(r[name] for r in new)


# -- nobody waits --------------------------------------------------------------------------------


def fill(engine: Engine, server_id: int, boot_id: int, steps: int) -> None:
    at_us = int((NOW - timedelta(days=100)).timestamp() * 1e6)
    rows = [samples.chain_step(1, i, 0, at_us=at_us + i, boot_id=boot_id) for i in range(steps)]
    ingest(engine, server_id, boot_id, [(1, [samples.started(1, boot_id=boot_id), *rows])])


def test_ingest_goes_on_while_events_are_pruned(engine: Engine, tmp_path: Path) -> None:
    group_id, server_id = join(engine, "default", OLD)
    _, young = join(engine, "default", YOUNG)
    fill(engine, server_id, OLD, 4_000)
    pace = PrunePace()
    done = threading.Event()

    def work() -> None:
        prune(engine, ArtifactRoot(str(tmp_path)), group_id, Limits(), now=NOW, pace=pace)
        done.set()

    thread = threading.Thread(target=work)
    waits: list[float] = []
    thread.start()
    number = 0
    while not done.is_set():
        number += 1
        begun = time.monotonic()
        ingest(engine, young, YOUNG, [(number, [samples.started(number, boot_id=YOUNG)])])
        waits.append(time.monotonic() - begun)
        done.wait(0.005)
    thread.join()
    assert column(engine, AcceptanceEvent.request_id) == []
    if is_sqlite(engine):  # in PostgreSQL the day's table was dropped, at once
        assert len(waits) > 5, "many commits got through while it went on"
    assert max(waits) < 1.0


def test_a_partition_that_somebody_reads_is_emptied_and_nobody_waits(
    postgres_database: str, tmp_path: Path
) -> None:
    """pg_dump at midnight, or an analyst who went to lunch in a transaction."""
    engine = store.connect(postgres_database)
    store.upgrade(engine)
    group_id, server_id = join(engine, "default", OLD)
    _, young = join(engine, "default", YOUNG)
    serve(engine, server_id, OLD, [50, 49], steps=30)
    names = tuple(name_of((NOW - timedelta(days=age)).date()) for age in (50, 49))
    root = ArtifactRoot(str(tmp_path))
    with engine.connect() as reader:
        reader.execute(text("SELECT count(*) FROM acceptance_event"))
        thread = threading.Thread(
            target=lambda: reports.append(prune(engine, root, group_id, Limits(), now=NOW))
        )
        reports: list[Any] = []
        waits: list[float] = []
        thread.start()
        number = 0
        while thread.is_alive():
            number += 1
            begun = time.monotonic()
            step = samples.chain_step(number, 0, 1, boot_id=YOUNG, at_us=wire.now_us())
            ingest(engine, young, YOUNG, [(number, [step])])
            waits.append(time.monotonic() - begun)
        thread.join()
        (report,) = reports
        assert (report.events, report.partitions, report.emptied) == (60, (), names)
        assert max(waits) < 1.0
        reader.rollback()
    assert prune(engine, root, group_id, Limits(), now=NOW).partitions == names
    engine.dispose()


def test_a_transaction_grows_and_shrinks_with_the_time_that_it_takes(engine: Engine) -> None:
    clock = {"now": 0.0, "second": 0.001}
    pace = PrunePace(monotonic=lambda: clock["now"])

    def work(_: Any, most: int) -> int:
        clock["now"] += clock["second"]
        return most

    for _ in range(6):
        pace.once(engine, work)
    assert pace.rows == MOST_ROWS
    clock["second"] = 0.05
    sizes = [pace.rows for _ in range(3) if pace.once(engine, work)]
    assert sizes == [2_500, 1_250, 625]


def test_a_round_ends_where_its_lease_is_lost_and_loses_nothing(
    engine: Engine, tmp_path: Path
) -> None:
    group_id, server_id = join(engine, "default", OLD)
    serve(engine, server_id, OLD, [400, 300, 1])
    asked = iter([True, False])
    with pytest.raises(Interrupted):
        root = ArtifactRoot(str(tmp_path))
        prune(engine, root, group_id, Limits(), now=NOW, pace=PrunePace(lambda: next(asked, False)))
    assert len(column(engine, Request.id)) == 3
    prune(engine, root, group_id, Limits(), now=NOW)
    assert len(column(engine, Request.id)) == 1


# -- who does it, and when -----------------------------------------------------------------------


def keeper(engine: Engine, folder: Path, **changes: Any) -> Housekeeper:
    return Housekeeper(link_of(engine), ArtifactRoot(str(folder)), "test", **changes)


def make_due(engine: Engine, group_id: int) -> None:
    with store.session(engine) as s:
        queries.limits.ensure_limits(s, group_id, Limits(trace_bytes=0), "test")
        past = store_now(s) - timedelta(days=2)
        s.execute(update(RetentionLimit).values(updated_at=past))
        s.execute(update(PruneRun).values(started_at=past))


def test_a_round_is_due_a_day_after_the_limits_were_set_and_once_a_day(
    engine: Engine, tmp_path: Path
) -> None:
    group_id, server_id = join(engine, "default", OLD)
    serve(engine, server_id, OLD, [400, 1])
    one = keeper(engine, tmp_path)
    assert one.round(engine, group_id) is None, "no limits yet"
    with store.session(engine) as s:
        queries.limits.ensure_limits(s, group_id, Limits(), "test")
    assert one.round(engine, group_id) is None, "a day to change them"
    make_due(engine, group_id)
    report = one.round(engine, group_id)
    assert report is not None and report.requests == 1
    assert one.round(engine, group_id) is None
    with store.session(engine, write=False) as s:
        run = queries.prune_runs.last(s, group_id)
        assert run is not None and run.finished_at is not None and run.error == ""
        assert run.report["requests"] == 1 and "1 requests" in run.report["sentence"]
        assert run.actor.startswith("test ")
    make_due(engine, group_id)
    assert one.round(engine, group_id) is not None


def test_a_sidecar_prunes_only_where_no_scheduler_leads(engine: Engine, tmp_path: Path) -> None:
    group_id, _ = join(engine, "default", OLD)
    make_due(engine, group_id)
    sidecar = keeper(engine, tmp_path, stands_in=True)
    with store.session(engine) as s:
        token = queries.leases.acquire_lease(s, scheduler_lease_name(group_id), "them", 60)
    assert token is not None and sidecar.round(engine, group_id) is None
    with store.session(engine) as s:
        queries.leases.release_lease(s, scheduler_lease_name(group_id), "them", token)
    assert sidecar.round(engine, group_id) is not None


def test_of_two_that_prune_one_does(engine: Engine, tmp_path: Path) -> None:
    group_id, _ = join(engine, "default", OLD)
    make_due(engine, group_id)
    link = StoreLink(engine.url.render_as_string(hide_password=False))
    keepers = [Housekeeper(link, ArtifactRoot(str(tmp_path)), "test") for _ in range(3)]
    for one in keepers:
        one.look(group_id)
    for one in keepers:
        if one._thread is not None:
            one._thread.join(30)
    with store.session(engine, write=False) as s:
        assert s.scalar(select(func.count()).select_from(PruneRun)) == 1
    link.close()
