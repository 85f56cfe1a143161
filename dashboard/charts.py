"""Plotly figures. Colour is never the only sign: series differ in symbol or pattern too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from html import escape
from itertools import pairwise
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from aurora_sgl.store.models import Deployment
from aurora_sgl.store.queries.trends import Served

from . import words
from .context import local, zone

#: Okabe and Ito's colours, told apart with any colour vision; each with a symbol and a pattern.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C2A", "#7F7F7F")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "circle-open")
PATTERNS = ("", "/", "x", "-", "|", "+", ".", "\\")
DASHES = ("solid", "dot", "dash", "longdash", "dashdot", "longdashdot", "solid", "dot")
BAND = 0.22
CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}

Series = Mapping[str, Sequence[tuple[datetime, Served]]]


def show(figure: go.Figure, key: str, alt: str) -> None:
    st.plotly_chart(figure, key=key, config=CONFIG, alt=alt)


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


#: Room for labels of numbers and for two lines of a date. A margin that the browser works out by
#: itself makes it draw the picture twice.
FIXED = {"l": 48, "r": 12, "t": 36, "b": 48}


def _laid_out(
    figure: go.Figure, height: int, y: str, *, fixed: bool = False, **more: Any
) -> go.Figure:
    """``fixed``: the labels of both axes are short, see ``FIXED``."""
    if fixed:
        figure.update_xaxes(automargin=False, tickangle=0)
        figure.update_yaxes(automargin=False)
    figure.update_layout(
        height=height,
        margin=FIXED if fixed else {"l": 8, "r": 8, "t": 36, "b": 8},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        yaxis_title=y,
        hovermode="closest",
        **more,
    )
    return figure


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
    figure = go.Figure()
    top = 1.0
    for index, (name, points) in enumerate(series.items()):
        colour, symbol = COLOURS[index % 8], SYMBOLS[index % 8]
        x, y, low, high, hover = _columns(points, width)
        top = max([top, *(value for value in high if value is not None)])
        for lower, upper, times in _bands(x, low, high):
            figure.add_scatter(
                x=[*times, *times[::-1]], y=[*upper, *lower[::-1]], fill="toself",
                fillcolor=_rgba(colour, BAND), line={"width": 0}, hoverinfo="skip",
                showlegend=False, legendgroup=escape(name),
            )  # fmt: skip
        figure.add_scatter(
            x=x, y=y, name=escape(name), legendgroup=escape(name), mode="lines+markers", text=hover,
            hovertemplate="%{text}", connectgaps=False,
            line={"color": colour, "width": 2, "dash": DASHES[index % 8]},
            marker={"symbol": symbol, "size": 6, "color": colour,
                    "maxdisplayed": MOST_SYMBOLS if len(x) > 2 * MOST_SYMBOLS else 0},
        )  # fmt: skip
    moments = [points[i][0] for points in series.values() if points for i in (0, -1)]
    span = max(moments) - min(moments) if moments else width
    _mark_deployments(figure, list(deployments), top, span / 25)
    if break_even is not None:
        figure.add_hline(
            y=break_even, line={"dash": "dot", "width": 1, "color": "#7F7F7F"},
            annotation={"text": f"drafts pay above {break_even:.2f}", "font": {"size": 11}},
            annotation_position="bottom right",
        )  # fmt: skip
    return _laid_out(figure, height, "", fixed=True, showlegend=True)


def _columns(points: Sequence[tuple[datetime, Served]], width: timedelta) -> tuple[list[Any], ...]:
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
    figure: go.Figure, deployments: list[Deployment], top: float, apart: timedelta
) -> None:
    """A label closer than ``apart`` to the one after it is left to the pointer."""
    moments = sorted(row.created_at for row in deployments)
    crowded = {one for one, after in pairwise(moments) if after - one < apart}
    name = "version" if len(deployments) <= MOST_LABELS // 2 else ""
    for action, symbol in (("promote", "triangle-up"), ("rollback", "triangle-down")):
        rows = [row for row in deployments if row.action == action]
        if not rows:
            continue
        named = len(deployments) <= MOST_LABELS
        figure.add_scatter(
            x=[local(row.created_at) for row in rows],
            y=[top + 0.04 * (top - 1)] * len(rows),
            mode="markers+text" if named else "markers",
            text=["" if row.created_at in crowded else f"{name} {row.version_id}" for row in rows],
            textposition="middle right",
            customdata=[
                f"{action} of version {row.version_id} by {escape(row.actor)}<br>"
                f"{_wrapped(row.reason)}<br>"
                f"{local(row.created_at):%d %b %H:%M:%S} ({words.utc(row.created_at)})"
                for row in rows
            ],
            hovertemplate="%{customdata}<extra></extra>",
            marker={"symbol": symbol, "size": 10, "color": "#7F7F7F"},
            name="promoted" if action == "promote" else "rolled back",
        )
    if len(deployments) <= 4 * MOST_LABELS:
        for row in deployments:
            figure.add_vline(
                x=local(row.created_at), line={"width": 1, "dash": "dot", "color": "#7F7F7F"}
            )


def _wrapped(text: str, width: int = 60) -> str:
    return "<br>".join(escape(line) for line in wrap(text, width)[:4])


def positions(reached: Mapping[str, Sequence[int]], steps: Mapping[str, int]) -> go.Figure:
    """Share of steps that accepted a proposal at depth 1, 2, ...; sums to accept length - 1."""
    figure = go.Figure()
    for index, (name, counts) in enumerate(reached.items()):
        total = max(1, steps[name])
        figure.add_bar(
            x=[f"depth {i}" for i in range(1, len(counts) + 1)],
            y=[count / total for count in counts],
            name=escape(name),
            marker={"color": COLOURS[index % 8], "pattern": {"shape": PATTERNS[index % 8]}},
            hovertemplate="%{x}: %{y:.1%} of the steps<extra>" + escape(name) + "</extra>",
        )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return _laid_out(figure, 300, "", fixed=True, showlegend=True, barmode="group")


def histogram(counts: Mapping[str, Sequence[int]]) -> go.Figure:
    """How many proposals steps accepted."""
    figure = go.Figure()
    for index, (name, column) in enumerate(counts.items()):
        total = max(1, sum(column))
        figure.add_bar(
            x=[f"{i} accepted" for i in range(len(column))],
            y=[count / total for count in column],
            customdata=list(column),
            name=escape(name),
            marker={"color": COLOURS[index % 8], "pattern": {"shape": PATTERNS[index % 8]}},
            hovertemplate="%{x}: %{customdata:,} steps, %{y:.1%}"
            f"<extra>{escape(name)}</extra>",
        )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_xaxes(type="category")
    return _laid_out(figure, 300, "", fixed=True, showlegend=True, barmode="group")


def heat(rows: Sequence[str], columns: Sequence[str], cells: Mapping[Any, Served]) -> go.Figure:
    """Accept length by domain and hour; a cell says its number."""
    values = [[_length(cells.get((row, column))) for column in columns] for row in rows]
    told = [[_told(row, column, cells.get((row, column))) for column in columns] for row in rows]
    numbers = [["" if value is None else f"{value:.2f}" for value in line] for line in values]
    few = len(columns) <= 30
    figure = go.Figure(
        go.Heatmap(
            x=list(columns),
            y=[escape(row) for row in rows],
            z=values,
            text=numbers,
            customdata=told,
            texttemplate="%{text}" if few else "",
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "accept<br>length"},
            showscale=not few,
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(type="category", side="bottom")
    figure.update_yaxes(type="category", autorange="reversed")
    return _laid_out(figure, max(180, 90 + 34 * len(rows)), "", showlegend=False)


def _length(served: Served | None) -> float | None:
    return served.accept_length if served else None


def _told(row: str, column: str, served: Served | None) -> str:
    if served is None:
        return f"{escape(row)}, {column}: nothing served"
    told = words.length(served.accept_length, served.interval)
    return f"{escape(row)}, {column}: {told}, {served.requests:,} requests"


def lineage(
    nodes: Sequence[tuple[int, int | None, datetime, float | None, str, str]],
    chosen: int | None,
) -> go.Figure:
    """(version, parent, made at, accept length, role, hover): lines lead from parent to child."""
    figure, here_is = go.Figure(), zone()
    place = {node[0]: (node[2].astimezone(here_is), node[3]) for node in nodes}
    x: list[Any] = []
    y: list[Any] = []
    for version, parent, *_ in nodes:
        if parent in place and place[version][1] is not None and place[parent][1] is not None:
            x += [place[parent][0], place[version][0], None]
            y += [place[parent][1], place[version][1], None]
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"color": "#7F7F7F", "width": 1}, hoverinfo="skip",
        name="parent to child", showlegend=False,
    )  # fmt: skip
    looks = {"live": ("star", "#009E73", 16), "previous": ("diamond", "#0072B2", 12),
             "candidate": ("triangle-up", "#E69F00", 12), "": ("circle", "#56B4E9", 8)}  # fmt: skip
    for role, (symbol, colour, size) in looks.items():
        here = [node for node in nodes if node[4] == role and node[3] is not None]
        if here:
            few = len(nodes) <= 40 or role
            figure.add_scatter(
                x=[place[node[0]][0] for node in here], y=[node[3] for node in here],
                mode="markers+text" if few else "markers", text=[str(node[0]) for node in here],
                textposition="top center", cliponaxis=False, name=role or "other versions",
                marker={"symbol": symbol, "size": size, "color": colour,
                        "line": {"width": [3 if node[0] == chosen else 0 for node in here]}},
                customdata=[node[5] for node in here],
                hovertemplate="%{customdata}<extra></extra>",
            )  # fmt: skip
    return _laid_out(figure, 320, "accept length", showlegend=True)


def plain(x: Sequence[Any], y: Sequence[Any], across: str, up: str, kind: str) -> go.Figure:
    """One column against another one; ``kind``: bars, line or points."""
    figure = go.Figure()
    if kind == "bars":
        figure.add_bar(x=list(x), y=list(y), marker={"color": COLOURS[0]})
    else:
        mode = "lines+markers" if kind == "line" else "markers"
        figure.add_scatter(x=list(x), y=list(y), mode=mode, line={"color": COLOURS[0]})
    figure.update_xaxes(title=across)
    return _laid_out(figure, 380, up, showlegend=False)


def curves(columns: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> go.Figure:
    """Lines over training: (x, y) pairs by name."""
    figure = go.Figure()
    for index, (name, points) in enumerate(columns.items()):
        figure.add_scatter(
            x=[p[0] for p in points], y=[p[1] for p in points], name=name, mode="lines+markers",
            line={"color": COLOURS[index % 8], "dash": DASHES[index % 8]},
            marker={"symbol": SYMBOLS[index % 8], "size": 6},
        )  # fmt: skip
    figure.update_xaxes(title=x)
    return _laid_out(figure, 280, y, showlegend=True)
