"""The access matrix: who asks, and what for. Each cell is a test, against one running dashboard."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from aurora_sgl import rollout, store
from aurora_sgl.errors import Refused
from aurora_sgl.rollout import status, switches
from aurora_sgl.store import queries
from aurora_sgl.store.accounts import Accounts
from dashboard.server import cookie_name
from tests.support.browser import PAGES, Dashboard
from tests.support.dashboard_house import DOMAINS, House
from tests.support.page_socket import Drawn, PageSocket

pytestmark = pytest.mark.timeout(240)

PASSWORD = "a long enough one"
ELSEWHERE = "http://evil.example"
#: Those whom every page and action is closed to.
STRANGERS = ("no account", "after logout", "after demotion", "forged cookie")
WHO = (*STRANGERS, "other origin", "viewer")
#: What the login shows, and no page.
LOGIN = "Log in"
#: Page, query, and the key of the button of each action.
ACTIONS = {
    "promote": ("versions", "version=4", "promote"),
    "roll back": ("versions", "version=3", "rollback"),
    "pin": ("versions", "version=4", "pin"),
    "unpin": ("versions", "version=1", "pin"),
    "export": ("versions", "version=4", "export"),
    "turn learning": ("training", "", "turn learning"),
    "turn auto_promote": ("training", "", "turn auto_promote"),
    "train": ("training", "", "train now"),
}
TOKENS = """SELECT draft_token AS hidden_from_viewers, target_token FROM v_rejected_tokens
WHERE draft_token IS NOT NULL LIMIT 5"""
#: How a session of otto's ends.
ENDS: dict[str, Callable[[Accounts, str], object]] = {
    "logout": lambda accounts, token: accounts.close_session(token),
    "demotion": lambda accounts, _: accounts.add("otto", "viewer", PASSWORD),
    "removal": lambda accounts, _: accounts.remove("otto"),
}


class People:
    """Sessions of the dashboard by who holds them."""

    def __init__(self, house: House, url: str) -> None:
        self.accounts = Accounts(house.home / "dashboard" / "accounts.db")
        self.url = url
        operator = self.accounts.open_session("ada")
        gone = self.accounts.open_session("ada")
        self.accounts.close_session(gone)
        self.tokens = {
            "no account": "", "after logout": gone, "after demotion": self.demoted("dora"),
            "forged cookie": "A" * len(operator), "other origin": operator, "operator": operator,
            "viewer": self.accounts.open_session("vera"),
        }  # fmt: skip

    def demoted(self, name: str) -> str:
        self.accounts.add(name, "operator", PASSWORD)
        token = self.accounts.open_session(name)
        self.accounts.add(name, "viewer", PASSWORD)
        return token

    def socket(self, who: str) -> PageSocket:
        origin = ELSEWHERE if who == "other origin" else self.url
        return PageSocket(self.url, self.tokens[who], origin=origin)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, who: str, method: str, path: str, body: str = "", **more: str) -> httpx.Response:
        headers = {"x-aurora-dashboard": "1", "Origin": self.url}
        if who == "other origin":
            headers["Origin"] = ELSEWHERE
        if self.tokens[who]:
            headers["Cookie"] = f"{cookie_name(self.port)}={self.tokens[who]}"
        headers |= more
        return httpx.request(method, f"{self.url}{path}", headers=headers, content=body)


@pytest.fixture(scope="module")
def people(shared: House, running: Dashboard) -> Iterator[People]:
    people = People(shared, running.url)
    rollout.pin(shared.engine, 1, actor="test", reason="to be unpinned")
    yield people
    rollout.unpin(shared.engine, 1, actor="test", reason="as before")
    people.accounts.remove("dora")


def only_the_login(drawn: Drawn) -> None:
    assert LOGIN in drawn.submits
    assert not drawn.kinds & {"dataframe", "plotly_chart", "metric", "multiselect", "selectbox"}
    # "chat" and "code" may stand anywhere; what is drawn of the store are tables and numbers.
    assert "version" not in drawn.text and not set(DOMAINS) & set(drawn.texts)


def drawn_for(people: People, who: str, page: str, query: str = "", **more: str) -> Drawn | None:
    """``None``: not even the socket is open to them."""
    try:
        with people.socket(who) as socket:
            return socket.show(page, query=query, **more)  # type: ignore[arg-type]
    except InvalidStatus as refused:
        assert refused.response.status_code == 403
        return None


# -- pages and their socket ----------------------------------------------------------------------


@pytest.mark.parametrize("page", [name.lower() for name in PAGES])
@pytest.mark.parametrize("who", WHO)
def test_who_may_look_at_a_page(house: House, people: People, who: str, page: str) -> None:
    drawn = drawn_for(people, who, "" if page == "now" else page)
    if who == "other origin":
        assert drawn is None
    elif who == "viewer":
        assert drawn is not None and LOGIN not in drawn.submits
        assert page.upper() in drawn.text.upper() and "vera (viewer: may look)" in drawn.text
        assert "log out" in drawn.by_key
        assert not {key for _, _, key in ACTIONS.values()} & set(drawn.by_key)
    else:
        assert drawn is not None
        only_the_login(drawn)


# -- actions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialog:
    """What an operator's browser sends to act: the button that asks; of the dialog its fragment,
    the field of the reason, and the button that agrees."""

    page: str
    query: str
    button: str
    fragment: str
    reason: str
    agree: str

    def ask(self, socket: PageSocket) -> Drawn:
        socket.show(self.page, query=self.query)  # what a button does is known once it was drawn
        return socket.show(self.page, query=self.query, press=self.button)

    @property
    def agreed(self) -> dict[str, Any]:
        """As the whole page's; an operator's browser names the fragment too."""
        return {"query": self.query, "press": self.agree, "typed": {self.reason: "because"}}


@pytest.fixture(scope="module")
def dialogs(shared: House, people: People) -> dict[str, Dialog]:
    """By action, of an operator's page."""
    dialogs = {}
    for action, (page, query, key) in ACTIONS.items():
        with people.socket("operator") as socket:
            button = socket.show(page, query=query).by_key[key]
            drawn = socket.show(page, query=query, press=button)
        assert "Reason" in drawn.inputs, f"an operator is asked before: {action}"
        reason = drawn.inputs["Reason"]
        fragment = drawn.fragments[reason]  # of the dialog; the page below has forms of its own
        (agree,) = [one for one in drawn.submits.values() if drawn.fragments[one] == fragment]
        dialogs[action] = Dialog(page, query, button, fragment, reason, agree)
    return dialogs


def state_of(house: House) -> object:
    """What actions change."""
    with store.session(house.engine, write=False) as s:
        aliases = queries.aliases.aliases(s, house.group_id)
        pinned = [v.pinned for v in queries.versions.versions(s, house.group_id)]
    turned = [(one.name, one.on) for one in switches.read(house.engine, "default")]
    return aliases, pinned, turned, len(status.audit(house.engine, "default"))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("who", WHO)
def test_who_may_act(
    house: House, people: People, dialogs: dict[str, Dialog], who: str, action: str
) -> None:
    """All that is sent is the operator's own, as whoever watched him would send it."""
    before, dialog = state_of(house), dialogs[action]
    try:
        with people.socket(who) as socket:
            asked = dialog.ask(socket)
            socket.send(dialog.page, fragment=dialog.fragment, **dialog.agreed)
            done = socket.show(dialog.page, **dialog.agreed)
    except InvalidStatus as refused:
        assert who == "other origin" and refused.response.status_code == 403
    else:
        assert who != "other origin"
        for drawn in (asked, done):
            assert "Reason" not in drawn.inputs
            assert (LOGIN in drawn.submits) == (who != "viewer")
    assert state_of(house) == before


@pytest.fixture
def back_again(house: House) -> Iterator[None]:
    """What the actions of a test changed is as before; what is live is by its house."""
    turned = switches.read(house.engine, "default")
    yield
    for was, one in zip(turned, switches.read(house.engine, "default"), strict=True):
        if one.on != was.on:
            switches.turn(
                house.engine, "default", one.name, was.on, actor="test", reason="as before"
            )
    rollout.pin(house.engine, 1, actor="test", reason="as before")
    rollout.unpin(house.engine, 4, actor="test", reason="as before")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.usefixtures("back_again")
def test_an_operator_may_act(
    house: House, people: People, dialogs: dict[str, Dialog], action: str
) -> None:
    """By the very messages that do nothing when another sends them."""
    dialog = dialogs[action]
    if action == "train":  # as far as it goes without a run
        switches.turn(house.engine, "default", "learning", False, actor="test", reason="no run")
    before = state_of(house)
    with people.socket("operator") as socket:
        assert "Reason" in dialog.ask(socket).inputs
        done = socket.show(dialog.page, fragment=dialog.fragment, **dialog.agreed)
    if action == "train":
        assert "learning is switched off in this group" in done.text
    assert (state_of(house) != before) == (action != "train")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.usefixtures("back_again")
def test_a_dialog_that_is_open_ends_with_its_session(
    house: House, people: People, dialogs: dict[str, Dialog], action: str, end: str
) -> None:
    """The dialog's own fragment is there, and was drawn for an operator."""
    people.accounts.add("otto", "operator", PASSWORD)
    token, before, dialog = people.accounts.open_session("otto"), state_of(house), dialogs[action]
    with PageSocket(people.url, token, origin=people.url) as socket:
        assert "Reason" in dialog.ask(socket).inputs
        ENDS[end](people.accounts, token)
        socket.show(dialog.page, fragment=dialog.fragment, **dialog.agreed)
    people.accounts.add("otto", "viewer", PASSWORD)
    people.accounts.remove("otto")
    assert state_of(house) == before


@pytest.fixture(scope="module")
def console(shared: House, people: People) -> tuple[str, str]:
    """The ids of the SQL page's button and of its statement."""
    with people.socket("operator") as socket:
        page = socket.show("sql")
    return page.submits["Run"], page.inputs["Statement"]


@pytest.mark.parametrize("who", [*WHO, "operator"])
def test_who_may_run_a_statement_and_have_its_rows_as_a_file(
    house: House, people: People, console: tuple[str, str], who: str
) -> None:
    run, statement = console
    try:
        with people.socket("operator") as other, people.socket(who) as socket:
            socket.show("sql")
            counted = socket.show("sql", press=run, typed={statement: "SELECT 7 AS seven"})
            drawn = socket.show("sql", press=run, typed={statement: TOKENS})
            theirs = other.show("sql", press=run, typed={statement: TOKENS})
            path = theirs.downloads["Download CSV"]
            assert people.ask("operator", "GET", path).text.startswith("hidden_from_viewers")
            assert people.ask(who, "GET", path).status_code == (200 if who == "operator" else 403)
    except InvalidStatus as refused:
        assert who == "other origin" and refused.response.status_code == 403
        return
    if who in STRANGERS:
        only_the_login(counted)
        only_the_login(drawn)
    else:
        assert "1 row in" in counted.text
        assert ("5 rows in" in drawn.text) == (who == "operator")
        assert ("Download CSV" in drawn.downloads) == (who == "operator")


@pytest.mark.parametrize("who", WHO)
def test_a_set_up_link_makes_nobody_an_operator_once_there_are_accounts(
    house: House, people: People, who: str
) -> None:
    """Not even one that was never used."""
    token, before = "a link that was printed", people.accounts.all()
    with closing(sqlite3.connect(people.accounts.path)) as db, db:
        db.execute("INSERT OR REPLACE INTO setup VALUES (?, ?)",
                   [sha256(token.encode()).hexdigest(), time.time() + 600])  # fmt: skip
    drawn = drawn_for(people, who, "", query=f"setup={quote(token)}")
    if who in STRANGERS:
        assert drawn is not None
        only_the_login(drawn)
        assert "This one-time link was used already" in drawn.text
    elif who == "viewer":
        assert drawn is not None and "vera (viewer: may look)" in drawn.text
    assert drawn is None or "Make the account" not in drawn.submits
    with pytest.raises(Refused):
        people.accounts.set_up(token, "mallory", PASSWORD)
    assert people.accounts.all() == before


def test_a_page_that_is_open_ends_with_its_session(house: House, people: People) -> None:
    """Logged out elsewhere, made a viewer, or removed: the next look shows the login."""
    for end in ENDS.values():
        people.accounts.add("otto", "operator", PASSWORD)
        token = people.accounts.open_session("otto")
        with PageSocket(people.url, token, origin=people.url) as socket:
            assert "Promote" in socket.show("versions", query="version=4").buttons
            end(people.accounts, token)
            only_the_login(socket.show("versions", query="version=4"))
    people.accounts.add("otto", "viewer", PASSWORD)
    people.accounts.remove("otto")


# -- endpoints -----------------------------------------------------------------------------------

CLOSED = {
    ("PUT", "/_stcore/upload_file/session/file"): {404},
    ("DELETE", "/_stcore/upload_file/session/file"): {404},
    ("GET", "/_stcore/metrics"): {404},
    ("POST", "/_stcore/agent/interact"): {404},
    ("GET", "/_stcore/agent/openapi.json"): {404},
    ("POST", "/_stcore/agent/mcp"): {404},
    ("GET", "/_stcore/bidi-components/x/y.js"): {404},
    ("GET", "/component/x/accounts.db"): {404},
    ("GET", "/app/static/../accounts.db"): {200, 400, 404},  # 200: the empty page
}


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize("who", [*WHO, "operator"])
def test_endpoints_that_no_page_needs_are_closed_to_all(
    people: People, who: str, method: str, path: str
) -> None:
    answer = people.ask(who, method, path)
    assert answer.status_code in CLOSED[method, path]
    assert b"argon2" not in answer.content and b"SQLite" not in answer.content


@pytest.mark.parametrize("who", [*WHO, "operator"])
def test_who_may_fetch_what_pages_offer_for_download(people: People, who: str) -> None:
    """An address that exists is not known here; whether it is looked for depends on who asks."""
    answer = people.ask(who, "GET", f"/media/{'0' * 56}.csv")
    allowed = who in ("viewer", "operator")
    assert answer.status_code == (404 if allowed else 403)


@pytest.mark.parametrize("who", [*WHO, "operator"])
def test_who_may_keep_a_session_in_a_cookie(people: People, who: str) -> None:
    answer = people.ask(who, "POST", "/session", people.tokens[who])
    allowed = who in ("viewer", "operator")
    assert answer.status_code == (200 if allowed else 403)
    cookie = answer.headers.get("set-cookie", "")
    assert bool(cookie) == allowed
    if allowed:
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie


@pytest.mark.parametrize("who", [*WHO, "operator"])
def test_under_a_host_name_that_is_not_ours_nothing_but_health_is_answered(
    people: People, who: str
) -> None:
    """DNS rebinding: the page of another site, whose name points here, asks as its own origin."""
    for method, path, allowed in (
        ("GET", "/", False), ("GET", "/versions", False), ("GET", "/media/0.csv", False),
        ("POST", "/session", False), ("DELETE", "/session", False),
        ("GET", "/_stcore/host-config", False), ("GET", "/_stcore/health", True),
    ):  # fmt: skip
        for host in ("evil.example", f"evil.example:{people.port}"):
            answer = people.ask(who, method, path, people.tokens[who],
                                Host=host, Origin=f"http://{host}")  # fmt: skip
            assert answer.status_code == (200 if allowed else 403), (method, path, host)
            assert "set-cookie" not in answer.headers or allowed


@pytest.mark.parametrize("who", [*WHO, "operator"])
def test_forgetting_a_cookie_ends_nobody_elses_session(people: People, who: str) -> None:
    answer = people.ask(who, "DELETE", "/session")
    assert answer.status_code == (403 if who == "other origin" else 200)
    assert people.accounts.of_session(people.tokens["operator"]) is not None
    assert people.accounts.of_session(people.tokens["viewer"]) is not None


@pytest.mark.parametrize("path", ["/_stcore/health", "/_stcore/host-config"])
@pytest.mark.parametrize("who", WHO)
def test_what_is_open_to_all_says_nothing_of_the_store(people: People, who: str, path: str) -> None:
    answer = people.ask(who, "GET", path)
    assert answer.status_code == 200
    assert not any(word in answer.text for word in ("version", "aurora.db", "ada", "vera"))


def test_a_file_that_a_page_offers_is_there_as_long_as_the_page(
    people: People, console: tuple[str, str]
) -> None:
    """However often other pages draw themselves meanwhile; their parts do every few seconds."""
    run, statement = console
    with people.socket("operator") as mine, people.socket("viewer") as other:
        mine.show("sql")
        offered = mine.show("sql", press=run, typed={statement: "SELECT 7 AS seven"})
        path = offered.downloads["Download CSV"]
        for _ in range(3):
            other.show("sql")
        assert people.ask("operator", "GET", path).text.startswith("seven")
