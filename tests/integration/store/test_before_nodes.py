"""A store from before nodes were in the keys of the roll-ups (schema 0007) goes on as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, text

from aurora_sgl import store, wire
from aurora_sgl.clock import from_us
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.schema import scripts_folder
from tests.support import store_samples as samples
from tests.support.hour_sums import assert_hours_are_sums

AT = from_us(samples.START_US).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")
#: (server, depth, topk, nodes, [(steps, accepted) of each request])
SERVED = [
    (1, 3, 1, 4, [(10, 12), (20, 31)]),
    (1, 3, 4, 8, [(12, 18), (30, 40), (7, 7)]),
    (1, 1, 4, 4, [(15, 9)]),
    (2, 3, 4, 16, [(11, 25), (9, 14)]),
    (2, 0, 4, 1, [(40, 0)]),
]


def insert(connection: Connection, table: str, **row: Any) -> None:
    names = ", ".join(f'"{name}"' for name in row)
    marks = ", ".join(f":{name}" for name in row)
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), row)


def serve(connection: Connection, server: int, number: int, steps: int, accepted: int) -> int:
    request_id = wire.request_id(samples.BOOT + server, number)
    insert(connection, "request", id=request_id, rid="", server_id=server, dp_rank=0,
           admitted_at=AT, finished_at=AT, status="finished", domain="chat",
           conversation_hash="", prompt_tokens=9, cached_tokens=0,
           completion_tokens=1 + steps + accepted, verify_steps=steps, proposed=0,
           accepted=accepted, retractions=0, sampling="{}", finish_reason="stop",
           may_train=True, traced=False, speculates=True, accept_rule="greedy")  # fmt: skip
    return request_id


def fill(connection: Connection) -> None:
    """By SQL, as the tables were then."""
    insert(connection, "deployment_group", id=1, name="default", target_model="target",
           target_revision="", draft_architecture="LlamaForCausalLMEagle3", generation=0,
           created_at=AT)  # fmt: skip
    for server in (1, 2):
        insert(connection, "server", id=server, group_id=1, name=f"s{server}",
               boot_id=samples.BOOT + server, sglang_version="", live_sha256="", state="running",
               dtype="", phase="", phase_reason="", counters="{}", notices="{}", last_error="",
               started_at=AT, last_seen_at=AT)  # fmt: skip
    number = 0
    for server, depth, topk, nodes, requests in SERVED:
        steps, accepted = (sum(column) for column in zip(*requests, strict=True))
        insert(connection, "acceptance_minute", bucket_start=AT, server_id=server,
               drafter_version_id=0, domain="chat", depth=depth, topk=topk, accept_rule="greedy",
               batch_bucket=1, mixed=False, verify_steps=steps, proposed=steps * (nodes - 1),
               accepted=accepted, requests=len(requests), completion_tokens=steps + accepted,
               sum_steps_squared=sum(n * n for n, _ in requests),
               sum_accepted_squared=sum(y * y for _, y in requests),
               sum_steps_accepted=sum(n * y for n, y in requests),
               histogram=json.dumps([steps]), per_position="[]")  # fmt: skip
        for n, y in requests:
            number += 1
            insert(connection, "request_tally", request_id=serve(connection, server, number, n, y),
                   drafter_version_id=0, depth=depth, topk=topk, mixed=False, verify_steps=n,
                   accepted=y)  # fmt: skip


def make(url: str) -> Engine:
    engine = store.connect(url)
    config = Config()
    config.set_main_option("script_location", str(scripts_folder()))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0007")
        fill(connection)
    return engine


@pytest.fixture
def before(empty_store_url: str) -> Iterator[Engine]:
    engine = make(empty_store_url)
    yield engine
    engine.dispose()


def lengths(engine: Engine) -> list[dict[str, Any]]:
    with store.reading(engine) as connection:
        rows = connection.execute(text("SELECT * FROM v_accept_length_by_version")).mappings()
        rows = [{**row, "mixed": bool(row["mixed"])} for row in rows]
    return sorted(rows, key=lambda row: (row["depth"], row["topk"], row.get("nodes", 0)))


def test_an_older_store_shows_the_same_accept_lengths_and_its_draft_shapes(before: Engine) -> None:
    old = lengths(before)
    store.upgrade(before)
    new = lengths(before)
    assert_hours_are_sums(before)
    shapes = sorted({(d, k, n) for _, d, k, n, _ in SERVED if d})
    assert [(row["depth"], row["topk"], row["nodes"]) for row in new] == shapes
    for name in ("verify_steps", "requests", "proposed", "accepted"):
        assert sum(row[name] for row in new) == sum(row[name] for row in old)
    alone = [row for row in new if (row["depth"], row["topk"]) != (3, 4)]
    assert [{**row, "nodes": 0} for row in alone] == [
        {**row, "nodes": 0} for row in old if (row["depth"], row["topk"]) != (3, 4)
    ]
    with store.session(before, write=False) as s:
        (whole,) = queries.accept_lengths.accept_length_by_version(s, 1)
        pairs = [pair for _, depth, _, _, requests in SERVED if depth for pair in requests]
        steps, accepted = sum(n for n, _ in pairs), sum(y for _, y in pairs)
        assert whole.accept_length == pytest.approx(1 + accepted / steps)
        counts = queries.request_counts.request_counts(s, 1, 0)
        assert sorted((c.verify_steps, c.accepted) for c in counts) == sorted(pairs)
        assert {(c.depth, c.topk, c.nodes) for c in counts} == set(shapes)
        (big,) = queries.accept_lengths.accept_length_by_version(s, 1, depth=3, topk=4, nodes=16)
        assert big.accept_length == pytest.approx(1 + 39 / 20)
        filtered = queries.trends.Filter(1, depth=3, topk=4, nodes=8)
        (point,) = queries.trends.trend(s, filtered, "day")
        assert (point.nodes, point.served.accepted) == (8, 65)
        assert queries.servers.served_shape(s, 1) == (3, 4, 8), "of most steps"


def test_a_request_that_runs_on_over_the_upgrade_is_one_request(before: Engine) -> None:
    store.upgrade(before)
    step = samples.chain_step(1, 10, 2, boot_id=samples.BOOT + 1)
    ingest(before, 1, samples.BOOT + 1, [(1, [step])])
    (chain,) = [row for row in lengths(before) if row["topk"] == 1]
    assert (chain["requests"], chain["verify_steps"], chain["accepted"]) == (2, 31, 45)
    with store.session(before, write=False) as s:
        (tally,) = queries.request_counts.tallies(s, step.request_id)
    assert (tally.nodes, tally.verify_steps, tally.accepted) == (4, 11, 14)


def test_nodes_that_can_not_be_told_are_none(before: Engine) -> None:
    with before.begin() as connection:
        connection.execute(
            text("UPDATE acceptance_minute SET proposed = proposed + 1 WHERE server_id = 2")
        )
    store.upgrade(before)
    assert {row["nodes"] for row in lengths(before)} == {0, 4, 8}
    with store.session(before, write=False) as s:
        counts = queries.request_counts.request_counts(s, 1, 0)
    assert sorted(c.nodes for c in counts if (c.depth, c.topk) == (3, 4)) == [0, 0, 8, 8, 8]


def test_rights_on_the_views_stay_in_postgresql(postgres_database: str) -> None:
    before = make(postgres_database)
    with before.begin() as connection:
        connection.execute(text("GRANT SELECT ON v_accept_length_by_version TO PUBLIC"))
    store.upgrade(before)
    with store.reading(before) as connection:
        rights = connection.scalar(
            text("SELECT relacl::text FROM pg_class WHERE relname = 'v_accept_length_by_version'")
        )
    assert "=r/" in rights
    before.dispose()
