"""Every page, drawn in light and dark: nothing is cut, nothing is empty without a word, and
axe-core finds nothing serious.

The pictures lie in the folder ``AURORA_PICTURES`` afterwards (default: pytest's own).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support import page_labels as labels
from tests.support.accessibility import serious
from tests.support.browser import PAGES, Viewer
from tests.support.dashboard_house import House

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: Parts of a page that are wider, or higher, than what is seen of them.
CUT = """() => {
  const found = [];
  const main = document.querySelector('[data-testid=stMain]');
  for (const e of [main, ...main.querySelectorAll('.aurora-scroll, .aurora-table th, button, p,'
      + ' [data-testid=stMetricLabel], [data-testid=stMetricValue]')]) {
    if (e.scrollWidth > e.clientWidth + 2 && getComputedStyle(e).display !== 'inline')
      found.push(e.tagName + ': ' + e.textContent.slice(0, 60));
  }
  const title = main.querySelector('h1').getBoundingClientRect();
  const head = document.querySelector('[data-testid=stHeader]');
  if (head && title.top < head.getBoundingClientRect().bottom) found.push('the title');
  return found;
}"""
#: The page's background is that of the theme.
THEME = """theme => {
  const css = getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor;
  return (Number(css.match(/\\d+/)[0]) < 128) === (theme === 'dark');
}"""
TABS = (
    "By position",
    "Per step",
    "Domain by hour",
    "Versions at equal draft shape",
    "The same numbers",
)


def shoot(viewer: Viewer, folder: Path, name: str) -> None:
    page = viewer.page
    page.set_viewport_size({"width": 1400, "height": 900})
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": 1400, "height": max(900, height + 10)})
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
        page.wait_for_function(THEME, arg=theme)
        viewer.settled()
        page.screenshot(path=folder / f"{name}-{theme}.png")
        assert (theme, serious(page)) == (theme, [])
    page.set_viewport_size({"width": 1400, "height": 900})


def whole(viewer: Viewer) -> None:
    """Fails with what is cut. While a part is drawn anew it may be wider for a moment."""
    for _ in range(20):
        viewer.settled()
        cut = viewer.page.evaluate(CUT) + labels.cut(viewer.page)
        if not cut:
            return
        viewer.page.wait_for_timeout(500)
    assert cut == []


def whole_everywhere(viewer: Viewer) -> None:
    for width in labels.WIDTHS:
        viewer.page.set_viewport_size({"width": width, "height": 900})
        whole(viewer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = os.environ.get("AURORA_PICTURES")
    made = Path(found) if found else tmp_path_factory.mktemp("pictures")
    made.mkdir(parents=True, exist_ok=True)
    return made


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_drawn_whole_in_both_themes(
    house: House, look: Callable[..., Viewer], folder: Path, name: str
) -> None:
    viewer = look("ada", "" if name == "Now" else name.lower())
    page = viewer.page
    if name == "SQL":
        viewer.choose("Examples", "For whom did it get better?")
        expect(page.get_by_role("textbox", name="Statement")).to_have_value(re.compile("SELECT"))
        page.get_by_role("button", name="Run").click()
        expect(page.get_by_text("rows in")).to_be_visible()
    elif name == "Versions":
        page.goto(f"{viewer.url}/versions?version=4")
        page.get_by_role("heading", name="Version 4").wait_for()
    whole_everywhere(viewer)
    expect(page.get_by_test_id("stException")).to_have_count(0)
    if name != "Training":  # there a failed run is told in red
        expect(page.get_by_test_id("stAlertContentError")).to_have_count(0)
    shoot(viewer, folder, name.lower())
    if name == "Acceptance":
        for number, tab in enumerate(TABS[1:], 2):
            page.get_by_role("tab", name=tab).click()
            expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
            whole_everywhere(viewer)
            shoot(viewer, folder, f"acceptance-{number}")
    if name == "Versions":
        page.get_by_role("tab", name="Lineage").click()
        expect(page.locator(".js-plotly-plot")).to_be_visible()
        whole_everywhere(viewer)
        shoot(viewer, folder, "lineage")
        page.get_by_role("button", name="Promote", exact=True).click()
        page.get_by_role("dialog").get_by_role("textbox", name="Reason").wait_for()
        shoot(viewer, folder, "promote")
    page.emulate_media(color_scheme="light")
