"""Roll-ups by hour: kept by triggers, whatever happens to the minutes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, and_, delete, func, select, text, update

from aurora_sgl import store
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.models import AcceptanceEvent, AcceptanceHour, AcceptanceMinute
from aurora_sgl.store.upsert import upsert
from tests.integration.store.test_ingest import register
from tests.support import store_samples as samples
from tests.support.hour_sums import assert_hours_are_sums

START = datetime(2026, 1, 1, 4, 50, tzinfo=UTC)
TABLE = AcceptanceMinute.__table__
KEY = [column.name for column in TABLE.primary_key]
REST = [column.name for column in TABLE.columns if column.name not in KEY]
LISTS = ("histogram", "per_position")

KEYS = st.fixed_dictionaries(
    {
        "bucket_start": st.integers(0, 80).map(lambda m: START + timedelta(minutes=m)),
        "domain": st.sampled_from(["chat", "客服'\""]),
        **{n: st.integers(1, 2) for n in KEY if n not in ("bucket_start", "domain", "accept_rule")},
        "accept_rule": st.sampled_from(["greedy", "sampled"]),
        "mixed": st.booleans(),
    }
)
#: A purge adds sums below zero.
VALUES = st.fixed_dictionaries(
    {n: st.just([1]) if n in LISTS else st.integers(-5, 1 << 40) for n in REST}
)
CHANGES = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=4)),
    st.tuples(st.just("delete"), st.integers(0, 80)),
    st.tuples(st.just("move"), st.tuples(st.integers(0, 80), st.integers(-90, 90))),
    st.tuples(st.just("rename"), st.integers(0, 80)),
)


def apply(connection: Connection, change: tuple[str, Any]) -> None:
    m = AcceptanceMinute
    what, value = change
    if what == "put":
        rows = {tuple(key.values()): {**key, **values} for key, values in value}
        upsert(connection, m, list(rows.values()), KEY, REST)
        return
    minute = value[0] if what == "move" else value
    before = m.bucket_start < START + timedelta(minutes=minute)
    if what == "delete":
        connection.execute(delete(m).where(before))
        return
    # Rows that go to where nobody is.
    row = connection.execute(select(TABLE).where(before).limit(1)).mappings().one_or_none()
    if row is not None:
        here = and_(*(TABLE.c[name] == row[name] for name in KEY))
        moved = row["bucket_start"] + timedelta(days=1, minutes=value[1] if what == "move" else 0)
        new = {"bucket_start": moved} if what == "move" else {"domain": f"{row['domain']} ", **VERY}
        taken = and_(*(TABLE.c[name] == {**row, **new}[name] for name in KEY))
        if not connection.scalar(select(TABLE.c.domain).where(taken)):
            connection.execute(update(m).where(here).values(**new))


VERY = {"verify_steps": 7, "accepted": 3}  # sums that change with the key


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(CHANGES, min_size=1, max_size=8))
def test_hours_are_the_sums_of_minutes_whatever_happens_to_them(
    engine: Engine, changes: list[tuple[str, Any]]
) -> None:
    with engine.begin() as connection:
        connection.execute(delete(AcceptanceMinute))
        assert not connection.execute(select(AcceptanceHour)).all()
    for change in changes:
        with engine.begin() as connection:
            apply(connection, change)
        assert_hours_are_sums(engine)


def test_what_is_ingested_twice_is_in_the_hour_once(engine: Engine) -> None:
    server_id = register(engine)
    batch = samples.traffic(requests=7, steps=30)
    for _ in range(2):
        ingest(engine, server_id, samples.BOOT, batch)
    hours = assert_hours_are_sums(engine)
    with store.reading(engine) as connection:
        steps = connection.scalar(select(func.count()).select_from(AcceptanceEvent))
        assert sum(row["verify_steps"] for row in hours) == steps
        views = [
            connection.scalar(text(f"SELECT sum(verify_steps) FROM {view}"))
            for view in ("v_accept_length_by_version", "v_accept_length_by_domain_hour")
        ]
    assert views == [sum(row["verify_steps"] for row in hours if row["depth"])] * 2
