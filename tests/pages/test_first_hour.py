"""The pages of a server that is eight minutes old, with two promotions and a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from streamlit.testing.v1 import AppTest

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.store import queries
from aurora_sgl.store.liveness import training_lease_name
from aurora_sgl.store.models import Deployment
from dashboard.screens import acceptance
from tests.pages.test_pages import draw, said
from tests.support import browser
from tests.support import dashboard_house as samples
from tests.support import page_labels as labels
from tests.support.browser import PAGES
from tests.support.dashboard_house import House

Use = Callable[..., None]
MINUTE = timedelta(minutes=1)
PERIODS = ("1 hour", "24 hours", "7 days", "30 days")


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = samples.first_hour(tmp_path_factory.mktemp("young"))
    browser.add_accounts(house.home)
    yield house
    house.engine.dispose()


@pytest.fixture
def at_home(young: House, settings_of: Use) -> House:
    settings_of(young.home)
    young.servers_follow()
    return young


# -- pictures ------------------------------------------------------------------------------------


def figure(app: AppTest, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(app.get("plotly_chart")[index].proto.spec)
    return found


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def lines(drawn: dict[str, Any]) -> dict[str, list[datetime]]:
    """Where the points of each line lie."""
    return {
        trace["name"]: [moment(x) for x, y in zip(trace["x"], trace["y"], strict=True)
                        if y is not None]
        for trace in drawn["data"] if trace.get("mode") == "lines+markers"
    }  # fmt: skip


def steps(house: House) -> dict[str, list[datetime]]:
    """When each version made its steps, as the store has it; and all of them."""
    found: dict[str, list[datetime]] = {}
    with store.reading(house.engine) as connection:
        rows = connection.exec_driver_sql("SELECT drafter_version_id, at FROM acceptance_event")
        for version, at in rows:
            when = datetime.fromisoformat(at).replace(tzinfo=UTC)
            for name in (f"version {version}", "all together", "all domains"):
                found.setdefault(name, []).append(when)
    return found


def deployments(house: House) -> list[Deployment]:
    with store.session(house.engine, write=False) as s:
        return list(queries.deployments.deployments(s, house.group_id))


def holds(drawn: dict[str, Any], house: House) -> None:
    """Points and promotions lie where things happened, and the axis is as long as they are."""
    served, found = steps(house), lines(drawn)
    for name, points in found.items():
        first, last = min(served[name]), max(served[name])
        assert all(first <= point <= last for point in points), name
        middles = [point.replace(second=0, microsecond=0) + MINUTE / 2 for point in points]
        assert points[1:-1] == middles[1:-1], name
        minutes = {at.replace(second=0, microsecond=0) for at in served[name]}
        assert len(points) == len(minutes), name
    signs = [x for trace in drawn["data"] if trace.get("name") == "promoted" for x in trace["x"]]
    assert sorted(map(moment, signs)) == sorted(row.created_at for row in deployments(house))
    begin, end = map(moment, drawn["layout"]["xaxis"]["range"])
    everything = [*map(moment, signs), *(point for points in found.values() for point in points)]
    assert begin < min(everything) and max(everything) < end
    assert end - begin < 1.2 * (max(everything) - min(everything)) + MINUTE


def test_on_now_points_lie_in_the_minutes_that_were_served(at_home: House) -> None:
    drawn = figure(draw(at_home.home, "Now"))
    assert len(lines(drawn)["all domains"]) >= 7
    holds(drawn, at_home)


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("split", [acceptance.ALL, acceptance.BY_VERSION])
def test_on_acceptance_too_whatever_period_is_chosen(
    at_home: House, period: str, split: str
) -> None:
    drawn = figure(draw(at_home.home, "Acceptance", period=period, lines=split))
    wanted = ["all together"] if split == acceptance.ALL else [f"version {i}" for i in (1, 2, 3)]
    assert list(lines(drawn)) == wanted
    holds(drawn, at_home)
    # No version has a point before it went live.
    live = {f"version {row.version_id}": row.created_at for row in deployments(at_home)}
    for name, points in lines(drawn).items():
        assert name not in live or min(points) > live[name]


# -- words ---------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    """Holds that every element is closed, and finds text that was markup."""

    EMPTY = frozenset({"br", "img", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("page", PAGES)
def test_no_markup_is_cut_or_shown_as_text(at_home: House, page: str) -> None:
    app = draw(at_home.home, page)
    for body in [element.proto.body for element in app.get("html")]:
        parser = Balanced()
        parser.feed(body)
        parser.close()
        assert parser.open == []
        for sign in ("<time", "title=", "tabindex", "</", "&lt;"):
            text = parser.text.replace(samples.LONG, "").replace(samples.NOTICE, "")
            assert sign not in text


def test_a_run_that_goes_on_says_since_when_from_where_and_how_far_it_is(at_home: House) -> None:
    samples.goes_on(at_home, 4)
    app = draw(at_home.home, "Training")
    words = said(app)
    told = words.partition("Run 4 (requests) goes on for ")[2]
    assert told.startswith("<time ") and "</time>, from version 3, on 43 requests." in told[:220]
    assert 'role="progressbar"' in words and 'aria-valuenow="30"' in words
    assert "Training, 120 of 400 updates. About 2 min left of this stage; " in words
    assert "of the whole run: not told yet." in words
    curves = [figure(app, index)["data"][0] for index in (0, 1)]
    assert [(one["name"], len(one["x"])) for one in curves] == [
        ("objective (loss)", 120), ("held-out accept length", 2),
    ]  # fmt: skip
    assert "Its curves are above, as they come." in words
    words = said(draw(at_home.home, "Now"))
    assert "Training, 120 of 400 updates" in words
    assert "version 3: 0 of 3 windows, the first one is open" in words, "its watch"
    samples.goes_on(at_home, 4, stage="gate", done=12, total=40, seconds_left=240.0)
    assert (
        "Gate: replaying held-out requests, 12 of 40 requests replayed. About 4 min left."
        in said(draw(at_home.home, "Training"))
    )


def test_a_run_whose_trainer_is_gone_does_not_look_as_if_it_went_on(at_home: House) -> None:
    old = (utc_now() - timedelta(seconds=50)).isoformat()
    samples.goes_on(at_home, 4, updated_at=old)
    words = said(draw(at_home.home, "Training"))
    assert "It has said nothing lately" in words and "min left" not in words
    with store.session(at_home.engine) as s:
        name = training_lease_name(at_home.group_id)
        held = queries.leases.lease(s, name)
        assert held is not None
        queries.leases.release_lease(s, name, held.holder, held.token)
    app = draw(at_home.home, "Training")
    words = said(app)
    assert "Run 4 (requests) was not heard of since <time" in words
    assert "its trainer is gone" in words and 'role="progressbar"' not in words
    assert not app.button(key="train now").disabled, "another one may begin"
    samples.goes_on(at_home, 4)


def test_what_a_server_says_is_wrong_is_an_alert_with_its_name(at_home: House) -> None:
    (told,) = [element.value for element in draw(at_home.home, "Now").warning]
    assert told.startswith("Server 127.0.0.1:30000: The headers of clients are lost")
    assert r"\<b\>nothing\</b\>" in told  # literal


def test_why_a_version_was_not_judged_is_said_with_what_can_be(at_home: House) -> None:
    app = draw(at_home.home, "Versions", version=4)
    words = said(app)
    assert f"Why it was not judged: {samples.UNJUDGED}." in words
    assert any(
        caption.value.startswith("Now ") and "held-out requests can be judged" in caption.value
        for caption in app.caption
    )
    table = app.dataframe[0].value
    assert dict(zip(table["version"], table["why not"], strict=True)) == {
        4: samples.UNJUDGED, 3: "", 2: "", 1: "",
    }  # fmt: skip
    passed = said(draw(at_home.home, "Versions", version=3))
    assert "Why it" not in passed and "It rests on 60 held-out requests" in passed
    assert "left out: 3 rejection sampling" in passed


def test_now_says_why_the_newest_candidate_is_not_live(at_home: House) -> None:
    assert f"Version 4: not judged: {samples.UNJUDGED}" in said(draw(at_home.home, "Now"))


def test_a_request_without_limits_says_that_they_are_off(at_home: House) -> None:
    words = said(draw(at_home.home, "Requests"))
    assert "max_new_tokens 64, min_p off, temperature 0.7, top_k off, top_p off" in words
    assert str(1 << 30) not in words


# -- in a browser --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_labels_of_charts_are_whole_on_telephone_tablet_and_desk(
    young: House, chromium: Browser
) -> None:
    young.servers_follow()
    dashboard = browser.start(young.home)
    try:
        viewer = browser.viewer(chromium, dashboard.url)
        viewer.let_in(young.home, "ada")
        with young.heard_of():
            for where in ("", "acceptance?lines=by+domain&tab=Domain+by+hour"):
                viewer.page.goto(f"{dashboard.url}/{where}")
                expect(viewer.page.locator(".js-plotly-plot").first).to_be_visible()
                for width in labels.WIDTHS:
                    viewer.page.set_viewport_size({"width": width, "height": 900})
                    viewer.settled()
                    assert labels.cut(viewer.page) == [], (where, width)
        viewer.context.close()
    finally:
        dashboard.stop()
