"""What people keep beside the numbers: notes and tags, who takes an alert, saved views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from playwright.sync_api import expect
from streamlit.testing.v1 import AppTest

from aurora_sgl import rollout, store
from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.rollout import alerts, status
from aurora_sgl.rollout.alerts import Alert
from aurora_sgl.store import queries
from aurora_sgl.store.models import SavedView
from dashboard import actions, addresses, login
from dashboard.addresses import Address
from dashboard.context import Group
from tests.pages.test_pages import draw, said
from tests.support import dashboard_house as samples
from tests.support import hostile
from tests.support.browser import PAGES, Viewer
from tests.support.dashboard_house import House

pytestmark = pytest.mark.timeout(300)

Use = Callable[..., None]
Look = Callable[..., Viewer]
NAMES = [page.lower() for page in PAGES]


@pytest.fixture
def small(tmp_path: Path, settings_of: Use) -> Iterator[House]:
    """Three versions and two servers; nobody wrote anything, and no scheduler ever ran."""
    house = samples.empty(tmp_path)
    samples.add_servers(house)
    for parent in (None, 1, 1):
        samples.add_version(house, parent)
    rollout.promote(house.engine, 2, actor="test", reason="go", force=True)
    house.servers_follow()
    settings_of(tmp_path)
    yield house
    house.engine.dispose()


def here(house: House) -> Group:
    return Group(house.url, house.group_id, "default")


def shown_versions(app: AppTest) -> list[int]:
    return [int(number) for number in app.dataframe[0].value["version"]]


# -- notes and tags ------------------------------------------------------------------------------


def test_versions_are_filtered_by_what_people_wrote(
    small: House,
) -> None:
    app = draw(small.home, "Versions", version=3)
    assert "tags" not in app.dataframe[0].value  # no column for what nobody gave
    rollout.notes.tag(small.engine, 3, ["prod", "eu-west"], actor="ada")
    rollout.notes.add_note(small.engine, 3, "slow on\n<b>long</b> prompts", actor="eve")
    app = draw(small.home, "Versions", version=3)
    assert shown_versions(app) == [3, 2, 1]
    row = app.dataframe[0].value.iloc[0]
    assert (list(row["tags"]), row["note"]) == (["prod", "eu-west"], "slow on\n<b>long</b> prompts")
    words = said(app)
    assert "<li>prod</li><li>eu-west</li>" in words
    assert "<p>slow on\n&lt;b&gt;long&lt;/b&gt; prompts</p>" in words
    # The note of its making comes first, and stays.
    assert words.index("forward_kl on 40 requests") < words.index("slow on\n")
    app.text_input(key="search").set_value('tag:prod "<b>long"').run()
    assert shown_versions(app) == [3] and "1 of 3 versions fit." in said(app)
    app.text_input(key="search").set_value("tag:none").run()
    assert not app.dataframe and "No version fits" in said(app)
    assert "Version 3" in said(app)  # the chosen one stays


def test_a_viewer_reads_notes_and_takes_no_alert_and_saves_no_view(small: House) -> None:
    rollout.notes.add_note(small.engine, 2, "good at night", actor="ada")
    app = draw(small.home, "Versions", "vera", version=2)
    assert "good at night" in said(app)
    assert not {"Add note", "Add tags", "Take off", "Save view"} & {one.label for one in app.button}


@pytest.mark.parametrize("name", ["vera", None])
def test_whoever_is_no_operator_is_refused_whatever_he_sends(
    small: House, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    draw(small.home, "Now")  # makes the accounts
    from dashboard.context import accounts

    monkeypatch.setattr(login, "account", lambda: accounts().get(name) if name else None)
    group, before = here(small), len(status.audit(small.engine, "default"))
    for act in (
        lambda: actions.add_note(group, 2, "x"),
        lambda: actions.change_tags(group, 2, ["x"], True),
        lambda: actions.acknowledge(group, 1, note=""),
        lambda: actions.save_view(group, "x", Address("versions")),
        lambda: actions.delete_view(group, 1, reason="x"),
    ):
        with pytest.raises(Refused, match=r"may look only|logged out"):
            act()
    assert len(status.audit(small.engine, "default")) == before


# -- alerts --------------------------------------------------------------------------------------


def off(house: House, *kinds: str, ago: float = 0.0) -> None:
    """What a scheduler that leads writes down when it looks."""
    problems = [Alert(kind, "", alerts.CRITICAL if kind == "no_server" else alerts.WARNING,
                      f"Something of {kind}.") for kind in kinds]  # fmt: skip
    with store.session(house.engine) as s:
        alerts.record(s, house.group_id, problems, utc_now() - timedelta(minutes=ago))


def test_without_a_scheduler_the_page_says_that_nobody_looks_and_what_is_off_all_the_same(
    small: House,
) -> None:
    with small.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE server SET last_seen_at = '2026-01-01 00:00:00.000000'")
    app = draw(small.home, "Alerts")
    (warning,) = [one.value for one in app.warning]
    assert "No scheduler runs for this group, so no alert begins or ends" in warning
    words = said(app)
    assert "gpu-1:30000 was last heard of" in words and "None was ever written down." in words
    assert "Nothing was written down" in words and "None was written. Receivers are named" in words
    with store.session(small.engine) as s:
        queries.scheduler_states.set_scheduler_state(
            s, small.group_id, holder="h:1", state="waiting", reason="", next_action="",
            next_at=None, details={},
        )  # fmt: skip
    app = draw(small.home, "Alerts")
    assert not app.warning and "was last heard of" not in said(app)


def test_open_alerts_come_first_and_the_history_says_how_long_each_lasted_and_is_filtered(
    small: House,
) -> None:
    off(small, "drift", "no_server", ago=90)
    off(small, "drift", ago=30)
    off(small, "drift", "switch_off")
    alerts.acknowledge(small.engine, "default", 1, actor="eve", note="<i>at it</i>")
    app = draw(small.home, "Alerts")
    words = said(app)
    assert words.index("Something of switch_off") < words.index("Something of drift")
    assert "Taken by eve" in words and "&lt;i&gt;at it&lt;/i&gt;" in words
    assert [one.key for one in app.button if one.label == "Take it"] == ["take 3"]
    frame = app.dataframe[0].value
    assert list(frame["number"]) == [3, 2, 1] and list(frame["taken by"])[2] == "eve"
    assert list(frame["lasted"])[1:] == ["60 min", "2 h"] and frame["taken by"].count() == 1
    for state, numbers in (
        ({"kinds": ["drift", "no_server"], "state": "over"}, [2]),
        ({"state": "nobody took it"}, [3, 2]), ({"state": "open", "severity": "warning"}, [3, 1]),
    ):  # fmt: skip
        filtered = draw(small.home, "Alerts", **state)
        assert list(filtered.dataframe[0].value["number"]) == numbers, state
    none = draw(small.home, "Alerts", kinds=["drift"], severity="critical")
    assert "None of the 3 alerts fits." in said(none)


# -- saved views ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "query"), hostile.ADDRESSES)
def test_what_is_no_page_of_ours_with_parameters_is_no_address(page: str, query: str) -> None:
    with pytest.raises(AuroraError):
        Address.of(page, query, NAMES)


def test_an_address_comes_out_as_it_went_in_and_never_leads_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "base", lambda: "/aurora")
    for text in hostile.texts():
        readable = text.encode(errors="replace").decode()
        pairs = [("domain", readable), ("domain", "chat"), ("search", "")]
        address = Address.checked("requests", pairs, NAMES)
        assert Address.of("requests", address.query, NAMES) == address
        parts = urlsplit(address.href)
        assert (parts.scheme, parts.netloc, parts.path, parts.fragment) == (
            "", "", "/aurora/requests", "")  # fmt: skip
        assert parse_qsl(parts.query, keep_blank_values=True) == pairs
        assert not set(address.href) & set("\"'<>\\ \n\t:")
    assert Address("now").href == "/aurora/"
    hidden = Address.checked("now", [("setup", "a token"), ("embed", "true"), ("x", "1")], NAMES)
    assert hidden.query == "x=1"  # nobody keeps a link that makes operators


def test_what_stands_in_the_table_and_is_no_address_of_ours_is_no_link(small: House) -> None:
    with store.session(small.engine) as s:
        for page, query in (*hostile.ADDRESSES, ("versions", "search=tag%3Aprod")):
            queries.saved_views.add_saved_view(
                s, small.group_id, name=f"to {page}", page=page, query=query, actor="eve"
            )
    markup = next(one.proto.body for one in draw(small.home, "Now").get("html")
                  if "aurora-links" in one.proto.body)  # fmt: skip
    assert markup.count("<a ") == 1 and 'href="/versions?search=tag%3Aprod"' in markup
    assert hostile.HOST not in markup


def test_names_are_taken_once_and_a_group_has_so_many_views(
    small: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(small.home, "Now")
    from dashboard.context import accounts

    monkeypatch.setattr(login, "account", lambda: accounts().get("ada"))
    group, address = here(small), Address("versions", (("search", "tag:prod"),))
    actions.save_view(group, " my\n view ", address)
    for name, why in (("MY VIEW", "already"), (" ", "needs a name"), ("x" * 81, "at most 80")):
        with pytest.raises(AuroraError, match=why):
            actions.save_view(group, name, address)
    with store.session(small.engine) as s:
        (row,) = queries.saved_views.saved_views(s, small.group_id)
        assert (row.name, row.page, row.query, row.actor) == (
            "my view", "versions", "search=tag%3Aprod", "ada")  # fmt: skip
        s.add_all(SavedView(group_id=small.group_id, name=f"v{n}", page="now", query="", actor="x",
                            created_at=utc_now()) for n in range(199))  # fmt: skip
    with pytest.raises(AuroraError, match="at most 200 saved views"):
        actions.save_view(group, "one more", address)
    assert actions.delete_view(group, row.id, reason="old") == "my view"
    with pytest.raises(AuroraError, match="not there any more"):
        actions.delete_view(group, row.id, reason="old")
    with pytest.raises(AuroraError, match="not there any more"):
        actions.delete_view(Group(small.url, 7, "other"), row.id + 1, reason="of another group")
    entries = [row for row in status.audit(small.engine, "default") if "view" in row.action]
    assert [(one.action, one.actor) for one in entries] == [
        ("delete view", "ada"), ("save view", "ada")]  # fmt: skip
    assert "my view" not in str([(one.subject, one.reason, one.after) for one in entries])


def test_a_view_is_of_its_group_and_so_is_its_address(
    small: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(small.home, "Now")
    from dashboard.context import accounts

    with store.session(small.engine) as s:
        blue = queries.groups.ensure_group(s, "blue", "target", "r1", "LlamaForCausalLMEagle3").id
    with monkeypatch.context() as patched:
        patched.setattr(login, "account", lambda: accounts().get("ada"))
        address = Address("now", (("deployment", "blue"),))
        actions.save_view(Group(small.url, blue, "blue"), "of blue", address)
    assert "of blue" not in said(draw(small.home, "Now"))
    app = draw(small.home, "Versions", deployment="blue")
    assert "There is no version yet" in said(app)
    assert 'href="/?deployment=blue"' in said(app)
    assert "There is no version yet" not in said(draw(small.home, "Versions", deployment="gone"))


#: What can be chosen on a page, as its address has it, and what the page makes of it.
CHOSEN: dict[str, tuple[str, dict[str, object]]] = {
    "Acceptance": (
        "period=7+days&lines=by+domain&servers=gpu-1%3A30000&domains=code&domains=sql&versions=2"
        "&tab=Versions+at+equal+draft+shape&baseline=version+2",
        {"period": "7 days", "lines": "by domain", "servers": ["gpu-1:30000"], "baseline": 2,
         "domains": ["code", "sql"], "versions": [2], "tab": "Versions at equal draft shape"},
    ),
    "Requests": (
        "ended=7+days&domain=code&served_by=2&lengths=1.2&lengths=3.5",
        {"ended": "7 days", "domain": ["code"], "served_by": 2, "lengths": (1.2, 3.5)},
    ),
    "SQL": ("statement=SELECT+1+AS+%22a+%26+b%22", {"statement": 'SELECT 1 AS "a & b"'}),
    "Audit": (
        "what=promote&who=scheduler&why=replay",
        {"what": ["promote"], "who": ["scheduler"], "why": "replay"},
    ),
    "Alerts": (
        "kinds=drift&severity=warning&state=open",
        {"kinds": ["drift"], "severity": "warning", "state": "open"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("page", CHOSEN)
def test_the_address_of_a_page_brings_back_what_was_chosen_on_it(
    house: House, settings_of: Use, page: str
) -> None:
    off(house, "drift")
    settings_of(house.home)
    query, expected = CHOSEN[page]
    app = draw(house.home, page, query=query)
    assert {key: app.session_state[key] for key in expected} == expected


def test_the_address_names_the_training_run(house: House, settings_of: Use) -> None:
    settings_of(house.home)
    assert "Run 1: " in said(draw(house.home, "Training", query="run=1"))
    newest = draw(house.home, "Training", query="run=999")
    assert "Run 5: " in said(newest) and "Below: the newest." in said(newest)


# -- in a browser --------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_operator_writes_finds_takes_and_keeps_what_he_looks_at(
    house: House, look: Look
) -> None:
    off(house, "drift")
    viewer = look("ada", "versions?version=2")
    page, dialog = viewer.page, viewer.page.get_by_role("dialog")
    page.get_by_role("textbox", name="Note", exact=True).fill("slow on <b>long</b> prompts")
    page.get_by_role("button", name="Add note").click()
    expect(page.get_by_role("list", name="notes")).to_contain_text("slow on <b>long</b> prompts")
    expect(page.get_by_role("textbox", name="Note", exact=True)).to_have_value("")
    tags = page.get_by_role("textbox", name="Tags", exact=True)
    tags.fill("Prod eu-west")
    page.get_by_role("button", name="Add tags").click()
    expect(page.get_by_role("list", name="tags")).to_have_text("prodeu-west")
    tags.fill("eu-west")
    page.get_by_role("button", name="Take off").click()
    expect(page.get_by_role("list", name="tags")).to_have_text("prod")
    tags.fill("prod")
    page.get_by_role("button", name="Add tags").click()
    expect(page.get_by_text("version 2 has the tag prod already")).to_be_visible()
    page.get_by_role("textbox", name="Search").fill("tag:prod")
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 of 5 versions fit.")).to_be_visible()

    page.get_by_role("button", name="Save view").click()
    expect(dialog.get_by_role("table", name="view")).to_contain_text("tag:prod")
    dialog.get_by_role("textbox", name="Name").fill("what is in production")
    dialog.get_by_role("button", name="Save", exact=True).click()
    saved = page.get_by_role("navigation", name="saved views")
    saved.get_by_role("link", name="what is in production").wait_for()

    viewer.open("Now")
    page.get_by_role("link", name="Who takes care").click()
    page.get_by_role("heading", name="Alerts", level=1).wait_for()
    page.get_by_role("button", name="Take it").first.click()
    dialog.get_by_role("button", name="Take it").click()  # without a note
    expect(page.get_by_text("is yours.")).to_be_visible()
    expect(page.get_by_text("Taken by ada")).to_be_visible()

    saved.get_by_role("link", name="what is in production").click()
    expect(page.get_by_text("1 of 5 versions fit.")).to_be_visible()
    assert parse_qsl(urlsplit(page.url).query) == [("search", "tag:prod"), ("version", "2")]
    page.get_by_role("button", name="Delete", exact=True).click()
    dialog.get_by_role("textbox", name="Reason").fill("done")
    dialog.get_by_role("button", name="Delete", exact=True).click()
    expect(saved).to_have_count(0)
    entries = status.audit(house.engine, "default")[:6]
    assert [(one.actor, one.action) for one in entries] == [
        ("ada", action)
        for action in ("delete view", "acknowledge", "save view", "untag", "tag", "note")
    ]
