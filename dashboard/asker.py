"""Who asks by plain HTTP, where no page runs: by our cookie or Streamlit's of OpenID Connect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request

from aurora_sgl.store.accounts import Account, Accounts

from .server import accounts_path, cookie_name


def asker(request: Request) -> Account | None:
    """The account as it is at this moment."""
    accounts = Accounts(accounts_path())
    token = request.cookies.get(cookie_name(request.url.port))
    user = accounts.of_session(token) if token else None
    return user or of_openid(accounts, _claims(request))


def of_openid(accounts: Accounts, claims: Mapping[str, Any]) -> Account | None:
    """The account under a verified address that has no password, until the login has ended."""
    name = verified_name(claims)
    user = accounts.get(name) if name else None
    if user is None or user.has_password or accounts.has_ended(login_of(claims)):
        return None
    return user


def login_of(claims: Mapping[str, Any]) -> str:
    """One login: a browser that logs in again has another nonce."""
    return json.dumps([claims.get(name) for name in ("iss", "sub", "iat", "nonce")])


def verified_name(claims: Mapping[str, Any]) -> str:
    """An address that nobody verified is nobody's."""
    verified = claims.get("email_verified", True)
    return str(claims.get("email") or "") if verified in (True, "true") else ""


def _claims(request: Request) -> Mapping[str, Any]:
    """What Streamlit's cookie says, as its socket reads it; nothing when it is not of this address.
    Streamlit deletes the cookie at a logout."""
    from streamlit.auth_util import get_cookie_with_chunks
    from streamlit.web.server.server_util import get_cookie_secret
    from streamlit.web.server.starlette.starlette_app_utils import decode_signed_value
    from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME

    def read(name: str) -> bytes | None:
        signed = request.cookies.get(name, "").encode("latin-1", "replace")
        return decode_signed_value(get_cookie_secret(), name, signed)

    if USER_COOKIE_NAME not in request.cookies or not get_cookie_secret():
        return {}
    claims = json.loads(get_cookie_with_chunks(read, USER_COOKIE_NAME) or b"{}")
    here = urlsplit(str(claims.get("origin") or "")).netloc == request.headers.get("host")
    return claims if here and claims.get("is_logged_in") else {}
