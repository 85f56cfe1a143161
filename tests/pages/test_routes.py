"""Every route that the running dashboard has, asked by everybody over plain HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from dashboard.server import cookie_name
from tests.pages.test_access import WHO, People, people  # noqa: F401 (a fixture)
from tests.support.browser import PAGES
from tests.support.dashboard_house import House

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
#: Prints the routes of the application that ``serve`` starts, with its settings, instead of
#: listening.
LIST = """
import json
import streamlit
from streamlit import config
from dashboard import server

def show(app, config):
    for name, value in config.items():
        streamlit.config.set_option(name, value)
    routes = app._build_starlette_app().routes
    print(json.dumps([[route.path, sorted(getattr(route, "methods", None) or [])]
                      for route in routes]))

streamlit.App.run = show
server.serve("127.0.0.1", 0)
"""
CLOSED, READ = "not there", "for reading, by all"
#: By the path of each route: a path of it that is asked, and to whom it is open.
ROUTES = {
    "/session": ("/session", "its own methods"),
    "/_stcore/health": ("/_stcore/health", READ),
    "/_stcore/host-config": ("/_stcore/host-config", READ),
    "/_stcore/metrics": ("/_stcore/metrics", CLOSED),
    "/media/{file_id:path}": (f"/media/{'0' * 56}.csv", "who is logged in"),
    "/_stcore/upload_file/{session_id}/{file_id}": ("/_stcore/upload_file/1/2", CLOSED),
    "/component/{path:path}": ("/component/x/y.js", CLOSED),
    "/_stcore/bidi-components/{path:path}": ("/_stcore/bidi-components/x/y.js", CLOSED),
    "/_stcore/stream": ("/_stcore/stream", CLOSED),  # a socket; by plain HTTP nothing
    "/auth/login": ("/auth/login", "of OpenID Connect"),
    "/auth/logout": ("/auth/logout", "of OpenID Connect"),
    "/oauth2callback": ("/oauth2callback", "of OpenID Connect"),
    "/_stcore/agent/interact": ("/_stcore/agent/interact", CLOSED),
    "/_stcore/agent/openapi.json": ("/_stcore/agent/openapi.json", CLOSED),
    "/_stcore/agent/mcp": ("/_stcore/agent/mcp", CLOSED),
    "": ("/", READ),  # the empty page and its parts
}
#: Of no route of its own: the last one would answer them all with the empty page.
OTHERS = {
    **{f"/{name.lower()}": READ for name in PAGES},
    **dict.fromkeys(("/versions/", "/index.html", "/favicon.png", "/manifest.json"), READ),
    **dict.fromkeys(
        ("/nowhere", "/versions/4", "/_stcore", "/_stcore/", "/_stcore/message", "/app/static/x",
         "/_stcore/script-health-check", "/metrics", "/health", "/st-allowed-message-origins",
         "/session/x", "/mediax", "/staticx", "//evil.example/", "/.env", "/accounts.db"), CLOSED,
    ),
}  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    environment = {**os.environ, "AURORA_HOME": str(tmp_path_factory.mktemp("routes")),
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LIST], env=environment, capture_output=True,
                          text=True, timeout=200, check=True)  # fmt: skip
    listed: dict[str, set[str]] = {}
    for path, methods in json.loads(done.stdout.splitlines()[-1]):
        listed.setdefault(path, set()).update(methods)
    return listed


def test_of_every_route_it_is_decided_who_may_ask_it(routes: dict[str, set[str]]) -> None:
    """A route of a new Streamlit, or of ours, is neither open nor forgotten."""
    assert {path or "/" for path in routes} == {path or "/" for path in ROUTES}


def expected(who: str, method: str, rule: str) -> set[int]:
    reads = method in ("GET", "HEAD")
    if rule == CLOSED:
        return {404}
    if rule == "its own methods":
        return {200, 403} if method in ("POST", "DELETE") else {405}
    if not reads:
        return {405}
    if rule == "who is logged in":
        return {404} if who in ("viewer", "operator") else {403}
    return {200, 301} if rule == READ else {200, 302, 307, 400, 404}


@pytest.mark.parametrize("who", [*WHO, "operator"])
def test_every_route_answers_everybody_as_it_was_decided(
    house: House,
    people: People,  # noqa: F811
    routes: dict[str, set[str]],
    who: str,
) -> None:
    asked = {path: rule for path, rule in ROUTES.values()} | OTHERS
    origin = "http://evil.example" if who == "other origin" else people.url
    headers = {"Origin": origin}
    if people.tokens[who]:
        headers["Cookie"] = f"{cookie_name(people.port)}={people.tokens[who]}"
    with httpx.Client(headers=headers, timeout=60) as client:
        for path, rule in asked.items():
            for method in METHODS:
                answer = client.request(method, f"{people.url}{path}")
                where = (method, path, answer.status_code)
                assert answer.status_code in expected(who, method, rule), where
                cookie = answer.headers.get("set-cookie", "")
                assert "aurora_session" not in cookie or method == "DELETE", where
                assert not any(
                    word in answer.text for word in ("aurora.db", "argon2", "SQLite", "vera")
                ), where
    for token in ("operator", "viewer"):
        assert people.accounts.of_session(people.tokens[token]) is not None
