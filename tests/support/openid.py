"""A small OpenID Connect provider on loopback that knows one person: discovery, the code flow with
its nonce, and tokens signed with RS256, as the specification asks for; and who logs in there."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.support.page_socket import PageSocket

CLIENT, SECRET = "aurora", "a secret of both sides"
COOKIE_SECRET = "kept by the dashboard, long enough"


@dataclass
class Provider:
    """``claims``: what it says of whoever comes; set it before a login."""

    port: int
    claims: dict[str, Any] = field(default_factory=dict)
    logins: int = 0
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "1"}))
    nonces: dict[str, str | None] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self.configuration),
                Route("/authorize", self.authorize),
                Route("/token", self.token, methods=["POST"]),
                Route("/jwks", self.jwks),
            ]
        )

    async def configuration(self, _: Request) -> Response:
        return JSONResponse(
            {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/authorize",
                "token_endpoint": f"{self.url}/token",
                "jwks_uri": f"{self.url}/jwks",
                "response_types_supported": ["code"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
            }
        )

    async def authorize(self, request: Request) -> Response:
        asked, code = request.query_params, secrets.token_urlsafe()
        assert asked["client_id"] == CLIENT and asked["response_type"] == "code"
        self.nonces[code] = asked.get("nonce")
        back = f"{asked['redirect_uri']}?code={code}&state={asked['state']}"
        return RedirectResponse(back, 302)

    async def token(self, request: Request) -> Response:
        form = await request.form()
        nonce, now = self.nonces.pop(str(form["code"])), int(time.time())
        self.logins += 1
        said = {"iss": self.url, "aud": CLIENT, "sub": "1", "iat": now, "exp": now + 600,
                "nonce": nonce, **self.claims}  # fmt: skip
        signed = jwt.encode({"alg": "RS256", "kid": "1"}, said, self.key)
        return JSONResponse(
            {"access_token": "x", "token_type": "Bearer", "expires_in": 600, "id_token": signed}
        )

    async def jwks(self, _: Request) -> Response:
        return JSONResponse({"keys": [self.key.as_dict(private=False)]})


def set_up(home: Path, provider: Provider) -> None:
    """The dashboard of this data folder asks the provider, at whatever port it listens."""
    path = home / "dashboard" / "secrets.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""[auth]
redirect_uri = "http://127.0.0.1:{{port}}/oauth2callback"
cookie_secret = "{COOKIE_SECRET}"
client_id = "{CLIENT}"
client_secret = "{SECRET}"
server_metadata_url = "{provider.url}/.well-known/openid-configuration"
"""
    )


class Visitor:
    """Somebody's browser, as far as a login needs one: it keeps cookies and goes where it is sent.
    Whatever he asks for, he asks with the cookies that he has then."""

    def __init__(
        self, url: str, provider: Provider, cookies: Mapping[str, str] | None = None
    ) -> None:
        self.url, self._provider = url, provider
        self._http = httpx.Client(
            base_url=url, cookies=dict(cookies or {}), follow_redirects=True, timeout=60
        )

    def log_in(self, email: str, **claims: Any) -> Visitor:
        self._http.get("/_stcore/health")  # gives the cookie against forged requests
        self._provider.claims = {"email": email, "email_verified": True, **claims}
        with self.page() as page:
            button = page.show().buttons["Log in with OpenID Connect"]
            self.follow(page.show(press=button).redirect)
        return self

    def follow(self, redirect: str) -> None:
        answer = self._http.get(redirect)
        assert answer.status_code == 200 and str(answer.url).startswith(self.url)

    def page(self) -> PageSocket:
        return PageSocket(self.url, origin=self.url, cookies=self.cookies)

    @property
    def cookies(self) -> dict[str, str]:
        return dict(self._http.cookies)

    def ask(self, path: str) -> tuple[int, bytes]:
        answer = self._http.get(path)
        return answer.status_code, answer.content

    def close(self) -> None:
        self._http.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def provider() -> Iterator[Provider]:
    made = Provider(_free_port())
    config = uvicorn.Config(made.app(), host="127.0.0.1", port=made.port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield made
    finally:
        server.should_exit = True
        thread.join(10)
