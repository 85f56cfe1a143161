"""What pages would make the first one wait for is read once before: sums over long times."""

from __future__ import annotations

from datetime import timedelta

from aurora_sgl.clock import utc_now
from aurora_sgl.store.queries.trends import Filter

from . import data, worths
from .context import find_groups


def warm() -> None:
    now = utc_now()
    hour = now.replace(minute=0, second=0, microsecond=0)
    for group in find_groups():
        month = Filter(group.id, hour - 30 * data.DAY, now)
        data.long_trend(group.url, month, "hour", hour - timedelta(hours=1))
        data.served_by_version(group.url, tuple(version.id for version in data.versions(group)))
        data.held_out(group.url, group.name)
        worths.warm(group)
