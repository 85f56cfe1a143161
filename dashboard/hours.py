"""Domain by hour, as a clock on the viewer's wall shows it: on the days when clocks are turned an
hour is missing, or two are one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import streamlit as st

from aurora_sgl.store.queries import trends
from aurora_sgl.store.queries.trends import TrendPoint

from . import charts
from .buckets import HOUR, Period
from .context import local

MOST_DOMAINS = 12
INSTANT = timedelta(microseconds=1)


def show(points: Sequence[TrendPoint], period: Period) -> None:
    steps = trends.by(points, lambda p: p.domain)
    domains = sorted(sorted(steps, key=lambda d: -steps[d].verify_steps)[:MOST_DOMAINS])
    one_day = period.until - period.since <= 30 * HOUR
    columns: Sequence[datetime | str] = [f"{hour:02}h" for hour in range(24)]
    if one_day:
        columns = on_the_wall(period.since, period.until)

    def cell(point: TrendPoint) -> tuple[str, datetime | str]:
        hour = _hour(point.bucket)
        return point.domain, hour if one_day else f"{hour:%H}h"

    cells = trends.by(points, cell)
    charts.show(charts.heat(domains, columns, cells), "heat", "accept length by domain and hour")
    caption = "Hours of your time zone." if one_day else "Hours of the day, in your time zone."
    if len(steps) > MOST_DOMAINS:
        caption += f" The {MOST_DOMAINS} of {len(steps)} domains with the most steps."
    st.caption(caption)


def on_the_wall(since: datetime, until: datetime) -> list[datetime]:
    """Every hour that the clock shows from one time to the other, and those between, without a
    zone: where clocks go back it may show less at the end than before."""
    moments = [since + i * HOUR for i in range(-((since - until) // HOUR))]
    shown = [_hour(moment) for moment in (*moments, until - INSTANT)]
    return [min(shown) + i * HOUR for i in range((max(shown) - min(shown)) // HOUR + 1)]


def _hour(moment: datetime) -> datetime:
    return local(moment).replace(minute=0, second=0, microsecond=0, tzinfo=None)
