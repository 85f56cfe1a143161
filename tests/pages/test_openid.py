"""A team logs in through its own OpenID Connect provider; an account says what one may do."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, expect

pytest.importorskip("authlib", reason="the extra openid is not installed")

from aurora_sgl.store.accounts import Accounts
from tests.pages.conftest import Team, only_loopback
from tests.support import browser, openid

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_team_logs_in_through_its_provider_and_only_with_an_account(
    team: Team, chromium: Browser
) -> None:
    viewer = browser.viewer(chromium, team.url)
    try:
        _journey(viewer, team.provider, team.accounts)
    finally:
        viewer.context.close()
        for name in ("eve@example.org", "grace@example.org"):
            if team.accounts.get(name):
                team.accounts.remove(name)


def _journey(viewer: browser.Viewer, provider: openid.Provider, accounts: Accounts) -> None:
    page = viewer.page

    def enter(email: str, *, verified: bool = True) -> None:
        provider.claims = {"email": email, "email_verified": verified}
        before = provider.logins
        page.goto(viewer.url)
        page.get_by_role("button", name="Log in with OpenID Connect").click()
        expect(page.get_by_role("button", name="Log out")).to_be_visible()
        assert provider.logins == before + 1

    def leave() -> None:
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("button", name="Log in", exact=True)).to_be_visible()
        expect(page.get_by_role("button", name="Log out")).to_have_count(0)

    enter("eve@example.org")  # no account, no page
    expect(page.get_by_text("There is no account for eve@example.org")).to_be_visible()
    expect(page.get_by_test_id("stSidebarNav")).to_have_count(0)
    leave()

    accounts.add("eve@example.org", "viewer", None)
    enter("eve@example.org")
    expect(page.get_by_text("eve@example.org (viewer: may look)")).to_be_visible()
    accounts.add("eve@example.org", "operator", None)
    page.reload()
    expect(page.get_by_text("eve@example.org (operator: may act)")).to_be_visible()
    leave()

    enter("eve@example.org", verified=False)  # an address that nobody verified is nobody's
    expect(page.get_by_text("There is no account for this identity")).to_be_visible()
    leave()

    accounts.add("grace@example.org", "operator", "a long enough one")
    enter("grace@example.org")  # an account with a password is opened by the password alone
    expect(page.get_by_text("There is no account for grace@example.org")).to_be_visible()
    only_loopback(viewer)
