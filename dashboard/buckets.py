"""Buckets of time that fit what was served, and where their points lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from aurora_sgl.store.models import Deployment
from aurora_sgl.store.queries.trends import Filter, ServedCounts, TrendPoint

from . import data

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
#: What can be read: buckets of these lengths.
LENGTHS = {"minute": MINUTE, "10 minutes": 10 * MINUTE, "hour": HOUR}
#: Points of all lines together: a browser needs a second for a thousand with their bands.
MOST_POINTS = 250

Series = dict[str, list[tuple[datetime, ServedCounts]]]
Namer = Callable[[TrendPoint], str]


@dataclass(frozen=True)
class Period:
    """``bucket``: what is read; ``width``: what is drawn, a multiple of it."""

    since: datetime
    until: datetime
    bucket: str
    width: timedelta


def period(since: datetime, until: datetime) -> Period:
    """With buckets that make a picture of at most some two hundred points. Up to the end of the
    minute of ``until``; where that is the begin of one, as a day's end is, not into the next."""
    since, until = since.astimezone(UTC), until.astimezone(UTC)  # of one zone: a turn is no time
    bucket, width = _buckets(until - since)
    return Period(floor(since, width), _ceiling(until), bucket, width)


def _buckets(span: timedelta) -> tuple[str, timedelta]:
    if span <= 2 * HOUR:
        return "minute", MINUTE
    if span <= 30 * HOUR:
        return "10 minutes", 10 * MINUTE
    return "hour", HOUR * max(1, -(-int(span.total_seconds()) // (3600 * 180)))


def fitted(whole: Period, points: Sequence[TrendPoint]) -> Period:
    """The part of a period that has data, with buckets as short as its length allows. Where
    ``bucket`` changed they are to be read again."""
    if not points:
        return whole
    since = min(point.bucket for point in points)
    until = max(point.bucket for point in points) + LENGTHS[whole.bucket]
    return Period(since, until, *min(_buckets(until - since), (whole.bucket, whole.width),
                                     key=lambda buckets: buckets[1]))  # fmt: skip


def fit(
    whole: Period, read: Callable[[datetime, datetime, str], Sequence[TrendPoint]]
) -> tuple[Period, Sequence[TrendPoint]]:
    """Points of a period in buckets that fit them, and the part of it that they fill. ``read``
    takes begin, end and the length of a bucket."""
    points = read(whole.since, whole.until, whole.bucket)
    part = fitted(whole, points)
    if part.bucket != whole.bucket:
        points = read(part.since, part.until, part.bucket)
        part = fitted(part, points)
    return part, points


def coarser(period: Period, points: Sequence[TrendPoint], name: Namer) -> Period:
    """The same period with buckets so wide that all lines together keep to ``MOST_POINTS``."""
    starts = {point.bucket: floor(point.bucket, period.width) for point in points}
    drawn = len({(name(point), starts[point.bucket]) for point in points})
    return replace(period, width=period.width * max(1, -(-drawn // MOST_POINTS)))


def floor(moment: datetime, width: timedelta) -> datetime:
    seconds = width.total_seconds()
    return datetime.fromtimestamp(moment.timestamp() // seconds * seconds, tz=UTC)


def _ceiling(moment: datetime) -> datetime:
    begin = floor(moment, MINUTE)
    return begin if begin == moment else begin + MINUTE


def placed(
    series: Series, width: timedelta, ends: Mapping[str, tuple[datetime, datetime]]
) -> Series:
    """Points in the middle of their buckets, at the ends of a line in the middle of what lies
    between its first and its last step: never outside of what was served.

    ``series`` has the begin of each bucket, ``ends`` the first and the last step of each line."""
    lines: Series = {}
    for name, points in series.items():
        first, last = ends[name]
        spans = [(max(begin, first), min(begin + width, last)) for begin, _ in points]
        lines[name] = [
            (begin + (end - begin) / 2, served)
            for (begin, end), (_, served) in zip(spans, points, strict=True)
        ]
    return lines


def ends(
    url: str, wanted: Filter, bucket: str, points: Iterable[TrendPoint], name: Namer
) -> dict[str, tuple[datetime, datetime]]:
    """The first and the last step of each line. ``wanted``: group and servers."""
    lines: dict[str, dict[datetime, list[TrendPoint]]] = {}
    for point in points:
        lines.setdefault(name(point), {}).setdefault(point.bucket, []).append(point)
    extents = {}
    for line, of in lines.items():
        first, last = (
            _extent(url, wanted, bucket, begin, of[begin]) for begin in (min(of), max(of))
        )
        extents[line] = first[0], last[1]
    return extents


def _extent(
    url: str, wanted: Filter, bucket: str, begin: datetime, of: Sequence[TrendPoint]
) -> tuple[datetime, datetime]:
    """The first and the last step in one bucket of what a line is made of there."""
    end = begin + LENGTHS[bucket]
    versions = tuple(sorted({point.version_id for point in of}))
    domains = tuple(sorted({point.domain for point in of}))
    part = replace(wanted, since=begin, until=end, version_ids=versions, domains=domains)
    return data.extent(url, part) or (begin, end)


def near(
    deployments: Iterable[Deployment], series: Series, width: timedelta, asked: Period
) -> list[Deployment]:
    """Those of the period beside what is drawn; others would push it into a corner."""
    moments = [moment for points in series.values() for moment, _ in points]
    if not moments:
        return []
    first, last = min(moments), max(moments)
    room = max(2 * width, (last - first) / 4)
    begin, end = max(first - room, asked.since), min(last + room, asked.until)
    return [row for row in deployments if begin <= row.created_at <= end]
