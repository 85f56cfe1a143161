"""The picture of where versions come from."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import plotly.graph_objects as go

from .charts import DATES, NARROWEST, laid_out
from .context import zone


def figure_of(
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
    drawn = [node for node in nodes if node[3] is not None]
    side = _sides([(node[0], node[2], node[3]) for node in drawn if node[3] is not None])
    looks = {"live": ("star", "#009E73", 16), "previous": ("diamond", "#0072B2", 12),
             "candidate": ("triangle-up", "#E69F00", 12), "": ("circle", "#56B4E9", 8)}  # fmt: skip
    for role, (symbol, colour, size) in looks.items():
        here = [node for node in drawn if node[4] == role]
        if here:
            few = len(nodes) <= 40 or role
            figure.add_scatter(
                x=[place[node[0]][0] for node in here], y=[node[3] for node in here],
                mode="markers+text" if few else "markers",
                text=[str(node[0]) if node[0] in side else "" for node in here],
                textposition=[side.get(node[0], "top center") for node in here],
                cliponaxis=False, name=role or "other versions",
                marker={"symbol": symbol, "size": size, "color": colour,
                        "line": {"width": [3 if node[0] == chosen else 0 for node in here]}},
                customdata=[node[5] for node in here],
                hovertemplate="%{customdata}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(tickformatstops=DATES)
    return laid_out(figure, 320, "accept length", showlegend=True)


#: Share of the picture's height that two labels need to lie below each other.
HIGH = 0.12


def _sides(points: Sequence[tuple[int, datetime, float]]) -> dict[int, str]:
    """Where the number of each version stands, the newest first; a number that would lie on
    another one is left to the pointer."""
    if not points:
        return {}
    moments, lengths = [point[1] for point in points], [point[2] for point in points]
    apart = (max(moments) - min(moments)) / NARROWEST
    high = HIGH * max(max(lengths) - min(lengths), 1e-9)
    sides: dict[int, str] = {}
    taken: dict[str, list[tuple[datetime, float]]] = {"top center": [], "bottom center": []}
    for version, moment, length in sorted(points, reverse=True):
        for side, others in taken.items():
            if all(abs(moment - other) >= apart or abs(length - y) >= high for other, y in others):
                sides[version] = side
                others.append((moment, length))
                break
    return sides
