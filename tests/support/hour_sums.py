"""Whether the roll-ups by hour are the sums of those by minute."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sqlalchemy import Engine, select

from aurora_sgl import store
from aurora_sgl.store.models import AcceptanceHour, AcceptanceMinute

COLUMNS = [column.name for column in AcceptanceHour.__table__.columns]
KEY = [column.name for column in AcceptanceHour.__table__.primary_key]
SUMS = [name for name in COLUMNS if name not in KEY and not name.endswith("_minute")]


def assert_hours_are_sums(engine: Engine) -> list[dict[str, Any]]:
    """Of each hour, exactly; its minutes lie within the ends that it names. The hours."""
    with store.reading(engine) as connection:
        read = connection.execute(select(AcceptanceHour)).mappings()
        hours: list[dict[str, Any]] = [dict(row) for row in read]
        minutes = connection.execute(select(AcceptanceMinute)).mappings().all()
    sums: dict[tuple[Any, ...], dict[str, int]] = defaultdict(lambda: dict.fromkeys(SUMS, 0))
    within: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for row in minutes:
        hour = row["bucket_start"].replace(minute=0, second=0, microsecond=0)
        key = tuple(hour if name == "hour" else row[name] for name in KEY)
        within[key].append(row["bucket_start"])
        for name in SUMS:
            sums[key][name] += 1 if name == "minutes" else row[name]
    assert {tuple(row[name] for name in KEY): {n: row[n] for n in SUMS} for row in hours} == sums
    for one in hours:
        times = within[tuple(one[name] for name in KEY)]
        assert one["first_minute"] <= min(times) <= max(times) <= one["last_minute"]
    return hours
