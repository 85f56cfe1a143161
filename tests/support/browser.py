"""A dashboard as its own process and a real headless Chromium that looks at it."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
PASSWORDS = {"ada": "correct horse 1", "vera": "battery staple 2"}
#: Pages by name, in the order of the navigation.
PAGES = (
    *("Now", "Alerts", "Acceptance", "Versions", "Compare", "Training", "Worth"),
    *("Requests", "SQL", "Audit"),
)
#: Milliseconds that a page may take on a busy machine before a test gives up.
PATIENCE = 60_000
expect.set_options(timeout=PATIENCE)
#: Everything on the page is of the last run and has been drawn.
WHOLE = """() => {
  const all = (css, root = document) => [...root.querySelectorAll(css)];
  const seen = e => e.offsetParent !== null;
  return document.fonts.status === 'loaded'
    && !all('[data-stale=true]').some(seen)
    && all('[data-testid=stPlotlyChart]').filter(seen)
         .every(e => all('.main-svg', e).length && e.querySelector('.main-svg').clientWidth)
    && all('[data-testid=stDataFrame]').filter(seen).every(e => e.querySelector('canvas'));
}"""
#: Asked again and again: the same sizes three times in a row.
STILL = """() => {
  const main = document.querySelector('[data-testid=stMain]');
  const now = [main.scrollHeight, main.scrollWidth, main.querySelectorAll('*').length].join();
  const last = window.auroraStill || {now: '', times: 0};
  window.auroraStill = {now, times: last.now === now ? last.times + 1 : 0};
  if (window.auroraStill.times < 3) return false;
  delete window.auroraStill;
  return true;
}"""
READY = "[data-testid=stApp][data-test-script-state=notRunning]"


@dataclass
class Dashboard:
    """``url`` as printed; ``setup`` the one-time link, when it printed one."""

    process: subprocess.Popen[str]
    url: str
    setup: str | None

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(home: Path, environment: dict[str, str] | None = None, *flags: str) -> Dashboard:
    """``aurora-sgl dashboard`` on a free port; returns when it has printed its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aurora_sgl.cli", "dashboard", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=(home / "dashboard.err").open("wb"),
        text=True,
        cwd=home,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "AURORA_HOME": str(home),
            **(environment or {}),
        },
        start_new_session=True,
    )
    assert process.stdout is not None
    url = setup = None
    for line in process.stdout:
        url = url or _found(r"dashboard: (http://\S+)$", line)
        setup = _found(r"(http://\S+\?setup=\S+)", line)
        if url and (setup or accounts_are_there(home)):
            break
    assert url, (home / "dashboard.err").read_text()
    wait_for_port(url)
    return Dashboard(process, url, setup)


def accounts_are_there(home: Path) -> bool:
    from aurora_sgl.store.accounts import Accounts

    return bool(Accounts(home / "dashboard" / "accounts.db").all())


def _found(pattern: str, line: str) -> str | None:
    match = re.search(pattern, line.strip())
    return match.group(1) if match else None


def wait_for_port(url: str, seconds: float = PATIENCE / 1000) -> None:
    import httpx

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}/_stcore/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise TimeoutError(url)


def add_accounts(home: Path) -> None:
    from aurora_sgl.store.accounts import Accounts

    path = home / "dashboard" / "accounts.db"
    Accounts(path)
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany("INSERT OR REPLACE INTO account VALUES (?, ?, ?, ?)", _accounts())


@cache
def _accounts() -> list[tuple[object, ...]]:
    """Their rows as the product makes them; a hash takes long on purpose."""
    from aurora_sgl.store.accounts import Accounts

    with TemporaryDirectory() as folder:
        path = Path(folder) / "accounts.db"
        accounts = Accounts(path)
        accounts.add("ada", "operator", PASSWORDS["ada"])
        accounts.add("vera", "viewer", PASSWORDS["vera"])
        with closing(sqlite3.connect(path)) as db:
            return db.execute("SELECT * FROM account").fetchall()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium. Raises ``RuntimeError`` with what to do when it is not there."""
    path = which("chromium") or which("chromium-browser") or which("google-chrome")
    if path is None:
        raise RuntimeError("Chromium is missing; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@dataclass
class Viewer:
    """One person at one browser; what his browser asked for, and what went wrong in it."""

    context: BrowserContext
    page: Page
    url: str
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def log_in(self, name: str) -> None:
        self.page.goto(self.url)
        self.page.get_by_role("textbox", name="Name").fill(name)
        self.page.get_by_role("textbox", name="Password").fill(PASSWORDS[name])
        self.page.get_by_role("button", name="Log in").click()
        expect(self.page.get_by_role("heading", name="Now", exact=True)).to_be_visible()

    def let_in(self, home: Path, name: str) -> None:
        """The cookie of a login by the form, without the form."""
        from aurora_sgl.store.accounts import Accounts
        from dashboard.server import cookie_name

        token = Accounts(home / "dashboard" / "accounts.db").open_session(name)
        cookie = cookie_name(int(self.url.rpartition(":")[2]))
        self.context.add_cookies([{"name": cookie, "value": token, "url": self.url}])

    def open(self, name: str) -> None:
        """A page by its link in the navigation; returns when it is drawn."""
        self.page.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True).click()
        expect(self.page.get_by_role("heading", name=name, level=1, exact=True)).to_be_visible()
        self.ready()

    def ready(self) -> None:
        """Wait until everything is drawn once. (Parts that refresh are drawn again and again.)"""
        self.page.locator(READY).wait_for()
        self.page.wait_for_function("!document.querySelector('[data-testid=stSkeleton]')")

    def settled(self) -> None:
        """Wait until a picture of the page would be whole: no element of an earlier run is left,
        charts and tables are drawn, fonts are there, and nothing moved for a while."""
        self.ready()
        self.page.wait_for_function(WHOLE)
        self.page.wait_for_function(STILL, polling=100)

    def rest(self) -> None:
        """Look at nothing: pages refresh themselves as long as they are open, which took half of a
        processor from all tests that came after."""
        self.page.goto("about:blank")

    def keeps_login(self, kept: bool = True) -> None:
        """Wait until the browser keeps the login in a cookie, or has forgotten it."""
        until = time.monotonic() + PATIENCE / 1000
        while any(c["name"].startswith("aurora_session") for c in self.context.cookies()) != kept:
            assert time.monotonic() < until, "the login's cookie"
            self.page.wait_for_timeout(100)

    def choose(self, label: str, option: str) -> None:
        """An option of a select box."""
        box = self.page.get_by_role("combobox", name=label)
        box.click()
        box.fill(option)  # long lists draw only what is seen
        self.page.get_by_role("option", name=option, exact=True).click()


def viewer(browser: Browser, url: str, *, theme: str = "light", width: int = 1440) -> Viewer:
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if theme == "dark" else "light",
        timezone_id="Europe/Zurich",
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    found = Viewer(context, page, url)
    page.on("request", lambda request: found.asked.append(request.url))
    page.on("websocket", lambda socket: found.asked.append(socket.url))
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    return found
