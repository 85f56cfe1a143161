"""A staged rollout and a freeze, begun, watched and ended by an operator in a real browser."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta

import pytest
from playwright.sync_api import expect

from aurora_sgl import clock, store
from aurora_sgl.rollout import freezes, stages, status
from aurora_sgl.store import queries
from aurora_sgl.store.models import RolloutStage
from tests.pages.test_journeys import agree, ask
from tests.support.browser import Viewer
from tests.support.dashboard_house import House

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

Look = Callable[..., Viewer]


def wanted(house: House) -> dict[str, int | None]:
    return {row.name: row.wanted_version_id for row in status.servers(house.engine, "default")}


def runs(house: House, server: str, version_id: int) -> None:
    """The server says so, as after a swap."""
    sha256 = house.version(version_id).weights_sha256
    with store.session(house.engine) as s:
        row = next(row for row in queries.servers.servers(s, house.group_id) if row.name == server)
        queries.servers.touch_server(s, row.id, live_version_id=version_id, live_sha256=sha256)


def test_an_operator_stages_a_version_watches_it_and_continues_or_aborts(
    house: House, look: Look
) -> None:
    viewer = look("ada", "versions?version=4")
    page = viewer.page
    for last in ("abort", "continue"):
        page.goto(f"{viewer.url}/versions?version=4")
        ask(page, "Promote")
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("Some servers first", exact=True).click()
        expect(dialog).to_contain_text("gpu-1:30000 first, judged by live traffic against gpu-2")
        servers = dialog.get_by_role("textbox", name="Servers")
        servers.fill("2")
        servers.press("Enter")
        expect(dialog).to_contain_text("needs another server to be judged against")
        servers.fill("gpu-2:30000")
        servers.press("Enter")
        expect(dialog).to_contain_text("gpu-2:30000 first, judged by live traffic against gpu-1")
        expect(dialog.get_by_text("being watched since its promotion")).to_be_visible()
        dialog.get_by_text("Promote it all the same").click()
        agree(page, "one server first", "Promote")
        expect(page.get_by_text("Version 4 goes to gpu-2:30000 first")).to_be_visible()
        assert house.live() == 3 and wanted(house) == {"gpu-1:30000": 3, "gpu-2:30000": 4}
        expect(page.get_by_text("Staged: version 4")).to_be_visible()
        expect(page.get_by_text("It is on its way to gpu-2:30000.")).not_to_be_visible()
        stages.tick(house.engine, house.group_id)
        expect(page.get_by_text("It is on its way to gpu-2:30000.")).to_be_visible()
        if last == "abort":
            ask(page, "Abort")
            agree(page, "slower at night", "Abort")
            expect(page.get_by_text("Version 4 is taken back")).to_be_visible()
            expect(page.get_by_text("Staged: version 4")).not_to_be_visible()
            assert set(wanted(house).values()) == {3}
    runs(house, "gpu-2:30000", 4)
    now = clock.utc_now()
    with house.together():
        rng = random.Random(5)
        for at in range(40):
            moment = now + timedelta(seconds=at)
            for boot, version in ((77, 3), (78, 4)):
                house.serve(moment, version, boot=boot, steps=20, quality=0.6, rng=rng)
    stages.tick(house.engine, house.group_id, now=now + timedelta(hours=1))
    windows = page.get_by_role("table", name="windows of the stage")
    expect(windows).to_contain_text("accept length")
    with store.session(house.engine, write=False) as s:
        stage = queries.stages.stages(s, house.group_id, limit=1)[0]
    assert stage.status in ("running", "passed") and stage.windows, stage.outcome
    viewer.open("Now")
    expect(page.get_by_role("table", name="what comes next")).to_contain_text(
        "version 4 on gpu-2:30000"
    )
    viewer.open("Versions")
    ask(page, "Continue to the rest")
    dialog = page.get_by_role("dialog")
    if stage.status == "running":
        dialog.get_by_text("Continue all the same").click()
    agree(page, "as good as the others", "Continue")
    expect(page.get_by_text("Version 4 is live (generation")).to_be_visible()
    assert house.live() == 4 and set(wanted(house).values()) == {4}
    viewer.open("Audit")
    for action in ("stage start", "stage abort", "stage continue"):
        assert action in [row.action.replace("_", " ") for row in
                          status.audit(house.engine, "default", limit=20)]  # fmt: skip
    with store.session(house.engine) as s:
        for row in s.query(RolloutStage):
            s.delete(row)


def test_a_viewer_sees_a_stage_and_can_do_nothing_about_it(house: House, look: Look) -> None:
    stages.start(house.engine, 4, "1", actor="ada", reason="<b>first</b>", force=True)
    try:
        page = look("vera", "versions").page
        expect(page.get_by_text("Staged: version 4")).to_be_visible()
        expect(page.get_by_text("by ada: <b>first</b>")).to_be_visible()
        for name in ("Continue to the rest", "Abort"):
            expect(page.get_by_role("button", name=name)).not_to_be_visible()
    finally:
        stages.abort(house.engine, "default", actor="test", reason="over")


def test_an_operator_freezes_and_lifts(house: House, look: Look) -> None:
    page = look("ada", "training").page
    expect(page.get_by_text("None: what passes may go live by itself.")).to_be_visible()
    ask(page, "Freeze")
    agree(page, "release week", "Freeze")
    expect(page.get_by_text("Nothing goes live by itself until")).to_be_visible()
    expect(page.get_by_text("❄ Frozen")).to_be_visible()
    row = freezes.current(house.engine, "default")
    assert row is not None and (row.actor, row.reason) == ("ada", "release week")
    assert timedelta(hours=23) < row.ends_at - row.starts_at <= timedelta(hours=25)
    ask(page, "Lift")
    agree(page, "the release is out", "Lift")
    expect(page.get_by_text("The freeze is lifted.")).to_be_visible()
    assert freezes.current(house.engine, "default") is None
