"""The keyboard reaches everything, times are the viewer's, and what others wrote is only text."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from playwright.sync_api import Page, expect

from aurora_sgl import rollout, store
from aurora_sgl.store import queries
from tests.pages.test_journeys import agree, ask
from tests.support.browser import PAGES, Viewer
from tests.support.dashboard_house import House

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Look = Callable[..., Viewer]
#: What has the focus: its role or kind, and its name.
FOCUS = """() => {
  const e = document.activeElement;
  return (e.getAttribute('aria-label') || e.innerText || e.textContent || e.tagName).trim();
}"""


def tabbed(page: Page, most: int = 70) -> list[str]:
    """Names of what the Tab key reaches, one after the other, from the top of the page."""
    page.evaluate("document.activeElement.blur()")
    found: list[str] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        found.append(str(page.evaluate(FOCUS)))
    return found


def test_the_keyboard_reaches_every_page_every_choice_and_every_action(
    house: House, look: Look
) -> None:
    page = look("ada", "versions?version=4").page
    reached = "\n".join(tabbed(page))
    own = ("Promote", "Pin", "Export", "Add note", "Add tags", "Take off", "Compare with version 3")
    for name in (*PAGES, "Log out", "Save view", "All versions", *own):
        assert re.search(rf"(?m)\b{name}$", reached), f"{name} is not reached:\n{reached}"
    for address, names in (
        ("training", ("Freeze", "Train now", "Switch off")),
        ("compare?a=3&b=4", ("Swap", "Origin and recipe")),
        ("worth", ("7 days",)),
    ):
        reached = "\n".join(tabbed(look("ada", address).page, 50))
        for name in names:
            assert re.search(rf"(?m)\b{name}$", reached), f"{name} is not reached:\n{reached}"
    page = look("ada").page
    with store.session(house.engine, write=False) as s:
        run = queries.runs.runs(s, house.group_id, limit=1)[0].id  # it failed
    assert re.search(rf"(?m)\bRun {run}$", "\n".join(tabbed(page)))
    page.get_by_test_id("stMain").get_by_role("link", name=f"Run {run}").focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"Run {run}: ✖ failed").wait_for()
    assert page.url.endswith(f"/training?run={run}")
    page = look("ada", "acceptance").page
    reached = "\n".join(tabbed(page))
    for name in ("24 hours", "by version", "Domain", "Version", "By position"):
        assert name in reached, f"{name} is not reached:\n{reached}"
    # What has the focus is seen to have it.
    page.get_by_role("radio", name="24 hours", exact=True).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    expect(page.get_by_role("radio", name="7 days", exact=True)).to_be_checked()


def test_times_are_of_the_viewer_s_zone_and_say_utc_on_hover(house: House, look: Look) -> None:
    page = look("ada", "audit").page
    with store.session(house.engine, write=False) as s:
        newest = queries.deployments.deployments(s, house.group_id, limit=1)[0].created_at
    when = page.get_by_role("table", name="entry").locator("time")
    there = datetime.fromisoformat(str(when.get_attribute("datetime")))
    assert abs((there - newest).total_seconds()) < 86_400 and there.tzinfo is not None
    here = there.astimezone(ZoneInfo("Europe/Zurich"))  # of the test's browser
    assert f"{here:%H:%M}" in when.inner_text()
    assert when.get_attribute("title") == f"{there.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    assert here.utcoffset() != there.astimezone(UTC).utcoffset()
    expect(page.get_by_test_id("stDataFrame")).to_be_visible()


def test_the_numbers_beneath_the_trend_come_as_a_csv_file(house: House, look: Look) -> None:
    page = look("ada", "acceptance?period=30+days").page
    page.get_by_role("tab", name="The same numbers").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    with Path(download.value.path()).open() as file:
        rows = list(csv.DictReader(file))
    with store.session(house.engine, write=False) as s:
        lengths = queries.accept_lengths.accept_length_by_version(s, house.group_id)
    for column in ("verify steps", "accepted"):
        wanted = sum(getattr(one, column.replace(" ", "_")) for one in lengths)
        assert sum(int(row[column]) for row in rows) == wanted
    assert all(datetime.fromisoformat(row["time"]).tzinfo == UTC for row in rows)


def test_a_switch_is_turned_with_a_reason_that_is_never_markup(house: House, look: Look) -> None:
    viewer = look("ada", "training")
    page = viewer.page
    picture = "quiet ![x](http://192.0.2.1/x.png) <img src=http://192.0.2.1/y.png>"
    expect(page.get_by_text("Learning: ✔ on")).to_be_visible()
    ask(page, "Switch off")
    agree(page, picture, "Switch off")
    expect(page.get_by_text("Learning is off.")).to_be_visible()
    expect(page.get_by_text("Learning: ✖ off")).to_be_visible()
    learning = next(s for s in rollout.switches.read(house.engine, "default"))
    assert (learning.on, learning.actor, learning.reason) == (False, "ada", picture)
    try:
        for name in ("Now", "Audit"):
            viewer.open(name)
            expect(page.get_by_test_id("stMain")).to_contain_text("quiet ![x](http")
            expect(page.get_by_test_id("stMain").locator("img")).to_have_count(0)
    finally:
        turn = rollout.switches.turn
        turn(house.engine, "default", "learning", True, actor="test", reason="as before")
    # The fixture holds afterwards that nothing but loopback was asked.
