"""What Streamlit's server answers is narrowed to what our pages need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.store.accounts import Account

SESSION, HEALTH, MEDIA = "session", "_stcore/health", "media/"
#: Beside the pages, below the base path. All else of Streamlit's is not there: uploads (files of
#: 200 MB each into memory, by whoever opens the login), counters, components, what agents call.
OPEN = frozenset(
    {
        *("", "index.html", "favicon.png", "manifest.json", HEALTH, "_stcore/host-config"),
        *("auth/login", "auth/logout", "oauth2callback"),  # of OpenID Connect
    }
)
STATIC = "static/"
READ, KEEP = ("GET", "HEAD"), ("POST", "DELETE")


def owned(kind: str, owner: Account, content: bytes) -> str:
    """The media type of a file that only this account gets, and only while it has this role.

    It names the content too: Streamlit tells files of over 1 MB apart by their length, their type
    and parts of them.
    """
    return f"{kind}; for={_key(owner)}.{sha256_bytes(content)}"


def _key(owner: Account) -> str:
    return sha256_bytes(f"{owner.role} {owner.name}".encode())[:32]


class Guard:
    """ASGI middleware: a path, method, host name or origin that no page needs is refused, and so
    is a file that was made for another account than the one that asks."""

    def __init__(
        self,
        app: ASGIApp,
        base: str,
        pages: Iterable[str],
        asker: Callable[[Request], Account | None],
        is_host: Callable[[str | None], bool],
    ) -> None:
        self._app = app
        self._base = f"{base}/"
        self._open = OPEN | frozenset(pages)
        self._asker = asker
        self._is_host = is_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the socket's host and origin are Streamlit's to check
            await self._app(scope, receive, send)
            return
        path = self._inside(scope["path"])
        refusal = self._refusal(Request(scope), path)
        if refusal is not None:
            await refusal(scope, receive, send)
        elif path.startswith(MEDIA):
            answer = _Owned(send, self._asker(Request(scope)))
            await self._app(scope, receive, answer)
        else:
            await self._app(scope, receive, send)

    def _inside(self, path: str) -> str:
        """Below the base path; what is not is no path of ours."""
        if f"{path}/" == self._base:
            return ""
        return path.removeprefix(self._base) if path.startswith(self._base) else "/"

    def _refusal(self, request: Request, path: str) -> PlainTextResponse | None:
        page = path.rstrip("/")
        if not (page in self._open or page == SESSION or path.startswith((STATIC, MEDIA))):
            return PlainTextResponse("not found\n", 404)
        allowed = KEEP if page == SESSION else READ
        if request.method not in allowed:
            return PlainTextResponse("not for this method\n", 405, {"Allow": ", ".join(allowed)})
        if path != HEALTH and not self._is_host(request.headers.get("host")):
            return PlainTextResponse("not under this host name; see --host-name\n", 403)
        if path.startswith(MEDIA) and _is_elsewhere(request.headers):
            return PlainTextResponse("not from the dashboard's page\n", 403)
        return None


def _is_elsewhere(headers: Headers) -> bool:
    origin = urlsplit(headers.get("origin") or "").netloc
    return bool(origin) and origin != headers.get("host")


class _Owned:
    """Sends an answer on unless its file is another's. A picture is everybody's: the login shows
    some too."""

    def __init__(self, send: Send, asker: Account | None) -> None:
        self._send = send
        self._asker = asker
        self._refused = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            kind, _, rest = headers.get("content-type", "").partition("; for=")
            owner, semicolon, more = rest.partition(";")
            owner = owner.partition(".")[0]
            if not kind.startswith("image/"):
                self._refused = not self._may_have(message["status"], owner)
                headers["content-type"] = kind + semicolon + more
        if not self._refused:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._refuse()

    def _may_have(self, status: int, owner: str) -> bool:
        if self._asker is None:
            return False
        return status == 404 or owner == _key(self._asker)

    async def _refuse(self) -> None:
        why = "log in first" if self._asker is None else "made for another account"
        body = f"{why}\n".encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"),
                   (b"content-length", str(len(body)).encode())]  # fmt: skip
        await self._send({"type": "http.response.start", "status": 403, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
