"""Reads of the store, kept for as long as an operator would not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import streamlit as st

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.rollout import status
from aurora_sgl.step_cost import StepCost, TreeShare
from aurora_sgl.store import queries
from aurora_sgl.store.models import Deployment, DrafterVersion, Evaluation, Request, TrainingRun
from aurora_sgl.store.queries import explorer, trends
from aurora_sgl.store.queries.trends import Filter, ServedCounts, TrendPoint
from aurora_sgl.trace_room import TraceRoom

from . import tokens
from .context import Group, engine_of
from .standing import NEWEST, Speed, Standing

#: Seconds for which numbers of the moment, sums over long times, and the past are kept.
FRESH, LONG, PAST = 3.0, 60.0, 600.0
#: How what is kept is found: a filter's text says all of it. Streamlit's own way, part by part,
#: takes a tenth of a second for a month.
BY_REPR: dict[str | type[Any], Callable[[Any], Any]] = {Filter: repr}
#: A day is settled when records that were late have come; it is read again a day later.
SETTLED, LATE, DAY = 86_400.0, timedelta(hours=6), timedelta(days=1)


@st.cache_data(ttl=FRESH, max_entries=200, show_spinner=False, hash_funcs=BY_REPR)
def trend(url: str, wanted: Filter, bucket: str) -> list[TrendPoint]:
    with store.session(engine_of(url), write=False) as s:
        return trends.trend(s, wanted, bucket)


@st.cache_resource(ttl=PAST, max_entries=30, show_spinner=False, hash_funcs=BY_REPR)
def _past(url: str, wanted: Filter, bucket: str) -> tuple[TrendPoint, ...]:
    with store.session(engine_of(url), write=False) as s:
        return tuple(trends.trend(s, wanted, bucket, with_histogram=True))


@st.cache_resource(ttl=FRESH, max_entries=30, show_spinner=False, hash_funcs=BY_REPR)
def _recent(url: str, wanted: Filter, bucket: str) -> tuple[TrendPoint, ...]:
    with store.session(engine_of(url), write=False) as s:
        return tuple(trends.trend(s, wanted, bucket, with_histogram=True))


@st.cache_resource(ttl=SETTLED, max_entries=400, show_spinner=False, hash_funcs=BY_REPR)
def _day(url: str, wanted: Filter, bucket: str) -> tuple[TrendPoint, ...]:
    with store.session(engine_of(url), write=False) as s:
        return tuple(trends.trend(s, wanted, bucket, with_histogram=True))


def long_trend(url: str, wanted: Filter, bucket: str, cut: datetime) -> tuple[TrendPoint, ...]:
    """With histograms. Days that ended long ago are read once, what is before ``cut`` (on a
    bucket's edge) every ten minutes, what is after it anew."""
    points: list[TrendPoint] = []
    for part in _parts(wanted, cut):
        if part.since is None or part.until is None or part.until > cut:
            points += _recent(url, part, bucket)
        elif part.until - part.since == DAY and cut - part.until > LATE:
            points += _day(url, part, bucket)
        else:
            points += _past(url, part, bucket)
    return tuple(points)


def _parts(wanted: Filter, cut: datetime) -> Iterator[Filter]:
    """A filter cut at the days of UTC and at ``cut``, in order."""
    if wanted.since is None or wanted.until is None:
        yield wanted
        return
    midnight = wanted.since.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    days = (wanted.until - midnight) // DAY
    edges = {wanted.since, wanted.until, *(midnight + i * DAY for i in range(1, days + 1)), cut}
    ordered = sorted(edge for edge in edges if wanted.since <= edge <= wanted.until)
    for since, until in pairwise(ordered):
        yield replace(wanted, since=since, until=until)


def extent(url: str, wanted: Filter) -> tuple[datetime, datetime] | None:
    """The first and the last step in a bucket; of one that is over for long they are kept."""
    over = wanted.until is not None and utc_now() - wanted.until > LATE
    return (_past_extent if over else _recent_extent)(url, wanted)


@st.cache_data(ttl=PAST, max_entries=400, show_spinner=False, hash_funcs=BY_REPR)
def _past_extent(url: str, wanted: Filter) -> tuple[datetime, datetime] | None:
    with store.session(engine_of(url), write=False) as s:
        return trends.extent(s, wanted)


@st.cache_data(ttl=FRESH, max_entries=100, show_spinner=False, hash_funcs=BY_REPR)
def _recent_extent(url: str, wanted: Filter) -> tuple[datetime, datetime] | None:
    with store.session(engine_of(url), write=False) as s:
        return trends.extent(s, wanted)


@st.cache_data(ttl=LONG, max_entries=20, show_spinner=False)
def domains(url: str, group_id: int, since: datetime | None) -> list[str]:
    with store.session(engine_of(url), write=False) as s:
        return trends.domains(s, group_id, since)


@st.cache_data(ttl=FRESH, max_entries=20, show_spinner=False)
def last_minute(url: str, group_id: int) -> datetime | None:
    with store.session(engine_of(url), write=False) as s:
        return trends.last_minute(s, group_id)


@st.cache_data(ttl=FRESH, max_entries=20, show_spinner=False)
def tokens_kept(url: str, group_id: int, since: datetime, until: datetime) -> tuple[int, int, int]:
    with store.session(engine_of(url), write=False) as s:
        return trends.tokens_kept(s, group_id, since, until)


def step_cost(group: Group) -> StepCost:
    """What steps cost, as a server measured it last: of those that run, else of one that did."""
    with store.session(group.engine, write=False) as s:
        rows = queries.step_times.step_times(s, group.id)
        rows = rows or queries.step_times.step_times(s, group.id, states=("stopped", "gone"))[:1]
    costs = [row.cost for row in rows]
    return next((cost for cost in costs if cost.break_even), costs[0] if costs else StepCost())


def tree_shares(group: Group) -> list[tuple[str, TreeShare]]:
    """(server, shape) of the last steps of the servers that choose each step's tree."""
    with store.session(group.engine, write=False) as s:
        rows = queries.step_times.step_times(s, group.id)
    return [(row.name, one) for row in rows for one in row.trees]


def trace_room(group: Group) -> TraceRoom | None:
    """What the budgets of traces hold for the target of a running server."""
    with store.session(group.engine, write=False) as s:
        return queries.servers.trace_room(s, group.id)


def look(group: Group) -> status.GroupStatus:
    return status.look(group.engine, group.name)


def standing_of(group: Group, look: status.GroupStatus, speed: Speed | None) -> Standing:
    """What the headline rests on."""
    with store.session(group.engine, write=False) as s:
        rows = queries.servers.servers(s, group.id)
        may_train, newest = queries.training_requests.may_train_counts(s, group.id, NEWEST)
        return Standing(
            look,
            speed,
            {row.name: dict(row.counters or {}) for row in rows},
            {row.name: frozenset(row.notices or {}) for row in rows},
            may_train,
            newest,
        )


def deployments(group: Group, limit: int | None = None) -> Sequence[Deployment]:
    with store.session(group.engine, write=False) as s:
        return queries.deployments.deployments(s, group.id, limit=limit)


def runs(group: Group, limit: int | None = None) -> Sequence[TrainingRun]:
    with store.session(group.engine, write=False) as s:
        return queries.runs.runs(s, group.id, limit=limit)


def versions_of_runs(group: Group) -> dict[int, int]:
    """The version that each run made, by run."""
    return {row.training_run_id: row.id for row in versions(group) if row.training_run_id}


def servers(group: Group) -> dict[int, str]:
    """Names of all boots that ever were, by id, newest first."""
    with store.session(group.engine, write=False) as s:
        every = queries.servers.servers(s, group.id, states=("running", "stopped", "gone"))
        return {row.id: row.name for row in every}


def event_days(group: Group) -> int:
    """Days that the group keeps acceptance events."""
    with store.session(group.engine, write=False) as s:
        return queries.limits.limits(s, group.id).event_days


def aliases(group: Group) -> dict[str, int]:
    with store.session(group.engine, write=False) as s:
        return queries.aliases.aliases(s, group.id)


def versions(group: Group) -> Sequence[DrafterVersion]:
    with store.session(group.engine, write=False) as s:
        return queries.versions.versions(s, group.id)


@st.cache_data(ttl=LONG, max_entries=20, show_spinner=False)
def served_by_version(url: str, version_ids: tuple[int, ...]) -> dict[int, ServedCounts]:
    with store.session(engine_of(url), write=False) as s:
        return trends.served_by_version(s, version_ids)


@st.cache_data(ttl=LONG, max_entries=20, show_spinner=False)
def held_out(url: str, name: str) -> str:
    """How many held-out requests of a group can be judged, and why others can't: a sentence."""
    return status.held_out(engine_of(url), name).sentence


def evaluations(group: Group, version_id: int) -> Sequence[Evaluation]:
    with store.session(group.engine, write=False) as s:
        return queries.evaluations.evaluations(s, version_id)


def newest_evaluation(group: Group, version_id: int) -> Evaluation | None:
    """Over all domains."""
    return next((row for row in evaluations(group, version_id) if not row.domain), None)


def run_of(group: Group, run_id: int | None) -> TrainingRun | None:
    if run_id is None:
        return None
    with store.session(group.engine, write=False) as s:
        return s.get(TrainingRun, run_id)


def deployments_of(group: Group, version_id: int) -> list[Deployment]:
    """Those that put it live or took it off, newest first."""
    return [
        row for row in deployments(group) if version_id in (row.version_id, row.previous_version_id)
    ]


def evaluations_of(group: Group, version_ids: Sequence[int]) -> dict[int, Evaluation]:
    """The newest evaluation over all domains, by candidate."""
    with store.session(group.engine, write=False) as s:
        return queries.evaluations.newest_evaluations(s, version_ids)


def find_requests(group: Group, **wanted: Any) -> list[explorer.FoundRequest]:
    with store.session(group.engine, write=False) as s:
        return explorer.find_requests(s, group.id, **wanted)


def request(group: Group, request_id: int) -> tuple[Request | None, list[dict[str, Any]]]:
    """A request of this group and its verify steps, decoded."""
    with store.session(group.engine, write=False) as s:
        row = queries.requests.request(s, request_id)
        if row is None or queries.servers.server(s, row.server_id).group_id != group.id:
            return None, []
        return row, queries.events.events(s, request_id)


def target(group: Group) -> tuple[str, str]:
    """(model, revision) of the target."""
    with store.session(group.engine, write=False) as s:
        row = queries.groups.group(s, group.id)
        return row.target_model, row.target_revision


@st.cache_resource(max_entries=4, show_spinner=False)
def decoder(target_model: str, revision: str) -> tokens.Decode | None:
    return tokens.decoder(target_model, revision)


@dataclass(frozen=True)
class Window:
    """The stretch of time that "now" means: the shortest with enough steps in it."""

    since: datetime
    until: datetime
    is_now: bool  # False: the last stretch with traffic, some time ago


#: Lengths of it, and the verify steps with drafts that are enough.
WINDOWS = (timedelta(minutes=15), timedelta(hours=1), timedelta(hours=6), timedelta(hours=24))
ENOUGH = 200


def window(group: Group, now: datetime) -> Window | None:
    """``None``: nothing was ever served."""
    last = last_minute(group.url, group.id)
    if last is None:
        return None
    until = now.replace(second=0, microsecond=0) + timedelta(minutes=1)
    is_now = until - last <= WINDOWS[0]
    if not is_now:
        until = last + timedelta(minutes=1)
    for span in WINDOWS:
        steps = tokens_kept(group.url, group.id, until - span, until)[2]
        if steps >= ENOUGH or span == WINDOWS[-1]:
            return Window(until - span, until, is_now)
    raise AssertionError
