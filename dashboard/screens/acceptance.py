"""Acceptance: how much of what was proposed is accepted, over time, for whom, and how deep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from datetime import time as day_time

import pandas as pd
import streamlit as st

from aurora_sgl.intervals import unpaired_difference
from aurora_sgl.store.domains import OTHER
from aurora_sgl.store.queries import trends
from aurora_sgl.store.queries.trends import Filter, ServedCounts, TrendPoint

from .. import buckets, charts, data, downloads, exports, hours, words
from ..buckets import Namer, Period, Series, coarser, floor, period
from ..context import Group, group, local, now, zone
from ..parts import refreshing

SECONDS = 10.0
#: Lines of a picture; what is beyond them is drawn as one.
MOST = 7
PERIODS = {
    "1 hour": timedelta(hours=1),
    "6 hours": timedelta(hours=6),
    "24 hours": timedelta(hours=24),
    "7 days": timedelta(days=7),
    "30 days": timedelta(days=30),
}
OWN = "own dates"
ALL, BY_VERSION, BY_DOMAIN = "all together", "by version", "by domain"


@dataclass(frozen=True)
class ChartChoice:
    """``period``: the part with data of the one that was ``asked`` for; ``servers``: empty for all
    of them; ``narrowed``: less than all that was served in the period."""

    period: Period
    split: str
    points: list[TrendPoint]
    narrowed: bool
    servers: tuple[int, ...] = ()
    asked: Period | None = None


def show() -> None:
    st.title("Acceptance")
    _page()


@refreshing(SECONDS)
def _page() -> None:
    here = group()
    last = data.last_minute(here.url, here.id)
    if last is None:
        st.info(
            "No verify step was recorded yet. Send a request to a server's OpenAI endpoint, or "
            "run `make demo`; the first numbers appear within seconds.",
            icon=":material/hourglass_empty:",
        )
        return
    choice = _choose(here)
    if choice is None:
        return
    points = choice.points
    if not points:
        _nothing(choice, last)
        return
    name = _namer(points, choice, data.aliases(here).get("live"))
    choice = replace(choice, period=coarser(choice.period, points, name))
    series = _series(points, choice, name)
    _trend(here, choice, series, name)
    _tabs(Shown(here, choice, points, name, series))


@refreshing(None)
def _tabs(shown: Shown) -> None:
    """A part of its own, so that the trend is not drawn again for another tab; and only the open
    tab is drawn: each picture costs a browser a tenth of a second and more."""
    tabs = st.tabs(list(TABS), key="tab", on_change="rerun", bind="query-params")
    for tab, draw in zip(tabs, TABS.values(), strict=True):
        if tab.open:
            with tab:
                draw(shown)


# -- what is looked at --------------------------------------------------------------------------


def _choose(here: Group) -> ChartChoice | None:
    top = st.columns([3, 2], gap="large")
    with top[0]:
        name = st.segmented_control(
            "Period", [*PERIODS, OWN], default="24 hours", required=True, key="period",
            bind="query-params",
        )  # fmt: skip
    with top[1]:
        split = st.segmented_control(
            "Lines", [ALL, BY_VERSION, BY_DOMAIN], default=BY_VERSION, required=True, key="lines",
            bind="query-params",
        )  # fmt: skip
    period = _period(str(name))
    if period is None:
        return None
    columns = st.columns(3)
    named = data.servers(here)
    servers = columns[0].multiselect(
        "Server", sorted(set(named.values())), placeholder="all", key="servers",
        bind="query-params",
    )  # fmt: skip
    chosen = tuple(id for id, name in sorted(named.items()) if name in servers)
    wanted = Filter(here.id, period.since, period.until, chosen)
    points = _read(here, wanted, period.bucket)
    domains = columns[1].multiselect(
        "Domain", sorted({point.domain for point in points}), placeholder="all", key="domains",
        bind="query-params",
    )  # fmt: skip
    versions = columns[2].multiselect(
        "Version", sorted({point.version_id for point in points}, reverse=True),
        placeholder="all", key="versions", bind="query-params",
    )  # fmt: skip
    asked = Kept(frozenset(domains), frozenset(versions))
    kept = asked.of(points)
    narrowed = len(kept) < len(points) or bool(servers)
    fitted = buckets.fitted(period, kept)
    if fitted.bucket != period.bucket:
        part = replace(wanted, since=fitted.since, until=fitted.until)
        kept = asked.of(_read(here, part, fitted.bucket))
        fitted = buckets.fitted(fitted, kept)
    return ChartChoice(fitted, str(split), kept, narrowed, chosen, period)


@dataclass(frozen=True)
class Kept:
    """The chosen domains and versions; empty for all of them."""

    domains: frozenset[str]
    versions: frozenset[int]

    def of(self, points: Iterable[TrendPoint]) -> list[TrendPoint]:
        return [
            point
            for point in points
            if (not self.domains or point.domain in self.domains)
            and (not self.versions or point.version_id in self.versions)
        ]


def _read(here: Group, wanted: Filter, bucket: str) -> Sequence[TrendPoint]:
    """What is older than an hour is read every ten minutes only."""
    cut = floor(now() - timedelta(hours=1), timedelta(hours=1))
    return data.long_trend(here.url, wanted, bucket, cut)


def _period(name: str) -> Period | None:
    if name != OWN:
        span = PERIODS[name]
        return period(now() - span, now())
    today = local(now()).date()
    chosen = st.date_input(
        "From and to (in your time zone, both included)", (today - timedelta(days=7), today),
        max_value=today, key="dates", bind="query-params",
    )  # fmt: skip
    if not isinstance(chosen, tuple) or len(chosen) != 2:
        st.caption("Choose the last day too.")
        return None
    begin, end = (datetime.combine(day, day_time(), zone()) for day in chosen)
    return period(begin, min(end + timedelta(days=1), now()))


def _nothing(choice: ChartChoice, last: datetime) -> None:
    if choice.narrowed:
        st.info("Nothing was served that fits all of these. Take one of them away.")
        return
    words.say(
        "No step carried drafts in this period. The last verify step, with or without drafts, was ",
        words.since(last), ". Choose a longer period, or send requests.",
    )  # fmt: skip


# -- lines --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What the parts of the page draw."""

    here: Group
    choice: ChartChoice
    points: Sequence[TrendPoint]
    name: Namer
    series: Series


def _series(points: Sequence[TrendPoint], choice: ChartChoice, name: Namer) -> Series:
    width = choice.period.width
    starts = {point.bucket: floor(point.bucket, width) for point in points}
    sums = trends.by(points, lambda p: (name(p), starts[p.bucket]))
    series: Series = {}
    for (line, moment), served in sorted(sums.items(), key=lambda item: item[0]):
        series.setdefault(line, []).append((moment, served))
    order = sorted(series, key=lambda line: (line.startswith("other"), _number(line), line))
    return {line: series[line] for line in order}


def _number(line: str) -> int:
    return int(line.split()[1]) if line.startswith("version ") else 0


def _namer(points: Sequence[TrendPoint], choice: ChartChoice, live: int | None) -> Namer:
    """The line that a point belongs to."""
    if choice.split == ALL:
        return lambda point: "all together"
    if choice.split == BY_DOMAIN:
        steps = trends.by(points, lambda p: p.domain)
        kept = sorted(steps, key=lambda d: -steps[d].verify_steps)[:MOST]
        return lambda point: point.domain if point.domain in kept else "other domains"
    newest = sorted({point.version_id for point in points}, reverse=True)
    shown = set(newest[:MOST]) | ({live} if live in newest else set())
    names = {id: words.version(id) if id in shown else "other versions" for id in newest}
    return lambda point: names[point.version_id]


def _trend(here: Group, choice: ChartChoice, series: Series, name: Namer) -> None:
    st.subheader("Accept length")
    period, servers = choice.period, Filter(here.id, server_ids=choice.servers)
    ends = buckets.ends(here.url, servers, period.bucket, choice.points, name)
    drawn = buckets.placed(series, period.width, ends)
    asked = choice.asked or period
    beside = buckets.near(data.deployments(here), drawn, period.width, asked)
    figure = charts.trend(drawn, period.width, beside, break_even=data.step_cost(here).break_even)
    charts.show(figure, "trend", "accept length over time, with 95% bands and promotions")
    caption = (
        f"Points of {words.span(period.width.total_seconds())}, over the part of the period in "
        "which drafts were served; bands: 95%, over requests."
    )
    if "other versions" in series:
        caption += f" The newest {MOST} versions and the live one have lines of their own."
    if any(point.domain == OTHER for point in choice.points):
        caption += (
            f' "{OTHER}" are the requests of domains beyond those that are told apart on one day '
            "(AURORA_MOST_DOMAINS)."
        )
    st.caption(caption)


def _counts(shown: Shown) -> dict[str, list[int]]:
    """Steps with i accepted proposals, by line."""
    histograms = trends.histograms(shown.points, shown.name)
    return {line: histograms[line] for line in shown.series}


def _depths(shown: Shown) -> None:
    counts = _counts(shown)
    reached = {name: _reached(column) for name, column in counts.items()}
    figure = charts.positions(reached, {name: sum(column) for name, column in counts.items()})
    charts.show(figure, "positions", "share of steps that accepted a proposal at each depth")
    st.caption(
        "The share of steps that accepted a proposal at each depth of the draft. The shares of a "
        "line add up to its accept length less one, the target's own token."
    )


def _per_step(shown: Shown) -> None:
    figure = charts.histogram(_counts(shown))
    charts.show(figure, "histogram", "how many proposals steps accepted")
    st.caption("The share of steps by how many of their proposals were accepted.")


def _reached(column: list[int]) -> list[int]:
    """Steps that accepted at least i proposals, for i from 1."""
    return [sum(column[i:]) for i in range(1, len(column))]


# -- versions at equal draft shape ---------------------------------------------------------------


def _equal_shape(shown: Shown) -> None:
    here, points = shown.here, shown.points
    shapes: dict[tuple[int, int, int], dict[int, ServedCounts]] = {}
    sums = trends.by(points, lambda p: (p.depth, p.topk, p.nodes, p.version_id), of_shape=True)
    for (*shape, version), served in sorted(sums.items(), key=lambda item: item[0]):
        shapes.setdefault((shape[0], shape[1], shape[2]), {})[version] = served
    versions = sorted({version for of in shapes.values() for version in of}, reverse=True)
    live = data.aliases(here).get("live")
    baseline = st.selectbox(
        "Compare with", versions, index=versions.index(live) if live in versions else 0,
        format_func=words.version, key="baseline", width=240, bind="query-params",
    )  # fmt: skip
    rows = []
    for (depth, topk, nodes), of in shapes.items():
        against = of.get(baseline) if baseline is not None else None
        for version in sorted(of, reverse=True)[:20]:
            served = of[version]
            rows.append(
                {
                    "depth": depth,
                    "top-k": topk,
                    "nodes": nodes or "not known",
                    "version": words.version(version),
                    "requests": f"{served.requests:,}",
                    "verify steps": f"{served.verify_steps:,}",
                    "accept length (95%)": words.length(served.accept_length, served.interval),
                    f"less {words.version(baseline)}": _less(served, against, version == baseline),
                }
            )
    words.table("equal draft shape", rows,
                numbers=("depth", "top-k", "nodes", "requests", "verify steps"),
                empty="Nothing was served with drafts.")  # fmt: skip
    st.caption(
        "Only versions under the same draft shape (depth, top-k and nodes) are set against each "
        "other; otherwise the shapes would be compared. Traffic differs between versions: the "
        "gate's paired replay, on the page Versions, does not have that weakness."
    )
    _trees(shown.here)


def _trees(here: Group) -> None:
    """Of servers that choose each step's tree (``AURORA_SHAPES=learned``)."""
    rows = [
        {
            "server": server,
            "requests at once": f"up to {one.requests_at_once}",
            "depth": one.depth,
            "nodes": one.nodes,
            "share of the steps": f"{one.share:.0%}",
            "expected accept length": f"{one.accept_length:.2f}",
            "steps that found out": f"{one.explored:,}",
        }
        for server, one in data.tree_shares(here)
    ]
    if not rows:
        return
    st.subheader("Trees of the last steps")
    words.table("trees", rows, numbers=("depth", "nodes", "steps that found out"),
                empty="No server chooses its trees.")  # fmt: skip
    st.caption(
        "These servers choose each step's tree by how sure the drafter is, so a shape's accept "
        "length says when it is chosen, and versions can't be told apart by it."
    )


def _less(served: ServedCounts, against: ServedCounts | None, same: bool) -> str:
    if same:
        return "itself"
    if against is None:
        return "not served in this shape"
    difference = unpaired_difference(served.counts, against.counts)
    return words.difference(*difference) if difference else "too few to tell"


# -- the same numbers as a table ----------------------------------------------------------------


def _table(shown: Shown) -> None:
    series, choice = shown.series, shown.choice
    rows = []
    for name, points in series.items():
        for moment, served in points:
            low, high = served.interval or (None, None)
            rows.append(
                {
                    "time": moment,
                    "line": name,
                    "accept length": served.accept_length,
                    "95% from": low,
                    "to": high,
                    "requests": served.requests,
                    "verify steps": served.verify_steps,
                    "proposed": served.proposed,
                    "accepted": served.accepted,
                    "kept tokens": served.completion_tokens,
                }
            )
    frame = pd.DataFrame(rows).sort_values(["time", "line"], ascending=[False, True])
    number = st.column_config.NumberColumn(format="%.3f")
    st.dataframe(
        frame, hide_index=True, height=min(320, 38 + 35 * len(frame)), key="trend table",
        alt="accept length by time and line",
        placeholder=words.NONE,
        column_config={
            "time": words.time_column(help="Begin of the bucket"), "accept length": number,
            "95% from": number, "to": number,
        },
    )  # fmt: skip
    times = "%Y-%m-%dT%H:%M:%SZ"
    downloads.offer(
        "Download CSV", exports.csv(frame, date_format=times),
        f"acceptance-{choice.period.since:%Y%m%dT%H%M}Z.csv", "text/csv", help="Times in UTC",
    )  # fmt: skip


TABS: dict[str, Callable[[Shown], None]] = {
    "By position": _depths,
    "Per step": _per_step,
    "Domain by hour": lambda shown: hours.show(shown.points, shown.choice.period),
    "Versions at equal draft shape": _equal_shape,
    "The same numbers": _table,
}
