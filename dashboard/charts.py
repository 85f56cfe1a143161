"""Plotly figures. Colour is never the only sign: series differ in symbol or pattern too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from html import escape, unescape
from itertools import pairwise
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from aurora_sgl.store.models import Deployment
from aurora_sgl.store.queries.trends import ServedCounts

from . import words
from .context import local, zone

#: Okabe and Ito's colours, told apart with any colour vision; each with a symbol and a pattern.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C2A", "#7F7F7F")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "circle-open")
PATTERNS = ("", "/", "x", "-", "|", "+", ".", "\\")
DASHES = ("solid", "dot", "dash", "longdash", "dashdot", "longdashdot", "solid", "dot")
BAND = 0.22
CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}

Series = Mapping[str, Sequence[tuple[datetime, ServedCounts]]]
MILLISECOND = timedelta(milliseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def literal(text: str) -> str:
    """A text of others for plotly, which reads some HTML, ``%{name}`` in what is shown on hover,
    and formulas between dollars."""
    return escape(text).replace("%{", "%&#123;").replace("$", "&#36;")


def show(figure: go.Figure, key: str, alt: str) -> None:
    st.plotly_chart(figure, key=key, config=CONFIG, alt=alt)


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


#: Room for labels of numbers and for two lines of a date. A margin that the browser works out by
#: itself makes it draw the picture twice.
FIXED = {"l": 48, "r": 20, "t": 36, "b": 48}


def laid_out(
    figure: go.Figure, height: int, y: str, *, fixed: bool = False, **more: Any
) -> go.Figure:
    """``fixed``: the labels of both axes are short, see ``FIXED``. ``more``: of the layout."""
    across, up = dict(more.pop("xaxis", {})), {"title": {"text": y}, **more.pop("yaxis", {})}
    if fixed:
        across |= {"automargin": False, "tickangle": 0}
        up["automargin"] = False
    names = [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]
    figure.update_layout(
        height=max(height, 2 * _legend_height(names) if more.get("showlegend") else 0),
        margin=FIXED if fixed else {"l": 8, "r": 24, "t": 36, "b": 8},
        # Hung from the top: Plotly puts one that stands on the plot by its height before a window
        # became narrower, over the plot.
        legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0},
        xaxis=across,
        yaxis=up,
        hovermode="closest",
        **more,
    )
    return figure


def _legend_height(names: Sequence[str]) -> int:
    """Pixels of a legend on a telephone. A browser shows no more of it than half of the picture's
    height and lets people scroll the rest (plotly.js, legend/draw.js)."""
    lines = [name.split("<br>") for name in names] or [[""]]
    wide = 50 + 6.5 * max(len(unescape(line)) for of in lines for line in of)
    rows = -(-len(names) // max(1, int(258 // wide)))
    return rows * (12 + 16 * max(map(len, lines)))


#: Symbols of a line with many points: enough to tell it from others, fewer for a browser to draw.
MOST_SYMBOLS = 30


def trend(
    series: Series,
    width: timedelta,
    deployments: Iterable[Deployment],
    *,
    break_even: float | None = None,
    height: int = 380,
) -> go.Figure:
    """Accept length over time with its 95% band, and when versions went live.

    ``width`` is that of a bucket; points more than two of them apart are not joined.
    """
    figure, rows = go.Figure(), list(deployments)
    values: list[float] = [] if break_even is None else [break_even]
    for index, (name, points) in enumerate(series.items()):
        colour, symbol, shown = COLOURS[index % 8], SYMBOLS[index % 8], label(name)
        x, y, low, high, hover = _columns(points, width)
        values += [value for value in (*low, *high) if value is not None]
        for lower, upper, times in _bands(x, low, high):
            figure.add_scatter(
                x=[*times, *times[::-1]], y=[*upper, *lower[::-1]], fill="toself", mode="lines",
                fillcolor=_rgba(colour, BAND), line={"width": 0}, hoverinfo="skip",
                showlegend=False, legendgroup=shown,
            )  # fmt: skip
        figure.add_scatter(
            x=x, y=y, name=shown, legendgroup=shown, mode="lines+markers", text=hover,
            hovertemplate="%{text}", connectgaps=False,
            line={"color": colour, "width": 2, "dash": DASHES[index % 8]},
            marker={"symbol": symbol, "size": 6, "color": colour,
                    "maxdisplayed": MOST_SYMBOLS if len(x) > 2 * MOST_SYMBOLS else 0},
        )  # fmt: skip
    begin, end = _across(series, rows, width)
    bottom, marks, top = _up(values, bool(rows))
    _mark_deployments(figure, rows, bottom, marks, (end - begin) / NARROWEST)
    if break_even is not None:
        _mark_break_even(figure, break_even, above=break_even == min(values))
    return laid_out(
        figure, height, "", fixed=True, showlegend=True,
        xaxis={"range": [local(begin), local(end)], "tickformatstops": DATES},
        yaxis={"range": [bottom, top]},
    )  # fmt: skip


def _mark_break_even(figure: go.Figure, value: float, *, above: bool) -> None:
    """A line with its name at the right, above or below it. (Plotly's own ``add_hline`` takes as
    long as all the rest.)"""
    figure.add_shape(
        type="line", xref="paper", x0=0, x1=1, y0=value, y1=value,
        line={"dash": "dot", "width": 1, "color": "#7F7F7F"},
    )  # fmt: skip
    figure.add_annotation(
        text=f"break-even {value:.2f}", font={"size": 11}, showarrow=False, xref="paper", x=1,
        y=value, xanchor="right", yanchor="bottom" if above else "top",
    )  # fmt: skip


#: Labels of times: as short as they can be, the day below the hour and the year below the day
#: where they change (plotly writes what is behind a line's end only there).
DATES = [
    {"dtickrange": [None, 59_999], "value": "%H:%M:%S\n%-d %b"},
    {"dtickrange": [60_000, 86_399_999], "value": "%H:%M\n%-d %b"},
    {"dtickrange": [86_400_000, "M1"], "value": "%-d %b\n%Y"},
    {"dtickrange": ["M1", None], "value": "%b\n%Y"},
]
#: Shares of the values' range: below it, above it, and from it to the signs of deployments.
BELOW, ABOVE, MARKS = 0.08, 0.25, 0.07
#: Labels of deployments that a picture on a telephone has room for; its share on either side.
NARROWEST, BESIDE = 14, 0.05


def _across(
    series: Series, deployments: Iterable[Deployment], width: timedelta
) -> tuple[datetime, datetime]:
    """Begin and end of the axis: all that is drawn, and some room on both sides."""
    moments = [points[i][0] for points in series.values() if points for i in (0, -1)]
    moments += [row.created_at for row in deployments]
    begin, end = min(moments, default=EPOCH), max(moments, default=EPOCH)
    room = max(BESIDE * (end - begin), width / 2)
    return begin - room, end + room


def _up(values: Sequence[float], marked: bool) -> tuple[float, float, float]:
    """The axis' lower end, the height of deployments' signs, and its upper end."""
    low, high = min(values, default=1.0), max(values, default=2.0)
    room = max(high - low, 0.1)
    return low - BELOW * room, high + MARKS * room, high + (ABOVE if marked else BELOW) * room


def _columns(
    points: Sequence[tuple[datetime, ServedCounts]], width: timedelta
) -> tuple[list[Any], ...]:
    x: list[Any] = []
    y: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    hover: list[str] = []
    before, here = None, zone()
    for moment, served in points:
        if before is not None and moment - before > 2 * width:
            x.append((before + width).astimezone(here))
            y.append(None)
            low.append(None)
            high.append(None)
            hover.append("")
        interval = served.interval
        x.append(moment.astimezone(here))
        y.append(served.accept_length)
        low.append(interval[0] if interval else served.accept_length)
        high.append(interval[1] if interval else served.accept_length)
        hover.append(
            f"{x[-1]:%d %b %H:%M} ({words.utc(moment)})<br>accept length "
            f"{words.length(served.accept_length, interval)}<br>{served.requests:,} requests, "
            f"{served.verify_steps:,} steps<extra></extra>"
        )
        before = moment
    return x, y, low, high, hover


def _bands(x: list[Any], low: list[Any], high: list[Any]) -> Iterable[tuple[list[Any], ...]]:
    """The stretches without a gap."""
    begin = 0
    for end in [i for i, value in enumerate(low) if value is None] + [len(low)]:
        if end - begin > 1:
            yield low[begin:end], high[begin:end], x[begin:end]
        begin = end + 1


#: Deployments beyond which only their symbols are drawn.
MOST_LABELS = 12


def _mark_deployments(
    figure: go.Figure, deployments: list[Deployment], bottom: float, y: float, apart: timedelta
) -> None:
    """A line from ``bottom`` to a sign at ``y`` for each. A label closer than ``apart`` to the one
    after it is left to the pointer."""
    here = zone()
    moments = sorted(row.created_at for row in deployments)
    crowded = {one for one, after in pairwise(moments) if after - one < apart}
    for action, symbol in (("promote", "triangle-up"), ("rollback", "triangle-down")):
        rows = [row for row in deployments if row.action == action]
        if not rows:
            continue
        named = len(deployments) <= MOST_LABELS
        figure.add_scatter(
            x=[row.created_at.astimezone(here) for row in rows],
            y=[y] * len(rows),
            mode="markers+text" if named else "markers",
            text=["" if row.created_at in crowded else f"v{row.version_id}" for row in rows],
            textposition="top center",
            cliponaxis=False,
            customdata=[
                f"{action} of version {row.version_id} by {literal(row.actor)}<br>"
                f"{_wrapped(row.reason)}<br>"
                f"{row.created_at.astimezone(here):%d %b %H:%M:%S} ({words.utc(row.created_at)})"
                for row in rows
            ],
            hovertemplate="%{customdata}<extra></extra>",
            marker={"symbol": symbol, "size": 10, "color": "#7F7F7F"},
            name="promoted" if action == "promote" else "rolled back",
        )
    if len(deployments) <= 4 * MOST_LABELS:
        for row in deployments:
            moment = row.created_at.astimezone(here)
            figure.add_shape(
                type="line", x0=moment, x1=moment, y0=bottom, y1=y,
                line={"width": 1, "dash": "dot", "color": "#7F7F7F"},
            )  # fmt: skip


def label(text: str, width: int = 30) -> str:
    """A name that others chose, whole, in lines that a telephone has room for: plotly cuts what is
    wider than the picture."""
    return "<br>".join(literal(line) for line in wrap(text, width)) or literal(text)


def _wrapped(text: str) -> str:
    return "<br>".join(literal(line) for line in wrap(text, 60, max_lines=4, placeholder=" ..."))


#: An axis of shares.
SHARES = {"tickformat": ".0%", "rangemode": "tozero"}


def positions(reached: Mapping[str, Sequence[float]], steps: Mapping[str, int]) -> go.Figure:
    """Share of steps that accepted a proposal at depth 1, 2, ...; sums to accept length - 1."""
    figure = go.Figure()
    for index, (name, counts) in enumerate(reached.items()):
        total = max(1, steps[name])
        figure.add_bar(
            x=[f"depth {i}" for i in range(1, len(counts) + 1)],
            y=[count / total for count in counts],
            name=label(name),
            marker={"color": COLOURS[index % 8], "pattern": {"shape": PATTERNS[index % 8]}},
            hovertemplate="%{x}: %{y:.1%} of the steps<extra>" + literal(name) + "</extra>",
        )
    return laid_out(figure, 300, "", fixed=True, showlegend=True, barmode="group", yaxis=SHARES)


def histogram(counts: Mapping[str, Sequence[int]]) -> go.Figure:
    """How many proposals steps accepted."""
    figure = go.Figure()
    for index, (name, column) in enumerate(counts.items()):
        total = max(1, sum(column))
        figure.add_bar(
            x=[f"{i} accepted" for i in range(len(column))],
            y=[count / total for count in column],
            customdata=list(column),
            name=label(name),
            marker={"color": COLOURS[index % 8], "pattern": {"shape": PATTERNS[index % 8]}},
            hovertemplate="%{x}: %{customdata:,} steps, %{y:.1%}"
            f"<extra>{literal(name)}</extra>",
        )
    return laid_out(
        figure, 300, "", fixed=True, showlegend=True, barmode="group",
        xaxis={"type": "category"}, yaxis=SHARES,
    )  # fmt: skip


def heat(
    rows: Sequence[str], columns: Sequence[datetime | str], cells: Mapping[Any, ServedCounts]
) -> go.Figure:
    """Accept length by domain and hour, which is a name or a time of the wall's clock; a cell says
    its number."""
    values = [[_length(cells.get((row, column))) for column in columns] for row in rows]
    hover_texts = [
        [_hover_text(row, column, cells.get((row, column))) for column in columns] for row in rows
    ]
    numbers = [["" if value is None else f"{value:.2f}" for value in line] for line in values]
    few, names = len(columns) <= 30, [label(row, 14) for row in rows]
    figure = go.Figure(
        go.Heatmap(
            y=names,
            z=values,
            text=numbers,
            customdata=hover_texts,
            texttemplate="%{text}" if few else "",
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "accept<br>length"},
            showscale=not few,
            xgap=1,
            ygap=1,
        )
    )
    _put_hours(figure, columns)
    figure.update_yaxes(type="category", autorange="reversed")
    lines = max((name.count("<br>") + 1 for name in names), default=1)
    return laid_out(figure, max(180, 90 + (18 + 16 * lines) * len(rows)), "", showlegend=False)


def _put_hours(figure: go.Figure, columns: Sequence[datetime | str]) -> None:
    """Names below their cells; times below where their cells begin."""
    hour, begin = timedelta(hours=1), columns[0]
    if isinstance(begin, datetime):
        figure.update_traces(x0=begin + hour / 2, dx=hour / MILLISECOND)
        end = begin + len(columns) * hour
        figure.update_xaxes(range=[begin, end], tickformatstops=DATES, tickangle=0)
    else:
        figure.update_traces(x=list(columns))
        figure.update_xaxes(type="category", side="bottom")


def _length(served: ServedCounts | None) -> float | None:
    return served.accept_length if served else None


def _hover_text(row: str, column: datetime | str, served: ServedCounts | None) -> str:
    column = f"{column:%-d %b %Hh}" if isinstance(column, datetime) else column
    if served is None:
        return f"{literal(row)}, {column}: nothing served"
    length = words.length(served.accept_length, served.interval)
    return f"{literal(row)}, {column}: {length}, {served.requests:,} requests"


def plain(x: Sequence[Any], y: Sequence[Any], across: str, up: str, kind: str) -> go.Figure:
    """One column against another one; ``kind``: bars, line or points. Text in them is literal."""
    figure = go.Figure()
    x = [literal(value) if isinstance(value, str) else value for value in x]
    if kind == "bars":
        figure.add_bar(x=x, y=list(y), marker={"color": COLOURS[0]})
    else:
        mode = "lines+markers" if kind == "line" else "markers"
        figure.add_scatter(x=x, y=list(y), mode=mode, line={"color": COLOURS[0]})
    figure.update_xaxes(title=label(across))
    return laid_out(figure, 380, label(up), showlegend=False)


def curves(columns: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> go.Figure:
    """Lines over training: (x, y) pairs by name."""
    figure = go.Figure()
    for index, (name, points) in enumerate(columns.items()):
        figure.add_scatter(
            x=[p[0] for p in points], y=[p[1] for p in points], name=label(name),
            mode="lines+markers",
            line={"color": COLOURS[index % 8], "dash": DASHES[index % 8]},
            marker={"symbol": SYMBOLS[index % 8], "size": 6},
        )  # fmt: skip
    figure.update_xaxes(title=x)
    return laid_out(figure, 280, y, showlegend=True)
