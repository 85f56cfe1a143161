"""The dashboard beside a real server: what is served is seen, and what is decided is served."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from playwright.sync_api import expect

from aurora_sgl import store
from aurora_sgl.rollout.promote import rollback
from aurora_sgl.store import queries
from tests.e2e.conftest import Running, until
from tests.e2e.test_swap import a_relative
from tests.support import browser


def test_the_page_shows_traffic_as_it_runs_and_puts_a_version_live_in_the_server(
    server: Running, trained: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    before = server.live_version()
    version = a_relative(server, trained, tmp_path / "relative", 1.02)
    with store.session(server.engine, write=False) as s:
        sha256 = queries.versions.version(s, version).weights_sha256
    browser.add_accounts(server.home)
    server.generate(prompts[0], max_new_tokens=16)
    dashboard = browser.start(server.home)
    try:
        with browser.chromium() as chromium:
            viewer = browser.viewer(chromium, dashboard.url)
            viewer.log_in("ada")
            page = viewer.page
            # While a page is drawn anew, what it had may be there a moment longer: the last is new.
            trend = page.locator(".js-plotly-plot .scatterlayer").last
            expect(trend).to_be_visible()
            counted = (
                page.get_by_test_id("stMetric").filter(has_text="Tokens/s of all servers").last
            )
            shown = (counted.inner_text(), trend.inner_html())
            asked = itertools.cycle(prompts[1:4])

            def moved() -> bool:
                server.generate(next(asked), max_new_tokens=32)
                return counted.inner_text() != shown[0] and trend.inner_html() != shown[1]

            until(moved, 120, "throughput and trend to move")
            page.goto(f"{dashboard.url}/versions?version={version}")
            page.get_by_role("heading", name=re.compile(rf"^Version {version}\b")).wait_for()
            page.get_by_role("button", name="Promote", exact=True).click()
            dialog = page.get_by_role("dialog")
            expect(dialog).to_contain_text("never compared with another one")
            dialog.get_by_text("Promote it all the same").click()
            dialog.get_by_role("textbox", name="Reason").fill("seen from the page")
            dialog.get_by_role("button", name="Promote", exact=True).click()
            servers = page.get_by_role("table", name="what servers run")
            expect(servers).to_contain_text(sha256[:16])
            expect(servers).to_contain_text("as wanted")
    finally:
        dashboard.stop()
    assert server.live_version() == version
    until(lambda: server.row().live_sha256 == sha256, 30, "the hash of what was read back")
    rollback(server.engine, "default", actor="test", reason="as before", to=before)
    until(lambda: server.live_version() == before, 60, "the version before")
