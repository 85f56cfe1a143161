"""Ingest against both databases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, event, func, select, text

from aurora_sgl import store, wire
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import (
    AcceptanceEvent,
    AcceptanceMinute,
    Base,
    Request,
    RequestTally,
    Server,
)
from tests.support import store_samples as samples

TABLES = (Request, AcceptanceEvent, AcceptanceMinute, RequestTally)


def register(engine: Engine, boot_id: int = samples.BOOT) -> int:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        return queries.servers.register_server(s, group.id, samples.hello(boot_id)).id


def contents(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """All rows of the tables that ingest writes, in order."""
    with store.reading(engine) as connection:
        return {
            table.__tablename__: [
                dict(row._mapping)
                for row in connection.execute(
                    select(table).order_by(*table.__table__.primary_key.columns)
                )
            ]
            for table in TABLES
        }


def test_the_same_batch_twice_changes_nothing(engine: Engine) -> None:
    server_id = register(engine)
    batch = samples.traffic(requests=5, steps=20)
    first = ingest(engine, server_id, samples.BOOT, batch)
    before = contents(engine)
    second = ingest(engine, server_id, samples.BOOT, batch)
    assert first.inserted_events == len(before["acceptance_event"]) > 90
    assert (second.inserted_events, second.duplicate_events) == (0, first.inserted_events)
    assert contents(engine) == before


def test_overlapping_pieces_in_any_cut_give_the_rows_of_one_batch(
    engine: Engine, tmp_path: Any
) -> None:
    batch = samples.traffic(requests=5, steps=20)
    ingest(engine, register(engine), samples.BOOT, batch)
    other = store.connect(f"sqlite:///{tmp_path / 'pieces.db'}")
    store.upgrade(other)
    server_id = register(other)
    for begin in range(0, len(batch), 3):
        ingest(other, server_id, samples.BOOT, batch[max(0, begin - 2) : begin + 3])
    assert contents(other) == contents(engine)


def test_the_identities_hold_on_the_rows(engine: Engine) -> None:
    server_id = register(engine)
    ingest(engine, server_id, samples.BOOT, samples.traffic(requests=7, steps=30))
    rows = contents(engine)
    events, requests = rows["acceptance_event"], rows["request"]
    for request in requests:
        own = [event for event in events if event["request_id"] == request["id"]]
        assert request["verify_steps"] == request["reported_verify_steps"] == len(own)
        assert request["accepted"] == request["reported_accepted"]
        assert request["proposed"] == request["reported_proposed"]
        assert request["completion_tokens"] == 1 + sum(1 + event["accepted"] for event in own)
        length = 1 + request["accepted"] / request["verify_steps"]
        assert length == pytest.approx((request["completion_tokens"] - 1) / request["verify_steps"])
    for minute in rows["acceptance_minute"]:
        histogram, positions = minute["histogram"], minute["per_position"]
        assert sum(histogram) == minute["verify_steps"]
        assert sum(i * count for i, count in enumerate(histogram)) == minute["accepted"]
        assert sum(positions) == minute["accepted"]
        assert minute["completion_tokens"] == minute["verify_steps"] + minute["accepted"]
    assert sum(minute["requests"] for minute in rows["acceptance_minute"]) == len(requests)
    assert len({minute["bucket_start"] for minute in rows["acceptance_minute"]}) == 3


def test_the_sums_of_squares_over_minutes_are_those_of_whole_requests(engine: Engine) -> None:
    server_id = register(engine)
    for envelope in samples.traffic(requests=6, steps=25):
        ingest(engine, server_id, samples.BOOT, [envelope])
    rows = contents(engine)
    pairs = [(tally["verify_steps"], tally["accepted"]) for tally in rows["request_tally"]]
    minutes = rows["acceptance_minute"]
    assert sum(m["sum_steps_squared"] for m in minutes) == sum(n * n for n, _ in pairs)
    assert sum(m["sum_accepted_squared"] for m in minutes) == sum(y * y for _, y in pairs)
    assert sum(m["sum_steps_accepted"] for m in minutes) == sum(n * y for n, y in pairs)


def test_minutes_and_events_give_the_same_accept_length_and_interval(engine: Engine) -> None:
    server_id = register(engine)
    mature = [
        (seq, [_aged(record) for record in records])
        for seq, records in samples.traffic(requests=6, steps=25)
    ]
    ingest(engine, server_id, samples.BOOT, mature)
    with store.session(engine, write=False) as s:
        group = queries.groups.group_by_name(s, "default").id
        (by_minute,) = queries.accept_lengths.accept_length_by_version(s, group, depth=3, topk=1)
        (by_event,) = queries.accept_lengths.accept_length_by_version(
            s, group, min_swap_age=5, depth=3
        )
        by_domain = queries.accept_lengths.accept_length_by_version(s, group, by_domain=True)
        per_request = queries.accept_lengths.per_request(s, group, 0)
        assert queries.events.count_events(s, server_id) == by_minute.verify_steps
    assert asdict(by_minute) == pytest.approx(asdict(by_event))
    assert by_minute.ci_low is not None and by_minute.ci_high is not None
    assert by_minute.ci_low < by_minute.accept_length < by_minute.ci_high
    assert [row.domain for row in by_domain] == ["chat", "code"]
    assert sum(row.verify_steps for row in by_domain) == by_minute.verify_steps
    assert sum(accepted for _, _, accepted in per_request) == by_minute.accepted


def _aged(record: wire.Record) -> wire.Record:
    if isinstance(record, wire.VerifyStep):
        return samples.chain_step(
            record.request_id & 0xFFFFFFFF,
            record.step,
            record.accepted,
            at_us=record.at_us,
            swap_age=10,
        )
    return record


def test_steps_of_mixed_draft_kv_stay_out_of_comparisons(engine: Engine) -> None:
    server_id = register(engine)
    steps = [
        samples.chain_step(1, 0, 3),
        samples.chain_step(1, 1, 0, mixed=True),
        samples.chain_step(2, 0, 1),
    ]
    start: list[wire.Record] = [samples.started(1), samples.started(2)]
    ingest(engine, server_id, samples.BOOT, [(1, [*start, *steps])])
    with store.session(engine, write=False) as s:
        group = queries.groups.group_by_name(s, "default").id
        (clean,) = queries.accept_lengths.accept_length_by_version(s, group)
        (every,) = queries.accept_lengths.accept_length_by_version(s, group, with_mixed=True)
    assert (clean.verify_steps, clean.accept_length) == (2, 3.0)
    assert every.verify_steps == 3


def test_a_step_without_a_version_gets_the_one_that_the_server_booted_with(
    engine: Engine,
) -> None:
    server_id = register(engine)
    with store.session(engine) as s:
        group = queries.groups.group_by_name(s, "default")
        version, _ = queries.versions.add_version(
            s,
            group_id=group.id,
            architecture="LlamaForCausalLMEagle3",
            weights_uri="versions/a/",
            weights_sha256="a" * 64,
            vocab_sha256="b" * 64,
            draft_vocab_size=8192,
            target_model="target",
            source="scratch",
        )
        queries.servers.touch_server(s, server_id, boot_version_id=version.id)
    ingest(
        engine, server_id, samples.BOOT, [(1, [samples.started(1), samples.chain_step(1, 0, 1)])]
    )
    rows = contents(engine)
    assert rows["acceptance_event"][0]["drafter_version_id"] == version.id
    assert rows["acceptance_minute"][0]["drafter_version_id"] == version.id


def test_a_step_whose_start_was_lost_makes_a_request_that_may_not_be_trained_on(
    engine: Engine,
) -> None:
    server_id = register(engine)
    ingest(engine, server_id, samples.BOOT, [(4, [samples.chain_step(1, 0, 2)])])
    (request,) = contents(engine)["request"]
    assert (request["domain"], request["may_train"]) == ("default", False)
    assert request["completion_tokens"] == 4
    ingest(engine, server_id, samples.BOOT, [(5, [samples.started(1, domain="code")])])
    (request,) = contents(engine)["request"]
    assert (request["domain"], request["verify_steps"]) == ("code", 1)


def test_a_request_knows_the_accept_rule_of_its_steps_and_that_they_had_several(
    engine: Engine,
) -> None:
    server_id = register(engine)
    tree = msgspec.structs.replace(samples.tree_step(2, 1), step=1)
    ingest(
        engine, server_id, samples.BOOT,
        [(1, [samples.chain_step(1, 0, 2), samples.chain_step(1, 1, 0),
              samples.chain_step(2, 0, 1), samples.chain_step(3, 0, 1), tree])],
    )  # fmt: skip
    later = msgspec.structs.replace(samples.tree_step(3, 1), step=1)
    ingest(engine, server_id, samples.BOOT, [(2, [samples.chain_step(1, 2, 1), later])])
    rules = [row["accept_rule"] for row in contents(engine)["request"]]
    assert rules == ["greedy", "mixed", "mixed"]


def test_odd_text_from_a_client_does_not_stop_the_ingest(engine: Engine) -> None:
    server_id = register(engine)
    record = samples.started(1)
    odd = wire.RequestStarted(
        **{
            **{name: getattr(record, name) for name in record.__struct_fields__},
            "rid": "a\x00b'; DROP TABLE request; --",
            "sampling": {"stop": ["\x00"], "temperature": float("nan")},
        }
    )
    ingest(engine, server_id, samples.BOOT, [(1, [odd])])
    (request,) = contents(engine)["request"]
    assert request["rid"] == "ab'; DROP TABLE request; --"
    assert request["sampling"] == {"stop": [""], "temperature": None}


def test_records_of_another_boot_are_refused_and_nothing_is_stored(engine: Engine) -> None:
    server_id = register(engine)
    batch: store.ingest.Batch = [(1, [samples.started(1), samples.chain_step(1, 0, 1, boot_id=5)])]
    with pytest.raises(AuroraError, match="not one of boot"):
        ingest(engine, server_id, samples.BOOT, batch)
    assert contents(engine)["request"] == []
    with pytest.raises(AuroraError, match="not registered"):
        ingest(engine, server_id, 5, [(1, [])])


def test_an_old_batch_does_not_bring_back_an_old_live_version(engine: Engine) -> None:
    server_id = register(engine)
    refused = wire.SwapDone(samples.BOOT, 1, 9, False, "not finite", "", 1.0, 0.0)
    hello = wire.Hello(samples.BOOT, 1, {}, 999, 1, 7, {"running": 2.0})
    fine = wire.SwapDone(samples.BOOT, 1, 9, True, "", "c" * 64, 1.0, 2.0)
    ingest(engine, server_id, samples.BOOT, [(1, [refused]), (2, [hello])])
    with store.session(engine, write=False) as s:
        server = queries.servers.server(s, server_id)
        assert server.last_error == "version 9 was refused: not finite"
        assert server.live_version_id is None  # 999 is not in this store
        assert queries.drops.drops(s, server.group_id) == {"engine": 7}
    ingest(engine, server_id, samples.BOOT, [(3, [fine])])
    result = ingest(engine, server_id, samples.BOOT, [(1, [refused]), (2, [hello])])
    assert result.last_seq == 3
    with store.session(engine, write=False) as s:
        server = queries.servers.server(s, server_id)
        assert (server.last_error, server.live_sha256) == ("", "c" * 64)
        assert queries.watermarks.watermark(s, server_id, samples.BOOT) == 3


@pytest.mark.parametrize("cut", ["one batch", "each alone"])
@pytest.mark.parametrize(
    ("records", "live", "sha256"),
    [
        (["hello 1", "done 1"], 1, "a"),
        (["done 1", "hello 1"], 1, "a"),
        (["done 1", "hello 2"], 2, ""),  # live, and its hash is not read back yet
        (["done 1", "hello 2", "hello 2"], 2, ""),
        (["done 1", "hello 2", "done 2"], 2, "b"),
        (["done 1", "hello 2", "done 2", "hello 2"], 2, "b"),
        (["done 1", "hello 2", "hello 1"], 1, ""),
        (["done 1", "done 2", "hello 2"], 2, "b"),
    ],
)
def test_the_hash_beside_the_live_version_is_its_own_or_none(
    engine: Engine, records: list[str], live: int, sha256: str, cut: str
) -> None:
    server_id = register(engine)
    with store.session(engine) as s:
        ids = [samples.add_version(s, 1, letter) for letter in "ab"]

    def record(word: str, version_id: int) -> wire.Record:
        if word == "hello":
            return samples.hello(live=version_id)
        sha256 = "ab"[ids.index(version_id)] * 64
        return wire.SwapDone(samples.BOOT, version_id, version_id, True, "", sha256, 1.0, 2.0)

    words = [one.split() for one in records]
    batch: list[wire.Record] = [record(word, ids[int(at) - 1]) for word, at in words]
    if cut == "one batch":
        ingest(engine, server_id, samples.BOOT, [(1, batch)])
    else:
        for seq, one in enumerate(batch, 1):
            ingest(engine, server_id, samples.BOOT, [(seq, [one])])
    with store.session(engine, write=False) as s:
        server = queries.servers.server(s, server_id)
        assert (server.live_version_id, server.live_sha256) == (ids[live - 1], sha256 * 64)


def test_a_server_that_is_registered_again_keeps_a_hash_of_its_live_version_only(
    engine: Engine,
) -> None:
    server_id = register(engine)
    with store.session(engine) as s:
        ids = [samples.add_version(s, 1, letter) for letter in "ab"]
    done = wire.SwapDone(samples.BOOT, 1, ids[0], True, "", "a" * 64, 1.0, 2.0)
    ingest(engine, server_id, samples.BOOT, [(1, [done])])
    for version_id, sha256 in ((ids[0], "a" * 64), (ids[1], "")):  # a sidecar that starts anew
        with store.session(engine) as s:
            queries.servers.register_server(s, 1, samples.hello(live=version_id))
        with store.session(engine, write=False) as s:
            server = queries.servers.server(s, server_id)
            assert (server.live_version_id, server.live_sha256) == (version_id, sha256)


def test_what_a_server_says_is_wrong_is_kept_until_it_says_otherwise(engine: Engine) -> None:
    server_id = register(engine)
    for seq, notices in ((1, {"consent": "headers\x00 are lost"}), (2, {})):
        hello = wire.Hello(samples.BOOT, 1, {}, 0, 0, 0, {}, notices)
        ingest(engine, server_id, samples.BOOT, [(seq, [hello])])
        with store.session(engine, write=False) as s:
            expected = {"consent": "headers are lost"} if notices else {}
            assert queries.servers.server(s, server_id).notices == expected


def test_running_requests_of_a_boot_that_is_gone_are_lost(engine: Engine) -> None:
    old, new = register(engine), register(engine, boot_id=78)
    ingest(engine, old, 77, [(1, [samples.started(1), samples.started(2)])])
    ingest(engine, old, 77, [(2, [samples.finished(2, [])])])
    ingest(engine, new, 78, [(1, [samples.started(1, boot_id=78)])])
    with store.session(engine) as s:
        server = s.get_one(Server, new)
        assert [boot.id for boot in queries.servers.earlier_boots(s, server)] == [old]
        assert queries.servers.mark_lost(s, old, 77) == 1
        assert queries.servers.earlier_boots(s, server) == []
        assert queries.events.count_events(s, new) == 0
        statuses = dict(s.execute(select(Request.id, Request.status)).tuples().all())
    assert [statuses[wire.request_id(77, 1)], statuses[wire.request_id(77, 2)]] == [
        "lost",
        "finished",
    ]
    assert statuses[wire.request_id(78, 1)] == "running"


def test_no_table_but_those_of_the_contract_is_made(engine: Engine) -> None:
    with store.reading(engine) as connection:
        for table in Base.metadata.sorted_tables:
            name = connection.dialect.identifier_preparer.format_table(table)
            assert connection.scalar(select(func.count()).select_from(table)) == 0, name
        if engine.dialect.name == "sqlite":
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
            assert connection.scalar(text("PRAGMA foreign_keys")) == 1


class Reads:
    """What the database goes through for its statements: in SQLite steps of its machine, in
    PostgreSQL rows that it sends."""

    def __init__(self, engine: Engine) -> None:
        self.count = 0
        if engine.dialect.name == "sqlite":
            event.listen(engine, "checkout", self._watch)
        else:
            event.listen(engine, "after_cursor_execute", self._count_rows)

    def _watch(self, driver: Any, *_: Any) -> None:
        driver.set_progress_handler(self._step, 10)

    def _step(self) -> int:
        self.count += 10
        return 0

    def _count_rows(self, _: Any, cursor: Any, *__: Any) -> None:
        self.count += max(0, cursor.rowcount)

    def of(self, work: Callable[[], Any]) -> int:
        before = self.count
        work()
        return self.count - before


def test_a_new_request_beside_long_ones_does_not_read_their_steps_again(engine: Engine) -> None:
    """64 requests of 8,000 steps and a new one: 445 ms a batch where it was 14."""
    server_id = register(engine)
    long, steps = range(1, 9), 2000
    for number in long:
        first: list[wire.Record] = [samples.chain_step(number, i, 1) for i in range(steps)]
        ingest(engine, server_id, samples.BOOT, [(number, [samples.started(number), *first])])
    reads = Reads(engine)
    seq = iter(range(100, 200))

    def next_steps(step: int, *others: wire.Record) -> int:
        records = [samples.chain_step(number, step, 1) for number in long]
        return reads.of(
            lambda: ingest(engine, server_id, samples.BOOT, [(next(seq), [*records, *others])])
        )

    next_steps(steps)  # what is done once
    alone = next_steps(steps + 1)
    beside = next_steps(steps + 2, samples.started(99), samples.chain_step(99, 0, 1))
    assert 0 < beside < 2 * alone + 100
