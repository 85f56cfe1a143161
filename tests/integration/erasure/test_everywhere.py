"""``db purge`` in all places: hashes that the store salts, names beyond the day's limit, what a
spool keeps or has no room for, and every table and column that there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec
import pytest
from sqlalchemy import JSON, Engine, String, select, text

from aurora_sgl import store, wire
from aurora_sgl.clock import from_us, utc_now
from aurora_sgl.erasure import PurgeReport, purge
from aurora_sgl.sidecar.retry import MOVED
from aurora_sgl.sidecar.spool.erase import SpoolEraser
from aurora_sgl.store import queries
from aurora_sgl.store.models import AcceptanceMinute, Base, Request
from aurora_sgl.store.pruning.pace import PrunePace
from aurora_sgl.store.pruning.requests import prune_requests
from aurora_sgl.store.purge import Selector
from aurora_sgl.store.purge_rows import OF_REQUESTS, drop_minutes
from aurora_sgl.store.scrub import NAMED_IN, forget_domain
from tests.support import leftovers
from tests.support import store_samples as samples
from tests.support.purge_house import (
    DOMAIN,
    OTHERS,
    OURS,
    RID,
    TALK,
    TALK_HASH,
    PurgeHouse,
    hello,
    number,
    started,
    step,
)

one_database = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)

#: Text of rows that stay and that no client has a word in: names that people or this program give,
#: kinds, hashes of weights, who did it. Reasons and evidence of people are kept, as the docs say.
OURS_ALONE = {
    "alert": {"key", "kind", "severity", "acknowledged_by"},
    "alias": {"name"},
    "audit": {"actor", "action", "subject", "reason", "before", "after"},
    "delivery": {"target", "state"},
    "deployment": {"action", "actor", "reason", "before", "after", "evidence"},
    "deployment_group": {"name", "target_model", "target_revision", "draft_architecture"},
    "drafter_version": {
        *("architecture", "weights_uri", "weights_sha256", "vocab_sha256", "target_model"),
        *("target_revision", "source", "config"),
    },
    "drop_count": {"place"},
    "erasure": {"kind", "salt", "key_hash", "actor", "reason", "details"},
    "evaluation": {"kind", "verdict"},
    "freeze_window": {"actor", "reason", "lifted_by"},
    "notification": {"event_key", "uid", "kind", "severity"},
    "prune_run": {"actor"},
    "retention_limit": {"name", "actor"},
    "rollout_stage": {"status", "servers", "actor", "reason", "settings"},
    "saved_view": {"page", "actor"},
    "scheduler_state": {"holder", "state"},
    "server": {"name", "sglang_version", "live_sha256", "state", "dtype", "phase"},
    "store_key": {"name", "value"},
    "swap": {"reason", "live_sha256"},
    "switch": {"name", "actor", "reason"},
    "tree_memory": {"name", "state"},
    "training_run": {"trigger", "status", "objective"},
    "trial": {"status", "verdict"},
    "version_note": {"actor", "kind", "text"},
    "watch": {"status", "settings"},
    "watch_window": {"verdict"},
}
#: Rows that go with a domain, or with its name.
OF_A_DOMAIN = {"acceptance_hour", "acceptance_minute", "drift", "lease"}


@pytest.fixture
def house(tmp_path: Path, engine: Engine) -> Iterator[PurgeHouse]:
    one = PurgeHouse(tmp_path / "home", engine)
    yield one
    one.close_sidecar()


def run_purge(house: PurgeHouse, kind: str, value: str, wait: float = 0.0) -> PurgeReport:
    return purge(
        house.engine, house.artifacts, house.home, Selector(kind, value, utc_now()),
        actor="ada", reason="asked to", wait_seconds=wait,
    )  # fmt: skip


def everywhere(house: PurgeHouse, wanted: dict[str, bytes]) -> set[str]:
    files = leftovers.in_files(house.home.parent, wanted)
    return files | leftovers.in_tables(house.engine, wanted)


def test_every_table_with_numbers_of_requests_is_purged_of_them() -> None:
    of_requests = {str(column) for column in OF_REQUESTS}
    for table in Base.metadata.sorted_tables:
        for column in table.c:
            names_one = "request_id" in column.name or any(
                key.column.table.name == "request" for key in column.foreign_keys
            )
            if names_one and str(column) not in of_requests:
                # The list of what was purged; drifts lose the number, see ``scrub``.
                assert str(column) in ("erased_request.request_id", "drift.last_request_id")


def test_every_text_in_every_table_goes_with_its_request_or_domain_or_is_ours_alone() -> None:
    named = {model.__tablename__: set(columns) for model, columns in NAMED_IN}
    gone = {column.table.name for column in OF_REQUESTS} | {"request"} | OF_A_DOMAIN
    for table in Base.metadata.sorted_tables:
        texts = {one.name for one in table.c if isinstance(one.type, String | JSON)}
        texts -= OURS_ALONE.get(table.name, set()) | named.get(table.name, set())
        texts -= {"domain"}  # of an evaluation
        assert not texts or table.name in gone, (table.name, texts)


@one_database
def test_a_domain_is_forgotten_in_addresses_of_saved_views_however_it_is_written(
    house: PurgeHouse,
) -> None:
    domain = "a & b/ü 100%"
    queries_of = {
        "requests": [("domain", domain), ("domain", "chat"), ("ended", "7 days")],
        "sql": [("statement", f"SELECT * FROM request WHERE domain = '{domain}'")],
    }
    with store.session(house.engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "r1", "LlamaForCausalLMEagle3")
        for page, pairs in queries_of.items():
            queries.saved_views.add_saved_view(
                s, group.id, name=page, page=page, query=urlencode(pairs), actor="ada"
            )
        group_id = group.id
    forget_domain(house.engine, domain)
    with store.session(house.engine, write=False) as s:
        rows = {row.page: parse_qsl(row.query) for row in
                queries.saved_views.saved_views(s, group_id)}  # fmt: skip
    assert rows["requests"] == [("domain", "(purged)"), ("domain", "chat"), ("ended", "7 days")]
    assert rows["sql"] == [("statement", "SELECT * FROM request WHERE domain = '(purged)'")]


def test_a_domain_is_forgotten_in_every_text_where_it_may_be_named(house: PurgeHouse) -> None:
    house.fill()
    with store.session(house.engine) as s:
        for model, columns in NAMED_IN:
            rows = s.scalars(select(model)).all()
            assert rows, f"the house has no row of {model.__tablename__}"
            for row in rows:
                for column in columns:
                    is_text = isinstance(model.__table__.c[column].type, String)
                    words = f"worse in {DOMAIN}: 2.1"
                    named = {DOMAIN: 1, "a": {f"3/1/{DOMAIN}": 2, "b": [[1, DOMAIN], words]}}
                    setattr(row, column, words if is_text else named)
    wanted = {DOMAIN: DOMAIN.encode()}
    places = {place.split(":")[0] for place in leftovers.in_tables(house.engine, wanted)}
    assert places >= {f"{model.__tablename__}.{one}" for model, columns in NAMED_IN
                      for one in columns}  # fmt: skip
    forget_domain(house.engine, DOMAIN)
    left = {place.split(":")[0] for place in leftovers.in_tables(house.engine, wanted)}
    assert left == {"request.domain", "acceptance_minute.domain", "acceptance_hour.domain"}


@one_database
@pytest.mark.parametrize("form", ["name", "hash", "salted"])
def test_a_conversation_goes_by_its_name_its_hash_or_the_hash_that_the_store_shows(
    house: PurgeHouse, form: str
) -> None:
    house.fill()
    with store.session(house.engine) as s:
        salted = s.get_one(Request, number(1)).conversation_hash
        s.get_one(Request, number(2)).conversation_hash = TALK_HASH  # from before schema 0010
    assert salted not in ("", TALK_HASH)
    house.close_sidecar()
    wanted = house.wanted
    assert {f"request.conversation_hash: {one}" for one in (salted, TALK_HASH)} <= everywhere(
        house, wanted
    )
    value = {"name": TALK, "hash": TALK_HASH, "salted": salted}[form]
    assert run_purge(house, "conversation", value).left == []
    assert everywhere(house, wanted) == set()
    # What lies in a spool elsewhere has the engine's plain hash.
    house.open_sidecar(house.home / "spool" / "0")
    house.send(
        *(msgspec.structs.replace(started(1), request_id=number(n)) for n in (7, 8)),
        msgspec.structs.replace(started(1, wire.now_us() + 1_000_000), request_id=number(9)),
    )
    assert house.batcher.drain()
    assert house.numbers("request", "id") == [*OTHERS, 9]


def beyond_the_limit(home: Path, engine: Engine) -> PurgeHouse:
    """A day had room for one name, which is the others'."""
    house = PurgeHouse(home, engine, most_domains=1)
    house.send(hello(), *(started(n) for n in (*OTHERS, *OURS)))
    house.send(*(step(n, 0) for n in (*OTHERS, *OURS)))
    house.write_trace(1)
    assert house.batcher.drain()
    with store.session(engine, write=False) as s:
        assert [s.get_one(Request, number(n)).domain for n in (1, 2, 3)] == [
            "other", "other", "chat",
        ]  # fmt: skip
    return house


@one_database
@pytest.mark.parametrize("is_running", [False, True])
def test_a_domain_beyond_the_days_names_goes_while_its_start_lies_in_a_spool(
    tmp_path: Path, engine: Engine, is_running: bool
) -> None:
    house = beyond_the_limit(tmp_path / "home", engine)
    if not is_running:
        house.close_sidecar()
    report = run_purge(house, "domain", DOMAIN)
    house.batcher.look_for_purges()
    assert (report.requests, report.events, report.traces) == (2, 2, 1)
    assert house.numbers("request", "id") == list(OTHERS)
    assert everywhere(house, {**house.wanted, DOMAIN: DOMAIN.encode()}) == set()
    house.close_sidecar()


@one_database
def test_a_running_sidecar_elsewhere_takes_the_rows_that_only_its_spool_tells(
    tmp_path: Path, engine: Engine
) -> None:
    house = beyond_the_limit(tmp_path / "there", engine)
    here = tmp_path / "here"
    here.mkdir()
    purge(
        engine, house.artifacts, here, Selector("domain", DOMAIN, utc_now()),
        actor="ada", reason="asked to", wait_seconds=0.0,
    )  # fmt: skip
    assert house.numbers("request", "id") == [1, 2, 3, 4]
    house.batcher.look_for_purges()
    assert house.numbers("request", "id") == list(OTHERS)
    assert house.numbers("trace") == []
    house.close_sidecar()


@one_database
def test_a_domain_beyond_the_days_names_that_no_spool_tells_goes_as_other(
    tmp_path: Path, engine: Engine
) -> None:
    house = beyond_the_limit(tmp_path / "home", engine)
    house.close_sidecar()
    shutil.rmtree(house.spool.folder)
    assert run_purge(house, "domain", DOMAIN).requests == 0
    assert house.numbers("request", "id") == [1, 2, 3, 4]
    assert run_purge(house, "domain", "other").requests == 2
    assert house.numbers("request", "id") == list(OTHERS)


@one_database
@pytest.mark.parametrize("knows_the_purge", [True, False])
def test_what_a_spool_keeps_for_a_failover_does_not_bring_back_what_was_purged(
    house: PurgeHouse, knows_the_purge: bool
) -> None:
    """The replica was behind: it has the purge or not, and the watermark is an old one."""
    house.fill()
    for index in range(10, 40):
        house.send(*(step(n, index) for n in (*OURS, *OTHERS)))
    assert house.batcher.drain()
    run_purge(house, "rid", RID)
    house.batcher.look_for_purges()
    assert run_purge(house, "rid", RID).left == []
    assert house.spool.kept_bytes > 0
    tables = ["acceptance_event", "request_tally", "trace", "acceptance_minute", "request"]
    with house.engine.begin() as connection:
        for table in [*tables, *([] if knows_the_purge else ["erasure", "erased_request"])]:
            connection.execute(text(f"DELETE FROM {table}"))
        connection.execute(text("UPDATE spool_watermark SET last_seq = 0"))
    house.link.close()  # the next connection is another database
    house.send(step(3, 20))
    assert house.batcher.drain()
    assert house.batcher.watermarks.rewinds == 1
    assert house.numbers("request", "id") == house.numbers("acceptance_event") == list(OTHERS)
    assert house.numbers("trace") == list(OTHERS)
    assert everywhere(house, house.wanted) == set()
    with store.session(house.engine, write=False) as s:
        server = queries.servers.server_of_boot(s, samples.BOOT)
        assert server is not None
        lost = queries.drops.drops_of_server(s, server.id)
    assert {place: count for place, count in lost.items() if place != "rejected"} == dict.fromkeys(
        lost.keys() - {"rejected"}, 0
    )


@one_database
def test_what_waits_in_memory_past_a_full_spool_is_purged_too(
    tmp_path: Path, engine: Engine
) -> None:
    house = PurgeHouse(tmp_path / "home", engine, spool_bytes=1 << 14)
    house.send(hello())
    assert house.batcher.drain()
    index = 0
    while not len(house.bypass):
        house.send(*(step(3, index + i) for i in range(8)))
        index += 8
    house.send(*(started(n) for n in (*OURS, *OTHERS)))
    house.send(*(step(n, 500) for n in (*OURS, *OTHERS)))
    run_purge(house, "rid", RID)
    house.batcher.look_for_purges()
    waiting = house.bypass.take(house.spool.tail, 1000)
    house.bypass.done(0)
    found = leftovers.in_bytes(b"".join(frame.payload for frame in waiting), house.wanted)
    assert waiting and list(found) == []
    assert house.batcher.drain()
    assert house.numbers("request", "id") == house.numbers("acceptance_event") == [3, 4]
    assert everywhere(house, house.wanted) == set()
    house.close_sidecar()


@one_database
def test_bytes_that_nobody_can_read_stay_until_something_is_purged(house: PurgeHouse) -> None:
    """Another release may read them. A sidecar looks again after each spool that it adopted."""
    house.fill()
    house.batcher.refused.keep_bytes(b"odd", "it is odd")
    before = house.batcher.refused.path.read_bytes()

    def look() -> None:
        eraser = SpoolEraser(house.spool, house.link, house.artifacts.delete, house.bypass)
        eraser.look_again()
        eraser.look()

    look()
    assert house.batcher.refused.path.read_bytes() == before
    run_purge(house, "rid", RID)
    look()
    assert b"it is odd" not in house.batcher.refused.path.read_bytes()
    house.close_sidecar()


@one_database
def test_what_a_retry_of_refused_records_had_moved_aside_is_purged_too(house: PurgeHouse) -> None:
    house.fill()
    house.batcher.refused.path.rename(house.spool.folder / MOVED)  # and then it was killed
    house.close_sidecar()
    assert any(MOVED in place for place in everywhere(house, house.wanted))
    assert run_purge(house, "rid", RID).left == []
    assert everywhere(house, house.wanted) == set()
    assert b"newer" in (house.spool.folder / MOVED).read_bytes()


def test_of_an_hour_that_was_summed_up_a_moment_within_takes_nothing(engine: Engine) -> None:
    """The row of the hour has what came before the moment and after it, in one sum."""
    hour = from_us(samples.START_US).replace(minute=0)
    columns: dict[str, Any] = {
        column.name: 1 for column in AcceptanceMinute.__table__.columns
    } | {"domain": "chat", "accept_rule": "greedy", "histogram": [1], "per_position": [],
         "mixed": False}  # fmt: skip
    with store.session(engine) as s:
        for minutes in (0, 7, 40):
            start = hour + timedelta(minutes=minutes)
            s.add(AcceptanceMinute(**{**columns, "bucket_start": start}))
    assert drop_minutes(engine, hour + timedelta(minutes=30)) == 1  # that of minute 7
    assert drop_minutes(engine, hour + timedelta(minutes=60)) == 2


@one_database
def test_what_training_noted_of_requests_goes_with_them_when_they_are_old(
    house: PurgeHouse,
) -> None:
    house.fill()
    with store.session(house.engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, "default").id
    assert house.numbers("training_request") == [1, 3, 4]
    prune_requests(house.engine, PrunePace(), group_id, utc_now())
    assert house.numbers("request", "id") == house.numbers("training_request") == []
