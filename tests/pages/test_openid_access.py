"""Who logged in through OpenID Connect ends like everybody else: by a logout, made a viewer, or
without an account. On an open page, in its dialogs, for its files and the SQL page's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("authlib", reason="the extra openid is not installed")

from streamlit.web.server.starlette.starlette_app_utils import create_signed_value
from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME as COOKIE

from dashboard.server import cookie_name
from tests.pages.conftest import Team
from tests.pages.test_access import ELSEWHERE, only_the_login, state_of
from tests.pages.test_change_of_account import ASKED, MARK
from tests.support.dashboard_house import House
from tests.support.openid import COOKIE_SECRET, Visitor
from tests.support.page_socket import Drawn, PageSocket

pytestmark = pytest.mark.timeout(240)

TRAINING = "training"
EVE, PASSWORD = "eve@example.org", "a long enough one"
FIRST, OTHERS = (403, b"log in first\n"), (403, b"made for another account\n")


@dataclass(frozen=True)
class End:
    """``done``: by others, or in another window of the same browser. What is left is in force at
    the next look, with cookies that are still there."""

    done: Callable[[Team, Visitor], object]
    refusal: tuple[int, bytes]
    is_viewer: bool = False


def log_out(team: Team, eve: Visitor) -> None:
    """The page's button; where it sends the browser is gone to by whoever wants to be out."""
    with eve.page() as page:
        page.show(press=page.show().by_key["log out"])


ENDS = {
    "logged out in another window": End(log_out, FIRST),
    "made a viewer": End(lambda team, _: team.accounts.add(EVE, "viewer", None), OTHERS, True),
    "given a password": End(lambda team, _: team.accounts.add(EVE, "operator", PASSWORD), FIRST),
    "removed": End(lambda team, _: team.accounts.remove(EVE), FIRST),
}
OVER = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)


@pytest.fixture
def visit(team: Team) -> Iterator[Callable[..., Visitor]]:
    """Somebody logs in at the provider, with an account of this role; "" for none."""
    names = set()
    with ExitStack() as stack:

        def come(name: str = EVE, role: str = "operator", **claims: object) -> Visitor:
            if role:
                team.accounts.add(name, role, None)
                names.add(name)
            visitor = Visitor(team.url, team.provider)
            stack.callback(visitor.close)
            return visitor.log_in(name, **claims)

        yield come
    for name in names & {account.name for account in team.accounts.all()}:
        team.accounts.remove(name)


def tokens(page: PageSocket) -> Drawn:
    """What the SQL page shows of a statement that asks for tokens."""
    sql = page.show("sql")
    run, text = sql.submits["Run"], sql.inputs["Statement"]
    page.show("sql", press=run, typed={text: ASKED}, fragment=sql.fragments[run])
    return page.show("sql")


def ask_to_turn(page: PageSocket) -> tuple[str, dict[str, Any]]:
    """The button that switches learning, and what is sent to agree in its dialog."""
    button = page.show(TRAINING).by_key["turn learning"]
    dialog = page.show(TRAINING, press=button)
    (agree,), why = dialog.submits.values(), {dialog.inputs["Reason"]: "because"}
    return button, {"press": agree, "typed": why, "fragment": dialog.fragments[agree]}


def as_it_is_now(drawn: Drawn, end: End) -> None:
    if end.is_viewer:
        assert f"{EVE} (viewer: may look)" in drawn.text
    else:
        only_the_login(drawn)


def file_of(visitor: Visitor, page: PageSocket) -> tuple[str, bytes]:
    """Of the rows that the SQL page shows: the address of their file, and what is there."""
    drawn = tokens(page)
    assert MARK in drawn.sent.decode("latin-1")
    path = drawn.downloads["Download CSV"]
    status, content = visitor.ask(path)
    assert status == 200 and content.startswith(MARK.encode()) and content.count(b"\n") > 1
    return path, content


@OVER
def test_an_open_page_shows_and_gives_what_its_visitor_may_have_now(
    house: House, team: Team, visit: Callable[..., Visitor], end: End
) -> None:
    eve = visit()
    with eve.page() as page:
        path, _ = file_of(eve, page)
        end.done(team, eve)
        assert eve.ask(path) == end.refusal
        drawn = page.show("sql")
        as_it_is_now(drawn, end)
        assert MARK not in drawn.sent.decode("latin-1") and not drawn.downloads
        if end.is_viewer:
            drawn = tokens(page)
            assert "0 rows in" in drawn.text and not drawn.downloads  # tokens read as NULL


@OVER
def test_an_action_whose_dialog_was_open_is_not_done(
    house: House, team: Team, visit: Callable[..., Visitor], end: End
) -> None:
    """By the dialog alone, as a browser draws it, and by the whole page."""
    eve = visit()
    with eve.page() as page:
        _, agree = ask_to_turn(page)
        end.done(team, eve)
        before = state_of(house)
        for fragment in (agree["fragment"], ""):
            as_it_is_now(page.show(TRAINING, **agree | {"fragment": fragment}), end)
            assert state_of(house) == before


def test_what_is_refused_later_is_done_for_an_operator_who_stays(
    house: House, visit: Callable[..., Visitor]
) -> None:
    with visit().page() as page:
        for _ in ("off", "and on"):
            before = state_of(house)
            _, agree = ask_to_turn(page)
            page.show(TRAINING, **agree)
            assert state_of(house) != before


def test_a_logout_is_of_one_login_and_a_new_one_is_let_in(
    house: House, team: Team, visit: Callable[..., Visitor]
) -> None:
    eve, at_home = visit(), visit()
    kept = eve.cookies
    with eve.page() as page, at_home.page() as elsewhere:
        path, content = file_of(at_home, elsewhere)
        assert eve.ask(path) == (200, content)  # one account
        out = page.show(press=page.show().by_key["log out"])
        only_the_login(page.show())
        eve.follow(out.redirect)
        path, _ = file_of(at_home, elsewhere)
        assert COOKIE not in eve.cookies and eve.ask(path) == FIRST
        assert f"{EVE} (operator: may act)" in elsewhere.show().text
    with PageSocket(team.url, origin=team.url, cookies=kept) as page:  # a copy of the cookie
        login = page.show()
        only_the_login(login)
        assert "There is no account" not in login.text
    eve.log_in(EVE)
    with eve.page() as page:
        assert f"{EVE} (operator: may act)" in page.show().text


def test_a_file_of_somebody_at_the_provider_is_his_accounts_in_its_role_alone(
    house: House, team: Team, visit: Callable[..., Visitor]
) -> None:
    groups = [str(uuid4()) for _ in range(150)]
    eve, mallory, nobody = visit(groups=groups), visit("mallory@example.org"), visit("x@y", "")
    assert f"{COOKIE}_1" in eve.cookies  # one that is split
    unverified = visit(EVE, email_verified=False)
    with eve.page() as page:
        path, content = file_of(eve, page)
        for place in (path, f"{path}.png"):
            assert mallory.ask(place) == OTHERS
            assert nobody.ask(place) == unverified.ask(place) == FIRST
        for cookies in forged(team, mallory):
            assert asked_with(team, path, cookies) == FIRST
        boss = {cookie_name(port_of(team)): team.accounts.open_session("boss")}
        assert asked_with(team, path, boss) == OTHERS
        split = {name: value for name, value in eve.cookies.items() if name != f"{COOKIE}_2"}
        assert asked_with(team, path, split) == FIRST
        for role, answer in (("viewer", OTHERS), ("operator", (200, content))):
            team.accounts.add(EVE, role, None)
            assert eve.ask(path) == answer


def port_of(team: Team) -> int:
    return int(team.url.rpartition(":")[2])


def asked_with(team: Team, path: str, cookies: dict[str, str]) -> tuple[int, bytes]:
    visitor = Visitor(team.url, team.provider, cookies)
    try:
        return visitor.ask(path)
    finally:
        visitor.close()


def forged(team: Team, mallory: Visitor) -> Iterator[dict[str, str]]:
    """Cookies that say to be Eve's: of another secret, another page, another name, nobody."""
    claims = f'{{"is_logged_in": true, "email": "{EVE}", "origin": "{team.url}"}}'
    yield {COOKIE: claims}
    for secret, name, text in (
        ("another secret, long enough", COOKIE, claims),
        (COOKIE_SECRET, f"{COOKIE}_tokens", claims),
        (COOKIE_SECRET, COOKIE, claims.replace(team.url, ELSEWHERE)),
        (COOKIE_SECRET, COOKIE, claims.replace("true", "false")),
    ):
        yield {COOKIE: create_signed_value(secret, name, text).decode()}
    _, *signature = mallory.cookies[COOKIE].rsplit(".", 2)
    payload, *_ = create_signed_value("x", COOKIE, claims).decode().rsplit(".", 2)
    yield {COOKIE: ".".join([payload, *signature])}


def test_who_has_no_account_has_nothing_whatever_he_sends(
    house: House, team: Team, visit: Callable[..., Visitor]
) -> None:
    """An operator's own ids of buttons and fields, the address of his file, his statement."""
    eve, stranger = visit(), visit("stranger@example.org", "")
    with eve.page() as page, stranger.page() as theirs:
        button, agree = ask_to_turn(page)
        sql = page.show("sql")
        run, statement = sql.submits["Run"], sql.inputs["Statement"]
        before = state_of(house)
        for drawn in (
            theirs.show(TRAINING, press=button),
            theirs.show(TRAINING, **agree | {"fragment": ""}),
            theirs.show("sql", press=run, typed={statement: ASKED}),
        ):
            only_the_login(drawn)
            assert "There is no account for stranger@example.org" in drawn.text
            assert MARK not in drawn.sent.decode("latin-1")
        assert state_of(house) == before
        path, _ = file_of(eve, page)
        assert stranger.ask(path) == FIRST
