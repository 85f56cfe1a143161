"""The steps that the page about worth sums, kept by day: those of a day that is over stay."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import streamlit as st

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.rollout import worth
from aurora_sgl.rollout.worth import Day, Worth
from aurora_sgl.store import queries
from aurora_sgl.store.queries.drafted_steps import DraftedSteps

from . import data
from .context import Group, engine_of, local

#: Days of the longest period of the page.
LONGEST = 90


def last_days(count: int) -> list[Day]:
    """So many days of the viewer's calendar, up to today."""
    here = local(utc_now())
    zone = here.tzinfo
    assert zone is not None
    return worth.days(here.date(), count, zone)


def warm(here: Group) -> None:
    """Reads the days that the longest period has, of UTC and of this machine's zone: viewers are
    in one of them more often than not."""
    now = utc_now()
    for zone in (UTC, now.astimezone().tzinfo):
        assert zone is not None
        for day in worth.days(now.astimezone(zone).date(), LONGEST, zone):
            _steps(here, day, now)


def read(here: Group, wanted: Sequence[Day]) -> Worth:
    """What step times are told now counts for all days; see ``rollout.worth``."""
    now = utc_now()
    steps = [(day, _steps(here, day, now)) for day in wanted]
    with store.session(here.engine, write=False) as s:
        times = queries.step_times.shape_times(s, here.id)
        runs = queries.runs.run_spans(s, here.id, wanted[0].begin, wanted[-1].end)
    return worth.worth_of(steps, times, runs, now)


def _steps(here: Group, day: Day, now: datetime) -> tuple[DraftedSteps, ...]:
    settled = now - day.end > data.LATE
    return (_past if settled else _recent)(here.url, here.id, day.begin, day.end)


@st.cache_resource(ttl=data.SETTLED, max_entries=400, show_spinner=False)  # nobody changes it
def _past(url: str, group_id: int, begin: datetime, end: datetime) -> tuple[DraftedSteps, ...]:
    with store.session(engine_of(url), write=False) as s:
        return tuple(queries.drafted_steps.drafted_steps(s, group_id, begin, end))


@st.cache_resource(ttl=10.0, max_entries=40, show_spinner=False)
def _recent(url: str, group_id: int, begin: datetime, end: datetime) -> tuple[DraftedSteps, ...]:
    with store.session(engine_of(url), write=False) as s:
        return tuple(queries.drafted_steps.drafted_steps(s, group_id, begin, end))
