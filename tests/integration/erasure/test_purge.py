"""``db purge``: nothing is left anywhere, nobody else loses anything, nothing comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import from_us, utc_now
from aurora_sgl.erasure import PurgeReport, purge
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.refused import FILE, read
from aurora_sgl.sidecar.spool.erase import purged_in
from aurora_sgl.sidecar.traces.writer import TraceRow
from aurora_sgl.store import purge as records
from aurora_sgl.store import purge_rows, queries
from aurora_sgl.store.erased import rules_of, wait_for_ingests, without_erased
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import AcceptanceMinute, Audit, Drift, Erasure, Evaluation, Watch
from aurora_sgl.store.pruning.minutes import prune_minutes
from aurora_sgl.store.pruning.pace import PrunePace
from aurora_sgl.store.purge import Selector
from tests.support import leftovers
from tests.support import store_samples as samples
from tests.support.hour_sums import assert_hours_are_sums
from tests.support.purge_house import (
    BOOT,
    DOMAIN,
    OTHERS,
    OURS,
    RID,
    TALK,
    TALK_HASH,
    PurgeHouse,
    finished,
    hello,
    moment,
    number,
    started,
    step,
)

#: For what is the same whatever the database is.
one_database = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


@pytest.fixture
def house(tmp_path: Path, engine: Engine) -> Iterator[PurgeHouse]:
    one = PurgeHouse(tmp_path / "home", engine)
    yield one
    one.close_sidecar()


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def everywhere(house: PurgeHouse, wanted: dict[str, bytes]) -> set[str]:
    folder = house.home.parent  # with SQLite's database and its log
    return leftovers.in_files(folder, wanted) | leftovers.in_tables(house.engine, wanted)


def run_purge(house: PurgeHouse, kind: str, value: str = "", **options: Any) -> PurgeReport:
    until = options.pop("until", None) or utc_now()
    return purge(
        house.engine, house.artifacts, house.home, Selector(kind, value, until),
        actor="ada", reason="asked to", **{"wait_seconds": 10.0, **options},
    )  # fmt: skip


BETWEEN = from_us(samples.START_US) + timedelta(minutes=30)
CALLS: dict[str, list[tuple[str, str, datetime | None]]] = {
    "request": [("request", str(number(n)), None) for n in OURS],
    "rid": [("rid", RID, None)],
    "conversation": [("conversation", TALK, None)],
    "domain": [("domain", DOMAIN, None)],
    "before": [("before", "", BETWEEN)],
}
#: All ways on one database, and on the other those that are not all the same to it.
WAYS = [(way, "sqlite") for way in CALLS] + [(way, "postgresql") for way in ("domain", "before")]


@pytest.mark.parametrize(("way", "engine"), WAYS, indirect=["engine"])
def test_a_purge_leaves_no_token_and_no_name_in_any_file_or_table(
    house: PurgeHouse, way: str
) -> None:
    house.fill()
    wanted = dict(house.wanted)
    if way == "domain":
        wanted[DOMAIN] = DOMAIN.encode()
    places = everywhere(house, wanted)
    for place in ("acceptance_event.target_tokens: int32", "request.rid", "cache", ".trace: int64",
                  "refused.jsonl: msgpack", "00000001.spool: msgpack", "state.pt: int64",
                  "artifacts/traces"):  # fmt: skip
        assert any(place in one for one in places), (place, sorted(places))
    house.close_sidecar()
    for kind, value, until in CALLS[way]:
        report = run_purge(house, kind, value, until=until)
        assert report.left == []
    assert everywhere(house, wanted) == set()
    house.open_sidecar(house.home / "spool" / "0")
    assert house.batcher.drain()  # the last steps of the others, which waited there
    assert everywhere(house, wanted) == set()
    assert house.numbers("acceptance_event") == list(OTHERS)
    assert house.numbers("request", "id") == list(OTHERS)
    assert house.numbers("trace") == list(OTHERS)
    with store.reading(house.engine) as connection:
        count = connection.scalar(text("SELECT count(*) FROM acceptance_event"))
        uris = connection.scalars(text("SELECT uri FROM trace")).all()
    assert count == 4 * len(OTHERS)
    assert all(house.artifacts.exists(uri) for uri in uris)
    kept = list(read(house.spool.folder / FILE))
    assert [one.record.request_id for one in kept] == [number(3)]  # type: ignore[union-attr]
    assert b"newer" in (house.spool.folder / FILE).read_bytes()
    names = {path.name for path in (house.home / "training").iterdir()}
    assert names == {"group-3"}
    assert {path.name for path in (house.home / "tmp").glob("*.trace")} == {"left3.trace"}


def test_the_purge_of_a_domain_takes_its_roll_ups_and_what_was_measured_of_it_alone(
    house: PurgeHouse,
) -> None:
    house.fill()
    run_purge(house, "domain", DOMAIN, wait_seconds=0.0)
    with store.session(house.engine, write=False) as s:
        assert set(s.scalars(select(AcceptanceMinute.domain))) == {"chat"}
        assert {row["domain"] for row in assert_hours_are_sums(house.engine)} == {"chat"}
        evaluations = s.scalars(select(Evaluation).order_by(Evaluation.id)).all()
        assert [row.domain for row in evaluations] == ["", "chat"]
        assert [row[0] for row in evaluations[0].details["requests"]] == [number(3), number(4)]
        assert set(evaluations[0].details["by_domain"]) == {"chat"}
        assert s.scalars(select(Drift)).all() == []
        (watch,) = s.scalars(select(Watch))
        assert set(watch.baseline["strata"]) == {"3/1/4/chat"}
        assert watch.reason == "worse in (purged)"


@one_database
def test_a_purge_names_the_versions_that_learnt_and_leaves_an_audit_without_the_content(
    house: PurgeHouse,
) -> None:
    house.fill()
    house.close_sidecar()
    looked = run_purge(house, "rid", RID, dry_run=True)
    assert (looked.requests, looked.events, looked.traces) == (2, 6, 2)
    assert looked.versions_that_learnt == [house.learnt]
    assert house.numbers("request", "id") == [1, 2, 3, 4]  # a look changes nothing
    report = run_purge(house, "rid", RID)
    assert report.versions_that_learnt == [house.learnt]
    assert report.versions_made_from_those == [house.derived]
    assert (report.requests, report.events, report.traces) == (2, 6, 2)
    with store.session(house.engine, write=False) as s:
        (audit,) = s.scalars(select(Audit).where(Audit.action == "purge"))
        (erasure,) = s.scalars(select(Erasure))
    assert (audit.actor, audit.reason) == ("ada", "asked to")
    assert audit.after["versions"] == [house.learnt, house.derived]
    assert audit.after["requests"] == 2
    assert RID not in str((audit.subject, audit.after, erasure.details, erasure.key_hash))
    assert erasure.finished_at is not None


@one_database
def test_of_runs_from_before_a_purge_could_ask_the_window_says_who_may_have_learnt(
    house: PurgeHouse,
) -> None:
    house.fill()
    begin = from_us(samples.START_US)
    with store.session(house.engine) as s:
        group = queries.groups.group_by_name(s, "default").id
        window = {"window_start": begin, "window_end": begin + timedelta(minutes=1)}
        old = queries.runs.start_run(s, group, trigger="new", **window).id
        version = samples.add_version(s, group, "9", training_run_id=old)
    report = run_purge(house, "rid", RID, dry_run=True)
    assert report.versions_that_learnt == [house.learnt, version]


@pytest.mark.parametrize("seed", range(2))
def test_roll_ups_are_as_if_a_purged_request_had_never_been(
    engine: Engine, tmp_path: Path, seed: int
) -> None:
    """Against the same traffic without it, row for row, with many requests a minute."""
    servers = two_servers(engine)
    purged = {number(n) for n in (1, 4, 5)}
    envelopes = samples.traffic(8, 6, seed=seed)
    ingest(engine, servers[BOOT], BOOT, envelopes)
    ingest(engine, servers[BOOT + 1], BOOT + 1, without(envelopes, purged))
    for one in purged:
        selector = Selector("request", str(one), utc_now())
        erasure_id = records.begin_purge(engine, selector, actor="a", reason="r")
        erase_rows(engine, erasure_id, selector)
    assert _minutes(engine, servers[BOOT]) == _minutes(engine, servers[BOOT + 1]) != []


@pytest.mark.parametrize("late", [0, 20])
def test_roll_ups_that_became_hours_are_as_if_a_purged_request_had_never_been(
    engine: Engine, late: int
) -> None:
    """Also when so many envelopes came after the minutes were summed up."""
    servers = two_servers(engine)
    purged = {number(n) for n in (1, 4, 5)}
    envelopes = samples.traffic(8, 6, seed=3, minutes=100)
    early = len(envelopes) - late
    old = utc_now() + timedelta(days=1)
    for boot in servers:
        sent = envelopes if boot == BOOT else without(envelopes, purged)
        ingest(engine, servers[boot], boot, sent[:early])
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, "default").id
    first = from_us(samples.START_US) - timedelta(days=1)
    prune_minutes(engine, PrunePace(), group_id, minutes_before=old, hours_before=first)
    for boot in servers if late else ():
        sent = envelopes if boot == BOOT else without(envelopes, purged)
        ingest(engine, servers[boot], boot, sent[early:])
    for one in purged:
        selector = Selector("request", str(one), utc_now())
        erasure_id = records.begin_purge(engine, selector, actor="a", reason="r")
        erase_rows(engine, erasure_id, selector)
    prune_minutes(engine, PrunePace(), group_id, minutes_before=old, hours_before=first)
    assert _minutes(engine, servers[BOOT]) == _minutes(engine, servers[BOOT + 1]) != []


def two_servers(engine: Engine) -> dict[int, int]:
    """Their rows, by boot."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        return {
            boot: queries.servers.register_server(
                s, group.id, samples.hello(boot_id=boot, name=f"server-{boot}")
            ).id
            for boot in (BOOT, BOOT + 1)
        }


def without(envelopes: list[Any], purged: set[int]) -> list[Any]:
    """The same of the other boot, without some requests."""
    return [
        (seq, [_of_boot(one, BOOT + 1) for one in sent if _id(one) not in purged])
        for seq, sent in envelopes
    ]


def erase_rows(engine: Engine, erasure_id: int, selector: Selector) -> None:
    with store.reading(engine) as connection:
        condition = selector.condition(connection)
    while purge_rows.purge_chunk(engine, erasure_id, condition):
        pass


def _id(record: wire.Record) -> int:
    return int(getattr(record, "request_id", 0))


def _of_boot(record: Any, boot: int) -> wire.Record:
    other = wire.request_id(boot, record.request_id & 0xFFFFFFFF)
    return msgspec.structs.replace(record, request_id=other)  # type: ignore[no-any-return]


def _minutes(engine: Engine, server_id: int) -> list[dict[str, Any]]:
    m = AcceptanceMinute
    columns = [column for column in m.__table__.columns if column.name != "server_id"]
    query = select(*columns).where(m.server_id == server_id).order_by(*m.__table__.primary_key)
    with store.reading(engine) as connection:
        return [
            {name: _trimmed(value) for name, value in row.items()}
            for row in connection.execute(query).mappings()
        ]


def _trimmed(value: Any) -> Any:
    """A histogram without zeros at its end."""
    if isinstance(value, list):
        while value and not value[-1]:
            value = value[:-1]
    return value


@one_database
def test_a_minute_in_which_nobody_else_was_served_goes_also_when_its_steps_were_pruned(
    house: PurgeHouse,
) -> None:
    house.fill()
    with house.engine.begin() as connection:
        connection.execute(text("DELETE FROM acceptance_event"))
        connection.execute(text("DELETE FROM request_tally"))
    run_purge(house, "rid", RID, wait_seconds=0.0)
    with store.session(house.engine, write=False) as s:
        assert set(s.scalars(select(AcceptanceMinute.domain))) == {"chat"}


@one_database
def test_a_purge_that_was_stopped_goes_on_when_it_is_called_again(
    house: PurgeHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.fill()
    house.close_sidecar()
    monkeypatch.setattr(purge_rows, "CHUNK", 1)
    selector = Selector("domain", DOMAIN, utc_now())
    first = records.begin_purge(house.engine, selector, actor="ada", reason="asked to")
    with store.reading(house.engine) as connection:
        condition = selector.condition(connection)
    assert purge_rows.purge_chunk(house.engine, first, condition)  # then it was killed
    assert house.numbers("request", "id") == [2, 3, 4]
    report = run_purge(house, "domain", DOMAIN)
    assert report.purge == first and report.left == []
    assert (report.requests, report.events, report.traces) == (2, 6, 2)  # of both calls
    assert everywhere(house, {**house.wanted, DOMAIN: DOMAIN.encode()}) == set()
    again = run_purge(house, "domain", DOMAIN)
    assert (again.purge, again.requests) == (first + 1, 0)


def test_beside_a_running_sidecar_its_spool_is_emptied_of_it_and_nothing_comes_back(
    house: PurgeHouse,
) -> None:
    house.fill()
    batcher = threading.Thread(target=house.batcher.run)
    batcher.start()
    late = threading.Thread(target=_send_late, args=(house,))
    late.start()
    try:
        report = run_purge(house, "domain", DOMAIN, wait_seconds=30.0)
        late.join()
        house.send(*(step(n, 40) for n in OURS))  # a server that still answers them
        eventually(lambda: house.cursor.position == house.spool.tail)
        eventually(lambda: not purged_in(house.spool.folder, house.engine))
    finally:
        house.batcher.stop()
        batcher.join()
    assert report.left == []
    assert house.batcher.drain()
    assert everywhere(house, house.wanted) == set()
    assert house.numbers("acceptance_event") == list(OTHERS)
    assert house.numbers("request", "id") == list(OTHERS)


def _send_late(house: PurgeHouse) -> None:
    """More of the same requests, as a server sends it that still answers them."""
    for index in range(4, 40):
        house.send(*(step(n, index) for n in (*OURS, *OTHERS)))
    house.send(*(finished(n) for n in OURS))


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_purge_waits_for_an_ingest_that_read_the_rules_before_it(engine: Engine) -> None:
    with engine.begin() as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f"ALTER DATABASE {name} SET lock_timeout = '200ms'"))
    other = store.connect(engine.url.render_as_string(hide_password=False))
    with engine.begin() as ingesting:
        assert without_erased(ingesting, [(1, [started(1)])]) == [(1, [started(1)])]
        with pytest.raises(DBAPIError, match="lock timeout"):
            wait_for_ingests(other)
    wait_for_ingests(other)
    other.dispose()


@one_database
def test_a_sidecar_that_does_not_look_is_named_and_the_purge_counts_as_unfinished(
    house: PurgeHouse,
) -> None:
    house.fill()
    report = run_purge(house, "rid", RID, wait_seconds=0.0)
    assert (
        len(report.left) == 1
        and "still holds some of it: its sidecar is running" in (report.left[0])
    )
    with store.session(house.engine, write=False) as s:
        (erasure,) = s.scalars(select(Erasure))
        assert erasure.finished_at is None
        assert s.scalars(select(Audit).where(Audit.action == "purge")).all() == []
    house.batcher.look_for_purges()
    assert run_purge(house, "rid", RID, wait_seconds=0.0).left == []


@pytest.mark.parametrize(("way", "engine"), WAYS, indirect=["engine"])
def test_what_still_lies_in_a_spool_elsewhere_does_not_come_in_after_the_purge(
    house: PurgeHouse, way: str
) -> None:
    """The store never had these requests; what is served after the purge under the same names is
    new."""
    house.send(hello())
    assert house.batcher.drain()
    for kind, value, until in CALLS[way]:
        run_purge(house, kind, value, until=until, wait_seconds=0.0)
    house.send(*(started(n) for n in (*OURS, *OTHERS)))
    assert house.batcher.drain()
    house.send(*(step(n, 0) for n in (*OURS, *OTHERS)))
    uri = house.write_trace(1)
    house.send(*(finished(n) for n in (*OURS, *OTHERS)))
    assert house.batcher.drain()
    assert house.numbers("request", "id") == list(OTHERS)
    assert house.numbers("acceptance_event") == list(OTHERS)
    assert not house.artifacts.exists(uri) and house.numbers("trace") == []
    assert house.traces.counts["purged"] == 1
    now = wire.now_us() + 1_000_000
    house.send(msgspec.structs.replace(started(1, now), request_id=number(9)))
    assert house.batcher.drain()
    assert house.numbers("request", "id") == [*OTHERS, 9]


@one_database
def test_steps_whose_start_was_lost_do_not_come_back_in_the_default_domain(
    house: PurgeHouse,
) -> None:
    house.send(hello())
    assert house.batcher.drain()
    run_purge(house, "domain", "default", wait_seconds=0.0)
    house.send(step(1, 0), step(3, 0, at_us=wire.now_us() + 1_000_000))
    assert house.batcher.drain()
    assert house.numbers("request", "id") == [3]


@one_database
def test_a_trace_that_arrives_while_its_request_is_purged_is_deleted(house: PurgeHouse) -> None:
    house.fill()
    run_purge(house, "request", str(number(1)), wait_seconds=0.0)
    uri = house.write_trace(1)
    assert house.batcher.drain()
    assert not house.artifacts.exists(uri)
    row = TraceRow(number(1), uri, 1, "", 0, 0, 1, 1, "", "", True, 1, 1, "float32")
    house.traces.add([row])  # nor does it matter that the file is gone
    assert 1 not in house.numbers("trace")


@one_database
def test_traces_in_an_object_store_go_too(tmp_path: Path, engine: Engine) -> None:
    artifacts = ArtifactRoot(f"memory://purge-{tmp_path.name}-{engine.dialect.name}")
    house = PurgeHouse(tmp_path / "home", engine, artifacts)
    house.fill()
    litter = house.write_trace(2)  # of which no row will ever tell
    house.close_sidecar()
    assert len(list(artifacts.files("traces"))) == 4
    run_purge(house, "rid", RID)
    uris = [uri for uri, _ in artifacts.files("traces")]
    names = sorted(uri.rpartition("/")[2] for uri in uris)
    assert names == [f"{number(n)}.safetensors" for n in OTHERS]
    assert litter not in uris


@pytest.mark.parametrize(
    ("kind", "value", "until", "message"),
    [
        ("rid", "", None, "--rid is empty"),
        ("domain", "", None, "--domain is empty"),
        ("request", "-1", None, "is no number of a request"),
        ("request", "x", None, "is no number of a request"),
        ("request", str(1 << 63), None, "is no number of a request"),
        ("before", "", datetime.fromisoformat("2999-01-01T00:00:00+00:00"), "in the future"),
    ],
)
def test_what_selects_nothing_or_the_future_is_refused_in_one_line(
    kind: str, value: str, until: datetime | None, message: str
) -> None:
    with pytest.raises(AuroraError, match=message) as refusal:
        Selector(kind, value, until or utc_now())
    assert "\n" not in str(refusal.value)


@one_database
def test_before_together_with_a_domain_is_the_older_part_of_it(house: PurgeHouse) -> None:
    house.fill()
    run_purge(house, "domain", "chat", until=from_us(moment(3)) - timedelta(seconds=1),
              wait_seconds=0.0)  # fmt: skip
    assert house.numbers("request", "id") == [1, 2, 3, 4]
    run_purge(house, "domain", "chat", until=from_us(moment(3)), wait_seconds=0.0)
    assert house.numbers("request", "id") == [1, 2]


@one_database
def test_a_rule_names_nobody_and_one_salt_serves_a_store(house: PurgeHouse) -> None:
    house.send(hello())
    assert house.batcher.drain()
    assert Selector("conversation", TALK_HASH, utc_now()).stored_texts == [TALK_HASH]
    assert Selector("conversation", TALK, utc_now()).stored_texts == [TALK_HASH]
    for kind, value in (("rid", RID), ("domain", DOMAIN), ("conversation", TALK)):
        run_purge(house, kind, value, wait_seconds=0.0)
    assert leftovers.in_tables(house.engine, {n: n.encode() for n in (RID, DOMAIN, TALK_HASH)}) == (
        set()
    )
    with store.reading(house.engine) as connection:
        assert len(rules_of(connection).salts) == 1
