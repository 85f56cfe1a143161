"""A small OpenID Connect provider on loopback that knows one person: discovery, the code flow with
its nonce, and tokens signed with RS256, as the specification asks for."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

CLIENT, SECRET = "aurora", "a secret of both sides"


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


@contextmanager
def provider(port: int) -> Iterator[Provider]:
    made = Provider(port)
    config = uvicorn.Config(made.app(), host="127.0.0.1", port=port, log_level="error")
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
