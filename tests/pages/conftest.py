"""One filled store and one Chromium a session; a store of its own for each test that acts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import streamlit
from playwright.sync_api import Browser, expect
from streamlit.components.v2 import manifest_scanner

from aurora_sgl import rollout, store
from aurora_sgl.config import get_settings
from aurora_sgl.rollout.promote import set_candidate
from aurora_sgl.store import queries
from aurora_sgl.store.accounts import Accounts
from aurora_sgl.store.queries import sql_console
from tests.conftest import new_database
from tests.support import browser as chrome
from tests.support import dashboard_house as samples
from tests.support.browser import Dashboard, Viewer
from tests.support.dashboard_house import House

if TYPE_CHECKING:
    from tests.support.openid import Provider


@pytest.fixture(scope="session", autouse=True)
def _packages_are_looked_at_once() -> Iterator[None]:
    """Streamlit's `AppTest` reads what every installed package says of itself, at every run, in
    search of components: four fifths of a drawing. They stay the same while tests run."""
    scan = cache(manifest_scanner.scan_component_manifests)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(manifest_scanner, "scan_component_manifests", scan)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = samples.fill(tmp_path_factory.mktemp("house"), requests=260)
    chrome.add_accounts(house.home)
    yield house
    house.engine.dispose()


@pytest.fixture
def house(shared: House) -> Iterator[House]:
    """The store that all share, with version 3 live, 2 before it and 4 the candidate, and servers
    that follow and are heard of, however long a test takes."""
    with store.session(shared.engine, write=False) as s:
        names = queries.aliases.aliases(s, shared.group_id)
    if (names.get("live"), names.get("previous")) != (3, 2):
        for version in (2, 3):
            shared.servers_follow()
            rollout.promote(shared.engine, version, actor="test", reason="as before", force=True)
    if "candidate" not in names:  # it was promoted
        set_candidate(shared.engine, 4, shared.group_id)
    shared.servers_follow()
    with shared.heard_of():
        yield shared


@pytest.fixture(scope="session")
def running(shared: House) -> Iterator[Dashboard]:
    """The dashboard of the shared store."""
    dashboard = chrome.start(shared.home)
    yield dashboard
    dashboard.stop()


@dataclass(frozen=True)
class Team:
    """A dashboard of the shared store whose people log in at their provider; it has accounts of its
    own."""

    url: str
    provider: Provider
    accounts: Accounts


@pytest.fixture(scope="session")
def team(shared: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    pytest.importorskip("authlib", reason="the extra openid is not installed")
    from tests.support import openid

    home = tmp_path_factory.mktemp("team")
    accounts = Accounts(home / "dashboard" / "accounts.db")
    accounts.add("boss", "operator", "a long enough one")
    with openid.provider() as provider:
        openid.set_up(home, provider)
        artifacts = str(shared.home / "artifacts")
        dashboard = chrome.start(
            home, {"AURORA_DATABASE_URL": shared.url, "AURORA_ARTIFACTS": artifacts}
        )
        yield Team(dashboard.url, provider, accounts)
        dashboard.stop()


@pytest.fixture(scope="session")
def hostile_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which every text that is not ours is hostile."""
    home = tmp_path_factory.mktemp("hostile")
    samples.fill_hostile(home).engine.dispose()
    chrome.add_accounts(home)
    return home


@pytest.fixture(scope="session")
def hostile_postgres(
    tmp_path_factory: pytest.TempPathFactory, postgres_url: str, upgraded_postgres: str
) -> Iterator[House]:
    """The same in PostgreSQL."""
    with new_database(postgres_url, upgraded_postgres) as url:
        engine = store.connect(url)
        house = samples.fill_hostile(tmp_path_factory.mktemp("hostile"), engine)
        chrome.add_accounts(house.home)
        roles = sql_console.make_sql_roles(engine)
        sql_console.keep_roles(house.home / "dashboard" / "sql-roles.json", roles)
        yield house
        engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def among_hostile(request: pytest.FixtureRequest, settings_of: Callable[..., None]) -> Path:
    """The data folder of such a store, of each kind in turn; this process is of it."""
    if request.param == "sqlite":
        home: Path = request.getfixturevalue("hostile_home")
        settings_of(home)
        return home
    house: House = request.getfixturevalue("hostile_postgres")
    settings_of(house.home, database_url=house.url)
    return house.home


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes this process one of the house at a folder, with further settings, that kept nothing of
    what an earlier test drew: pages are drawn quicker than what they keep grows old."""

    def use(home: Path, **more: str) -> None:
        monkeypatch.chdir(home)
        for name in [name for name in os.environ if name.startswith("AURORA_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AURORA_HOME", str(home))
        for name, value in more.items():
            monkeypatch.setenv(f"AURORA_{name.upper()}", value)
        get_settings.cache_clear()
        streamlit.cache_data.clear()
        streamlit.cache_resource.clear()

    yield use
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with chrome.chromium() as found:
        yield found


@pytest.fixture(scope="session")
def people(chromium: Browser, running: Dashboard) -> Iterator[dict[str, Viewer]]:
    """Everybody logs in once, by the form."""
    logged_in = {name: chrome.viewer(chromium, running.url) for name in chrome.PASSWORDS}
    for name, viewer in logged_in.items():
        viewer.log_in(name)
        viewer.keeps_login()
        viewer.rest()
    yield logged_in
    for viewer in logged_in.values():
        viewer.context.close()


@pytest.fixture
def look(people: dict[str, Viewer]) -> Iterator[Callable[..., Viewer]]:
    """A person's browser at a page. Whatever a test does: nothing but loopback is asked, and no
    script fails."""

    def open_(name: str, where: str = "") -> Viewer:
        viewer = people[name]
        viewer.page.goto(f"{viewer.url}/{where}")
        # The page that was asked for, and nobody was logged out meanwhile.
        title = {page.lower(): page for page in chrome.PAGES}[where.partition("?")[0] or "now"]
        expect(viewer.page.get_by_role("heading", name=title, level=1, exact=True)).to_be_visible()
        expect(
            viewer.page.get_by_text(re.compile(rf"^{name} \((operator|viewer): "))
        ).to_be_visible()
        viewer.ready()
        return viewer

    yield open_
    for viewer in people.values():
        only_loopback(viewer)
        viewer.rest()


def only_loopback(viewer: Viewer) -> None:
    own = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:http://127.0.0.1:")
    assert viewer.asked
    assert not [url for url in viewer.asked if not url.startswith(own)]
    assert not viewer.errors
