"""How long the operator's page takes on a store of months: first paint and every interaction.

Makes 10 million acceptance events under 200 versions (once, see ``dashboard_data``), starts the
dashboard on them, and looks at it with a real Chromium. Aim: a page's first paint after a reload
(the browser's own first contentful paint), a page opened from another one until it is drawn whole,
and every interaction until its end, each within one second: the page ran, nothing of an earlier run
is left, and what was asked for is there. How long it takes until all of a page is drawn after a
reload is told too: most of it is Streamlit's own start in the browser.

    python -m benchmarks.dashboard --data /tmp/months
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from playwright.sync_api import expect

from aurora_sgl.console import print_cells
from benchmarks import dashboard_data
from tests.support import browser
from tests.support.browser import Viewer

AIM = 1.0
#: A dashboard that was just started reads sums over months in the background meanwhile.
WARM_SECONDS = 20
#: Without an aim of its own.
WHOLE = "all drawn after a reload"
PLOT = ".js-plotly-plot .main-svg"
#: What is on a page once it says what it is for.
FIRST = {
    "Now": "[data-testid=stMetric]",
    "Alerts": "h2, h3",
    "Acceptance": PLOT,
    "Versions": "[data-testid=stDataFrame] canvas",
    "Compare": ".aurora-table",
    "Training": "[data-testid=stDataFrame] canvas",
    "Worth": PLOT,
    "Requests": "[data-testid=stDataFrame] canvas",
    "SQL": "textarea",
    "Audit": "[data-testid=stDataFrame] canvas",
}


#: Counts the runs of the page from now on.
COUNT_RUNS = """() => {
  const app = document.querySelector('[data-testid=stApp]');
  window.auroraRuns = 0;
  window.auroraCount?.disconnect();
  window.auroraCount = new MutationObserver(() => {
    if (app.dataset.testScriptState !== 'notRunning') window.auroraRuns += 1;
  });
  window.auroraCount.observe(app, {attributeFilter: ['data-test-script-state']});
}"""
#: The page ran, nothing of an earlier run is left, and what is looked for is there. Asked with each
#: picture that the browser draws: Playwright's own waits ask twice a second only.
DRAWN = """wanted => {
  const seen = e => e.offsetParent !== null;
  const all = css => [...document.querySelectorAll(css)].filter(seen);
  return window.auroraRuns > 0
    && document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'
    && !all('[data-stale=true]').length && !all('[data-testid=stSkeleton]').length
    && wanted.every(([css, text]) => all(css).some(
      e => !text || e.textContent.trim().startsWith(text)));
}"""
#: Something is there, whatever else goes on.
THERE = """wanted => wanted.every(([css, text]) => [...document.querySelectorAll(css)].some(
  e => e.getClientRects().length && (!text || e.textContent.trim().startsWith(text))))"""
#: (selector, its text or "" for any)
Wanted = tuple[str, str]


class Clock:
    """Seconds of each thing that was done, by name."""

    def __init__(self, viewer: Viewer, processes: list[psutil.Process]) -> None:
        self.processes = processes
        self.viewer, self.page = viewer, viewer.page
        self.taken: dict[str, list[float]] = {}
        self.busy: dict[str, list[float]] = {}

    def time(self, name: str, act: Callable[[], object], *wanted: Wanted) -> None:
        """From the act, which makes the page run, until it is drawn and holds what that leads
        to."""
        self.viewer.ready()
        self.page.wait_for_timeout(300)
        self.page.evaluate(COUNT_RUNS)
        self._time(name, act, DRAWN, wanted)

    def _time(self, name: str, act: Callable[[], object], condition: str, arg: object) -> None:
        begun, busy = time.perf_counter(), self._cpu()
        act()
        self.page.wait_for_function(condition, arg=arg)
        self.taken.setdefault(name, []).append(time.perf_counter() - begun)
        self.busy.setdefault(name, []).append(self._cpu() - busy)

    def _cpu(self) -> float:
        """Seconds of CPU that the dashboard and the browser have used so far."""
        total = 0.0
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                total += used.user + used.system
        return total

    def open(self, name: str) -> None:
        link = self.page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True)
        self.time(f"{name}: open", link.click, ("h1", name), (FIRST[name], ""))

    def reload(self, name: str) -> None:
        self.viewer.ready()
        wanted = [("h1", name), (FIRST[name], "")]
        self._time(f"{name}: {WHOLE}", self.page.reload, THERE, wanted)
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        shown = f"{name}: first paint after a reload"
        self.taken.setdefault(shown, []).append(self.page.evaluate(paint) / 1000)

    def press(self, page: str, group: str, option: str) -> None:
        """A button of a row of them; over when the page has been drawn again."""
        button = self.page.get_by_role("radio", name=option, exact=True)
        checked = '[role=radio][aria-checked="true"]'
        self.time(f"{page}: {group} {option}", button.click, (checked, option))

    def tab(self, page: str, name: str, *wanted: Wanted) -> None:
        tab = self.page.get_by_role("tab", name=name, exact=True)
        chosen = '[role=tab][aria-selected="true"]'
        self.time(f"{page}: {name}", tab.click, (chosen, name), *wanted)

    def choose(self, page: str, label: str, option: str) -> None:
        box = self.page.get_by_role("combobox", name=label)
        box.click()
        box.fill(option)  # long lists draw only what is seen
        entry = self.page.get_by_role("option", name=option, exact=True)
        entry.wait_for()
        self.time(f"{page}: {label} {option}", entry.click)
        if self.page.get_by_role("listbox").count():  # of a multiselect: it hides all else
            self.page.keyboard.press("Escape")


def newest_request(store: Path) -> str:
    with sqlite3.connect(store) as db:
        return str(db.execute("SELECT max(id) FROM request").fetchone()[0])


def contents(store: Path) -> str:
    """What the store holds, in words."""
    with sqlite3.connect(store) as db:
        events, versions = (
            db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("acceptance_event", "drafter_version")
        )
    return f"{events:,} events, {versions:,} versions"


def look(clock: Clock, store: Path) -> None:
    """Every page, and everything that can be chosen on it."""
    page = clock.page
    for name in (*browser.PAGES[1:], browser.PAGES[0]):
        clock.open(name)
    for name in browser.PAGES:
        clock.viewer.open(name)
        clock.reload(name)
    clock.viewer.open("Acceptance")
    for period in ("1 hour", "6 hours", "7 days", "30 days"):
        clock.press("Acceptance", "period", period)
    for lines in ("by domain", "all together", "by version"):
        clock.press("Acceptance", "30 days,", lines)
    clock.choose("Acceptance", "Domain", "code")
    for tab in ("Per step", "Domain by hour", "The same numbers", "Versions at equal draft shape"):
        clock.tab("Acceptance", tab)
    clock.choose("Acceptance", "Compare with", "version 190")
    clock.viewer.open("Versions")
    clock.tab("Versions", "Lineage", (PLOT, ""))
    clock.tab("Versions", "All versions", (FIRST["Versions"], ""))
    clock.choose("Versions", "Version", "120")
    clock.time(
        "Versions: ask to promote",
        page.get_by_role("button", name="Promote", exact=True).click,
        ('[role=dialog] input[aria-label="Reason"]', ""),
    )
    page.keyboard.press("Escape")
    clock.viewer.open("Compare")
    for tab in ("Replay", "Served", "By position", "Requests"):
        clock.tab("Compare", tab)
    clock.viewer.open("Worth")
    for period in ("30 days", "90 days"):
        clock.press("Worth", "period", period)
    clock.viewer.open("Requests")
    for period in ("15 minutes", "7 days", "ever"):
        clock.press("Requests", "period", period)
    clock.choose("Requests", "Version", "3")
    field = page.get_by_role("textbox", name="Or one request")
    number = newest_request(store)
    field.fill(number)
    clock.time(
        "Requests: one by its number", lambda: field.press("Enter"), ("h2, h3", f"Request {number}")
    )
    clock.viewer.open("SQL")
    example = "Who put what live, and why?"
    clock.choose("SQL", "Examples", example)
    expect(page.get_by_role("textbox", name="Statement")).to_have_value(re.compile("SELECT"))
    clock.time(
        "SQL: run the example", page.get_by_role("button", name="Run").click,
        ('[data-testid=stDataFrame] canvas', ""),
    )  # fmt: skip
    clock.viewer.open("Audit")
    clock.choose("Audit", "What", "rollback")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/tmp/aurora-months"))
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.data.mkdir(parents=True, exist_ok=True)
    store = given.data / "aurora.db"
    if not store.exists():
        dashboard_data.build(store, given.events, given.versions)
    browser.add_accounts(given.data)
    dashboard = browser.start(given.data)
    try:
        with browser.chromium() as chromium:
            viewer = browser.viewer(chromium, dashboard.url)
            viewer.log_in("ada")
            everything = psutil.Process().children(recursive=True)
            everything += [psutil.Process(dashboard.process.pid)]
            viewer.page.wait_for_timeout(1000 * WARM_SECONDS)
            clock = Clock(viewer, list({one.pid: one for one in everything}.values()))
            try:
                for _ in range(given.rounds):
                    look(clock, store)
            finally:
                report(clock, contents(store), given.json)
    finally:
        dashboard.stop()


def report(clock: Clock, held: str, as_json: bool) -> None:
    taken = clock.taken
    if as_json:
        print(json.dumps({"seconds": taken, "cpu_seconds": clock.busy}, indent=2))
        return
    headings = ("what", "first", "median", "slowest", "CPU", f"within {AIM:.0f} s")
    cells = []
    for name, seconds in taken.items():
        slowest = max(seconds)
        busy = clock.busy.get(name)
        said = "" if name.endswith(WHOLE) else "yes" if slowest <= AIM else "no"
        cells.append([
            name, f"{seconds[0]:.2f}", f"{statistics.median(seconds):.2f}", f"{slowest:.2f}",
            f"{statistics.median(busy):.2f}" if busy else "", said,
        ])  # fmt: skip
    print_cells(f"Dashboard on {held} (seconds)", headings, cells, [h != "what" for h in headings])


if __name__ == "__main__":
    main()
