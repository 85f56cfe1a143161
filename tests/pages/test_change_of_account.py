"""One open page, two accounts: what it kept for the first is gone before the second sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest

from aurora_sgl.store.accounts import Accounts
from dashboard.server import cookie_name
from tests.support.browser import PASSWORDS, Dashboard
from tests.support.dashboard_house import House
from tests.support.page_socket import Drawn, PageSocket

pytestmark = pytest.mark.timeout(240)

PASSWORD = "a long enough one"
#: Its column's name and its rows are nowhere but in the answer, in the page's state and the file.
ASKED = """SELECT draft_token AS hidden_from_viewers, target_token FROM v_rejected_tokens
WHERE draft_token IS NOT NULL LIMIT 5"""
MARK = "hidden_from_viewers"

Leave = Callable[[PageSocket, Drawn, Accounts, str], Drawn]


def log_out(socket: PageSocket, page: Drawn, accounts: Accounts, token: str) -> Drawn:
    return socket.show("sql", press=page.buttons["Log out"])


def logged_out_in_another_tab(
    socket: PageSocket, page: Drawn, accounts: Accounts, token: str
) -> Drawn:
    accounts.close_session(token)
    return socket.show("sql")


def demoted(socket: PageSocket, page: Drawn, accounts: Accounts, token: str) -> Drawn:
    accounts.add("otto", "viewer", PASSWORD)
    return socket.show("sql")


def removed(socket: PageSocket, page: Drawn, accounts: Accounts, token: str) -> Drawn:
    accounts.remove("otto")
    return socket.show("sql")


def demoted_and_a_part_is_drawn_alone(
    socket: PageSocket, page: Drawn, accounts: Accounts, token: str
) -> Drawn:
    accounts.add("otto", "viewer", PASSWORD)
    run = page.submits["Run"]
    return socket.show("sql", press=run, fragment=page.fragments[run])


WAYS: dict[str, Leave] = {
    way.__name__.replace("_", " "): way
    for way in (
        log_out, logged_out_in_another_tab, demoted, removed, demoted_and_a_part_is_drawn_alone,
    )
}  # fmt: skip


@dataclass
class Operators:
    """What an operator's page offered."""

    token: str
    path: str  # of its file


def ask(socket: PageSocket, statement: str) -> Drawn:
    page = socket.show("sql")
    run, text = page.submits["Run"], page.inputs["Statement"]
    socket.show("sql", press=run, typed={text: statement}, fragment=page.fragments[run])
    return socket.show("sql")


def status_of(url: str, path: str, token: str) -> tuple[int, bytes]:
    port = int(url.rpartition(":")[2])
    cookies = {"Cookie": f"{cookie_name(port)}={token}"} if token else {}
    answer = httpx.get(f"{url}{path}", headers=cookies)
    return answer.status_code, answer.content


def as_operator(socket: PageSocket, url: str, token: str) -> tuple[Drawn, Operators]:
    page = ask(socket, ASKED)
    assert MARK in page.sent.decode("latin-1") and "dataframe" in page.kinds
    kept = Operators(token, page.downloads["Download CSV"])
    status, csv = status_of(url, kept.path, token)
    assert status == 200 and csv.startswith(MARK.encode()) and csv.count(b"\n") > 1
    return page, kept


def nothing_is_left(socket: PageSocket, drawn: Drawn, kept: Operators) -> None:
    assert MARK not in drawn.sent.decode("latin-1")
    assert "dataframe" not in drawn.kinds or "answer table" not in drawn.sent.decode("latin-1")
    assert not drawn.downloads


@pytest.mark.parametrize("way", WAYS)
def test_what_a_page_kept_for_an_account_is_gone_before_the_next_one_sees_it(
    house: House, running: Dashboard, way: str
) -> None:
    """The page is not loaded again: the state of one socket outlives a login."""
    accounts = Accounts(house.home / "dashboard" / "accounts.db")
    accounts.add("otto", "operator", PASSWORD)
    token = accounts.open_session("otto")
    try:
        with PageSocket(running.url, token, origin=running.url) as socket:
            page, kept = as_operator(socket, running.url, token)
            login = WAYS[way](socket, page, accounts, token)
            assert "Log in" in login.submits
            nothing_is_left(socket, login, kept)
            assert status_of(running.url, kept.path, token)[0] == 403
            socket.show("sql", press=login.submits["Log in"], typed={
                login.inputs["Name"]: "vera", login.inputs["Password"]: PASSWORDS["vera"],
            })  # fmt: skip
            viewers = socket.show("sql")
            assert "vera (viewer: may look)" in viewers.text
            nothing_is_left(socket, viewers, kept)
        vera = accounts.open_session("vera")
        assert status_of(running.url, kept.path, vera)[0] in (403, 404)  # Streamlit forgets it
    finally:
        accounts.add("otto", "viewer", PASSWORD)
        accounts.remove("otto")


def test_an_account_keeps_its_answer_and_its_file(house: House, running: Dashboard) -> None:
    """What goes with a change stays without one, and is there in another browser of the account,
    in pieces too, as the type that it is."""
    accounts = Accounts(house.home / "dashboard" / "accounts.db")
    first, second = accounts.open_session("ada"), accounts.open_session("ada")
    port = int(running.url.rpartition(":")[2])
    cookie = {"Cookie": f"{cookie_name(port)}={second}"}
    with PageSocket(running.url, first, origin=running.url) as socket:
        _, kept = as_operator(socket, running.url, first)
        piece = httpx.get(f"{running.url}{kept.path}", headers={**cookie, "Range": "bytes=0-5"})
        assert (piece.status_code, piece.text) == (206, MARK[:6])
        assert piece.headers["content-type"] == "text/csv; charset=utf-8"
        assert 'filename="answer.csv"' in piece.headers["content-disposition"]
        assert httpx.head(f"{running.url}{kept.path}", headers=cookie).status_code == 200
        socket.show("audit")
        assert MARK in socket.show("sql").sent.decode("latin-1")


def test_a_file_that_exists_is_only_its_accounts(house: House, running: Dashboard) -> None:
    """Whoever knows its address, and under whatever ending."""
    accounts = Accounts(house.home / "dashboard" / "accounts.db")
    accounts.add("otto", "operator", PASSWORD)
    others = {name: accounts.open_session(name) for name in ("otto", "vera")}
    token = accounts.open_session("ada")
    gone = accounts.open_session("ada")
    accounts.close_session(gone)
    try:
        with PageSocket(running.url, token, origin=running.url) as socket:
            _, kept = as_operator(socket, running.url, token)
            for path in (kept.path, f"{kept.path}.png", f"{kept.path}.svg"):
                for other in others.values():
                    answer = status_of(running.url, path, other)
                    assert answer == (403, b"made for another account\n")
                for stranger in ("", gone, "A" * len(token)):
                    assert status_of(running.url, path, stranger) == (403, b"log in first\n")
            assert status_of(running.url, kept.path, token)[0] == 200  # it was there all along
    finally:
        accounts.remove("otto")
