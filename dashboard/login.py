"""No account, no page: logging in and out, and the first operator."""

from __future__ import annotations

import json
import secrets

import streamlit as st

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.accounts import OPERATOR, SHORTEST_PASSWORD, Account

from . import addresses
from .asker import login_of, of_openid, verified_name
from .context import accounts
from .server import cookie_name

TOKEN, SETUP = "session_token", "setup"
CHANGE, OWNER = "cookie_change", "owner"
#: What a page keeps that is of the login itself; all else is of the account that looks at it.
OF_LOGIN = frozenset({TOKEN, CHANGE, OWNER})


def account() -> Account | None:
    """Who looks at the page, with the role that the account has at this moment."""
    token = st.session_state.get(TOKEN) or _cookie()
    if token:
        user = accounts().of_session(token)
        if user is not None:
            st.session_state[TOKEN] = token
            return user
        st.session_state.pop(TOKEN, None)
    return _openid_account() if _openid_is_set_up() else None


def is_operator() -> bool:
    user = account()
    return user is not None and user.role == OPERATOR


def owns_page(user: Account | None) -> bool:
    """Whether what the page keeps was kept for this account in this role."""
    return st.session_state.get(OWNER) == _owner(user)


def settle(user: Account | None) -> None:
    """Before a page is drawn: what it kept for another account, or for this one in another role,
    goes. The page is the same one after a logout, and so is its state."""
    if owns_page(user):
        return
    for key in list(st.session_state):
        if key not in OF_LOGIN:
            del st.session_state[key]
    st.session_state[OWNER] = _owner(user)


def _owner(user: Account | None) -> tuple[str, str] | None:
    return (user.name, user.role) if user is not None else None


def show() -> None:
    """The page for those who are not logged in."""
    _keep()
    _, middle, _ = st.columns([1, 2, 1])
    with middle:
        st.title("Aurora-SGL")
        token = st.query_params.get(SETUP, "")
        if token and accounts().setup_is_open(token):
            _first_operator(token)
        elif not accounts().all():
            st.info(
                "Nobody has an account yet. Open the one-time link that was printed where the "
                "dashboard was started, or run there:"
            )
            st.code("aurora-sgl dashboard add-user NAME --role operator", language="sh")
        else:
            if token:
                st.warning("This one-time link was used already, or is too old. Log in instead.")
            _log_in()


def log_out() -> None:
    token = st.session_state.pop(TOKEN, None)
    if token:
        accounts().close_session(token)
    st.session_state[CHANGE] = ""
    if _openid_is_set_up() and st.user.is_logged_in:
        accounts().end_login(login_of(st.user))
        st.logout()


def keep_cookie() -> None:
    """Let the browser keep, or forget, the login; drawn once after it changed."""
    _keep()


def _log_in() -> None:
    with st.form("log in"):
        st.subheader("Log in")
        name = st.text_input("Name", autocomplete="username")
        password = st.text_input("Password", type="password", autocomplete="current-password")
        if st.form_submit_button("Log in", type="primary"):
            try:
                user = accounts().log_in(name, password, st.context.ip_address or "local")
            except AuroraError as error:
                st.error(str(error), icon=":material/error:")
            else:
                _enter(user)
    if _openid_is_set_up():
        if st.button("Log in with OpenID Connect", icon=":material/key:"):
            st.login()
        if st.user.is_logged_in and not accounts().has_ended(login_of(st.user)):
            st.error(
                f"There is no account for {_openid_name() or 'this identity'}. An operator makes "
                "one with: aurora-sgl dashboard add-user NAME --role viewer --openid"
            )
            st.button("Log out of OpenID Connect", on_click=log_out)


def _first_operator(token: str) -> None:
    with st.form("first operator"):
        st.subheader("Make the first operator")
        name = st.text_input("Name", autocomplete="username")
        password = st.text_input(
            "Password", type="password", autocomplete="new-password",
            help=f"At least {SHORTEST_PASSWORD} characters.",
        )  # fmt: skip
        again = st.text_input("Password again", type="password", autocomplete="new-password")
        if st.form_submit_button("Make the account", type="primary"):
            try:
                if not secrets.compare_digest(password.encode(), again.encode()):
                    raise AuroraError("the two passwords differ")
                user = accounts().set_up(token, name, password)
            except AuroraError as error:
                st.error(str(error), icon=":material/error:")
            else:
                st.query_params.clear()
                _enter(user)


def _enter(user: Account) -> None:
    token = accounts().open_session(user.name)
    st.session_state[TOKEN] = token
    st.session_state[CHANGE] = token
    st.rerun()


def _keep() -> None:
    token = st.session_state.pop(CHANGE, None)
    if token is None:
        return
    method = "POST" if token else "DELETE"
    st.html(
        f"<script>fetch('{addresses.base()}/session', {{"
        f"method: '{method}', body: {json.dumps(token) if token else 'undefined'}, "
        "headers: {'x-aurora-dashboard': '1'}})</script>",
        unsafe_allow_javascript=True,
    )


def _cookie() -> str | None:
    try:
        port = int((st.context.headers.get("Host") or "").rpartition(":")[2])
    except ValueError:
        port = None
    return st.context.cookies.get(cookie_name(port))


# -- OpenID Connect: Streamlit's own login, once [auth] stands in its secrets.toml ---------------


def _openid_is_set_up() -> bool:
    try:
        return "auth" in st.secrets
    except FileNotFoundError:
        return False


def _openid_name() -> str:
    return verified_name(st.user)


def _openid_account() -> Account | None:
    return of_openid(accounts(), st.user) if st.user.is_logged_in else None
