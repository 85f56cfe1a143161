"""What every page has around it: the login, the navigation, the choice of a group."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import streamlit as st
from sqlalchemy.exc import DBAPIError

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.accounts import OPERATOR, Account

from . import dialogs, links, live, login, saved_views, tokens, words
from .context import find_groups, group, in_words
from .parts import guarded
from .screens import (
    acceptance,
    alerts,
    audit,
    compare,
    now,
    requests,
    sql,
    training,
    versions,
    worth,
)

ICON, LOGO = (Path(__file__).parent / "pictures" / name for name in ("icon.svg", "logo.svg"))
#: Less empty space above and beside the pages than Streamlit leaves.
STYLE = """<style>
[data-testid=stMainBlockContainer] {padding:3.9rem 2rem 3rem}
[data-testid=stMainBlockContainer] h1 {padding-top:0}
[data-testid=stButtonGroup] [role=radiogroup] {flex-wrap:wrap}
[data-testid=stTabs] [role=tablist] {flex-wrap:wrap}
/* Streamlit's own button writes cells that a spreadsheet would run, see exports. */
[data-testid=stElementToolbar] button[aria-label^="Download as CSV"] {display:none}
[data-testid=stAlertContainer] ul {margin:0 0 1rem; padding-left:.3rem}
/* Streamlit greys out what it is about to draw again. Parts that refresh by themselves would come
   and go all the time, and too pale to be read; its sign in the corner says that it is at work. */
[data-stale=true] {opacity:1 !important; transition:none !important}
/* Small print, keys and buttons have the contrast that WCAG 2.1 AA asks for, in both themes. */
[data-testid=stCaptionContainer] {opacity:.9}
[data-testid=stCaptionContainer] code {color:inherit}
[data-testid^=stBaseButton] kbd {opacity:1}
button[kind^=primary]:not(:disabled) {background-color:#0072B2; border-color:#0072B2}
/* On a tablet numbers stand in two rows, and tables below charts. */
@media (min-width: 641px) and (max-width: 1000px) {
  [data-testid=stHorizontalBlock]:has(> [data-testid=stColumn] [data-testid=stMetric]),
  [data-testid=stHorizontalBlock]:has(> [data-testid=stColumn] .aurora-table) {flex-wrap:wrap}
  [data-testid=stColumn]:has([data-testid=stMetric]) {min-width:13rem}
  [data-testid=stColumn]:has(.aurora-table) {min-width:100%}
}
</style>"""
#: Pixels; Streamlit's own 300 leave a laptop little room for the pages.
SIDEBAR = 240
PAGES = (
    (now, "Now", "speed"),
    (alerts, "Alerts", "notifications"),
    (acceptance, "Acceptance", "monitoring"),
    (versions, "Versions", "account_tree"),
    (compare, "Compare", "compare"),
    (training, "Training", "model_training"),
    (worth, "Worth", "savings"),
    (requests, "Requests", "segment"),
    (sql, "SQL", "database"),
    (audit, "Audit", "history"),
)


def show() -> None:
    st.set_page_config(page_title="Aurora-SGL", page_icon=str(ICON), layout="wide",
                       initial_sidebar_state=SIDEBAR)  # fmt: skip
    st.logo(str(LOGO), icon_image=str(ICON), size="large")
    st.html(STYLE + words.STYLE + tokens.STYLE + live.STYLE)
    account = login.account()
    login.settle(account)
    pages = [
        st.Page(
            guarded(page.show), title=title, icon=f":material/{icon}:",
            url_path=title.lower(), default=page is now,
        )
        for page, title, icon in PAGES
    ]  # fmt: skip
    links.keep(pages)
    # Before the login too, so that an address of a page leads there afterwards.
    chosen = st.navigation(pages, position="hidden" if account is None else "sidebar")
    if account is None:
        login.show()
        return
    login.keep_cookie()
    with st.sidebar:
        _who(account)
    if not _choose_group():
        return
    names = [title.lower() for _, title, _ in PAGES]
    with st.sidebar:
        guarded(saved_views.show)(group(), chosen.title.lower(), names)
    dialogs.open_asked()
    chosen.run()


@st.fragment(run_every=5.0)
def _wait() -> None:
    """Draws the page anew as soon as there is something to look at."""
    with suppress(AuroraError, DBAPIError):
        if find_groups():
            st.rerun()


def _who(account: Account) -> None:
    what = "operator: may act" if account.role == OPERATOR else "viewer: may look"
    st.caption(f"{account.name} ({what})")
    st.button("Log out", on_click=login.log_out, icon=":material/logout:", key="log out")


def _choose_group() -> bool:
    """Whether there is a group to look at; else the page says what to do."""
    try:
        groups = find_groups()
    except (AuroraError, DBAPIError) as error:
        st.header("The store can't be read")
        st.error(words.literal(in_words(error)), icon=":material/cloud_off:")
        if "db upgrade" in str(error):
            st.write("A server or the demo makes the tables too, when it starts.")
        st.button("Try again", icon=":material/refresh:")
        _wait()
        return False
    if not groups:
        st.header("Nothing was served yet")
        st.info("The store is empty: no server was ever started with it. Start one:")
        st.code(
            "make demo                                 # a small model and sample traffic\n"
            "aurora-sgl serve --model PATH             # your own",
            language="sh",
        )
        st.write("This page shows it as soon as it is there.")
        st.button("Look again", icon=":material/refresh:")
        _wait()
        return False
    names = [group.name for group in groups]
    name = names[0]
    if len(groups) > 1:
        with st.sidebar:
            name = st.selectbox("Deployment group", names, key="deployment", bind="query-params")
    st.session_state["group"] = groups[names.index(name) if name in names else 0]
    return True
