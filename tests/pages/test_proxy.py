"""The dashboard behind a real nginx with TLS that keeps Host, under a sub-path."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from aurora_sgl.config import Settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import throttle
from dashboard import reach
from tests.support import browser, hostile, nginx
from tests.support.browser import PAGES, Dashboard
from tests.support.dashboard_house import House
from tests.support.page_socket import PageSocket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

BASE = "/aurora"
DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
#: What a page must not have of a client's making, see ``support.hostile``.
INTERPRETED = f"""() => {{
  const main = document.querySelector('[data-testid=stApp]');
  const own = e => e.tagName === 'A' && e.origin === location.origin
    && e.pathname.startsWith('{BASE}/');
  const bad = [...main.querySelectorAll('a, img, script, iframe, svg image, form')].filter(e =>
    [...e.attributes].some(a => /{hostile.HOST}|alert\\(/.test(a.value)) && !own(e));
  const made = [...main.querySelectorAll('[onerror], [onload], [onfocus], .katex, blockquote')];
  return [...bad, ...made].map(e => e.outerHTML.slice(0, 200));
}}"""


def location() -> str:
    """nginx' block of the docs."""
    block = re.search(r"\n    location /aurora/ \{.*?\n    \}\n", DOCS.read_text(), re.S)
    assert block is not None
    return block[0]


@pytest.fixture(scope="module")
def proxied(hostile_home: Path) -> Iterator[Dashboard]:
    """A dashboard that is meant to be shown by a proxy on this machine."""
    flags = ("--base-path", BASE, "--host-name", nginx.NAME, "--trusted-proxy", "127.0.0.1")
    dashboard = browser.start(hostile_home, None, *flags)
    assert dashboard.url.endswith(BASE)
    yield dashboard
    dashboard.stop()


def test_the_dashboard_works_behind_a_tls_proxy_under_a_sub_path(
    proxied: Dashboard, chromium: Browser, tmp_path: Path
) -> None:
    """Login, sessions, websocket, every page, a download, logout; and what clients wrote is text
    on all of them."""
    upstream = proxied.url.removeprefix("http://").removesuffix(BASE)
    with nginx.before(upstream, BASE, tmp_path, location()) as url:
        context = chromium.new_context(ignore_https_errors=True, accept_downloads=True,
                                       viewport={"width": 1440, "height": 900})  # fmt: skip
        context.set_default_timeout(browser.PATIENCE)
        viewer = browser.Viewer(context, context.new_page(), url)
        page = viewer.page
        page.on("request", lambda request: viewer.asked.append(request.url))
        page.on("websocket", lambda socket: viewer.asked.append(socket.url))
        page.on("dialog", lambda dialog: viewer.errors.append(dialog.message))
        viewer.log_in("ada")
        viewer.keeps_login()
        (cookie,) = [c for c in context.cookies() if c["name"].startswith("aurora_session")]
        assert (cookie["path"], cookie["secure"], cookie["httpOnly"]) == (BASE, True, True)
        page.goto(f"{url}/audit")  # the address of a page, and the login is kept
        expect(page.get_by_role("heading", name="Audit", level=1)).to_be_visible()
        for name in PAGES:
            viewer.open(name)
            assert page.url.split("?")[0] in (f"{url}/{name.lower()}", f"{url}/")
            assert page.evaluate(INTERPRETED) == [], name
        viewer.open("Now")  # a link of an alert, from there and back to the page itself
        page.get_by_test_id("stMain").get_by_role("link", name=re.compile("^Run")).click()
        expect(page.get_by_role("heading", name="Training", level=1)).to_be_visible()
        assert page.url == f"{url}/training?run=1"
        viewer.open("SQL")
        page.get_by_role("textbox", name="Statement").fill(
            "SELECT domain, count(*) AS n FROM request GROUP BY domain"
        )
        page.keyboard.press("Control+Enter")
        expect(page.get_by_text("rows in")).to_be_visible()
        with page.expect_download() as download:
            page.get_by_role("button", name="Download CSV").click()
        assert Path(download.value.path()).read_text().startswith("domain,n")
        page.get_by_role("tab", name="Chart").click()
        expect(page.locator(".js-plotly-plot")).to_be_visible()
        assert page.evaluate(INTERPRETED) == []
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("button", name="Log in")).to_be_visible()
        viewer.keeps_login(False)
        own = (url, url.replace("https", "wss", 1), "data:", f"blob:{url.removesuffix(BASE)}")
        assert not [asked for asked in viewer.asked if not asked.startswith(own)]
        assert not viewer.errors
        context.close()


def test_names_that_were_not_given_are_not_answered(proxied: Dashboard) -> None:
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    for host in ("evil.example", "aurora.localhost.evil.example", f"x.{nginx.NAME}", "*"):
        stream = httpx.get(f"{proxied.url}/_stcore/stream", headers={**upgrade, "Host": host})
        assert stream.status_code == 403, host


def _levels(home: Path) -> set[str]:
    with closing(sqlite3.connect(home / "dashboard" / "accounts.db")) as db:
        return {key for (key,) in db.execute("SELECT key FROM failed_login")}


@pytest.mark.parametrize(
    ("said", "address"),
    [("203.0.113.7", "203.0.113.7"), ("10.1.2.3, 198.51.100.9", "198.51.100.9"),
     ("198.51.100.8, 127.0.0.1", "198.51.100.8"), ("", "local")],
)  # fmt: skip
def test_failed_logins_count_at_the_address_that_a_trusted_proxy_says(
    proxied: Dashboard, hostile_home: Path, said: str, address: str
) -> None:
    assert guess(proxied, hostile_home, f"somebody at {address}", said) == address


def guess(dashboard: Dashboard, home: Path, name: str, forwarded: str) -> str:
    """The address under which a failed login of this name counts; "" for none of those tried."""
    headers = {"X_Forwarded_For": forwarded} if forwarded else {}
    with PageSocket(dashboard.url, **headers) as socket:
        form = socket.show()
        done = socket.show(
            press=form.submits["Log in"],
            typed={form.inputs["Name"]: name, form.inputs["Password"]: "a wrong guess"},
        )
    assert "the name or the password is wrong" in done.text
    tried = (*(part.strip() for part in forwarded.split(",")), "local")
    return next((one for one in tried if throttle.keys_of(name, one)[0][0] in _levels(home)), "")


def test_nobody_elses_forwarded_address_is_believed(shared: House, running: Dashboard) -> None:
    """Without a trusted proxy not even this machine's own."""
    assert guess(running, shared.home, "a name for this test alone", "203.0.113.7") == "local"


@pytest.mark.parametrize(
    ("option", "value"),
    [("names", "https://aurora.example.org"), ("names", "aurora.example.org:443"), ("names", "*"),
     ("names", "a b"), ("base", "/a/../b"), ("base", "/a//b"), ("base", "/a?b"),
     ("base", "."), ("proxies", "proxy"), ("proxies", "10.0.0.1/8"), ("proxies", "*")],
)  # fmt: skip
def test_a_name_path_or_proxy_that_is_none_is_refused_in_one_line(option: str, value: str) -> None:
    given = {option: value if option == "base" else [value]}
    with pytest.raises(AuroraError) as refused:
        reach.read("127.0.0.1", 8501, Settings(), **given)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value) and "AURORA_DASHBOARD_" in str(refused.value)


def test_what_the_settings_say_counts_where_no_flag_does() -> None:
    settings = Settings(
        dashboard_host_names="Aurora.Example.org, *.lab.example.org", dashboard_base_path="a/b/",
        dashboard_trusted_proxies="10.0.0.7, 10.1.0.0/16",
    )  # fmt: skip
    site = reach.read("127.0.0.1", 8501, settings)
    assert (site.address, site.public) == (
        "http://127.0.0.1:8501/a/b", "https://aurora.example.org/a/b")  # fmt: skip
    assert {"localhost", "aurora.example.org", "*.lab.example.org"} <= set(site.allowed_hosts)
    assert site.proxies == "10.0.0.7,10.1.0.0/16"
    assert reach.read("0.0.0.0", 1, settings, base="", names=["x.org"]).public == "https://x.org"
    assert reach.read("10.0.0.5", 1, Settings()).allowed_hosts == []


def test_a_dashboard_under_a_sub_path_is_nowhere_else(proxied: Dashboard) -> None:
    root = proxied.url.removesuffix(BASE)
    assert httpx.post(f"{root}/session", headers={"x-aurora-dashboard": "1"}).status_code in (
        404, 405)  # fmt: skip
    assert httpx.get(f"{proxied.url}/_stcore/metrics").status_code == 404
    assert httpx.get(f"{proxied.url}/media/{'0' * 56}.csv").status_code == 403
