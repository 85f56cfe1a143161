"""A request counts once, whatever draft shapes its steps had: in every view and interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, make_url, text

from aurora_sgl import store
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.store import queries
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.queries.accept_lengths import AcceptLength
from aurora_sgl.store.queries.sql_console import make_sql_roles
from aurora_sgl.store.queries.trends import Filter, TrendPoint
from aurora_sgl.store.schema import scripts_folder
from tests.support import mixed_shapes
from tests.support.mixed_shapes import SHAPES, Event, truth


def view_by_domain_hour(engine: Engine, group_id: int, events: list[Event]) -> None:
    rows = _rows(engine, "SELECT * FROM v_accept_length_by_domain_hour")
    expected = truth(events, lambda e: (e.domain, e.hour, e.version_id), mixed=True)
    assert {(row["domain"], _time(row["hour"]), row["drafter_version_id"]): _counts(row)
            for row in rows} == {key: _of(counts) for key, counts in expected.items()}  # fmt: skip


def view_by_version(engine: Engine, group_id: int, events: list[Event]) -> None:
    rows = _rows(engine, "SELECT * FROM v_accept_length_by_version")
    for mixed in (False, True):
        own = [event for event in events if event.mixed == mixed]
        expected = truth(own, lambda e: (e.version_id, e.shape.depth, e.shape.nodes), mixed=True)
        assert {(row["drafter_version_id"], row["depth"], row["nodes"]): _counts(row)
                for row in rows if bool(row["mixed"]) == mixed
                } == {key: _of(counts) for key, counts in expected.items()}  # fmt: skip


def by_version(engine: Engine, group_id: int, events: list[Event]) -> None:
    shape = SHAPES[1]
    asked: list[tuple[dict[str, Any], list[Event]]] = [
        ({}, events),
        (shape._asdict(), [event for event in events if event.shape == shape]),
        ({"depth": 3}, [event for event in events if event.shape.depth == 3]),
        ({"accept_rule": "greedy", "topk": 1}, [e for e in events if e.shape.topk == 1]),
    ]
    with store.session(engine, write=False) as s:
        for mixed in (False, True):
            for named, own in asked:
                for by_domain in (False, True):
                    rows = queries.accept_lengths.accept_length_by_version(
                        s, group_id, with_mixed=mixed, by_domain=by_domain, **named
                    )
                    key = _version_and_domain if by_domain else _version
                    _same(rows, truth(own, key, mixed=mixed))


def per_request(engine: Engine, group_id: int, events: list[Event]) -> None:
    with store.session(engine, write=False) as s:
        for version_id in {event.version_id for event in events}:
            rows = queries.accept_lengths.per_request(s, group_id, version_id)
            own = [event for event in events if event.version_id == version_id and not event.mixed]
            assert {row[0] for row in rows} == {event.request_id for event in own}
            assert len(rows) == len({row[0] for row in rows})
            assert sum(row[1] for row in rows) == len(own)


def trend(engine: Engine, group_id: int, events: list[Event]) -> None:
    keys: list[tuple[Callable[[TrendPoint], Hashable], Callable[[Event], Hashable]]] = [
        (lambda p: 0, lambda e: 0),
        (lambda p: p.version_id, _version),
        (lambda p: p.domain, lambda e: e.domain),
        (lambda p: p.bucket, lambda e: e.hour),
        (lambda p: (p.domain, p.bucket, p.version_id), lambda e: (e.domain, e.hour, e.version_id)),
    ]
    trends, shape = queries.trends, SHAPES[0]
    with store.session(engine, write=False) as s:
        points = trends.trend(s, Filter(group_id), "hour", with_histogram=True)
        minutes = trends.trend(s, Filter(group_id), "minute")
        filtered = Filter(group_id, depth=shape.depth, topk=shape.topk, nodes=shape.nodes)
        of_shape = trends.trend(s, filtered, "day")
    for of_point, of_event in keys:
        expected = truth(events, of_event, mixed=False)
        assert {key: one.counts for key, one in trends.by(points, of_point).items()} == expected
    assert trends.total(minutes) == trends.total(points)
    own = [event for event in events if event.shape == shape]
    assert trends.total(of_shape).counts == truth(own, lambda e: 0, mixed=False)[0]
    alone = trends.by(points, lambda p: (p.depth, p.topk, p.nodes), of_shape=True)
    for shape in SHAPES[:3]:
        own = [event for event in events if event.shape == shape]
        counts = alone[shape.depth, shape.topk, shape.nodes].counts
        assert counts == truth(own, lambda e: 0, mixed=False)[0]


def served_by_version(engine: Engine, group_id: int, events: list[Event]) -> None:
    expected = truth(events, _version, mixed=False)
    with store.session(engine, write=False) as s:
        served = queries.trends.served_by_version(s, [int(str(key)) for key in expected])
    assert {key: one.counts for key, one in served.items()} == expected


def strata(engine: Engine, group_id: int, events: list[Event]) -> None:
    """Of one shape a request counts in each of its shapes, over all shapes once."""
    shaped: dict[Hashable, AcceptCounts] = {}
    together: dict[Hashable, AcceptCounts] = {}
    with store.session(engine, write=False) as s:
        for version in {event.version_id for event in events}:
            for key, counts in queries.strata.served_strata(s, version).items():
                shape = DraftShape(key.depth, key.topk, key.nodes)
                shaped[version, key.domain, key.accept_rule, shape] = counts
            for key, counts in queries.strata.served_strata(s, version, over_shapes=True).items():
                together[version, key.domain, key.accept_rule] = counts
    assert shaped == truth(events, _shaped, mixed=False)
    assert together == truth(events, lambda e: _shaped(e)[:-1], mixed=False)


def _shaped(event: Event) -> tuple[int, str, str, DraftShape]:
    return event.version_id, event.domain, "greedy", event.shape


READERS = [
    *(view_by_domain_hour, view_by_version, by_version, per_request, trend, served_by_version),
    strata,
]
Reader = Callable[[Engine, int, list[Event]], None]


def test_several_draft_shapes_in_a_request_every_reader_counts_it_once(engine: Engine) -> None:
    group_id = mixed_shapes.fill(engine)
    events = mixed_shapes.events(engine)
    whole = truth(events, lambda e: 0, mixed=True)[0]
    shapes = sum(one.requests for one in truth(events, lambda e: e.shape, mixed=True).values())
    assert shapes > 1.5 * whole.requests, "the sample has requests of several shapes"
    for reader in READERS:
        reader(engine, group_id, events)


def test_the_interval_of_steps_of_several_shapes_is_as_wide_as_its_requests_differ(
    engine: Engine,
) -> None:
    """The case's own: counted by shape, there were twice the requests and narrower intervals."""
    group_id = mixed_shapes.fill(engine, requests=60, seed=7)
    events = mixed_shapes.events(engine)
    right = truth(events, lambda e: 0, mixed=False)[0]
    by_shape = sum(truth(events, lambda e: e.shape, mixed=False).values(), AcceptCounts())
    assert by_shape.error < 0.9 * right.error
    with store.session(engine, write=False) as s:
        points = queries.trends.trend(s, Filter(group_id), "day")
    assert queries.trends.total(points).interval == pytest.approx(right.interval)


def test_an_older_store_is_filled_from_its_events(engine: Engine) -> None:
    group_id = mixed_shapes.fill(engine, seed=3)
    _down(engine)
    store.upgrade(engine)
    events = mixed_shapes.events(engine)
    for reader in READERS:
        reader(engine, group_id, events)


def test_where_events_are_pruned_an_older_store_stays_as_it_was(engine: Engine) -> None:
    group_id = mixed_shapes.fill(engine, requests=8)
    _down(engine)
    before = _rows(engine, "SELECT sum(requests) AS n FROM v_accept_length_by_domain_hour")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM acceptance_event"))
    store.upgrade(engine)
    after = _rows(engine, "SELECT sum(requests) AS n FROM v_accept_length_by_domain_hour")
    assert before == after
    with store.session(engine, write=False) as s:
        assert queries.trends.trend(s, Filter(group_id), "hour")


def _down(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(scripts_folder()))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0009")


def _rows(engine: Engine, query: str) -> list[dict[str, Any]]:
    with store.reading(engine) as connection:
        return [dict(row) for row in connection.execute(text(query)).mappings()]


def _time(value: str | datetime) -> datetime:
    if isinstance(value, str):
        return datetime.fromisoformat(value).replace(tzinfo=UTC)
    return value.astimezone(UTC)


def _counts(row: dict[str, Any]) -> list[Any]:
    return [row["requests"], row["verify_steps"], row["accepted"],
            _near(row["accept_length_variance"])]  # fmt: skip


def _of(counts: AcceptCounts) -> list[Any]:
    variance = counts.variance if counts.requests > 1 else None
    return [counts.requests, counts.steps, counts.accepted, _near(variance)]


def _near(value: float | None) -> Any:
    return value if value is None else pytest.approx(value, abs=1e-9)


def _version(event: Event) -> Hashable:
    return event.version_id


def _version_and_domain(event: Event) -> Hashable:
    return event.version_id, event.domain


def _same(rows: list[AcceptLength], expected: dict[Hashable, AcceptCounts]) -> None:
    named = {(row.version_id, row.domain) if row.domain else row.version_id: row for row in rows}
    assert set(named) == set(expected)
    for key, counts in expected.items():
        row = named[key]
        assert (row.requests, row.verify_steps) == (counts.requests, counts.steps)
        assert row.accept_length == pytest.approx(counts.accept_length)
        interval = counts.interval or (math.nan, math.nan)
        assert (row.ci_low is None) == (counts.interval is None)
        if row.ci_low is not None:
            assert (row.ci_low, row.ci_high) == pytest.approx(interval)


def test_the_upgrade_takes_conversation_hashes_from_a_viewers_role(engine: Engine) -> None:
    """Roles of the SQL page that were made before."""
    if is_sqlite(engine):
        return
    role = str(make_url(make_sql_roles(engine)["viewer"]).username)
    with engine.begin() as connection:
        connection.exec_driver_sql(f'GRANT SELECT ON request TO "{role}"')
    _down(engine)
    store.upgrade(engine)
    may = "has_column_privilege(:role, 'request', {}, 'SELECT')"
    query = f"SELECT {may.format(':hidden')} AS hidden, {may.format(':shown')} AS shown"
    with store.reading(engine) as connection:
        row = connection.execute(
            text(query), {"role": role, "hidden": "conversation_hash", "shown": "rid"}
        ).one()
    assert tuple(row) == (False, True)
