"""Servers, leases, switches, drops, runs, traces and what training reads, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.clock import from_us, utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from tests.support import store_samples as samples


@pytest.fixture
def group_id(engine: Engine) -> int:
    with store.session(engine) as s:
        return queries.groups.ensure_group(
            s, "default", "target", "r1", "LlamaForCausalLMEagle3"
        ).id


def test_a_group_is_made_once_and_keeps_its_target(engine: Engine, group_id: int) -> None:
    with store.session(engine) as s:
        again = queries.groups.ensure_group(s, "default", "target", "r1", "LlamaForCausalLMEagle3")
        assert again.id == group_id
        with pytest.raises(AuroraError, match="AURORA_GROUP"):
            queries.groups.ensure_group(s, "default", "other", "r1", "LlamaForCausalLMEagle3")
        with pytest.raises(AuroraError, match="there is: 'default'"):
            queries.groups.group_by_name(s, "nowhere")


def test_a_boot_registers_once_and_a_new_boot_gets_its_own_row(
    engine: Engine, group_id: int
) -> None:
    with store.session(engine) as s:
        first = queries.servers.register_server(s, group_id, samples.hello())
        assert queries.servers.register_server(s, group_id, samples.hello()).id == first.id
        second = queries.servers.register_server(s, group_id, samples.hello(boot_id=78))
        assert second.id != first.id
        assert (second.name, second.dtype, second.sglang_version) == (
            "test:30000",
            "bfloat16",
            "0.5.21",
        )
        assert [found.id for found in queries.servers.servers(s, group_id)] == [second.id, first.id]


def test_touching_a_server_sets_what_is_given_and_not_the_time(
    engine: Engine, group_id: int
) -> None:
    with store.session(engine) as s:
        server = queries.servers.register_server(s, group_id, samples.hello())
        seen = server.last_seen_at
        queries.servers.touch_server(s, server.id, phase="explore", live_version_id=12345)
    with store.session(engine) as s:
        server = queries.servers.server(s, server.id)
        assert (server.phase, server.live_version_id, server.last_seen_at) == (
            "explore",
            None,
            seen,
        )
        queries.servers.touch_server(s, server.id)
    with store.session(engine) as s:
        assert queries.servers.server(s, server.id).last_seen_at > seen


def test_of_many_that_want_a_lease_at_once_one_gets_it(engine: Engine) -> None:
    def want(holder: str) -> int | None:
        with store.session(engine) as s:
            return queries.leases.acquire_lease(s, "train", holder, 60)

    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(want, [f"h{i}" for i in range(8)]))
    assert [token for token in tokens if token is not None] == [1]


def test_a_lease_is_renewed_lost_and_taken_with_a_higher_token(engine: Engine) -> None:
    now = utc_now()
    later = now + timedelta(seconds=11)
    with store.session(engine) as s:
        token = queries.leases.acquire_lease(s, "train", "a", 10, now)
        assert token == 1
        assert queries.leases.acquire_lease(s, "train", "b", 10, now) is None
        assert queries.leases.renew_lease(s, "train", "a", token, 10, now)
        assert not queries.leases.renew_lease(s, "train", "a", token, 10, later)
        assert queries.leases.acquire_lease(s, "train", "b", 10, later) == 2
        assert not queries.leases.renew_lease(s, "train", "a", token, 10, later)
        queries.leases.release_lease(s, "train", "a", token)  # an old token frees nothing
        assert queries.leases.renew_lease(s, "train", "b", 2, 10, later)
        queries.leases.release_lease(s, "train", "b", 2)
    with store.session(engine) as s:
        assert queries.leases.acquire_lease(s, "train", "c", 10) == 3


def test_a_switch_is_on_until_somebody_says_why_not(engine: Engine, group_id: int) -> None:
    with store.session(engine) as s:
        assert queries.switches.is_on(s, group_id, "learning")
        with pytest.raises(AuroraError, match="reason"):
            queries.switches.set_switch(s, group_id, "learning", False, actor="ada", reason=" ")
        queries.switches.set_switch(s, group_id, "learning", False, actor="ada", reason="drift")
        queries.switches.set_switch(s, group_id, "learning", False, actor="ada", reason="drift")
        assert not queries.switches.is_on(s, group_id, "learning")
        (row,) = queries.switches.switches(s, group_id)
        assert (row.actor, row.reason) == ("ada", "drift")


def test_drops_are_counted_by_place_and_totals_never_twice(engine: Engine, group_id: int) -> None:
    with store.session(engine) as s:
        server_id = queries.servers.register_server(s, group_id, samples.hello()).id
        for total in (3, 3, 2, 5):
            queries.drops.set_drops(s, server_id, "engine", total)
        queries.drops.add_drops(s, server_id, "trace", 2)
        queries.drops.add_drops(s, server_id, "trace", 1)
        queries.drops.add_drops(s, server_id, "spool", 0)
        assert queries.drops.drops(s, group_id) == {"engine": 5, "trace": 3}
        assert queries.drops.drops_of_server(s, server_id) == {"engine": 5, "trace": 3}
        assert queries.drops.drops(s, group_id, since=utc_now() + timedelta(hours=1)) == {}


def test_a_run_ends_once(engine: Engine, group_id: int) -> None:
    with store.session(engine) as s:
        run = queries.runs.start_run(s, group_id, trigger="requests", objective="kl")
        assert run.status == "running"
        queries.runs.finish_run(
            s, run.id, "succeeded", requests=10, tokens=99, metrics={"loss": 1.0}
        )
        with pytest.raises(AuroraError, match="succeeded"):
            queries.runs.finish_run(s, run.id, "failed")
        left = queries.runs.start_run(s, group_id, trigger="requests")
        assert queries.runs.fail_running(s, group_id, "killed") == 1
        assert [(r.id, r.status) for r in queries.runs.runs(s, group_id)] == [
            (left.id, "failed"),
            (run.id, "succeeded"),
        ]


def serve(engine: Engine, group_id: int, requests: int = 6) -> None:
    """Requests of two domains, every second with a trace, one that forbids training."""
    with store.session(engine) as s:
        server_id = queries.servers.register_server(s, group_id, samples.hello()).id
    records: list[wire.Record] = []
    for number in range(1, requests + 1):
        start = samples.started(number, domain="chat" if number < 4 else "code")
        if number == 2:
            start = wire.RequestStarted(
                **{
                    **{name: getattr(start, name) for name in start.__struct_fields__},
                    "may_train": False,
                }
            )
        at_us = samples.START_US + number * 1_000_000
        records += [start, samples.finished(number, [], at_us=at_us)]
    ingest(engine, server_id, samples.BOOT, [(1, records)])
    with store.session(engine) as s:
        for number in range(1, requests + 1):
            add_trace(s, number, greedy=number != 6)


def add_trace(s: store.connection.Session, number: int, *, greedy: bool = True) -> None:
    queries.traces.add_trace(
        s,
        request_id=wire.request_id(samples.BOOT, number),
        uri=f"traces/20261118/{number}.safetensors",
        bytes=100,
        sha256="0" * 64,
        start=0,
        end=20,
        output_start=12,
        prompt_sha256="1" * 64,
        head_sha256="2" * 64,
        greedy=greedy,
        aux_width=9,
        last_width=3,
        dtype="bfloat16",
        created_at=from_us(samples.START_US + number),
    )


def numbers(rows: list[queries.requests.RecentRequest]) -> list[int]:
    return [row.request_id & 0xFFFFFFFF for row in rows]


def test_recent_requests_are_those_that_training_may_read(engine: Engine, group_id: int) -> None:
    serve(engine, group_id)
    with store.session(engine) as s:
        assert numbers(queries.requests.recent_requests(s, group_id)) == [6, 5, 4, 3, 1]
        assert numbers(
            queries.requests.recent_requests(s, group_id, limit=2, newest_first=False)
        ) == [5, 6]
        assert numbers(queries.requests.recent_requests(s, group_id, domains=["chat"])) == [3, 1]
        assert numbers(
            queries.requests.recent_requests(s, group_id, domains=["chat"], only_trainable=False)
        ) == [3, 2, 1]
        since = from_us(samples.START_US + 4_000_000)
        assert numbers(queries.requests.recent_requests(s, group_id, since=since)) == [6, 5, 4]
        assert numbers(queries.requests.recent_requests(s, group_id, until=since)) == [3, 1]
        assert queries.requests.recent_requests(s, group_id + 1) == []
        assert queries.requests.count_finished(s, group_id, since=since) == 3


def test_a_trace_needs_its_request_and_comes_once(engine: Engine, group_id: int) -> None:
    serve(engine, group_id, requests=2)
    with store.session(engine) as s:
        add_trace(s, 1)
        assert queries.traces.trace_bytes_total(s) == 200
        assert [t.request_id & 0xFF for t in queries.traces.traces_oldest_first(s)] == [1, 2]
        queries.traces.pin_traces(s, [wire.request_id(samples.BOOT, 1)], "test")
        assert [t.request_id & 0xFF for t in queries.traces.traces_oldest_first(s, 1)] == [2]
        queries.traces.delete_traces(s, [wire.request_id(samples.BOOT, 2)])
        assert queries.traces.trace_bytes_total(s) == 100
        found = queries.requests.request(s, wire.request_id(samples.BOOT, 2))
        assert found is not None and not found.traced
    with pytest.raises(Exception, match=r"(?i)foreign key"), store.session(engine) as s:
        add_trace(s, 77)
