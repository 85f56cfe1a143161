"""What a picture says is said without its colours too, and names in it are only text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from aurora_sgl.store.models import Deployment
from aurora_sgl.store.queries.trends import ServedCounts
from dashboard import charts

BEGIN = datetime(2026, 11, 24, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SERVED = ServedCounts(4, 40, 120, 50, 90, 420, 640, 500)
EIGHT = [f"version {i}" for i in range(1, 9)]


def deployment(action: str, minutes: int) -> Deployment:
    return Deployment(
        action=action, version_id=2, previous_version_id=1, actor="ada", generation=minutes,
        reason="<b>better</b>", created_at=BEGIN + minutes * MINUTE,
    )  # fmt: skip


def test_lines_differ_in_symbol_and_dash_and_markers_in_their_shape() -> None:
    points = [(BEGIN + i * MINUTE, SERVED) for i in range(100)]
    figure = charts.trend(
        {name: points for name in EIGHT}, MINUTE,
        [deployment("promote", 3), deployment("rollback", 7)],
    )  # fmt: skip
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == EIGHT
    assert len({line.marker.symbol for line in lines}) == 8
    assert len({(line.line.dash, line.marker.symbol) for line in lines}) == 8
    assert all(len(line.x) == 100 for line in lines)  # every point is there to point at
    said = {trace.name: trace.marker.symbol for trace in figure.data if trace.name}
    assert said["promoted"] != said["rolled back"]


def test_bars_differ_in_pattern_and_cells_say_their_number() -> None:
    counts = {name: [5, 3, 2] for name in EIGHT}
    for figure in (charts.histogram(counts),
                   charts.positions(counts, dict.fromkeys(EIGHT, 10))):  # fmt: skip
        assert len({bar.marker.pattern.shape for bar in figure.data}) == 8
    heat = charts.heat(["chat"], ["00h", "01h"], {("chat", "00h"): SERVED}).data[0]
    assert [list(row) for row in heat.text] == [["2.25", ""]]
    assert heat.texttemplate == "%{text}"


def test_a_gap_in_the_traffic_is_a_gap_in_the_line() -> None:
    points = [(BEGIN, SERVED), (BEGIN + MINUTE, SERVED), (BEGIN + 9 * MINUTE, SERVED)]
    figure = charts.trend({"all": points}, MINUTE, [])
    (line,) = (trace for trace in figure.data if trace.mode == "lines+markers")
    assert list(line.y).count(None) == 1 and not line.connectgaps


def test_a_name_that_a_client_chose_is_never_markup() -> None:
    name = '<a href="http://192.0.2.1">code</a>'
    points = [(BEGIN, SERVED), (BEGIN + MINUTE, SERVED)]
    figures = [
        charts.trend({name: points}, MINUTE, [deployment("promote", 0)]),
        charts.histogram({name: [1, 2]}),
        charts.positions({name: [1]}, {name: 3}),
        charts.heat([name], ["00h"], {(name, "00h"): SERVED}),
    ]
    for figure in figures:
        drawn = figure.to_json()
        assert "<a " not in drawn and "\\u003ca " not in drawn and "<b>" not in drawn
        assert "&lt;a" in drawn or "\\u0026lt;a" in drawn
