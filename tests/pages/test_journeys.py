"""What people do with the dashboard, in a real browser on a real store."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from aurora_sgl import rollout, store
from aurora_sgl.rollout import status
from aurora_sgl.store import queries
from tests.pages.conftest import only_loopback
from tests.support import browser
from tests.support.browser import PAGES, PASSWORDS, Dashboard, Viewer
from tests.support.dashboard_house import House

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

Look = Callable[..., Viewer]


def ask(page: Page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()
    page.get_by_role("dialog").wait_for()


def agree(page: Page, reason: str, button: str) -> None:
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("textbox", name="Reason").fill(reason)
    dialog.get_by_role("button", name=button, exact=True).click()


def test_the_first_start_prints_a_link_that_makes_the_first_operator_once(
    tmp_path: Path, chromium: Browser
) -> None:
    dashboard = browser.start(tmp_path)
    try:
        assert dashboard.setup is not None
        _first_login(chromium, dashboard, dashboard.setup)
        # PyTorch would be a third of the start.
        assert "libtorch" not in Path(f"/proc/{dashboard.process.pid}/maps").read_text()
    finally:
        dashboard.stop()


def _first_login(chromium: Browser, dashboard: Dashboard, setup: str) -> None:
    viewer = browser.viewer(chromium, dashboard.url)
    page = viewer.page
    page.goto(dashboard.url)
    expect(page.get_by_text("Nobody has an account yet")).to_be_visible()
    page.goto(setup)
    page.get_by_role("textbox", name="Name").fill("Grace")
    page.get_by_role("textbox", name="Password", exact=True).fill("a long enough one")
    page.get_by_role("textbox", name="Password again").fill("a long enough two")
    page.get_by_role("button", name="Make the account").click()
    expect(page.get_by_text("the two passwords differ")).to_be_visible()
    page.get_by_role("textbox", name="Password again").fill("a long enough one")
    page.get_by_role("button", name="Make the account").click()
    expect(page.get_by_text("grace (operator: may act)")).to_be_visible()
    # The store is new: the page says so, and what to do.
    expect(page.get_by_text("aurora-sgl db upgrade")).to_be_visible()
    viewer.keeps_login()
    page.reload()
    expect(page.get_by_text("grace (operator: may act)")).to_be_visible()

    other = browser.viewer(chromium, dashboard.url).page
    other.goto(setup)
    expect(other.get_by_text("This one-time link was used already")).to_be_visible()
    other.get_by_role("textbox", name="Name").fill("grace")
    other.get_by_role("textbox", name="Password").fill("a wrong guess")
    slowed, wrong = (other.get_by_text(text) for text in ("too many failed logins", "wrong"))
    end = time.monotonic() + 90
    while time.monotonic() < end:  # a click while the last one is being answered may not count
        other.get_by_role("button", name="Log in").click()
        expect(slowed.or_(wrong).first).to_be_visible()
        if slowed.is_visible():
            break
        other.wait_for_timeout(300)
    expect(slowed).to_contain_text("try again in")

    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("button", name="Log in")).to_be_visible()
    viewer.keeps_login(False)
    page.goto(f"{dashboard.url}/audit")
    expect(page.get_by_role("button", name="Log in")).to_be_visible()
    only_loopback(viewer)
    viewer.context.close()
    other.context.close()


def test_an_operator_promotes_a_version_and_sees_the_servers_follow(
    house: House, look: Look
) -> None:
    viewer = look("ada", "versions?version=4")
    page = viewer.page
    ask(page, "Promote")
    dialog = page.get_by_role("dialog")
    change = dialog.get_by_role("table", name="change")
    expect(change).to_contain_text("live")
    expect(change).to_contain_text("version 3")
    expect(change).to_contain_text("version 4")
    expect(dialog.get_by_role("table", name="evidence")).to_contain_text("pass")
    expect(dialog.get_by_role("table", name="evidence")).to_contain_text(re.compile("(min|h) ago"))
    expect(dialog).to_contain_text("gpu-1:30000, gpu-2:30000")
    agree(page, "  ", "Promote")
    expect(dialog.get_by_text("Say why first.")).to_be_visible()
    assert house.live() == 3
    # By the keyboard alone: the reason, and Enter.
    dialog.get_by_role("textbox", name="Reason").focus()
    page.keyboard.type("better on code")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Version 4 is live (generation")).to_be_visible()
    assert house.live() == 4
    with store.session(house.engine, write=False) as s:
        row = queries.deployments.deployments(s, house.group_id, limit=1)[0]
    assert (row.actor, row.reason, row.action) == ("ada", "better on code", "promote")
    assert row.evidence["verdict"] == "pass" and row.evidence["age_seconds"] > 60
    servers = page.get_by_role("table", name="what servers run")
    expect(servers).to_contain_text("version 4 is on its way")
    house.servers_follow()
    expect(servers).to_contain_text(house.version(4).weights_sha256[:16])
    expect(servers).not_to_contain_text("on its way")
    viewer.open("Audit")
    expect(page.get_by_role("heading", name="Promote: version 3 → version 4")).to_be_visible()
    expect(page.get_by_role("table", name="entry")).to_contain_text("better on code")


def test_a_stale_page_is_refused_whether_the_dialog_was_open_or_not(
    house: House, look: Look
) -> None:
    page = look("ada", "versions?version=2").page
    rollout.promote(house.engine, 4, actor="cli", reason="meanwhile", force=True)
    ask(page, "Promote")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("expected version 3 to be live, but version 4 is")
    expect(dialog.get_by_role("textbox", name="Reason")).not_to_be_visible()
    page.keyboard.press("Escape")
    page.reload()
    page.get_by_role("heading", name="Version 2").wait_for()
    ask(page, "Promote")
    expect(dialog.get_by_role("table", name="change")).to_contain_text("version 4")
    rollout.rollback(house.engine, "default", actor="cli", reason="meanwhile again")
    dialog.get_by_text("Promote it all the same").click()
    expect(dialog).to_contain_text("expected version 4 to be live, but version 3 is")
    assert house.live() == 3


def test_an_operator_rolls_back_pins_and_exports(house: House, look: Look) -> None:
    page = look("ada", "versions?version=3").page
    ask(page, "Pin")
    agree(page, "known good", "Pin")
    expect(page.get_by_text("Version 3 is pinned.")).to_be_visible()
    assert house.version(3).pinned
    ask(page, "Export")
    agree(page, "a copy for the lab", "Prepare the archive")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    packed = Path(download.value.path())
    assert packed.read_bytes()[:2] == b"PK" and b"model.safetensors" in packed.read_bytes()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    ask(page, "Roll back")
    change = page.get_by_role("dialog").get_by_role("table", name="change")
    expect(change).to_contain_text("version 2")
    agree(page, "slower at night", "Roll back")
    expect(page.get_by_text("Version 2 is live again")).to_be_visible()
    assert house.live() == 2
    audit = status.audit(house.engine, "default")
    assert [(row.actor, row.action, row.reason) for row in audit[:2]] == [
        ("ada", "export", "a copy for the lab"),
        ("ada", "pin", "known good"),
    ]


def test_a_viewer_looks_at_every_page_and_can_act_on_none(house: House, look: Look) -> None:
    viewer = look("vera")
    page = viewer.page
    for name in PAGES:
        viewer.open(name)
        for action in ("Promote", "Roll back", "Pin", "Export", "Switch off", "Train now"):
            expect(page.get_by_role("button", name=action, exact=True)).to_have_count(0)
        expect(page.get_by_test_id("stException")).to_have_count(0)
    viewer.open("Requests")
    shown = page.locator(".aurora-text .aurora-token").all_inner_texts()
    assert shown and set(shown) <= set("■◆●·")
    expect(page.get_by_text("is shown to operators only")).to_be_visible()
    viewer.open("SQL")
    answer = run(page, "SELECT count(*) AS n, count(draft_tokens) AS seen FROM acceptance_event")
    expect(answer).to_contain_text("1 row in")
    run(page, "UPDATE alias SET version_id = 5")
    expect(page.get_by_text("refused")).to_be_visible()
    assert house.live() == 3


def run(page: Page, statement: str) -> Page:
    page.get_by_role("textbox", name="Statement").fill(statement)
    page.keyboard.press("Control+Enter")
    return page.get_by_test_id("stMain")  # type: ignore[return-value]


def test_the_sql_page_reads_and_refuses_to_write(house: House, look: Look) -> None:
    viewer = look("ada", "sql")
    page = viewer.page
    for statement, said in {
        "DELETE FROM audit": "this page only reads",
        "PRAGMA writable_schema = 1": "this page only reads",
        "ATTACH '/tmp/x.db' AS x": "this page only reads",
        "SELECT sql FROM sqlite_master": "only the public tables and views",
        "SELECT 1; DELETE FROM alias": "one statement at a time",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n":
            "stopped after 5 s",
    }.items():  # fmt: skip
        run(page, statement)
        expect(page.get_by_test_id("stAlert")).to_contain_text(said)
    viewer.choose("Examples", "Accept length by version")
    # Not what was typed before, which has a SELECT in it too.
    expect(page.get_by_role("textbox", name="Statement")).to_have_value(re.compile("^SELECT draft"))
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_text("3 rows in")).to_be_visible()
    page.get_by_role("tab", name="Chart").click()
    expect(page.locator(".js-plotly-plot")).to_be_visible()
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 1000000)"
    run(page, f"{numbers} SELECT i FROM n")
    expect(page.get_by_text("these are the first 1,000")).to_be_visible()


def test_a_statement_is_run_once_by_the_keyboard_and_by_the_button(
    house: House, look: Look
) -> None:
    viewer = look("ada", "sql")
    page, sent = viewer.page, list[bytes | str]()
    page.on(
        "websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame))
    )  # playwright marks handlers: no built-in
    page.reload()
    viewer.ready()
    for number, how in enumerate(("keyboard", "button")):
        statement = f"SELECT 41 + {number} AS n"
        if how == "keyboard":
            run(page, statement)
        else:
            page.get_by_role("textbox", name="Statement").fill(statement)
            page.get_by_role("button", name="Run").click()
        expect(page.get_by_text("1 row in")).to_be_visible()
        page.wait_for_timeout(300)
        asked = [frame for frame in sent if statement in str(frame)]
        assert len(asked) == 1, how


def test_tokens_of_a_request_are_coloured_by_what_they_were(house: House, look: Look) -> None:
    page = look("ada", "requests").page
    name = page.get_by_role("heading", name=re.compile("^Request "), level=3).inner_text()
    request_id = int(re.search(r"Request (\d+)", name).group(1))  # type: ignore[union-attr]
    with store.session(house.engine, write=False) as s:
        events = queries.events.events(s, request_id)
    expected = []
    for event in events:
        expected += ["accepted"] * event["accepted"]
        expected.append("correction" if event["first_rejected_at"] else "bonus")
    assert {"accepted", "correction", "bonus"} == set(expected)
    shown = page.locator(".aurora-text .aurora-token")
    kinds = [value.split()[1] for value in shown.evaluate_all("all => all.map(e => e.className)")]
    assert kinds == expected
    backgrounds = {
        kind: page.locator(f".aurora-text .aurora-token.{kind}").first.evaluate(
            "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).borderBottomStyle]"
        )
        for kind in ("accepted", "correction", "bonus")
    }
    assert len({colour for colour, _ in backgrounds.values()}) == 3
    assert len({line for _, line in backgrounds.values()}) == 3  # not by colour alone
    step = page.locator(".aurora-step").first
    step.focus()  # the keyboard reaches what was proposed
    tip = step.locator(".aurora-tip")
    expect(tip).to_be_visible()
    expect(tip).to_contain_text("depth 1")
    box, view = tip.bounding_box(), page.viewport_size
    assert box and view and box["x"] >= 0 and box["x"] + box["width"] <= view["width"]
    assert box["y"] >= 0 and box["y"] + box["height"] <= view["height"]


def test_it_listens_on_loopback_and_serves_no_page_of_another_site(running: Dashboard) -> None:
    listening = {
        connection.laddr.ip
        for connection in psutil.Process(running.process.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    upgrade = {
        "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    for other in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        stream = httpx.get(f"{running.url}/_stcore/stream", headers={**upgrade, **other})
        assert stream.status_code == 403, other


def test_the_password_file_is_not_among_what_the_page_serves(
    running: Dashboard, look: Look
) -> None:

    for path in ("accounts.db", "dashboard/accounts.db", "static/accounts.db", "session"):
        answer = httpx.get(f"{running.url}/app/static/../{path}")
        assert b"argon2" not in answer.content
    refused = httpx.post(f"{running.url}/session", content="guess")
    assert refused.status_code == 403
    headers = {"x-aurora-dashboard": "1"}
    assert httpx.post(f"{running.url}/session", content="x", headers=headers).status_code == 403
    page = look("vera").page
    cookie = next(c for c in page.context.cookies() if c["name"].startswith("aurora_session"))
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert PASSWORDS["vera"] not in page.content()
