"""The days on which clocks go forward or back, in zones of several kinds."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from streamlit.runtime.context import ContextProxy

from aurora_sgl import rollout
from dashboard import buckets, hours
from dashboard.screens import acceptance
from dashboard.screens import now as screen
from tests.pages.test_pages import draw, said
from tests.support import browser
from tests.support import dashboard_house as samples
from tests.support.dashboard_house import House

Use = Callable[..., None]
HALF = timedelta(minutes=30)
HOURS = [f"{hour:02}h" for hour in range(24)]
#: A zone, a day of it, and by the wall's hour how many half hours of that day are not two. New
#: York and Berlin: an hour at night. Lord Howe Island: half an hour. Troll: two hours. Havana: at
#: midnight. Apia: no longer at all; once it left out a day.
DAYS = [
    ("America/New_York", date(2026, 3, 8), {"02h": 0}),
    ("America/New_York", date(2026, 11, 1), {"01h": 4}),
    ("America/New_York", date(2026, 11, 2), {}),
    ("Europe/Berlin", date(2026, 3, 29), {"02h": 0}),
    ("Europe/Berlin", date(2026, 10, 25), {"02h": 4}),
    ("Australia/Lord_Howe", date(2026, 10, 4), {"02h": 1}),
    ("Australia/Lord_Howe", date(2026, 4, 5), {"01h": 3}),
    ("Antarctica/Troll", date(2026, 3, 29), {"01h": 0, "02h": 0}),
    ("Antarctica/Troll", date(2026, 10, 25), {"01h": 4, "02h": 4}),
    ("America/Havana", date(2026, 3, 8), {"00h": 0}),
    ("America/Havana", date(2026, 11, 1), {"00h": 4}),
    ("Pacific/Apia", date(2026, 4, 5), {}),
    ("Pacific/Apia", date(2026, 9, 27), {}),
]


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A request each half hour around each of the days."""
    house = samples.empty(tmp_path_factory.mktemp("turned"))
    browser.add_accounts(house.home)
    samples.add_servers(house)
    rollout.promote(house.engine, samples.add_version(house), actor="system", reason="first")
    days = sorted({day for _, day, _ in DAYS})
    noons = [datetime.combine(day, time(12), UTC) for day in days]
    moments = {noon + half * HALF for noon in noons for half in range(-84, 61)}
    with house.together():
        for moment in sorted(moments):
            house.serve(moment, 1, steps=2, rng=random.Random(0))
    yield house
    house.engine.dispose()


def requests_by_hour(
    house: House, page_zone: str, monkeypatch: pytest.MonkeyPatch, begin: date, end: date
) -> tuple[list[str], Counter[str]]:
    """What "Domain by hour" shows somebody there: its columns, and its cells with requests."""
    monkeypatch.setattr(ContextProxy, "timezone", property(lambda self: page_zone))
    app = draw(house.home, "Acceptance", period=acceptance.OWN, dates=(begin, end),
               tab="Domain by hour")  # fmt: skip
    spec = json.loads(app.get("plotly_chart")[-1].proto.spec)
    [heat] = [trace for trace in spec["data"] if trace["type"] == "heatmap"]
    cells = re.compile(r"chat, (?:\d+ \w+ )?(\d\dh): (?:.*, (\d+) requests|nothing served)")
    matches = [cells.fullmatch(text) for text in heat["customdata"][0]]
    assert all(matches), heat["customdata"]
    found = [(match[1], int(match[2] or 0)) for match in matches if match]
    for (_, count), text in zip(found, heat["text"][0], strict=True):
        assert bool(text) == bool(count)
    return [hour for hour, _ in found], Counter({hour: count for hour, count in found if count})


@pytest.mark.parametrize(("name", "day", "odd"), DAYS, ids=str)
def test_domain_by_hour_on_a_day_when_clocks_are_turned(
    turned: House,
    settings_of: Use,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    day: date,
    odd: dict[str, int],
) -> None:
    settings_of(turned.home)
    columns, requests = requests_by_hour(turned, name, monkeypatch, day, day)
    expected = Counter({hour: count for hour in HOURS if (count := odd.get(hour, 2))})
    drawn = [hour for hour in HOURS if hour in requests or hour > min(expected)]
    assert columns == (drawn if name == "America/Havana" else HOURS)
    assert requests == expected


def test_hours_of_several_days_with_a_turn_add_up(
    turned: House, settings_of: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_of(turned.home)
    day = timedelta(days=1)
    for name, middle, odd in [row for row in DAYS[:5] if row[2]]:
        columns, requests = requests_by_hour(turned, name, monkeypatch, middle - day, middle)
        assert columns == HOURS
        assert requests == Counter({hour: 2 + odd.get(hour, 2) for hour in HOURS})


def test_a_day_that_was_left_out_is_an_empty_one(
    turned: House, settings_of: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apia had no 30 December 2011."""
    settings_of(turned.home)
    monkeypatch.setattr(ContextProxy, "timezone", property(lambda self: "Pacific/Apia"))
    gone = date(2011, 12, 30)
    app = draw(turned.home, "Acceptance", period=acceptance.OWN, dates=(gone, gone))
    assert "No step carried drafts in this period." in said(app)


def test_hours_shown_twice_are_columns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From half past two to a quarter past one, 45 minutes later: Troll turns back by two hours."""
    monkeypatch.setattr(ContextProxy, "timezone", property(lambda self: "Antarctica/Troll"))
    since = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    for minutes, expected in ((10, [2]), (45, [1, 2]), (60, [1, 2]), (240, [1, 2, 3, 4])):
        found = hours.on_the_wall(since, since + timedelta(minutes=minutes))
        assert [hour.hour for hour in found] == expected, minutes


@pytest.mark.parametrize(("name", "day", "odd"), DAYS, ids=str)
def test_a_day_is_as_long_as_it_was(
    monkeypatch: pytest.MonkeyPatch, name: str, day: date, odd: dict[str, int]
) -> None:
    """Neither a minute of the next one nor an hour that there was not; so is yesterday."""
    here = ZoneInfo(name)
    begin, end = (datetime.combine(one, time(), here) for one in (day, day + timedelta(days=1)))
    found = buckets.period(begin, end)
    assert (found.since, found.until) == (begin.astimezone(UTC), end.astimezone(UTC))
    halves = sum(odd.get(hour, 2) for hour in HOURS)
    assert found.until - found.since == halves * HALF
    assert screen.yesterday(end + timedelta(hours=8)) == (found.since, found.until)
