"""Buckets are as long as what was served allows, and points lie inside of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from aurora_sgl.store.models import Deployment
from aurora_sgl.store.queries.trends import ServedCounts, TrendPoint
from dashboard import buckets
from dashboard.buckets import LENGTHS, MINUTE

NOW = datetime(2026, 11, 27, 10, 20, 41, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def served(begin: datetime, end: datetime, bucket: str) -> list[TrendPoint]:
    """A point in each bucket from the first step to the last."""
    at, found = buckets.floor(begin, LENGTHS[bucket]), []
    while at <= end:
        found.append(TrendPoint(at, 1, "chat", 3, 4, 8, ServedCounts(1, 10, 30, 12)))
        at += LENGTHS[bucket]
    return found


@pytest.mark.parametrize(
    ("asked", "age", "bucket", "most"),
    [
        (HOUR, 8 * MINUTE, "minute", 9),
        (DAY, 8 * MINUTE, "minute", 9),
        (DAY, MINUTE / 2, "minute", 2),
        (7 * DAY, 40 * MINUTE, "minute", 41),
        (30 * DAY, 8 * MINUTE, "minute", 9),
        (30 * DAY, 5 * HOUR, "10 minutes", 31),
        (30 * DAY, 3 * DAY, "hour", 73),
        (DAY, DAY, "10 minutes", 146),
        (30 * DAY, 30 * DAY, "hour", 181),
    ],
)
def test_buckets_follow_what_was_served_and_not_what_was_asked_for(
    asked: timedelta, age: timedelta, bucket: str, most: int
) -> None:
    def read(since: datetime, until: datetime, bucket: str) -> list[TrendPoint]:
        return [p for p in served(NOW - age, NOW, bucket) if since <= p.bucket < until]

    part, points = buckets.fit(buckets.period(NOW - asked, NOW), read)
    assert part.bucket == bucket and points
    assert (part.until - part.since) / part.width <= most
    assert part.since <= points[0].bucket and points[-1].bucket < part.until
    edge = LENGTHS[bucket]
    assert NOW - age - part.since <= edge and part.until - NOW <= edge
    assert sum(p.served.requests for p in points) == len(served(NOW - age, NOW, bucket))


@pytest.mark.parametrize("width", [MINUTE, 10 * MINUTE, HOUR, 4 * HOUR])
@pytest.mark.parametrize("share", [0.01, 0.4, 0.99])
def test_points_lie_in_the_middle_of_their_bucket_and_never_outside_of_their_line(
    width: timedelta, share: float
) -> None:
    begin = buckets.floor(NOW, width)
    first, last = begin + share * width, begin + (5 + share) * width
    points = [(begin + i * width, ServedCounts(1, 10)) for i in range(6)]
    drawn = buckets.placed({"chat": points}, width, {"chat": (first, last)})["chat"]
    moments = [moment for moment, _ in drawn]
    assert all(first <= moment <= last for moment in moments)
    assert moments[1:-1] == [at + width / 2 for at, _ in points[1:-1]]
    assert all(at <= moment < at + width for moment, (at, _) in zip(moments, points, strict=True))
    assert all(a < b for a, b in pairwise(moments))
    alone = buckets.placed({"x": points[:1]}, width, {"x": (first, first)})["x"]
    assert alone[0][0] == first


def test_deployments_far_from_all_that_was_served_do_not_push_it_into_a_corner() -> None:
    series = {"all": [(NOW - i * MINUTE, ServedCounts(1, 10)) for i in range(9)]}
    ages = [-3 * DAY, -20 * MINUTE, -9 * MINUTE, -5 * MINUTE, MINUTE, HOUR]
    rows = [Deployment(version_id=i, created_at=NOW + age) for i, age in enumerate(ages)]
    day, part = buckets.period(NOW - DAY, NOW), buckets.period(NOW - 8 * MINUTE, NOW)
    assert [row.version_id for row in buckets.near(rows, series, MINUTE, day)] == [2, 3]
    assert [row.version_id for row in buckets.near(rows, series, MINUTE, part)] == [3]
    assert buckets.near(rows, {}, MINUTE, day) == []
